"""A web page in place of a file: what servers send to clients that are not logged in."""

from __future__ import annotations

import re
from pathlib import Path

_SHOWN = 80  # letters of a title
_LOOKED_AT = 4096


def describe_page(head: bytes, landed: str = "") -> str:
    """Return which page a file is, by its first bytes; empty if it is none.

    No file of a shard set begins with ``<``, nor does JSON.

    Args:
        head: at least some hundred bytes.
        landed: the address that a server redirected to, if any.
    """
    text = head[:_LOOKED_AT].decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
    if not text.startswith("<"):
        return ""
    is_html = re.search(r"<!doctype html|<html\b", text, re.IGNORECASE)
    title = re.search(r"<title[^>]*>\s*(.*?)\s*</title>", text, re.IGNORECASE | re.DOTALL)
    named = f" ({' '.join(title.group(1).split())[:_SHOWN]!r})" if title else ""
    led = f" at {landed}, where the server redirected to," if landed else ""
    return (
        f"there is {'a web page' if is_html else 'an XML text'}{named}{led} instead of the file; "
        f"the server may want a login or a token, or the address is wrong"
    )


def found_page(path: Path) -> str:
    """Return which page a local file is, copied from a server; empty if it is none."""
    try:
        with open(path, "rb") as file:
            return describe_page(file.read(_LOOKED_AT))
    except OSError:
        return ""
