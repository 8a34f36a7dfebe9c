"""The same as ``bigdet show-batch``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("show-batch", sys.argv[1:])
