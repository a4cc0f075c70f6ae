"""Properties of n-gram mixing: exact counts, proper weights, and what NGRAM=on logs."""

import math
import re
from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_cli import assert_refused, score
from hypothesis import example, given, settings
from hypothesis import strategies as st

import eval_sliding
from eval_sliding import NGRAM_LOCAL_ORDER, NGRAM_ORDER, count_contexts, mix, search_counts
from train_gpt import BOS_ID, ValData

EXPERTS = [  # in the order in which they are mixed in
    (order, is_local)
    for order in range(NGRAM_ORDER + 1)
    for is_local in (True, False)
    if (order <= NGRAM_LOCAL_ORDER if is_local else order > 0)
]


def make_text(num_targets: int, vocab_size: int = 8, seed: int = 0) -> torch.Tensor:
    """Return random tokens of several documents, of which much is copied from before."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, vocab_size, num_targets + 1).astype(np.int32)
    tokens[:: max(num_targets // 4, 1)] = BOS_ID
    for start in range(40, num_targets - 30, 60):
        source = int(rng.integers(0, start))
        tokens[start : start + 30] = tokens[source : source + 30]
    return torch.from_numpy(tokens)


def make_losses(num_targets: int, seed: int = 0) -> torch.Tensor:
    return 4 * torch.rand(num_targets, generator=torch.Generator().manual_seed(seed))


def searched_counts(tokens: list[int]) -> dict[tuple[int, bool], list]:
    """Return seen, hits, distinct and age of every target, by expert, by a search of the past."""
    rows = {}
    for order, is_local in EXPERTS:
        rows[order, is_local] = []
        for target in range(len(tokens) - 1):
            known = [0, 0, 0, 0]
            if target >= order:
                known = search_counts(tokens, target, order, is_local)
            rows[order, is_local].append(known)
    return rows


def our_counts(tokens: list[int]) -> dict[tuple[int, bool], list]:
    """Return the same by `count_contexts`; experts that it leaves out know nothing."""
    rows = {expert: torch.zeros(len(tokens) - 1, 4, dtype=torch.long) for expert in EXPERTS}
    for counts in count_contexts(torch.tensor(tokens, dtype=torch.int32)):
        values = torch.stack([counts.seen, counts.hits, counts.distinct, counts.age], 1).long()
        values *= (counts.seen > 0)[:, None]
        rows[counts.order, counts.is_local][counts.targets] = values
    return {expert: values.tolist() for expert, values in rows.items()}


# ---- Counts and mixture


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    tokens=st.integers(2, 4).flatmap(lambda n: st.lists(st.integers(1, n), min_size=1, max_size=80))
)
@example(tokens=[65_535, 0, 65_535, 1, 65_535, 0, 2, 65_535, 0, 65_535, 1])  # above 32 bits
def test_counts_are_those_of_a_search(tokens):
    assert our_counts(tokens) == searched_counts(tokens)


def bucket_of(seen: int, distinct: int, age: int) -> tuple[int, int, int]:
    """Return the bucket of a context that was seen, by the edges that the constants state."""
    repeats = np.float32(seen) / np.float32(distinct)
    return (
        sum(seen >= edge for edge in eval_sliding.NGRAM_SEEN.tolist()),
        sum(repeats >= edge for edge in eval_sliding.NGRAM_REPEATS.numpy()),
        sum(age >= edge for edge in eval_sliding.NGRAM_AGE.tolist()),
    )


def slow_mixture(losses: list[float], tokens: list[int], updates: list[int]) -> list[float]:
    """Return the mixture's losses by loops; weights change before the targets in `updates`."""
    probs = [math.exp(-loss) for loss in losses]
    for rows in searched_counts(tokens).values():
        mass, total, waiting = defaultdict(lambda: 0.4), defaultdict(lambda: 4.0), []
        for target, (seen, hits, distinct, age) in enumerate(rows):
            if target in updates:
                for bucket, posterior in waiting:
                    mass[bucket] += posterior
                    total[bucket] += 1
                waiting = []
            if seen:
                bucket = bucket_of(seen, distinct, age)
                weight = mass[bucket] / total[bucket]
                gain = weight * hits / seen
                probs[target] = (1 - weight) * probs[target] + gain
                waiting.append((bucket, gain / probs[target]))
    return [-math.log(prob) for prob in probs]


def test_the_mixture_is_that_of_a_slow_loop():
    tokens, losses = make_text(300), make_losses(300)
    mixed, order = mix(losses, tokens)
    slow = slow_mixture(losses.tolist(), tokens.tolist(), [16, 32, 64, 128, 256])
    assert order == NGRAM_ORDER
    assert mixed.tolist() == pytest.approx(slow, abs=1e-12)
    assert mixed.mean() < losses.mean() - 0.1
    never = slow_mixture(losses.tolist(), tokens.tolist(), [])
    assert mixed.tolist() != pytest.approx(never, abs=1e-2)


@pytest.mark.parametrize("num_targets", [0, 1])
def test_text_without_a_past_keeps_its_losses(num_targets):
    mixed, _ = mix(make_losses(num_targets), make_text(num_targets))
    torch.testing.assert_close(mixed, make_losses(num_targets).double())


def test_contexts_whose_turn_would_end_too_late_are_left_out(monkeypatch):
    """Five experts have contexts of 2 tokens at most; the clock says 6 then, a second for each."""
    tokens, losses = make_text(300), make_losses(300)
    clock = SimpleNamespace(now=0.0)

    def perf_counter() -> float:
        clock.now += 1.0
        return clock.now

    monkeypatch.setattr(eval_sliding.time, "perf_counter", perf_counter)
    late, order = mix(losses, tokens, deadline=6.5)  # it begins at 1
    assert order == 2
    monkeypatch.setattr(eval_sliding, "NGRAM_ORDER", 2)
    assert torch.equal(late, mix(losses, tokens)[0])


