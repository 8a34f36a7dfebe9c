"""Measure the AP of a checkpoint on a shard set.

Its command line is in ``cli/arguments/evaluate.py``.
"""

from __future__ import annotations

from bigdet.cli.arguments.evaluate import parse_arguments
from bigdet.cli.running import answer_early, parse_early, run_command

if __name__ == "__main__":
    options = parse_early(parse_arguments)
    if options is not None and options.model.suffix == ".json":  # of detections: without torch
        from bigdet.cli import score_file

        run_command(score_file.main)  # ends the process
    answer_early(parse_arguments)

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bigdet import distributed
from bigdet.cli import score_file
from bigdet.cli.score_file import LIMIT_KEY, check_outputs, report, warn_of_nothing
from bigdet.config.evaluation import TtaConfig
from bigdet.config.load import parse_config
from bigdet.config.model import has_keypoints, has_masks
from bigdet.config.resize import plan_of
from bigdet.config.rules import ConfigError
from bigdet.config.run import RunConfig, phase_data
from bigdet.data.format.manifest import Category, ShardError
from bigdet.data.format.mix import class_ids, warn_of_absent, with_categories
from bigdet.data.format.shard_set import ShardSet
from bigdet.evaluation.coco_metrics import evaluation_kinds
from bigdet.evaluation.detection_limits import warn_of_few
from bigdet.evaluation.detections import Result
from bigdet.evaluation.ground_truth import read_ground_truth
from bigdet.evaluation.scoring import Metrics, evaluate_detections
from bigdet.evaluation.split import passes_of, predict_split
from bigdet.evaluation.tta import AugmentedDetector
from bigdet.evaluation.waiting import work_on_main
from bigdet.host import errors
from bigdet.logs.log import setup_logging
from bigdet.models.detector import Detector
from bigdet.models.weights import find_weights, load_detector, read_metadata

logger = logging.getLogger("bigdet.evaluate")  # __name__ is __main__ here

CHANGEABLE = (
    "evaluation.resize",
    "evaluation.images_per_gpu",
    "evaluation.tta",
    "model.roi.score_threshold",
    "model.roi.nms",
    "model.roi.nms_iou",
    "model.roi.nms_sigma",
    "model.roi.detections_per_image",
    "model.retina.score_threshold",
    "model.retina.nms",
    "model.retina.nms_iou",
    "model.retina.nms_sigma",
    "model.retina.detections_per_image",
    "evaluation.metric",
    "evaluation.max_detections",
    "engine.precision",
    "data.workers",
    "data.worker_kind",
    "data.cache",
)
"""The options that an evaluation reads; others are refused, as they would have no effect."""


def main(arguments: Sequence[str]) -> int:
    """Measure a detector and return the exit code."""
    options = parse_arguments(arguments)
    if options.model.suffix == ".json":
        return score_file.main(arguments)
    if options.max_detections is not None:
        options.overrides.append(f"{LIMIT_KEY}={options.max_detections}")
    if options.metric is not None:
        options.overrides.append(f"evaluation.metric={options.metric}")
    distributed.start()
    setup_logging(distributed.rank())
    with distributed.together():
        check_outputs(options)
        detector = load_detector(options.model)
        config = read_config(options.model, options.overrides)
        shards = ShardSet(options.shards, cache=config.data.cache)
        phase = read_metadata(find_weights(options.model))["phase"]
        if phase_data(config, phase).train.more_shards:  # its classes are those of a mix of sets
            shards = with_categories(shards, [Category(**entry) for entry in detector.categories])
        check_categories(detector, options.model, shards)
        classes = [category["name"] for category in detector.categories]
        warn_of_absent(shards, classes)
        shards.check_random_reads()
        warn_of_few(config)
    warn_of_nothing(shards)
    detector.use_eval_settings(config.model)
    if config.evaluation.resize is not None:
        resize = config.evaluation.resize
        detector.eval_size = plan_of(resize)
    device = distributed.device()
    tta = config.evaluation.tta or (TtaConfig() if options.tta else None)
    short, long = detector.eval_size
    logger.info(
        "%s on %d images of %s: %s, %d ranks on %s",
        find_weights(options.model),
        len(shards),
        shards.address,
        f"short side {short}, long side at most {long}" if tta is None else f"views {tta}",
        distributed.world_size(),
        device.type,
    )
    model, metric = detector.config, config.evaluation.metric
    limit = config.evaluation.max_detections
    with distributed.together():
        kinds = evaluation_kinds(shards, has_masks(model), has_keypoints(model), metric, limit)
    detector = detector.to(device)
    errors.at(f"evaluating {options.model} on {shards.address}")
    results = predict_split(
        detector if tta is None else AugmentedDetector(detector, tta, shards.categories),
        shards,
        passes_of(config, detector.eval_size if tta is None else None),
        device,
        ids=class_ids(shards, classes),
    )
    assert results is not None, "nothing asks it to stop"

    def score() -> Metrics:
        if options.detections is not None:
            truth = read_ground_truth(shards, "segm" in kinds, "keypoints" in kinds)
            write_detections(options.detections, results, truth.source_ids)
        return evaluate_detections(shards, results, kinds, metric, max_detections=limit)

    metrics = work_on_main(score, must_stop=lambda: False)
    with distributed.together():
        if distributed.is_main() and metrics is not None:
            report(metrics, options)
    return 0


def write_detections(
    file: Path, results: Iterable[Result], source_ids: Mapping[str, int] | None = None
) -> None:
    """Write detections as one list in the COCO results format, without holding them in memory.

    ``source_ids`` maps string ids of images to their numbers; the file gets the strings.
    """
    names = {number: name for name, number in (source_ids or {}).items()}
    with open(file, "w", encoding="utf-8") as opened:
        for number, result in enumerate(results):
            result = result | {"image_id": names.get(result["image_id"], result["image_id"])}
            opened.write(("[" if number == 0 else ",\n") + json.dumps(result))
        opened.write("]\n" if opened.tell() else "[]\n")
    logger.info("detections written to %s", file)


def read_config(model: Path, overrides: Sequence[str]) -> RunConfig:
    """Return the config in a weights file, with the overrides that an evaluation may make."""
    for word in overrides:
        key = word.partition("=")[0]
        if not any(key == option or key.startswith(f"{option}.") for option in CHANGEABLE):
            raise ConfigError(
                f"command line: {key}: an evaluation does not read this option, only "
                f"{', '.join(CHANGEABLE)}. Leave it out."
            )
    file = find_weights(model)
    return parse_config(read_metadata(file).get("config", ""), str(file), overrides)


def check_categories(detector: Detector, model: Path, shards: ShardSet) -> None:
    """Raise ``ValueError`` unless the detector was trained on the classes of the set, by name."""
    known = [category["name"] for category in detector.categories]
    found = [category.name for category in shards.categories]
    try:
        class_ids(shards, known)
    except ShardError as error:
        pairs = zip(known, found, strict=False)
        first = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(known), len(found)))
        raise ValueError(
            f"{shards.address}: its {len(found)} categories are not the {len(known)} that {model} "
            f"was trained on: label {first} is {_name(found, first)}, expected "
            f"{_name(known, first)}. {error}"
        ) from error


def _name(names: Sequence[str], label: int) -> str:
    return repr(names[label]) if label < len(names) else "absent"


if __name__ == "__main__":
    run_command(main)
