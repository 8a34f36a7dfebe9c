"""The message of an error for the user: bigdet's own, or one with the place in the run.

An error that bigdet raises itself says where, what and what to do. One from elsewhere (torch, a
codec, the system) says nothing about the run, so the place in the run is added.
"""

from __future__ import annotations

import dis
import errno
import os
import signal
from types import TracebackType

from bigdet.host.limits import host_memory

_RAISE = dis.opmap["RAISE_VARARGS"]
_OWN = ("bigdet", "__main__")  # a command is __main__
_GIB = 1 << 30
_FULL = ("can't allocate memory", "std::bad_alloc")
"""What torch says when the memory of the host is full."""
_place = ""


class LostProcessError(ValueError, RuntimeError):
    """A process that this one started was killed or failed; shown without a traceback."""


def at(place: str) -> None:
    """Record what this process does from now on, for messages; empty for nothing."""
    global _place
    _place = place


def explain(error: BaseException) -> str:
    """Return the message of an error, with advice if it is one of the system.

    Whether it is bigdet's own depends on where it was raised, not on its text or type.
    """
    if (own := type(error).__module__).startswith("bigdet.") or _is_raised_here(error):
        return _advised(error)
    text = _advised(error) or type(error).__name__
    if text.startswith("Caught ") and "Original Traceback" in text:  # of a loader process
        text = text.strip().splitlines()[-1]
    kind = type(error).__name__ if own == "builtins" else f"{own}.{type(error).__name__}"
    begin = f"{_place}: " if _place else ""
    end = "" if text.endswith((".", "!", "?")) else "."
    return f"{begin}{text}{end} ({kind}{_way(error)}. BIGDET_TRACEBACK=1 shows the traceback.)"


def explain_exit(code: int) -> str:
    """Return what an exit code of a signal, below 0 or above 128, means; else an empty string."""
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return ""
    return f" It got {name}: {memory_hint()}." if name == "SIGKILL" else f" It got {name}."


def explain_killed(error: BaseException) -> str:
    """Return a message if an error of torch means that a loader process was killed; else empty."""
    begin = "DataLoader worker (pid"
    if not (isinstance(error, RuntimeError) and str(error).startswith(begin)):
        return ""
    first = str(error.__cause__)  # with the signal, where torch noticed the end by itself
    text = first if first.startswith(begin) else str(error)
    found = " ".join(text.split("Details are lost")[0].split()).rstrip(".")
    hint = "" if "Segmentation fault" in found else f": {memory_hint()}"
    return (
        f"a loader process was lost ({found}){hint}. Lower data.workers (each holds a few batches "
        f"and decoded images), or give the job more memory. The same command continues from "
        f"the newest checkpoint."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a device, or the host as one, had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def explain_full(error: BaseException) -> str:
    """Return where memory ran out and what to do if an error of torch means that; else empty."""
    if isinstance(error, MemoryError) or not is_out_of_memory(error):
        return ""
    begin, lines = f"{_place}: " if _place else "", str(error).splitlines()
    return (
        f"{begin}out of memory: {lines[0].rstrip('.') if lines else 'none is left'}. Take fewer or "
        f"smaller images at a time (evaluation.images_per_gpu, evaluation.resize), or end what "
        f"else uses the device."
    )


def memory_hint() -> str:
    """Return when the system kills processes, and how much memory there is."""
    memory = host_memory()
    free = "" if memory.available is None else f"{memory.available / _GIB:.1f} of "
    unit = "GiB are free now" if free else "GiB in all"
    return (
        f"the system kills processes when the memory of the host or of the job is full, "
        f"{free}{memory.total / _GIB:.1f} {unit}"
    )


def _advised(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error}. Make room where this command writes, or give it another place."
    if isinstance(error, MemoryError):
        return (
            f"out of memory: {str(error) or 'none is left'}: {memory_hint()}. Lower data.workers "
            f"or --processes, or end other programs."
        )
    return str(error)


def _is_raised_here(error: BaseException) -> bool:
    """Return whether a ``raise`` in bigdet made an error, and not a call from it."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None:
        return True
    return _is_own(last) and last.tb_frame.f_code.co_code[last.tb_lasti] == _RAISE


def _is_own(trace: TracebackType) -> bool:
    name: str = trace.tb_frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in _OWN


def _way(error: BaseException) -> str:
    """Return which package raised an error, and which code of bigdet had called it."""
    trace, caller, raised_in = error.__traceback__, None, ""
    while trace is not None:
        if _is_own(trace):
            caller, raised_in = trace, ""
        else:
            name: str = trace.tb_frame.f_globals.get("__name__", "")
            raised_in = f" from {name.partition('.')[0]}"
        trace = trace.tb_next
    if caller is None:
        return raised_in
    code = caller.tb_frame.f_code
    file = "/".join(code.co_filename.split(os.sep)[-2:])
    return f"{raised_in} in {code.co_name}, {file}:{caller.tb_lineno}"
