"""Train, export and score a token-routed Mixture-of-Experts language model for Parameter Golf.

Every token id owns one narrow expert per layer beside a wide shared one, by a table frozen before
the first step, so routing is exact, causal and independent of the batch. The artifact and the code
stay below 16,000,000 bytes; eval_sliding.py scores the artifact.

    torchrun --standalone --nproc_per_node=8 train_gpt.py    # the record: 8xH100, 600 s
    ITERATIONS=10 TRAIN_BATCH_TOKENS=4096 TRAIN_SEQ_LEN=256 python train_gpt.py    # any device
"""

import _thread
import base64
import collections
import contextlib
import copy
import datetime
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
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import Field, dataclass, field, fields, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import sentencepiece as spm
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn
except (ImportError, OSError) as error:  # OSError: a shared library of theirs does not load
    sys.exit(f"{error}: pip install -r requirements.txt")

MAX_SUBMISSION_BYTES = 16_000_000  # code + compressed model, decimal
LOADER_BYTES = 1_194  # of records/record_loader.txt, which unpacks a record's code
LOG_FOLDER = Path("logs")  # of logs, artifacts and checkpoints, below the working directory
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # end a run in good order
BOS_ID = 1  # starts every document of a shard
GATE_CHANNELS = 12  # input channels that attention gates and SmearGate read
GROUPED_FROM = 0.25  # share of idle hidden units; twice that from which sorting pays, on paper


# ---- Model config and knobs ----------------------------------------------------------------------


class ConfigError(Exception):
    """Bad input from the user, a file or the machine: one line and exit status 2."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def knob(default: float, low: float, high: float = math.inf) -> Any:
    """Declare a number with its range, both ends included."""
    return field(default=default, metadata={"low": low, "high": high})


def choice(*choices: str) -> Any:
    """Declare a word with its choices, of which the first is the default."""
    return field(default=choices[0], metadata={"choices": choices})


@dataclass(frozen=True)
class ModelConfig:
    """What an artifact carries to rebuild its model: env var FOO sets field foo."""

    vocab_size: int = knob(8192, 4, 65_536)  # V
    train_seq_len: int = knob(2048, 1, 65_536)  # T, tokens
    num_layers: int = knob(11, 1, 256)  # L
    model_dim: int = knob(512, GATE_CHANNELS, 65_536)  # D
    num_heads: int = knob(8, 1)  # H
    num_kv_heads: int = knob(4, 1)  # each shared by NUM_HEADS / NUM_KV_HEADS query heads
    rope_dims: int = knob(16, 0, 65_536)  # rotated dimensions of a head, even; 0 = no positions
    qk_gain_init: float = knob(5.0, 0)  # initial scale of normalised queries, learned per head
    xsa: bool = True  # takes a head's component along the token's own value out; 0 = off
    activation: str = choice("leaky_relu2", "swiglu")  # swiglu: two up rows per hidden unit
    routing: str = choice("zipf", "hash", "modulo", "learned", "hybrid", "soft", "dense")
    dispatch: str = choice("auto", "masked", "grouped")  # one GEMM, a mask | one GEMM per expert
    num_experts: int = knob(4, 1, 256)  # E, routed experts per layer
    expert_dim: int = knob(64, 1, 65_536)  # hidden units of each routed expert
    shared_dim: int = knob(1792, 1, 65_536)  # hidden units of the shared expert
    mu: str = choice("vector", "full", "pid", "off")  # guidance of q, k and v by the layer before
    loop_start: int = knob(3, 0, 1024)  # first layer of the depth recurrence
    loop_end: int = knob(5, 0, 1024)  # its last layer
    loop_passes: int = knob(3, 1, 16)  # times its layers run once it is on; 1 = no recurrence
    routing_per_pass: bool = True  # pass p takes expert (table + p) mod E; 0 = the same expert
    parallel_start_layer: int = knob(7, 0, 1024)  # MLP beside attention from here; >= L: off
    ln_scale: bool = True  # normalised inputs of layer l times 1 / sqrt(l + 1); 0 = off
    skip_gates: bool = True  # a sigmoid per channel mixes U-Net skips in; 0 = they are added
    attn_gate: bool = True  # each head's result times 2 * sigmoid(12 input channels); 0 = off
    smear_gate: bool = True  # adds a gated part of the token before, not across BOS; 0 = off

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def is_routed(self) -> bool:
        return self.routing != "dense"

    @property
    def has_router(self) -> bool:
        return self.routing in ("learned", "hybrid", "soft")

    @property
    def is_grouped(self) -> bool:
        """Tell whether a token is multiplied with its own expert alone; auto: from GROUPED_FROM."""
        can = not self.has_router and self.expert_dim % 8 == 0 and self.model_dim % 8 == 0
        skipped = (self.num_experts - 1) * self.expert_dim
        pays = skipped >= GROUPED_FROM * (skipped + self.expert_dim + self.shared_dim)
        is_asked = self.dispatch == "grouped" or (self.dispatch == "auto" and can and pays)
        return self.is_routed and is_asked

    def execution_order(self, looped: bool) -> list[int]:
        """Layers in the order in which they run, with the depth recurrence or without."""
        layers = list(range(self.num_layers))
        if not looped:
            return layers
        end = self.loop_end + 1
        return layers[:end] + layers[self.loop_start : end] * (self.loop_passes - 1) + layers[end:]

    def validate(self) -> "ModelConfig":
        """Return this config after all checks of it. Raises ConfigError naming the variables."""
        check_values(self)
        D, H, L = self.model_dim, self.num_heads, self.num_layers
        require(D % H == 0, f"NUM_HEADS={H} MODEL_DIM={D}: the heads must divide the width")
        kv_heads = f"NUM_KV_HEADS={self.num_kv_heads} NUM_HEADS={H}: kv heads must divide the heads"
        require(H % self.num_kv_heads == 0, kv_heads)
        rope = f"ROPE_DIMS={self.rope_dims}: must be even, at most {self.head_dim}"
        require(self.rope_dims % 2 == 0 and self.rope_dims <= self.head_dim, rope)
        loop = f"LOOP_START={self.loop_start} LOOP_END={self.loop_end} NUM_LAYERS={L}: no range"
        inside = self.loop_start <= self.loop_end < L
        require(inside or self.loop_passes == 1, f"{loop}; LOOP_PASSES=1 turns recurrence off")
        if self.dispatch == "grouped" and self.is_routed:
            router = f"ROUTING={self.routing} DISPATCH=grouped: a router learns from all experts"
            require(not self.has_router, router)
            dims = f"EXPERT_DIM={self.expert_dim} MODEL_DIM={D}: DISPATCH=grouped needs"
            require(self.expert_dim % 8 == 0 and D % 8 == 0, f"{dims} multiples of 8")
        return self


@dataclass(frozen=True)
class Hyperparameters:
    """Every knob of a training: env var FOO sets field foo, here or in `model`.

    Booleans are 0 or 1. The defaults are the 8xH100 record. Schedules go by the fraction of the
    budget that is used: of the wall-clock cap if there is one, else of the steps.
    """

    model: ModelConfig = ModelConfig()
    run_id: str = ""  # names logs/<RUN_ID>.txt and .ptz; "" = the time of the start
    seed: int = knob(1337, 0)  # of initial weights and data order
    dtype: str = choice("bfloat16", "float32")  # of activations; master weights are float32
    attention: str = choice("auto", "fa3", "cudnn", "flash", "math")  # auto = the first that runs
    compile: bool = True  # torch.compile with fullgraph where a compiler is installed; 0 = eager
    checkpoint_every: str = ""  # "500" steps or "300s"; goes on from RUN_ID's newest; "" = off
    data_path: str = ""  # folder of shards; "" = data/datasets/fineweb10B_sp<VOCAB_SIZE>
    tokenizer_path: str = ""  # "" = the one that belongs to the data, see load_tokenizer
    train_batch_tokens: int = knob(786_432, 1)  # tokens per optimizer step, over all ranks
    micro_batch_tokens: int = knob(98_304, 1)  # tokens per forward pass and rank, at most
    val_max_tokens: int = knob(0, 0)  # targets to score; 0 = all, fewer are reported as PARTIAL
    val_loss_every: int = knob(0, 0)  # steps; 0 = validate at the end only
    iterations: int = knob(20_000, 1)  # optimizer steps, at most
    max_wallclock_seconds: float = knob(600.0, 0)  # s, no warm-up, no validation; 0 = no cap
    matrix_lr: float = knob(0.022, 0)  # Muon, per update of spectral norm ~1
    embed_lr: float = knob(0.03, 0)  # AdamW, tied embedding
    scalar_lr: float = knob(0.02, 0)  # AdamW, vectors, gains and mu
    muon_momentum: float = knob(0.97, 0, 1)  # reached from 0.85 in the first tenth of the budget
    muon_weight_decay: float = knob(0.095, 0)  # decoupled, times the scheduled LR; 0 = off
    embed_weight_decay: float = knob(0.085, 0)  # decoupled, times the scheduled LR; 0 = off
    grad_clip_norm: float = knob(0.3, 0)  # global L2 norm; 0 = off
    schedule: str = choice("linear", "sgdr")  # constant, then warmdown | cosine with a restart
    loop_from: float = knob(0.35, 0, 1)  # fraction from which the depth recurrence is on
    warmdown_frac: float = knob(0.85, 0, 1)  # fraction of SCHEDULE=linear that descends; 0 = none
    min_lr: float = knob(0.1, 0, 1)  # floor of both schedules, fraction of the peak
    average: str = choice("ema", "swa", "off")  # of all steps | of the last descent's end | none
    ema_decay: float = knob(0.9965, 0, 1)  # per step, warmed up as (1 + t) / (10 + t)
    qat_from: float = knob(1.0, 0, 1)  # fraction that trains on the rounded weights; 1 = off
    matrix_bits: int = knob(6, 2, 8)  # of matrices but the experts'
    expert_bits: int = knob(6, 2, 8)  # of routed experts; 2 = ternary
    embed_bits: int = knob(7, 2, 8)  # of the tied embedding
    matrix_clip: float = knob(12.85, 0)  # k: scale = k * std(row) / (2^(bits-1) - 1), from 5 bits
    embed_clip: float = knob(15.0, 0)  # k of the embedding; larger = smaller file
    target_bytes: int = knob(15_980_000, 0, MAX_SUBMISSION_BYTES - 1)  # with code; 0 = k as given
    gptq_batches: int = knob(64, 0, 1 << 20)  # micro-batches for Hessians; 0 = no GPTQ

    @classmethod
    def from_env(cls, environ: dict[str, str]) -> "Hyperparameters":
        """Read and validate all knobs. Raises ConfigError naming the variable and the value."""
        return cls().override(**parse_knobs(cls, environ))

    def override(self, **knobs: object) -> "Hyperparameters":
        """Return a checked copy with these knobs, the model's or the run's. Raises ConfigError."""
        of_model = {name: knobs[name] for name in knobs if name in knob_fields(ModelConfig)}
        of_run = {name: knobs[name] for name in knobs if name not in of_model}
        return replace(self, model=replace(self.model, **of_model), **of_run).validate()

    def values(self) -> dict[str, object]:
        """Return every knob by name, the model's among them."""
        flat = vars(self) | vars(self.model)
        return {name: value for name, value in flat.items() if name != "model"}

    @property
    def dataset_dir(self) -> Path:
        return Path(self.data_path or f"data/datasets/fineweb10B_sp{self.model.vocab_size}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    @property
    def gptq_seconds(self) -> float:
        """Time for the Hessians, s: 2 % of the cap, at least 4 s, at most a quarter of the cap."""
        if not self.uses_gptq:
            return 0.0
        cap = self.max_wallclock_seconds
        return min(max(4.0, 0.02 * cap), 0.25 * cap)

    @property
    def uses_qat(self) -> bool:
        return self.qat_from < 1

    def trains_rounded(self, bits: int) -> bool:
        """Tell whether tensors of so many bits end the training as the artifact will hold them."""
        # With 5 bits or more, GPTQ after the training does better.
        return self.uses_qat and (bits in CLIP_OF_FEW_LEVELS or self.gptq_batches == 0)

    @property
    def uses_gptq(self) -> bool:
        """Tell whether GPTQ rounds any tensor."""
        bits = [self.matrix_bits, self.embed_bits]
        if self.model.is_routed:
            bits.append(self.expert_bits)
        return self.gptq_batches > 0 and not all(map(self.trains_rounded, bits))

    def loop_is_on(self, frac: float) -> bool:
        """Tell whether the depth recurrence runs at the fraction `frac` of the budget."""
        return self.model.loop_passes == 1 or frac >= self.loop_from

    def grad_accum_steps(self, world_size: int) -> int:
        """Return the fewest equal micro-batches within MICRO_BATCH_TOKENS. Raises ConfigError."""
        seq_len = self.model.train_seq_len
        sequences, rest = divmod(self.train_batch_tokens, world_size * seq_len)
        batch = f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} TRAIN_SEQ_LEN={seq_len}"
        uneven = f"{batch}: not a whole number of sequences on each of {world_size} ranks"
        require(rest == 0, uneven)
        fewest = min(math.ceil(sequences * seq_len / self.micro_batch_tokens), sequences)
        return next(n for n in range(fewest, sequences + 1) if sequences % n == 0)

    def validate(self) -> "Hyperparameters":
        """Return these knobs after all checks of them. Raises ConfigError naming the variable."""
        self.model.validate()
        check_values(self)
        is_name = re.fullmatch(r"[\w.+-]*", self.run_id) is not None
        require(is_name, f"RUN_ID={self.run_id}: letters, digits and . _ + - only")
        every = self.checkpoint_every
        is_interval = re.fullmatch(r"([1-9]\d*s?)?", every) is not None
        require(is_interval, f"CHECKPOINT_EVERY={every}: expected steps as in 500, or s as in 300s")
        self.grad_accum_steps(1)
        return self


def knob_fields(cls: type) -> dict[str, Field]:
    """Return the fields of a class of knobs by name; a model's are knobs like the others."""
    knobs = {f.name: f for f in fields(cls)}
    if knobs.pop("model", None):
        knobs = knob_fields(ModelConfig) | knobs
    return knobs


def parse_knobs(cls: type, environ: dict[str, str]) -> dict[str, object]:
    """Return what the environment sets of a class of knobs. Raises ConfigError."""
    values = {}
    for name, f in knob_fields(cls).items():
        text = environ.get(name.upper())
        if text is None:
            continue
        if f.type is bool:
            require(text in ("0", "1"), f"{name.upper()}={text!r}: expected 0 or 1")
            values[name] = text == "1"
            continue
        try:
            values[name] = f.type(text)
        except ValueError:
            raise ConfigError(f"{name.upper()}={text!r}: expected {f.type.__name__}") from None
    return values


def check_values(knobs: object) -> None:
    """Check type, choices and range of every knob in a dataclass. Raises ConfigError."""
    for f in fields(knobs):
        value = vars(knobs)[f.name]
        stated = f"{f.name.upper()}={value!r}"
        require(type(value) is f.type, f"{stated}: expected {f.type.__name__}")
        if "choices" in f.metadata:
            choices = f.metadata["choices"]
            require(value in choices, f"{stated}: expected one of {' '.join(choices)}")
        if "low" in f.metadata:
            low = f.metadata["low"]
            high = min(f.metadata["high"], 2**63 - 1) if f.type is int else f.metadata["high"]
            in_range = low <= value <= high and value != math.inf
            require(in_range, f"{stated}: expected a finite number from {low} to {high}")


