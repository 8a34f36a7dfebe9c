"""The ``deepspeed`` command: the launcher's own ``-m`` is ``--module``, all else stays."""

from __future__ import annotations

import shlex
import sys

import pytest
from deepspeed.launcher import runner

from bigdet.cli import deepspeed as deepspeed_command


@pytest.mark.parametrize(
    ("typed", "handed_on"),
    [
        ("--num_gpus 8 -m bigdet.train C a=b", "--num_gpus 8 --module bigdet.train C a=b"),
        ("-m --num_gpus 8 pkg.mod", "--module --num_gpus 8 pkg.mod"),
        ("-H file -i host:0 -m pkg.mod -m x", "-H file -i host:0 --module pkg.mod -m x"),
        ("--hostfile=f -q -m pkg.mod --module", "--hostfile=f -q --module pkg.mod --module"),
        (
            "--launcher openmpi --launcher_args '-mca btl tcp' -m mod",
            "--launcher openmpi --launcher_args '-mca btl tcp' --module mod",
        ),
        ("--launcher_args=-m -m mod", "--launcher_args=-m --module mod"),
    ],
)
def test_the_launchers_own_m_is_module(typed, handed_on):
    assert deepspeed_command.with_module(shlex.split(typed)) == shlex.split(handed_on)


@pytest.mark.parametrize(
    "typed",
    [
        "train.py -m x",
        "--num_gpus 2 train.py --module -m",
        "--launcher_args=-m train.py",
        "--launcher openmpi --launcher_args '-m 3' train.py -m x",
        "--no_python echo -m x",
        "--module pkg.mod -m x",
        "--help",
        "train.py",
        "",
    ],
)
def test_all_else_is_handed_on_as_it_is(typed):
    assert deepspeed_command.with_module(shlex.split(typed)) == shlex.split(typed)


def test_the_runner_gets_the_words_and_its_exit_code_is_kept(monkeypatch):
    seen = []

    def ends(words):
        seen.append(words)
        sys.exit(7)

    monkeypatch.setattr(runner, "main", ends)
    monkeypatch.setattr(sys, "argv", ["deepspeed", "--num_gpus", "1", "-m", "pkg.mod", "x"])
    with pytest.raises(SystemExit) as ended:
        deepspeed_command.main()
    assert ended.value.code == 7
    assert seen == [["--num_gpus", "1", "--module", "pkg.mod", "x"]]
