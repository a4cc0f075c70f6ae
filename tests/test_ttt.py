"""Properties of score-first test-time training, the audit, and stops of eval_sliding.py."""

import itertools
import math
import os
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, attend_both_ways, make_model, make_val, tiny_hp
from helpers_cli import (
    CPU,
    VOCAB_SIZE,
    assert_refused,
    eval_env,
    make_sentences,
    run_command,
    score,
    tiny_tokenizer,
)
from helpers_hostile import refusal

import eval_sliding
import train_gpt
from eval_sliding import EvalConfig, adapt, audit, check_tokenizer_made, same, score_split, snapshot
from train_gpt import BOS_ID, GPT, Dist, Scorer, ValData, Windowing

T = 16  # window, tokens
HP = tiny_hp(num_layers=2)
CONFIG = EvalConfig(
    eval_stride=4, eval_max_seconds=0.0, ttt="sgd", ttt_lr=0.1, ttt_epochs=2, ttt_chunk_tokens=16
)


def make_scorer(forward, val: ValData, dist=ALONE, stride: int = 4, batch_size: int = 4) -> Scorer:
    return Scorer(forward, val, dist, Windowing(T, stride, batch_size), "test")


def run_split(
    model: GPT,
    config: EvalConfig,
    val: ValData,
    segments: int = 2,
    before: Callable | None = None,
    dist: Dist = ALONE,
    forward: Callable | None = None,
    batch_size: int = 4,
    started: float = 0.0,
) -> SimpleNamespace:
    """Do what eval_sliding.py does; `before(scorer, chunk)` is called before it is scored."""
    scorer = make_scorer(forward or model, val, dist, config.eval_stride, batch_size)
    honest = eval_sliding.score_within_memory

    def watched(scorer, windows) -> None:
        if before:
            before(scorer, windows)
        honest(scorer, windows)

    with mock.patch.object(eval_sliding, "score_within_memory", watched):
        epochs = score_split(scorer, model, config, started, segments).tolist()
    sums = scorer.sums[:, :-1]
    return SimpleNamespace(sums=sums, losses=sums[0], times=sums[1], epochs=epochs)


# ---- Score first


@pytest.mark.parametrize("segments", [1, 3])
def test_a_segment_starts_with_the_artifact_and_trained_weights_score_its_other_chunks(segments):
    val, model = make_val(192), make_model(HP)  # 12 chunks of 16 targets
    artifact, changed = snapshot(model), set()

    def before(scorer, windows) -> None:
        for name, tensor in model.state_dict().items():
            if not torch.equal(tensor, artifact[name]):
                changed.add(name)

    trained = run_split(model, CONFIG, val, segments, before).losses
    untrained = run_split(model, replace(CONFIG, ttt="off"), val).losses
    differs = (trained != untrained).view(segments, -1, 16)
    assert not differs[:, 0].any()
    assert differs[:, 1:].any(-1).all()
    assert changed == set(artifact) - {"expert_table"}
    assert same(artifact, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("num_targets", "changes", "windows_per_chunk", "segments"),
    [
        (160, {}, 4, 2),
        (157, {"ttt_chunk_tokens": 15, "ttt_epochs": 3}, 3, 2),  # nothing comes out even
        (90, {"ttt_chunk_tokens": 3, "ttt_epochs": 1}, 1, 2),  # chunks below a window are one
        (70, {"ttt_chunk_tokens": 1 << 20}, 1 << 18, 3),  # nothing is left to train for
        (10, {}, 4, 8),  # more segments than windows
    ],
)
def test_a_chunk_is_scored_then_trained_on_and_a_segments_last_one_never(
    num_targets, changes, windows_per_chunk, segments, monkeypatch
):
    config = replace(CONFIG, **changes)
    chunks, updates = [], []  # in order; the updates between a chunk and the next
    honest = eval_sliding.adapt

    def recorded(scorer, optimizer, first, end) -> None:
        assert bool((scorer.sums[1, first:end] == 1).all()), "an update on targets not scored"
        updates[-1].append((first, end, optimizer.param_groups[0]["lr"]))
        honest(scorer, optimizer, first, end)

    def before(scorer, windows) -> None:
        chunks.append(windows.tolist())
        updates.append([])

    monkeypatch.setattr(eval_sliding, "adapt", recorded)
    result = run_split(make_model(HP), config, make_val(num_targets), segments, before)
    assert result.epochs == [sum(map(len, updates))] * 2
    assert bool((result.times == 1).all())
    every = train_gpt.scoring_windows(num_targets, T, config.eval_stride).tolist()
    assert list(itertools.chain(*chunks)) == every

    ends = [i + 1 for i, steps in enumerate(updates) if not steps]
    assert len(ends) == min(segments, len(every))
    for start, end in itertools.pairwise([0, *ends]):
        for i in range(start, end - 1):
            cosine = 0.5 * (1 + math.cos(math.pi * (i - start) / (end - start - 1)))
            lr = pytest.approx(config.ttt_lr * cosine, rel=1e-12)
            assert len(chunks[i]) == windows_per_chunk
            assert updates[i] == [(chunks[i][0][1], chunks[i][-1][2], lr)] * config.ttt_epochs
        assert len(chunks[end - 1]) <= windows_per_chunk


