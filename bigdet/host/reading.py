"""Errors of the system while a file is read, which say nothing about its content.

A read that may succeed later is tried again. An error that remains ends the command, with the
reason and what to do: taken for damage, it would cost images, or intact files would be made again.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import TypeVar

logger = logging.getLogger(__name__)

RETRY_SECONDS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between attempts, so there is one more attempt. No jitter: processes that fail together
wait for each other's lock anyway when files are fetched, see ``data/format/cache.py``."""


def _numbers(names: str) -> frozenset[int]:
    """Return the error numbers of some names, as far as this system has them."""
    return frozenset(getattr(errno, name) for name in names.split() if hasattr(errno, name))


_MAY_NOT = _numbers("EACCES EPERM")
_TOO_MANY = _numbers("EMFILE ENFILE")
_NO_MEMORY = _numbers("ENOMEM ENOBUFS")
_NETWORK = _numbers(
    "ESTALE ETIMEDOUT EHOSTDOWN EHOSTUNREACH ENETDOWN ENETUNREACH ENETRESET ECONNRESET "
    "ECONNREFUSED ECONNABORTED"
)
_DISK = _numbers("EIO EREMOTEIO EBUSY EAGAIN EINTR ENOLCK")
_GONE = _numbers("ENOENT ENOTDIR ENODEV ENXIO ENOTCONN ESHUTDOWN ENOMEDIUM")
MAY_PASS = _TOO_MANY | _NO_MEMORY | _NETWORK | _DISK
NO_FILE = _numbers("ENOENT ENOTDIR ELOOP ENAMETOOLONG EINVAL EILSEQ EBADF")
"""Errors for a name that no file has, or could have."""

_ADVICE = (
    (_MAY_NOT, "Allow the user that runs this command to read it (chmod, or mount options)"),
    (_TOO_MANY, "Raise the limit of open files (ulimit -n), or lower data.workers"),
    (_NO_MEMORY, "This host has no memory left: lower data.workers, or end other programs"),
    (_NETWORK | _GONE, "Check that its disk or network folder is mounted here and answers"),
    (_DISK, "Check its disk or network folder; the system's log (dmesg) may say more"),
)

T = TypeVar("T")


def patiently(read: Callable[[], T], name: str) -> T:
    """Return what a function reads, called again if the system may only be busy or unreachable.

    Args:
        read: starts from the beginning each time.
        name: of what is read, for the log.

    Raises:
        OSError: that of the last attempt, or one that waiting does not change.
    """
    for pause in RETRY_SECONDS:
        try:
            return read()
        except OSError as error:
            if error.errno not in MAY_PASS:
                raise
            logger.warning("%s: %s; again in %.1f s", name, os.strerror(error.errno), pause)
        time.sleep(pause)
    return read()


def why_unread(error: OSError | MemoryError) -> str:
    """Return why something cannot be read, and what to do: a predicate and a sentence."""
    number = error.errno if isinstance(error, OSError) else errno.ENOMEM
    if number is None:
        return f"cannot be read ({error})."
    advice = next((text for numbers, text in _ADVICE if number in numbers), "Check it")
    return f"cannot be read ({os.strerror(number)}). {advice}; nothing is known to be damaged."
