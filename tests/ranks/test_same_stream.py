"""Ranks that would train on different data stop together."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdet import distributed
from bigdet.distributed import SharedError
from bigdet.training.resume import check_same_stream
from tests.spawn import run_ranks


def compare_streams() -> tuple[str, str]:
    key = "phases.pretrain.data.train"
    check_same_stream({"seed": 1, "index": "a"}, key)
    with pytest.raises(SharedError) as error:
        check_same_stream({"seed": 1, "index": "ab"[distributed.rank()]}, key)
    return str(error.value)


def test_ranks_with_other_data_stop_together(tmp_path: Path):
    first, second = run_ranks(compare_streams, 2, tmp_path)
    assert first == second
    assert first.startswith("phases.pretrain.data.train: rank 1 has another index than rank 0")
