"""Train, export and score a token-routed Mixture-of-Experts language model for Parameter Golf, in one file.

Every token id owns one narrow expert per layer beside a wide shared one, by a table frozen before the first step, so
routing is exact, causal and independent of the batch. eval_sliding.py scores the artifact; both fit 16,000,000 bytes.

    torchrun --standalone --nproc_per_node=8 train_gpt.py                          # the record: 8xH100, 600 s
    ITERATIONS=10 TRAIN_BATCH_TOKENS=4096 TRAIN_SEQ_LEN=256 python train_gpt.py    # smoke, on any device
"""

import base64
import collections
import copy
import difflib
import fcntl
import hashlib
import importlib.util
import io
import json
import lzma
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import sysconfig
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial, partialmethod
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = (
    20240520,
    1,
    256,
)  # the challenge's .bin header, shared with llm.c
MAX_SUBMISSION_BYTES = 16_000_000  # code + compressed model, decimal
LOADER_BYTES = 1_194  # of what unpacks a record's code, LOADER in records/make_record.py
LOG_FOLDER = Path("logs")  # of logs, artifacts and checkpoints, below the working directory
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # that end a run in good order
BOS_ID = 1  # starts every document of a shard
GATE_CHANNELS = 12  # of the input, that attention gates and SmearGate read
TABLE_SCORE = {
    "learned": 1e-3,
    "hybrid": 2.0,
    "soft": 0.0,
}  # of what the table names; the router's come on top
MATRIX_MU = ("lowrank", "full")  # these write and read mu by matrices, vector and pid by gains
SWITCH_LOSS = 0.01  # weight of the loss that balances learned experts (arXiv 2101.03961)


# ---- Hyperparameters -------------------------------------------------------------------------------------------------
class Refusal(Exception):
    """Bad input from the user, a file or the machine; entry points print it as one line and exit with status 2."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise Refusal(message)


@dataclass(frozen=True)
class Hyperparameters:
    """Every knob of a run: env var FOO sets field foo; booleans are 0 or 1. The defaults are the 8xH100 record."""

    run_id: str = ""  # names logs/<RUN_ID>.txt and logs/<RUN_ID>.ptz; "" = the time of the start
    seed: int = 1337  # of initial weights and data order
    device: str = "auto"  # auto (cuda if there is one) | cuda | cpu
    dtype: str = "bfloat16"  # of activations and matmuls: bfloat16 | float32; master weights are always float32
    attention: str = "auto"  # kernel: fa3 (FlashAttention-3) | cudnn | flash | math; auto = the first of them that runs
    compile: bool = True  # torch.compile with fullgraph where a compiler is installed; 0 = eager
    checkpoint_every: str = (
        ""  # steps ("500") or s ("300s") between logs/<RUN_ID>.step<N>.npz; two stay; "" = off
    )
    resume: str = "off"  # off | auto (the newest intact checkpoint of RUN_ID, if it has any) | path of a checkpoint
    data_path: str = ""  # folder of shards; "" = data/datasets/fineweb10B_sp<VOCAB_SIZE>
    tokenizer_path: str = (
        ""  # SentencePiece model; "" = data/tokenizers/fineweb_<VOCAB_SIZE>_bpe.model
    )
    train_batch_tokens: int = 786_432  # tokens per optimizer step, over all ranks
    micro_batch_tokens: int = (
        98_304  # tokens per forward pass and rank, at most; gradient accumulation does the rest
    )
    val_max_tokens: int = (
        0  # targets to score; 0 = the whole split, fewer than that is reported as PARTIAL
    )
    iterations: int = 20_000  # optimizer steps, at most
    max_wallclock_seconds: float = (
        600.0  # s of training, without warm-up and validation; 0 = ITERATIONS alone decides
    )
    warmup_steps: int = (
        3  # steps on random tokens that compile everything before the clock and are undone; 0 = off
    )
    train_log_every: int = 200  # steps
    val_loss_every: int = 0  # steps; 0 = validate at the end only
    # -- model: from here to smear_gate, what the artifact carries
    vocab_size: int = 8192  # V
    train_seq_len: int = 2048  # T, tokens
    num_layers: int = 11  # L
    model_dim: int = 512  # D
    num_heads: int = 8  # H
    num_kv_heads: int = 4  # each shared by NUM_HEADS / NUM_KV_HEADS query heads
    rope_dims: int = 16  # rotated dimensions of every head, even; 0 = no position signal
    qk_gain_init: float = 5.0  # initial scale of the normalised queries, learned per head
    xsa: bool = (
        True  # take out of each head's result its component along the token's own value; 0 = off
    )
    activation: str = "leaky_relu2"  # leaky_relu2 | relu2 | swiglu (two rows of the up projection per hidden unit)
    routing: str = "zipf"  # zipf | cluster | hash | modulo: table; learned | hybrid | soft: router; dense: no experts
    dispatch: str = (
        "masked"  # masked: one GEMM and a block mask | grouped: sort by expert, one GEMM per expert
    )
    num_experts: int = 4  # E, routed experts per layer
    top_k: int = 1  # K, experts that a token gets, 1 or 2
    expert_dim: int = 64  # hidden units of each routed expert
    shared_dim: int = 1792  # hidden units of the shared expert
    moe_start_layer: int = (
        0  # first layer with experts; those before it are dense with the same width
    )
    mu: str = "vector"  # guidance of q, k and v by the layer before: vector | pid (and velocity) | lowrank | full | off
    mu_rank: int = 16  # width of mu for MU=lowrank
    loop_start: int = 3  # first layer of the depth recurrence
    loop_end: int = 5  # its last layer
    loop_passes: int = 3  # times its layers are run once it is on; 1 = no recurrence
    routing_per_pass: bool = (
        True  # pass p takes expert (table + p) mod E, so that passes differ; 0 = the same expert
    )
    parallel_start_layer: int = (
        7  # from here on attention and MLP read the same input; NUM_LAYERS or more = off
    )
    ln_scale: bool = True  # normalised inputs of layer l are multiplied by 1 / sqrt(l + 1); 0 = off
    skip_gates: bool = True  # a sigmoid per channel mixes U-Net skips in; 0 = they are added
    attn_gate: bool = True  # each head's result times 2 * sigmoid(12 input channels); 0 = off
    smear_gate: bool = (
        True  # adds a gated part of the previous token's embedding, not across BOS; 0 = off
    )
    # -- optimizers
    matrix_lr: float = 0.022  # Muon, per update of spectral norm ~1
    embed_lr: float = 0.03  # AdamW, tied embedding
    scalar_lr: float = 0.02  # AdamW, vectors, gains and mu
    muon_momentum: float = 0.97  # reached linearly from 0.85 in the first tenth of the budget
    muon_weight_decay: float = 0.095  # decoupled, times the scheduled LR; 0 = off
    embed_weight_decay: float = 0.085  # decoupled, times the scheduled LR; 0 = off
    grad_clip_norm: float = 0.3  # global L2 norm; 0 = off
    # -- schedule and averaging, in fractions of the budget (wall-clock if capped, else steps)
    schedule: str = (
        "linear"  # linear: constant, then linear warmdown | sgdr: cosine cycles with restarts
    )
    loop_from: float = 0.35  # the depth recurrence is on from this fraction of the budget
    sgdr_cycles: int = 2  # each twice as long as the last, 0.7 times as high; the last from LOOP_FROM; 1 = no restart
    warmdown_frac: float = 0.85  # of the budget, for SCHEDULE=linear; 0 = constant
    min_lr: float = 0.1  # floor of both schedules as a fraction of the peak
    average: str = "ema"  # ema: over all steps | swa: equal weights from SWA_START_FRAC on | off
    ema_decay: float = 0.9965  # per step, warmed up as (1 + t) / (10 + t)
    swa_start_frac: float = 0.85  # of the budget; must lie inside the last descent
    # -- export
    matrix_bits: int = 6  # of matrices and experts
    embed_bits: int = 7  # of the tied embedding
    matrix_clip: float = (
        12.85  # k: quantization step = k * std(row) / (2^(bits-1) - 1); larger = smaller file
    )
    embed_clip: float = 15.0  # k of the embedding
    target_bytes: int = (
        15_980_000  # code + model: one factor on both k solves for it; 0 = k as given
    )
    gptq_batches: int = (
        64  # training micro-batches for the Hessians, over all ranks; 0 = round to nearest
    )
    gptq_reserve_seconds: float = 12.0  # s of MAX_WALLCLOCK_SECONDS kept for them
    gptq_damping: float = 0.01  # added to the Hessian's diagonal, times its mean
    codec: str = "auto"  # zstd | brotli | auto (the smaller of both)
    # -- eval_sliding.py
    eval_stride: int = 64  # targets scored per window
    eval_seq_len: int = 0  # window, tokens; 0 = TRAIN_SEQ_LEN
    eval_max_seconds: float = (
        600.0  # s since the start; epochs of TTT, never targets, are left out to keep it; 0 = off
    )
    ttt: str = "off"  # score-first test-time training on what has been scored: sgd | off
    ttt_scope: str = "all"  # parameters that it changes: all | mu | vectors | experts
    ttt_lr: float = 0.005  # of the first chunk; a cosine takes it to 0 over the chunks of a segment
    ttt_momentum: float = 0.9  # of SGD; 0 = off
    ttt_epochs: int = 3  # steps on a chunk once it is scored, each over all of its targets
    ttt_chunk_tokens: int = 32_768  # targets scored between two updates
    ttt_segments: int = (
        8  # contiguous parts of the split that know nothing of each other; ranks share them
    )

    @classmethod
    def from_env(cls, environ: dict[str, str]) -> "Hyperparameters":
        """Read and validate all knobs. Raises Refusal naming the variable and the value."""
        values = {}
        for f in (f for f in fields(cls) if f.name.upper() in environ):
            text, kind = environ[f.name.upper()], type(f.default)
            try:
                values[f.name] = {"0": False, "1": True}[text] if kind is bool else kind(text)
            except (KeyError, ValueError):
                expected = "0 or 1" if kind is bool else kind.__name__
                raise Refusal(f"{f.name.upper()}={text!r}: expected {expected}") from None
        return cls(**values).validate()

    head_dim = property(lambda hp: hp.model_dim // hp.num_heads)
    routed_layers = property(
        lambda hp: range(hp.moe_start_layer, hp.num_layers * (hp.routing != "dense"))
    )
    reserved_seconds = property(lambda hp: hp.gptq_reserve_seconds * (hp.gptq_batches > 0))
    training_seconds = property(
        lambda hp: max(hp.max_wallclock_seconds - hp.reserved_seconds, 0.0)
    )  # 0 without a cap
    dataset_dir = property(
        lambda hp: Path(hp.data_path or f"data/datasets/fineweb10B_sp{hp.vocab_size}")
    )

    def execution_order(self, looped: bool) -> list[int]:
        """Layers in the order in which they are run."""
        order, end = list(range(self.num_layers)), self.loop_end + 1
        order[end:end] = order[self.loop_start : end] * (self.loop_passes - 1 if looped else 0)
        return order

    def loop_is_on(self, frac: float) -> bool:
        return self.loop_passes == 1 or frac >= self.loop_from

    longer = property(
        lambda hp: max(1.0, hp.eval_seq_len / hp.train_seq_len)
    )  # a window, times the trained one
    # 10,000; for longer windows so much more that the slowest rotation turns as far as it did
    rope_base = property(
        lambda hp: 10_000.0 * hp.longer ** (hp.rope_dims / max(hp.rope_dims - 2, 1))
    )

    def grad_accum_steps(self, world_size: int) -> int:
        """Fewest equal micro-batches of whole sequences that respect MICRO_BATCH_TOKENS. Raises Refusal."""
        sequences, rest = divmod(self.train_batch_tokens, world_size * self.train_seq_len)
        names = f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} TRAIN_SEQ_LEN={self.train_seq_len}"
        require(
            rest == 0, f"{names}: not a whole number of sequences on each of {world_size} ranks"
        )
        fewest = min(math.ceil(sequences * self.train_seq_len / self.micro_batch_tokens), sequences)
        return next(n for n in range(fewest, sequences + 1) if sequences % n == 0)

    def validate(self) -> "Hyperparameters":
        """These knobs, after all checks of and between them. Raises Refusal naming the variable and the value."""
        for f in fields(self):
            value, kind, choices = getattr(self, f.name), type(f.default), CHOICES.get(f.name)
            low, high = RANGES.get(f.name, (1, 2**63 - 1) if kind is int else (0, math.inf))
            expected = f"one of {choices}" if choices else f"a finite number from {low} to {high}"
            ok = type(value) is kind and (choices is None or value in choices.split())
            ok = ok and (
                kind not in (int, float) or (low <= value <= high and math.isfinite(value))
            )
            require(ok, f"{f.name.upper()}={value!r}: expected {expected}")

        def check(condition: bool, names: str, rule: str) -> None:
            require(
                condition,
                " ".join(f"{n.upper()}={getattr(self, n)}" for n in names.split()) + f": {rule}",
            )

        grouped, window = (
            self.dispatch == "grouped" and self.routed_layers,
            self.eval_seq_len or self.train_seq_len,
        )
        descent = sgdr_bounds(self)[-2] if self.schedule == "sgdr" else 1 - self.warmdown_frac
        run_id, every = (
            re.fullmatch(r"[\w.+-]*", self.run_id),
            re.fullmatch(r"([1-9]\d*s?)?", self.checkpoint_every),
        )
        check(run_id is not None, "run_id", "letters, digits and . _ + - only")
        check(every is not None, "checkpoint_every", "expected steps as in 500, or s as in 300s")
        check(
            self.resume != "auto" or self.run_id != "",
            "resume run_id",
            "RUN_ID says whose checkpoints",
        )
        check(
            self.model_dim % self.num_heads == 0,
            "model_dim num_heads",
            "the heads must divide the width",
        )
        check(
            self.num_heads % self.num_kv_heads == 0,
            "num_heads num_kv_heads",
            "kv heads must divide the heads",
        )
        check(
            self.rope_dims in range(0, self.head_dim + 1, 2),
            "rope_dims",
            f"must be even, at most {self.head_dim}",
        )
        check(self.top_k <= self.num_experts, "top_k num_experts", "more than there are")
        check(
            not grouped or self.routing not in TABLE_SCORE,
            "routing dispatch",
            "a router learns from all experts",
        )
        check(
            self.moe_start_layer < self.num_layers,
            "moe_start_layer num_layers",
            "leaves no layer to route",
        )
        inside = self.loop_passes == 1 or self.loop_start <= self.loop_end < self.num_layers
        check(
            inside,
            "loop_start loop_end num_layers",
            "no range of layers; LOOP_PASSES=1 turns the recurrence off",
        )
        in_time = not self.max_wallclock_seconds or self.training_seconds > 0
        check(
            in_time,
            "gptq_reserve_seconds max_wallclock_seconds",
            "the reserve leaves no time to train",
        )
        check(self.eval_stride <= window, "eval_stride", f"above the window of {window} tokens")
        eights = not grouped or (self.expert_dim | self.model_dim) % 8 == 0
        check(eights, "expert_dim model_dim", "DISPATCH=grouped needs multiples of 8")
        swa_fits = self.average != "swa" or descent <= self.swa_start_frac < 1
        check(swa_fits, "swa_start_frac", f"must lie inside the last descent, {descent:.3f} to 1")
        self.grad_accum_steps(1)
        return self


CHOICES = {
    "device": "auto cuda cpu",
    "dtype": "bfloat16 float32",
    "attention": "auto fa3 cudnn flash math",
    "routing": "zipf cluster hash modulo learned hybrid soft dense",
    "dispatch": "masked grouped",
    "mu": "vector pid lowrank full off",
    "activation": "leaky_relu2 relu2 swiglu",
    "codec": "auto zstd brotli",
    "schedule": "sgdr linear",
    "average": "ema swa off",
    "ttt": "off sgd",
    "ttt_scope": "all mu vectors experts",
}
RANGES = {  # of integers from 1 and of floats from 0 that have a narrower or wider one
    (
        0,
        1,
    ): "muon_momentum warmdown_frac min_lr ema_decay swa_start_frac loop_from gptq_damping ttt_momentum",
    (0, 2**63 - 1): "warmup_steps val_loss_every val_max_tokens seed",
    (1, 16): "loop_passes sgdr_cycles",
    (0, 1024): "moe_start_layer parallel_start_layer loop_start loop_end",
    (0, 65_536): "rope_dims eval_seq_len",
    (1, 65_536): "expert_dim shared_dim mu_rank train_seq_len",
    (1, 256): "num_experts num_layers",
    (1, 2): "top_k",
    (GATE_CHANNELS, 65_536): "model_dim",
    (4, 65_536): "vocab_size",
    (2, 8): "matrix_bits embed_bits",
    (0, 1 << 20): "gptq_batches",
    (0, MAX_SUBMISSION_BYTES - 1): "target_bytes",
}
RANGES = {name: limits for limits, names in RANGES.items() for name in names.split()}
ALL_KNOBS = [f.name for f in fields(Hyperparameters)]
MODEL_KNOBS = ALL_KNOBS[ALL_KNOBS.index("vocab_size") : ALL_KNOBS.index("smear_gate") + 1]


# ---- Runtime and logging ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Dist:
    """This process among its peers; alone it is rank 0 of 1 and every collective is a no-op."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_torchrun(cls, device_name: str) -> "Dist":
        """Join the process group that torchrun announces in the environment. Raises Refusal."""
        rank, local_rank = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        require(8 % world_size == 0, f"WORLD_SIZE={world_size} does not divide 8")
        count = torch.cuda.device_count()
        kind = ("cuda" if local_rank < count else "cpu") if device_name == "auto" else device_name
        require(
            kind == "cpu" or local_rank < count,
            f"DEVICE=cuda: rank {rank} finds none among {count} CUDA devices",
        )
        device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        if (
            world_size > 1
        ):  # CPU tensors travel over gloo, so that agreeing on the clock never waits for the GPU
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=np.timedelta64(10, "m").item())
        return cls(rank, world_size, device)

    def all_sum(self, tensor: Tensor, op=torch.distributed.ReduceOp.SUM) -> Tensor:
        """Sum over ranks, in place. Raises Refusal when a rank is lost."""
        if self.world_size > 1:
            try:
                torch.distributed.all_reduce(tensor, op)
            except RuntimeError as error:  # gloo and NCCL raise a class of their own, or this one
                raise Refusal(
                    f"rank {self.rank} lost another rank: {str(error).splitlines()[0]}"
                ) from error
        return tensor

    def all_max(self, *values: float) -> list[float]:
        """For each value on the host the largest of the ranks', without touching the GPU."""
        return self.all_sum(
            torch.tensor(values, dtype=torch.float64), torch.distributed.ReduceOp.MAX
        ).tolist()

    def synchronize(self) -> float:
        """Wait for the device and for the other ranks. Returns the time on the host, s."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.all_max(0.0)
        return time.perf_counter()


def interrupt(number: int, frame: object) -> None:
    """Handler of SIGINT and SIGTERM: raises KeyboardInterrupt(signal) once, as launchers signal again."""
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


class Log:
    """Rank 0's log, printed and appended to `path`; a lock keeps other runs of its name away. Raises Refusal."""

    def __init__(self, dist: Dist, path: Path):
        self.path, self.file = path, None
        if dist.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115, for as long as this lives
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # some network file systems have no locks
                require(
                    not isinstance(error, BlockingIOError),
                    f"{path}: another run writes it; choose another RUN_ID",
                )

    def __call__(self, text: str, echo: bool = True) -> None:
        data = f"{text}\n".encode() if self.file else b""
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise Refusal(f"cannot write {self.path}: {error.strerror}") from error
        if self.file and echo:
            print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)
            print(text, flush=True)


