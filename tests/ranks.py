"""Processes that act as the ranks of a job, started once for all tests that need some."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

from support import free_port


class Ranks:
    """Call one, as `ranks(function, *arguments)`: each process calls `function(rank, *arguments)`.

    What fails in one is raised here; the processes are ended then, and new ones started at the next call. They have
    joined each other already (`pretrain.engine.init_distributed`).
    """

    def __init__(self, world_size: int, timeout_s: float = 300) -> None:
        self._world_size, self._timeout_s = world_size, timeout_s
        self._ranks: list[tuple[Any, Connection]] = []

    def __call__(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._ranks:
            self._start()
        for _, connection in self._ranks:
            connection.send((function, arguments))
        pending = [connection for _, connection in self._ranks]
        while pending:
            finished = wait(pending, self._timeout_s)
            failure = None if finished else "the ranks wait for each other"
            for connection in finished:
                pending.remove(connection)  # type: ignore[arg-type]
                failure = failure or _answer(connection)  # type: ignore[arg-type]
            if failure:
                self.end()
                raise AssertionError(failure)

    def _start(self) -> None:
        context, port = get_context("spawn"), free_port()
        for rank in range(self._world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self._world_size, port, there), daemon=True)
            process.start()
            there.close()
            self._ranks.append((process, here))

    def end(self) -> None:
        """End the processes."""
        for process, _ in self._ranks:
            process.kill()
            process.join()
        self._ranks = []


def _answer(connection: Connection) -> str | None:
    try:
        return connection.recv()  # type: ignore[no-any-return]
    except EOFError:
        return "a rank died"


def _serve(rank: int, world_size: int, port: int, connection: Connection) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    from pretrain.engine import init_distributed

    init_distributed()
    while True:
        function, arguments = connection.recv()
        try:
            function(rank, *arguments)
            connection.send(None)
        except BaseException:
            connection.send(f"rank {rank}: {traceback.format_exc()}")
