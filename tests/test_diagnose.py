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


def found_for(change=None, **knobs) -> diagnose.Diagnosis:
    """Diagnose a small model whose parameters `change` has been given first."""
    model, hp = model_of(**knobs)
    if change:
        with torch.no_grad():
            change(model)
    return diagnose.diagnose(model, split(), hp, "run")


# ---- Measurements


@pytest.mark.parametrize("knobs", [{"routing_per_pass": False}, {"dispatch": "grouped"}], ids=str)
def test_the_load_of_a_table_is_a_count_of_the_tokens(knobs):
    model, hp = model_of(**knobs)
    load = diagnose.diagnose(model, split(), hp, "run").load
    experts = list(range(hp.model.num_experts))
    for layer in range(hp.model.num_layers):
        chosen = []
        for step in range(hp.model.execution_order(True).count(layer)):
            shift = step if hp.model.routing_per_pass else 0
            for token in split().tokens[:-1].tolist():
                chosen.append((int(model.expert_table[layer, token]) + shift) % len(experts))
        shares = np.bincount(chosen, minlength=len(experts)) / len(chosen)
        assert load.loc[layer, experts].tolist() == pytest.approx(shares.tolist(), abs=1e-12)


def test_the_load_of_a_router_is_what_it_chose_for_each_token():
    model, hp = model_of(routing="hybrid", num_layers=2)
    load = diagnose.diagnose(model, split(), hp, "run").load
    gates = {0: [], 1: []}
    for layer, block in enumerate(model.blocks):

        def record(mlp, args, layer=layer):
            gates[layer].append(mlp.choose(*args)[0][0].double())

        block.mlp.register_forward_pre_hook(record)
    for start in range(0, N, 16):  # windows one by one and without padding
        model.features(split().tokens[start : min(start + 16, N)][None].long())
    for layer, parts in gates.items():
        chosen = torch.cat(parts)
        assert len(chosen) == N
        shares = (chosen.sum(0) / N).tolist()
        assert load.loc[layer, list(range(4))].tolist() == pytest.approx(shares, abs=1e-6)


def test_balance_of_equal_and_of_collapsed_loads():
    for load, measures in (
        ([0.25] * 4, (1, 1)),
        ([1.0, 0.0, 0.0, 0.0], (4, 0)),
        ([0.5, 0.5, 0.0, 0.0], (2, 0.5)),
        ([1.0], (1, 1)),
    ):
        found = diagnose.balance(load)
        assert (found["max/mean"], found["entropy / log E"]) == pytest.approx(measures)


def test_a_router_that_repeats_the_table_is_wholly_lexical_and_one_that_reads_the_stream_is_not():
    def table_only(model):
        for block in model.blocks:
            block.mlp.router.zero_()

    def stream_only(model):
        for block in model.blocks:
            block.mlp.router.mul_(1e3)

    lexical = found_for(table_only, routing="hybrid").specialisation
    assert (lexical["keeps table"] == 1).all()
    contextual = found_for(stream_only, routing="learned").specialisation
    assert ((contextual["keeps table"] > 0) & (contextual["keeps table"] < 0.7)).all()
    assert "keeps table" not in found_for(routing="zipf").specialisation


def test_exchanging_experts_is_a_shift_of_the_layers_table():
    model, hp = model_of()
    found = diagnose.diagnose(model, split(), hp, "run")
    for layer in range(hp.model.num_layers):
        table = model.expert_table[layer].clone()
        model.expert_table[layer] = (table + 1) % hp.model.num_experts
        shifted = loss_of(model, hp) - found.score.val_loss
        model.expert_table[layer] = table
        assert found.specialisation.loc[layer, "shift nats"] == pytest.approx(shifted, abs=1e-9)


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
    found = diagnose.diagnose(model, split(), hp, "run")
    assert set(found.costs.index) == set(MU[mu])
    assert list(found.costs.columns) == ["all", 0, 1, 2]
    for branch, (parameter, rows) in MU[mu].items():
        for column, layers in (("all", range(3)), (1, [1])):
            for layer in layers:
                model.state_dict()[f"blocks.{layer}.{parameter}"][rows] = 0
            cost = loss_of(model, hp) - found.score.val_loss
            model.load_state_dict(weights)
            assert found.costs.loc[branch, column] == pytest.approx(cost, abs=1e-9)
            assert cost != 0


def test_weights_come_back_bit_for_bit_even_after_a_failure():
    model, hp = model_of(mu="pid")
    with torch.no_grad():
        model.blocks[0].attn.mu_gain[0, 0] = -0.0
    before = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    diagnose.diagnose(model, split(), hp, "run")
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


