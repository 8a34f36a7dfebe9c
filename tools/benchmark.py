"""The same as ``bigdet benchmark``."""

import sys

from bigdet.cli.main import run

if __name__ == "__main__":
    run("benchmark", sys.argv[1:])
