"""Properties of the scoring windows and of the score itself.   pytest tests/test_evaluation.py"""

import copy
import json
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from helpers_cli import ALONE, CPU, cli_env, eval_env, run_in_process, write_dataset, write_shard
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_sliding
import train_gpt
from train_gpt import (
    Dist,
    Hyperparameters,
    Refusal,
    Score,
    Scorer,
    ValData,
    evaluate,
    scoring_windows,
)

V = 61
HP = Hyperparameters(
    vocab_size=V,
    dtype="float32",
    train_seq_len=16,
    train_batch_tokens=16,
    micro_batch_tokens=64,
    num_layers=3,
    model_dim=16,
    num_heads=2,
    num_kv_heads=1,
    rope_dims=4,
    expert_dim=8,
    shared_dim=16,
    eval_stride=16,
)
CASES = [
    (1, 16, 16),
    (7, 16, 3),
    (15, 16, 5),
    (16, 16, 5),
    (17, 16, 5),
    (17, 16, 16),
    (48, 16, 16),
    (53, 16, 1),
]
CASES += [(53, 7, 4)]


@pytest.fixture(scope="module")
def model() -> train_gpt.GPT:
    """A small model whose every parameter matters, unlike one with freshly zeroed projections."""
    model, generator = train_gpt.GPT(HP), torch.Generator().manual_seed(0)
    model.init_weights()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.expert_table.copy_(train_gpt.build_expert_table(HP, np.arange(V)))
    return model.eval()


def make_val(num_targets: int, partial: bool = False) -> ValData:
    """Random tokens that stand for random numbers of bytes."""
    rng = np.random.default_rng(num_targets)
    tokens, sizes = rng.integers(0, V, num_targets + 1), rng.integers(0, 9, num_targets)
    return ValData(
        *(torch.from_numpy(array.astype(np.int32)) for array in (tokens, sizes)), "", partial
    )


def with_window(seq_len: int, **changes) -> Hyperparameters:
    return replace(HP, eval_seq_len=seq_len, **changes)


