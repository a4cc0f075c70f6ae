"""The model: causality, attention, recurrence, experts, routers, mu, initial weights, loss."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import ALONE, make_ids, make_model, tiny_hp
from helpers_cli import allow_every_attention_kernel
from torch import Tensor

import train_gpt
from train_gpt import (
    BOS_ID,
    GPT,
    CausalSelfAttention,
    ConfigError,
    Gradients,
    Hyperparameters,
    TokenRoutedMLP,
    activate,
    build_optimizers,
    can_compile,
    choose_attention,
    expert_linear,
    group_tokens,
    role_of,
    rotary_tables,
    sdpa_attention,
    train_step,
)

# Pairs of routing, dispatch, mu, activation, recurrence and the switches, not their product.
MODES = {
    "record": {},
    "grouped": {"dispatch": "grouped", "loop_passes": 3, "routing_per_pass": False},
    "grouped_full": {"dispatch": "grouped", "mu": "full", "activation": "swiglu"},
    "grouped_pid": {"dispatch": "grouped", "mu": "pid", "routing": "hash", "loop_end": 3},
    "grouped_off": {"dispatch": "grouped", "mu": "off", "routing": "modulo", "loop_passes": 1},
    "hash_off": {"routing": "hash", "mu": "off", "activation": "swiglu", "ln_scale": False},
    "modulo_pid": {"routing": "modulo", "mu": "pid", "loop_start": 0, "parallel_start_layer": 0},
    "zipf_full": {"mu": "full", "loop_passes": 1, "xsa": False, "smear_gate": False},
    "learned": {"routing": "learned", "routing_per_pass": False, "attn_gate": False},
    "learned_pid": {"routing": "learned", "mu": "pid", "loop_end": 3, "activation": "swiglu"},
    "hybrid": {"routing": "hybrid", "loop_passes": 3, "parallel_start_layer": 99},
    "soft_full": {"routing": "soft", "mu": "full", "skip_gates": False},
    "soft_off": {"routing": "soft", "mu": "off", "loop_passes": 1},
    "dense": {"routing": "dense", "loop_passes": 3, "activation": "swiglu"},
}
OFF = ("routing_per_pass", "xsa", "ln_scale", "skip_gates", "attn_gate", "smear_gate")
MODES["all_off"] = dict.fromkeys(OFF, False)
MODES["all_off"] |= {"routing": "dense", "mu": "off", "loop_passes": 1, "parallel_start_layer": 99}
ROUTERS = ("learned", "hybrid", "soft")
ROUTING = ("zipf", "hash", "modulo", *ROUTERS, "dense")
MU = ("vector", "full", "pid", "off")

# Of 16 positions, in any order, with repeats and both ends.
SCORED = torch.tensor([[15, 0, 7, 7, 3], [0, 15, 2, 1, 14], [4, 9, 4, 0, 12]])


def tolerance(hp: Hyperparameters) -> float:
    """None, but a GEMM over an expert's rows rounds by their number."""
    return 5e-6 if hp.model.is_grouped else 0.0


def other_tokens(ids: Tensor) -> Tensor:
    """Ids below 64 that differ everywhere from `ids`."""
    return (ids + 1 + torch.arange(ids.numel()).view_as(ids) % 63) % 64


# ---- Causality and independence ------------------------------------------------------------------


@torch.no_grad()
def check_causality(model: GPT, ids: Tensor, atol: float) -> None:
    """Logits depend on the token itself and on those before it, and on no other."""
    logits = model(ids)
    other = other_tokens(ids)
    for t in (0, 3, 7, 14):
        later = ids.clone()
        later[:, t + 1 :] = other[:, t + 1 :]
        changed = model(later)
        torch.testing.assert_close(changed[:, : t + 1], logits[:, : t + 1], rtol=0, atol=atol)
        assert ((changed - logits)[:, t + 1 :].abs().amax(-1) > 1e-3).all()

        now = ids.clone()
        now[:, t] = other[:, t]
        assert ((model(now) - logits)[:, t].abs().amax(-1) > 1e-3).all()
    torch.testing.assert_close(model(ids[:, :5]), logits[:, :5], rtol=0, atol=1e-5)


@torch.no_grad()
def check_batch_independence(model: GPT, ids: Tensor, atol: float) -> None:
    """A row has the same logits whatever the other rows are."""
    others = other_tokens(ids)
    others[1] = ids[1]
    logits = model(ids)
    among_others = model(others)
    torch.testing.assert_close(among_others[1], logits[1], rtol=0, atol=atol)
    assert ((among_others - logits)[[0, 2]].abs().amax(-1) > 1e-3).all()


@pytest.mark.parametrize("mode", MODES)
def test_logits_depend_on_no_later_token_and_on_no_other_row(mode):
    hp = tiny_hp(**MODES[mode])
    model = make_model(hp)
    check_causality(model, make_ids(hp, 1, 16), tolerance(hp))
    check_causality(model, make_ids(hp, 3, 16), tolerance(hp))
    check_batch_independence(model, make_ids(hp, 3, 16), tolerance(hp))


def attend_both_ways(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)


def share_over_time(x: Tensor, table_BTE: Tensor) -> tuple[Tensor, float]:
    """Let experts choose tokens, as expert-choice routing does."""
    return 4 * x[..., :4].softmax(dim=1), 0.0


