"""python -m benchmarks.finetune: fine-tuning's speed against transformers' BertForSequenceClassification.

Sentences a second of texts of mixed lengths, in training (forward, backward, AdamW) and in prediction, of models of the same size on the
same ids, threads and texts. They take turns, and ratios of medians of CPU seconds are the figures:

  ours        finetune's: samples one behind the other, without padding
  BERT        a batch padded to its longest text, as transformers' DataCollatorWithPadding does
  grouped     the same, the texts of --steps batches sorted by length first (transformers' group_by_length sorts those of 50)

Texts: `--data`, a .tsv with a text column (python -m benchmarks.corpora makes some), or else the corpus's lines. Writes finetune.json.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.peers import bert_config
from benchmarks.text import make_tokenizer
from data_prep.console import ArgumentParser, available_cores, progress_bar, run_command
from data_prep.corpus import find_sources, read_documents
from data_prep.files import write_whole
from data_prep.tokenizer import Tokenizer
from finetune.batches import micro_batches
from finetune.classify_data import Inputs, Target, make_inputs
from finetune.classify_model import Classifier
from finetune.optimizer import WholeState, parameter_groups
from finetune.processes import Processes
from finetune.tables import read_table
from finetune.tokens import TokenListsBuilder
from finetune.trainer import TrainSettings
from pretrain.model import PMLM, PMLMConfig

OURS, BERT, GROUPED = "ours", "BERT", "grouped"
_NUM_LABELS, _LEARNING_RATE, _MAX_NORM = 2, 2e-5, 1.0


@dataclass(frozen=True)
class Setting:
    """What a row is measured at."""

    config: PMLMConfig
    batch_size: int
    micro_batch_size: int
    prediction_batch_size: int
    """Of transformers; ours takes as many as PREDICTION_TOKENS hold."""


class Ours:
    """finetune's classifier and optimizer, as the trainer uses them in one process."""

    def __init__(self, setting: Setting, tokenizer: Tokenizer, inputs: Inputs, max_length_tokens: int) -> None:
        torch.manual_seed(0)
        self._setting, self._inputs, self._targets = setting, inputs, torch.zeros(len(inputs.ids), dtype=torch.int64)
        labels = tuple(map(str, range(_NUM_LABELS)))
        self._classifier = Classifier.make(
            PMLM(setting.config), tokenizer, Target(labels), max_length_tokens, Processes(), 0
        )
        model = self._classifier.model
        settings = TrainSettings()
        groups = parameter_groups(model, settings.weight_decay, settings.layer_decay)
        self._optimizer = WholeState(model, self, groups, Processes(), "fp32", _MAX_NORM)

    def loss(self, samples: Sequence[int], epoch: int) -> torch.Tensor:
        """See finetune.trainer.Task."""
        return self._classifier.loss(self._inputs, self._targets, samples)

    def train(self, batch: np.ndarray) -> None:
        """A step."""
        self._classifier.model.train()
        for samples in micro_batches(batch, self._inputs.lengths, self._setting.micro_batch_size):
            self._optimizer.add(samples.tolist(), 0, 1 / len(batch))
        self._optimizer.step(_LEARNING_RATE)

    def predict(self, samples: np.ndarray) -> np.ndarray:
        """Outputs, [B, C]."""
        self._classifier.model.eval()
        some = TokenListsBuilder(self._setting.config.vocab_size)
        some.add([self._inputs.ids[i] for i in samples])
        return self._classifier.outputs(Inputs(some.build(), self._inputs.num_first[samples]))


class Bert:
    """transformers' model, padding and torch's AdamW."""

    def __init__(self, setting: Setting, inputs: Inputs, padding_id: int) -> None:
        config = setting.config
        self._setting, self._inputs, self._padding_id = setting, inputs, padding_id
        torch.manual_seed(0)
        self._model = transformers.BertForSequenceClassification(bert_config(config, num_labels=_NUM_LABELS))
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=_LEARNING_RATE, fused=True)

    def _padded(self, samples: Sequence[int]) -> dict[str, torch.Tensor]:
        ids = [torch.from_numpy(self._inputs.ids[i].astype(np.int64)) for i in samples]
        pad = torch.nn.utils.rnn.pad_sequence
        return {
            "input_ids": pad(ids, batch_first=True, padding_value=self._padding_id),
            "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
            "token_type_ids": pad([torch.zeros_like(row) for row in ids], batch_first=True),
        }

    def train(self, batch: np.ndarray) -> None:
        """A step."""
        self._model.train()
        self._model(**self._padded(batch.tolist()), labels=torch.zeros(len(batch), dtype=torch.int64)).loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), _MAX_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def predict(self, samples: np.ndarray) -> np.ndarray:
        """Logits, [B, C]."""
        self._model.eval()
        size = self._setting.prediction_batch_size
        with torch.no_grad():
            parts = [self._model(**self._padded(samples[i : i + size].tolist())).logits for i in range(0, len(samples), size)]  # fmt: skip
        return torch.cat(parts).numpy()


