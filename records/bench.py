"""Measure what a training step costs on this device: time, memory and MFU, by way of dispatch.

    python records/bench.py                          # GPU: the record at 1/8 of its batch
    NUM_EXPERTS=8 MU=off python records/bench.py     # any knob of train_gpt.py
    python records/bench.py eval                     # targets per second of eval_sliding.py
    python records/bench.py --table logs/*.txt       # finished trainings side by side

Steps are those of train_gpt.py, on random tokens that are as frequent as those of a text. Without a
GPU, and without a knob of the model in the environment, the model is that of PROFILE=smoke. MFU is
of the dense bfloat16 peak of an H100 or H200, 989 TFLOP/s.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import ArgumentParser, markdown_table, profile
from runlog import RunLog

from eval_sliding import EvalConfig, score_within_memory
from train_gpt import (
    GPT,
    SHARD_HEADER_INTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    ConfigError,
    Dist,
    Gradients,
    Hyperparameters,
    ModelConfig,
    Progress,
    Scorer,
    TokenLoader,
    ValData,
    average_weight,
    build_expert_table,
    build_optimizers,
    can_compile,
    choose_attention,
    knob_fields,
    require,
    role_of,
    run_entry_point,
    set_schedules,
    train_step,
)

PEAK_FLOPS = 989e12  # per second, dense bfloat16, H100 and H200 (SXM) by their data sheet
RECORD_RANKS = 8
CHALLENGE_TARGETS = 40_540_160  # of the challenge's validation split in sp8192
BLOCKS = 5  # of steps; the table has their median and extremes
WARMUP_STEPS = 3


# ---- Arithmetic ----------------------------------------------------------------------------------


def flops_per_token(config: ModelConfig, looped: bool) -> float:
    """Return the floating-point operations that a training step takes for a token.

    6 for every weight of a matrix that is multiplied with, and 6 T D per layer run for causal
    attention. The masked dispatch multiplies with all experts, the grouped one with one of E.
    """
    with torch.device("meta"):
        model = GPT(config)
    weights = [0.0] * config.num_layers
    for name, p in model.named_parameters():
        role = role_of(name)
        if role in ("matrix", "mu_matrix", "router", "expert"):
            is_grouped = role == "expert" and config.is_grouped
            used = 1 / config.num_experts if is_grouped else 1.0
            weights[int(name.split(".")[1])] += used * p.numel()
    order = config.execution_order(looped)
    head = config.vocab_size * config.model_dim
    attention = len(order) * config.train_seq_len * config.model_dim
    return 6 * (sum(weights[layer] for layer in order) + head + attention)


def is_hopper(hardware: str) -> bool:
    return "H100" in hardware or "H200" in hardware


# ---- Training steps ------------------------------------------------------------------------------


def text_like(vocab_size: int, count: int) -> np.ndarray:
    """Return (count,) uint16 ids by Zipf-Mandelbrot: uniform ones would spare the embedding."""
    shares = 1 / (np.arange(vocab_size) + 3.7)
    generator = np.random.default_rng(0)
    return generator.choice(vocab_size, count, p=shares / shares.sum()).astype("<u2")


def write_tokens(folder: Path, hp: Hyperparameters) -> None:
    """Write a training shard of four batches."""
    tokens = text_like(hp.model.vocab_size, 4 * hp.train_batch_tokens)
    header = np.zeros(SHARD_HEADER_INTS, "<i4")
    header[:3] = SHARD_MAGIC, SHARD_VERSION, len(tokens)
    (folder / "fineweb_train_0.bin").write_bytes(header.tobytes() + tokens.tobytes())


class Trainer:
    """What the training of train_gpt.py sets up, and one step of its loop."""

    def __init__(self, hp: Hyperparameters, dist: Dist):
        self.hp = hp.validate()
        self.dist = dist
        self.loader = TokenLoader(hp, dist)
        self.model = GPT(hp.model, hp.torch_dtype)
        self.model.init_weights(hp.seed)
        counts = np.bincount(self.loader.sample(), minlength=hp.model.vocab_size)
        self.model.expert_table.copy_(build_expert_table(hp.model, counts))
        self.model.to(dist.device)
        choose_attention(hp.attention, self.model, dist.device, lambda text: None)

        torch.compiler.reset()  # what another variant compiled counts towards Dynamo's limit
        self.forward = self.model
        if can_compile(hp, dist.device):
            self.forward = torch.compile(self.model, fullgraph=True, dynamic=False)
        self.optimizers = build_optimizers(hp, self.model, dist)
        self.gradients = Gradients(self.model, dist)
        self.weights = [p.detach() for p in self.model.parameters()]
        self.average = [p.clone() for p in self.weights]

    def step(self, looped: bool) -> torch.Tensor:
        """Take a step in the middle of the budget, when nothing warms up. Returns the loss."""
        hp = self.hp
        set_schedules(hp, self.optimizers, 0.5)
        batches = [self.loader.next_batch() for _ in range(hp.grad_accum_steps(1))]
        loss = train_step(
            self.forward, self.optimizers, self.gradients, batches, hp.grad_clip_norm, looped
        )
        newest = average_weight(hp, 0.5, 1000)
        if newest:
            torch._foreach_lerp_(self.average, self.weights, newest)
        return loss


def time_blocks(work: Callable[[], object], dist: Dist, seconds: float) -> list[float]:
    """Return seconds per call in each of BLOCKS blocks of about `seconds`, fastest first."""
    started = dist.synchronize()
    work()
    calls = max(1, math.ceil(seconds / (dist.synchronize() - started)))
    times = []
    for _ in range(BLOCKS):
        started = dist.synchronize()
        for _ in range(calls):
            work()
        times.append((dist.synchronize() - started) / calls)
    return sorted(times)


def measure(trainer: Trainer, looped: bool, seconds: float) -> dict[str, float]:
    """Time steps after a warm-up. Raises ConfigError for a loss that is not finite."""
    for _ in range(WARMUP_STEPS):
        loss = trainer.step(looped)
    require(math.isfinite(loss.item()), f"the loss is {loss.item()}")
    peak = None
    is_cuda = trainer.dist.device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = time_blocks(lambda: trainer.step(looped), trainer.dist, seconds)
    if is_cuda:
        peak = torch.cuda.max_memory_allocated()
    median = statistics.median(times)
    rate = trainer.hp.train_batch_tokens / median
    flops = rate * flops_per_token(trainer.hp.model, looped)
    return {
        "seconds": median,
        "fastest": times[0],
        "slowest": times[-1],
        "tokens_per_second": rate,
        "flops": flops,
        "peak_bytes": peak,
    }


def variants(hp: Hyperparameters) -> dict[str, Hyperparameters]:
    """Return the model by both ways of dispatch, and dense with the same parameters."""
    routing = hp.model.routing if hp.model.is_routed else "zipf"
    kinds = {"dense": {"routing": "dense"}}
    for dispatch in ("masked", "grouped"):
        kinds[dispatch] = {"routing": routing, "dispatch": dispatch}
    return {name: replace(hp, model=replace(hp.model, **new)) for name, new in kinds.items()}


def bench_steps(hp: Hyperparameters, dist: Dist, device: str, seconds: float) -> str:
    """Return the table of a training step by dispatch, with the depth recurrence off and on."""
    rows = []
    left_out = []
    dense = {}
    loops = (False, True) if hp.model.loop_passes > 1 else (False,)
    kinds = variants(hp)
    with Progress("bench", len(kinds) * len(loops)) as progress:
        for name, knobs in kinds.items():
            try:
                trainer = Trainer(knobs, dist)
                for looped in loops:
                    progress.update(len(rows), f"{name}, compiling and measuring")
                    row = measure(trainer, looped, seconds)
                    if name == "dense":
                        dense[looped] = row["seconds"]
                    title = f"{name}, recurrence {'on' if looped else 'off'}"
                    rows.append(step_row(title, row, dense.get(looped), device))
            except (ConfigError, torch.cuda.OutOfMemoryError) as error:
                left_out.append(f"{name}: {str(error).splitlines()[0]}")
            trainer = None  # its memory would count in the next one's peak
    header = "step|tok/s|ms, median|blocks|over dense|TFLOP/s|MFU|peak MiB"
    return "\n".join([markdown_table(header.split("|"), rows), *left_out])


def step_row(title: str, row: dict, dense_seconds: float | None, device: str) -> list[str]:
    """Return the cells of a measurement, with a dash for what is not known."""
    over = f"{row['seconds'] / dense_seconds - 1:+.1%}" if dense_seconds else "-"
    mfu = f"{row['flops'] / PEAK_FLOPS:.1%}" if is_hopper(device) else "-"
    peak = f"{row['peak_bytes'] / 2**20:,.0f}" if row["peak_bytes"] else "-"
    spread = f"{1000 * row['fastest']:.2f} to {1000 * row['slowest']:.2f}"
    rate = f"{row['tokens_per_second']:,.0f}"
    milliseconds = f"{1000 * row['seconds']:.2f}"
    return [title, rate, milliseconds, spread, over, f"{row['flops'] / 1e12:.3f}", mfu, peak]


# ---- Scoring -------------------------------------------------------------------------------------


def bench_eval(hp: Hyperparameters, config: EvalConfig, dist: Dist, seconds: float) -> str:
    """Return the table of the sliding window's targets per second, compiled and not."""
    model = GPT(hp.model, hp.torch_dtype, config.eval_seq_len).to(dist.device)
    choose_attention(hp.attention, model, dist.device, lambda text: None)
    windowing = config.windowing(hp)
    count = 4 * windowing.batch_size * windowing.stride + windowing.seq_len
    tokens = torch.from_numpy(text_like(hp.model.vocab_size, count + 1).astype(np.int32))
    bytes_of_one = torch.ones(count, dtype=torch.int32, device=dist.device)
    val = ValData(tokens.to(dist.device), bytes_of_one, "", False)

    forwards = {"eager": model}
    if can_compile(hp, dist.device):
        forwards["compiled"] = torch.compile(model, fullgraph=True, dynamic=False)
    rows = []
    for name, forward in forwards.items():
        with Progress(f"bench eval, {name}", 1):
            scorer = Scorer(forward, val, dist, windowing, name)
            windows = scorer.windows[-2 * scorer.batch_size : -scorer.batch_size]  # full ones
            score_within_memory(scorer, windows)
            scored = windows[: scorer.batch_size]
            times = time_blocks(partial(score_within_memory, scorer, scored), dist, seconds)
        rate = len(scored) * windowing.stride / statistics.median(times)
        needed = f"{CHALLENGE_TARGETS / RECORD_RANKS / rate:,.0f}"
        shape = [windowing.seq_len, windowing.stride, len(scored)]
        rows.append([name, *shape, f"{rate:,.0f}", needed])
    header = "scoring|window|stride|windows per pass|targets/s|s for the challenge on 8"
    return markdown_table(header.split("|"), rows)


