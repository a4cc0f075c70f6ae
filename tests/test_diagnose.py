"""Properties of records/diagnose.py on small models: what it measures and writes.   pytest tests/test_diagnose.py"""

import io
import math
import re
import sys
from dataclasses import replace

import diagnose
import numpy as np
import pytest
import torch
from conftest import ALONE, tiny_hp
from helpers_cli import CPU, VOCAB_SIZE, assert_refused, eval_env, run_in_process, write_dataset

import train_gpt

needs_matplotlib = pytest.mark.skipif(
    not train_gpt.importlib.util.find_spec("matplotlib"), reason="no matplotlib"
)
N = 40  # targets: two whole windows of 16 and a half, so that there is padding


def split(hp, targets: int = N, partial: bool = True) -> train_gpt.ValData:
    """Random targets of two bytes each, with few enough ids that most occur often."""
    tokens = torch.randint(
        16, (targets + 1,), generator=torch.Generator().manual_seed(3), dtype=torch.int32
    )
    return train_gpt.ValData(tokens, torch.full((targets,), 2, dtype=torch.int32), "", partial)


def model_of(**knobs) -> tuple[train_gpt.GPT, train_gpt.Hyperparameters]:
    """A small routed model with a recurrence, all parameters perturbed so that every branch is alive."""
    hp = tiny_hp(**{"num_layers": 3, "loop_start": 1, "loop_end": 1, **knobs})
    tokens = np.random.default_rng(0).integers(hp.vocab_size, size=2000)
    model, counts = train_gpt.GPT(hp), np.bincount(tokens, minlength=hp.vocab_size)
    model.init_weights()
    model.expert_table.copy_(train_gpt.build_expert_table(hp, counts, tokens))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval(), hp


def loss_of(model, hp) -> float:
    return train_gpt.evaluate(model, split(hp), hp, ALONE, hp.train_seq_len, "test").val_loss


def found_for(change=None, **knobs) -> diagnose.Diagnosis:
    """The diagnosis of a small model whose parameters `change` has been given first."""
    model, hp = model_of(**knobs)
    with torch.no_grad():
        if change:
            change(model)
    return diagnose.diagnose(model, split(hp), replace(hp, eval_stride=1), "run")


def table_choices(model, layer: int) -> list[list[int]]:
    """The experts that the table gives to each input of the split in each pass through a layer, one by one."""
    hp, shares = model.hp, []
    passes = hp.execution_order(True).count(layer)
    for shift in range(passes):
        for token in split(hp).tokens[:-1].tolist():
            first = model.expert_table[layer - hp.routed_layers.start, token].tolist()
            shares.append(
                [(expert + shift * hp.routing_per_pass) % hp.num_experts for expert in first]
            )
    return shares


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"routing": "cluster", "moe_start_layer": 1},
        {"top_k": 2, "routing_per_pass": False},
        {"dispatch": "grouped"},
    ],
)
def test_the_load_of_a_table_is_a_count_of_the_tokens(knobs):
    model, hp = model_of(**knobs)
    load = diagnose.diagnose(model, split(hp), hp, "run").load
    assert list(load) == list(hp.routed_layers)
    for layer, shares in load.items():
        counts = np.bincount(np.ravel(table_choices(model, layer)), minlength=hp.num_experts)
        assert shares == pytest.approx((counts / counts.sum()).tolist(), abs=1e-12)


@pytest.mark.parametrize("routing", ["learned", "hybrid", "soft"])
def test_the_load_of_a_router_is_what_it_chose_for_each_token(routing):
    model, hp = model_of(routing=routing, num_layers=2)
    load, gates, val = (
        diagnose.diagnose(model, split(hp), hp, "run").load,
        {0: [], 1: []},
        split(hp),
    )
    for layer, block in enumerate(model.blocks):
        record = gates[layer].append
        block.mlp.register_forward_pre_hook(
            lambda mlp, args, record=record: record(mlp.choose(args[0], *args[1])[0])
        )
    for start in range(0, N, 16):  # windows one by one and without padding
        model.features(val.tokens[start : min(start + 16, N)][None].long())
    for layer, shares in load.items():
        chosen = torch.cat([gate[0].double() for gate in gates[layer]])
        assert len(chosen) == N
        assert shares == pytest.approx((chosen.sum(0) / chosen.sum()).tolist(), abs=1e-6)