# ---- One update, the clock, ranks


def reference_gradients(model: GPT, val: ValData, first: int, end: int) -> list[torch.Tensor]:
    """Return gradients of the targets' mean loss, read in tiles of a window without context."""
    tokens, total = val.tokens.long(), 0.0
    for start in range(first, end, T):
        stop = min(start + T, end)
        logits = model(tokens[None, start:stop])[0]
        total = total + F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="sum")
    return list(torch.autograd.grad(total / (end - first), list(model.parameters())))


@pytest.mark.parametrize(
    ("span", "batch", "size"), [((0, 64), 1, 1.0), ((4, 20), 16, 1.0), ((33, 100), 3, 0.02)]
)
def test_an_update_is_a_clipped_step_of_sgd_on_the_mean_loss_of_its_targets(span, batch, size):
    """Losses of the usual size are clipped; those of a 50th are not scaled up to the bound."""
    val, ours, plain = make_val(101), make_model(HP), make_model(HP)
    scorer = make_scorer(
        lambda *args, **kwargs: size * ours(*args, **kwargs), val, batch_size=batch
    )
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    for _ in range(2):
        adapt(scorer, optimizer, *span)
        gradients = [size * g for g in reference_gradients(plain, val, *span)]
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert (norm > 1) == (size == 1)
        with torch.no_grad():
            for p, v, g in zip(plain.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g / max(norm, 1))
                p.sub_(0.1 * v)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=0, atol=1e-5)
    assert not scorer.sums.any()


@pytest.mark.parametrize(
    ("budget", "least", "most"),
    [(0.0, 24, 24), (100.0, 24, 24), (60.0, 8, 9), (46.0, 3, 3), (30.0, 0, 0)],
)
def test_epochs_and_never_targets_are_left_out_to_keep_the_time(budget, least, most, monkeypatch):
    """40 windows take 1 s each to score; 8 updates of 3 epochs, 2 s each, to train."""
    clock = SimpleNamespace(now=100.0)

    def timed_adapt(*args) -> None:
        clock.now += 2.0

    def before(scorer, windows) -> None:
        clock.now += len(windows)

    monkeypatch.setattr(eval_sliding.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(eval_sliding, "adapt", timed_adapt)
    config = replace(CONFIG, eval_max_seconds=budget, ttt_epochs=3)
    val, model = make_val(160), make_model(HP)
    result = run_split(model, config, val, before=before, started=100.0)
    assert bool((result.times == 1).all())
    run, asked = result.epochs
    assert asked == 24
    assert least <= run <= most
    assert budget == 0 or clock.now - 100.0 <= max(budget, 40.0)


@pytest.mark.parametrize(("ttt", "dispatch"), [("off", "grouped"), ("sgd", "masked")])
def test_the_loss_of_every_target_is_the_same_at_any_world_size(ttt, dispatch):
    """The number of segments, which the ranks share, is the control."""
    config, val = replace(CONFIG, ttt=ttt), make_val(131)
    model = make_model(tiny_hp(num_layers=2, dispatch=dispatch))
    alone = run_split(model, config, val, 8)
    for world_size in (2, 4, 8):
        ranks = [Dist(rank, world_size, CPU) for rank in range(world_size)]
        sums = sum(run_split(model, config, val, 8, dist=rank).sums for rank in ranks)
        assert torch.equal(sums, alone.sums)
    assert torch.equal(run_split(model, config, val, 2).sums, alone.sums) == (ttt == "off")


# ---- Memory and tokenizer


def limited(model: GPT, fits: int, error: str = "CUDA out of memory") -> Callable:
    """Return `model` on a machine whose memory holds so many windows to score."""

    def forward(input_ids, *args, **kwargs):
        if len(input_ids) > fits and not torch.is_grad_enabled():
            raise RuntimeError(error)
        return model(input_ids, *args, **kwargs)

    return forward


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ttt", "batch", "fits", "left"), [("off", 8, 2, [4, 2]), ("sgd", 5, 1, [2, 1])]
)
def test_memory_that_runs_out_halves_the_batch_and_leaves_the_losses(
    ttt, batch, fits, left, capsys
):
    config, val = replace(CONFIG, ttt=ttt, ttt_chunk_tokens=64), make_val(203)
    model = make_model(HP)
    expected = run_split(model, config, val, batch_size=batch)
    assert capsys.readouterr().err == ""
    result = run_split(model, config, val, forward=limited(model, fits), batch_size=batch)
    assert bool((result.times == 1).all())
    torch.testing.assert_close(result.losses, expected.losses, rtol=0, atol=1e-4)
    said = "warning: out of memory, {} windows per forward pass from here on"
    assert capsys.readouterr().err.splitlines() == [said.format(size) for size in left]