# ---- Runtime and logging -------------------------------------------------------------------------


@dataclass(frozen=True)
class Dist:
    """This process among its peers; alone it is rank 0 of 1 and every collective is a no-op."""

    rank: int
    world_size: int
    device: torch.device

    @classmethod
    def from_torchrun(cls) -> "Dist":
        """Join the process group that torchrun announces in the environment. Raises ConfigError."""
        numbers = []
        for name, alone in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
            text = os.environ.get(name, alone)
            require(text.isdecimal(), f"{name}={text!r}: expected a number, as torchrun sets it")
            numbers.append(int(text))
        rank, local_rank, world_size = numbers
        require(world_size in (1, 2, 4, 8), f"WORLD_SIZE={world_size} does not divide 8")
        require(rank < world_size, f"RANK={rank} WORLD_SIZE={world_size}: not set by torchrun")

        count = torch.cuda.device_count()
        require(count == 0 or local_rank < count, f"rank {rank} finds only {count} CUDA devices")
        device = torch.device("cuda", local_rank) if count else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)

        # CPU tensors travel over gloo, so that agreeing on the clock never waits for the GPU.
        if world_size > 1:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            ten_minutes = datetime.timedelta(minutes=10)
            try:
                torch.distributed.init_process_group(backend, timeout=ten_minutes)
            except ValueError as error:
                raise ConfigError(f"WORLD_SIZE={world_size} without torchrun: {error}") from error
        return cls(rank, world_size, device)

    def all_sum(self, tensor: Tensor, op=torch.distributed.ReduceOp.SUM) -> Tensor:
        """Sum over ranks, in place. Raises ConfigError when a rank is lost."""
        if self.world_size > 1:
            try:
                torch.distributed.all_reduce(tensor, op)
            except RuntimeError as error:  # gloo and NCCL raise a class of their own, or this one
                reason = str(error).splitlines()[0]
                raise ConfigError(f"rank {self.rank} lost another rank: {reason}") from error
        return tensor

    def all_max(self, *values: float) -> list[float]:
        """Return for each value on the host the largest of the ranks', without the GPU."""
        tensor = torch.tensor(values, dtype=torch.float64)
        return self.all_sum(tensor, torch.distributed.ReduceOp.MAX).tolist()

    def synchronize(self) -> float:
        """Wait for the device and for the other ranks. Returns the time on the host, s."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.all_max(0.0)
        return time.perf_counter()


def interrupt(number: int, frame: object) -> None:
    """Handle SIGINT and SIGTERM: raise KeyboardInterrupt(signal) once, as launchers repeat it."""
    for ignored in SIGNALS:
        signal.signal(ignored, signal.SIG_IGN)
    raise KeyboardInterrupt(number)


class Log:
    """Rank 0's log, printed and appended to `path`; a lock keeps other runs of its name away."""

    def __init__(self, dist: Dist, path: Path):
        """Open and lock the file. Raises ConfigError when another run has it."""
        self.path = path
        self.file = None
        if dist.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(path, "ab", buffering=0)  # noqa: SIM115, for as long as this lives
            try:
                fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{path}: another run writes it; choose another RUN_ID") from None
            except OSError:
                pass  # some network file systems have no locks

    def __call__(self, text: str, echo: bool = True) -> None:
        """Write a line, to the terminal too if `echo`. Raises ConfigError when the disk is full."""
        if self.file is None:
            return
        data = f"{text}\n".encode()
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise ConfigError(f"cannot write {self.path}: {error.strerror}") from error
        if echo:
            print(text, flush=True)


@dataclass
class Progress:
    """Says on stderr every 5 s what a stage is doing, even one that cannot call `update`."""

    label: str
    total: float
    rank: int = 0
    done: float = 0.0
    note: str = ""

    def __enter__(self) -> "Progress":
        self.started = time.perf_counter()
        self.ended = threading.Event()
        # Not a Thread, whose start waits for ever if memory is too short for it to begin.
        if self.rank == 0:
            _thread.start_new_thread(self.report, ())
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()

    def update(self, done: float, note: str = "") -> None:
        """Tell how much is done, in the unit of `total`, and what else to show."""
        self.done = done
        self.note = note

    def report(self) -> None:
        """Print until the stage has ended."""
        while not self.ended.wait(5.0):
            spent = time.perf_counter() - self.started
            shown = f"{self.label}: {spent:.0f}s {self.note}"
            if self.done:
                left = spent * max(self.total - self.done, 0) / self.done
                shown = f"{self.label}: {self.done / self.total:.0%} ETA {left:.0f}s {self.note}"
            print(shown.rstrip(), file=sys.stderr, flush=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename: `path` keeps its content or holds all of `data`. Raises ConfigError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def can_compile(hp: Hyperparameters, device: torch.device) -> bool:
    """Tell whether torch.compile is wanted and can build kernels here."""
    if not hp.compile:
        return False
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    has_headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    has_compiler = shutil.which("g++") is not None or shutil.which("clang++") is not None
    return has_headers and has_compiler


def out_of_memory(error: BaseException) -> bool:
    """Tell whether memory ran out, on the host or on a GPU."""
    patterns = "out of memory|allocate memory|ALLOC_FAILED|start new thread"
    return isinstance(error, MemoryError) or re.search(patterns, str(error)) is not None


def run_entry_point(entry: Callable[[], None]) -> None:
    """Call `entry`; what the user can mend ends in one line and status 2, signals in 130 or 143."""
    handlers = [signal.signal(number, interrupt) for number in SIGNALS]
    code = 0
    message = ""
    try:
        entry()
        if torch.distributed.is_initialized():  # nobody leaves while another still needs it
            torch.distributed.all_reduce(torch.zeros(1))
    except KeyboardInterrupt as error:
        number = int(error.args[0]) if error.args else int(signal.SIGINT)
        code = 128 + number
        message = f"error: interrupted by signal {number}\n"
    except (ConfigError, OSError, ImportError, MemoryError, RuntimeError) as error:
        code = 2
        reason = str(error) or type(error).__name__
        if out_of_memory(error):
            reason = f"out of memory: {reason}"
        elif isinstance(error, RuntimeError):
            if not isinstance(error, torch._dynamo.exc.TorchDynamoException):
                raise
            reason = f"compiling failed; COMPILE=0 runs eager ({reason.splitlines()[0]})"
        message = f"error: {reason}\n"

    print(end=message, file=sys.stderr, flush=True)
    if torch.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)  # gloo's threads may abort an interpreter that shuts down
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler or signal.SIG_DFL)
    if code:
        sys.exit(code)


# ---- Data ----------------------------------------------------------------------------------------

SHARD_MAGIC = 20240520  # of the challenge's .bin header, shared with llm.c
SHARD_VERSION = 1
SHARD_HEADER_INTS = 256


def list_shards(folder: Path, split: str) -> list[Path]:
    """Return the shards of "train" or "val" in order, without byte sidecars. Raises ConfigError."""
    require(folder.is_dir(), f"{folder}: no such data folder (DATA_PATH)")
    paths = sorted(folder.glob(f"fineweb_{split}_*.bin"))
    shards = [path for path in paths if not path.name.startswith("fineweb_val_bytes_")]
    require(len(shards) > 0, f"{folder}: no fineweb_{split}_*.bin shards (DATA_PATH)")
    return shards


def shard_length(path: Path) -> int:
    """Return the tokens of a shard, after checking header and file size. Raises ConfigError."""
    require(path.is_file(), f"{path}: no such shard")
    header_bytes = SHARD_HEADER_INTS * 4
    size = path.stat().st_size
    require(size >= header_bytes, f"{path}: {size} bytes is shorter than a shard's header")
    magic, version, count = map(int, np.fromfile(path, dtype="<i4", count=3))
    require(magic == SHARD_MAGIC, f"{path}: not a shard, magic is {magic}, not {SHARD_MAGIC}")
    require(version == SHARD_VERSION, f"{path}: shard version {version}, not {SHARD_VERSION}")
    whole = count > 0 and size == header_bytes + 2 * count
    require(whole, f"{path}: {count} tokens do not make {size} bytes")
    return count


def read_shard(path: Path, start: int, count: int, vocab_size: int = 1 << 16) -> np.ndarray:
    """Read tokens of a shard from `start` on, (count,) uint16. Raises ConfigError."""
    # Not mapped: a mapped file that is cut would kill the process.
    tokens = np.fromfile(path, "<u2", count, offset=4 * SHARD_HEADER_INTS + 2 * start)
    require(len(tokens) == count, f"{path}: has become shorter since the start of the run")
    largest = tokens.max(initial=0)
    require(largest < vocab_size, f"{path}: token id {largest} is outside VOCAB_SIZE={vocab_size}")
    return tokens


def load_data_shard(path: Path, vocab_size: int = 1 << 16) -> np.ndarray:
    """Read all tokens of a shard, (count,) uint16, after checking it. Raises ConfigError."""
    return read_shard(path, 0, shard_length(path), vocab_size)


