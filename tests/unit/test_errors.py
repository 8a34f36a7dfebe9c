"""Whose an error is, and what is said of it."""

import errno
import io
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bigdet import distributed
from bigdet.config.rules import ConfigError
from bigdet.host import errors
from bigdet.training.watchdog import Watchdog

END = "BIGDET_TRACEBACK=1 shows the traceback.)"


@pytest.fixture(autouse=True)
def no_place():
    errors.at("")
    yield
    errors.at("")


def module(text: str) -> ModuleType:
    """A module of bigdet with this code."""
    made = ModuleType("bigdet.training.made_up")
    code = compile(text, "/somewhere/bigdet/training/made_up.py", "exec")
    exec(code, made.__dict__)
    return made


def caught(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as info:  # noqa: PT011
        call()
    return info.value


def call_from_bigdet(function: Callable[[], object]) -> Exception:
    """What comes up when bigdet calls a function, in line 2."""
    return caught(lambda: module("def work(call):\n    call()\n").work(function))


def batch_of_one() -> None:
    nn.BatchNorm2d(4)(torch.zeros(1, 4, 1, 1))


def broken_picture() -> None:
    Image.open(io.BytesIO(b"no picture"))


def read_only() -> None:
    raise OSError(errno.EROFS, "Read-only file system", "runs/x/metrics.jsonl")


@pytest.mark.parametrize(
    ("call", "said", "whose"),
    [
        (
            batch_of_one,
            "Expected more than 1 value per channel when training, got input size "
            "torch.Size([1, 4, 1, 1]).",
            "ValueError from torch",
        ),
        (
            read_only,
            "[Errno 30] Read-only file system: 'runs/x/metrics.jsonl'.",
            "OSError from tests",
        ),
        (
            lambda: np.zeros(3).reshape(2),
            "cannot reshape array of size 3 into shape (2,).",
            "ValueError from tests",
        ),
        (broken_picture, "cannot identify image file <", "PIL.UnidentifiedImageError from PIL"),
    ],
)
def test_what_came_up_elsewhere_is_reported_with_the_place_in_the_run(
    tmp_path: Path, call, said: str, whose: str
):
    error = call_from_bigdet(call)
    told = errors.explain(error)
    assert told.startswith(said)
    assert told.endswith(f"({whose} in work, training/made_up.py:2. {END}")
    Watchdog(None, tmp_path / "log").at("pretrain step 7: forward, backward, update")
    assert errors.explain(error) == f"pretrain step 7: forward, backward, update: {told}"


@pytest.mark.parametrize(
    "text",
    [
        "def work():\n    return int('seven')\n",  # Python itself raises it, in a line of ours
        "def work():\n    return open('/no/such/file')\n",
        "def work():\n    [1].index(2)\n",
    ],
)
def test_a_failing_call_in_a_line_of_bigdet_is_none_of_its_messages(text: str):
    told = errors.explain(caught(module(text).work))
    assert told.endswith(f"Error in work, training/made_up.py:2. {END}")


@pytest.mark.parametrize(
    "text",
    [
        "def work():\n    raise ValueError('data.workers: found -1')\n",
        # of several lines, with arguments that are calls
        "def work():\n    raise ValueError(\n        'data.workers: ' + str('found')\n"
        "        + ' -1'\n    )\n",
        "def work():\n    try:\n        int('x')\n    except ValueError as error:\n"
        "        raise ValueError('data.workers: found -1') from error\n",
        "def work():\n    try:\n        raise ValueError('data.workers: found -1')\n"
        "    except ValueError:\n        raise\n",
        "def work():\n    error = ValueError('data.workers: found -1')\n    raise error\n",
    ],
)
def test_what_bigdet_raises_is_reported_as_it_is(text: str):
    errors.at("pretrain step 7")
    assert errors.explain(caught(module(text).work)) == "data.workers: found -1"


def test_it_is_known_after_threads_and_processes_too():
    work = module("def work():\n    raise ValueError('data.workers: found -1')\n").work
    with ThreadPoolExecutor(1) as pool:
        assert errors.explain(caught(pool.submit(work).result)) == "data.workers: found -1"
        foreign = errors.explain(caught(pool.submit(json.loads, "{").result))
    assert foreign.startswith("Expecting property name enclosed in double quotes: line 1 column 2")
    assert "(json.decoder.JSONDecodeError from json" in foreign

    def reraise() -> None:  # as torch does with what came up in a loader process
        raise ValueError(
            "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent "
            "call last):\n  File ...\nValueError: bad strip\n"
        )

    assert errors.explain(caught(reraise)).startswith("ValueError: bad strip. (ValueError from")
    # Pickled, an error of a class of ours has no way, but is ours.
    assert errors.explain(caught(lambda: exec("raise e", {"e": ConfigError("lr: 0")}))) == "lr: 0"


def test_other_ranks_are_reported_the_same(monkeypatch: pytest.MonkeyPatch):
    errors.at("pretrain step 7: evaluation")
    with pytest.raises(distributed.SharedError) as shared, distributed.together():
        read_only()
    told = errors.explain(shared.value)
    assert told.startswith("pretrain step 7: evaluation: [Errno 30] Read-only file system: ")
    assert told.count("BIGDET_TRACEBACK=1") == 1


def test_exit_codes_of_killed_processes_are_reported_with_the_memory():
    for code in (0, 1, 75, 128, 255):
        assert errors.explain_exit(code) == ""
    assert errors.explain_exit(-11) == " It got SIGSEGV."
    for code in (-9, 137):  # a shell and Slurm add the signal to 128
        told = errors.explain_exit(code)
        assert told.startswith(" It got SIGKILL: the system kills processes when the memory of")


def test_memory_that_is_full_is_reported():
    told = errors.explain(caught(lambda: bytearray(1 << 62)))
    assert told.startswith("out of memory: none is left: the system kills processes when")
    assert os.uname().sysname != "Linux" or "GiB are free now" in told


def test_memory_that_is_full_for_torch_is_reported_by_every_command():
    errors.at("evaluating runs/x")
    begin = "evaluating runs/x: out of memory: "
    host = errors.explain_full(caught(lambda: torch.empty(1 << 60)))
    assert host.startswith(begin)
    assert "can't allocate memory" in host
    device = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee ...")
    told = errors.explain_full(device)
    assert told.startswith(f"{begin}CUDA out of memory. Tried to allocate 2.00 GiB. Take fewer")
    assert errors.explain_full(RuntimeError("shapes cannot be multiplied")) == ""
    assert errors.explain_full(MemoryError()) == ""  # `explain` does
