"""Small training logs in the three dialects that records/runlog.py reads.   (no tests here)"""

import json
import math

from runlog import RULE

STEPS, BATCH, TARGETS = 400, 2048, 5_000
NATS = 1.6  # per token, that one bit per byte is in these logs
SOURCE = '"""A trainer."""\n\nimport torch\n\nBANNER = "=" * 100\n'
AUDIT = """\
| condition | test | finding | |
|---|---|---|---|
| C1 causal | other tokens | unchanged | pass |
| C4 single pass | a counter | 768 of 768 | pass |
"""
MODEL, CODE = 213_463, 30_000


def scores(loss: float, mode: str = "val") -> str:
    return f"{mode}_loss:{loss:.8f} {mode}_bpb:{loss / NATS:.8f}"


def ours(
    seed: int = 1337,
    partial: bool = False,
    targets: int = TARGETS,
    ttt: str = "off",
    run_id: str = "run",
) -> str:
    """Ours: 100 ms a step, the recurrence from step 150 on, 6 s of Hessians."""
    mode, label = "PARTIAL" if partial else "val", "sliding_window" if ttt == "off" else "ttt"
    train = ""
    for step in (1, 100, 200, 300, 400):
        train += f"step:{step}/{STEPS} train_loss:{4 - step / 400:.6f} train_time:{100 * step}ms "
        train += "step_avg:100.00ms lr_scale:1.000 tok/s: 20480\n"
        if step == 100:
            train += "layer_loop:enabled step:150 frac:0.375\n"
    trained = {"run_id": run_id, "partial": partial, "train_seconds": 46.0, "steps": STEPS}
    trained |= {"val_loss": 3.2, "val_bpb": 3.2 / NATS, "val_bpb_float": 3.1 / NATS}
    scored = {"partial": partial, "stride": 64, "eval_seconds": 9.5, "target_tokens": targets}
    scored |= {"scored_bytes": round(NATS / math.log(2) * targets)}
    scored |= {"val_loss": 3.15, "val_bpb": 3.15 / NATS, "ttt": ttt}
    if partial:
        trained |= {"val_bpb": None, "val_bpb_float": None}
        scored["val_bpb"] = None
    return f"""{SOURCE}{RULE}
/bin/sh: 1: nvidia-smi: not found
python:3.11.7 torch:2.13.0+cpu numpy:2.4.6 commit:3d916ea
  run_id: {run_id}
  seed: {seed}
  data_path: /data/{run_id}
  train_batch_tokens: {BATCH}
  matrix_lr: 0.03
device:cpu threads:2 overrides: RUN_ID={run_id}
model_params:675212 world_size:1 seed:{seed}
val_loader:shards pattern=/data/fineweb_val_*.bin tokens:{targets}
dry run: 999 bytes of code + model expected
{train}stopping_early: wallclock_cap train_time:46000ms step:{STEPS}/{STEPS}
step:{STEPS}/{STEPS} {scores(3.1, mode)} train_time:46000ms step_avg:115.00ms
pre-quantization post-ema {scores(3.1, mode)} eval_time:2000ms
Serialized model quantized+zstd: {MODEL} bytes in 1.1s
Code size: {CODE} bytes
Total submission size quantized+zstd: {MODEL + CODE} bytes
quantized round to nearest {scores(3.3, mode)} eval_time:2000ms
quantized {scores(3.2, mode)} eval_time:2500ms
final_roundtrip_exact {scores(3.2, mode)}
{json.dumps({"event": "train_summary", **trained})}
sliding evaluation of logs/{run_id}.ptz window:256 stride:64 world_size:1
trained_window:256 rope_base:10000 sidecar:False ttt:{ttt}
quantized_{label} {scores(3.15, mode)} eval_time:9500ms
final_{label}_exact {scores(3.15, mode)}
total_eval_time:11.0s
{json.dumps({"event": "eval_summary", **scored})}
{AUDIT}"""


