"""The benchmark of paper 2's table 7: its commands, with something else in the place of Python."""

import json
import os
import subprocess
from pathlib import Path

from bigdet.config.load import load_config
from bigdet.config.run import check_config
from bigdet.plan import parse_arguments
from tests.commands.runs import ROOT

FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\t' "$@" >> "$LOG"; echo >> "$LOG"
echo '{"seconds": 0.5}'
"""
NORMS = {  # of the phase that is trained
    "imagenet": ("affine", 2),
    "scratch_bn": ("live", 0),
    "scratch_syncbn": ("sync", 0),
    "scratch_gn": (None, 0),
    "direct_pretrain": ("live", 0),
    "direct_finetune": ("fixed", 2),
}
OTHERS = [
    "imagenet_inference",
    "direct_inference",
    "gn_inference",
    "pretrain_data",
    "finetune_data",
]


def test_table_7_has_a_row_for_each_way_to_train(tmp_path: Path):
    python = tmp_path / "bin/python"
    python.parent.mkdir()
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    path = f"{python.parent}:{os.environ['PATH']}"
    printed = subprocess.run(
        ["bash", "launch/table7.sh", "seed=3"],
        cwd=ROOT,
        check=True,
        text=True,
        env={**os.environ, "PATH": path, "LOG": str(tmp_path / "log")},
        capture_output=True,
    ).stdout.splitlines()
    names = [*NORMS, *OTHERS]
    assert [json.loads(line) for line in printed] == [
        {"row": name, "seconds": 0.5} for name in names
    ]
    commands = [line.split("\t")[:-1] for line in (tmp_path / "log").read_text().splitlines()]
    for name, words in zip(names, commands, strict=True):
        place = next(index for index, word in enumerate(words) if word.endswith(".yaml"))
        config = load_config(ROOT / words[place], words[place + 1 :])
        check_config(config)
        assert config.seed == 3
        if name in NORMS:
            assert words[:2] == ["-m", "bigdet.plan"]
            options = parse_arguments(words[2:])
            assert options.measure
            phase = config.phases[options.phase or next(iter(config.phases))]
            assert (phase.norm_mode, phase.freeze_stages) == NORMS[name], name
        else:
            assert words[0] == "tools/benchmark.py"
            assert words[1] == ("stream" if name.endswith("data") else "predict")
