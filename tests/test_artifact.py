"""Properties of quantization, the artifact and its size.   pytest tests/test_artifact.py"""

import errno
import math
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_ids, make_model, tiny_hp
from helpers_hostile import SHA, refusal
from make_record import pack_script

import train_gpt
from train_gpt import Hyperparameters, fit, load_artifact, pack, quantize, quantize_tensor

CPU = torch.device("cpu")
EVERY_ROLE = {"routing": "learned", "mu": "full"}
ONE_CODE = 2 ** (1 / 8)  # from one scale to the next
CODE_BYTES = train_gpt.submission_bytes(Hyperparameters(), 0, "code")[0]


def rows_of(std: float, rows: int = 64, cols: int = 512) -> torch.Tensor:
    return std * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


# ---- Quantization --------------------------------------------------------------------------------


RULES = [  # bits, k, std and outlier of the weights
    (6, 12.85, 0.02, 0.0),
    (6, 12.85, 1e-4, 30.0),
    (6, 1.0, 1.0, 0.0),
    (8, 12.85, 1.0, 1e3),
    (8, 0.0, 1e-4, 0.0),
]


@pytest.mark.parametrize(("bits", "clip", "std", "outlier"), RULES)
def test_a_scale_is_what_k_asks_for_or_what_the_largest_weight_needs(bits, clip, std, outlier):
    levels = 2 ** (bits - 1) - 1
    weight = rows_of(std)
    weight[:, 7] += outlier * std
    quantized = quantize_tensor(weight, bits, clip)
    error = (quantized.dequantize() - weight).abs()
    assert (error <= quantized.scale() * (0.5 + 1e-4 * levels)).all()
    typical = clip * weight.std(-1, correction=0, keepdim=True)
    wanted = torch.maximum(typical, weight.abs().amax(-1, keepdim=True)) / levels
    assert (quantized.scale() < ONE_CODE * wanted).all()
    assert (quantized.scale() > wanted / 1.045).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_levels_cut_off_outliers_and_have_the_scales_of_their_sources(bits):
    weight = rows_of(0.02, 16, 4096)

    def error(factor: float) -> float:
        clip = factor * train_gpt.CLIP_OF_FEW_LEVELS[bits]
        return (quantize_tensor(weight, bits, clip).dequantize() - weight).square().mean().item()

    levels = 2 ** (bits - 1) - 1
    quantized = quantize_tensor(weight, bits, train_gpt.CLIP_OF_FEW_LEVELS[bits])
    assert quantized.symbols.unique().tolist() == list(range(-levels, levels + 1))
    assert quantized.dequantize().abs().max() < 0.9 * weight.abs().max()
    if bits == 2:
        by_row = weight.abs().mean(-1, keepdim=True)
        torch.testing.assert_close(quantized.scale(), by_row, rtol=0.05, atol=0)
    else:
        assert all(error(1.0) < 1.01 * error(other) for other in (0.7, 0.9, 1.1, 1.4))
        assert error(0.7) > 1.05 * error(1.0) < error(1.4)


# ---- Rules of tensors ----------------------------------------------------------------------------

MODES = [  # test_cli.py goes through the pairs of all choices
    {"routing": "zipf", "mu": "pid", "activation": "swiglu", "dispatch": "grouped"},
    {"routing": "hybrid", "mu": "vector", "loop_passes": 3, "routing_per_pass": False},
    {"routing": "learned", "mu": "full", "num_layers": 3},
    {"routing": "dense", "mu": "off", "num_layers": 1, "rope_dims": 0},
]


def test_every_tensor_has_the_rule_of_its_role():
    hp = tiny_hp(**EVERY_ROLE, matrix_bits=5, embed_bits=7, expert_bits=2)
    state = make_model(hp).state_dict()
    stored, unusable = quantize(hp, state)
    assert (list(stored), unusable) == (list(state), [])
    ones = torch.full((32,), 192, dtype=torch.uint8)
    rules = {  # by one of the tensors of each role that is rounded
        "blocks.0.attn.c_q.weight": (5, hp.matrix_clip),
        "blocks.0.mu_write.weight": (5, hp.matrix_clip),
        "blocks.0.mlp.expert_up": (2, 0.8),
        "tok_emb.weight": (7, hp.embed_clip, ones),
        "mu_init": (8, 0.0),
    }
    for name, rule in rules.items():
        expected = vars(quantize_tensor(state[name], *rule))
        for part, found in vars(stored[name]).items():
            assert found is expected[part] is None or torch.equal(found, expected[part]), name
    assert torch.equal(stored["blocks.0.mlp.router"], state["blocks.0.mlp.router"].half())
    assert torch.equal(stored["expert_table"], state["expert_table"])