# ---- Finished trainings --------------------------------------------------------------------------


def mfu_at_end(run: RunLog) -> float | None:
    """Return the MFU between the last two logged steps; None on other devices than Hopper GPUs."""
    if len(run.train) < 2 or not is_hopper(run.hardware):
        return None
    booleans = {"True": "1", "False": "0"}
    texts = {name.upper(): booleans.get(text, text) for name, text in run.knobs.items()}
    hp = Hyperparameters.from_env(texts)
    looped = hp.loop_is_on(0.0) or any(event.name == "recurrence on" for event in run.events)
    before, last = run.train[-2:]
    rate = (last.step - before.step) * hp.train_batch_tokens / (last.seconds - before.seconds)
    return rate * flops_per_token(hp.model, looped) / PEAK_FLOPS / (run.world_size or 1)


def table_of_logs(paths: list[Path]) -> str:
    """Return finished trainings of ours side by side. Raises ConfigError."""
    rows = []
    for path in paths:
        run = RunLog.read(path)
        train = run.json_events.get("train_summary")
        require(train is not None, f"{path}: no train_summary: not a finished training of ours")
        scored = run.json_events.get("eval_summary", {})
        mfu = mfu_at_end(run)
        row = [train["run_id"], f"{train['steps']:,}"]
        row.append(f"{train['tokens'] / train['train_seconds']:,.0f}")
        row.append("-" if mfu is None else f"{mfu:.1%}")
        for score in (train["val_bpb_float"], train["val_bpb"], scored.get("val_bpb")):
            row.append("-" if score is None else f"{score:.4f}")
        rows.append([*row, f"{train['bytes_total']:,}"])
    header = "run|steps|tok/s|MFU at the end|float|int6|sliding|bytes"
    return markdown_table(header.split("|"), rows)


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("what", nargs="?", choices=("train", "eval"), default="train")
    parser.add_argument("--seconds", type=float, default=1.0, help=f"of each of {BLOCKS} blocks")
    help_of_table = "of finished trainings; measures nothing"
    parser.add_argument("--table", nargs="+", type=Path, metavar="LOG", help=help_of_table)
    args = parser.parse_args()
    in_range = 0 < args.seconds < math.inf
    require(in_range, f"--seconds {args.seconds}: expected a positive number")
    return args


