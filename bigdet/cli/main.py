"""The ``bigdet`` command: every command of the package by one name.

``bigdet NAME ...`` is the same as ``python -m bigdet.MODULE ...``. Only the module that is asked
for is imported.
"""

from __future__ import annotations

import difflib
import runpy
import sys

import bigdet

COMMANDS = {
    "train": ("train", "all phases of a config; --doctor checks first, --options lists options"),
    "evaluate": ("evaluate", "AP of a run, a checkpoint or a file of detections"),
    "predict": ("predict", "pictures to detections, and drawn copies"),
    "report": ("report", "curves, tables and pictures of runs, as one HTML file"),
    "plan": ("plan", "which sizes and batches fit, and which engine to use"),
    "sweep": ("sweep", "a list of runs, one after another or as Slurm arrays"),
    "configs": ("cli.list_configs", "the configs, fragments and sweeps that come with bigdet"),
    "shards": ("cli.make_shards", "annotations of COCO, Objects365 or VOC, or shapes, to shards"),
    "check-shards": ("cli.check_shards", "read and decode all of a shard set"),
    "index-shards": ("cli.index_shards", "index WebDataset tars that were made elsewhere"),
    "show-batch": ("cli.show_batch", "draw or list the batch of any step"),
    "convert-weights": ("cli.convert_weights", "from and to torchvision, detectron2, mmdetection"),
    "export": ("cli.export", "a detector as ONNX or torch.export"),
    "benchmark": ("cli.benchmark", "measure a part of bigdet and an alternative"),
    "overfit": ("cli.overfit", "let a small detector memorize 16 images"),
}
"""The module that each command runs, and its purpose."""


def main() -> None:
    """Run the command that the first word names."""
    name, words = (sys.argv[1:2] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:{width}}  {purpose}" for command, (_, purpose) in COMMANDS.items()]
        head = "usage: bigdet COMMAND ...       (bigdet COMMAND --help shows its options)"
        end = "On several GPUs: deepspeed --num_gpus 8 -m bigdet.train CONFIG"
        print("\n".join([head, "", *lines, "", end]))  # at once: a pipe may be closed after a line
    elif name == "--version":
        print(f"bigdet {bigdet.__version__}")
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name.replace("_", "-"), COMMANDS, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        sys.exit(f"error: bigdet has no command {name!r}. {hint}`bigdet --help` lists all.")
    else:
        run(name, words)


def run(name: str, words: list[str]) -> None:
    """Run a command as ``python -m`` does its module."""
    sys.argv = [f"bigdet {name}", *words]
    runpy.run_module(f"bigdet.{COMMANDS[name][0]}", run_name="__main__", alter_sys=True)