def test_a_window_that_never_fits_is_refused_and_other_errors_are_not_swallowed():
    val, model = make_val(203), make_model(HP)
    message = refusal(lambda: run_split(model, CONFIG, val, forward=limited(model, 0)))
    assert re.search(f"a window of {T} tokens exceeds .* EVAL_SEQ_LEN", message)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_split(model, CONFIG, val, forward=limited(model, 0, "device-side assert"))


@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_the_run_before_the_clock_leaves_no_trace_and_finds_the_batch_that_fits(ttt):
    config, windowing = replace(CONFIG, ttt=ttt, ttt_chunk_tokens=64), Windowing(T, 4, 8)
    model = make_model(HP)
    artifact, rng = snapshot(model), torch.get_rng_state()
    for fits in (8, 2):
        short = limited(model, fits)
        fitted = eval_sliding.compile_on_random_tokens(short, model, config, windowing, ALONE)
        assert fitted == Windowing(T, 4, fits)
    assert same(artifact, model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_another_tokenizer_is_told_from_documents_of_one_word():
    models = [tiny_tokenizer(seed) for seed in (0, 50)]
    right, wrong = [train_gpt.spm.SentencePieceProcessor(model_proto=model) for model in models]
    words = " ".join(make_sentences(2, 40)).split()
    tokens = torch.tensor([id for word in words for id in [BOS_ID, *right.encode(word)]])
    check_tokenizer_made(tokens, right, Path("shards"))

    # Other ids for all but the control tokens.
    shifted = torch.tensor([*range(4), *range(VOCAB_SIZE - 1, 3, -1)])[tokens]
    no_document = shifted[shifted != BOS_ID]
    for sp, strange in ((wrong, tokens), (right, shifted), (right, no_document)):
        assert "another tokenizer" in refusal(check_tokenizer_made, strange, sp, Path("shards"))


# ---- Audit

ROWS = ["C1 causal", "C2 normalised", "C3 score before update", "C4 single pass"]
ROWS += ["ranks", "batches", "artifact", "bytes"]


@pytest.fixture(scope="module")
def set_hp(dataset) -> train_gpt.Hyperparameters:
    """Knobs of a model for the data set."""
    paths = {"data_path": str(dataset.folder), "tokenizer_path": str(dataset.tokenizer)}
    return tiny_hp(num_layers=2, vocab_size=VOCAB_SIZE, **paths)


@pytest.fixture
def audited(set_hp) -> Callable:
    """Function that gives the rows that fail in an audit, by its log.

    A window of 16 makes it one of 48 targets: two segments of three chunks of 8.
    """

    def run(config=CONFIG, val=None, **changes) -> set[str]:
        hp = set_hp.override(**changes)
        lines: list[str] = []
        val = val or ValData.load(hp, CPU)
        holds = audit(make_model(hp), hp, config, val, lines.append)
        table = re.findall(r"^\| ([^|]+?) \|.*\| (pass|FAIL) \|$", "\n".join(lines), re.MULTILINE)
        assert [row for row, _ in table] == ROWS
        failed = {row.split()[0] for row, verdict in table if verdict == "FAIL"}
        assert holds == (not failed)
        return failed

    return run


@pytest.mark.parametrize(
    ("ttt", "dispatch", "changes"),
    [
        ("off", "grouped", {}),
        ("sgd", "masked", {"eval_seq_len": 9, "eval_stride": 3}),
    ],
)
def test_an_honest_evaluation_passes_its_audit(ttt, dispatch, changes, audited):
    assert audited(replace(CONFIG, ttt=ttt, **changes), dispatch=dispatch) == set()


def train_on(scorer, windows) -> None:
    first, end = int(windows[0, 1]), int(windows[-1, 2])
    adapt(scorer, torch.optim.SGD(scorer.forward.parameters(), lr=0.1), first, end)


def train_before_scoring(honest, scorer, windows) -> None:
    train_on(scorer, windows)
    honest(scorer, windows)


def keep_the_second_loss(honest, scorer, windows) -> None:
    """Score a chunk again after training on it, and write that loss over the first one."""
    honest(scorer, windows)
    kept, weights = scorer.sums.clone(), snapshot(scorer.forward)
    train_on(scorer, windows)
    Scorer.score(scorer, windows)
    targets = slice(int(windows[0, 1]), int(windows[-1, 2]))
    kept[0, targets] = scorer.sums[0, targets] - kept[0, targets]
    scorer.sums.copy_(kept)
    scorer.forward.load_state_dict(weights)


def leave_out_the_first(honest, scorer, windows) -> None:
    honest(scorer, windows[int(windows[0, 1] == 0) :])


def leave_trained_weights(honest, scorer, *args, **kwargs):
    result = honest(scorer, *args, **kwargs)
    train_on(scorer, scorer.windows[:1])
    return result


def carry_weights_into_the_next_segment(honest, scorer, model, *args, **kwargs):
    artifact = snapshot(model)
    model.load_state_dict = lambda state: None
    try:
        return honest(scorer, model, *args, **kwargs)
    finally:
        del model.load_state_dict
        model.load_state_dict(artifact)


@pytest.mark.parametrize(
    ("name", "cheat", "fails"),
    [
        ("score_within_memory", train_before_scoring, {"C1", "C3"}),
        ("score_within_memory", keep_the_second_loss, {"C1", "C2"}),
        ("score_within_memory", leave_out_the_first, {"C4"}),
        ("score_split", leave_trained_weights, {"artifact"}),
        ("score_split", carry_weights_into_the_next_segment, {"ranks"}),
    ],
)
def test_a_cheat_fails_the_audit(name, cheat, fails, audited, monkeypatch):
    monkeypatch.setattr(eval_sliding, name, partial(cheat, vars(eval_sliding)[name]))
    failed = audited()
    assert failed >= fails
    assert "bytes" not in failed


def test_losses_that_are_no_probabilities_fail_the_audit(audited, monkeypatch):
    honest = GPT.forward

    def forward(self, input_ids, target_ids=None, **kwargs):
        result = honest(self, input_ids, target_ids, **kwargs)
        return result if target_ids is None else 0.9 * result

    monkeypatch.setattr(GPT, "forward", forward)
    assert audited() == {"C2"}


@pytest.mark.parametrize("place", [0, -1])
def test_one_byte_too_many_fails_the_audit_wherever_it_is(place, audited, set_hp):
    val = ValData.load(set_hp, CPU)
    val.target_bytes[place] += 1
    assert audited(val=val) == {"bytes"}


def test_a_sidecar_may_count_other_bytes_but_none_for_the_start_of_a_document(audited, set_hp):
    val = ValData.load(set_hp, CPU)
    starts = val.tokens[1:] == BOS_ID
    sizes = torch.where(starts, 0, 3)
    assert audited(val=replace(val, target_bytes=sizes, sidecar=True)) == set()
    assert audited(val=replace(val, target_bytes=sizes + starts, sidecar=True)) == {"bytes"}


def test_a_split_too_short_to_audit_is_refused(audited):
    assert "23 targets are too few to audit" in refusal(lambda: audited(val_max_tokens=23))
    assert audited(val_max_tokens=24) == set()


# ---- Command line

TRAINED = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 16, "TTT_EPOCHS": 1, "TTT_LR": 0.05}


