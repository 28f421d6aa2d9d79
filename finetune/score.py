"""Score texts that a model wrote, against references.

ROUGE-1, ROUGE-2, ROUGE-L (F1, mean over the texts; rouge-score), BLEU and chrF (of the corpus; sacrebleu) and exact match, all in
percent. What changes a score, tokenisation and options, is printed and stored with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.console import ArgumentParser
from data_prep.files import read_json, sha256_of_file, write_json
from finetune.model import refuse_one_text
from finetune.processes import Processes
from finetune.seq2seq_data import QUESTION_TARGET, is_lines
from finetune.squad import read_squad
from finetune.tables import read_table, text_lines

ROUGE = {"rouge1": "rouge_1", "rouge2": "rouge_2", "rougeL": "rouge_l"}


def text_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], *, ignore_case: bool = False
) -> tuple[dict[str, float], dict[str, str]]:
    """The scores, and the options of each kind. `references`: for each prediction one or more.

    Of several references ROUGE takes the one most like the prediction. Raises ValueError for unequal or no numbers of them.
    """
    scores, options = rouge_scores(predictions, references)
    for part in (_sacrebleu_scores, _exact_match):
        more, more_options = part(predictions, references, ignore_case)
        scores, options = scores | more, options | more_options
    return scores, options


def rouge_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[dict[str, float], dict[str, str]]:
    """Return ROUGE only, see `text_scores`."""
    from rouge_score.rouge_scorer import RougeScorer  # here, because it takes its time to import

    _refuse_unequal(predictions, references)
    scorer = RougeScorer([*ROUGE], use_stemmer=True)
    found = [scorer.score_multi(of_one, text) for text, of_one in zip(predictions, references, strict=True)]
    scores = {name: 100 * sum(one[key].fmeasure for one in found) / len(found) for key, name in ROUGE.items()}
    return scores, {"rouge": f"f1|tok:lowercase [a-z0-9]+|stemmer:porter|version:{version('rouge-score')}"}


def _refuse_unequal(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    for name, texts in (
        ("predictions", predictions),
        ("references", references),
        *(("references", r) for r in references[:1]),
    ):
        refuse_one_text(name, texts)
    if len(predictions) != len(references) or not predictions or len({*map(len, references)}) != 1 or not references[0]:
        raise ValueError("expected at least one prediction, and of each as many references, at least one")


def _sacrebleu_scores(
    predictions: Sequence[str], references: Sequence[Sequence[str]], ignore_case: bool
) -> tuple[dict[str, float], dict[str, str]]:
    from sacrebleu import BLEU, CHRF

    metrics: dict[str, Any] = {"bleu": BLEU(lowercase=ignore_case), "chrf": CHRF(lowercase=ignore_case)}
    streams = [list(stream) for stream in zip(*references, strict=True)]
    scores = {name: float(metric.corpus_score(list(predictions), streams).score) for name, metric in metrics.items()}
    return scores, {name: str(metric.get_signature()) for name, metric in metrics.items()}


def _exact_match(
    predictions: Sequence[str], references: Sequence[Sequence[str]], ignore_case: bool
) -> tuple[dict[str, float], dict[str, str]]:
    def plain(text: str) -> str:
        return " ".join((text.lower() if ignore_case else text).split())

    num_equal = sum(plain(text) in [*map(plain, of_one)] for text, of_one in zip(predictions, references, strict=True))
    options = f"case:{'lc' if ignore_case else 'mixed'}|space:collapsed"
    return {"exact_match": 100 * num_equal / len(predictions)}, {"exact_match": options}


def read_lines(path: Path, column: str, flag: str = "") -> list[str]:
    """Return a text a row: of a .txt its lines, of SQuAD's JSON the questions that have answers, of other files the column."""
    if path.suffix == ".txt":
        return [text for _, text in text_lines(path)]
    if path.suffix == ".json" and not is_lines(path):
        return [question.text for question in read_squad(path).questions if question.answers]
    return [row[0] for row in read_table(path, [column], [flag]).rows]


def score_files(
    predictions: Path, references: Sequence[Path], *, prediction_column: str, reference_column: str, ignore_case: bool
) -> dict[str, Any]:
    """What the command writes. Raises ValueError or OSError for files that cannot be read, or of unequal lengths."""
    texts = read_lines(predictions, prediction_column, "--prediction_column")
    streams = {path: read_lines(path, reference_column, "--reference_column") for path in references}
    for path, stream in streams.items():
        if len(stream) != len(texts):
            raise ValueError(
                f"{path}: has {len(stream):,} texts, and {predictions} {len(texts):,}; expected one for each, in its order"
            )
    if not texts:
        raise ValueError(f"{predictions}: has no texts; expected at least one")
    scores, options = text_scores(texts, [*zip(*streams.values(), strict=True)], ignore_case=ignore_case)
    made_by = made_by_file(predictions)
    return {
        "scores": scores,
        "options": options,
        "num_texts": len(texts),
        "num_empty": sum(not text.strip() for text in texts),
        "predictions": {"file": predictions.name, "sha256": sha256_of_file(predictions)},
        "references": [{"file": path.name, "sha256": sha256_of_file(path)} for path in references],
        "decoding": read_json(made_by) if made_by.is_file() else None,
    }


def made_by_file(predictions: Path) -> Path:
    """Where `python -m finetune generate` says with what settings and model it wrote the file."""
    return predictions.with_name(f"{predictions.name}.settings.json")


def add_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `python -m finetune score`."""
    parser.add_argument("--predictions", type=Path, metavar="PATH", required=True,
                        help="what a model wrote: .txt with a text a line, or .jsonl, .tsv, .csv or .parquet")  # fmt: skip
    parser.add_argument("--references", type=Path, metavar="PATH", required=True, nargs="+",
                        help="what people wrote, in the same order; several files: several references of each")  # fmt: skip
    parser.add_argument("--prediction_column", metavar="NAME", default="text", help="column of the predictions")
    parser.add_argument("--reference_column", metavar="NAME", default="tgt",
                        help=f"column of the references; {QUESTION_TARGET} for question generation")  # fmt: skip
    parser.add_argument("--ignore_case", action="store_true",
                        help="BLEU, chrF and exact match without regard to case, for uncased models; ROUGE always")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="PATH", help="JSON to write: the scores, their options, the files' "
                        "hashes, and the decoding settings and model's hash that generate left beside its output")  # fmt: skip


def run(args: Any, processes: Processes) -> None:
    """Run `python -m finetune score`."""
    if not processes.is_first:
        return
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    result = score_files(
        args.predictions, args.references, prediction_column=args.prediction_column,
        reference_column=args.reference_column, ignore_case=args.ignore_case,
    )  # fmt: skip
    for name, value in result["scores"].items():
        print(f"{name:12} {value:6.2f}   {result['options'].get(name, result['options']['rouge'])}")
    if args.output is not None:
        write_json(args.output, result)
