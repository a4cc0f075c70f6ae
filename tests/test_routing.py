"""Routing tables: equal loads, independent layers, a real mixer, determinism."""

import itertools

import numpy as np
import pytest
import torch
from conftest import ALONE, tiny_hp, zipf_counts
from helpers_cli import write_shard

from train_gpt import TokenLoader, build_expert_table, mix32, zipf_assignment

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
    for row in table_of("zipf", num_experts, counted):
        assert imbalance(row, counted, num_experts) < 1.01
        assert imbalance(row, trained_on, num_experts) < 1.02
    of_modulo = [imbalance(row, counted, num_experts) for row in table_of("modulo", num_experts)]
    assert max(of_modulo) > 1.012


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("tokens", [0, 1_000, 50_000_000])
def test_zipf_spreads_tokens_it_never_saw(num_experts, tokens):
    shares = np.where(np.arange(V) < V // 2, 1 / (np.arange(V) + 3.7), 0)
    counts = np.random.default_rng(4).multinomial(tokens, shares / shares.sum())
    counts = np.random.default_rng(5).permutation(counts)
    for layer, row in enumerate(table_of("zipf", num_experts, counts)):
        owned = np.bincount(row[counts == 0], minlength=num_experts)
        assert owned.max() < 1.5 * owned.mean(), f"layer {layer}: experts own {owned} unseen tokens"
        assert owned.min() > 0.5 * owned.mean(), f"layer {layer}: experts own {owned} unseen tokens"


def test_zipf_copes_with_extreme_counts():
    counts = zipf_counts(V) * 100_000  # above 32 bits
    assert counts.max() > 2**31
    for row in table_of("zipf", 4, counts):
        assert imbalance(row, counts, 4) < 1.01

    # One token outnumbers all others together: these go to the other experts.
    counts = np.ones(V, np.int64)
    counts[5] = 2**40
    row = zipf_assignment(counts, 4, layer=0)
    assert (row == row[5]).sum() < V // 40
    others = np.bincount(np.delete(row, 5), minlength=4)
    assert sorted(others)[1] > V // 4


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


def test_mixer_turns_one_flipped_bit_into_about_sixteen():
    x = np.arange(4096, dtype=np.uint32)
    assert len(np.unique(mix32(x))) == len(x)
    for bit in range(32):
        flipped = mix32(x) ^ mix32(x ^ np.uint32(1 << bit))
        assert 13 < 32 * np.unpackbits(flipped.view(np.uint8)).mean() < 19, f"input bit {bit}"
        assert 0.4 < (flipped & 1).mean() < 0.6, f"input bit {bit}"


@pytest.mark.parametrize("routing", TABLES)
def test_tables_are_deterministic_and_use_every_expert_in_every_layer(routing):
    hp = tiny_hp(vocab_size=V, routing=routing)
    table = build_expert_table(hp.model, zipf_counts(V))
    assert table.dtype == torch.uint8
    for row in table_of(routing, 8):
        assert sorted(set(row.tolist())) == list(range(8))
    np.random.seed(99)
    torch.manual_seed(99)
    other = hp.override(model_dim=64, train_seq_len=32)
    assert torch.equal(build_expert_table(other.model, zipf_counts(V)), table)
    many = hp.override(num_experts=256)
    assert build_expert_table(many.model, zipf_counts(V)).max() > 250


@pytest.mark.parametrize("routing", TABLES)
def test_a_layer_keeps_its_table_in_a_deeper_model_and_that_of_zipf_follows_the_counts(routing):
    table = table_of(routing)
    assert np.array_equal(table_of(routing, num_layers=6)[:4], table)
    of_other_counts = table_of(routing, counts=zipf_counts(V, seed=1))
    assert np.array_equal(of_other_counts, table) == (routing != "zipf")


def test_modulo_is_the_remainder_of_the_id_and_routers_start_from_tables():
    assert np.array_equal(table_of("modulo"), np.tile(np.arange(V) % 4, (4, 1)))
    for routing, start in START.items():
        assert np.array_equal(table_of(routing), table_of(start))
    assert table_of("dense").shape == (0, V)


def test_loader_samples_as_many_tokens_from_the_start_of_every_training_shard(tmp_path):
    tokens = np.random.default_rng(0).integers(V, size=(2, 300))
    for i, shard in enumerate(tokens):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shard)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(300, 7))
    loader = TokenLoader(tiny_hp(vocab_size=V, data_path=str(tmp_path)), ALONE)
    assert np.array_equal(loader.sample(), tokens.ravel())
    assert np.array_equal(loader.sample(401), tokens[:, :200].ravel())
