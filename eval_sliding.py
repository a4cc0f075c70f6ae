"""Score an artifact of train_gpt.py by sliding window, from the artifact, a tokenizer and validation shards alone.

    python eval_sliding.py logs/RUN_ID.ptz
    torchrun --standalone --nproc_per_node=8 eval_sliding.py logs/RUN_ID.ptz
    TTT=sgd python eval_sliding.py logs/RUN_ID.ptz               # score-first test-time training
    python eval_sliding.py --self-check 200 logs/RUN_ID.ptz      # 200 windows again, one at a time
    TTT=sgd python eval_sliding.py --audit logs/RUN_ID.ptz       # the rules of the challenge, tested on this artifact

Every target is scored once, with EVAL_SEQ_LEN - EVAL_STRIDE tokens of context or more where the text has them. The last
layer has queries, and the head inputs, at scored positions only. The model comes from the artifact; the environment
sets DATA_PATH, TOKENIZER_PATH, EVAL_STRIDE, EVAL_SEQ_LEN, EVAL_MAX_SECONDS, TTT, TTT_*, VAL_MAX_TOKENS (a PARTIAL
score), MICRO_BATCH_TOKENS, DTYPE, ATTENTION, DEVICE and COMPILE. The audit is in float32, with plain attention and not
compiled: what has to be equal then is, to the bit. All of it goes to the end of the training's log.
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
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from train_gpt import (
    BOS_ID,
    GPT,
    Dist,
    Hyperparameters,
    Log,
    Scorer,
    ValData,
    can_compile,
    choose_attention,
    load_artifact,
    load_tokenizer,
    out_of_memory,
    require,
    role_of,
    run_entry_point,
    scoring_windows,
    submission_source,
)

TTT_CLIP_NORM = 1.0  # L2 norm of the gradients of test-time training (upstream PR #1413)


# ---- Scoring


def snapshot(model: GPT) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, other[name]) for name, tensor in state.items())


def halve_batch(scorer: Scorer, error: RuntimeError, tried: int) -> None:
    """For a caller that ran out of memory with `tried` windows and will try again with `scorer.batch_size`. Raises the
    error if it is another one, or Refusal."""
    if not out_of_memory(error):
        raise error
    require(
        tried > 1, f"one window of {scorer.seq_len} tokens exceeds the memory; lower EVAL_SEQ_LEN"
    )
    scorer.batch_size = tried // 2
    print(
        f"warning: out of memory, {scorer.batch_size} windows per forward pass from here on",
        file=sys.stderr,
    )


def score_within_memory(scorer: Scorer, windows: Tensor) -> None:
    """`scorer.score`, with half the batch size for as long as memory runs out. Raises Refusal."""
    while len(windows):
        batch = windows[: scorer.batch_size]
        try:
            scorer.score(batch)
        except RuntimeError as error:
            halve_batch(scorer, error, scorer.batch_size)
        else:
            windows = windows[len(batch) :]


def score_split(
    scorer: Scorer, model: GPT, hp: Hyperparameters, log: Callable, started: float, score=None
) -> Tensor:
    """Score this rank's share of the split, in an evaluation that began at `started` on the host's clock, s. `score`
    replaces, to observe it, what scores windows: (W, 3) -> None. Returns epochs of TTT run and asked for."""
    score = score or partial(score_within_memory, scorer)
    if hp.ttt == "sgd":
        return score_first(scorer, model, hp, log, started, score)
    score(scorer.share)
    return torch.zeros(2, dtype=torch.int64)


def compile_on_random_tokens(
    forward, model: GPT, hp: Hyperparameters, dist: Dist
) -> Hyperparameters:
    """Run everything once on tokens that are not the validation split's, and leave the weights as they were. Returns
    `hp` with the batch that fits the memory of every rank."""
    device = dist.device
    count = hp.ttt_chunk_tokens + hp.eval_stride if hp.ttt == "sgd" else hp.eval_stride
    tokens = torch.randint(
        hp.vocab_size, (count + 1,), generator=torch.Generator().manual_seed(0), dtype=torch.int32
    )
    val = ValData(tokens.to(device), torch.ones(count, dtype=torch.int32, device=device), "", False)
    trial = replace(hp, ttt_segments=1, ttt_epochs=1, eval_max_seconds=0.0)
    scorer = Scorer(forward, val, trial, Dist(0, 1, device), hp.eval_stride, "compile")
    score_split(scorer, model, trial, lambda text: None, 0.0)
    return replace(
        hp, micro_batch_tokens=-int(dist.all_max(-scorer.batch_size)[0]) * scorer.seq_len
    )


@torch.no_grad()
def plain_losses(model: GPT, val: ValData, windows: Tensor) -> Tensor:
    """Losses of the targets of windows (W, 3) in order, in nats: one window at a time, without padding, all positions
    through all layers."""
    losses = []
    for start, first, end in windows.tolist():
        tokens = val.tokens[None, start : end + 1].long()
        losses.append(model(tokens[:, :-1], tokens[:, 1:], reduction="none")[0, first - start :])
    return torch.cat(losses)


def targets_of(windows: Tensor) -> Tensor:
    """The targets that windows (W, 3) score, in order."""
    return torch.cat(
        [torch.arange(first, end, device=windows.device) for _, first, end in windows.tolist()]
    )


def self_check(scorer: Scorer, model: GPT, count: int, rate: float, log: Callable) -> None:
    """Score `count` windows, evenly spread, again by `plain_losses`. Raises Refusal when that gives another score."""
    every = torch.linspace(0, len(scorer.windows) - 1, min(count, len(scorer.windows)))
    windows = scorer.windows[every.round().long().unique()]
    started, targets = time.perf_counter(), targets_of(windows)
    plain, fast = plain_losses(model, scorer.val, windows), scorer.sums[0, targets]
    worst, plain_rate = (
        (plain - fast).abs().max().item(),
        len(targets) / (time.perf_counter() - started),
    )
    ours, reference = (
        bits_per_byte(losses, scorer.val.target_bytes[targets]) for losses in (fast, plain)
    )
    log(
        f"self_check: {len(windows)} of {len(scorer.windows)} windows one at a time: plain_bpb:{reference:.8f} "
        f"fast_bpb:{ours:.8f} largest_difference:{worst:.1e} nats, plain tok/s: {plain_rate:.0f} fast tok/s: {rate:.0f}"
    )
    bound = 1e-6 if model.dtype == torch.float32 else 1e-3
    require(
        abs(ours - reference) <= bound,
        f"self-check failed: {abs(ours - reference):.1e} bits per byte apart",
    )


def bits_per_byte(losses: Tensor, target_bytes: Tensor) -> float:
    """Of losses in nats and the bytes of their targets."""
    return losses.double().sum().item() / math.log(2) / int(target_bytes.sum())


# ---- Test-time training


def ttt_parameters(model: GPT, scope: str) -> dict[str, nn.Parameter]:
    """The parameters that TTT_SCOPE lets change, by name. Raises Refusal when the model has none."""
    inside = {
        "all": lambda name: True,
        "mu": lambda name: re.search(r"\bmu_", name) is not None,
        "vectors": lambda name: role_of(name) == "vector",
        "experts": lambda name: role_of(name) == "expert",
    }[scope]
    chosen = {name: p for name, p in model.named_parameters() if inside(name)}
    require(len(chosen) > 0, f"TTT_SCOPE={scope}: this artifact has no such parameters")
    return chosen


def add_gradients(scorer: Scorer, tiles: Tensor, batch_size: int) -> None:
    """Add the gradients of the mean loss over all targets of the windows `tiles`, so many windows at a time."""
    for batch in tiles.split(batch_size):
        input_ids, target_ids, _, column = scorer.batch(batch, scorer.seq_len, batch_size)
        nll = scorer.forward(input_ids, target_ids, reduction="none", scored=None)
        (
            torch.where(column < scorer.num_targets, nll, 0).sum() / (tiles[-1, 2] - tiles[0, 1])
        ).backward()


def adapt(scorer: Scorer, optimizer: torch.optim.Optimizer, first: int, end: int) -> None:
    """One step on the mean loss of the targets from `first` to before `end`, which must have been scored."""
    tiles = (
        scoring_windows(end - first, scorer.seq_len, scorer.seq_len).to(scorer.windows.device)
        + first
    )
    while True:
        optimizer.zero_grad()
        batch_size = min(scorer.batch_size, len(tiles))
        try:
            add_gradients(
                scorer, tiles, batch_size
            )  # in a frame of its own, which an error takes its tensors with
        except RuntimeError as error:
            halve_batch(scorer, error, batch_size)
        else:
            break
    parameters = optimizer.param_groups[0]["params"]
    torch.nn.utils.clip_grad_norm_(parameters, TTT_CLIP_NORM, foreach=True)
    optimizer.step()


def affordable_epochs(
    hp: Hyperparameters, elapsed: float, to_score: float, per_epoch: float, updates: int
) -> int:
    """Epochs for the next of `updates` updates, at most TTT_EPOCHS: as many as fit EVAL_MAX_SECONDS with `to_score`
    seconds of scoring to come, if all updates get so many of `per_epoch` seconds each, 0 = not known yet. 2 % are kept
    in reserve."""
    spare = 0.98 * hp.eval_max_seconds - elapsed - to_score if hp.eval_max_seconds else math.inf
    return int(min(max(spare, 0) / max(per_epoch * updates, 1e-9), hp.ttt_epochs))


def score_first(
    scorer: Scorer, model: GPT, hp: Hyperparameters, log: Callable, started: float, score
) -> Tensor:
    """Score a chunk, then train on it, then score the next (upstream PR #1413). Each of TTT_SEGMENTS contiguous parts
    of the split begins with the artifact's weights, so it does not matter how ranks share them. A part's last chunk
    is not trained on. Leaves `model` as it was. Returns epochs run and asked for, (2,). Raises Refusal."""

    def elapsed() -> float:
        if dist.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    dist, windows, artifact = scorer.dist, scorer.windows, snapshot(model)
    chosen = ttt_parameters(model, hp.ttt_scope)
    for name, p in model.named_parameters():
        p.requires_grad_(name in chosen)
    segments = min(hp.ttt_segments, len(windows))
    bounds = [len(windows) * i // segments for i in range(segments + 1)]
    split = [
        windows[a:b].split(max(1, hp.ttt_chunk_tokens // hp.eval_stride))
        for a, b in itertools.pairwise(bounds)
    ]
    mine = split[dist.rank :: dist.world_size]
    updates, windows_left = (
        sum(len(chunks) - 1 for chunks in mine),
        sum(len(c) for chunks in mine for c in chunks),
    )
    epochs_asked, epochs_run, windows_done, scoring, training = (
        updates * hp.ttt_epochs,
        0,
        0,
        0.0,
        0.0,
    )
    for chunks in mine:
        model.load_state_dict(artifact)
        optimizer = torch.optim.SGD(chosen.values(), lr=hp.ttt_lr, momentum=hp.ttt_momentum)
        for i, chunk in enumerate(chunks):
            begun = elapsed()
            score(chunk)
            now, windows_left, windows_done = (
                elapsed(),
                windows_left - len(chunk),
                windows_done + len(chunk),
            )
            scoring += now - begun
            if i + 1 == len(chunks):
                break
            to_score, per_epoch = (
                windows_left * scoring / windows_done,
                training / max(epochs_run, 1),
            )
            epochs = affordable_epochs(hp, now, to_score, per_epoch, updates)
            if epochs < hp.ttt_epochs and epochs_run == epochs_asked - updates * hp.ttt_epochs:
                log(
                    f"EVAL_MAX_SECONDS={hp.eval_max_seconds:g}: fewer epochs of TTT after {now:.1f} s, all targets"
                )
            optimizer.param_groups[0]["lr"] = (
                hp.ttt_lr * 0.5 * (1 + math.cos(math.pi * i / (len(chunks) - 1)))
            )
            first, end = int(chunk[0, 1]), int(chunk[-1, 2])
            for _ in range(epochs):
                adapt(scorer, optimizer, first, end)
            updates, epochs_run, training = (
                updates - 1,
                epochs_run + epochs,
                training + elapsed() - now,
            )
        changed = [
            name for name, t in model.state_dict().items() if not torch.equal(t, artifact[name])
        ]
        assert set(changed) <= set(chosen), f"outside TTT_SCOPE={hp.ttt_scope}: {changed}"
    model.load_state_dict(artifact)
    model.requires_grad_(True).zero_grad()
    return torch.tensor([epochs_run, epochs_asked])


# ---- Audit


def rewritten(val: ValData, where: slice, vocab_size: int) -> ValData:
    """`val` with another token in place of each one in `where`."""
    tokens, generator = val.tokens.clone(), torch.Generator().manual_seed(0)
    shift = torch.randint(
        1, vocab_size, tokens[where].shape, generator=generator, dtype=torch.int32
    )
    tokens[where] = (tokens[where] + shift.to(tokens.device)) % vocab_size
    return replace(val, tokens=tokens)


def observed_run(
    model: GPT, hp: Hyperparameters, val: ValData, ranks: int = 1
) -> tuple[Tensor, Tensor, list]:
    """Score `val` by the code that scores, as so many ranks in turn. Returns the loss of every target in nats, how
    often it was scored, and, in order, windows with the weights that scored them."""
    sums, states = torch.zeros(2, len(val.tokens) - 1, device=val.tokens.device), []
    for rank in range(ranks):
        scorer = Scorer(
            model, val, hp, Dist(rank, ranks, val.tokens.device), hp.eval_stride, "audit"
        )

        def observed(windows: Tensor, scorer: Scorer = scorer) -> None:
            states.append((windows, snapshot(model)))
            score_within_memory(scorer, windows)

        score_split(scorer, model, hp, lambda text: None, 0.0, observed)
        sums += scorer.sums[:, :-1]
    return *sums, states


@torch.no_grad()
def total_probability(model: GPT, scorer: Scorer, window: Tensor) -> tuple[float, float]:
    """Sum over the vocabulary of the probabilities that scoring gives at the last target of a window (3,), each found
    by scoring that token as the target; and the loss of the true one."""
    input_ids, _, _, _ = scorer.batch(window[None], scorer.stride, 1)
    last, losses = window[2] - 1, []
    for tokens in torch.arange(model.hp.vocab_size, device=window.device)[None].split(1024, dim=1):
        position = (last - window[0]).expand(tokens.shape)
        losses.append(model(input_ids, tokens, reduction="none", scored=position)[0].double())
    return float(torch.cat(losses).neg().exp().sum()), float(
        torch.cat(losses)[scorer.val.tokens[last + 1]]
    )


def audit_bytes(val: ValData, sp, max_tokens: int = 1_000_000) -> tuple[str, str, str, bool]:
    """Row of the audit: bytes as counted against those of the decoded text, over the whole documents of the first
    tokens."""
    tokens, sizes = val.tokens[: max_tokens + 1].cpu(), val.target_bytes[:max_tokens].cpu()
    starts = torch.nonzero(tokens == BOS_ID).flatten().tolist()
    if len(starts) < 2 or (len(tokens) == len(val.tokens) and not val.partial):
        starts.append(len(tokens))  # where the document after the split's last would begin
    documents = [tokens[a:b].tolist() for a, b in itertools.pairwise(starts)]
    counted = int(sizes[starts[0] : starts[-1] - 1].sum())
    decoded = sum(len(sp.decode(document).encode()) for document in documents)
    test = f"counted against the UTF-8 text that SentencePiece decodes, {len(documents)} whole documents"
    if not val.sidecar:
        return "bytes", test, f"{counted} against {decoded}", counted == decoded > 0
    unpaid = int(sizes[tokens[1:] == BOS_ID].sum())
    return (
        "bytes",
        "sidecar: the original text's",
        f"{counted}; 0 expected for BOS, {unpaid} found",
        unpaid == 0,
    )


def audit_rows(model: GPT, hp: Hyperparameters, val: ValData) -> list[tuple[str, str, str, bool]]:
    """What `audit` finds on a short split: condition, test, finding, whether it holds."""
    exact = (
        hp.dispatch == "masked" or not hp.routed_layers
    )  # the rounding of a grouped GEMM depends on its groups
    rounding = 1e-4  # nats
    artifact, count, stride = snapshot(model), len(val.tokens) - 1, hp.eval_stride
    losses, times, states = observed_run(model, hp, val)

    # Amid the targets of a window, which then reads tokens that the first half must not know, and amid a TTT chunk.
    places = [quarter * count // 4 // stride * stride + (stride - 1) // 2 for quarter in (1, 3)]
    futures = [
        observed_run(model, hp, rewritten(val, slice(p + 1, None), hp.vocab_size)) for p in places
    ]
    past, _, _ = observed_run(model, hp, rewritten(val, slice(0, places[1]), hp.vocab_size))
    leak = max(
        float((future - losses)[:p].abs().max())
        for p, (future, _, _) in zip(places, futures, strict=True)
    )
    control = float((past - losses)[places[1] :].abs().max())
    test = f"other tokens after the input of target {places[0]}, {places[1]}; control: before the latter"
    finding = f"losses before it change by {leak:.1e} nats at most; control {control:.1e}"
    rows = [("C1 causal", test, finding, leak <= (0.0 if exact else rounding) and control > 1e-2)]

    scorer, windows = (
        Scorer(model, val, hp, Dist(0, 1, val.tokens.device), stride, "audit"),
        states[0][0],
    )
    windows = windows[:: max(1, len(windows) // 4)]
    found = torch.tensor([total_probability(model, scorer, window) for window in windows])
    off = float((found[:, 0] - 1).abs().max())
    apart = float((losses[windows[:, 2] - 1].cpu() - found[:, 1]).abs().max())
    test = f"at {len(windows)} positions each of the {hp.vocab_size} tokens scored as the target"
    finding = (
        f"probabilities add up to 1 within {off:.1e}; the true token's loss within {apart:.1e} nats"
    )
    rows += [("C2 normalised", test, finding, off < 1e-3 and apart <= rounding)]

    at = max(i for i, (windows, _) in enumerate(states) if windows[0, 1] <= places[1])
    windows, weights = states[at]
    trained, blind = not same(weights, artifact), same(weights, futures[1][2][at][1])
    model.load_state_dict(weights)
    apart = float((plain_losses(model, val, windows) - losses[targets_of(windows)]).abs().max())
    model.load_state_dict(artifact)
    test = f"chunk {at + 1} of {len(states)} again with the weights that scored it; the run with other tokens in it"
    finding = f"losses within {apart:.1e} nats; {'trained' if trained else 'untrained'} weights, "
    finding += "the same in both" if blind else "OTHER ones with other tokens"
    learns = hp.ttt != "off" and hp.ttt_lr > 0
    rows += [
        ("C3 score before update", test, finding, apart <= rounding and blind and trained == learns)
    ]

    once = int((times == 1).sum())
    rows += [
        (
            "C4 single pass",
            "a counter on every target",
            f"{once} of {count} scored once",
            once == count,
        )
    ]

    others = (
        observed_run(model, hp, val, ranks=2),
        observed_run(model, replace(hp, micro_batch_tokens=1), val),
    )
    bpb, *changed = (
        bits_per_byte(x, val.target_bytes) for x in (losses, others[0][0], others[1][0])
    )
    ranks, batches = (abs(x - bpb) for x in changed)
    same_sum = 1e-9 if exact else rounding
    rows += [("ranks", "two instead of one", f"{ranks:.1e} bits per byte apart", ranks <= same_sum)]
    rows += [
        ("batches", "of a single window", f"{batches:.1e} bits per byte apart", batches <= rounding)
    ]
    kept = same(artifact, snapshot(model))
    rows += [
        (
            "artifact",
            f"its {len(artifact)} tensors afterwards",
            "bit-equal" if kept else "CHANGED",
            kept,
        )
    ]
    return rows


def audit(model: GPT, hp: Hyperparameters, val: ValData, log: Callable) -> bool:
    """Test conditions C1 to C4 of the challenge, the byte count and the invariances through the code that scores, on
    the first targets of the split, in two segments of three chunks of half a window; log a table. Returns whether all
    hold. `model` should compute in float32 with deterministic kernels. Raises Refusal when the split is too short."""
    window = hp.eval_seq_len or hp.train_seq_len
    count = min(len(val.tokens) - 1, 3 * window)
    require(count >= 24, f"{count} targets are too few to audit")
    chunk = count // 6
    stride = max(min(hp.eval_stride, chunk), chunk // 4)
    hp = replace(
        hp, eval_stride=stride, ttt_chunk_tokens=chunk, ttt_segments=2, eval_max_seconds=0.0
    )
    hp = replace(
        hp, micro_batch_tokens=min(hp.micro_batch_tokens, 4 * window)
    )  # more than one batch for two ranks
    rows = audit_rows(
        model,
        hp,
        replace(val, tokens=val.tokens[: count + 1], target_bytes=val.target_bytes[:count]),
    )
    rows.append(audit_bytes(val, load_tokenizer(hp)[0]))
    log(f"audit of the first {count} targets, window:{window} stride:{stride} {ttt_settings(hp)}")
    log("| condition | test | finding | |\n|---|---|---|---|")
    for name, test, finding, holds in rows:
        log(f"| {name} | {test} | {finding} | {'pass' if holds else 'FAIL'} |")
    return all(holds for *_, holds in rows)


# ---- Command line


def check_tokenizer_made(tokens: Tensor, sp, source: Path) -> None:
    """Raises Refusal when encoding the text of the first 4,096 tokens again gives other tokens; 99.9 % stay the same
    with the tokenizer that made them, 91 % at most with another of the same size."""
    text = [token for token in tokens[:4096].tolist() if not sp.is_control(token)]
    again = np.bincount(sp.encode(sp.decode(text)), minlength=sp.vocab_size())
    common = np.minimum(again, np.bincount(text, minlength=sp.vocab_size())).sum()
    require(
        common >= 0.97 * len(text),
        f"{source}: the val shards were made by another tokenizer than the artifact's",
    )


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises Refusal; exits with 0 after --help."""
    usage = "eval_sliding.py [--self-check N | --audit] ARTIFACT"
    parser = argparse.ArgumentParser(
        usage=usage, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: require(False, f"usage: {usage}: {message}")
    parser.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="logs/RUN_ID.ptz, as train_gpt.py wrote it"
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--self-check",
        type=int,
        default=0,
        metavar="N",
        help="score N windows again, one at a time",
    )
    modes.add_argument(
        "--audit", action="store_true", help="test the rules; exit status 1 if one does not hold"
    )
    args = parser.parse_args()
    require(args.self_check >= 0, f"--self-check {args.self_check}: expected a number of windows")
    return args


def ttt_settings(hp: Hyperparameters) -> str:
    """For the log: the knobs of test-time training, or that it is off."""
    names = ["ttt"] if hp.ttt == "off" else [f.name for f in fields(hp) if f.name.startswith("ttt")]
    return " ".join(f"{name}:{value}" for name, value in asdict(hp).items() if name in names)


def score_or_stop(
    scorer: Scorer, model: GPT, hp: Hyperparameters, log: Log, started: float
) -> Tensor:
    """`score_split`; SIGINT and SIGTERM end it with a PARTIAL score of what this rank has scored."""
    try:
        return score_split(scorer, model, hp, log, started)
    except KeyboardInterrupt as error:
        scored = int((scorer.sums[1, :-1] == 1).sum())
        so_far = scorer.total(finished=False) if scored else "nothing"
        log(
            f"interrupted by signal {error.args[0]}, {scored} of {scorer.num_targets} targets scored here: {so_far}"
        )
        raise


def main() -> None:
    """Score the artifact named on the command line and end the log with one JSON line. Raises Refusal."""
    started, args = time.perf_counter(), parse_arguments()
    path, hp = args.artifact, Hyperparameters.from_env(os.environ)
    hp = replace(hp, dtype="float32", attention="math") if args.audit else hp
    dist = Dist.from_torchrun(hp.device)
    torch.set_float32_matmul_precision("highest" if hp.dtype == "float32" else "high")
    model, hp, tokenizer_sha256 = load_artifact(path, hp, dist.device)
    val, window = ValData.load(hp, dist.device), hp.eval_seq_len or hp.train_seq_len
    require(
        val.tokenizer_sha256 == tokenizer_sha256,
        f"{path} was trained with another tokenizer (TOKENIZER_PATH)",
    )
    check_tokenizer_made(val.tokens, load_tokenizer(hp)[0], hp.dataset_dir)
    shared = hp.ttt == "off" or hp.ttt_segments % dist.world_size == 0
    require(shared, f"TTT_SEGMENTS={hp.ttt_segments}: not a multiple of {dist.world_size} ranks")
    require(
        hp.ttt == "off" or not args.self_check,
        f"TTT={hp.ttt}: --self-check is for TTT=off, --audit for both",
    )
    require(
        dist.world_size == 1 or not args.audit,
        "--audit is for one process; it plays two ranks itself",
    )
    log = Log(dist, path.with_suffix(".txt"))
    log(
        f"sliding evaluation of {path} window:{window} stride:{hp.eval_stride} world_size:{dist.world_size}"
    )
    log(f"code_sha256:{hashlib.sha256(submission_source()).hexdigest()}")
    log(
        f"trained_window:{hp.train_seq_len} rope_base:{hp.rope_base:.0f} sidecar:{val.sidecar} {ttt_settings(hp)}"
    )
    choose_attention(model, dist.device, log)
    if args.audit:
        sys.exit(0 if audit(model, hp, val, log) else 1)
    forward, compiles = model, can_compile(hp, dist.device)
    if compiles:
        forward = torch.compile(model, fullgraph=True, dynamic=False)
        hp = compile_on_random_tokens(forward, model, hp, dist)
        log(f"compiled on random tokens, {time.perf_counter() - started:.1f}s since the start")
    dist.all_sum(
        torch.zeros(1, device=dist.device)
    )  # NCCL sets itself up on its first use: here, not when time is up
    scorer = Scorer(
        forward, val, hp, dist, hp.eval_stride, "slide" if hp.ttt == "off" else "slide and train"
    )
    epochs = dist.all_sum(score_or_stop(scorer, model, hp, log, started).to(dist.device)).tolist()
    score = scorer.total()
    rate, kind = score.target_tokens / score.seconds, "sliding_window" if hp.ttt == "off" else "ttt"
    log(f"quantized_{kind} {score} eval_time:{1000 * score.seconds:.0f}ms")
    log(f"final_{kind}_exact {score}")
    log(
        f"target_tokens:{score.target_tokens} scored_bytes:{score.scored_bytes}\nscored tok/s: {rate:.0f}"
    )
    if hp.ttt != "off":
        log(f"ttt_epochs: {epochs[0]} of {epochs[1]}")
        if not epochs[1]:
            log(
                f"warning: nothing to train on, TTT_CHUNK_TOKENS={hp.ttt_chunk_tokens} is all of a segment"
            )
    if args.self_check:
        self_check(scorer, model, args.self_check, rate, log)
    spent = time.perf_counter() - started
    log(f"total_eval_time:{spent:.1f}s")
    if 0 < hp.eval_max_seconds < spent:
        log(f"warning: {spent:.1f} s are more than EVAL_MAX_SECONDS={hp.eval_max_seconds:g}")
    result = {
        "event": "eval_summary",
        "artifact_path": str(path),
        "partial": score.partial,
        "stride": hp.eval_stride,
    }
    result |= {
        "val_bpb": None if score.partial else score.bpb,
        "val_loss": score.val_loss,
        "seq_len": window,
    }
    result |= {
        "target_tokens": score.target_tokens,
        "scored_bytes": score.scored_bytes,
        "eval_seconds": score.seconds,
    }
    result |= {"ttt": hp.ttt, "ttt_epochs": epochs}
    log(json.dumps(result))


if __name__ == "__main__":
    run_entry_point(main)