class Progress:
    """One updating line with ETA on a terminal; silent elsewhere, and on all ranks but the first."""

    def __init__(self, label: str, total: float, rank: int = 0):
        self.label, self.total, self.started, self.shown, self.done = (
            label,
            total,
            time.perf_counter(),
            0.0,
            0,
        )
        self.enabled = rank == 0 and sys.stderr.isatty()

    def update(self, done: float, note: str = "") -> None:
        """Redraw at most five times a second; `done` counts in the unit of `total`."""
        now, self.done = time.perf_counter(), done
        if self.enabled and (now - self.shown > 0.2 or done >= self.total):
            self.shown, eta = (
                now,
                (now - self.started) * max(self.total - done, 0) / max(done, 1e-9),
            )
            line = f"{self.label} {done / max(self.total, 1e-9):4.0%} ETA {eta:.0f}s {note}"
            print(
                f"\r{line[:118]:<118}",
                end="\n" if done >= self.total else "",
                file=sys.stderr,
                flush=True,
            )


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename: `path` keeps its old content or holds all of `data`. Raises Refusal when it cannot."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Refusal(f"cannot write {path}: {error.strerror}") from error
        raise


def can_compile(hp: Hyperparameters, device: torch.device) -> bool:
    """Whether torch.compile is wanted and can build kernels: Triton on CUDA, a C++ compiler and Python.h on CPU."""
    if not hp.compile or (hp.dispatch == "grouped" and hp.dtype == "float32"):
        return False  # torch 2.13 traces grouped_mm for bfloat16 only
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return Path(sysconfig.get_paths()["include"], "Python.h").exists() and any(
        map(shutil.which, ("g++", "clang++"))
    )


def log_provenance(log: Log, hp: Hyperparameters, dist: Dist, environ: dict[str, str]) -> None:
    """What a reader needs to repeat the run: source, commit, versions, hardware, knobs, overrides, likely typos."""
    here = {"cwd": Path(__file__).resolve().parent, "capture_output": True, "text": True}
    commit = (
        subprocess.run("git describe --always --dirty", shell=True, **here).stdout.strip()
        or "unknown"
    )
    log(
        Path(__file__).read_text(encoding="utf-8")
        + "=" * 100
        + "\n"
        + subprocess.getoutput("nvidia-smi"),
        echo=False,
    )
    log(
        f"python:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__} commit:{commit}"
    )
    log(f"code_sha256:{hashlib.sha256(submission_source()).hexdigest()}")
    log("\n".join(f"  {name}: {value}" for name, value in asdict(hp).items()), echo=False)
    changed = " ".join(
        f"{name.upper()}={v}"
        for name, v in asdict(hp).items()
        if v != getattr(Hyperparameters, name)
    )
    log(f"device:{dist.device} threads:{torch.get_num_threads()} overrides: {changed or 'none'}")
    for name in sorted(set(environ) - set(map(str.upper, ALL_KNOBS))):
        for match in difflib.get_close_matches(name, map(str.upper, ALL_KNOBS), n=1, cutoff=0.85):
            log(f"warning: {name} is not a knob; did you mean {match}?")


# ---- Data ------------------------------------------------------------------------------------------------------------
def list_shards(folder: Path, split: str) -> list[Path]:
    """The shards of `split` ("train" or "val") in order, without byte sidecars. Raises Refusal when there are none."""
    require(folder.is_dir(), f"{folder}: no such data folder (DATA_PATH)")
    shards = sorted(
        p
        for p in folder.glob(f"fineweb_{split}_*.bin")
        if not p.name.startswith("fineweb_val_bytes_")
    )
    require(len(shards) > 0, f"{folder}: no fineweb_{split}_*.bin shards (DATA_PATH)")
    return shards


def shard_length(path: Path) -> int:
    """Tokens of a shard, after checking every header field and the length of the file. Raises Refusal."""
    require(path.is_file(), f"{path}: no such shard")
    header_bytes, size = SHARD_HEADER_INTS * 4, path.stat().st_size
    require(
        size >= header_bytes,
        f"{path}: {size} bytes is shorter than the {header_bytes}-byte shard header",
    )
    magic, version, count = map(int, np.fromfile(path, dtype="<i4", count=3))
    require(magic == SHARD_MAGIC, f"{path}: not a shard, magic is {magic} instead of {SHARD_MAGIC}")
    require(version == SHARD_VERSION, f"{path}: shard version {version}, expected {SHARD_VERSION}")
    require(
        count > 0 and size == header_bytes + 2 * count,
        f"{path}: {count} tokens do not make {size} bytes",
    )
    return count


def read_shard(path: Path, start: int, count: int, vocab_size: int = 1 << 16) -> np.ndarray:
    """Tokens of a shard from `start` on, (count,) uint16. Raises Refusal; mapped and cut, it would kill the process."""
    tokens = np.fromfile(path, "<u2", count, offset=4 * SHARD_HEADER_INTS + 2 * start)
    require(len(tokens) == count, f"{path}: has become shorter since the start of the run")
    largest = tokens.max(initial=0)
    require(largest < vocab_size, f"{path}: token id {largest} is outside VOCAB_SIZE={vocab_size}")
    return tokens


def load_data_shard(path: Path, vocab_size: int = 1 << 16) -> np.ndarray:
    """All tokens of a shard, (count,) uint16, after checking its header. Raises Refusal."""
    return read_shard(path, 0, shard_length(path), vocab_size)


