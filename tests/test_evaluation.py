"""Properties of the scoring windows and of the score itself."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALONE, make_model, make_val, tiny_hp
from helpers_cli import CPU, cli_env, score, train
from helpers_hostile import refusal
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import GPT, Dist, Scorer, ValData, Windowing, scoring_windows

T = 16  # window of the model, tokens
V = 64
CASES = [(1, 16, 16), (15, 16, 5), (17, 16, 5), (48, 16, 16), (53, 16, 1), (53, 7, 4)]


@pytest.fixture(scope="module")
def model() -> GPT:
    return make_model(tiny_hp(), noise=0.3).eval()


def score_all(
    forward, val: ValData, seq_len: int, stride: int, batch_size: int = 4, dist: Dist = ALONE
) -> Scorer:
    """Score the share of a rank."""
    scorer = Scorer(forward, val, dist, Windowing(seq_len, stride, batch_size), "test")
    scorer.score(scorer.share)
    return scorer


def loss_of_every_target(model: GPT, val: ValData, seq_len: int, stride: int) -> np.ndarray:
    """Return (targets,) losses by a forward pass per window over no token after its last input."""
    tokens, losses = val.tokens.long(), []
    while len(losses) < len(tokens) - 1:
        context = min(len(losses), seq_len - stride)
        inputs = tokens[:-1][len(losses) - context : len(losses) + stride]
        with torch.no_grad():
            log_probabilities = model(inputs[None])[0, context:].double().log_softmax(-1)
        targets = tokens[1:][len(losses) : len(losses) + stride]
        losses += (-log_probabilities[torch.arange(len(targets)), targets]).tolist()
    return np.array(losses)


# ---- Windows


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    num_targets=st.integers(1, 400),
    lengths=st.integers(1, 64).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
)
@example(num_targets=10_007, lengths=(2048, 64))
@example(num_targets=1, lengths=(2048, 64))
@example(num_targets=5, lengths=(1, 1))
def test_scored_spans_tile_all_targets_and_every_window_has_its_context(num_targets, lengths):
    seq_len, stride = lengths
    windows = scoring_windows(num_targets, seq_len, stride).tolist()
    scored = [target for _, first, end in windows for target in range(first, end)]
    assert scored == list(range(num_targets))
    for start, first, end in windows:
        assert 0 <= start <= first < end <= start + seq_len
        assert start == 0 or first - start == seq_len - stride
        assert first == 0 or end - first == stride or end == num_targets


@pytest.mark.parametrize("stride", [1, 4, 16])
def test_windows_of_the_usual_strides_are_those_of_the_challenge(stride):
    """The first scores all of its targets, the next, a stride further each, their last ones."""
    num_targets = 60
    theirs = {(0, target) for target in range(T)}
    for start in range(stride, num_targets - T + stride, stride):
        end = min(start + T, num_targets)
        theirs |= {(start, target) for target in range(start + T - stride, end)}
    ours = scoring_windows(num_targets, T, stride).tolist()
    assert {(start, target) for start, first, end in ours for target in range(first, end)} == theirs


# ---- Score


@pytest.mark.parametrize(
    ("num_targets", "seq_len", "stride"), [*CASES, (257, 64, 24), (1001, 96, 40)]
)
def test_the_score_equals_an_independent_loop(model, num_targets, seq_len, stride):
    """For windows longer and shorter than the trained one; other windows give other losses."""
    longer = GPT(model.config, context=seq_len).eval()
    longer.load_state_dict(model.state_dict())
    val = make_val(num_targets)
    expected = loss_of_every_target(longer, val, seq_len, stride)
    scorer = score_all(longer, val, seq_len, stride)
    assert np.abs(scorer.sums[0, :-1].numpy() - expected).max() < 1e-4
    score, scored_bytes = scorer.total(), sum(val.target_bytes.tolist())
    assert score.val_loss == pytest.approx(expected.mean(), abs=1e-5)
    assert score.bpb == pytest.approx(expected.sum() / math.log(2) / scored_bytes, rel=1e-5)
    assert (score.target_tokens, score.scored_bytes) == (num_targets, scored_bytes)
    assert not score.partial
    if num_targets > seq_len:
        other = loss_of_every_target(longer, val, seq_len // 2, min(stride, seq_len // 2))
        assert np.abs(other - expected).max() > 1e-2


def test_losses_that_are_no_numbers_and_texts_of_no_bytes_are_refused(model):
    val = make_val(40)
    scorer = score_all(model, val, T, T)
    val.target_bytes[:] = 0
    assert "over 0 bytes" in refusal(scorer.total)
    val.target_bytes[:] = 1
    scorer.sums[0, 33] = math.nan
    assert "test: total loss nan over" in refusal(scorer.total)


@pytest.mark.parametrize(("num_targets", "seq_len", "stride"), CASES)
def test_a_batch_holds_nothing_beyond_the_last_targets_of_its_windows(num_targets, seq_len, stride):
    val, outside = make_val(num_targets), 10 * V
    for window in scoring_windows(num_targets, seq_len, stride):
        planted = replace(val, tokens=val.tokens.clone())
        planted.tokens[int(window[2]) :] = outside  # from the last target on
        scorer = Scorer(None, planted, ALONE, Windowing(seq_len, stride, 3), "test")
        input_ids, target_ids, _, _ = scorer.batch(window[None], stride, 3)
        assert input_ids.max() < V
        assert target_ids.max() == outside, "which is to be predicted"


@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
@pytest.mark.parametrize(("num_targets", "seq_len", "stride"), [*CASES, (203, 16, 5)])
def test_every_target_is_scored_once_by_one_rank_in_batches_of_one_layout(
    num_targets, seq_len, stride, batch_size, world_size
):
    """So that nothing is compiled twice."""
    layouts, times, val = set(), torch.zeros(num_targets), make_val(num_targets)

    def forward(input_ids, target_ids, reduction, scored):
        tensors = (input_ids, target_ids, scored)
        layouts.add(tuple(t is not None and (t.shape, t.stride(), t.dtype) for t in tensors))
        return torch.ones(target_ids.shape)

    for rank in range(world_size):
        dist = Dist(rank, world_size, CPU)
        times += score_all(forward, val, seq_len, stride, batch_size, dist).sums[1, :-1]
    assert times.tolist() == [1.0] * num_targets
    inputs = ((batch_size, seq_len), (seq_len, 1), torch.int64)
    targets = ((batch_size, stride), (stride, 1), torch.int64)
    assert layouts == {(inputs, targets, targets if stride < seq_len else False)}


@pytest.mark.parametrize(("change", "wrong"), [("twice", 3), ("left_out", 10), ("both", 13)])
def test_targets_scored_twice_or_not_at_all_stop_the_score(model, change, wrong):
    scorer = Scorer(model, make_val(203), ALONE, Windowing(T, 5, 4), "test")
    scorer.score(scorer.windows if change == "twice" else scorer.windows[2:])
    if change != "left_out":
        scorer.score(scorer.windows[-1:])  # of three targets
    with pytest.raises(AssertionError, match=f"^{wrong} targets not scored once"):
        scorer.total()


# ---- Partial scores


def test_an_unfinished_score_is_that_of_the_targets_scored_and_says_so(model):
    val = make_val(203)
    losses = loss_of_every_target(model, val, T, 5)
    scorer = Scorer(model, val, ALONE, Windowing(T, 5, 4), "test")
    scorer.score(scorer.windows[3:7])
    part, sizes = scorer.total(finished=False), val.target_bytes.numpy()[15:35]
    assert (part.partial, part.target_tokens, part.scored_bytes) == (True, 20, sizes.sum())
    assert part.val_loss == pytest.approx(losses[15:35].mean(), abs=1e-6)
    assert part.bpb == pytest.approx(losses[15:35].sum() / math.log(2) / sizes.sum(), abs=1e-6)
    assert str(part).startswith("PARTIAL_loss:")
    scorer.score(torch.cat([scorer.windows[:3], scorer.windows[7:]]))
    assert scorer.total().bpb == score_all(model, val, T, 5).total().bpb


@pytest.mark.slow
def test_partial_scores_are_never_called_val_bpb(dataset, tmp_path):
    run = train(tmp_path, dataset, VAL_MAX_TOKENS=50, VAL_LOSS_EVERY=4)
    for result in (run.result, score(run.artifact, dataset, VAL_MAX_TOKENS=50)):
        *lines, last = result.out.splitlines()
        assert "PARTIAL_bpb:" in result.out
        assert not [line for line in lines if "val_bpb" in line or "val_loss" in line]
        summary = json.loads(last)
        assert (summary["partial"], summary["val_bpb"]) == (True, None)
        assert summary.get("val_bpb_float") is None
    whole = score(run.artifact, dataset)
    assert "PARTIAL" not in whole.out
    assert whole.summary["val_bpb"] > 0
    targets = whole.summary["target_tokens"]
    for count in (targets - 1, targets, targets + 1):
        hp = train_gpt.Hyperparameters.from_env(cli_env(dataset, VAL_MAX_TOKENS=count))
        assert ValData.load(hp, CPU).partial == (count < targets)
