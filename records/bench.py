"""Measure what a training step costs on this device: time, memory and MFU, by way of dispatch.

    python records/bench.py                          # GPU: the record at 1/8 of its batch
    NUM_EXPERTS=8 MU=off python records/bench.py     # any knob of train_gpt.py
    python records/bench.py --grid grid.txt          # every cell of a grid of ablate.py
    python records/bench.py mlp                      # the MLP alone at several widths and shares
    python records/bench.py --table logs/*.txt       # finished trainings side by side

Steps are those of train_gpt.py, on random tokens that are as frequent as those of a text. Without a
GPU, and without a knob of the model in the environment, the model is that of PROFILE=smoke.
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
from ablate import read_grid
from common import ArgumentParser, markdown_table, profile
from runlog import RunLog
from tokenize_docs import write_shard

from train_gpt import (
    GPT,
    ConfigError,
    Dist,
    Gradients,
    Hyperparameters,
    ModelConfig,
    Progress,
    TokenLoader,
    average_weight,
    build_expert_table,
    build_optimizers,
    can_compile,
    choose_attention,
    knob_fields,
    require,
    role_of,
    rounded,
    run_entry_point,
    set_schedules,
    train_step,
)

PEAK_FLOPS = 989e12  # per second, dense bfloat16, H100 and H200 (SXM) by their data sheet
RECORD_RANKS = 8
BLOCKS = 10  # of steps; the table has their median and extremes
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
    write_shard(folder / "fineweb_train_0.bin", tokens)


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
        inside = rounded(hp, self.model, hp.uses_qat)
        clip = hp.grad_clip_norm
        loss = train_step(
            self.forward, self.optimizers, self.gradients, batches, clip, looped, inside
        )
        newest = average_weight(hp, 0.5, 1000)
        if newest:
            torch._foreach_lerp_(self.average, self.weights, newest)
        return loss


def time_blocks(works: dict[str, Callable], dist: Dist, seconds: float) -> dict[str, list[float]]:
    """Return seconds per call of each work in BLOCKS blocks of about `seconds`.

    The works take turns, so that what else the machine does hits all alike.
    """
    calls = {}
    for name, work in works.items():
        started = dist.synchronize()
        work()
        calls[name] = max(1, math.ceil(seconds / (dist.synchronize() - started)))
    times = {name: [] for name in works}
    for _ in range(BLOCKS):
        for name, work in works.items():
            started = dist.synchronize()
            for _ in range(calls[name]):
                work()
            times[name].append((dist.synchronize() - started) / calls[name])
    return times


def over(times: list[float], control: list[float]) -> float:
    """Return the median ratio of blocks that were measured side by side."""
    return statistics.median(a / b for a, b in zip(times, control, strict=True))


def variants(hp: Hyperparameters) -> dict[str, Hyperparameters]:
    """Return the model by both ways of dispatch, and dense with the same parameters."""
    routing = hp.model.routing if hp.model.is_routed else "zipf"
    kinds = {"dense": {"routing": "dense"}}
    for dispatch in ("masked", "grouped"):
        kinds[dispatch] = {"routing": routing, "dispatch": dispatch}
    return {name: replace(hp, model=replace(hp.model, **new)) for name, new in kinds.items()}


def bench_steps(kinds: dict[str, Hyperparameters], dist: Dist, device: str, seconds: float) -> str:
    """Return the table of a training step of each model, with the depth recurrence off and on.

    The first is the control. Raises ConfigError for a loss that is not finite.
    """
    torch._dynamo.config.recompile_limit = 8 * len(kinds)  # to Dynamo all are one function
    steps = {}
    peaks = {}
    left_out = []
    with Progress("bench", len(kinds)) as progress:
        for done, (name, hp) in enumerate(kinds.items()):
            progress.update(done, f"{name}, compiling")
            resident = torch.cuda.memory_allocated()
            if dist.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                trainer = Trainer(hp, dist)
                for looped in (False, True) if hp.model.loop_passes > 1 else (False,):
                    for _ in range(WARMUP_STEPS):
                        loss = trainer.step(looped)
                    require(math.isfinite(loss.item()), f"{name}: the loss is {loss.item()}")
                    steps[name, looped] = partial(trainer.step, looped)
            except (ConfigError, torch.cuda.OutOfMemoryError) as error:
                left_out.append(f"{name}: {str(error).splitlines()[0]}")
            peaks[name] = torch.cuda.max_memory_allocated() - resident
        progress.update(len(kinds), "measuring")
        times = time_blocks(steps, dist, seconds)

    rows = []
    first = next(iter(kinds))
    for (name, looped), blocks in times.items():
        control = times.get((first, looped)) or times.get((first, False))
        title = f"{name}, recurrence {'on' if looped else 'off'}"
        rows.append([title, *step_cells(kinds[name], looped, blocks, control, device)])
        rows[-1].append(f"{peaks[name] / 2**20:,.0f}" if peaks[name] else "-")
    header = "step|tok/s|ms, median|blocks|of the first|TFLOP/s|MFU|peak MiB"
    return "\n".join([markdown_table(header.split("|"), rows), *left_out])


def step_cells(
    hp: Hyperparameters, looped: bool, blocks: list[float], control: list[float], device: str
) -> list[str]:
    """Return the cells of a measurement, with a dash for what is not known."""
    median = statistics.median(blocks)
    rate = hp.train_batch_tokens / median
    flops = rate * flops_per_token(hp.model, looped)
    return [
        f"{rate:,.0f}",
        f"{1000 * median:.2f}",
        f"{1000 * min(blocks):.2f} to {1000 * max(blocks):.2f}",
        f"{over(blocks, control):.3f}" if control else "-",
        f"{flops / 1e12:.3f}",
        f"{flops / PEAK_FLOPS:.1%}" if is_hopper(device) else "-",
    ]


# ---- The MLP alone -------------------------------------------------------------------------------

# Tokens, MODEL_DIM, SHARED_DIM, NUM_EXPERTS, EXPERT_DIM: of a micro-batch of the record, and small.
RECORD_MLPS = (
    (98_304, 512, 1792, 4, 64),
    (98_304, 512, 1536, 4, 128),
    (98_304, 512, 1024, 4, 256),
    (98_304, 512, 512, 4, 384),
    (98_304, 512, 512, 8, 192),
)
SMALL_MLPS = (
    (2048, 128, 384, 4, 32),
    (2048, 128, 128, 4, 96),
    (4096, 256, 256, 8, 96),
)


def mlp_work(hp: Hyperparameters, tokens: int, dist: Dist) -> Callable:
    """Return a forward and backward pass of one MLP, routed as a text's tokens would be."""
    model = GPT(hp.model, hp.torch_dtype)
    ids = text_like(hp.model.vocab_size, tokens)
    counts = np.bincount(ids, minlength=hp.model.vocab_size)
    model.expert_table.copy_(build_expert_table(hp.model, counts))
    mlp = model.to(dist.device).blocks[0].mlp
    for p in mlp.parameters():
        torch.nn.init.normal_(p, std=0.02)
    input_ids = torch.from_numpy(ids.astype(np.int64))[None].to(dist.device)
    route = model.routes(input_ids, [0])[0]
    shape = (1, tokens, hp.model.model_dim)
    x = torch.randn(shape, device=dist.device, dtype=hp.torch_dtype, requires_grad=True)
    grad = torch.randn_like(x)
    forward = mlp
    if can_compile(hp, dist.device):
        forward = torch.compile(mlp, fullgraph=True, dynamic=False)

    def work() -> None:
        y, _ = forward(x, route)
        y.backward(grad)

    for _ in range(WARMUP_STEPS):
        work()
    return work


