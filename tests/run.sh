#!/usr/bin/env bash
# Lint and test: bash tests/run.sh [pytest arguments]. Sets up as run_8xh100.sh does, plus tests/requirements.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_8xh100.sh
setup "torch, numpy, sentencepiece, zstandard, brotli, sympy, networkx, pytest, hypothesis, xdist, ruff, matplotlib, scipy, pandas" requirements.txt tests/requirements.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # one process per core does more than threads in models this small
"$PYTHON" -m pytest -n auto --dist worksteal "$@"
