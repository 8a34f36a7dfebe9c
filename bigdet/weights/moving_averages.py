"""Files that hold weights twice: the plain ones, and their moving average (EMA).

Found by the names that timm, torchvision, Swin's and ConvNeXt's authors, detectron2 and its kin,
mmcv, mmengine and many others give the average: a key of its own (``state_dict_ema``,
``model_ema``, ``ema``, ``ema_state_dict``, ``modelEMA``, ``swa_state_dict``, ...), a first word of
the tensors' names (``ema.``, ``model_ema.``), or mmcv's ``ema_`` before a name with its dots
replaced.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)

NESTS = ("model", "state_dict", "blobs")
"""Keys under which files keep the tensors next to other things."""

_EMA = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
_KEY = re.compile(
    r"(^|_)(ema|swa|(?<!exp_)avg|average|averaged|polyak)(_|$)|EMA|[a-z]Ema([A-Z_]|$)"
)
_WRAPPERS = ("module", "state_dict", "model", "shadow", "params")
_COUNTERS = ("n_averaged", "num_updates", "updates", "steps", "decay")


@dataclass(frozen=True)
class Weights:
    """One of the sets of weights in a file.

    Attributes:
        key: where they are in the file; empty for its top.
        tensors: by name.
    """

    key: str
    tensors: dict[str, Tensor]


def choose_weights(content: Any, ema: bool | None, file: Path) -> dict[str, Tensor]:
    """Return the weights that are asked for, and say which where there are two sets.

    Args:
        content: of the file.
        ema: True for the moving average, False for the plain weights. None: what the file has in
            the usual place, which are the plain ones but for mmengine's files.
        file: for messages.

    Returns:
        Tensors by name; empty where the file has none.

    Raises:
        ValueError: the file does not have those that are asked for.
    """
    plain, average = _find_sets(content)
    if plain is None and average is None:
        return {}
    usual = plain or average
    if plain and average and _is_of_mmengine(content):
        plain, average = average, plain  # the average is where others have the plain weights
    chosen = usual if ema is None else average if ema else plain
    if chosen is None:
        has, lacks = ("plain", "no moving average (EMA)") if ema else ("averaged (EMA)", "no plain")
        raise ValueError(
            f"{file}: found {lacks} weights in it, only {has} ones. Leave out ema "
            f"(start_from.ema; --ema or --no-ema when converting), or give another file."
        )
    if average is None:
        return chosen.tensors
    _tell(file, plain, average, chosen)
    if chosen is plain or plain is None or not average.tensors.keys() < plain.tensors.keys():
        return chosen.tensors
    logger.info(
        "%s: %d tensors, such as running statistics, that the average leaves out are the plain "
        "ones", file, len(plain.tensors) - len(average.tensors),
    )  # fmt: skip
    return {**plain.tensors, **average.tensors}


def _tell(file: Path, plain: Weights | None, average: Weights, chosen: Weights) -> None:
    what = "moving average (EMA)" if chosen is average else "plain ones"
    if plain is None:
        logger.info("%s: has the moving average (EMA) of weights alone; it is taken", file)
        return
    logger.info(
        "%s: has plain weights (%s) and their moving average (EMA, %s); taken are the %s. "
        "start_from.ema=true or false chooses (--ema or --no-ema when converting)",
        file, plain.key or "top", average.key, what,
    )  # fmt: skip


def _is_of_mmengine(content: Any) -> bool:
    meta = content.get("meta") if isinstance(content, Mapping) else None
    return isinstance(meta, Mapping) and "mmengine_version" in meta and "ema_state_dict" in content


def _find_sets(content: Any) -> tuple[Weights | None, Weights | None]:
    """Find the weights in the usual place, and the first average."""
    averages: list[Weights] = []
    keys: list[str] = []
    while isinstance(content, Mapping):
        for key, value in content.items():
            tensors = _tensors_of(value) if _KEY.search(str(key)) else {}
            if tensors:
                averages.append(Weights(".".join([*keys, str(key)]), tensors))
        nest = next((name for name in NESTS if isinstance(content.get(name), Mapping)), None)
        if nest is None:
            break
        keys.append(nest)
        content = content[nest]
    plain, averaged, prefix = _split(_named_tensors(content))
    if averaged:
        averages.append(Weights(".".join([*keys, f"{prefix}..."]), averaged))
    usual = Weights(".".join(keys), plain) if plain else None
    return usual, averages[0] if averages else None


def _named_tensors(content: Any) -> dict[str, Tensor]:
    values = content.items() if isinstance(content, Mapping) else ()
    return {str(name): value for name, value in values if isinstance(value, Tensor)}


def _tensors_of(value: Any) -> dict[str, Tensor]:
    """Return the named tensors of an average, out of what it is wrapped in."""
    while isinstance(value, Mapping):
        wrapper = next((name for name in _WRAPPERS if isinstance(value.get(name), Mapping)), None)
        if wrapper is None:
            break
        value = value[wrapper]
    return _clean(_named_tensors(value))


def _clean(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out counters, and the ``module.`` that wrappers put before every name."""
    kept = {name: value for name, value in tensors.items() if name not in _COUNTERS}
    if kept and all(name.startswith("module.") for name in kept):
        return {name.removeprefix("module."): value for name, value in kept.items()}
    return kept


def _split(named: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Part the tensors of one set into plain and averaged ones; say how the latter are named."""
    of_mmcv = {f"ema_{name.replace('.', '_')}": name for name in named}
    plain, averaged, prefix = {}, {}, ""
    for name, tensor in named.items():
        word, dot, rest = name.partition(".")
        if name in of_mmcv:
            averaged[of_mmcv[name]], prefix = tensor, "ema_"
        elif dot and _EMA.search(word):
            averaged[rest], prefix = tensor, f"{word}."
        else:
            plain[name] = tensor
    return plain, _clean(averaged), prefix
