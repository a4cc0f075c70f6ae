"""Score an artifact of train_gpt.py by sliding window: from it, a tokenizer and validation shards.

    python eval_sliding.py logs/RUN_ID.ptz
    torchrun --standalone --nproc_per_node=8 eval_sliding.py logs/RUN_ID.ptz
    TTT=sgd python eval_sliding.py logs/RUN_ID.ptz               # score-first test-time training
    NGRAM=on python eval_sliding.py logs/RUN_ID.ptz              # a memory of what was scored
    python eval_sliding.py --self-check 200 logs/RUN_ID.ptz      # 200 windows again, one at a time
    TTT=sgd python eval_sliding.py --audit logs/RUN_ID.ptz       # the challenge's rules, tested

Every target is scored once, with EVAL_SEQ_LEN - EVAL_STRIDE tokens of context or more where the
text has them. The model comes from the artifact; the environment sets the knobs of EvalConfig and
DATA_PATH, TOKENIZER_PATH, VAL_MAX_TOKENS (a PARTIAL score), MICRO_BATCH_TOKENS, DTYPE, ATTENTION,
COMPILE.
The audit is in float32, with plain attention and not compiled: what has to be equal then is, to
the bit. All of it goes to the end of the training's log.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

try:
    import numpy as np
    import torch
    from torch import Tensor
except (ImportError, OSError) as error:  # OSError: a shared library of theirs does not load
    sys.exit(f"{error}: pip install -r requirements.txt")

import train_gpt
from train_gpt import GPT, Dist, Scorer, ValData, Windowing, choice, knob, load_artifact, require

TTT_CLIP_NORM = 1.0  # L2 norm of the gradients of test-time training (upstream PR #1413)
TTT_MOMENTUM = 0.9
TTT_SEGMENTS = 8  # contiguous parts of the split that know nothing of each other; ranks share them


@dataclass(frozen=True)
class EvalConfig:
    """The knobs of evaluation alone: env var FOO sets field foo."""

    eval_stride: int = knob(64, 1)  # targets scored per window
    eval_seq_len: int = knob(0, 0, 65_536)  # window, tokens; 0 = TRAIN_SEQ_LEN
    eval_max_seconds: float = knob(600.0, 0)  # s since the start; TTT leaves epochs out; 0 = off
    ttt: str = choice("off", "sgd")  # test-time training on what has been scored
    ttt_lr: float = knob(0.005, 0)  # of the first chunk; a cosine over the segment takes it to 0
    ttt_epochs: int = knob(3, 1)  # steps on a chunk once it is scored, each over all its targets
    ttt_chunk_tokens: int = knob(32_768, 1)  # targets scored between two updates
    ngram: str = choice("off", "on")  # mix the scores with counts of what has been scored

    @classmethod
    def from_env(cls, environ: dict[str, str]) -> "EvalConfig":
        """Read and check the knobs. Raises ConfigError naming the variable and the value."""
        config = cls(**train_gpt.parse_knobs(cls, environ))
        train_gpt.check_values(config)
        return config

    def windowing(self, hp: train_gpt.Hyperparameters) -> Windowing:
        """Return how the split is cut for this model. Raises ConfigError for too long a stride."""
        window = self.eval_seq_len or hp.model.train_seq_len
        fits = self.eval_stride <= window
        require(fits, f"EVAL_STRIDE={self.eval_stride}: above the window of {window} tokens")
        return Windowing(window, self.eval_stride, max(1, hp.micro_batch_tokens // window))

    @property
    def limit(self) -> float:
        return self.eval_max_seconds or math.inf

    def stated(self) -> str:
        """Return for the log the knobs of test-time training, or that it is off, and of n-grams."""
        knobs = {"ttt": "off"}
        if self.ttt != "off":
            knobs = {name: value for name, value in vars(self).items() if name.startswith("ttt")}
            knobs["ttt_segments"] = TTT_SEGMENTS
        if self.ngram != "off":
            knobs |= {"ngram": self.ngram, "ngram_order": NGRAM_ORDER}
        return " ".join(f"{name}:{value}" for name, value in knobs.items())


def snapshot(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def bits_per_byte(losses: Tensor, target_bytes: Tensor) -> float:
    """Return bits per byte from losses in nats and the bytes of their targets."""
    return losses.double().sum().item() / math.log(2) / int(target_bytes.sum())


def split_documents(tokens: Tensor) -> tuple[Tensor, ...]:
    """Return what comes before the first BOS, then every document with the BOS that begins it."""
    return tokens.tensor_split(torch.nonzero(tokens == train_gpt.BOS_ID)[:, 0].cpu())


def check_tokenizer_made(tokens: Tensor, sp, source: Path) -> None:
    """Raise ConfigError when encoding the first 4,096 tokens' documents again gives others.

    Of the tokens in a document, 99.9 % come again if this tokenizer made them, be it one word or
    a long text; with another of its size, or with permuted ids, 95 % at most.
    """
    made = 0
    common = 0
    rest, *documents = split_documents(tokens[:4096])
    for document in documents or [rest]:
        text = [token for token in document.tolist() if not sp.is_control(token)]
        again = Counter(sp.encode(sp.decode(text)))
        made += len(text)
        common += (Counter(text) & again).total()
    other = f"{source}: the val shards were made by another tokenizer than the artifact's"
    require(common >= 0.97 * made, other)


# ---- Scoring -------------------------------------------------------------------------------------


def score_within_memory(scorer: Scorer, windows: Tensor) -> None:
    """Score windows (W, 3), with half the batch as long as memory runs out. Raises ConfigError."""
    while len(windows):
        try:
            scorer.score(windows[: scorer.batch_size])
            windows = windows[scorer.batch_size :]
        except RuntimeError as error:
            if not train_gpt.out_of_memory(error):
                raise
            large = f"a window of {scorer.seq_len} tokens exceeds memory; lower EVAL_SEQ_LEN"
            require(scorer.batch_size > 1, large)
            scorer.batch_size //= 2
            less = f"{scorer.batch_size} windows per forward pass from here on"
            print(f"warning: out of memory, {less}", file=sys.stderr)


def adapt(scorer: Scorer, optimizer: torch.optim.Optimizer, first: int, end: int) -> None:
    """Take a step on the mean loss of targets `first` to `end` - 1, read in disjoint windows."""
    tiles = train_gpt.scoring_windows(end - first, scorer.seq_len, scorer.seq_len) + first
    tiles = tiles.to(scorer.windows.device)
    count = tiles[-1, 2] - tiles[0, 1]
    batch_size = min(scorer.batch_size, len(tiles))
    optimizer.zero_grad()
    for batch in tiles.split(batch_size):
        input_ids, target_ids, _, columns = scorer.batch(batch, scorer.seq_len, batch_size)
        nll = scorer.forward(input_ids, target_ids, reduction="none", scored=None)
        (torch.where(columns < scorer.num_targets, nll, 0).sum() / count).backward()
    parameters = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(parameters, TTT_CLIP_NORM, foreach=True)
    optimizer.step()


def score_split(
    scorer: Scorer, model: GPT, config: EvalConfig, started: float, segments: int = TTT_SEGMENTS
) -> Tensor:
    """Score a chunk, then train on it, then score the next (upstream PR #1413); TTT=off, one chunk.

    Each of `segments` contiguous parts of the split begins with the artifact's weights, so it
    does not matter how ranks share them. A part's last chunk is not trained on. The evaluation
    began at `started` on the host's clock, s. Returns epochs run and asked for, (2,): as many as
    98 % of EVAL_MAX_SECONDS allow beside all scoring. Leaves `model` as it was. Raises ConfigError.
    """

    def elapsed() -> float:
        if scorer.dist.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    segments_here = [[scorer.share]]
    if config.ttt != "off":
        segments = min(segments, len(scorer.windows))
        bounds = [len(scorer.windows) * i // segments for i in range(1, segments)]
        per_chunk = max(1, config.ttt_chunk_tokens // scorer.stride)
        split = [part.split(per_chunk) for part in scorer.windows.tensor_split(bounds)]
        segments_here = split[scorer.dist.rank :: scorer.dist.world_size]

    updates = sum(len(chunks) - 1 for chunks in segments_here)
    epochs_asked = updates * config.ttt_epochs
    epochs_run = 0
    scorer.progress.total = sum(len(chunk) for chunks in segments_here for chunk in chunks)
    artifact = snapshot(model)
    begun = elapsed()
    seconds_training = 0.0
    for chunks in segments_here:
        model.load_state_dict(artifact)
        optimizer = torch.optim.SGD(model.parameters(), config.ttt_lr, TTT_MOMENTUM)
        for i, chunk in enumerate(chunks):
            score_within_memory(scorer, chunk)
            if i + 1 == len(chunks):
                break

            # All updates to come get as many epochs.
            now = elapsed()
            windows_left = scorer.progress.total - scorer.progress.done
            to_score = windows_left * (now - begun - seconds_training) / scorer.progress.done
            spare = max(0.98 * config.limit - now - to_score, 0)
            per_epoch = seconds_training / max(epochs_run, 1)
            epochs = int(min(spare / max(per_epoch * updates, 1e-9), config.ttt_epochs))
            cosine = 0.5 * (1 + math.cos(math.pi * i / (len(chunks) - 1)))
            optimizer.param_groups[0]["lr"] = config.ttt_lr * cosine
            for _ in range(epochs):
                adapt(scorer, optimizer, int(chunk[0, 1]), int(chunk[-1, 2]))
            updates -= 1
            epochs_run += epochs
            seconds_training += elapsed() - now
    model.load_state_dict(artifact)
    model.zero_grad()
    return torch.tensor([epochs_run, epochs_asked])


def compile_on_random_tokens(
    forward: Callable, model: GPT, config: EvalConfig, windowing: Windowing, dist: Dist
) -> Windowing:
    """Run all once on random tokens; return the windowing with a batch that fits on every rank."""
    count = windowing.stride + (config.ttt_chunk_tokens if config.ttt == "sgd" else 0)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (count + 1,), generator=generator)
    tokens = tokens.int().to(dist.device)
    val = ValData(tokens, torch.ones_like(tokens[1:]), "", False)
    trial = replace(config, ttt_epochs=1, eval_max_seconds=0.0)
    scorer = Scorer(forward, val, Dist(0, 1, dist.device), windowing, "compile")
    with scorer.progress:
        score_split(scorer, model, trial, 0.0, segments=1)
    (negative,) = dist.all_max(-scorer.batch_size)
    return replace(windowing, batch_size=-int(negative))


@torch.no_grad()
def plain_losses(model: GPT, val: ValData, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return targets of windows (W, 3), losses, nats, and the last one's log softmax, (n, V)."""
    targets = []
    losses = []
    # Without padding, and by logits that know the inputs alone.
    for start, first, end in windows.tolist():
        logits = model(val.tokens[None, start:end].long())[0, first - start :]
        log_probs = logits.double().log_softmax(-1)
        true_ids = val.tokens[first + 1 : end + 1, None].long()
        losses.append(-log_probs.gather(1, true_ids)[:, 0])
        targets.append(torch.arange(first, end, device=windows.device))
    return torch.cat(targets), torch.cat(losses), log_probs


def self_check(scorer: Scorer, model: GPT, count: int, log: Callable) -> None:
    """Score `count` windows, evenly spread, again by `plain_losses`. Raises ConfigError."""
    total = len(scorer.windows)
    every = torch.linspace(0, total - 1, min(count, total)).round().long().unique()
    with train_gpt.Progress("self-check", 1):
        targets, plain, _ = plain_losses(model, scorer.val, scorer.windows[every])
    fast = scorer.sums[0, targets]
    sizes = scorer.val.target_bytes[targets]
    plain_bpb = bits_per_byte(plain, sizes)
    fast_bpb = bits_per_byte(fast, sizes)
    worst = (plain - fast).abs().max().item()
    log(
        f"self_check: {len(every)} of {total} windows one at a time: plain_bpb:{plain_bpb:.8f} "
        f"fast_bpb:{fast_bpb:.8f} largest_difference:{worst:.1e} nats"
    )
    apart = abs(fast_bpb - plain_bpb)
    bound = 1e-6 if model.dtype == torch.float32 else 1e-3
    require(apart <= bound, f"self-check failed: {apart:.1e} bits per byte apart")


# ---- Memory of scored text -----------------------------------------------------------------------

NGRAM_BYTES = 220  # of memory to have for a target; of millions, one takes 130 to 160
NGRAM_SECONDS = 2.2e-6  # to have for a target; of 40 million, one takes 1.3e-6 on 2 cores

# The rest was chosen on training documents.
NGRAM_ORDER = 8  # tokens of the longest context
NGRAM_LOCAL_ORDER = 2  # of the longest one that is also counted in the target's document alone
NGRAM_SEEN = torch.tensor([1, 2, 3, 5, 9, 20, 50, 200]).int()  # edges of buckets of Counts.seen
NGRAM_REPEATS = torch.tensor([1.01, 1.3, 1.7, 2.2, 3.0, 5.0, 10.0])  # of seen / distinct
NGRAM_AGE = torch.tensor([128, 1024]).int()  # of age
NGRAM_BUCKETS = 9 * 8 * 3
NGRAM_PRIOR = 0.1  # weight of the counts in a bucket without targets
NGRAM_PRIOR_TARGETS = 4.0  # targets that this prior counts for
NGRAM_CHUNK = 4096  # targets at most between two updates of the weights; few at first


@dataclass
class Counts:
    """What the text before each of some targets says of it, (n,); int32 but for `targets`."""

    order: int  # tokens of the context
    is_local: bool  # counted in the target's document, not in all of the text
    targets: Tensor  # in no order; without those whose context the text has but once
    seen: Tensor  # earlier occurrences of the context
    hits: Tensor  # of them, those that the target's token followed
    distinct: Tensor  # different tokens that followed
    age: Tensor  # targets since the last of them, if there are any


def starts_of_runs(*keys: Tensor) -> Tensor:
    """Return for every place where its run begins, in which all `keys` are equal, (n,) int32."""
    starts = torch.arange(len(keys[0]), dtype=torch.int32)
    is_new = torch.zeros(len(starts), dtype=torch.bool)
    for key in keys:
        is_new[1:] |= key[1:] != key[:-1]
    starts *= is_new
    np.maximum.accumulate(starts.numpy(), out=starts.numpy())
    return starts


def count_pasts(
    targets: Tensor, by_pair: Tensor, keys: list[Tensor], pair_keys: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return seen, hits, distinct and age of `Counts`.

    Places of equal `keys` form runs, in which targets ascend; those of equal `pair_keys` do so
    once sorted by `by_pair`. A place's past is the part of its run before it.
    """
    begin = starts_of_runs(*keys)
    pair_begin = starts_of_runs(*pair_keys)
    places = torch.arange(len(targets), dtype=torch.int32)
    hits = torch.empty_like(begin).scatter_(0, by_pair, places - pair_begin)

    first_times = (hits == 0).int()
    before = first_times.cumsum(0, dtype=torch.int32).sub_(first_times)
    distinct = before - before.index_select(0, begin)
    age = targets.diff(prepend=targets[:1]).int()
    return places - begin, hits, distinct, age


def count_contexts(tokens: Tensor) -> Iterator[Counts]:
    """Yield exact counts of contexts of 0 to NGRAM_ORDER tokens, from short to long.

    Target i is token i + 1; token 0 is in no context. Contexts are sorted, not hashed: in a run
    of one context, in the order of the text, a target's place is the number of those before it.
    A context and its target are the context, one token longer, of the target that comes next.
    """
    vocab_size = int(tokens.max()) + 1
    document = (tokens == train_gpt.BOS_ID).cumsum(0, dtype=torch.int32)
    targets = torch.arange(len(tokens) - 1)  # by context, then in the order of the text
    context = torch.zeros(len(targets), dtype=torch.int32)
    for order in range(NGRAM_ORDER + 1):
        pair = context.long().mul_(vocab_size).add_(tokens.index_select(0, targets + 1))
        pair, by_pair = pair.sort(stable=True)
        pair_targets = targets.index_select(0, by_pair)
        if order <= NGRAM_LOCAL_ORDER:
            keys = [context, document.index_select(0, targets)]
            pair_keys = [pair, document.index_select(0, pair_targets)]
            yield Counts(order, True, targets, *count_pasts(targets, by_pair, keys, pair_keys))
        if order > 0:
            yield Counts(order, False, targets, *count_pasts(targets, by_pair, [context], [pair]))

        # Contexts that the text has but once have no past, and none that contain them has.
        goes_on = pair[1:] == pair[:-1]
        is_again = torch.zeros(len(pair), dtype=torch.bool)
        is_again[1:] |= goes_on
        is_again[:-1] |= goes_on
        is_again &= pair_targets < len(tokens) - 2
        again = is_again.nonzero()[:, 0]
        if len(again) == 0:
            break
        context = starts_of_runs(pair).index_select(0, again)
        targets = pair_targets.index_select(0, again).add_(1)


def mix_in(probs: Tensor, counts: Counts) -> None:
    """Make `probs` p (targets,) into (1 - w) p + w hits / seen, in place: distributions all.

    The weight w is that of the target's bucket, which is known before the target: the mean of the
    counts' posterior probability over the bucket's targets up to the chunk before, by online EM.
    """
    buckets = torch.zeros(len(probs), dtype=torch.uint8)  # 0: the context was not seen before
    shares = torch.zeros(len(probs), dtype=torch.float64)
    columns = (counts.targets, counts.seen, counts.hits, counts.distinct, counts.age)
    # Fresh memory costs more time than arithmetic; parts fit into the caches.
    for targets, seen, hits, distinct, age in zip(*(c.split(65_536) for c in columns), strict=True):
        often = torch.bucketize(seen, NGRAM_SEEN, right=True)
        repeats = torch.bucketize(seen / distinct.clamp(min=1), NGRAM_REPEATS, right=True)
        recent = torch.bucketize(age, NGRAM_AGE, right=True)
        bucket = ((often * 8 + repeats) * 3 + recent) * (seen > 0)
        buckets.scatter_(0, targets, bucket.byte())
        shares.scatter_(0, targets, hits.double() / seen.clamp(min=1))

    total = torch.full((NGRAM_BUCKETS,), NGRAM_PRIOR_TARGETS, dtype=torch.float64)
    explained = NGRAM_PRIOR * total
    explained[0] = 0.0
    done = 0
    while done < len(probs):
        chunk = slice(done, done + min(max(done, 16), NGRAM_CHUNK))
        p = probs[chunk]
        bucket = buckets[chunk].long()
        weight = (explained / total).index_select(0, bucket)
        gain = weight * shares[chunk]
        p.mul_(1 - weight).add_(gain)
        explained += torch.bincount(bucket, gain / p, NGRAM_BUCKETS)
        total += torch.bincount(bucket, minlength=NGRAM_BUCKETS)
        done = chunk.stop


def mix(losses: Tensor, tokens: Tensor, deadline: float = math.inf) -> tuple[Tensor, int]:
    """Mix a model's distributions, of which `losses` (targets,) tells enough, with exact counts.

    Returns the mixture's losses, nats in float64, and the tokens of the longest context in it:
    those whose turn would end after `deadline` on the host's clock, s, are left out.
    """
    # PyTorch does not share so few among threads, whose number would change the rounding.
    probs = torch.cat([(-part.double()).exp() for part in losses.cpu().split(NGRAM_CHUNK)])
    order = NGRAM_ORDER
    slowest = 0.0
    begun = time.perf_counter()
    for counts in count_contexts(tokens.cpu()):
        mix_in(probs, counts)
        now = time.perf_counter()
        slowest = max(slowest, now - begun)
        begun = now
        if now + slowest > deadline:
            order = counts.order
            break
    return torch.cat([-part.log() for part in probs.split(NGRAM_CHUNK)]), order


def plan_ngram(config: EvalConfig, num_targets: int, log: Callable) -> float:
    """Log what n-gram mixing takes, and return its seconds. Raises ConfigError for too much."""
    if config.ngram == "off":
        return 0.0
    needed = NGRAM_BYTES * num_targets
    seconds = NGRAM_SECONDS * num_targets
    takes = f"{needed / 1e9:.1f} GB of memory for {num_targets} targets"
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", meminfo.read_text())[1])
        require(needed <= free, f"NGRAM=on takes {takes}, and {free / 1e9:.1f} GB are free")
    log(f"ngram: up to {takes} and {seconds:.0f}s")
    return seconds


def remember(
    scorer: Scorer, score: train_gpt.Score, config: EvalConfig, started: float, log: Callable
) -> dict | None:
    """Mix what all ranks scored with a memory of it; log that and return a summary, or None."""
    # Rank 0 alone takes the memory.
    if config.ngram == "off" or scorer.dist.rank > 0:
        return None
    begun = time.perf_counter()
    deadline = started + config.limit
    if begun + NGRAM_SECONDS * score.target_tokens > deadline:
        log(f"EVAL_MAX_SECONDS={config.limit:g}: no time for n-gram mixing")
        return None

    with train_gpt.Progress("mix n-grams", 1):
        losses, order = mix(scorer.sums[0, :-1], scorer.val.tokens, deadline=deadline)
    if order < NGRAM_ORDER:
        log(f"EVAL_MAX_SECONDS={config.limit:g}: no n-gram contexts of more than {order} tokens")
    nats = math.fsum(float(part.sum()) for part in losses.split(NGRAM_CHUNK))
    bpb = nats / math.log(2) / score.scored_bytes
    seconds = time.perf_counter() - begun
    mixed = replace(score, val_loss=nats / score.target_tokens, bpb=bpb, seconds=seconds)
    log(f"final_ngram_exact {mixed} eval_time:{1000 * seconds:.0f}ms")
    val_bpb = None if score.partial else bpb
    return {"order": order, "val_bpb": val_bpb, "val_loss": mixed.val_loss, "seconds": seconds}


# ---- Audit ---------------------------------------------------------------------------------------

AUDIT_ROUNDING = 1e-4  # nats by which float32 may differ between shapes of a batch
# Those of data/lossless_case.py, which does not stand beside a record. Text without them has as
# many bytes as the original, because both letters of a pair have.
CASE_OPERATORS = re.compile(r"\ue004(.)|[\ue001-\ue003]", re.DOTALL)
Row = tuple[str, str, str, bool]  # condition, test, finding, whether it holds


class Observed(Scorer):
    """A Scorer that scores at once, in two segments, and keeps the weights that scored a batch."""

    def __init__(
        self, model: GPT, config: EvalConfig, windowing: Windowing, val: ValData, rank=0, ranks=1
    ):
        super().__init__(model, val, Dist(rank, ranks, val.tokens.device), windowing, "audit")
        self.states = []  # batches of windows and weights
        score_split(self, model, config, 0.0, segments=2)
        self.losses, self.times = self.sums[:, :-1]

    def score(self, windows: Tensor) -> None:
        self.states.append((windows, snapshot(self.forward)))
        super().score(windows)


def rewritten(val: ValData, where: slice, vocab_size: int) -> ValData:
    """Return `val` with another token in place of each one in `where`."""
    tokens = val.tokens.clone()
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(1, vocab_size, tokens[where].shape, generator=generator)
    tokens[where] = (tokens[where] + shift.int().to(tokens.device)) % vocab_size
    return replace(val, tokens=tokens)


def audit_bytes(val: ValData, sp, max_tokens: int = 1_000_000) -> Row:
    """Compare bytes as counted with those of the decoded text, over whole documents."""
    count = len(val.tokens) if val.sidecar else max_tokens
    tokens = val.tokens[: count + 1].cpu()
    sizes = val.target_bytes[:count].cpu()
    # A transform other than the lossless case's is not undone here.
    if val.sidecar and sp.is_unknown(sp.piece_to_id("\ue004")):
        unpaid = int(sizes[tokens[1:] == train_gpt.BOS_ID].sum())
        finding = f"{int(sizes.sum())}; 0 expected for BOS, {unpaid} found"
        return "bytes", "sidecar: the original text's", finding, unpaid == 0

    rest, *documents = split_documents(tokens)
    is_cut = len(tokens) < len(val.tokens) or val.partial
    if is_cut and len(documents) > 1:
        tokens = tokens[: -len(documents.pop())]
    counted = int(sizes[len(rest) : len(tokens) - 1].sum())
    decoded = 0
    for document in documents:
        text = sp.decode(document.tolist())
        if val.sidecar:
            text = CASE_OPERATORS.sub(r"\1", text)
        decoded += len(text.encode())
    test = "sidecar: " if val.sidecar else ""
    test += f"against the UTF-8 text that SentencePiece decodes, {len(documents)} whole documents"
    return "bytes", test, f"{counted} against {decoded}", counted == decoded > 0


def search_counts(tokens: list[int], target: int, order: int, is_local: bool) -> list[int]:
    """Return seen, hits, distinct and age of `Counts` by a plain search of the text before."""
    text = tokens[: target + 1]
    begin = order
    if is_local and train_gpt.BOS_ID in text:
        begin = max(begin, target - text[::-1].index(train_gpt.BOS_ID))
    context = text[target + 1 - order :]
    ends = [end for end in range(begin, target) if text[end + 1 - order : end + 1] == context]
    followers = [text[end + 1] for end in ends]
    age = target - ends[-1] if ends else 0
    return [len(ends), followers.count(tokens[target + 1]), len(set(followers)), age]


def audit_ngram(losses: Tensor, val: ValData, dists: dict[int, Tensor]) -> Iterator[Row]:
    """Yield what `audit` finds on n-gram mixing; `dists` are the model's (V,) by target."""
    losses = losses.cpu()
    tokens = val.tokens.cpu()
    vocab_size = len(next(iter(dists.values())))
    mixed, _ = mix(losses, tokens)
    places = torch.linspace(NGRAM_ORDER, len(losses) - 1, 32).long().tolist()
    leak = 0.0
    control = 0.0
    for place in places:
        other = rewritten(val, slice(place + 1, None), vocab_size)
        again, _ = mix(torch.cat([losses[:place], losses[place:] + 1]), other.tokens)
        changes = (again - mixed).abs()
        leak = max(leak, float(changes[:place].max()))
        control = max(control, float(changes[place:].max()))
    test = f"other tokens and losses from one of {len(places)} targets on; control: of these"
    finding = f"mixed losses before it change by {leak:.1e} nats at most; control {control:.1e}"
    yield "C1 n-gram", test, finding, leak == 0.0 and control > 1e-2

    worst = 0.0
    for target, log_probs in dists.items():
        known = losses[: target + 1].double()
        text = tokens[: target + 2].clone()
        total = 0.0
        for token, log_prob in enumerate(log_probs.tolist()):
            known[-1] = -log_prob
            text[-1] = token
            total += math.exp(-float(mix(known, text)[0][-1]))
        worst = max(worst, abs(total - 1))
    test = f"each of {vocab_size} tokens as target {' and '.join(map(str, dists))}"
    yield "C2 n-gram", test, f"probabilities sum to 1 within {worst:.1e}", worst <= 1e-9

    equal = []
    for counts in count_contexts(tokens):
        for target in places:
            here = (counts.targets == target) & (counts.seen > 0)
            known = (counts.seen, counts.hits, counts.distinct, counts.age)
            ours = [int(values[here].sum()) for values in known]
            searched = search_counts(tokens.tolist(), target, counts.order, counts.is_local)
            equal.append(ours == searched)
    test = "counts of a target's context, against a search of the text before it"
    yield "C3 n-gram", test, f"{sum(equal)} of {len(equal)} equal", all(equal)


def audit_rows(model: GPT, config: EvalConfig, windowing: Windowing, val: ValData) -> Iterator[Row]:
    """Yield what `audit` finds on a short split."""
    # The rounding of a grouped GEMM depends on its groups.
    rounding = AUDIT_ROUNDING if model.config.is_grouped else 0.0
    vocab_size = model.config.vocab_size
    artifact = snapshot(model)
    honest = Observed(model, config, windowing, val)
    losses = honest.losses
    count = len(losses)

    # Amid the targets of a window, which then reads tokens that the first half must not know, and
    # amid a TTT chunk.
    stride = windowing.stride
    place = 3 * count // 4 // stride * stride + (stride - 1) // 2
    other = rewritten(val, slice(place + 1, None), vocab_size)
    blind = Observed(model, config, windowing, other)
    leak = float((blind.losses - losses)[:place].abs().max())
    other = rewritten(val, slice(0, place), vocab_size)
    past = Observed(model, config, windowing, other).losses
    control = float((past - losses)[place:].abs().max())
    test = f"other tokens after the input of target {place}; control: before"
    finding = f"losses before it change by {leak:.1e} nats at most; control {control:.1e}"
    yield "C1 causal", test, finding, leak <= rounding and control > 1e-2

    at = max(i for i, (windows, _) in enumerate(honest.states) if windows[0, 1] <= place)
    windows, weights = honest.states[at]
    model.load_state_dict(weights)
    targets, again, log_probs = plain_losses(model, val, windows)
    model.load_state_dict(artifact)
    apart = float((again - losses[targets]).abs().max())
    batch = f"batch {at + 1} of {len(honest.states)}"
    test = f"{batch} again by the softmax of all {vocab_size} logits"
    yield "C2 normalised", test, f"losses within {apart:.1e} nats", apart <= AUDIT_ROUNDING

    is_trained = not same(weights, artifact)
    is_blind = same(weights, blind.states[at][1])
    finding = f"{'trained' if is_trained else 'untrained'} ones, "
    finding += f"{'the same' if is_blind else 'OTHER ones'} with other tokens in it"
    learns = config.ttt != "off" and config.ttt_lr > 0
    holds = is_blind and is_trained == learns
    yield "C3 score before update", f"the weights that scored {batch}", finding, holds

    once = int((honest.times == 1).sum())
    test = "a counter on every target"
    yield "C4 single pass", test, f"{once} of {count} scored once", once == count

    if config.ngram == "on":
        dists = {int(windows[-1, 1]): log_probs[0], int(windows[-1, 2]) - 1: log_probs[-1]}
        yield from audit_ngram(losses, val, dists)

    bpb = bits_per_byte(losses, val.target_bytes)
    halves = [Observed(model, config, windowing, val, rank, ranks=2).losses for rank in (0, 1)]
    apart = abs(bits_per_byte(sum(halves), val.target_bytes) - bpb)
    yield "ranks", "two instead of one", f"{apart:.1e} bits per byte apart", apart <= rounding

    single = Observed(model, config, replace(windowing, batch_size=1), val).losses
    apart = abs(bits_per_byte(single, val.target_bytes) - bpb)
    finding = f"{apart:.1e} bits per byte apart"
    yield "batches", "of a single window", finding, apart <= AUDIT_ROUNDING

    kept = same(artifact, snapshot(model))
    test = f"its {len(artifact)} tensors afterwards"
    yield "artifact", test, "bit-equal" if kept else "CHANGED", kept


def audit(
    model: GPT, hp: train_gpt.Hyperparameters, config: EvalConfig, val: ValData, log: Callable
) -> bool:
    """Log a table of tests of the code that scores; return whether all hold. Raises ConfigError."""
    windowing = config.windowing(hp)
    count = min(len(val.tokens) - 1, 3 * windowing.seq_len)
    require(count >= 24, f"{count} targets are too few to audit")
    chunk = count // 6  # three of them in each of two segments
    stride = max(min(config.eval_stride, chunk), chunk // 4)
    config = replace(config, ttt_chunk_tokens=chunk, eval_max_seconds=0.0)
    # More than one batch for two ranks.
    windowing = replace(windowing, stride=stride, batch_size=min(windowing.batch_size, 4))
    part = replace(val, tokens=val.tokens[: count + 1], target_bytes=val.target_bytes[:count])

    shape = f"window:{windowing.seq_len} stride:{stride}"
    log(f"audit of the first {count} targets, {shape} {config.stated()}")
    log("| condition | test | finding | |\n|---|---|---|---|")
    all_hold = True
    with train_gpt.Progress("audit", 1):
        rows = audit_rows(model, config, windowing, part)
        bytes_row = audit_bytes(val, train_gpt.load_tokenizer(hp)[0])
        for name, test, finding, holds in itertools.chain(rows, [bytes_row]):
            log(f"| {name} | {test} | {finding} | {'pass' if holds else 'FAIL'} |")
            all_hold = all_hold and holds
    return all_hold


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    usage = "eval_sliding.py [--self-check N | --audit] ARTIFACT"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def refuse(message: str) -> None:
        require(False, f"usage: {usage}: {message}")

    parser.error = refuse
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="logs/RUN_ID.ptz")
    modes = parser.add_mutually_exclusive_group()
    check = "score N windows again, one at a time"
    modes.add_argument("--self-check", type=int, default=0, metavar="N", help=check)
    modes.add_argument("--audit", action="store_true", help="test the rules; status 1 if one fails")
    args = parser.parse_args()
    require(args.self_check >= 0, f"--self-check {args.self_check}: expected a number of windows")
    return args


def score_or_stop(
    scorer: Scorer, model: GPT, config: EvalConfig, log: train_gpt.Log, started: float
) -> Tensor:
    """Run `score_split`; SIGINT and SIGTERM end it with a PARTIAL score of what is scored here."""
    # TTT leaves the time that n-gram mixing takes.
    begun = started - plan_ngram(config, scorer.num_targets, log)
    try:
        with scorer.progress:
            return score_split(scorer, model, config, begun)
    except KeyboardInterrupt as error:
        count = int((scorer.sums[1, :-1] == 1).sum())
        scored = f"{count} of {scorer.num_targets} targets scored here"
        so_far = scorer.total(finished=False) if count else "nothing"
        log(f"interrupted by signal {error.args[0]}, {scored}: {so_far}")
        raise


def main() -> None:
    """Score the artifact of the command line and log one JSON line. Raises ConfigError."""
    started = time.perf_counter()
    args = parse_arguments()
    path = args.artifact
    hp = train_gpt.Hyperparameters.from_env(os.environ)
    config = EvalConfig.from_env(os.environ)
    dist = Dist.from_torchrun()
    if args.audit:
        hp = replace(hp, dtype="float32", attention="math")
        require(dist.world_size == 1, "--audit is for one process; it plays two ranks itself")
    if args.self_check:
        require(config.ttt == "off", "TTT=sgd: --self-check is for TTT=off, --audit for both")

    torch.set_float32_matmul_precision("highest" if hp.dtype == "float32" else "high")
    model, hp, digest = load_artifact(path, hp, dist.device, config.eval_seq_len)
    windowing = config.windowing(hp)
    val = ValData.load(hp, dist.device)
    other = f"{path} was trained with another tokenizer (TOKENIZER_PATH)"
    require(val.tokenizer_sha256 == digest, other)
    check_tokenizer_made(val.tokens, train_gpt.load_tokenizer(hp)[0], hp.dataset_dir)

    log = train_gpt.Log(dist, path.with_suffix(".txt"))
    shape = f"window:{windowing.seq_len} stride:{windowing.stride}"
    log(f"sliding evaluation of {path} {shape} world_size:{dist.world_size}")
    log(f"code_sha256:{hashlib.sha256(train_gpt.submission_source()).hexdigest()}")
    trained = f"trained_window:{hp.model.train_seq_len} rope_base:{model.rope_base:.0f}"
    log(f"{trained} sidecar:{val.sidecar} {config.stated()}")
    if val.partial:
        log(f"warning: the validation split lacks {val.lacks}: scores are PARTIAL")
    train_gpt.warn_of_typos(log, os.environ, train_gpt.knob_fields(EvalConfig))
    compiles = train_gpt.can_compile(hp, dist.device) and not args.audit
    train_gpt.choose_attention(hp.attention, model, dist.device, log, compiles)
    if args.audit:
        sys.exit(0 if audit(model, hp, config, val, log) else 1)

    forward = model
    if compiles:
        forward = torch.compile(model, fullgraph=True, dynamic=False)
        windowing = compile_on_random_tokens(forward, model, config, windowing, dist)
        log(f"compiled on random tokens, {time.perf_counter() - started:.1f}s since the start")
    # NCCL sets itself up on its first use: here, not when time is up.
    dist.all_sum(torch.zeros(1, device=dist.device))

    scorer = Scorer(forward, val, dist, windowing, "slide")
    epochs = score_or_stop(scorer, model, config, log, started).to(dist.device)
    epochs_run, epochs_asked = dist.all_sum(epochs).tolist()
    score = scorer.total()
    kind = "sliding_window" if config.ttt == "off" else "ttt"
    log(f"quantized_{kind} {score} eval_time:{1000 * score.seconds:.0f}ms")
    log(f"final_{kind}_exact {score}")
    log(f"target_tokens:{score.target_tokens} scored_bytes:{score.scored_bytes}")
    if config.ttt != "off":
        log(f"ttt_epochs: {epochs_run} of {epochs_asked}")
    if epochs_run < epochs_asked:
        log(f"EVAL_MAX_SECONDS={config.limit:g}: fewer epochs of TTT, all targets")
    if args.self_check:
        self_check(scorer, model, args.self_check, log)
    ngram = remember(scorer, score, config, started, log)

    spent = time.perf_counter() - started
    log(f"total_eval_time:{spent:.1f}s")
    if spent > config.limit:
        log(f"warning: {spent:.1f} s are more than EVAL_MAX_SECONDS={config.limit:g}")
    summary = {
        "event": "eval_summary",
        "artifact_path": str(path),
        "partial": score.partial,
        "stride": windowing.stride,
        "val_bpb": None if score.partial else score.bpb,
        "val_loss": score.val_loss,
        "seq_len": windowing.seq_len,
        "target_tokens": score.target_tokens,
        "scored_bytes": score.scored_bytes,
        "eval_seconds": score.seconds,
        "ttt": config.ttt,
        "ttt_epochs": [epochs_run, epochs_asked],
        "ngram": ngram,
    }
    log(json.dumps(summary))


if __name__ == "__main__":
    train_gpt.run_entry_point(main)