class TokenLoader:
    """Endless training batches, the same at any world size: an epoch cuts shards at a random phase and shuffles."""

    def __init__(self, hp: Hyperparameters, dist: Dist):
        self.hp, self.dist, self.paths = hp, dist, list_shards(hp.dataset_dir, "train")
        self.lengths = [shard_length(path) for path in self.paths]
        windows = [
            max(n // hp.train_seq_len - 1, 0) for n in self.lengths
        ]  # one to spare for the random phase
        self.first_window, self.num_windows = np.cumsum([0, *windows]), sum(windows)
        short = f"{hp.dataset_dir}: no training shard holds two sequences of TRAIN_SEQ_LEN={hp.train_seq_len}"
        require(self.num_windows > 0, short)
        sequences = hp.train_batch_tokens // (hp.train_seq_len * dist.world_size)
        self.num_sequences, self.position, self.epoch = (
            sequences // hp.grad_accum_steps(dist.world_size),
            0,
            -1,
        )
        self.pool, self.pending = (
            ThreadPoolExecutor(1) if dist.device.type == "cuda" else None,
            None,
        )

    def sample(self, max_tokens: int = 50_000_000) -> np.ndarray:
        """At most `max_tokens` training tokens, as many from the start of each shard, (n,) uint16. Raises Refusal."""
        shards = zip(
            self.paths, np.minimum(self.lengths, max_tokens // len(self.paths)), strict=True
        )
        return np.concatenate(
            [read_shard(path, 0, count, self.hp.vocab_size) for path, count in shards]
        )

    def _window(self, index: int) -> np.ndarray:
        T, (epoch, slot) = self.hp.train_seq_len, divmod(index, self.num_windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.hp.seed, epoch])
            self.epoch, self.phase, self.order = (
                epoch,
                int(rng.integers(T)),
                rng.permutation(self.num_windows),
            )
        shard = int(np.searchsorted(self.first_window, self.order[slot], side="right")) - 1
        start = self.phase + int(self.order[slot] - self.first_window[shard]) * T
        return read_shard(self.paths[shard], start, T + 1, self.hp.vocab_size)

    def _load(self) -> Tensor:
        first = self.position + self.dist.rank * self.num_sequences
        self.position += self.dist.world_size * self.num_sequences
        batch = np.stack(
            [self._window(i) for i in range(first, first + self.num_sequences)]
        ).astype(np.int64)
        return torch.from_numpy(batch).pin_memory() if self.pool else torch.from_numpy(batch)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-step, each (B, T) int64 on the device; targets are inputs shifted by one."""
        batch = (self.pending.result() if self.pending else self._load()).to(
            self.dist.device, non_blocking=True
        )
        self.pending = self.pool.submit(self._load) if self.pool else None
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def token_bytes(sp: spm.SentencePieceProcessor, tokens: np.ndarray) -> np.ndarray:
    """UTF-8 bytes that each token but the first adds to the text, (n,) -> (n - 1,) int32. The leading space of a piece
    counts unless a control, unknown or unused token is before it; operators of lossless transforms (#1729) do not."""
    base_bytes, has_space, void = (
        np.full(sp.vocab_size(), fill) for fill in (np.int32(0), False, True)
    )
    for i in range(sp.vocab_size()):
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
            void[i], has_space[i] = False, sp.id_to_piece(i).startswith("\u2581")
            text = sp.id_to_piece(i).removeprefix("\u2581").replace("\u2581", " ")
            base_bytes[i] = (
                1 if sp.is_byte(i) else len(re.sub("[\ue000-\uf8ff]", "", text).encode())
            )
    return base_bytes[tokens[1:]] + (has_space[tokens[1:]] & ~void[tokens[:-1]])


def load_tokenizer(hp: Hyperparameters) -> tuple[spm.SentencePieceProcessor, str]:
    """The SentencePiece model and the SHA-256 of its file. Raises Refusal when missing, damaged or of another size."""
    path = Path(hp.tokenizer_path or f"data/tokenizers/fineweb_{hp.vocab_size}_bpe.model")
    require(path.is_file(), f"{path}: no such tokenizer (TOKENIZER_PATH)")
    try:
        sp = spm.SentencePieceProcessor(
            model_proto=path.read_bytes() or b"?"
        )  # an empty file would pass for a model
    except RuntimeError as error:
        raise Refusal(f"{path} is not a SentencePiece model (TOKENIZER_PATH)") from error
    require(
        sp.vocab_size() == hp.vocab_size,
        f"{path} has {sp.vocab_size()} pieces, but VOCAB_SIZE={hp.vocab_size}",
    )
    require(
        sp.bos_id() == BOS_ID,
        f"{path} starts documents with id {sp.bos_id()}, shards with {BOS_ID}",
    )
    lone_space = sp.piece_to_id(
        "\u2581"
    )  # without it, that becomes three byte tokens (upstream issue #897)
    require(
        not sp.is_unknown(lone_space), f"{path} has no U+2581 piece: byte counts would be wrong"
    )
    return sp, hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class ValData:
    """The validation split on the device; target i is token i + 1 and stands for target_bytes[i] bytes of text."""

    tokens: Tensor  # (targets + 1,) int32
    target_bytes: Tensor  # (targets,) int32
    tokenizer_sha256: str
    partial: bool  # holds fewer targets than the split
    sidecar: bool = False  # target_bytes were read, not counted

    @classmethod
    def load(cls, hp: Hyperparameters, device: torch.device) -> "ValData":
        """The split; sidecars fineweb_val_bytes_N.bin: bytes before a lossless transform (#1729). Raises Refusal."""
        (sp, digest), paths = load_tokenizer(hp), list_shards(hp.dataset_dir, "val")
        shards = [load_data_shard(path, hp.vocab_size) for path in paths]
        tokens, sidecars = (
            np.concatenate(shards),
            sorted(hp.dataset_dir.glob("fineweb_val_bytes_*.bin")),
        )
        require(len(tokens) > 1, f"{hp.dataset_dir}: the validation split has no target to score")
        odd = {path.name.replace("_bytes", "") for path in sidecars} ^ {
            path.name for path in paths if sidecars
        }
        require(
            not odd,
            f"{hp.dataset_dir}: without a sidecar of bytes, or the shard to it: {', '.join(sorted(odd))}",
        )
        sizes = [load_data_shard(path) for path in sidecars]
        for path, size, shard in zip(sidecars, sizes, shards, strict=False):
            require(
                len(size) == len(shard),
                f"{path}: bytes of {len(size)} tokens, but the shard has {len(shard)}",
            )
        target_bytes = (
            np.concatenate(sizes)[1:].astype(np.int32) if sizes else token_bytes(sp, tokens)
        )
        count = min(hp.val_max_tokens or len(tokens), len(tokens) - 1)
        arrays = (
            torch.from_numpy(a).to(device)
            for a in (tokens[: count + 1].astype(np.int32), target_bytes[:count])
        )
        return cls(*arrays, digest, count < len(tokens) - 1, len(sizes) > 0)


# ---- Routing ---------------------------------------------------------------------------------------------------------
def mix32(x):
    """The lowbias32 mixer of uint32 (nullprogram.com/blog/2018/07/31): all bits reach those which `% E` reads."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def zipf_assignment(token_counts: np.ndarray, num_experts: int, layer: int) -> np.ndarray:
    """Greedy bin packing, (V,) int64 -> (V,) uint8: by frequency, shuffled in strata per layer, to the least loaded."""
    rng, seen = np.random.default_rng(layer), np.count_nonzero(token_counts)
    strata = np.split(
        np.argsort(-token_counts, kind="stable")[:seen],
        range(4 * num_experts, seen, 4 * num_experts),
    )
    loads, assignment = np.zeros(num_experts, np.int64), np.empty(len(token_counts), np.uint8)
    for token in np.concatenate([rng.permutation(stratum) for stratum in strata]):
        assignment[token] = loads.argmin()
        loads[assignment[token]] += token_counts[token]
    unseen = rng.permutation(
        np.flatnonzero(token_counts == 0)
    )  # by load, they would all go to the least loaded expert
    assignment[unseen] = np.arange(len(unseen)) % num_experts
    return assignment


def cluster_assignments(
    tokens: np.ndarray, token_counts: np.ndarray, num_experts: int, layers: range
):
    """For each layer (V,): k-means of token ids by the shares of the C = 1,024 most frequent ids among the tokens after
    them, and before them, in a text (n,). A cluster's price rises while it has more than its share of the tokens."""
    V, C, sides = len(token_counts), min(1024, len(token_counts)), []
    rank, seen = np.argsort(np.argsort(-token_counts, kind="stable")), np.flatnonzero(token_counts)
    for ids, neighbours in ((tokens[:-1], tokens[1:]), (tokens[1:], tokens[:-1])):
        cells = (ids.astype(np.int64) * C + rank[neighbours])[rank[neighbours] < C]
        counts = np.bincount(cells, minlength=V * C).reshape(V, C)[seen]
        sides.append(np.sqrt(counts / counts.sum(-1, keepdims=True).clip(1), dtype=np.float32))
    shares, weights = np.concatenate(sides, axis=-1), token_counts[seen] / token_counts.sum()
    for layer in layers:
        rng, price, best = np.random.default_rng(layer), np.zeros(num_experts), math.inf
        assignment = zipf_assignment(
            token_counts, num_experts, layer
        )  # whose unseen ids are in balance
        x = shares @ rng.normal(size=(2 * C, 32))  # another random view of them in every layer
        x /= np.sqrt(weights @ (x * x).sum(-1) - ((weights @ x) ** 2).sum() + 1e-9)
        centres = x[rng.choice(len(x), num_experts, replace=len(x) < num_experts, p=weights)]
        for rate in np.geomspace(1, 0.01, 300):
            nearest = ((centres**2).sum(-1) - 2 * x @ centres.T + price).argmin(-1)
            members = np.eye(num_experts)[nearest] * weights[:, None]
            load = members.sum(0)
            if rate > 0.2:  # from then on the centres stand, and the loads settle
                centres += (
                    0.2 * (members.T @ x - load[:, None] * centres) / load[:, None].clip(1e-9)
                )
            elif load.max() < best:
                best, assignment[seen] = load.max(), nearest
            price += rate * (load - 1 / num_experts)
        yield assignment


def build_expert_table(
    hp: Hyperparameters, token_counts: np.ndarray, tokens: np.ndarray | None = None
) -> Tensor:
    """The K experts of every token id in every routed layer, (routed layers, V, K) uint8, from training text alone: its
    counts (V,) and, for cluster, a sample of its tokens (n,). Routers that read the stream start from it."""
    E, layers, ids = hp.num_experts, hp.routed_layers, np.arange(hp.vocab_size, dtype=np.uint32)
    rows = {"hash": (mix32(ids ^ mix32(np.uint32([layer + 1]))) % E for layer in layers)}
    rows |= dict.fromkeys(("modulo", "learned", "soft"), (ids % E for _ in layers))
    rows |= dict.fromkeys(
        ("zipf", "hybrid"), (zipf_assignment(token_counts, E, layer) for layer in layers)
    )
    rows |= {"cluster": cluster_assignments(tokens, token_counts, E, layers), "dense": ()}
    table = np.zeros((len(layers), hp.vocab_size, hp.top_k), np.uint8)
    for experts, layer, first in zip(table, layers, rows[hp.routing], strict=True):
        experts[:, 0] = first
        if hp.top_k == 2:  # another hash picks one of the others
            experts[:, 1] = (
                first + 1 + mix32(ids ^ mix32(np.uint32([layer + 1025]))) % (E - 1)
            ) % E
    return torch.from_numpy(table)


# ---- Model -----------------------------------------------------------------------------------------------------------
# Shape suffixes: B batch, T tokens, S scored positions, D model_dim, H heads, K head_dim, F hidden units, V vocabulary,
# E experts, N B * T, R layers run; G is the rows per hidden unit of an up projection (2 for swiglu, else 1).
def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def activate(h: Tensor, kind: str) -> Tensor:
    """Non-linearity of the MLP, (..., G * F) -> (..., F). The slope 0.3 is from upstream PR #1948."""
    if kind == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value
    return (F.leaky_relu(h, 0.3) if kind == "leaky_relu2" else F.relu(h)).square()


def rotary_tables(
    seq_len: int, base: float, dims: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each (T, 1, dims / 2) float32."""
    frequencies = base ** (
        -torch.arange(0, dims, 2, device=device, dtype=torch.float32) / max(dims, 1)
    )
    angles = torch.arange(seq_len, device=device, dtype=torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()


def apply_rotary(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of every head, half-split; the others stay free of position (partial RoPE)."""
    half, cos, sin = cos.size(-1), cos.to(x_BTHK.dtype), sin.to(x_BTHK.dtype)
    x1, x2, rest = x_BTHK.split([half, half, x_BTHK.size(-1) - 2 * half], dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


class CastedLinear(nn.Linear):
    """Bias-free linear layer: the float32 master weight is cast to the dtype of the activations at the matmul."""

    __init__ = partialmethod(nn.Linear.__init__, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def pick(x: Tensor, positions_BS: Tensor | None) -> Tensor:
    """(B, T, ...) at some positions of each row, (B, S, ...); all of x if these are None."""
    return (
        x
        if positions_BS is None
        else x[torch.arange(len(x), device=x.device)[:, None], positions_BS]
    )


def attend_at(positions_BS: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of queries (B, S, H, K) that stand at some positions, to k and v (B, T, Hkv, K)."""
    unseen_BST = torch.arange(k.size(1), device=k.device) > positions_BS[..., None]
    scores = (
        torch.einsum("bsgrk,btgk->bgrst", q.unflatten(2, (k.size(2), -1)), k).float()
        * q.size(-1) ** -0.5
    )
    weights = scores.masked_fill(unseen_BST[:, None, None], -math.inf).softmax(-1).to(v.dtype)
    return torch.einsum("bgrst,btgk->bsgrk", weights, v).flatten(2, 3)


def attention_kernel(name: str):
    """Causal attention, FlashAttention-3's or PyTorch's: q (B, T, H, K), k and v (B, T, Hkv, K) -> (B, T, H, K)."""
    if name == "fa3":
        from flash_attn_interface import flash_attn_func

        return partial(flash_attn_func, causal=True)
    sdpa = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    return lambda *q_k_v: sdpa(*(y.transpose(1, 2) for y in q_k_v)).transpose(1, 2)


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; mu biases q, k and v before the heads are split."""

    def __init__(self, hp: Hyperparameters, mu_dim: int):
        super().__init__()
        self.hp, D, kv_dim = hp, hp.model_dim, hp.num_kv_heads * hp.head_dim
        self.c_q, self.proj = CastedLinear(D, D), CastedLinear(D, D)
        self.c_k, self.c_v = CastedLinear(D, kv_dim), CastedLinear(D, kv_dim)
        self.q_gain = nn.Parameter(torch.full((hp.num_heads,), hp.qk_gain_init))
        self.attend = attention_kernel(hp.attention)
        if hp.attn_gate:
            self.gate = nn.Parameter(torch.zeros(hp.num_heads, GATE_CHANNELS))
        if hp.mu in MATRIX_MU:
            self.mu_read = CastedLinear(mu_dim, D + 2 * kv_dim)
        elif hp.mu != "off":
            self.mu_gain = nn.Parameter(torch.zeros(3, D))  # of mu in the inputs of q, k and v

    def qkv(
        self, x: Tensor, mu: Tensor | None, scored: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Projections of the normalised input, guided by mu: (B, T, D) twice -> (B, S, D), 2 x (B, T, Hkv * K)."""
        if mu is not None and self.hp.mu not in MATRIX_MU:
            q_gain, k_gain, v_gain = self.mu_gain.to(x.dtype)
            return (
                self.c_q(pick(x + q_gain * mu, scored)),
                self.c_k(x + k_gain * mu),
                self.c_v(x + v_gain * mu),
            )
        q, k, v = self.c_q(pick(x, scored)), self.c_k(x), self.c_v(x)
        if mu is None:
            return q, k, v
        mu_q, mu_k, mu_v = self.mu_read(mu).split([q.size(-1), k.size(-1), v.size(-1)], dim=-1)
        return q + pick(mu_q, scored), k + mu_k, v + mu_v

    def forward(
        self, x: Tensor, mu: Tensor | None, rotary: tuple[Tensor, Tensor], scored=None
    ) -> Tensor:
        """Normalised input (B, T, D), mu (B, T, mu_dim) or None, cosines and sines -> (B, S, D) at scored positions."""
        hp, q_rotary = self.hp, rotary if scored is None else [table[scored] for table in rotary]
        q, k, v = (y.unflatten(-1, (-1, hp.head_dim)) for y in self.qkv(x, mu, scored))
        q, k = (
            apply_rotary(norm(q), *q_rotary) * self.q_gain.to(x.dtype)[:, None],
            apply_rotary(norm(k), *rotary),
        )
        y = self.attend(q, k, v) if scored is None else attend_at(scored, q, k, v)
        x, v = pick(x, scored), pick(v, scored)
        if hp.xsa:  # exclusive self attention, upstream PR #478: the stream holds the token's own value already
            y, own = y.unflatten(2, (hp.num_kv_heads, -1)), F.normalize(v, dim=-1)[:, :, :, None]
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)
        if hp.attn_gate:  # SparseAttnGate of upstream PR #1787, neutral at the start
            y = (
                y
                * (2 * torch.sigmoid(F.linear(x[..., :GATE_CHANNELS], self.gate.to(x.dtype))))[
                    ..., None
                ]
            )
        return self.proj(y.flatten(2))


class TokenRoutedMLP(nn.Module):
    """shared(x) + the experts that the table or a router gives to the token; without, a plain MLP of the same width."""

    def __init__(self, hp: Hyperparameters, routed: bool):
        super().__init__()
        self.hp, self.routed, self.G = hp, routed, 2 if hp.activation == "swiglu" else 1
        self.width = hp.shared_dim + (
            0 if routed else hp.num_experts * hp.expert_dim
        )  # dense: equal bytes
        self.up, self.down = (
            CastedLinear(hp.model_dim, self.G * self.width),
            CastedLinear(self.width, hp.model_dim),
        )
        if routed:  # (E, out, in): every expert is a matrix of its own to Muon and to the quantizer
            self.expert_up = nn.Parameter(
                torch.zeros(hp.num_experts, self.G * hp.expert_dim, hp.model_dim)
            )
            self.expert_down = nn.Parameter(
                torch.zeros(hp.num_experts, hp.model_dim, hp.expert_dim)
            )
            if hp.routing in TABLE_SCORE:
                self.router = nn.Parameter(torch.zeros(hp.num_experts, hp.model_dim))

    def forward(self, x: Tensor, route: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | float]:
        """(B, T, D) and the layer's dispatch -> (B, T, D), and the Switch loss of a learned choice."""
        if (
            self.routed and self.hp.dispatch == "masked"
        ):  # every expert's share of one GEMM with the shared one
            chosen_BTE, balance = self.choose(x, *route)
            down = torch.cat([self.down.weight, *self.expert_down], dim=-1)
            return F.linear(self.hidden(x, chosen_BTE), down.to(x.dtype)), balance
        y = self.down(activate(self.up(x), self.hp.activation))
        return y + self.grouped(x, *route) if self.routed else y, 0.0

    def choose(self, x: Tensor, table_BTE: Tensor) -> tuple[Tensor, Tensor | float]:
        """Factor on each expert's output, (B, T, E): 1 if chosen, else 0, with the softmax's gradient straight through;
        for soft, E times the softmax. And the Switch loss, 1 for a perfect balance."""
        E, K, routing = self.hp.num_experts, self.hp.top_k, self.hp.routing
        if routing not in TABLE_SCORE:
            return table_BTE, 0.0
        scores = F.linear(x.float(), self.router) + TABLE_SCORE[routing] * table_BTE
        share = scores.softmax(-1)
        if routing == "soft":
            return (E * share).to(x.dtype), 0.0
        chosen = torch.zeros_like(share).scatter(-1, scores.topk(K).indices, 1.0)
        balance = E / K * chosen.flatten(0, 1).mean(0) @ share.flatten(0, 1).mean(0)
        return (chosen + (share - share.detach())).to(x.dtype), balance

    def hidden(self, x: Tensor, chosen_BTE: Tensor) -> Tensor:
        """Hidden units of the shared expert and of all others in one GEMM, those of experts not chosen set to zero."""
        D, width, hidden = self.hp.model_dim, self.width, self.hp.num_experts * self.hp.expert_dim
        expert_up = (
            self.expert_up.unflatten(1, (self.G, -1)).transpose(0, 1).reshape(self.G, hidden, D)
        )
        up = torch.cat([self.up.weight.view(self.G, width, D), expert_up], dim=1).view(-1, D)
        shared, routed = activate(F.linear(x, up.to(x.dtype)), self.hp.activation).split(
            [width, hidden], dim=-1
        )
        routed = (routed.unflatten(-1, (self.hp.num_experts, -1)) * chosen_BTE[..., None]).flatten(
            -2
        )
        return torch.cat([shared, routed], dim=-1)

    def grouped(self, x: Tensor, order_M: Tensor, inverse_M: Tensor, offsets_E: Tensor) -> Tensor:
        """M = N * K rows sorted by expert, one GEMM per expert between the true offsets, and back into place."""
        up, down, K = self.expert_up.to(x.dtype).mT, self.expert_down.to(x.dtype).mT, self.hp.top_k
        h_MF = activate(
            F.grouped_mm(x.flatten(0, 1)[order_M // K], up, offs=offsets_E), self.hp.activation
        )
        return F.grouped_mm(h_MF, down, offs=offsets_E)[inverse_M].view(*x.shape[:2], K, -1).sum(2)


Stream = collections.namedtuple(
    "Stream", "x mu velocity balance"
)  # (B, T, D), (B, T, mu_dim), pid's (B, T, D), loss


class Block(nn.Module):
    """x0 mix, attention guided by mu, MLP, and the mu for the next layer."""

    def __init__(self, hp: Hyperparameters, layer: int, mu_dim: int):
        super().__init__()
        self.hp, D = hp, hp.model_dim
        self.attn, self.mlp = (
            CausalSelfAttention(hp, mu_dim),
            TokenRoutedMLP(hp, routed=layer in hp.routed_layers),
        )
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
        self.parallel, self.input_scale = (
            layer >= hp.parallel_start_layer,
            (layer + 1) ** -0.5 if hp.ln_scale else 1.0,
        )
        self.makes_mu = (
            hp.mu != "off" and layer in hp.execution_order(True)[:-1]
        )  # nobody would read the last one
        if self.makes_mu and hp.mu in MATRIX_MU:
            self.mu_base, self.mu_write = nn.Parameter(torch.zeros(mu_dim)), CastedLinear(D, mu_dim)
        elif self.makes_mu:
            self.mu_mix = nn.Parameter(torch.full((2, D), 0.5))
        if hp.mu == "pid":
            self.pid_gains = nn.Parameter(torch.tensor([[2.2], [-2.2], [0.05]]).repeat(1, D))

    def next_mu(self, mu: Tensor, x: Tensor) -> Tensor:
        """Made from the normalised stream and bounded by a norm; the lineage's raw streams and clamps diverged."""
        if self.hp.mu in MATRIX_MU:
            return norm(self.mu_base.to(x.dtype) + self.mu_write(norm(x)))
        keep, write = self.mu_mix.to(x.dtype)
        return norm(keep * mu + write * norm(x))

    def forward(
        self, stream: Stream, x0: Tensor, rotary: tuple, route: tuple, scored: Tensor | None = None
    ) -> Stream:
        """Embeddings x0 (B, T, D), rotary tables and the layer's dispatch -> the stream for the next layer. In the last
        one, with scored positions (B, S), to which the dispatch then belongs, only the x there, and no mu."""
        x, mu, velocity, balance = stream
        keep, inject = self.resid_mix.to(x.dtype)
        x = keep * x + inject * x0
        y, x = self.attn(norm(x) * self.input_scale, mu, rotary, scored), pick(x, scored)
        if (
            self.hp.mu == "pid"
        ):  # a velocity pulls y towards mu; as it decays and the error is bounded, so is it
            decay, pull, gain = self.pid_gains.to(x.dtype)
            error = F.rms_norm(y, (y.size(-1),), eps=1e-3) - pick(
                mu, scored
            )  # XSA leaves a first token rounding alone
            velocity = torch.sigmoid(decay) * pick(velocity, scored) - torch.sigmoid(pull) * error
            y = y + gain * velocity
        attended = x + self.attn_scale.to(x.dtype) * y
        y, switch_loss = self.mlp(norm(x if self.parallel else attended) * self.input_scale, route)
        x = attended + self.mlp_scale.to(x.dtype) * y
        mu = self.next_mu(mu, x) if self.makes_mu and scored is None else None
        return Stream(x, mu, velocity, balance + switch_loss)


class GPT(nn.Module):
    """Decoder-only transformer with tied embedding, U-Net skips and token-routed MLPs."""

    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, self.dtype, num_skips = (
            hp,
            getattr(torch, hp.dtype),
            len(hp.execution_order(True)) // 2,
        )
        mu_dim = hp.mu_rank if hp.mu == "lowrank" else hp.model_dim
        self.tok_emb = nn.Embedding(hp.vocab_size, hp.model_dim)
        self.blocks = nn.ModuleList(Block(hp, layer, mu_dim) for layer in range(hp.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, hp.model_dim))
        if hp.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips, hp.model_dim))
        if hp.smear_gate:
            self.smear_gate, self.smear_scale = (
                nn.Parameter(torch.zeros(GATE_CHANNELS)),
                nn.Parameter(torch.zeros(1)),
            )
        if hp.mu != "off":
            self.mu_init = nn.Parameter(torch.ones(mu_dim))
        self.register_buffer(
            "expert_table", torch.zeros(len(hp.routed_layers), hp.vocab_size, hp.top_k).byte()
        )

    @torch.no_grad()
    def init_weights(self) -> None:
        """Orthogonal matrices, each expert by itself; zero for output projections and for the readers of mu. A tensor's
        values depend on its name, its shape and SEED alone, so that models that differ elsewhere start alike."""
        for name, p in self.named_parameters():
            generator = torch.Generator().manual_seed(self.hp.seed ^ zlib.crc32(name.encode()))
            if role_of(name) == "embedding":
                nn.init.normal_(p, std=0.005, generator=generator)
            elif role_of(name) in ("matrix", "expert", "mu_matrix"):
                for matrix in p.view(-1, *p.shape[-2:]):
                    nn.init.orthogonal_(matrix, generator=generator)
                if re.search(r"\b(proj|down|expert_down|mu_read)\b", name):
                    p.zero_()
            elif (
                name == "mu_init" and self.hp.mu in MATRIX_MU
            ):  # equal entries would get equal gradients
                nn.init.normal_(p, generator=generator)

    def routes(self, input_ids: Tensor, order: list[int]) -> list[tuple[Tensor, ...]]:
        """Dispatch in each of the R layers run, from token ids alone: block masks, or permutations and offsets."""
        hp, routed = (
            self.hp,
            [step for step, layer in enumerate(order) if layer in self.hp.routed_layers],
        )
        if not routed:
            return [()] * len(order)
        expert_LNK = self.expert_table[:, input_ids.flatten()].long()
        shifts = [order[:step].count(order[step]) * hp.routing_per_pass for step in routed]
        rows = [expert_LNK[order[step] - hp.routed_layers.start] for step in routed]
        expert_RNK = torch.stack(
            [(row + shift) % hp.num_experts for row, shift in zip(rows, shifts, strict=True)]
        )
        chosen_RNE = (
            expert_RNK[..., None] == torch.arange(hp.num_experts, device=input_ids.device)
        ).any(2)
        if hp.dispatch == "masked":
            parts = [(mask,) for mask in chosen_RNE.unflatten(1, input_ids.shape).to(self.dtype)]
        else:
            order_RM = expert_RNK.flatten(1).argsort(dim=-1, stable=True)
            offsets_RE = chosen_RNE.sum(1).cumsum(-1).to(torch.int32)
            parts = list(zip(order_RM, order_RM.argsort(dim=-1), offsets_RE, strict=True))
        return [parts.pop(0) if step in routed else () for step in range(len(order))]

    def smear(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """SmearGate (upstream PR #1667): adds a gated part of the token before, but not to a document's first token."""
        follows = (input_ids != BOS_ID) & (torch.arange(input_ids.size(1), device=x.device) > 0)
        gate = self.smear_scale.to(x.dtype) * torch.sigmoid(
            x[..., :GATE_CHANNELS] @ self.smear_gate.to(x.dtype)
        )
        return x + (gate * follows)[..., None] * F.pad(x[:, :-1], (0, 0, 1, 0))

    def features(
        self, input_ids: Tensor, looped: bool = True, scored: Tensor | None = None
    ) -> tuple:
        """(B, T) int64 -> the head's normalised input, (B, T, D) or (B, S, D) where scored; and the Switch losses."""
        hp, order, x = (
            self.hp,
            self.hp.execution_order(looped),
            self.tok_emb(input_ids).to(self.dtype),
        )
        x = x0 = norm(self.smear(x, input_ids) if hp.smear_gate else x)
        rotary, skips = (
            rotary_tables(input_ids.size(1), hp.rope_base, hp.rope_dims, input_ids.device),
            [],
        )
        mu = (
            norm(self.mu_init.to(self.dtype)).expand(*input_ids.shape, -1)
            if hp.mu != "off"
            else None
        )
        stream = Stream(
            x, mu, mu if hp.mu == "pid" else None, 0.0
        )  # from 0, the first gain would never learn
        routes = (
            self.routes(input_ids, order)[:-1] + self.routes(pick(input_ids, scored), order)[-1:]
        )
        for step, (layer, route) in enumerate(zip(order, routes, strict=True)):
            decoder_step = step - len(order) // 2
            if decoder_step >= 0 and skips:
                skip = self.skip_weights[decoder_step].to(x.dtype) * skips.pop()
                gate = (
                    torch.sigmoid(self.skip_gates[decoder_step]).to(x.dtype)
                    if hp.skip_gates
                    else None
                )
                stream = stream._replace(
                    x=stream.x + skip if gate is None else torch.lerp(skip, stream.x, gate)
                )
            stream = self.blocks[layer](
                stream, x0, rotary, route, scored if step == len(order) - 1 else None
            )
            if decoder_step < 0:
                skips.append(stream.x)
        return norm(stream.x), stream.balance

    def forward(
        self, input_ids, target_ids=None, reduction="mean", looped: bool = True, scored=None
    ) -> Tensor:
        """Logits (B, T, V) or, given targets, cross-entropy in nats; `looped` is off until the recurrence begins. Given
        `scored` positions (B, S) int64, only for these, (B, S, ...). In training, the mean includes Switch losses."""
        x, balance = self.features(input_ids, looped, scored)
        logits = 30.0 * torch.tanh(F.linear(x, self.tok_emb.weight.to(x.dtype)).float() / 30.0)
        if target_ids is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction=reduction)
        return (
            loss.view_as(target_ids)
            if reduction == "none"
            else loss + SWITCH_LOSS * balance * self.training
        )


ROLES = {  # what each tensor of the state dict is, by name; the optimizers and the quantizer both go by it
    "embedding": r"tok_emb\.weight",
    "matrix": r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(up|down))\.weight",
    "expert": r"blocks\.\d+\.mlp\.expert_(up|down)",
    "mu_matrix": r"blocks\.\d+\.(attn\.mu_read|mu_write)\.weight",
    "router": r"blocks\.\d+\.mlp\.router",
    "vector": r"skip_(weights|gates)|smear_(gate|scale)|mu_init"
    r"|blocks\.\d+\.(attn\.(q_gain|gate|mu_gain)|(attn|mlp)_scale|resid_mix|mu_mix|mu_base|pid_gains)",
    "table": r"expert_table",
}


def role_of(name: str) -> str:
    """The one role of a tensor in the state dict; a name without one, or with two, is a bug."""
    roles = [role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)]
    assert len(roles) == 1, f"{name} has roles {roles}"
    return roles[0]


def choose_attention(model: GPT, device: torch.device, log: Log) -> str:
    """Give `model` the first kernel of ATTENTION that runs with its heads, forward and backward, and turn PyTorch's
    others off. Returns the kernel; raises Refusal when there is none."""
    hp, failures = model.hp, []
    for kernel in CHOICES["attention"].split()[1:] if hp.attention == "auto" else [hp.attention]:
        for name in ("cudnn", "flash", "mem_efficient", "math"):
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(kernel in (name, "fa3"))
        try:
            shapes = (
                (1, 128, heads, hp.head_dim)
                for heads in (hp.num_heads, hp.num_kv_heads, hp.num_kv_heads)
            )
            inputs = [
                torch.zeros(s, device=device, dtype=model.dtype, requires_grad=True) for s in shapes
            ]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's reasons for not using a kernel
                attention_kernel(kernel)(*inputs).sum().backward()
        except (ImportError, RuntimeError) as error:
            failures.append(f"not {kernel}: {str(error).splitlines()[0][:60]}")
            continue
        for block in model.blocks:
            block.attn.attend = attention_kernel(kernel)
        log(f"attention:{kernel}" + "".join(f" ({failure})" for failure in failures))
        return kernel
    raise Refusal(f"ATTENTION={hp.attention}: {'; '.join(failures)}")


# ---- Optimizers and schedules ----------------------------------------------------------------------------------------
POLAR_EXPRESS = (  # optimal odd quintics for five steps, arXiv 2505.16932; used in upstream PR #1787
    (8.156555, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def zeropower_via_newtonschulz5(G: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each G[i], (M, rows, cols); a zero matrix stays zero. bfloat16 on a GPU."""
    X = G / (G.norm(dim=-1, keepdim=True) + 1e-7)  # row-normalised: MuonEq-R, upstream PR #1217
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    X, tall = X.bfloat16() if G.is_cuda else X, X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix (kellerjordan.github.io/posts/muon); an expert of a 3-D tensor is a matrix.
    A group holds the matrices of one shape, orthogonalised in one batch of which every rank computes its share."""

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, dist: Dist, compiles: bool
    ):
        groups = [
            {"params": [p for p in params if p.shape[-2:] == s]}
            for s in sorted({p.shape[-2:] for p in params})
        ]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.0})
        self.dist, self.zeropower = dist, zeropower_via_newtonschulz5
        if (
            compiles and dist.device.type == "cuda"
        ):  # on a CPU it is all GEMM, and not worth the compilation
            self.zeropower = torch.compile(
                zeropower_via_newtonschulz5, fullgraph=True, dynamic=False
            )

    @torch.no_grad()
    def step(self) -> None:
        """One update of every group, from the gradients and the LR and momentum in the group."""
        mine = slice(self.dist.rank, None, self.dist.world_size)
        for group in self.param_groups:
            params, (rows, cols) = group["params"], group["params"][0].shape[-2:]
            update, state = (
                torch.cat([p.grad.view(-1, rows, cols) for p in params]),
                self.state[params[0]],
            )
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(update)
            buffer = state["momentum_buffer"].lerp_(update, 1 - group["momentum"])
            update.lerp_(buffer, group["momentum"])  # Nesterov
            share = self.zeropower(update[mine]) if len(update[mine]) else update[mine]
            update.zero_()[mine] = share
            updates = self.dist.all_sum(update).split([p.numel() // (rows * cols) for p in params])
            updates = [u.view_as(p) for u, p in zip(updates, params, strict=True)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            scale = (
                max(1, rows / cols) ** 0.5
            )  # the RMS change of an activation is the same for tall and wide ones
            torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)


def build_optimizers(hp: Hyperparameters, model: GPT, dist: Dist) -> list[torch.optim.Optimizer]:
    """Muon for matrices and experts, AdamW for the embedding and for everything small; each parameter exactly once."""
    by_role = {
        role: [p for name, p in model.named_parameters() if role_of(name) == role] for role in ROLES
    }
    large, small = (
        by_role["matrix"] + by_role["expert"],
        by_role["vector"] + by_role["mu_matrix"] + by_role["router"],
    )
    muon = Muon(large, hp.matrix_lr, hp.muon_weight_decay, dist, can_compile(hp, dist.device))
    groups = [
        {"params": by_role["embedding"], "lr": hp.embed_lr, "weight_decay": hp.embed_weight_decay}
    ]
    groups += [
        {"params": small, "lr": hp.scalar_lr, "weight_decay": 0.0}
    ]  # decay would hold gains at their start
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=dist.device.type == "cuda")
    covered = sorted(
        id(p)
        for optimizer in (muon, adam)
        for group in optimizer.param_groups
        for p in group["params"]
    )
    assert covered == sorted(map(id, model.parameters())), (
        "every parameter needs exactly one optimizer group"
    )
    for group in muon.param_groups + adam.param_groups:
        group["base_lr"] = group["lr"]
    return [muon, adam]


def sgdr_bounds(hp: Hyperparameters) -> list[float]:
    """Starts of the cycles and the end, as fractions of the budget; every cycle is twice as long as the one before.
    With depth recurrence the last restart is where that begins: the loss spikes there, and wants a high LR."""
    bounds = [(2**i - 1) / (2**hp.sgdr_cycles - 1) for i in range(hp.sgdr_cycles + 1)]
    aligned = hp.loop_passes > 1 and hp.sgdr_cycles > 1 and 0 < hp.loop_from < 1
    return (
        [start * hp.loop_from / bounds[-2] for start in bounds[:-1]] + [1.0] if aligned else bounds
    )


def lr_scale(hp: Hyperparameters, frac: float) -> float:
    """Multiplier of all learning rates when the fraction `frac` of the budget is used (SGDR: arXiv 1608.03983)."""
    if hp.schedule == "linear":
        return max(hp.min_lr, min(1.0, (1 - frac) / hp.warmdown_frac)) if hp.warmdown_frac else 1.0
    bounds = sgdr_bounds(hp)
    cycle = sum(frac >= start for start in bounds[1:-1])
    position = min((frac - bounds[cycle]) / (bounds[cycle + 1] - bounds[cycle]), 1.0)
    return hp.min_lr + max(0.7**cycle - hp.min_lr, 0.0) * 0.5 * (1 + math.cos(math.pi * position))


def set_schedules(
    hp: Hyperparameters, optimizers: list[torch.optim.Optimizer], frac: float
) -> float:
    """Set learning rates and Muon's momentum for `frac` of the budget. Returns the LR multiplier."""
    scale, start = lr_scale(hp, frac), min(0.85, hp.muon_momentum)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["base_lr"] * scale
        if "momentum" in group:
            group["momentum"] = start + (hp.muon_momentum - start) * min(frac / 0.1, 1.0)
    return scale


def average_weight(hp: Hyperparameters, frac: float, count: int) -> float:
    """Weight of the newest parameters in a running average that has taken in `count` before; 0 = leave them out."""
    if hp.average == "ema":  # its warm-up keeps a short run from averaging over the bad start
        return 1 - min(hp.ema_decay, (1 + count) / (10 + count))
    return 1 / (1 + count) if hp.average == "swa" and frac >= hp.swa_start_frac else 0.0


# ---- Quantization ----------------------------------------------------------------------------------------------------
STEPS = torch.exp2(
    (torch.arange(256, dtype=torch.float64) - 192) / 8
).float()  # a byte a row meets k within 4.5 %


def quant_rule(hp: Hyperparameters, name: str) -> tuple[int, float] | None:
    """(bits, k) of a tensor, k = 0 where the largest weight alone sets the step; None = kept as it is."""
    rules = dict.fromkeys(("matrix", "expert", "mu_matrix"), (hp.matrix_bits, hp.matrix_clip))
    rules |= {
        "embedding": (hp.embed_bits, hp.embed_clip),
        "vector": (8, 0.0),
        "router": None,
        "table": None,
    }
    return rules[role_of(name)]


def step_codes(weight: Tensor, bits: int, clip: float) -> Tensor:
    """Index into STEPS of every row, (..., C) -> (..., 1) uint8. The step is clip * std(row) / (2^(bits-1) - 1)
    (SDClip, upstream PR #1394), which sets the entropy and hence the size, or as much more as an outlier needs."""
    weight, levels = weight.float(), 2 ** (bits - 1) - 1
    std = (weight - weight.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
    typical = 8 * (clip * std / levels).log2()
    needed = (
        8 * (weight.abs().amax(-1, keepdim=True) / levels).log2() - 1e-3
    )  # one that just fits is large enough
    return (torch.maximum(typical.round(), needed.ceil()) + 192).clamp(0, 255).to(torch.uint8)


def column_codes(hessian: Tensor | None, weight: Tensor) -> Tensor:
    """Index into STEPS of a factor on each column's steps, (C,) uint8: 1, or the inverse fourth root of the inputs'
    second moments. Some inputs of a head are a hundred times as active as the rest; cf. AWQ, arXiv 2306.00978."""
    if hessian is None or not hessian.isfinite().all():
        return torch.full(weight.shape[-1:], 192, dtype=torch.uint8, device=weight.device)
    activity = hessian.diagonal().clamp(min=1e-4 * hessian.diagonal().mean().item() + 1e-30).log2()
    return (192 + 8 / 4 * (activity.mean() - activity)).round().clamp(160, 216).to(torch.uint8)


def steps_of(*codes: Tensor) -> Tensor:
    return math.prod(STEPS.to(code.device)[code.long()] for code in codes)


def round_to_nearest(weight: Tensor, step: Tensor, bits: int) -> Tensor:
    levels = 2 ** (bits - 1) - 1
    return (weight.float() / step).round().clamp(-levels, levels)


def dequantize(symbols: Tensor, *codes: Tensor) -> Tensor:
    return symbols.float() * steps_of(*codes)


def gptq(weight: Tensor, step: Tensor, bits: int, hessian: Tensor, damping: float) -> Tensor | None:
    """GPTQ (arXiv 2210.17323) with act-order: rounds one column after another, the most active input first, and moves
    each error to the columns still to come, of which an input that was never active has none. weight and step (R, C),
    moments of the input (C, C) -> symbols (R, C) float32; None if these are not finite or not positive definite."""
    hessian, diagonal = hessian.double(), hessian.diagonal().double()
    order = diagonal.argsort(descending=True)
    damped = hessian + torch.diag(damping * diagonal.mean() + (diagonal == 0).double())
    upper, failed = torch.linalg.cholesky_ex(damped[order][:, order])
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(upper), upper=True)
    if failed or not upper.isfinite().all():
        return None
    upper, weight, step = (
        upper.float(),
        weight.float().T[order],
        step.T[order],
    )  # columns as rows, close in memory
    symbols = torch.empty_like(weight)
    for start in range(0, len(order), 128):
        block, rest = slice(start, start + 128), slice(start + 128, None)
        errors = torch.zeros_like(weight[block])
        for i, j in enumerate(range(start, start + len(errors))):
            symbols[j] = round_to_nearest(weight[j], step[j], bits)
            errors[i] = (weight[j] - symbols[j] * step[j]) / upper[j, j]
            weight[j + 1 : start + 128].addr_(upper[j, j + 1 : start + 128], errors[i], alpha=-1)
        weight[rest].addmm_(upper[block, rest].T, errors, alpha=-1)
    return symbols[order.argsort()].T


def matrices_of(tensors: dict[str, Tensor], name: str) -> list[list[Tensor]]:
    """The matrices whose inputs the Hessians under `name` describe: one per expert of expert_up; the down projections
    of the shared expert and of all others side by side, as they add up to one output; else the tensor itself."""
    if name.endswith("expert_up"):
        return [[matrix] for matrix in tensors[name]]
    return [[tensors[name], *tensors.get(name.removesuffix("down.weight") + "expert_down", ())]]


def quantize(
    hp: Hyperparameters, state: dict, factor: float = 1.0, hessians: dict | None = None
) -> tuple[dict, list]:
    """(symbols int8, step codes uint8 of rows, in the embedding also of columns) of tensors with a rule, (tensor,) of
    others; `factor` multiplies every k. Tensors named in `hessians` are rounded by GPTQ, the rest to nearest, as those
    whose Hessian is of no use, listed. Vectors that 8 bits would change by over 1 % stay float16. Raises Refusal."""
    parts, unusable, hessians = {}, [], hessians or {}
    for name, tensor in state.items():
        parts[name], rule = (tensor,), quant_rule(hp, name)
        gains = [column_codes(hessians.get(name), tensor)] * (role_of(name) == "embedding")
        limit = steps_of(*gains) * (
            STEPS[-1].item() * (2 ** (rule[0] - 1) - 1) if rule else 65_504
        )  # float16's
        require(
            bool((tensor.float().abs() <= limit).all()),
            f"{name}: not finite or too large, nothing exported",
        )
        if rule:
            codes = step_codes(tensor / steps_of(*gains), rule[0], factor * rule[1])
            parts[name] = (
                round_to_nearest(tensor, steps_of(codes, *gains), rule[0]).to(torch.int8),
                codes,
                *gains,
            )
        coarse = (
            role_of(name) == "vector"
            and (dequantize(*parts[name]) - tensor).norm() > 0.01 * tensor.norm()
        )
        if coarse or role_of(name) == "router":
            parts[name] = (tensor.half(),)
    symbols = {name: part[0] for name, part in parts.items()}
    steps = {
        name: steps_of(*part[1:]).expand_as(part[0])
        for name, part in parts.items()
        if len(part) > 1
    }
    for name, hessian in hessians.items():
        jobs = zip(
            *(matrices_of(tensors, name) for tensors in (state, steps, symbols)), strict=True
        )
        for H, (weights, all_steps, targets) in zip(
            hessian.view(-1, *hessian.shape[-2:]), jobs, strict=True
        ):
            result = gptq(
                torch.cat(weights, -1),
                torch.cat(all_steps, -1),
                quant_rule(hp, name)[0],
                H,
                hp.gptq_damping,
            )
            if result is None:
                unusable += [name] * (name not in unusable)
                continue
            for old, step, new in zip(
                targets, all_steps, result.split([t.size(-1) for t in targets], -1), strict=True
            ):
                old.copy_(
                    torch.where(step > STEPS[0], new, old)
                )  # errors of others would fill a row of zeros
    return parts, unusable


# ---- Artifact --------------------------------------------------------------------------------------------------------
# PREFIX | JSON header | streams, each compressed by itself. The model knobs in the header give the names and shapes of
# all tensors, `storage` a letter for each (q = symbols and steps, h = float16, t = uint8), `streams` codecs and bytes.
PREFIX = struct.Struct(
    "<8sHI32s"
)  # magic, version, bytes of the header, SHA-256 of all other bytes
ARTIFACT_MAGIC, ARTIFACT_VERSION, CODECS = b"TRMOE\r\n\x1a", 3, {1: "zstd", 2: "brotli"}
MAX_WEIGHTS, MAX_HEADER_BYTES = (
    1 << 27,
    1 << 16,
)  # bound what a stranger's file may cost: seconds, and 2 GiB


def import_codec(name: str) -> tuple:
    """(compress, decompress up to about a size, error class) of a codec; imported on use, as reading needs only one."""
    try:
        if name == "zstd":
            import zstandard as zstd

            reader = zstd.ZstdDecompressor().stream_reader
            return (
                zstd.ZstdCompressor(22).compress,
                lambda data, size: reader(data).read(size),
                zstd.ZstdError,
            )
        import brotli

        unpack, pack = brotli.Decompressor().process, partial(brotli.compress, quality=11, lgwin=24)
        return pack, lambda data, size: unpack(data, output_buffer_limit=size), brotli.error
    except ImportError as error:
        raise Refusal(
            f"codec {name} needs the Python package {error.name}: pip install {error.name}"
        ) from None


def compress(data: bytes, codec: str) -> tuple[int, bytes]:
    """Number of the codec and what it makes of `data`; auto keeps the smaller of zstd-22 and brotli-11."""
    packed = (
        (number, import_codec(name)[0](data))
        for number, name in CODECS.items()
        if codec in (name, "auto")
    )
    return min(packed, key=lambda item: len(item[1]))


def decompress(data: bytes, number: int, size: int, source: Path) -> bytes:
    """`size` bytes from a stream. Raises Refusal when it holds more, or less, or is damaged."""
    require(number in CODECS, f"{source}: damaged artifact, no codec {number}")
    _, unpack, codec_error = import_codec(CODECS[number])
    try:
        payload = unpack(data, size + 1)
    except codec_error as error:
        raise Refusal(f"{source}: damaged artifact, {CODECS[number]} says {error}") from error
    require(
        len(payload) == size,
        f"{source}: damaged artifact, a stream does not unpack to {size} bytes",
    )
    return payload


def layout(
    shapes: dict[str, tuple[int, ...]], storage: str
) -> dict[str, list[tuple[str, str, np.dtype, tuple]]]:
    """Streams in order, each a list of (tensor, part, dtype, shape). Raises ValueError for impossible storage."""
    streams: dict[str, list] = {}
    require(
        sum(map(math.prod, shapes.values())) <= MAX_WEIGHTS,
        f"too large a model, over {MAX_WEIGHTS:,} weights",
    )
    for (name, shape), kind in zip(shapes.items(), storage, strict=True):
        role = role_of(name)
        if kind not in {"vector": "qh", "router": "h", "table": "t"}.get(role, "q"):
            raise ValueError(f"{name} cannot be stored as {kind!r}")
        entries = (
            [("float16", "kept", "<f2", shape)] if kind == "h" else [("table", "kept", "u1", shape)]
        )
        if kind == "q":
            entries = [(role if role == "vector" else name, "symbols", "i1", shape)]
            entries += [("steps", "codes", "u1", (*shape[:-1], 1))]
            entries += [("steps", "gains", "u1", shape[-1:])] * (role == "embedding")
        for stream, part, dtype, part_shape in entries:
            streams.setdefault(stream, []).append((name, part, np.dtype(dtype), part_shape))
    return streams


def pack(
    hp: Hyperparameters, parts: dict, tokenizer_sha256: str, codec: str
) -> tuple[bytes, dict[str, int]]:
    """The artifact of quantized tensors, and its bytes by role of the tensors, with the streams that tensors share."""
    storage = "".join(
        {torch.uint8: "t", torch.float16: "h", torch.int8: "q"}[p[0].dtype] for p in parts.values()
    )
    plan = layout({name: tuple(part[0].shape) for name, part in parts.items()}, storage)
    index = {"kept": 0, "symbols": 0, "codes": 1, "gains": 2}

    def stream_of(entries: list[tuple]) -> tuple[int, bytes]:
        return compress(
            b"".join(
                parts[name][index[part]].cpu().numpy().tobytes() for name, part, *_ in entries
            ),
            codec,
        )

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        streams = dict(zip(plan, pool.map(stream_of, plan.values()), strict=True))
    header = {
        "model": {name: getattr(hp, name) for name in MODEL_KNOBS},
        "tokenizer_sha256": tokenizer_sha256,
    }
    header |= {
        "storage": storage,
        "streams": [(number, len(data)) for number, data in streams.values()],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    body, prefix = (
        text + b"".join(data for _, data in streams.values()),
        (ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text)),
    )
    sizes = collections.Counter(header=PREFIX.size + len(text))
    for stream, (_, data) in streams.items():
        sizes[role_of(stream) if stream in parts else stream] += len(data)
    return PREFIX.pack(
        *prefix, hashlib.sha256(PREFIX.pack(*prefix, bytes(32)) + body).digest()
    ) + body, sizes


def load_artifact(
    path: Path, hp: Hyperparameters, device: torch.device
) -> tuple[GPT, Hyperparameters, str]:
    """The only reader of artifacts: the model, `hp` with the artifact's model knobs, and its tokenizer's SHA-256."""
    require(path.is_file(), f"{path}: no such artifact")
    require(
        PREFIX.size <= path.stat().st_size < MAX_SUBMISSION_BYTES,
        f"{path}: too short or too long for an artifact",
    )
    data, what = path.read_bytes(), f"{path}: damaged artifact"
    magic, version, header_bytes, digest = PREFIX.unpack_from(data)
    require(magic == ARTIFACT_MAGIC, f"{path} is not an artifact of this trainer")
    require(
        version == ARTIFACT_VERSION,
        f"{path}: artifact version {version}, this trainer reads {ARTIFACT_VERSION}",
    )
    intact = (
        hashlib.sha256(data[: PREFIX.size - 32] + bytes(32) + data[PREFIX.size :]).digest()
        == digest
    )
    require(intact, f"{what}, the checksum does not match")
    require(header_bytes <= MAX_HEADER_BYTES, f"{what}, a header of {header_bytes:,} bytes")
    offset = PREFIX.size + header_bytes
    try:
        header = json.loads(data[PREFIX.size : offset])
        tokenizer_sha256 = str(header["tokenizer_sha256"])
        numbers, sizes = zip(*(map(int, stream) for stream in header["streams"]), strict=True)
        hp = replace(hp, **{name: header["model"][name] for name in MODEL_KNOBS})
        hp = replace(
            hp, train_batch_tokens=hp.train_seq_len
        ).validate()  # the environment's need not fit
        with torch.device("meta"):
            model = GPT(hp)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        plan = layout(shapes, str(header["storage"]))
    except Refusal as error:
        raise Refusal(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Refusal(f"{what}, bad header ({error})") from error
    fill = len(sizes) == len(plan) and min(sizes) >= 0 and offset + sum(sizes) == len(data)
    require(fill, f"{what}, its streams do not fill it")
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in shapes}
    for entries, number, size in zip(plan.values(), numbers, sizes, strict=True):
        unpacked = sum(math.prod(shape) * dtype.itemsize for *_, dtype, shape in entries)
        stream, offset = (
            io.BytesIO(decompress(data[offset : offset + size], number, unpacked, path)),
            offset + size,
        )
        for name, part, dtype, shape in entries:
            array = np.frombuffer(stream.read(math.prod(shape) * dtype.itemsize), dtype).reshape(
                shape
            )
            parts[name][part] = torch.from_numpy(array.astype(dtype.newbyteorder("=")))
    state = {
        name: dequantize(part.pop("symbols"), *part.values()) if "symbols" in part else part["kept"]
        for name, part in parts.items()
    }
    require(
        all(bool(tensor.isfinite().all()) for tensor in state.values()),
        f"{what}, a weight is not finite",
    )
    table = state["expert_table"].sort(-1).values
    require(
        bool((table < hp.num_experts).all() and table.diff(dim=-1).all()),
        f"{what}, expert out of range or twice",
    )
    model.load_state_dict(state, strict=True, assign=True)
    return model.float().to(device).eval(), hp, tokenizer_sha256


class Fitted(collections.namedtuple("Fitted", "artifact sizes parts factor unusable")):
    """An artifact, its bytes by role, quantized tensors, the factor on every k, tensors whose Hessian was of no use."""

    def budget(self) -> str:
        """Table of what every role takes, with the entropy of its symbols, tensor by tensor, as the floor in bytes."""
        lines = [
            f"{'role':<10}{'weights':>12}{'bytes':>12}{'bits/weight':>13}{'entropy floor':>15}"
        ]
        for role, size in self.sizes.items():
            tensors = [p for name, p in self.parts.items() if role_of(name) == role and len(p) > 1]
            weights, floor = (
                sum(p[0].numel() for p in tensors),
                entropy_bytes(*(p[0] for p in tensors)),
            )
            known = f"{weights:>12,}{size:>12,}{8 * size / max(weights, 1):>13.3f}{floor:>15,.0f}"
            lines.append(f"{role:<10}" + (known if weights else f"{'':>12}{size:>12,}"))
        return (
            "\n".join(lines) + f"\n{'total':<22}{len(self.artifact):>12,}  (k x {self.factor:.4f})"
        )


def entropy_bytes(*tensors: Tensor) -> float:
    """Least size of tensors of 8 bits for a coder that knows each one's frequencies and nothing else; others as is."""
    total = 0.0
    for tensor in (tensor for tensor in tensors if tensor.numel()):
        bits = 8.0 * tensor.element_size()
        if bits == 8:
            shares = torch.bincount(tensor.flatten().int() + 128).double() / tensor.numel()
            bits = torch.special.entr(shares).sum().item() / math.log(2)
        total += tensor.numel() * bits / 8
    return total


def factor_for(hp: Hyperparameters, state: dict, goal: float) -> tuple[float, float]:
    """The finest factor on every k, 1/8 to 4, at which rounding to nearest leaves at most `goal` bytes of entropy, or
    the coarsest if there is none; and these bytes."""

    def entropy(exponent: float) -> float:
        return entropy_bytes(
            *(x for part in quantize(hp, state, 2.0**exponent)[0].values() for x in part)
        )

    low, high = -3.0, -3.0 if entropy(-3.0) <= goal else 2.0
    while high - low > 2**-12:
        middle = (low + high) / 2
        low, high = (low, middle) if entropy(middle) <= goal else (middle, high)
    return 2.0**high, entropy(high)


def fit(
    hp: Hyperparameters,
    state: dict,
    tokenizer_sha256: str,
    codec: str,
    hessians: dict | None = None,
) -> Fitted:
    """The finest artifact whose size and the code's are at most TARGET_BYTES, within ~0.1 % where k decides the size; k
    as given if that is 0. Each try corrects the entropy to aim at. Raises Refusal if the largest k is not enough."""
    target, ratio, best = max(hp.target_bytes - submission_bytes(hp, 0, "code")[0], 1), 1.015, None
    for aim in (*[0.9996] * 5, 0.98):
        factor, entropy = (
            factor_for(hp, state, aim * target / ratio) if hp.target_bytes else (1.0, math.inf)
        )
        parts, unusable = quantize(hp, state, factor, hessians)
        fitted = Fitted(*pack(hp, parts, tokenizer_sha256, codec), parts, factor, unusable)
        size = len(fitted.artifact)
        if not hp.target_bytes or (
            size <= target and (factor == 2.0**-3 or size >= 0.999 * target)
        ):
            return fitted
        if size <= target and (best is None or size > len(best.artifact)):
            best = fitted
        excess = f"{size - target:,} bytes too large; lower MODEL_DIM={hp.model_dim} or NUM_LAYERS={hp.num_layers}"
        require(
            best is not None or (aim > 0.98 and factor < 4.0),
            f"TARGET_BYTES={hp.target_bytes}: {excess}",
        )
        ratio = size / entropy
    return best


def submission_source() -> bytes:
    """This file and, after a NUL, eval_sliding.py beside it."""
    files = Path(__file__).resolve(), Path(__file__).resolve().with_name("eval_sliding.py")
    return b"\0".join(path.read_bytes() for path in files if path.exists())


def pack_source(source: bytes) -> bytes:
    """The text that a record's train_gpt.py carries between the lines of its loader: xz in base85, ASCII."""
    return base64.b85encode(lzma.compress(source, preset=9))


def submission_bytes(hp: Hyperparameters, model_bytes: int, what: str) -> tuple[int, int]:
    """Bytes of the code, packed as a record ships it, and of code plus model. Raises Refusal at the cap."""
    code = LOADER_BYTES + len(pack_source(submission_source()))
    cap = f"the cap is {MAX_SUBMISSION_BYTES:,}; lower MODEL_DIM={hp.model_dim} or raise MATRIX_CLIP={hp.matrix_clip}"
    require(
        code + model_bytes < MAX_SUBMISSION_BYTES,
        f"{what}: {code:,} bytes of code + {model_bytes:,}, {cap}",
    )
    return code, code + model_bytes


def dry_run(hp: Hyperparameters, model: GPT) -> Fitted:
    """The artifact to come, estimated on Gaussian stand-ins, whose symbols have the entropy of trained rows."""
    rng, state = torch.Generator().manual_seed(0), model.state_dict()
    state |= {
        n: torch.randn(t.shape, generator=rng) for n, t in state.items() if t.is_floating_point()
    }
    return fit(hp, state, "0" * 64, "zstd" if hp.codec == "auto" else hp.codec)


# ---- Evaluation ------------------------------------------------------------------------------------------------------
def scoring_windows(num_targets: int, seq_len: int, stride: int) -> Tensor:
    """Windows that score `stride` targets each, (W, 3) int64: start, first target, end; where the text has them, with
    `seq_len - stride` tokens of context or more."""
    first = torch.arange(0, num_targets, stride)
    return torch.stack(
        [(first + stride - seq_len).clamp(min=0), first, (first + stride).clamp(max=num_targets)], 1
    )


class Score(
    collections.namedtuple("Score", "val_loss bpb target_tokens scored_bytes seconds partial")
):
    """Of an evaluation, in nats per token and in bits per byte, which is a val_bpb unless partial."""

    def __str__(self) -> str:
        name = "PARTIAL" if self.partial else "val"
        return f"{name}_loss:{self.val_loss:.8f} {name}_bpb:{self.bpb:.8f}"


class Scorer:
    """Scores windows of a split; keeps the loss of every target, in nats, and how often it has been scored."""

    def __init__(
        self, forward, val: ValData, hp: Hyperparameters, dist: Dist, stride: int, label: str
    ):
        self.forward, self.val, self.dist, self.stride, self.label = (
            forward,
            val,
            dist,
            stride,
            label,
        )
        self.num_targets, self.seq_len = len(val.tokens) - 1, hp.eval_seq_len or hp.train_seq_len
        self.batch_size = max(1, hp.micro_batch_tokens // self.seq_len)  # windows per forward pass
        self.windows = scoring_windows(self.num_targets, self.seq_len, stride).to(dist.device)
        self.sums = torch.zeros(
            2, self.num_targets + 1, device=dist.device
        )  # the last column is for padding
        batch = (
            torch.arange(len(self.windows), device=dist.device) // self.batch_size
        )  # shared whole: same rounding
        self.share = self.windows[batch % dist.world_size == dist.rank]
        self.progress = Progress(label, len(self.share), dist.rank)

    def batch(
        self, windows: Tensor, stride: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Inputs (B, T), targets (B, S), scored positions (B, S), None for all, and the column of each loss (B, S), for
        windows (W, 3) and empty ones up to B. A window's last input is repeated to its end: nothing beyond is read."""
        start, first, end = F.pad(windows, (0, 0, 0, size - len(windows))).T[..., None]
        position_BT = (
            (start + torch.arange(self.seq_len, device=windows.device))
            .minimum(end - 1)
            .clamp(min=0)
        )
        target_BS = first + torch.arange(stride, device=windows.device)
        column_BS = torch.where(target_BS < end, target_BS, self.num_targets)
        target_BS = target_BS.minimum(end - 1).clamp(min=0)
        scored_BS = None if stride == self.seq_len else target_BS - start
        return (
            self.val.tokens[position_BT].long(),
            self.val.tokens[target_BS + 1].long(),
            scored_BS,
            column_BS,
        )

    @torch.no_grad()
    def score(self, windows: Tensor) -> None:
        """Score windows (W, 3), in batches of one shape."""
        for batch in windows.split(self.batch_size):
            input_ids, target_ids, scored_BS, column_BS = self.batch(
                batch, self.stride, self.batch_size
            )
            nll_BS = self.forward(input_ids, target_ids, reduction="none", scored=scored_BS)
            self.sums.index_add_(
                1, column_BS.flatten(), torch.stack([nll_BS, torch.ones_like(nll_BS)]).flatten(1)
            )
            self.progress.update(self.progress.done + len(batch))

    def total(self, finished: bool = True) -> Score:
        """Of all ranks, each target once, or unless finished of this one; float64, in the order of the text, whatever
        the ranks and batches. Raises Refusal."""
        nll, times = (self.dist.all_sum(self.sums) if finished else self.sums)[:, :-1]
        once, partial = times == 1, self.val.partial or not finished
        assert not finished or bool(once.all()), (
            f"{int((~once).sum())} of {self.num_targets} targets not scored once"
        )
        nats, scored_bytes = nll[once].double().sum().item(), int(self.val.target_bytes[once].sum())
        require(
            math.isfinite(nats) and scored_bytes > 0,
            f"{self.label}: total loss {nats} over {scored_bytes} bytes",
        )
        count, seconds = int(once.sum()), time.perf_counter() - self.progress.started
        return Score(
            nats / count, nats / math.log(2) / scored_bytes, count, scored_bytes, seconds, partial
        )


def evaluate(
    model: nn.Module, val: ValData, hp: Hyperparameters, dist: Dist, stride: int, label: str
) -> Score:
    """Score the split by windows that score `stride` targets, a whole window in plain validation. Raises Refusal."""
    scorer = Scorer(model, val, hp, dist, stride, label)
    scorer.score(scorer.share)
    return scorer.total()


# ---- Training --------------------------------------------------------------------------------------------------------
class Gradients:
    """The loss and all gradients as views of one flat buffer: one all-reduce, one norm and one memset per step."""

    def __init__(self, model: GPT, dist: Dist):
        self.dist, params = dist, list(model.parameters())
        starts = np.cumsum(
            [64] + [-(-p.numel() // 64) * 64 for p in params]
        ).tolist()  # aligned for vector loads
        self.flat = torch.zeros(starts[-1], device=dist.device)
        for p, start in zip(params, starts, strict=False):
            p.grad = self.flat[start : start + p.numel()].view_as(p)

    def average_and_clip(self, max_norm: float) -> None:
        """Mean over ranks of loss and gradients; then shrink the gradients to an L2 norm of at most `max_norm`."""
        self.dist.all_sum(self.flat).div_(self.dist.world_size)
        if max_norm:
            self.flat[64:].mul_((max_norm / (self.flat[64:].norm() + 1e-6)).clamp(max=1.0))


def train_step(
    model, optimizers: list, gradients: Gradients, batches: list, max_norm: float, looped=True
) -> Tensor:
    """One optimizer step over micro-batches (input_ids, target_ids). Returns the mean loss of all ranks, a tensor."""
    gradients.flat.zero_()
    for input_ids, target_ids in batches:
        loss = model(input_ids, target_ids, looped=looped) / len(batches)
        loss.backward()
        gradients.flat[0] += loss.detach()
    gradients.average_and_clip(max_norm)
    for optimizer in optimizers:
        optimizer.step()
    return gradients.flat[0].clone()


def warm_up(
    model: nn.Module, raw_model: GPT, optimizers: list, gradients: Gradients, loader: TokenLoader
) -> None:
    """Compile everything on random tokens and leave no trace: weights and optimizer states are restored."""
    hp, generator = loader.hp, torch.Generator().manual_seed(0)
    weights, states = (
        copy.deepcopy(raw_model.state_dict()),
        copy.deepcopy([o.state_dict() for o in optimizers]),
    )
    for looped in [
        looped for looped in sorted({hp.loop_is_on(0.0), True}) for _ in range(hp.warmup_steps)
    ]:
        tokens = torch.randint(
            hp.vocab_size, (2, loader.num_sequences, hp.train_seq_len), generator=generator
        )
        train_step(
            model,
            optimizers,
            gradients,
            [tuple(tokens.to(loader.dist.device))],
            hp.grad_clip_norm,
            looped,
        )
    raw_model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)


def timing(seconds: float, steps: int) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(steps, 1):.2f}ms"


class Checkpoints:
    """logs/<RUN_ID>.step<N>.npz: all that the next step depends on, at any world size; no step draws from an RNG, and
    the order of the data follows from SEED and the step. Raises Refusal."""

    def __init__(
        self, log: Log, model: GPT, optimizers: list, average: list[Tensor], loader: TokenLoader
    ):
        self.log, self.model, self.optimizers, self.average, self.hp = (
            log,
            model,
            optimizers,
            average,
            loader.hp,
        )
        self.rank, self.step, self.elapsed, self.kept = loader.dist.rank, 0, 0.0, []
        self.fixed = {
            name: getattr(self.hp, name) for name in (*MODEL_KNOBS, "seed", "train_batch_tokens")
        }
        self.fixed["train_windows"], self.pattern = (
            loader.num_windows,
            f"{self.hp.run_id}.step{'[0-9]' * 8}.npz",
        )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name."""
        parts = {"model": self.model.state_dict()}
        parts["average"] = dict(
            zip([name for name, _ in self.model.named_parameters()], self.average, strict=True)
        )
        for i, optimizer in enumerate(self.optimizers):
            parts |= {
                f"optimizer{i}/{p}": state for p, state in optimizer.state_dict()["state"].items()
            }
        return {
            f"{part}/{name}": tensor
            for part, named in parts.items()
            for name, tensor in named.items()
        }

    def save(self, step: int, elapsed: float, averaged: int, now: bool) -> None:
        """After so many steps and s of training, if CHECKPOINT_EVERY has passed, or `now`; the last two are kept."""
        every, path = self.hp.checkpoint_every, LOG_FOLDER / f"{self.hp.run_id}.step{step:08d}.npz"
        past = elapsed - self.elapsed if every.endswith("s") else step - self.step
        if not every or step == self.step or not (now or past >= int(every.rstrip("s"))):
            return
        if self.rank == 0:
            tensors, file = self.tensors(), io.BytesIO()
            finite = all(bool(tensor.isfinite().all()) for tensor in tensors.values())
            require(
                finite,
                f"weights or moments are not finite at step {step}: stopped, {path} not written",
            )
            arrays = {name: tensor.cpu().numpy() for name, tensor in tensors.items()}
            np.savez(file, meta=json.dumps([self.fixed, (step, elapsed, averaged)]), **arrays)
            write_atomically(path, file.getbuffer())
            for old in set(LOG_FOLDER.glob(self.pattern)) - {path, *self.kept[-1:]}:
                old.unlink()
        self.step, self.elapsed, self.kept = step, elapsed, [*self.kept, path]
        self.log(
            f"checkpoint:{path} train_time:{1000 * elapsed:.0f}ms (to go on: RUN_ID={self.hp.run_id} RESUME=auto)"
        )

    def resume(self) -> tuple[int, float, int]:
        """Load what RESUME names. Returns steps done, s of training, and how many steps the average holds."""
        found, flaws = sorted(LOG_FOLDER.glob(self.pattern)), []
        paths = {"off": [], "auto": found[::-1]}.get(self.hp.resume, [Path(self.hp.resume)])
        apart = (
            self.hp.resume == "auto"
            or not found
            or found[-1].resolve() in [path.resolve() for path in paths]
        )
        require(
            apart,
            f"{max(found, default='')} is there: RESUME=auto goes on from it, another RUN_ID leaves it",
        )
        for optimizer in self.optimizers * (len(paths) > 0):
            optimizer.step()  # makes the states that are loaded next
        for path in paths:
            try:
                with np.load(path, allow_pickle=False) as file:
                    knobs, (step, elapsed, averaged) = json.loads(str(file["meta"]))
                    other = [
                        f"{k.upper()}={knobs[k]}, now {v}"
                        for k, v in self.fixed.items()
                        if v != knobs[k]
                    ]
                    require(not other, f"{path} is of another run: {'; '.join(other)}")
                    for name, tensor in self.tensors().items():
                        tensor.copy_(torch.from_numpy(file[name]))
                self.step, self.elapsed, self.kept = step, elapsed, [path]
                self.log(f"resumed:{path} step:{step} train_time:{1000 * elapsed:.0f}ms")
                return step, elapsed, averaged
            except Refusal:
                raise
            except Exception as error:  # a zip file can be damaged in many ways
                flaws.append(f"{path}: damaged checkpoint ({error})")
                self.log(f"warning: {flaws[-1]}")
        require(not flaws, "; ".join(flaws))
        return 0, 0.0, 0


def train(hp: Hyperparameters, dist: Dist, log: Log, model: GPT, loader: TokenLoader, val: ValData):
    """Train until ITERATIONS or the wall-clock cap; leave averaged weights in `model`. Returns steps and seconds."""
    compiles, cap, accum = (
        can_compile(hp, dist.device),
        hp.training_seconds,
        hp.grad_accum_steps(dist.world_size),
    )
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiles else model
    optimizers, gradients, started = (
        build_optimizers(hp, model, dist),
        Gradients(model, dist),
        time.perf_counter(),
    )
    weights = [p.detach() for p in model.parameters()]
    average = [p.clone() for p in weights]
    checkpoints = Checkpoints(log, model, optimizers, average, loader)
    step, elapsed, averaged = checkpoints.resume()
    loader.position = step * hp.train_batch_tokens // hp.train_seq_len
    warm_up(forward, model, optimizers, gradients, loader)
    log(
        f"warmup_step:{hp.warmup_steps}/{hp.warmup_steps} random tokens, undone, {dist.synchronize() - started:.1f}s "
        f"compile:{'fullgraph' if compiles else 'off'} grad_accum_steps:{accum}"
    )
    progress, loss, started = (
        Progress("train", 1.0, dist.rank),
        math.nan,
        dist.synchronize() - elapsed,
    )
    on_cpu, looped = (
        dist.device.type == "cpu",
        hp.loop_is_on(0.0),
    )  # on a CPU, reading the loss costs nothing
    # Steps that must end inside the cap: the next, and the two by which the host may be ahead of a GPU.
    ahead = (1 if on_cpu else 3) * len(hp.execution_order(True)) / hp.num_layers
    caught: list[int] = []
    handlers = [
        signal.signal(number, lambda number, frame: caught.append(number)) for number in SIGNALS
    ]
    while True:
        before, (elapsed, signalled) = (
            elapsed,
            dist.all_max(time.perf_counter() - started, sum(caught[:1])),
        )
        require(
            elapsed >= before,
            f"the clock went back by {before - elapsed:.1f} s at step {step}: stopped",
        )
        out_of_time = cap > 0 and step > 0 and elapsed * (1 + ahead / step) > cap
        ended = out_of_time or step == hp.iterations
        checkpoints.save(step, elapsed, averaged, now=ended or signalled > 0)
        if signalled:
            log(
                f"interrupted after step {step}, CHECKPOINT_EVERY={hp.checkpoint_every or 'off: nothing saved'}"
            )
            raise KeyboardInterrupt(int(signalled))
        if ended:
            break
        if hp.val_loss_every and step and step % hp.val_loss_every == 0:
            paused = dist.synchronize()
            score = evaluate(
                partial(model, looped=looped), val, hp, dist, hp.train_seq_len, "validate"
            )
            log(f"step:{step}/{hp.iterations} {score} {timing(elapsed, step)}")
            started += dist.synchronize() - paused
        frac = max(elapsed / cap if cap else 0.0, step / hp.iterations)
        if hp.loop_is_on(frac) and not looped:
            looped = True
            log(f"layer_loop:enabled step:{step} frac:{frac:.3f} order:{hp.execution_order(True)}")
        scale, batches = (
            set_schedules(hp, optimizers, frac),
            [loader.next_batch() for _ in range(accum)],
        )
        device_loss = train_step(forward, optimizers, gradients, batches, hp.grad_clip_norm, looped)
        newest = average_weight(hp, frac, averaged)
        if newest:
            torch._foreach_lerp_(average, weights, newest)
            averaged += 1
        step += 1
        logged = step <= 10 or step % hp.train_log_every == 0
        if logged or on_cpu:
            loss = device_loss.item()
            require(
                math.isfinite(loss),
                f"training loss is {loss} at step {step}: stopped, nothing exported",
            )
        spent = time.perf_counter() - started
        speed = f"{timing(spent, step)} lr_scale:{scale:.3f} tok/s: {step * hp.train_batch_tokens / spent:.0f}"
        if logged:
            log(f"step:{step}/{hp.iterations} train_loss:{loss:.6f} {speed}")
        progress.update(frac, f"step {step} loss {loss:.3f} {speed}")
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)
    elapsed = dist.all_max(dist.synchronize() - started)[0]
    if out_of_time:
        log(
            f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{step}/{hp.iterations}"
        )
    if averaged:
        torch._foreach_copy_(weights, average)
    return step, elapsed


@torch.no_grad()
def collect_hessians(
    hp: Hyperparameters, dist: Dist, log: Log, model: GPT, loader: TokenLoader
) -> tuple[dict, float]:
    """Second moments X^T X of every matrix's input over the tokens that reach it, summed over ranks: (C, C); (E, C, C)
    for expert_up; of shared and routed hidden units together for a routed down projection. Stops after GPTQ_BATCHES
    training micro-batches or, under a wall-clock cap, before GPTQ_RESERVE_SECONDS are over. Also returns seconds."""
    sums: dict[str, Tensor] = {}

    def add(name: str, *inputs: Tensor) -> None:
        moments = [x.mT @ x for x in (y.flatten(0, -2).float() for y in inputs)]
        sums[name] = sums.get(name, 0) + (
            torch.stack(moments) if name.endswith("expert_up") else moments[0]
        )

    def observe(name: str, module: nn.Module, args: tuple) -> None:
        if isinstance(module, CastedLinear):
            add(f"{name}.weight", args[0])
        elif isinstance(module, TokenRoutedMLP) and module.routed:
            chosen_BTE = module.choose(args[0], *args[1])[0]
            add(f"{name}.up.weight", args[0])
            add(f"{name}.down.weight", module.hidden(args[0], chosen_BTE))
            add(f"{name}.expert_up", *(args[0][chosen > 0] for chosen in chosen_BTE.unbind(-1)))

    with torch.device(
        "meta"
    ):  # the masked dispatch, as only that has all hidden units side by side
        observed = GPT(replace(hp, dispatch="masked"))
    observed.load_state_dict(model.state_dict(), assign=True)
    for name, module in observed.named_modules():
        module.register_forward_pre_hook(partial(observe, name))
    started, batches, elapsed = dist.synchronize(), 0, 0.0
    reserve = hp.gptq_reserve_seconds if hp.max_wallclock_seconds else math.inf
    while (
        batches * dist.world_size < hp.gptq_batches
        and elapsed * (1 + 1 / max(batches, 1)) < reserve
    ):
        add("tok_emb.weight", observed.features(loader.next_batch()[0])[0])
        batches, elapsed = batches + 1, dist.all_max(dist.synchronize() - started)[0]
    tokens = batches * dist.world_size * loader.num_sequences * hp.train_seq_len
    log(f"gptq: {len(sums)} Hessians over {tokens} training tokens in {elapsed:.1f}s")
    return {
        name: dist.all_sum(hessian) for name, hessian in sums.items()
    }, dist.synchronize() - started


def export(
    hp, dist: Dist, log: Log, model: GPT, hessians: dict, tokenizer_sha256: str, path: Path
) -> None:
    """Write the artifact from rank 0. Raises Refusal at the cap, or when it cannot."""
    if dist.rank == 0:
        started, fitted = (
            time.perf_counter(),
            fit(hp, model.state_dict(), tokenizer_sha256, hp.codec, hessians),
        )
        code, total = submission_bytes(hp, len(fitted.artifact), "artifact")
        write_atomically(path, fitted.artifact)
        for name in fitted.unusable:
            log(
                f"warning: the Hessian of {name} is not finite or not positive definite: rounded to nearest"
            )
        log(
            f"{fitted.budget()}\nexport_time:{time.perf_counter() - started:.1f}s\n"
            f"Serialized model quantized+{hp.codec}: {total - code} bytes\nCode size: {code} bytes\n"
            f"Total submission size quantized+{hp.codec}: {total} bytes"
        )
    dist.synchronize()


def main() -> None:
    """Read the knobs, train, export, score the reloaded artifact, and end the log with one JSON line."""
    require(
        not sys.argv[1:],
        f"{' '.join(sys.argv[1:])}: no arguments; knobs are environment variables (README.md)",
    )
    hp = Hyperparameters.from_env(os.environ)
    dist = Dist.from_torchrun(hp.device)
    now = np.datetime64(int(1000 * dist.all_max(time.time())[0]), "ms")
    hp = replace(hp, run_id=hp.run_id or str(now).replace(":", ""))
    path = LOG_FOLDER / f"{hp.run_id}.ptz"
    log = Log(dist, path.with_suffix(".txt"))
    log_provenance(log, hp, dist, os.environ)
    hp = replace(
        hp, eval_seq_len=0, eval_stride=1
    )  # plain validation, whatever eval_sliding.py is to do
    loader, val = TokenLoader(hp, dist), ValData.load(hp, dist.device)
    sample, model = loader.sample(), GPT(hp)
    model.init_weights()
    hp = replace(hp, attention=choose_attention(model, dist.device, log))
    table = build_expert_table(hp, np.bincount(sample, minlength=hp.vocab_size), sample)
    model.expert_table.copy_(dist.all_sum(table * (dist.rank == 0)))
    params = sum(p.numel() for p in model.parameters())
    log(f"model_params:{params} world_size:{dist.world_size} seed:{hp.seed}")
    log(
        f"train_loader:dataset:{hp.dataset_dir.name} train_shards:{len(loader.paths)} windows:{loader.num_windows}"
    )
    log(
        f"val_loader:shards pattern={hp.dataset_dir}/fineweb_val_*.bin tokens:{len(val.tokens) - 1}"
    )
    if dist.rank == 0:
        expected = dry_run(hp, model)
        _, total = submission_bytes(hp, len(expected.artifact), "dry run")
        log(f"{expected.budget()}\ndry run: {total} bytes of code + model expected")
    torch.set_float32_matmul_precision("high")
    steps, seconds = train(hp, dist, log, model.to(dist.device), loader, val)
    hessians, reserved = (
        collect_hessians(hp, dist, log, model, loader) if hp.gptq_batches else ({}, 0.0)
    )
    seconds += reserved
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
    before = evaluate(model, val, hp, dist, hp.train_seq_len, "validate")
    log(
        f"step:{steps}/{hp.iterations} {before} {timing(seconds, steps)}\n"
        f"pre-quantization post-{hp.average} {before} eval_time:{1000 * before.seconds:.0f}ms"
    )
    export(hp, dist, log, model, hessians, val.tokenizer_sha256, path)
    after = evaluate(
        load_artifact(path, hp, dist.device)[0],
        val,
        hp,
        dist,
        hp.train_seq_len,
        "validate the artifact",
    )
    log(f"quantized {after} eval_time:{1000 * after.seconds:.0f}ms\nfinal_roundtrip_exact {after}")
    code, total = submission_bytes(hp, path.stat().st_size, "artifact")
    log(
        json.dumps(
            {
                "event": "train_summary",
                "run_id": hp.run_id,
                "artifact_path": str(path),
                "partial": val.partial,
                "val_bpb_float": None if val.partial else before.bpb,
                "val_bpb": None if val.partial else after.bpb,
                "val_loss": after.val_loss,
                "train_seconds": seconds,
                "tokens": steps * hp.train_batch_tokens,
                "params": params,
                "steps": steps,
                "bytes_code": code,
                "bytes_model": total - code,
                "bytes_total": total,
            }
        )
    )


def out_of_memory(error: BaseException) -> bool:
    patterns = "out of memory|allocate memory|ALLOC_FAILED|start new thread"
    return isinstance(error, MemoryError) or re.search(patterns, str(error)) is not None


def run_entry_point(entry) -> None:
    """Call `entry()`; bad input, files, packages and memory end in one line and status 2, signals in 130 and 143."""
    code, message, handlers = 0, "", [signal.signal(number, interrupt) for number in SIGNALS]
    try:
        entry()
        if torch.distributed.is_initialized():  # nobody leaves while another still needs it
            torch.distributed.all_reduce(torch.zeros(1))
    except KeyboardInterrupt as error:
        code = 128 + int((*error.args, signal.SIGINT)[0])
        message = f"error: interrupted by signal {code - 128}\n"
    except (Refusal, OSError, ImportError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not out_of_memory(error):
            raise
        code, message = (
            2,
            f"error: {'out of memory: ' * out_of_memory(error)}{str(error) or type(error).__name__}\n",
        )
    print(end=message, file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(
            code
        )  # gloo's threads may abort an interpreter that shuts down, with another status
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler or signal.SIG_DFL)
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_entry_point(main)
