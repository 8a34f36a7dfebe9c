"""The same as ``bigdet shards``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("shards", sys.argv[1:])