def knobs_from(environ: dict[str, str]) -> Hyperparameters:
    """Return the environment's knobs over the small model or 1/8 of the record's batch."""
    model_knobs = {name.upper() for name in knob_fields(ModelConfig)}
    if torch.cuda.is_available() or model_knobs & set(environ):
        batch = Hyperparameters().train_batch_tokens // RECORD_RANKS
        return Hyperparameters.from_env({"TRAIN_BATCH_TOKENS": str(batch)} | environ)
    return Hyperparameters.from_env(profile("smoke") | environ)


def main() -> None:
    """Measure, or read logs, and print a table. Raises ConfigError."""
    args = parse_arguments()
    if args.table:
        print(table_of_logs(args.table))
        return
    require(os.environ.get("WORLD_SIZE", "1") == "1", "bench.py is for one process")
    hp = knobs_from(dict(os.environ))
    config = EvalConfig.from_env(os.environ)
    dist = Dist.from_torchrun()
    torch.set_float32_matmul_precision("high")
    device = f"a CPU, {torch.get_num_threads()} threads"
    if dist.device.type == "cuda":
        device = torch.cuda.get_device_name(dist.device)
    started = time.perf_counter()
    print(f"{device}, torch {torch.__version__}, {hp.dtype}", flush=True)
    if args.what == "eval":
        print(bench_eval(hp, config, dist, args.seconds))
    else:
        print(f"{hp.train_batch_tokens:,} tokens a step, {BLOCKS} blocks each", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            write_tokens(Path(folder), hp)
            print(bench_steps(replace(hp, data_path=folder), dist, device, args.seconds))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run_entry_point(main)
