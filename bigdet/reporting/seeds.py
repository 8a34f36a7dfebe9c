"""The analyses of several seeds as one: means, standard deviations, and sums of counts."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

Analysis = dict[str, Any]
"""The analysis of one kind, see ``evaluation/analysis.py``."""


def mean_analysis(analyses: Sequence[Analysis]) -> Analysis:
    """Return the mean of every number; calibration and confusion are of all seeds together.

    Seeds without a number (null) are left out of its mean.
    """
    rest: Analysis = _combined([_without_pairs(each) for each in analyses], statistics.mean)
    pairs: Counter[tuple[str | None, str | None]] = Counter()
    for each in analyses:
        for true, detected, count in each["confusion"]["pairs"]:
            pairs[true, detected] += count
    return rest | {
        "confusion": {
            "min_score": analyses[0]["confusion"]["min_score"],
            "pairs": [[true, detected, count] for (true, detected), count in pairs.items()],
        },
        "calibration": _pooled([each["calibration"] for each in analyses]),
    }


def deviations(analyses: Sequence[Analysis]) -> Analysis | None:
    """Return the standard deviation of every number; None for a single seed."""
    if len(analyses) == 1:
        return None
    found: Analysis = _combined([_without_pairs(each) for each in analyses], _deviation)
    return found


def _without_pairs(analysis: Analysis) -> Analysis:
    """Leave out the parts whose keys differ between seeds."""
    return {
        key: value for key, value in analysis.items() if key not in ("confusion", "calibration")
    }


def _combined(values: Sequence[Any], combine: Callable[[list[float]], float | None]) -> Any:
    """Combine the numbers with the same keys of nested dicts."""
    if isinstance(values[0], dict):
        return {key: _combined([each[key] for each in values], combine) for key in values[0]}
    known = [value for value in values if value is not None]
    return combine(known) if known else None


def _deviation(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _pooled(bins: Sequence[Analysis | None]) -> Analysis | None:
    """Return the calibration of the detections of all seeds; None if a seed has none."""
    known = [each for each in bins if each is not None]
    if len(known) < len(bins):
        return None
    counts = [sum(count) for count in zip(*(each["count"] for each in known), strict=True)]

    def mean(name: str) -> list[float | None]:
        sums = [0.0] * len(counts)
        for each in known:
            for place, (count, value) in enumerate(zip(each["count"], each[name], strict=True)):
                sums[place] += count * value if count else 0.0
        return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

    return {"count": counts, "score": mean("score"), "precision": mean("precision")}
