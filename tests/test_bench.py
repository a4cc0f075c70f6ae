"""records/bench.py on models that run in milliseconds; no test depends on a speed."""

import json
import re
from dataclasses import replace
from pathlib import Path

import bench
import helpers_logs
import pytest
import torch
from conftest import ALONE, make_ids, make_model, tiny_hp
from helpers_cli import TINY_ENV, TINY_MODEL, assert_refused, run_in_process
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

SHALLOW = {"num_layers": 2, "loop_start": 0, "loop_end": 0, "parallel_start_layer": 1}


@pytest.fixture
def hp(tmp_path):
    """Knobs of two layers, the first run twice, and data for them."""
    hp = tiny_hp(**SHALLOW, loop_passes=2, data_path=str(tmp_path))
    bench.write_tokens(tmp_path, hp)
    return hp


# ---- Arithmetic


def counted_flops(hp) -> float:
    """Return those of a forward and backward pass of a token, as PyTorch counts them.

    It counts both halves of the attention matrix.
    """
    model = make_model(hp)
    ids = make_ids(hp, 3, hp.model.train_seq_len)
    torch.backends.cuda.enable_flash_sdp(False)  # the kernel for CPUs computes parts twice
    with FlopCounterMode(display=False) as counter:
        model(ids, ids, looped=True).backward()
    torch.backends.cuda.enable_flash_sdp(True)
    return counter.get_total_flops() / ids.numel()


COUNTED = [
    {"routing": "dense"},
    {"loop_passes": 3, "mu": "full"},
    {"routing": "learned", "num_experts": 8, "expert_dim": 16},
    {"activation": "swiglu"},
]


@pytest.mark.parametrize("changes", COUNTED, ids=str)
def test_flops_are_those_that_pytorch_counts_with_causal_attention_at_half(changes):
    hp = tiny_hp(attn_gate=False, smear_gate=False, **changes)
    config = hp.model
    halved = 6 * len(config.execution_order(True)) * config.train_seq_len * config.model_dim
    assert counted_flops(hp) == bench.flops_per_token(config, True) + halved


def test_grouped_counts_the_chosen_expert_and_masked_all():
    masked = tiny_hp().model
    grouped = replace(masked, dispatch="grouped")
    expert = 6 * 2 * masked.model_dim * masked.expert_dim * len(masked.execution_order(True))
    flops = bench.flops_per_token(masked, True)
    assert flops - bench.flops_per_token(grouped, True) == (masked.num_experts - 1) * expert
    assert flops == bench.flops_per_token(replace(masked, routing="dense"), True)  # equal bytes
    assert bench.flops_per_token(masked, False) < flops


# ---- Steps


def test_a_step_of_the_bench_is_a_step_of_training(hp, monkeypatch):
    """Compare with train() itself, told the same fraction of the budget in every step."""
    hp = replace(hp, loop_from=0.0)
    ours, theirs = (bench.Trainer(hp, ALONE) for _ in range(2))
    start = [p.detach().clone() for p in theirs.weights]
    for _ in range(hp.iterations):
        ours.step(True)
    schedules = train_gpt.set_schedules
    weight = train_gpt.average_weight

    def half_way(hp, optimizers, frac):
        return schedules(hp, optimizers, 0.5)

    monkeypatch.setattr(train_gpt, "set_schedules", half_way)
    monkeypatch.setattr(train_gpt, "average_weight", lambda hp, *args: weight(hp, 0.5, 1000))
    train_gpt.train(hp, ALONE, lambda *args, **kwargs: None, theirs.model, theirs.loader, None)
    torch.testing.assert_close(ours.average, theirs.weights, rtol=0, atol=0)
    assert any(bool((a != b).any()) for a, b in zip(start, theirs.weights, strict=True))


@pytest.mark.parametrize("routing", ["hash", "dense"])
def test_the_variants_have_equally_many_weights(routing):
    kinds = bench.variants(tiny_hp(routing=routing))
    sizes = {sum(p.numel() for p in make_model(hp).parameters()) for hp in kinds.values()}
    assert len(sizes) == 1
    assert kinds["masked"].model.routing == ("zipf" if routing == "dense" else "hash")


# ---- Command line


def run_bench(env: dict[str, str], cwd: Path, *argv: object):
    return run_in_process(bench.main, env, cwd, *argv)