class TokenLoader:
    """Endless training batches, the same at any world size and after a resume."""

    def __init__(self, hp: Hyperparameters, dist: Dist):
        """Find and check the training shards. Raises ConfigError."""
        self.hp = hp
        self.dist = dist
        self.seq_len = hp.model.train_seq_len
        self.paths = list_shards(hp.dataset_dir, "train")
        self.lengths = [shard_length(path) for path in self.paths]

        # One window of each shard is left out: the phase needs its room.
        windows = [max(length // self.seq_len - 1, 0) for length in self.lengths]
        self.first_window = np.cumsum([0, *windows])
        self.num_windows = sum(windows)
        short = f"{hp.dataset_dir}: no training shard holds two sequences of"
        require(self.num_windows > 0, f"{short} TRAIN_SEQ_LEN={self.seq_len}")

        sequences = hp.train_batch_tokens // (self.seq_len * dist.world_size)
        self.num_sequences = sequences // hp.grad_accum_steps(dist.world_size)
        self.position = 0  # in windows, over all ranks and epochs
        self.epoch = -1
        self.pool = ThreadPoolExecutor(1) if dist.device.type == "cuda" else None
        self.pending = None

    def sample(self, max_tokens: int = 50_000_000) -> np.ndarray:
        """Read at most `max_tokens`, as many from each shard's start, (n,) uint16."""
        each = max_tokens // len(self.paths)
        parts = []
        for path, length in zip(self.paths, self.lengths, strict=True):
            parts.append(read_shard(path, 0, min(length, each), self.hp.model.vocab_size))
        return np.concatenate(parts)

    def _window(self, index: int) -> np.ndarray:
        """Read the tokens of a window, counted over all epochs, and the one after it."""
        epoch, slot = divmod(index, self.num_windows)
        # Each epoch cuts every shard at a random phase, and shuffles all windows.
        if epoch != self.epoch:
            rng = np.random.default_rng([self.hp.seed, epoch])
            self.epoch = epoch
            self.phase = int(rng.integers(self.seq_len))
            self.order = rng.permutation(self.num_windows)
        window = self.order[slot]
        shard = int(np.searchsorted(self.first_window, window, side="right")) - 1
        start = self.phase + int(window - self.first_window[shard]) * self.seq_len
        return read_shard(self.paths[shard], start, self.seq_len + 1, self.hp.model.vocab_size)

    def _load(self) -> Tensor:
        """Read this rank's next micro-batch, (B, T + 1) int64."""
        first = self.position + self.dist.rank * self.num_sequences
        self.position += self.dist.world_size * self.num_sequences
        windows = [self._window(i) for i in range(first, first + self.num_sequences)]
        batch = torch.from_numpy(np.stack(windows).astype(np.int64))
        return batch.pin_memory() if self.pool else batch

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Return inputs and the targets after them, each (B, T) int64 on the device."""
        batch = self.pending.result() if self.pending else self._load()
        batch = batch.to(self.dist.device, non_blocking=True)
        if self.pool:
            self.pending = self.pool.submit(self._load)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()


def token_bytes(sp: spm.SentencePieceProcessor, tokens: np.ndarray) -> np.ndarray:
    """Return the UTF-8 bytes that each token but the first adds to the text, (n - 1,) int32."""
    base_bytes = np.zeros(sp.vocab_size(), np.int32)
    has_leading_space = np.zeros(sp.vocab_size(), bool)
    is_boundary_token = np.ones(sp.vocab_size(), bool)
    for i in range(sp.vocab_size()):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            continue
        is_boundary_token[i] = False
        piece = sp.id_to_piece(i)
        has_leading_space[i] = piece.startswith("\u2581")
        text = piece.removeprefix("\u2581").replace("\u2581", " ")
        base_bytes[i] = 1 if sp.is_byte(i) else len(text.encode())
    # The leading space of a piece counts unless a control, unknown or unused token is before it.
    spaces = has_leading_space[tokens[1:]] & ~is_boundary_token[tokens[:-1]]
    return base_bytes[tokens[1:]] + spaces


def data_root(dataset_dir: Path) -> Path:
    """Return the folder of datasets/, tokenizers/ and manifest.json, two above the shards."""
    return dataset_dir.absolute().parent.parent


def manifest_entry(dataset_dir: Path) -> dict:
    """Return what manifest.json says of a folder of shards, {} without one."""
    try:
        manifest = json.loads((data_root(dataset_dir) / "manifest.json").read_text())
        entries = {entry["name"]: entry for entry in manifest["datasets"]}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return entries.get(dataset_dir.absolute().name, {})


def load_tokenizer(hp: Hyperparameters) -> tuple[spm.SentencePieceProcessor, str]:
    """Load the SentencePiece model. Also returns its SHA-256; raises ConfigError if it is amiss."""
    vocab_size = hp.model.vocab_size

    # TOKENIZER_PATH, else the manifest's or the usual one in tokenizers/ of the data or of data/.
    usual = f"fineweb_{vocab_size}_bpe"
    name = manifest_entry(hp.dataset_dir).get("tokenizer_name", usual)
    path = data_root(hp.dataset_dir) / "tokenizers" / f"{name}.model"
    if not path.is_file():
        path = Path(f"data/tokenizers/{usual}.model")
    path = Path(hp.tokenizer_path or path)
    require(path.is_file(), f"{path}: no such tokenizer (TOKENIZER_PATH)")
    data = path.read_bytes()
    try:
        sp = spm.SentencePieceProcessor(model_proto=data or b"?")  # b"" would pass for a model
    except RuntimeError as error:
        raise ConfigError(f"{path} is not a SentencePiece model (TOKENIZER_PATH)") from error

    pieces = sp.vocab_size()
    require(pieces == vocab_size, f"{path} has {pieces} pieces, but VOCAB_SIZE={vocab_size}")
    bos_id = sp.bos_id()
    require(bos_id == BOS_ID, f"{path} starts documents with id {bos_id}, shards with {BOS_ID}")

    # Without this piece a lone space becomes three byte tokens (upstream issue #897).
    has_space = not sp.is_unknown(sp.piece_to_id("\u2581"))
    require(has_space, f"{path} has no U+2581 piece: byte counts would be wrong")
    return sp, hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class ValData:
    """The validation split on the device: target i is token i + 1, of target_bytes[i] bytes."""

    tokens: Tensor  # (targets + 1,) int32
    target_bytes: Tensor  # (targets,) int32
    tokenizer_sha256: str
    partial: bool  # holds fewer targets than the split
    sidecar: bool = False  # target_bytes were read, not counted
    lacks: str = ""  # what of the split is not there, when it is partial

    @classmethod
    def load(cls, hp: Hyperparameters, device: torch.device) -> "ValData":
        """Read the split and, where it has sidecars, the bytes they state. Raises ConfigError."""
        sp, digest = load_tokenizer(hp)
        paths = list_shards(hp.dataset_dir, "val")
        shards = [load_data_shard(path, hp.model.vocab_size) for path in paths]
        tokens = np.concatenate(shards)
        require(len(tokens) > 1, f"{hp.dataset_dir}: the validation split has no target to score")

        # fineweb_val_bytes_N.bin holds the bytes before a lossless transform (PR #1729).
        sizes = load_sidecars(paths, shards, sp)
        target_bytes = token_bytes(sp, tokens) if sizes is None else sizes[1:].astype(np.int32)
        targets = len(tokens) - 1
        count = min(hp.val_max_tokens, targets) if hp.val_max_tokens else targets
        lacks = what_is_missing(paths, len(tokens))
        if count < targets:
            lacks = f"all but VAL_MAX_TOKENS={count} targets"
        kept = torch.from_numpy(tokens[: count + 1].astype(np.int32)).to(device)
        paid = torch.from_numpy(target_bytes[:count]).to(device)
        return cls(kept, paid, digest, partial=lacks != "", sidecar=sizes is not None, lacks=lacks)


def what_is_missing(paths: list[Path], num_tokens: int) -> str:
    """Say what a split lacks by numbers of shards and by the manifest; "" if it is whole."""
    for number, path in enumerate(paths):
        found = re.fullmatch(r"fineweb_val_(\d+)\.bin", path.name)
        if found and int(found[1]) != number:
            return f"a shard of number {number}, before {path.name}"

    stats = manifest_entry(paths[0].parent).get("stats")
    expected = stats.get("tokens_val") if isinstance(stats, dict) else None
    if not isinstance(expected, int) or expected == num_tokens:
        return ""
    return f"tokens: {num_tokens} of {expected} in the manifest"


def load_sidecars(
    paths: list[Path], shards: list[np.ndarray], sp: spm.SentencePieceProcessor
) -> np.ndarray | None:
    """Return the bytes of every validation token, or None without sidecars. Raises ConfigError."""
    folder = paths[0].parent
    found = set(folder.glob("fineweb_val_bytes_*.bin"))
    if not found:
        # Three bytes for every operator of data/lossless_case.py would make the score too good.
        operators = [sp.piece_to_id(operator) for operator in "\ue001\ue002\ue003\ue004"]
        has_case = not any(map(sp.is_unknown, operators))
        bare = has_case and any(operators[0] in shard for shard in shards)
        require(not bare, f"{folder}: lossless case without fineweb_val_bytes_*.bin")
        return None
    expected = [path.with_name(path.name.replace("val_", "val_bytes_")) for path in paths]
    odd = sorted(path.name for path in found.symmetric_difference(expected))
    require(not odd, f"{folder}: a sidecar without its shard, or none for it: {', '.join(odd)}")
    parts = []
    for path, shard in zip(expected, shards, strict=True):
        sizes = load_data_shard(path)
        both = f"{path}: bytes of {len(sizes)} tokens, but the shard has {len(shard)}"
        require(len(sizes) == len(shard), both)
        parts.append(sizes)
    return np.concatenate(parts)


# ---- Routing -------------------------------------------------------------------------------------

TABLE_SCORE = {"learned": 1e-3, "hybrid": 2.0, "soft": 0.0}  # of the table's expert, in a router
SWITCH_LOSS = 0.01  # weight of the loss that balances learned experts (arXiv 2101.03961)


def mix32(x: np.ndarray) -> np.ndarray:
    """Mix uint32 by lowbias32 (nullprogram.com/blog/2018/07/31): all bits reach the low ones."""
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def zipf_assignment(token_counts: np.ndarray, num_experts: int, layer: int) -> np.ndarray:
    """Pack token ids greedily so that experts get equal shares, (V,) int64 -> (V,) uint8."""
    # The most frequent come first, shuffled per layer within strata of similar frequency.
    rng = np.random.default_rng(layer)
    seen = np.count_nonzero(token_counts)
    by_frequency = np.argsort(-token_counts, kind="stable")[:seen]
    strata = np.split(by_frequency, range(4 * num_experts, seen, 4 * num_experts))

    loads = np.zeros(num_experts, np.int64)
    assignment = np.empty(len(token_counts), np.uint8)
    for token in np.concatenate([rng.permutation(stratum) for stratum in strata]):
        assignment[token] = loads.argmin()
        loads[assignment[token]] += token_counts[token]

    # By load, ids that were never seen would all go to the least loaded expert.
    unseen = rng.permutation(np.flatnonzero(token_counts == 0))
    assignment[unseen] = np.arange(len(unseen)) % num_experts
    return assignment


def build_expert_table(config: ModelConfig, token_counts: np.ndarray) -> Tensor:
    """Return the expert of every token id in every layer, (L, V) uint8, or (0, V) when dense."""
    if not config.is_routed:
        return torch.zeros(0, config.vocab_size, dtype=torch.uint8)

    # From counts of training tokens alone. Routers that read the stream start from it.
    ids = np.arange(config.vocab_size, dtype=np.uint32)
    rows = []
    for layer in range(config.num_layers):
        if config.routing in ("zipf", "hybrid"):
            rows.append(zipf_assignment(token_counts, config.num_experts, layer))
        elif config.routing in ("modulo", "learned", "soft"):
            rows.append(ids % config.num_experts)
        else:
            assert config.routing == "hash", f"ROUTING={config.routing} has no table"
            salt = mix32(np.uint32([layer + 1]))
            rows.append(mix32(ids ^ salt) % config.num_experts)
    return torch.from_numpy(np.stack(rows).astype(np.uint8))


# ---- Model ---------------------------------------------------------------------------------------
# Shape suffixes: B batch, T tokens, S scored positions, D model_dim, H heads, K head_dim, F hidden
# units, V vocabulary, E experts, L layers, R layers run, N = B * T. Plain x is (B, T, D).


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def activate(h: Tensor, kind: str) -> Tensor:
    """Apply the MLP's non-linearity, (..., F), or (..., 2 F) for swiglu, -> (..., F)."""
    if kind == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.leaky_relu(h, 0.3).square()  # PR #493; the slope is from #1948


def rotary_tables(
    seq_len: int, base: float, dims: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotation angles, each (T, 1, dims / 2) float32."""
    exponents = torch.arange(0, dims, 2, device=device, dtype=torch.float32) / max(dims, 1)
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = positions[:, None, None] * base**-exponents
    return angles.cos(), angles.sin()


def apply_rotary(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of every head, half-split; the rest stays (partial RoPE)."""
    half = cos.size(-1)
    x1, x2, rest = x_BTHK.split([half, half, x_BTHK.size(-1) - 2 * half], dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)


class CastedLinear(nn.Linear):
    """Bias-free linear layer whose float32 weight is cast to the activations' dtype."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally by PyTorch's kernel, q (B, T, H, K), k and v (B, T, Hkv, K) -> like q."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return y.transpose(1, 2)


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by FlashAttention-3, like `sdpa_attention`. Raises ImportError without it."""
    from flash_attn_interface import flash_attn_func

    y = flash_attn_func(q, k, v, causal=True)
    return y[0] if isinstance(y, tuple) else y  # some versions return the log-sum-exp too


class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; mu biases q, k and v."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D = config.model_dim
        kv_dim = config.num_kv_heads * config.head_dim
        self.c_q = CastedLinear(D, D)
        self.proj = CastedLinear(D, D)
        self.c_k = CastedLinear(D, kv_dim)
        self.c_v = CastedLinear(D, kv_dim)
        self.q_gain = nn.Parameter(torch.full((config.num_heads,), config.qk_gain_init))
        self.attend = sdpa_attention
        if config.attn_gate:
            self.gate = nn.Parameter(torch.zeros(config.num_heads, GATE_CHANNELS))
        if config.mu == "full":
            self.mu_read = CastedLinear(D, D + 2 * kv_dim)
        elif config.mu != "off":
            self.mu_gain = nn.Parameter(torch.zeros(3, D))  # of mu in the inputs of q, k and v

    def forward(self, x: Tensor, mu: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Attend causally, normalised (B, T, D) -> (B, T, D); rotary holds cosines and sines."""
        config = self.config
        x_q, x_k, x_v = x, x, x
        if config.mu in ("vector", "pid"):
            x_q, x_k, x_v = (x + gain * mu for gain in self.mu_gain.to(x.dtype))
        q, k, v = self.c_q(x_q), self.c_k(x_k), self.c_v(x_v)
        if config.mu == "full":
            mu_q, mu_k, mu_v = self.mu_read(mu).split([q.size(-1), k.size(-1), v.size(-1)], dim=-1)
            q, k, v = q + mu_q, k + mu_k, v + mu_v

        q = norm(q.unflatten(-1, (-1, config.head_dim)))
        k = norm(k.unflatten(-1, (-1, config.head_dim)))
        v = v.unflatten(-1, (-1, config.head_dim))
        q = apply_rotary(q, *rotary) * self.q_gain.to(x.dtype)[:, None]
        k = apply_rotary(k, *rotary)
        y = self.attend(q, k, v)

        # Exclusive self attention (PR #478): the stream holds the token's own value already.
        if config.xsa:
            y = y.unflatten(2, (config.num_kv_heads, -1))
            own = F.normalize(v, dim=-1)[:, :, :, None]
            y = (y - (y * own).sum(-1, keepdim=True) * own).flatten(2, 3)

        # SparseAttnGate (PR #1787), neutral at the start.
        if config.attn_gate:
            channels = x[..., :GATE_CHANNELS]
            y = y * (2 * torch.sigmoid(F.linear(channels, self.gate.to(x.dtype))))[..., None]
        return self.proj(y.flatten(2))


class Groups(NamedTuple):
    """The tokens of a batch sorted by the expert that a layer gives them."""

    order: Tensor  # (N,) int64, the token at each place
    place: Tensor  # (N,) int64, the place of each token
    ends: Tensor  # (E,) int32, the place at which each expert's tokens end


def group_tokens(expert_RN: Tensor, num_experts: int) -> list[Groups]:
    """Sort the tokens of every layer run by their expert, stably, by counting."""
    experts = torch.arange(num_experts, device=expert_RN.device)
    chosen_REN = expert_RN[:, None] == experts[:, None]
    rank_REN = chosen_REN.cumsum(-1, dtype=torch.int32)  # from 1
    counts_RE = rank_REN[..., -1]
    ends_RE = counts_RE.cumsum(-1, dtype=torch.int32)

    place_REN = rank_REN + (ends_RE - counts_RE - 1)[..., None]
    place_RN = (place_REN * chosen_REN).sum(1)
    tokens_RN = torch.arange(place_RN.size(1), device=place_RN.device).expand_as(place_RN)
    order_RN = torch.empty_like(place_RN).scatter_(1, place_RN, tokens_RN)
    return [Groups(*layer) for layer in zip(order_RN, place_RN, ends_RE, strict=True)]


class Permute(torch.autograd.Function):
    """x[order] for a permutation of rows; the gradient is a gather too, by the inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse], None, None


# Operators, as torch 2.13 cannot trace grouped_mm in float32. A copy of this file under another
# name, in the same process, has its own: PyTorch would take those of the first away.
NAMESPACE = __name__.replace(".", "_").strip("_")


@torch.library.custom_op(f"{NAMESPACE}::expert_linear", mutates_args=())
def expert_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows (N, C), sorted by expert, with their matrices of (E, R, C) -> (N, R)."""
    y = x.new_empty(len(x), weight.size(1))
    start = 0
    for matrix, end in zip(weight, ends.tolist(), strict=True):
        torch.mm(x[start:end], matrix.T, out=y[start:end])
        start = end
    return y


@torch.library.custom_op(f"{NAMESPACE}::expert_linear_backward", mutates_args=())
def expert_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and weight from that of the result, (N, R)."""
    x_grad = torch.empty_like(x)
    weight_grad = torch.empty_like(weight)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = grad[start:end]
        torch.mm(rows, weight[expert], out=x_grad[start:end])
        torch.mm(rows.T, x[start:end], out=weight_grad[expert])
        start = end
    return x_grad, weight_grad


# Their shapes alone, for the compiler.
expert_linear.register_fake(lambda x, weight, ends: x.new_empty(len(x), weight.size(1)))
expert_linear_backward.register_fake(
    lambda grad, x, weight, ends: (torch.empty_like(x), torch.empty_like(weight))
)
expert_linear.register_autograd(
    lambda ctx, grad: (*expert_linear_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def linear_by_expert(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Apply each expert's matrix to its rows, by PyTorch's kernel where there is one."""
    weight = weight.to(x.dtype)
    if x.is_cuda and x.dtype == torch.bfloat16:
        return F.grouped_mm(x, weight.mT, offs=ends)
    return expert_linear(x, weight, ends)


class TokenRoutedMLP(nn.Module):
    """shared(x) + expert[table[token]](x); without experts a plain MLP of the same width."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        D, E, F_expert = config.model_dim, config.num_experts, config.expert_dim
        self.rows = 2 if config.activation == "swiglu" else 1  # of the up projection per unit
        self.width = config.shared_dim + (0 if config.is_routed else E * F_expert)
        self.up = CastedLinear(D, self.rows * self.width)
        self.down = CastedLinear(self.width, D)
        if config.is_routed:  # (E, out, in): each is a matrix of its own to Muon and quantizer
            self.expert_up = nn.Parameter(torch.zeros(E, self.rows * F_expert, D))
            self.expert_down = nn.Parameter(torch.zeros(E, D, F_expert))
        if config.has_router:
            self.router = nn.Parameter(torch.zeros(E, D))

    def forward(self, x: Tensor, route: Any) -> tuple[Tensor, Tensor | float]:
        """Apply the MLP by the layer's dispatch. Also returns a learned choice's Switch loss."""
        if self.config.is_routed and not self.config.is_grouped:
            share_BTE, balance = self.choose(x, route)
            down = torch.cat([self.down.weight, *self.expert_down], dim=-1)
            return F.linear(self.hidden(x, share_BTE), down.to(x.dtype)), balance
        y = self.down(activate(self.up(x), self.config.activation))
        if self.config.is_grouped:
            y = y + self.grouped(x, route)
        return y, 0.0

    def choose(self, x: Tensor, table_BTE: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return the factor on each expert's output, (B, T, E), and the Switch loss, at best 1."""
        config = self.config
        if not config.has_router:
            return table_BTE, 0.0
        scores = F.linear(x.float(), self.router) + TABLE_SCORE[config.routing] * table_BTE
        share = scores.softmax(-1)
        if config.routing == "soft":
            return (config.num_experts * share).to(x.dtype), 0.0
        # One expert by the factor 1, the others by 0; the softmax's gradient goes straight through.
        chosen = torch.zeros_like(share).scatter(-1, scores.topk(1).indices, 1.0)
        balance = config.num_experts * chosen.flatten(0, 1).mean(0) @ share.flatten(0, 1).mean(0)
        return (chosen + (share - share.detach())).to(x.dtype), balance

    def hidden(self, x: Tensor, share_BTE: Tensor) -> Tensor:
        """Return the hidden units [shared | expert 0 | ... | expert E-1] of one GEMM."""
        E, D = self.config.num_experts, self.config.model_dim
        routed_width = E * self.config.expert_dim
        expert_up = self.expert_up.unflatten(1, (self.rows, -1)).transpose(0, 1).flatten(1, 2)
        up = torch.cat([self.up.weight.view(self.rows, self.width, D), expert_up], dim=1)

        h = activate(F.linear(x, up.view(-1, D).to(x.dtype)), self.config.activation)
        shared, routed = h.split([self.width, routed_width], dim=-1)
        # An expert's are multiplied by its share, so that the others' outputs are exactly zero.
        routed = (routed.unflatten(-1, (E, -1)) * share_BTE[..., None]).flatten(-2)
        return torch.cat([shared, routed], dim=-1)

    def grouped(self, x: Tensor, groups: Groups) -> Tensor:
        """Sort tokens by expert, multiply each with its own expert alone, and sort back."""
        order, place, ends = groups
        sorted_ND = Permute.apply(x.flatten(0, 1), order, place)
        h = activate(linear_by_expert(sorted_ND, self.expert_up, ends), self.config.activation)
        y_ND = linear_by_expert(h, self.expert_down, ends)
        return Permute.apply(y_ND, place, order).view_as(x)


class Guide(NamedTuple):
    """What a layer hands the next beside the stream."""

    mu: Tensor | None  # (B, T, D), None when MU=off
    velocity: Tensor | None  # (B, T, D), for MU=pid


class Block(nn.Module):
    """x0 mix, attention guided by mu, MLP, and the mu for the next layer."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        D = config.model_dim
        self.attn = CausalSelfAttention(config)
        self.mlp = TokenRoutedMLP(config)
        self.attn_scale = nn.Parameter(torch.ones(D))
        self.mlp_scale = nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
        self.is_parallel = layer >= config.parallel_start_layer
        self.input_scale = (layer + 1) ** -0.5 if config.ln_scale else 1.0

        # Nobody would read the mu of the layer that runs last.
        self.makes_mu = config.mu != "off" and layer in config.execution_order(True)[:-1]
        if self.makes_mu and config.mu == "full":
            self.mu_base = nn.Parameter(torch.zeros(D))
            self.mu_write = CastedLinear(D, D)
        elif self.makes_mu:
            self.mu_mix = nn.Parameter(torch.full((2, D), 0.5))
        if config.mu == "pid":
            self.pid_gains = nn.Parameter(torch.tensor([[2.2], [-2.2], [0.05]]).repeat(1, D))

    def next_mu(self, mu: Tensor, x: Tensor) -> Tensor:
        """Make the next layer's mu from the normalised stream; a norm bounds it."""
        if self.config.mu == "full":
            return norm(self.mu_base.to(x.dtype) + self.mu_write(norm(x)))
        keep, write = self.mu_mix.to(x.dtype)
        return norm(keep * mu + write * norm(x))

    def steer(self, y: Tensor, guide: Guide) -> tuple[Tensor, Tensor]:
        """Pull attention's result towards mu by a velocity, which a decay bounds (MU=pid)."""
        decay, pull, gain = self.pid_gains.to(y.dtype)
        # XSA leaves nothing but rounding of a first token, which eps keeps small.
        error = F.rms_norm(y, (y.size(-1),), eps=1e-3) - guide.mu
        velocity = torch.sigmoid(decay) * guide.velocity - torch.sigmoid(pull) * error
        return y + gain * velocity, velocity

    def forward(
        self, x: Tensor, guide: Guide, x0: Tensor, rotary: tuple[Tensor, Tensor], route: Any
    ) -> tuple[Tensor, Guide, Tensor | float]:
        """Return the stream, the guide for the next layer, and the Switch loss."""
        keep, inject = self.resid_mix.to(x.dtype)
        x = keep * x + inject * x0
        y = self.attn(norm(x) * self.input_scale, guide.mu, rotary)
        velocity = guide.velocity
        if self.config.mu == "pid":
            y, velocity = self.steer(y, guide)

        attended = x + self.attn_scale.to(x.dtype) * y
        mlp_input = x if self.is_parallel else attended
        y, switch_loss = self.mlp(norm(mlp_input) * self.input_scale, route)
        x = attended + self.mlp_scale.to(x.dtype) * y

        mu = self.next_mu(guide.mu, x) if self.makes_mu else None
        return x, Guide(mu, velocity), switch_loss


class GPT(nn.Module):
    """Decoder-only transformer with tied embedding, U-Net skips and token-routed MLPs."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.float32, context: int = 0):
        """Build for activations of `dtype` and windows of `context` tokens, 0 = TRAIN_SEQ_LEN."""
        super().__init__()
        self.config = config
        self.dtype = dtype
        D = config.model_dim
        num_skips = len(config.execution_order(True)) // 2
        self.tok_emb = nn.Embedding(config.vocab_size, D)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(num_skips, D))
        if config.skip_gates:
            self.skip_gates = nn.Parameter(torch.zeros(num_skips, D))
        if config.smear_gate:
            self.smear_gate = nn.Parameter(torch.zeros(GATE_CHANNELS))
            self.smear_scale = nn.Parameter(torch.zeros(1))
        if config.mu != "off":
            self.mu_init = nn.Parameter(torch.ones(D))
        table_rows = config.num_layers if config.is_routed else 0
        table = torch.zeros(table_rows, config.vocab_size, dtype=torch.uint8)
        self.register_buffer("expert_table", table)

        # For longer windows the base grows, so that the slowest rotation turns as far as it did.
        longer = max(1.0, context / config.train_seq_len)
        self.rope_base = 10_000.0 * longer ** (config.rope_dims / max(config.rope_dims - 2, 1))

    def use_attention(self, attend: Callable) -> None:
        """Attend by this kernel in every layer."""
        for block in self.blocks:
            block.attn.attend = attend

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw orthogonal matrices, each expert by itself; zero output projections and mu_read."""
        # By name, so that models that differ elsewhere start alike.
        for name, p in self.named_parameters():
            generator = torch.Generator().manual_seed(seed ^ zlib.crc32(name.encode()))
            role = role_of(name)
            if role == "embedding":
                nn.init.normal_(p, std=0.005, generator=generator)
            elif name == "mu_init" and self.config.mu == "full":
                nn.init.normal_(p, generator=generator)  # equal entries would get equal gradients
            elif role in ("matrix", "expert", "mu_matrix"):
                for matrix in p.view(-1, *p.shape[-2:]):
                    nn.init.orthogonal_(matrix, generator=generator)
                if re.search(r"\b(proj|down|expert_down|mu_read)\b", name):
                    p.zero_()

    def routes(self, input_ids: Tensor, order: list[int]) -> list:
        """Return each layer run's dispatch: Groups, or, masked, (B, T, E) of ones and zeros."""
        config = self.config
        if not config.is_routed:
            return [None] * len(order)

        table_LN = self.expert_table[:, input_ids.flatten()].long()
        rows = []
        for step, layer in enumerate(order):
            earlier = order[:step].count(layer) if config.routing_per_pass else 0
            rows.append((table_LN[layer] + earlier) % config.num_experts)
        expert_RN = torch.stack(rows)
        if config.is_grouped:
            return group_tokens(expert_RN, config.num_experts)
        experts = torch.arange(config.num_experts, device=input_ids.device)
        chosen_RNE = expert_RN[..., None] == experts
        return list(chosen_RNE.unflatten(1, input_ids.shape).to(self.dtype))

    def smear(self, x: Tensor, input_ids: Tensor) -> Tensor:
        """Add a gated part of the token before, but not across BOS (SmearGate, PR #1667)."""
        positions = torch.arange(input_ids.size(1), device=x.device)
        follows = (input_ids != BOS_ID) & (positions > 0)
        gate = torch.sigmoid(x[..., :GATE_CHANNELS] @ self.smear_gate.to(x.dtype))
        gate = self.smear_scale.to(x.dtype) * gate
        return x + (gate * follows)[..., None] * F.pad(x[:, :-1], (0, 0, 1, 0))

    def add_skip(self, x: Tensor, skip: Tensor, index: int) -> Tensor:
        """Mix in what the encoder half kept for this step of the decoder half."""
        skip = self.skip_weights[index].to(x.dtype) * skip
        if not self.config.skip_gates:
            return x + skip
        return torch.lerp(skip, x, torch.sigmoid(self.skip_gates[index]).to(x.dtype))

    def features(self, input_ids: Tensor, looped: bool = True) -> tuple[Tensor, Tensor | float]:
        """Return the head's normalised input, (B, T, D), and the Switch losses."""
        config = self.config
        x = self.tok_emb(input_ids).to(self.dtype)
        x0 = norm(self.smear(x, input_ids) if config.smear_gate else x)
        angles = rotary_tables(input_ids.size(1), self.rope_base, config.rope_dims, x.device)
        rotary = [table.to(self.dtype) for table in angles]
        mu = None
        if config.mu != "off":
            mu = norm(self.mu_init.to(self.dtype)).expand(*input_ids.shape, -1)
        guide = Guide(mu, velocity=mu)  # pid's; from zero its first gain would never learn

        order = config.execution_order(looped)
        routes = self.routes(input_ids, order)

        x = x0
        skips = []
        switch_loss = 0.0
        half = len(order) // 2
        for step, layer in enumerate(order):
            if step >= half and skips:
                x = self.add_skip(x, skips.pop(), step - half)
            x, guide, loss = self.blocks[layer](x, guide, x0, rotary, routes[step])
            switch_loss = switch_loss + loss
            if step < half:
                skips.append(x)
        return norm(x), switch_loss

    def forward(
        self,
        input_ids: Tensor,
        target_ids: Tensor | None = None,
        reduction: str = "mean",
        looped: bool = True,
        scored: Tensor | None = None,
    ) -> Tensor:
        """Return logits (B, T, V) or, given targets, cross-entropy in nats.

        `looped` is off until the recurrence begins. With `scored` positions (B, S) int64 the
        result is theirs alone. In training the mean includes the Switch losses.
        """
        x, switch_loss = self.features(input_ids, looped)
        if scored is not None:
            x = x[torch.arange(len(x), device=x.device)[:, None], scored]
        logits = F.linear(x, self.tok_emb.weight.to(x.dtype)).float()
        logits = 30.0 * torch.tanh(logits / 30.0)
        if target_ids is None:
            return logits
        loss = F.cross_entropy(logits.flatten(0, 1), target_ids.flatten(), reduction=reduction)
        if reduction == "none":
            return loss.view_as(target_ids)
        return loss + SWITCH_LOSS * switch_loss if self.training else loss


class Role(NamedTuple):
    """What tensors of a kind are called, which optimizer trains them, how they are stored."""

    name: str
    pattern: str  # of the whole name in the state dict
    optimizer: str  # muon | embedding (AdamW with decay) | adamw | none
    storage: str  # what `layout` may hold of one: q | h | t, of qh the first that is close


ROLES = (
    Role("embedding", r"tok_emb\.weight", "embedding", "q"),
    Role("matrix", r"blocks\.\d+\.(attn\.(c_[qkv]|proj)|mlp\.(up|down))\.weight", "muon", "q"),
    Role("expert", r"blocks\.\d+\.mlp\.expert_(up|down)", "muon", "q"),
    Role("mu_matrix", r"blocks\.\d+\.(attn\.mu_read|mu_write)\.weight", "adamw", "q"),
    Role("router", r"blocks\.\d+\.mlp\.router", "adamw", "h"),
    Role(
        "vector",
        r"skip_(weights|gates)|smear_(gate|scale)|mu_init|blocks\.\d+\."
        r"(attn\.(q_gain|gate|mu_gain)|(attn|mlp)_scale|resid_mix|mu_mix|mu_base|pid_gains)",
        "adamw",
        "qh",
    ),
    Role("table", r"expert_table", "none", "t"),
)


@cache
def find_role(name: str) -> Role:
    """Return the one role of a tensor of the state dict; none, or two, is a bug."""
    roles = [role for role in ROLES if re.fullmatch(role.pattern, name)]
    assert len(roles) == 1, f"{name} has roles {[role.name for role in roles]}"
    return roles[0]


def role_of(name: str) -> str:
    return find_role(name).name


def choose_attention(
    name: str, model: GPT, device: torch.device, log: Callable, compiles: bool = False
) -> str:
    """Give `model` the first kernel of ATTENTION that runs, and log which. Raises ConfigError."""
    config = model.config
    candidates = ["fa3", "cudnn", "flash", "math"] if name == "auto" else [name]
    trial = {"device": device, "dtype": model.dtype, "requires_grad": True}
    q = torch.zeros(1, 128, config.num_heads, config.head_dim, **trial)
    k = torch.zeros(1, 128, config.num_kv_heads, config.head_dim, **trial)
    v = torch.zeros_like(k, requires_grad=True)
    failures = []
    for kernel in candidates:
        # PyTorch's choice is narrowed to the kernel on trial. FA3 is none of its own: all are on.
        torch.backends.cuda.enable_cudnn_sdp(kernel in ("cudnn", "fa3"))
        torch.backends.cuda.enable_flash_sdp(kernel in ("flash", "fa3"))
        torch.backends.cuda.enable_mem_efficient_sdp(kernel == "fa3")
        torch.backends.cuda.enable_math_sdp(kernel in ("math", "fa3"))
        attend = flash_attention_3 if kernel == "fa3" else sdpa_attention
        # Some builds of FA3 run, but cannot be part of a graph.
        on_trial = attend
        if compiles and kernel == "fa3":
            on_trial = torch.compile(attend, fullgraph=True, backend="aot_eager")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch's reasons for not using a kernel
                on_trial(q, k, v).sum().backward()
        except (Exception, SystemExit) as error:  # of an optional kernel, anything
            reason = (str(error) or type(error).__name__).splitlines()[0]
            failures.append(f"not {kernel}: {reason[:60]}")
            continue
        model.use_attention(attend)
        log(f"attention:{kernel}" + "".join(f" ({failure})" for failure in failures))
        return kernel
    raise ConfigError(f"ATTENTION={name}: {'; '.join(failures)}")


# ---- Optimizers and schedules --------------------------------------------------------------------

# Optimal odd quintics for five steps (Polar Express, arXiv 2505.16932; used in PR #1787).
POLAR_EXPRESS = (
    (8.156555, -22.483293, 15.878770),
    (4.042930, -2.808917, 0.500018),
    (3.891668, -2.772484, 0.506065),
    (3.285754, -2.368129, 0.464490),
    (2.346541, -1.709783, 0.423236),
)


def zeropower_via_newtonschulz5(G: Tensor) -> Tensor:
    """Return the nearest semi-orthogonal matrix of each G[i], (M, rows, cols); zero stays zero."""
    norm = G.norm(dim=-1, keepdim=True)
    # A row whose squares overflow becomes NaN, which ends the run, and not zero.
    norm = norm.where(norm.isfinite(), math.nan)
    X = G / (norm + 1e-7)  # row-normalised: MuonEq-R, PR #1217
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    if G.is_cuda:
        X = X.bfloat16()
    is_tall = X.size(-2) > X.size(-1)
    if is_tall:
        X = X.mT
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if is_tall else X).to(G.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix or expert (kellerjordan.github.io/posts/muon)."""

    def __init__(
        self, params: list[Tensor], lr: float, weight_decay: float, dist: Dist, compiles: bool
    ):
        groups = []  # of matrices of one shape, which are orthogonalised in one batch
        for shape in sorted({p.shape[-2:] for p in params}):
            groups.append({"params": [p for p in params if p.shape[-2:] == shape]})
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.0})
        self.dist = dist
        self.zeropower = zeropower_via_newtonschulz5
        # On a CPU it is all GEMM, and not worth the compilation.
        if compiles and dist.device.type == "cuda":
            self.zeropower = torch.compile(self.zeropower, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:
        """Update every group from the gradients, and the LR and momentum in the group."""
        mine = slice(self.dist.rank, None, self.dist.world_size)
        for group in self.param_groups:
            params = group["params"]
            rows, cols = params[0].shape[-2:]
            update = torch.cat([p.grad.view(-1, rows, cols) for p in params])

            state = self.state[params[0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(update)
            buffer = state["momentum_buffer"].lerp_(update, 1 - group["momentum"])
            update.lerp_(buffer, group["momentum"])  # Nesterov

            # Each rank orthogonalises its share; the sum puts the shares together.
            share = update[mine]
            if len(share):
                share = self.zeropower(share)
            update.zero_()[mine] = share
            self.dist.all_sum(update)

            updates = update.split([p.numel() // (rows * cols) for p in params])
            updates = [u.view_as(p) for u, p in zip(updates, params, strict=True)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            # So that the RMS change of an activation is the same for tall and wide matrices.
            scale = max(1, rows / cols) ** 0.5
            torch._foreach_add_(params, updates, alpha=-group["lr"] * scale)


def build_optimizers(hp: Hyperparameters, model: GPT, dist: Dist) -> list[torch.optim.Optimizer]:
    """Give every parameter to the optimizer of its role, exactly once."""
    params = {"muon": [], "embedding": [], "adamw": []}
    for role in ROLES:  # by role, then by name
        members = [p for name, p in model.named_parameters() if role_of(name) == role.name]
        if members:
            params[role.optimizer] += members
    decay = hp.embed_weight_decay
    embedding = {"params": params["embedding"], "lr": hp.embed_lr, "weight_decay": decay}
    # Weight decay would hold gains at their start.
    small = {"params": params["adamw"], "lr": hp.scalar_lr, "weight_decay": 0.0}
    is_cuda = dist.device.type == "cuda"
    adamw = torch.optim.AdamW([embedding, small], betas=(0.9, 0.95), eps=1e-8, fused=is_cuda)
    compiles = can_compile(hp, dist.device)
    muon = Muon(params["muon"], hp.matrix_lr, hp.muon_weight_decay, dist, compiles)

    groups = muon.param_groups + adamw.param_groups
    covered = sorted(id(p) for group in groups for p in group["params"])
    assert covered == sorted(map(id, model.parameters())), "a parameter has no or two optimizers"
    for group in groups:
        group["base_lr"] = group["lr"]
    return [muon, adamw]


def sgdr_restart(hp: Hyperparameters) -> float:
    """Return the fraction of the budget at which the second cycle of SGDR begins."""
    # With the depth recurrence, where the loss spikes and wants a high LR; else twice as long.
    if hp.model.loop_passes > 1 and 0 < hp.loop_from < 1:
        return hp.loop_from
    return 1 / 3


def lr_scale(hp: Hyperparameters, frac: float) -> float:
    """Return the multiplier of all learning rates at the fraction `frac` of the budget."""
    if hp.schedule == "linear":
        if hp.warmdown_frac == 0:
            return 1.0
        return max(hp.min_lr, min(1.0, (1 - frac) / hp.warmdown_frac))

    # Cosine cycles with warm restarts (SGDR, arXiv 1608.03983), the second 0.7 times as high.
    restart = sgdr_restart(hp)
    if frac < restart:
        peak = 1.0
        position = frac / restart
    else:
        peak = 0.7
        position = min((frac - restart) / (1 - restart), 1.0)
    height = max(peak - hp.min_lr, 0.0)
    return hp.min_lr + height * 0.5 * (1 + math.cos(math.pi * position))


def set_schedules(hp: Hyperparameters, optimizers: list, frac: float) -> float:
    """Set learning rates and Muon's momentum for `frac` of the budget. Returns the multiplier."""
    scale = lr_scale(hp, frac)
    start = min(0.85, hp.muon_momentum)
    momentum = start + (hp.muon_momentum - start) * min(frac / 0.1, 1.0)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * scale
            if isinstance(optimizer, Muon):
                group["momentum"] = momentum
    return scale


def average_weight(hp: Hyperparameters, frac: float, count: int) -> float:
    """Return the newest parameters' weight in an average of `count` before; 0 = leave them out."""
    if hp.average == "ema":  # its warm-up keeps a short run from averaging over the bad start
        return 1 - min(hp.ema_decay, (1 + count) / (10 + count))
    if hp.average == "swa":  # the end of the last descent, equal weights
        descent = sgdr_restart(hp) if hp.schedule == "sgdr" else 1 - hp.warmdown_frac
        if frac >= max(0.85, descent):
            return 1 / (1 + count)
    return 0.0


# ---- Quantization --------------------------------------------------------------------------------

# A scale is stored as one byte c and means 2^((c - 192) / 8): 2^-24 to 2^7.9, within 4.5 % of any.
UNIT_CODE = 192
CODES_PER_OCTAVE = 8
SCALES = torch.exp2((torch.arange(256, dtype=torch.float64) - UNIT_CODE) / CODES_PER_OCTAVE).float()
COLUMN_CODES = (160, 216)  # factors on columns stay within 2^-4 to 2^3
# With few levels larger weights are cut off. The k of 3 and 4 bits round a Gaussian with the least
# squared error (Max, IRE Trans. Inf. Theory 6, 1960). A ternary scale is the mean of absolute
# values: trained at it, a model loses less than at Max's 1.22 (study LowBitExperts).
CLIP_OF_FEW_LEVELS = {2: 0.8, 3: 1.954, 4: 2.468}  # by bits
GPTQ_DAMPING = 0.01  # added to the Hessian's diagonal, times its mean
GPTQ_BLOCK = 128  # columns whose errors are moved together


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as small integers times the scale of their row and, for the embedding, column."""

    symbols: Tensor  # (..., R, C) int8
    row_codes: Tensor  # (..., R, 1) uint8, codes of scales
    column_codes: Tensor | None = None  # (C,) uint8

    def scale(self) -> Tensor:
        """Return the scale of every symbol, float32, shaped to broadcast."""
        return decode_scales(self.row_codes, self.column_codes)

    def dequantize(self) -> Tensor:
        """Return the weights, float32."""
        return self.symbols.float() * self.scale()


@cache
def scales_on(device: torch.device) -> Tensor:
    """Return SCALES on a device; they go there once, as a copy makes the host wait."""
    return SCALES.to(device)


def decode_scales(codes: Tensor, column_codes: Tensor | None = None) -> Tensor:
    """Return the scales that uint8 codes stand for, times those of columns, float32."""
    scale = scales_on(codes.device)[codes.long()]
    return scale if column_codes is None else scale * decode_scales(column_codes)


def largest_symbol(bits: int) -> int:
    return 2 ** (bits - 1) - 1


def bits_and_clip(hp: Hyperparameters, name: str) -> tuple[int, float] | None:
    """Return bits and k of a tensor; k = 0: by the largest weight; None: not rounded."""
    role = role_of(name)
    if role in ("matrix", "mu_matrix"):
        bits, clip = hp.matrix_bits, hp.matrix_clip
    elif role == "expert":
        bits, clip = hp.expert_bits, hp.matrix_clip
    elif role == "embedding":
        bits, clip = hp.embed_bits, hp.embed_clip
    else:
        return (8, 0.0) if role == "vector" else None
    return bits, CLIP_OF_FEW_LEVELS.get(bits, clip)


def column_scale_codes(hessian: Tensor | None, weight: Tensor) -> Tensor:
    """Return the code of a factor on each column's scale, (C,) uint8; it is 1 without a Hessian."""
    if hessian is None or not hessian.isfinite().all():
        return torch.full(weight.shape[-1:], UNIT_CODE, dtype=torch.uint8, device=weight.device)
    # The inverse fourth root of the input's second moment: some inputs of a head are a hundred
    # times as active as the rest; cf. AWQ, arXiv 2306.00978.
    diagonal = hessian.diagonal()
    activity = diagonal.clamp(min=1e-4 * diagonal.mean().item() + 1e-30).log2()
    codes = UNIT_CODE + CODES_PER_OCTAVE / 4 * (activity.mean() - activity)
    return codes.round().clamp(*COLUMN_CODES).to(torch.uint8)


def round_to_nearest(weight: Tensor, scale: Tensor, limit: int) -> Tensor:
    """Return the nearest symbols from -limit to limit, float32."""
    return (weight.float() / scale).round().clamp(-limit, limit)


def quantize_tensor(
    weight: Tensor, bits: int, clip: float, column_codes: Tensor | None = None
) -> QuantizedTensor:
    """Round to nearest, with a scale for every row and, given codes, a factor on every column."""
    largest = largest_symbol(bits)
    balanced = weight if column_codes is None else weight / decode_scales(column_codes)

    # By the standard deviation (SDClip, PR #1394), which sets the entropy and hence the size.
    std = (balanced - balanced.mean(-1, keepdim=True)).square().mean(-1, keepdim=True).sqrt()
    codes = (CODES_PER_OCTAVE * (clip * std / largest).log2()).round()
    if bits not in CLIP_OF_FEW_LEVELS:
        outlier = balanced.abs().amax(-1, keepdim=True) / largest
        needed = CODES_PER_OCTAVE * outlier.log2() - 1e-3  # one that just fits is large enough
        codes = torch.maximum(codes, needed.ceil())
    row_codes = (codes + UNIT_CODE).clamp(0, 255).to(torch.uint8)

    symbols = round_to_nearest(weight, decode_scales(row_codes, column_codes), largest)
    return QuantizedTensor(symbols.to(torch.int8), row_codes, column_codes)


def is_close(quantized: QuantizedTensor, weight: Tensor) -> Tensor:
    """Tell, as a tensor, whether 8 bits change a vector by at most 1 %."""
    return (quantized.dequantize() - weight).norm() <= 0.01 * weight.norm()


def store_tensor(
    hp: Hyperparameters, name: str, weight: Tensor, factor: float, hessian: Tensor | None
) -> QuantizedTensor | Tensor:
    """Round one tensor as its role asks, to symbols or float16. Raises ConfigError."""
    role = role_of(name)
    precision = bits_and_clip(hp, name)
    column_codes = None
    limit = torch.tensor(torch.finfo(torch.float16).max)
    if precision:
        limit = SCALES[-1] * largest_symbol(precision[0])
    if role == "embedding":
        of_training = hp.trains_rounded(precision[0])
        column_codes = column_scale_codes(None if of_training else hessian, weight)
        limit = limit * decode_scales(column_codes)
    fits = bool((weight.float().abs() <= limit).all())
    require(fits, f"{name}: not finite or too large, nothing exported")

    if precision is None:
        return weight.half() if weight.is_floating_point() else weight
    bits, clip = precision
    if not (hp.uses_gptq and hp.trains_rounded(bits)):
        clip *= factor
    quantized = quantize_tensor(weight, bits, clip, column_codes)
    is_kept = role == "vector" and not is_close(quantized, weight)
    return weight.half() if is_kept else quantized


def as_stored(hp: Hyperparameters, name: str, weight: Tensor) -> Tensor:
    """Return a parameter as `store_tensor` keeps it without a Hessian; the host does not wait."""
    precision = bits_and_clip(hp, name)
    if precision is None:
        return weight.half().float()
    quantized = quantize_tensor(weight, *precision)
    if role_of(name) == "vector":
        return torch.where(is_close(quantized, weight), quantized.dequantize(), weight.half())
    return quantized.dequantize() if hp.trains_rounded(precision[0]) else weight


@contextlib.contextmanager
def rounded(hp: Hyperparameters, model: GPT, on: bool = True) -> Iterator[None]:
    """Give `model` the weights that its artifact will hold, but for those that GPTQ will round."""
    if not on:
        yield
        return
    weights = [p.detach() for p in model.parameters()]
    kept = [weight.clone() for weight in weights]
    stored = [as_stored(hp, name, p.detach()) for name, p in model.named_parameters()]
    torch._foreach_copy_(weights, stored)
    # A gradient taken here and applied to the others is straight-through (arXiv 1308.3432).
    try:
        yield
    finally:
        torch._foreach_copy_(weights, kept)


def gptq(weight: Tensor, scale: Tensor, limits: Tensor, hessian: Tensor) -> Tensor | None:
    """Round by GPTQ (arXiv 2210.17323) with act-order: errors move to less active inputs' columns.

    weight and scale (R, C), largest symbols (C,), second moments of the input (C, C) -> symbols
    (R, C) float32, or None if the moments are not finite or not positive definite.
    """
    hessian = hessian.double()
    diagonal = hessian.diagonal()
    order = diagonal.argsort(descending=True)
    damped = hessian + torch.diag(GPTQ_DAMPING * diagonal.mean() + (diagonal == 0).double())
    upper, failed = torch.linalg.cholesky_ex(damped[order][:, order])
    if not failed:
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(upper), upper=True)
    if failed or not upper.isfinite().all():
        return None

    # Columns become rows, which lie close in memory.
    upper = upper.float()
    weight = weight.float().T[order]
    scale = scale.T[order]
    limits = limits[order.cpu()].tolist()
    symbols = torch.empty_like(weight)
    for start in range(0, len(order), GPTQ_BLOCK):
        end = start + GPTQ_BLOCK
        errors = torch.zeros_like(weight[start:end])
        for j in range(start, min(end, len(order))):
            symbols[j] = round_to_nearest(weight[j], scale[j], limits[j])
            error = (weight[j] - symbols[j] * scale[j]) / upper[j, j]
            errors[j - start] = error
            weight[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
        weight[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
    return symbols[order.argsort()].T


def parts_with_input(state: dict[str, Tensor], name: str) -> list[list[tuple[str, Any]]]:
    """Return the matrices whose inputs Hessians `name` describe, each as its parts side by side."""
    if name.endswith("expert_up"):
        return [[(name, expert)] for expert in range(len(state[name]))]
    # All down projections of a layer are one matrix, as they add up to one output.
    parts = [(name, ...)]
    routed = name.replace("down.weight", "expert_down")
    if name.endswith("mlp.down.weight") and routed in state:
        parts += [(routed, expert) for expert in range(len(state[routed]))]
    return [parts]


def round_by_gptq(
    hp: Hyperparameters, state: dict, quantized: dict, parts: list[tuple], hessian: Tensor
) -> bool:
    """Round a matrix in place, but for parts trained rounded. Returns False for a bad Hessian."""
    scales = {name: quantized[name].scale().expand_as(state[name]) for name, _ in parts}
    weight = torch.cat([state[name][index] for name, index in parts], -1)
    scale = torch.cat([scales[name][index] for name, index in parts], -1)
    symbols = torch.cat([quantized[name].symbols[index] for name, index in parts], -1).float()
    columns = []  # the largest symbol of each; 0 = stays as it is
    for name, _ in parts:
        bits, _ = bits_and_clip(hp, name)
        limit = 0 if hp.trains_rounded(bits) else largest_symbol(bits)
        columns += [limit] * state[name].size(-1)

    limits = torch.tensor(columns)
    free = limits.nonzero()[:, 0]
    if len(free) == 0:
        return True
    result = gptq(weight[:, free], scale[:, free], limits[free], hessian[free][:, free])
    if result is None:
        return False
    # In a row of zeros the errors of others would become weights.
    symbols[:, free] = result.where(scale[:, free] > SCALES[0], symbols[:, free])
    widths = [state[name].size(-1) for name, _ in parts]
    for (name, index), part in zip(parts, symbols.split(widths, -1), strict=True):
        quantized[name].symbols[index] = part
    return True


def quantize(
    hp: Hyperparameters, state: dict[str, Tensor], factor: float = 1.0, hessians: dict | None = None
) -> tuple[dict[str, QuantizedTensor | Tensor], list[str]]:
    """Quantize a state dict, every k times `factor`; by GPTQ given Hessians. Raises ConfigError."""
    hessians = hessians or {}
    quantized = {}
    for name, weight in state.items():
        quantized[name] = store_tensor(hp, name, weight, factor, hessians.get(name))

    unusable = []  # names of those whose Hessian is of no use: rounded to nearest, like the rest
    for name, hessian in hessians.items():
        matrices = parts_with_input(state, name)
        for parts, matrix in zip(matrices, hessian.view(-1, *hessian.shape[-2:]), strict=True):
            done = round_by_gptq(hp, state, quantized, parts, matrix)
            if not done and name not in unusable:
                unusable.append(name)
    return quantized, unusable


# ---- Artifact ------------------------------------------------------------------------------------
# PREFIX | JSON header | streams, each compressed by itself. The model's knobs in the header give
# names and shapes of all tensors, `storage` a letter for each (q = symbols and codes of scales,
# h = float16, t = uint8), `streams` codecs and bytes.

PREFIX = struct.Struct("<8sHI32s")  # magic, version, bytes of the header, SHA-256 of all else
ARTIFACT_MAGIC = b"TRMOE\r\n\x1a"
ARTIFACT_VERSION = 4
ZSTD = 1  # numbers of the codecs in the header
BROTLI = 2
MAX_WEIGHTS = 1 << 27  # bounds what a stranger's file may cost: seconds, and 2 GiB
MAX_HEADER_BYTES = 1 << 16
STORED_DTYPES = {"q": torch.int8, "h": torch.float16, "t": torch.uint8}  # by a storage's letter


def find_brotli() -> Any:
    """Return the module brotli, or None where it is not installed or does not load."""
    try:
        import brotli
    except (ImportError, OSError):
        return None
    return brotli


def compress(data: bytes, fast: bool = False) -> tuple[int, bytes]:
    """Return the codec's number and the smaller of zstd-22 and brotli-11, or `fast`, zstd-22."""
    import zstandard

    packed = ZSTD, zstandard.ZstdCompressor(22).compress(data)
    brotli = find_brotli()
    if fast or brotli is None:
        return packed
    smaller = brotli.compress(data, quality=11, lgwin=24)
    return (BROTLI, smaller) if len(smaller) < len(packed[1]) else packed


def decompress(data: bytes, codec: int, size: int) -> bytes:
    """Unpack `size` bytes. Raises ConfigError when there are more, or fewer, or damaged ones."""
    try:
        if codec == ZSTD:
            import zstandard

            payload = zstandard.ZstdDecompressor().stream_reader(data).read(size + 1)
        elif codec == BROTLI:
            import brotli

            payload = brotli.Decompressor().process(data, output_buffer_limit=size + 1)
        else:
            raise ValueError(f"no codec {codec}")
        if len(payload) != size:
            raise ValueError("it is longer or shorter")
    except ImportError as error:
        raise ConfigError(f"needs the package {error.name}: pip install {error.name}") from None
    except Exception as error:  # each codec has an error class of its own
        reason = f"a stream does not unpack to {size} bytes ({error})"
        raise ConfigError(f"damaged artifact, {reason}") from error
    return payload


def layout(config: ModelConfig, storage: str) -> dict[str, QuantizedTensor | Tensor]:
    """Return what an artifact of this `storage` holds, to be filled. Raises ConfigError."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    weights = sum(map(math.prod, shapes.values()))
    require(weights <= MAX_WEIGHTS, f"too large a model, over {MAX_WEIGHTS:,} weights")
    require(len(storage) == len(shapes), f"storage of {len(storage)} tensors, not {len(shapes)}")
    tensors = {}
    for (name, shape), letter in zip(shapes.items(), storage, strict=True):
        role = find_role(name)
        require(letter in role.storage, f"{name} cannot be stored as {letter!r}")
        tensors[name] = torch.empty(shape, dtype=STORED_DTYPES[letter])
        if letter == "q":
            row_codes = torch.empty(*shape[:-1], 1, dtype=torch.uint8)
            has_columns = role.name == "embedding"
            column_codes = torch.empty(shape[-1], dtype=torch.uint8) if has_columns else None
            tensors[name] = QuantizedTensor(tensors[name], row_codes, column_codes)
    return tensors


def streams_of(tensors: dict[str, QuantizedTensor | Tensor]) -> dict[str, list[Tensor]]:
    """Return what each stream holds, in order; vectors, codes and float16 have one together."""
    streams = collections.defaultdict(list)
    for name, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            is_vector = role_of(name) == "vector"
            streams["vector" if is_vector else name].append(tensor.symbols)
            streams["scales"].append(tensor.row_codes)
            if tensor.column_codes is not None:
                streams["scales"].append(tensor.column_codes)
        else:
            streams["float16" if tensor.dtype == torch.float16 else "table"].append(tensor)
    return streams


def pack(
    config: ModelConfig, tensors: dict, tokenizer_sha256: str, fast: bool = False
) -> tuple[bytes, dict[str, int]]:
    """Return the artifact of quantized tensors, and its bytes by role or shared stream."""
    letters = {dtype: letter for letter, dtype in STORED_DTYPES.items()}
    storage = ""
    for tensor in tensors.values():
        whole = tensor.symbols if isinstance(tensor, QuantizedTensor) else tensor
        storage += letters[whole.dtype]
    layout(config, storage)  # refuses what the reader would

    plan = streams_of(tensors)
    raw = [b"".join(part.cpu().numpy().tobytes() for part in parts) for parts in plan.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        streams = list(pool.map(partial(compress, fast=fast), raw))

    header = {"model": vars(config), "tokenizer_sha256": tokenizer_sha256, "storage": storage}
    header["streams"] = [(codec, len(data)) for codec, data in streams]
    text = json.dumps(header, separators=(",", ":")).encode()
    body = text + b"".join(data for _, data in streams)
    unsigned = PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, len(text), bytes(32))
    digest = hashlib.sha256(unsigned + body).digest()

    sizes = collections.Counter({"header": PREFIX.size + len(text)})
    for name, (_, data) in zip(plan, streams, strict=True):
        sizes[role_of(name) if name in tensors else name] += len(data)
    return unsigned[:-32] + digest + body, dict(sizes)


def unpack(data: bytes, dtype: torch.dtype, context: int) -> tuple[GPT, str]:
    """Return an artifact's model, for windows of `context` tokens, and its tokenizer's SHA-256."""
    magic, version, header_bytes, digest = PREFIX.unpack_from(data)
    require(magic == ARTIFACT_MAGIC, "not an artifact of this trainer")
    readable = f"artifact version {version}, this trainer reads {ARTIFACT_VERSION}"
    require(version == ARTIFACT_VERSION, readable)
    unsigned = data[: PREFIX.size - 32] + bytes(32) + data[PREFIX.size :]
    is_intact = hashlib.sha256(unsigned).digest() == digest
    require(is_intact, "damaged artifact, the checksum does not match")
    is_short = header_bytes <= MAX_HEADER_BYTES
    require(is_short, f"damaged artifact, a header of {header_bytes:,} bytes")

    offset = PREFIX.size + header_bytes
    header = json.loads(data[PREFIX.size : offset])
    streams = [(int(codec), int(size)) for codec, size in header["streams"]]
    knobs = {name: header["model"][name] for name in knob_fields(ModelConfig)}
    config = ModelConfig(**knobs).validate()
    tensors = layout(config, str(header["storage"]))
    plan = streams_of(tensors)
    sizes = [size for _, size in streams]
    is_filled = len(sizes) == len(plan) and min(sizes) >= 0 and offset + sum(sizes) == len(data)
    require(is_filled, "damaged artifact, its streams do not fill it")

    for parts, (codec, size) in zip(plan.values(), streams, strict=True):
        unpacked = sum(part.nbytes for part in parts)
        stream = io.BytesIO(decompress(data[offset : offset + size], codec, unpacked))
        offset += size
        for part in parts:
            stream.readinto(part.numpy())
    state = {}
    for name, tensor in tensors.items():
        state[name] = tensor.dequantize() if isinstance(tensor, QuantizedTensor) else tensor

    is_finite = all(bool(tensor.isfinite().all()) for tensor in state.values())
    require(is_finite, "damaged artifact, a weight is not finite")
    experts_exist = bool((state["expert_table"] < config.num_experts).all())
    require(experts_exist, "damaged artifact, an expert that does not exist")
    with torch.device("meta"):
        model = GPT(config, dtype, context)
    model.load_state_dict(state, strict=True, assign=True)
    return model.float().eval(), str(header["tokenizer_sha256"])


def load_artifact(
    path: Path, hp: Hyperparameters, device: torch.device, context: int = 0
) -> tuple[GPT, Hyperparameters, str]:
    """Read an artifact: its model, `hp` with that, its tokenizer's SHA-256. Raises ConfigError."""
    require(path.is_file(), f"{path}: no such artifact")
    fits = PREFIX.size <= path.stat().st_size < MAX_SUBMISSION_BYTES
    require(fits, f"{path}: too short or too long for an artifact")
    try:
        model, tokenizer_sha256 = unpack(path.read_bytes(), hp.torch_dtype, context)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{path}: damaged artifact, bad header ({error})") from error
    return model.to(device), replace(hp, model=model.config), tokenizer_sha256


@dataclass(frozen=True)
class Fitted:
    """An artifact that keeps the cap, and how it came about."""

    artifact: bytes
    sizes: dict[str, int]  # bytes by role or shared stream
    tensors: dict[str, QuantizedTensor | Tensor]
    factor: float  # on every k
    unusable: list[str]  # tensors whose Hessian was of no use


def entropy_bytes(tensors: list[Tensor]) -> float:
    """Return the least bytes for a coder that knows each tensor's frequencies and nothing else."""
    total = 0.0
    for tensor in tensors:
        bits = 8.0 * tensor.element_size()  # more than 8 count as they are
        if bits == 8:
            shares = torch.bincount(tensor.flatten().int() + 128).double() / tensor.numel()
            bits = torch.special.entr(shares).sum().item() / math.log(2)
        total += tensor.numel() * bits / 8
    return total


def budget_table(fitted: Fitted) -> str:
    """Return a table of what every role takes, and the entropy of its symbols as the floor."""
    lines = [f"{'role':<10}{'weights':>12}{'bytes':>12}{'bits/weight':>13}{'entropy floor':>15}"]
    for role, size in fitted.sizes.items():
        tensors = [tensor for name, tensor in fitted.tensors.items() if role_of(name) == role]
        symbols = [tensor.symbols for tensor in tensors if isinstance(tensor, QuantizedTensor)]
        weights = sum(tensor.numel() for tensor in symbols)
        line = f"{role:<10}{'':>12}{size:>12,}"
        if symbols:
            line = f"{role:<10}{weights:>12,}{size:>12,}{8 * size / weights:>13.3f}"
            line += f"{entropy_bytes(symbols):>15,.0f}"
        lines.append(line)
    lines.append(f"{'total':<22}{len(fitted.artifact):>12,}  (k x {fitted.factor:.4f})")
    return "\n".join(lines)


FINEST = 1 / 8  # factor on every k
COARSEST = 4.0
AIMS = (0.9996, 0.9996, 0.9996, 0.9996, 0.9996, 0.98)  # shares of the target, try by try


def factor_for(hp: Hyperparameters, state: dict[str, Tensor], goal: float) -> tuple[float, float]:
    """Return the finest factor on k whose symbols' entropy is at most `goal`, and it, in bytes."""

    def entropy(exponent: float) -> float:
        quantized, _ = quantize(hp, state, 2.0**exponent)
        return sum(map(entropy_bytes, streams_of(quantized).values()))

    fine = math.log2(FINEST)
    coarse = math.log2(COARSEST)  # the answer if none is coarse enough
    if entropy(fine) <= goal:
        coarse = fine
    while coarse - fine > 2**-12:
        middle = (fine + coarse) / 2
        if entropy(middle) <= goal:
            coarse = middle
        else:
            fine = middle
    return 2.0**coarse, entropy(coarse)


def fit(
    hp: Hyperparameters,
    state: dict[str, Tensor],
    tokenizer_sha256: str,
    hessians: dict[str, Tensor] | None = None,
    fast: bool = False,
) -> Fitted:
    """Return the finest artifact that keeps TARGET_BYTES; 0 = k as given. Raises ConfigError."""

    def attempt(factor: float) -> Fitted:
        tensors, unusable = quantize(hp, state, factor, hessians)
        artifact, sizes = pack(hp.model, tensors, tokenizer_sha256, fast)
        return Fitted(artifact, sizes, tensors, factor, unusable)

    code_bytes, _ = submission_bytes(hp, 0, "code")
    target = hp.target_bytes - code_bytes if hp.target_bytes else math.inf
    # What was trained rounded keeps its k, unless nothing else is left to make coarser.
    if hp.target_bytes == 0 or (hp.uses_qat and not hp.uses_gptq):
        fitted = attempt(1.0)
        if len(fitted.artifact) <= target:
            return fitted

    # The entropy of the symbols tells the size before compression; each try corrects the ratio of
    # both by the size it came to, so that the result fills the target to ~0.1 %.
    ratio = 1.015  # of bytes to entropy, a first guess
    best = None
    for aim in AIMS:
        factor, entropy = factor_for(hp, state, aim * target / ratio)
        fitted = attempt(factor)
        size = len(fitted.artifact)
        ratio = size / entropy
        fits = size <= target
        if fits and (best is None or size > len(best.artifact)):
            best = fitted
        is_hopeless = best is None and factor == COARSEST
        if is_hopeless or (fits and (factor == FINEST or size >= 0.999 * target)):
            break
    large = f"TARGET_BYTES={hp.target_bytes}: {size - target:,} bytes too large"
    remedy = f"lower MODEL_DIM={hp.model.model_dim} or NUM_LAYERS={hp.model.num_layers}"
    require(best is not None, f"{large}; {remedy}")
    return best


def submission_source() -> bytes:
    """Return this file and, after a NUL, eval_sliding.py beside it."""
    here = Path(__file__).resolve()
    files = [here, here.with_name("eval_sliding.py")]
    return b"\0".join(path.read_bytes() for path in files if path.exists())


def pack_source(source: bytes) -> bytes:
    """Return what a record's train_gpt.py carries in its loader: xz in base85, ASCII."""
    return base64.b85encode(lzma.compress(source, preset=9))


def submission_bytes(hp: Hyperparameters, model_bytes: int, what: str) -> tuple[int, int]:
    """Return bytes of the code as a record ships it, and of both. Raises ConfigError at the cap."""
    code_bytes = LOADER_BYTES + len(pack_source(submission_source()))
    total = code_bytes + model_bytes
    large = f"{what}: {code_bytes:,} bytes of code + {model_bytes:,}, the cap is"
    remedy = f"lower MODEL_DIM={hp.model.model_dim} or raise MATRIX_CLIP={hp.matrix_clip}"
    require(total < MAX_SUBMISSION_BYTES, f"{large} {MAX_SUBMISSION_BYTES:,}; {remedy}")
    return code_bytes, total


def dry_run(hp: Hyperparameters, model: GPT) -> Fitted:
    """Estimate the artifact by Gaussian weights, whose symbols have the entropy of trained ones."""
    generator = torch.Generator().manual_seed(0)
    state = model.state_dict()
    for name, p in model.named_parameters():
        state[name] = torch.randn(p.shape, generator=generator)
    return fit(hp, state, "0" * 64, fast=True)


# ---- Evaluation ----------------------------------------------------------------------------------


def scoring_windows(num_targets: int, seq_len: int, stride: int) -> Tensor:
    """Return windows that score `stride` targets each, (W, 3) int64: start, first target, end."""
    first = torch.arange(0, num_targets, stride)
    start = (first + stride - seq_len).clamp(min=0)  # seq_len - stride of context, or all
    end = (first + stride).clamp(max=num_targets)
    return torch.stack([start, first, end], dim=1)


@dataclass(frozen=True)
class Windowing:
    """How a split is cut into windows."""

    seq_len: int  # tokens per window
    stride: int  # targets scored per window
    batch_size: int  # windows per forward pass


@dataclass(frozen=True)
class Score:
    """Result of an evaluation."""

    val_loss: float  # nats per token
    bpb: float  # bits per byte: val_bpb unless partial
    target_tokens: int
    scored_bytes: int
    seconds: float
    partial: bool

    def __str__(self) -> str:
        name = "PARTIAL" if self.partial else "val"
        return f"{name}_loss:{self.val_loss:.8f} {name}_bpb:{self.bpb:.8f}"


class Scorer:
    """Scores a split; keeps the loss of every target, in nats, and how often it was scored."""

    def __init__(
        self, forward: Callable, val: ValData, dist: Dist, windowing: Windowing, label: str
    ):
        self.forward = forward
        self.val = val
        self.dist = dist
        self.seq_len = windowing.seq_len
        self.stride = windowing.stride
        self.batch_size = windowing.batch_size
        self.num_targets = len(val.tokens) - 1
        windows = scoring_windows(self.num_targets, self.seq_len, self.stride)
        self.windows = windows.to(dist.device)
        self.sums = torch.zeros(2, self.num_targets + 1, device=dist.device)  # last: padding

        # Ranks share whole batches, so that a window has the same neighbours at any world size.
        batch = torch.arange(len(windows), device=dist.device) // self.batch_size
        self.share = self.windows[batch % dist.world_size == dist.rank]
        self.progress = Progress(label, len(self.share), dist.rank)
        self.started = time.perf_counter()

    def batch(
        self, windows: Tensor, stride: int, size: int
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Return inputs (B, T), targets, scored positions, None = all, and loss columns, (B, S)."""
        # Empty windows fill up to `size`. A window's last input is repeated: no later one is read.
        start, first, end = F.pad(windows, (0, 0, 0, size - len(windows))).T[..., None]
        positions_BT = start + torch.arange(self.seq_len, device=windows.device)
        positions_BT = positions_BT.minimum(end - 1).clamp(min=0)
        targets_BS = first + torch.arange(stride, device=windows.device)
        columns_BS = torch.where(targets_BS < end, targets_BS, self.num_targets)
        targets_BS = targets_BS.minimum(end - 1).clamp(min=0)
        scored_BS = None if stride == self.seq_len else targets_BS - start
        input_ids = self.val.tokens[positions_BT].long()
        target_ids = self.val.tokens[targets_BS + 1].long()
        return input_ids, target_ids, scored_BS, columns_BS

    @torch.no_grad()
    def score(self, windows: Tensor) -> None:
        """Score windows (W, 3), in batches of one shape."""
        for batch in windows.split(self.batch_size):
            input_ids, target_ids, scored, columns = self.batch(batch, self.stride, self.batch_size)
            nll_BS = self.forward(input_ids, target_ids, reduction="none", scored=scored)
            once_BS = torch.ones_like(nll_BS)
            self.sums.index_add_(1, columns.flatten(), torch.stack([nll_BS, once_BS]).flatten(1))
            self.progress.update(self.progress.done + len(batch))

    def total(self, finished: bool = True) -> Score:
        """Add up all ranks' losses; this one's so far unless `finished`. Raises ConfigError."""
        sums = self.dist.all_sum(self.sums) if finished else self.sums
        nll, times = sums[:, :-1]
        once = times == 1
        count = int(once.sum())
        if finished:
            assert count == self.num_targets, f"{self.num_targets - count} targets not scored once"
        # In float64 and in the order of the text, whatever the ranks and batches.
        nats = nll[once].double().sum().item()
        scored_bytes = int(self.val.target_bytes[once].sum())
        is_valid = math.isfinite(nats) and scored_bytes > 0
        require(is_valid, f"{self.progress.label}: total loss {nats} over {scored_bytes} bytes")
        seconds = time.perf_counter() - self.started
        partial = self.val.partial or not finished
        bpb = nats / math.log(2) / scored_bytes
        return Score(nats / count, bpb, count, scored_bytes, seconds, partial)


def evaluate(forward: Callable, val: ValData, hp: Hyperparameters, dist: Dist, label: str) -> Score:
    """Validate plainly, in windows of TRAIN_SEQ_LEN without overlap. Raises ConfigError."""
    seq_len = hp.model.train_seq_len
    windowing = Windowing(seq_len, seq_len, max(1, hp.micro_batch_tokens // seq_len))
    scorer = Scorer(forward, val, dist, windowing, label)
    with scorer.progress:
        scorer.score(scorer.share)
    return scorer.total()


# ---- Training ------------------------------------------------------------------------------------

WARMUP_STEPS = 3  # per graph, where there is something to compile or to load


class Gradients:
    """The loss and all gradients as views of one buffer: one all-reduce, norm and memset a step."""

    def __init__(self, model: GPT, dist: Dist):
        self.dist = dist
        params = list(model.parameters())
        padded = [math.ceil(p.numel() / 64) * 64 for p in params]  # aligned for vector loads
        starts = np.cumsum([64, *padded]).tolist()
        self.flat = torch.zeros(starts[-1], device=dist.device)
        for p, start in zip(params, starts, strict=False):
            p.grad = self.flat[start : start + p.numel()].view_as(p)

    def average_and_clip(self, max_norm: float) -> None:
        """Average over ranks; then shrink the gradients to an L2 norm of at most `max_norm`."""
        self.dist.all_sum(self.flat).div_(self.dist.world_size)
        if max_norm:
            gradients = self.flat[64:]
            norm = gradients.norm()
            # An infinite norm would make every gradient zero; as NaN it ends the run.
            norm = norm.where(norm.isfinite(), math.nan)
            gradients.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def train_step(
    forward: Callable,
    optimizers: list[torch.optim.Optimizer],
    gradients: Gradients,
    batches: list[tuple[Tensor, Tensor]],
    max_norm: float,
    looped: bool = True,
    weights: contextlib.AbstractContextManager | None = None,
) -> Tensor:
    """Take a step on gradients of micro-batches inside `weights`. Returns all ranks' mean loss."""
    gradients.flat.zero_()
    with weights or contextlib.nullcontext():
        for input_ids, target_ids in batches:
            loss = forward(input_ids, target_ids, looped=looped) / len(batches)
            loss.backward()
            gradients.flat[0] += loss.detach()
    gradients.average_and_clip(max_norm)
    for optimizer in optimizers:
        optimizer.step()
    return gradients.flat[0].clone()


def warm_up(
    forward: Callable, model: GPT, optimizers: list, gradients: Gradients, loader: TokenLoader
) -> None:
    """Compile both graphs on random tokens; weights and optimizer states are restored."""
    hp = loader.hp
    generator = torch.Generator().manual_seed(0)
    weights = copy.deepcopy(model.state_dict())
    states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    shape = (2, loader.num_sequences, hp.model.train_seq_len)
    for looped in sorted({hp.loop_is_on(0.0), True}):
        for _ in range(WARMUP_STEPS):
            tokens = torch.randint(hp.model.vocab_size, shape, generator=generator)
            batch = tuple(tokens.to(loader.dist.device))
            inside = rounded(hp, model, hp.uses_qat)
            train_step(forward, optimizers, gradients, [batch], hp.grad_clip_norm, looped, inside)
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)


def timing(seconds: float, steps: int) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(steps, 1):.2f}ms"


@dataclass
class Progression:
    """Where a training stands; goes into checkpoints."""

    step: int = 0  # optimizer steps done
    elapsed: float = 0.0  # s of training
    averaged: int = 0  # steps that the average holds


class Clock:
    """Training time, s, the same on all ranks; stops for validation, and says when to end."""

    def __init__(self, hp: Hyperparameters, dist: Dist, now: Progression):
        self.hp = hp
        self.dist = dist
        self.now = now
        self.cap = hp.max_wallclock_seconds - hp.gptq_seconds or math.inf
        self.started = dist.synchronize() - now.elapsed
        self.signalled = 0  # number of a signal that any rank has received
        self.caught = 0  # by this one
        self.handlers = [signal.signal(number, self.catch) for number in SIGNALS]

        self.step_ends = collections.deque()  # events of a GPU that may be still to come

        # Steps that have to end inside the cap: the next, and two by which the host may be ahead
        # of a GPU; with recurrence each of them may be as much longer as there are layers more.
        order = hp.model.execution_order(True)
        self.ahead = (1 if dist.device.type == "cpu" else 3) * len(order) / hp.model.num_layers

    def catch(self, number: int, frame: object) -> None:
        """Note a signal, to end with the step."""
        self.caught = self.caught or number

    def release(self) -> None:
        """Give the signals back to their handlers, and end the time of training."""
        for number, handler in zip(SIGNALS, self.handlers, strict=True):
            signal.signal(number, handler)
        (self.now.elapsed,) = self.dist.all_max(self.dist.synchronize() - self.started)

    def tick(self) -> None:
        """Agree with all ranks on time and signals. Raises ConfigError if the time went back."""
        # What a GPU has still to do is no more than two steps.
        if self.dist.device.type == "cuda":
            self.step_ends.append(torch.cuda.Event())
            self.step_ends[-1].record()
            if len(self.step_ends) > 2:
                self.step_ends.popleft().synchronize()

        before = self.now.elapsed
        here = time.perf_counter() - self.started
        self.now.elapsed, self.signalled = self.dist.all_max(here, self.caught)
        back = before - self.now.elapsed
        require(back <= 0, f"the clock went back by {back:.1f} s at step {self.now.step}: stopped")

    def is_over(self) -> bool:
        """Tell whether another step might not end inside the cap."""
        step = self.now.step
        return step > 0 and self.now.elapsed * (1 + self.ahead / step) > self.cap

    def frac(self) -> float:
        """Return the fraction of the budget that is used."""
        return max(self.now.elapsed / self.cap, self.now.step / self.hp.iterations)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stop for what does not count as training."""
        since = self.dist.synchronize()
        yield
        self.started += self.dist.synchronize() - since


class Checkpoints:
    """logs/<RUN_ID>.step<N>.pt: all that the next step depends on, at any world size."""

    def __init__(
        self, log: Log, model: GPT, optimizers: list, average: list[Tensor], loader: TokenLoader
    ):
        self.log = log
        self.model = model
        self.optimizers = optimizers
        self.average = average
        self.hp = loader.hp
        self.is_main = loader.dist.rank == 0
        self.last = Progression()
        run = {"seed": self.hp.seed, "train_batch_tokens": self.hp.train_batch_tokens}
        self.fixed = vars(self.hp.model) | run | {"train_windows": loader.num_windows}

    def found(self) -> list[Path]:
        """Return this run's checkpoints, oldest first."""
        return sorted(LOG_FOLDER.glob(f"{self.hp.run_id}.step{'[0-9]' * 8}.pt"))

    def save(self, now: Progression, at_once: bool) -> None:
        """Save if CHECKPOINT_EVERY has passed or `at_once`. Raises ConfigError."""
        every = self.hp.checkpoint_every
        if not every or now.step == self.last.step:
            return
        passed = now.step - self.last.step
        if every.endswith("s"):
            passed = now.elapsed - self.last.elapsed
        if passed >= int(every.rstrip("s")) or at_once:
            self.write(now)

    def write(self, now: Progression) -> None:
        """Save now, whatever CHECKPOINT_EVERY says; keep two. Raises ConfigError."""
        path = LOG_FOLDER / f"{self.hp.run_id}.step{now.step:08d}.pt"
        if self.is_main:
            tensors = [*self.model.state_dict().values(), *self.average]
            for optimizer in self.optimizers:
                for state in optimizer.state.values():
                    tensors += state.values()
            is_finite = all(bool(tensor.isfinite().all()) for tensor in tensors)
            where = f"at step {now.step}: stopped, {path} not written"
            require(is_finite, f"weights or moments are not finite {where}")
            # No step draws from an RNG, and the order of the data follows from SEED and the step.
            saved = {"fixed": self.fixed, "now": vars(now), "model": self.model.state_dict()}
            saved["average"] = self.average
            saved["optimizers"] = [o.state_dict()["state"] for o in self.optimizers]
            file = io.BytesIO()
            torch.save(saved, file)
            write_atomically(path, file.getbuffer())
            for old in self.found()[:-2]:
                if old != path:  # damaged ones of a later step may be there
                    old.unlink()
        self.last = replace(now)
        every = self.hp.checkpoint_every or 1
        again = f"the same command with RUN_ID={self.hp.run_id} CHECKPOINT_EVERY={every}"
        self.log(f"checkpoint:{path} train_time:{1000 * now.elapsed:.0f}ms (to go on: {again})")

    def resume(self) -> Progression:
        """Load RUN_ID's newest intact checkpoint, if there is one. Raises ConfigError."""
        found = self.found()
        if not found:
            return Progression()
        goes_on = self.hp.checkpoint_every != ""
        require(goes_on, f"{found[-1]} is there: CHECKPOINT_EVERY goes on, another RUN_ID begins")
        flaws = []
        for path in reversed(found):
            try:
                # All of the file is read and checked, which torch.load does not, before a change.
                with zipfile.ZipFile(path) as archive:
                    damaged = archive.testzip()
                if damaged:
                    raise ValueError(f"{damaged} does not match its checksum")
                saved = torch.load(path, map_location="cpu", weights_only=True)
                fixed = saved["fixed"]
                other = [name for name in self.fixed if fixed[name] != self.fixed[name]]
                stated = [f"{name.upper()}={fixed[name]}, now {self.fixed[name]}" for name in other]
                require(not other, f"{path} is of another run: {'; '.join(stated)}")
                self.last = Progression(**saved["now"])
                self.model.load_state_dict(saved["model"])
                for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
                    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
                torch._foreach_copy_(self.average, saved["average"])
            except (ConfigError, MemoryError):
                raise
            except Exception as error:  # a file can be damaged in many ways
                reason = (str(error) or type(error).__name__).splitlines()[0]
                flaws.append(f"{path}: damaged checkpoint ({reason})")
                self.log(f"warning: {flaws[-1]}")
                continue
            spent = 1000 * self.last.elapsed
            self.log(f"resumed:{path} step:{self.last.step} train_time:{spent:.0f}ms")
            return replace(self.last)
        raise ConfigError("; ".join(flaws))


def train(
    hp: Hyperparameters, dist: Dist, log: Log, model: GPT, loader: TokenLoader, val: ValData
) -> tuple[Progression, Checkpoints]:
    """Train until ITERATIONS or the wall-clock cap; leave averaged weights in `model`."""
    compiles = can_compile(hp, dist.device)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiles else model
    optimizers = build_optimizers(hp, model, dist)
    gradients = Gradients(model, dist)
    weights = [p.detach() for p in model.parameters()]
    average = [p.clone() for p in weights]
    checkpoints = Checkpoints(log, model, optimizers, average, loader)
    now = checkpoints.resume()
    # A rank that could not read the newest would go on from the one before.
    newest, minus_oldest = dist.all_max(now.step, -now.step)
    others = f"the ranks read checkpoints of steps {-minus_oldest:.0f} and {newest:.0f}"
    require(newest == -minus_oldest, others)

    accum_steps = hp.grad_accum_steps(dist.world_size)
    loader.position = now.step * hp.train_batch_tokens // hp.model.train_seq_len

    # What is compiled, or first used on a GPU, is so before the clock starts.
    warmup_steps = WARMUP_STEPS if compiles or dist.device.type == "cuda" else 0
    started = dist.synchronize()
    if warmup_steps:
        with Progress("compile and warm up", 1, dist.rank):
            warm_up(forward, model, optimizers, gradients, loader)
    log(
        f"warmup_step:{warmup_steps}/{warmup_steps} random tokens, undone, "
        f"{dist.synchronize() - started:.1f}s compile:{'fullgraph' if compiles else 'off'} "
        f"grad_accum_steps:{accum_steps}"
    )

    clock = Clock(hp, dist, now)
    looped = hp.loop_is_on(0.0)
    rounds = False
    fiftieths = 0  # of the budget, when a line was last logged
    with Progress("train", 1.0, dist.rank) as progress:
        while True:
            clock.tick()
            ended = clock.is_over() or now.step == hp.iterations
            checkpoints.save(now, at_once=ended or clock.signalled > 0)
            if clock.signalled:
                saved = f"CHECKPOINT_EVERY={hp.checkpoint_every or 'off: nothing saved'}"
                log(f"interrupted after step {now.step}, {saved}")
                raise KeyboardInterrupt(int(clock.signalled))
            if ended:
                break

            if hp.val_loss_every and now.step and now.step % hp.val_loss_every == 0:
                with clock.paused(), rounded(hp, model, rounds):
                    score = evaluate(partial(model, looped=looped), val, hp, dist, "validate")
                    log(f"step:{now.step}/{hp.iterations} {score} {timing(now.elapsed, now.step)}")

            frac = clock.frac()
            if hp.loop_is_on(frac) and not looped:
                looped = True
                order = hp.model.execution_order(True)
                log(f"layer_loop:enabled step:{now.step} frac:{frac:.3f} order:{order}")
            if hp.uses_qat and frac >= hp.qat_from and not rounds:
                rounds = True
                log(f"qat:enabled step:{now.step} frac:{frac:.3f}")
            scale = set_schedules(hp, optimizers, frac)
            batches = [loader.next_batch() for _ in range(accum_steps)]
            inside = rounded(hp, model, rounds)
            loss = train_step(
                forward, optimizers, gradients, batches, hp.grad_clip_norm, looped, inside
            )
            newest = average_weight(hp, frac, now.averaged)
            if newest:
                torch._foreach_lerp_(average, weights, newest)
                now.averaged += 1
            now.step += 1

            # Reading the loss makes a GPU wait, so there it is read for about fifty lines alone.
            is_logged = now.step <= 10 or now.step == hp.iterations or int(50 * frac) > fiftieths
            fiftieths = int(50 * frac)
            if is_logged or dist.device.type == "cpu":
                last_loss = loss.item()
                stopped = f"training loss is {last_loss} at step {now.step}: stopped"
                require(math.isfinite(last_loss), f"{stopped}, nothing exported")
            spent = time.perf_counter() - clock.started
            rate = now.step * hp.train_batch_tokens / spent
            speed = f"{timing(spent, now.step)} lr_scale:{scale:.3f} tok/s: {rate:.0f}"
            if is_logged:
                log(f"step:{now.step}/{hp.iterations} train_loss:{last_loss:.6f} {speed}")
            progress.update(frac, f"step {now.step} {speed}")

    clock.release()
    if now.step < hp.iterations:
        milliseconds = f"train_time:{1000 * now.elapsed:.0f}ms"
        log(f"stopping_early: wallclock_cap {milliseconds} step:{now.step}/{hp.iterations}")
    if now.averaged:
        torch._foreach_copy_(weights, average)
    return now, checkpoints


@torch.no_grad()
def collect_hessians(
    hp: Hyperparameters, dist: Dist, log: Log, model: GPT, loader: TokenLoader
) -> tuple[dict[str, Tensor], float]:
    """Return second moments X^T X of each matrix's input, (C, C), or (E, C, C) by expert, and s."""
    if not hp.uses_gptq:
        return {}, 0.0
    hessians: dict[str, Tensor] = {}

    def moments(x: Tensor) -> Tensor:
        x = x.flatten(0, -2).float()
        return x.mT @ x

    def add(name: str, new: Tensor) -> None:
        hessians[name] = hessians.get(name, 0) + new

    def observe(name: str, module: nn.Module, args: tuple) -> None:
        """Add what reaches a module before its forward pass."""
        if isinstance(module, CastedLinear):
            add(f"{name}.weight", moments(args[0]))
        elif isinstance(module, TokenRoutedMLP) and module.config.is_routed:
            x, route = args
            share_BTE, _ = module.choose(x, route)
            add(f"{name}.up.weight", moments(x))
            add(f"{name}.down.weight", moments(module.hidden(x, share_BTE)))
            by_expert = [moments(x[share_BT > 0]) for share_BT in share_BTE.unbind(-1)]
            add(f"{name}.expert_up", torch.stack(by_expert))

    # The masked dispatch, as only that has all hidden units side by side.
    with torch.device("meta"):
        observed = GPT(replace(hp.model, dispatch="masked"), model.dtype)
    observed.load_state_dict(model.state_dict(), assign=True)
    observed.use_attention(model.blocks[0].attn.attend)
    for name, module in observed.named_modules():
        module.register_forward_pre_hook(partial(observe, name))

    started = dist.synchronize()
    batches = 0
    elapsed = 0.0
    # Stops after GPTQ_BATCHES training micro-batches or, under a cap, when their time is over.
    # A tenth of it is kept for adding up what the ranks have.
    reserve = 0.9 * hp.gptq_seconds if hp.max_wallclock_seconds else math.inf
    with Progress("collect Hessians", hp.gptq_batches, dist.rank) as progress:
        while batches * dist.world_size < hp.gptq_batches:
            if elapsed * (1 + 1 / max(batches, 1)) >= reserve:
                break
            input_ids, _ = loader.next_batch()
            add("tok_emb.weight", moments(observed.features(input_ids)[0]))
            batches += 1
            (elapsed,) = dist.all_max(dist.synchronize() - started)
            progress.update(batches * dist.world_size)

    tokens = batches * dist.world_size * loader.num_sequences * hp.model.train_seq_len
    log(f"gptq: {len(hessians)} Hessians over {tokens} training tokens in {elapsed:.1f}s")
    for name in sorted(hessians):
        dist.all_sum(hessians[name])
    return hessians, dist.synchronize() - started


# ---- Main ----------------------------------------------------------------------------------------


def log_provenance(log: Log, hp: Hyperparameters, dist: Dist, environ: dict[str, str]) -> None:
    """Log what repeats the run: source, versions, hardware, knobs; and likely typos."""
    folder = Path(__file__).resolve().parent
    command = ["git", "describe", "--always", "--dirty"]
    try:
        told = subprocess.run(command, cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:
        told = ""
    source = Path(__file__).read_text(encoding="utf-8")
    log(source + "=" * 100 + "\n" + subprocess.getoutput("nvidia-smi"), echo=False)
    versions = f"torch:{torch.__version__} numpy:{np.__version__}"
    log(f"python:{sys.version.split()[0]} {versions} commit:{told or 'unknown'}")
    log(f"code_sha256:{hashlib.sha256(submission_source()).hexdigest()}")

    values = hp.values()
    log("\n".join(f"  {name}: {value}" for name, value in values.items()), echo=False)
    defaults = Hyperparameters().values()
    changed = [f"{name.upper()}={v}" for name, v in values.items() if v != defaults[name]]
    threads = torch.get_num_threads()
    log(f"device:{dist.device} threads:{threads} overrides: {' '.join(changed) or 'none'}")
    warn_of_typos(log, environ, values)


def warn_of_typos(log: Log, environ: dict[str, str], knobs: Iterable[str]) -> None:
    """Log which variables of the environment are almost a knob."""
    names = [name.upper() for name in knobs]
    for name in sorted(set(environ) - set(names)):
        for match in difflib.get_close_matches(name, names, n=1, cutoff=0.85):
            log(f"warning: {name} is not a knob; did you mean {match}?")


def estimate(hp: Hyperparameters, model: GPT, log: Log) -> None:
    """Log what the artifact will take. Raises ConfigError where it cannot be made or fit."""
    if find_brotli() is None:
        log("brotli is not installed: zstd alone, a larger file")
    with Progress("estimate the artifact", 1):
        expected = dry_run(hp, model)
    _, total = submission_bytes(hp, len(expected.artifact), "dry run")
    log(f"{budget_table(expected)}\ndry run: {total} bytes of code + model expected")


def export(
    hp: Hyperparameters, dist: Dist, log: Log, state: dict, hessians: dict, tokenizer_sha256: str
) -> Path:
    """Write the artifact from rank 0. Raises ConfigError at the cap, or when it cannot."""
    path = LOG_FOLDER / f"{hp.run_id}.ptz"
    if dist.rank == 0:
        started = time.perf_counter()
        with Progress("quantize and compress", 1):
            fitted = fit(hp, state, tokenizer_sha256, hessians)
        code_bytes, total = submission_bytes(hp, len(fitted.artifact), "artifact")
        write_atomically(path, fitted.artifact)
        for name in fitted.unusable:
            flaw = "is not finite or not positive definite: rounded to nearest"
            log(f"warning: the Hessian of {name} {flaw}")
        log(budget_table(fitted))
        log(f"export_time:{time.perf_counter() - started:.1f}s")
        log(f"Serialized model quantized+auto: {total - code_bytes} bytes")
        log(f"Code size: {code_bytes} bytes")
        log(f"Total submission size quantized+auto: {total} bytes")
    dist.synchronize()
    return path


def main() -> None:
    """Read the knobs, train, export, score the reloaded artifact, and log one JSON line."""
    arguments = " ".join(sys.argv[1:])
    require(not arguments, f"{arguments}: no arguments; knobs are environment variables")
    hp = Hyperparameters.from_env(os.environ)
    dist = Dist.from_torchrun()
    (seconds,) = dist.all_max(time.time())
    now = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    hp = replace(hp, run_id=hp.run_id or now.strftime("%Y-%m-%dT%H%M%S.%f")[:-3])
    log = Log(dist, LOG_FOLDER / f"{hp.run_id}.txt")
    if dist.rank == 0:
        log_provenance(log, hp, dist, os.environ)

    # All that can be refused is, before the training.
    loader = TokenLoader(hp, dist)
    val = ValData.load(hp, dist.device)
    model = GPT(hp.model, hp.torch_dtype)
    model.init_weights(hp.seed)
    compiles = can_compile(hp, dist.device)
    choose_attention(hp.attention, model, dist.device, log, compiles)
    counts = np.bincount(loader.sample(), minlength=hp.model.vocab_size)
    table = build_expert_table(hp.model, counts)
    if dist.rank > 0:  # all get that of rank 0, by a sum
        table.zero_()
    model.expert_table.copy_(dist.all_sum(table))
    params = sum(p.numel() for p in model.parameters())
    log(f"model_params:{params} world_size:{dist.world_size} seed:{hp.seed}")
    shards = f"train_shards:{len(loader.paths)} windows:{loader.num_windows}"
    log(f"train_loader:dataset:{hp.dataset_dir.name} {shards}")
    val_pattern = f"{hp.dataset_dir}/fineweb_val_*.bin"
    log(f"val_loader:shards pattern={val_pattern} tokens:{len(val.tokens) - 1}")
    if val.partial:
        log(f"warning: the validation split lacks {val.lacks}: scores are PARTIAL")
    if dist.rank == 0:
        estimate(hp, model, log)

    torch.set_float32_matmul_precision("high")
    done, checkpoints = train(hp, dist, log, model.to(dist.device), loader, val)
    with rounded(hp, model, hp.uses_qat):
        hessians, gptq_seconds = collect_hessians(hp, dist, log, model, loader)
        log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
        before = evaluate(model, val, hp, dist, "validate")
    seconds = done.elapsed + gptq_seconds
    if 0 < hp.max_wallclock_seconds < seconds:
        log(f"warning: the training took {seconds:.2f} s, more than MAX_WALLCLOCK_SECONDS")
    log(f"step:{done.step}/{hp.iterations} {before} {timing(seconds, done.step)}")
    log(f"pre-quantization post-{hp.average} {before} eval_time:{1000 * before.seconds:.0f}ms")
    try:
        path = export(hp, dist, log, model.state_dict(), hessians, val.tokenizer_sha256)
    except Exception:
        # What the clock has paid for is kept; if it cannot be, the first error says more.
        with contextlib.suppress(ConfigError):
            checkpoints.write(done)
        raise
    reloaded, _, _ = load_artifact(path, hp, dist.device)
    reloaded.use_attention(model.blocks[0].attn.attend)
    after = evaluate(reloaded, val, hp, dist, "validate the artifact")
    log(f"quantized {after} eval_time:{1000 * after.seconds:.0f}ms")
    log(f"final_roundtrip_exact {after}")

    code_bytes, total = submission_bytes(hp, path.stat().st_size, "artifact")
    summary = {
        "event": "train_summary",
        "run_id": hp.run_id,
        "artifact_path": str(path),
        "partial": val.partial,
        "val_bpb_float": None if val.partial else before.bpb,
        "val_bpb": None if val.partial else after.bpb,
        "val_loss": after.val_loss,
        "train_seconds": seconds,
        "tokens": done.step * hp.train_batch_tokens,
        "params": params,
        "steps": done.step,
        "bytes_code": code_bytes,
        "bytes_model": total - code_bytes,
        "bytes_total": total,
    }
    log(json.dumps(summary))


if __name__ == "__main__":
    run_entry_point(main)
