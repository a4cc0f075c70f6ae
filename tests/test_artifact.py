"""Properties of quantization, the artifact file and its reader.   pytest tests/test_artifact.py"""

import ast
import errno
import hashlib
import itertools
import json
import math
import operator
import os
import struct
import sys
import tracemalloc
from dataclasses import replace
from functools import partial
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import zstandard
from conftest import make_ids, make_model, tiny_hp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import (
    ARTIFACT_MAGIC,
    ARTIFACT_VERSION,
    CHOICES,
    CODECS,
    MAX_PAYLOAD_BYTES,
    MAX_SUBMISSION_BYTES,
    MODEL_KNOBS,
    PREFIX,
    Hyperparameters,
    Refusal,
    compress,
    decompress,
    dequantize,
    dry_run_bytes,
    layout,
    load_artifact,
    pack,
    quant_rule,
    quantize,
    role_of,
    submission_bytes,
    write_atomically,
)

ROOT = Path(train_gpt.__file__).resolve().parent
CPU, SHA = torch.device("cpu"), "ab" * 32
ROUTING, DISPATCH, MU, ACTIVATION = (CHOICES[knob].split() for knob in ("routing", "dispatch", "mu", "activation"))
MODES = [{"routing": r, "dispatch": d, "mu": m} for r, d, m in itertools.product(ROUTING, DISPATCH, MU)]
MODES += [{"activation": activation} for activation in ACTIVATION]
MODES += [{"num_layers": 1}, {"moe_start_layer": 2}, {"rope_dims": 0, "xsa": False}]
MODES += [{"num_layers": 3, "num_experts": 3}]
HALF_ULP = 2.0**-11  # relative rounding error of a normal float16


def label(mode: dict) -> str:
    return "-".join(map(str, mode.values()))


def rows_of(std: float, rows: int = 64, cols: int = 512, seed: int = 0) -> torch.Tensor:
    return std * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


# ---- Quantization ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_symbols_use_the_whole_range_of_their_bits_and_no_more(bits):
    levels = 2 ** (bits - 1) - 1
    symbols, scale = quantize(rows_of(0.02), bits, clip=2.5)
    assert (symbols.dtype, scale.dtype) == (torch.int8, torch.float16)
    assert scale.shape == (64, 1)
    assert symbols.abs().max() == levels
    assert len(symbols.unique()) > 1.3 * levels


@pytest.mark.parametrize("clip", [8.0, 12.85, 20.0])
def test_clip_sets_the_entropy_of_the_symbols(clip):
    symbols, _ = quantize(rows_of(0.02, 256, 2048), 6, clip)
    p = np.bincount(symbols.flatten().numpy() + 31) / symbols.numel()
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum()
    assert entropy == pytest.approx(0.5 * math.log2(2 * math.pi * math.e) - math.log2(clip / 31), abs=0.03)


