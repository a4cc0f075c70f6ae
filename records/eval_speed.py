"""Targets scored per second by eval_sliding.py's code, and by that code with one of its measures taken away.

    python records/eval_speed.py                      # the record model on this GPU: random weights, random tokens
    TTT=sgd python records/eval_speed.py              # also a chunk of test-time training
    SECONDS_EACH=2 DEVICE=cpu DTYPE=float32 NUM_LAYERS=3 MODEL_DIM=128 NUM_HEADS=4 NUM_KV_HEADS=2 SHARED_DIM=256 \\
        LOOP_PASSES=1 TRAIN_SEQ_LEN=256 MICRO_BATCH_TOKENS=8192 VOCAB_SIZE=1024 TTT_CHUNK_TOKENS=4096 \\
        python records/eval_speed.py                  # the same table in a minute on a CPU

Any knob of train_gpt.py sets the model and the evaluation; what the weights and tokens are does not matter. The last
column extrapolates to the challenge's 40.5 million targets of sp8192 on eight such devices.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import eval_sliding
from train_gpt import (
    GPT,
    Dist,
    Hyperparameters,
    Scorer,
    ValData,
    can_compile,
    choose_attention,
    pick,
    require,
    run_entry_point,
)

CHALLENGE_TARGETS, RECORD_DEVICES = 40_540_160, 8


class FullLastLayer(GPT):
    """Head at the scored positions, every layer at all of them."""

    def features(self, input_ids, looped=True, scored=None):
        x, balance = super().features(input_ids, looped)
        return pick(x, scored), balance


class FullHead(GPT):
    """All layers and the head at all positions; losses of the scored ones."""

    def forward(self, input_ids, target_ids=None, reduction="mean", looped=True, scored=None):
        losses = torch.nn.functional.cross_entropy(
            pick(super().forward(input_ids), scored).flatten(0, 1),
            target_ids.flatten(),
            reduction="none",
        )
        return losses.view_as(target_ids)


def random_split(hp: Hyperparameters, targets: int, device: torch.device) -> ValData:
    tokens = torch.randint(hp.vocab_size, (targets + 1,), device=device, dtype=torch.int32)
    return ValData(tokens, torch.ones(targets, dtype=torch.int32, device=device), "", False)


def rate_of(
    model: GPT, hp: Hyperparameters, dist: Dist, compiles: bool, seconds: float
) -> tuple[float, int]:
    """Targets per second over at least `seconds` of scoring after a warm-up, and windows per forward pass."""
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiles else model
    scorer = Scorer(
        forward, random_split(hp, 1 << 20, dist.device), hp, dist, hp.eval_stride, "speed"
    )
    windows = scorer.windows[len(scorer.windows) // 2 :]
    eval_sliding.score_within_memory(scorer, windows[: scorer.batch_size])
    done, started = 0, dist.synchronize()
    while time.perf_counter() - started < seconds:
        eval_sliding.score_within_memory(scorer, windows[: scorer.batch_size])
        done += scorer.batch_size * hp.eval_stride
        dist.synchronize()
    return done / (time.perf_counter() - started), scorer.batch_size


def chunk_seconds(model: GPT, hp: Hyperparameters, dist: Dist, compiles: bool) -> float:
    """Seconds to score a chunk and train on it, after a warm-up."""
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiles else model
    val, hp = (
        random_split(hp, hp.ttt_chunk_tokens + hp.eval_stride, dist.device),
        replace(hp, ttt_segments=1),
    )
    for _ in range(2):
        scorer, started = (
            Scorer(forward, val, hp, dist, hp.eval_stride, "speed"),
            dist.synchronize(),
        )
        eval_sliding.score_split(scorer, model, hp, print, started)
        seconds = dist.synchronize() - started
    return seconds


def main() -> None:
    """Print the table. Raises Refusal."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    require(
        len(sys.argv) == 1,
        f"{sys.argv[0]} takes knobs from the environment, no arguments (more with --help)",
    )
    seconds = float(os.environ.get("SECONDS_EACH", "10"))
    hp = Hyperparameters.from_env(dict(os.environ))
    hp, dist = replace(hp, eval_max_seconds=0.0), Dist.from_torchrun(hp.device)
    torch.set_float32_matmul_precision("high")
    base = GPT(hp)
    base.init_weights()
    compiles, single = can_compile(hp, dist.device), replace(hp, micro_batch_tokens=1)
    variants = {
        "all measures": (GPT, hp, compiles),
        "every position through the last layer": (FullLastLayer, hp, compiles),
        "and through the head": (FullHead, hp, compiles),
        "not compiled": (GPT, hp, False),
        "one window at a time": (GPT, single, compiles),
        "none of them": (FullHead, single, False),
    }
    window = hp.eval_seq_len or hp.train_seq_len
    print(
        f"{sum(p.numel() for p in base.parameters()):,} parameters, window {window}, stride {hp.eval_stride}"
    )
    print(
        "| scoring | windows per pass | targets/s | ratio | s for the challenge on 8 |\n|---|---|---|---|---|"
    )
    slowest = None
    for name, (kind, knobs, wanted) in reversed(variants.items()):
        model = kind(knobs)
        model.load_state_dict(base.state_dict())
        choose_attention(model.to(dist.device), dist.device, lambda text: None)
        torch.compiler.reset()
        rate, batch_size = rate_of(model, knobs, dist, wanted, seconds)
        slowest = slowest or rate
        needed = CHALLENGE_TARGETS / RECORD_DEVICES / rate
        print(
            f"| {name} | {batch_size} | {rate:,.0f} | {rate / slowest:.2f} | {needed:,.0f} |",
            flush=True,
        )
    if hp.ttt != "off":
        torch.compiler.reset()
        spent, chunks = (
            chunk_seconds(model, hp, dist, compiles),
            CHALLENGE_TARGETS / hp.ttt_chunk_tokens,
        )
        print(
            f"TTT: {spent:.2f} s a chunk of {hp.ttt_chunk_tokens} targets, {hp.ttt_epochs} epochs: "
            f"{spent * chunks / RECORD_DEVICES:,.0f} s for the challenge on 8"
        )


if __name__ == "__main__":
    run_entry_point(main)
