"""Properties of score-first test-time training, the audit, and stops of eval_sliding.py.   pytest tests/test_ttt.py"""

import itertools
import math
import os
import re
import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import (
    CPU,
    VOCAB_SIZE,
    assert_refused,
    cli_env,
    eval_env,
    run_command,
    run_in_process,
    train_gpt,
    write_dataset,
    write_shard,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_sliding
from eval_sliding import adapt, affordable_epochs, audit, score_split, score_within_memory
from train_gpt import GPT, Dist, Hyperparameters, Refusal, Scorer, ValData

T = 16  # window, tokens
TTT = {
    "num_layers": 2,
    "train_seq_len": T,
    "eval_stride": 4,
    "eval_max_seconds": 0.0,
    "ttt": "sgd",
    "ttt_lr": 0.1,
    "ttt_epochs": 2,
    "ttt_chunk_tokens": 16,
    "ttt_segments": 2,
}
SCOPES = train_gpt.CHOICES["ttt_scope"].split()


def ttt_hp(**overrides) -> Hyperparameters:
    return tiny_hp(**{**TTT, **overrides})


def make_val(num_targets: int, vocab_size: int = 64, period: int | None = None) -> ValData:
    """Random tokens, repeated after `period`, that stand for random numbers of bytes."""
    generator = torch.Generator().manual_seed(num_targets)
    tokens = torch.randint(
        vocab_size, (period or num_targets + 1,), generator=generator, dtype=torch.int32
    )
    tokens = tokens.repeat(1 + num_targets // len(tokens))[: num_targets + 1]
    sizes = torch.randint(1, 9, (num_targets,), generator=generator, dtype=torch.int32)
    return ValData(tokens, sizes, "", False)


def run_split(
    model,
    hp: Hyperparameters,
    val: ValData,
    dist=ALONE,
    before=None,
    log=None,
    started=0.0,
    forward=None,
):
    """What eval_sliding.py does with a rank's share; `before(windows)` is called before these are scored."""
    scorer = Scorer(forward or model, val, hp, dist, hp.eval_stride, "test")

    def score(windows) -> None:
        before(windows)
        score_within_memory(scorer, windows)

    epochs = score_split(
        scorer, model, hp, log or (lambda text: None), started, score if before else None
    )
    return SimpleNamespace(
        sums=scorer.sums[:, :-1], losses=scorer.sums[0, :-1], epochs=epochs.tolist(), scorer=scorer
    )


def sliding_losses(model, hp: Hyperparameters, val: ValData) -> torch.Tensor:
    return run_split(model, replace(hp, ttt="off"), val).losses


def copy_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_names(state: dict, other: dict) -> set[str]:
    return {name for name, tensor in state.items() if not torch.equal(tensor, other[name])}


# ---- Score first


@pytest.mark.parametrize(("lr", "apart"), [(0.0, 0.0), (1e-12, 1e-6)])
def test_training_that_changes_nothing_gives_the_losses_of_sliding(lr, apart):
    hp, val = ttt_hp(ttt_lr=lr), make_val(101)
    model = make_model(hp)
    ours = run_split(model, hp, val)
    torch.testing.assert_close(ours.losses, sliding_losses(model, hp, val), rtol=0, atol=apart)
    assert ours.epochs[0] == ours.epochs[1] > 0
    assert bool((ours.sums[1] == 1).all())


@pytest.mark.parametrize("segments", [1, 2, 3])
def test_each_segment_starts_with_the_artifact_and_all_its_other_chunks_are_scored_by_trained_weights(
    segments,
):
    hp, val = ttt_hp(ttt_segments=segments), make_val(192)  # 12 chunks of 16 targets
    model = make_model(hp)
    differs = (run_split(model, hp, val).losses != sliding_losses(model, hp, val)).view(
        segments, -1, 16
    )
    assert not differs[:, 0].any()
    assert differs[:, 1:].any(-1).all()


def test_what_repeats_beyond_the_window_is_learned():
    """The first time that the sequence comes it is as hard as without training."""
    hp = ttt_hp(ttt_segments=1, ttt_chunk_tokens=40, ttt_epochs=6)
    val, model = make_val(320, period=40), make_model(hp)
    both = sliding_losses(model, hp, val), run_split(model, hp, val).losses
    plain, trained = (losses.view(-1, 40).mean(1) for losses in both)
    assert trained[0] == plain[0] > 3.5
    assert plain[-1] > 3.5
    assert trained[-1] < 0.5 * plain[-1]
    assert trained.mean() < 0.8 * plain.mean()


def test_a_text_without_any_pattern_cannot_be_learned():
    """Control of the test above: no gain of TTT may come from elsewhere than the text."""
    hp = ttt_hp(ttt_segments=1, ttt_chunk_tokens=40, ttt_epochs=6)
    val, model = make_val(320), make_model(hp)
    assert run_split(model, hp, val).losses.mean() > math.log(64)


# ---- Order of events


def record_events(monkeypatch, hp: Hyperparameters, num_targets: int) -> list[tuple]:
    """A run as ("score", windows) and ("adapt", first, end, learning rate) in order."""
    events, honest = [], eval_sliding.adapt

    def recorded(scorer, optimizer, first, end) -> None:
        assert bool((scorer.sums[1, first:end] == 1).all()), (
            "an update on targets that were not scored before"
        )
        events.append(("adapt", first, end, optimizer.param_groups[0]["lr"]))
        honest(scorer, optimizer, first, end)

    monkeypatch.setattr(eval_sliding, "adapt", recorded)
    result = run_split(
        make_model(hp),
        hp,
        make_val(num_targets),
        before=lambda w: events.append(("score", w.tolist())),
    )
    assert result.epochs == [sum(event[0] == "adapt" for event in events)] * 2
    assert bool((result.sums[1] == 1).all())
    return events


@pytest.mark.parametrize(
    ("num_targets", "changes", "windows_per_chunk", "segments"),
    [
        (160, {}, 4, 2),
        (
            157,
            {"ttt_chunk_tokens": 15, "ttt_epochs": 3},
            3,
            2,
        ),  # neither chunks nor windows nor tiles come out even
        (90, {"ttt_chunk_tokens": 3, "ttt_epochs": 1}, 1, 2),  # chunks below a window are one
        (90, {"eval_stride": 16, "ttt_chunk_tokens": 16, "ttt_segments": 4}, 1, 4),
        (131, {"ttt_chunk_tokens": 8, "ttt_segments": 5}, 2, 5),
        (
            70,
            {"ttt_chunk_tokens": 1 << 20, "ttt_segments": 3},
            1 << 18,
            3,
        ),  # nothing is left to train for
        (10, {"ttt_segments": 8}, 4, 3),  # more segments than windows
        (1, {"ttt_segments": 8}, 4, 1),
    ],
)
def test_a_chunk_is_scored_then_trained_on_and_a_segments_last_one_never(
    num_targets, changes, windows_per_chunk, segments, monkeypatch
):
    hp = ttt_hp(**changes)
    events = record_events(monkeypatch, hp, num_targets)
    in_order = train_gpt.scoring_windows(num_targets, T, hp.eval_stride).tolist()
    assert [window for kind, *rest in events if kind == "score" for window in rest[0]] == in_order
    chunks, updates = [], []
    for kind, *rest in events:
        if kind == "score":
            chunks.append(rest[0])
            updates.append([])
        else:
            updates[-1].append(rest)
    split, current = [], []
    for chunk, steps in zip(chunks, updates, strict=True):
        current.append((chunk, steps))
        if not steps:
            split.append(current)
            current = []
    assert not current
    assert len(split) == segments
    sizes = [sum(len(chunk) for chunk, _ in segment) for segment in split]
    assert max(sizes) - min(sizes) <= 1
    for segment in split:
        assert all(len(chunk) == windows_per_chunk for chunk, _ in segment[:-1])
        assert 1 <= len(segment[-1][0]) <= windows_per_chunk
        for i, (chunk, steps) in enumerate(segment[:-1]):
            lr = hp.ttt_lr / 2 * (1 + math.cos(math.pi * i / (len(segment) - 1)))
            assert (
                steps == [[chunk[0][1], chunk[-1][2], pytest.approx(lr, rel=1e-12)]] * hp.ttt_epochs
            )


# ---- Scopes


IN_SCOPE = {  # by the names of the tensors, as a reader of the state dict would choose them
    "all": lambda name: name != "expert_table",
    "mu": lambda name: (
        name.rpartition(".")[2].startswith("mu_") or re.search(r"mu_(read|write)\.weight", name)
    ),
    "vectors": lambda name: not re.search(r"weight$|expert_|table|router", name),
    "experts": lambda name: re.search(r"expert_(up|down)$", name),
}


@pytest.mark.parametrize(
    "changes", [{}, {"mu": "lowrank"}, {"mu": "pid", "routing": "soft"}], ids=str
)
@pytest.mark.parametrize("scope", SCOPES)
def test_exactly_the_tensors_of_the_scope_change_and_all_are_restored(scope, changes):
    hp = ttt_hp(ttt_scope=scope, **changes)
    model, changed = make_model(hp), set()
    artifact = copy_of(model)
    run_split(
        model,
        hp,
        make_val(100),
        before=lambda _: changed.update(changed_names(artifact, model.state_dict())),
    )
    assert changed == {name for name in artifact if IN_SCOPE[scope](name)}
    assert not changed_names(artifact, model.state_dict())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_every_scope_is_another_one():
    names = {
        scope: frozenset(eval_sliding.ttt_parameters(make_model(ttt_hp()), scope))
        for scope in SCOPES
    }
    assert len(set(names.values())) == len(SCOPES)
    assert all(chosen <= names["all"] for chosen in names.values())


@pytest.mark.parametrize(
    ("scope", "changes"), [("mu", {"mu": "off"}), ("experts", {"routing": "dense"})]
)
def test_a_scope_that_the_model_lacks_is_refused(scope, changes):
    hp = ttt_hp(ttt_scope=scope, **changes)
    with pytest.raises(Refusal, match=f"TTT_SCOPE={scope}"):
        run_split(make_model(hp), hp, make_val(100))
    hp = replace(hp, ttt_scope="vectors")
    assert run_split(make_model(hp), hp, make_val(100)).epochs[0] > 0


# ---- One update


def reference_gradients(
    model: GPT, val: ValData, first: int, end: int
) -> tuple[list[torch.Tensor], float]:
    """Gradients of the mean loss of these targets, read in tiles of a window without context, and their norm."""
    tokens, total = val.tokens.long(), 0.0
    for start in range(first, end, T):
        stop = min(start + T, end)
        logits = model(tokens[None, start:stop])[0]
        total = total + F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="sum")
    gradients = torch.autograd.grad(total / (end - first), list(model.parameters()))
    return gradients, math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


def reference_steps(
    model: GPT, val: ValData, hp: Hyperparameters, spans: list[tuple[int, int]]
) -> list[float]:
    """Plain SGD with momentum on clipped gradients, in place. Returns the norms before clipping."""
    velocity, norms = [torch.zeros_like(p) for p in model.parameters()], []
    for first, end in spans:
        gradients, norm = reference_gradients(model, val, first, end)
        norms.append(norm)
        with torch.no_grad():
            for p, v, g in zip(model.parameters(), velocity, gradients, strict=True):
                v.mul_(hp.ttt_momentum).add_(g * min(1.0, 1.0 / norm))
                p.sub_(hp.ttt_lr * v)
    return norms


@pytest.mark.parametrize("batch", [1, 2, 3, 16], ids=lambda batch: f"batch={batch}")
@pytest.mark.parametrize("span", [(0, 64), (4, 20), (33, 100), (50, 57)], ids=str)
def test_an_update_is_a_plain_step_on_the_mean_loss_of_its_targets(span, batch):
    hp, val = ttt_hp(micro_batch_tokens=batch * T), make_val(101)
    ours, plain = make_model(hp), make_model(hp)
    scorer = Scorer(ours, val, hp, ALONE, hp.eval_stride, "test")
    optimizer = torch.optim.SGD(ours.parameters(), lr=hp.ttt_lr, momentum=hp.ttt_momentum)
    before, spans = copy_of(ours), [span, span]
    for first, end in spans:
        adapt(scorer, optimizer, first, end)
    reference_steps(plain, val, hp, spans)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=0, atol=1e-5)
    assert (
        max(float((p.detach() - before[name]).abs().max()) for name, p in ours.named_parameters())
        > 1e-2
    )
    assert not scorer.sums.any()


