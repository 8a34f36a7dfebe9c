"""The number of this process among the ranks. No other module reads RANK.

Apart from ``distributed.py``, for commands that do without torch, whose import takes seconds.
"""

from __future__ import annotations

import os


def rank() -> int:
    """This process's number, 0 when started without a launcher."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes train together, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process's number on its host."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_main() -> bool:
    """True on the rank that writes files and prints."""
    return rank() == 0
