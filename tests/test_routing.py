"""Properties of the routing tables: balance, independence of layers, determinism.   pytest tests/test_routing.py"""

import inspect
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ALONE, markov_text, tiny_hp, zipf_counts
from helpers_cli import write_shard

from train_gpt import (
    CHOICES,
    TokenLoader,
    build_expert_table,
    cluster_assignments,
    mix32,
    zipf_assignment,
)

V = 1024
EXPERTS = [2, 4, 8]
ROUTED = [routing for routing in CHOICES["routing"].split() if routing != "dense"]
START = {"learned": "modulo", "soft": "modulo", "hybrid": "zipf"}  # tables that routers start from


def tables_of(
    routing: str, num_experts: int, counts: np.ndarray | None = None, tokens=None, **knobs
) -> np.ndarray:
    """(layers, V, K), by `counts` and, for cluster, a text of 8 classes of tokens or `tokens`."""
    hp = tiny_hp(vocab_size=V, routing=routing, num_experts=num_experts, **knobs)
    tokens = markov_text(V) if tokens is None else tokens
    return build_expert_table(hp, zipf_counts(V) if counts is None else counts, tokens).numpy()


def table_of(*args, **knobs) -> np.ndarray:
    """The first choices, (layers, V)."""
    return tables_of(*args, **knobs)[..., 0]


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
    assert (
        max(imbalance(row, counts, num_experts) for row in table_of("modulo", num_experts, counts))
        > 1.012
    )


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
    counts = np.random.default_rng(5).permutation(
        np.random.default_rng(4).multinomial(tokens, shares / shares.sum())
    )
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
    for routing in ("zipf", "hash"):  # clusters of 8 classes cannot be unrelated
        assert (
            max(map(abs, co_membership_correlations(table_of(routing, num_experts, num_layers=6))))
            < 0.08
        ), routing
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
        flips = (
            np.unpackbits((mix32(x) ^ mix32(x ^ np.uint32(1 << bit))).view(np.uint8)).mean() * 32
        )
        assert 13 < flips < 19, f"input bit {bit}"
        low = ((mix32(x) ^ mix32(x ^ np.uint32(1 << bit))) & 1).mean()
        assert 0.4 < low < 0.6, f"input bit {bit}"
    assert len(np.unique(mix32(x))) == len(x)


@pytest.mark.parametrize("routing", ROUTED)
def test_tables_are_deterministic_and_in_range(routing):
    hp, counts = tiny_hp(vocab_size=V, routing=routing), zipf_counts(V)
    table = build_expert_table(hp, counts, markov_text(V))
    assert table.dtype == torch.uint8
    assert table.shape == (hp.num_layers, V, 1)
    assert table.max() == hp.num_experts - 1
    np.random.seed(99)
    torch.manual_seed(99)
    other = tiny_hp(vocab_size=V, routing=routing, seed=7, model_dim=64, train_seq_len=32)
    assert torch.equal(build_expert_table(other, counts, markov_text(V).copy()), table)
    others = build_expert_table(
        replace(hp, num_experts=256, moe_start_layer=3), counts, markov_text(V)
    )
    assert others.max() > 250


@pytest.mark.parametrize("routing", ROUTED)
def test_tables_depend_on_vocabulary_experts_and_layer_and_those_of_text_on_counts(routing):
    table, counts = table_of(routing, 4), zipf_counts(V, seed=1)
    other = table_of(routing, 4, counts)
    assert np.array_equal(other, table) == (routing not in ("zipf", "hybrid", "cluster"))
    assert not np.array_equal(table_of(routing, 8), table)
    late = table_of(routing, 4, moe_start_layer=2)
    assert np.array_equal(
        late, table[2:]
    )  # a layer keeps its table whatever the layers before it are
    assert np.array_equal(table[0], table[1]) == (START.get(routing, routing) == "modulo")


def test_routers_start_from_tables():
    for routing, start in START.items():
        assert np.array_equal(table_of(routing, 4), table_of(start, 4))
    assert not np.array_equal(table_of("zipf", 4), table_of("modulo", 4))


