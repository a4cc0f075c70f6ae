"""Train, export and score a token-routed Mixture-of-Experts language model for Parameter Golf, in one file.

Every token id owns one narrow expert per layer, by a table that is frozen before the first step, beside a wide shared
expert. Routing is therefore exact, causal and independent of the rest of the batch. The artifact (int6, compressed) and
the code stay under 16,000,000 bytes together; eval_sliding.py scores it, run_8xh100.sh holds the hardware profiles.

    python train_gpt.py                                        # one process, any device
    torchrun --standalone --nproc_per_node=8 train_gpt.py      # the record: 8xH100, 600 s
    ITERATIONS=10 TRAIN_BATCH_TOKENS=4096 TRAIN_SEQ_LEN=256 python train_gpt.py    # smoke
"""

import copy
import datetime
import difflib
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import sentencepiece as spm
import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

SHARD_MAGIC, SHARD_VERSION, SHARD_HEADER_INTS = 20240520, 1, 256  # the challenge's .bin header, shared with llm.c
MAX_SUBMISSION_BYTES = 16_000_000  # code + compressed model, decimal

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
    device: str = "auto"  # auto | cuda | mps | cpu
    dtype: str = "bfloat16"  # of activations and matmuls: bfloat16 | float32; master weights are always float32
    compile: bool = True  # torch.compile with fullgraph where a compiler is installed; 0 = eager
    save_checkpoint: bool = False  # also write the averaged float32 weights to logs/<RUN_ID>.pt
    # -- data
    data_path: str = ""  # folder of shards; "" = data/datasets/fineweb10B_sp<VOCAB_SIZE>
    tokenizer_path: str = ""  # SentencePiece model; "" = data/tokenizers/fineweb_<VOCAB_SIZE>_bpe.model
    train_batch_tokens: int = 786_432  # tokens per optimizer step, over all ranks
    micro_batch_tokens: int = 98_304  # tokens per forward pass and rank, at most; gradient accumulation does the rest
    val_max_tokens: int = 0  # targets to score; 0 = the whole split, fewer than that is reported as PARTIAL
    # -- training length
    iterations: int = 20_000  # optimizer steps, at most
    max_wallclock_seconds: float = 600.0  # s of training, without warm-up and validation; 0 = ITERATIONS alone decides
    warmup_steps: int = 3  # steps on random tokens that compile everything before the clock and are undone; 0 = off
    train_log_every: int = 200  # steps
    val_loss_every: int = 0  # steps; 0 = validate at the end only
    # -- model: from here to mu_rank, what the artifact carries
    vocab_size: int = 8192  # V
    train_seq_len: int = 2048  # T, tokens
    num_layers: int = 11  # L
    model_dim: int = 512  # D
    num_heads: int = 8  # H
    num_kv_heads: int = 4  # each shared by NUM_HEADS / NUM_KV_HEADS query heads
    rope_dims: int = 16  # rotated dimensions of every head, even; 0 = no position signal
    qk_gain_init: float = 5.0  # initial scale of the normalised queries, learned per head
    xsa: bool = True  # take out of each head's result its component along the token's own value; 0 = off
    activation: str = "leaky_relu2"  # leaky_relu2 | relu2 | swiglu (two rows of the up projection per hidden unit)
    routing: str = "zipf"  # token id -> expert: zipf | hash | modulo | dense (no experts, an MLP of the same width)
    dispatch: str = "masked"  # masked: one GEMM and a block mask | grouped: sort by expert, one GEMM per expert
    num_experts: int = 4  # E, routed experts per layer, one of them active per token
    expert_dim: int = 64  # hidden units of each routed expert
    shared_dim: int = 1792  # hidden units of the shared expert
    moe_start_layer: int = 0  # first layer with experts; those before it are dense with the same width
    mu: str = "vector"  # guidance of q, k and v by the layer before: vector | lowrank | full | off
    mu_rank: int = 16  # width of mu for MU=lowrank
    # -- optimizers
    matrix_lr: float = 0.022  # Muon, per update of spectral norm ~1
    embed_lr: float = 0.03  # AdamW, tied embedding
    scalar_lr: float = 0.02  # AdamW, vectors, gains and mu
    muon_momentum: float = 0.97  # reached linearly from 0.85 in the first tenth of the budget
    muon_weight_decay: float = 0.095  # decoupled, times the scheduled LR; 0 = off
    embed_weight_decay: float = 0.085  # decoupled, times the scheduled LR; 0 = off
    grad_clip_norm: float = 0.3  # global L2 norm; 0 = off
    # -- schedule and averaging, in fractions of the budget (wall-clock if capped, else steps)
    schedule: str = "sgdr"  # sgdr: cosine cycles with restarts | linear: constant, then linear warmdown
    sgdr_cycles: int = 2  # each twice as long as the one before, its peak 0.7 times as high; 1 = a single cosine
    warmdown_frac: float = 0.85  # of the budget, for SCHEDULE=linear; 0 = constant
    min_lr: float = 0.1  # floor of both schedules as a fraction of the peak
    average: str = "ema"  # ema: over all steps | swa: equal weights from SWA_START_FRAC on | off
    ema_decay: float = 0.9965  # per step, warmed up as (1 + t) / (10 + t)
    swa_start_frac: float = 0.85  # of the budget; must lie inside the last descent
    # -- export and sliding-window evaluation
    matrix_bits: int = 6  # of matrices and experts
    embed_bits: int = 7  # of the tied embedding
    matrix_clip: float = 12.85  # k: quantization step = k * std(row) / (2^(bits-1) - 1); larger = smaller file
    embed_clip: float = 15.0  # k of the embedding
    codec: str = "auto"  # zstd | brotli | auto (the smaller of both)
    eval_stride: int = 64  # for eval_sliding.py: targets scored per window after the first
    eval_seq_len: int = 0  # for eval_sliding.py: window, tokens; 0 = TRAIN_SEQ_LEN

    @classmethod
    def from_env(cls, environ: dict[str, str]) -> "Hyperparameters":
        """Read and validate all knobs. Raises Refusal naming the variable and the value."""
        values = {}
        for f in (f for f in fields(cls) if f.name.upper() in environ):
            text, kind = environ[f.name.upper()], type(f.default)
            try:
                values[f.name] = {"0": False, "1": True}[text] if kind is bool else kind(text)
            except (KeyError, ValueError):
                kind_name = "0 or 1" if kind is bool else kind.__name__
                raise Refusal(f"{f.name.upper()}={text!r}: expected {kind_name}") from None
        hp = cls(**values)
        hp.validate()
        return hp

    @property
    def head_dim(self) -> int:
        return self.model_dim // self.num_heads

    @property
    def routed_layers(self) -> range:
        return range(0) if self.routing == "dense" else range(self.moe_start_layer, self.num_layers)

    @property
    def dataset_dir(self) -> Path:
        return Path(self.data_path or f"data/datasets/fineweb10B_sp{self.vocab_size}")

    def grad_accum_steps(self, world_size: int) -> int:
        """Fewest equal micro-batches of whole sequences that respect MICRO_BATCH_TOKENS. Raises Refusal."""
        sequences, rest = divmod(self.train_batch_tokens, world_size * self.train_seq_len)
        batch = f"TRAIN_BATCH_TOKENS={self.train_batch_tokens} TRAIN_SEQ_LEN={self.train_seq_len}"
        require(rest == 0, f"{batch}: not a whole number of sequences on each of {world_size} ranks")
        fewest = min(math.ceil(sequences * self.train_seq_len / self.micro_batch_tokens), sequences)
        return next(n for n in range(fewest, sequences + 1) if sequences % n == 0)

    def validate(self) -> None:
        """All checks of single knobs and between knobs. Raises Refusal naming the variable and the value."""
        for f in fields(self):
            value, kind, choices = getattr(self, f.name), type(f.default), CHOICES.get(f.name)
            low, high = RANGES.get(f.name, (1, 2**63 - 1) if kind is int else (0, math.inf))
            expected = f"one of {choices}" if choices else f"a finite number from {low} to {high}"
            ok = type(value) is kind and (choices is None or value in choices.split())
            ok = ok and (kind not in (int, float) or (low <= value <= high and math.isfinite(value)))
            require(ok, f"{f.name.upper()}={value!r}: expected {expected}")

        def check(condition: bool, names: str, rule: str) -> None:
            require(condition, " ".join(f"{n.upper()}={getattr(self, n)}" for n in names.split()) + f": {rule}")

        grouped, window = self.dispatch == "grouped" and self.routed_layers, self.eval_seq_len or self.train_seq_len
        descent = sgdr_bounds(self.sgdr_cycles)[-2] if self.schedule == "sgdr" else 1 - self.warmdown_frac
        swa_fits = self.average != "swa" or descent <= self.swa_start_frac < 1
        check(re.fullmatch(r"[\w.+-]*", self.run_id) is not None, "run_id", "letters, digits and . _ + - only")
        check(self.model_dim % self.num_heads == 0, "model_dim num_heads", "the heads must divide the width")
        check(self.num_heads % self.num_kv_heads == 0, "num_heads num_kv_heads", "kv heads must divide the heads")
        check(self.rope_dims in range(0, self.head_dim + 1, 2), "rope_dims", f"must be even, at most {self.head_dim}")
        check(self.moe_start_layer < self.num_layers, "moe_start_layer num_layers", "leaves no layer to route")
        check(self.eval_stride <= window, "eval_stride", f"above the window of {window} tokens")
        check(not grouped or hasattr(F, "grouped_mm"), "dispatch", f"needs torch >= 2.10, this is {torch.__version__}")
        eights = (self.expert_dim | self.model_dim) % 8 == 0
        check(not grouped or eights, "expert_dim model_dim", "DISPATCH=grouped needs multiples of 8")
        check(swa_fits, "swa_start_frac", f"must lie inside the last descent, {descent:.3f} to 1")
        self.grad_accum_steps(1)

