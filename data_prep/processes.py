"""Tasks spread over processes: some of this machine, or the ranks of an MPI job.

One process, the conductor, decides what is to be done and hands the tasks out, in chunks, to an executor: that of
`concurrent.futures` on one machine, that of `mpi4py.futures` over the ranks that mpirun or srun has started. There rank 0
conducts and the other ranks work. Tasks are independent, leave their results in files and return what they did.

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
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from data_prep.console import USER_ERROR_STATUS, available_cores, describe_error
from data_prep.memory import keep_freed_memory
from data_prep.progress import Progress, Stage, Work

Task = Callable[..., Work]
Report = Callable[[Work], object]
LOGS = "logs"  # in the folder that is being made
PROCESSES_PER_CORE = 2
"""At most so many are started: more would not be faster, and each takes some hundred MB."""
_CHUNKS_PER_PROCESS = 2  # under way or waiting, so that none idles
_CHUNK_S = 0.1
"""Seconds of work in a chunk, where tasks are shorter: handing it out takes about a millisecond."""
_MAX_CHUNK_TASKS = 16
_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)
_log.propagate = False
_log.addHandler(logging.NullHandler())


# ---- one process


class _LogFile(logging.Handler):
    """A log that is written line by line, after the lines of earlier runs. A full disk is reported by what writes data."""

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


@dataclass(frozen=True)
class _Setting:
    """What a process needs before its first task. It travels with each chunk, so that no process has to be told in time."""

    set_up: Callable[..., object]
    words: tuple[Any, ...]
    log_folder: Path | None
    number: int = field(default_factory=count(1).__next__)


_name = "main"  # of this process
_setting_number = 0  # of the setting that this process has
_watcher: subprocess.Popen[str] | None = None  # of this rank of an MPI job


def _begin(log_folder: Path | None) -> None:
    """Make this process ready, and open its log in place of an earlier one."""
    keep_freed_memory()
    _load_numba_without_scipy()
    _close_log(None)
    if not log_folder:
        return
    log_folder.mkdir(parents=True, exist_ok=True)
    _log.addHandler(_LogFile(log_folder, _name))
    _log.info("%s: %s", _name, " ".join(sys.argv))
    if _watcher:
        _watcher.stdin.write(f"{log_folder}\n")  # type: ignore[union-attr]
        _watcher.stdin.flush()  # type: ignore[union-attr]


def _load_numba_without_scipy() -> None:
    """Load numba without SciPy's linear algebra, which its first call would import, if it is installed, for functions that
    nothing here uses: a tenth of a second of each process."""
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


def _set_up(setting: _Setting) -> None:
    global _setting_number
    setting.set_up(*setting.words)
    _setting_number = setting.number


def _perform(task: Task, words: tuple[Any, ...], stage: Stage) -> Work:
    told = [str(word) for word in words if isinstance(word, int) or "__str__" in vars(type(word))]  # not lists of many
    what = f"{stage.name} {' '.join(told):.120}"
    _log.info("started %s", what)
    started = time.perf_counter()
    work = replace(task(*words), process=_name, seconds=time.perf_counter() - started)
    counts = f"{work.size} {stage.unit}, {work.documents} documents, {work.tokens} tokens"
    _log.info("finished %s: %s, %.3f s", what, counts, work.seconds)
    return work


def _perform_chunk(setting: _Setting, task: Task, chunk: list[tuple[Any, ...]], stage: Stage) -> list[Work]:
    """Perform tasks in a process that works for another."""
    try:
        if setting.number != _setting_number:
            _begin(setting.log_folder)
            _set_up(setting)
        return [_perform(task, words, stage) for words in chunk]
    except BaseException as error:
        _log.error("failed by %s", type(error).__name__, exc_info=error)
        error.add_note(_name)
        raise


# ---- the conductor


class Processes:
    """The conductor's side of the processes that work. Where it is the only one it does the work itself."""

    def __init__(self, max_workers: int, *, shows_progress: bool) -> None:
        self._max_workers = max_workers
        self._shows_progress = shows_progress
        self._setting = _Setting(int, (), None)
        self._pending: set[Future[list[Work]]] = set()

    def prepare(self, set_up: Callable[..., object], *words: Any, log_folder: Path | None = None) -> None:
        """From now on call `set_up(*words)` once in each process, before its first task, and log in `log_folder`."""
        self._setting = _Setting(set_up, words, log_folder)
        _begin(log_folder)

    def run(
        self, task: Task, arguments: Iterable[tuple[Any, ...]], stage: Stage, report: Report = lambda work: None
    ) -> None:
        """Run the task for each of the arguments, which are taken as they are needed; `report` gets what each has done.

        Raises what a task raised, and ValueError if a worker process was killed.
        """
        todo = iter(arguments)
        first = list(islice(todo, self._max_workers))
        executor, names = self._start(len(first))
        with Progress(stage, names, is_shown=self._shows_progress) as progress:
            for work in self._works(executor, len(names), task, chain(first, todo), stage):
                report(work)
                progress.add(work)

    def _works(
        self, executor: Executor | None, num_workers: int, task: Task, todo: Iterator[tuple[Any, ...]], stage: Stage
    ) -> Iterator[Work]:
        if not executor:
            for words in todo:
                if self._setting.number != _setting_number:
                    _set_up(self._setting)
                yield _perform(task, words, stage)
            return
        chunk_tasks = 1
        while True:
            while len(self._pending) < _CHUNKS_PER_PROCESS * num_workers and (chunk := list(islice(todo, chunk_tasks))):
                self._pending.add(executor.submit(_perform_chunk, self._setting, task, chunk, stage))
            if not self._pending:
                return
            finished, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
            works = [work for future in finished for work in future.result()]
            yield from works
            task_s = sum(work.seconds for work in works) / len(works)
            chunk_tasks = min(_MAX_CHUNK_TASKS, max(1, int(_CHUNK_S / max(task_s, 1e-6))))

    def _start(self, num_tasks: int) -> tuple[Executor | None, list[str]]:
        """Return an executor of as many processes as there are tasks for, and their names; None: do it here."""
        raise NotImplementedError


