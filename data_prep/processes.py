"""Tasks spread over processes: some of this machine, or the ranks of an MPI job.

Tasks are independent, leave their results in files and return a small value for the progress display. Their order is
no one's business, so neither is the number of processes.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any, Protocol, TypeVar

from data_prep.console import USER_ERROR_STATUS, describe_error

_T = TypeVar("_T")
_MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK")
_TASKS_PER_PROCESS = 2  # under way or waiting, so that none idles


class Processes(Protocol):
    """What does the work. Every process of an MPI job calls every method, in the same order."""

    is_main: bool

    def prepare(self, set_up: Callable[..., None], *settings: Any) -> None:
        """Call `set_up(*settings)` once in each process, before the first task."""

    def on_main(self, decide: Callable[[], _T]) -> _T:
        """What `decide` returns in the main process, in all of them; what it raises, too."""

    def run(self, task: Callable[..., _T], arguments: Sequence[tuple[Any, ...]], report: Callable[[_T], None]) -> None:
        """Run the task for each of the arguments; `report` gets each result, in the main process, as it comes."""

    def __enter__(self) -> Processes: ...

    def __exit__(self, *error: object) -> None:
        """Let the processes go."""


def launched_by_mpi() -> bool:
    """Whether this process is one of an MPI job's."""
    return any(name in os.environ for name in _MPI_VARIABLES)


class LocalProcesses:
    """Processes of this machine; with one worker the work is done in this process itself."""

    is_main = True

    def __init__(self, num_workers: int) -> None:
        self._num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def prepare(self, set_up: Callable[..., None], *settings: Any) -> None:
        """See `Processes`."""
        if self._num_workers == 1:
            set_up(*settings)
            return
        self._pool = ProcessPoolExecutor(
            self._num_workers, get_context("spawn"), initializer=_set_up_worker, initargs=(set_up, settings)
        )

    def on_main(self, decide: Callable[[], _T]) -> _T:
        """See `Processes`."""
        return decide()

    def run(self, task: Callable[..., _T], arguments: Sequence[tuple[Any, ...]], report: Callable[[_T], None]) -> None:
        """See `Processes`. Raises what a task raised, and ValueError if a worker process was killed."""
        if not self._pool:
            for words in arguments:
                report(task(*words))
            return
        pending: set[Future[_T]] = set()
        try:
            for words in arguments:
                pending.add(self._submit(task, *words))
                if len(pending) >= _TASKS_PER_PROCESS * self._num_workers:
                    pending = _report_finished(pending, report)
            while pending:
                pending = _report_finished(pending, report)
        except BrokenProcessPool:
            raise ValueError(
                "a worker process was killed, for example for want of memory; the same command with fewer --workers goes on"
            ) from None

    def _submit(self, task: Callable[..., _T], *words: Any) -> Future[_T]:
        """Submit a task; a process started for it inherits that Ctrl-C, which ends them all, is for the parent."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return self._pool.submit(task, *words)  # type: ignore[union-attr]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})

    def __enter__(self) -> LocalProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)


def _report_finished(pending: set[Future[_T]], report: Callable[[_T], None]) -> set[Future[_T]]:
    finished, still_pending = wait(pending, return_when=FIRST_COMPLETED)
    for future in finished:
        report(future.result())
    return still_pending


def _set_up_worker(set_up: Callable[..., None], settings: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    set_up(*settings)


def _end_with_parent() -> None:
    parent = parent_process()
    if parent:
        parent.join()
        os._exit(1)


class MPIProcesses:
    """The ranks of an MPI job, each of which works; rank r takes the tasks r, r + size, ..."""

    def __init__(self) -> None:
        from mpi4py import MPI  # here, because it initialises MPI

        self._comm = MPI.COMM_WORLD
        self.is_main = self._comm.rank == 0

    def prepare(self, set_up: Callable[..., None], *settings: Any) -> None:
        """See `Processes`."""
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
            raise failure
        return value  # type: ignore[no-any-return]

    def run(self, task: Callable[..., _T], arguments: Sequence[tuple[Any, ...]], report: Callable[[_T], None]) -> None:
        """See `Processes`. A task that fails on one rank ends the whole job, with the reason and status 2."""
        num_unreported = len(arguments)
        for words in arguments[self._comm.rank :: self._comm.size]:
            try:
                result = task(*words)
            except (ValueError, OSError) as error:
                print(f"rank {self._comm.rank}: error: {describe_error(error)}", file=sys.stderr, flush=True)
                self._comm.Abort(USER_ERROR_STATUS)
            if not self.is_main:
                self._comm.send(result, dest=0)
                continue
            report(result)
            num_unreported -= 1
            while self._comm.iprobe():
                report(self._comm.recv())
                num_unreported -= 1
        for _ in range(num_unreported if self.is_main else 0):
            report(self._comm.recv())
        self._comm.barrier()

    def __enter__(self) -> MPIProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        pass
