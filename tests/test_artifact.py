"""Properties of quantization, the artifact and its size.   pytest tests/test_artifact.py"""

import errno
import itertools
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
from conftest import make_ids, make_model, tiny_hp
from helpers_hostile import SHA, Pieces, refusal, shapes_of
from make_record import pack_script

import train_gpt
from train_gpt import (
    BROTLI,
    MAX_SUBMISSION_BYTES,
    ROLES,
    SCALES,
    ZSTD,
    Hyperparameters,
    QuantizedTensor,
    compress,
    dry_run,
    fit,
    load_artifact,
    pack,
    quantize,
    quantize_tensor,
    role_of,
    stored_parts,
    submission_bytes,
    write_atomically,
)

CPU = torch.device("cpu")
KNOBS = train_gpt.knob_fields(train_gpt.ModelConfig)
CHOICES = {name: field.metadata.get("choices") for name, field in KNOBS.items()}
DENSE = {"routing": "dense", "mu": "off", "num_layers": 1}
EVERY_ROLE = {"routing": "learned", "mu": "full"}
ONE_CODE = 2 ** (1 / 8)  # from one scale to the next
CODE_BYTES = submission_bytes(Hyperparameters(), 0, "code")[0]


def rows_of(std: float, rows: int = 64, cols: int = 512) -> torch.Tensor:
    return std * torch.randn(rows, cols, generator=torch.Generator().manual_seed(0))


def entropy_bits(symbols: torch.Tensor) -> float:
    """Return bits per symbol, from the counts of the values."""
    shares = np.array([*Counter(symbols.flatten().tolist()).values()]) / symbols.numel()
    return float(-(shares * np.log2(shares)).sum())


# ---- Quantization --------------------------------------------------------------------------------


def test_there_are_256_scales_an_eighth_of_an_octave_apart():
    assert [SCALES[code].item() for code in (0, 184, 192, 200)] == [2.0**-24, 0.5, 1.0, 2.0]
    steps = torch.full((255,), ONE_CODE)
    torch.testing.assert_close(SCALES[1:] / SCALES[:-1], steps, rtol=1e-6, atol=0)
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128, 1)
    quantized = QuantizedTensor(torch.full((2, 128, 3), -5, dtype=torch.int8), codes)
    expected = -5.0 * SCALES.view(2, 128, 1).expand(2, 128, 3)
    assert torch.equal(quantized.dequantize(), expected)


RULES = [  # bits, k, std and outlier of the weights
    (6, 12.85, 0.02, 0.0),
    (6, 12.85, 1e-4, 30.0),
    (6, 1.0, 1.0, 0.0),
    (8, 12.85, 1.0, 1e3),
    (8, 0.0, 1e-4, 0.0),
    (7, 3.0, 0.02, 30.0),
    (5, 1.0, 0.02, 3.0),
]


@pytest.mark.parametrize(("bits", "clip", "std", "outlier"), RULES)
def test_a_scale_is_what_k_asks_for_or_what_the_largest_weight_needs(bits, clip, std, outlier):
    levels = 2 ** (bits - 1) - 1
    weight = rows_of(std)
    weight[:, 7] += outlier * std
    quantized = quantize_tensor(weight, bits, clip)
    assert (quantized.symbols.dtype, quantized.row_codes.dtype) == (torch.int8, torch.uint8)
    scale = quantized.scale()
    error = (quantized.dequantize() - weight).abs()
    assert (error <= scale * (0.5 + 1e-4 * levels)).all()
    assert levels >= quantized.symbols.abs().max() >= (0.9 * levels if outlier else 1)

    largest = weight.abs().amax(-1, keepdim=True)
    typical = clip * weight.std(-1, correction=0, keepdim=True) / levels
    by_k = scale <= typical * 1.045
    assert (scale[by_k] >= typical[by_k] / 1.045).all()
    assert (levels * scale[~by_k] / ONE_CODE < largest[~by_k]).all()  # a smaller one would not do
    assert by_k.all() if clip > 1.1 * (outlier + 5) else not by_k.all()


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


@pytest.mark.parametrize("clip", [8.0, 12.85, 20.0])
def test_k_sets_the_entropy_of_the_symbols_and_the_bytes_are_near_it(clip):
    symbols = quantize_tensor(rows_of(0.02, 256, 1024), 6, clip).symbols
    gaussian = 0.5 * math.log2(2 * math.pi * math.e)
    assert entropy_bits(symbols) == pytest.approx(gaussian - math.log2(clip / 31), abs=0.1)
    floor = train_gpt.entropy_bytes([symbols])
    assert floor == pytest.approx(entropy_bits(symbols) * symbols.numel() / 8)
    for fast in (False, True):
        size = len(compress(symbols.numpy().tobytes(), fast)[1])
        assert 0.999 * floor < size < 1.03 * floor


