"""What a training step costs on this device, part by part: one command, one device, a bounded number of seconds.

    python records/bench.py --out logs/bench         # the record profile at 1/8 of its batch, as on one of eight GPUs
    NUM_EXPERTS=8 MU=off python records/bench.py     # any knob of train_gpt.py
    python records/bench.py                          # without a GPU and knobs of the model: 3 layers x 128, a minute
    python records/bench.py --table logs/*.txt       # finished trainings side by side; measures nothing

Steps are those of train_gpt.py, on random tokens that are as frequent as those of a text. What --seconds has no room
for is left out, and named; what has begun is ended. Exits with 1 if a graph broke, if anything was compiled after the
warm-up, or if no step was traced.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from runlog import Run

import train_gpt
from train_gpt import (
    GPT,
    Dist,
    Gradients,
    Hyperparameters,
    Refusal,
    require,
    role_of,
    run_entry_point,
)

PEAK_FLOPS = 989e12  # per second, dense bfloat16, H100 and H200 (SXM) by their data sheet
NVLINK_BYTES = 450e9  # per second and direction, of both, by their data sheet
RANKS = 8
BLOCKS = 5  # of steps; the table has their median and extremes
BACKWARD = (
    "autograd::engine::evaluate_function: "  # what the profiler calls a node of the backward pass
)
NUM_EXPERTS, EXPERT_DIMS = (4, 2, 8, 16), (32, 64, 128, 256, 512, 1024)  # the record's E first
UNTIL = {
    "attention": 0.15,
    "steps": 0.7,
    "parts": 0.8,
    "dispatch": 1.0,
}  # fraction of --seconds, by kind of cell
PARTS = (
    "attention",
    "MLP",
    "routing",
    "mu",
    "head + loss",
    "loader",
    "gradients",
    "Muon",
    "AdamW",
    "EMA",
    "other",
)
COMPILERS = {"inductor": "inductor", "eager": "Dynamo only", "none": "none"}
SMALL = {  # the cpu profile of run_8xh100.sh, with recurrence; not compiled, which would take the whole minute
    **{
        "DTYPE": "float32",
        "COMPILE": "0",
        "VOCAB_SIZE": "1024",
        "TRAIN_SEQ_LEN": "256",
        "TRAIN_BATCH_TOKENS": "2048",
    },
    **{
        "NUM_LAYERS": "3",
        "MODEL_DIM": "128",
        "NUM_HEADS": "4",
        "NUM_KV_HEADS": "2",
        "SHARED_DIM": "256",
    },
    **{"LOOP_START": "1", "LOOP_END": "1", "LOOP_PASSES": "2", "PARALLEL_START_LAYER": "3"},
}


# ---- Arithmetic


def flops_per_token(hp: Hyperparameters, looped: bool) -> float:
    """Of a training step: 6 for every weight of a matrix that is multiplied with, and 6 T D per layer that is run for
    causal attention. The masked dispatch multiplies with all experts, the grouped one with K of E."""
    with torch.device("meta"):
        sizes = {name: p.numel() for name, p in GPT(hp).named_parameters()}
    used = hp.top_k / hp.num_experts if hp.dispatch == "grouped" else 1.0
    factors = {"matrix": 1.0, "mu_matrix": 1.0, "router": 1.0, "expert": used}
    order, layers = hp.execution_order(looped), [0.0] * hp.num_layers
    for name, size in sizes.items():
        if role_of(name) in factors:
            layers[int(name.split(".")[1])] += size * factors[role_of(name)]
    head, attention = hp.vocab_size * hp.model_dim, len(order) * hp.train_seq_len * hp.model_dim
    return 6 * (sum(layers[layer] for layer in order) + head + attention)


def communication(hp: Hyperparameters, step_seconds: float | None) -> list[dict]:
    """What RANKS ranks exchange in a step: bytes, and the seconds of a ring at NVLINK_BYTES if nothing overlaps; None
    for the clock, which goes over the host, where its latency counts and not its 8 bytes."""
    with torch.device("meta"):
        model = GPT(hp)
    flat = Gradients(model, Dist(0, RANKS, torch.device("meta"))).flat
    updates = sum(
        p.nbytes for name, p in model.named_parameters() if role_of(name) in ("matrix", "expert")
    )
    rows = []
    for name, size in {
        "loss and gradients, one flat buffer": flat.nbytes,
        "Muon's updates": updates,
    }.items():
        spent = 2 * (RANKS - 1) / RANKS * size / NVLINK_BYTES
        share = spent / step_seconds if step_seconds else None
        rows.append({"what": name, "bytes": size, "seconds": spent, "share_of_step": share})
    return [
        *rows,
        {"what": "clock, by the host", "bytes": 8, "seconds": None, "share_of_step": None},
    ]


def crossovers(rows: list[dict]) -> dict[int, int | None]:
    """For each E the smallest EXPERT_DIM from which on grouped was faster wherever it was measured; None = nowhere."""
    found = {}
    for experts in sorted({row["num_experts"] for row in rows}):
        found[experts] = None
        mine = [row for row in rows if row["num_experts"] == experts]
        for row in sorted(mine, key=lambda row: -row["expert_dim"]):
            if row["grouped"] >= row["masked"]:
                break
            found[experts] = row["expert_dim"]
    return found


# ---- Running


class Budget:
    """Admits a cell while the slowest of its kind so far would still end inside the share of its kind."""

    def __init__(self, seconds: float):
        self.started, self.seconds, self.left_out = time.perf_counter(), seconds, []
        self.slowest: dict[str, float] = {}

    def run(self, kind: str, name: str, work: Callable):
        """What `work()` returns; None if there is no time for it, no memory, or it is refused."""
        started = time.perf_counter()
        if started + self.slowest.get(kind, 0.0) - self.started > UNTIL[kind] * self.seconds:
            self.left_out.append(f"{name}: no time left")
            return None
        try:
            return work()
        except (Refusal, torch.cuda.OutOfMemoryError) as error:
            self.left_out.append(f"{name}: {str(error).splitlines()[0]}")
            return None
        finally:
            self.slowest[kind] = max(self.slowest.get(kind, 0.0), time.perf_counter() - started)


def compilations() -> tuple[int, int]:
    """Graphs that were compiled in this process, and breaks between graphs."""
    counters = torch._dynamo.utils.counters
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def backend_of(hp: Hyperparameters, device: torch.device) -> str:
    """inductor as in training; where that is off or missing Dynamo alone, to count; none for what it cannot trace."""
    if train_gpt.can_compile(hp, device):
        return "inductor"
    return "none" if hp.dispatch == "grouped" and hp.dtype == "float32" else "eager"


def compiled(module: nn.Module, backend: str) -> Callable:
    """As train() of train_gpt.py does, but without fullgraph: a broken graph is to be counted, not to raise."""
    torch.compiler.reset()  # else what was compiled before counts towards Dynamo's limit of recompilations
    return module if backend == "none" else torch.compile(module, backend=backend, dynamic=False)


def time_blocks(work: Callable[[], object], dist: Dist, seconds: float) -> list[float]:
    """Seconds per call in each of BLOCKS blocks of about `seconds`, synchronised at their ends alone, fastest first."""
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


def text_like(hp: Hyperparameters, count: int) -> np.ndarray:
    """(count,) uint16 token ids by the law of Zipf and Mandelbrot: uniform ones would be kind to the embedding."""
    shares = 1 / (np.arange(hp.vocab_size) + 3.7)
    return (
        np.random.default_rng(0).choice(hp.vocab_size, count, p=shares / shares.sum()).astype("<u2")
    )


def write_tokens(folder: Path, hp: Hyperparameters) -> None:
    tokens = text_like(hp, 4 * hp.train_batch_tokens)
    header = np.zeros(train_gpt.SHARD_HEADER_INTS, "<i4")
    header[:3] = train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, len(tokens)
    (folder / "fineweb_train_0.bin").write_bytes(header.tobytes() + tokens.tobytes())


def model_for(hp: Hyperparameters, kernel: str, device: torch.device) -> GPT:
    """With the attention kernel of this name, or the first that runs for auto. Raises Refusal where it does not run."""
    model = GPT(replace(hp, attention="auto"))  # which imports nothing
    model.hp = replace(hp, attention=kernel)
    model.hp = replace(hp, attention=train_gpt.choose_attention(model, device, lambda text: None))
    return model


class Trainer:
    """What train() of train_gpt.py sets up, and one step of its loop."""

    def __init__(self, hp: Hyperparameters, dist: Dist, backend: str):
        hp.validate()
        gc.collect()  # the trainer before this one has circular references, and its memory would count in the peak
        self.loader, self.dist, self.backend = train_gpt.TokenLoader(hp, dist), dist, backend
        self.model = model = model_for(hp, hp.attention, dist.device)
        model.init_weights()
        sample = self.loader.sample()
        table = train_gpt.build_expert_table(
            hp, np.bincount(sample, minlength=hp.vocab_size), sample
        )
        model.expert_table.copy_(table)
        model.to(dist.device)
        self.hp, self.within = model.hp, lambda part: contextlib.nullcontext()
        self.forward = compiled(model, backend)
        self.optimizers, self.gradients = (
            train_gpt.build_optimizers(hp, model, dist),
            Gradients(model, dist),
        )
        self.weights = [p.detach() for p in model.parameters()]
        self.average, self.accum = [p.clone() for p in self.weights], hp.grad_accum_steps(1)

    def step(self, looped: bool) -> Tensor:
        """At the middle of the budget, when nothing warms up any more. Returns the loss."""
        train_gpt.set_schedules(self.hp, self.optimizers, 0.5)
        with self.within("loader"):
            batches = [self.loader.next_batch() for _ in range(self.accum)]
        norm = self.hp.grad_clip_norm
        loss = train_gpt.train_step(
            self.forward, self.optimizers, self.gradients, batches, norm, looped
        )
        newest = train_gpt.average_weight(self.hp, 0.5, 1000)
        with self.within("EMA"):
            if newest:
                torch._foreach_lerp_(self.average, self.weights, newest)
        return loss

    def wrap(self, owner: object, method: str, part: str) -> None:
        """Let `owner.method` be `part` of the step, except for what it calls that is another part."""
        inner = getattr(owner, method)

        def within_part(*args, **kwargs):
            with self.within(part):
                return inner(*args, **kwargs)

        setattr(owner, method, within_part)

    def wrap_outside(self) -> None:
        for optimizer in self.optimizers:
            self.wrap(optimizer, "step", type(optimizer).__name__)
        self.wrap(self.gradients, "average_and_clip", "gradients")

    def wrap_inside(self) -> None:
        """The model's own parts. What qkv() does beside its projections is to add mu."""
        self.wrap(self.model, "forward", "head + loss")
        self.wrap(self.model, "features", "other")
        self.wrap(self.model, "routes", "routing")
        for block in self.model.blocks:
            attn = block.attn
            self.wrap(block, "next_mu", "mu")
            self.wrap(block.mlp, "forward", "MLP")
            self.wrap(block.mlp, "choose", "routing")
            self.wrap(attn, "forward", "attention")
            self.wrap(attn, "qkv", "attention" if self.hp.mu == "off" else "mu")
            for linear in (attn.c_q, attn.c_k, attn.c_v):
                self.wrap(linear, "forward", "attention")