def test_balance_of_equal_and_of_collapsed_loads():
    assert diagnose.balance([0.25] * 4) == pytest.approx((1, 1))
    assert diagnose.balance([1.0, 0.0, 0.0, 0.0]) == pytest.approx((4, 0))
    assert diagnose.balance([0.5, 0.5, 0.0, 0.0]) == pytest.approx((2, 0.5))
    assert diagnose.balance([1.0]) == (1, 1)


def test_a_router_that_repeats_the_table_is_wholly_lexical_and_one_that_reads_the_stream_is_not():
    def table_only(model):
        for block in model.blocks:
            block.mlp.router.zero_()

    def stream_only(model):
        for block in model.blocks:
            block.mlp.router.mul_(1e3)

    for row in found_for(table_only, routing="hybrid").specialisation.values():
        assert row["keeps table"] == row["keeps favourite"] == 1
    for row in found_for(stream_only, routing="learned").specialisation.values():
        assert 0 < row["keeps table"] < 0.7
        assert 0.2 < row["keeps favourite"] <= 1
    assert "keeps table" not in found_for(routing="zipf").specialisation[0]


def test_a_favourite_is_found_on_the_other_half_of_the_targets():
    model, hp = model_of(routing="learned", num_layers=1)
    probe = diagnose.Probe(model, CPU)
    probe.load[0, 0] = probe.on_table[0, 0] = 1
    probe.votes[0][7, 1] = 5  # even targets: token 7 chose expert 1; token 8 occurs only here
    probe.votes[0][8, 2] = 9
    probe.votes[0][hp.vocab_size + 7, :2] = torch.tensor(
        [3.0, 1.0]
    )  # odd targets, whose favourite is expert 0
    assert probe.lexical(0)["keeps favourite"] == pytest.approx((0 + 1) / (5 + 4))


@pytest.mark.parametrize("routing", ["zipf", "learned", "soft"])
def test_exchanging_experts_costs_nothing_only_when_they_are_equal(routing):
    def equal(model):
        for block in model.blocks:
            for experts in (block.mlp.expert_up, block.mlp.expert_down):
                experts.copy_(experts[:1].expand_as(experts))

    for row in found_for(equal, routing=routing).specialisation.values():
        assert row["shift nats"] == pytest.approx(0, abs=1e-6)
        assert [
            row[f"{kind}cos {name}"] for kind in ("", "abs ") for name in ("up", "down")
        ] == pytest.approx([1] * 4)
    for row in found_for(routing=routing).specialisation.values():
        assert abs(row["shift nats"]) > 1e-5


@pytest.mark.parametrize("knobs", [{}, {"top_k": 2}])
def test_exchanging_experts_is_a_shift_of_the_layers_table(knobs):
    model, hp = model_of(**knobs)
    found = diagnose.diagnose(model, split(hp), hp, "run")
    for layer in hp.routed_layers:
        table = model.expert_table[layer].clone()
        model.expert_table[layer] = (table + 1) % hp.num_experts
        shifted = loss_of(model, hp) - found.score.val_loss
        model.expert_table[layer] = table
        assert found.specialisation[layer]["shift nats"] == pytest.approx(shifted, abs=1e-9)


def test_cosines_of_experts_keep_the_sign_and_take_no_pair_twice():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert diagnose.cosines(torch.stack([a, -a])) == pytest.approx((-1, 1))
    assert diagnose.cosines(torch.stack([a, b, -3 * a])) == pytest.approx((-1 / 3, 1 / 3))
    assert all(map(math.isnan, diagnose.cosines(a[None])))


BRANCHES = {  # whose parameters, and which of their rows, a reader of the model would set to zero
    "routed experts": ("mlp.expert_down", slice(None)),
    "shared expert": ("mlp.down.weight", slice(None)),
    "mu into q": ("attn.mu_gain", 0),
    "mu into k": ("attn.mu_gain", 1),
    "mu into v": ("attn.mu_gain", 2),
    "mu into q, k and v": ("attn.mu_gain", slice(None)),
    "pid velocity": ("pid_gains", 2),
    "x0 re-injection": ("resid_mix", 1),
}
READERS = {"mu into q": slice(0, 32), "mu into k": slice(32, 48), "mu into v": slice(48, 64)}


