"""Properties of the model: causality, routed MLP, gradients, loss, compilation.   pytest tests/test_model.py"""

import copy
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import ALONE, make_ids, make_model, tiny_hp

from train_gpt import (
    BOS_ID,
    CHOICES,
    GPT,
    Gradients,
    Hyperparameters,
    Refusal,
    TokenRoutedMLP,
    activate,
    attention_kernel,
    build_optimizers,
    can_compile,
    choose_attention,
    role_of,
    rotary_tables,
    train_step,
)

ROUTING, DISPATCH, MU, ACTIVATION = (
    CHOICES[knob].split() for knob in ("routing", "dispatch", "mu", "activation")
)
ROUTED = [routing for routing in ROUTING if routing != "dense"]
ROUTERS = [
    "learned",
    "hybrid",
    "soft",
]  # read the stream, and all experts learn from it: DISPATCH=masked alone
TABLES = [routing for routing in ROUTED if routing not in ROUTERS]
OLD = [
    "zipf",
    "hash",
    "modulo",
    "dense",
]  # with every MU; the others with those that read the stream by gains
WAYS = [{"routing": r, "dispatch": d} for r in TABLES for d in DISPATCH] + [
    {"routing": r} for r in (*ROUTERS, "dense")
]
MODES = [
    {**way, "mu": mu}
    for way in WAYS
    for mu in MU
    if mu in ("vector", "pid") or way["routing"] in OLD
]
MODES += [
    {**way, "top_k": 2} for way in WAYS if way["routing"] not in ("dense", "hash", "modulo", "soft")
]
VARIANTS = [
    {"activation": a, "dispatch": d, "xsa": x}
    for a in ACTIVATION
    for d in DISPATCH
    for x in (True, False)
]
SWITCHES = [{"loop_passes": passes, "dispatch": d} for passes in (1, 3) for d in DISPATCH]
SWITCHES += [{"routing_per_pass": False}, {"loop_end": 3}, {"loop_start": 0, "moe_start_layer": 2}]
SWITCHES += [
    {"parallel_start_layer": 0},
    {"parallel_start_layer": 99},
    {"ln_scale": False},
    {"skip_gates": False},
]
SWITCHES += [
    {"routing": "dense", "dispatch": "grouped"},
    {"attn_gate": False},
    {"smear_gate": False},
]
SWITCHES += [{"routing": "learned", "loop_end": 3, "mu": "pid"}]
SCORED = torch.tensor(
    [[15, 0, 7, 7, 3], [0, 15, 2, 1, 14], [4, 9, 4, 0, 12]]
)  # of 16: any order, repeats, both ends


def label(mode: dict) -> str:
    return "-".join(
        f"{value}" if isinstance(value, str) else f"{name}={value}" for name, value in mode.items()
    )


def assert_same(actual: torch.Tensor, expected: torch.Tensor, hp) -> None:
    """Bit-equal; but a GEMM over a group's rows rounds by their number, so grouped ones agree to a few float32 ulps."""
    exact = hp.dispatch == "masked" or not hp.routed_layers
    torch.testing.assert_close(actual, expected, rtol=0, atol=0 if exact else 5e-6)


