#!/usr/bin/env bash
# All checks, from a fresh machine: format, lint, types, tests by two processes. Arguments go to
# pytest:
#   bash tests/run.sh
#   bash tests/run.sh tests/unit -k boxes
# Makes .venv and installs into it, unless a virtual environment is active. PYTHON chooses the
# interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
  [ -d .venv ] || "${PYTHON:-python3}" -m venv .venv
  . .venv/bin/activate
fi
pip install --quiet --constraint launch/constraints.txt --editable '.[test]'

ruff format --check .
ruff check .
mypy bigdet
OMP_NUM_THREADS=1 python -m pytest --numprocesses 2 --dist loadfile "$@"