def measure(trainer: Trainer, name: str, looped: bool, seconds: float) -> dict:
    """One row: a warm-up, then blocks of about `seconds`. Raises Refusal for a loss that is not finite."""
    hp, device = trainer.hp, trainer.dist.device
    before = compilations()
    for _ in range(max(hp.warmup_steps, 2)):
        loss = trainer.step(looped)
    require(math.isfinite(loss.item()), f"{name}: the loss is {loss.item()}")
    warm = compilations()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = time_blocks(lambda: trainer.step(looped), trainer.dist, seconds)
    after = compilations()
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    rate, flops = hp.train_batch_tokens / statistics.median(times), flops_per_token(hp, looped)
    row = {"name": name, "looped": looped, "seconds": statistics.median(times), "fastest": times[0]}
    row |= {
        "slowest": times[-1],
        "tokens_per_second": rate,
        "flops_per_token": flops,
        "flops": rate * flops,
    }
    row |= {"mfu": rate * flops / PEAK_FLOPS if is_hopper(device) else None, "peak_bytes": peak}
    row |= {"backend": trainer.backend, "attention": hp.attention, "graphs": warm[0] - before[0]}
    return row | {"graph_breaks": after[1] - before[1], "recompiles": after[0] - warm[0]}


def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and any(
        chip in torch.cuda.get_device_name(device) for chip in ("H100", "H200")
    )


