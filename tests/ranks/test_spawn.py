"""The helper that runs tests on several ranks reports what went wrong first, and never hangs."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from bigdet import distributed
from tests.spawn import RankError, run_ranks


def add_ranks(offset: int) -> tuple[int, list[int]]:
    return offset + distributed.rank(), distributed.all_gather_objects(distributed.rank())


def fail_on_the_last_rank() -> None:
    if distributed.rank() == distributed.world_size() - 1:
        raise ValueError("the cause")
    distributed.barrier()


def die_on_the_last_rank() -> None:
    if distributed.rank() == distributed.world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    distributed.barrier()


def sleep_long() -> None:
    time.sleep(600)


def test_results_come_in_rank_order(tmp_path: Path) -> None:
    assert run_ranks(add_ranks, 2, tmp_path, 10) == [(10, [0, 1]), (11, [0, 1])]


def test_the_rank_that_failed_first_is_reported_and_not_its_peer(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed first.*ValueError: the cause"):
        run_ranks(fail_on_the_last_rank, 2, tmp_path)


def test_a_killed_rank_is_reported_and_not_its_peer(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)rank 1 of 2 failed first.*exit code -9"):
        run_ranks(die_on_the_last_rank, 2, tmp_path)


def test_ranks_that_hang_are_ended_and_show_where(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"(?s)no end in time on ranks.*in sleep_long"):
        run_ranks(sleep_long, 1, tmp_path, timeout_seconds=12.0)