@pytest.mark.parametrize("mu", ["pid", "lowrank"])
def test_the_cost_of_a_branch_is_that_of_zeros_in_its_place(mu):
    model, hp = model_of(mu=mu, routing="hybrid")
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = diagnose.diagnose(model, split(hp), hp, "run")
    names = [name for name in BRANCHES if mu == "pid" or name != "pid velocity"]
    assert sorted(found.costs) == sorted(names)
    for branch in names:
        assert list(found.costs[branch]) == [None, 0, 1, 2]
        for layer in (None, 1):
            parameter, rows = BRANCHES[branch]
            if mu == "lowrank" and "mu_gain" in parameter:
                parameter, rows = "attn.mu_read.weight", READERS.get(branch, slice(None))
            for some in range(3) if layer is None else [layer]:
                model.state_dict()[f"blocks.{some}.{parameter}"][rows] = 0
            loss = loss_of(model, hp)
            model.load_state_dict(weights)
            cost = found.costs[branch][layer]
            assert cost.nats == pytest.approx(loss - found.score.val_loss, abs=1e-9), (
                branch,
                layer,
            )
            assert cost.bpb == pytest.approx(cost.nats / math.log(2) / 2, abs=1e-9)


def test_a_branch_that_is_zero_already_costs_exactly_nothing_and_the_shared_expert_something():
    def silence(model):
        model.blocks[1].mlp.expert_down.zero_()
        for block in model.blocks:
            block.attn.mu_gain[2].zero_()

    costs = found_for(silence).costs
    assert costs["routed experts"][1] == (0, 0)
    assert set(costs["mu into v"].values()) == {(0, 0)}
    assert all(cost.nats != 0 for cost in costs["shared expert"].values())
    assert all(cost.nats != 0 for cost in costs["mu into k"].values())


def test_weights_come_back_bit_for_bit_even_after_a_failure():
    model, hp = model_of(mu="pid")
    with torch.no_grad():
        model.blocks[0].attn.mu_gain[0, 0] = -0.0
    before = {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}
    diagnose.diagnose(model, split(hp), hp, "run")
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


def test_mu_ratios_are_those_of_a_hand_computation_and_zero_without_gains():
    model, hp = model_of(num_layers=3, mu="pid")
    val, seen, streams = split(hp), [], []
    found = diagnose.diagnose(model, val, hp, "run")
    for block in model.blocks:
        block.attn.register_forward_pre_hook(
            lambda attn, args: seen.append((attn, args[0], args[1]))
        )
        block.register_forward_hook(lambda block, args, stream: streams.append(stream.velocity))
    parts = []
    with torch.no_grad():
        for start in range(0, N, 16):
            seen.clear(), streams.clear()
            model.features(val.tokens[start : min(start + 16, N)][None].long())
            parts.append(
                [(attn, x[0], mu[0], v[0]) for (attn, x, mu), v in zip(seen, streams, strict=True)]
            )
        for depth, row in enumerate(found.mu):
            attn = parts[0][depth][0]
            x, mu, velocity = (torch.cat([part[depth][i] for part in parts]) for i in (1, 2, 3))
            assert len(x) == N
            for i, (name, matrix) in enumerate(
                {"q": attn.c_q, "k": attn.c_k, "v": attn.c_v}.items()
            ):
                bias = (attn.mu_gain[i] * mu) @ matrix.weight.T
                assert row[name] == pytest.approx(rms(bias) / rms(x @ matrix.weight.T), rel=1e-4)
            assert row["rms mu"] == pytest.approx(1, abs=1e-3)
            assert row["rms velocity"] == pytest.approx(rms(velocity), rel=1e-5)
            if depth:
                cosine = torch.cosine_similarity(
                    mu, torch.cat([part[depth - 1][2] for part in parts]), dim=-1
                )
                assert row["cosine"] == pytest.approx(cosine.mean().item(), abs=1e-5)
    assert [row["layer"] for row in found.mu] == hp.execution_order(True)
    assert math.isnan(found.mu[0]["cosine"])
    silent = found_for(lambda model: [block.attn.mu_gain.zero_() for block in model.blocks]).mu
    assert {row[name] for row in silent for name in "qkv"} == {0.0}


# ---- Text, picture and command line


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