@pytest.mark.parametrize("outlier", [0.0, 1e3])
@pytest.mark.parametrize("std", [1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("bits", [6, 8])
def test_no_weight_moves_by_more_than_half_a_step(bits, std, outlier):
    weight, levels = rows_of(std), 2 ** (bits - 1) - 1
    weight[:, 7] += outlier * std
    symbols, scale = quantize(weight, bits, 12.85)
    error, step = (dequantize(symbols, scale) - weight).abs(), scale.float()
    assert (error <= step * (0.5 + levels * HALF_ULP)).all()
    assert (error > 0.45 * step).any() or outlier
    reach = torch.maximum(12.85 * weight.std(-1, correction=0), weight.abs().amax(-1))
    torch.testing.assert_close(step[:, 0], reach / levels, rtol=2 * HALF_ULP, atol=0)
    if outlier:
        assert (symbols[:, 7] == levels).all()


@pytest.mark.parametrize("std", [1e-3, 1e-2, 1e-1, 1.0])
def test_relative_error_is_the_same_at_every_scale_of_the_weights(std):
    weight = rows_of(std)

    def relative_error(scale: torch.Tensor) -> float:
        restored = (weight / scale).round().clamp(-31, 31) * scale
        return ((restored - weight).norm() / weight.norm()).item()

    symbols, scale = quantize(weight, 6, 12.85)
    error = ((dequantize(symbols, scale) - weight).norm() / weight.norm()).item()
    assert error == pytest.approx(12.85 / 31 / math.sqrt(12), rel=0.02)
    floored = relative_error(scale.float().clamp(min=1 / 31))  # a floor under the scale would fail this
    assert (floored == pytest.approx(error, rel=0.02)) == (std * 12.85 > 1)


def test_zero_and_constant_rows_are_exact():
    weight = torch.tensor([[0.0], [0.5], [-3e-3], [1.0]]).repeat(1, 32)
    restored = dequantize(*quantize(weight, 6, 12.85))
    assert torch.equal(restored[0], weight[0])
    torch.testing.assert_close(restored, weight, rtol=HALF_ULP, atol=0)
    assert restored[1:].abs().min() > 0


def test_rows_are_quantized_independently_and_deterministically():
    weight = rows_of(0.02, rows=12).view(3, 4, -1)
    symbols, scale = quantize(weight, 6, 12.85)
    again = quantize(weight, 6, 12.85)
    assert torch.equal(symbols, again[0])
    assert torch.equal(scale, again[1])
    other = weight.clone()
    other[1, 2] *= 100
    changed, changed_scale = quantize(other, 6, 12.85)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(changed[same], symbols[same])
    assert torch.equal(changed_scale[same], scale[same])
    assert changed_scale[1, 2] > 50 * scale[1, 2]


def test_requantizing_is_exact_where_an_outlier_sets_the_step_and_else_within_half_a_step():
    weight = rows_of(0.02)
    weight[:32, 7] = 1.0
    symbols, scale = quantize(weight, 6, 12.85)
    restored = dequantize(symbols, scale)
    symbols2, scale2 = quantize(restored, 6, 12.85)
    assert torch.equal(symbols2[:32], symbols[:32])
    assert torch.equal(scale2[:32], scale[:32])
    error = (dequantize(symbols2, scale2) - restored).abs()
    assert (error <= scale2.float() * (0.5 + 31 * HALF_ULP)).all()
    torch.testing.assert_close(scale2.float(), scale.float(), rtol=0.02, atol=0)


@pytest.mark.parametrize("mode", MODES, ids=label)
def test_every_tensor_has_one_rule_and_one_place_in_the_file(mode):
    hp = tiny_hp(**mode, matrix_bits=5, embed_bits=8)
    state = make_model(hp).state_dict()
    parts = {}
    for name, part, dtype, shape in layout(hp, state):
        parts.setdefault(name, {})[part] = (dtype.str, shape)
    assert set(parts) == set(state)
    for name, tensor in state.items():
        shape, rule = tuple(tensor.shape), quant_rule(hp, name)
        quantized = {"symbols": ("|i1", shape), "scales": ("<f2", (*shape[:-1], 1))}
        expected = {
            "embedding": ((8, hp.embed_clip), quantized),
            "vector": (torch.float16, {"kept": ("<f2", shape)}),
            "table": (torch.uint8, {"kept": ("|u1", shape)}),
        }.get(role_of(name), ((5, hp.matrix_clip), quantized))
        assert (rule, parts[name]) == expected, name


# ---- Round trip ------------------------------------------------------------------------------------------------------


def write_artifact(path: Path, hp, model, codec: str = "zstd") -> Path:
    path.write_bytes(compress(pack(hp, model.state_dict(), SHA), codec)[0])
    return path


def expected_state(hp, state: dict) -> dict:
    """What a state dict must be after a trip through the file."""
    expected = {}
    for name, tensor in state.items():
        rule = quant_rule(hp, name)
        if isinstance(rule, tuple):
            expected[name] = dequantize(*quantize(tensor, *rule))
        else:
            expected[name] = tensor.half().float() if rule == torch.float16 else tensor
    return expected


@pytest.mark.parametrize("mode", MODES, ids=label)
@torch.no_grad()
def test_reloaded_model_is_the_dequantized_one_bit_for_bit(tmp_path, mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp), make_ids(hp, 2, 16)
    loaded, loaded_hp, sha = load_artifact(write_artifact(tmp_path / "a.ptz", hp, model), hp, CPU)
    expected = expected_state(hp, model.state_dict())
    state = loaded.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name
    assert (loaded.training, sha) == (False, SHA)
    assert {name: getattr(loaded_hp, name) for name in MODEL_KNOBS} == {name: getattr(hp, name) for name in MODEL_KNOBS}
    original = model(ids)
    model.load_state_dict(expected, strict=True)
    assert torch.equal(loaded(ids), model(ids))
    assert not torch.equal(loaded(ids), original)


@pytest.mark.parametrize("codec", list(CODECS.values()))
def test_every_codec_holds_the_same_payload_and_auto_takes_the_smaller(codec):
    hp = tiny_hp(model_dim=64, shared_dim=128)
    payload = pack(hp, make_model(hp).state_dict(), SHA)
    data, used = compress(payload, codec)
    assert used == codec
    assert decompress(data, Path("x")) == payload
    sizes = {name: len(compress(payload, name)[0]) for name in CODECS.values()}
    auto, used = compress(payload, "auto")
    assert sizes[used] == len(auto) == min(sizes.values())
    assert len(set(sizes.values())) > 1
    assert compress(payload, codec)[0] == data


def test_auto_takes_either_codec_when_it_is_the_smaller(monkeypatch):
    for winner in CODECS.values():
        copies = {name: 1 + (name != winner) for name in CODECS.values()}
        fake = {name: (partial(operator.mul, n), None, None) for name, n in copies.items()}
        monkeypatch.setattr(train_gpt, "import_codec", fake.__getitem__)
        data, used = compress(b"payload", "auto")
        assert (used, len(data)) == (winner, PREFIX.size + 7)


def test_tied_embedding_is_stored_once():
    hp = tiny_hp(vocab_size=256)
    state = make_model(hp).state_dict()
    payload = pack(hp, state, SHA)
    symbols = quantize(state["tok_emb.weight"], hp.embed_bits, hp.embed_clip)[0].numpy().tobytes()
    assert payload.count(symbols) == 1
    assert payload.count(symbols[:64]) == 1
    assert [name for name in state if "emb" in name or "head" in name] == ["tok_emb.weight"]


def test_artifact_brings_its_own_model_knobs_into_any_environment(tmp_path):
    hp = tiny_hp(num_layers=3, mu="lowrank", routing="hash", activation="swiglu", xsa=False, train_seq_len=64)
    model = make_model(hp)
    path = write_artifact(tmp_path / "a.ptz", hp, model)
    environment = Hyperparameters(seed=5, eval_stride=16, micro_batch_tokens=128, dtype="float32")
    assert all(getattr(environment, knob) != getattr(hp, knob) for knob in ("num_layers", "mu", "routing", "xsa"))
    loaded, loaded_hp, _ = load_artifact(path, environment, CPU)
    assert {name: getattr(loaded_hp, name) for name in MODEL_KNOBS} == {name: getattr(hp, name) for name in MODEL_KNOBS}
    kept = ("seed", "eval_stride", "micro_batch_tokens", "dtype", "compile", "device")
    assert all(getattr(loaded_hp, knob) == getattr(environment, knob) for knob in kept)
    ids = make_ids(hp, 2, 16)
    model.load_state_dict(expected_state(hp, model.state_dict()))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e6])