@pytest.mark.parametrize(("scale", "clipped"), [(1.0, True), (0.02, False)])
def test_gradients_are_clipped_to_a_norm_of_one(scale, clipped):
    """A loss of a fiftieth has gradients below the bound, and these must not be scaled up to it."""
    hp, val = ttt_hp(ttt_lr=1.0, ttt_momentum=0.0), make_val(64)
    model = make_model(hp)
    _, norm = reference_gradients(model, val, 0, 57)
    assert (norm * scale > 1.0) == clipped
    scorer = Scorer(
        lambda *args, **kwargs: scale * model(*args, **kwargs),
        val,
        hp,
        ALONE,
        hp.eval_stride,
        "test",
    )
    before = copy_of(model)
    adapt(scorer, torch.optim.SGD(model.parameters(), lr=1.0), 0, 57)
    steps = [p.detach() - before[name] for name, p in model.named_parameters()]
    moved = math.sqrt(sum(float(step.double().square().sum()) for step in steps))
    assert moved == pytest.approx(min(1.0, norm * scale), rel=1e-3)


def test_an_update_sees_no_token_outside_its_targets():
    hp, val = ttt_hp(), make_val(101)
    inside, states = slice(20, 53), []  # tokens of the targets 20 to 51
    other = replace(val, tokens=(val.tokens + 1) % hp.vocab_size)
    other.tokens[inside] = val.tokens[inside]
    nudged = replace(val, tokens=val.tokens.clone())
    nudged.tokens[52] = (nudged.tokens[52] + 1) % hp.vocab_size  # the last target
    for tokens in (val, other, nudged):
        model = make_model(hp)
        scorer = Scorer(model, tokens, hp, ALONE, hp.eval_stride, "test")
        adapt(scorer, torch.optim.SGD(model.parameters(), lr=0.1), 20, 52)
        states.append(copy_of(model))
    assert not changed_names(states[0], states[1])
    assert changed_names(states[0], states[2])