@pytest.mark.parametrize(
    ("knobs", "more_rows"),
    [({}, []), ({**TRAINED, "NGRAM": "on"}, ["C1 n-gram", "C2 n-gram", "C3 n-gram"])],
    ids=["off", "sgd and n-gram"],
)
def test_the_audit_of_an_artifact_logs_its_table_and_succeeds(knobs, more_rows, artifact, dataset):
    result = score(artifact, dataset, "--audit", **knobs)
    assert (result.code, result.err) == (0, "")
    table = re.findall(r"^\| (.+?) \| .* \| .* \| (\w+) \|$", result.out, re.MULTILINE)
    assert table == [(row, "pass") for row in [*ROWS[:4], *more_rows, *ROWS[4:]]]
    assert artifact.with_suffix(".txt").read_text().endswith(result.out)
    assert "audit of the first 96 targets, window:32 stride:8 ttt:" in result.out
    assert "eval_summary" not in result.out


@pytest.mark.parametrize(("ttt", "stride"), [("off", 4), ("sgd", 8)])
def test_the_audit_of_a_model_that_looks_ahead_ends_with_status_1(
    ttt, stride, artifact, dataset, monkeypatch
):
    """Whatever EVAL_STRIDE: tokens change amid a window, where such a model can look ahead."""
    monkeypatch.setattr(train_gpt, "sdpa_attention", attend_both_ways)
    result = score(artifact, dataset, "--audit", TTT=ttt, EVAL_STRIDE=stride)
    assert (result.code, result.err) == (1, "")
    assert re.search(r"^\| C1 causal \|.*\| FAIL \|$", result.out, re.MULTILINE)


