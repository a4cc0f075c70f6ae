"""The model: causality, attention, recurrence, experts, routers, mu, initial weights, loss."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from conftest import ALONE, attend_both_ways, make_ids, make_model, tiny_hp
from helpers_cli import allow_every_attention_kernel
from helpers_hostile import refusal
from torch import Tensor

import train_gpt
from train_gpt import BOS_ID, GPT, Hyperparameters, TokenRoutedMLP, activate, role_of, rotary_tables

# Pairs of routing, dispatch, mu, activation, recurrence and the switches, not their product.
MODES = {
    "record": {},
    "grouped": {"dispatch": "grouped", "loop_passes": 3, "routing_per_pass": False},
    "grouped_full": {"dispatch": "grouped", "mu": "full", "activation": "swiglu"},
    "grouped_pid": {"dispatch": "grouped", "mu": "pid", "routing": "hash", "loop_end": 3},
    "grouped_off": {"dispatch": "grouped", "mu": "off", "routing": "modulo", "loop_passes": 1},
    "modulo_pid": {"routing": "modulo", "mu": "pid", "loop_start": 0, "parallel_start_layer": 0},
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

# Of 16 positions, in any order, with repeats and both ends.
SCORED = torch.tensor([[15, 0, 7, 7, 3], [0, 15, 2, 1, 14], [4, 9, 4, 0, 12]])


def tolerance(hp: Hyperparameters) -> float:
    """None, but a GEMM over an expert's rows rounds by their number."""
    return 5e-6 if hp.model.is_grouped else 0.0


def other_tokens(ids: Tensor) -> Tensor:
    """Ids below 64 that differ everywhere from `ids`."""
    return (ids + 1 + torch.arange(ids.numel()).view_as(ids) % 63) % 64


# ---- Causality, independence and scored positions ------------------------------------------------


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
    for rows in (1, 3):
        check_causality(model, make_ids(hp, rows, 16), tolerance(hp))
    check_batch_independence(model, make_ids(hp, 3, 16), tolerance(hp))


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


def reference_attention(attn: torch.nn.Module, x: Tensor, mu: Tensor, angles: Tensor) -> Tensor:
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


def choose(kernel: str, compiles: bool = False) -> tuple[str, str]:
    """Give a model a kernel: which one, and the line that says so."""
    hp = tiny_hp()
    ids = make_ids(hp, 2, 16)
    model = make_model(hp)
    lines = []
    try:
        chosen = train_gpt.choose_attention(kernel, model, ALONE.device, lines.append, compiles)
        torch.testing.assert_close(model(ids), make_model(hp)(ids), rtol=0, atol=1e-5)
    finally:
        allow_every_attention_kernel()
    return chosen, lines[0]


def test_attention_ladder_takes_the_first_kernel_that_runs_and_says_so(monkeypatch):
    assert choose("math") == ("math", "attention:math")
    kernel, line = choose("auto")
    assert kernel == "flash"
    assert line.startswith("attention:flash (not fa3: ")
    assert "(not cudnn: " in line
    assert refusal(choose, "fa3").startswith("ATTENTION=fa3: not fa3: ")

    calls = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        calls.append(causal)
        return train_gpt.sdpa_attention(q, k, v)

    package = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", package)
    assert choose("auto") == ("fa3", "attention:fa3")
    assert calls == [True] * 7  # a trial, and the six layers that are run

    def opaque(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        torch._dynamo.graph_break()
        return train_gpt.sdpa_attention(q, k, v)

    package.flash_attn_func = opaque
    assert choose("auto")[0] == "fa3"
    assert choose("auto", compiles=True)[0] == "flash", "the step is one graph"


# ---- Recurrence and smearing ---------------------------------------------------------------------


def unrolled(model: GPT, looped: bool) -> GPT:
    """A model without recurrence that has a layer of its own for every layer that `model` runs."""
    config = model.config
    order = config.execution_order(looped)
    state = model.state_dict()
    new = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for name in new.keys() & {"skip_weights", "skip_gates"}:
        new[name] = state[name][: len(order) // 2]
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
        ("modulo_pid", (3, 3, 4)),
        ("hybrid", (2, 3, 3)),
        ("soft_off", (0, 0, 2)),
    ],
)
@torch.no_grad()
def test_with_and_before_the_recurrence_the_model_is_the_unrolled_network(mode, loop):
    start, end, passes = loop
    knobs = MODES[mode] | {"loop_start": start, "loop_end": end, "loop_passes": passes}
    hp = tiny_hp(**knobs | {"ln_scale": False, "parallel_start_layer": 99})
    model = make_model(hp)
    ids = make_ids(hp, 2, 16)
    for looped in (True, False):
        deep = unrolled(model, looped)
        torch.testing.assert_close(deep(ids), model(ids, looped=looped), rtol=0, atol=1e-5)
    assert (model(ids, looped=False) - model(ids)).abs().max() > 1e-2


