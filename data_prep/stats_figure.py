"""What was counted of a data set as a figure."""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_prep.files import write_whole
from data_prep.shards import SPLITS
from data_prep.stats import Measured
from data_prep.stats_summary import FREQUENT
from data_prep.units import bin_width

_MAX_BARS = 64


def draw(measured: Measured, path: Path) -> None:
    """Write the figure, whole, as PNG: lengths of samples and of documents, and how often each vocabulary entry occurs."""
    from matplotlib.figure import Figure  # here, because it takes a second
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    data = measured.data
    figure = Figure(figsize=(15, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    num_samples = ", ".join(f"{data.num_samples(split):,} samples for {split}" for split in SPLITS)
    figure.suptitle(f"{data.folder.resolve().name}: {num_samples}", fontweight="bold")
    samples, documents, vocabulary = figure.subplots(1, 3)

    lengths = np.arange(data.max_length_tokens + 1)
    width = -(-len(lengths) // _MAX_BARS)
    edges = np.arange(0, len(lengths) + width, width)
    per_bar, _ = np.histogram(lengths, edges, weights=measured.length_counts)
    samples.stairs(per_bar, edges, fill=True)
    samples.set(
        title="Lengths of samples", xlabel="tokens, special ones included", ylabel=f"samples per {width} tokens"
    )

    of_length = {int(length): count for length, count in data.manifest["text"]["document_lengths_tokens"].items()}
    ends = [min(of_length)]
    while ends[-1] <= max(of_length):
        ends.append(ends[-1] + bin_width(ends[-1]))
    per_octave = [of_length.get(low, 0) / np.log2(high / low) for low, high in pairwise(ends)]
    documents.stairs(per_octave, ends, fill=True)
    documents.set(
        title="Lengths of documents", xlabel="tokens", ylabel="documents per doubling of the length", xscale="log"
    )

    ids = data.tokenizer.normal_ids
    occurrences = np.sort(measured.token_counts_V[ids])[::-1]
    seen = occurrences[occurrences > 0]
    vocabulary.plot(np.arange(1, len(seen) + 1), seen)
    vocabulary.axhline(FREQUENT, color="grey", linestyle="--", linewidth=1)
    vocabulary.set(
        title=f"Vocabulary: {len(seen):,} of {len(ids):,} entries occur", xlabel="rank of the entry", ylabel="occurrences",
        xscale="log", yscale="log",
    )  # fmt: skip
    for axes in (samples, documents, vocabulary):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, image.getvalue())