# ---- The clock


SECONDS = st.floats(0, 1e6, allow_nan=False)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    epochs=st.integers(1, 10),
    budget=SECONDS,
    elapsed=st.tuples(SECONDS, SECONDS),
    to_score=SECONDS,
    per_epoch=SECONDS,
    updates=st.integers(1, 1000),
)
def test_epochs_are_as_many_as_fit_the_budget(
    epochs, budget, elapsed, to_score, per_epoch, updates
):
    hp = replace(ttt_hp(), ttt_epochs=epochs, eval_max_seconds=budget)
    early, late = (
        affordable_epochs(hp, seconds, to_score, per_epoch, updates) for seconds in sorted(elapsed)
    )
    assert 0 <= late <= early <= epochs
    assert (
        affordable_epochs(replace(hp, eval_max_seconds=0.0), late, to_score, per_epoch, updates)
        == epochs
    )
    if budget and per_epoch:
        assert early == 0 or min(elapsed) + to_score + early * per_epoch * updates <= budget
        if early < epochs:
            assert min(elapsed) + to_score + (early + 1.001) * per_epoch * updates > 0.98 * budget


def run_by_clock(
    monkeypatch, budget: float, window_seconds: float, epoch_seconds: float, **changes
):
    """A run of 40 windows in 10 chunks, 8 updates, on a clock that scoring and training, which is left out, move."""
    clock, lines = SimpleNamespace(now=100.0), []

    def timed_adapt(*args) -> None:
        clock.now += epoch_seconds

    def timed_score(windows) -> None:
        clock.now += window_seconds * len(windows)

    monkeypatch.setattr(eval_sliding.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(eval_sliding, "adapt", timed_adapt)
    hp = ttt_hp(eval_max_seconds=budget, ttt_epochs=3, **changes)
    result = run_split(
        make_model(hp), hp, make_val(160), before=timed_score, log=lines.append, started=100.0
    )
    assert bool((result.sums[1] == 1).all())
    assert bool(result.losses.isfinite().all())
    return SimpleNamespace(epochs=result.epochs, lines=lines, seconds=clock.now - 100.0)


@pytest.mark.parametrize(
    ("budget", "least", "most"),
    [
        (0.0, 24, 24),
        (100.0, 24, 24),
        (60.0, 8, 9),
        (70.0, 13, 15),
        (46.0, 3, 3),
    ],  # 40 s of scoring, 48 s of training
)
def test_epochs_and_never_targets_are_left_out_to_keep_the_time(budget, least, most, monkeypatch):
    result = run_by_clock(monkeypatch, budget, window_seconds=1.0, epoch_seconds=2.0)
    run, asked = result.epochs
    assert asked == 24
    assert least <= run <= most
    assert not budget or result.seconds <= budget
    if run == asked:
        assert result.lines == []
    else:
        assert len(result.lines) == 1
        assert f"EVAL_MAX_SECONDS={budget:g}" in result.lines[0]


def test_no_epoch_is_run_when_scoring_alone_takes_the_whole_budget(monkeypatch):
    """Not even after the first chunk, when the time of an epoch is not known yet."""
    result = run_by_clock(monkeypatch, 30.0, window_seconds=1.0, epoch_seconds=2.0)
    assert result.epochs == [0, 24]
    assert result.seconds == 40.0
    assert len(result.lines) == 1


# ---- Ranks


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_the_loss_of_every_target_is_the_same_at_any_world_size(ttt, dispatch):
    hp, val = ttt_hp(ttt=ttt, ttt_segments=4, dispatch=dispatch), make_val(131)
    model, sums = make_model(hp), []
    for world_size in (1, 2, 4):
        ranks = [
            run_split(model, hp, val, Dist(rank, world_size, CPU)) for rank in range(world_size)
        ]
        sums.append(sum(rank.sums for rank in ranks))
        assert all(0 < int(rank.sums[1].sum()) < 131 for rank in ranks) or world_size == 1
        assert bool((sums[-1][1] == 1).all())
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


def test_the_number_of_segments_does_change_the_losses():
    """Control of the test above."""
    hp, val = ttt_hp(ttt_segments=4), make_val(131)
    model = make_model(hp)
    assert not torch.equal(
        run_split(model, hp, val).losses, run_split(model, replace(hp, ttt_segments=2), val).losses
    )


# ---- Memory


MEMORY_ERRORS = {
    "cuda": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "cpu": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
}


def limited(model: GPT, fits: int, error: Exception, training: bool):
    """`model` on a machine whose memory holds so many windows, in training or in scoring."""

    def forward(input_ids, *args, **kwargs):
        if len(input_ids) > fits and torch.is_grad_enabled() == training:
            raise error
        return model(input_ids, *args, **kwargs)

    return forward


@pytest.mark.parametrize(
    ("ttt", "training", "batch", "fits", "left", "error"),
    [
        ("off", False, 8, 2, [4, 2], "cuda"),
        ("off", False, 8, 4, [4], "cpu"),
        ("off", False, 5, 1, [2, 1], "torch"),
        ("sgd", False, 8, 4, [4], "cuda"),
        ("sgd", True, 8, 1, [2, 1], "torch"),
        ("sgd", True, 3, 2, [1], "cpu"),
    ],
)
def test_memory_that_runs_out_halves_the_batch_and_leaves_the_losses(
    ttt, training, batch, fits, left, error, capsys
):
    hp, val = ttt_hp(ttt=ttt, ttt_chunk_tokens=64, micro_batch_tokens=batch * T), make_val(203)
    model = make_model(hp)
    expected = run_split(model, hp, val)
    assert capsys.readouterr().err == ""
    result = run_split(model, hp, val, forward=limited(model, fits, MEMORY_ERRORS[error], training))
    assert bool((result.sums[1] == 1).all())
    torch.testing.assert_close(
        result.losses, expected.losses, rtol=0, atol=1e-4 if ttt == "sgd" else 1e-5
    )
    lines = [
        f"warning: out of memory, {size} windows per forward pass from here on" for size in left
    ]
    assert capsys.readouterr().err.splitlines() == lines


def test_an_update_that_runs_out_of_memory_halfway_begins_again_without_its_first_gradients():
    hp, val = ttt_hp(micro_batch_tokens=4 * T), make_val(101)
    states = []
    for fails_at in (None, 2):
        model, calls = make_model(hp), itertools.count(1)

        def forward(*args, model=model, calls=calls, fails_at=fails_at, **kwargs):
            if next(calls) == fails_at:
                raise MEMORY_ERRORS["cuda"]
            return model(*args, **kwargs)

        scorer = Scorer(forward, val, hp, ALONE, hp.eval_stride, "test")
        adapt(scorer, torch.optim.SGD(model.parameters(), lr=0.1), 0, 100)
        states.append(model.state_dict())
        assert next(calls) == (
            3 if fails_at is None else 7
        )  # 2 batches; then 1, the failure, and 4
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_a_window_that_never_fits_is_refused(training, capsys):
    hp, val = ttt_hp(ttt_chunk_tokens=64, micro_batch_tokens=4 * T), make_val(203)
    model = make_model(hp)
    with pytest.raises(Refusal, match=f"one window of {T} tokens .* EVAL_SEQ_LEN"):
        run_split(model, hp, val, forward=limited(model, 0, MEMORY_ERRORS["cuda"], training))
    assert len(capsys.readouterr().err.splitlines()) == 2


@pytest.mark.parametrize("training", [False, True])
def test_an_error_that_is_not_about_memory_is_not_swallowed(training, capsys):
    hp, val = ttt_hp(micro_batch_tokens=4 * T), make_val(101)
    model = make_model(hp)
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_split(
            model, hp, val, forward=limited(model, 0, RuntimeError("device-side assert"), training)
        )
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("ttt", "training"), [("off", False), ("sgd", False), ("sgd", True)])
def test_the_run_before_the_clock_leaves_no_trace_and_finds_the_batch_that_fits(ttt, training):
    hp = ttt_hp(ttt=ttt, ttt_chunk_tokens=64, micro_batch_tokens=8 * T)
    model = make_model(hp)
    artifact, rng = copy_of(model), torch.get_rng_state()
    assert eval_sliding.compile_on_random_tokens(model, model, hp, ALONE) == hp
    if ttt == "sgd" or not training:
        forward = limited(model, 2 if training else 1, MEMORY_ERRORS["cuda"], training)
        fitted = eval_sliding.compile_on_random_tokens(forward, model, hp, ALONE)
        assert fitted == replace(hp, micro_batch_tokens=(2 if training else 1) * T)
    assert not changed_names(artifact, model.state_dict())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