def test_execution_order_of_the_record_is_that_of_upstream():
    order = [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    config = Hyperparameters().model
    assert config.execution_order(True) == order
    assert config.execution_order(False) == list(range(11))


@torch.no_grad()
def test_the_previous_token_never_reaches_across_the_start_of_a_document():
    hp = tiny_hp()
    model = make_model(hp)
    ids = make_ids(hp, 2, 16).clamp(min=2)
    ids[1, [6, 9]] = BOS_ID
    x = model.tok_emb(ids)
    added = (model.smear(x, ids) - x).abs().amax(-1)
    starts = ids == BOS_ID
    starts[:, 0] = True
    assert (added[starts] == 0).all()
    assert (added[~starts] > 1e-5).all()  # the token after BOS may see BOS


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


@pytest.mark.parametrize("ends", [[3, 7, 9], [0, 0, 9]], ids=str)
def test_operator_keeps_what_it_promises_the_compiler(ends):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(9, 8, generator=generator).requires_grad_()
    weight = torch.randn(3, 5, 8, generator=generator).requires_grad_()
    ends = torch.tensor(ends, dtype=torch.int32)
    torch.library.opcheck(train_gpt.expert_linear, (x, weight, ends))


@pytest.mark.parametrize(
    ("knobs", "is_grouped"),
    [
        ({"shared_dim": 64, "expert_dim": 8}, True),  # a token skips 24 of 96 units
        ({"shared_dim": 72, "expert_dim": 8}, False),
        ({"shared_dim": 8, "expert_dim": 12}, False),
        ({"shared_dim": 8, "expert_dim": 16, "routing": "soft"}, False),
    ],
    ids=str,
)
def test_auto_groups_where_a_token_skips_a_quarter_of_the_width(knobs, is_grouped):
    assert tiny_hp(dispatch="auto", **knobs).model.is_grouped == is_grouped


# ---- Routers that read the stream ----------------------------------------------------------------


def router_inputs(model: GPT, ids: Tensor) -> list[tuple[TokenRoutedMLP, Tensor, Tensor]]:
    """(MLP, its input, what the table chooses) of every layer run."""
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda mlp, args: seen.append((mlp, *args)))
    model.features(ids)
    return list(seen)  # calling the MLPs again adds to `seen`


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
def test_outputs_are_the_loop_over_factors_that_have_the_gradient_of_the_softmax(routing, bonus):
    hp = tiny_hp(routing=routing)
    mlp, x, table_BTE = router_inputs(make_model(hp), make_ids(hp, 2, 16))[0]
    factors, _ = mlp.choose(x, table_BTE)
    outputs = per_token_loop(mlp, x, factors)
    torch.testing.assert_close(mlp(x, table_BTE)[0], outputs, rtol=1e-4, atol=1e-5)
    weights = torch.randn(table_BTE.shape, generator=torch.Generator().manual_seed(0))
    share = (F.linear(x, mlp.router) + bonus * table_BTE).softmax(-1)
    expected = ((4 * share if routing == "soft" else share) * weights).sum()
    actual = (factors * weights).sum()
    theirs = torch.autograd.grad(expected, (mlp.router, x), retain_graph=True)
    ours = torch.autograd.grad(actual, (mlp.router, x))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert all(gradient.abs().max() > 1e-2 for gradient in theirs)


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


