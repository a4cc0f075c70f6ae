"""Routing tables: equal loads, independent layers, determinism."""

import itertools

import numpy as np
import pytest
import torch
from conftest import tiny_hp, zipf_counts

from train_gpt import build_expert_table

V = 1024
EXPERTS = [2, 4, 8]
TABLES = ("zipf", "hash", "modulo")
START = {"learned": "modulo", "soft": "modulo", "hybrid": "zipf"}  # tables that routers start from


def table_of(
    routing: str, num_experts: int = 4, counts: np.ndarray | None = None, **knobs
) -> np.ndarray:
    """(layers, V) experts, by `counts`."""
    hp = tiny_hp(vocab_size=V, routing=routing, num_experts=num_experts, **knobs)
    return build_expert_table(hp.model, zipf_counts(V) if counts is None else counts).numpy()


def imbalance(row: np.ndarray, counts: np.ndarray, num_experts: int) -> float:
    """Load of the busiest expert over the mean, token by token."""
    loads = [sum(int(count) for count in counts[row == expert]) for expert in range(num_experts)]
    return max(loads) * num_experts / sum(loads)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_zipf_loads_are_equal_on_the_counted_corpus_and_nearly_so_on_another_sample(num_experts):
    shares = zipf_counts(V) / zipf_counts(V).sum()
    counted, trained_on = np.random.default_rng(1).multinomial(1_000_000, shares, size=2)
    table = table_of("zipf", num_experts, counted)
    assert np.array_equal(table_of("zipf", num_experts, 100_000 * counted), table)  # above 32 bits
    for row in table:
        assert imbalance(row, counted, num_experts) < 1.01
        assert imbalance(row, trained_on, num_experts) < 1.02
    of_modulo = [imbalance(row, counted, num_experts) for row in table_of("modulo", num_experts)]
    assert max(of_modulo) > 1.012


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("tokens", [0, 1_000])
def test_zipf_spreads_tokens_it_never_saw(num_experts, tokens):
    counts = np.random.default_rng(4).permutation(zipf_counts(V, tokens) * (np.arange(V) % 2))
    counts *= tokens > 0
    for row in table_of("zipf", num_experts, counts):
        owned = np.bincount(row[counts == 0], minlength=num_experts)
        assert 0.5 * owned.mean() < owned.min() <= owned.max() < 1.5 * owned.mean()


def co_membership_correlations(table: np.ndarray) -> list[float]:
    """Per pair of layers, how far the same random pairs of tokens share an expert in both."""
    a, b = np.random.default_rng(0).integers(V, size=(2, 40_000))
    together = (table[:, a] == table[:, b])[:, a != b].astype(float)
    return [np.corrcoef(x, y)[0, 1] for x, y in itertools.combinations(together, 2)]


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_layers_partition_the_vocabulary_in_unrelated_ways(num_experts):
    for routing in ("zipf", "hash"):
        correlations = co_membership_correlations(table_of(routing, num_experts, num_layers=6))
        assert max(map(abs, correlations)) < 0.08, routing
    assert min(co_membership_correlations(table_of("modulo", num_experts))) > 0.999


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_hash_occupancy_is_that_of_random_assignment(num_experts):
    mean = V / num_experts
    for row in table_of("hash", num_experts, num_layers=12):
        occupancy = np.bincount(row, minlength=num_experts)
        assert np.abs(occupancy - mean).max() < 5 * mean**0.5


@pytest.mark.parametrize("routing", TABLES)
def test_tables_follow_from_vocabulary_and_experts_and_that_of_zipf_from_the_counts(routing):
    table = table_of(routing)
    np.random.seed(99)
    torch.manual_seed(99)
    other = table_of(routing, model_dim=64, train_seq_len=32, num_layers=6)
    assert np.array_equal(other[:4], table)
    of_other_counts = table_of(routing, counts=zipf_counts(V, seed=1))
    assert np.array_equal(of_other_counts, table) == (routing != "zipf")
    assert table_of(routing, 256).max() > 250


def test_modulo_is_the_remainder_of_the_id_and_routers_start_from_tables():
    assert np.array_equal(table_of("modulo"), np.tile(np.arange(V) % 4, (4, 1)))
    for routing, start in START.items():
        assert np.array_equal(table_of(routing), table_of(start))
    assert table_of("dense").shape == (0, V)
