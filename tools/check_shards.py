"""The same as ``bigdet check-shards``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("check-shards", sys.argv[1:])