# ---- Audit

ROWS = ["C1 causal", "C2 normalised", "C3 score before update", "C4 single pass"]
ROWS += ["ranks", "batches", "artifact", "bytes"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=3)


@pytest.fixture(scope="module")
def audit_hp(dataset) -> Hyperparameters:
    """A window of 16 makes the audit one of 48 targets: two segments of three chunks of 8, each of them two windows."""
    paths = {"data_path": str(dataset.folder), "tokenizer_path": str(dataset.tokenizer)}
    return ttt_hp(vocab_size=VOCAB_SIZE, ttt_epochs=1, **paths)


def audited(hp: Hyperparameters, model: GPT | None = None, val: ValData | None = None) -> set[str]:
    """The rows that fail in an audit, by its log; its verdict has to agree with them."""
    lines: list[str] = []
    holds = audit(model or make_model(hp), hp, val or ValData.load(hp, CPU), lines.append)
    verdicts = dict(
        re.findall(r"^\| ([^|]+?) \|.*\| (pass|FAIL) \|$", "\n".join(lines), re.MULTILINE)
    )
    assert list(verdicts) == ROWS
    failed = {row for row, verdict in verdicts.items() if verdict == "FAIL"}
    assert holds == (not failed)
    return failed


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_an_honest_evaluation_passes_its_audit(ttt, dispatch, audit_hp):
    hp = replace(audit_hp, ttt=ttt, dispatch=dispatch)
    model = make_model(hp)
    artifact = copy_of(model)
    assert audited(hp, model) == set()
    assert not changed_names(artifact, model.state_dict())