def seconds_in_turns(
    works: dict[str, Callable[[int], None]], num_turns: int, repetitions: int, advance: Callable[[], Any]
) -> dict[str, list[float]]:
    """CPU seconds of each at the same texts, one after the other; a round to warm up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for repetition in range(repetitions + 1):
        for name, work in works.items():
            started = time.process_time()
            work(repetition % num_turns)
            if repetition:
                seconds[name].append(time.process_time() - started)
            advance()
    return seconds


def measure(setting: Setting, tokenizer: Tokenizer, inputs: Inputs, max_length_tokens: int, repetitions: int, steps: int,
            advance: Callable[[], Any]) -> dict[str, dict[str, list[float]]]:  # fmt: skip
    """CPU seconds of `steps` batches, of training and of prediction."""
    ours, bert = Ours(setting, tokenizer, inputs, max_length_tokens), Bert(setting, inputs, tokenizer.pad_id)
    order, size = np.random.default_rng(0).permutation(len(inputs.ids)), setting.batch_size
    turns = order[: len(order) // (size * steps) * size * steps].reshape(-1, size * steps)
    by_length = [texts[np.argsort(-inputs.lengths[texts], kind="stable")] for texts in turns]
    of: dict[str, tuple[Ours | Bert, Any]] = {OURS: (ours, turns), BERT: (bert, turns), GROUPED: (bert, by_length)}

    def training(name: str, turn: int) -> None:
        for batch in of[name][1][turn].reshape(steps, size):
            of[name][0].train(batch)

    def prediction(name: str, turn: int) -> None:
        of[name][0].predict(of[name][1][turn])

    return {
        kind.__name__: seconds_in_turns({name: partial(kind, name) for name in of}, len(turns), repetitions, advance)
        for kind in (training, prediction)
    }


# ---- the program


def main() -> int:
    """Entry point; returns the exit status."""
    parser = ArgumentParser(prog="python -m benchmarks.finetune", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="PATH", help="a .tsv, .csv or .jsonl of texts")
    parser.add_argument("--text_column", default="text", help="its column")
    parser.add_argument("--corpus", type=Path, default=Path("sample_corpus"), help="without --data: its lines")
    parser.add_argument("--num_texts", type=int, default=4000, help="texts used at most")
    parser.add_argument("--max_length_tokens", type=int, default=128, help="longer texts are cut")
    parser.add_argument("--num_layers", type=int, default=4, help="layers of base width")
    parser.add_argument("--dropout", type=float, default=0.1, help="of all models")
    parser.add_argument("--vocab_size", type=int, default=8000, help="of tokenizer and models")
    parser.add_argument("--batch_size", type=int, default=32, help="texts of a step")
    parser.add_argument("--micro_batch_size", type=int, default=TrainSettings.micro_batch_size, help="texts computed at once, of ours")  # fmt: skip
    parser.add_argument(
        "--prediction_batch_size", type=int, default=64, help="texts predicted at once, of transformers"
    )
    parser.add_argument("--steps", type=int, default=8, help="batches of a turn")
    parser.add_argument("--repetitions", type=int, default=3, help="turns measured of each")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON")
    args = parser.parse_args()
    return run_command(lambda: _run(args), parser.prog)


def _run(args: Any) -> None:
    torch.set_flush_denormal(True)
    if args.data is not None:
        texts = [row[0] for row in read_table(args.data, [args.text_column]).rows]
    else:
        texts = [line for document in read_documents(find_sources([args.corpus])) for line in document.lines]
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = make_tokenizer([args.corpus], folder / "tokenizer.model", args.vocab_size)
        inputs = make_inputs(tokenizer, [(text,) for text in texts[: args.num_texts]], args.max_length_tokens)
        config = PMLMConfig(
            args.vocab_size, args.num_layers, max_positions=args.max_length_tokens, dropout=args.dropout
        )
        setting = Setting(config, args.batch_size, args.micro_batch_size, args.prediction_batch_size)
        with progress_bar("measure", 6 * (args.repetitions + 1), "turn") as bar:
            found = measure(
                setting, tokenizer, inputs, args.max_length_tokens, args.repetitions, args.steps, bar.update
            )
    lengths, sentences = inputs.lengths, args.steps * args.batch_size
    medians = {kind: {name: statistics.median(s) for name, s in seconds.items()} for kind, seconds in found.items()}
    result = {
        "machine": {"torch": torch.__version__, "transformers": transformers.__version__, "threads": torch.get_num_threads(),
                    "cores": available_cores()},
        "setting": asdict(setting), "arguments": {key: str(value) for key, value in vars(args).items()},
        "lengths_tokens": {"mean": float(lengths.mean()), "median": float(np.median(lengths)), "max": int(lengths.max())},
        "cpu_seconds": found, "sentences_per_cpu_s": {k: {n: sentences / s for n, s in of.items()} for k, of in medians.items()},
        "ratios": {kind: {name: s / of[OURS] for name, s in of.items() if name != OURS} for kind, of in medians.items()},
    }  # fmt: skip
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / "finetune.json", json.dumps(result, indent=1).encode())
    print(
        f"texts of {lengths.mean():.0f} tokens on average, {np.median(lengths):.0f} in the middle, {lengths.max()} at most"
    )
    for kind, of in medians.items():
        for name, s in of.items():
            print(
                f"{kind:11} {name:8} {sentences / s:8.1f} sentences a CPU second   ours is {s / of[OURS]:.2f} x as fast"
            )
    print(f"written: {args.output / 'finetune.json'}")


if __name__ == "__main__":
    sys.exit(main())
