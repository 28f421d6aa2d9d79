"""python -m benchmarks.precision: whether the precision that "auto" takes on this machine is the fastest.

Times training steps (forward and backward pass) of two models, and a matrix product, in each precision in turn. Prints a
table, writes precision.json. Run it with nothing else running. Exit status 1 if a step in another precision is faster than
in the chosen one by more than a tenth.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.text import Text
from benchmarks.train_step import Step, interleaved_seconds, pmlm_step
from data_prep.console import ArgumentParser, progress_bar
from data_prep.files import write_json
from pretrain.device import Precision, device_name, speeds
from pretrain.layout import Objective, pseudo_masked_layout
from pretrain.model import PMLM, PMLMConfig

_DTYPES: dict[Precision, torch.dtype] = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_LENGTH_TOKENS, _NUM_SAMPLES, _VOCAB_SIZE = 128, 4, 8000
_MODELS = {
    "a step of tiny": PMLMConfig.of_size("tiny", vocab_size=_VOCAB_SIZE),
    "a step of small with 2 layers": PMLMConfig.of_size("small", vocab_size=_VOCAB_SIZE, num_layers=2, dropout=0.0),
}
_PRODUCT = (512, 768, 3072)
_TOLERANCE = 1.1


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--repetitions", type=int, default=7, help="times that each is measured; the median counts")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    args = parser.parse_args()
    torch.set_flush_denormal(True)
    found = speeds()
    chosen = found.precisions[0]
    medians: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Text(Path("sample_corpus"), Path(folder))
        with progress_bar(
            "precision", (len(_MODELS) + 1) * len(_DTYPES) * (args.repetitions + 1), "measurement"
        ) as bar:
            for name in (*_MODELS, "a product"):
                steps: dict[str, Step] = {precision: _step(name, dtype, text) for precision, dtype in _DTYPES.items()}
                seconds = interleaved_seconds(steps, args.repetitions, bar.update)
                medians[name] = {precision: statistics.median(of) for precision, of in seconds.items()}
    slower = [name for name in _MODELS if medians[name][chosen] > _TOLERANCE * min(medians[name].values())]
    print(f"{device_name()}, {torch.get_num_threads()} threads: auto is {chosen} ({found.reason})\n")
    print(f"| milliseconds | {' | '.join(_DTYPES)} |\n|---|{'---:|' * len(_DTYPES)}")
    for name, of in medians.items():
        print(f"| {name} | {' | '.join(f'{1000 * of[precision]:.1f}' for precision in _DTYPES)} |")
    print("\n" + (f"{chosen} is not the fastest for {' and '.join(slower)}" if slower else f"{chosen} is the fastest"))
    args.output.mkdir(parents=True, exist_ok=True)
    write_json(args.output / "precision.json", {"device": device_name(), "chosen": chosen, "medians_s": medians})
    return 1 if slower else 0


def _step(name: str, dtype: torch.dtype, text: Text) -> Step:
    if name not in _MODELS:
        rows, size_in, size_out = _PRODUCT
        left, right = torch.randn(rows, size_in).to(dtype), torch.randn(size_out, size_in).to(dtype)
        return lambda: float(F.linear(left, right)[0, 0])
    torch.manual_seed(0)
    batch = text.batch(_LENGTH_TOKENS, _NUM_SAMPLES)
    return pmlm_step(PMLM(_MODELS[name]).to(dtype), pseudo_masked_layout(batch, Objective.AE_PAR, mask_id=text.mask_id))


if __name__ == "__main__":
    sys.exit(main())