CHOICES = {"device": "auto cuda mps cpu", "dtype": "bfloat16 float32", "activation": "leaky_relu2 relu2 swiglu"}
CHOICES |= {"routing": "zipf hash modulo dense", "dispatch": "masked grouped", "mu": "vector lowrank full off"}
CHOICES |= {"schedule": "sgdr linear", "average": "ema swa off", "codec": "auto zstd brotli"}
RANGES = {"vocab_size": (4, 65_536), "num_experts": (1, 256), "sgdr_cycles": (1, 16), "seed": (0, 2**63 - 1)}
RANGES |= dict.fromkeys(["muon_momentum", "warmdown_frac", "min_lr", "ema_decay", "swa_start_frac"], (0, 1))
RANGES |= dict.fromkeys(["warmup_steps", "val_loss_every", "val_max_tokens", "eval_seq_len"], (0, 2**63 - 1))
RANGES |= dict.fromkeys(["model_dim", "expert_dim", "shared_dim", "mu_rank"], (1, 65_536)) | {"num_layers": (1, 1024)}
RANGES |= {"rope_dims": (0, 65_536), "moe_start_layer": (0, 1024), "matrix_bits": (2, 8), "embed_bits": (2, 8)}
ALL_KNOBS = [f.name for f in fields(Hyperparameters)]
MODEL_KNOBS = ALL_KNOBS[ALL_KNOBS.index("vocab_size") : ALL_KNOBS.index("mu_rank") + 1]

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
        alone = (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
        rank, local_rank, world_size = (int(os.environ.get(*default)) for default in alone)
        require(8 % world_size == 0, f"WORLD_SIZE={world_size} does not divide 8")
        count = torch.cuda.device_count()
        available = {"cuda": local_rank < count, "mps": torch.backends.mps.is_available(), "cpu": True}
        kind = next(k for k, ok in available.items() if ok) if device_name == "auto" else device_name
        require(available[kind], f"DEVICE={device_name}: rank {rank} finds no such device ({count} CUDA devices here)")
        device = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        if kind == "cuda":
            torch.cuda.set_device(device)
        if world_size > 1:  # CPU tensors travel over gloo, so that agreeing on the clock never waits for the GPU
            backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10))
        return cls(rank, world_size, device)

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def all_max(self, value: float) -> float:
        """The largest of the ranks' host-side values, without touching the GPU."""
        tensor = torch.tensor(value, dtype=torch.float64)
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor, op=torch.distributed.ReduceOp.MAX)
        return tensor.item()

    def synchronize(self) -> float:
        """Wait for the device and for the other ranks. Returns the time on the host, s."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.all_max(0.0)
        return time.perf_counter()

class Log:
    """Rank 0's log: printed, and appended to `path` so that training and scoring share one file."""
    def __init__(self, dist: Dist, path: Path):
        self.path, self.enabled = path, dist.rank == 0
        path.parent.mkdir(parents=True, exist_ok=True)

    def __call__(self, text: str, echo: bool = True) -> None:
        if self.enabled:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text + "\n")
        if self.enabled and echo:
            print("\r\033[K" * sys.stderr.isatty(), end="", file=sys.stderr, flush=True)
            print(text, flush=True)

class Progress:
    """One updating line with ETA on a terminal; silent elsewhere, and on all ranks but the first."""
    def __init__(self, label: str, total: float, rank: int = 0):
        self.label, self.total, self.started, self.shown = label, total, time.perf_counter(), 0.0
        self.enabled = rank == 0 and sys.stderr.isatty()

    def update(self, done: float, note: str = "") -> None:
        """Redraw at most five times a second; `done` counts in the unit of `total`."""
        now = time.perf_counter()
        if self.enabled and (now - self.shown > 0.2 or done >= self.total):
            self.shown, eta = now, (now - self.started) * max(self.total - done, 0) / max(done, 1e-9)
            line = f"{self.label} {done / max(self.total, 1e-9):4.0%} ETA {eta:.0f}s {note}"
            print(f"\r{line[:118]:<118}", end="\n" if done >= self.total else "", file=sys.stderr, flush=True)

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
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise Refusal(f"cannot write {path}: {error.strerror}") from error

def can_compile(hp: Hyperparameters, device: torch.device) -> bool:
    """Whether torch.compile is wanted and can build kernels: Triton on CUDA, a C++ compiler and Python.h on CPU."""
    if not hp.compile or (hp.dispatch == "grouped" and hp.dtype == "float32"):
        return False  # torch 2.13 traces grouped_mm for bfloat16 only
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    has_headers = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    return device.type == "cpu" and has_headers and any(map(shutil.which, ("g++", "clang++")))

def log_provenance(log: Log, hp: Hyperparameters, dist: Dist, environ: dict[str, str]) -> None:
    """What a reader needs to repeat the run: source, commit, versions, hardware, knobs, overrides, likely typos."""
    here = shlex.quote(str(Path(__file__).resolve().parent))
    commit = subprocess.getoutput(f"git -C {here} describe --always --dirty 2>/dev/null") or "unknown"
    log(Path(__file__).read_text(encoding="utf-8") + "=" * 100 + "\n" + subprocess.getoutput("nvidia-smi"), echo=False)
    log(f"python:{sys.version.split()[0]} torch:{torch.__version__} numpy:{np.__version__} commit:{commit}")
    log("\n".join(f"  {name}: {value}" for name, value in asdict(hp).items()), echo=False)
    changed = [f"{name.upper()}={v}" for name, v in asdict(hp).items() if v != getattr(Hyperparameters, name)]
    log(f"device:{dist.device} threads:{torch.get_num_threads()} overrides: {' '.join(changed) or 'none'}")
    for name in sorted(set(environ) - set(map(str.upper, ALL_KNOBS))):
        for match in difflib.get_close_matches(name, map(str.upper, ALL_KNOBS), n=1, cutoff=0.85):
            log(f"warning: {name} is not a knob; did you mean {match}?")

# ---- Data ------------------------------------------------------------------------------------------------------------
def list_shards(folder: Path, split: str) -> list[Path]:
    """The shards of `split` ("train" or "val") in order, without byte sidecars. Raises Refusal when there are none."""
    require(folder.is_dir(), f"{folder}: no such data folder (DATA_PATH)")
    shards = sorted(p for p in folder.glob(f"fineweb_{split}_*.bin") if not p.name.startswith("fineweb_val_bytes_"))
    require(len(shards) > 0, f"{folder}: no fineweb_{split}_*.bin shards (DATA_PATH)")
    return shards

def load_data_shard(path: Path) -> np.ndarray:
    """Memory-map a shard after checking every header field and the length. Returns (count,) uint16; raises Refusal."""
    header_bytes, size = SHARD_HEADER_INTS * 4, path.stat().st_size
    require(size >= header_bytes, f"{path}: {size} bytes is shorter than the {header_bytes}-byte shard header")
    magic, version, count = map(int, np.fromfile(path, dtype="<i4", count=3))
    require(magic == SHARD_MAGIC, f"{path}: not a shard, magic is {magic} instead of {SHARD_MAGIC}")
    require(version == SHARD_VERSION, f"{path}: shard version {version}, expected {SHARD_VERSION}")
    require(count > 0 and size == header_bytes + 2 * count, f"{path}: {count} tokens do not make {size} bytes")
    return np.memmap(path, dtype="<u2", mode="r", offset=header_bytes, shape=(count,))

