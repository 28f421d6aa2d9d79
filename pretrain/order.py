"""The run's position in the global order of samples: which samples the coming steps take, and which are skipped."""

from __future__ import annotations

from typing import Any


class Cursor:
    """The position of a run in its data, the only owner of that rule.

    A position counts the samples of the global order (`pretrain.batches.SampleOrder`) from the start of the run. Skipped
    ranges begin where a step began, and all steps take equally many samples, so a step never reaches into one.
    """

    def __init__(self, batch_samples: int, state: dict[str, Any] | None = None) -> None:
        """Create the cursor of a run whose steps take `batch_samples` each, at its start or where `state_dict` was called."""
        self._batch_samples = batch_samples
        self.samples_consumed: int = state["samples_consumed"] if state else 0
        """The position after the last step."""
        self.skipped: list[range] = [range(first, stop) for first, stop in state["skipped"]] if state else []
        """Positions that the run does not take, in the order in which they were skipped."""

    def next(self) -> range:
        """Return the positions of the coming step's samples, and move to their end."""
        while skipped := next((positions for positions in self.skipped if self.samples_consumed in positions), None):
            self.samples_consumed = skipped.stop
        positions = range(self.samples_consumed, self.samples_consumed + self._batch_samples)
        self.samples_consumed = positions.stop
        return positions

    def skip(self, positions: range) -> None:
        """Never take these positions again, which begin where a step began."""
        self.skipped.append(positions)

    def rewind(self, earlier: Cursor) -> None:
        """Move to where an earlier cursor of the same run is; what has been skipped since stays skipped."""
        self.samples_consumed = earlier.samples_consumed
        self.skipped = earlier.skipped + [positions for positions in self.skipped if positions not in earlier.skipped]

    def copy(self) -> Cursor:
        """Return a cursor at the same position, which moves by itself."""
        return Cursor(self._batch_samples, self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return what the constructor needs to go on from here, in JSON's types."""
        skipped = [[positions.start, positions.stop] for positions in self.skipped]
        return {"samples_consumed": self.samples_consumed, "skipped": skipped}
