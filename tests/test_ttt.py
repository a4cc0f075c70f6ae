"""Properties of score-first test-time training, the audit, and stops of eval_sliding.py."""

import itertools
import math
import os
import random
import re
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import tokenize_docs
import torch
import torch.nn.functional as F
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import (
    CPU,
    SHARED,
    VOCAB_SIZE,
    assert_refused,
    eval_env,
    make_sentences,
    run_command,
    run_in_process,
    tiny_tokenizer,
    train,
    write_dataset,
    write_shard,
)

import eval_sliding
import train_gpt
from eval_sliding import EvalConfig, adapt, audit, check_tokenizer_made, score_split
from train_gpt import GPT, ConfigError, Dist, Scorer, ValData, Windowing

T = 16  # window, tokens
HP = tiny_hp(num_layers=2)
CONFIG = EvalConfig(
    eval_stride=4, eval_max_seconds=0.0, ttt="sgd", ttt_lr=0.1, ttt_epochs=2, ttt_chunk_tokens=16
)


def make_val(num_targets: int, period: int | None = None) -> ValData:
    """Return random tokens, repeated after `period`, that stand for random numbers of bytes."""
    generator = torch.Generator().manual_seed(num_targets)
    count = period or num_targets + 1
    tokens = torch.randint(64, (count,), generator=generator, dtype=torch.int32)
    tokens = tokens.repeat(1 + num_targets // count)[: num_targets + 1]
    sizes = torch.randint(1, 9, (num_targets,), generator=generator, dtype=torch.int32)
    return ValData(tokens, sizes, "", False)


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


def sliding_losses(model: GPT, val: ValData) -> torch.Tensor:
    return run_split(model, replace(CONFIG, ttt="off"), val).losses


def copy_of(model: GPT) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_names(state: dict, other: dict) -> set[str]:
    return {name for name, tensor in state.items() if not torch.equal(tensor, other[name])}


# ---- Score first


def test_training_that_changes_nothing_gives_the_losses_of_sliding():
    val, model = make_val(101), make_model(HP)
    ours = run_split(model, replace(CONFIG, ttt_lr=0.0), val)
    assert torch.equal(ours.losses, sliding_losses(model, val))
    assert ours.epochs[0] == ours.epochs[1] > 0
    assert bool((ours.times == 1).all())


@pytest.mark.parametrize("segments", [1, 3])
def test_a_segment_starts_with_the_artifact_and_trained_weights_score_its_other_chunks(segments):
    val, model = make_val(192), make_model(HP)  # 12 chunks of 16 targets
    artifact, changed = copy_of(model), set()

    def before(scorer, windows) -> None:
        changed.update(changed_names(artifact, model.state_dict()))

    trained = run_split(model, CONFIG, val, segments, before).losses
    differs = (trained != sliding_losses(model, val)).view(segments, -1, 16)
    assert not differs[:, 0].any()
    assert differs[:, 1:].any(-1).all()
    assert changed == set(artifact) - {"expert_table"}
    assert not changed_names(artifact, model.state_dict())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.slow
def test_what_repeats_beyond_the_window_is_learned_and_noise_is_not():
    """The first time that the sequence comes it is as hard as without training."""
    config = replace(CONFIG, ttt_chunk_tokens=40, ttt_epochs=6)
    model, val = make_model(HP), make_val(320, period=40)
    plain = sliding_losses(model, val).view(-1, 40).mean(1)
    trained = run_split(model, config, val, 1).losses.view(-1, 40).mean(1)
    assert trained[0] == plain[0] > 3.5
    assert trained[-1] < 0.5 * plain[-1]
    noise = run_split(model, config, make_val(320), 1).losses
    assert noise.mean() > math.log(64)


@pytest.mark.parametrize(
    ("num_targets", "changes", "windows_per_chunk", "segments"),
    [
        (160, {}, 4, 2),
        (157, {"ttt_chunk_tokens": 15, "ttt_epochs": 3}, 3, 2),  # nothing comes out even
        (90, {"ttt_chunk_tokens": 3, "ttt_epochs": 1}, 1, 2),  # chunks below a window are one
        (90, {"eval_stride": 16}, 1, 4),
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


# ---- One update


def reference_gradients(model: GPT, val: ValData, first: int, end: int) -> list[torch.Tensor]:
    """Return gradients of the targets' mean loss, read in tiles of a window without context."""
    tokens, total = val.tokens.long(), 0.0
    for start in range(first, end, T):
        stop = min(start + T, end)
        logits = model(tokens[None, start:stop])[0]
        total = total + F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="sum")
    return list(torch.autograd.grad(total / (end - first), list(model.parameters())))


@pytest.mark.parametrize(("span", "batch"), [((0, 64), 1), ((4, 20), 16), ((33, 100), 3)])
def test_an_update_is_a_clipped_step_of_sgd_on_the_mean_loss_of_its_targets(span, batch):
    val, ours, plain = make_val(101), make_model(HP), make_model(HP)
    scorer = make_scorer(ours, val, batch_size=batch)
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1, momentum=0.9)
    velocity = [torch.zeros_like(p) for p in plain.parameters()]
    for _ in range(2):
        adapt(scorer, optimizer, *span)
        gradients = reference_gradients(plain, val, *span)
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
        assert norm > 1, "so that it is clipped"
        with torch.no_grad():
            for p, v, g in zip(plain.parameters(), velocity, gradients, strict=True):
                v.mul_(0.9).add_(g / norm)
                p.sub_(0.1 * v)
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, plain.state_dict()[name], rtol=0, atol=1e-5)
    assert not scorer.sums.any()