def write_artifact(folder, dataset, **knobs):
    """An artifact of an untrained small model with a random value in every parameter."""
    model, hp = model_of(vocab_size=VOCAB_SIZE, target_bytes=0, **knobs)
    digest = train_gpt.hashlib.sha256(dataset.tokenizer.read_bytes()).hexdigest()
    path = folder / "my.run.ptz"
    path.write_bytes(train_gpt.fit(hp, model.state_dict(), digest, "zstd").artifact)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, dataset):
    return write_artifact(tmp_path_factory.mktemp("artifact"), dataset, mu="pid")


def run(dataset, artifact, *argv, **knobs):
    return run_in_process(diagnose.main, eval_env(dataset, **knobs), artifact.parent, *argv)


@needs_matplotlib
@pytest.mark.parametrize(
    ("routing", "mu", "knobs"),
    [
        ("zipf", "vector", {"top_k": 2}),
        ("cluster", "lowrank", {"moe_start_layer": 1}),
        ("learned", "pid", {}),
        ("hybrid", "off", {"activation": "swiglu"}),
        ("soft", "full", {"num_layers": 1}),
        ("hash", "vector", {"num_experts": 1}),
        ("dense", "off", {}),
    ],
)
def test_every_kind_of_model_gets_its_text_and_its_picture(
    routing, mu, knobs, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(diagnose, "DPI", 150 if routing == "zipf" else 20)
    path = write_artifact(tmp_path, dataset, routing=routing, mu=mu, **knobs)
    result = run(dataset, path, path, "--targets", 50, "--out", tmp_path / "deep" / "er")
    assert (result.code, result.err) == (0, "")
    files = sorted((tmp_path / "deep" / "er").iterdir())
    assert [file.name for file in files] == ["my.run_diagnosis.md", "my.run_diagnosis.png"]
    assert files[0].read_text() == result.out
    assert result.out.startswith("# my.run: PARTIAL loss, first 50 targets: ")
    assert ("No experts." in result.out) == (routing == "dense")
    assert ("No mu." in result.out) == (mu == "off")
    assert ("pid velocity" in result.out) == (mu == "pid")
    assert ("dense MLP" in result.out) == (routing in ("dense", "cluster"))
    assert "val_" not in result.out
    assert "nan" not in result.out
    png = files[1].read_bytes()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    assert png.endswith(b"IEND\xaeB`\x82")
    size = np.frombuffer(png[16:24], ">u4")
    assert size.tolist() == [16 * diagnose.DPI, 10 * diagnose.DPI]


@needs_matplotlib
def test_the_picture_draws_what_was_measured_and_names_what_is_absent(monkeypatch):
    monkeypatch.setattr(diagnose, "DPI", 20)
    figures, real = [], diagnose.import_figure()
    monkeypatch.setattr(
        diagnose, "import_figure", lambda: lambda **kw: figures.append(real(**kw)) or figures[-1]
    )
    found = found_for(mu="pid")
    assert diagnose.picture(found).startswith(b"\x89PNG")
    axes = {a.get_title(): a for a in figures[0].axes if a.get_title()}
    costs = axes["Cost of zeroing a branch"]
    names = [text.get_text().rsplit("  ", 1) for text in costs.get_yticklabels()]
    widths = [bar.get_width() for bar in costs.patches]
    assert widths == sorted(widths)
    assert [(n, w) for (n, _), w in zip(names, widths, strict=True)] == [
        (name, found.costs[name][None].nats) for name, _ in names
    ]
    assert len(costs.lines[0].get_xdata()) == 3 * len(found.costs)
    assert [bar.get_height() for bar in axes["Specialisation of experts"].patches] == [
        row["shift nats"] for row in found.specialisation.values()
    ]
    drawn = [
        list(line.get_ydata())
        for line in axes["Mu: RMS of what it adds over RMS of the projection"].lines
    ]
    assert drawn == [[row[name] for row in found.mu] for name in "qkv"]
    assert figures[0].get_suptitle() == found.title()
    diagnose.picture(found_for(mu="off", routing="dense"))
    assert sorted(t.get_text() for a in figures[1].axes for t in a.texts) == [
        "no experts",
        "no experts",
        "no mu",
    ]


def test_the_numbers_of_the_text_are_those_of_the_structure():
    found = found_for(mu="pid", routing="hybrid")
    text = diagnose.report(found)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line[:1] == "|"
    ]
    bodies, rule = [], 0
    for row in rows:  # a table is its header, a rule and its rows
        rule = row[0] == "---"
        if rule:
            bodies.append([])
        elif bodies:
            bodies[-1].append(row)
    bodies = [body[:-1] for body in bodies[:-1]] + bodies[
        -1:
    ]  # without the header of the table after it
    load, special, nats, bpb, mu = bodies

    def shown(*values) -> list[str]:
        return ["-" if math.isnan(value) else f"{value:.4f}" for value in values]

    assert load == [[str(k), *shown(*v, *diagnose.balance(v))] for k, v in found.load.items()]
    assert special == [[str(k), *shown(*v.values())] for k, v in found.specialisation.items()]
    for body, unit in ((nats, "nats"), (bpb, "bpb")):
        assert {k: v for k, *v in body} == {
            k: shown(*(getattr(v[layer], unit) for layer in (None, 0, 1, 2)))
            for k, v in found.costs.items()
        }
        assert [float(row[1]) for row in body] == sorted(
            (float(row[1]) for row in body), reverse=True
        )
    for depth, (row, expected) in enumerate(zip(mu, found.mu, strict=True)):
        layer, *numbers = expected.values()
        assert row == [str(depth), str(layer), *shown(*numbers)]