def other_tokens(ids: torch.Tensor, hp) -> torch.Tensor:
    """Ids of the same shape that differ everywhere."""
    return (ids + 1 + torch.arange(ids.numel()).view_as(ids) % (hp.vocab_size - 1)) % hp.vocab_size


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("mode", MODES + VARIANTS + SWITCHES, ids=label)
@torch.no_grad()
def test_logits_depend_on_no_later_token(mode, rows):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp), make_ids(hp, rows, hp.train_seq_len)
    logits, other = model(ids), other_tokens(ids, hp)
    for t in (0, 3, 7, hp.train_seq_len - 2):
        later, now = ids.clone(), ids.clone()
        later[:, t + 1 :], now[:, t] = other[:, t + 1 :], other[:, t]
        changed = model(later)
        assert_same(changed[:, : t + 1], logits[:, : t + 1], hp)
        assert ((changed - logits)[:, t + 1 :].abs().amax(-1) > 1e-3).all()
        assert ((model(now) - logits)[:, t].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("mode", MODES + SWITCHES, ids=label)
@torch.no_grad()
def test_row_is_independent_of_the_other_rows(mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp), make_ids(hp, 3, hp.train_seq_len)
    others = other_tokens(ids, hp)
    others[1] = ids[1]
    logits, among_others = model(ids), model(others)
    assert_same(among_others[1], logits[1], hp)
    assert ((among_others - logits)[[0, 2]].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("mode", MODES + SWITCHES, ids=label)
@torch.no_grad()
def test_logits_of_a_prefix_are_a_prefix_of_the_logits(mode):
    hp = tiny_hp(**{"train_seq_len": 32, **mode})
    model, ids = make_model(hp), make_ids(hp, 2, 32)
    logits = model(ids)
    for n in (1, 5, 16, 31):
        torch.testing.assert_close(model(ids[:, :n]), logits[:, :n], rtol=0, atol=1e-5)
    assert (logits[:, 1:] - logits[:, :-1]).abs().max() > 1e-2


def at(positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`values` (B, T, ...) at some positions of each row, (B, S, ...)."""
    return torch.stack([row[where] for row, where in zip(values, positions, strict=True)])


@pytest.mark.parametrize("mode", MODES + VARIANTS + SWITCHES, ids=label)
@torch.no_grad()
def test_scored_positions_get_the_logits_and_losses_of_the_full_forward_there(mode):
    model = make_model(tiny_hp(**mode)).eval()
    ids = make_ids(model.hp, 3, 17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    for looped in (True, False):
        logits, losses = (
            model(inputs, looped=looped),
            model(inputs, targets, reduction="none", looped=looped),
        )
        chosen, there = model(inputs, looped=looped, scored=SCORED), at(SCORED, targets)
        torch.testing.assert_close(chosen, at(SCORED, logits), rtol=0, atol=1e-5)
        few = model(inputs, there, reduction="none", looped=looped, scored=SCORED)
        torch.testing.assert_close(few, at(SCORED, losses), rtol=0, atol=1e-5)
        torch.testing.assert_close(
            model(inputs, there, looped=looped, scored=SCORED), few.mean(), rtol=1e-5, atol=0
        )
        assert (
            (model(inputs, looped=looped, scored=(SCORED + 1) % 16) - chosen).abs().amax(-1) > 1e-3
        ).all()


@pytest.mark.parametrize("mode", MODES + SWITCHES, ids=label)
def test_scored_positions_send_the_gradients_of_the_full_forward(mode):
    hp = tiny_hp(**mode)
    ids, weights, gradients = make_ids(hp, 3, 17), torch.arange(1.0, 16.0).view(3, 5), []
    for positions in (None, SCORED, (SCORED + 1) % 16):
        model, inputs, targets = make_model(hp), ids[:, :-1], ids[:, 1:]
        if positions is None:
            losses = at(SCORED, model(inputs, targets, reduction="none"))
        else:
            losses = model(inputs, at(positions, targets), reduction="none", scored=positions)
        (losses * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, full in gradients[0].items():
        few, elsewhere = gradients[1][name], gradients[2][name]
        assert few is not None, name
        assert (few - full).norm() <= 1e-4 * full.norm() + 1e-6, name
        assert (elsewhere - full).norm() > 1e-2 * full.norm(), name


@pytest.mark.parametrize(
    "mode", [{}, {"dispatch": "grouped"}, {"loop_end": 3}, {"routing": "dense"}], ids=label
)
@torch.no_grad()
def test_the_last_layer_and_the_head_work_at_the_scored_positions_alone(mode, monkeypatch):
    model, linear, widths = (
        make_model(tiny_hp(**mode)),
        F.linear,
        {"head": [], "mlp": [], "query": [], "key": []},
    )

    def observed(x, weight):
        if weight is model.tok_emb.weight:
            widths["head"].append(x.size(1))
        return linear(x, weight)

    monkeypatch.setattr(F, "linear", observed)
    for block in model.blocks:
        for name, module in {
            "mlp": block.mlp,
            "query": block.attn.c_q,
            "key": block.attn.c_k,
        }.items():
            module.register_forward_pre_hook(
                lambda module, args, name=name: widths[name].append(args[0].size(1))
            )
    ids, depth = make_ids(model.hp, 3, 16), len(model.hp.execution_order(True))
    for positions, size in ((SCORED, 5), (None, 16)):
        model(ids, scored=positions)
        last = {
            "head": [size],
            "mlp": [16] * (depth - 1) + [size],
            "query": [16] * (depth - 1) + [size],
        }
        assert widths == {**last, "key": [16] * depth}
        for seen in widths.values():
            seen.clear()


# ---- Rotation


def angles(seq_len: int, trained_len: int, dims: int) -> torch.Tensor:
    """(T, dims / 2) in -pi to pi."""
    hp = Hyperparameters(train_seq_len=trained_len, eval_seq_len=seq_len, rope_dims=dims)
    cos, sin = rotary_tables(seq_len, hp.rope_base, dims, ALONE.device)
    assert cos.shape == sin.shape == (seq_len, 1, dims // 2)
    return torch.atan2(sin.double(), cos.double())[:, 0]


@pytest.mark.parametrize("dims", [0, 2, 4, 16, 64])
def test_rotation_is_that_of_training_up_to_the_trained_length(dims):
    expected = 10_000.0 ** (-torch.arange(0, dims, 2, dtype=torch.float64) / max(dims, 1))
    for trained_len in (16, 17, 64, 4096):
        assert torch.equal(angles(16, trained_len, dims), angles(16, 16, dims))
        torch.testing.assert_close(angles(16, trained_len, dims)[1], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [2, 8])
@pytest.mark.parametrize("dims", [4, 16, 64])
def test_beyond_the_trained_length_the_slowest_rotation_turns_as_far_as_it_did_there(dims, ratio):
    """NTK-aware scaling: frequency i of dims / 2 is slowed by ratio ** (i / (dims / 2 - 1)), the fastest not at all."""
    trained, longer = angles(64, 64, dims), angles(64 * ratio, 64, dims)
    slowed = ratio ** torch.linspace(0, 1, dims // 2, dtype=torch.float64)
    torch.testing.assert_close(longer[1] * slowed, trained[1], rtol=1e-4, atol=0)
    torch.testing.assert_close(longer[:64, 0], trained[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(longer[::ratio, -1], trained[:, -1], rtol=1e-4, atol=0)
    assert longer[-1, -1] < trained[-1, -1] + trained[1, -1]


@pytest.mark.parametrize(("dims", "stretched"), [(0, False), (2, False), (4, True), (8, True)])
@torch.no_grad()
def test_a_window_twice_the_trained_one_changes_only_rotations_that_have_a_slower_one(
    dims, stretched
):
    """And it does so for every input, however short: a padded window and a bare one must agree."""
    hp = tiny_hp(rope_dims=dims)
    ids, model, longer = (
        make_ids(hp, 2, 16),
        make_model(hp),
        make_model(replace(hp, eval_seq_len=32)),
    )
    change = (model(ids) - longer(ids)).abs().amax()
    assert (change > 1e-4) == stretched
    assert change > 1e-4 or change == 0


# ---- Position, exclusive attention and recurrence


@torch.no_grad()
def test_position_matters_only_with_rotated_dimensions():
    for rope_dims, moves in ((4, True), (0, False)):
        hp = tiny_hp(rope_dims=rope_dims, xsa=False, smear_gate=False)
        model, ids = make_model(hp), make_ids(hp, 1, 8)
        swapped = ids[:, [1, 0, 2, 3, 4, 5, 6, 7]]
        change = (model(swapped) - model(ids))[:, -1].abs().max()
        # From the second layer on, causal attention itself tells positions apart, so only one layer is order-blind.
        hp = tiny_hp(rope_dims=rope_dims, num_layers=1, smear_gate=False)
        one = make_model(hp)
        change_of_one = (one(swapped) - one(ids))[:, -1].abs().max()
        assert change > 1e-4
        assert (change_of_one > 1e-4) == moves


@torch.no_grad()
def test_xsa_removes_the_component_along_the_own_value():
    seen = {}
    for xsa in (True, False):
        hp = tiny_hp(xsa=xsa, mu="off")
        attention = make_model(hp).blocks[1].attn
        attention.proj.register_forward_pre_hook(
            lambda module, args, xsa=xsa: seen.update({xsa: args[0]})
        )
        x = torch.randn(2, 16, hp.model_dim, generator=torch.Generator().manual_seed(0))
        rotary = (torch.ones(16, 1, 2), torch.zeros(16, 1, 2))
        attention(x, None, rotary)
        own = attention.c_v(x).view(2, 16, hp.num_kv_heads, hp.head_dim).repeat_interleave(2, dim=2)
        along = (seen[xsa].view(2, 16, hp.num_heads, hp.head_dim) * F.normalize(own, dim=-1)).sum(
            -1
        )
        assert (along.abs().max() < 1e-5) == xsa


def unrolled(model: GPT) -> GPT:
    """A model without recurrence that has a layer of its own for every layer that `model` runs."""
    hp, order, state = model.hp, model.hp.execution_order(True), model.state_dict()
    deep = GPT(replace(hp, num_layers=len(order), loop_passes=1))
    new = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for step, layer in enumerate(order):
        prefix = f"blocks.{layer}."
        new |= {
            name.replace(prefix, f"blocks.{step}."): t
            for name, t in state.items()
            if name.startswith(prefix)
        }
    passes = torch.tensor([order[:step].count(layer) for step, layer in enumerate(order)])
    shifts = (passes if hp.routing_per_pass else 0 * passes)[:, None, None].to(torch.uint8)
    new["expert_table"] = (state["expert_table"][order] + shifts) % hp.num_experts
    missing = deep.load_state_dict(new, strict=False)
    assert not missing.missing_keys
    assert all(
        "mu_" in name for name in missing.unexpected_keys
    )  # the last layer's, which nobody reads
    return deep


RECURRENT = [{"mu": mu} for mu in MU] + [{"dispatch": "grouped"}, {"routing_per_pass": False}]
RECURRENT += [{"routing": routing} for routing in ("cluster", *ROUTERS)]
RECURRENT += [{"top_k": 2, "dispatch": "grouped"}, {"top_k": 2, "routing": "hybrid", "mu": "pid"}]


@pytest.mark.parametrize(
    "looping", [(1, 2, 2), (1, 2, 3), (0, 0, 2), (3, 3, 2), (0, 3, 2), (2, 3, 3)], ids=str
)
@pytest.mark.parametrize("mode", RECURRENT, ids=label)
@torch.no_grad()
def test_recurrence_is_the_unrolled_network(mode, looping):
    loop = dict(zip(("loop_start", "loop_end", "loop_passes"), looping, strict=True))
    model = make_model(tiny_hp(**loop, **mode, ln_scale=False, parallel_start_layer=99))
    ids = make_ids(model.hp, 2, 16)
    torch.testing.assert_close(unrolled(model)(ids), model(ids), rtol=0, atol=1e-5)
    assert (model(ids, looped=False) - model(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("mu", MU)
@torch.no_grad()
def test_one_pass_is_no_recurrence(mu):
    once, thrice = (
        make_model(tiny_hp(loop_passes=1, mu=mu)),
        make_model(tiny_hp(loop_passes=3, mu=mu)),
    )
    ids, state = make_ids(once.hp, 2, 16), thrice.state_dict()
    assert torch.equal(once(ids), once(ids, looped=False))
    once.load_state_dict(
        {n: t[: once.skip_weights.size(0)] if "skip_" in n else t for n, t in state.items()}
    )
    assert torch.equal(once(ids), thrice(ids, looped=False))
    assert (once(ids) - thrice(ids)).abs().max() > 1e-2


def test_execution_order_of_the_record_is_that_of_upstream():
    order = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert Hyperparameters().execution_order(True) == order
    assert Hyperparameters().execution_order(False) == list(range(11))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("dispatch", DISPATCH)
@torch.no_grad()
def test_every_pass_has_experts_of_its_own_and_the_same_load(dispatch, top_k):
    for own in (True, False):
        hp = tiny_hp(loop_passes=3, routing_per_pass=own, dispatch=dispatch, top_k=top_k)
        model, ids, order = (
            make_model(hp),
            torch.arange(hp.vocab_size).view(4, 16),
            hp.execution_order(True),
        )
        routes = [
            route
            for route, layer in zip(model.routes(ids, order), order, strict=True)
            if layer == 1
        ]
        if dispatch == "masked":
            chosen = [mask.flatten(0, 1).long() for (mask,) in routes]
        else:
            ranges = [
                torch.bucketize(torch.arange(64 * top_k), offsets, right=True)
                for _, _, offsets in routes
            ]
            experts = [
                r[inverse].view(64, top_k)
                for r, (_, inverse, _) in zip(ranges, routes, strict=True)
            ]
            chosen = [F.one_hot(each, 4).sum(1) for each in experts]
        assert torch.equal(chosen[0], F.one_hot(model.expert_table[1].long(), 4).sum(1))
        for number, each in enumerate(chosen):
            assert torch.equal(each, chosen[0].roll(number * own, -1))
        assert torch.equal(chosen[0], chosen[1]) != own


@pytest.mark.parametrize("switch", ["attn_gate", "smear_gate"])
@torch.no_grad()
def test_gates_are_neutral_at_the_start_and_matter_later(switch):
    on, off = make_model(tiny_hp(), noise=0.0), make_model(tiny_hp(**{switch: False}), noise=0.0)
    for p in on.parameters():
        p.add_(
            0.1
            * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
            * (p != 0).any()
        )
    off.load_state_dict({n: t for n, t in on.state_dict().items() if n in off.state_dict()})
    ids = make_ids(on.hp, 2, 16)
    torch.testing.assert_close(on(ids), off(ids), rtol=0, atol=1e-5)
    for name, p in on.named_parameters():
        if "gate" in name or "smear" in name:
            p.fill_(0.5)
    assert (on(ids) - off(ids)).abs().max() > 1e-3


@torch.no_grad()
def test_previous_token_never_reaches_across_the_start_of_a_document():
    model = make_model(tiny_hp())
    ids = make_ids(model.hp, 2, 16).clamp(min=2)
    ids[:, 6] = ids[1, 9] = BOS_ID

    def added(ids: torch.Tensor) -> torch.Tensor:
        x = model.tok_emb(ids)
        return model.smear(x, ids) - x

    change = (added(other_tokens(ids, model.hp)[:, :6].clamp(min=2)) - added(ids[:, :6])).abs()
    assert (
        change[:, 1:].amax(-1) > 1e-5
    ).all()  # within a document it depends on the tokens before
    before = ids.clone()
    before[:, 5] = before[1, 8] = 3
    same = (added(before) == added(ids)).all(-1)
    assert same[:, 6].all()
    assert same[1, 9]
    assert (added(ids)[ids == BOS_ID] == 0).all()
    assert (added(ids)[:, 0] == 0).all()
    assert (added(ids)[:, 7].abs().amax(-1) > 1e-5).all()  # the token after BOS may see BOS


@torch.no_grad()
def test_layer_scale_and_parallel_residual_change_what_the_branches_read():
    for knobs, parallel, scaled in (
        ({}, True, True),
        ({"parallel_start_layer": 99, "ln_scale": False}, False, False),
    ):
        model, reads = make_model(tiny_hp(**knobs)), {}
        block = model.blocks[3]
        block.attn.register_forward_pre_hook(
            lambda m, args, reads=reads: reads.update(attn=args[0])
        )
        block.mlp.register_forward_pre_hook(lambda m, args, reads=reads: reads.update(mlp=args[0]))
        model(make_ids(model.hp, 2, 16))
        assert torch.equal(reads["attn"], reads["mlp"]) == parallel
        rms = reads["attn"].square().mean(-1).sqrt()
        torch.testing.assert_close(
            rms, torch.full_like(rms, 0.5 if scaled else 1.0), rtol=1e-3, atol=0
        )


@pytest.fixture
def sdpa_flags():
    """Leaves PyTorch's attention switches as they were."""
    names = ("cudnn", "flash", "mem_efficient", "math")
    enabled = [getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names]
    yield
    for name, value in zip(names, enabled, strict=True):
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(value)


def test_attention_ladder_takes_the_first_kernel_that_runs_and_says_so(sdpa_flags, monkeypatch):
    ids = make_ids(tiny_hp(), 2, 16)
    logits = make_model(tiny_hp())(ids)

    def choose(kernel: str) -> tuple[str, str]:
        model, lines = make_model(tiny_hp()), []
        model.hp = replace(model.hp, attention=kernel)
        chosen = choose_attention(model, ALONE.device, lines.append)
        torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-5)
        return chosen, lines[0]

    assert choose("flash")[1] == "attention:flash"
    assert choose("math") == ("math", "attention:math")
    kernel, line = choose("auto")
    assert kernel == "flash"
    assert line.startswith("attention:flash (not fa3: ")
    assert "(not cudnn: " in line
    for kernel in ("fa3", "cudnn"):
        with pytest.raises(Refusal, match=f"^ATTENTION={kernel}: not {kernel}: "):
            choose(kernel)

    calls = []

    def flash_attn_func(q, k, v, causal):
        calls.append(q.shape)
        assert causal
        return attention_kernel("flash")(q, k, v)

    monkeypatch.setitem(
        sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=flash_attn_func)
    )
    assert choose("auto") == ("fa3", "attention:fa3")
    assert calls == [(1, 128, 4, 8)] + [(2, 16, 4, 8)] * 6


def test_attention_kernels_agree(sdpa_flags):
    heads_first = [(2, 16, heads, 8) for heads in (4, 2, 2)]
    q, k, v = (
        torch.randn(shape, generator=torch.Generator().manual_seed(i))
        for i, shape in enumerate(heads_first)
    )
    scores = torch.einsum("bthk,bshk->bhts", q, k.repeat_interleave(2, 2)) / math.sqrt(8)
    scores = scores.masked_fill(~torch.ones(16, 16, dtype=torch.bool).tril(), -math.inf)
    expected = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v.repeat_interleave(2, 2))
    for kernel in ("flash", "math"):
        choose_attention(make_model(tiny_hp(attention=kernel)), ALONE.device, lambda line: None)
        torch.testing.assert_close(attention_kernel(kernel)(q, k, v), expected, rtol=0, atol=1e-5)


