"""Errors and wishes of one rank reach all of them in one message."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigdet import distributed
from tests.spawn import run_ranks


def meet(asking: int | None, problem: str = "") -> bool:
    with distributed.together() as wish:
        wish.is_asked = distributed.rank() == asking
        if problem and distributed.rank() == 1:
            raise ValueError(problem)
    return wish.is_asked


def meet_often() -> list[bool]:
    answers = [meet(asking) for asking in (None, 1, 0, None)]
    with pytest.raises(distributed.SharedError, match=r"^rank 1: no such shard"):
        meet(0, "no such shard")
    return answers


def test_a_wish_of_one_rank_is_known_to_all_and_an_error_is_raised_on_all(tmp_path: Path) -> None:
    assert run_ranks(meet_often, 2, tmp_path) == [[False, True, True, False]] * 2