# ---- Parts of a step


class Stopwatch:
    """Seconds inside named ranges by the clock of the device's own stream, which does not make it wait."""

    def __init__(self, device: torch.device):
        self.device, self.spans = device, []

    def stamp(self):
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = self.stamp()
        yield
        self.spans.append((name, start, self.stamp()))

    def seconds(self) -> dict[str, float]:
        """Sums by name, after the device has been waited for."""
        sums: dict[str, float] = {}
        for name, start, end in self.spans:
            spent = start.elapsed_time(end) / 1000 if self.device.type == "cuda" else end - start
            sums[name] = sums.get(name, 0.0) + spent
        return sums


def phases(trainer: Trainer, looped: bool) -> dict[str, float]:
    """Shares of a step as it is trained, by stopwatch: the model's graph is one of them. Wraps the trainer for good."""
    watch = Stopwatch(trainer.dist.device)
    trainer.within = watch
    trainer.wrap_outside()
    for _ in range(BLOCKS):
        with watch("step"):
            trainer.step(looped)
    trainer.dist.synchronize()
    seconds = watch.seconds()
    total = seconds.pop("step")
    return {"forward + backward": 1 - sum(seconds.values()) / total} | {
        n: s / total for n, s in seconds.items()
    }


def parts_of(events: list, on_gpu: bool) -> dict[str, float]:
    """Share of each of PARTS in the time of a profile: kernels by the operator that launched them, or operators on a
    CPU. The innermost range around an operator counts; around one of the backward pass, that of its forward operator,
    which has the same sequence number and is the last to have it."""
    on_host = sorted(
        (e for e in events if e.device_type.name == "CPU"), key=lambda e: e.time_range.start
    )
    forward_part: dict[int, str] = {}

    def part_of(event) -> str:
        while event is not None:
            if event.name.startswith("part:"):
                return event.name.removeprefix("part:")
            if event.name.startswith(BACKWARD):
                return forward_part.get(event.sequence_nr, "other")
            event = event.cpu_parent
        return "other"

    for event in on_host:
        if event.sequence_nr >= 0 and event.scope != 1 and not event.name.startswith(BACKWARD):
            forward_part[event.sequence_nr] = part_of(event)
    spent = dict.fromkeys(PARTS, 0.0)
    for event in on_host:
        spent[part_of(event)] += (
            event.self_device_time_total if on_gpu else event.self_cpu_time_total
        )
    total = sum(spent.values())
    require(total > 0, "the profiler has seen nothing")
    return {part: part_spent / total for part, part_spent in spent.items()}