# ---- processes of this machine


class LocalProcesses(Processes):
    """Processes of this machine, never more than two for each of its cores, nor than a stage has tasks; one worker is this
    process itself."""

    def __init__(self, num_workers: int, *, shows_progress: bool = False) -> None:
        super().__init__(min(num_workers, PROCESSES_PER_CORE * available_cores()), shows_progress=shows_progress)
        self._pool: ProcessPoolExecutor | None = None
        self._names = ["main"]

    def _start(self, num_tasks: int) -> tuple[Executor | None, list[str]]:
        if self._max_workers > 1 and num_tasks > (len(self._names) if self._pool else 0):
            if self._pool:
                self._pool.shutdown()
            fork = get_context("fork")  # a process started anew would import all of this for half a second
            self._pool = ProcessPoolExecutor(num_tasks, fork, _begin_worker, (fork.Value("i", 0),))
            self._names = [f"worker {number}" for number in range(num_tasks)]
            # Workers inherit that Ctrl-C, which ends them all, is for this process.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._pool.submit(os.getpid)  # forks all of them, while there are no threads here
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return self._pool, self._names

    def _works(self, executor: Executor | None, *words: Any) -> Iterator[Work]:
        try:
            yield from super()._works(executor, *words)
        except (BrokenProcessPool, OSError) as error:
            # "handle is closed", which no task says: the pool is just finding out that it is broken
            is_from_task = not executor or hasattr(error, "__notes__")
            if isinstance(error, OSError) and (is_from_task or error.errno is not None):
                raise
            folder = self._setting.log_folder
            where = f"; the last lines of {folder}/*.log tell what it was doing" if folder else ""
            raise ValueError(
                "a worker process was killed, for example for want of memory: the same command with fewer --workers "
                f"goes on{where}"
            ) from None

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)
        _close_log(error)


