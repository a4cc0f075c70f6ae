"""Properties of quantization, the artifact file, its size and its reader.   pytest tests/test_artifact.py"""

import ast
import errno
import hashlib
import itertools
import json
import math
import operator
import os
import re
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import brotli
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zstandard
from conftest import make_ids, make_model, tiny_hp
from helpers_hostile import seal, shapes_of, split_artifact
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from make_record import pack_script

import train_gpt
from train_gpt import (
    ARTIFACT_MAGIC,
    ARTIFACT_VERSION,
    CHOICES,
    CODECS,
    GPT,
    MAX_SUBMISSION_BYTES,
    MAX_WEIGHTS,
    MODEL_KNOBS,
    PREFIX,
    ROLES,
    STEPS,
    TABLE_SCORE,
    Fitted,
    Hyperparameters,
    Refusal,
    compress,
    decompress,
    dequantize,
    dry_run,
    entropy_bytes,
    fit,
    layout,
    load_artifact,
    pack,
    quant_rule,
    quantize,
    role_of,
    round_to_nearest,
    step_codes,
    steps_of,
    submission_bytes,
    submission_source,
    write_atomically,
)

ROOT = Path(train_gpt.__file__).resolve().parent
CPU, SHA = torch.device("cpu"), "ab" * 32
ROUTING, DISPATCH, MU, ACTIVATION = (
    CHOICES[knob].split() for knob in ("routing", "dispatch", "mu", "activation")
)
ROUTERS = sorted(TABLE_SCORE)  # these read the stream, and take no grouped dispatch
SHALLOW = {"num_layers": 1, "loop_passes": 1}
MODES = [
    {"routing": r, "dispatch": d, "mu": m} for r, d, m in itertools.product(ROUTING, DISPATCH, MU)
]
MODES = [
    {**mode, "num_layers": 3}
    for mode in MODES
    if mode["routing"] not in ROUTERS or mode["dispatch"] == "masked"
]
MODES += [{"routing": routing, "top_k": 2, "num_layers": 3} for routing in ROUTING]
MODES += [{"routing": "cluster", "top_k": 2, "dispatch": "grouped"}, {"top_k": 2, "num_experts": 2}]
MODES += [{"routing": "learned", "activation": "swiglu", "moe_start_layer": 1}]
MODES += [{"activation": activation} for activation in ACTIVATION]
MODES += [
    {switch: False}
    for switch in ("skip_gates", "attn_gate", "smear_gate", "ln_scale", "routing_per_pass")
]
MODES += [{"loop_passes": 1}, {"loop_passes": 3}, {"moe_start_layer": 2}]
MODES += [
    SHALLOW,
    {**SHALLOW, "routing": "dense", "mu": "off"},
    {"rope_dims": 0, "xsa": False},
    {"num_experts": 3},
]
EVERY_ROLE = {"mu": "lowrank", "routing": "learned"}
OCTAVE_EIGHTH = 2 ** (1 / 8)
HALF_ULP = 2.0**-11  # relative rounding error of a normal float16


def label(mode: dict) -> str:
    return "-".join(f"{knob}_{value}" for knob, value in mode.items())