def test_one_command_measures_every_dispatch_with_and_without_recurrence(tmp_path):
    result = run_bench(TINY_ENV | {"ROUTING": "zipf"}, tmp_path, "--seconds", 0.01)
    assert (result.code, result.err) == (0, "")
    table = [line for line in result.out.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    names = [line.split(" | ")[0] for line in table[2:]]
    kinds = ("dense", "masked", "grouped")
    assert names == [f"| {kind}, recurrence {on}" for kind in kinds for on in ("off", "on")]
    ratios = [line.split(" | ")[4] for line in table[2:]]
    assert ratios[:2] == ["1.000"] * 2
    assert set(ratios[2:]) != {"1.000"}  # one of the four may be, by chance
    assert not list(tmp_path.iterdir())


def test_the_cells_of_a_grid_are_measured_side_by_side(tmp_path):
    knobs = TINY_MODEL | {"COMPILE": 0, "TRAIN_BATCH_TOKENS": 128}
    lines = ["base " + " ".join(f"{name}={value}" for name, value in knobs.items())]
    lines += ["base DATA_PATH=. TOKENIZER_PATH=.", "shallow LOOP_PASSES=1", "deep"]
    (tmp_path / "grid.txt").write_text("\n".join(lines))
    result = run_bench({}, tmp_path, "--grid", "grid.txt", "--seconds", 0.01)
    assert (result.code, result.err) == (0, "")
    rows = [line.split(" | ") for line in result.out.splitlines() if line.startswith("|")][2:]
    names = ["| shallow, recurrence off", "| deep, recurrence off", "| deep, recurrence on"]
    assert [row[0] for row in rows] == names
    assert "-" not in [row[4] for row in rows]


def test_the_mlp_alone_is_measured_by_dispatch_beside_its_gemm(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SMALL_MLPS", ((64, 32, 16, 4, 8),))
    result = run_bench(TINY_ENV, tmp_path, "mlp", "--seconds", 0.01)
    assert (result.code, result.err) == (0, "")
    assert re.search(r"\n\| 64 \| 32 \| 16 \+ 4 x 8 \| 0.50 \| [\d.]+ \| [\d.]+ \|", result.out)


def test_a_variant_that_the_knobs_do_not_allow_is_left_out_by_name(tmp_path):
    env = TINY_ENV | {"ROUTING": "learned", "LOOP_PASSES": "1"}
    result = run_bench(env, tmp_path, "--seconds", 0.01)
    assert result.code == 0
    assert "\ngrouped: ROUTING=learned DISPATCH=grouped: a router learns" in result.out


def test_knobs_default_to_an_eighth_of_the_record_and_to_the_smoke_model_without_a_gpu(monkeypatch):
    assert bench.knobs_from({"NUM_LAYERS": "12"}).train_batch_tokens == 98_304
    small = bench.knobs_from({"MATRIX_LR": "0.5"})
    assert (small.model.num_layers, small.model.model_dim, small.matrix_lr) == (2, 64, 0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    record = bench.knobs_from({})
    assert (record.model.num_layers, record.train_batch_tokens) == (11, 98_304)


BAD = {
    "--seconds 0": "--seconds 0.0: expected a positive number",
    "--speed": "unrecognized arguments: --speed",
    "--table nowhere.txt": "nowhere.txt: no such log",
    "NUM_LAYERS=0": "NUM_LAYERS=0: expected",
    "WORLD_SIZE=8": "for one process",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case, tmp_path):
    env, argv = {}, case.split()
    if "=" in case:
        env, argv = dict([case.split("=")]), []
    assert_refused(run_bench(TINY_ENV | env, tmp_path, *argv), BAD[case])


# ---- Finished trainings


def write_log(path: Path, gpu: str = "") -> Path:
    """Write a log of the tiny model, on a GPU if one is named."""
    text = helpers_logs.ours(run_id=path.stem)
    knobs = "".join(f"  {name.lower()}: {value}\n" for name, value in TINY_MODEL.items())
    text = text.replace("  matrix_lr: 0.03\n", f"  matrix_lr: 0.03\n  xsa: False\n{knobs}")
    more = json.dumps({"bytes_total": 243_463, "tokens": helpers_logs.STEPS * 2048})[1:-1]
    text = text.replace('{"event": "train_summary", ', f'{{"event": "train_summary", {more}, ')
    if gpu:
        row = f"| 0  NVIDIA {gpu}          On  |   00000000:18:00.0 Off |            0 |\n"
        text = text.replace("device:cpu threads:2 ", "device:cuda:0 threads:2 ")
        text = text.replace("python:3", f"{row}python:3")
    path.write_text(text, encoding="utf-8")
    return path


def test_finished_trainings_stand_side_by_side(tmp_path):
    paths = [write_log(tmp_path / "first.txt", "H100 80GB HBM3")]
    paths.append(write_log(tmp_path / "second.txt"))
    result = run_bench({}, tmp_path, "--table", *paths)
    assert (result.code, result.err) == (0, "")
    config = bench.knobs_from(TINY_ENV).model
    mfu = 20_480 * bench.flops_per_token(config, True) / 989e12  # 100 steps of 2,048 tokens, 10 s
    scores = " | ".join(f"{loss / helpers_logs.NATS:.4f}" for loss in (3.1, 3.2, 3.15))
    scores += " | 243,463"
    assert f"\n| first | 400 | {400 * 2048 / 46:,.0f} | {mfu:.1%} | {scores} |" in result.out
    assert f"\n| second | 400 | {400 * 2048 / 46:,.0f} | - | {scores} |" in result.out


def test_an_unfinished_training_is_refused(tmp_path):
    path = tmp_path / "first.txt"
    path.write_text(helpers_logs.ours().replace('{"event": "train_summary"', "{"))
    assert_refused(run_bench({}, tmp_path, "--table", path), "not a finished training of ours")
