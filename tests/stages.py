"""Builds in this process to which something happens at a stage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_prep.processes import LocalProcesses
from data_prep.progress import Stage, Work


class Disturbed(LocalProcesses):
    """Something happens to the input before a stage."""

    def __init__(self, stage: str, disturb: Callable[[], object]) -> None:
        super().__init__(1)
        self._stage, self._disturb = stage, disturb

    def run(self, task: Any, arguments: Any, stage: Stage, *report: Any) -> None:
        if stage.name == self._stage:
            self._disturb()
        super().run(task, arguments, stage, *report)


class Interrupted(LocalProcesses):
    """Ctrl-C comes when so many tasks are done, of any stage or of the one that is named."""

    def __init__(self, num_tasks: int, stage: str | None = None) -> None:
        super().__init__(1)
        self._num_tasks, self._stage = num_tasks, stage

    def run(
        self, task: Any, arguments: Any, stage: Stage, report: Callable[[Work], object] = lambda work: None
    ) -> None:
        def count(work: Work) -> None:
            report(work)
            self._num_tasks -= self._stage in (None, stage.name)
            if self._num_tasks < 0:
                raise KeyboardInterrupt

        super().run(task, arguments, stage, count)