@pytest.mark.parametrize("name", ["mu_init", "blocks.0.mlp.up.weight", "tok_emb.weight"])
def test_weights_that_float16_cannot_hold_are_not_exported(name, bad):
    hp = tiny_hp()
    state = make_model(hp).state_dict()
    pack(hp, state, SHA)
    state[name][..., 1] = bad * (1 if name == "mu_init" else 100)
    with pytest.raises(Refusal, match=name.replace(".", r"\.")):
        pack(hp, state, SHA)


# ---- Damaged files ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample() -> tuple:
    """Knobs, payload and file content of a good artifact."""
    hp = tiny_hp(num_layers=2)
    payload = pack(hp, make_model(hp).state_dict(), SHA)
    return hp, payload, compress(payload, "zstd")[0]


def seal(packed: bytes, size: int, codec: int = 1, version: int = ARTIFACT_VERSION, magic=ARTIFACT_MAGIC) -> bytes:
    """An artifact with a valid checksum around any content."""
    prefix = PREFIX.pack(magic, version, codec, size, bytes(32))
    return prefix[:-32] + hashlib.sha256(prefix + packed).digest() + packed


def reseal(payload: bytes) -> bytes:
    return seal(zstandard.compress(payload), len(payload))


def edited(payload: bytes, edit) -> bytes:
    """The payload with its JSON header changed in place by `edit(header)`, or replaced by what that returns."""
    length = struct.unpack_from("<I", payload)[0]
    header = json.loads(payload[4 : 4 + length])
    result = edit(header)
    text = result if isinstance(result, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + payload[4 + length :]


def assert_refused(path: Path, data: bytes, hp, match: str = ".") -> None:
    path.write_bytes(data)
    with pytest.raises(Refusal, match=match) as refused:
        load_artifact(path, hp, CPU)
    message = str(refused.value)
    assert "\n" not in message, message
    assert str(path) in message, message


def test_untouched_and_resealed_artifacts_load(tmp_path, sample):
    hp, payload, data = sample
    path = tmp_path / "a.ptz"
    for content in (data, reseal(payload), reseal(edited(payload, lambda header: None))):
        path.write_bytes(content)
        load_artifact(path, hp, CPU)


def test_missing_artifact_is_refused(tmp_path):
    for path in (tmp_path / "none.ptz", tmp_path):
        with pytest.raises(Refusal, match="no such artifact"):
            load_artifact(path, tiny_hp(), CPU)


def test_truncated_or_extended_file_is_refused(tmp_path, sample):
    hp, _, data = sample
    path = tmp_path / "a.ptz"
    for length in (0, 1, 8, PREFIX.size - 1, PREFIX.size, PREFIX.size + 1, len(data) // 2, len(data) - 1):
        assert_refused(path, data[:length], hp, "artifact")
    assert_refused(path, data + b"\0", hp, "damaged")


def test_any_flipped_bit_is_refused(tmp_path, sample):
    hp, _, data = sample
    positions = {*range(PREFIX.size), *np.linspace(PREFIX.size, len(data) - 1, 30).astype(int).tolist()}
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        assert_refused(tmp_path / "a.ptz", bytes(damaged), hp)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.floats(0, 1), junk=st.binary(min_size=1, max_size=40), insert=st.booleans(), valid=st.booleans())
def test_random_damage_is_refused_or_harmless(tmp_path, sample, start, junk, insert, valid):
    hp, payload, data = sample
    content = payload if valid else data
    at = int(start * len(content))
    content = content[:at] + junk + content[at if insert else at + len(junk) :]
    path = tmp_path / "a.ptz"
    path.write_bytes(reseal(content) if valid else content)
    same, message = path.read_bytes() == data, ""
    try:
        load_artifact(path, hp, CPU)
    except Refusal as refusal:
        message = str(refusal)
    assert "\n" not in message
    assert str(path) in message or same or (valid and len(content) == len(payload))


def test_foreign_newer_and_oversized_files_are_told_apart(tmp_path, sample):
    hp, payload, _ = sample
    packed, path = zstandard.compress(payload), tmp_path / "a.ptz"
    assert_refused(path, seal(packed, len(payload), magic=b"PK\3\4\0\0\0\0"), hp, "not an artifact")
    assert_refused(path, seal(packed, len(payload), version=ARTIFACT_VERSION + 1), hp, "newer")
    assert_refused(path, seal(packed, len(payload), codec=9), hp, "damaged")
    assert_refused(path, seal(packed, MAX_PAYLOAD_BYTES + 1), hp, "damaged")
    assert_refused(path, seal(packed, 2**63), hp, "damaged")
    assert_refused(path, seal(b"not zstd", len(payload)), hp, "damaged")
    assert_refused(path, seal(b"not brotli", len(payload), codec=2), hp, "damaged")
    assert_refused(path, seal(packed[:-9], len(payload)), hp, "damaged")
    path.write_bytes(seal(packed, len(payload)))
    load_artifact(path, hp, CPU)


@pytest.mark.parametrize("codec", list(CODECS))
def test_payload_of_another_size_than_declared_is_refused(tmp_path, sample, codec):
    hp, payload, _ = sample
    pack_it = {"zstd": zstandard.compress, "brotli": brotli.compress}[CODECS[codec]]
    good = seal(pack_it(payload), len(payload), codec)
    assert decompress(good, Path("x")) == payload
    for size in (4, len(payload) - 1, len(payload) + 1, MAX_PAYLOAD_BYTES):
        assert_refused(tmp_path / "a.ptz", seal(pack_it(payload), size, codec), hp, "damaged")
    for content in (b"", b"ab"):
        assert_refused(tmp_path / "a.ptz", seal(pack_it(content), 100, codec), hp, "damaged")


@pytest.mark.parametrize("codec", list(CODECS))
def test_file_that_unpacks_to_far_more_than_declared_does_not_fill_the_memory(tmp_path, codec):
    bomb = bytes(1 << 26)
    packed = zstandard.compress(bomb) if CODECS[codec] == "zstd" else brotli.compress(bomb, quality=1)
    tracemalloc.start()
    try:
        with pytest.raises(Refusal):
            decompress(seal(packed, 1000, codec), Path("x"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()


def test_zstd_frame_that_announces_an_absurd_size_is_refused(tmp_path):
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 55) + b"\x01\x00\x00"
    assert zstandard.frame_content_size(frame) == 1 << 55
    assert_refused(tmp_path / "a.ptz", seal(frame, 1000), tiny_hp(), "damaged")


def knob(**values):
    return lambda header: header["model"].update(values)


BAD_HEADERS = {
    "no_knob": lambda header: header["model"].pop("num_layers") and None,
    "no_model": lambda header: header.pop("model") and None,
    "no_tokenizer": lambda header: header.pop("tokenizer_sha256") and None,
    "list": lambda header: b"[]",
    "number": lambda header: b"7",
    "not_json": lambda header: b"{",
    "not_utf8": lambda header: b"\xff\xfe\xfd",
    "empty": lambda header: b"",
    "deep": lambda header: b"[" * 100_000,
    "huge_number": lambda header: b'{"model":' + b"9" * 5000 + b"}",
    "string_for_int": knob(num_layers="2"),
    "float_for_int": knob(num_layers=2.0),
    "int_for_float": knob(qk_gain_init=5),
    "int_for_bool": knob(xsa=1),
    "null": knob(model_dim=None),
    "list_for_choice": knob(routing=["zipf"]),
    "nan": knob(qk_gain_init=math.nan),
    "zero_layers": knob(num_layers=0),
    "negative": knob(model_dim=-32),
    "unknown_routing": knob(routing="learned"),
    "heads": knob(num_heads=5),
    "rope": knob(rope_dims=10),
    "huge_vocabulary": knob(vocab_size=1 << 40),
    "other_width": knob(shared_dim=40),
    "one_expert_less": knob(num_experts=3),
    "other_mode": knob(mu="off"),
    "huge_width": knob(shared_dim=1 << 60),
    "beyond_64_bits": knob(model_dim=1 << 70),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path, sample, name):
    hp, payload, _ = sample
    assert_refused(tmp_path / "a.ptz", reseal(edited(payload, BAD_HEADERS[name])), hp)


def test_header_length_beyond_the_file_is_refused(tmp_path, sample):
    hp, payload, _ = sample
    for length in (0, 2**31, 2**32 - 1):
        assert_refused(tmp_path / "a.ptz", reseal(struct.pack("<I", length) + payload[4:]), hp)


@pytest.mark.parametrize("knobs", [{"num_layers": 10**9}, {"shared_dim": 10**12}, {"mu": "lowrank", "mu_rank": 10**12}])
def test_absurd_model_is_refused_before_it_is_built(tmp_path, sample, knobs, monkeypatch):
    def forbidden(hp):
        raise AssertionError("built a model of absurd size")

    hp, payload, _ = sample
    monkeypatch.setattr(train_gpt, "GPT", forbidden)
    assert_refused(tmp_path / "a.ptz", reseal(edited(payload, knob(**knobs))), hp)


def test_tensors_of_the_wrong_size_are_refused(tmp_path, sample):
    hp, payload, _ = sample
    for content in (payload[:-1], payload + b"\0", payload[: len(payload) // 2]):
        assert_refused(tmp_path / "a.ptz", reseal(content), hp, "damaged")


def test_expert_out_of_range_is_refused(tmp_path, sample):
    hp, payload, _ = sample
    assert payload[-1] < hp.num_experts  # the table comes last
    assert_refused(tmp_path / "a.ptz", reseal(payload[:-1] + bytes([hp.num_experts])), hp, "expert")
    (tmp_path / "a.ptz").write_bytes(reseal(payload[:-1] + bytes([hp.num_experts - 1])))
    load_artifact(tmp_path / "a.ptz", hp, CPU)


def test_missing_codec_is_named_and_the_other_still_works(tmp_path, sample, monkeypatch):
    hp, payload, data = sample
    with_brotli = compress(payload, "brotli")[0]
    monkeypatch.setitem(sys.modules, "brotli", None)
    path = tmp_path / "a.ptz"
    path.write_bytes(with_brotli)
    with pytest.raises(Refusal, match="pip install brotli"):
        load_artifact(path, hp, CPU)
    with pytest.raises(Refusal, match="pip install brotli"):
        compress(payload, "auto")
    path.write_bytes(data)
    load_artifact(path, hp, CPU)
    assert compress(payload, "zstd")[0] == data
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(Refusal, match="pip install zstandard"):
        load_artifact(path, hp, CPU)


# ---- Size and files --------------------------------------------------------------------------------------------------


def test_submission_may_have_every_byte_below_the_cap():
    code = sum((ROOT / name).stat().st_size for name in ("train_gpt.py", "eval_sliding.py"))
    assert submission_bytes(tiny_hp(), 1000, "x") == (code, code + 1000)
    free = MAX_SUBMISSION_BYTES - code
    assert MAX_SUBMISSION_BYTES == 16_000_000
    assert submission_bytes(tiny_hp(), free - 1, "artifact") == (code, 15_999_999)
    with pytest.raises(Refusal, match=r"^artifact: .* the cap is 16,000,000"):
        submission_bytes(tiny_hp(), free, "artifact")


def medium_hp(**knobs) -> Hyperparameters:
    sizes = {"vocab_size": 1024, "model_dim": 128, "shared_dim": 256, "expert_dim": 32, "num_layers": 2}
    return tiny_hp(**{**sizes, **knobs})


@pytest.mark.parametrize("routing", ROUTING)
@torch.no_grad()
def test_dry_run_foretells_the_size_of_gaussian_weights(routing):
    hp = medium_hp(routing=routing, codec="zstd")
    model = make_model(hp, noise=0.0)
    expected = dry_run_bytes(hp, model)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if isinstance(quant_rule(hp, name), tuple):
            p.copy_(0.03 * torch.randn(p.shape, generator=generator))
    actual = len(compress(pack(hp, model.state_dict(), SHA), "zstd")[0])
    assert expected == pytest.approx(actual, rel=0.02)
    assert dry_run_bytes(replace(hp, shared_dim=512), make_model(replace(hp, shared_dim=512))) > 1.05 * actual


@torch.no_grad()
def test_dry_run_foretells_the_size_of_trained_weights():
    hp = medium_hp(codec="auto")
    model = make_model(hp, noise=0.0)
    expected = dry_run_bytes(hp, model)
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        if isinstance(quant_rule(hp, name), tuple):  # rows of unequal scale with heavier tails than a Gaussian
            row_scale = (0.5 * torch.randn((*p.shape[:-1], 1), generator=generator)).exp()
            p.copy_(p + 0.03 * row_scale * torch.distributions.StudentT(8.0).sample(p.shape))
        elif p.numel():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    actual = len(compress(pack(hp, model.state_dict(), SHA), "auto")[0])
    assert expected == pytest.approx(actual, rel=0.1)


def names_in(path: Path) -> set[str]:
    """Every module, name, attribute and keyword that a source file uses, dotted where it is an attribute of a name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.name for alias in node.names}
            found |= {node.module or ""} if isinstance(node, ast.ImportFrom) else set()
        elif isinstance(node, ast.Attribute):
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.keyword):
            found.add(node.arg or "")
    return found


def test_no_reader_of_files_can_run_code_from_them():
    sources = [ROOT / "train_gpt.py", ROOT / "eval_sliding.py", *sorted((ROOT / "data").glob("*.py"))]
    assert len(sources) >= 4
    for path in sources:
        unsafe = {"pickle", "cPickle", "torch.load", "np.load", "allow_pickle", "marshal", "shelve", "eval", "exec"}
        assert not names_in(path) & unsafe, path
    assert "torch.save" in names_in(sources[0])


def test_atomic_write_replaces_the_whole_file_and_makes_its_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    for content in (b"a long first version", b"second", b""):
        write_atomically(path, content)
        assert path.read_bytes() == content
        assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


class FullDisk:
    """A file that takes half of what is written to it."""

    def __init__(self, *args):
        self.file = open(*args)  # noqa: SIM115

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["replace", "fsync", "write", "open"])
def test_failed_write_keeps_the_old_content_and_leaves_nothing_behind(tmp_path, monkeypatch, failing):
    def fail(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    with monkeypatch.context() as patch:
        if failing in ("replace", "fsync"):
            patch.setattr(train_gpt.os, failing, fail)
        else:
            opener = fail if failing == "open" else FullDisk
            patch.setattr(train_gpt, "open", opener, raising=False)
        with pytest.raises(Refusal, match=r"cannot write .*file\.bin: No space left on device"):
            write_atomically(path, b"new content")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["file.bin"]
    write_atomically(path, b"new content")
    assert path.read_bytes() == b"new content"
