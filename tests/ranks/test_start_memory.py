"""Weights to start from are never all in the memory of the rank that reads them."""

from __future__ import annotations

from pathlib import Path

import torch

from bigdet.config.load import load_config
from bigdet.config.run import phase_model
from bigdet.engine import writing
from bigdet.engine.parts import Part, copy_share
from bigdet.models.build import build_detector
from bigdet.models.weights import save_detector_weights, weights_metadata
from bigdet.pieces.index import MODEL
from bigdet.run_dir import RunDir
from bigdet.training.phases import start_weights
from tests.ranks.memory import Watch, memory_now
from tests.spawn import run_ranks

CONFIG = Path(__file__).parents[2] / "configs" / "vitdet_b.yaml"
WORDS = ["model.backbone=vit_s", "model.width=16", "model.fc_width=16"]
TINY = [*WORDS[1:], "model.backbone=vit_ti", "phases.train.start_from.source=random"]
CLASSES = ["a", "b"]
MIB = 2**20


Sums = dict[str, float]


def start_from(sources: dict[str, Path]) -> dict[str, tuple[int, Sums]]:
    """Private bytes that it takes to start from each source, and the sum of each tensor then."""
    run_dir = RunDir(next(iter(sources.values())).parent / "run")
    found = {}
    with start_weights(load_config(CONFIG, TINY), "train", CLASSES, run_dir):
        watch = Watch()  # only now: imports and caches are there in any case
    for kind, source in sources.items():
        parts = "[backbone]" if kind == "pth" else "[backbone,fpn,rpn,box_head,mask_head]"
        words = [f"phases.train.start_from={{source: {source}, parts: {parts}}}"]
        before, _ = memory_now()
        watch.restart()
        with start_weights(load_config(CONFIG, WORDS + words), "train", CLASSES, run_dir) as stored:
            taken = watch.most()["private"] - before
            names = stored.catalog[MODEL]
            sums = {name: stored.read(MODEL, name).double().sum().item() for name in names}
        found[kind] = taken, sums
    return found


def write_source(folder: Path, kind: str) -> tuple[Path, Sums]:
    """Write a detector or its backbone, all numbers new; give the sums of what was written."""
    config = load_config(CONFIG, WORDS)
    detector = build_detector(phase_model(config, "train"), len(CLASSES))
    with torch.no_grad():
        for number, parameter in enumerate(detector.parameters()):
            parameter.fill_(2.0 ** -(number % 8))  # the same in fp16
    state = detector.state_dict()
    metadata = weights_metadata(config, [{"id": n, "name": n} for n in CLASSES], "train")
    if kind == "pth":
        backbone = detector.backbone.state_dict()
        state = {f"backbone.{name}": value for name, value in backbone.items()}
        path = folder / "published.pth"
        torch.save({"model": {name: value.half() for name, value in backbone.items()}}, path)
    elif kind == "pieces":
        path = folder / "train-7"
        parts = [
            Part(MODEL, name, tuple(v.shape), 0, v, is_whole=True) for name, v in state.items()
        ]
        share = copy_share(parts, 0, 1)
        writing.write(writing.Save(path, 1, metadata=metadata), share)
    else:
        path = folder / "model.safetensors"
        save_detector_weights(path, detector, metadata)
    return path, {name: value.double().sum().item() for name, value in state.items()}


def test_a_start_from_elsewhere_takes_the_memory_of_a_few_tensors(tmp_path: Path) -> None:
    written = {kind: write_source(tmp_path, kind) for kind in ("safetensors", "pieces", "pth")}
    sources = {kind: source for kind, (source, _) in written.items()}
    (found,) = run_ranks(start_from, 1, tmp_path, sources, timeout_seconds=1000)
    for kind, (_, expected) in written.items():
        taken, sums = found[kind]
        assert {name: sums[name] for name in expected} == expected
        assert taken < 35 * MIB, kind  # the largest tensor has 2 MiB; all of them have 85
