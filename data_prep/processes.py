"""Tasks spread over processes: some of this machine, or the ranks of an MPI job.

Tasks are independent, leave their results in files and return what they did, for the progress display. Their order is
no one's business, so neither is the number of processes.

Each process logs to a file of its own, line by line, when it starts and finishes a task, and the traceback of what fails:
the last line of one that was killed tells what it was doing.
"""

from __future__ import annotations

import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_prep.console import USER_ERROR_STATUS, describe_error
from data_prep.memory import keep_freed_memory
from data_prep.progress import Progress, Stage, Work

_T = TypeVar("_T")
Task = Callable[..., Work]
Report = Callable[[Work], object]
LOGS = "logs"  # in the folder that is being made
_TASKS_PER_PROCESS = 2  # under way or waiting, so that none idles
_MAX_PAUSE_S = 0.01
_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
_log.propagate = False
_log.addHandler(logging.NullHandler())


class Processes(Protocol):
    """What does the work. Every process of an MPI job calls every method, in the same order."""

    is_main: bool

    def prepare(self, set_up: Callable[..., None], *settings: Any, log_folder: Path | None = None) -> None:
        """Call `set_up(*settings)` once in each process, before the first task; from then on each has its log."""

    def on_main(self, decide: Callable[[], _T]) -> _T:
        """What `decide` returns in the main process, in all of them; what it raises, too."""

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], stage: Stage, report: Report = lambda work: None
    ) -> None:
        """Run the task for each of the arguments; `report` gets what each has done, in the main process, as it comes."""

    def __enter__(self) -> Processes: ...

    def __exit__(self, *error: Any) -> None:
        """Let the processes go."""


# ---- one process


class _LogFile(logging.Handler):
    """Lines go to the file as they come, behind those of earlier runs; a full disk is told by those who write data."""

    def __init__(self, folder: Path, process: str) -> None:
        super().__init__()
        kind, *number = process.split()
        path = folder / ("-".join([kind, *(f"{int(digits):04d}" for digits in number)]) + ".log")
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self.setFormatter(
            logging.Formatter(f"%(asctime)s {socket.gethostname()} %(process)d %(levelname)s %(message)s")
        )

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(self._file, f"{self.format(record)}\n".encode("utf-8", "backslashreplace"))
        except OSError:
            return

    def close(self) -> None:
        os.close(self._file)
        super().close()


def _begin(log_folder: Path | None, process: str) -> None:
    """What each process does first."""
    keep_freed_memory()
    _load_numba_without_scipy()
    if log_folder:
        _log.addHandler(_LogFile(log_folder, process))
        _log.info("%s: %s", process, " ".join(sys.argv))


def _load_numba_without_scipy() -> None:
    """numba's first call would load SciPy's linear algebra, where it is installed, for functions that nothing here uses: a
    tenth of a second of each process."""
    module = "scipy.linalg"
    if module in sys.modules:
        return
    sys.modules[module] = None  # type: ignore[assignment]  # "there is none"
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        del sys.modules[module]


def _close_log(error: BaseException | None) -> None:
    if error:
        _log.error("ended by %s", type(error).__name__, exc_info=error)
    for handler in [handler for handler in _log.handlers if isinstance(handler, _LogFile)]:
        _log.removeHandler(handler)
        handler.close()


def _perform(task: Task, words: tuple[Any, ...], stage: Stage, process: str) -> Work:
    told = " ".join(text for text in map(str, words) if not text.startswith("<"))  # what has no text of its own
    what = f"{stage.name} {told:.120}"
    _log.info("started %s", what)
    started = time.perf_counter()
    work = replace(task(*words), process=process, seconds=time.perf_counter() - started)
    counts = f"{work.size} {stage.unit}, {work.documents} documents, {work.tokens} tokens"
    _log.info("finished %s: %s, %.3f s", what, counts, work.seconds)
    return work


# ---- processes of this machine


