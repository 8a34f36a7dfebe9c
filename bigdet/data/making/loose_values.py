"""Numbers and flags as other programs write them: 1.0, "1", true."""

from __future__ import annotations

import math
import re
from typing import Any

MAX_ID = 2**63 - 1

_WHOLE = re.compile(r"\s*(-?[0-9]{1,19})(\.0*)?\s*")
_NUMBER = re.compile(r"\s*[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]{1,3})?\s*", re.ASCII)
_FLAGS = {"": False, "0": False, "false": False, "no": False, "1": True, "true": True, "yes": True}


def whole_number(value: Any) -> int | None:
    """Return a whole number below 2**63, also one written as 2.0 or "2"; None for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    elif isinstance(value, str) and (match := _WHOLE.fullmatch(value)):
        value = int(match[1])
    return value if type(value) is int and abs(value) <= MAX_ID else None


def with_numbers(value: Any) -> Any:
    """Return a value as it is, but "1.5" and the like as numbers, and so in a list of values."""
    if isinstance(value, list):
        return [with_numbers(v) for v in value] if any(type(v) is str for v in value) else value
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else value


def truth_value(value: Any) -> bool | None:
    """Return a flag, False if it is absent (null, NaN, an empty string); None if it is not one."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return False
    if isinstance(value, str):
        value = value.strip().lower()
        return _FLAGS.get(value.removesuffix(".0"))
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None
