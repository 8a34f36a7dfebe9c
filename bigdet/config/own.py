"""A user's own backbone, detector, board or source of shards, without a change in bigdet.

Each is named in the config or on the command line as ``package.module:attribute``. The module must
be importable: installed, on ``PYTHONPATH``, or in the folder where the command runs. One docstring
has the contract of each kind:

| kind | named by | contract |
| --- | --- | --- |
| backbone | ``model.backbone`` | ``models/backbone_base.py``, ``Backbone`` |
| detector | ``model.detector`` | ``models/detector.py``, ``Detector`` |
| board | ``log.boards`` | ``logs/boards.py``, ``Board`` |
| source of shards | ``bigdet shards NAME`` | ``data/making/sources/own.py`` |

A run folder and its weights keep the name, not the code: to load them takes the module, whose code
then runs.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Collection
from pathlib import Path
from typing import Any

from bigdet.config.rules import nearest
from bigdet.config.timm_names import PREFIX

FORM = "package.module:attribute"


def is_own(name: str) -> bool:
    """Tell whether a name is a user's own, ``package.module:attribute``, and not one of timm's."""
    return ":" in name and not name.startswith(PREFIX)


def refuse_unknown(key: str, name: str, known: Collection[str]) -> None:
    """Raise ``ValueError`` unless a name is one of bigdet's or has the form of a user's own."""
    if name not in known and not is_own(name):
        raise ValueError(
            f"{key}: found {name!r}{nearest(name, known)} Expected one of {', '.join(known)}, or "
            f"your own as {FORM}."
        )


def import_own(key: str, name: str) -> Any:
    """Import what ``package.module:attribute`` names; ``key`` is the option that has the name.

    Raises:
        ValueError: there is no such module or attribute, or the module cannot be imported.
    """
    module_name, _, attribute = name.partition(":")
    if not (attribute.isidentifier() and all(map(str.isidentifier, module_name.split(".")))):
        raise ValueError(f"{key}: found {name!r}, expected {FORM}, such as my_package.nets:build.")
    if not {"", os.getcwd()} & set(sys.path):  # a console script does not look here
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is not None and f"{module_name}.".startswith(f"{absent}."):
            raise ValueError(
                f"{key}: found {name!r}, but there is no module {absent}. Expected one that can be "
                f"imported: install it, put its folder on PYTHONPATH, or run the command there."
            ) from error
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{key}: found {name!r}, but importing {module_name} fails: {type(error).__name__}: "
            f"{error} ({Path(place.filename).name}, line {place.lineno})."
        ) from error
    if not hasattr(module, attribute):
        names = [each for each in vars(module) if not each.startswith("_")]
        raise ValueError(
            f"{key}: found {name!r}, but {module.__file__ or module_name} has no {attribute}"
            f"{nearest(attribute, names)}"
        )
    return getattr(module, attribute)


def import_callable(key: str, name: str) -> Any:
    """Do as `import_own` for what must be a function or a class."""
    found = import_own(key, name)
    if not callable(found):
        raise ValueError(
            f"{key}: found {name!r}, which is {type_name(found)}, expected a function or a class."
        )
    return found


def parameters_of(key: str, name: str, function: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters that a user's function takes, by name.

    Raises:
        ValueError: some cannot be given by name.
    """
    parameters = dict(inspect.signature(function).parameters)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for each in parameters.values():
        if each.kind not in by_name:
            raise ValueError(f"{key}: {name} takes {each}, expected parameters with names only.")
    return parameters


def type_name(found: object) -> str:
    """Return what something is, for messages: ``a list``, ``None``."""
    return "None" if found is None else f"a {type(found).__qualname__}"
