"""python -m benchmarks.study.losses: a model's losses of both kinds on held-out samples; writes OUTPUT/study.json.

Every model is asked both: the masked tokens each for itself, from [M] in the context, and turn by turn, from [P] behind it,
whatever it was trained for; on the samples and masks with which run_pretrain.py validates.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.study.tasks import RESULT
from data_prep.console import ArgumentParser, progress_bar, run_command
from data_prep.files import write_json
from data_prep.shards import DataSet
from finetune.weights import load_pretrained
from pretrain.batches import Share, validation_batches
from pretrain.layout import Objective
from pretrain.model import PMLM

_SAMPLES, _AT_ONCE = 2048, 32


@torch.no_grad()
def losses_of(model: PMLM, data: DataSet) -> dict[str, float]:
    """Mean losses and accuracies."""
    sums, num_targets = torch.zeros(4, dtype=torch.float64), 0
    batches = validation_batches(data, Objective.AE_PAR, Share(0, 1, _AT_ONCE, 1), _SAMPLES)
    with progress_bar("validate", len(batches), "batch") as bar:
        for _, layout in batches:
            sums += torch.stack([part.double() for part in model(layout)])
            num_targets += layout.num_targets
            bar.update()
    names = ("ae_loss", "par_loss", "ae_accuracy", "par_accuracy")
    return dict(zip(names, (sums / num_targets).tolist(), strict=True))


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.study.losses", description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, metavar="PATH", help="anything finetune.weights opens")
    parser.add_argument("--data", type=Path, required=True, help="data set made by data_prep build")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    args = parser.parse_args()

    def command() -> None:
        torch.set_flush_denormal(True)
        data, pretrained = DataSet(args.data), load_pretrained(args.weights)
        if not pretrained.has_head:
            raise ValueError(f"{args.weights}: has no output layer, so that it predicts nothing")
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / RESULT, {"losses": losses_of(pretrained.model.eval(), data)})
        data.close()

    return run_command(command, parser.prog)


if __name__ == "__main__":
    sys.exit(main())
