"""What records/diagnose.py measures and writes, on small models.   pytest tests/test_diagnose.py"""

import hashlib

import diagnose
import numpy as np
import pytest
import torch
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import VOCAB_SIZE, assert_refused, eval_env, run_in_process, write_dataset

import train_gpt
from eval_sliding import same, snapshot

N = 40  # targets: two whole windows of 16 and a half, so that there is padding
WHOLE = 32


def split() -> train_gpt.ValData:
    """Return random targets of two bytes each, with few enough ids that most occur often."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(16, (N + 1,), generator=generator, dtype=torch.int32)
    return train_gpt.ValData(tokens, torch.full((N,), 2, dtype=torch.int32), "", True)


def model_of(**knobs) -> tuple[train_gpt.GPT, train_gpt.Hyperparameters]:
    """Return a small routed model with a recurrence, none of whose branches is zero."""
    hp = tiny_hp(**{"num_layers": 3, "loop_start": 1, "loop_end": 1, **knobs})
    return make_model(hp).eval(), hp


def loss_of(model, hp) -> float:
    return train_gpt.evaluate(model, split(), hp, ALONE, "test").val_loss


@pytest.mark.parametrize("knobs", [{"routing_per_pass": False}, {"dispatch": "grouped"}], ids=str)
def test_load_and_cost_of_experts_are_those_of_the_table(knobs):
    model, hp = model_of(**knobs)
    score, rows, _ = diagnose.diagnose(model, split(), hp)
    experts = list(range(hp.model.num_experts))
    for layer, row in enumerate(rows):
        chosen = []
        for step in range(hp.model.execution_order(True).count(layer)):
            shift = step if hp.model.routing_per_pass else 0
            for token in split().tokens[:WHOLE].tolist():
                chosen.append((int(model.expert_table[layer, token]) + shift) % len(experts))
        shares = np.bincount(chosen, minlength=len(experts)) / len(chosen)
        assert [row[expert] for expert in experts] == pytest.approx(list(shares), abs=1e-12)
        assert row["max/mean"] == pytest.approx(len(experts) * max(shares))

        table = model.expert_table[layer].clone()
        model.expert_table[layer] = (table + 1) % hp.model.num_experts
        shifted = loss_of(model, hp) - score.val_loss
        model.expert_table[layer] = table
        assert row["shift"] == pytest.approx(shifted, abs=1e-6)


BRANCHES = {  # whose parameters, and which of their rows, a reader of the model would set to zero
    "routed experts": ("mlp.expert_down", slice(None)),
    "shared expert": ("mlp.down.weight", slice(None)),
    "x0 re-injection": ("resid_mix", 1),
    "mu into q": ("attn.mu_gain", 0),
    "mu into k": ("attn.mu_gain", 1),
    "mu into v": ("attn.mu_gain", 2),
    "mu into q, k and v": ("attn.mu_gain", slice(None)),
    "pid velocity": ("pid_gains", 2),
}


def test_the_cost_of_a_branch_is_that_of_zeros_in_its_place():
    model, hp = model_of(mu="pid", routing="hybrid")
    weights = snapshot(model)
    score, _, rows = diagnose.diagnose(model, split(), hp)
    assert same(weights, model.state_dict())
    costs = {row["branch"]: row for row in rows}
    assert costs.keys() == BRANCHES.keys()
    for branch, (parameter, rows) in BRANCHES.items():
        for column, layers in (("all", range(3)), (1, [1])):
            for layer in layers:
                model.state_dict()[f"blocks.{layer}.{parameter}"][rows] = 0
            cost = loss_of(model, hp) - score.val_loss
            model.load_state_dict(weights)
            assert costs[branch][column] == pytest.approx(cost, abs=1e-9)
            assert cost != 0


@pytest.mark.parametrize(("routing", "mu"), [("learned", "full"), ("dense", "off")])
def test_the_command_line_prints_the_tables_of_an_artifact_or_refuses_it(routing, mu, tmp_path):
    dataset = write_dataset(tmp_path / "set", val_docs=2)
    model, hp = model_of(vocab_size=VOCAB_SIZE, target_bytes=0, routing=routing, mu=mu)
    digest = hashlib.sha256(dataset.tokenizer.read_bytes()).hexdigest()
    fitted = train_gpt.fit(hp, model.state_dict(), digest, fast=True)
    (tmp_path / "my.run.ptz").write_bytes(fitted.artifact)

    def run(*argv, **knobs):
        return run_in_process(diagnose.main, eval_env(dataset, **knobs), tmp_path, *argv)

    result = run("my.run.ptz", "--targets", 50)
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("# my.run: PARTIAL loss, first 50 targets of the split: ")
    assert ("## Experts" in result.out) == (routing != "dense")
    assert ("mu into q" in result.out) == (mu == "full")
    assert "nan" not in result.out
    assert_refused(run("other.ptz"), "other.ptz: no such artifact")
    assert_refused(run("my.run.ptz", DATA_PATH="nowhere"), "nowhere: no such data folder")
    assert_refused(run("my.run.ptz", "--target", 5), "unrecognized arguments: --target 5")
    assert_refused(run("my.run.ptz", "--targets", -1), "--targets -1: expected")