def rms(y: torch.Tensor) -> float:
    return y.double().square().mean().sqrt().item()


def test_mu_ratios_are_those_of_a_hand_computation():
    model, hp = model_of(mu="pid")
    found = diagnose.diagnose(model, split(), hp, "run").mu
    seen = []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda attn, args: seen.append((attn, *args[:2])))
    depths = len(hp.model.execution_order(True))
    last_mu = None
    with torch.no_grad():
        for start in range(0, N, 16):
            model.features(split().tokens[start : min(start + 16, N)][None].long())
        for depth, row in found.iterrows():
            attn = seen[depth][0]
            x = torch.cat([x[0] for _, x, _ in seen[depth::depths]])
            mu = torch.cat([mu[0] for _, _, mu in seen[depth::depths]])
            assert len(x) == N
            for i, matrix in enumerate((attn.c_q, attn.c_k, attn.c_v)):
                bias = (attn.mu_gain[i] * mu) @ matrix.weight.T
                expected = rms(bias) / rms(x @ matrix.weight.T)
                assert row["qkv"[i]] == pytest.approx(expected, rel=1e-4)
            assert row["rms mu"] == pytest.approx(rms(mu), rel=1e-5)
            if depth:
                cosine = torch.cosine_similarity(mu, last_mu, dim=-1).mean().item()
                assert row["cosine"] == pytest.approx(cosine, abs=1e-5)
            last_mu = mu
    assert found["layer"].tolist() == hp.model.execution_order(True)
    assert math.isnan(found["cosine"][0])


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
def test_every_kind_of_model_gets_its_text_and_its_picture(routing, mu, dataset, tmp_path):
    path = write_artifact(tmp_path, dataset, routing=routing, mu=mu)
    result = run(dataset, path, path, "--targets", 50, "--out", tmp_path / "deep" / "er")
    assert (result.code, result.err) == (0, "")
    text, png = sorted((tmp_path / "deep" / "er").iterdir())
    assert (text.name, png.name) == ("my.run_diagnosis.md", "my.run_diagnosis.png")
    assert text.read_text() == result.out
    assert result.out.startswith("# my.run: PARTIAL loss, first 50 targets of the split: ")
    assert ("No experts." in result.out) == (routing == "dense")
    assert ("No mu." in result.out) == (mu == "off")
    assert ("pid velocity" in result.out) == (mu == "pid")
    assert "nan" not in result.out
    assert png.read_bytes().endswith(b"IEND\xaeB`\x82")


def test_the_numbers_of_the_text_are_those_of_the_structure():
    found = found_for(mu="pid", routing="hybrid")
    text = diagnose.report(found)
    for branch, row in found.costs.iterrows():
        assert f"\n| {branch} | {' | '.join(f'{cost:.4f}' for cost in row)} |\n" in text
    assert found.costs["all"].is_monotonic_decreasing
    q, mu = found.mu["q"][0], found.mu["rms mu"][0]
    assert f"\n| 0 | 0 | {q:.4f} | " in text
    assert f" | {mu:.4f} | - |\n" in text  # no mu is before the first


@pytest.mark.slow
def test_the_whole_split_is_not_called_partial(dataset, artifact):
    whole = run(dataset, artifact, artifact, "--targets", 0)
    assert whole.out.startswith("# my.run: loss, all ")
    default = run(dataset, artifact, artifact)  # the split is smaller than the default sample
    assert default.out == whole.out
    for file in artifact.parent.glob("*_diagnosis.*"):
        file.unlink()


@pytest.mark.parametrize(
    ("argv", "knobs", "expected"),
    [
        (["other.ptz"], {}, "other.ptz: no such artifact"),
        (["my.run.ptz"], {"DATA_PATH": "nowhere"}, "nowhere: no such data folder (DATA_PATH)"),
        (["my.run.ptz", "--target", "5"], {}, "unrecognized arguments: --target 5"),
        (["my.run.ptz", "--targets", "-1"], {}, "--targets -1: expected"),
        (["my.run.ptz", "--out", "my.run.ptz"], {}, "--out my.run.ptz: not a folder"),
    ],
)
def test_what_is_missing_or_foreign_is_refused_in_one_line(
    argv, knobs, expected, artifact, dataset
):
    assert_refused(run(dataset, artifact, *argv, **knobs), expected)
    assert [file.name for file in artifact.parent.iterdir()] == [artifact.name]
