"""What commands share: words of the command line, and the last message."""

import argparse
import ast
import errno
import re
import subprocess
import sys
from pathlib import Path

import pytest

import bigdet
from bigdet.cli.parsing import positive
from bigdet.cli.running import explain


def test_numbers_above_zero_are_taken_and_all_else_is_reported():
    assert positive("12") == 12
    for text in ("0", "-3", "two", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^found {text}, expected a whole n"):
            positive(text)


def test_a_full_disk_is_reported_with_what_to_do():
    assert explain(OSError(errno.ENOSPC, "No space left on device")) == (
        "[Errno 28] No space left on device. Make room where this command writes, or give it "
        "another place."
    )
    assert explain(FileNotFoundError(2, "No such file", "x")) == "[Errno 2] No such file: 'x'"


def test_messages_name_no_files_that_an_installed_package_lacks():
    # tools/ and launch/ are not installed; a folder below tools/ is another framework's.
    package = Path(bigdet.__file__).parent
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.findall(r"(?:tools/\w+\.py|\blaunch/\w+)", node.value)
                assert not named, (file, node.lineno, named)


def test_nothing_is_collected_during_imports_and_what_was_imported_never():
    code = (
        "import gc; from bigdet.cli.running import answer_early, run_command; answer_early(list)\n"
        "assert not gc.isenabled()\n"
        "run_command(lambda words: print(gc.isenabled(), gc.get_freeze_count() > 100_000) or 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("True True\n", 0), ended.stderr