def _begin_worker(num_started: Any) -> None:
    global _name, _setting_number
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _close_log(None)  # the parent's
    with num_started.get_lock():
        _name, _setting_number = f"worker {num_started.value}", 0
        num_started.value += 1


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


# ---- ranks of an MPI job


def num_launched() -> int:
    """Return how many processes mpirun or srun has started together with this one, itself included; 1 without them."""
    names = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return int(next((os.environ[name] for name in names if name in os.environ), 1))


def launched_by_mpi() -> bool:
    """Return whether this process is one of the ranks of an MPI job.

    Raises ValueError for one of several that srun has started without MPI: each would do all of the work.
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


# A process next to each rank that tells of its death, which neither MPI nor srun does. mpirun then ends the other ranks;
# under srun this process does.
_WATCH = """
while read -r line; do last=$line; done
[ "$last" = done ] && exit
rank=${OMPI_COMM_WORLD_RANK:-${PMIX_RANK:-${PMI_RANK:-$SLURM_PROCID}}}
echo "rank $rank: error: was killed, for example for want of memory${last:+; the last lines of $last/*.log tell what it was doing}" >&2
[ -n "$OMPI_COMM_WORLD_SIZE" ] || [ -z "$SLURM_STEP_ID" ] || exec scancel "$SLURM_JOB_ID.$SLURM_STEP_ID"
"""


class MPIProcesses(Processes):
    """The ranks of an MPI job: rank 0 conducts, the others work.

    In a `with` statement rank 0 gets this object; for the other ranks the statement begins with all of their work, and then
    gives None. A slow host does fewer tasks than a fast one, and no rank waits for another but at the end of a stage.
    """

    def __init__(self, *, shows_progress: bool = False) -> None:
        global _name, _watcher
        _watcher = subprocess.Popen(["sh", "-c", _WATCH], stdin=subprocess.PIPE, text=True, errors="surrogateescape")
        try:
            self._start_mpi()
        except ValueError:
            _watcher.communicate("done\n")
            raise
        _name = f"rank {self._comm.rank}"
        super().__init__(self._comm.size - 1, shows_progress=shows_progress)

    def _start_mpi(self) -> None:
        from mpi4py import MPI  # here, because it initialises MPI
        from mpi4py.futures import MPICommExecutor

        self._comm = MPI.COMM_WORLD
        if self._comm.size == 1 < num_launched():
            raise ValueError(
                f"{num_launched()} processes were started, but MPI knows of one: mpi4py has found another MPI library "
                f"({MPI.Get_library_version().splitlines()[0]}) than that of the launcher; under Slurm: srun --mpi=pmix"
            )
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise ValueError(
                "this MPI library allows no calls from a thread (it grants less than MPI_THREAD_SERIALIZED)"
            )
        self._ranks = MPICommExecutor(self._comm)

    def _start(self, num_tasks: int) -> tuple[Executor | None, list[str]]:
        return self._executor, [f"rank {rank}" for rank in range(1, self._comm.size)]

    def _end(self, error: BaseException) -> None:
        """End the job at once, whatever the other ranks are doing."""
        is_users = isinstance(error, (ValueError, OSError))
        reason = describe_error(error) if is_users else "".join(traceback.format_exception(error))
        print(f"{getattr(error, '__notes__', [_name])[0]}: error: {reason}", file=sys.stderr, flush=True)
        _close_log(error)
        _watcher.communicate("done\n")  # type: ignore[union-attr]
        self._comm.Abort(USER_ERROR_STATUS if is_users else 1)

    def __enter__(self) -> MPIProcesses | None:
        self._executor: Any = self._ranks.__enter__()
        return self if self._executor else None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error and self._pending:
            self._end(error)
        self._ranks.__exit__(kind, error, trace)
        _close_log(error)
        _watcher.communicate("done\n")  # type: ignore[union-attr]