def rows_of(std: float, rows: int = 64, cols: int = 512, seed: int = 0) -> torch.Tensor:
    return std * torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def nearest(
    weight: torch.Tensor, bits: int = 6, clip: float = 12.85
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 symbols and step codes of a weight rounded to nearest."""
    codes = step_codes(weight, bits, clip)
    return round_to_nearest(weight, steps_of(codes), bits).to(torch.int8), codes


def entropy_bits(symbols: torch.Tensor) -> float:
    """Bits per symbol, from the counts of the values."""
    shares = np.array([*Counter(symbols.flatten().tolist()).values()]) / symbols.numel()
    return float(-(shares * np.log2(shares)).sum())


def some_name(state: dict, role: str) -> str:
    """The last tensor of a role."""
    return [name for name in state if role_of(name) == role][-1]


# ---- Quantization ----------------------------------------------------------------------------------------------------


def test_there_are_256_steps_an_eighth_of_an_octave_apart():
    assert (STEPS.shape, STEPS.dtype) == ((256,), torch.float32)
    assert [STEPS[code].item() for code in (0, 184, 192, 200)] == [2.0**-24, 0.5, 1.0, 2.0]
    torch.testing.assert_close(
        STEPS[1:] / STEPS[:-1], torch.full((255,), OCTAVE_EIGHTH), rtol=1e-6, atol=0
    )
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128, 1)
    assert torch.equal(steps_of(codes).flatten(), STEPS)
    symbols = torch.full((2, 128, 3), -5, dtype=torch.int8)
    assert torch.equal(dequantize(symbols, codes), -5.0 * STEPS.view(2, 128, 1).expand(2, 128, 3))


@pytest.mark.parametrize("outlier", [0.0, 30.0, 1e3])
@pytest.mark.parametrize("std", [1e-4, 0.02, 1.0])
@pytest.mark.parametrize(("bits", "clip"), [(6, 12.85), (6, 1.0), (8, 12.85), (8, 0.0), (4, 3.0)])
def test_a_step_is_what_k_asks_for_or_what_the_largest_weight_needs(bits, clip, std, outlier):
    weight, levels = rows_of(std), 2 ** (bits - 1) - 1
    weight[:, 7] += outlier * std
    symbols, codes = nearest(weight, bits, clip)
    assert (symbols.dtype, codes.dtype, codes.shape) == (torch.int8, torch.uint8, (64, 1))
    step, largest = steps_of(codes), weight.abs().amax(-1, keepdim=True)
    typical = clip * weight.std(-1, correction=0, keepdim=True) / levels
    assert (levels * step * OCTAVE_EIGHTH**0.00101 >= largest).all()
    assert ((dequantize(symbols, codes) - weight).abs() <= step * (0.5 + 1e-4 * levels)).all()
    by_k = step <= typical * 1.045
    assert (step[by_k] >= typical[by_k] / 1.045).all()
    assert (
        levels * step[~by_k] / OCTAVE_EIGHTH < largest[~by_k]
    ).all()  # the next smaller one would not do
    expected = clip * std / levels > 1.1 * (outlier + 5) * std / levels
    assert by_k.all() if expected else not by_k.all()
    if not outlier:
        assert ((dequantize(symbols, codes) - weight).abs() > 0.45 * step).any()


def test_a_weight_that_just_fits_gets_the_step_that_it_fits():
    codes = torch.arange(60, 250, dtype=torch.uint8)[:, None]
    weight = torch.tensor([31.0, 0.0, -1.0]) * steps_of(codes)
    symbols, again = nearest(weight, 6, 0.0)
    assert torch.equal(again, codes)
    assert torch.equal(dequantize(symbols, codes), weight)
    larger = step_codes(weight * 1.001, 6, 0.0)
    assert torch.equal(larger.int(), codes.int() + 1)


@pytest.mark.parametrize("bits", [5, 6, 7, 8])
def test_symbols_use_the_whole_range_of_their_bits_and_no_more(bits):
    levels = 2 ** (bits - 1) - 1
    symbols, _ = nearest(rows_of(0.02, 256), bits, clip=2.5)
    assert symbols.abs().max() == levels
    assert symbols.min() == -levels
    assert len(symbols.unique()) > 1.3 * levels


@pytest.mark.parametrize("clip", [8.0, 12.85, 20.0])
def test_k_sets_the_entropy_of_the_symbols(clip):
    weight = rows_of(0.02, 128, 2048)
    symbols, codes = nearest(weight, 6, clip)
    gaussian = 0.5 * math.log2(2 * math.pi * math.e)
    assert entropy_bits(symbols) == pytest.approx(
        gaussian - (steps_of(codes) / 0.02).log2().mean().item(), abs=0.04
    )
    assert entropy_bits(symbols) == pytest.approx(
        gaussian - math.log2(clip / 31), abs=0.04 + 1 / 16
    )
    assert entropy_bytes(symbols) == pytest.approx(
        entropy_bits(symbols) * symbols.numel() / 8, rel=1e-9
    )


def test_entropy_floor_of_special_symbols():
    for values, bits in ([0] * 64, 0), ([-127, 127] * 32, 1), ([*range(-32, 32)], 6), ([], 0):
        assert entropy_bytes(torch.tensor(values, dtype=torch.int8)) == pytest.approx(
            bits * len(values) / 8
        )


@pytest.mark.parametrize("std", [1e-3, 1e-2, 1e-1, 1.0])
def test_relative_error_is_the_same_at_every_scale_of_the_weights(std):
    weight = rows_of(std)
    error = (dequantize(*nearest(weight)) - weight).norm() / weight.norm()
    assert error.item() == pytest.approx(12.85 / 31 / math.sqrt(12), rel=0.05)
    symbols, codes = nearest(weight)
    for octaves in (-8, -1, 3):
        shifted = nearest(weight * 2.0**octaves)
        assert torch.equal(shifted[0], symbols)
        assert torch.equal(shifted[1].int(), codes.int() + 8 * octaves)


def test_zero_rows_are_exact_and_constant_rows_within_half_a_step():
    weight = torch.tensor([[0.0], [0.5], [-3e-3], [1.0]]).repeat(1, 32)
    symbols, codes = nearest(weight)
    restored = dequantize(symbols, codes)
    assert torch.equal(restored[0], weight[0])
    assert ((restored - weight).abs() <= steps_of(codes) / 2).all()
    torch.testing.assert_close(restored, weight, rtol=0.02, atol=0)
    assert symbols[1:].abs().min() >= 28


def test_rows_are_quantized_independently_and_deterministically():
    weight = rows_of(0.02, rows=12).view(3, 4, -1)
    symbols, codes = nearest(weight)
    assert codes.shape == (3, 4, 1)
    for part, again in zip((symbols, codes), nearest(weight), strict=True):
        assert torch.equal(part, again)
    other = weight.clone()
    other[1, 2] *= 100
    changed, changed_codes = nearest(other)
    same = torch.ones(3, 4, dtype=torch.bool)
    same[1, 2] = False
    assert torch.equal(changed[same], symbols[same])
    assert torch.equal(changed_codes[same], codes[same])
    assert steps_of(changed_codes)[1, 2] > 50 * steps_of(codes)[1, 2]
    for expert in range(3):
        assert torch.equal(nearest(weight[expert])[0], symbols[expert])


def test_requantizing_is_exact_where_an_outlier_sets_the_step_and_else_within_half_a_step():
    weight = rows_of(0.02)
    weight[:32, 7] = 1.0
    symbols, codes = nearest(weight)
    restored = dequantize(symbols, codes)
    symbols2, codes2 = nearest(restored)
    assert torch.equal(symbols2[:32], symbols[:32])
    assert torch.equal(codes2[:32], codes[:32])
    assert (
        (dequantize(symbols2, codes2) - restored).abs() <= steps_of(codes2) * (0.5 + 1e-3)
    ).all()
    assert (codes2.int() - codes.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "mode", [EVERY_ROLE, *MODES[::5], {"routing": "dense", "mu": "full"}, SHALLOW], ids=label
)
def test_every_tensor_is_quantized_by_the_rule_of_its_role(mode):
    hp = tiny_hp(**mode, matrix_bits=5, embed_bits=7)
    state = make_model(hp).state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    parts, unusable = quantize(hp, state)
    assert (list(parts), unusable) == (list(state), [])
    for name, tensor in state.items():
        assert torch.equal(tensor, before[name])
        role = role_of(name)
        if role == "table":
            assert quant_rule(hp, name) is None
            assert torch.equal(*parts[name], tensor)
        elif role == "router":
            assert quant_rule(hp, name) is None
            assert parts[name][0].dtype == torch.float16
            assert torch.equal(*parts[name], tensor.half())
        elif len(parts[name]) == 1:
            assert role == "vector"
            assert torch.equal(*parts[name], tensor.half())
        else:
            special = {"embedding": (7, hp.embed_clip), "vector": (8, 0.0)}
            rule = special.get(role, (5, hp.matrix_clip))
            assert quant_rule(hp, name) == rule
            gains = [torch.full(tensor.shape[-1:], 192, dtype=torch.uint8)] * (
                role == "embedding"
            )  # factors of 1
            for part, expected in zip(parts[name], [*nearest(tensor, *rule), *gains], strict=True):
                assert part.dtype == expected.dtype
                assert torch.equal(part, expected), name


@pytest.mark.parametrize("factor", [0.125, 0.5, 1.0, 2.0, 4.0])
def test_a_factor_multiplies_every_k_and_no_vector(factor):
    hp = tiny_hp(**EVERY_ROLE, matrix_clip=100.0, embed_clip=100.0)  # no outlier decides
    state = make_model(hp, noise=0.02).state_dict()
    plain, scaled = quantize(hp, state)[0], quantize(hp, state, factor)[0]
    roles = {role_of(name) for name in state if len(plain[name]) > 1}
    assert roles == set(ROLES) - {"table", "router"}
    for name, parts in plain.items():
        octaves = 0 if role_of(name) == "vector" else math.log2(factor)
        if len(parts) > 1:
            assert torch.equal(scaled[name][1].int(), parts[1].int() + round(8 * octaves)), name
        else:
            assert torch.equal(*scaled[name], *parts)


@pytest.mark.parametrize(
    "name", ["mu_init", "skip_weights", "blocks.0.attn.q_gain", "blocks.0.attn.gate"]
)
def test_vectors_take_a_byte_unless_that_changes_them_by_a_hundredth(name):
    hp = tiny_hp()
    shape, generator = make_model(hp).state_dict()[name].shape, torch.Generator().manual_seed(0)
    plain = 0.1 * torch.randn(shape, generator=generator)
    symbols, codes = quantize(hp, {name: plain})[0][name]
    assert (symbols.shape, codes.shape) == (shape, (*shape[:-1], 1))
    assert (symbols.abs().amax(-1) >= 115).all()
    assert 0 < (dequantize(symbols, codes) - plain).norm() <= 0.01 * plain.norm()
    if shape[-1] < 12:  # so few cannot be off by that much
        return
    uneven = 0.034 + 0.001 * plain
    uneven[..., 3] = 10.0  # whose step takes all others to zero
    (kept,) = quantize(hp, {name: uneven})[0][name]
    as_bytes = dequantize(*nearest(uneven, 8, 0.0))
    assert (as_bytes - uneven).norm() > 0.01 * uneven.norm()
    assert kept.dtype == torch.float16
    assert ((kept.float() - uneven).abs() <= HALF_ULP * uneven.abs() + 2.0**-25).all()


@pytest.mark.parametrize("role", [role for role in ROLES if role != "table"])
def test_weights_that_are_not_finite_or_too_large_are_not_exported(role):
    hp = tiny_hp(**EVERY_ROLE)
    state = make_model(hp).state_dict()
    name = some_name(state, role)
    largest = 2047.0 if role != "router" else 60_000.0  # float16
    state[name].view(-1)[1] = largest
    quantize(hp, state)
    for bad in (math.nan, math.inf, -math.inf, 16 * largest, -16 * largest, 1e30):
        state[name].view(-1)[1] = bad
        with pytest.raises(Refusal, match=rf"^{re.escape(name)}: .*nothing exported$"):
            quantize(hp, state)


# ---- Layout ----------------------------------------------------------------------------------------------------------


def write_artifact(path: Path, hp: Hyperparameters, model: GPT, codec: str = "zstd") -> Path:
    path.write_bytes(pack(hp, quantize(hp, model.state_dict())[0], SHA, codec)[0])
    return path


def plan_of(hp: Hyperparameters, data: bytes) -> dict[str, list]:
    return layout(shapes_of(hp), split_artifact(data)[0]["storage"])


STORED_AS = dict.fromkeys(("embedding", "matrix", "expert", "mu_matrix"), "q") | {
    "vector": "qh",
    "router": "h",
}
STORED_AS |= {"table": "t"}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "mode", [EVERY_ROLE, *MODES[::3], {"routing": "dense", "mu": "full"}, SHALLOW], ids=label
)
def test_every_tensor_has_exactly_one_place_in_the_file(mode, last):
    shapes = shapes_of(tiny_hp(**mode))
    storage = "".join(
        STORED_AS[role_of(name)][-last] for name in shapes
    )  # every first choice, or every last
    places = {}
    for stream, entries in layout(shapes, storage).items():
        for name, part, dtype, shape in entries:
            assert part not in places.setdefault(name, {})
            places[name][part] = (stream, dtype.str, shape)
    assert list(places) == [name for name in places if name in shapes]
    assert set(places) == set(shapes)
    for (name, shape), kind in zip(shapes.items(), storage, strict=True):
        steps = {"codes": ("steps", "|u1", (*shape[:-1], 1))}
        steps |= {"gains": ("steps", "|u1", shape[-1:])} if role_of(name) == "embedding" else {}
        expected = {
            "t": {"kept": ("table", "|u1", shape)},
            "h": {"kept": ("float16", "<f2", shape)},
            "q": steps
            | {"symbols": ("vector" if role_of(name) == "vector" else name, "|i1", shape)},
        }
        assert places[name] == expected[kind]


@pytest.mark.parametrize("role", ROLES)
def test_storage_that_a_tensor_cannot_have_is_an_error(role):
    shapes = shapes_of(tiny_hp(**EVERY_ROLE))
    letters, place = (
        [STORED_AS[role_of(name)][0] for name in shapes],
        [*shapes].index(some_name(shapes, role)),
    )
    for kind in "qhtrcQx ":
        text = "".join([*letters[:place], kind, *letters[place + 1 :]])
        if kind in STORED_AS[role]:
            assert layout(shapes, text)
        else:
            with pytest.raises(
                ValueError, match=rf"{re.escape(some_name(shapes, role))} cannot be stored as"
            ):
                layout(shapes, text)
    for text in ("", "".join(letters[:-1]), "".join(letters) + "q"):
        with pytest.raises(ValueError, match="argument 2 is"):
            layout(shapes, text)


# ---- Round trip ------------------------------------------------------------------------------------------------------


def restored(parts: dict) -> dict[str, torch.Tensor]:
    """What the tensors of a model must be after a trip through the file."""
    state = {name: dequantize(*p) if len(p) > 1 else p[0] for name, p in parts.items()}
    return {
        name: tensor.float() if tensor.dtype == torch.float16 else tensor
        for name, tensor in state.items()
    }


def assert_restored(
    path: Path, hp: Hyperparameters, parts: dict
) -> tuple[GPT, Hyperparameters, str]:
    """What the reader returns, whose model must be that of the parts bit for bit."""
    loaded, loaded_hp, sha = load_artifact(path, hp, CPU)
    state, expected = loaded.state_dict(), restored(parts)
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert state[name].dtype == tensor.dtype, name
        assert state[name].is_contiguous(), name
        assert torch.equal(state[name], tensor), name
    return loaded, loaded_hp, sha


@pytest.mark.parametrize("mode", [*MODES, EVERY_ROLE], ids=label)
@torch.no_grad()
def test_reloaded_model_is_the_dequantized_one_bit_for_bit(tmp_path, mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp), make_ids(hp, 2, 16)
    parts, _ = quantize(hp, model.state_dict())
    (tmp_path / "a.ptz").write_bytes(pack(hp, parts, SHA, "zstd")[0])
    loaded, loaded_hp, sha = assert_restored(tmp_path / "a.ptz", hp, parts)
    assert (loaded.training, sha) == (False, SHA)
    assert {name: getattr(loaded_hp, name) for name in MODEL_KNOBS} == {
        name: getattr(hp, name) for name in MODEL_KNOBS
    }
    original = model(ids)
    model.load_state_dict(restored(parts), strict=True)
    assert torch.equal(loaded(ids), model(ids))
    assert not torch.equal(loaded(ids), original)


@pytest.mark.parametrize("codec", ["zstd", "auto"])
def test_a_matrix_fills_a_stream_of_its_own_and_the_small_ones_share_theirs(tmp_path, codec):
    """One stream for each table of frequencies that a coder may use."""
    hp = tiny_hp(**EVERY_ROLE)
    state = make_model(hp).state_dict()
    parts, _ = quantize(hp, state)
    (tmp_path / "a.ptz").write_bytes(pack(hp, parts, SHA, codec)[0])
    data = (tmp_path / "a.ptz").read_bytes()
    header, streams = split_artifact(data)
    packed = dict(zip(plan_of(hp, data), zip(header["streams"], streams, strict=True), strict=True))
    alone = [
        name for name in state if role_of(name) in ("embedding", "matrix", "expert", "mu_matrix")
    ]
    assert set(packed) - set(alone) <= {"vector", "steps", "float16", "table"}
    for name in alone:
        number, content = compress(parts[name][0].numpy().tobytes(), codec)
        assert packed[name] == ([number, len(content)], content), name
    assert_restored(tmp_path / "a.ptz", hp, parts)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    top_k=st.integers(1, 2),
    half=st.booleans(),
    levels=st.sampled_from([0, 1, 31, 127]),
)
def test_any_symbols_and_steps_come_back(tmp_path, seed, top_k, half, levels):
    hp = tiny_hp(**EVERY_ROLE, num_layers=2, top_k=top_k)
    rng, parts = np.random.default_rng(seed), {}
    for name, shape in shapes_of(hp).items():
        symbols = rng.integers(-levels, levels, shape, np.int8, endpoint=True)
        codes = rng.integers(0, 256, (*shape[:-1], 1), np.uint8)
        experts = rng.permuted(
            np.tile(np.arange(hp.num_experts, dtype=np.uint8), (*shape[:-1], 1)), axis=-1
        )
        kept = {"table": np.ascontiguousarray(experts[..., :top_k])}
        float16 = ("router", "vector") if half else ("router",)
        kept |= {role: rng.normal(size=shape).astype(np.float16) for role in float16}
        gains = [rng.integers(0, 256, shape[-1:], np.uint8)] * (role_of(name) == "embedding")
        part = (kept[role_of(name)],) if role_of(name) in kept else (symbols, codes, *gains)
        parts[name] = tuple(map(torch.from_numpy, part))
    data, sizes = pack(hp, parts, SHA, "zstd")
    assert sum(sizes.values()) == len(data)
    assert {"table", "float16", "steps"} <= set(sizes)
    assert ("vector" in sizes) != half
    (tmp_path / "a.ptz").write_bytes(data)
    assert_restored(tmp_path / "a.ptz", hp, parts)


@pytest.mark.parametrize(
    "mode", [EVERY_ROLE, {"routing": "dense", "mu": "off"}, {"mu": "pid"}, SHALLOW], ids=label
)
def test_sizes_by_role_are_those_of_the_streams_and_sum_to_the_file(mode):
    hp = tiny_hp(**mode)
    state = make_model(hp).state_dict()
    data, sizes = pack(hp, quantize(hp, state)[0], SHA, "zstd")
    header, streams = split_artifact(data)
    assert {role_of(name) for name in state} - {"vector", "router"} <= set(sizes)
    expected = {"header": len(data) - sum(map(len, streams))}
    for stream, packed in zip(plan_of(hp, data), streams, strict=True):
        role = role_of(stream) if stream in state else stream
        expected[role] = expected.get(role, 0) + len(packed)
    assert sizes == expected
    assert sum(sizes.values()) == len(data)
    assert set(header) == {"model", "tokenizer_sha256", "storage", "streams"}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["learned", "hybrid"])
@torch.no_grad()
def test_a_reloaded_router_is_float16_and_chooses_the_same_experts(tmp_path, routing, top_k):
    """Of the same inputs; only where two experts are as good as equal may the rounding decide between them."""
    hp, inputs = tiny_hp(routing=routing, top_k=top_k), []
    model, ids = make_model(hp, noise=0.5), make_ids(hp, 64, 16)
    loaded, _, _ = load_artifact(write_artifact(tmp_path / "a.ptz", hp, model), hp, CPU)
    for layer, block in enumerate(loaded.blocks):
        block.mlp.register_forward_pre_hook(
            lambda mlp, args, layer=layer: inputs.append((layer, *args))
        )
    loaded(ids)
    assert len(inputs) == len(hp.execution_order(True))
    moved, used = 0, []
    for layer, x, (table,) in inputs:
        exact, stored = model.blocks[layer].mlp.router, loaded.blocks[layer].mlp.router
        assert torch.equal(stored, exact.half().float())
        assert not torch.equal(stored, exact)
        scores = F.linear(x, exact) + TABLE_SCORE[routing] * table
        ranked = scores.sort(-1, descending=True).values
        sure = ranked[..., top_k - 1] - ranked[
            ..., top_k
        ] > 4 * HALF_ULP * x.abs() @ exact.abs().amax(0)
        chosen, before = (m.blocks[layer].mlp.choose(x, table)[0].round() for m in (loaded, model))
        assert torch.equal(chosen[sure], before[sure])
        assert (chosen.sum(-1) == top_k).all()
        moved += int((chosen != before).any(-1).sum())
        used.append((chosen.mean((0, 1)) > 0.01).sum())
    assert moved < 0.005 * len(inputs) * ids.numel()
    assert sum(used) > 0.9 * hp.num_experts * len(inputs)  # it is a choice


@pytest.mark.parametrize("routing", [routing for routing in ROUTING if routing != "dense"])
def test_both_experts_of_every_token_come_back(tmp_path, routing):
    hp = tiny_hp(routing=routing, top_k=2, moe_start_layer=1)
    model = make_model(hp)
    table = load_artifact(write_artifact(tmp_path / "a.ptz", hp, model), hp, CPU)[0].expert_table
    assert (table.shape, table.dtype) == ((3, 64, 2), torch.uint8)
    assert torch.equal(table, model.expert_table)
    assert (table[..., 0] != table[..., 1]).all()


def test_tied_embedding_is_stored_once():
    hp = tiny_hp(vocab_size=256)
    state = make_model(hp).state_dict()
    parts, _ = quantize(hp, state)
    data, _ = pack(hp, parts, SHA, "zstd")
    header, streams = split_artifact(data)
    unpacked = [
        decompress(
            stream,
            number,
            sum(math.prod(shape) * dtype.itemsize for *_, dtype, shape in entries),
            Path("x"),
        )
        for entries, stream, (number, _) in zip(
            plan_of(hp, data).values(), streams, header["streams"], strict=True
        )
    ]
    symbols = parts["tok_emb.weight"][0].numpy().tobytes()
    assert b"".join(unpacked).count(symbols) == 1
    assert b"".join(unpacked).count(symbols[:64]) == 1
    assert [name for name in state if "emb" in name or "head" in name] == ["tok_emb.weight"]


def test_artifact_brings_its_own_model_knobs_into_any_environment(tmp_path):
    hp = tiny_hp(
        num_layers=3, mu="lowrank", routing="hash", activation="swiglu", xsa=False, train_seq_len=64
    )
    model = make_model(hp)
    path = write_artifact(tmp_path / "a.ptz", hp, model)
    environment = Hyperparameters(seed=5, eval_stride=16, micro_batch_tokens=128, dtype="float32")
    assert all(
        getattr(environment, knob) != getattr(hp, knob)
        for knob in ("num_layers", "mu", "routing", "xsa")
    )
    loaded, loaded_hp, _ = load_artifact(path, environment, CPU)
    assert {name: getattr(loaded_hp, name) for name in MODEL_KNOBS} == {
        name: getattr(hp, name) for name in MODEL_KNOBS
    }
    kept = (
        "seed",
        "eval_stride",
        "micro_batch_tokens",
        "dtype",
        "compile",
        "device",
        "matrix_clip",
        "target_bytes",
    )
    assert all(getattr(loaded_hp, knob) == getattr(environment, knob) for knob in kept)
    ids = make_ids(hp, 2, 16)
    model.load_state_dict(restored(quantize(hp, model.state_dict())[0]))
    with torch.no_grad():
        assert torch.equal(loaded(ids), model(ids))


@pytest.mark.parametrize(
    "mode", [{}, *({"routing": r, "top_k": 2} for r in ("cluster", *ROUTERS))], ids=label
)
def test_the_same_weights_make_the_same_file(mode):
    hp = tiny_hp(**mode)
    first, again = (
        pack(hp, quantize(hp, make_model(hp).state_dict())[0], SHA, "auto")[0] for _ in range(2)
    )
    assert first == again
    other = pack(hp, quantize(hp, make_model(hp, noise=0.2).state_dict())[0], SHA, "auto")[0]
    assert first != other


# ---- Codecs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", list(CODECS.values()))
def test_every_codec_returns_what_it_got_and_auto_takes_the_smaller(codec):
    payload = nearest(rows_of(0.02))[0].numpy().tobytes()
    number, data = compress(payload, codec)
    assert CODECS[number] == codec
    assert decompress(data, number, len(payload), Path("x")) == payload
    assert compress(payload, codec) == (number, data)
    sizes = {number: len(compress(payload, name)[1]) for number, name in CODECS.items()}
    used, auto = compress(payload, "auto")
    assert sizes[used] == len(auto) == min(sizes.values())
    assert len(set(sizes.values())) > 1
    for empty in (compress(b"", codec), compress(b"", "auto")):
        assert decompress(empty[1], empty[0], 0, Path("x")) == b""


def test_auto_takes_either_codec_when_it_is_the_smaller(monkeypatch):
    for winner in CODECS.values():
        copies = {name: 1 + (name != winner) for name in CODECS.values()}
        fake = {name: (partial(operator.mul, n), None, None) for name, n in copies.items()}
        monkeypatch.setattr(train_gpt, "import_codec", fake.__getitem__)
        number, data = compress(b"payload", "auto")
        assert (CODECS[number], data) == (winner, b"payload")


@pytest.mark.parametrize("codec", list(CODECS.values()))
def test_a_file_is_written_by_the_codec_asked_for(codec):
    hp = tiny_hp(num_layers=2)
    data, _ = pack(hp, quantize(hp, make_model(hp).state_dict())[0], SHA, codec)
    assert {CODECS[number] for number, _ in split_artifact(data)[0]["streams"]} == {codec}


# ---- Damaged files ---------------------------------------------------------------------------------------------------


SAMPLE = {"num_layers": 2, "routing": "learned", "top_k": 2}


@pytest.fixture(scope="module")
def sample() -> tuple[Hyperparameters, bytes]:
    """Knobs and content of a good artifact that has streams of every kind."""
    hp = tiny_hp(**SAMPLE)
    state = make_model(hp).state_dict()
    state["mu_init"][:] = torch.cat(
        [torch.full((1,), 10.0), torch.full((hp.model_dim - 1,), 0.034)]
    )
    data, sizes = pack(hp, quantize(hp, state)[0], SHA, "zstd")
    assert {"vector", "steps", "table", "float16", "embedding", "matrix", "expert"} <= set(sizes)
    return hp, data


def edited(data: bytes, edit: Callable) -> bytes:
    """The artifact with its JSON header changed in place by `edit(header)`, or replaced by what that returns."""
    header, streams = split_artifact(data)
    result = edit(header)
    return seal(
        result if isinstance(result, bytes) else json.dumps(header).encode(), b"".join(streams)
    )


def with_streams(data: bytes, streams: list[tuple[int, bytes]]) -> bytes:
    """The artifact with other (codec, content) streams, rightly declared."""
    header = split_artifact(data)[0] | {
        "streams": [(number, len(stream)) for number, stream in streams]
    }
    return seal(json.dumps(header).encode(), b"".join(stream for _, stream in streams))


def replaced(
    hp: Hyperparameters, data: bytes, name: str, change: Callable[[bytes], tuple[int, bytes]]
) -> bytes:
    """The artifact with the stream `name` replaced by the (codec, content) that `change` makes of its payload."""
    header, streams = split_artifact(data)
    numbered = [
        (number, stream) for (number, _), stream in zip(header["streams"], streams, strict=True)
    ]
    at = [*plan_of(hp, data)].index(name)
    numbered[at] = change(zstandard.ZstdDecompressor().decompress(numbered[at][1]))
    return with_streams(data, numbered)


def rezipped(change: Callable[[bytes], bytes]) -> Callable[[bytes], tuple[int, bytes]]:
    return lambda payload: (1, zstandard.compress(change(payload)))


def assert_refused(path: Path, data: bytes, hp: Hyperparameters, match: str = ".") -> None:
    path.write_bytes(data)
    with pytest.raises(Refusal, match=match) as refused:
        load_artifact(path, hp, CPU)
    message = str(refused.value)
    assert "\n" not in message, message
    assert str(path) in message, message


def test_untouched_and_resealed_artifacts_load(tmp_path, sample):
    hp, data = sample
    path, same = tmp_path / "a.ptz", rezipped(lambda payload: payload)
    for content in (
        data,
        edited(data, lambda header: None),
        *(replaced(hp, data, n, same) for n in plan_of(hp, data)),
    ):
        path.write_bytes(content)
        load_artifact(path, hp, CPU)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_refused(bad, tmp_path, sample):
    hp, data = sample
    half = struct.pack("<e", bad)
    hostile = replaced(hp, data, "float16", rezipped(lambda payload: payload[:-2] + half))
    assert_refused(tmp_path / "a.ptz", hostile, hp, "a weight is not finite")


def test_missing_artifact_is_refused(tmp_path):
    for path in (tmp_path / "none.ptz", tmp_path):
        with pytest.raises(Refusal, match="no such artifact"):
            load_artifact(path, tiny_hp(), CPU)


def test_truncated_or_extended_file_is_refused(tmp_path, sample):
    hp, data = sample
    path = tmp_path / "a.ptz"
    for length in (
        0,
        1,
        8,
        PREFIX.size - 1,
        PREFIX.size,
        PREFIX.size + 1,
        len(data) // 2,
        len(data) - 1,
    ):
        assert_refused(path, data[:length], hp, "artifact")
    assert_refused(path, data + b"\0", hp, "damaged")


def test_streams_cut_or_extended_under_a_valid_checksum_are_refused(tmp_path, sample):
    hp, data = sample
    header, streams = split_artifact(data)
    text, body = json.dumps(header).encode(), b"".join(streams)
    for content in (b"", body[:1], body[:-1], body + b"\0", body * 2):
        assert_refused(tmp_path / "a.ptz", seal(text, content), hp, "damaged")


def test_any_flipped_bit_is_refused(tmp_path, sample):
    hp, data = sample
    positions = {
        *range(PREFIX.size),
        *np.linspace(PREFIX.size, len(data) - 1, 40).astype(int).tolist(),
    }
    for position in positions:
        damaged = bytearray(data)
        damaged[position] ^= 1 << (position % 8)
        assert_refused(tmp_path / "a.ptz", bytes(damaged), hp)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    at=st.floats(0, 1, exclude_max=True),
    junk=st.binary(min_size=1, max_size=9),
    which=st.integers(0, 99),
)
def test_random_damage_inside_a_stream_is_refused_or_changes_only_values(
    tmp_path, sample, at, junk, which
):
    hp, data = sample

    def hurt(payload: bytes) -> bytes:
        start = int(at * len(payload))
        return (payload[:start] + junk + payload[start + len(junk) :])[: len(payload)]

    names = [*plan_of(hp, data)]
    (tmp_path / "a.ptz").write_bytes(replaced(hp, data, names[which % len(names)], rezipped(hurt)))
    try:
        loaded = load_artifact(tmp_path / "a.ptz", hp, CPU)[0]
    except Refusal as refusal:
        outcome = str(refusal)
    else:
        outcome = {name: tuple(t.shape) for name, t in loaded.state_dict().items()}
    assert outcome == shapes_of(hp) or re.search(
        "expert out of range|a weight is not finite", str(outcome)
    )


def test_foreign_files_and_other_versions_are_told_apart(tmp_path, sample):
    hp, data = sample
    header, streams = split_artifact(data)
    content, path = (json.dumps(header).encode(), b"".join(streams)), tmp_path / "a.ptz"
    assert_refused(path, seal(*content, magic=b"PK\3\4\0\0\0\0"), hp, "not an artifact")
    assert ARTIFACT_VERSION == 3  # as of tables of K experts, routers, and storage by rows alone
    for version in (0, 1, 2, 4, 65_535):
        expected = f"artifact version {version}, this trainer reads {ARTIFACT_VERSION}"
        assert_refused(path, seal(*content, version=version), hp, expected)
    path.write_bytes(seal(*content))
    load_artifact(path, hp, CPU)


def nth(count: int, value: object) -> Callable:
    """An edit of the header that sets the n-th stream's entry."""
    return lambda header: operator.setitem(header["streams"], count, value)


def size_of_first(change: Callable[[int], object]) -> Callable:
    return lambda header: operator.setitem(header["streams"][0], 1, change(header["streams"][0][1]))


def swap_sizes(header: dict) -> None:
    first, second = header["streams"][:2]
    assert first[1] != second[1]
    first[1], second[1] = second[1], first[1]


def shift_sizes(header: dict) -> None:
    header["streams"][0][1] += header["streams"][1][1] + 1
    header["streams"][1][1] = -1


BAD_STREAMS = {
    "one_more_byte": size_of_first(lambda size: size + 1),
    "one_byte_less": size_of_first(lambda size: size - 1),
    "negative_size": size_of_first(lambda size: -size),
    "negative_size_but_right_sum": shift_sizes,
    "swapped": swap_sizes,
    "huge": size_of_first(lambda size: 1 << 62),
    "beyond_64_bits": size_of_first(lambda size: 10**4000),
    "infinite": size_of_first(lambda size: math.inf),
    "nan": size_of_first(lambda size: math.nan),
    "null": size_of_first(lambda size: None),
    "word": size_of_first(lambda size: "x"),
    "list": size_of_first(lambda size: [size]),
    "no_codec_9": lambda header: operator.setitem(header["streams"][0], 0, 9),
    "no_codec_0": lambda header: operator.setitem(header["streams"][0], 0, 0),
    "negative_codec": lambda header: operator.setitem(header["streams"][0], 0, -1),
    "infinite_codec": lambda header: operator.setitem(header["streams"][0], 0, math.inf),
    "other_codec": lambda header: operator.setitem(header["streams"][0], 0, 2),
    "triple": nth(0, [1, 2, 3]),
    "single": nth(0, [1]),
    "number": nth(0, 7),
    "one_less": lambda header: header["streams"].pop() and None,
    "one_empty_more": lambda header: header["streams"].append([1, 0]),
    "none_left": lambda header: header.update(streams=[]),
    "no_list": lambda header: header.update(streams=5),
    "many": lambda header: header.update(streams=[[1, 0]] * 100_000),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_bad_list_of_streams_is_refused(tmp_path, sample, name):
    hp, data = sample
    expected = "streams do not fill it" if name.startswith("negative_s") else "damaged"
    assert_refused(tmp_path / "a.ptz", edited(data, BAD_STREAMS[name]), hp, expected)


def letter(name: str, kind: object) -> Callable:
    """An edit of the header that gives one tensor another storage, as a list unless it is one letter."""

    def edit(header: dict) -> None:
        at, storage = [*shapes_of(tiny_hp(**SAMPLE))].index(name), [*header["storage"]]
        storage[at] = kind
        header["storage"] = (
            "".join(storage) if isinstance(kind, str) and len(kind) == 1 else storage
        )

    return edit


BAD_STORAGE = {
    "shorter": lambda header: header.update(storage=header["storage"][:-1]),
    "longer": lambda header: header.update(storage=header["storage"] + "q"),
    "empty": lambda header: header.update(storage=""),
    "null": lambda header: header.update(storage=None),
    "number": lambda header: header.update(storage=5),
    "unknown_letter": letter("tok_emb.weight", "x"),
    "matrix_by_column": letter("blocks.0.attn.c_k.weight", "c"),
    "expert_by_row_of_version_2": letter("blocks.0.mlp.expert_up", "r"),
    "matrix_as_float16": letter("blocks.0.attn.c_k.weight", "h"),
    "matrix_as_table": letter("blocks.0.attn.c_k.weight", "t"),
    "vector_as_float16": letter("skip_weights", "h"),
    "vector_by_column": letter("skip_weights", "c"),
    "float16_as_vector": letter("mu_init", "q"),
    "table_as_symbols": letter("expert_table", "q"),
    "router_as_symbols": letter("blocks.0.mlp.router", "q"),
    "router_as_table": letter("blocks.0.mlp.router", "t"),
    "list_with_a_number": letter("blocks.0.attn.c_k.weight", 1),
    "list_with_null": letter("blocks.0.attn.c_k.weight", None),
}


@pytest.mark.parametrize("name", BAD_STORAGE)
def test_bad_storage_is_refused(tmp_path, sample, name):
    hp, data = sample
    assert_refused(tmp_path / "a.ptz", edited(data, BAD_STORAGE[name]), hp, "damaged")


@pytest.mark.parametrize("kind", ["", "q", "h", "t", "qh", "qq", "qht"])
@pytest.mark.parametrize(
    "name", ["mu_init", "blocks.0.attn.c_k.weight", "blocks.0.mlp.router", "expert_table"]
)
def test_a_list_in_the_place_of_the_storage_string_is_refused(tmp_path, sample, name, kind):
    """The header is consistent with the streams otherwise."""
    hp, data = sample
    shapes, header = shapes_of(hp), split_artifact(data)[0]
    storage = [kind if other == name else STORED_AS[role_of(other)][0] for other in shapes]
    try:
        plan = layout(shapes, storage)
    except ValueError:
        return
    sizes = [
        sum(math.prod(shape) * dtype.itemsize for *_, dtype, shape in entries)
        for entries in plan.values()
    ]
    streams = [
        zstandard.compress(b"\0\1" * (size // 2) + b"\0" * (size % 2)) for size in sizes
    ]  # two experts a token
    header |= {"storage": storage, "streams": [(1, len(stream)) for stream in streams]}
    assert_refused(
        tmp_path / "a.ptz", seal(json.dumps(header).encode(), b"".join(streams)), hp, "bad header"
    )
    if len(kind) == 1:  # as a string, it is what a writer may write
        header["storage"] = "".join(storage)
        (tmp_path / "a.ptz").write_bytes(seal(json.dumps(header).encode(), b"".join(streams)))
        load_artifact(tmp_path / "a.ptz", hp, CPU)


def with_expert(hp: Hyperparameters, data: bytes, place: int, expert: int) -> bytes:
    """The artifact with another entry of its table."""

    def change(payload: bytes) -> bytes:
        entries = bytearray(payload)
        entries[place] = expert
        return bytes(entries)

    return replaced(hp, data, "table", rezipped(change))


@pytest.mark.parametrize(
    "place", [0, 1, 2 * 64 + 1, -2, -1]
)  # first and second expert of tokens in both layers
def test_an_expert_out_of_range_or_given_twice_is_refused(tmp_path, sample, place):
    hp, data = sample
    (tmp_path / "a.ptz").write_bytes(data)
    table = load_artifact(tmp_path / "a.ptz", hp, CPU)[0].expert_table
    other = table.flatten()[place % table.numel() ^ 1].item()  # of the same token
    for expert in (hp.num_experts, 255, other):
        bad = with_expert(hp, data, place, expert)
        assert_refused(tmp_path / "a.ptz", bad, hp, "expert out of range or twice")
    for expert in {*range(hp.num_experts)} - {other}:
        (tmp_path / "a.ptz").write_bytes(with_expert(hp, data, place, expert))
        table = load_artifact(tmp_path / "a.ptz", hp, CPU)[0].expert_table
        assert (table.shape, table.flatten()[place]) == ((2, 64, 2), expert)


@pytest.mark.parametrize("name", ["vector", "steps", "table", "float16", "tok_emb.weight"])
def test_stream_of_another_size_than_its_tensors_is_refused(tmp_path, sample, name):
    hp, data = sample
    changes = [
        lambda payload: payload[:-1],
        lambda payload: payload + b"\0",
        lambda payload: b"",
        lambda p: p * 1000,
    ]
    for change, packer in itertools.product(changes, [zstandard.compress, brotli.compress]):
        number = 1 if packer is zstandard.compress else 2
        bad = replaced(
            hp, data, name, lambda payload, n=number, c=change, p=packer: (n, p(c(payload)))
        )
        assert_refused(tmp_path / "a.ptz", bad, hp, "damaged.* does not unpack to")


@pytest.mark.parametrize("number", list(CODECS))
def test_stream_that_is_no_such_stream_is_refused(tmp_path, sample, number):
    hp, data = sample
    packer = {"zstd": zstandard.compress, "brotli": brotli.compress}[CODECS[number]]
    path = tmp_path / "a.ptz"
    for change in (lambda p: b"", lambda p: b"not packed", lambda p: p, lambda p: packer(p)[:-9]):
        bad = replaced(
            hp, data, "tok_emb.weight", lambda payload, change=change: (number, change(payload))
        )
        assert_refused(path, bad, hp, "damaged")
    path.write_bytes(
        replaced(hp, data, "tok_emb.weight", lambda payload: (number, packer(payload)))
    )
    load_artifact(path, hp, CPU)


@pytest.mark.parametrize("number", list(CODECS))
def test_file_that_unpacks_to_far_more_than_declared_does_not_fill_the_memory(
    tmp_path, sample, number
):
    hp, data = sample
    bomb = bytes(1 << 26)
    packed = (
        zstandard.compress(bomb) if CODECS[number] == "zstd" else brotli.compress(bomb, quality=1)
    )
    tracemalloc.start()
    try:
        with pytest.raises(Refusal, match=r"^x: damaged"):
            decompress(packed, number, 1000, Path("x"))
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        assert_refused(
            tmp_path / "a.ptz",
            replaced(hp, data, "table", lambda payload: (number, packed)),
            hp,
            "damaged",
        )
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
        decompress(packed, number, len(bomb), Path("x"))
        assert tracemalloc.get_traced_memory()[1] > 1 << 26
    finally:
        tracemalloc.stop()


def test_zstd_frame_that_announces_an_absurd_size_is_refused(tmp_path, sample):
    hp, data = sample
    frame = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 55) + b"\x01\x00\x00"
    assert zstandard.frame_content_size(frame) == 1 << 55
    assert_refused(
        tmp_path / "a.ptz", replaced(hp, data, "table", lambda payload: (1, frame)), hp, "damaged"
    )


def knob(**values) -> Callable:
    return lambda header: header["model"].update(values)


BAD_HEADERS = {
    "no_knob": lambda header: header["model"].pop("num_layers") and None,
    "no_model": lambda header: header.pop("model") and None,
    "no_tokenizer": lambda header: header.pop("tokenizer_sha256") and None,
    "no_storage": lambda header: header.pop("storage") and None,
    "no_streams": lambda header: header.pop("streams") and None,
    "model_is_a_list": lambda header: header.update(model=[1]),
    "model_is_null": lambda header: header.update(model=None),
    "list": lambda header: b"[]",
    "number": lambda header: b"7",
    "string": lambda header: b'"model"',
    "not_json": lambda header: b"{",
    "not_utf8": lambda header: b"\xff\xfe\xfd",
    "empty": lambda header: b"",
    "deep": lambda header: b"[" * 100_000,
    "deep_objects": lambda header: b'{"model":' * 100_000,
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
    "unknown_routing": knob(routing="random"),
    "no_router": knob(routing="zipf"),
    "no_experts_at_all": knob(routing="dense"),
    "router_by_sorted_tokens": knob(dispatch="grouped"),
    "no_expert": knob(top_k=0),
    "one_expert_for_two": knob(top_k=1),
    "three_experts": knob(top_k=3),
    "word_for_top_k": knob(top_k="x"),
    "true_for_top_k": knob(top_k=True),
    "no_top_k": lambda header: header["model"].pop("top_k") and None,
    "two_of_one_expert": knob(num_experts=1),
    "mu_of_other_tensors": knob(mu="pid"),
    "line_break": knob(routing="zipf\n"),
    "heads": knob(num_heads=5),
    "rope": knob(rope_dims=10),
    "loop": knob(loop_passes=2),
    "huge_vocabulary": knob(vocab_size=1 << 40),
    "other_width": knob(shared_dim=40),
    "one_expert_less": knob(num_experts=3),
    "one_layer_less": knob(num_layers=1),
    "other_mode": knob(mu="off"),
    "other_switch": knob(smear_gate=False),
    "huge_width": knob(shared_dim=1 << 60),
    "beyond_64_bits": knob(model_dim=1 << 70),
}


@pytest.mark.parametrize("name", BAD_HEADERS)
def test_bad_header_is_refused(tmp_path, sample, name):
    hp, data = sample
    assert_refused(tmp_path / "a.ptz", edited(data, BAD_HEADERS[name]), hp)


def test_header_length_beyond_the_file_is_refused(tmp_path, sample):
    hp, data = sample
    length = PREFIX.unpack_from(data)[2]
    for wrong in (0, length - 1, length + 1, len(data), 2**31, 2**32 - 1):
        prefix = PREFIX.pack(ARTIFACT_MAGIC, ARTIFACT_VERSION, wrong, bytes(32))
        digest = hashlib.sha256(prefix + data[PREFIX.size :]).digest()
        assert_refused(
            tmp_path / "a.ptz", prefix[:-32] + digest + data[PREFIX.size :], hp, "damaged"
        )


ABSURD = [
    {"num_layers": 10**9},
    {"shared_dim": 10**12},
    {"mu": "lowrank", "mu_rank": 10**12},
    {"loop_passes": 10**9},
]
ABSURD += [{"vocab_size": 1 << 30}, {"top_k": 1 << 30}, {"num_experts": 1 << 30}]


@pytest.mark.parametrize("knobs", ABSURD, ids=label)
def test_absurd_model_is_refused_before_it_is_built(tmp_path, sample, knobs, monkeypatch):
    def forbidden(hp):
        raise AssertionError("built a model of absurd size")

    hp, data = sample
    monkeypatch.setattr(train_gpt, "GPT", forbidden)
    assert_refused(tmp_path / "a.ptz", edited(data, knob(**knobs)), hp)


LARGE = [{"model_dim": 65_536, "shared_dim": 65_536}, {"routing": "soft", "num_experts": 256}]
LARGE += [
    {"num_experts": 256, "expert_dim": 65_536, "model_dim": 1024},
    {"num_layers": 30, "vocab_size": 65_536},
]


@pytest.mark.parametrize("knobs", LARGE, ids=label)
@pytest.mark.parametrize("declared", [0, 1 << 40])
def test_large_model_with_a_consistent_header_is_refused_before_anything_is_unpacked(
    tmp_path, sample, knobs, declared, monkeypatch
):
    def forbidden(*args):
        raise AssertionError("unpacked a model of absurd size")

    hp = tiny_hp(**{"num_layers": 2, **knobs, "model_dim": knobs.get("model_dim", 65_536)})
    shapes = shapes_of(hp)
    storage, total = (
        "".join(STORED_AS[role_of(name)][0] for name in shapes),
        sum(map(math.prod, shapes.values())),
    )
    assert total > MAX_WEIGHTS
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "MAX_WEIGHTS", total)
        plan = layout(shapes, storage)
    header = {"model": {name: getattr(hp, name) for name in MODEL_KNOBS}, "tokenizer_sha256": SHA}
    header |= {"storage": storage, "streams": [(1, declared)] * len(plan)}
    monkeypatch.setattr(train_gpt, "decompress", forbidden)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        assert_refused(tmp_path / "a.ptz", seal(json.dumps(header).encode(), b""), hp, "too large")
        assert tracemalloc.get_traced_memory()[1] < 1 << 26
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 10


def test_missing_codec_is_named_and_the_other_still_works(tmp_path, sample, monkeypatch):
    hp, data = sample
    parts, _ = quantize(hp, make_model(hp).state_dict())
    with_brotli, path = pack(hp, parts, SHA, "brotli")[0], tmp_path / "a.ptz"
    monkeypatch.setitem(sys.modules, "brotli", None)
    path.write_bytes(with_brotli)
    with pytest.raises(Refusal, match="pip install brotli"):
        load_artifact(path, hp, CPU)
    for codec in ("auto", "brotli"):
        with pytest.raises(Refusal, match="pip install brotli"):
            pack(hp, parts, SHA, codec)
    path.write_bytes(data)
    load_artifact(path, hp, CPU)
    pack(hp, parts, SHA, "zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(Refusal, match="pip install zstandard"):
        load_artifact(path, hp, CPU)
    with pytest.raises(Refusal, match="pip install zstandard"):
        pack(hp, parts, SHA, "zstd")


# ---- Size ------------------------------------------------------------------------------------------------------------


def test_submission_may_have_every_byte_below_the_cap():
    code = len(pack_script(submission_source()))
    assert submission_bytes(tiny_hp(), 1000, "x") == (code, code + 1000)
    free = MAX_SUBMISSION_BYTES - code
    assert MAX_SUBMISSION_BYTES == 16_000_000
    assert submission_bytes(tiny_hp(), free - 1, "artifact") == (code, 15_999_999)
    with pytest.raises(Refusal, match=r"^artifact: .* the cap is 16,000,000"):
        submission_bytes(tiny_hp(), free, "artifact")


def medium_hp(**knobs) -> Hyperparameters:
    """A model of some 300,000 weights, at k as given."""
    sizes = {
        "vocab_size": 1024,
        "model_dim": 96,
        "rope_dims": 8,
        "shared_dim": 256,
        "expert_dim": 32,
        "num_layers": 2,
    }
    return tiny_hp(**{**sizes, "target_bytes": 0, **knobs})


CODE = submission_bytes(Hyperparameters(), 0, "code")[0]


def fit_to(
    hp: Hyperparameters, state: dict, codec: str, target: int, hessians: dict | None = None
) -> Fitted:
    """The artifact that takes at most `target` bytes beside the code."""
    return fit(replace(hp, target_bytes=CODE + target), state, SHA, codec, hessians)


@torch.no_grad()
def trained_like(hp: Hyperparameters, seed: int = 7) -> GPT:
    """A model whose rows have unequal scale and heavier tails than a Gaussian."""
    model, generator = make_model(hp, noise=0.0), torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if role_of(name) == "vector":
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
        else:
            row_scale = (0.5 * torch.randn((*p.shape[:-1], 1), generator=generator)).exp()
            chi2 = (
                torch.randn((8, *p.shape), generator=generator).square().mean(0)
            )  # over which: Student's t, 8 d.o.f.
            p.copy_(p + 0.03 * row_scale * torch.randn(p.shape, generator=generator) / chi2.sqrt())
    return model


@pytest.fixture(scope="module")
def medium() -> tuple[Hyperparameters, dict, Fitted]:
    """Knobs, state and artifact at the given k of a medium model."""
    hp = medium_hp()
    state = trained_like(hp).state_dict()
    return hp, state, fit(hp, state, SHA, "zstd")


def assert_same_parts(parts: dict, expected: dict) -> None:
    assert list(parts) == list(expected)
    for name, tensors in expected.items():
        assert all(itertools.starmap(torch.equal, zip(parts[name], tensors, strict=True))), name


def test_without_a_target_k_stays_as_given(medium):
    hp, state, fitted = medium
    parts, _ = quantize(hp, state)
    assert (fitted.factor, fitted.unusable) == (1.0, [])
    assert_same_parts(fitted.parts, parts)
    assert (fitted.artifact, fitted.sizes) == pack(hp, parts, SHA, "zstd")


TARGETS = [*itertools.product(["zstd"], [0.7, 0.8, 1.0, 1.2, 1.4]), ("brotli", 0.8), ("auto", 0.9)]


@pytest.mark.parametrize(("codec", "fraction"), TARGETS)
def test_the_artifact_is_about_a_thousandth_below_the_target_at_most(
    tmp_path, medium, codec, fraction
):
    hp, state, plain = medium
    target = int(fraction * len(plain.artifact))
    fitted = fit_to(hp, state, codec, target)
    size = len(fitted.artifact)
    assert (
        0.9985 * target <= size <= target
    )  # from one factor to the next, brotli's size jumps by a thousandth here
    assert 1 / 8 < fitted.factor < 4
    assert fitted.factor < 1 if fraction > 1 else fitted.factor > 1
    assert_same_parts(fitted.parts, quantize(hp, state, fitted.factor)[0])
    assert sum(fitted.sizes.values()) == size
    (tmp_path / "a.ptz").write_bytes(fitted.artifact)
    assert_restored(tmp_path / "a.ptz", hp, fitted.parts)


def test_gaussian_rows_of_one_scale_meet_the_target_as_well():
    hp = medium_hp()
    state = make_model(hp, noise=0.0).state_dict()
    generator = torch.Generator().manual_seed(5)
    for name, tensor in state.items():
        if quant_rule(hp, name):
            tensor.copy_(0.03 * torch.randn(tensor.shape, generator=generator))
    size = len(fit(hp, state, SHA, "zstd").artifact)
    for fraction in (0.7, 0.86):
        target = int(fraction * size)
        achieved = len(fit_to(hp, state, "zstd", target).artifact)
        assert 0.998 * target <= achieved <= target


def test_a_generous_target_gets_the_finest_quantization(medium):
    hp, state, plain = medium
    fitted = fit_to(hp, state, "zstd", 10 * len(plain.artifact))
    assert fitted.factor == 1 / 8
    assert_same_parts(fitted.parts, quantize(hp, state, 1 / 8)[0])
    exact = fit_to(hp, state, "zstd", len(fitted.artifact))
    assert 0.999 * len(fitted.artifact) <= len(exact.artifact) <= len(fitted.artifact)


def test_a_target_out_of_reach_is_refused_with_what_to_shrink(medium):
    hp, state, _ = medium
    coarsest = len(pack(hp, quantize(hp, state, 4.0)[0], SHA, "zstd")[0])
    assert fit_to(hp, state, "zstd", coarsest).factor <= 4
    for missing in (1 + coarsest // 1000, coarsest - 1):
        hp = replace(hp, target_bytes=CODE + coarsest - missing)
        with pytest.raises(Refusal) as refused:
            fit(hp, state, SHA, "zstd")
        message = str(refused.value)
        assert re.search(
            rf"^TARGET_BYTES={hp.target_bytes}: .*\b{missing:,} bytes too large", message
        ), message
        for way_out in ("MODEL_DIM=96", "NUM_LAYERS=2"):
            assert way_out in message
        assert "\n" not in message


def test_the_budget_has_every_role_its_bytes_and_its_entropy(medium):
    _, state, fitted = medium
    header, *lines, total = fitted.budget().splitlines()
    assert header.split() == ["role", "weights", "bytes", "bits/weight", "entropy", "floor"]
    assert re.fullmatch(rf"total +{len(fitted.artifact):,}  \(k x 1\.0000\)", total)
    table = {
        line.split()[0]: [float(cell.replace(",", "")) for cell in line.split()[1:]]
        for line in lines
    }
    assert {role: row[1] if len(row) > 1 else row[0] for role, row in table.items()} == fitted.sizes
    assert {role_of(name) for name in state} | {"header", "steps"} <= set(table)
    for role in {role_of(name) for name in state} - {"table"}:
        symbols = [
            parts[0]
            for name, parts in fitted.parts.items()
            if role_of(name) == role and len(parts) > 1
        ]
        weights, size = sum(part.numel() for part in symbols), fitted.sizes[role]
        floor = sum(entropy_bits(part) * part.numel() / 8 for part in symbols)
        assert table[role] == [
            weights,
            size,
            pytest.approx(8 * size / weights, abs=6e-4),
            pytest.approx(floor, abs=1),
        ]
    large = [table[role] for role in ("embedding", "matrix", "expert")]
    assert sum(row[0] for row in large) > 250_000
    assert all(0.93 * row[3] < row[1] < 1.03 * row[3] for row in large)
    assert [role for role, row in table.items() if len(row) == 1] == [
        role for role in table if role in ("header", "steps", "float16", "table")
    ]
    coarser = fitted._replace(factor=1.23456)
    assert coarser.budget().endswith("(k x 1.2346)")


@pytest.mark.parametrize("codec", ["zstd", "brotli"])
def test_the_bytes_of_a_large_gaussian_matrix_are_near_its_entropy(codec):
    symbols, _ = nearest(rows_of(0.02, 512, 2048), 6, 12.85)
    floor = entropy_bytes(symbols)
    assert floor == pytest.approx(symbols.numel() / 8 * (2.047 - math.log2(12.85 / 31)), rel=0.03)
    assert floor * 0.999 < len(compress(symbols.numpy().tobytes(), codec)[1]) < 1.02 * floor


@pytest.mark.parametrize("routing", ["zipf", "learned", "dense"])
@torch.no_grad()
def test_dry_run_foretells_the_size_of_gaussian_weights(routing):
    hp = medium_hp(routing=routing)
    model = make_model(hp, noise=0.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = dry_run(hp, model)
    assert expected.factor == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    generator = torch.Generator().manual_seed(7)
    for name, p in model.named_parameters():
        p.copy_(
            (0.1 if role_of(name) == "vector" else 1.0) * torch.randn(p.shape, generator=generator)
        )
    actual = fit(hp, model.state_dict(), SHA, "zstd")
    assert len(expected.artifact) == pytest.approx(len(actual.artifact), rel=0.02)
    wider = replace(hp, shared_dim=512)
    assert len(dry_run(wider, make_model(wider)).artifact) > 1.05 * len(actual.artifact)


@pytest.mark.parametrize("codec", ["zstd", "auto"])
def test_dry_run_foretells_the_size_of_trained_weights(codec):
    hp = medium_hp()
    expected = dry_run(hp, make_model(hp, noise=0.0))
    actual = fit(hp, trained_like(hp).state_dict(), SHA, codec)
    assert len(expected.artifact) == pytest.approx(len(actual.artifact), rel=0.1)


def test_the_code_takes_its_share_of_the_target():
    hp = medium_hp(target_bytes=CODE + 120_000)
    fitted = dry_run(hp, make_model(hp))
    size = len(fitted.artifact)
    assert 0.999 * 120_000 <= size <= 120_000
    for target in (1, CODE + 1000):
        with pytest.raises(Refusal, match=rf"^TARGET_BYTES={target}: "):
            dry_run(replace(hp, target_bytes=target), make_model(hp))


# ---- Files -----------------------------------------------------------------------------------------------------------


RUNS_CODE = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "eval",
    "exec",
}
RUNS_CODE |= {
    "torch.load",
    "torch.save",
    "torch.jit.load",
    "torch.package",
    "yaml.load",
    "np.load",
    "numpy.load",
}


def what_runs_code(source: str) -> set[str]:
    """What a source uses that runs code from files, or writes such; np.load may, if it says allow_pickle=False."""
    tree, found = ast.parse(source), set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    safe = [call.func for call in calls if "allow_pickle=False" in map(ast.unparse, call.keywords)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Attribute | ast.Name) and node not in safe:
            found.add(ast.unparse(node))
        elif isinstance(node, ast.Constant) and node.value not in ("eval", "exec"):
            found.add(node.value)  # a module may be imported by this name
    return found & RUNS_CODE


SOURCES = [ROOT / "train_gpt.py", ROOT / "eval_sliding.py", *sorted((ROOT / "data").glob("*.py"))]
SOURCES += sorted((ROOT / "records").glob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_reader_of_files_can_run_code_from_them(path):
    assert what_runs_code(path.read_text(encoding="utf-8")) == set()


CODE_RUNNERS = [
    "import pickle",
    "import json, pickle as p",
    "from pickle import loads",
    "def f():\n    import shelve",
]
CODE_RUNNERS += [
    "torch.load(x)",
    "from torch import load",
    "load = torch.load",
    "from torch import save",
    "eval(x)",
]
CODE_RUNNERS += [
    "np.load(x)",
    "np.load(x, allow_pickle=True)",
    "np.load(x, allow_pickle=y)",
    "from numpy import load",
]
CODE_RUNNERS += [
    "read = np.load\nread(x, allow_pickle=False)",
    "importlib.import_module('dill')",
    "run = exec",
]


@pytest.mark.parametrize("source", CODE_RUNNERS)
def test_what_runs_code_is_found(source):
    assert what_runs_code(source)


def test_what_runs_no_code_is_not_found():
    source = "import torch, json\nfrom torch import nn\nmodel.eval()\njson.load(x)\nnp.load(x, allow_pickle=False)"
    assert what_runs_code(source) == set()


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
def test_failed_write_keeps_the_old_content_and_leaves_nothing_behind(
    tmp_path, monkeypatch, failing
):
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
