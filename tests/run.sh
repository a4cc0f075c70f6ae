#!/usr/bin/env bash
# Lint and test: bash tests/run.sh [pytest arguments]. Sets up as run_8xh100.sh does, plus tests/requirements.txt.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source run_8xh100.sh
setup "torch, numpy, sentencepiece, zstandard, brotli, sympy, networkx, pytest, hypothesis, ruff, matplotlib, scipy" requirements.txt tests/requirements.txt
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