def test_zero_rows_are_exact_and_rows_know_nothing_of_each_other():
    weight = rows_of(0.02, rows=12).view(3, 4, -1)
    weight[0, 0] = 0
    weight[0, 1] = -3e-3
    quantized = quantize_tensor(weight, 6, 12.85)
    assert torch.equal(quantized.dequantize()[0, 0], weight[0, 0])
    torch.testing.assert_close(quantized.dequantize()[0, 1], weight[0, 1], rtol=0.02, atol=0)
    other = weight.clone()
    other[1, 2] *= 100
    changed = quantize_tensor(other, 6, 12.85)
    differs = (changed.symbols != quantized.symbols).any(-1)
    differs |= (changed.row_codes != quantized.row_codes)[..., 0]
    assert differs.nonzero().tolist() == [[1, 2]]


# ---- Rules of tensors ----------------------------------------------------------------------------

# Every pair of a routing and a mu, and of each other choice and switch with most of these.
MODES = []
SWITCHES = ("skip_gates", "attn_gate", "smear_gate", "xsa", "routing_per_pass")
for (r, routing), (m, mu) in itertools.product(
    enumerate(CHOICES["routing"]), enumerate(CHOICES["mu"])
):
    mode = {"routing": routing, "mu": mu, "num_layers": 3, "loop_passes": 1 + (r + m) % 3}
    if routing not in ("learned", "hybrid", "soft"):
        mode["dispatch"] = CHOICES["dispatch"][(r + m) % 2]
    mode["activation"] = CHOICES["activation"][(r // 2 + m // 2) % 2]
    mode[SWITCHES[(r + 2 * m) % 5]] = False
    MODES.append(mode)
MODES.append({**DENSE, "rope_dims": 0})


def label(mode: dict) -> str:
    return "-".join(str(mode[knob]) for knob in ("routing", "mu"))


@pytest.mark.parametrize("mode", MODES[::3], ids=label)
def test_every_tensor_has_one_rule(mode):
    hp = tiny_hp(**mode, matrix_bits=5, embed_bits=7, expert_bits=2)
    state = make_model(hp).state_dict()
    stored, unusable = quantize(hp, state)
    assert (list(stored), unusable) == (list(state), [])
    ones = torch.full((32,), 192, dtype=torch.uint8)
    for name, tensor in state.items():
        assert sum(re.fullmatch(role.pattern, name) is not None for role in ROLES) == 1
        role = role_of(name)
        if role == "table":
            expected = tensor
        elif role == "router":
            expected = tensor.half()
        elif role == "vector":
            in_bytes = isinstance(stored[name], QuantizedTensor)
            expected = quantize_tensor(tensor, 8, 0.0) if in_bytes else tensor.half()
        elif role == "embedding":
            expected = quantize_tensor(tensor, 7, hp.embed_clip, ones)
        elif role == "expert":
            expected = quantize_tensor(tensor, 2, 0.8)
        else:
            expected = quantize_tensor(tensor, 5, hp.matrix_clip)
        for part, right in zip(stored_parts([stored[name]]), stored_parts([expected]), strict=True):
            assert part.dtype == right.dtype
            assert torch.equal(part, right), name


@pytest.mark.parametrize("name", ["mu_init", "skip_weights", "blocks.0.attn.gate"])
def test_vectors_take_a_byte_unless_that_changes_them_by_a_hundredth(name):
    hp = tiny_hp()
    shape = make_model(hp).state_dict()[name].shape
    plain = 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantized = quantize(hp, {name: plain})[0][name]
    assert 0 < (quantized.dequantize() - plain).norm() <= 0.01 * plain.norm()
    uneven = 0.034 + 0.001 * plain
    uneven[..., 3] = 10.0  # its scale takes all others to zero
    kept = quantize(hp, {name: uneven})[0][name]
    assert kept.dtype == torch.float16
    torch.testing.assert_close(kept.float(), uneven, rtol=2.0**-11, atol=2.0**-25)


@pytest.mark.parametrize("role", [role.name for role in ROLES if role.name != "table"])
def test_weights_that_are_not_finite_or_too_large_are_not_exported(role):
    hp = tiny_hp(**EVERY_ROLE)
    state = make_model(hp).state_dict()
    name = next(name for name in state if role_of(name) == role)
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
        if isinstance(tensor, QuantizedTensor):
            expected = tensor.dequantize()
        else:
            expected = tensor.float() if tensor.is_floating_point() else tensor
        assert state[name].dtype == expected.dtype
        assert torch.equal(state[name], expected), name
    return model, hp


@pytest.mark.parametrize("mode", MODES, ids=label)
@torch.no_grad()
def test_reloaded_model_is_the_dequantized_one_bit_for_bit(tmp_path, mode):
    hp = tiny_hp(**mode)
    model = make_model(hp)
    tensors, _ = quantize(hp, model.state_dict())
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


@pytest.mark.parametrize("levels", [0, 1, 31, 127])
@pytest.mark.parametrize("vectors", ["int8", "float16"])
def test_any_symbols_and_scales_come_back(tmp_path, vectors, levels):
    hp = tiny_hp(**EVERY_ROLE, num_layers=2, loop_passes=1)
    rng = np.random.default_rng(levels)
    tensors = {}
    for name, shape in shapes_of(hp.model).items():
        role = role_of(name)
        if role == "table":
            tensors[name] = torch.from_numpy(rng.integers(0, 4, shape, np.uint8))
        elif role == "router" or (role == "vector" and vectors == "float16"):
            tensors[name] = torch.from_numpy(rng.normal(size=shape).astype(np.float16))
        else:
            symbols = rng.integers(-levels, levels, shape, np.int8, endpoint=True)
            parts = [symbols, rng.integers(0, 256, (*shape[:-1], 1), np.uint8)]
            if role == "embedding":
                parts.append(rng.integers(0, 256, shape[-1:], np.uint8))
            tensors[name] = QuantizedTensor(*map(torch.from_numpy, parts))
    data, sizes = pack(hp.model, tensors, SHA)
    assert sum(sizes.values()) == len(data)
    assert ("vector" in sizes) == (vectors == "int8")
    (tmp_path / "a.ptz").write_bytes(data)
    assert_restored(tmp_path / "a.ptz", tensors)


def test_every_codec_returns_what_it_got_and_the_smaller_is_taken(monkeypatch):
    skewed = quantize_tensor(rows_of(0.02), 6, 12.85).symbols.numpy().tobytes()
    for payload in (skewed, b""):
        assert compress(payload)[0] == BROTLI
        assert compress(payload, fast=True)[0] == ZSTD
        for codec, data in (compress(payload), compress(payload, fast=True)):
            assert train_gpt.decompress(data, codec, len(payload), Path("x")) == payload
    monkeypatch.setattr(brotli, "compress", lambda data, **options: 2 * data)
    assert compress(skewed) == compress(skewed, fast=True)


def test_a_missing_codec_is_named_and_the_other_still_works(tmp_path, monkeypatch):
    hp = tiny_hp()
    tensors, _ = quantize(hp, make_model(hp).state_dict())
    by_both = tmp_path / "both.ptz"
    by_both.write_bytes(pack(hp.model, tensors, SHA)[0])
    assert any(codec == BROTLI for codec, _ in Pieces.of(by_both.read_bytes()).header["streams"])
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert "pip install brotli" in refusal(load_artifact, by_both, hp, CPU)
    by_zstd = tmp_path / "zstd.ptz"
    by_zstd.write_bytes(pack(hp.model, tensors, SHA)[0])
    assert_restored(by_zstd, tensors)
    monkeypatch.setitem(sys.modules, "zstandard", None)
    assert "pip install zstandard" in refusal(load_artifact, by_zstd, hp, CPU)


# ---- Size ----------------------------------------------------------------------------------------


def test_a_submission_may_have_every_byte_below_the_cap():
    code = len(pack_script(train_gpt.submission_source()))
    free = MAX_SUBMISSION_BYTES - code
    assert MAX_SUBMISSION_BYTES == 16_000_000
    assert submission_bytes(tiny_hp(), free - 1, "artifact") == (code, 15_999_999)
    message = refusal(submission_bytes, tiny_hp(), free, "artifact")
    assert re.match(r"artifact: .* the cap is 16,000,000", message)


def medium_hp(**knobs) -> Hyperparameters:
    """Return knobs of a model of some 300,000 weights, at k as given."""
    sizes = {"vocab_size": 1024, "model_dim": 96, "rope_dims": 8, "shared_dim": 256}
    return tiny_hp(**{**sizes, "expert_dim": 32, "num_layers": 2, "target_bytes": 0, **knobs})


def with_room(hp: Hyperparameters, artifact_bytes: int) -> Hyperparameters:
    """Aim at an artifact of so many bytes, beside the code."""
    return hp.override(target_bytes=CODE_BYTES + artifact_bytes)


@torch.no_grad()
def trained_like(hp: Hyperparameters) -> dict[str, torch.Tensor]:
    """Return weights whose rows have unequal scale and heavier tails than a Gaussian."""
    model = make_model(hp, noise=0.0)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        if role_of(name) == "vector":
            p.add_(0.1 * noise)
            continue
        row_scale = (0.5 * torch.randn((*p.shape[:-1], 1), generator=generator)).exp()
        chi_squared = torch.randn((8, *p.shape), generator=generator).square().mean(0)
        p.add_(0.03 * row_scale * noise / chi_squared.sqrt())  # Student's t
    return model.state_dict()


@pytest.fixture(scope="module")
def medium():
    """Knobs, state and artifact at the given k of a medium model."""
    hp = medium_hp()
    state = trained_like(hp)
    return hp, state, fit(hp, state, SHA, fast=True)


def test_k_stays_as_given_without_a_target_and_has_an_end(medium):
    hp, state, fitted = medium
    tensors, _ = quantize(hp, state)
    assert fitted.factor == 1.0
    assert (fitted.artifact, fitted.sizes) == pack(hp.model, tensors, SHA, fast=True)
    generous = with_room(hp, 10 * len(fitted.artifact))
    assert fit(generous, state, SHA, fast=True).factor == 1 / 8  # the finest


@pytest.mark.parametrize(
    ("fraction", "fast"),
    [(0.7, True), pytest.param(0.9, False, marks=pytest.mark.slow), (1.0, True), (1.4, True)],
)
def test_the_artifact_is_about_a_thousandth_below_the_target(tmp_path, medium, fraction, fast):
    hp, state, plain = medium
    target = int(fraction * len(plain.artifact))
    fitted = fit(with_room(hp, target), state, SHA, fast=fast)
    assert 0.9985 * target <= len(fitted.artifact) <= target
    assert (fitted.factor < 1) == (fraction > 1)
    assert sum(fitted.sizes.values()) == len(fitted.artifact)
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


def test_the_budget_has_every_role_its_bytes_and_its_entropy(medium):
    _, state, fitted = medium
    header, *lines, total = train_gpt.budget_table(fitted).splitlines()
    assert header.split() == ["role", "weights", "bytes", "bits/weight", "entropy", "floor"]
    assert re.fullmatch(rf"total +{len(fitted.artifact):,}  \(k x 1\.0000\)", total)
    table = {}
    for line in lines:
        role, *cells = line.replace(",", "").split()
        table[role] = [float(cell) for cell in cells]
    assert {role_of(name) for name in state} | {"header", "scales"} <= set(table)
    for role, cells in table.items():
        if len(cells) == 1:
            assert role in ("header", "scales", "float16", "table")
            assert cells == [fitted.sizes[role]]
            continue
        weights, size, bits, floor = cells
        assert weights == sum(t.numel() for name, t in state.items() if role_of(name) == role)
        assert size == fitted.sizes[role]
        assert bits == pytest.approx(8 * size / weights, abs=6e-4)
        if role in ("embedding", "matrix", "expert"):
            assert 0.93 * floor < size < 1.03 * floor


@pytest.mark.parametrize("routing", ["zipf", "learned", "dense"])
def test_a_dry_run_foretells_the_size(routing):
    hp = medium_hp(routing=routing)
    model = make_model(hp, noise=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = len(dry_run(hp, model).artifact)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    actual = len(fit(hp, trained_like(hp), SHA, fast=True).artifact)
    assert expected == pytest.approx(actual, rel=0.1)
    wider = medium_hp(routing=routing, shared_dim=512)
    assert len(dry_run(wider, make_model(wider)).artifact) > 1.05 * actual
    assert "TARGET_BYTES=" in refusal(dry_run, with_room(hp, 1000), model)


# ---- Files ---------------------------------------------------------------------------------------


def test_an_atomic_write_replaces_the_whole_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    for content in (b"a long first version", b"second", b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def full_disk(*args) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["replace", "fsync", "open", "full"])
def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_behind(
    tmp_path, monkeypatch, failing
):
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    if failing == "open":
        monkeypatch.setattr(train_gpt, "open", full_disk, raising=False)
    elif failing == "full" and not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    elif failing == "full":
        (tmp_path / f".file.bin.{os.getpid()}.tmp").symlink_to("/dev/full")
    else:
        monkeypatch.setattr(train_gpt.os, failing, full_disk)
    message = refusal(write_atomically, path, b"new content")
    assert message == f"cannot write {path}: No space left on device"
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
