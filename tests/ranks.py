"""Processes that act as the ranks of a job, started once for all tests that need some."""

from __future__ import annotations

import io
import os
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

from support import PATIENCE_S, free_port


class Ranks:
    """Call one, as `ranks(function, *arguments)`: each process calls `function(rank, *arguments)`.

    What fails in one is raised here; the processes are ended then, and new ones started at the next call. They have
    joined each other already (`pretrain.distributed.join_ranks`).
    """

    def __init__(self, world_size: int, timeout_s: float = 2 * PATIENCE_S, *, is_joined: bool = True) -> None:
        """Without `is_joined` they have only imported what training needs, for functions that call `in_child`."""
        self._world_size, self._timeout_s, self._is_joined = world_size, timeout_s, is_joined
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
            process = context.Process(
                target=_serve, args=(rank, self._world_size, port, there, self._is_joined), daemon=True
            )
            with mock.patch.dict(os.environ):
                os.environ.pop("PYTEST_CURRENT_TEST", None)  # they are no test's own, see kill_left_processes
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


def _serve(rank: int, world_size: int, port: int, connection: Connection, is_joined: bool) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    from any_precision import allow_every_precision

    from pretrain import train  # noqa: F401 (what training needs: loaded once, not in each child)
    from pretrain.distributed import join_ranks

    allow_every_precision()
    if is_joined:
        join_ranks()
    while True:
        function, arguments = connection.recv()
        try:
            function(rank, *arguments)
            connection.send(None)
        except BaseException:
            connection.send(f"rank {rank}: {traceback.format_exc()}")


def in_child(function: Callable[..., None], *arguments: Any) -> None:
    """Call it in a fork, as no process can join ranks of another number after it has had an engine."""
    child = os.fork()
    if child:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    status = 1
    try:
        function(*arguments)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def train_tiny(world_size: int, port: int, flags: list[str], model_class: type | None = None) -> None:
    """A whole run of a tiny model, without dropout and with a record a step; what it says goes to RUN/console.txt, a user's
    error too. `model_class`: a test's own, with a fault."""
    from pretrain import train
    from pretrain.config import check_inputs, make_parser

    os.environ |= {"WORLD_SIZE": str(world_size), "MASTER_PORT": str(port)}
    always = [
        "--model", "tiny", "--hidden_size", "32", "--intermediate_size", "64", "--dropout", "0", "--log_every_steps", "1",
        "--validate_every_steps", "100", "--validation_samples", "25",  # so that two ranks have an odd number of batches
    ]  # fmt: skip
    args = make_parser("", "").parse_args([*always, *flags])
    console = io.StringIO()
    with mock.patch.object(train, "PMLM", model_class) if model_class else nullcontext():
        try:
            train.train(check_inputs(args, world_size, device=None), console)
        except ValueError as error:
            print(f"error: {error}", file=console)
    if os.environ["RANK"] == "0":
        with open(args.run / "console.txt", "a") as file:
            file.write(console.getvalue())
