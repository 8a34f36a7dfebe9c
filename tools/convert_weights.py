"""The same as ``bigdet convert-weights``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("convert-weights", sys.argv[1:])