def test_the_audit_is_refused_to_two_ranks(artifact, dataset, monkeypatch):
    monkeypatch.setattr(Dist, "from_torchrun", lambda: Dist(0, 2, CPU))
    assert_refused(score(artifact, dataset, "--audit"), "--audit is for one process")


def test_a_budget_too_short_for_training_still_gives_a_whole_score(artifact, dataset):
    result = score(artifact, dataset, **TRAINED, EVAL_MAX_SECONDS=1e-3)
    run, asked = result.summary["ttt_epochs"]
    assert run < asked
    assert f"ttt_epochs: {run} of {asked}" in result.out
    assert len(re.findall(r"^EVAL_MAX_SECONDS=0.001: fewer epochs", result.out, re.MULTILINE)) == 1
    assert (result.code, result.summary["partial"]) == (0, False)


@pytest.mark.slow
def test_two_processes_report_the_scores_of_one(artifact, dataset):
    knobs = {**TRAINED, "NGRAM": "on"}
    alone = score(artifact, dataset, **knobs).summary
    env = eval_env(dataset, **knobs)
    both = run_command("eval_sliding.py", env, artifact.parent, artifact.name, nproc=2)
    assert both.code == 0, both.err
    for name in ("val_bpb", "val_loss"):
        assert both.summary[name] == pytest.approx(alone[name], abs=1e-9)
        assert both.summary["ngram"][name] == pytest.approx(alone["ngram"][name], abs=1e-9)
    for name in ("target_tokens", "scored_bytes", "ttt", "ttt_epochs"):
        assert both.summary[name] == alone[name]
    assert alone["ttt_epochs"][0] > 0
    assert score(artifact, dataset).summary["val_bpb"] != alone["val_bpb"]


@pytest.mark.parametrize(
    ("number", "batch", "knobs"),
    [(signal.SIGTERM, 3, {}), (signal.SIGINT, 3, TRAINED), (signal.SIGINT, 1, {})],
)
def test_a_signal_ends_scoring_with_the_partial_score_so_far(
    number, batch, knobs, artifact, dataset, monkeypatch
):
    honest, calls = Scorer.score, itertools.count(1)

    def interrupted(scorer, windows) -> None:
        if next(calls) == batch:
            os.kill(os.getpid(), number)
        honest(scorer, windows)

    monkeypatch.setattr(Scorer, "score", interrupted)
    result = score(artifact, dataset, **knobs)
    said = f"error: interrupted by signal {int(number)}\n"
    assert (result.code, result.err) == (128 + number, said)
    scored = (batch - 1) * (16 if knobs else 32)  # 4 windows of 8 targets, 2 of them in TTT
    line = rf"^interrupted by signal {int(number)}, {scored} of \d+ targets scored here: (.*)\n\Z"
    found = re.search(line, result.out, re.MULTILINE)
    assert found, result.out
    assert artifact.with_suffix(".txt").read_text().endswith(result.out)
    assert not re.search("val_bpb|val_loss|eval_summary", result.out)
    if not scored:
        assert found[1] == "nothing"
        return
    assert re.fullmatch(r"PARTIAL_loss:[\d.]+ PARTIAL_bpb:[\d.]+", found[1])
    if not knobs:
        assert found[1] in score(artifact, dataset, VAL_MAX_TOKENS=scored).out
