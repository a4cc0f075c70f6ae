"""Training and export under stress: high learning rates, extreme rows, idle experts, bfloat16."""

import math
from pathlib import Path

import pytest
import torch
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import (
    BOS,
    CPU,
    Dataset,
    Run,
    assert_refused,
    cli_env,
    eval_env,
    run_in_process,
    tiny_tokenizer,
    train,
    write_dataset,
    write_shard,
)
from torch import Tensor

import eval_sliding
import train_gpt
from train_gpt import Hyperparameters, QuantizedTensor, load_artifact, quantize

DEFAULTS = Hyperparameters()
TRIPLE = {
    "MATRIX_LR": 3 * DEFAULTS.matrix_lr,
    "EMBED_LR": 3 * DEFAULTS.embed_lr,
    "SCALAR_LR": 3 * DEFAULTS.scalar_lr,
}
EXACT = DEFAULTS.override(dtype="float32")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "set", val_docs=2)


def loaded(run: Run) -> dict[str, Tensor]:
    """The weights of the artifact."""
    return load_artifact(run.artifact, EXACT, CPU)[0].state_dict()


def exported(run: Run) -> dict[str, Tensor]:
    """The float32 weights from which the artifact was made, by the last checkpoint."""
    (path,) = run.artifact.parent.glob("run.step*.pt")
    saved = torch.load(path)
    names = [name for name in saved["model"] if name != "expert_table"]  # a buffer
    return saved["model"] | dict(zip(names, saved["average"], strict=True))


def nearest(state: dict[str, Tensor], name: str) -> QuantizedTensor:
    """A tensor rounded to nearest by the default knobs."""
    return quantize(EXACT, {name: state[name]})[0][name]


# ---- High learning rates and bad weights ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("mode", [{}, {"ROUTING": "learned", "MU": "pid", "GRAD_CLIP_NORM": 0}])
def test_three_times_the_default_learning_rates_train_and_export_numbers(dataset, tmp_path, mode):
    run = train(tmp_path, dataset, ITERATIONS=200, **TRIPLE, **mode)
    losses = torch.tensor(run.losses)
    assert losses.isfinite().all()
    assert losses[-10:].mean() < losses[0] - 2
    assert run.result.summary["val_loss"] < losses[0] - 2
    assert all(tensor.isfinite().all() for tensor in loaded(run).values())


def assert_nothing_exported(dataset: Dataset, folder: Path, message: str, **knobs) -> None:
    result = run_in_process(train_gpt.main, cli_env(dataset, **knobs), folder)
    assert_refused(result, message)
    assert [path.name for path in (folder / "logs").iterdir()] == ["run.txt"]


@pytest.mark.parametrize("knob", ["MATRIX_LR", "EMBED_LR"])
def test_a_learning_rate_that_diverges_exports_nothing(dataset, tmp_path, knob):
    assert_nothing_exported(dataset, tmp_path, "training loss is nan at step ", **{knob: "1e30"})


def test_a_nan_of_the_last_step_exports_nothing(dataset, tmp_path, monkeypatch):
    """No training loss sees it any more."""
    true_train = train_gpt.train

    def planted(hp, dist, log, model, loader, val):
        end = true_train(hp, dist, log, model, loader, val)
        model.state_dict()["blocks.1.attn.c_q.weight"][3, 5] = math.nan
        return end

    monkeypatch.setattr(train_gpt, "train", planted)
    assert_nothing_exported(dataset, tmp_path, "validate: total loss nan")


# ---- Extreme rows --------------------------------------------------------------------------------

ROW = 5  # of the first expert, where there are several


def rows_of(tensor: Tensor) -> Tensor:
    return tensor.view(-1, tensor.size(-1))


@pytest.mark.parametrize("name", ["blocks.1.attn.c_q.weight", "blocks.1.mlp.expert_down"])
def test_extreme_rows_come_back_from_gptq_and_spare_the_others(name):
    hp = tiny_hp()
    state = make_model(hp).state_dict()
    width = 64 if "mlp" in name else 32
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    x = torch.randn(500, width, generator=generator) @ mixing
    hessians = {name.replace("expert_down", "down.weight"): x.T @ x}
    usual = quantize(hp, state, 1.0, hessians)[0][name].dequantize()
    is_other = torch.arange(len(rows_of(usual))) % hp.model.model_dim != ROW

    zeros = torch.zeros(usual.size(-1))
    outlier = rows_of(state[name])[ROW].clone()
    outlier[3] = -1e4 * outlier.abs().mean()
    for row in (zeros, zeros + 1e-40, outlier):
        planted = state | {name: state[name].clone()}
        rows_of(planted[name])[ROW] = row
        restored = rows_of(quantize(hp, planted, 1.0, hessians)[0][name].dequantize())
        # Errors of the other experts, of the same output, must not fill a row of zeros.
        assert restored[ROW, 3] == pytest.approx(row[3].item(), rel=0.07, abs=1e-30)
        assert restored[ROW].any() == (row is outlier)
        assert torch.equal(restored[is_other], rows_of(usual)[is_other])


# ---- What training never reached -----------------------------------------------------------------


