#!/usr/bin/env bash
# Token-routed against dense on one Hopper GPU: the record profile at 1/8 of its batch, one after the other with the same
# seconds and data, each trained, exported and scored by sliding window; then a table with tok/s, MFU, val_bpb and bytes.
#
#   DATA_PATH=data/datasets/fineweb10B_sp8192 bash records/hopper_ab.sh             8 minutes of training each
#   MAX_WALLCLOCK_SECONDS=300 SEED=42 bash records/hopper_ab.sh                     any knob of train_gpt.py
#
# One seed a side cannot tell differences under 0.003 val_bpb from noise.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
export MAX_WALLCLOCK_SECONDS=${MAX_WALLCLOCK_SECONDS:-480} TRAIN_BATCH_TOKENS=${TRAIN_BATCH_TOKENS:-98304}
seed=${SEED:-1337}
runs=()
for routing in zipf dense; do
  run=hopper_${routing}_seed$seed
  ROUTING=$routing RUN_ID=$run python3 train_gpt.py
  python3 eval_sliding.py "logs/$run.ptz"
  runs+=("logs/$run.txt")
done

python3 records/bench.py --table "${runs[@]}"