def old(seed: int = 1337, points: int = 20, validate: int = 5, targets: int = 62_021_632) -> str:
    """Until April 2026: `points` lines every 50 steps of 40 ms, every `validate`-th validated."""
    lines = [f"step:0/20000 {scores(6.9)} train_time:0ms step_avg:0.01ms"]
    for point in range(1, points + 1):
        clock = f"train_time:{2000 * point}ms step_avg:40.00ms"
        loss = 3 - point / points + 0.1 * (point % 2)
        lines.append(f"step:{50 * point}/20000 train_loss:{loss:.4f} {clock}")
        if point % validate == 0:
            lines.append(f"step:{50 * point}/20000 {scores(3 - point / points)} {clock}")
    body = "\n".join(lines)
    return f"""{SOURCE}{RULE}
Running Python 3.12.3 (main)
Running PyTorch 2.9.1+cu128
| 0  NVIDIA H100 80GB HBM3          On  |   00000000:18:00.0 Off |                    0 |
{RULE}
val_loader:shards pattern=./data/fineweb_val_*.bin tokens:{targets}
model_params:17059912
world_size:8 grad_accum_steps:1
train_batch_tokens:524288 train_seq_len:1024 iterations:20000 max_wallclock_seconds:600.000
seed:{seed}
{body}
stopping_early: wallclock_cap train_time:{2000 * points + 38}ms step:{50 * points}/20000
peak memory allocated: 10184 MiB reserved: 10200 MiB
Serialized model: 67224983 bytes
Code size: 47642 bytes
Total submission size: 67272625 bytes
Serialized model int8+zlib: 15815847 bytes (payload:17178912 raw_torch:17224025 payload_ratio:3.91x)
Total submission size int8+zlib: 15863489 bytes
final_int8_zlib_roundtrip val_loss:2.0727 val_bpb:1.2954 eval_time:1401ms
final_int8_zlib_roundtrip_exact {scores(2.07269931)}
"""


def new(seed: int = 42, directory: str = "./data", targets: int = 45_508_608) -> str:
    """Since April 2026: minutes with one digit, validation without a time, a block of knobs."""
    return f"""Hyperparameters:
  datasets_dir: {directory}/datasets
  is_main_process: True
  logfile: logs/{seed}.txt
  matrix_lr: 0.022
  seed: {seed}
  train_batch_tokens: 786432
  world_size: 8
train_shards: 128
val_tokens: {targets}
model_params:35943512
0/20000 val_loss: 9.0090 val_bpb: 5.6306
1/20000 train_loss: 9.0111 train_time: 0.0m tok/s: 8242436
500/20000 train_loss: 3.3339 train_time: 0.8m tok/s: 7726831
layer_loop:enabled step:700 frac:0.500 encoder:[0, 1, 2] decoder:[2, 1, 0]
1000/20000 train_loss: 3.1906 train_time: 1.7m tok/s: 7728478
1000/20000 val_loss: 3.1040 val_bpb: 1.9400
1100/20000 val_loss: 3.0400 val_bpb: 1.9000
stopping_early: wallclock_cap train_time: 118136ms step: 1100/20000
pre-quantization post-ema {scores(3.02)} eval_time:6006ms
Serialized model: 135426937 bytes
Code size: 15516 bytes
Serialized model quantized+brotli: 15973467 bytes
Total submission size quantized+brotli: 15988983 bytes
quantized {scores(3.05)} eval_time:7467ms
quantized_sliding_window {scores(3.01)} eval_time:84115ms
legal_ttt_exact {scores(3.0)} eval_time:290000ms
"""


def short(seed: int = 42) -> str:
    """Of the old time, with lines `step:N/M loss:`, settings in one line and sizes in another."""
    return f"""{SOURCE}{RULE}
--- Hyperparameters ---
activation=relu2 matrix_lr=0.04 run_id=x seed={seed} train_batch_tokens=524288
params:73685840 L:10 d:768 h:8 kv:4 ws:8 ga:1 s:{seed}
step:1000/10000 loss:3.3120 ce:3.3000 t:91478ms avg:91.5ms
step:2000/10000 loss:3.2883 ce:3.2700 t:183345ms avg:91.7ms
step:2000/10000 {scores(3.2)} train_time:183400ms zero_frac:0.336
artifact:15.92MB ternary:64880640(14239486B) fp:2513744(2537376B) code:70853
budget:15993853/16000000 (15.99/16.00MB) FITS
final_ternary_roundtrip {scores(3.1)}
final_sliding {scores(3.0)} (stride=16, T=0.90) eval_time:429311ms
"""