def token_losses(artifact: Path, dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Targets of the validation split, and the loss of each."""
    hp = EXACT.override(data_path=str(dataset.folder), tokenizer_path=str(dataset.tokenizer))
    model, hp, _ = load_artifact(artifact, hp, CPU)
    val = train_gpt.ValData.load(hp, CPU)
    scorer = train_gpt.Scorer(model, val, ALONE, train_gpt.Windowing(32, 8, 16), "score")
    scorer.score(scorer.share)
    return val.tokens[1:], scorer.sums[0, :-1]


def test_tokens_that_training_never_saw_are_routed_exported_and_scored(dataset, tmp_path):
    run = train(tmp_path, dataset, TARGET_BYTES=0, CHECKPOINT_EVERY=1000, ITERATIONS=24)
    seen = set()
    for path in dataset.folder.glob("fineweb_train_*"):
        seen |= set(train_gpt.load_data_shard(path).tolist())
    sp = train_gpt.spm.SentencePieceProcessor(model_proto=tiny_tokenizer())
    text = [BOS, *sp.encode("abc \u2603 def \u00e9 ghi " * 20)]
    unseen = sorted(set(text) - seen)
    assert len(unseen) >= 5

    weights = loaded(run)
    assert weights["expert_table"][:, unseen].unique().tolist() == [0, 1, 2, 3]
    before = exported(run)["tok_emb.weight"][unseen].norm(dim=-1)
    after = weights["tok_emb.weight"][unseen].norm(dim=-1)
    torch.testing.assert_close(after, before, rtol=0.25, atol=0)

    folder = tmp_path / "unseen"
    write_shard(folder / "fineweb_val_0.bin", text)
    odd = Dataset(folder, dataset.tokenizer)
    targets, losses = token_losses(run.artifact, odd)
    is_new = torch.isin(targets, torch.tensor(unseen))
    assert losses.isfinite().all()
    assert losses[is_new].min() > losses[~is_new].mean()
    env = eval_env(odd, TTT="sgd")
    scored = run_in_process(eval_sliding.main, env, tmp_path, "logs/run.ptz")
    assert scored.code == 0, scored.err
    assert math.isfinite(scored.summary["val_loss"])


def starve_the_last_expert(monkeypatch) -> None:
    """Give no token id the last expert, in any layer."""
    build = train_gpt.build_expert_table

    def starving(config, counts):
        return build(config, counts) % (config.num_experts - 1)

    monkeypatch.setattr(train_gpt, "build_expert_table", starving)


def test_an_expert_that_never_got_a_token_only_decays_and_comes_back(
    dataset, tmp_path, monkeypatch
):
    """Its down projection is still the zeros of the start, and its Hessian is zero."""
    starve_the_last_expert(monkeypatch)
    knobs = {"ROUTING_PER_PASS": 0, "ITERATIONS": 12, "TARGET_BYTES": 0, "CHECKPOINT_EVERY": 1000}
    run = train(tmp_path, dataset, **knobs)
    assert "warning" not in run.result.out
    weights = loaded(run)
    before = exported(run)
    start = make_model(load_artifact(run.artifact, EXACT, CPU)[1], noise=0.0).state_dict()
    for layer in range(4):
        up = f"blocks.{layer}.mlp.expert_up"
        down = f"blocks.{layer}.mlp.expert_down"
        assert [bool(expert.any()) for expert in before[down]] == [True, True, True, False]
        assert not weights[down][3].any()
        decay = before[up][3].norm() / start[up][3].norm()
        assert 0.9 < decay < 1
        torch.testing.assert_close(before[up][3], decay * start[up][3])
        off = (weights[up] - before[up]).abs() / nearest(before, up).scale()
        assert off[3].max() <= 0.5 + 1e-4
        assert off[:3].max() > 0.51  # GPTQ moved the others


# ---- bfloat16 ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_bfloat16_has_the_loss_curve_of_float32(dataset, tmp_path, monkeypatch):
    """The largest difference over 40 steps, in which the loss falls by more than 1 nat.

    Measured: 0.006 to 0.025 nats by either dispatch, 0.021 to 0.064 with a learned router, whose
    choices flip; 0.45 to 0.69 with another seed; 0.10 to 0.27 with an epsilon of bfloat16 in the
    norm, which is far above the squares of the embedding's first weights.
    """

    def curve(name: str, **knobs) -> Tensor:
        run = train(tmp_path / name, dataset, ITERATIONS=40, GPTQ_BATCHES=0, **knobs)
        losses = torch.tensor(run.losses)
        assert len(losses) == 40
        assert losses[-1] < losses[0] - 1
        return losses

    def worst(curve: Tensor, other: Tensor) -> float:
        return (curve - other).abs().max().item()

    masked = curve("masked")
    assert 0 < worst(masked, curve("rounded", DTYPE="bfloat16")) < 0.05
    assert 0 < worst(masked, curve("grouped", DTYPE="bfloat16", DISPATCH="grouped")) < 0.05
    router = {"ROUTING": "learned", "MU": "pid"}
    rounded = curve("rounded_router", DTYPE="bfloat16", **router)
    assert 0 < worst(curve("router", **router), rounded) < 0.13

    assert worst(masked, curve("seed", DTYPE="bfloat16", SEED=42)) > 0.26
    epsilon = torch.finfo(torch.bfloat16).eps

    def coarse_norm(x: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x, x.shape[-1:], eps=epsilon)

    monkeypatch.setattr(train_gpt, "norm", coarse_norm)
    assert worst(masked, curve("epsilon", DTYPE="bfloat16")) > 0.075