def test_vectors_take_a_byte_unless_that_changes_them_by_a_hundredth():
    hp = tiny_hp()
    plain = 0.1 * torch.randn(32, generator=torch.Generator().manual_seed(0))
    quantized = quantize(hp, {"mu_init": plain})[0]["mu_init"]
    assert 0 < (quantized.dequantize() - plain).norm() <= 0.01 * plain.norm()
    uneven = 0.034 + 0.001 * plain
    uneven[3] = 10.0  # its scale takes all others to zero
    kept = quantize(hp, {"mu_init": uneven})[0]["mu_init"]
    assert kept.dtype == torch.float16
    torch.testing.assert_close(kept.float(), uneven, rtol=2.0**-11, atol=2.0**-25)


@pytest.mark.parametrize("role", [role.name for role in train_gpt.ROLES if role.name != "table"])
def test_weights_that_are_not_finite_or_too_large_are_not_exported(role):
    hp = tiny_hp(**EVERY_ROLE)
    state = make_model(hp).state_dict()
    name = next(name for name in state if train_gpt.role_of(name) == role)
    largest = 60_000.0 if role == "router" else 2047.0
    state[name].view(-1)[1] = largest
    quantize(hp, state)
    for bad in (math.nan, math.inf, -16 * largest, 1e30):
        state[name].view(-1)[1] = bad
        message = refusal(quantize, hp, state)
        assert message == f"{name}: not finite or too large, nothing exported"


# ---- Round trip ----------------------------------------------------------------------------------


def assert_restored(path: Path, tensors: dict) -> tuple[train_gpt.GPT, Hyperparameters]:
    """Read an artifact, whose model must be that of the tensors bit for bit."""
    model, hp, sha = load_artifact(path, Hyperparameters(seed=5), CPU)
    state = model.state_dict()
    assert (list(state), sha, model.training) == (list(tensors), SHA, False)
    for name, tensor in tensors.items():
        if isinstance(tensor, train_gpt.QuantizedTensor):
            expected = tensor.dequantize()
        else:
            expected = tensor.float() if tensor.is_floating_point() else tensor
        assert state[name].dtype == expected.dtype
        assert torch.equal(state[name], expected), name
    return model, hp


@pytest.mark.parametrize("mode", MODES, ids=str)
@torch.no_grad()
def test_reloaded_model_is_the_dequantized_one_bit_for_bit(tmp_path, mode):
    hp = tiny_hp(**mode)
    model = make_model(hp)
    tensors, _ = quantize(hp, model.state_dict())
    columns = torch.arange(170, 202, dtype=torch.uint8)  # as Hessians give them
    tensors["tok_emb.weight"] = replace(tensors["tok_emb.weight"], column_codes=columns)
    data, sizes = pack(hp.model, tensors, SHA, fast=True)
    assert sum(sizes.values()) == len(data)
    path = tmp_path / "a.ptz"
    path.write_bytes(data)
    loaded, loaded_hp = assert_restored(path, tensors)
    assert loaded_hp.model == hp.model  # the artifact's, whatever the environment has
    assert loaded_hp.seed == 5

    ids = make_ids(hp, 2, 16)
    model.load_state_dict(loaded.state_dict(), strict=True)
    assert torch.equal(load_artifact(path, hp, CPU)[0](ids), model(ids))


def test_the_smaller_codec_is_taken_and_a_missing_one_is_named(tmp_path, monkeypatch):
    hp = tiny_hp()
    tensors, _ = quantize(hp, make_model(hp).state_dict())
    path = tmp_path / "a.ptz"
    both = pack(hp.model, tensors, SHA)[0]
    path.write_bytes(both)
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert "pip install brotli" in refusal(load_artifact, path, hp, CPU)
    path.write_bytes(pack(hp.model, tensors, SHA)[0])
    assert path.stat().st_size > len(both)
    assert_restored(path, tensors)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in refusal(load_artifact, path, hp, CPU)


# ---- Size and files ------------------------------------------------------------------------------


def test_a_submission_may_have_every_byte_below_the_cap():
    code = len(pack_script(train_gpt.submission_source()))
    free = train_gpt.MAX_SUBMISSION_BYTES - code
    assert train_gpt.MAX_SUBMISSION_BYTES == 16_000_000
    assert train_gpt.submission_bytes(tiny_hp(), free - 1, "artifact") == (code, 15_999_999)
    message = refusal(train_gpt.submission_bytes, tiny_hp(), free, "artifact")
    assert re.match(r"artifact: .* the cap is 16,000,000", message)