class LocalProcesses:
    """Processes of this machine; with one worker the work is done in this process itself."""

    is_main = True

    def __init__(self, num_workers: int, *, shows_progress: bool = False) -> None:
        self._names = [f"worker {number}" for number in range(num_workers)] if num_workers > 1 else ["main"]
        self._shows_progress = shows_progress
        self._log_folder: Path | None = None
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, set_up: Callable[..., None], *settings: Any, log_folder: Path | None = None) -> None:
        """See `Processes`."""
        self._log_folder = log_folder
        if log_folder:
            log_folder.mkdir(parents=True, exist_ok=True)
        _begin(log_folder, "main")
        if len(self._names) == 1:
            set_up(*settings)
            return
        fork = get_context("fork")  # a process started anew would import all of this for half a second
        self._pool = ProcessPoolExecutor(
            len(self._names), fork, _set_up_worker, (self._names, fork.Value("i", 0), log_folder, set_up, settings)
        )
        self._submit(os.getpid)  # forks all of them, while there are no threads here

    def on_main(self, decide: Callable[[], _T]) -> _T:
        """See `Processes`."""
        return decide()

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], stage: Stage, report: Report = lambda work: None
    ) -> None:
        """See `Processes`. Raises what a task raised, and ValueError if a worker process was killed."""
        with Progress(stage, self._names, is_shown=self._shows_progress) as progress:
            for work in self._done(task, arguments, stage):
                report(work)
                progress.add(work)

    def _done(self, task: Task, arguments: Sequence[tuple[Any, ...]], stage: Stage) -> Iterator[Work]:
        if not self._pool:
            for words in arguments:
                yield _perform(task, words, stage, self._names[0])
            return
        pending: set[Future[Work]] = set()
        try:
            for words in arguments:
                pending.add(self._submit(_perform_in_worker, task, words, stage))
                if len(pending) >= _TASKS_PER_PROCESS * len(self._names):
                    finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in finished)
            yield from (future.result() for future in as_completed(pending))
        except BrokenProcessPool:
            where = f"; the last lines of {self._log_folder}/*.log tell what it was doing" if self._log_folder else ""
            raise ValueError(
                "a worker process was killed, for example for want of memory: the same command with fewer --workers "
                f"goes on{where}"
            ) from None

    def _submit(self, function: Callable[..., _T], *words: Any) -> Future[_T]:
        """Have a worker call it; a process started for it inherits that Ctrl-C, which ends them all, is for the parent."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(function, *words)  # type: ignore[union-attr]
        except OSError as error:
            if error.errno is None:  # "handle is closed": the pool is just finding out that it is broken
                raise BrokenProcessPool from error
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        _close_log(error)


_worker_name: str  # set once in each worker process
_worker_failure: Exception | None = None


def _set_up_worker(
    names: list[str], num_started: Any, log_folder: Path | None, set_up: Callable[..., None], settings: tuple[Any, ...]
) -> None:
    global _worker_name, _worker_failure
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with num_started.get_lock():
        _worker_name = names[num_started.value]
        num_started.value += 1
    try:
        _close_log(None)  # the parent's
        _begin(log_folder, _worker_name)
        set_up(*settings)
    except Exception as error:  # the pool would only say that it is broken: the first task tells why
        _worker_failure = error


def _perform_in_worker(task: Task, words: tuple[Any, ...], stage: Stage) -> Work:
    try:
        if _worker_failure:
            raise _worker_failure
        return _perform(task, words, stage, _worker_name)
    except BaseException as error:
        _log.error("failed by %s", type(error).__name__, exc_info=error)
        raise


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


# ---- ranks of an MPI job


def num_launched() -> int:
    """Processes that mpirun or srun has started together with this one, itself included; 1 without a launcher."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return int(next((os.environ[name] for name in names if name in os.environ), 1))


def launched_by_mpi() -> bool:
    """Whether this process is one of the ranks of an MPI job.

    Raises ValueError for one of several that srun has started without MPI: each would do the whole work.
    """
    if num_launched() == 1:
        return False
    if not any(name.startswith(("OMPI_COMM_WORLD_", "PMI_", "PMIX_RANK")) for name in os.environ):
        if os.environ.get("SLURM_PROCID") != "0":
            raise SystemExit(USER_ERROR_STATUS)  # process 0 tells why
        raise ValueError(
            f"srun has started {num_launched()} processes without MPI, which would all do the same work: "
            "srun --mpi=pmix (or another of srun --mpi=list that mpi4py's MPI library knows)"
        )
    return True


# Beside each rank, to tell of its death, which neither MPI nor srun does: mpirun ends the others, here a rank of srun does.
_WATCH = """
while read -r line; do last=$line; done
[ "$last" = done ] && exit
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-$SLURM_PROCID}}}
echo "rank $rank: error: was killed, for example for want of memory${last:+; the last lines of $last/*.log tell what it was doing}" >&2
[ -n "$OMPI_COMM_WORLD_SIZE" ] || [ -z "$SLURM_STEP_ID" ] || exec scancel "$SLURM_JOB_ID.$SLURM_STEP_ID"
"""