def profile(trainer: Trainer, looped: bool) -> dict[str, float]:
    """Shares of PARTS in a step that is not compiled. Wraps the trainer for good."""
    on_gpu, kinds = trainer.dist.device.type == "cuda", torch.profiler.ProfilerActivity
    trainer.within = lambda part: torch.profiler.record_function(f"part:{part}")
    trainer.wrap_outside()
    trainer.wrap_inside()
    for _ in range(2):
        trainer.step(looped)
    trainer.dist.synchronize()
    with torch.profiler.profile(activities=[kinds.CPU] + [kinds.CUDA] * on_gpu) as profiler:
        trainer.step(looped)  # one: to read the profile takes far longer than the step
        trainer.dist.synchronize()
    return parts_of(profiler.events(), on_gpu)


# ---- Cells


def variants(hp: Hyperparameters) -> dict[str, Hyperparameters]:
    """The environment's model by both ways of dispatch, and dense with the same parameters."""
    routed = replace(hp, routing="zipf") if hp.routing == "dense" else hp
    kinds = {
        "masked": {"dispatch": "masked"},
        "dense": {"routing": "dense"},
        "grouped": {"dispatch": "grouped"},
    }
    return {name: replace(routed, **changes) for name, changes in kinds.items()}


def measure_variant(
    name: str, hp: Hyperparameters, dist: Dist, budget: Budget, seconds: float
) -> tuple[list, dict]:
    """Rows with recurrence off and on, and the phases of a step of the last; no phases of others than masked."""
    trainer = budget.run("steps", name, lambda: Trainer(hp, dist, backend_of(hp, dist.device)))
    rows, shares = [], None
    for looped in (False, True)[hp.loop_passes == 1 :] if trainer else ():
        title = f"{name}, recurrence {'on' if looped and hp.loop_passes > 1 else 'off'}"
        rows.append(
            budget.run("steps", title, lambda t=title, on=looped: measure(trainer, t, on, seconds))
        )
    if name == "masked" and any(rows):
        shares = budget.run("parts", "phases", lambda: phases(trainer, looped))
    return [row for row in rows if row], shares or {}