def bench_mlp(hp: Hyperparameters, dist: Dist, seconds: float) -> str:
    """Return the table of one MLP's passes by dispatch, and the rate of its GEMM beside it."""
    rows = []
    shapes = RECORD_MLPS if dist.device.type == "cuda" else SMALL_MLPS
    torch._dynamo.config.recompile_limit = 8 * len(shapes)
    with Progress("bench mlp", len(shapes)) as progress:
        for tokens, dim, shared, experts, width in shapes:
            progress.update(len(rows))
            model = {"num_layers": 1, "model_dim": dim, "loop_passes": 1}
            model |= {"num_experts": experts, "shared_dim": shared, "expert_dim": width}
            units = shared + experts * width
            x = torch.randn(tokens, dim, device=dist.device, dtype=hp.torch_dtype)
            weight = torch.randn(dim, units, device=dist.device, dtype=hp.torch_dtype)
            works = {"gemm": partial(torch.mm, x, weight)}
            for name, kind in variants(hp.override(**model)).items():
                works[name] = mlp_work(kind, tokens, dist)
            times = time_blocks(works, dist, seconds)

            dense = times["dense"]
            row = [tokens, dim, f"{shared} + {experts} x {width}"]
            row.append(f"{(shared + width) / units:.2f}")
            row += [f"{over(times[kind], dense):.3f}" for kind in ("masked", "grouped")]
            row.append(f"{1000 * statistics.median(dense):.2f}")
            flops = 2 * tokens * dim * units
            row.append(f"{6 * flops / statistics.median(dense) / 1e12:.3f}")
            row.append(f"{flops / statistics.median(times['gemm']) / 1e12:.3f}")
            rows.append(row)
    header = "tokens|D|shared + E x width|share used|masked|grouped|dense, ms|TFLOP/s|of its GEMM"
    return markdown_table(header.split("|"), rows)