class MPIProcesses:
    """The ranks of an MPI job, each of which works.

    Rank 0 hands out the tasks one by one, in a thread beside its own work, to whoever asks for the next: a slow host does
    fewer, and no rank waits for another but at the end of a stage. Messages are that request, with what was done since the
    last one, and the number of a task.
    """

    def __init__(self, *, shows_progress: bool = False) -> None:
        self._watcher = subprocess.Popen(
            ["sh", "-c", _WATCH], stdin=subprocess.PIPE, text=True, errors="surrogateescape"
        )
        try:
            self._start_mpi()
        except ValueError:
            self._watcher.communicate("done\n")
            raise
        self.is_main = self._comm.rank == 0
        self._name = f"rank {self._comm.rank}"
        self._shows_progress = shows_progress
        self._has_failed_everywhere = False

    def _start_mpi(self) -> None:
        from mpi4py import MPI  # here, because it initialises MPI

        self._comm, self._status = MPI.COMM_WORLD, MPI.Status()
        if self._comm.size == 1 < num_launched():
            raise ValueError(
                f"{num_launched()} processes were started, but MPI knows of one: mpi4py has found another MPI library "
                f"({MPI.Get_library_version().splitlines()[0]}) than that of the launcher; under Slurm: srun --mpi=pmix"
            )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise ValueError(
                "this MPI library allows no calls from a thread (it grants less than MPI_THREAD_SERIALIZED)"
            )

    def prepare(self, set_up: Callable[..., None], *settings: Any, log_folder: Path | None = None) -> None:
        """See `Processes`."""
        if log_folder:
            self._watcher.stdin.write(f"{log_folder}\n")  # type: ignore[union-attr]
            self._watcher.stdin.flush()  # type: ignore[union-attr]
            self.on_main(lambda: log_folder.mkdir(parents=True, exist_ok=True))
        _begin(log_folder, self._name)
        set_up(*settings)

    def on_main(self, decide: Callable[[], _T]) -> _T:
        """See `Processes`."""
        outcome: tuple[_T | None, Exception | None] = (None, None)
        if self.is_main:
            try:
                outcome = (decide(), None)
            except (ValueError, OSError) as error:
                outcome = (None, error)
        value, failure = self._comm.bcast(outcome)
        if failure:
            self._has_failed_everywhere = True
            raise failure
        return value  # type: ignore[no-any-return]

    def run(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], stage: Stage, report: Report = lambda work: None
    ) -> None:
        """See `Processes`. A task that fails on one rank ends the whole job, with the reason."""
        if self.is_main:
            self._work_and_hand_out(task, arguments, stage, report)
        else:
            self._work(task, arguments, stage)
        self._comm.barrier()

    def _work(self, task: Task, arguments: Sequence[tuple[Any, ...]], stage: Stage) -> None:
        done: Work | None = None
        while True:
            self._comm.send(done, dest=0)
            number = self._comm.recv(source=0)
            if number is None:
                return
            done = _perform(task, arguments[number], stage, self._name)

    def _work_and_hand_out(
        self, task: Task, arguments: Sequence[tuple[Any, ...]], stage: Stage, report: Report
    ) -> None:
        todo = iter(range(len(arguments)))
        lock = threading.Lock()

        def take() -> int | None:
            with lock:
                return next(todo, None)

        def record(work: Work) -> None:
            with lock:
                report(work)
            progress.add(work)

        def hand_out() -> None:
            num_working, pause_s = self._comm.size - 1, 0.0
            while num_working:
                if not self._comm.iprobe(status=self._status):  # MPI's own waiting takes a whole core
                    pause_s = min(pause_s + _MAX_PAUSE_S / 10, _MAX_PAUSE_S)
                    time.sleep(pause_s)
                    continue
                pause_s = 0.0
                rank = self._status.Get_source()
                if work := self._comm.recv(source=rank):
                    record(work)
                number = take()
                self._comm.send(number, dest=rank)
                num_working -= number is None

        names = [f"rank {rank}" for rank in range(self._comm.size)]
        with Progress(stage, names, is_shown=self._shows_progress) as progress:
            thread = threading.Thread(target=self._end_if_it_fails, args=(hand_out,), daemon=True)
            thread.start()
            while (number := take()) is not None:
                record(_perform(task, arguments[number], stage, self._name))
            thread.join()

    def _end_if_it_fails(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._end(error)

    def _end(self, error: BaseException) -> None:
        """End the job because of what only this rank knows."""
        is_users = isinstance(error, (ValueError, OSError))
        reason = describe_error(error) if is_users else "".join(traceback.format_exception(error))
        print(f"{self._name}: error: {reason}", file=sys.stderr, flush=True)
        _close_log(error)
        self._watcher.communicate("done\n")
        self._comm.Abort(USER_ERROR_STATUS if is_users else 1)

    def __enter__(self) -> MPIProcesses:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error and not self._has_failed_everywhere:
            self._end(error)
        _close_log(error)
        self._watcher.communicate("done\n")
        if error and not self.is_main:
            raise SystemExit(USER_ERROR_STATUS) from None  # the main process tells why
