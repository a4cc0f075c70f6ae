"""Score an artifact of train_gpt.py by sliding window: from it, a tokenizer and validation shards.

    python eval_sliding.py logs/RUN_ID.ptz
    torchrun --standalone --nproc_per_node=8 eval_sliding.py logs/RUN_ID.ptz
    TTT=sgd python eval_sliding.py logs/RUN_ID.ptz               # score-first test-time training
    python eval_sliding.py --self-check 200 logs/RUN_ID.ptz      # 200 windows again, one at a time
    TTT=sgd python eval_sliding.py --audit logs/RUN_ID.ptz       # the challenge's rules, tested

Every target is scored once, with EVAL_SEQ_LEN - EVAL_STRIDE tokens of context or more where the
text has them. The last layer has queries, and the head inputs, at scored positions only. The model
comes from the artifact; the environment sets the knobs of EvalConfig and DATA_PATH,
TOKENIZER_PATH, VAL_MAX_TOKENS (a PARTIAL score), MICRO_BATCH_TOKENS, DTYPE, ATTENTION, COMPILE.
The audit is in float32, with plain attention and not compiled: what has to be equal then is, to
the bit. All of it goes to the end of the training's log.
"""

import argparse
import hashlib
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from train_gpt import (
    BOS_ID,
    GPT,
    Dist,
    Hyperparameters,
    Log,
    Scorer,
    ValData,
    Windowing,
    can_compile,
    check_values,
    choice,
    choose_attention,
    knob,
    knob_fields,
    load_artifact,
    load_tokenizer,
    out_of_memory,
    parse_knobs,
    require,
    run_entry_point,
    scoring_windows,
    submission_source,
    warn_of_typos,
)

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

    @classmethod
    def from_env(cls, environ: dict[str, str]) -> "EvalConfig":
        """Read and check the knobs. Raises ConfigError naming the variable and the value."""
        config = cls(**parse_knobs(cls, environ))
        check_values(config)
        return config

    def windowing(self, hp: Hyperparameters) -> Windowing:
        """Return how the split is cut for this model. Raises ConfigError for too long a stride."""
        window = self.eval_seq_len or hp.model.train_seq_len
        fits = self.eval_stride <= window
        require(fits, f"EVAL_STRIDE={self.eval_stride}: above the window of {window} tokens")
        return Windowing(window, self.eval_stride, max(1, hp.micro_batch_tokens // window))

    def stated(self) -> str:
        """Return the knobs of test-time training for the log, or that it is off."""
        if self.ttt == "off":
            return "ttt:off"
        chunk = f"ttt_epochs:{self.ttt_epochs} ttt_chunk_tokens:{self.ttt_chunk_tokens}"
        return f"ttt:{self.ttt} ttt_lr:{self.ttt_lr} {chunk} ttt_segments:{TTT_SEGMENTS}"


# ---- Scoring -------------------------------------------------------------------------------------


def snapshot(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def bits_per_byte(losses: Tensor, target_bytes: Tensor) -> float:
    """Return bits per byte from losses in nats and the bytes of their targets."""
    return losses.double().sum().item() / math.log(2) / int(target_bytes.sum())


def halve_batch(scorer: Scorer, error: RuntimeError, tried: int) -> None:
    """Halve the batch after memory ran out with `tried` windows. Raises any other error again."""
    if not out_of_memory(error):
        raise error
    require(tried > 1, f"a window of {scorer.seq_len} tokens exceeds memory; lower EVAL_SEQ_LEN")
    scorer.batch_size = tried // 2
    less = f"{scorer.batch_size} windows per forward pass from here on"
    print(f"warning: out of memory, {less}", file=sys.stderr)


def score_within_memory(scorer: Scorer, windows: Tensor) -> None:
    """Score windows (W, 3), with half the batch as long as memory runs out. Raises ConfigError."""
    while len(windows):
        batch = windows[: scorer.batch_size]
        try:
            scorer.score(batch)
        except RuntimeError as error:
            halve_batch(scorer, error, scorer.batch_size)
        else:
            windows = windows[len(batch) :]


def score_split(
    scorer: Scorer,
    model: GPT,
    config: EvalConfig,
    log: Callable,
    started: float,
    score: Callable | None = None,
    segments: int = TTT_SEGMENTS,
) -> Tensor:
    """Score this rank's share, in an evaluation that began at `started` on the host's clock, s.

    `score` replaces, to observe it, what scores windows. Returns epochs of TTT run and asked for.
    """
    score = score or partial(score_within_memory, scorer)
    with scorer.progress:
        if config.ttt == "sgd":
            return score_first(scorer, model, config, log, started, score, segments)
        score(scorer.share)
    return torch.zeros(2, dtype=torch.int64)


def compile_on_random_tokens(
    forward: Callable, model: GPT, config: EvalConfig, windowing: Windowing, dist: Dist
) -> Windowing:
    """Run everything once on random tokens, which leaves the weights as they were.

    Returns the windowing with the batch that fits the memory of every rank.
    """
    count = windowing.stride
    if config.ttt == "sgd":
        count += config.ttt_chunk_tokens
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (count + 1,), generator=generator)
    bytes_of_one = torch.ones(count, dtype=torch.int32, device=dist.device)
    val = ValData(tokens.int().to(dist.device), bytes_of_one, "", False)
    trial = replace(config, ttt_epochs=1, eval_max_seconds=0.0)
    scorer = Scorer(forward, val, Dist(0, 1, dist.device), windowing, "compile")
    score_split(scorer, model, trial, print, 0.0, segments=1)
    (largest,) = dist.all_max(-scorer.batch_size)
    return replace(windowing, batch_size=-int(largest))


@torch.no_grad()
def plain_losses(model: GPT, val: ValData, windows: Tensor) -> Tensor:
    """Return the losses of windows' targets in order, in nats, one window at a time, unpadded."""
    losses = []
    for start, first, end in windows.tolist():
        tokens = val.tokens[None, start : end + 1].long()
        nll = model(tokens[:, :-1], tokens[:, 1:], reduction="none")
        losses.append(nll[0, first - start :])
    return torch.cat(losses)


def targets_of(windows: Tensor) -> Tensor:
    """Return the targets that windows (W, 3) score, in order."""
    device = windows.device
    return torch.cat([torch.arange(a, b, device=device) for _, a, b in windows.tolist()])


def self_check(scorer: Scorer, model: GPT, count: int, rate: float, log: Callable) -> None:
    """Score `count` windows, evenly spread, again by `plain_losses`. Raises ConfigError."""
    total = len(scorer.windows)
    every = torch.linspace(0, total - 1, min(count, total)).round().long().unique()
    windows = scorer.windows[every]
    targets = targets_of(windows)
    started = time.perf_counter()
    plain = plain_losses(model, scorer.val, windows)
    plain_rate = len(targets) / (time.perf_counter() - started)

    fast = scorer.sums[0, targets]
    worst = (plain - fast).abs().max().item()
    ours = bits_per_byte(fast, scorer.val.target_bytes[targets])
    reference = bits_per_byte(plain, scorer.val.target_bytes[targets])
    log(
        f"self_check: {len(windows)} of {total} windows one at a time: "
        f"plain_bpb:{reference:.8f} fast_bpb:{ours:.8f} largest_difference:{worst:.1e} nats, "
        f"plain tok/s: {plain_rate:.0f} fast tok/s: {rate:.0f}"
    )
    bound = 1e-6 if model.dtype == torch.float32 else 1e-3
    apart = abs(ours - reference)
    require(apart <= bound, f"self-check failed: {apart:.1e} bits per byte apart")


# ---- Test-time training --------------------------------------------------------------------------


def add_gradients(scorer: Scorer, tiles: Tensor, batch_size: int) -> None:
    """Add the gradients of the mean loss over the targets of the windows `tiles`, in batches."""
    count = tiles[-1, 2] - tiles[0, 1]
    for batch in tiles.split(batch_size):
        input_ids, target_ids, _, columns = scorer.batch(batch, scorer.seq_len, batch_size)
        nll = scorer.forward(input_ids, target_ids, reduction="none", scored=None)
        (torch.where(columns < scorer.num_targets, nll, 0).sum() / count).backward()


def adapt(scorer: Scorer, optimizer: torch.optim.Optimizer, first: int, end: int) -> None:
    """Take a step on the mean loss of the targets from `first` to before `end`, scored before."""
    tiles = scoring_windows(end - first, scorer.seq_len, scorer.seq_len) + first
    tiles = tiles.to(scorer.windows.device)
    while True:
        optimizer.zero_grad()
        batch_size = min(scorer.batch_size, len(tiles))
        try:
            # In a frame of its own, which an error takes its tensors with.
            add_gradients(scorer, tiles, batch_size)
            break
        except RuntimeError as error:
            halve_batch(scorer, error, batch_size)
    parameters = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(parameters, TTT_CLIP_NORM, foreach=True)
    optimizer.step()


def affordable_epochs(
    config: EvalConfig, elapsed: float, to_score: float, per_epoch: float, updates: int
) -> int:
    """Return the epochs of the next of `updates` updates that EVAL_MAX_SECONDS allows.

    All updates get as many, of `per_epoch` seconds each (0 = not known yet), besides `to_score`
    seconds of scoring to come; 2 % are kept in reserve.
    """
    if config.eval_max_seconds == 0:
        return config.ttt_epochs
    spare = 0.98 * config.eval_max_seconds - elapsed - to_score
    return int(min(max(spare, 0) / max(per_epoch * updates, 1e-9), config.ttt_epochs))


def score_first(
    scorer: Scorer,
    model: GPT,
    config: EvalConfig,
    log: Callable,
    started: float,
    score: Callable,
    segments: int,
) -> Tensor:
    """Score a chunk, then train on it, then score the next (upstream PR #1413).

    Each of `segments` contiguous parts of the split begins with the artifact's weights, so it
    does not matter how ranks share them. A part's last chunk is not trained on. Leaves `model` as
    it was. Returns epochs run and asked for, (2,). Raises ConfigError.
    """

    def elapsed() -> float:
        if scorer.dist.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    windows = scorer.windows
    artifact = snapshot(model)
    segments = min(segments, len(windows))
    bounds = [len(windows) * i // segments for i in range(segments + 1)]
    per_chunk = max(1, config.ttt_chunk_tokens // scorer.stride)
    split = [windows[a:b].split(per_chunk) for a, b in itertools.pairwise(bounds)]
    mine = split[scorer.dist.rank :: scorer.dist.world_size]

    updates = sum(len(chunks) - 1 for chunks in mine)
    epochs_asked = updates * config.ttt_epochs
    epochs_run = 0
    windows_left = sum(len(chunk) for chunks in mine for chunk in chunks)
    windows_done = 0
    seconds_scoring = 0.0
    seconds_training = 0.0
    is_cut = False
    for chunks in mine:
        model.load_state_dict(artifact)
        optimizer = torch.optim.SGD(model.parameters(), config.ttt_lr, TTT_MOMENTUM)
        for i, chunk in enumerate(chunks):
            begun = elapsed()
            score(chunk)
            now = elapsed()
            seconds_scoring += now - begun
            windows_left -= len(chunk)
            windows_done += len(chunk)
            if i + 1 == len(chunks):
                break

            to_score = windows_left * seconds_scoring / windows_done
            per_epoch = seconds_training / max(epochs_run, 1)
            epochs = affordable_epochs(config, now, to_score, per_epoch, updates)
            if epochs < config.ttt_epochs and not is_cut:
                is_cut = True
                limit = f"EVAL_MAX_SECONDS={config.eval_max_seconds:g}"
                log(f"{limit}: fewer epochs of TTT after {now:.1f} s, all targets")
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


# ---- Audit ---------------------------------------------------------------------------------------

AUDIT_ROUNDING = 1e-4  # nats by which float32 may differ between shapes of a batch


def rewritten(val: ValData, where: slice, vocab_size: int) -> ValData:
    """Return `val` with another token in place of each one in `where`."""
    tokens = val.tokens.clone()
    generator = torch.Generator().manual_seed(0)
    shift = torch.randint(1, vocab_size, tokens[where].shape, generator=generator)
    tokens[where] = (tokens[where] + shift.int().to(tokens.device)) % vocab_size
    return replace(val, tokens=tokens)


def observed_run(
    model: GPT, config: EvalConfig, windowing: Windowing, val: ValData, ranks: int = 1
) -> tuple[Tensor, Tensor, list]:
    """Score `val` by the code that scores, as so many ranks in turn.

    Returns every target's loss in nats, how often it was scored, and, in order, windows with the
    weights that scored them.
    """
    device = val.tokens.device
    sums = torch.zeros(2, len(val.tokens) - 1, device=device)
    states = []
    for rank in range(ranks):
        scorer = Scorer(model, val, Dist(rank, ranks, device), windowing, "audit")

        def observed(windows: Tensor, scorer: Scorer = scorer) -> None:
            states.append((windows, snapshot(model)))
            score_within_memory(scorer, windows)

        score_split(scorer, model, config, print, 0.0, observed, segments=2)
        sums += scorer.sums[:, :-1]
    return *sums, states


@torch.no_grad()
def total_probability(model: GPT, scorer: Scorer, window: Tensor) -> tuple[float, float]:
    """Return the probabilities' sum over the vocabulary at a window's last target, and its loss.

    Each token is scored as the target by what scores; window is (3,).
    """
    input_ids, _, _, _ = scorer.batch(window[None], scorer.stride, 1)
    last = window[2] - 1
    losses = []
    for tokens in torch.arange(model.config.vocab_size, device=window.device).split(1024):
        position = (last - window[0]).expand(1, len(tokens))
        nll = model(input_ids, tokens[None], reduction="none", scored=position)
        losses.append(nll[0].double())
    losses = torch.cat(losses)
    return float(losses.neg().exp().sum()), float(losses[scorer.val.tokens[last + 1]])


def audit_bytes(val: ValData, sp, max_tokens: int = 1_000_000) -> tuple[str, str, str, bool]:
    """Compare, over whole documents, bytes as counted with those of the decoded text."""
    tokens = val.tokens[: max_tokens + 1].cpu()
    sizes = val.target_bytes[:max_tokens].cpu()
    if val.sidecar:
        unpaid = int(sizes[tokens[1:] == BOS_ID].sum())
        finding = f"{int(sizes.sum())}; 0 expected for BOS, {unpaid} found"
        return "bytes", "sidecar: the original text's", finding, unpaid == 0

    starts = torch.nonzero(tokens == BOS_ID).flatten().tolist()
    is_whole_split = len(tokens) == len(val.tokens) and not val.partial
    if len(starts) < 2 or is_whole_split:
        starts.append(len(tokens))  # where the document after the split's last would begin
    documents = [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]
    counted = int(sizes[starts[0] : starts[-1] - 1].sum())
    decoded = sum(len(sp.decode(document).encode()) for document in documents)
    test = f"against the UTF-8 text that SentencePiece decodes, {len(documents)} whole documents"
    return "bytes", test, f"{counted} against {decoded}", counted == decoded > 0


def audit_rows(
    model: GPT, config: EvalConfig, windowing: Windowing, val: ValData
) -> list[tuple[str, str, str, bool]]:
    """Return what `audit` finds on a short split: condition, test, finding, whether it holds."""
    # The rounding of a grouped GEMM depends on its groups.
    is_exact = not model.config.is_grouped
    vocab_size = model.config.vocab_size
    count = len(val.tokens) - 1
    artifact = snapshot(model)
    losses, times, states = observed_run(model, config, windowing, val)

    # Amid the targets of a window, which then reads tokens that the first half must not know, and
    # amid a TTT chunk.
    stride = windowing.stride
    places = [q * count // 4 // stride * stride + (stride - 1) // 2 for q in (1, 3)]
    leak = 0.0
    for place in places:
        other = rewritten(val, slice(place + 1, None), vocab_size)
        future, _, future_states = observed_run(model, config, windowing, other)
        leak = max(leak, float((future - losses)[:place].abs().max()))
    other = rewritten(val, slice(0, places[1]), vocab_size)
    past, _, _ = observed_run(model, config, windowing, other)
    control = float((past - losses)[places[1] :].abs().max())
    test = f"other tokens after the input of target {places[0]}, {places[1]}; control: before"
    finding = f"losses before it change by {leak:.1e} nats at most; control {control:.1e}"
    is_causal = leak <= (0.0 if is_exact else AUDIT_ROUNDING) and control > 1e-2
    rows = [("C1 causal", test, finding, is_causal)]

    scorer = Scorer(model, val, Dist(0, 1, val.tokens.device), windowing, "audit")
    windows = states[0][0]
    windows = windows[:: max(1, len(windows) // 4)]
    found = torch.tensor([total_probability(model, scorer, window) for window in windows])
    off = float((found[:, 0] - 1).abs().max())
    apart = float((losses[windows[:, 2] - 1].cpu() - found[:, 1]).abs().max())
    test = f"at {len(windows)} positions each of the {vocab_size} tokens scored as the target"
    finding = f"probabilities add up to 1 within {off:.1e}; the true loss within {apart:.1e} nats"
    rows.append(("C2 normalised", test, finding, off < 1e-3 and apart <= AUDIT_ROUNDING))

    at = max(i for i, (windows, _) in enumerate(states) if windows[0, 1] <= places[1])
    windows, weights = states[at]
    is_trained = not same(weights, artifact)
    is_blind = same(weights, future_states[at][1])
    model.load_state_dict(weights)
    again = plain_losses(model, val, windows)
    model.load_state_dict(artifact)
    apart = float((again - losses[targets_of(windows)]).abs().max())
    test = f"chunk {at + 1} of {len(states)} again with the weights that scored it"
    finding = f"losses within {apart:.1e} nats; {'trained' if is_trained else 'untrained'} "
    finding += f"weights, {'the same' if is_blind else 'OTHER ones'} with other tokens in it"
    learns = config.ttt != "off" and config.ttt_lr > 0
    holds = apart <= AUDIT_ROUNDING and is_blind and is_trained == learns
    rows.append(("C3 score before update", test, finding, holds))

    once = int((times == 1).sum())
    test = "a counter on every target"
    rows.append(("C4 single pass", test, f"{once} of {count} scored once", once == count))

    bpb = bits_per_byte(losses, val.target_bytes)
    others, _, _ = observed_run(model, config, windowing, val, ranks=2)
    apart = abs(bits_per_byte(others, val.target_bytes) - bpb)
    holds = apart <= (1e-9 if is_exact else AUDIT_ROUNDING)
    rows.append(("ranks", "two instead of one", f"{apart:.1e} bits per byte apart", holds))
    others, _, _ = observed_run(model, config, replace(windowing, batch_size=1), val)
    apart = abs(bits_per_byte(others, val.target_bytes) - bpb)
    finding = f"{apart:.1e} bits per byte apart"
    rows.append(("batches", "of a single window", finding, apart <= AUDIT_ROUNDING))
    kept = same(artifact, snapshot(model))
    test = f"its {len(artifact)} tensors afterwards"
    rows.append(("artifact", test, "bit-equal" if kept else "CHANGED", kept))
    return rows


def audit(model: GPT, hp: Hyperparameters, config: EvalConfig, val: ValData, log: Callable) -> bool:
    """Test the challenge's conditions C1 to C4, byte count and invariances by the code that scores.

    On the first targets of the split, in two segments of three chunks; logs a table. Returns
    whether all hold. `model` computes in float32, deterministically. Raises ConfigError.
    """
    window = config.windowing(hp).seq_len
    count = min(len(val.tokens) - 1, 3 * window)
    require(count >= 24, f"{count} targets are too few to audit")
    chunk = count // 6
    stride = max(min(config.eval_stride, chunk), chunk // 4)
    config = replace(config, eval_stride=stride, ttt_chunk_tokens=chunk, eval_max_seconds=0.0)
    windowing = config.windowing(hp)
    # More than one batch for two ranks.
    windowing = replace(windowing, batch_size=min(windowing.batch_size, 4))
    part = replace(val, tokens=val.tokens[: count + 1], target_bytes=val.target_bytes[:count])
    rows = audit_rows(model, config, windowing, part)
    rows.append(audit_bytes(val, load_tokenizer(hp)[0]))
    log(f"audit of the first {count} targets, window:{window} stride:{stride} {config.stated()}")
    log("| condition | test | finding | |\n|---|---|---|---|")
    for name, test, finding, holds in rows:
        log(f"| {name} | {test} | {finding} | {'pass' if holds else 'FAIL'} |")
    return all(holds for *_, holds in rows)


# ---- Command line --------------------------------------------------------------------------------


def check_tokenizer_made(tokens: Tensor, sp, source: Path) -> None:
    """Raise ConfigError when encoding the text of the first 4,096 tokens again gives other tokens.

    99.9 % stay the same with the tokenizer that made them, 91 % at most with another of its size.
    """
    text = [token for token in tokens[:4096].tolist() if not sp.is_control(token)]
    again = np.bincount(sp.encode(sp.decode(text)), minlength=sp.vocab_size())
    common = np.minimum(again, np.bincount(text, minlength=sp.vocab_size())).sum()
    other = f"{source}: the val shards were made by another tokenizer than the artifact's"
    require(common >= 0.97 * len(text), other)


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    usage = "eval_sliding.py [--self-check N | --audit] ARTIFACT"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = partial(refuse_arguments, usage)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="logs/RUN_ID.ptz")
    modes = parser.add_mutually_exclusive_group()
    check = "score N windows again, one at a time"
    modes.add_argument("--self-check", type=int, default=0, metavar="N", help=check)
    modes.add_argument("--audit", action="store_true", help="test the rules; status 1 if one fails")
    args = parser.parse_args()
    require(args.self_check >= 0, f"--self-check {args.self_check}: expected a number of windows")
    return args


def refuse_arguments(usage: str, message: str) -> None:
    require(False, f"usage: {usage}: {message}")


def score_or_stop(
    scorer: Scorer, model: GPT, config: EvalConfig, log: Log, started: float
) -> Tensor:
    """Run `score_split`; SIGINT and SIGTERM end it with a PARTIAL score of what is scored here."""
    try:
        return score_split(scorer, model, config, log, started)
    except KeyboardInterrupt as error:
        scored = int((scorer.sums[1, :-1] == 1).sum())
        so_far = scorer.total(finished=False) if scored else "nothing"
        number = error.args[0]
        log(
            f"interrupted by signal {number}, {scored} of {scorer.num_targets} targets scored "
            f"here: {so_far}"
        )
        raise


def log_start(log: Log, settings: str) -> None:
    """Log which code scores, how, and what of the environment is almost a knob."""
    log(f"code_sha256:{hashlib.sha256(submission_source()).hexdigest()}")
    log(settings)
    warn_of_typos(log, os.environ, knob_fields(EvalConfig))


def main() -> None:
    """Score the artifact of the command line and log one JSON line. Raises ConfigError."""
    started = time.perf_counter()
    args = parse_arguments()
    path = args.artifact
    hp = Hyperparameters.from_env(os.environ)
    config = EvalConfig.from_env(os.environ)
    if args.audit:
        hp = replace(hp, dtype="float32", attention="math")
    dist = Dist.from_torchrun()
    one_process = dist.world_size == 1 or not args.audit
    require(one_process, "--audit is for one process; it plays two ranks itself")
    is_plain = config.ttt == "off" or not args.self_check
    require(is_plain, f"TTT={config.ttt}: --self-check is for TTT=off, --audit for both")

    torch.set_float32_matmul_precision("highest" if hp.dtype == "float32" else "high")
    model, hp, tokenizer_sha256 = load_artifact(path, hp, dist.device, config.eval_seq_len)
    windowing = config.windowing(hp)
    val = ValData.load(hp, dist.device)
    known = val.tokenizer_sha256 == tokenizer_sha256
    require(known, f"{path} was trained with another tokenizer (TOKENIZER_PATH)")
    check_tokenizer_made(val.tokens, load_tokenizer(hp)[0], hp.dataset_dir)

    log = Log(dist, path.with_suffix(".txt"))
    shape = f"window:{windowing.seq_len} stride:{windowing.stride}"
    log(f"sliding evaluation of {path} {shape} world_size:{dist.world_size}")
    trained = f"trained_window:{hp.model.train_seq_len} rope_base:{model.rope_base:.0f}"
    log_start(log, f"{trained} sidecar:{val.sidecar} {config.stated()}")
    choose_attention(hp.attention, model, dist.device, log)
    if args.audit:
        sys.exit(0 if audit(model, hp, config, val, log) else 1)

    forward = model
    if can_compile(hp, dist.device):
        forward = torch.compile(model, fullgraph=True, dynamic=False)
        windowing = compile_on_random_tokens(forward, model, config, windowing, dist)
        log(f"compiled on random tokens, {time.perf_counter() - started:.1f}s since the start")
    # NCCL sets itself up on its first use: here, not when time is up.
    dist.all_sum(torch.zeros(1, device=dist.device))

    label = "slide" if config.ttt == "off" else "slide and train"
    scorer = Scorer(forward, val, dist, windowing, label)
    epochs = score_or_stop(scorer, model, config, log, started).to(dist.device)
    epochs_run, epochs_asked = dist.all_sum(epochs).tolist()
    score = scorer.total()
    rate = score.target_tokens / score.seconds
    kind = "sliding_window" if config.ttt == "off" else "ttt"
    log(f"quantized_{kind} {score} eval_time:{1000 * score.seconds:.0f}ms")
    log(f"final_{kind}_exact {score}")
    log(f"target_tokens:{score.target_tokens} scored_bytes:{score.scored_bytes}")
    log(f"scored tok/s: {rate:.0f}")
    if config.ttt != "off":
        log(f"ttt_epochs: {epochs_run} of {epochs_asked}")
        if not epochs_asked:
            chunk = f"TTT_CHUNK_TOKENS={config.ttt_chunk_tokens}"
            log(f"warning: nothing to train on, {chunk} is all of a segment")
    if args.self_check:
        self_check(scorer, model, args.self_check, rate, log)

    spent = time.perf_counter() - started
    log(f"total_eval_time:{spent:.1f}s")
    if 0 < config.eval_max_seconds < spent:
        limit = f"EVAL_MAX_SECONDS={config.eval_max_seconds:g}"
        log(f"warning: {spent:.1f} s are more than {limit}")
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
    }
    log(json.dumps(summary))


if __name__ == "__main__":
    run_entry_point(main)