def test_tables_are_built_from_knobs_and_training_counts_alone():
    assert list(inspect.signature(build_expert_table).parameters) == [
        "hp",
        "token_counts",
        "tokens",
    ]
    parameters = inspect.signature(cluster_assignments).parameters
    assert list(parameters) == ["tokens", "token_counts", "num_experts", "layers"]
    assert list(inspect.signature(zipf_assignment).parameters) == [
        "token_counts",
        "num_experts",
        "layer",
    ]


def test_modulo_is_the_remainder_of_the_id():
    assert np.array_equal(table_of("modulo", 4), np.tile(np.arange(V) % 4, (4, 1)))


def test_dense_routes_no_layer():
    assert tables_of("dense", 4).shape == (0, V, 1)


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


def test_loader_samples_as_many_tokens_from_the_start_of_every_training_shard(tmp_path):
    tokens = np.random.default_rng(0).integers(V, size=(2, 300))
    for i, shard in enumerate(tokens):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", shard)
    write_shard(tmp_path / "fineweb_val_000000.bin", np.full(300, 7))
    loader = TokenLoader(tiny_hp(vocab_size=V, data_path=str(tmp_path)), ALONE)
    assert np.array_equal(loader.sample(), tokens.ravel())
    assert np.array_equal(loader.sample(401), tokens[:, :200].ravel())


# ---- Two experts per token


@pytest.mark.parametrize("num_experts", EXPERTS)
@pytest.mark.parametrize("routing", ROUTED)
def test_second_expert_is_another_one_and_in_every_layer_by_another_rule(routing, num_experts):
    table = tables_of(routing, num_experts, top_k=2)
    first, second = table[..., 0], table[..., 1]
    assert np.array_equal(first, table_of(routing, num_experts))
    assert (first != second).all()
    assert table.max() == num_experts - 1
    if (
        num_experts > 2
    ):  # how far it is from the first differs between layers as often as for independent choices
        steps = (second.astype(int) - first) % num_experts
        for a, b in itertools.combinations(steps, 2):
            assert (a == b).mean() == pytest.approx(1 / (num_experts - 1), abs=0.08)
    for row in second:
        assert np.bincount(row, minlength=num_experts).min() > 0.5 * V / num_experts


# ---- Clusters


def mutual_information(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> float:
    """Of two labels of the same tokens, in nats."""
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), weights / weights.sum())
    independent = joint.sum(1, keepdims=True) * joint.sum(0)
    return float((joint[joint > 0] * np.log(joint[joint > 0] / independent[joint > 0])).sum())


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_clusters_recover_the_classes_of_a_text_and_share_its_tokens_equally(num_experts):
    tokens, classes = markov_text(V, 2 * num_experts, 200_000), np.arange(V) % (2 * num_experts)
    counts = np.bincount(tokens, minlength=V)
    zipf, clusters = (table_of(r, num_experts, counts, tokens) for r in ("zipf", "cluster"))
    for layer, row in enumerate(clusters):
        assert imbalance(row, counts, num_experts) <= 1.15, f"layer {layer}"
        known = mutual_information(row, classes, counts)
        assert known > 0.3 * np.log(num_experts), (
            f"layer {layer}"
        )  # all of it: an expert has whole classes
        assert known > 4 * mutual_information(zipf[layer], classes, counts), f"layer {layer}"
    for a, b in itertools.combinations(clusters, 2):
        assert not np.array_equal(a, b)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_clusters_share_the_tokens_of_a_text_without_any_pattern_equally(num_experts):
    counts = zipf_counts(V)
    tokens = np.random.default_rng(0).choice(V, 100_000, p=counts / counts.sum())
    counts = np.bincount(tokens, minlength=V)
    for row in table_of("cluster", num_experts, counts, tokens):
        assert imbalance(row, counts, num_experts) <= 1.15


def test_clusters_depend_on_the_order_of_the_tokens():
    tokens = markov_text(V)
    shuffled = np.random.default_rng(0).permutation(tokens)
    assert not np.array_equal(table_of("cluster", 4), table_of("cluster", 4, tokens=shuffled))


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_clusters_spread_tokens_they_never_saw(num_experts):
    tokens = markov_text(V)
    tokens = tokens[tokens < V // 2]
    counts = np.bincount(tokens, minlength=V)
    for row in table_of("cluster", num_experts, counts, tokens):
        owned = np.bincount(row[counts == 0], minlength=num_experts)
        assert owned.max() - owned.min() <= 1
