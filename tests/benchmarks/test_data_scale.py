from __future__ import annotations

from pathlib import Path

from benchmarks.data_scale import Scale, measure_scale, table_of_scale


def test_counts_of_a_small_simulation(tmp_path: Path) -> None:
    """Opens stay far below parts x buckets, messages far below the list of all files."""
    scale = Scale(
        num_files=30, num_small_files=2000, small_file_factor=3, num_parts=60, documents_of_part=5, num_buckets=40
    )
    result = measure_scale(tmp_path, scale)
    assert result["large_files"]["files"] == 30
    assert result["small_files"]["files"] == 6000
    assert result["small_files"]["largest_message_bytes"] < result["small_files"]["sent_bytes"] / 4
    assert abs(result["large_files"]["manifest_bytes"] - result["small_files"]["manifest_bytes"]) < 10
    assert 30 <= result["second_start"]["opens"] <= 80
    assert result["duplicates"]["opens"] > 60
    assert len(list(table_of_scale(result))) == 12