def test_gradients_below_the_bound_are_not_scaled_up_to_it():
    val, model = make_val(64), make_model(HP)
    gradients = reference_gradients(model, val, 0, 57)
    scorer = make_scorer(lambda *args, **kwargs: 0.02 * model(*args, **kwargs), val)
    before = copy_of(model)
    adapt(scorer, torch.optim.SGD(model.parameters(), lr=1.0), 0, 57)
    for (name, p), g in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(before[name] - p.detach(), 0.02 * g, rtol=0, atol=1e-5)


# ---- The clock


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


# ---- Ranks


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


# ---- Memory


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
    with pytest.raises(ConfigError, match=f"a window of {T} tokens exceeds .* EVAL_SEQ_LEN"):
        run_split(model, CONFIG, val, forward=limited(model, 0))
    with pytest.raises(RuntimeError, match="device-side assert"):
        run_split(model, CONFIG, val, forward=limited(model, 0, "device-side assert"))


@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_the_run_before_the_clock_leaves_no_trace_and_finds_the_batch_that_fits(ttt):
    config, windowing = replace(CONFIG, ttt=ttt, ttt_chunk_tokens=64), Windowing(T, 4, 8)
    model = make_model(HP)
    artifact, rng = copy_of(model), torch.get_rng_state()
    for fits in (8, 2):
        short = limited(model, fits)
        fitted = eval_sliding.compile_on_random_tokens(short, model, config, windowing, ALONE)
        assert fitted == Windowing(T, 4, fits)
    assert not changed_names(artifact, model.state_dict())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


# ---- Tokenizer

LENGTHS = (1, 3, 8, 10_000)  # words of a document: a name, a query, a title, a text


def made_by(sp, documents: list[str], words: int) -> torch.Tensor:
    """Return the shard of documents that are cut into shorter ones."""
    pieces = [text.split() for text in documents]
    shorter = [" ".join(p[i : i + words]) for p in pieces for i in range(0, len(p), words)]
    random.Random(0).shuffle(shorter)
    return torch.tensor(
        [token for text in shorter for token in (train_gpt.BOS_ID, *sp.encode(text))]
    )


