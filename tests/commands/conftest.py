"""Fixtures of the tests of commands."""

import signal
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lets the command run in this process, and leaves no trace of it."""
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        if "deepspeed.utils.groups" in sys.modules:  # keeps its own copy of the group
            sys.modules["deepspeed.utils.groups"]._WORLD_GROUP = None  # type: ignore[attr-defined]
    for number, handler in handlers.items():
        signal.signal(number, handler)
