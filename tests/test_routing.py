"""Properties of the routing tables: balance, independence of layers, determinism.   pytest tests/test_routing.py"""

import inspect
import itertools

import numpy as np
import pytest
import torch
from conftest import ALONE, tiny_hp, zipf_counts
from helpers_cli import write_shard

from train_gpt import CHOICES, TokenLoader, build_expert_table, expert_load, mix32, zipf_assignment

V = 1024
EXPERTS = [2, 4, 8]
ROUTED = [routing for routing in CHOICES["routing"].split() if routing != "dense"]


def table_of(routing: str, num_experts: int, counts: np.ndarray | None = None, **knobs) -> np.ndarray:
    hp = tiny_hp(vocab_size=V, routing=routing, num_experts=num_experts, **knobs)
    return build_expert_table(hp, zipf_counts(V) if counts is None else counts).numpy()


def imbalance(row: np.ndarray, counts: np.ndarray, num_experts: int) -> float:
    """Load of the busiest expert over the mean, token by token."""
    loads = [sum(int(count) for count in counts[row == expert]) for expert in range(num_experts)]
    return max(loads) * num_experts / sum(loads)


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("seed", range(3))
def test_zipf_loads_are_equal_on_the_counted_corpus(num_experts, seed):
    counts = zipf_counts(V, seed=seed)
    for layer, row in enumerate(table_of("zipf", num_experts, counts)):
        assert imbalance(row, counts, num_experts) < 1.01, f"layer {layer}"
    assert max(imbalance(row, counts, num_experts) for row in table_of("modulo", num_experts, counts)) > 1.012


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_zipf_loads_are_nearly_equal_on_another_sample_of_the_corpus(num_experts):
    shares = zipf_counts(V) / zipf_counts(V).sum()
    counted, trained_on = np.random.default_rng(1).multinomial(1_000_000, shares, size=2)
    for row in table_of("zipf", num_experts, counted):
        assert imbalance(row, trained_on, num_experts) < 1.02


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("tokens", [0, 1_000, 1_000_000, 50_000_000])
def test_zipf_spreads_tokens_it_never_saw(num_experts, tokens):
    shares = np.where(np.arange(V) < V // 2, 1 / (np.arange(V) + 3.7), 0)
    counts = np.random.default_rng(5).permutation(np.random.default_rng(4).multinomial(tokens, shares / shares.sum()))
    unseen = counts == 0
    assert unseen.sum() >= V // 2
    for layer, row in enumerate(table_of("zipf", num_experts, counts)):
        owned = np.bincount(row[unseen], minlength=num_experts)
        assert owned.max() < 1.5 * owned.mean(), f"layer {layer}: experts own {owned} unseen tokens"
        assert owned.min() > 0.5 * owned.mean(), f"layer {layer}: experts own {owned} unseen tokens"


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("routing", ROUTED)
def test_every_expert_owns_tokens_in_every_layer(routing, num_experts):
    for row in table_of(routing, num_experts):
        assert sorted(set(row.tolist())) == list(range(num_experts))


def co_membership_correlations(table: np.ndarray) -> list[float]:
    """Per pair of layers, how far the same random pairs of tokens share an expert in both; labels do not matter."""
    a, b = np.random.default_rng(0).integers(V, size=(2, 40_000))
    together = (table[:, a] == table[:, b])[:, a != b].astype(float)
    return [np.corrcoef(x, y)[0, 1] for x, y in itertools.combinations(together, 2)]


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_layers_partition_the_vocabulary_in_unrelated_ways(num_experts):
    for routing in ("zipf", "hash"):
        assert max(map(abs, co_membership_correlations(table_of(routing, num_experts, num_layers=6)))) < 0.08, routing
    assert min(co_membership_correlations(table_of("modulo", num_experts))) > 0.999


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_hash_occupancy_is_that_of_random_assignment(num_experts):
    mean = V / num_experts
    for row in table_of("hash", num_experts, num_layers=12):
        occupancy = np.bincount(row, minlength=num_experts)
        assert np.abs(occupancy - mean).max() < 5 * mean**0.5


def test_mixer_turns_one_flipped_bit_into_about_sixteen():
    x = np.arange(4096, dtype=np.uint32)
    for bit in range(32):
        flips = np.unpackbits((mix32(x) ^ mix32(x ^ np.uint32(1 << bit))).view(np.uint8)).mean() * 32
        assert 13 < flips < 19, f"input bit {bit}"
        low = ((mix32(x) ^ mix32(x ^ np.uint32(1 << bit))) & 1).mean()
        assert 0.4 < low < 0.6, f"input bit {bit}"
    assert len(np.unique(mix32(x))) == len(x)


@pytest.mark.parametrize("routing", ROUTED)
def test_tables_are_deterministic_and_in_range(routing):
    hp, counts = tiny_hp(vocab_size=V, routing=routing), zipf_counts(V)
    table = build_expert_table(hp, counts)
    assert table.dtype == torch.uint8
    assert table.shape == (hp.num_layers, V)
    assert table.max() == hp.num_experts - 1
    np.random.seed(99)
    torch.manual_seed(99)
    again = build_expert_table(tiny_hp(vocab_size=V, routing=routing, seed=7, model_dim=64, train_seq_len=32), counts)
    assert torch.equal(again, table)


@pytest.mark.parametrize("routing", ROUTED)
def test_tables_depend_on_vocabulary_experts_and_layer_and_zipf_on_counts(routing):
    table, counts = table_of(routing, 4), zipf_counts(V, seed=1)
    other = table_of(routing, 4, counts)
    assert np.array_equal(other, table) == (routing != "zipf")
    assert not np.array_equal(table_of(routing, 8), table)
    late = table_of(routing, 4, moe_start_layer=2)
    assert np.array_equal(late, table[2:])  # a layer keeps its table whatever the layers before it are
    assert np.array_equal(table[0], table[1]) == (routing == "modulo")


def test_tables_are_built_from_knobs_and_training_counts_alone():
    assert list(inspect.signature(build_expert_table).parameters) == ["hp", "token_counts"]
    assert list(inspect.signature(zipf_assignment).parameters) == ["token_counts", "num_experts", "layer"]


def test_modulo_is_the_remainder_of_the_id():
    assert np.array_equal(table_of("modulo", 4), np.tile(np.arange(V) % 4, (4, 1)))


def test_dense_routes_no_layer():
    assert table_of("dense", 4).shape == (0, V)


def test_counts_above_32_bits_stay_balanced():
    counts = zipf_counts(V) * 100_000
    assert counts.max() > 2**31
    for row in table_of("zipf", 4, counts):
        assert imbalance(row, counts, 4) < 1.01


def test_more_tokens_of_one_kind_than_the_rest_together_leave_the_rest_to_the_others():
    counts = np.ones(V, np.int64)
    counts[5] = 2**40
    row = zipf_assignment(counts, 4, layer=0)
    assert (row == row[5]).sum() < V // 40
    others = np.bincount(np.delete(row, 5), minlength=4)
    assert sorted(others)[1] > V // 4


def test_load_line_has_the_directly_computed_figure_of_every_layer():
    for routing in ROUTED:
        counts, table = zipf_counts(V, seed=2), table_of(routing, 8, moe_start_layer=1)
        text = expert_load(torch.from_numpy(table), counts, 8)
        figures = [float(figure) for figure in text.rsplit(": ", 1)[1].split()]
        assert figures == pytest.approx([imbalance(row, counts, 8) for row in table], abs=6e-4)
        assert len(figures) == 3
    idle = expert_load(torch.zeros(1, V, dtype=torch.uint8), counts, 8)
    assert float(idle.split()[-1]) == 8.0


def test_loader_counts_every_training_token_in_64_bits(tmp_path):
    tokens = np.random.default_rng(0).integers(V, size=(2, 300))
    for i, shard in enumerate(tokens):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shard)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(300, 7))
    loader = TokenLoader(tiny_hp(vocab_size=V, data_path=str(tmp_path)), ALONE)
    assert loader.count_tokens().dtype == np.int64
    assert np.array_equal(loader.count_tokens(), np.bincount(tokens.ravel(), minlength=V))
    assert np.array_equal(loader.count_tokens(400), np.bincount(tokens.ravel()[:400], minlength=V))