def check_vocab(tokens: np.ndarray, vocab_size: int, source: Path) -> np.ndarray:
    """`tokens`, or Refusal when an id lies outside the vocabulary."""
    largest = tokens.max(initial=0)
    require(largest < vocab_size, f"{source}: token id {largest} is outside VOCAB_SIZE={vocab_size}")
    return tokens

class TokenLoader:
    """Endless shuffled training batches in an order that depends on SEED alone. An epoch cuts every shard into windows
    of T + 1 tokens at a random phase; ranks share the windows of a step, the same ones at any world size."""
    def __init__(self, hp: Hyperparameters, dist: Dist):
        self.hp, self.dist, self.paths = hp, dist, list_shards(hp.dataset_dir, "train")
        self.shards = [load_data_shard(path) for path in self.paths]
        windows = [max(len(s) // hp.train_seq_len - 1, 0) for s in self.shards]  # one to spare for the random phase
        self.first_window, self.num_windows = np.cumsum([0, *windows]), sum(windows)
        need = f"two sequences of TRAIN_SEQ_LEN={hp.train_seq_len}"
        require(self.num_windows > 0, f"{hp.dataset_dir}: no training shard holds {need}")
        micro_steps = dist.world_size * hp.grad_accum_steps(dist.world_size)
        self.num_sequences = hp.train_batch_tokens // (hp.train_seq_len * micro_steps)
        self.position, self.epoch = 0, -1
        self.token_counts = np.zeros(hp.vocab_size, np.int64)  # of the inputs that this rank has loaded
        self.pool, self.pending = ThreadPoolExecutor(1) if dist.device.type == "cuda" else None, None

    def count_tokens(self, max_tokens: int = 50_000_000) -> np.ndarray:
        """Occurrences of each id in the first `max_tokens` training tokens, (V,) int64. Raises Refusal."""
        counts = np.zeros(self.hp.vocab_size, np.int64)
        for path, shard in zip(self.paths, self.shards, strict=True):
            tokens = check_vocab(shard[: max_tokens - int(counts.sum())], self.hp.vocab_size, path)
            counts += np.bincount(tokens, minlength=self.hp.vocab_size)
        return counts

    def _window(self, index: int) -> np.ndarray:
        T = self.hp.train_seq_len
        epoch, slot = divmod(index, self.num_windows)
        if epoch != self.epoch:
            rng = np.random.default_rng([self.hp.seed, epoch])
            self.epoch, self.phase, self.order = epoch, int(rng.integers(T)), rng.permutation(self.num_windows)
        window = int(self.order[slot])
        shard = int(np.searchsorted(self.first_window, window, side="right")) - 1
        start = self.phase + (window - int(self.first_window[shard])) * T
        return check_vocab(self.shards[shard][start : start + T + 1], self.hp.vocab_size, self.paths[shard])

    def _load(self) -> Tensor:
        first = self.position + self.dist.rank * self.num_sequences
        self.position += self.dist.world_size * self.num_sequences
        batch = np.stack([self._window(i) for i in range(first, first + self.num_sequences)]).astype(np.int64)
        self.token_counts += np.bincount(batch[:, :-1].ravel(), minlength=self.hp.vocab_size)
        return torch.from_numpy(batch).pin_memory() if self.pool else torch.from_numpy(batch)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a micro-step, each (B, T) int64 on the device; targets are inputs shifted by one."""
        batch = self.pending.result() if self.pending else self._load()
        self.pending = self.pool.submit(self._load) if self.pool else None
        batch = batch.to(self.dist.device, non_blocking=True)
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

def build_sentencepiece_luts(sp: spm.SentencePieceProcessor, vocab_size: int, device: torch.device) -> list[Tensor]:
    """Tables (V,): UTF-8 bytes of a piece but for its space mark; whether it has one; whether one after it is void."""
    base_bytes, (has_space, boundary) = np.zeros(vocab_size, np.int32), np.full((2, vocab_size), [[False], [True]])
    for i in range(sp.vocab_size()):
        if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i)):
            piece = sp.id_to_piece(i)
            boundary[i], has_space[i] = False, piece.startswith("\u2581")
            base_bytes[i] = 1 if sp.is_byte(i) else len(piece.removeprefix("\u2581").replace("\u2581", " ").encode())
    return [torch.from_numpy(table).to(device) for table in (base_bytes, has_space, boundary)]

def load_tokenizer(hp: Hyperparameters) -> tuple[spm.SentencePieceProcessor, str]:
    """The SentencePiece model and the SHA-256 of its file. Raises Refusal when missing, damaged or of another size."""
    path = Path(hp.tokenizer_path or f"data/tokenizers/fineweb_{hp.vocab_size}_bpe.model")
    require(path.is_file(), f"{path}: no such tokenizer (TOKENIZER_PATH)")
    try:
        sp = spm.SentencePieceProcessor(model_proto=path.read_bytes() or b"?")  # an empty file would pass for a model
    except RuntimeError as error:
        raise Refusal(f"{path} is not a SentencePiece model (TOKENIZER_PATH)") from error
    require(sp.vocab_size() == hp.vocab_size, f"{path} has {sp.vocab_size()} pieces, but VOCAB_SIZE={hp.vocab_size}")
    # Without this piece a lone space becomes three byte tokens, which inflates the byte count (upstream issue #897).
    require(not sp.is_unknown(sp.piece_to_id("\u2581")), f"{path} has no U+2581 piece: byte counts would be wrong")
    return sp, hashlib.sha256(path.read_bytes()).hexdigest()

@dataclass(frozen=True)
class ValData:
    """The validation split and the tables that turn its tokens into bytes, on the device."""
    tokens: Tensor  # (targets + 1,) int32
    base_bytes_lut: Tensor
    has_leading_space_lut: Tensor
    is_boundary_token_lut: Tensor
    tokenizer_sha256: str
    partial: bool  # holds fewer targets than the split

    @classmethod
    def load(cls, hp: Hyperparameters, device: torch.device) -> "ValData":
        """Read and check the whole split. Raises Refusal."""
        sp, digest = load_tokenizer(hp)
        paths = list_shards(hp.dataset_dir, "val")
        tokens = np.concatenate([check_vocab(load_data_shard(path), hp.vocab_size, path) for path in paths])
        require(len(tokens) > 1, f"{hp.dataset_dir}: the validation split has no target to score")
        partial = 0 < hp.val_max_tokens < len(tokens) - 1
        tokens = torch.from_numpy(tokens[: hp.val_max_tokens + 1 if partial else None].astype(np.int32))
        return cls(tokens.to(device), *build_sentencepiece_luts(sp, hp.vocab_size, device), digest, partial)

    def token_bytes(self, prev_ids: Tensor, target_ids: Tensor) -> Tensor:
        """UTF-8 bytes that each target adds to the text; a leading space counts unless it follows a boundary token."""
        space = self.has_leading_space_lut[target_ids] & ~self.is_boundary_token_lut[prev_ids]
        return self.base_bytes_lut[target_ids] + space

# ---- Routing ---------------------------------------------------------------------------------------------------------
def mix32(x: np.ndarray) -> np.ndarray:
    """The lowbias32 mixer (nullprogram.com/blog/2018/07/31): every input bit reaches the low bits that `% E` reads."""
    x = x.astype(np.uint32)
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)

def zipf_assignment(token_counts: np.ndarray, num_experts: int, layer: int) -> np.ndarray:
    """Greedy bin packing: the next most frequent token goes to the least loaded expert. (V,) int64 -> (V,) uint8."""
    # Shuffled per layer within strata of similar frequency: balanced loads, and unrelated partitions in any two layers.
    rng, seen = np.random.default_rng(layer), np.count_nonzero(token_counts)
    ranked = np.argsort(-token_counts, kind="stable")[:seen]
    strata = np.split(ranked, range(4 * num_experts, len(ranked), 4 * num_experts))
    loads, assignment = np.zeros(num_experts, np.int64), np.empty(len(token_counts), np.uint8)
    for token in np.concatenate([rng.permutation(stratum) for stratum in strata]):
        assignment[token] = loads.argmin()
        loads[assignment[token]] += token_counts[token]
    unseen = rng.permutation(np.flatnonzero(token_counts == 0))  # by load, they would all go to the least loaded expert
    assignment[unseen] = np.arange(len(unseen)) % num_experts
    return assignment

def build_expert_table(hp: Hyperparameters, token_counts: np.ndarray) -> Tensor:
    """Expert of every token id in every routed layer, from training counts (V,) alone: (routed layers, V) uint8."""
    ids, E = np.arange(hp.vocab_size, dtype=np.uint32), hp.num_experts
    row_of = {"modulo": lambda layer: ids % E, "hash": lambda layer: mix32(ids ^ mix32(np.uint32([layer + 1]))) % E}
    row_of["zipf"] = lambda layer: zipf_assignment(token_counts, E, layer)
    rows = [row_of[hp.routing](layer).astype(np.uint8) for layer in hp.routed_layers]
    return torch.from_numpy(np.reshape(rows, (len(rows), hp.vocab_size)).astype(np.uint8))

def expert_load(table: Tensor, token_counts: np.ndarray, num_experts: int) -> str:
    """Load of the busiest expert over the mean, per routed layer, when tokens occur `token_counts` (V,) times."""
    loads = (np.bincount(row, weights=token_counts, minlength=num_experts) for row in table.cpu().numpy())
    return "expert_load max/mean per routed layer: " + " ".join(f"{load.max() / load.mean():.3f}" for load in loads)

# ---- Model -----------------------------------------------------------------------------------------------------------
# Shape suffixes: B batch, T tokens, D model_dim, H heads, K head_dim, F hidden units, V vocabulary, E experts, N B * T.
# G is the rows per hidden unit of an up projection (2 for swiglu, else 1). The residual stream x is always (B, T, D).

def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))

def activate(h: Tensor, kind: str) -> Tensor:
    """Non-linearity of the MLP, (..., G * F) -> (..., F). The slope 0.3 is from upstream PR #1948."""
    if kind == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value
    return (F.leaky_relu(h, 0.3) if kind == "leaky_relu2" else F.relu(h)).square()

def rotary_tables(seq_len: int, dims: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotation angles, each (T, 1, dims / 2) float32."""
    frequencies = 10_000.0 ** (-torch.arange(0, dims, 2, device=device, dtype=torch.float32) / max(dims, 1))
    angles = torch.arange(seq_len, device=device, dtype=torch.float32)[:, None, None] * frequencies
    return angles.cos(), angles.sin()

def apply_rotary(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dimensions of every head, half-split; the others stay free of position (partial RoPE)."""
    half, cos, sin = cos.size(-1), cos.to(x_BTHK.dtype), sin.to(x_BTHK.dtype)
    x1, x2, rest = x_BTHK.split([half, half, x_BTHK.size(-1) - 2 * half], dim=-1)
    return torch.cat([x1 * cos + x2 * sin, x2 * cos - x1 * sin, rest], dim=-1)

class CastedLinear(nn.Linear):
    """Bias-free linear layer: the float32 master weight is cast to the dtype of the activations at the matmul."""
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

class CausalSelfAttention(nn.Module):
    """Grouped-query attention with normalised queries and keys; mu biases q, k and v before the heads are split."""
    def __init__(self, hp: Hyperparameters, mu_dim: int):
        super().__init__()
        self.hp, D, kv_dim = hp, hp.model_dim, hp.num_kv_heads * hp.head_dim
        self.c_q, self.proj = CastedLinear(D, D), CastedLinear(D, D)
        self.c_k, self.c_v = CastedLinear(D, kv_dim), CastedLinear(D, kv_dim)
        self.q_gain = nn.Parameter(torch.full((hp.num_heads,), hp.qk_gain_init))
        if hp.mu == "vector":
            self.mu_gain = nn.Parameter(torch.zeros(3, D))  # of mu in the inputs of q, k and v
        elif hp.mu != "off":
            self.mu_read = CastedLinear(mu_dim, D + 2 * kv_dim)

    def qkv(self, x: Tensor, mu: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Projections of the normalised input, guided by mu: (B, T, D) twice -> (B, T, D), 2 x (B, T, Hkv * K)."""
        if self.hp.mu == "vector":
            q_gain, k_gain, v_gain = self.mu_gain.to(x.dtype)
            return self.c_q(x + q_gain * mu), self.c_k(x + k_gain * mu), self.c_v(x + v_gain * mu)
        q, k, v = self.c_q(x), self.c_k(x), self.c_v(x)
        if self.hp.mu == "off":
            return q, k, v
        mu_q, mu_k, mu_v = self.mu_read(mu).split([q.size(-1), k.size(-1), v.size(-1)], dim=-1)
        return q + mu_q, k + mu_k, v + mu_v

    def forward(self, x: Tensor, mu: Tensor | None, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Normalised input (B, T, D), mu (B, T, mu_dim) or None, cosines and sines -> (B, T, D)."""
        hp, (B, T, D) = self.hp, x.shape
        q, k, v = (y.view(B, T, -1, hp.head_dim) for y in self.qkv(x, mu))
        q = apply_rotary(norm(q), *rotary) * self.q_gain.to(x.dtype)[:, None]
        q_k_v = (y.transpose(1, 2) for y in (q, apply_rotary(norm(k), *rotary), v))
        y = F.scaled_dot_product_attention(*q_k_v, is_causal=True, enable_gqa=True).transpose(1, 2)
        if hp.xsa:  # exclusive self attention, upstream PR #478: the stream holds the token's own value already
            y, own = y.unflatten(2, (hp.num_kv_heads, -1)), F.normalize(v, dim=-1)[:, :, :, None]
            y = y - (y * own).sum(-1, keepdim=True) * own
        return self.proj(y.reshape(B, T, D))

class TokenRoutedMLP(nn.Module):
    """shared(x) + expert[table[token id]](x); without experts, a plain MLP of the same total width."""
    def __init__(self, hp: Hyperparameters, routed: bool):
        super().__init__()
        self.hp, self.routed, self.G = hp, routed, 2 if hp.activation == "swiglu" else 1
        # Without experts, the width of shared and routed together: the dense control of equal bytes.
        self.width = hp.shared_dim + (0 if routed else hp.num_experts * hp.expert_dim)
        self.up, self.down = CastedLinear(hp.model_dim, self.G * self.width), CastedLinear(self.width, hp.model_dim)
        if routed:  # (E, out, in): every expert is a matrix of its own to Muon and to the quantizer
            self.expert_up = nn.Parameter(torch.zeros(hp.num_experts, self.G * hp.expert_dim, hp.model_dim))
            self.expert_down = nn.Parameter(torch.zeros(hp.num_experts, hp.model_dim, hp.expert_dim))

    def forward(self, x: Tensor, route: tuple[Tensor, ...]) -> Tensor:
        if self.routed and self.hp.dispatch == "masked":
            return self.masked(x, *route)
        y = self.down(activate(self.up(x), self.hp.activation))
        return y + self.grouped(x, *route) if self.routed else y

    def masked(self, x: Tensor, chosen_BTE: Tensor) -> Tensor:
        """All experts in one GEMM with the shared one, the hidden units of those not chosen set to zero."""
        D, width, hidden = self.hp.model_dim, self.width, self.hp.num_experts * self.hp.expert_dim
        expert_up = self.expert_up.unflatten(1, (self.G, -1)).transpose(0, 1).reshape(self.G, hidden, D)
        up = torch.cat([self.up.weight.view(self.G, width, D), expert_up], dim=1).view(-1, D)
        down = torch.cat([self.down.weight, self.expert_down.transpose(0, 1).reshape(D, hidden)], dim=1)
        shared, routed = activate(F.linear(x, up.to(x.dtype)), self.hp.activation).split([width, hidden], dim=-1)
        routed = (routed.unflatten(-1, (self.hp.num_experts, -1)) * chosen_BTE[..., None]).flatten(-2)
        return F.linear(torch.cat([shared, routed], dim=-1), down.to(x.dtype))

    def grouped(self, x: Tensor, order_N: Tensor, inverse_N: Tensor, offsets_E: Tensor) -> Tensor:
        """Tokens sorted by expert, one GEMM per expert between the true offsets, and back into place."""
        up, down = self.expert_up.to(x.dtype).mT, self.expert_down.to(x.dtype).mT
        h_NF = activate(F.grouped_mm(x.flatten(0, 1)[order_N], up, offs=offsets_E), self.hp.activation)
        return F.grouped_mm(h_NF, down, offs=offsets_E)[inverse_N].view_as(x)

class Block(nn.Module):
    """x0 mix, attention guided by mu, MLP, and the mu for the next layer."""
    def __init__(self, hp: Hyperparameters, layer: int, mu_dim: int):
        super().__init__()
        self.hp, D = hp, hp.model_dim
        self.attn, self.mlp = CausalSelfAttention(hp, mu_dim), TokenRoutedMLP(hp, routed=layer in hp.routed_layers)
        self.attn_scale, self.mlp_scale = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))
        self.resid_mix = nn.Parameter(torch.tensor([[1.0], [0.0]]).repeat(1, D))
        self.makes_mu = hp.mu != "off" and layer < hp.num_layers - 1  # nobody would read the last layer's
        if self.makes_mu and hp.mu == "vector":
            self.mu_mix = nn.Parameter(torch.full((2, D), 0.5))
        elif self.makes_mu:
            self.mu_base, self.mu_write = nn.Parameter(torch.zeros(mu_dim)), CastedLinear(D, mu_dim)

    def next_mu(self, mu: Tensor, x: Tensor) -> Tensor:
        """Made from the normalised stream and bounded by a norm; the lineage's raw streams and clamps diverged."""
        if self.hp.mu == "vector":
            keep, write = self.mu_mix.to(x.dtype)
            return norm(keep * mu + write * norm(x))
        return norm(self.mu_base.to(x.dtype) + self.mu_write(norm(x)))

    def forward(self, x, x0, mu, rotary, route) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) twice, mu (B, T, mu_dim) or None, rotary tables and this layer's dispatch -> new x, new mu."""
        keep, inject = self.resid_mix.to(x.dtype)
        x = keep * x + inject * x0
        x = x + self.attn_scale.to(x.dtype) * self.attn(norm(x), mu, rotary)
        x = x + self.mlp_scale.to(x.dtype) * self.mlp(norm(x), route)
        return x, self.next_mu(mu, x) if self.makes_mu else None

class GPT(nn.Module):
    """Decoder-only transformer with tied embedding, U-Net skips and token-routed MLPs."""
    def __init__(self, hp: Hyperparameters):
        super().__init__()
        self.hp, self.num_encoder_layers, self.dtype = hp, hp.num_layers // 2, getattr(torch, hp.dtype)
        mu_dim = hp.mu_rank if hp.mu == "lowrank" else hp.model_dim
        self.tok_emb = nn.Embedding(hp.vocab_size, hp.model_dim)
        self.blocks = nn.ModuleList(Block(hp, layer, mu_dim) for layer in range(hp.num_layers))
        self.skip_weights = nn.Parameter(torch.ones(self.num_encoder_layers, hp.model_dim))
        if hp.mu != "off":
            self.mu_init = nn.Parameter(torch.ones(mu_dim))
        # Part of the state: routing is data of the artifact, not a recipe to run again.
        self.register_buffer("expert_table", torch.zeros(len(hp.routed_layers), hp.vocab_size, dtype=torch.uint8))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Orthogonal matrices, each expert by itself; zero for output projections and for the readers of mu."""
        generator = torch.Generator().manual_seed(self.hp.seed)
        nn.init.normal_(self.tok_emb.weight, std=0.005, generator=generator)
        for name, p in self.named_parameters():
            if role_of(name) in ("matrix", "expert", "mu_matrix"):
                for matrix in p.view(-1, *p.shape[-2:]):
                    nn.init.orthogonal_(matrix, generator=generator)
                if re.search(r"\.(proj|down|expert_down|mu_read)\b", name):
                    p.zero_()
        if self.hp.mu in ("lowrank", "full"):  # equal entries would get equal gradients, which the norm takes out
            nn.init.normal_(self.mu_init, generator=generator)

    def routes(self, input_ids: Tensor) -> list[tuple[Tensor, ...]]:
        """Dispatch of every layer for this batch, from token ids alone: block masks, or permutations and offsets."""
        hp, dense = self.hp, [()] * (self.hp.num_layers - len(self.hp.routed_layers))
        if not hp.routed_layers:
            return dense
        expert_LN = self.expert_table[:, input_ids.flatten()].long()
        chosen_LNE = expert_LN[..., None] == torch.arange(hp.num_experts, device=input_ids.device)
        if hp.dispatch == "masked":
            return dense + [(mask,) for mask in chosen_LNE.unflatten(1, input_ids.shape).to(self.dtype)]
        order_LN = expert_LN.argsort(dim=-1, stable=True)
        offsets_LE = chosen_LNE.sum(1).cumsum(-1).to(torch.int32)
        return dense + list(zip(order_LN, order_LN.argsort(dim=-1), offsets_LE, strict=True))

    def logits(self, input_ids: Tensor) -> Tensor:
        """(B, T) int64 -> (B, T, V) float32, squashed into (-30, 30)."""
        x = x0 = norm(self.tok_emb(input_ids).to(self.dtype))
        rotary, skips = rotary_tables(input_ids.size(1), self.hp.rope_dims, input_ids.device), []
        mu = norm(self.mu_init.to(self.dtype)).expand(*input_ids.shape, -1) if self.hp.mu != "off" else None
        for layer, (block, route) in enumerate(zip(self.blocks, self.routes(input_ids), strict=True)):
            if layer >= self.num_encoder_layers and skips:
                x = x + self.skip_weights[layer - self.num_encoder_layers].to(x.dtype) * skips.pop()
            x, mu = block(x, x0, mu, rotary, route)
            if layer < self.num_encoder_layers:
                skips.append(x)
        logits_BTV = F.linear(norm(x), self.tok_emb.weight.to(x.dtype)).float()
        return 30.0 * torch.tanh(logits_BTV / 30.0)

    def forward(self, input_ids: Tensor, target_ids: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V) without targets; else cross-entropy in nats per token, (B, T) for reduction="none"."""
        logits_BTV = self.logits(input_ids)
        if target_ids is None:
            return logits_BTV
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), target_ids.flatten(), reduction=reduction)
        return loss if reduction == "mean" else loss.view_as(target_ids)

