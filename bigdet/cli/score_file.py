"""``bigdet evaluate FILE.json``: the AP of detections that any program wrote, without torch."""

from __future__ import annotations

import argparse
import itertools
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence

from bigdet.cli.arguments.evaluate import parse_arguments
from bigdet.config.evaluation import MAX_DETECTIONS, Metric, check_max_detections
from bigdet.config.rules import ConfigError
from bigdet.data.format.shard_set import ShardSet, source_ids
from bigdet.data.making.loose_values import whole_number
from bigdet.evaluation.coco_metrics import KIND_NAMES, evaluation_kinds
from bigdet.evaluation.detections import CHUNK, RESULT_KEYS, Kind, Result, load_results
from bigdet.evaluation.scoring import Metrics, analysis_table, evaluate_detections, metrics_table
from bigdet.host.files import check_file
from bigdet.host.ranks import is_main
from bigdet.host.strict_json import to_json
from bigdet.logs.log import setup_logging

logger = logging.getLogger(__name__)

LIMIT_KEY = "evaluation.max_detections"


def main(arguments: Sequence[str]) -> int:
    """Measure the detections in a file and return the exit code; other ranks do nothing."""
    options = parse_arguments(arguments)
    if options.max_detections is not None:
        options.overrides.append(f"{LIMIT_KEY}={options.max_detections}")
    if not is_main():
        return 0
    setup_logging(rank=0)
    check_outputs(options)
    overrides = [w for w in options.overrides if w.partition("=")[0] != LIMIT_KEY]
    if overrides or options.detections is not None or options.tta:
        what = "--tta" if options.tta else "--detections"
        what = overrides[0] if overrides else what
        raise ValueError(
            f"{options.model}: a file of detections is scored as it is, so {what} would be "
            f"ignored. Leave it out."
        )
    metric: Metric = options.metric or "coco"
    limit = read_limit(options.overrides, metric)
    results = load_results(options.model)
    head = list(itertools.islice(results, CHUNK))
    if not head:
        logger.warning("%s: contains no detections, so every AP is 0", options.model)
    shards = ShardSet(options.shards)
    warn_of_nothing(shards)
    given = given_kinds(head)
    possible = evaluation_kinds(shards, "segm" in given, "keypoints" in given, metric, limit)
    kinds = [kind for kind in possible if kind in given]
    if not kinds:
        raise ValueError(
            f"{options.model}: the first detection has nothing that {metric} can measure on "
            f"{shards.address}: bbox, or segmentation and keypoints where the set has them. "
            f"Give detections in the COCO results format."
        )
    if kinds != ["bbox"] and head[0].get("bbox"):
        logger.info(
            "APs, APm and APl use the areas of boxes, also for %s, as in pycocotools when the "
            "first detection has a box; detectron2 and mmdetection leave out bbox to score masks",
            " and ".join(f"{KIND_NAMES[kind]}s" for kind in kinds if kind != "bbox"),
        )
    every, where = with_own_ids(itertools.chain(head, results), shards), str(options.model)
    metrics = evaluate_detections(shards, every, kinds, metric, where, limit, one_area=True)
    report(metrics, options)
    return 0


def given_kinds(head: Sequence[Result]) -> set[Kind]:
    """Return the kinds that the first detections of a file have; boxes if there are none."""
    if not head or not isinstance(head[0], dict):  # reported where all are read
        return {"bbox"}
    given = {kind for kind, key in RESULT_KEYS.items() if head[0].get(key)}
    if "bbox" in given and any(isinstance(r, dict) and r.get("segmentation") for r in head):
        given.add("segm")  # the mask of the others is their box
    return given | {"bbox"} if "segm" in given else given  # the box of a mask


def warn_of_nothing(shards: ShardSet) -> None:
    """Warn of a set without objects to find."""
    if not shards.manifest.instances:
        crowd = f", only {shards.manifest.crowd} crowd regions" if shards.manifest.crowd else ""
        logger.warning("%s: has no object to find%s, so every AP is empty", shards.address, crowd)


def read_limit(overrides: Sequence[str], metric: Metric) -> int:
    """Return the ``evaluation.max_detections`` of a command line that scores a file."""
    value = MAX_DETECTIONS
    for text in (word.partition("=")[2] for word in overrides if word.startswith(f"{LIMIT_KEY}=")):
        if not text.isdecimal():
            raise ConfigError(f"command line: {LIMIT_KEY}: found {text!r}, expected a number.")
        value = int(text)
    check_max_detections(value, metric)
    return value


def check_outputs(options: argparse.Namespace) -> None:
    """Raise ``ValueError`` where the results could not be written at the end."""
    for name, file in (("--out", options.out), ("--detections", options.detections)):
        if file is not None and is_main():
            check_file(file, name)


def with_own_ids(results: Iterable[Result], shards: ShardSet) -> Iterable[Result]:
    """Return results whose image ids are strings if the ids of the set are strings."""
    names = source_ids(shards)
    return (_named(result, names) for result in results) if names else results


def _named(result: Result, names: Mapping[str, int]) -> Result:
    given = result.get("image_id") if isinstance(result, dict) else None
    number = whole_number(given)
    if number is None or given in names or str(number) not in names:
        return result
    return result | {"image_id": str(number)}


def report(metrics: Metrics, options: argparse.Namespace) -> None:
    """Print the numbers, and write them to ``--out`` if it is given."""
    if metrics.get("rule") == "lvis":
        logger.info(
            "scored by the LVIS rule: at most 300 detections per image, of classes annotated on it"
        )
    sys.stdout.write(metrics_table(metrics, per_class=True) + "\n")
    if options.analysis:
        sys.stdout.write("\n" + analysis_table(metrics["analysis"]) + "\n")
    if options.out is not None:
        options.out.write_text(to_json(metrics, indent=1) + "\n", encoding="utf-8")
        logger.info("written to %s", options.out)