def permuted(tokens: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Return the tokens under other ids; control tokens keep theirs."""
    ids = torch.randperm(vocab_size - 4, generator=torch.Generator().manual_seed(0)) + 4
    return torch.cat([torch.arange(4), ids])[tokens]


def is_accepted(tokens: torch.Tensor, sp) -> bool:
    try:
        check_tokenizer_made(tokens, sp, Path("shards"))
    except ConfigError:
        return False
    return True


def load(model: bytes):
    return train_gpt.spm.SentencePieceProcessor(model_proto=model)


def test_another_tokenizer_is_told_from_documents_of_one_word():
    right, wrong = (load(tiny_tokenizer(seed)) for seed in (0, 50))
    tokens = made_by(right, make_sentences(2, 40), 1)
    assert is_accepted(tokens, right)
    assert not is_accepted(tokens, wrong)
    assert not is_accepted(permuted(tokens, VOCAB_SIZE), right)
    no_document = tokens[tokens != train_gpt.BOS_ID]
    assert not is_accepted(permuted(no_document, VOCAB_SIZE), right)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="shared/data is not here")
@pytest.mark.parametrize("vocab_size", [1024, 8192])
def test_the_official_tokenizers_are_told_from_others_on_real_text(vocab_size):
    name = f"fineweb_{vocab_size}_bpe.model"
    right = load((SHARED / "tokenizers" / name).read_bytes())
    foreign_text = tokenize_docs.read_documents([SHARED / "wiki_val.jsonl.xz"])
    wrong = [load(tokenize_docs.train_tokenizer(foreign_text, vocab_size))]
    wrong += [
        load(p.read_bytes()) for p in (SHARED / "tokenizers").glob("*.model") if p.name != name
    ]
    documents = list(tokenize_docs.read_documents([SHARED / "fineweb_val.jsonl.xz"]))[:40]
    for words in LENGTHS:
        tokens = made_by(right, documents, words)
        assert is_accepted(tokens, right), words
        assert not is_accepted(permuted(tokens, vocab_size), right), words
        for other in wrong:
            tokens = made_by(other, documents, words)
            within = torch.where(tokens < vocab_size, tokens, 4 + tokens % (vocab_size - 4))
            assert not is_accepted(within, right), words


# ---- Audit

ROWS = ["C1 causal", "C2 normalised", "C3 score before update", "C4 single pass"]
ROWS += ["ranks", "batches", "artifact", "bytes"]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=3)


@pytest.fixture
def audited(dataset) -> Callable:
    """Function that gives the rows that fail in an audit, by its log.

    A window of 16 makes it one of 48 targets: two segments of three chunks of 8.
    """

    def run(config=CONFIG, val=None, make=make_model, folder=dataset.folder, **changes) -> str:
        paths = {"data_path": str(folder), "tokenizer_path": str(dataset.tokenizer)}
        hp = tiny_hp(num_layers=2, vocab_size=VOCAB_SIZE, **paths, **changes)
        lines: list[str] = []
        holds = audit(make(hp), hp, config, val or ValData.load(hp, CPU), lines.append)
        table = re.findall(r"^\| ([^|]+?) \|.*\| (pass|FAIL) \|$", "\n".join(lines), re.MULTILINE)
        assert [row for row, _ in table] == ROWS
        failed = [row.split()[0] for row, verdict in table if verdict == "FAIL"]
        assert holds == (not failed)
        return " ".join(failed)

    return run


@pytest.mark.parametrize(
    ("ttt", "dispatch", "changes"),
    [
        ("off", "masked", {}),
        ("sgd", "grouped", {}),
        pytest.param("sgd", "masked", {"eval_stride": 1}, marks=pytest.mark.slow),
        pytest.param("off", "grouped", {"eval_stride": 16}, marks=pytest.mark.slow),
        pytest.param(
            "sgd", "masked", {"eval_seq_len": 9, "eval_stride": 3}, marks=pytest.mark.slow
        ),
    ],
)
def test_an_honest_evaluation_passes_its_audit(ttt, dispatch, changes, audited):
    assert audited(replace(CONFIG, ttt=ttt, **changes), dispatch=dispatch) == ""


def train_on(scorer, windows) -> None:
    first, end = int(windows[0, 1]), int(windows[-1, 2])
    adapt(scorer, torch.optim.SGD(scorer.forward.parameters(), lr=0.1), first, end)


def train_before_scoring(scorer, windows, score) -> None:
    train_on(scorer, windows)
    score(scorer, windows)


def hide_that_it_trained(scorer, windows, score) -> None:
    weights = copy_of(scorer.forward)
    train_before_scoring(scorer, windows, score)
    scorer.forward.load_state_dict(weights)


def keep_the_second_loss(scorer, windows, score) -> None:
    """Score a chunk again after training on it, and write that loss over the first one."""
    score(scorer, windows)
    kept, weights = scorer.sums.clone(), copy_of(scorer.forward)
    train_on(scorer, windows)
    Scorer.score(scorer, windows)
    targets = slice(int(windows[0, 1]), int(windows[-1, 2]))
    kept[0, targets] = scorer.sums[0, targets] - kept[0, targets]
    scorer.sums.copy_(kept)
    scorer.forward.load_state_dict(weights)


def score_twice(scorer, windows, score) -> None:
    score(scorer, windows)
    scorer.score(windows[:1])


def leave_out_the_first(scorer, windows, score) -> None:
    score(scorer, windows[int(windows[0, 1] == 0) :])


@pytest.mark.parametrize(
    ("cheat", "ttt", "fails"),
    [
        (train_before_scoring, "sgd", "C1 C3"),
        (hide_that_it_trained, "off", "C1 C3"),
        pytest.param(hide_that_it_trained, "sgd", "C1 C3", marks=pytest.mark.slow),
        pytest.param(keep_the_second_loss, "sgd", "C1 C2", marks=pytest.mark.slow),
        (score_twice, "sgd", "C4"),
        (leave_out_the_first, "sgd", "C4"),
    ],
)
def test_a_chunk_that_is_scored_otherwise_fails_the_audit(cheat, ttt, fails, audited, monkeypatch):
    honest = eval_sliding.score_within_memory

    def cheating(scorer, windows) -> None:
        cheat(scorer, windows, honest)

    monkeypatch.setattr(eval_sliding, "score_within_memory", cheating)
    failed = audited(replace(CONFIG, ttt=ttt)).split()
    assert set(failed) >= set(fails.split())
    assert not {"artifact", "bytes"} & set(failed)
    assert ("C4" in failed) == (fails == "C4")


def test_an_update_that_reaches_into_the_next_chunk_fails_the_audit(audited, monkeypatch):
    def reaching(scorer, optimizer, first, end) -> None:
        adapt(scorer, optimizer, first, end + 8)

    monkeypatch.setattr(eval_sliding, "adapt", reaching)
    assert {"C1", "C3"} <= set(audited().split())


def test_weights_left_trained_fail_the_audit(audited, monkeypatch):
    honest = eval_sliding.score_split

    def cheating(scorer, *args, **kwargs):
        result = honest(scorer, *args, **kwargs)
        train_on(scorer, scorer.windows[:1])
        return result

    monkeypatch.setattr(eval_sliding, "score_split", cheating)
    assert "artifact" in audited()


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
def test_weights_carried_into_the_next_segment_fail_the_audit(dispatch, audited, monkeypatch):
    honest = eval_sliding.score_split

    def cheating(scorer, model, *args, **kwargs):
        artifact = copy_of(model)
        model.load_state_dict = lambda state: None
        try:
            return honest(scorer, model, *args, **kwargs)
        finally:
            del model.load_state_dict
            model.load_state_dict(artifact)

    monkeypatch.setattr(eval_sliding, "score_split", cheating)
    assert audited(dispatch=dispatch) == "ranks"


def attend_everywhere(*q_k_v):
    q, k, v = (y.transpose(1, 2) for y in q_k_v)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "ttt", "stride"),
    [("first", "off", 4), ("last", "off", 8), ("last", "sgd", 4), ("first", "sgd", 8)],
)
def test_a_model_that_attends_to_the_next_tokens_fails_its_audit(where, ttt, stride, audited):
    """Whatever EVAL_STRIDE: tokens change amid a window, where such a model can look ahead."""

    def make(hp) -> GPT:
        model = make_model(hp)
        model.blocks[0 if where == "first" else -1].attn.attend = attend_everywhere
        return model

    failed = audited(replace(CONFIG, ttt=ttt, eval_stride=stride), make=make).split()
    assert "C1" in failed
    assert not {"C4", "artifact", "bytes"} & set(failed)


@pytest.mark.parametrize("ttt", ["off", "sgd"])
def test_losses_that_are_no_probabilities_fail_the_audit(ttt, audited, monkeypatch):
    honest = GPT.forward

    def forward(self, input_ids, target_ids=None, **kwargs):
        result = honest(self, input_ids, target_ids, **kwargs)
        return result if target_ids is None else 0.9 * result

    monkeypatch.setattr(GPT, "forward", forward)
    assert audited(replace(CONFIG, ttt=ttt)) == "C2"


@pytest.mark.slow
@pytest.mark.parametrize("place", [0, -1])
def test_one_byte_too_many_fails_the_audit_wherever_it_is(place, audited, dataset):
    paths = {"data_path": str(dataset.folder), "tokenizer_path": str(dataset.tokenizer)}
    val = ValData.load(tiny_hp(vocab_size=VOCAB_SIZE, **paths), CPU)
    off = replace(CONFIG, ttt="off")
    assert audited(off, val) == ""
    val.target_bytes[place] += 1
    assert audited(off, val) == "bytes"


@pytest.mark.slow
@pytest.mark.parametrize(("bos_bytes", "failed"), [(0, ""), (1, "bytes")])
def test_a_sidecar_may_count_other_bytes_but_none_for_the_start_of_a_document(
    bos_bytes, failed, tmp_path, audited
):
    folder = write_dataset(tmp_path / "set", val_docs=3).folder
    tokens = train_gpt.load_data_shard(folder / "fineweb_val_0.bin")
    sizes = [bos_bytes if token == train_gpt.BOS_ID else 3 for token in tokens]
    write_shard(folder / "fineweb_val_bytes_0.bin", sizes)
    assert audited(replace(CONFIG, ttt="off"), folder=folder) == failed


def test_a_split_too_short_to_audit_is_refused(audited):
    with pytest.raises(ConfigError, match="23 targets are too few to audit"):
        audited(val_max_tokens=23)
    assert audited(val_max_tokens=24) == ""


# ---- Command line

TRAINED = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 16, "TTT_EPOCHS": 1, "TTT_LR": 0.05}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, dataset) -> bytes:
    return train(tmp_path_factory.mktemp("run"), dataset, GPTQ_BATCHES=0).artifact.read_bytes()


@pytest.fixture
def score(tmp_path, dataset, trained) -> Callable:
    """Function that scores an artifact by eval_sliding.main; its log is tmp_path / "model.txt"."""

    def run(*argv, **knobs):
        (tmp_path / "model.ptz").write_bytes(trained)
        env = eval_env(dataset, **knobs)
        return run_in_process(eval_sliding.main, env, tmp_path, *argv, "model.ptz")

    return run


@pytest.mark.parametrize(
    ("knobs", "more_rows"),
    [({}, []), ({**TRAINED, "NGRAM": "on"}, ["C1 n-gram", "C2 n-gram", "C3 n-gram"])],
    ids=["off", "sgd and n-gram"],
)
def test_the_audit_of_an_artifact_logs_its_table_and_succeeds(knobs, more_rows, score, tmp_path):
    result = score("--audit", **knobs)
    assert (result.code, result.err) == (0, "")
    table = re.findall(r"^\| (.+?) \| .* \| .* \| (\w+) \|$", result.out, re.MULTILINE)
    assert table == [(row, "pass") for row in [*ROWS[:4], *more_rows, *ROWS[4:]]]
    assert (tmp_path / "model.txt").read_text() == result.out
    assert "audit of the first 96 targets, window:32 stride:8 ttt:" in result.out
    assert "eval_summary" not in result.out


def test_the_audit_of_a_model_that_looks_ahead_ends_with_status_1(score, monkeypatch):
    monkeypatch.setattr(train_gpt, "sdpa_attention", attend_everywhere)
    result = score("--audit")
    assert (result.code, result.err) == (1, "")
    assert re.search(r"^\| C1 causal \|.*\| FAIL \|$", result.out, re.MULTILINE)


def test_the_audit_is_refused_to_two_ranks(score, monkeypatch):
    monkeypatch.setattr(Dist, "from_torchrun", lambda: Dist(0, 2, CPU))
    assert_refused(score("--audit"), "--audit is for one process")


def test_a_budget_too_short_for_training_still_gives_a_whole_score(score):
    result = score(**TRAINED, EVAL_MAX_SECONDS=1e-3)
    run, asked = result.summary["ttt_epochs"]
    assert run < asked
    assert f"ttt_epochs: {run} of {asked}" in result.out
    assert len(re.findall(r"^EVAL_MAX_SECONDS=0.001: fewer epochs", result.out, re.MULTILINE)) == 1
    assert (result.code, result.summary["partial"]) == (0, False)


@pytest.mark.slow
def test_two_processes_report_the_score_of_one(score, dataset, tmp_path):
    """test_cli.py has the same for TTT=off."""
    alone = score(**TRAINED).summary
    env = eval_env(dataset, **TRAINED)
    both = run_command("eval_sliding.py", env, tmp_path, "model.ptz", nproc=2)
    assert both.code == 0, both.err
    for name in ("val_bpb", "val_loss"):
        assert both.summary[name] == pytest.approx(alone[name], abs=1e-9)
    for name in ("target_tokens", "scored_bytes", "ttt", "ttt_epochs"):
        assert both.summary[name] == alone[name]
    assert alone["ttt_epochs"][0] > 0
    assert score().summary["val_bpb"] != alone["val_bpb"]


@pytest.fixture
def stop_at(monkeypatch) -> Callable:
    """Function that sends this process a signal when a batch is about to be scored."""

    def unexpected(number, frame) -> None:
        raise AssertionError(f"signal {number} outside of scoring")

    def install(number: int, batch: int) -> None:
        honest, calls = Scorer.score, itertools.count(1)

        def score(self, windows) -> None:
            if next(calls) == batch:
                os.kill(os.getpid(), number)
            honest(self, windows)

        monkeypatch.setattr(Scorer, "score", score)

    previous = {n: signal.signal(n, unexpected) for n in (signal.SIGINT, signal.SIGTERM)}
    yield install
    for number, handler in previous.items():
        given_back = signal.signal(number, handler)
        assert given_back is unexpected


@pytest.mark.parametrize(
    ("number", "batch", "knobs"),
    [
        (signal.SIGTERM, 3, {}),
        (signal.SIGINT, 3, TRAINED),
        (signal.SIGINT, 1, {}),
        (signal.SIGTERM, 1 << 30, {}),  # control: nothing is sent
    ],
)
def test_a_signal_ends_scoring_with_the_partial_score_so_far(
    number, batch, knobs, score, stop_at, tmp_path
):
    stop_at(number, batch)  # batches of 4 windows that score 8 targets each, of 2 in TTT
    result = score(**knobs)
    if batch > 3:
        assert result.code == 0
        return
    said = f"error: interrupted by signal {int(number)}\n"
    assert (result.code, result.err) == (128 + number, said)
    per_batch = 16 if knobs else 32
    scored = (batch - 1) * per_batch
    interrupted = rf"interrupted by signal {int(number)}, {scored} of \d+ targets scored here: "
    line = re.search(rf"^{interrupted}(.*)\n\Z", result.out, re.MULTILINE)
    assert line, result.out
    assert (tmp_path / "model.txt").read_text() == result.out
    assert not re.search("val_bpb|val_loss|eval_summary", result.out)
    if not scored:
        assert line[1] == "nothing"
        return
    assert re.fullmatch(r"PARTIAL_loss:[\d.]+ PARTIAL_bpb:[\d.]+", line[1])
    if not knobs:
        assert line[1] in score(VAL_MAX_TOKENS=scored).out
