"""The same as ``bigdet show-batch``."""

import sys

from bigdet.cli import run

if __name__ == "__main__":
    run("show-batch", sys.argv[1:])
