"""A loader process that the system kills: reported as that, wherever training is then."""

import os
import signal

import pytest
import torch

from bigdet.data.examples.collate import Allocate, PackedGroup
from bigdet.data.format.manifest import ShardError
from bigdet.data.streams.loader import Loader
from bigdet.host.errors import explain_killed


def dies(key: int, allocate: Allocate) -> PackedGroup:
    os.kill(os.getpid(), signal.SIGKILL if key == 0 else signal.SIGSEGV)
    raise AssertionError


@pytest.mark.parametrize(("key", "found"), [(0, "Killed"), (1, "Segmentation fault")])
def test_who_waits_for_data_is_warned_of_memory_and_workers(key: int, found: str):
    loader = Loader(dies, [key], workers=1, group_bytes=1000)
    with pytest.raises(ShardError) as caught:
        next(loader)
    message = str(caught.value)
    assert message.startswith("a loader process was lost (DataLoader worker (pid")
    assert found in message
    assert ("when the memory of the host or of the job is full" in message) == (key == 0)
    assert "Lower data.workers" in message
    assert "The same command continues from the newest checkpoint" in message
    assert "\n" not in message
    loader.close()


def test_other_errors_are_not_of_loader_processes():
    assert explain_killed(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) == ""
    assert explain_killed(ValueError("DataLoader worker (pid 7) is killed by signal")) == ""
    text = "DataLoader worker (pid 7) exited unexpectedly with exit code 1. Details are lost due to"
    told = explain_killed(RuntimeError(f"{text} multiprocessing."))
    assert "(DataLoader worker (pid 7) exited unexpectedly with exit code 1): the sys" in told
    assert explain_killed(torch.OutOfMemoryError("CUDA out of memory")) == ""