def test_a_part_of_the_split_is_called_partial_and_the_whole_is_not():
    model, hp = model_of(num_layers=1)
    part, whole = (
        diagnose.diagnose(model, split(hp, partial=partial), hp, "x") for partial in (True, False)
    )
    assert part.title().startswith("x: PARTIAL loss, first 40 targets: ")
    assert whole.title().startswith("x: loss, all 40 targets of the split: ")
    assert part.score.val_loss == whole.score.val_loss == loss_of(model, hp)


@needs_matplotlib
def test_targets_and_window_are_those_of_command_line_and_artifact(
    artifact, dataset, tmp_path, monkeypatch
):
    monkeypatch.setattr(diagnose, "picture", lambda found: b"")
    argv = (artifact, "--targets", 30, "--out", tmp_path)
    first = run(dataset, artifact, *argv).out
    assert (
        run(
            dataset, artifact, *argv, EVAL_SEQ_LEN=8, EVAL_STRIDE=4, VAL_MAX_TOKENS=7, NUM_LAYERS=12
        ).out
        == first
    )
    assert "first 30 targets" in first


@needs_matplotlib
@pytest.mark.parametrize(
    ("argv", "knobs", "expected"),
    [
        (["other.ptz"], {}, r"other\.ptz: no such artifact"),
        (["my.run.ptz"], {"DATA_PATH": "nowhere"}, r"nowhere: no such data folder \(DATA_PATH\)"),
        (["my.run.ptz"], {"TOKENIZER_PATH": "none.model"}, r"none\.model: no such tokenizer"),
        (["my.run.ptz", "--target", "5"], {}, r"usage: .*unrecognized arguments: --target 5"),
        (["my.run.ptz", "--targets", "-1"], {}, r"--targets -1: expected"),
        (["my.run.ptz", "--targets", "many"], {}, r"usage: .*invalid int value: 'many'"),
        (
            ["my.run.ptz", "--out", "my.run.ptz", "--targets", "5"],
            {},
            r"--out my\.run\.ptz: not a folder",
        ),
        ([], {}, r"usage: .*required: ARTIFACT"),
    ],
)
def test_what_is_missing_or_foreign_is_refused_in_one_line(
    argv, knobs, expected, artifact, dataset
):
    result = run(dataset, artifact, *argv, **knobs)
    assert_refused(result)
    assert re.search(expected, result.err), result.err
    assert [file.name for file in artifact.parent.iterdir()] == [artifact.name]


def test_without_matplotlib_one_line_says_so_before_any_work(monkeypatch, artifact, dataset):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(diagnose, "load_artifact", lambda *args: pytest.fail("worked"))
    assert_refused(
        run(dataset, artifact, artifact), "the picture needs matplotlib: pip install matplotlib"
    )


def test_progress_is_one_line_that_ends_at_100_percent(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    found_for(num_layers=2, mu="off")
    assert terminal.getvalue().count("\n") == 1
    assert re.search(r"\rdiagnose 100% ETA 0s +\n$", terminal.getvalue())


def test_help_shows_an_example(dataset, artifact):
    result = run(dataset, artifact, "--help")
    assert (result.code, result.err) == (0, "")
    assert "python records/diagnose.py logs/RUN_ID.ptz" in result.out
