"""records/bench.py on models that run in milliseconds; no test depends on a speed.   pytest tests/test_bench.py"""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import bench
import helpers_logs
import pytest
import torch
from conftest import ALONE, make_ids, make_model, tiny_hp
from helpers_cli import ROOT, TINY_MODEL, TINY_RUN, assert_refused, run_in_process
from torch.utils.flop_counter import FlopCounterMode

from train_gpt import Refusal

TINY_ENV = {name: str(value) for name, value in {**TINY_MODEL, **TINY_RUN}.items()}
SHALLOW = {"num_layers": 2, "loop_start": 0, "loop_end": 0, "parallel_start_layer": 1}


@pytest.fixture
def hp(tmp_path):
    """Knobs of two layers, the first run twice, and data for them."""
    hp = replace(tiny_hp(**SHALLOW, data_path=str(tmp_path)), loop_passes=2)
    bench.write_tokens(tmp_path, hp)
    return hp


# ---- Arithmetic


def counted_flops(hp) -> float:
    """Of a forward and backward pass of a token, by PyTorch, which counts both halves of the attention matrix."""
    model, (rows, length) = make_model(hp), (3, hp.train_seq_len)
    torch.backends.cuda.enable_flash_sdp(False)  # the kernel for CPUs computes parts twice
    ids = make_ids(hp, rows, length)
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, looped=True).backward()
    torch.backends.cuda.enable_flash_sdp(True)
    return counter.get_total_flops() / ids.numel()


COUNTED = [
    {},
    {"routing": "dense"},
    {"loop_passes": 3},
    {"mu": "lowrank"},
    {"mu": "full", "moe_start_layer": 2},
]
COUNTED += [{"routing": "learned"}, {"num_experts": 8, "expert_dim": 16}, {"activation": "swiglu"}]


@pytest.mark.parametrize("changes", COUNTED, ids=str)
def test_flops_are_those_that_pytorch_counts_with_causal_attention_at_half(changes):
    hp = tiny_hp(attn_gate=False, smear_gate=False, **changes)
    halved = 6 * len(hp.execution_order(True)) * hp.train_seq_len * hp.model_dim
    assert counted_flops(hp) == bench.flops_per_token(hp, True) + halved


def test_flops_of_the_record_are_near_six_per_weight_that_is_run():
    hp = tiny_hp(routing="dense", loop_passes=1)
    matrices = sum(p.numel() for p in make_model(hp).parameters() if p.ndim > 1)
    attention = 6 * hp.num_layers * hp.train_seq_len * hp.model_dim
    assert bench.flops_per_token(hp, False) == pytest.approx(6 * matrices + attention, rel=0.1)


def test_grouped_counts_the_chosen_experts_and_masked_all():
    masked, grouped, top_2 = (
        tiny_hp(**c) for c in ({}, {"dispatch": "grouped"}, {"dispatch": "grouped", "top_k": 2})
    )
    runs = len(masked.execution_order(True))
    expert = 6 * 2 * masked.model_dim * masked.expert_dim * runs
    flops = [bench.flops_per_token(hp, True) for hp in (masked, grouped, top_2)]
    assert flops[0] - flops[1] == (masked.num_experts - 1) * expert
    assert flops[2] - flops[1] == expert
    assert flops[0] == bench.flops_per_token(
        replace(masked, routing="dense"), True
    )  # of equal bytes
    assert bench.flops_per_token(masked, False) < flops[0]


def test_communication_counts_the_parameters_that_ranks_exchange():
    hp = tiny_hp()
    model = make_model(hp)
    gradients, updates, clock = bench.communication(hp, 0.5)
    params = list(model.parameters())
    assert (
        4 * sum(p.numel() for p in params)
        < gradients["bytes"]
        <= 4 * (64 + sum(p.numel() + 63 for p in params))
    )
    muon = bench.train_gpt.build_optimizers(hp, model, ALONE)[0]
    assert updates["bytes"] == 4 * sum(
        p.numel() for group in muon.param_groups for p in group["params"]
    )
    assert gradients["seconds"] == pytest.approx(2 * 7 / 8 * gradients["bytes"] / 450e9)
    assert gradients["share_of_step"] == pytest.approx(gradients["seconds"] / 0.5)
    assert (clock["bytes"], clock["seconds"]) == (8, None)
    assert bench.communication(hp, None)[0]["share_of_step"] is None


