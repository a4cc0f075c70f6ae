"""records/bench.py on models that run in milliseconds; no test depends on a speed."""

import json
import re
from pathlib import Path

import bench
import helpers_logs
import pytest
import torch
from conftest import ALONE, make_ids, make_model, tiny_hp
from helpers_cli import TINY_ENV, TINY_MODEL, assert_refused, run_in_process
from torch.utils.flop_counter import FlopCounterMode

import train_gpt

# ---- Arithmetic and steps


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


COUNTED = [{"loop_passes": 3, "mu": "full"}, {"routing": "learned", "activation": "swiglu"}]


@pytest.mark.parametrize("changes", COUNTED, ids=str)
def test_flops_are_those_that_pytorch_counts_with_causal_attention_at_half(changes):
    hp = tiny_hp(attn_gate=False, smear_gate=False, **changes)
    config = hp.model
    halved = 6 * len(config.execution_order(True)) * config.train_seq_len * config.model_dim
    assert counted_flops(hp) == bench.flops_per_token(config, True) + halved


def test_a_step_of_the_bench_is_a_step_of_training(tmp_path, monkeypatch):
    """Compare with train() itself, told the same fraction of the budget in every step."""
    hp = tiny_hp(loop_from=0.0, data_path=str(tmp_path))
    bench.write_tokens(tmp_path, hp)
    ours, theirs = (bench.Trainer(hp, ALONE) for _ in range(2))
    start = [p.detach().clone() for p in theirs.weights]
    for _ in range(hp.iterations):
        ours.step(True)
    schedules = train_gpt.set_schedules
    weight = train_gpt.average_weight
    monkeypatch.setattr(train_gpt, "set_schedules", lambda hp, opt, frac: schedules(hp, opt, 0.5))
    monkeypatch.setattr(train_gpt, "average_weight", lambda hp, *args: weight(hp, 0.5, 1000))
    train_gpt.train(hp, ALONE, lambda *args, **kwargs: None, theirs.model, theirs.loader, None)
    torch.testing.assert_close(ours.average, theirs.weights, rtol=0, atol=0)
    assert not all(map(torch.equal, start, theirs.weights))


# ---- Command line


def run_bench(env: dict[str, str], cwd: Path, *argv: object):
    return run_in_process(bench.main, env, cwd, *argv, "--seconds", 0.01)


def rows_of(result) -> list[list[str]]:
    assert (result.code, result.err) == (0, "")
    table = [line.strip("| ") for line in result.out.splitlines() if line.startswith("|")]
    return [line.split(" | ") for line in table[2:]]


def test_one_command_measures_every_dispatch_with_and_without_recurrence(tmp_path):
    result = run_bench(TINY_ENV | {"ROUTING": "zipf"}, tmp_path)
    rows = rows_of(result)
    kinds = ("dense", "masked", "grouped")
    names = [f"{kind}, recurrence {on}" for kind in kinds for on in ("off", "on")]
    assert [row[0] for row in rows] == names
    assert [row[4] for row in rows[:2]] == ["1.000"] * 2
    assert {row[4] for row in rows[2:]} != {"1.000"}  # one of the four may be, by chance
    assert not list(tmp_path.iterdir())
    result = run_bench(TINY_ENV | {"ROUTING": "learned", "LOOP_PASSES": "1"}, tmp_path)
    assert "\ngrouped: ROUTING=learned DISPATCH=grouped: a router learns" in result.out


def test_the_cells_of_a_grid_are_measured_side_by_side(tmp_path):
    knobs = TINY_MODEL | {"COMPILE": 0, "TRAIN_BATCH_TOKENS": 128}
    lines = ["base " + " ".join(f"{name}={value}" for name, value in knobs.items())]
    lines += ["base DATA_PATH=. TOKENIZER_PATH=.", "shallow LOOP_PASSES=1", "deep"]
    (tmp_path / "grid.txt").write_text("\n".join(lines))
    rows = rows_of(run_bench({}, tmp_path, "--grid", "grid.txt"))
    names = ["shallow, recurrence off", "deep, recurrence off", "deep, recurrence on"]
    assert [row[0] for row in rows] == names
    assert "-" not in [row[4] for row in rows]


def test_the_mlp_is_measured_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SMALL_MLPS", ((64, 32, 16, 4, 8),))
    (row,) = rows_of(run_bench(TINY_ENV, tmp_path, "mlp"))
    assert row[:4] == ["64", "32", "16 + 4 x 8", "0.50"]


def test_bad_input_is_refused_in_one_line(tmp_path):
    assert_refused(run_bench(TINY_ENV, tmp_path, "--speed"), "unrecognized arguments: --speed")
    no_log = run_bench(TINY_ENV, tmp_path, "--table", "nowhere.txt")
    assert_refused(no_log, "nowhere.txt: no such log")
    assert_refused(run_bench(TINY_ENV | {"NUM_LAYERS": "0"}, tmp_path), "NUM_LAYERS=0: expected")
    assert_refused(run_bench(TINY_ENV | {"WORLD_SIZE": "8"}, tmp_path), "for one process")


def test_finished_trainings_stand_side_by_side(tmp_path):
    text = helpers_logs.ours(run_id="first")
    knobs = "".join(f"  {name.lower()}: {value}\n" for name, value in TINY_MODEL.items())
    text = text.replace("  matrix_lr: 0.03\n", f"  matrix_lr: 0.03\n  xsa: False\n{knobs}")
    more = json.dumps({"bytes_total": 243_463, "tokens": helpers_logs.STEPS * 2048})[1:-1]
    text = text.replace('{"event": "train_summary", ', f'{{"event": "train_summary", {more}, ')
    gpu = "| 0  NVIDIA H100 80GB HBM3          On  |   00000000:18:00.0 Off |            0 |\n"
    on_gpu = text.replace("device:cpu threads:2 ", "device:cuda:0 threads:2 ")
    on_gpu = on_gpu.replace("python:3", f"{gpu}python:3")
    (tmp_path / "cpu.txt").write_text(text)
    (tmp_path / "gpu.txt").write_text(on_gpu)
    first, second = rows_of(run_bench({}, tmp_path, "--table", "gpu.txt", "cpu.txt"))
    config = bench.knobs_from(TINY_ENV).model
    mfu = 20_480 * bench.flops_per_token(config, True) / 989e12  # 100 steps of 2,048 tokens, 10 s
    scores = [f"{loss / helpers_logs.NATS:.4f}" for loss in (3.1, 3.2, 3.15)]
    expected = ["first", "400", f"{400 * 2048 / 46:,.0f}", f"{mfu:.1%}", *scores, "243,463"]
    assert first == expected
    assert second[3] == "-"
    (tmp_path / "cpu.txt").write_text(re.sub('"event": "train_summary"', '"event": "x"', text))
    unfinished = run_bench({}, tmp_path, "--table", "cpu.txt")
    assert_refused(unfinished, "not a finished training of ours")