def medium_hp(**knobs) -> Hyperparameters:
    """Return knobs of a model of some 300,000 weights, at k as given."""
    sizes = {"vocab_size": 1024, "model_dim": 96, "rope_dims": 8, "shared_dim": 256}
    return tiny_hp(**{**sizes, "expert_dim": 32, "num_layers": 2, "target_bytes": 0, **knobs})


def with_room(hp: Hyperparameters, artifact_bytes: int) -> Hyperparameters:
    """Aim at an artifact of so many bytes, beside the code."""
    return hp.override(target_bytes=CODE_BYTES + artifact_bytes)


@pytest.fixture(scope="module")
def medium():
    """Knobs, state and artifact at the given k of a medium model."""
    hp = medium_hp()
    state = make_model(hp).state_dict()
    return hp, state, fit(hp, state, SHA, fast=True)


def test_k_stays_as_given_without_a_target_and_has_an_end(medium):
    hp, state, fitted = medium
    tensors, _ = quantize(hp, state)
    assert fitted.factor == 1.0
    assert (fitted.artifact, fitted.sizes) == pack(hp.model, tensors, SHA, fast=True)
    floor = sum(map(train_gpt.entropy_bytes, train_gpt.streams_of(tensors).values()))
    assert floor < len(fitted.artifact) < 1.05 * floor
    table = train_gpt.budget_table(fitted).replace(",", "")
    for role in ("embedding", "matrix", "expert"):
        weights = sum(t.numel() for name, t in state.items() if train_gpt.role_of(name) == role)
        size = fitted.sizes[role]
        assert re.search(rf"^{role} +{weights} +{size} +{8 * size / weights:.3f} ", table, re.M)
    generous = with_room(hp, 10 * len(fitted.artifact))
    assert fit(generous, state, SHA, fast=True).factor == 1 / 8  # the finest


@pytest.mark.parametrize(
    ("fraction", "fast"),
    [(0.7, True), pytest.param(0.9, False, marks=pytest.mark.slow), (1.4, True)],
)
def test_the_artifact_is_about_a_thousandth_below_the_target(tmp_path, medium, fraction, fast):
    hp, state, plain = medium
    target = int(fraction * len(plain.artifact))
    fitted = fit(with_room(hp, target), state, SHA, fast=fast)
    assert 0.9985 * target <= len(fitted.artifact) <= target
    assert (fitted.factor < 1) == (fraction > 1)
    (tmp_path / "a.ptz").write_bytes(fitted.artifact)
    assert_restored(tmp_path / "a.ptz", quantize(hp, state, fitted.factor)[0])


@pytest.mark.slow
def test_a_target_out_of_reach_is_refused_with_what_to_shrink(medium):
    hp, state, _ = medium
    coarsest = len(pack(hp.model, quantize(hp, state, 4.0)[0], SHA, fast=True)[0])
    assert fit(with_room(hp, coarsest), state, SHA, fast=True).factor <= 4
    missing = 1 + coarsest // 1000
    tight = with_room(hp, coarsest - missing)
    message = refusal(fit, tight, state, SHA, None, True)
    assert message.startswith(f"TARGET_BYTES={tight.target_bytes}: {missing:,} bytes too large")
    assert "MODEL_DIM=96" in message
    assert "NUM_LAYERS=2" in message


@pytest.mark.parametrize("routing", ["zipf", "dense"])
def test_a_dry_run_foretells_the_size(routing):
    hp = medium_hp(routing=routing)
    model = make_model(hp)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = len(train_gpt.dry_run(hp, model).artifact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    actual = len(fit(hp, before, SHA, fast=True).artifact)
    assert expected == pytest.approx(actual, rel=0.1)
    wider = medium_hp(routing=routing, shared_dim=512)
    assert len(train_gpt.dry_run(wider, make_model(wider)).artifact) > 1.05 * actual
    assert "TARGET_BYTES=" in refusal(train_gpt.dry_run, with_room(hp, 1000), model)


def test_an_atomic_write_replaces_the_whole_file_or_keeps_the_old_one(tmp_path, monkeypatch):
    """test_faults.py fills a real disk."""
    path = tmp_path / "a" / "b" / "file.bin"
    for content in (b"a long first version", b"old"):
        train_gpt.write_atomically(path, content)
        assert path.read_bytes() == content

    def full_disk(*args) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for failing in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, failing, full_disk)
            message = refusal(train_gpt.write_atomically, path, b"new content")
        assert message == f"cannot write {path}: No space left on device"
        assert path.read_bytes() == b"old"
        assert [p.name for p in path.parent.iterdir()] == ["file.bin"]