def naive_loss(model: torch.nn.Module, val: ValData, seq_len: int, stride: int) -> float:
    """Mean loss by one forward pass per target, which sees nothing that comes after it."""
    tokens, total = val.tokens.long(), 0.0
    for target in range(len(tokens) - 1):
        start = max(0, (target // stride + 1) * stride - seq_len)
        with torch.no_grad():
            logits = model(tokens[None, start : target + 1])[0, -1].tolist()
        top = max(logits)
        total += (
            top
            + math.log(sum(math.exp(logit - top) for logit in logits))
            - logits[tokens[target + 1]]
        )
    return total / (len(tokens) - 1)


def loss_of_every_target(
    model: torch.nn.Module, val: ValData, seq_len: int, stride: int
) -> np.ndarray:
    """(targets,) losses by one forward pass per window over all of its positions. After the last input come BOS, which
    a causal model does not see, since rotations depend on the length of the input."""
    tokens, losses = val.tokens.long(), []
    while len(losses) < len(tokens) - 1:
        context = min(len(losses), seq_len - stride)
        inputs = tokens[:-1][len(losses) - context : len(losses) + stride]
        padded = torch.cat([inputs, torch.ones(seq_len - len(inputs), dtype=torch.int64)])
        with torch.no_grad():
            log_probabilities = model(padded[None])[0, context:].double().log_softmax(-1)
        targets = tokens[1:][len(losses) : len(losses) + stride]
        losses += (-log_probabilities[torch.arange(len(targets)), targets]).tolist()
    return np.array(losses)


def score_all(model: torch.nn.Module, val: ValData, hp: Hyperparameters, stride: int) -> Scorer:
    scorer = Scorer(model, val, hp, ALONE, stride, "test")
    scorer.score(scorer.share)
    return scorer


# ---- Windows


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    num_targets=st.integers(1, 400),
    lengths=st.integers(1, 64).flatmap(
        lambda seq_len: st.tuples(st.just(seq_len), st.integers(1, seq_len))
    ),
)
@example(num_targets=10_007, lengths=(2048, 64))
@example(num_targets=10_007, lengths=(1024, 1024))
@example(num_targets=10_007, lengths=(97, 89))
@example(num_targets=1, lengths=(2048, 64))
@example(num_targets=31, lengths=(32, 8))
@example(num_targets=32, lengths=(32, 8))
@example(num_targets=33, lengths=(32, 8))
@example(num_targets=33, lengths=(32, 32))
@example(num_targets=5, lengths=(1, 1))
def test_scored_spans_tile_all_targets_and_every_window_has_its_context(num_targets, lengths):
    seq_len, stride = lengths
    windows = scoring_windows(num_targets, seq_len, stride).tolist()
    scored = [target for _, first, end in windows for target in range(first, end)]
    assert scored == list(range(num_targets))
    assert len(windows) == math.ceil(num_targets / stride)
    for start, first, end in windows:
        assert 0 <= start <= first < end <= start + seq_len
        assert start == 0 or first - start == seq_len - stride
        assert first == 0 or end - first == stride or end == num_targets


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_windows_of_the_usual_strides_are_those_of_the_challenge(stride):
    """The first window scores all of its targets, the next ones, each a stride further, their last `stride` targets."""
    seq_len, num_targets = 16, 60
    theirs = {(0, target) for target in range(seq_len)}
    for start in range(stride, num_targets - seq_len + stride, stride):
        theirs |= {
            (start, target)
            for target in range(start + seq_len - stride, min(start + seq_len, num_targets))
        }
    ours = scoring_windows(num_targets, seq_len, stride).tolist()
    assert {(start, target) for start, first, end in ours for target in range(first, end)} == theirs


# ---- Score


@pytest.mark.parametrize(("num_targets", "seq_len", "stride"), CASES)
def test_the_score_equals_one_forward_pass_per_target(model, num_targets, seq_len, stride):
    val = make_val(num_targets)
    score = evaluate(model, val, with_window(seq_len), ALONE, stride, "test")
    expected = naive_loss(model, val, seq_len, stride)
    assert score.val_loss == pytest.approx(expected, abs=1e-6)
    scored_bytes = sum(val.target_bytes.tolist())
    assert score.bpb == pytest.approx(expected * num_targets / math.log(2) / scored_bytes, rel=1e-6)
    assert (score.target_tokens, score.scored_bytes, score.partial) == (
        num_targets,
        scored_bytes,
        False,
    )


LONG_CASES = [(255, 256, 64, 256), (256, 256, 64, 256), (257, 256, 64, 256), (10_007, 256, 64, 256)]
LONG_CASES += [(1_001, 256, 256, 512), (1_001, 64, 24, 64), (1_001, 96, 40, 32), (257, 256, 64, 64)]


@pytest.mark.parametrize(("num_targets", "seq_len", "stride", "trained"), LONG_CASES)
def test_the_score_equals_one_forward_pass_per_window(model, num_targets, seq_len, stride, trained):
    """For windows longer and shorter than the trained one, and the losses of all targets beside their sum."""
    model, val = copy.deepcopy(model), make_val(num_targets)
    model.hp = hp = replace(
        HP, train_seq_len=trained, eval_seq_len=seq_len, micro_batch_tokens=7 * seq_len
    )
    expected = loss_of_every_target(model, val, seq_len, stride)
    scorer = score_all(model, val, hp, stride)
    assert np.abs(scorer.sums[0, :-1].numpy() - expected).max() < 1e-4
    bpb = expected.sum() / math.log(2) / sum(val.target_bytes.tolist())
    assert scorer.total().bpb == pytest.approx(bpb, abs=1e-6)
    assert evaluate(model, val, hp, ALONE, stride, "test").bpb == scorer.total().bpb
    less_context = loss_of_every_target(model, val, seq_len // 2, min(stride, seq_len // 2))
    assert np.abs(less_context - expected).max() > 1e-2


def test_the_trained_length_matters_beyond_it_and_only_there(model):
    """Without this, the window of the training could be read from the wrong place."""
    model, val, scores = copy.deepcopy(model), make_val(300), {}
    for trained in (32, 64, 128):
        model.hp = replace(HP, train_seq_len=trained, eval_seq_len=64)
        scores[trained] = evaluate(model, val, model.hp, ALONE, 16, "test").bpb
    assert scores[64] == scores[128]
    assert abs(scores[32] - scores[64]) > 1e-5


def test_a_longer_context_and_another_stride_change_the_score(model):
    """Without this, the equality with the naive loss could hold for a model that ignores its context."""
    losses = {
        naive_loss(model, make_val(53), seq_len, stride)
        for seq_len, stride in [(16, 16), (16, 1), (7, 4)]
    }
    assert max(losses) - min(losses) > 1e-3
    assert len(losses) == 3


def test_a_stride_of_a_whole_window_is_plain_validation(model):
    val, seq_len = make_val(16 * 6 + 5), 16
    total = 0.0
    for start in range(0, 16 * 6 + 5, seq_len):
        chunk = val.tokens[start : start + seq_len + 1].long()
        with torch.no_grad():
            total += float(
                torch.nn.functional.cross_entropy(
                    model(chunk[None, :-1])[0], chunk[1:], reduction="sum"
                )
            )
    score = evaluate(model, val, with_window(seq_len), ALONE, seq_len, "test")
    assert score.val_loss == pytest.approx(total / (16 * 6 + 5), abs=1e-6)
    assert evaluate(model, val, HP, ALONE, seq_len, "test").bpb == score.bpb


@pytest.mark.parametrize("stride", [5, 16])
def test_the_score_does_not_depend_on_the_batch_size(model, stride):
    val = make_val(203)
    sizes = (1, 16, 48, 112, 5_000)
    scores = [
        evaluate(model, val, replace(HP, micro_batch_tokens=size), ALONE, stride, "test")
        for size in sizes
    ]
    for score in scores:
        assert score.val_loss == pytest.approx(scores[0].val_loss, abs=1e-6)
        assert score.scored_bytes == int(val.target_bytes.sum())


class NotYet(Exception):
    """Stops a simulated rank whose peers have not contributed yet."""


@dataclass(frozen=True)
class SimulatedRank(Dist):
    """A rank whose peers run before or after it in this process and leave their sums in `parts`."""

    parts: dict = field(default_factory=dict)

    def all_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        self.parts[self.rank] = tensor.clone()
        if len(self.parts) < self.world_size:
            raise NotYet
        return tensor.copy_(sum(self.parts.values()))


def score_by_ranks(
    model: torch.nn.Module, val: ValData, world_size: int, stride: int
) -> list[Score]:
    """The score that every rank reports."""
    ranks = [SimulatedRank(rank, world_size, CPU) for rank in range(world_size)]
    ranks = [replace(rank, parts=ranks[0].parts) for rank in ranks]
    for rank in ranks[:-1]:
        with pytest.raises(NotYet):
            evaluate(model, val, HP, rank, stride, "test")
    return [evaluate(model, val, HP, rank, stride, "test") for rank in reversed(ranks)]


@pytest.mark.parametrize(("num_targets", "stride"), [(203, 5), (203, 16), (20, 16)])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_rank_reports_the_score_of_one_process(model, world_size, num_targets, stride):
    val = make_val(num_targets)
    alone = evaluate(model, val, HP, ALONE, stride, "test")
    for score in score_by_ranks(model, val, world_size, stride):
        assert (score.val_loss, score.bpb) == (alone.val_loss, alone.bpb)
        assert (score.target_tokens, score.scored_bytes) == (
            num_targets,
            int(val.target_bytes.sum()),
        )


def test_evaluation_leaves_no_trace_and_repeats_exactly(model):
    val = make_val(203)
    state, rng = {name: t.clone() for name, t in model.state_dict().items()}, torch.get_rng_state()
    gradients = [p.grad for p in model.parameters()]
    first = evaluate(model, val, HP, ALONE, 5, "test")
    second = evaluate(model, val, HP, ALONE, 5, "test")
    assert (first.val_loss, first.bpb) == (second.val_loss, second.bpb)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert [p.grad for p in model.parameters()] == gradients == [None] * len(gradients)
    assert torch.is_grad_enabled()


class PoisonedModel(torch.nn.Module):
    """Loss 1 nat everywhere but for one NaN, where the given token is the input."""

    def __init__(self, poison: int):
        super().__init__()
        self.poison = poison

    def forward(self, input_ids, target_ids, reduction, scored):
        return torch.where(input_ids == self.poison, math.nan, 1.0)


def test_a_loss_that_is_not_a_number_is_refused():
    val = make_val(40)
    val.tokens[:] = 1
    assert evaluate(PoisonedModel(2), val, HP, ALONE, 16, "test").val_loss == 1.0
    val.tokens[33] = 2
    with pytest.raises(Refusal, match="test: total loss nan over"):
        evaluate(PoisonedModel(2), val, HP, ALONE, 16, "test")


def test_a_text_of_no_bytes_is_refused():
    val = make_val(40)
    val.target_bytes[:] = 0
    with pytest.raises(Refusal, match="over 0"):
        evaluate(PoisonedModel(V), val, HP, ALONE, 16, "test")


class PartlyPoisonedModel(torch.nn.Module):
    """Loss 1 nat at the first `columns` positions of the first `rows` windows of a batch, NaN at all others."""

    def __init__(self, rows: int, columns: int):
        super().__init__()
        self.rows, self.columns = rows, columns

    def forward(self, input_ids, target_ids, reduction, scored):
        loss = torch.full(input_ids.shape, math.nan)
        loss[: self.rows, : self.columns] = 1.0
        return loss


def test_padded_positions_and_padded_windows_do_not_count():
    val = make_val(5)  # one window of 16 positions in a batch of four windows
    assert evaluate(PartlyPoisonedModel(1, 5), val, HP, ALONE, 16, "test").val_loss == 1.0
    with pytest.raises(Refusal, match="total loss nan"):
        evaluate(PartlyPoisonedModel(1, 4), val, HP, ALONE, 16, "test")


# ---- Batches


class RecordingModel(torch.nn.Module):
    """Loss 1 nat everywhere; keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, input_ids, target_ids, reduction, scored):
        self.calls.append((input_ids, target_ids, scored))
        return torch.ones(target_ids.shape)


@pytest.mark.parametrize(("num_targets", "seq_len", "stride"), CASES)
def test_a_batch_holds_its_windows_and_nothing_beyond_their_last_targets(
    num_targets, seq_len, stride
):
    val, outside = make_val(num_targets), 10 * V
    for index, (start, first, end) in enumerate(
        scoring_windows(num_targets, seq_len, stride).tolist()
    ):
        for last_known in (end, end - 1):
            planted = replace(val, tokens=val.tokens.clone())
            planted.tokens[last_known + 1 :] = outside
            scorer = Scorer(None, planted, with_window(seq_len), ALONE, stride, "test")
            window = torch.nn.functional.pad(scorer.windows[index : index + 1], (0, 0, 0, 2))
            input_ids, target_ids, scored, column = scorer.batch(window, stride, len(window))
            assert input_ids.max() < V
            assert (target_ids.max() == outside) == (last_known < end)  # so the plant would be seen
        assert torch.equal(input_ids[0, : end - start], val.tokens[start:end].long())
        assert torch.equal(target_ids[0, : end - first - 1], val.tokens[first + 1 : end].long())
        assert column[0].tolist() == list(range(first, end)) + [num_targets] * (
            stride - (end - first)
        )
        assert column[1:].eq(num_targets).all()
        if scored is None:
            assert stride == seq_len
        else:
            assert scored[0, : end - first].tolist() == list(range(first - start, end - start))
            assert 0 <= scored.min() <= scored.max() < seq_len


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(
    ("num_targets", "seq_len", "stride"), [*CASES, (203, 16, 5), (203, 16, 16)]
)
def test_all_batches_have_one_layout_so_that_nothing_is_compiled_twice(
    num_targets, seq_len, stride, batch_size, world_size
):
    layouts, calls, val = set(), 0, make_val(num_targets)
    for rank in range(world_size):
        model, hp = RecordingModel(), with_window(seq_len, micro_batch_tokens=batch_size * seq_len)
        scorer = Scorer(model, val, hp, Dist(rank, world_size, CPU), stride, "test")
        scorer.score(scorer.share)
        calls += len(model.calls) * bool(len(scorer.share))  # a rank without windows runs padding
        layouts |= {
            tuple(t is not None and (t.shape, t.stride(), t.dtype) for t in call)
            for call in model.calls
        }
    assert len(layouts) == 1
    input_layout, target_layout, scored_layout = layouts.pop()
    assert input_layout == ((batch_size, seq_len), (seq_len, 1), torch.int64)
    assert target_layout == ((batch_size, stride), (stride, 1), torch.int64)
    assert scored_layout == (target_layout if stride < seq_len else False)
    assert calls == math.ceil(math.ceil(num_targets / stride) / batch_size)


# ---- Coverage


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(("num_targets", "stride"), [(1, 16), (15, 5), (203, 5), (203, 16)])
def test_every_target_is_scored_exactly_once_by_one_rank(num_targets, stride, world_size):
    times, val = torch.zeros(num_targets), make_val(num_targets)
    for rank in range(world_size):
        scorer = Scorer(RecordingModel(), val, HP, Dist(rank, world_size, CPU), stride, "test")
        scorer.score(scorer.share)
        times += scorer.sums[1, :-1]
    assert times.tolist() == [1.0] * num_targets


@pytest.mark.parametrize("change", ["twice", "left_out", "both"])
def test_targets_scored_twice_or_not_at_all_stop_the_score_with_their_number(model, change):
    scorer = Scorer(model, make_val(203), HP, ALONE, 5, "test")
    keep = scorer.windows[2:] if change != "twice" else scorer.windows
    scorer.score(keep)
    if change != "left_out":
        scorer.score(scorer.windows[-1:])  # of three targets
    wrong = {"twice": 3, "left_out": 10, "both": 13}[change]
    with pytest.raises(AssertionError, match=f"^{wrong} of 203 targets not scored once"):
        scorer.total()
    assert score_all(model, make_val(203), HP, 5).total().target_tokens == 203


def test_an_unfinished_score_is_that_of_the_targets_scored_and_says_so(model):
    val = make_val(203)
    scorer, losses = (
        Scorer(model, val, HP, ALONE, 5, "test"),
        loss_of_every_target(model, val, 16, 5),
    )
    scorer.score(scorer.windows[3:7])
    score, sizes = scorer.total(finished=False), val.target_bytes.numpy()
    assert (score.partial, score.target_tokens, score.scored_bytes) == (
        True,
        20,
        int(sizes[15:35].sum()),
    )
    assert score.val_loss == pytest.approx(losses[15:35].mean(), abs=1e-6)
    assert score.bpb == pytest.approx(
        losses[15:35].sum() / math.log(2) / sizes[15:35].sum(), abs=1e-6
    )
    assert str(score).startswith("PARTIAL_loss:")
    scorer.score(torch.cat([scorer.windows[:3], scorer.windows[7:]]))
    assert scorer.total(finished=False).partial
    finished = scorer.total()
    assert not finished.partial
    assert finished.bpb == score_all(model, val, HP, 5).total().bpb


# ---- Partial scores


@pytest.mark.parametrize(
    ("val_max_tokens", "partial"), [(0, 0), (1, 1), (99, 1), (100, 0), (10**9, 0)]
)
def test_a_score_is_partial_exactly_if_targets_are_left_out(tmp_path, val_max_tokens, partial):
    dataset = write_dataset(tmp_path / "set")
    write_shard(dataset.folder / "fineweb_val_0.bin", [5] * 101)
    hp = Hyperparameters.from_env(cli_env(dataset, VAL_MAX_TOKENS=val_max_tokens))
    val = ValData.load(hp, CPU)
    assert val.partial == partial
    assert len(val.tokens) - 1 == (val_max_tokens if partial else 100)


def test_partial_scores_are_never_called_val_bpb(tmp_path):
    dataset = write_dataset(tmp_path / "set")
    trained = run_in_process(
        train_gpt.main, cli_env(dataset, VAL_MAX_TOKENS=50, VAL_LOSS_EVERY=4), tmp_path
    )
    scored = run_in_process(
        eval_sliding.main, eval_env(dataset, VAL_MAX_TOKENS=50), tmp_path, "logs/run.ptz"
    )
    for result in (trained, scored):
        assert result.code == 0, result.err
        *lines, last = result.out.splitlines()
        assert "PARTIAL_bpb:" in result.out
        assert not [line for line in lines if "val_bpb" in line or "val_loss" in line]
        summary = json.loads(last)
        assert summary["partial"] is True
        assert summary["val_bpb"] is None
    assert trained.summary["val_bpb_float"] is None
    assert scored.summary["target_tokens"] == 50
    whole = run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, "logs/run.ptz")
    assert "PARTIAL" not in whole.out
    assert whole.summary["val_bpb"] > 0
    assert whole.summary["partial"] is False