def routed_mlp(hp, table: torch.Tensor, ids: torch.Tensor) -> tuple[TokenRoutedMLP, tuple]:
    """The first MLP of a model whose every layer routes by `table` (V, K), and its dispatch of `ids`."""
    model = make_model(hp)
    model.expert_table.copy_(table.expand_as(model.expert_table))
    return model.blocks[0].mlp, model.routes(ids, [0])[0]


def per_token_loop(mlp: TokenRoutedMLP, x: torch.Tensor, experts_of: torch.Tensor) -> torch.Tensor:
    """What the routed MLP is defined to be, one token at a time; x (B, T, D) and the experts (B, T, K) of each."""
    rows, kind = [], mlp.hp.activation
    for token, experts in zip(x.flatten(0, 1), experts_of.flatten(0, 1).tolist(), strict=True):
        routed = (
            mlp.expert_down[expert] @ activate(mlp.expert_up[expert] @ token, kind)
            for expert in experts
        )
        rows.append(mlp.down.weight @ activate(mlp.up.weight @ token, kind) + sum(routed))
    return torch.stack(rows).view_as(x)


IDS = torch.arange(64)
TABLE_OF = {
    "even": IDS[:, None] % 4,
    "one_idle": IDS[:, None] % 3,
    "first_idle": 1 + IDS[:, None] % 3,
    "one_takes_all": torch.full((64, 1), 2),
    "two": torch.stack([IDS % 4, (IDS + 1 + IDS // 4 % 3) % 4], dim=-1),
    "two_of_three": torch.stack([IDS % 3, (IDS + 1 + IDS // 3 % 2) % 3], dim=-1),
    "two_take_all": torch.tensor([[3, 1]]).expand(64, 2),
}
SHAPES = [(2, 16), (1, 7), (3, 5), (1, 1)]


@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("table", TABLE_OF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_dispatch_computes_the_per_token_loop(shape, table, activation):
    table, generator = TABLE_OF[table].to(torch.uint8), torch.Generator().manual_seed(3)
    ids, x = make_ids(tiny_hp(), *shape), torch.randn(*shape, 32, generator=generator)
    gradients = {}
    for dispatch in DISPATCH:
        hp = tiny_hp(dispatch=dispatch, activation=activation, top_k=table.size(1))
        mlp, route = routed_mlp(hp, table, ids)
        y, balance = mlp(x, route)
        assert balance == 0.0
        torch.testing.assert_close(y, per_token_loop(mlp, x, table[ids]), rtol=1e-4, atol=1e-5)
        y.sin().sum().backward()
        gradients[dispatch] = {name: p.grad for name, p in mlp.named_parameters()}
        used = set(table[ids].flatten().tolist())
        for name in ("expert_up", "expert_down"):
            for expert in range(hp.num_experts):
                gradient = gradients[dispatch][name][expert]
                assert (gradient != 0).any() == (expert in used), f"{name} of expert {expert}"
    for name, expected in gradients["masked"].items():
        for dispatch in DISPATCH:
            torch.testing.assert_close(gradients[dispatch][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [{"mu": mu} for mu in MU] + [{"top_k": 2}], ids=label)
@pytest.mark.parametrize("routing", TABLES)
def test_model_is_the_same_function_under_every_dispatch(routing, mode):
    ids, losses, gradients = None, [], []
    for dispatch in DISPATCH:
        hp = tiny_hp(routing=routing, dispatch=dispatch, **mode)
        model, ids = make_model(hp), make_ids(hp, 3, 16)
        loss = model(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for loss, gradient in zip(losses, gradients, strict=True):
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
        assert (gradient - gradients[0]).norm() < 1e-4 * gradients[0].norm()


FOLLOWS = [{"dispatch": d, "top_k": k} for d in DISPATCH for k in (1, 2)] + [{"routing": "hybrid"}]


@pytest.mark.parametrize("mode", FOLLOWS, ids=label)
@torch.no_grad()
def test_output_follows_the_table(mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp), make_ids(hp, 2, 16)
    logits, table = model(ids), model.expert_table.clone()
    assert torch.equal(model(ids), logits)
    for layer in range(hp.num_layers):
        model.expert_table.copy_(table)
        model.expert_table[layer] = (table[layer] + 1) % hp.num_experts
        assert (model(ids) - logits).abs().max() > 1e-3, (
            f"layer {layer} ignores its row of the table"
        )


ALL_CHOSEN = [
    {"routing": "modulo", "dispatch": d, "num_experts": k, "top_k": k}
    for d in DISPATCH
    for k in (1, 2)
]
ALL_CHOSEN += [
    {"routing": r, "num_experts": k, "top_k": k}
    for r in ("cluster", "learned", "hybrid")
    for k in (1, 2)
]
ALL_CHOSEN += [{"routing": "soft", "num_experts": experts} for experts in (1, 4)]


@pytest.mark.parametrize("activation", ACTIVATION)
@pytest.mark.parametrize("mode", ALL_CHOSEN, ids=label)
@torch.no_grad()
def test_experts_that_all_are_chosen_are_the_dense_mlp_of_the_joint_width(mode, activation):
    """For soft that is so as long as its router is undecided, which it is at the start."""
    knobs = {**mode, "activation": activation}
    routed, dense = (
        make_model(tiny_hp(**knobs)),
        make_model(tiny_hp(**knobs | {"routing": "dense"})),
    )
    for block in routed.blocks:
        if mode["routing"] == "soft":
            block.mlp.router.zero_()
    ids, state = make_ids(routed.hp, 2, 16), routed.state_dict()
    state["expert_table"] = dense.expert_table
    for layer, block in enumerate(routed.blocks):
        prefix, mlp = f"blocks.{layer}.mlp.", block.mlp
        up = [weight.unflatten(0, (mlp.G, -1)) for weight in (mlp.up.weight, *mlp.expert_up)]
        state[prefix + "up.weight"] = torch.cat(up, dim=1).flatten(0, 1)
        state[prefix + "down.weight"] = torch.cat([mlp.down.weight, *mlp.expert_down], dim=1)
        for name in ("expert_up", "expert_down", "router"):
            state.pop(prefix + name, None)
    before = dense(ids)
    dense.load_state_dict(state, strict=True)
    torch.testing.assert_close(dense(ids), routed(ids), rtol=0, atol=1e-5)
    assert (before - dense(ids)).abs().max() > 1e-2


# ---- Routers that read the stream


def router_inputs(model: GPT, ids: torch.Tensor, looped: bool = True) -> list[tuple]:
    """(MLP, its input, its dispatch) of every layer run."""
    seen, hooks = [], []
    for block in model.blocks:
        hooks.append(
            block.mlp.register_forward_pre_hook(lambda mlp, args: seen.append((mlp, *args)))
        )
    model.features(ids, looped)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["learned", "hybrid"])
@torch.no_grad()
def test_choices_are_those_of_the_table_at_the_start_and_of_the_router_later(routing, top_k):
    hp = tiny_hp(routing=routing, top_k=top_k)
    for noise, follow in ((0.0, True), (0.1, False)):
        model, ids = make_model(hp, noise), make_ids(hp, 4, 16)
        for mlp, x, (table_BTE,) in router_inputs(model, ids):
            factors, _ = mlp.choose(x, table_BTE)
            assert ((factors == 0) | (factors == 1)).all()
            assert (factors.sum(-1) == top_k).all()
            assert torch.equal(factors, table_BTE) == follow
            if not follow:
                mlp.router.mul_(1e4)
                best = F.linear(x, mlp.router).topk(top_k).indices
                assert (mlp.choose(x, table_BTE)[0].gather(-1, best) == 1).all()


@pytest.mark.parametrize("routing", ROUTERS)
def test_factors_have_the_gradient_of_the_softmax(routing):
    hp = tiny_hp(routing=routing)
    mlp, x, (table_BTE,) = router_inputs(make_model(hp), make_ids(hp, 2, 16))[0]
    weights = torch.randn(table_BTE.shape, generator=torch.Generator().manual_seed(0))
    scores = (
        F.linear(x, mlp.router) + {"learned": 1e-3, "hybrid": 2.0, "soft": 0.0}[routing] * table_BTE
    )
    expected = (scores.softmax(-1) * (4 if routing == "soft" else 1) * weights).sum()
    actual = (mlp.choose(x, table_BTE)[0] * weights).sum()
    assert (actual != expected) or routing == "soft"
    for parameter in (mlp.router, x):
        (theirs,) = torch.autograd.grad(expected, parameter, retain_graph=True)
        (ours,) = torch.autograd.grad(actual, parameter, retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        assert theirs.abs().max() > 1e-2


@pytest.mark.parametrize(
    "mode", [{"routing": r, "top_k": k} for r in ROUTERS for k in (1, 2)], ids=label
)
def test_every_expert_gets_tokens_and_a_gradient_in_the_first_step(mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp, noise=0.0), make_ids(hp, 4, 17)
    for mlp, x, (table_BTE,) in router_inputs(model, ids[:, :-1]):
        assert (mlp.choose(x, table_BTE)[0].flatten(0, 1) > 0).any(0).all()
    model(ids[:, :-1], ids[:, 1:]).backward()
    for block in model.blocks:
        assert (block.mlp.expert_down.grad != 0).any(-1).any(-1).all()
        # Outputs of experts are zero at the start; the Switch loss alone can move the router then.
        assert (block.mlp.router.grad != 0).any(-1).all() or hp.routing == "soft"


@torch.no_grad()
def test_hybrid_starts_as_its_table():
    """With outputs of experts that are not zero, as they would be at the very start."""
    logits = {}
    for routing in ("zipf", "hybrid", "modulo"):
        model = make_model(tiny_hp(routing=routing), noise=0.0)
        for block in model.blocks:
            block.mlp.expert_down.copy_(block.mlp.expert_up.mT)
            assert not hasattr(block.mlp, "router") or not block.mlp.router.any()
        logits[routing] = model(make_ids(model.hp, 3, 16))
    assert torch.equal(logits["hybrid"], logits["zipf"])
    assert (logits["modulo"] - logits["zipf"]).abs().max() > 1e-3


def chosen_by(shares: torch.Tensor, routing: str = "learned", top_k: int = 1) -> tuple:
    """What a lone MLP makes of inputs (N, E) that its router takes for scores."""
    experts = shares.size(-1)
    hp = tiny_hp(routing=routing, num_experts=experts, top_k=top_k)
    mlp = make_model(hp).blocks[0].mlp
    with torch.no_grad():
        mlp.router.copy_(torch.eye(experts, hp.model_dim))
    x = F.pad(shares, (0, hp.model_dim - experts))[None]
    return mlp.choose(x, torch.zeros(1, *shares.shape))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("experts", [2, 4, 8])
@pytest.mark.parametrize("routing", ["learned", "hybrid"])
def test_switch_loss_is_1_in_balance_and_rises_to_the_number_of_experts_by_collapse(
    routing, experts, top_k
):
    each = torch.eye(experts).repeat(6, 1)
    two = each if top_k == 1 else torch.maximum(each, each.roll(1, -1))
    balanced, collapsed = 1e-6 * two, 100 * two[:1].expand(12, -1)
    assert chosen_by(balanced, routing, top_k)[1].item() == pytest.approx(1.0, abs=1e-5)
    assert chosen_by(100 * two, routing, top_k)[1].item() == pytest.approx(1.0, abs=1e-5)
    assert chosen_by(collapsed, routing, top_k)[1].item() == pytest.approx(
        experts / top_k, rel=1e-5
    )
    leaning = (1.0 * two[:1]).expand(12, -1).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(chosen_by(leaning, routing, top_k)[1], leaning)
    if top_k < experts:
        assert (gradient[leaning > 0] > 0).all()  # descent takes from those who have too much
        assert gradient.sum(-1).abs().max() < 1e-6


@pytest.mark.parametrize("mode", [*WAYS, {"routing": "learned", "top_k": 2}], ids=label)
def test_only_the_mean_loss_of_training_has_the_switch_loss(mode):
    hp = tiny_hp(**mode)
    ids = make_ids(hp, 3, 17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    for looped in (False, True):
        model = make_model(hp)
        learns = hp.routing in ("learned", "hybrid")
        layers = router_inputs(model, inputs, looped) if learns else []
        balance = sum(mlp.choose(x, *route)[1].item() for mlp, x, route in layers)
        assert float(torch.as_tensor(model.features(inputs, looped)[1]).detach()) == pytest.approx(
            balance, rel=1e-6
        )
        assert (balance > len(hp.execution_order(looped))) == learns
        assert learns or balance == 0
        per_token = model(inputs, targets, reduction="none", looped=looped)
        mean = model(inputs, targets, looped=looped)
        assert (mean - per_token.mean()).item() == pytest.approx(0.01 * balance, abs=2e-6)
        model.eval()
        assert torch.equal(model(inputs, targets, reduction="none", looped=looped), per_token)
        torch.testing.assert_close(
            model(inputs, targets, looped=looped), per_token.mean(), rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("routing", ROUTERS)
@torch.no_grad()
def test_routers_work_in_float32_whatever_the_dtype(routing):
    """Scores a hundredth apart are equal in bfloat16, where 100.25 is 100."""
    hp = tiny_hp(routing=routing, dtype="bfloat16")
    mlp = make_model(hp).blocks[0].mlp
    assert mlp.router.dtype == torch.float32
    mlp.router.fill_(0.0)[:, 0] = torch.tensor([100.0, 100.25, 100.0, 100.125])
    x = F.pad(torch.ones(1, 1, 1, dtype=torch.bfloat16), (0, hp.model_dim - 1))
    factors, _ = mlp.choose(x, torch.zeros(1, 1, 4, dtype=torch.bfloat16))
    assert factors.dtype == torch.bfloat16
    expected = (
        4 * mlp.router[:, 0].softmax(-1)
        if routing == "soft"
        else torch.tensor([0.0, 1.0, 0.0, 0.0])
    )
    assert torch.equal(factors[0, 0], expected.bfloat16())


# ---- Velocity of MU=pid


@pytest.mark.parametrize("gains", [(2.2, -2.2), (4.0, 3.0)], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1e4])
@torch.no_grad()
def test_velocity_is_bounded_over_many_passes_whatever_the_weights(scale, gains):
    model = make_model(tiny_hp(mu="pid", loop_passes=16), noise=0.0)
    for name, p in model.named_parameters():
        if name.endswith(("proj.weight", "down.weight")):
            p.normal_(std=scale, generator=torch.Generator().manual_seed(p.numel()))
    decay, pull = (torch.tensor(gain).sigmoid() for gain in gains)
    seen, bound = [], 2 * pull / (1 - decay)
    for block in model.blocks:
        block.pid_gains[0], block.pid_gains[1] = gains
        block.register_forward_hook(
            lambda block, args, out: seen.append(out.velocity.square().mean(-1).sqrt().max())
        )
    assert torch.isfinite(model(make_ids(model.hp, 3, 16))).all()
    assert max(seen) < bound
    assert max(seen) > 0.1 * bound  # so the bound does bound it
    assert len(seen) == 34


@torch.no_grad()
def test_velocity_pulls_the_attention_result_towards_mu():
    model = make_model(tiny_hp(mu="pid"), noise=0.0)
    block, ids = model.blocks[0], make_ids(model.hp, 2, 16)
    seen = {}
    block.register_forward_hook(
        lambda block, args, out: seen.update(before=args[0], velocity=out.velocity)
    )
    start = model(ids)
    decay, pull = torch.tensor(2.2).sigmoid(), torch.tensor(-2.2).sigmoid()
    expected = (
        decay * seen["before"].velocity + pull * seen["before"].mu
    )  # at the start attention gives nothing
    torch.testing.assert_close(seen["velocity"], expected)
    assert (expected.square().mean(-1) > 1e-3).all()
    block.pid_gains[2] = 0.0
    assert (model(ids) - start).abs().max() > 1e-4


def test_every_gain_of_the_velocity_has_a_gradient_from_the_true_start():
    model = make_model(tiny_hp(mu="pid"), noise=0.0)
    ids = make_ids(model.hp, 4, 17)
    model(ids[:, :-1], ids[:, 1:]).backward()
    for layer, block in enumerate(model.blocks):
        for gain, gradient in zip(("decay", "pull", "gain"), block.pid_gains.grad, strict=True):
            assert (gradient != 0).all(), f"{gain} of layer {layer}"


# ---- Parameters


@pytest.mark.parametrize(
    "changes", [*({"routing": r} for r in ROUTING), {"mu": "pid"}, {"num_experts": 8}], ids=label
)
@torch.no_grad()
def test_models_that_differ_elsewhere_start_with_equal_tensors(changes):
    models = {}
    for seed in (1, 2):
        for name, hp in (("a", tiny_hp(seed=seed)), ("b", tiny_hp(seed=seed, **changes))):
            models[name, seed] = GPT(hp)
            models[name, seed].init_weights()
    states = {key: dict(model.named_parameters()) for key, model in models.items()}
    common = [
        n
        for n, p in states["a", 1].items()
        if n in states["b", 1] and p.shape == states["b", 1][n].shape
    ]
    assert len(common) > 40
    for name in common:
        assert torch.equal(states["a", 1][name], states["b", 1][name]), name
        if role_of(name) in ("embedding", "matrix", "expert") and states["a", 1][name].any():
            assert not torch.equal(states["a", 1][name], states["a", 2][name]), name
    assert not torch.equal(
        states["a", 1]["blocks.0.attn.c_q.weight"], states["a", 1]["blocks.1.attn.c_q.weight"]
    )


REFUSED = [{"top_k": 2, "num_experts": 1}, {"top_k": 3}, {"top_k": 0}]
REFUSED += [{"routing": routing, "dispatch": "grouped"} for routing in ROUTERS]


@pytest.mark.parametrize("mode", REFUSED, ids=label)
def test_modes_that_cannot_be_are_refused(mode):
    last = list(mode)[-1] if len(mode) == 1 else "|".join(mode)
    with pytest.raises(Refusal, match=f"(?i){last}"):
        tiny_hp(**mode)


def count_parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("activation", ACTIVATION)
def test_dense_and_routed_models_have_equally_many_parameters(activation):
    """But for the routers, of one vector per expert and layer."""
    sizes = {
        routing: count_parameters(GPT(tiny_hp(routing=routing, activation=activation)))
        for routing in ROUTING
    }
    routers = {routing: 4 * 4 * 32 * (routing in ROUTERS) for routing in ROUTING}
    assert all(sizes[routing] == sizes["dense"] + routers[routing] for routing in ROUTING)
    assert count_parameters(GPT(tiny_hp(activation=activation, expert_dim=16))) > sizes["dense"]


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("dispatch", DISPATCH)
def test_layers_before_the_first_routed_one_are_dense_and_as_large(dispatch, start):
    model = make_model(tiny_hp(moe_start_layer=start, dispatch=dispatch))
    assert [hasattr(block.mlp, "expert_up") for block in model.blocks] == [
        layer >= start for layer in range(4)
    ]
    assert len({count_parameters(block.mlp) for block in model.blocks}) == 1
    assert model.expert_table.shape == (4 - start, 64, 1)
    ids = make_ids(model.hp, 2, 8)
    with torch.no_grad():
        logits = model(ids)
        model.expert_table.add_(1).remainder_(4)
        assert (model(ids) - logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    "mode", MODES + SWITCHES + [{"activation": a} for a in ACTIVATION], ids=label
)
def test_every_parameter_learns_within_a_few_steps_from_the_true_start(mode):
    hp = tiny_hp(**mode, matrix_lr=0.02)
    model = make_model(hp, noise=0.0)
    optimizers, gradients = build_optimizers(hp, model, ALONE), Gradients(model, ALONE)
    alive = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}
    for step in range(5):
        ids = torch.randperm(hp.vocab_size, generator=torch.Generator().manual_seed(step)).view(
            4, 16
        )
        train_step(model, optimizers, gradients, [(ids, ids.roll(-1, 1))], max_norm=0.0)
        noise = (
            1e-6 * gradients.flat[64:].norm()
        )  # rounding leaves a gradient below this where there is none
        for name, p in model.named_parameters():
            alive[name] |= p.grad.abs() > noise
    for name, part in alive.items():
        matrices = part.view(-1, *part.shape[-2:]) if part.ndim > 1 else part[None, None]
        assert matrices.flatten(1).any(1).all(), f"{name}: no gradient"
        if role_of(name) != "matrix":  # matrices and experts may keep a dead hidden unit
            assert role_of(name) == "expert" or matrices.any(-1).all(), (
                f"{name}: a row without gradient"
            )


@pytest.mark.parametrize("mu", MU)
def test_mu_exists_only_where_a_layer_reads_it(mu):
    model = GPT(tiny_hp(mu=mu))
    names = [name for name, _ in model.named_parameters() if "mu_" in name]
    writers = [
        name for name in names if "mu_mix" in name or "mu_write" in name or "mu_base" in name
    ]
    assert bool(names) == (mu != "off")
    assert not [name for name in writers if name.startswith("blocks.3.")]
    assert bool([name for name in writers if name.startswith("blocks.2.")]) == (mu != "off")
    gains = [name for name, _ in model.named_parameters() if "pid_gains" in name]
    assert len(gains) == (4 if mu == "pid" else 0)


@pytest.mark.parametrize("mu", [mu for mu in MU if mu != "off"])
@torch.no_grad()
def test_mu_reaches_the_output_through_every_reader(mu):
    model = make_model(tiny_hp(mu=mu))
    ids = make_ids(model.hp, 2, 16)
    logits = model(ids)
    for block in model.blocks:
        without = copy.deepcopy(block.attn.state_dict())
        reader = block.attn.mu_gain if mu in ("vector", "pid") else block.attn.mu_read.weight
        reader.zero_()
        assert (model(ids) - logits).abs().max() > 1e-3
        block.attn.load_state_dict(without)
    assert torch.equal(model(ids), logits)


@pytest.mark.parametrize("mode", MODES + SWITCHES, ids=label)
@torch.no_grad()
def test_loss_is_the_cross_entropy_of_the_logits(mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp).eval(), make_ids(hp, 3, 17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    nll = -model(inputs).double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    per_token, mean = model(inputs, targets, reduction="none"), model(inputs, targets)
    assert per_token.shape == targets.shape
    assert mean.shape == ()
    torch.testing.assert_close(per_token.double(), nll, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean, per_token.mean(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("mode", MODES, ids=label)
@torch.no_grad()
def test_first_loss_is_that_of_a_uniform_guess(mode):
    hp = tiny_hp(**mode)
    model, ids = make_model(hp, noise=0.0).eval(), make_ids(hp, 4, 17)
    assert abs(model(ids[:, :-1], ids[:, 1:]).item() - math.log(hp.vocab_size)) < 0.05
    noisy = make_model(hp, noise=0.3).eval()
    assert abs(noisy(ids[:, :-1], ids[:, 1:]).item() - math.log(hp.vocab_size)) > 0.05


@torch.no_grad()
def test_initial_matrices_are_orthogonal_and_experts_differ():
    model = make_model(tiny_hp(), noise=0.0)
    for name, p in model.named_parameters():
        if role_of(name) in ("matrix", "expert") and p.any():
            values = torch.linalg.svdvals(p)
            torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-4, msg=name)
    up = model.blocks[0].mlp.expert_up
    assert all((up[0] - up[e]).abs().max() > 0.05 for e in range(1, 4))
    assert (make_model(tiny_hp(seed=7), noise=0.0).blocks[0].mlp.expert_up - up).abs().max() > 0.05
    assert torch.equal(make_model(tiny_hp(), noise=0.0).blocks[0].mlp.expert_up, up)


@torch.no_grad()
def test_logits_are_capped_at_30_and_free_near_zero():
    model = make_model(tiny_hp())
    ids = make_ids(model.hp, 2, 16)
    model.tok_emb.weight.mul_(1e3)
    large = model(ids)
    assert 29.9 < large.abs().max() <= 30.0
    model.tok_emb.weight.mul_(1e-6)
    small = model(ids)
    hidden = []
    model.blocks[-1].register_forward_hook(lambda module, args, out: hidden.append(out[0]))
    torch.testing.assert_close(model(ids), small)
    raw = F.rms_norm(hidden[0], (32,)) @ model.tok_emb.weight.T
    torch.testing.assert_close(small, raw, rtol=1e-4, atol=1e-7)
    assert small.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.no_grad()
def test_logits_and_loss_are_float32_in_every_dtype(dtype):
    for dispatch in DISPATCH:
        model = make_model(tiny_hp(dtype=dtype, dispatch=dispatch))
        ids = make_ids(model.hp, 2, 16)
        reference = make_model(tiny_hp(dispatch=dispatch))
        assert model(ids).dtype == model(ids, ids).dtype == torch.float32
        change = (model(ids, ids) - reference(ids, ids)).abs()
        assert change < 0.05
        assert (change > 0) == (dtype == "bfloat16")


ALL_OFF = {
    "loop_passes": 1,
    "parallel_start_layer": 99,
    "xsa": False,
    "routing": "dense",
    "mu": "off",
}
ALL_OFF |= dict.fromkeys(
    ("routing_per_pass", "ln_scale", "skip_gates", "attn_gate", "smear_gate"), False
)
COMPILED = [
    {},
    {"mu": "lowrank"},
    {"dispatch": "grouped"},
    {"mu": "full", "dispatch": "grouped", "loop_passes": 1},
]
COMPILED += [
    {"loop_end": 3},
    {"routing": "learned", "mu": "pid", "loop_end": 3},
    {"routing": "hybrid", "top_k": 2},
]
COMPILED += [{"top_k": 2, "dispatch": "grouped"}, {"routing": "soft"}, ALL_OFF]


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPILED, ids=label)
def test_compiler_sees_one_graph_whatever_the_token_values_are(mode):
    dtype = "bfloat16" if mode.get("dispatch") == "grouped" else "float32"
    hp = tiny_hp(**mode, dtype=dtype)
    model, inputs = make_model(hp), torch.zeros(2, 16, dtype=torch.int64)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(3):
        loss = compiled(inputs, inputs)
        loss.backward()
        torch.testing.assert_close(loss, model(inputs, inputs), rtol=1e-5, atol=0)
        assert counter.frame_count == 1
        inputs = make_ids(hp, 2, 16, seed)
    for looped in (False, True, False):
        compiled(inputs, inputs, looped=looped)
        assert (
            counter.frame_count == 2
        )  # one more for the depth before the recurrence, so the count does count


@pytest.mark.slow
@pytest.mark.parametrize("mode", [COMPILED[2], COMPILED[5]], ids=label)
@torch.no_grad()
def test_compiler_sees_one_graph_wherever_the_scored_positions_are(mode):
    hp = tiny_hp(**mode, dtype="bfloat16" if mode.get("dispatch") == "grouped" else "float32")
    model, counter = make_model(hp), torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
    for seed, positions in enumerate([SCORED, (SCORED + 5) % 16, torch.zeros_like(SCORED)]):
        inputs, targets = make_ids(hp, 3, 16, seed), make_ids(hp, 3, 5, seed)
        losses = compiled(inputs, targets, reduction="none", scored=positions)
        torch.testing.assert_close(
            losses, model(inputs, targets, reduction="none", scored=positions)
        )
        assert counter.frame_count == 1
    compiled(inputs, inputs, reduction="none", scored=None)
    assert counter.frame_count == 2  # another shape of the output, so the count does count


@pytest.mark.slow
@torch.no_grad()
def test_generated_code_agrees_with_eager():
    hp = tiny_hp(num_layers=2, loop_start=0, loop_end=0, loop_passes=2, compile=True)
    if not can_compile(hp, ALONE.device):
        pytest.skip("no C++ compiler or no Python.h")
    model = make_model(hp)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    for seed in range(2):
        ids = make_ids(hp, 2, 17, seed)
        inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
        torch.testing.assert_close(
            compiled(inputs, targets), model(inputs, targets), rtol=1e-5, atol=1e-5
        )
        few = inputs[:, :5].contiguous(), "none", True, SCORED[seed : seed + 2]
        torch.testing.assert_close(
            compiled(inputs, *few), model(inputs, *few), rtol=1e-5, atol=1e-5
        )
