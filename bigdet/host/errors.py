"""What an error says to the user: the message of bigdet, or where the run was when one came up.

An error that bigdet raises itself says where, what and what to do. One that comes up elsewhere (in
torch, in a codec, in the system) says nothing of the run; it is told with the place in the run.
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
"""What torch says where the memory of the host is full."""
_place = ""


class LostProcessError(ValueError, RuntimeError):
    """A process that this one started was killed or failed; it is told without a traceback."""


def at(place: str) -> None:
    """Note what this process does from now on, for messages; empty for nothing to tell."""
    global _place
    _place = place


def explain(error: BaseException) -> str:
    """Return what an error says, and what to do where the system itself says no more.

    Whose it is, is told by where it was raised, not by its text or type.
    """
    if (own := type(error).__module__).startswith("bigdet.") or _is_raised_here(error):
        return _advised(error)
    text = _advised(error) or type(error).__name__
    if text.startswith("Caught ") and "Original Traceback" in text:  # of a loader process
        text = text.strip().splitlines()[-1]
    kind = type(error).__name__ if own == "builtins" else f"{own}.{type(error).__name__}"
    begin = f"{_place}: " if _place else ""
    end = "" if text.endswith((".", "!", "?")) else "."
    return (
        f"{begin}{text}{end} ({kind}{_way(error)}. BIGDET_TRACEBACK=1 shows the whole way there.)"
    )


def explain_exit(code: int) -> str:
    """Say what an exit code means that is of a signal, below 0 or above 128; else nothing."""
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name
    except ValueError:
        return ""
    return f" It got {name}: {memory_hint()}." if name == "SIGKILL" else f" It got {name}."


def explain_killed(error: BaseException) -> str:
    """Say that a loader process was killed, where an error of torch means that; else nothing."""
    begin = "DataLoader worker (pid"
    if not (isinstance(error, RuntimeError) and str(error).startswith(begin)):
        return ""
    first = str(error.__cause__)  # with the signal, where torch noticed the end by itself
    text = first if first.startswith(begin) else str(error)
    found = " ".join(text.split("Details are lost")[0].split()).rstrip(".")
    hint = "" if "Segmentation fault" in found else f": {memory_hint()}"
    return (
        f"a loader process was lost ({found}){hint}. Lower data.workers (each holds a few batches "
        f"and decoded images), or give the job more memory. The same command goes on from the "
        f"newest checkpoint."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether a device, or the host as one, had no memory left."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # of torch
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _FULL)


def explain_full(error: BaseException) -> str:
    """Say where memory ran out and what to do, where an error of torch means that; else nothing."""
    if isinstance(error, MemoryError) or not is_out_of_memory(error):
        return ""
    begin, lines = f"{_place}: " if _place else "", str(error).splitlines()
    return (
        f"{begin}out of memory: {lines[0].rstrip('.') if lines else 'none is left'}. Take fewer or "
        f"smaller images at a time (evaluation.images_per_gpu, evaluation.resize), or end what "
        f"else uses the device."
    )


def memory_hint() -> str:
    """Say when the system kills processes, and how much memory there is."""
    memory = host_memory()
    free = "" if memory.available is None else f"{memory.available / _GIB:.1f} of "
    told = "GiB are free now" if free else "GiB in all"
    return (
        f"the system kills processes when the memory of the host or of the job is full, "
        f"{free}{memory.total / _GIB:.1f} {told}"
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
    """Tell whether a ``raise`` of bigdet made an error, and not a call that it made."""
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
    """Say which package raised an error, and what of bigdet had called it."""
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