# ---- Audit and command line


def failed_rows(num_targets: int = 60, vocab_size: int = 8) -> str:
    """Return the conditions that n-gram mixing breaks, by the audit of a short text."""
    tokens = make_text(num_targets, vocab_size)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(num_targets, vocab_size, generator=generator, dtype=torch.float64)
    log_probs = logits.log_softmax(-1)
    losses = -log_probs.gather(1, tokens[1:, None].long())[:, 0]
    val = ValData(tokens, torch.ones(num_targets, dtype=torch.int32), "", False)
    dists = {target: log_probs[target] for target in (num_targets - 5, num_targets - 1)}
    rows = list(eval_sliding.audit_ngram(losses, val, dists))
    assert [row[0] for row in rows] == ["C1 n-gram", "C2 n-gram", "C3 n-gram"]
    return " ".join(name.split()[0] for name, _, _, holds in rows if not holds)


HONEST_COUNT = eval_sliding.count_pasts
HONEST_MIX_IN = eval_sliding.mix_in


def count_the_target_itself(*args):
    seen, hits, distinct, age = HONEST_COUNT(*args)
    return seen + 1, hits + 1, distinct.clamp(min=1), age


def weigh_by_the_target(probs, counts) -> None:
    """Let the bucket tell whether the counts hold the target."""
    HONEST_MIX_IN(probs, replace(counts, age=1024 * (counts.hits == 0).int()))


def learn_before_scoring(probs, counts) -> None:
    """Score with weights that all of the text has taught."""
    twice = replace(counts, targets=torch.cat([counts.targets, counts.targets + len(probs)]))
    for name in ("seen", "hits", "distinct", "age"):
        setattr(twice, name, getattr(counts, name).repeat(2))
    both = probs.repeat(2)
    HONEST_MIX_IN(both, twice)
    probs.copy_(both[len(probs) :])


@pytest.mark.parametrize(
    ("name", "cheat", "fails"),
    [
        ("count_pasts", count_the_target_itself, "C1 C2 C3"),
        ("mix_in", weigh_by_the_target, "C2"),
        ("mix_in", learn_before_scoring, "C1 C2"),
    ],
)
def test_mixing_that_cheats_fails_the_audit_and_honest_mixing_passes(
    name, cheat, fails, monkeypatch
):
    assert failed_rows() == ""
    monkeypatch.setattr(eval_sliding, name, cheat)
    assert failed_rows() == fails


def finals(out: str) -> list[str]:
    """Return the lines of final scores, without seconds."""
    return re.findall(r"^(final_\S+ \S+ \S+)", out, re.MULTILINE)


def test_the_mixed_score_comes_beside_that_of_the_model_which_stays(artifact, dataset):
    off, on = score(artifact, dataset), score(artifact, dataset, NGRAM="on")
    assert (off.code, on.code) == (0, 0)
    assert off.summary["ngram"] is None
    mixed = on.summary["ngram"]
    assert mixed["val_bpb"] < on.summary["val_bpb"] == off.summary["val_bpb"]
    own, ngram = finals(on.out)
    assert [own] == finals(off.out)
    scores = f"val_loss:{mixed['val_loss']:.8f} val_bpb:{mixed['val_bpb']:.8f}"
    assert ngram == f"final_ngram_exact {scores}"
    ratio = on.summary["val_loss"] / on.summary["val_bpb"]
    assert mixed["val_loss"] / mixed["val_bpb"] == pytest.approx(ratio, rel=1e-9)
    assert re.search(r"^trained_window:.* ngram:on", on.out, re.MULTILINE)
    assert "ngram" not in off.out.replace('"ngram": null', "")


def test_the_mixed_score_of_a_part_is_partial(artifact, dataset):
    result = score(artifact, dataset, NGRAM="on", VAL_MAX_TOKENS=90)
    assert "final_ngram_exact PARTIAL_loss:" in result.out
    assert result.summary["ngram"]["val_bpb"] is None


def test_without_time_for_it_there_is_no_mixing(artifact, dataset):
    result = score(artifact, dataset, NGRAM="on", EVAL_MAX_SECONDS=1e-3)
    assert len(re.findall("^EVAL_MAX_SECONDS=0.001: no time for n-gram", result.out, re.M)) == 1
    assert (result.code, result.summary["ngram"]) == (0, None)
    assert len(finals(result.out)) == 1


def test_test_time_training_leaves_the_time_for_it(artifact, dataset, monkeypatch):
    """What n-gram mixing would take is more than there is."""
    monkeypatch.setattr(eval_sliding, "NGRAM_SECONDS", 1e3)
    knobs = {"TTT": "sgd", "TTT_CHUNK_TOKENS": 16, "TTT_EPOCHS": 1, "EVAL_MAX_SECONDS": 1e4}
    run, asked = score(artifact, dataset, **knobs).summary["ttt_epochs"]
    assert run == asked > 0
    result = score(artifact, dataset, NGRAM="on", **knobs)
    assert result.summary["ttt_epochs"] == [0, asked]


def test_too_little_memory_is_refused_before_anything_is_scored(artifact, dataset, monkeypatch):
    monkeypatch.setattr(eval_sliding, "NGRAM_BYTES", 1e15)
    result = score(artifact, dataset, NGRAM="on")
    assert_refused(result, "NGRAM=on takes", "GB are free")
    assert "final" not in result.out
