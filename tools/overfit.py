"""The same as ``bigdet overfit``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("overfit", sys.argv[1:])