@pytest.mark.parametrize("mu", ["pid", "vector", "full"])
@torch.no_grad()
def test_mu_is_bounded_over_many_passes_whatever_the_weights(mu):
    hp = tiny_hp(mu=mu, loop_passes=16)
    model = make_model(hp, noise=0.0)
    guides = []
    for block in model.blocks:
        for weight in (block.attn.proj.weight, block.mlp.down.weight):
            weight.normal_(std=1e4, generator=torch.Generator().manual_seed(weight.numel()))
        block.register_forward_hook(lambda block, args, out: guides.append(out[1]))
    assert torch.isfinite(model(make_ids(hp, 3, 16))).all()
    assert len(guides) == 34
    for guide in guides[:-1]:
        rms = guide.mu.square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


def test_the_velocity_of_pid_decays_and_pulls_towards_mu():
    hp = tiny_hp(mu="pid")
    model = make_model(hp, noise=0.0)
    guides = []
    model.blocks[0].register_forward_hook(
        lambda block, args, out: guides.append((args[1], out[1].velocity))
    )
    model(make_ids(hp, 4, 16))
    before, velocity = guides[0]
    decay, pull = torch.tensor([2.2, -2.2]).sigmoid()
    # At the start attention gives nothing, so the error is minus mu.
    torch.testing.assert_close(velocity, decay * before.velocity + pull * before.mu)


# ---- Initial weights and learning ----------------------------------------------------------------


@torch.no_grad()
def test_models_that_differ_elsewhere_start_with_equal_tensors_and_other_seeds_do_not():
    hp = tiny_hp()
    ours = dict(make_model(hp, noise=0.0).named_parameters())
    other = hp.override(routing="hybrid", mu="pid", num_experts=8)
    theirs = dict(make_model(other, noise=0.0).named_parameters())
    of_another_seed = dict(make_model(hp.override(seed=2), noise=0.0).named_parameters())
    common = [name for name in ours if name in theirs and ours[name].shape == theirs[name].shape]
    assert len(common) > 40
    for name in common:
        assert torch.equal(ours[name], theirs[name]), name
        is_drawn = role_of(name) in ("embedding", "matrix") and bool(ours[name].any())
        assert torch.equal(ours[name], of_another_seed[name]) != is_drawn, name
    assert not torch.equal(ours["blocks.0.attn.c_q.weight"], ours["blocks.1.attn.c_q.weight"])


@pytest.mark.parametrize("mode", MODES)
def test_every_parameter_learns_within_a_few_steps_from_the_true_start(mode):
    hp = tiny_hp(**MODES[mode], matrix_lr=0.02)
    model = make_model(hp, noise=0.0)
    optimizers = train_gpt.build_optimizers(hp, model, ALONE)
    gradients = train_gpt.Gradients(model, ALONE)
    alive = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    for step in range(5):
        ids = torch.randperm(64, generator=torch.Generator().manual_seed(step)).view(4, 16)
        train_gpt.train_step(model, optimizers, gradients, [(ids, ids.roll(-1, 1))], max_norm=0.0)
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
    with train_gpt.rounded(hp.override(matrix_bits=2, expert_bits=2, qat_from=0.0), model):
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
@pytest.mark.parametrize(("dispatch", "dtype"), [("masked", "float32"), ("grouped", "bfloat16")])
def test_generated_code_agrees_with_eager(dispatch, dtype):
    hp = tiny_hp(num_layers=1, compile=True, dispatch=dispatch, dtype=dtype)
    if not train_gpt.can_compile(hp, ALONE.device):
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
