"""The door of the package: the weights that a phase starts from, into its detector."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from bigdet import distributed
from bigdet.config.own import is_own
from bigdet.config.phase import num_steps
from bigdet.config.run import RunConfig, phase_before, phase_model, phase_source, start_parts
from bigdet.config.start import is_timm, stated_cost
from bigdet.host.files import write_text
from bigdet.host.strict_json import to_json
from bigdet.models.build import build_detector
from bigdet.models.detector import Detector
from bigdet.models.weights import AVERAGE, FORMAT, LoadedPart, find_weights, part_of, read_metadata
from bigdet.pieces.building import parameters_in_file, parameters_on_meta
from bigdet.run_dir import RunDir
from bigdet.weights.classes import class_rows
from bigdet.weights.own_runs import hidden_differences, load_run
from bigdet.weights.published_backbones import load_backbone_file, load_timm_backbone

logger = logging.getLogger(__name__)


def load_start(
    detector: Detector, config: RunConfig, name: str, classes: Sequence[str], run_dir: RunDir
) -> None:
    """Fill the same detector on all ranks as `read_start` does on rank 0. Collective."""
    with distributed.together():
        if distributed.is_main():
            read_start(detector, config, name, classes, run_dir)
    for tensor in detector.state_dict().values():
        tensor.copy_(distributed.broadcast_tensor(tensor))


def read_start(
    detector: Detector, config: RunConfig, name: str, classes: Sequence[str], run_dir: RunDir
) -> None:
    """Fill a detector with the weights that a phase starts from, and log what came from where.

    Args:
        detector: of the phase, with random weights.
        config: of the run.
        name: of the phase.
        classes: names of the training set's categories, in the order of the labels.
        run_dir: where the phase before left its weights.
    """
    rows, kept, warning = _read(detector, config, name, classes, run_dir)
    for line in start_table(detector, rows, len(classes), kept):
        logger.info("phase %s: %s", name, line)
    if notes := [f"{row.source}: {row.note}" for row in rows if row.note]:
        logger.info("phase %s: weights from %s", name, "; ".join(notes))
        _add_to_environment(run_dir.environment, f"weights of {name}", "; ".join(notes))
    if warning:
        logger.warning("phases.%s.start_from: %s", name, warning)
    start = config.phases[name].start_from
    if start.source not in (None, "random", "previous"):
        costs = stated_cost(start.cost) if start.cost is not None else {}
        stated = ", ".join(f"{number:,} {key}" for key, number in costs.items())
        logger.info(
            "phase %s: cost of the weights from elsewhere: %s",
            name, stated or "not stated (start_from.cost)",
        )  # fmt: skip


def _add_to_environment(file: Path, key: str, value: str) -> None:
    """Add something to the last start in the list that ``environment.json`` is."""
    if file.is_file():
        starts = json.loads(file.read_text(encoding="utf-8"))
        starts[-1][key] = value
        write_text(file, to_json(starts, indent=1))


def check_start(config: RunConfig, name: str, classes: Sequence[str]) -> None:
    """Try the weights that a phase to come starts from, so that a misfit is found now (rank 0).

    They are from elsewhere, not from the phase before; timm's are downloaded here. What readers log
    of them is left to `read_start`, but for warnings.

    Raises:
        ValueError: with the phase, and what does not fit.
    """
    source = phase_source(config, name)
    try:
        if not is_timm(source):
            find_weights(Path(source))
        if distributed.is_main():
            with (
                tempfile.TemporaryDirectory() as folder,
                parameters_in_file(Path(folder) / "parameters"),
                _warnings_only(),
            ):
                detector = build_detector(phase_model(config, name), len(classes))
                _read(detector, config, name, classes, RunDir(Path(config.output)))
    except ValueError as error:
        raise ValueError(f"phases.{name}.start_from: {error}") from error


def check_hand_over(
    config: RunConfig, name: str, classes_before: Sequence[str], classes: Sequence[str]
) -> None:
    """Check that the parts that a phase takes from the one before fit its classes.

    Those of bigdet do; of a user's own detector it may not be known which rows are of which class.

    Raises:
        ValueError: with the first tensor that does not fit.
    """
    if list(classes_before) == list(classes) or not is_own(config.model.detector):
        return
    with parameters_on_meta():
        own, with_another = (
            build_detector(phase_model(config, name), number).state_dict()
            for number in (len(classes), len(classes) + 1)
        )
    parts = start_parts(config, name)
    for tensor in own:
        depends_on_classes = own[tensor].shape != with_another[tensor].shape
        if part_of(tensor) not in parts or not depends_on_classes:
            continue
        if class_rows(tensor, len(own[tensor]), len(classes)) is None:
            raise ValueError(
                f"phases.{name}.start_from.parts: found {part_of(tensor)}, but the phase before "
                f"has other classes, and it is not known which rows of {tensor} are of which "
                f"class. List the parts without it; it starts anew."
            )


@contextmanager
def _warnings_only() -> Iterator[None]:
    """Log nothing of this package but warnings in the block."""
    package = logging.getLogger(__package__)
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)


def _read(
    detector: Detector, config: RunConfig, name: str, classes: Sequence[str], run_dir: RunDir
) -> tuple[list[LoadedPart], int | None, str]:
    """Load the detector; say what was loaded, how many classes kept their weights, and a warning.

    The number is None where the source has the same classes, or does not say which.
    """
    source, parts = phase_source(config, name), start_parts(config, name)
    if source == "random":
        return [], None, ""
    if is_timm(source):
        return load_timm_backbone(detector, source, config.model.backbone, parts), 0, ""
    path = Path(source)
    if source == "previous":
        before = phase_before(config, name)
        path = run_dir.checkpoint(before, num_steps(config.phases[before]))
    start = config.phases[name].start_from
    if is_published_file(path):
        return load_backbone_file(detector, path, start.parts, start.pixels, start.ema), 0, ""
    if start.ema is not None:
        _check_ema(path, start.ema)
    if start.pixels is not None:
        raise ValueError(f"{path}: bigdet wrote it, so images are RGB. Leave out pixels.")
    rows, kept = load_run(detector, path, parts, classes)
    is_warned = source != "previous"  # phases differ in their detectors alone
    return rows, kept, hidden_differences(detector, path, parts) if is_warned else ""


def _check_ema(path: Path, is_wanted: bool) -> None:
    """Raise ``ValueError`` unless weights that bigdet wrote are, or are not, an average."""
    is_average = read_metadata(find_weights(path)).get("weights") == AVERAGE
    if is_wanted != is_average:
        found = f"the {AVERAGE} of its weights alone" if is_average else f"no {AVERAGE}"
        raise ValueError(f"{path}: found {found} in it. Leave out ema.")


def is_published_file(path: Path) -> bool:
    """Return whether a path is a file of weights that bigdet did not write."""
    if not path.is_file() or path.suffix != ".safetensors":
        return path.is_file()
    return read_metadata(path).get("format") != FORMAT


def start_table(
    detector: nn.Module, rows: Sequence[LoadedPart], num_classes: int, kept: int | None
) -> list[str]:
    """Return the lines of a table: each part of a detector, where it came from, how large it is.

    The parts of which there is no row are random. ``kept`` is how many of the K classes kept the
    weights of the source, None where it has the same ones.
    """
    sources = {row.part: row.source for row in rows}
    state, parameters = detector.state_dict(), dict(detector.named_parameters())
    lines = [("part", "tensors", "parameters", "classes kept", "from")]
    for part in dict.fromkeys(part_of(name) for name in state):
        names = [name for name in state if part_of(name) == part]
        count = sum(parameters[name].numel() for name in names if name in parameters)
        has_classes = any(
            state[name].ndim and class_rows(name, len(state[name]), num_classes) is not None
            for name in names
        )
        classes = ""
        if has_classes and part in sources:
            classes = "all" if kept is None else f"{kept} of {num_classes}"
        lines.append((part, f"{len(names)}", f"{count:,}", classes, sources.get(part, "random")))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    return [
        f"{part:{widths[0]}}  {tensors:>{widths[1]}}  {count:>{widths[2]}}  "
        f"{classes:>{widths[3]}}  {source}"
        for part, tensors, count, classes, source in lines
    ]