@pytest.mark.parametrize(
    "changes", [{"eval_stride": 1}, {"eval_stride": 16}, {"eval_seq_len": 9, "eval_stride": 3}]
)
@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_an_honest_evaluation_passes_at_any_stride_and_window(ttt, changes, audit_hp):
    assert audited(replace(audit_hp, ttt=ttt, **changes)) == set()


@pytest.mark.parametrize("scope", ["mu", "experts"])
def test_an_honest_evaluation_passes_in_every_scope(scope, audit_hp):
    assert audited(replace(audit_hp, ttt_scope=scope)) == set()


def span_of(windows) -> tuple[int, int]:
    return int(windows[0, 1]), int(windows[-1, 2])


def train_on(scorer, model, hp, windows, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=hp.ttt_lr)
    for _ in range(epochs):
        adapt(scorer, optimizer, *span_of(windows))


def train_first(epochs: int):
    """TTT that trains on a chunk before it scores it, as well as after."""

    def cheat(honest, scorer, model, hp, log, started, score):
        def peek(windows) -> None:
            train_on(scorer, model, hp, windows, epochs)
            score(windows)

        return honest(scorer, model, hp, log, started, peek)

    return cheat


def keep_the_second_loss(honest, scorer, model, hp, log, started, score):
    """TTT that scores a chunk again after training on it, and writes that loss over the first one."""

    def again(windows) -> None:
        score(windows)
        kept, weights = scorer.sums.clone(), copy_of(model)
        train_on(scorer, model, hp, windows, 1)
        scorer.score(windows)
        targets = slice(*span_of(windows))
        kept[0, targets] = scorer.sums[0, targets] - kept[0, targets]
        scorer.sums.copy_(kept)
        model.load_state_dict(weights)

    return honest(scorer, model, hp, log, started, again)


def score_twice(honest, scorer, model, hp, log, started, score):
    def twice(windows) -> None:
        score(windows)
        score_within_memory(scorer, windows[:1])

    return honest(scorer, model, hp, log, started, twice)


def leave_out(honest, scorer, model, hp, log, started, score):
    """TTT that does not score the first window of the split."""
    return honest(
        scorer, model, hp, log, started, lambda windows: score(windows[int(windows[0, 1] == 0) :])
    )


