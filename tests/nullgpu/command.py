"""``python -m tests.nullgpu.command MODULE ARGUMENTS``: a module's command on the null GPU."""

from __future__ import annotations

import runpy
import sys

from tests.nullgpu import null_gpu


def main() -> None:
    null_gpu.install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