# ---- Finished trainings --------------------------------------------------------------------------


def mfu_at_end(run: RunLog) -> float | None:
    """Return the MFU between the last two logged steps; None on other devices than Hopper GPUs."""
    if len(run.train) < 2 or not is_hopper(run.hardware):
        return None
    booleans = {"True": "1", "False": "0"}
    texts = {name.upper(): booleans.get(text, text) for name, text in run.knobs.items()}
    hp = Hyperparameters.from_env(texts)
    looped = hp.loop_is_on(0.0) or run.recurs
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
    header = "run|steps|tok/s|MFU at the end|float|artifact|sliding|bytes"
    return markdown_table(header.split("|"), rows)


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("what", nargs="?", choices=("train", "mlp"), default="train")
    add("--seconds", type=float, default=1.0, help=f"of each of {BLOCKS} blocks")
    add("--grid", type=Path, metavar="GRID", help="every cell of a grid of ablate.py, SOLVE aside")
    add("--table", nargs="+", type=Path, metavar="LOG", help="finished trainings; measures nothing")
    args = parser.parse_args()
    require(0 < args.seconds < math.inf, f"--seconds {args.seconds}: expected a positive number")
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
    kinds = variants(hp)
    if args.grid:
        kinds = {cell.name: cell.hyperparameters() for cell in read_grid(args.grid, "off")}
        hp = next(iter(kinds.values()))
    dist = Dist.from_torchrun()
    torch.set_float32_matmul_precision("high")
    device = f"a CPU, {torch.get_num_threads()} threads"
    if dist.device.type == "cuda":
        device = torch.cuda.get_device_name(dist.device)
    started = time.perf_counter()
    print(f"{device}, torch {torch.__version__}, {hp.dtype}", flush=True)
    if args.what == "mlp":
        print(f"forward and backward, {BLOCKS} blocks each; ratios to dense", flush=True)
        print(bench_mlp(hp, dist, args.seconds))
    else:
        print(f"{hp.train_batch_tokens:,} tokens a step, {BLOCKS} blocks each", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            write_tokens(Path(folder), hp)
            kinds = {name: replace(kind, data_path=folder) for name, kind in kinds.items()}
            print(bench_steps(kinds, dist, device, args.seconds))
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    run_entry_point(main)