def smear_next_token(x: Tensor, ids: Tensor) -> Tensor:
    return x + 0.1 * x.roll(-1, 1)


def smear_other_rows(x: Tensor, ids: Tensor) -> Tensor:
    return x + 0.1 * x.mean(0)


@pytest.mark.parametrize(
    ("check", "part", "leak"),
    [
        (check_causality, "attn.attend", attend_both_ways),
        (check_causality, "mlp.choose", share_over_time),
        (check_causality, "smear", smear_next_token),
        (check_batch_independence, "smear", smear_other_rows),
    ],
)
def test_a_planted_leak_is_caught(monkeypatch, check, part, leak):
    hp = tiny_hp()
    model = make_model(hp)
    check(model, make_ids(hp, 3, 16), 0.0)
    owner = model if part == "smear" else model.blocks[2].get_submodule(part.split(".")[0])
    monkeypatch.setattr(owner, part.split(".")[-1], leak)
    with pytest.raises(AssertionError):
        check(model, make_ids(hp, 3, 16), 0.0)


# ---- Scored positions ----------------------------------------------------------------------------


def at(positions: Tensor, values: Tensor) -> Tensor:
    """`values` (B, T, ...) at some positions of each row, (B, S, ...)."""
    return torch.stack([row[where] for row, where in zip(values, positions, strict=True)])


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_losses_are_cross_entropies_and_scored_positions_get_those_of_the_full_forward(mode):
    hp = tiny_hp(**MODES[mode])
    model = make_model(hp).eval()
    ids = make_ids(hp, 3, 17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    there = at(SCORED, targets)
    for looped in (True, False):
        logits = model(inputs, looped=looped)
        chosen = model(inputs, looped=looped, scored=SCORED)
        torch.testing.assert_close(chosen, at(SCORED, logits), rtol=0, atol=1e-5)
        elsewhere = model(inputs, looped=looped, scored=(SCORED + 1) % 16)
        assert ((elsewhere - chosen).abs().amax(-1) > 1e-3).all()

        losses = model(inputs, targets, reduction="none", looped=looped)
        nll = -logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        torch.testing.assert_close(losses, nll, rtol=1e-5, atol=1e-5)
        few = model(inputs, there, reduction="none", looped=looped, scored=SCORED)
        torch.testing.assert_close(few, at(SCORED, losses), rtol=0, atol=1e-5)
        mean = model(inputs, there, looped=looped, scored=SCORED)
        torch.testing.assert_close(mean, few.mean(), rtol=1e-5, atol=0)
    fresh = make_model(hp, noise=0.0).eval()
    assert fresh(inputs, targets).item() == pytest.approx(math.log(64), abs=0.05)


@pytest.mark.parametrize("mode", MODES)
def test_scored_positions_send_the_gradients_of_the_full_forward(mode):
    hp = tiny_hp(**MODES[mode])
    ids = make_ids(hp, 3, 17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    weights = torch.arange(1.0, 16.0).view(3, 5)

    def gradients(positions: Tensor | None) -> dict[str, Tensor]:
        model = make_model(hp)
        if positions is None:
            losses = at(SCORED, model(inputs, targets, reduction="none"))
        else:
            losses = model(inputs, at(positions, targets), reduction="none", scored=positions)
        (losses * weights).sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    few = gradients(SCORED)
    elsewhere = gradients((SCORED + 1) % 16)
    for name, full in gradients(None).items():
        assert (few[name] - full).norm() <= 1e-4 * full.norm() + 1e-6, name
        assert (elsewhere[name] - full).norm() > 1e-2 * full.norm(), name


# ---- Attention and position ----------------------------------------------------------------------


def angles(dims: int, trained_len: int, length: int) -> Tensor:
    """(length, dims / 2) angles in -pi to pi, of a model for windows of `length` tokens."""
    hp = tiny_hp(train_seq_len=trained_len, model_dim=64, num_heads=1, num_kv_heads=1)
    config = replace(hp.model, rope_dims=dims)
    model = GPT(config, context=length)
    cos, sin = rotary_tables(length, model.rope_base, dims, ALONE.device)
    return torch.atan2(sin.double(), cos.double())[:, 0]


@pytest.mark.parametrize(("dims", "ratio"), [(4, 8), (16, 2), (64, 8)])
def test_beyond_the_trained_length_the_slowest_rotation_turns_as_far_as_it_did_there(dims, ratio):
    """Frequency i of n is slowed by ratio ** (i / (n - 1)): NTK-aware scaling."""
    trained = angles(dims, 16, 16)
    frequencies = 10_000.0 ** (-torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    torch.testing.assert_close(trained[1], frequencies, rtol=1e-5, atol=0)
    torch.testing.assert_close(angles(dims, 64, 16), trained, rtol=0, atol=0)

    longer = angles(dims, 16, 16 * ratio)
    slowed = ratio ** torch.linspace(0, 1, dims // 2, dtype=torch.float64)
    torch.testing.assert_close(longer[1] * slowed, frequencies, rtol=1e-4, atol=0)
    torch.testing.assert_close(longer[::ratio, -1], trained[:, -1], rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dims", "is_stretched"), [(0, False), (2, False), (4, True), (8, True)])
@torch.no_grad()
def test_a_longer_context_changes_every_input_alike_however_short(dims, is_stretched):
    """A padded window and a bare one must agree. The fastest of two rotations is not slowed."""
    hp = tiny_hp(rope_dims=dims)
    ids = make_ids(hp, 2, 16)
    change = (make_model(hp)(ids) - make_model(hp, context=32)(ids)).abs().amax()
    assert (change > 1e-4) if is_stretched else (change == 0)


def reference_attention(attn: CausalSelfAttention, x: Tensor, mu: Tensor, angles: Tensor) -> Tensor:
    """What the module is defined to be, one query and head at a time; angles (T, dims / 2)."""
    config = attn.config
    half = angles.size(-1)

    def heads(weight: Tensor, gain: Tensor) -> Tensor:
        return ((x + gain * mu) @ weight.T).unflatten(-1, (-1, config.head_dim))

    def rotated(y: Tensor) -> Tensor:
        y = y / (y.square().mean(-1, keepdim=True) + torch.finfo(y.dtype).eps).sqrt()
        pairs = torch.complex(y[..., :half], y[..., half : 2 * half])
        pairs = pairs * torch.polar(torch.ones_like(angles), -angles)[:, None]
        return torch.cat([pairs.real, pairs.imag, y[..., 2 * half :]], dim=-1)

    q = rotated(heads(attn.c_q.weight, attn.mu_gain[0])) * attn.q_gain[:, None]
    k = rotated(heads(attn.c_k.weight, attn.mu_gain[1]))
    v = heads(attn.c_v.weight, attn.mu_gain[2])
    out = torch.zeros_like(q)
    for b, t, h in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        shared = h // (config.num_heads // config.num_kv_heads)
        scores = k[b, : t + 1, shared] @ q[b, t, h] / math.sqrt(config.head_dim)
        y = scores.softmax(0) @ v[b, : t + 1, shared]
        own = v[b, t, shared]
        if config.xsa:
            y = y - (y @ own) / (own @ own) * own
        if config.attn_gate:
            y = y * 2 * torch.sigmoid(attn.gate[h] @ x[b, t, :12])
        out[b, t, h] = y
    return out.flatten(2) @ attn.proj.weight.T


@pytest.mark.parametrize("parts", [{}, {"xsa": False}, {"attn_gate": False}], ids=str)
@torch.no_grad()
def test_attention_is_its_definition(parts):
    hp = tiny_hp(**parts)
    attn = make_model(hp).blocks[1].attn
    x, mu = torch.randn(2, 2, 16, 32, generator=torch.Generator().manual_seed(0))
    cos, sin = rotary_tables(16, 10_000.0, 4, ALONE.device)
    expected = reference_attention(attn, x, mu, torch.atan2(sin, cos)[:, 0])
    torch.testing.assert_close(attn(x, mu, (cos, sin)), expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def sdpa_flags():
    """Turns PyTorch's attention kernels on again in the end."""
    yield
    allow_every_attention_kernel()


def test_attention_ladder_takes_the_first_kernel_that_runs_and_says_so(sdpa_flags, monkeypatch):
    hp = tiny_hp()
    ids = make_ids(hp, 2, 16)
    logits = make_model(hp)(ids)

    def choose(kernel: str) -> tuple[str, str]:
        model = make_model(hp)
        lines = []
        chosen = choose_attention(kernel, model, ALONE.device, lines.append)
        torch.testing.assert_close(model(ids), logits, rtol=0, atol=1e-5)
        return chosen, lines[0]

    assert choose("flash") == ("flash", "attention:flash")
    assert choose("math") == ("math", "attention:math")
    kernel, line = choose("auto")
    assert kernel == "flash"
    assert line.startswith("attention:flash (not fa3: ")
    assert "(not cudnn: " in line
    for kernel in ("fa3", "cudnn"):
        with pytest.raises(ConfigError, match=f"^ATTENTION={kernel}: not {kernel}: "):
            choose(kernel)

    def unfit(*inputs: Tensor, causal: bool) -> None:
        raise SystemExit("this kernel needs another GPU")

    monkeypatch.setitem(sys.modules, "flash_attn_interface", SimpleNamespace(flash_attn_func=unfit))
    assert "not fa3: this kernel needs another GPU" in choose("auto")[1]

    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        calls.append(q.shape)
        assert causal
        return sdpa_attention(q, k, v)

    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    assert choose("auto") == ("fa3", "attention:fa3")
    assert calls == [(1, 128, 4, 8)] + [(2, 16, 4, 8)] * 6


# ---- Recurrence ----------------------------------------------------------------------------------


def unrolled(model: GPT) -> GPT:
    """A model without recurrence that has a layer of its own for every layer that `model` runs."""
    config = model.config
    order = config.execution_order(True)
    state = model.state_dict()
    new = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    table = []
    for step, layer in enumerate(order):
        prefix = f"blocks.{layer}."
        for name, tensor in state.items():
            if name.startswith(prefix):
                new[name.replace(prefix, f"blocks.{step}.")] = tensor
        passes = order[:step].count(layer) if config.routing_per_pass else 0
        table.append((state["expert_table"][layer] + passes) % config.num_experts)
    new["expert_table"] = torch.stack(table)
    deep = GPT(replace(config, num_layers=len(order), loop_passes=1))
    difference = deep.load_state_dict(new, strict=False)
    assert not difference.missing_keys
    assert all("mu_" in name for name in difference.unexpected_keys)  # nobody reads the last one's
    return deep


@pytest.mark.parametrize(
    ("mode", "loop"),
    [
        ("record", (1, 2, 2)),
        ("grouped", (0, 3, 3)),
        ("grouped_full", (1, 2, 3)),
        ("hash_off", (0, 0, 2)),
        ("modulo_pid", (3, 3, 4)),
        ("learned_pid", (0, 3, 2)),
        ("hybrid", (2, 3, 3)),
        ("soft_full", (1, 1, 3)),
    ],
)
@torch.no_grad()
def test_recurrence_is_the_unrolled_network(mode, loop):
    start, end, passes = loop
    knobs = MODES[mode] | {"loop_start": start, "loop_end": end, "loop_passes": passes}
    hp = tiny_hp(**knobs | {"ln_scale": False, "parallel_start_layer": 99})
    model = make_model(hp)
    ids = make_ids(hp, 2, 16)
    torch.testing.assert_close(unrolled(model)(ids), model(ids), rtol=0, atol=1e-5)
    assert (model(ids, looped=False) - model(ids)).abs().max() > 1e-2


@pytest.mark.parametrize("mu", MU)
@torch.no_grad()
def test_before_the_recurrence_the_model_is_one_without(mu):
    once = make_model(tiny_hp(loop_passes=1, mu=mu))
    thrice = make_model(tiny_hp(loop_passes=3, mu=mu))
    ids = make_ids(tiny_hp(), 2, 16)
    assert torch.equal(once(ids), once(ids, looped=False))
    state = thrice.state_dict()
    for name in ("skip_weights", "skip_gates"):
        state[name] = state[name][: len(once.skip_weights)]
    once.load_state_dict(state)
    assert torch.equal(once(ids), thrice(ids, looped=False))


def test_execution_order_of_the_record_is_that_of_upstream():
    order = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    config = Hyperparameters().model
    assert config.execution_order(True) == order
    assert config.execution_order(False) == list(range(11))


# ---- Gates, scales and residuals -----------------------------------------------------------------


@pytest.mark.parametrize("switch", ["attn_gate", "smear_gate"])
@torch.no_grad()
def test_gates_are_neutral_at_the_start_and_matter_later(switch):
    hp = tiny_hp()
    on = make_model(hp)
    off = make_model(tiny_hp(**{switch: False}))
    state = on.state_dict()
    off.load_state_dict({name: state[name] for name in off.state_dict()})
    gates = [on.get_parameter(name) for name in state if name not in off.state_dict()]
    assert gates
    for gate in gates:
        gate.zero_()
    ids = make_ids(hp, 2, 16)
    torch.testing.assert_close(on(ids), off(ids), rtol=0, atol=1e-5)
    for gate in gates:
        gate.fill_(0.5)
    assert (on(ids) - off(ids)).abs().max() > 1e-3


@torch.no_grad()
def test_the_previous_token_never_reaches_across_the_start_of_a_document():
    hp = tiny_hp()
    model = make_model(hp)
    ids = make_ids(hp, 2, 16).clamp(min=2)
    ids[:, 6] = BOS_ID
    ids[1, 9] = BOS_ID

    def added(ids: Tensor) -> Tensor:
        """What SmearGate adds to the embeddings."""
        x = model.tok_emb(ids)
        return model.smear(x, ids) - x

    amount = added(ids).abs().amax(-1)
    starts = ids == BOS_ID
    starts[:, 0] = True
    assert (amount[starts] == 0).all()
    assert (amount[~starts] > 1e-5).all()  # the token after BOS may see BOS


@pytest.mark.parametrize(
    ("knobs", "is_parallel", "scale"),
    [({}, True, 0.5), ({"parallel_start_layer": 99, "ln_scale": False}, False, 1.0)],
)
@torch.no_grad()
def test_layer_scale_and_parallel_residual_change_what_the_branches_read(knobs, is_parallel, scale):
    hp = tiny_hp(**knobs)
    model = make_model(hp)
    reads = {}
    block = model.blocks[3]
    block.attn.register_forward_pre_hook(lambda module, args: reads.update(attn=args[0]))
    block.mlp.register_forward_pre_hook(lambda module, args: reads.update(mlp=args[0]))
    model(make_ids(hp, 2, 16))
    assert torch.equal(reads["attn"], reads["mlp"]) == is_parallel
    rms = reads["attn"].square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.full_like(rms, scale), rtol=1e-3, atol=0)


# ---- Experts -------------------------------------------------------------------------------------


def per_token_loop(mlp: TokenRoutedMLP, x: Tensor, factor_BTE: Tensor) -> Tensor:
    """What the routed MLP is defined to be, one token and one of its experts at a time."""
    kind = mlp.config.activation
    rows = []
    for token, factors in zip(x.flatten(0, 1), factor_BTE.flatten(0, 1), strict=True):
        y = mlp.down.weight @ activate(mlp.up.weight @ token, kind)
        for expert in factors.nonzero().flatten():
            hidden = activate(mlp.expert_up[expert] @ token, kind)
            y = y + mlp.expert_down[expert] @ (factors[expert] * hidden)
        rows.append(y)
    return torch.stack(rows).view_as(x)


TABLES = {
    "even": torch.arange(64) % 4,
    "last_idle": torch.arange(64) % 3,
    "first_idle": 1 + torch.arange(64) % 3,
    "one_takes_all": torch.full((64,), 2),
}


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
@pytest.mark.parametrize(
    ("table", "shape", "activation"),
    [
        ("even", (2, 16), "leaky_relu2"),
        ("even", (1, 1), "swiglu"),
        ("last_idle", (3, 5), "swiglu"),
        ("first_idle", (1, 7), "leaky_relu2"),
        ("one_takes_all", (2, 16), "swiglu"),
    ],
)
def test_every_dispatch_computes_the_per_token_loop(table, shape, activation, dispatch):
    hp = tiny_hp(dispatch=dispatch, activation=activation)
    model = make_model(hp)
    model.expert_table.copy_(TABLES[table].expand_as(model.expert_table))
    mlp = model.blocks[0].mlp
    ids = make_ids(hp, *shape)
    x = torch.randn(*shape, 32, generator=torch.Generator().manual_seed(3))
    parameters = dict(mlp.named_parameters())

    y, balance = mlp(x, model.routes(ids, [0])[0])
    gradients = torch.autograd.grad(y.sin().sum(), parameters.values())
    expected = per_token_loop(mlp, x, F.one_hot(TABLES[table][ids], 4))
    assert balance == 0.0
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)

    references = torch.autograd.grad(expected.sin().sum(), parameters.values())
    for name, gradient, reference in zip(parameters, gradients, references, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5, msg=name)
        if name.startswith("expert"):
            used = [bool(one.any()) for one in gradient]
            assert used == [expert in TABLES[table][ids] for expert in range(4)], name


@pytest.mark.parametrize("shape", [(3, 40, 4), (1, 1, 1), (2, 7, 16)], ids=str)
def test_groups_are_a_stable_sort_and_its_inverse(shape):
    layers, tokens, experts = shape
    chosen = torch.randint(experts, (layers, tokens), generator=torch.Generator().manual_seed(2))
    for row, groups in zip(chosen, group_tokens(chosen, experts), strict=True):
        assert torch.equal(groups.order, row.argsort(stable=True))
        assert torch.equal(groups.order[groups.place], torch.arange(tokens))
        assert torch.equal(groups.ends, row.bincount(minlength=experts).cumsum(0).int())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", [[3, 7, 9], [0, 9, 9], [0, 0, 9]], ids=str)
def test_operator_keeps_what_it_promises_the_compiler(dtype, ends):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(3, 5, 8, generator=generator).to(dtype).requires_grad_()
    torch.library.opcheck(expert_linear, (x, weight, torch.tensor(ends, dtype=torch.int32)))


def test_a_copy_of_the_file_leaves_the_operators_of_the_first(monkeypatch):
    hp = tiny_hp(dispatch="grouped")
    model, ids = make_model(hp), make_ids(hp, 2, 16)
    expected = model(ids)
    spec = importlib.util.spec_from_file_location("copied", train_gpt.__file__)
    copied = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "copied", copied)
    spec.loader.exec_module(copied)
    assert copied.expert_linear._qualname == "copied::expert_linear"
    assert torch.equal(model(ids), expected)


@pytest.mark.parametrize(
    ("knobs", "is_grouped"),
    [
        ({"shared_dim": 64, "expert_dim": 8}, True),  # a token skips 24 of 96 units
        ({"shared_dim": 72, "expert_dim": 8}, False),
        ({"shared_dim": 8, "expert_dim": 12}, False),
        ({"shared_dim": 8, "expert_dim": 16, "routing": "soft"}, False),
        ({"shared_dim": 8, "expert_dim": 16, "routing": "dense"}, False),
    ],
    ids=str,
)
def test_auto_groups_where_a_token_skips_a_quarter_of_the_width(knobs, is_grouped):
    assert tiny_hp(dispatch="auto", **knobs).model.is_grouped == is_grouped


@pytest.mark.parametrize("mode", ["record", "grouped", "hybrid"])
@torch.no_grad()
def test_every_layer_follows_its_row_of_the_table(mode):
    hp = tiny_hp(**MODES[mode])
    model = make_model(hp)
    ids = make_ids(hp, 2, 16)
    logits = model(ids)
    table = model.expert_table.clone()
    for layer in range(4):
        model.expert_table.copy_(table)
        model.expert_table[layer] = (table[layer] + 1) % 4
        assert (model(ids) - logits).abs().max() > 1e-3, f"layer {layer}"


# ---- Routers that read the stream ----------------------------------------------------------------


def router_inputs(model: GPT, ids: Tensor) -> list[tuple[TokenRoutedMLP, Tensor, Tensor]]:
    """(MLP, its input, what the table chooses) of every layer run."""
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, args: seen.append((mlp, *args)))
    model.features(ids)
    return list(seen)  # calling the MLPs again adds to `seen`


@pytest.mark.parametrize("mode", ["learned", "learned_pid", "hybrid", "soft_full"])
@torch.no_grad()
def test_routed_outputs_are_the_per_token_loop_over_what_the_router_chose(mode):
    hp = tiny_hp(**MODES[mode])
    for mlp, x, table_BTE in router_inputs(make_model(hp), make_ids(hp, 2, 8)):
        expected = per_token_loop(mlp, x, mlp.choose(x, table_BTE)[0])
        torch.testing.assert_close(mlp(x, table_BTE)[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("routing", ["learned", "hybrid"])
@torch.no_grad()
def test_choices_are_those_of_the_table_at_the_start_and_of_the_router_later(routing):
    hp = tiny_hp(routing=routing)
    ids = make_ids(hp, 4, 16)
    for mlp, x, table_BTE in router_inputs(make_model(hp, noise=0.0), ids):
        assert torch.equal(mlp.choose(x, table_BTE)[0], table_BTE)
    for mlp, x, table_BTE in router_inputs(make_model(hp), ids):
        assert not torch.equal(mlp.choose(x, table_BTE)[0], table_BTE)
        mlp.router.mul_(1e4)
        best = F.linear(x, mlp.router).argmax(-1)
        assert torch.equal(mlp.choose(x, table_BTE)[0], F.one_hot(best, 4).float())


@pytest.mark.parametrize(("routing", "bonus"), [("learned", 1e-3), ("hybrid", 2.0), ("soft", 0.0)])
def test_factors_have_the_gradient_of_the_softmax(routing, bonus):
    hp = tiny_hp(routing=routing)
    mlp, x, table_BTE = router_inputs(make_model(hp), make_ids(hp, 2, 16))[0]
    weights = torch.randn(table_BTE.shape, generator=torch.Generator().manual_seed(0))
    share = (F.linear(x, mlp.router) + bonus * table_BTE).softmax(-1)
    expected = ((4 * share if routing == "soft" else share) * weights).sum()
    actual = (mlp.choose(x, table_BTE)[0] * weights).sum()
    theirs = torch.autograd.grad(expected, (mlp.router, x), retain_graph=True)
    ours = torch.autograd.grad(actual, (mlp.router, x))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 1e-2 for gradient in theirs)


def choose_by(scores: Tensor, routing: str) -> tuple[Tensor, Tensor]:
    """Factors and Switch loss of a lone MLP whose router takes its inputs (N, E) for scores."""
    experts = scores.size(-1)
    hp = tiny_hp(routing=routing, num_experts=experts)
    mlp = make_model(hp).blocks[0].mlp
    with torch.no_grad():
        mlp.router.copy_(torch.eye(experts, 32))
    x = F.pad(scores, (0, 32 - experts))[None]
    return mlp.choose(x, torch.zeros(1, *scores.shape))


@pytest.mark.parametrize(("routing", "experts"), [("learned", 2), ("hybrid", 8)])
def test_switch_loss_is_1_in_balance_and_rises_to_the_number_of_experts(routing, experts):
    each = torch.eye(experts).repeat(6, 1)
    assert choose_by(1e-6 * each, routing)[1].item() == pytest.approx(1.0, abs=1e-5)
    assert choose_by(100 * each, routing)[1].item() == pytest.approx(1.0, abs=1e-5)
    collapsed = each[:1].expand(12, -1)
    assert choose_by(100 * collapsed, routing)[1].item() == pytest.approx(experts, rel=1e-5)

    # Descent takes from the expert that has too much, and gives to the others.
    leaning = collapsed.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(choose_by(leaning, routing)[1], leaning)
    assert (gradient[:, 0] > 0).all()
    assert (gradient[:, 1:] < 0).all()


@pytest.mark.parametrize("mode", ["record", "grouped", "learned", "hybrid", "soft_full"])
def test_only_the_mean_loss_of_training_has_the_switch_loss(mode):
    hp = tiny_hp(**MODES[mode])
    model = make_model(hp)
    ids = make_ids(hp, 3, 17)
    inputs, targets = ids[:, :-1], ids[:, 1:]
    layers = len(hp.model.execution_order(True))
    balance = float(torch.as_tensor(model.features(inputs)[1]).detach())
    assert balance > layers if mode in ("learned", "hybrid") else balance == 0

    per_token = model(inputs, targets, reduction="none")
    in_training = model(inputs, targets)
    assert (in_training - per_token.mean()).item() == pytest.approx(0.01 * balance, abs=2e-6)
    model.eval()
    torch.testing.assert_close(model(inputs, targets), per_token.mean(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("routing", ROUTERS)
@torch.no_grad()
def test_routers_work_in_float32_whatever_the_dtype(routing):
    """Scores a quarter apart are equal in bfloat16, where 100.25 is 100."""
    hp = tiny_hp(routing=routing, dtype="bfloat16")
    mlp = make_model(hp).blocks[0].mlp
    mlp.router.zero_()
    mlp.router[:, 0] = torch.tensor([100.0, 100.25, 100.0, 100.125])
    x = F.pad(torch.ones(1, 1, 1, dtype=torch.bfloat16), (0, 31))
    factors, _ = mlp.choose(x, torch.zeros(1, 1, 4, dtype=torch.bfloat16))
    expected = torch.tensor([0.0, 1.0, 0.0, 0.0])
    if routing == "soft":
        expected = 4 * mlp.router[:, 0].softmax(-1)
    assert torch.equal(factors[0, 0], expected.bfloat16())


# ---- Mu ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", MU)
@torch.no_grad()
def test_mu_exists_only_where_a_layer_reads_it_and_every_reader_reaches_the_output(mu):
    hp = tiny_hp(mu=mu)
    model = make_model(hp)
    writing_layers = set()
    readers = []
    for name in model.state_dict():
        if re.search("mu_(mix|write|base)", name):
            writing_layers.add(int(name.split(".")[1]))
        elif re.search("mu_(gain|read)", name):
            readers.append(model.get_parameter(name))
    assert writing_layers == (set() if mu == "off" else {0, 1, 2})
    assert len(readers) == (0 if mu == "off" else 4)

    ids = make_ids(hp, 2, 16)
    logits = model(ids)
    for parameter in readers:
        kept = parameter.clone()
        parameter.zero_()
        assert (model(ids) - logits).abs().max() > 1e-3
        parameter.copy_(kept)


@pytest.mark.parametrize(
    ("mu", "scale", "gains"),
    [
        ("pid", 1.0, (4.0, 3.0)),
        ("pid", 1e4, (2.2, -2.2)),
        ("vector", 1e4, None),
        ("full", 1e4, None),
    ],
)
@torch.no_grad()
def test_mu_and_velocity_are_bounded_over_many_passes_whatever_the_weights(mu, scale, gains):
    hp = tiny_hp(mu=mu, loop_passes=16)
    model = make_model(hp, noise=0.0)
    guides = []
    for block in model.blocks:
        for weight in (block.attn.proj.weight, block.mlp.down.weight):
            weight.normal_(std=scale, generator=torch.Generator().manual_seed(weight.numel()))
        if gains:
            block.pid_gains[:2] = torch.tensor(gains)[:, None]
        block.register_forward_hook(lambda block, args, out: guides.append(out[1]))
    assert torch.isfinite(model(make_ids(hp, 3, 16))).all()
    assert len(guides) == 34
    for guide in guides[:-1]:
        rms = guide.mu.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)
    if gains:
        decay, pull = torch.tensor(gains).sigmoid()
        bound = 2 * pull / (1 - decay)
        fastest = max(guide.velocity.square().mean(-1).sqrt().max() for guide in guides)
        assert 0.1 * bound < fastest < bound


def test_velocity_of_pid_pulls_towards_mu_and_all_its_gains_learn_from_the_true_start():
    hp = tiny_hp(mu="pid")
    model = make_model(hp, noise=0.0)
    guides = []
    model.blocks[0].register_forward_hook(
        lambda block, args, out: guides.append((args[1], out[1].velocity))
    )
    ids = make_ids(hp, 4, 17)
    model(ids[:, :-1], ids[:, 1:]).backward()
    before, velocity = guides[0]
    decay, pull = torch.tensor([2.2, -2.2]).sigmoid()
    # At the start attention gives nothing, so the error is minus mu.
    torch.testing.assert_close(velocity, decay * before.velocity + pull * before.mu)
    for block in model.blocks:
        assert (block.pid_gains.grad != 0).all()


# ---- Initial weights and learning ----------------------------------------------------------------


@torch.no_grad()
def test_initial_matrices_are_orthogonal_and_outputs_of_branches_zero():
    for mode in ("record", "soft_full"):
        model = make_model(tiny_hp(**MODES[mode]), noise=0.0)
        for name, p in model.named_parameters():
            if role_of(name) not in ("matrix", "expert", "mu_matrix"):
                continue
            if any(part in name for part in ("proj", "down", "mu_read")):
                assert not p.any(), name
            else:
                values = torch.linalg.svdvals(p)
                expected = torch.ones_like(values)
                torch.testing.assert_close(values, expected, rtol=0, atol=1e-4, msg=name)
        up = model.blocks[0].mlp.expert_up
        assert all((up[0] - up[e]).abs().max() > 0.05 for e in range(1, 4))


@pytest.mark.parametrize(
    "changes",
    [{"routing": "dense"}, {"routing": "hybrid", "mu": "pid"}, {"mu": "off"}, {"num_experts": 8}],
    ids=str,
)
@torch.no_grad()
def test_models_that_differ_elsewhere_start_with_equal_tensors(changes):
    hp = tiny_hp()
    ours = dict(make_model(hp, noise=0.0).named_parameters())
    theirs = dict(make_model(hp.override(**changes), noise=0.0).named_parameters())
    of_another_seed = dict(make_model(hp.override(seed=2), noise=0.0).named_parameters())
    common = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert len(common) > 40
    for name in common:
        assert torch.equal(ours[name], theirs[name]), name
        is_drawn = role_of(name) in ("embedding", "matrix", "expert") and bool(ours[name].any())
        assert torch.equal(ours[name], of_another_seed[name]) != is_drawn, name
    q = "blocks.{}.attn.c_q.weight"
    assert not torch.equal(ours[q.format(0)], ours[q.format(1)])


@pytest.mark.parametrize("activation", ["leaky_relu2", "swiglu"])
def test_dense_and_routed_models_have_equally_many_parameters(activation):
    """But for the routers, of one vector per expert and layer."""
    sizes = {}
    for routing in ROUTING:
        model = GPT(tiny_hp(routing=routing, activation=activation).model)
        routers = 4 * 4 * 32 if routing in ROUTERS else 0
        sizes[routing] = sum(p.numel() for p in model.parameters()) - routers
    assert len(set(sizes.values())) == 1, sizes


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_learns_within_a_few_steps_from_the_true_start(mode):
    hp = tiny_hp(**MODES[mode], matrix_lr=0.02)
    model = make_model(hp, noise=0.0)
    optimizers = build_optimizers(hp, model, ALONE)
    gradients = Gradients(model, ALONE)
    alive = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for step in range(5):
        ids = torch.randperm(64, generator=torch.Generator().manual_seed(step)).view(4, 16)
        train_step(model, optimizers, gradients, [(ids, ids.roll(-1, 1))], max_norm=0.0)
        # Where there is no gradient, rounding leaves less than this.
        noise = 1e-6 * gradients.flat[64:].norm()
        for name, p in model.named_parameters():
            alive[name] |= p.grad.abs() > noise
    for name, part in alive.items():
        matrices = part.view(-1, *part.shape[-2:]) if part.ndim > 1 else part[None, None]
        assert matrices.flatten(1).any(1).all(), f"{name}: no gradient"
        if role_of(name) not in ("matrix", "expert"):  # these may keep a dead hidden unit
            assert matrices.any(-1).all(), f"{name}: a row without gradient"


# ---- Logits and loss -----------------------------------------------------------------------------


@torch.no_grad()
def test_logits_are_capped_at_30_and_free_near_zero():
    hp = tiny_hp()
    model = make_model(hp)
    ids = make_ids(hp, 2, 16)
    model.tok_emb.weight.mul_(1e3)
    assert 29.9 < model(ids).abs().max() <= 30.0
    model.tok_emb.weight.mul_(1e-6)
    raw = model.features(ids)[0] @ model.tok_emb.weight.T
    torch.testing.assert_close(model(ids), raw, rtol=1e-4, atol=1e-7)
    assert raw.abs().max() > 1e-4


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
@torch.no_grad()
def test_logits_and_loss_are_float32_in_bfloat16_too_and_close(dispatch):
    hp = tiny_hp(dispatch=dispatch)
    ids = make_ids(hp, 2, 16)
    exact = make_model(hp)
    rounded = make_model(hp.override(dtype="bfloat16"))
    assert rounded(ids).dtype == rounded(ids, ids).dtype == torch.float32
    assert 0 < (rounded(ids, ids) - exact(ids, ids)).abs() < 0.05


# ---- Compilation ---------------------------------------------------------------------------------


def compiled(model: GPT, backend: str | Callable = "inductor") -> Callable:
    torch._dynamo.reset()
    return torch.compile(model, backend=backend, fullgraph=True, dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["record", "grouped_full", "learned_pid", "all_off"])
def test_compiler_sees_one_graph_whatever_the_token_values_are(mode):
    hp = tiny_hp(**MODES[mode])
    model = make_model(hp)
    counter = torch._dynamo.testing.CompileCounter()
    forward = compiled(model, counter)
    for seed in range(3):
        ids = make_ids(hp, 3, 16, seed)
        loss = forward(ids, ids)
        loss.backward()
        torch.testing.assert_close(loss, model(ids, ids), rtol=1e-5, atol=0)
        assert counter.frame_count == 1
    with train_gpt.rounded(hp.override(matrix_bits=2, expert_bits=2), model):
        at_rounded = forward(ids, ids)
        torch.testing.assert_close(at_rounded, model(ids, ids), rtol=1e-5, atol=0)
    assert (at_rounded - loss).abs() > 1e-3  # no constant that was folded in
    assert counter.frame_count == 1
    forward(ids, ids, looped=False)
    assert counter.frame_count == 2  # another argument is another graph, so the count does count
    for positions in (SCORED, (SCORED + 5) % 16, torch.zeros_like(SCORED)):
        targets = at(positions, ids)
        losses = forward(ids, targets, reduction="none", scored=positions)
        expected = model(ids, targets, reduction="none", scored=positions)
        torch.testing.assert_close(losses, expected)
        assert counter.frame_count == 3


@pytest.mark.slow
@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_generated_code_agrees_with_eager(dispatch, dtype):
    hp = tiny_hp(num_layers=1, compile=True, dispatch=dispatch, dtype=dtype)
    if not can_compile(hp, ALONE.device):
        pytest.skip("no C++ compiler or no Python.h")
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == "float32" else {"rtol": 0.05, "atol": 0.05}
    model = make_model(hp)
    forward = compiled(model)
    ids = make_ids(hp, 3, 16)
    gradients = []
    for function in (forward, model):
        loss = function(ids, ids)
        parameters = model.parameters()
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    torch.testing.assert_close(*gradients, **close)
    scored = {"target_ids": at(SCORED, ids), "reduction": "none", "scored": SCORED}
    with torch.no_grad():
        torch.testing.assert_close(forward(ids, **scored), model(ids, **scored), **close)