def measure_attention(hp: Hyperparameters, dist: Dist, kernel: str, seconds: float) -> dict:
    """Forward and backward of one layer's kernel, without compilation. Raises Refusal where it does not run."""
    B = max(1, min(hp.micro_batch_tokens, hp.train_batch_tokens) // hp.train_seq_len)
    model = model_for(replace(hp, num_layers=1, loop_passes=1), kernel, dist.device)
    heads = (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads)
    shapes = [(B, hp.train_seq_len, count, hp.head_dim) for count in heads]
    q_k_v = [
        torch.randn(s, device=dist.device, dtype=model.dtype, requires_grad=True) for s in shapes
    ]
    attend, gradient = (
        model.blocks[0].attn.attend,
        torch.randn(shapes[0], device=dist.device, dtype=model.dtype),
    )
    times = time_blocks(lambda: torch.autograd.grad(attend(*q_k_v), q_k_v, gradient), dist, seconds)
    flops = 6 * hp.train_seq_len * hp.model_dim * B * hp.train_seq_len
    return {
        "kernel": kernel,
        "seconds": statistics.median(times),
        "flops": flops / statistics.median(times),
    }


class Layer(nn.Module):
    """One layer's MLP and its routing, (B, T, D) and ids (B, T) -> (B, T, D)."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.model = GPT(replace(hp, num_layers=1, loop_passes=1, moe_start_layer=0))

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        return self.model.blocks[0].mlp(x, self.model.routes(input_ids, [0])[0])[0]


def measure_layer(hp: Hyperparameters, dist: Dist, seconds: float) -> float:
    """Median seconds of forward and backward of one layer's MLP, compiled where training is. Raises Refusal."""
    hp.validate()
    layer = Layer(hp)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.02)
    B = max(1, min(hp.micro_batch_tokens, hp.train_batch_tokens) // hp.train_seq_len)
    tokens = text_like(hp, B * hp.train_seq_len)
    table = train_gpt.build_expert_table(
        layer.model.hp, np.bincount(tokens, minlength=hp.vocab_size), tokens
    )
    layer.model.expert_table.copy_(table)
    layer.to(dist.device)
    ids = torch.from_numpy(tokens.astype(np.int64)).view(B, -1).to(dist.device)
    shape = (*ids.shape, hp.model_dim)
    x, gradient = (
        torch.randn(shape, device=dist.device, dtype=layer.model.dtype) for _ in range(2)
    )
    inputs = [x.requires_grad_(), *layer.model.blocks[0].mlp.parameters()]
    forward = compiled(layer, "inductor" if train_gpt.can_compile(hp, dist.device) else "none")

    def work() -> None:
        torch.autograd.grad(forward(x, ids), inputs, gradient)

    work()
    return statistics.median(time_blocks(work, dist, seconds))


def compare_dispatch(
    hp: Hyperparameters, dist: Dist, experts: int, width: int, seconds: float
) -> dict:
    """Seconds of both ways, and the ratio that their operations predict: masked computes all experts, grouped K."""
    hp = replace(
        hp,
        num_experts=experts,
        expert_dim=width,
        routing="zipf" if hp.routing == "dense" else hp.routing,
    )
    ways = {
        way: measure_layer(replace(hp, dispatch=way), dist, seconds)
        for way in ("masked", "grouped")
    }
    predicted = (hp.shared_dim + experts * width) / (hp.shared_dim + hp.top_k * width)
    return {"num_experts": experts, "expert_dim": width, **ways, "predicted": predicted}


# ---- Tables


def markdown(title: str, columns: str, rows: list[list[str]]) -> str:
    """`columns` are parted by |."""
    if not rows:
        return f"\n{title}: left out"
    names = columns.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join([f"\n{title}\n", *("| " + " | ".join(line) + " |" for line in lines)])


def show(value: float | None, form: str) -> str:
    """A dash for what is not known."""
    return "-" if value is None else format(value, form)


def steps_table(rows: list[dict]) -> str:
    dense = {row["looped"]: row["seconds"] for row in rows if row["name"].startswith("dense")}
    lines = []
    for row in rows:
        spread = f"{1000 * row['fastest']:.2f} to {1000 * row['slowest']:.2f}"
        over = row["seconds"] / dense[row["looped"]] - 1 if row["looped"] in dense else None
        mebibytes = row["peak_bytes"] / 2**20 if row["peak_bytes"] else None
        rates = [
            f"{row['tokens_per_second']:,.0f}",
            f"{1000 * row['seconds']:.2f}",
            spread,
            show(over, "+.1%"),
        ]
        rates += [f"{row['flops'] / 1e12:.3f}", show(row["mfu"], ".1%"), show(mebibytes, ",.0f")]
        counts = [str(row[count]) for count in ("graphs", "graph_breaks", "recompiles")]
        lines.append([row["name"], *rates, COMPILERS[row["backend"]], *counts])
    columns = "step|tok/s|ms, median|blocks|over dense|TFLOP/s|MFU|peak MiB|compiler|graphs|breaks|recompiles"
    return markdown(f"Training steps, {BLOCKS} blocks each", columns, lines)


def shares_table(title: str, shares: dict[str, float]) -> str:
    return markdown(title, "part|share", [[part, f"{share:.1%}"] for part, share in shares.items()])


def attention_table(rows: list[dict]) -> str:
    lines = [
        [row["kernel"], f"{1000 * row['seconds']:.3f}", f"{row['flops'] / 1e12:.3f}"]
        for row in rows
    ]
    return markdown("Attention of one layer, forward + backward", "kernel|ms|TFLOP/s", lines)


def dispatch_table(rows: list[dict]) -> str:
    """And the crossovers below it."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["num_experts"], row["expert_dim"])):
        times = [f"{1000 * row[way]:.3f}" for way in ("masked", "grouped")]
        ratios = [f"{row['masked'] / row['grouped']:.2f}", f"{row['predicted']:.2f}"]
        lines.append([str(row["num_experts"]), str(row["expert_dim"]), *times, *ratios])
    columns = "E|EXPERT_DIM|masked ms|grouped ms|masked / grouped|predicted by FLOPs"
    text = markdown("Routing and MLP of one layer, forward + backward", columns, lines)
    if not rows:
        return text
    found = (
        f"E={e}: {'nowhere' if dim is None else f'>= {dim}'}" for e, dim in crossovers(rows).items()
    )
    return f"{text}\n\nEXPERT_DIM from which grouped is faster: {', '.join(found)}"


def communication_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        milliseconds = None if row["seconds"] is None else 1000 * row["seconds"]
        share = show(row["share_of_step"], ".1%")
        lines.append([row["what"], f"{row['bytes']:,}", show(milliseconds, ".3f"), share])
    title = f"On paper: {RANKS} ranks, ring all-reduce at {NVLINK_BYTES / 1e9:.0f} GB/s, nothing overlapped"
    return markdown(title, "all-reduce|bytes|ms|of the step", lines)


def mfu_at_end(run: Run) -> float | None:
    """Between the last two logged steps; None for other devices than Hopper GPUs. Raises Refusal for foreign knobs."""
    if len(run.train) < 2 or not any(chip in run.hardware for chip in ("H100", "H200")):
        return None
    booleans = {"True": "1", "False": "0"}
    hp = Hyperparameters.from_env(
        {name.upper(): booleans.get(text, text) for name, text in run.knobs.items()}
    )
    looped = hp.loop_is_on(0.0) or any(event.name == "recurrence on" for event in run.events)
    before, last = run.train[-2:]
    rate = (last.step - before.step) * hp.train_batch_tokens / (last.seconds - before.seconds)
    return rate * flops_per_token(hp, looped) / PEAK_FLOPS / (run.world_size or 1)


def table_of_logs(paths: list[Path]) -> str:
    """Finished trainings of ours side by side. Raises Refusal."""
    lines = []
    for run in map(Run.read, paths):
        train, scored = (run.json_events.get(f"{stage}_summary") for stage in ("train", "eval"))
        complete = {"run_id", "steps", "tokens", "val_bpb_float", "val_bpb"} <= (train or {}).keys()
        require(complete, f"{run.path}: no train_summary: not a finished training of ours")
        rate = train["tokens"] / train["train_seconds"]
        scores = [train["val_bpb_float"], train["val_bpb"], scored["val_bpb"] if scored else None]
        shown = [
            show(mfu_at_end(run), ".1%"),
            *(show(score, ".4f") for score in scores),
            f"{train['bytes_total']:,}",
        ]
        lines.append([train["run_id"], f"{train['steps']:,}", f"{rate:,.0f}", *shown])
    return markdown(
        "Finished trainings", "run|steps|tok/s|MFU at the end|float|int6|sliding|bytes", lines
    )


def figure_of(result: dict):
    """Tokens per second, parts of a step, attention kernels, and what dispatch costs by EXPERT_DIM."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 8), layout="constrained")
    (rates, parts), (kernels, dispatch) = figure.subplots(2, 2)
    figure.suptitle(f"records/bench.py on {result['device']}, torch {result['torch']}")
    rates.barh(
        [row["name"] for row in result["steps"]],
        [row["tokens_per_second"] for row in result["steps"]],
    )
    rates.set_xlabel("tokens per second")
    parts.barh(list(result["parts"]), [100 * share for share in result["parts"].values()])
    parts.set_xlabel("% of a step that is not compiled")
    kernels.barh(
        [row["kernel"] for row in result["attention"]],
        [1000 * row["seconds"] for row in result["attention"]],
    )
    kernels.set_xlabel("ms of one layer's attention")
    for experts in sorted({row["num_experts"] for row in result["dispatch"]}):
        rows = sorted(
            (r for r in result["dispatch"] if r["num_experts"] == experts),
            key=lambda r: r["expert_dim"],
        )
        widths, label = [row["expert_dim"] for row in rows], f"E = {experts}"
        (line,) = dispatch.plot(
            widths, [r["masked"] / r["grouped"] for r in rows], marker="o", label=label
        )
        dispatch.plot(
            widths, [row["predicted"] for row in rows], linestyle=":", color=line.get_color()
        )
    dispatch.axhline(1, color="black", linewidth=1)
    dispatch.set_xlabel("EXPERT_DIM (dotted: predicted by FLOPs)")
    dispatch.set_ylabel("time of masked / grouped")
    if result["dispatch"]:
        dispatch.set_xscale("log", base=2)
        dispatch.legend()
    for axes in (rates, parts, kernels):
        axes.invert_yaxis()
    return figure


# ---- Command line


def bench(hp: Hyperparameters, dist: Dist, seconds: float) -> dict:
    """Measure, and print each table once it is known. Returns everything, as JSON takes it."""
    budget, block = Budget(seconds), seconds / 400
    on_gpu = dist.device.type == "cuda"
    device = (
        torch.cuda.get_device_name(dist.device)
        if on_gpu
        else f"a CPU, {torch.get_num_threads()} threads"
    )
    result = {
        "device": device,
        "torch": torch.__version__,
        "knobs": asdict(replace(hp, data_path="")),
    }
    result |= {"left_out": budget.left_out, "attention": []}
    print(
        f"{device}, torch {torch.__version__}, {hp.train_batch_tokens:,} tokens a step, {seconds:.0f} s in all"
    )
    for kernel in train_gpt.CHOICES["attention"].split()[1:]:
        row = budget.run(
            "attention", kernel, lambda k=kernel: measure_attention(hp, dist, k, block)
        )
        result["attention"] += [row] if row else []
    print(attention_table(result["attention"]), flush=True)
    result |= {"steps": [], "phases": {}}
    for name, knobs in variants(hp).items():
        rows, shares = measure_variant(name, knobs, dist, budget, block)
        result["steps"] += rows
        result["phases"] = result["phases"] or shares
    print(steps_table(result["steps"]), flush=True)
    print(
        shares_table(
            "Phases of a masked step as in the table above, by the device's clock", result["phases"]
        )
    )
    # Without the compiler more is kept for the backward pass, so a GPU gets it in four passes.
    parts_hp = replace(
        hp, compile=False, micro_batch_tokens=max(1, hp.micro_batch_tokens // (4 if on_gpu else 1))
    )
    result["parts"] = (
        budget.run("parts", "parts", lambda: profile(Trainer(parts_hp, dist, "none"), True)) or {}
    )
    print(
        shares_table("Parts of a step that is not compiled, by torch.profiler", result["parts"]),
        flush=True,
    )
    result["dispatch"] = []
    for experts in NUM_EXPERTS:
        for width in (width for width in EXPERT_DIMS if width <= 2 * hp.model_dim):
            name = f"dispatch E={experts} EXPERT_DIM={width}"
            row = budget.run(
                "dispatch",
                name,
                lambda e=experts, w=width: compare_dispatch(hp, dist, e, w, block / 4),
            )
            result["dispatch"] += [row] if row else []
    print(dispatch_table(result["dispatch"]), flush=True)
    masked = [row["seconds"] for row in result["steps"] if row["name"].startswith("masked")]
    result["communication"] = communication(hp, masked[-1] if masked else None)
    print(communication_table(result["communication"]), flush=True)
    return result


def save(result: dict, name: Path) -> None:
    """NAME.json and, where matplotlib is installed, NAME.png, each complete or not at all. Raises Refusal."""
    train_gpt.write_atomically(
        name.with_name(f"{name.name}.json"), json.dumps(result, indent=1).encode()
    )
    try:
        figure = figure_of(result)
    except ImportError:
        print("no picture: needs matplotlib (pip install -r tests/requirements.txt)")
        return
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    train_gpt.write_atomically(name.with_name(f"{name.name}.png"), png.getvalue())


def parse_arguments() -> argparse.Namespace:
    """Raises Refusal; exits with 0 after --help."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: require(False, f"{message} (more with --help)")
    parser.add_argument("--seconds", type=float, help="default: 420 on a GPU, 60 without")
    parser.add_argument("--out", type=Path, metavar="NAME", help="write NAME.json and NAME.png")
    parser.add_argument(
        "--table",
        nargs="+",
        type=Path,
        metavar="LOG",
        help="of finished trainings; measures nothing",
    )
    args = parser.parse_args()
    in_range = args.seconds is None or 0 < args.seconds < math.inf
    require(in_range, f"--seconds {args.seconds}: expected a positive number")
    return args


def knobs_from(environ: dict[str, str]) -> Hyperparameters:
    """Those of the environment; under them the small profile or an eighth of the record's batch. Raises Refusal."""
    hp = Hyperparameters.from_env(environ)
    on_cpu = hp.device == "cpu" or (hp.device == "auto" and not torch.cuda.is_available())
    small = on_cpu and not {name.upper() for name in train_gpt.MODEL_KNOBS} & set(environ)
    defaults = SMALL if small else {"TRAIN_BATCH_TOKENS": str(hp.train_batch_tokens // RANKS)}
    return Hyperparameters.from_env(defaults | environ)


def main() -> int:
    """Returns the exit status. Raises Refusal."""
    args = parse_arguments()
    if args.table:
        print(table_of_logs(args.table))
        return 0
    require(
        os.environ.get("WORLD_SIZE", "1") == "1",
        "one process only: what ranks exchange is counted on paper",
    )
    hp = knobs_from(dict(os.environ))
    dist = Dist.from_torchrun(hp.device)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), hp)
        default = 420.0 if dist.device.type == "cuda" else 60.0
        result = bench(replace(hp, data_path=folder), dist, args.seconds or default)
    traced = [row for row in result["steps"] if row["backend"] != "none"]
    breaks, again = (sum(row[count] for row in traced) for count in ("graph_breaks", "recompiles"))
    failed = breaks + again > 0 or not traced
    verdict = "FAIL" if failed else "pass"
    print(f"\nleft out: {'; '.join(result['left_out']) or 'nothing'}")
    print(
        f"{len(traced)} steps traced, graph breaks {breaks}, graphs compiled after the warm-up {again}: {verdict}"
    )
    if args.out:
        save(result, args.out)
    return int(failed)


if __name__ == "__main__":
    run_entry_point(lambda: sys.exit(main()))