def leave_weights_trained(honest, scorer, model, hp, log, started, score):
    result = honest(scorer, model, hp, log, started, score)
    train_on(scorer, model, hp, scorer.windows[:1], 1)
    return result


def carry_weights_over(honest, scorer, model, hp, log, started, score):
    """TTT whose segments begin with the weights that the one before them ended with."""
    artifact = copy_of(model)
    model.load_state_dict = lambda state: None
    try:
        return honest(scorer, model, hp, log, started, score)
    finally:
        del model.load_state_dict
        model.load_state_dict(artifact)


CHEATS = {  # the rows that have to fail, and those that have to pass
    "trained_before": (train_first(1), "C1, C3", "C4, artifact, bytes"),
    "one_epoch_of_two_before": (train_first(1), "C1, C3", "C4, artifact, bytes"),
    "second_loss": (keep_the_second_loss, "C1, C3", "C4, artifact, bytes"),
    "scored_twice": (score_twice, "C4", "artifact, bytes"),
    "left_out": (leave_out, "C4", "artifact, bytes"),
    "left_trained": (leave_weights_trained, "artifact", "C4, bytes"),
    "carried_over": (carry_weights_over, "ranks", "C1, C2, C3, C4, batches, artifact, bytes"),
}


def rows(text: str) -> set[str]:
    """Full names of the rows whose abbreviations are listed."""
    return {next(row for row in ROWS if row.startswith(name)) for name in text.split(", ") if name}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"ttt_epochs": 2 if "of_two" in name else 1}) for name in CHEATS),
        ("carried_over", {"dispatch": "grouped"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_a_training_that_cheats_fails_its_audit(name, changes, audit_hp, monkeypatch):
    cheat, fail, keep = CHEATS[name]
    honest = eval_sliding.score_first
    monkeypatch.setattr(eval_sliding, "score_first", lambda *args: cheat(honest, *args))
    failed = audited(replace(audit_hp, **changes))
    assert failed >= rows(fail)
    assert not failed & rows(keep)


@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_training_hidden_in_what_scores_windows_fails_its_audit(ttt, audit_hp, monkeypatch):
    """The weights that the audit sees before a chunk is scored are then not those that score it."""
    honest = eval_sliding.score_within_memory

    def peek(scorer, windows) -> None:
        model = scorer.forward
        weights = copy_of(model)
        train_on(scorer, model, audit_hp, windows, 1)
        honest(scorer, windows)
        model.load_state_dict(weights)

    monkeypatch.setattr(eval_sliding, "score_within_memory", peek)
    hp = replace(audit_hp, ttt=ttt)
    model = make_model(hp)
    assert audited(hp, model) >= rows("C1, C3")


def attend_everywhere(*q_k_v):
    q, k, v = (y.transpose(1, 2) for y in q_k_v)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize(("ttt", "where"), [("off", "first"), ("off", "last"), ("sgd", "all")])
def test_a_model_that_attends_to_the_next_tokens_fails_its_audit(
    where, ttt, stride, audit_hp, monkeypatch
):
    """Whatever EVAL_STRIDE and the layer: tokens must change amid a window, where such a model can look ahead."""
    hp = replace(audit_hp, ttt=ttt, eval_stride=stride)
    model, honest = make_model(hp), train_gpt.attend_at
    if where != "last":
        for block in model.blocks[: None if where == "all" else -1]:
            block.attn.attend = attend_everywhere
    if where != "first":
        monkeypatch.setattr(
            train_gpt, "attend_at", lambda at, q, k, v: honest(0 * at + k.size(1) - 1, q, k, v)
        )
    failed = audited(hp, model)
    assert failed >= rows("C1")
    assert not failed & rows("C4, artifact, bytes")


@pytest.mark.parametrize("ttt", ["off", "sgd"])
@pytest.mark.parametrize(
    "change", [lambda nll: nll - 0.1, lambda nll: 0.9 * nll], ids=["offset", "factor"]
)
def test_losses_that_are_no_probabilities_fail_the_audit(change, ttt, audit_hp, monkeypatch):
    honest = GPT.forward

    def forward(self, input_ids, target_ids=None, **kwargs):
        result = honest(self, input_ids, target_ids, **kwargs)
        return result if target_ids is None else change(result)

    monkeypatch.setattr(GPT, "forward", forward)
    assert audited(replace(audit_hp, ttt=ttt)) == rows("C2")


@pytest.mark.parametrize("place", [0, -1])
def test_one_byte_too_many_fails_the_audit(place, audit_hp):
    """Wherever it is: the audit decodes the text of the whole split, not of the targets that it scores."""
    hp = replace(audit_hp, ttt="off")
    val = ValData.load(hp, CPU)
    assert audited(hp, val=val) == set()
    val.target_bytes[place] += 1
    assert audited(hp, val=val) == rows("bytes")


@pytest.mark.parametrize("more", [-1, 1])
def test_a_wrong_rule_for_counting_bytes_fails_the_audit(more, audit_hp, monkeypatch):
    honest = train_gpt.token_bytes

    def token_bytes(sp, tokens):
        sizes = honest(sp, tokens)
        sizes[20] += more
        return sizes

    monkeypatch.setattr(train_gpt, "token_bytes", token_bytes)
    assert audited(replace(audit_hp, ttt="off")) == rows("bytes")


@pytest.mark.parametrize(("bos_bytes", "failed"), [(0, ""), (1, "bytes")])
def test_a_sidecar_may_count_other_bytes_but_none_for_the_start_of_a_document(
    bos_bytes, failed, tmp_path, audit_hp
):
    data = write_dataset(tmp_path / "set", val_docs=3)
    tokens = torch.from_numpy(
        train_gpt.load_data_shard(data.folder / "fineweb_val_0.bin").astype("int32")
    )
    sizes = torch.where(tokens == train_gpt.BOS_ID, bos_bytes, 3)
    write_shard(data.folder / "fineweb_val_bytes_0.bin", sizes.tolist())
    assert audited(replace(audit_hp, ttt="off", data_path=str(data.folder))) == rows(failed)


def test_a_split_too_short_to_audit_is_refused(audit_hp):
    with pytest.raises(Refusal, match="23 targets are too few to audit"):
        audited(replace(audit_hp, val_max_tokens=23))
    assert audited(replace(audit_hp, val_max_tokens=24)) == set()


# ---- Command line


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory, dataset) -> dict:
    """Trained artifacts by DISPATCH."""
    paths = {}
    for dispatch in ("masked", "grouped"):
        folder = tmp_path_factory.mktemp(dispatch)
        trained = run_in_process(
            train_gpt.main, cli_env(dataset, DISPATCH=dispatch, GPTQ_BATCHES=0), folder
        )
        assert trained.code == 0, trained.err
        paths[dispatch] = folder / "logs" / "run.ptz"
    return paths


@pytest.fixture
def score(tmp_path, dataset, artifacts):
    """Function that scores a copy of an artifact by eval_sliding.main; its log is tmp_path / "model.txt"."""

    def run(*argv, dispatch="masked", **knobs):
        (tmp_path / "model.ptz").write_bytes(artifacts[dispatch].read_bytes())
        return run_in_process(
            eval_sliding.main, eval_env(dataset, **knobs), tmp_path, *argv, "model.ptz"
        )

    return run


TRAINED = {"TTT": "sgd", "TTT_SEGMENTS": 2, "TTT_CHUNK_TOKENS": 64, "TTT_EPOCHS": 1, "TTT_LR": 0.05}


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
@pytest.mark.parametrize("knobs", [{}, TRAINED], ids=["off", "sgd"])
def test_the_audit_of_an_artifact_logs_its_table_and_succeeds(knobs, dispatch, score, tmp_path):
    result = score("--audit", dispatch=dispatch, **knobs)
    assert (result.code, result.err) == (0, "")
    table = re.findall(r"^\| (.+?) \| .* \| .* \| (\w+) \|$", result.out, re.MULTILINE)
    assert table == [(row, "pass") for row in ROWS]
    assert (tmp_path / "model.txt").read_text() == result.out
    assert "audit of the first 96 targets, window:32 stride:8 ttt:" in result.out
    assert "eval_summary" not in result.out


def test_the_audit_of_a_model_that_looks_ahead_ends_with_status_1(score, monkeypatch):
    monkeypatch.setattr(train_gpt, "attention_kernel", lambda name: attend_everywhere)
    result = score("--audit")
    assert (result.code, result.err) == (1, "")
    assert re.search(r"^\| C1 causal \|.*\| FAIL \|$", result.out, re.MULTILINE)
    assert re.search(r"^\| C4 single pass \|.*\| pass \|$", result.out, re.MULTILINE)


def test_the_audit_of_training_before_scoring_ends_with_status_1(score, monkeypatch):
    honest = eval_sliding.score_first
    monkeypatch.setattr(eval_sliding, "score_first", lambda *args: train_first(1)(honest, *args))
    result = score("--audit", **TRAINED)
    assert (result.code, result.err) == (1, "")
    assert re.search(r"^\| C3 score before update \|.*\| FAIL \|$", result.out, re.MULTILINE)
    assert re.search(r"^\| C4 single pass \|.*\| pass \|$", result.out, re.MULTILINE)


@pytest.mark.parametrize(
    ("argv", "knobs", "message"),
    [
        (["--self-check", "5"], TRAINED, "TTT=sgd: --self-check is for TTT=off"),
        (["--self-check", "5", "--audit"], {}, "usage: eval_sliding.py"),
        (["--self-check", "-1"], {}, "--self-check"),
        ([], {"TTT": "adam"}, "TTT='adam': expected one of off sgd"),
        ([], {"TTT_SCOPE": "none"}, "TTT_SCOPE='none': expected one of"),
        ([], {"TTT_MOMENTUM": 1.5}, "TTT_MOMENTUM=1.5"),
        ([], {"TTT_EPOCHS": 0}, "TTT_EPOCHS=0"),
        ([], {"TTT_SEGMENTS": 0}, "TTT_SEGMENTS=0"),
    ],
    ids=str,
)
def test_options_that_cannot_be_met_are_refused_in_one_line(argv, knobs, message, score, tmp_path):
    """And before anything is scored."""
    assert_refused(score(*argv, **knobs), message)
    assert not (tmp_path / "model.txt").exists()


@pytest.mark.parametrize(
    ("argv", "knobs", "message"),
    [
        (["--audit"], {}, "--audit is for one process"),
        ([], {**TRAINED, "TTT_SEGMENTS": 3}, "TTT_SEGMENTS=3: not a multiple of 2 ranks"),
    ],
)
def test_what_two_ranks_cannot_do_is_refused_in_one_line(argv, knobs, message, score, monkeypatch):
    monkeypatch.setattr(Dist, "from_torchrun", lambda device: Dist(0, 2, CPU))
    assert_refused(score(*argv, **knobs), message)


@pytest.mark.parametrize(("count", "checked"), [(5, 5), (100_000, None)])
def test_the_self_check_scores_windows_again_one_at_a_time(count, checked, score):
    result = score("--self-check", count, EVAL_STRIDE=16)
    assert (result.code, result.err) == (0, "")
    numbers = r"plain_bpb:(\S+) fast_bpb:(\S+) largest_difference:(\S+) nats"
    line = re.search(
        rf"^self_check: (\d+) of (\d+) windows one at a time: {numbers}", result.out, re.MULTILINE
    )
    windows = math.ceil(result.summary["target_tokens"] / 16)
    assert (int(line[1]), int(line[2])) == (checked or windows, windows)
    assert float(line[3]) == pytest.approx(float(line[4]), abs=1e-6)
    assert float(line[5]) < 1e-4
    if not checked:
        assert float(line[3]) == pytest.approx(result.summary["val_bpb"], abs=1e-6)


def test_the_self_check_refuses_losses_that_one_window_at_a_time_does_not_have(score, monkeypatch):
    honest = Scorer.score

    def worse(self, windows) -> None:
        before = self.sums[1].clone()
        honest(self, windows)
        self.sums[0] += 0.01 * (self.sums[1] - before)

    monkeypatch.setattr(Scorer, "score", worse)
    result = score("--self-check", 5)
    assert_refused(result, "self-check failed")
    assert "eval_summary" not in result.out


def test_a_budget_too_short_for_training_still_gives_a_whole_score(score):
    result = score(**TRAINED, EVAL_MAX_SECONDS=1e-3)
    run, asked = result.summary["ttt_epochs"]
    assert run < asked
    assert f"ttt_epochs: {run} of {asked}" in result.out
    assert len(re.findall(r"^EVAL_MAX_SECONDS=0.001: fewer epochs", result.out, re.MULTILINE)) == 1
    assert (result.code, result.summary["partial"]) == (0, False)
    assert result.summary["val_bpb"] > 0


def test_two_processes_report_the_score_of_one(score, dataset, tmp_path):
    """For TTT=off, test_cli.py has the same."""
    alone = score(**TRAINED).summary
    both = run_command(
        "eval_sliding.py", eval_env(dataset, **TRAINED), tmp_path, "model.ptz", nproc=2
    )
    assert both.code == 0, both.err
    for name in ("val_bpb", "val_loss"):
        assert both.summary[name] == pytest.approx(alone[name], abs=1e-9)
    for name in ("target_tokens", "scored_bytes", "ttt", "ttt_epochs"):
        assert both.summary[name] == alone[name]
    assert alone["ttt_epochs"][0] > 0
    assert "world_size:2" in both.out
    assert score().summary["val_bpb"] != alone["val_bpb"]


# ---- Interruption


@pytest.fixture
def stop_at(monkeypatch):
    """Function that sends this process a signal when a batch is about to be scored, and says who handles it."""
    previous = {}

    def unexpected(number, frame) -> None:
        raise AssertionError(f"signal {number} outside of scoring")

    def install(number: int, batch: int):
        honest, calls = Scorer.score, itertools.count(1)

        def score(self, windows) -> None:
            if next(calls) == batch:
                os.kill(os.getpid(), number)
            honest(self, windows)

        monkeypatch.setattr(Scorer, "score", score)
        for each in (signal.SIGINT, signal.SIGTERM):
            previous[each] = signal.signal(each, unexpected)
        return unexpected

    yield install
    for number, handler in previous.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("knobs", [{}, TRAINED], ids=["off", "sgd"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_scoring_with_the_partial_score_so_far(
    number, knobs, score, stop_at, tmp_path
):
    handler = stop_at(number, batch=3)  # batches of 4 windows that score 8 targets each
    result = score(**knobs)
    assert (result.code, result.err) == (
        128 + number,
        f"error: interrupted by signal {int(number)}\n",
    )
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == [handler] * 2
    line = re.search(
        rf"^interrupted by signal {int(number)}, 64 of (\d+) targets scored here: (.*)$",
        result.out,
        re.M,
    )
    assert (tmp_path / "model.txt").read_text() == result.out
    assert result.out.endswith(line[0] + "\n")
    assert re.fullmatch(r"PARTIAL_loss:[\d.]+ PARTIAL_bpb:[\d.]+", line[2])
    assert not re.search("val_bpb|val_loss|eval_summary", result.out)
    assert line[2] in score(VAL_MAX_TOKENS=64).out  # in TTT a first chunk, scored by the artifact
    assert score(**knobs).summary["target_tokens"] == int(line[1])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_anything_is_scored_says_so(number, score, stop_at):
    handler = stop_at(number, batch=1)
    result = score()
    assert (result.code, result.err) == (
        128 + number,
        f"error: interrupted by signal {int(number)}\n",
    )
    assert re.search(
        rf"^interrupted by signal {int(number)}, 0 of \d+ targets scored here: nothing$",
        result.out,
        re.M,
    )
    assert not re.search("bpb|eval_summary", result.out)
    assert signal.getsignal(number) is handler


def test_a_finished_run_gives_the_signals_back(score, stop_at):
    """Control: nothing is sent."""
    handler = stop_at(signal.SIGTERM, batch=1 << 30)
    assert score().code == 0
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == [handler] * 2
