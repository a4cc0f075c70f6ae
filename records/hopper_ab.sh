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

python3 - "${runs[@]}" <<'PY'
import json, os, re, sys

import torch

sys.path.insert(0, ".")
from train_gpt import GPT, Hyperparameters, role_of

hp = Hyperparameters.from_env(dict(os.environ))
with torch.device("meta"):
    matrices = {n: p.numel() for n, p in GPT(hp).named_parameters() if role_of(n) in ("matrix", "expert", "mu_matrix")}

def flops_per_token(looped: bool) -> float:
    """Of training: 6 per weight of every matrix that is run and of the head, and 6 T D per layer for causal attention."""
    order = hp.execution_order(looped)
    layers = sum(size for layer in order for name, size in matrices.items() if name.startswith(f"blocks.{layer}."))
    return 6 * (layers + hp.vocab_size * hp.model_dim + len(order) * hp.train_seq_len * hp.model_dim)

print("| run | steps | tok/s | MFU at the end | float | int6 | sliding | bytes |")
print("|---|---|---|---|---|---|---|---|")
for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        log = file.read()
    train, slide = (json.loads(line) for line in log.splitlines() if line.startswith('{"event": '))
    logged = re.findall(r"^step:(\d+)/\d+ train_loss:\S+ train_time:(\d+)ms", log, re.M)
    (step_a, ms_a), (step_b, ms_b) = [map(int, pair) for pair in logged[-2:]]
    late = (step_b - step_a) * hp.train_batch_tokens / (ms_b - ms_a) * 1000
    scores = [train["val_bpb_float"], train["val_bpb"], slide["val_bpb"]]
    print(f"| {train['run_id']} | {train['steps']} | {train['tokens'] / train['train_seconds']:,.0f} | "
          f"{late * flops_per_token(True) / 989e12:.1%} | " + " | ".join(f"{s:.4f}" for s in scores)
          + f" | {train['bytes_total']:,} |")
PY
