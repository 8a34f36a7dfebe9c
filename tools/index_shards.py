"""The same as ``bigdet index-shards``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("index-shards", sys.argv[1:])
