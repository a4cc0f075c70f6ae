"""What records/diagnose.py measures and writes, on small models.   pytest tests/test_diagnose.py"""

import hashlib
import math

import diagnose
import numpy as np
import pytest
import torch
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import VOCAB_SIZE, assert_refused, eval_env, run_in_process, write_dataset

import train_gpt

N = 40  # targets: two whole windows of 16 and a half, so that there is padding
WHOLE = 32


def split(partial: bool = True) -> train_gpt.ValData:
    """Return random targets of two bytes each, with few enough ids that most occur often."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(16, (N + 1,), generator=generator, dtype=torch.int32)
    return train_gpt.ValData(tokens, torch.full((N,), 2, dtype=torch.int32), "", partial)


def model_of(**knobs) -> tuple[train_gpt.GPT, train_gpt.Hyperparameters]:
    """Return a small routed model with a recurrence, none of whose branches is zero."""
    hp = tiny_hp(**{"num_layers": 3, "loop_start": 1, "loop_end": 1, **knobs})
    return make_model(hp).eval(), hp


def loss_of(model, hp) -> float:
    return train_gpt.evaluate(model, split(), hp, ALONE, "test").val_loss


def found_in(model, hp) -> tuple[float, list[dict], dict[str, dict]]:
    """Return the loss, rows of experts, and those of branches by name."""
    score, experts, costs = diagnose.diagnose(model, split(), hp)
    return score.val_loss, list(experts), {row["branch"]: row for row in costs}


# ---- Measurements


@pytest.mark.parametrize("knobs", [{"routing_per_pass": False}, {"dispatch": "grouped"}], ids=str)
def test_the_load_of_a_table_is_a_count_of_the_tokens(knobs):
    model, hp = model_of(**knobs)
    _, rows, _ = found_in(model, hp)
    experts = list(range(hp.model.num_experts))
    for layer in range(hp.model.num_layers):
        chosen = []
        for step in range(hp.model.execution_order(True).count(layer)):
            shift = step if hp.model.routing_per_pass else 0
            for token in split().tokens[:WHOLE].tolist():
                chosen.append((int(model.expert_table[layer, token]) + shift) % len(experts))
        shares = np.bincount(chosen, minlength=len(experts)) / len(chosen)
        assert [rows[layer][expert] for expert in experts] == pytest.approx(list(shares), abs=1e-12)
        assert rows[layer]["max/mean"] == pytest.approx(len(experts) * max(shares))


def test_the_load_of_a_router_is_what_it_chose_for_each_token():
    model, hp = model_of(routing="hybrid", num_layers=2)
    _, rows, _ = found_in(model, hp)
    gates = {0: [], 1: []}
    for layer, block in enumerate(model.blocks):

        def record(mlp, args, layer=layer):
            gates[layer].append(mlp.choose(*args)[0][0].double())

        block.mlp.register_forward_pre_hook(record)
    for start in range(0, WHOLE, 16):
        model.features(split().tokens[start : start + 16][None].long())
    for layer, parts in gates.items():
        chosen = torch.cat(parts)
        assert len(chosen) == WHOLE
        shares = (chosen.sum(0) / WHOLE).tolist()
        assert [rows[layer][expert] for expert in range(4)] == pytest.approx(shares, abs=1e-6)


def test_exchanging_experts_is_a_shift_of_the_layers_table():
    model, hp = model_of()
    loss, experts, _ = found_in(model, hp)
    for layer in range(hp.model.num_layers):
        table = model.expert_table[layer].clone()
        model.expert_table[layer] = (table + 1) % hp.model.num_experts
        shifted = loss_of(model, hp) - loss
        model.expert_table[layer] = table
        assert experts[layer]["shift"] == pytest.approx(shifted, abs=1e-9)


def test_cosines_of_experts_take_no_pair_twice():
    a = torch.tensor([[1.0, 0.0]])
    b = torch.tensor([[0.0, 1.0]])
    assert diagnose.cosine(torch.stack([a, b, -3 * a])) == pytest.approx(1 / 3)
    assert diagnose.cosine(torch.stack([a, a])) == pytest.approx(1)
    assert math.isnan(diagnose.cosine(a[None]))


BRANCHES = {  # whose parameters, and which of their rows, a reader of the model would set to zero
    "routed experts": ("mlp.expert_down", slice(None)),
    "shared expert": ("mlp.down.weight", slice(None)),
    "x0 re-injection": ("resid_mix", 1),
}
MU = {
    "pid": BRANCHES
    | {
        "mu into q": ("attn.mu_gain", 0),
        "mu into k": ("attn.mu_gain", 1),
        "mu into v": ("attn.mu_gain", 2),
        "mu into q, k and v": ("attn.mu_gain", slice(None)),
        "pid velocity": ("pid_gains", 2),
    },
    "full": BRANCHES
    | {
        "mu into q": ("attn.mu_read.weight", slice(0, 32)),
        "mu into k": ("attn.mu_read.weight", slice(32, 48)),
        "mu into v": ("attn.mu_read.weight", slice(48, 64)),
        "mu into q, k and v": ("attn.mu_read.weight", slice(None)),
    },
}


@pytest.mark.parametrize("mu", MU)
def test_the_cost_of_a_branch_is_that_of_zeros_in_its_place(mu):
    model, hp = model_of(mu=mu, routing="hybrid")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss, _, costs = found_in(model, hp)
    assert costs.keys() == MU[mu].keys()
    for branch, (parameter, rows) in MU[mu].items():
        for column, layers in (("all", range(3)), (1, [1])):
            for layer in layers:
                model.state_dict()[f"blocks.{layer}.{parameter}"][rows] = 0
            cost = loss_of(model, hp) - loss
            model.load_state_dict(weights)
            assert costs[branch][column] == pytest.approx(cost, abs=1e-9)
            assert cost != 0


def test_weights_come_back_bit_for_bit_even_after_a_failure():
    model, hp = model_of(mu="pid")
    with torch.no_grad():
        model.blocks[0].attn.mu_gain[0, 0] = -0.0
    before = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    found_in(model, hp)
    mlp = model.blocks[0].mlp

    def fail(change) -> None:
        with change:
            assert not mlp.down.weight.any() or "choose" in vars(mlp)
            raise KeyboardInterrupt

    for change in (diagnose.zeroed([mlp.down.weight.detach()]), diagnose.next_expert(mlp)):
        with pytest.raises(KeyboardInterrupt):
            fail(change)
    assert "choose" not in vars(mlp)
    assert {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()} == before


# ---- Text, picture and command line


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=2)


def write_artifact(folder, dataset, **knobs):
    """Write an artifact of an untrained small model with a random value in every parameter."""
    model, hp = model_of(vocab_size=VOCAB_SIZE, target_bytes=0, **knobs)
    digest = hashlib.sha256(dataset.tokenizer.read_bytes()).hexdigest()
    path = folder / "my.run.ptz"
    path.write_bytes(train_gpt.fit(hp, model.state_dict(), digest, fast=True).artifact)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, dataset):
    return write_artifact(tmp_path_factory.mktemp("artifact"), dataset)


def run(dataset, artifact, *argv, **knobs):
    return run_in_process(diagnose.main, eval_env(dataset, **knobs), artifact.parent, *argv)


KINDS = [("zipf", "pid"), ("learned", "full"), ("dense", "off")]


@pytest.mark.parametrize(("routing", "mu"), KINDS)
def test_every_kind_of_model_gets_its_tables(routing, mu, dataset, tmp_path):
    path = write_artifact(tmp_path, dataset, routing=routing, mu=mu)
    result = run(dataset, path, path, "--targets", 50)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("# my.run: PARTIAL loss, first 50 targets of the split: ")
    assert ("## Experts" in result.out) == (routing != "dense")
    assert ("pid velocity" in result.out) == (mu == "pid")
    assert "nan" not in result.out
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_table_has_four_digits_a_dash_for_nan_and_is_not_there_without_rows(capsys):
    rows = [{"layer": 0, "x": 0.25, "y": math.nan}, {"layer": 1, "x": -1.0, "y": 2.0}]
    diagnose.print_table("Title", "Text.", iter(rows))
    table = "| layer | x | y |\n|---|---|---|\n| 0 | 0.2500 | - |\n| 1 | -1.0000 | 2.0000 |\n"
    assert capsys.readouterr().out == f"\n## Title\n\nText.\n\n{table}"
    diagnose.print_table("Title", "Text.", iter([]))
    assert capsys.readouterr().out == ""


@pytest.mark.slow
def test_the_whole_split_is_not_called_partial(dataset, artifact):
    whole = run(dataset, artifact, artifact, "--targets", 0)
    assert whole.out.startswith("# my.run: loss, all ")
    default = run(dataset, artifact, artifact)  # the split is smaller than the default sample
    assert default.out == whole.out


@pytest.mark.parametrize(
    ("argv", "knobs", "expected"),
    [
        (["other.ptz"], {}, "other.ptz: no such artifact"),
        (["my.run.ptz"], {"DATA_PATH": "nowhere"}, "nowhere: no such data folder (DATA_PATH)"),
        (["my.run.ptz", "--target", "5"], {}, "unrecognized arguments: --target 5"),
        (["my.run.ptz", "--targets", "-1"], {}, "--targets -1: expected"),
    ],
)
def test_what_is_missing_or_foreign_is_refused_in_one_line(
    argv, knobs, expected, artifact, dataset
):
    assert_refused(run(dataset, artifact, *argv, **knobs), expected)