def test_the_crossover_is_the_width_from_which_on_grouped_stays_faster():
    def rows(experts: int, *grouped: float) -> list[dict]:
        widths = (32, 64, 128, 256)
        return [
            {"num_experts": experts, "expert_dim": width, "masked": 1.0, "grouped": seconds}
            for width, seconds in zip(widths, grouped, strict=True)
        ]

    measured = (
        rows(2, 2, 2, 2, 2)
        + rows(4, 2, 0.5, 2, 0.5)
        + rows(8, 2, 0.5, 0.5, 0.5)
        + rows(16, 0.5, 0.5, 0.5, 0.5)
    )
    assert bench.crossovers(measured[::-1]) == {2: None, 4: 256, 8: 64, 16: 32}


# ---- Budget and counters


def test_a_budget_leaves_out_what_would_not_end_in_time_and_names_it(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def work(seconds: float = 5.0) -> float:
        clock[0] += seconds
        return seconds

    budget = bench.Budget(100)
    runs = [budget.run("dispatch", f"cell {i}", work) for i in range(25)]
    assert runs == [5.0] * 20 + [None] * 5
    assert budget.left_out == [f"cell {i}: no time left" for i in range(20, 25)]


def test_what_is_refused_or_has_no_memory_is_left_out_and_a_bug_is_not():
    def fail(error: Exception) -> None:
        raise error

    budget = bench.Budget(100)
    for error in (Refusal("FOO=1: no"), torch.cuda.OutOfMemoryError("full\nof tensors")):
        assert budget.run("steps", "cell", lambda e=error: fail(e)) is None
    assert budget.left_out == ["cell: FOO=1: no", "cell: full"]
    with pytest.raises(ZeroDivisionError):
        budget.run("steps", "cell", lambda: 1 // 0)


def test_a_sound_step_is_one_graph_without_breaks_or_recompilation(hp):
    row = bench.measure(bench.Trainer(hp, ALONE, "eager"), "masked", True, 0.0)
    assert (row["graphs"], row["graph_breaks"], row["recompiles"]) == (1, 0, 0)
    assert row["fastest"] <= row["seconds"] <= row["slowest"]
    assert row["tokens_per_second"] == pytest.approx(hp.train_batch_tokens / row["seconds"])
    assert row["flops"] == pytest.approx(row["tokens_per_second"] * bench.flops_per_token(hp, True))
    assert (row["mfu"], row["peak_bytes"]) == (None, None)


def test_a_planted_graph_break_is_counted(hp, monkeypatch):
    features = bench.GPT.features

    def broken(self, *args) -> tuple:
        torch._dynamo.graph_break()
        return features(self, *args)

    monkeypatch.setattr(bench.GPT, "features", broken)
    row = bench.measure(bench.Trainer(hp, ALONE, "eager"), "masked", True, 0.0)
    assert row["graph_breaks"] > 0


def test_a_planted_recompilation_after_the_warm_up_is_counted(hp):
    trainer = bench.Trainer(hp, ALONE, "eager")
    load, calls = trainer.loader.next_batch, iter(range(100))

    def shorter_later() -> list[torch.Tensor]:
        end = hp.train_seq_len - (next(calls) >= 4)  # two steps to warm up, and six to measure
        return [tokens[:, :end] for tokens in load()]

    trainer.loader.next_batch = shorter_later
    row = bench.measure(trainer, "masked", True, 0.0)
    assert (row["graph_breaks"], row["recompiles"]) == (0, 1)


COUNTS = {  # graph breaks, recompilations and compiler of a step, and the exit status
    "sound": (0, 0, "inductor", 0),
    "broken": (1, 0, "inductor", 1),
    "compiled again": (0, 1, "eager", 1),
    "not traced": (0, 0, "none", 1),
}


@pytest.mark.parametrize("case", COUNTS)
def test_the_exit_status_tells_of_breaks_and_of_a_lack_of_evidence(case, tmp_path, monkeypatch):
    breaks, again, backend, status = COUNTS[case]
    row = {"graph_breaks": breaks, "recompiles": again, "backend": backend}
    monkeypatch.setattr(bench, "bench", lambda *args: {"steps": [row], "left_out": []})
    result = run_bench(TINY_ENV, tmp_path)
    assert (result.code, result.err) == (status, "")
    counts = f"{int(backend != 'none')} steps traced, graph breaks {breaks}, graphs compiled after the warm-up {again}"
    assert f"{counts}: {'FAIL' if status else 'pass'}\n" in result.out


def test_a_step_of_the_bench_is_a_step_of_training(hp, monkeypatch):
    """The average of all weights after train() itself, had that the same fraction of the budget in every step."""
    hp = replace(hp, loop_from=0.0)
    ours, theirs = (bench.Trainer(hp, ALONE, "none") for _ in range(2))
    for _ in range(hp.iterations):
        ours.step(True)
    schedules, weight = bench.train_gpt.set_schedules, bench.train_gpt.average_weight
    monkeypatch.setattr(
        bench.train_gpt,
        "set_schedules",
        lambda hp, optimizers, frac: schedules(hp, optimizers, 0.5),
    )
    monkeypatch.setattr(
        bench.train_gpt, "average_weight", lambda hp, frac, count: weight(hp, 0.5, 1000)
    )
    start = [p.detach().clone() for p in theirs.weights]
    bench.train_gpt.train(hp, ALONE, lambda text: None, theirs.model, theirs.loader, None)
    torch.testing.assert_close(ours.average, theirs.weights, rtol=0, atol=0)
    assert any(bool((a != b).any()) for a, b in zip(start, theirs.weights, strict=True))


# ---- Parts


class Late(torch.autograd.Function):
    """The identity, whose backward pass alone is work."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        busy()
        return gradient


def busy() -> None:
    square = torch.ones(300, 300)
    for _ in range(60):  # several times all the rest of a step
        square = (square @ square).clamp(max=1.0)


def early(x: torch.Tensor) -> torch.Tensor:
    busy()
    return x


PLANTED = [
    ("mu", early),
    ("mu", Late.apply),
    ("MLP", Late.apply),
    ("attention", early),
    (None, None),
]


@pytest.mark.parametrize(
    ("part", "work"), PLANTED, ids=["mu", "mu-late", "MLP-late", "attention", "nothing"]
)
def test_shares_sum_to_one_and_planted_work_shows_in_its_part_forward_and_backward(
    hp, part, work, monkeypatch
):
    owners = {"mu": (bench.train_gpt.Block, "next_mu"), "MLP": (bench.train_gpt, "activate")}
    owners |= {"attention": (bench.train_gpt, "apply_rotary")}
    if part:
        owner, name = owners[part]
        inner = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: work(inner(*args)))
    shares = bench.profile(bench.Trainer(hp, ALONE, "none"), True)
    assert list(shares) == list(bench.PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(0 <= share < 1 for share in shares.values())
    if part:
        assert shares[part] > 0.5
    else:
        assert (
            min(
                shares[name]
                for name in ("attention", "MLP", "routing", "mu", "head + loss", "Muon", "AdamW")
            )
            > 0
        )


@pytest.mark.parametrize("plants", [False, True])
def test_phases_sum_to_one_and_planted_work_shows_in_its_phase(hp, plants):
    trainer = bench.Trainer(hp, ALONE, "none")
    muon = trainer.optimizers[0]
    zeropower = muon.zeropower
    muon.zeropower = lambda matrices: early(zeropower(matrices)) if plants else zeropower(matrices)
    shares = bench.phases(trainer, True)
    assert set(shares) == {"forward + backward", "loader", "gradients", "Muon", "AdamW", "EMA"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["Muon"] > (0.5 if plants else 0)


def test_a_variant_that_the_knobs_do_not_allow_is_left_out(hp):
    budget = bench.Budget(1e6)
    grouped = bench.variants(replace(hp, routing="learned"))["grouped"]
    assert bench.measure_variant("grouped", grouped, ALONE, budget, 0.0) == ([], {})
    assert budget.left_out == [
        "grouped: ROUTING=learned DISPATCH=grouped: a router learns from all experts"
    ]


def test_the_variants_have_equally_many_weights():
    for routing in ("zipf", "dense"):
        kinds = bench.variants(tiny_hp(routing=routing))
        assert (
            len({sum(p.numel() for p in make_model(kinds[name]).parameters()) for name in kinds})
            == 1
        )
        assert kinds["masked"].routing == "zipf"


# ---- Command line


def run_bench(env: dict[str, str], cwd: Path, *argv: object):
    return run_in_process(lambda: sys.exit(bench.main()), env, cwd, *argv)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One whole run of a tiny model, from a folder of its own; tracing takes seconds, and has tests of its own."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "NUM_EXPERTS", (2, 4))
        patch.setattr(bench, "EXPERT_DIMS", (8, 16, 1024))
        patch.setattr(bench, "UNTIL", dict.fromkeys(bench.UNTIL, 100.0))
        patch.setattr(bench, "backend_of", lambda hp, device: "none")
        return folder, run_bench(TINY_ENV, folder, "--seconds", 1, "--out", "deep/speed")


def test_one_command_measures_everything(finished):
    folder, result = finished
    assert (result.code, result.err) == (1, "")  # as nothing was traced
    found = json.loads((folder / "deep" / "speed.json").read_text(encoding="utf-8"))
    names = [
        f"{kind}, recurrence {state}"
        for kind in ("masked", "dense", "grouped")
        for state in ("off", "on")
    ]
    assert [row["name"] for row in found["steps"]] == names
    assert {row["kernel"] for row in found["attention"]} >= {"math"}
    assert [(row["num_experts"], row["expert_dim"]) for row in found["dispatch"]] == [
        (2, 8),
        (2, 16),
        (4, 8),
        (4, 16),
    ]
    assert found["dispatch"][3]["predicted"] == (32 + 4 * 16) / (32 + 16)
    for shares in (found["parts"], found["phases"]):
        assert sum(shares.values()) == pytest.approx(1)
    assert found["knobs"]["num_layers"] == 2
    assert all(text.startswith(("fa3: ", "cudnn: ", "flash: ")) for text in found["left_out"])
    assert not any(
        isinstance(x, float) and math.isnan(x)
        for row in found["communication"]
        for x in row.values()
    )
    assert (folder / "deep" / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.rglob("*")) == ["deep", "speed.json", "speed.png"]


def test_the_compiler_is_that_of_training_where_it_can_be_and_counts_where_not():
    for knobs, backend in (
        ({}, "eager"),
        ({"dispatch": "grouped"}, "none"),
        ({"compile": True}, "inductor"),
    ):
        hp = tiny_hp(**knobs)
        expected = (
            "eager" if hp.compile and not bench.train_gpt.can_compile(hp, ALONE.device) else backend
        )
        assert bench.backend_of(hp, ALONE.device) == expected
    assert bench.backend_of(tiny_hp(dispatch="grouped", dtype="bfloat16"), ALONE.device) == "eager"


def test_every_table_is_printed_and_is_well_formed(finished):
    tables = [
        block.splitlines() for block in finished[1].out.split("\n\n") if block.startswith("|")
    ]
    assert len(tables) == 6
    assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    for name in (
        "masked, recurrence on",
        "math",
        "attention",
        "Muon",
        "loss and gradients, one flat buffer",
    ):
        assert f"\n| {name} | " in finished[1].out
    assert "\nEXPERT_DIM from which grouped is faster: E=2: " in finished[1].out


def test_without_time_everything_is_left_out_and_named_but_what_is_on_paper(tmp_path):
    result = run_bench(TINY_ENV, tmp_path, "--seconds", 1e-9)
    assert result.code == 1
    assert "0 steps traced, " in result.out
    assert result.out.count(": left out\n") == 5
    assert "left out: fa3: no time left; " in result.out
    assert all(
        f"{name}: no time left" in result.out
        for name in ("masked", "parts", "dispatch E=4 EXPERT_DIM=32")
    )
    assert "| Muon's updates | " in result.out


def test_without_matplotlib_there_is_json_and_a_word(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setattr(bench, "bench", lambda *args: {"steps": [], "left_out": []})
    result = run_bench(TINY_ENV, tmp_path, "--out", "speed")
    assert "no picture: needs matplotlib" in result.out
    assert [path.name for path in tmp_path.iterdir()] == ["speed.json"]


def test_knobs_default_to_an_eighth_of_the_record_and_to_a_small_model_without_a_gpu(monkeypatch):
    assert bench.knobs_from({"NUM_LAYERS": "12", "DEVICE": "cpu"}).train_batch_tokens == 98_304
    small = bench.knobs_from({"DEVICE": "cpu", "MATRIX_LR": "0.5", "DTYPE": "bfloat16"})
    assert (small.num_layers, small.matrix_lr, small.dtype) == (3, 0.5, "bfloat16")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert (bench.knobs_from({}).num_layers, bench.knobs_from({}).train_batch_tokens) == (
        11,
        98_304,
    )


BAD = {
    "--seconds 0": "--seconds 0.0: expected a positive number",
    "--seconds soon": "invalid float value: 'soon'",
    "--speed": "unrecognized arguments: --speed",
    "--table nowhere.txt": "nowhere.txt: no such log",
    "NUM_LAYERS=0": "NUM_LAYERS=0: expected",
    "WORLD_SIZE=8": "one process only",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, tmp_path):
    env, argv = (dict([case.split("=")]), []) if "=" in case else ({}, case.split())
    assert_refused(run_bench(TINY_ENV | env, tmp_path, *argv), BAD[case])
    assert not list(tmp_path.iterdir())


def test_help_shows_examples_and_succeeds_from_any_directory(tmp_path):
    command = [sys.executable, str(ROOT / "records" / "bench.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (0, "")
    assert "python records/bench.py --table logs/*.txt" in done.stdout


# ---- Finished trainings


def write_log(path: Path, gpu: str = "", summary: bool = True) -> Path:
    text = helpers_logs.ours(run_id=path.stem)
    knobs = "".join(f"  {name.lower()}: {value}\n" for name, value in TINY_MODEL.items())
    knobs = f"  train_batch_tokens: 2048\n  eval_stride: 8\n  xsa: False\n{knobs}"
    text = text.replace("  train_batch_tokens: 2048\n", knobs)
    trained = {"bytes_code": 30_000, "bytes_model": 213_463, "bytes_total": 243_463}
    trained |= {"tokens": helpers_logs.STEPS * 2048}
    text = text.replace(
        '{"event": "train_summary", ', f'{{"event": "train_summary", {json.dumps(trained)[1:-1]}, '
    )
    if gpu:
        row = f"| 0  NVIDIA {gpu}          On  |   00000000:18:00.0 Off |                    0 |\n"
        text = text.replace("device:cpu threads:2 ", "device:cuda:0 threads:2 ").replace(
            "python:3", row + "python:3"
        )
    text = text if summary else text.replace('{"event": "train_summary"', "{")
    path.write_text(text, encoding="utf-8")
    return path


def test_finished_trainings_stand_side_by_side(tmp_path):
    paths = [
        write_log(tmp_path / "first.txt", "H100 80GB HBM3"),
        write_log(tmp_path / "second.txt"),
    ]
    result = run_bench({}, tmp_path, "--table", *paths)
    assert (result.code, result.err) == (0, "")
    hp = bench.knobs_from(TINY_ENV)
    mfu = 20_480 * bench.flops_per_token(hp, True) / 989e12  # 100 steps of 2,048 tokens in 10 s
    scores = f"{3.1 / 1.6:.4f} | {3.2 / 1.6:.4f} | {3.15 / 1.6:.4f} | 243,463"
    assert f"\n| first | 400 | {400 * 2048 / 46:,.0f} | {mfu:.1%} | {scores} |" in result.out
    assert f"\n| second | 400 | {400 * 2048 / 46:,.0f} | - | {scores} |" in result.out


def test_the_flops_at_the_end_of_a_log_are_those_of_its_knobs(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "PEAK_FLOPS", 1e9)
    run = bench.Run.read(write_log(tmp_path / "first.txt", "H200"))
    hp = bench.knobs_from(TINY_ENV | {"XSA": "0"})
    assert bench.mfu_at_end(run) == pytest.approx(20_480 * bench.flops_per_token(hp, True) / 1e9)


def test_an_unfinished_training_is_refused(tmp_path):
    path = write_log(tmp_path / "first.txt", summary=False)
    assert_refused(
        run_bench({}, tmp_path, "--table", path),
        "no train_summary: not a finished training of ours",
    )


def test_the_hopper_script_ends_with_this_table():
    text = (ROOT / "records" / "hopper_ab.sh").read_text(encoding="utf-8")
    assert text.endswith('\npython3 records/bench.py --table "${runs[@]}"\n')
    assert os.access(ROOT / "records" / "bench.py", os.R_OK)
