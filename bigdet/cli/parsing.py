"""What the parsers of all commands share."""

from __future__ import annotations

import argparse

from bigdet.host.limits import num_cpus


def command_parser(
    name: str, description: str | None, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Return a parser whose help shows a description as it is written.

    Args:
        name: what comes after ``bigdet``.
        description: the docstring of the command.
        epilog: what follows the list of options.
    """
    return argparse.ArgumentParser(
        prog=f"bigdet {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=epilog,
    )


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Add the ``key=value`` words that change options of a config."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="options to change"
    )


def add_count(parser: argparse.ArgumentParser, name: str, default: int, meaning: str) -> None:
    """Add an option that takes a whole number above 0; its help names the default."""
    parser.add_argument(name, type=positive, default=default, help=f"{meaning}; default {default}")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Add ``--processes``."""
    parser.add_argument(
        "--processes",
        type=positive,
        default=num_cpus(),
        help="number of processes; default: one per CPU",
    )


def positive(text: str) -> int:
    """Read a whole number above 0: a ``type`` of argparse."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"found {text}, expected a whole number above 0")
    return value
