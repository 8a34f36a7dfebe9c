"""The same as ``bigdet export``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("export", sys.argv[1:])