ROLES = {  # what each tensor of the state dict is, by name; the optimizers and the quantizer both go by it
    "embedding": r"tok_emb\.weight",
    "matrix": r"blocks\.\d+\.(attn\.(c_q|c_k|c_v|proj)|mlp\.(up|down))\.weight",
    "expert": r"blocks\.\d+\.mlp\.expert_(up|down)",
    "mu_matrix": r"blocks\.\d+\.(attn\.mu_read|mu_write)\.weight",
    "vector": r"skip_weights|mu_init|blocks\.\d+\.(attn\.(q_gain|mu_gain)|(attn|mlp)_scale|resid_mix|mu_mix|mu_base)",
    "table": r"expert_table",
}

def role_of(name: str) -> str:
    """The one role of a tensor in the state dict; a name without one, or with two, is a bug."""
    roles = [role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)]
    assert len(roles) == 1, f"{name} has roles {roles}"
    return roles[0]

# ---- Optimizers and schedules ----------------------------------------------------------------------------------------
POLAR_EXPRESS = (  # optimal odd quintics for five steps, arXiv 2505.16932; used in upstream PR #1787
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

def zeropower_via_newtonschulz5(G: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrix of each G[i], (M, rows, cols); a zero matrix stays zero. bfloat16 on a GPU."""
    X = G / (G.norm(dim=-1, keepdim=True) + 1e-7)  # row-normalised: MuonEq-R, upstream PR #1217
    X = X / (X.norm(dim=(-2, -1), keepdim=True) * 1.02 + 1e-6)
    X = X.bfloat16() if G.is_cuda else X
    tall = X.size(-2) > X.size(-1)
    X = X.mT if tall else X
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    return (X.mT if tall else X).to(G.dtype)

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised per matrix (kellerjordan.github.io/posts/muon); an expert of a 3-D tensor is a matrix.
    A group holds the matrices of one shape, orthogonalised in one batch of which every rank computes its share."""
    def __init__(self, params: list[Tensor], lr: float, weight_decay: float, dist: Dist, compiles: bool):
        groups = [{"params": [p for p in params if p.shape[-2:] == s]} for s in sorted({p.shape[-2:] for p in params})]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": 0.0})
        self.dist, self.zeropower = dist, zeropower_via_newtonschulz5
        if compiles and dist.device.type == "cuda":  # on a CPU it is all GEMM, and not worth the compilation
            self.zeropower = torch.compile(zeropower_via_newtonschulz5, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def step(self) -> None:
        """One update of every group, from the gradients and the LR and momentum in the group."""
        mine = slice(self.dist.rank, None, self.dist.world_size)
        for group in self.param_groups:
            params, (rows, cols) = group["params"], group["params"][0].shape[-2:]
            update, state = torch.cat([p.grad.view(-1, rows, cols) for p in params]), self.state[params[0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(update)
            buffer = state["momentum_buffer"].lerp_(update, 1 - group["momentum"])
            update.lerp_(buffer, group["momentum"])  # Nesterov
            share = self.zeropower(update[mine]) if len(update[mine]) else update[mine]
            update.zero_()[mine] = share
            updates = self.dist.all_sum(update).split([p.numel() // (rows * cols) for p in params])
            updates = [u.view_as(p) for u, p in zip(updates, params, strict=True)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            # The shape factor keeps the RMS change of an activation the same for tall and wide matrices.
            torch._foreach_add_(params, updates, alpha=-group["lr"] * max(1, rows / cols) ** 0.5)

def build_optimizers(hp: Hyperparameters, model: GPT, dist: Dist) -> list[torch.optim.Optimizer]:
    """Muon for matrices and experts, AdamW for the embedding and for everything small; each parameter exactly once."""
    by_role = {role: [p for name, p in model.named_parameters() if role_of(name) == role] for role in ROLES}
    matrices, small = by_role["matrix"] + by_role["expert"], by_role["vector"] + by_role["mu_matrix"]
    muon = Muon(matrices, hp.matrix_lr, hp.muon_weight_decay, dist, can_compile(hp, dist.device))
    groups = [{"params": by_role["embedding"], "lr": hp.embed_lr, "weight_decay": hp.embed_weight_decay}]
    groups += [{"params": small, "lr": hp.scalar_lr, "weight_decay": 0.0}]  # decay would hold gains at their start
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=dist.device.type == "cuda")
    covered = sorted(id(p) for optimizer in (muon, adam) for group in optimizer.param_groups for p in group["params"])
    assert covered == sorted(map(id, model.parameters())), "every parameter needs exactly one optimizer group"
    for group in muon.param_groups + adam.param_groups:
        group["base_lr"] = group["lr"]
    return [muon, adam]

def sgdr_bounds(cycles: int) -> list[float]:
    """Starts of the cycles and the end, as fractions of the budget; every cycle is twice as long as the one before."""
    return [(2**i - 1) / (2**cycles - 1) for i in range(cycles + 1)]

def lr_scale(hp: Hyperparameters, frac: float) -> float:
    """Multiplier of all learning rates when the fraction `frac` of the budget is used (SGDR: arXiv 1608.03983)."""
    if hp.schedule == "linear":
        return max(hp.min_lr, min(1.0, (1 - frac) / hp.warmdown_frac)) if hp.warmdown_frac else 1.0
    bounds = sgdr_bounds(hp.sgdr_cycles)
    cycle = sum(frac >= start for start in bounds[1:-1])
    position = min((frac - bounds[cycle]) / (bounds[cycle + 1] - bounds[cycle]), 1.0)
    return hp.min_lr + max(0.7**cycle - hp.min_lr, 0.0) * 0.5 * (1 + math.cos(math.pi * position))

def set_schedules(hp: Hyperparameters, optimizers: list[torch.optim.Optimizer], frac: float) -> float:
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

# ---- Quantization and artifact ---------------------------------------------------------------------------------------
# Artifact: PREFIX | compressed(header length, JSON header, tensors in the order of `layout`). Names, shapes and order
# follow from GPT(hp): the model knobs in the header describe the file completely, and its size is checked. No pickle.

PREFIX = struct.Struct("<8sHHQ32s")  # magic, version, codec, bytes before compression, SHA-256 of all other bytes
ARTIFACT_MAGIC, ARTIFACT_VERSION, CODECS = b"TRMOE\r\n\x1a", 1, {1: "zstd", 2: "brotli"}
MAX_PAYLOAD_BYTES = 1 << 30  # a stranger's file may not unpack to more

def quantize(weight: Tensor, bits: int, clip: float) -> tuple[Tensor, Tensor]:
    """Uniform symmetric quantization per row: (..., C) -> (..., C) int8 in +-(2^(bits-1) - 1), (..., 1) float16 steps.
    The step is clip * std(row) / (2^(bits-1) - 1) (SDClip, upstream PR #1394), which sets the entropy and hence the
    size; it grows only as far as an outlier needs, so that no weight moves by more than half a step."""
    levels, weight = 2 ** (bits - 1) - 1, weight.float()
    reach = torch.maximum(clip * weight.std(-1, correction=0, keepdim=True), weight.abs().amax(-1, keepdim=True))
    scale = (reach / levels).half()
    inverse = torch.where(scale > 0, 1 / scale.float(), 0.0)
    return (weight * inverse).round().clamp(-levels, levels).to(torch.int8), scale

def dequantize(symbols: Tensor, scale: Tensor) -> Tensor:
    return symbols.float() * scale.float()

def quant_rule(hp: Hyperparameters, name: str) -> tuple[int, float] | torch.dtype:
    """How a tensor is stored: (bits, clip) if quantized, else the dtype it is kept in."""
    rules = dict.fromkeys(("matrix", "expert", "mu_matrix"), (hp.matrix_bits, hp.matrix_clip))
    rules |= {"embedding": (hp.embed_bits, hp.embed_clip), "vector": torch.float16, "table": torch.uint8}
    return rules[role_of(name)]

def layout(hp: Hyperparameters, state: dict[str, Tensor]) -> list[tuple[str, str, np.dtype, tuple[int, ...]]]:
    """(tensor, part, dtype, shape) of all that an artifact holds, in order; like bytes together, to compress well."""
    parts = []
    for name, tensor in state.items():
        rule, shape = quant_rule(hp, name), tuple(tensor.shape)
        if isinstance(rule, tuple):
            parts += [(0, name, "symbols", "i1", shape), (1, name, "scales", "<f2", (*shape[:-1], 1))]
        else:
            parts.append((2, name, "kept", "<f2", shape) if rule == torch.float16 else (3, name, "kept", "u1", shape))
    return [(name, part, np.dtype(kind), shape) for _, name, part, kind, shape in sorted(parts, key=lambda p: p[0])]

def pack(hp: Hyperparameters, state: dict[str, Tensor], tokenizer_sha256: str) -> bytes:
    """Uncompressed payload of a state dict. Raises Refusal when a value does not survive float16."""
    parts = {}
    for name, tensor in state.items():
        rule = quant_rule(hp, name)
        if isinstance(rule, tuple):
            parts[name, "symbols"], parts[name, "scales"] = quantize(tensor.cpu(), *rule)
        else:
            parts[name, "kept"] = tensor.cpu().to(rule)
    for (name, part), tensor in parts.items():
        require(bool(tensor.isfinite().all()), f"{name}: {part} not finite in float16, nothing exported")
    header = {"model": {name: getattr(hp, name) for name in MODEL_KNOBS}, "tokenizer_sha256": tokenizer_sha256}
    text = json.dumps(header, separators=(",", ":")).encode()
    tensors = b"".join(parts[name, part].numpy().tobytes() for name, part, _, _ in layout(hp, state))
    return struct.pack("<I", len(text)) + text + tensors

def import_codec(name: str) -> tuple:
    """(compress, decompress up to about a size, error class) of a codec; imported on use, as reading needs only one."""
    try:
        if name == "zstd":
            import zstandard as zstd
            reader = zstd.ZstdDecompressor().stream_reader
            return zstd.ZstdCompressor(22).compress, lambda data, size: reader(data).read(size), zstd.ZstdError
        import brotli
        unpack = brotli.Decompressor().process
        pack = partial(brotli.compress, quality=11, lgwin=24)
        return pack, lambda data, size: unpack(data, output_buffer_limit=size), brotli.error
    except ImportError as error:
        raise Refusal(f"codec {name} needs the Python package {error.name}: pip install {error.name}") from None

def compress(payload: bytes, codec: str) -> tuple[bytes, str]:
    """The artifact of a payload and its codec; auto keeps the smaller of zstd-22 and brotli-11."""
    packed = {n: import_codec(name)[0](payload) for n, name in CODECS.items() if codec in (name, "auto")}
    number = min(packed, key=lambda n: len(packed[n]))
    prefix = PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, number, len(payload), bytes(32))
    return prefix[:-32] + hashlib.sha256(prefix + packed[number]).digest() + packed[number], CODECS[number]

def decompress(data: bytes, source: Path) -> bytes:
    """Payload of an artifact, after checking magic, version and checksum. Raises Refusal."""
    require(len(data) >= PREFIX.size, f"{source}: truncated artifact of {len(data)} bytes")
    magic, version, codec, size, digest = PREFIX.unpack_from(data)
    require(magic == ARTIFACT_MAGIC, f"{source} is not an artifact of this trainer")
    require(version <= ARTIFACT_VERSION, f"{source}: version {version} is newer than this trainer's {ARTIFACT_VERSION}")
    prefix, packed = data[: PREFIX.size - 32] + bytes(32), data[PREFIX.size :]
    intact = hashlib.sha256(prefix + packed).digest() == digest and codec in CODECS and 4 <= size <= MAX_PAYLOAD_BYTES
    require(intact, f"{source}: damaged artifact, the checksum does not match")
    _, unpacker, codec_error = import_codec(CODECS[codec])
    try:
        payload = unpacker(packed, size + 1)
    except codec_error as error:
        raise Refusal(f"{source}: damaged artifact, {CODECS[codec]} says {error}") from error
    require(len(payload) == size, f"{source}: damaged artifact, it does not unpack to the {size} bytes declared")
    return payload

def load_artifact(path: Path, hp: Hyperparameters, device: torch.device) -> tuple[GPT, Hyperparameters, str]:
    """The only reader of artifacts: the model, `hp` with the artifact's model knobs, and its tokenizer's SHA-256."""
    require(path.is_file(), f"{path}: no such artifact")
    payload = decompress(path.read_bytes(), path)
    try:
        header_end = 4 + struct.unpack_from("<I", payload)[0]
        header = json.loads(payload[4:header_end])
        tokenizer_sha256 = str(header["tokenizer_sha256"])
        hp = replace(hp, **{name: header["model"][name] for name in MODEL_KNOBS})
        hp = replace(hp, train_batch_tokens=hp.train_seq_len)  # the environment's need not fit, and is of no use here
        hp.validate()
    except Refusal as error:
        raise Refusal(f"{path}: {error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refusal(f"{path}: damaged artifact, bad header ({error})") from error
    with torch.device("meta"):
        model = GPT(hp)
    parts, offset, plan = {}, header_end, layout(hp, model.state_dict())
    expected = offset + sum(math.prod(shape) * dtype.itemsize for _, _, dtype, shape in plan)
    require(len(payload) == expected, f"{path}: damaged artifact, {len(payload)} bytes, its model has {expected}")
    for name, part, dtype, shape in plan:
        array = np.frombuffer(payload, dtype, math.prod(shape), offset).reshape(shape)
        parts[name, part], offset = torch.from_numpy(array.copy()), offset + array.nbytes
    state = {name: dequantize(t, parts[name, "scales"]) for (name, part), t in parts.items() if part == "symbols"}
    state |= {name: t if t.dtype == torch.uint8 else t.float() for (name, part), t in parts.items() if part == "kept"}
    require(bool((state["expert_table"] < hp.num_experts).all()), f"{path}: damaged artifact, expert out of range")
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).eval(), hp, tokenizer_sha256

def submission_bytes(hp: Hyperparameters, model_bytes: int, what: str) -> tuple[int, int]:
    """Bytes of the code (this file and eval_sliding.py beside it) and of code plus model. Raises Refusal at the cap."""
    here = Path(__file__).resolve()
    code = sum(path.stat().st_size for path in (here, here.with_name("eval_sliding.py")) if path.exists())
    cap = f"the cap is {MAX_SUBMISSION_BYTES:,}; lower MODEL_DIM={hp.model_dim} or raise MATRIX_CLIP={hp.matrix_clip}"
    require(code + model_bytes < MAX_SUBMISSION_BYTES, f"{what}: {code:,} bytes of code + {model_bytes:,}, {cap}")
    return code, code + model_bytes

def dry_run_bytes(hp: Hyperparameters, model: GPT) -> int:
    """Size of the artifact to come, measured on Gaussian stand-ins, whose symbols have the entropy of trained rows."""
    rng, state = torch.Generator().manual_seed(0), model.state_dict()
    state |= {n: torch.randn(t.shape, generator=rng) for n, t in state.items() if isinstance(quant_rule(hp, n), tuple)}
    return len(compress(pack(hp, state, "0" * 64), "zstd" if hp.codec == "auto" else hp.codec)[0])

# ---- Evaluation ------------------------------------------------------------------------------------------------------
def scoring_windows(num_targets: int, seq_len: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows (start, first scored target, end); each begins `stride` after the last and scores only what is new."""
    windows = [(0, 0, min(seq_len, num_targets))]
    while windows[-1][2] < num_targets:
        start, _, end = windows[-1]
        windows.append((start + stride, end, min(end + stride, num_targets)))
    return windows

@dataclass(frozen=True)
class Score:
    """Result of an evaluation over `target_tokens` targets that stand for `scored_bytes` bytes of text."""
    val_loss: float  # nats per token
    bpb: float  # bits per byte; a val_bpb unless partial
    target_tokens: int
    scored_bytes: int
    seconds: float
    partial: bool

    def __str__(self) -> str:
        name = "PARTIAL" if self.partial else "val"
        return f"{name}_loss:{self.val_loss:.8f} {name}_bpb:{self.bpb:.8f}"

@torch.no_grad()
def evaluate(model: nn.Module, val: ValData, hp: Hyperparameters, dist: Dist, stride: int, label: str) -> Score:
    """Score the split by windows of EVAL_SEQ_LEN tokens that advance by `stride`, a whole window in plain validation.
    Ranks take every world_size-th window. All batches have one shape: a short window is padded to the right, where
    causality keeps it harmless, a short batch by windows that score nothing. Sums are float64. Raises Refusal."""
    started, num_targets, seq_len = time.perf_counter(), len(val.tokens) - 1, hp.eval_seq_len or hp.train_seq_len
    windows = scoring_windows(num_targets, seq_len, stride)[dist.rank :: dist.world_size]
    batch_size = max(1, hp.micro_batch_tokens // seq_len)
    windows += [(0, 0, 0)] * (-len(windows) % batch_size)
    windows_3W1 = torch.tensor(windows, device=dist.device).view(len(windows), 3).T[..., None]
    sum_device = torch.device("cpu") if dist.device.type == "mps" else dist.device  # MPS has no float64
    totals, progress = torch.zeros(3, dtype=torch.float64, device=sum_device), Progress(label, len(windows), dist.rank)
    for i in range(0, len(windows), batch_size):
        start, first, end = windows_3W1[:, i : i + batch_size]
        position_BT = start + torch.arange(seq_len, device=dist.device)
        scored_BT, readable_BT = (position_BT >= first) & (position_BT < end), position_BT.clamp(max=num_targets - 1)
        input_ids, target_ids = val.tokens[readable_BT].long(), val.tokens[readable_BT + 1].long()
        nll_BT = torch.where(scored_BT, model(input_ids, target_ids, reduction="none"), 0)
        bytes_BT = torch.where(scored_BT, val.token_bytes(input_ids, target_ids), 0)
        totals += torch.stack([t.to(sum_device).double().sum() for t in (nll_BT, bytes_BT, scored_BT)])
        progress.update(i + batch_size)
    nll, scored_bytes, scored_targets = dist.all_sum(totals).tolist()
    assert scored_targets == num_targets, f"{scored_targets} of {num_targets} targets scored"
    require(math.isfinite(nll) and scored_bytes > 0, f"{label}: total loss {nll} over {scored_bytes} bytes")
    bpb, seconds = nll / math.log(2) / scored_bytes, time.perf_counter() - started
    return Score(nll / num_targets, bpb, num_targets, int(scored_bytes), seconds, val.partial)

# ---- Training --------------------------------------------------------------------------------------------------------
class Gradients:
    """The loss and all gradients as views of one flat buffer: one all-reduce, one norm and one memset per step."""
    def __init__(self, model: GPT, dist: Dist):
        self.dist, params = dist, list(model.parameters())
        starts = np.cumsum([64] + [-(-p.numel() // 64) * 64 for p in params]).tolist()  # aligned for vector loads
        self.flat = torch.zeros(starts[-1], device=dist.device)
        for p, start in zip(params, starts, strict=False):
            p.grad = self.flat[start : start + p.numel()].view_as(p)

    def average_and_clip(self, max_norm: float) -> None:
        """Mean over ranks of loss and gradients; then shrink the gradients to an L2 norm of at most `max_norm`."""
        self.dist.all_sum(self.flat).div_(self.dist.world_size)
        if max_norm:
            self.flat[64:].mul_((max_norm / (self.flat[64:].norm() + 1e-6)).clamp(max=1.0))

def train_step(model: nn.Module, optimizers: list, gradients: Gradients, batches: list, max_norm: float) -> Tensor:
    """One optimizer step over micro-batches (input_ids, target_ids). Returns the mean loss of all ranks, a tensor."""
    gradients.flat.zero_()
    for input_ids, target_ids in batches:
        loss = model(input_ids, target_ids) / len(batches)
        loss.backward()
        gradients.flat[0] += loss.detach()
    gradients.average_and_clip(max_norm)
    for optimizer in optimizers:
        optimizer.step()
    return gradients.flat[0].clone()

def warm_up(model: nn.Module, raw_model: GPT, optimizers: list, gradients: Gradients, loader: TokenLoader) -> None:
    """Compile everything on random tokens and leave no trace: weights and optimizer states are restored."""
    hp, generator = loader.hp, torch.Generator().manual_seed(0)
    weights, states = copy.deepcopy(raw_model.state_dict()), copy.deepcopy([o.state_dict() for o in optimizers])
    for _ in range(hp.warmup_steps):
        tokens = torch.randint(hp.vocab_size, (2, loader.num_sequences, hp.train_seq_len), generator=generator)
        train_step(model, optimizers, gradients, [tuple(tokens.to(loader.dist.device))], hp.grad_clip_norm)
    raw_model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)

def timing(seconds: float, steps: int) -> str:
    return f"train_time:{1000 * seconds:.0f}ms step_avg:{1000 * seconds / max(steps, 1):.2f}ms"

def train(hp: Hyperparameters, dist: Dist, log: Log, model: GPT, loader: TokenLoader, val: ValData):
    """Train until ITERATIONS or MAX_WALLCLOCK_SECONDS; leave averaged weights in `model`. Returns steps and seconds."""
    compiles, cap, accum = can_compile(hp, dist.device), hp.max_wallclock_seconds, hp.grad_accum_steps(dist.world_size)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiles else model
    optimizers, gradients, started = build_optimizers(hp, model, dist), Gradients(model, dist), time.perf_counter()
    warm_up(forward, model, optimizers, gradients, loader)
    log(f"warmup_step:{hp.warmup_steps}/{hp.warmup_steps} random tokens, undone, {dist.synchronize() - started:.1f}s "
        f"compile:{'fullgraph' if compiles else 'off'} grad_accum_steps:{accum}")
    weights, averaged = [p.detach() for p in model.parameters()], 0
    average = [p.clone() for p in weights]
    progress, step, loss, started = Progress("train", 1.0, dist.rank), 0, math.nan, dist.synchronize()
    on_cpu = dist.device.type == "cpu"  # where reading the loss costs nothing
    while True:
        elapsed = dist.all_max(time.perf_counter() - started)
        # The next step must end inside the cap, and so must the two by which the host may be ahead of a GPU.
        out_of_time = cap > 0 and step > 0 and elapsed * (1 + (1 if on_cpu else 3) / step) > cap
        if out_of_time or step == hp.iterations:
            break
        if hp.val_loss_every and step and step % hp.val_loss_every == 0:
            paused = dist.synchronize()
            score = evaluate(model, val, hp, dist, hp.train_seq_len, "validate")
            log(f"step:{step}/{hp.iterations} {score} {timing(elapsed, step)}")
            started += dist.synchronize() - paused
        frac = max(elapsed / cap if cap else 0.0, step / hp.iterations)
        scale = set_schedules(hp, optimizers, frac)
        batches = [loader.next_batch() for _ in range(accum)]
        device_loss = train_step(forward, optimizers, gradients, batches, hp.grad_clip_norm)
        newest = average_weight(hp, frac, averaged)
        if newest:
            torch._foreach_lerp_(average, weights, newest)
            averaged += 1
        step += 1
        logged = step <= 10 or step % hp.train_log_every == 0
        if logged or on_cpu:
            loss = device_loss.item()
            require(math.isfinite(loss), f"training loss is {loss} at step {step}: stopped, nothing exported")
        spent = time.perf_counter() - started
        rate, note = step * hp.train_batch_tokens / spent, f"{timing(spent, step)} lr_scale:{scale:.3f}"
        if logged:
            log(f"step:{step}/{hp.iterations} train_loss:{loss:.6f} {note} tok/s: {rate:.0f}")
        progress.update(frac, f"step {step} loss {loss:.3f} {rate:,.0f} tok/s")
    elapsed = dist.all_max(dist.synchronize() - started)
    if out_of_time:
        log(f"stopping_early: wallclock_cap train_time:{1000 * elapsed:.0f}ms step:{step}/{hp.iterations}")
    if averaged:
        torch._foreach_copy_(weights, average)
    return step, elapsed

def export(hp: Hyperparameters, dist: Dist, log: Log, model: GPT, tokenizer_sha256: str, path: Path) -> None:
    """Write the artifact, and the checkpoint if asked for, from rank 0. Raises Refusal at the cap or when it cannot."""
    if dist.rank == 0:
        started, checkpoint = time.perf_counter(), io.BytesIO()
        if hp.save_checkpoint:
            torch.save(model.state_dict(), checkpoint)
            write_atomically(path.with_suffix(".pt"), checkpoint.getvalue())
        artifact, codec = compress(pack(hp, model.state_dict(), tokenizer_sha256), hp.codec)
        code, total = submission_bytes(hp, len(artifact), "artifact")
        write_atomically(path, artifact)
        bits, seconds = 8 * len(artifact) / sum(p.numel() for p in model.parameters()), time.perf_counter() - started
        log(f"Serialized model quantized+{codec}: {len(artifact)} bytes ({bits:.3f} bits/parameter, {seconds:.1f}s)")
        log(f"Code size: {code} bytes\nTotal submission size quantized+{codec}: {total} bytes")
    dist.synchronize()

def main() -> None:
    """Read the knobs, train, export, score the reloaded artifact, and end the log with one JSON line."""
    hp = Hyperparameters.from_env(os.environ)
    dist = Dist.from_torchrun(hp.device)
    hp = replace(hp, run_id=hp.run_id or time.strftime("%Y%m%d_%H%M%S", time.localtime(dist.all_max(time.time()))))
    path = Path("logs", f"{hp.run_id}.ptz")
    log = Log(dist, path.with_suffix(".txt"))
    log_provenance(log, hp, dist, os.environ)
    hp = replace(hp, eval_seq_len=0, eval_stride=1)  # plain validation, whatever eval_sliding.py is to do
    loader, val = TokenLoader(hp, dist), ValData.load(hp, dist.device)
    token_counts, model = loader.count_tokens(), GPT(hp)
    model.init_weights()
    model.expert_table.copy_(build_expert_table(hp, token_counts))
    params = sum(p.numel() for p in model.parameters())
    log(f"model_params:{params} world_size:{dist.world_size} seed:{hp.seed}")
    log(f"train_loader:dataset:{hp.dataset_dir.name} train_shards:{len(loader.shards)} windows:{loader.num_windows}")
    log(f"val_loader:shards pattern={hp.dataset_dir}/fineweb_val_*.bin tokens:{len(val.tokens) - 1}")
    log(f"counted {expert_load(model.expert_table, token_counts, hp.num_experts)}")
    if dist.rank == 0:
        log(f"dry run: {submission_bytes(hp, dry_run_bytes(hp, model), 'dry run')[1]} bytes of code + model expected")
    torch.set_float32_matmul_precision("high")
    steps, seconds = train(hp, dist, log, model.to(dist.device), loader, val)
    log(f"trained on {expert_load(model.expert_table, loader.token_counts, hp.num_experts)}")
    log(f"peak memory allocated: {torch.cuda.max_memory_allocated() >> 20} MiB")
    before = evaluate(model, val, hp, dist, hp.train_seq_len, "validate")
    log(f"step:{steps}/{hp.iterations} {before} {timing(seconds, steps)}")
    log(f"pre-quantization post-{hp.average} {before} eval_time:{1000 * before.seconds:.0f}ms")
    export(hp, dist, log, model, val.tokenizer_sha256, path)
    after = evaluate(load_artifact(path, hp, dist.device)[0], val, hp, dist, hp.train_seq_len, "validate the artifact")
    log(f"quantized {after} eval_time:{1000 * after.seconds:.0f}ms\nfinal_roundtrip_exact {after}")
    code, total = submission_bytes(hp, path.stat().st_size, "artifact")
    result = {"event": "train_summary", "run_id": hp.run_id, "artifact_path": str(path), "partial": val.partial}
    result |= {"val_bpb_float": None if val.partial else before.bpb, "val_bpb": None if val.partial else after.bpb}
    result |= {"val_loss": after.val_loss, "train_seconds": seconds, "steps": steps, "params": params}
    result |= {"bytes_code": code, "bytes_model": total - code, "bytes_total": total}
    log(json.dumps(result | {"tokens": steps * hp.train_batch_tokens}))
    if dist.world_size > 1:
        torch.distributed.destroy_process_group()

def run_entry_point(entry) -> None:
    """Call `entry()`; bad input and failing files become one line on stderr and exit status 2, not a traceback."""
    try:
        entry()
    except (Refusal, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)

if __name__ == "__main__":
    run_entry_point(main)
