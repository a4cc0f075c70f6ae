"""Properties of the command lines, from environment to artifact and score.

The expected losses of a short fixed run live in golden_losses.json. After a change that is meant to
alter training:   PYTHONPATH=.:data:tests python tests/test_cli.py --write-golden
"""

import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALONE, tiny_hp
from helpers_cli import (
    TINY_MODEL,
    VOCAB_SIZE,
    Dataset,
    Result,
    Run,
    assert_refused,
    cli_env,
    encoded,
    eval_env,
    full_environment,
    run_command,
    run_in_process,
    score,
    tiny_tokenizer,
    train,
    train_losses,
    write_dataset,
    write_shard,
)
from helpers_hostile import refusal
from make_record import pack_script

import eval_sliding
import train_gpt
from eval_sliding import EvalConfig
from train_gpt import Hyperparameters, ModelConfig

GOLDEN = Path(__file__).with_name("golden_losses.json")
GOLDEN_TOLERANCE = 2e-5  # relative; initial weights that are off by 1e-5 move losses by 1e-6
END_OF_SOURCE = "=" * 100
TRAIN_KEYS = """event run_id artifact_path val_bpb_float val_bpb bytes_code bytes_model bytes_total
    train_seconds steps tokens params"""
EVAL_KEYS = "event val_bpb val_loss target_tokens scored_bytes eval_seconds stride partial"


@pytest.fixture(scope="module")
def chain(tmp_path_factory, dataset) -> tuple[Run, Result]:
    """Train with a misspelt knob, then score with a window-wide stride."""
    folder = tmp_path_factory.mktemp("chain")
    trained = train(folder, dataset, NUM_LAYER=5, LESS="-R")
    return trained, score(folder / "logs" / "run.ptz", dataset, EVAL_STRIDE=32)


@pytest.fixture
def artifact(chain, tmp_path) -> Path:
    """A copy that a test may damage."""
    path = tmp_path / "model.ptz"
    path.write_bytes(chain[0].artifact.read_bytes())
    return path


def refused(env: dict[str, str], cwd: Path, *fragments: str) -> None:
    """Check that training is refused with one line and leaves no artifact."""
    assert_refused(run_in_process(train_gpt.main, env, cwd), *fragments)
    assert not list(cwd.rglob("*.ptz"))
    assert not list(cwd.rglob("*.tmp"))


def score_refused(path: Path, dataset: Dataset, *fragments: str, **knobs: object) -> None:
    """Check that scoring is refused with one line and writes no log."""
    assert_refused(score(path, dataset, **knobs), *fragments)
    assert not path.with_suffix(".txt").exists()


def found(pattern: str, text: str) -> tuple[str, ...]:
    """Return the groups of the line that matches."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match, pattern
    return match.groups()


# ---- The whole chain


@pytest.mark.slow
def test_real_command_lines_do_what_runs_in_this_process_do(chain, dataset, tmp_path):
    """Which is why all the other tests may save the start of a process."""
    trained = Run(tmp_path, run_command("train_gpt.py", cli_env(dataset), tmp_path))
    env = eval_env(dataset, EVAL_STRIDE=32)
    scored = run_command("eval_sliding.py", env, tmp_path, "logs/run.ptz")
    assert (trained.result.err, scored.err, scored.code) == ("", "", 0)
    assert trained.same_as(chain[0])
    assert scored.summary["val_bpb"] == chain[1].summary["val_bpb"]
    assert_refused(run_command("eval_sliding.py", env, tmp_path), "usage: eval_sliding.py")


def test_the_log_holds_source_knobs_versions_overrides_data_and_the_misspelt_knob(chain, dataset):
    trained, _ = chain
    assert trained.result.err == ""
    assert sorted(path.name for path in trained.artifact.parent.iterdir()) == ["run.ptz", "run.txt"]
    assert trained.log.startswith(Path(train_gpt.__file__).read_text(encoding="utf-8"))
    log = trained.log.split(END_OF_SOURCE)[-1]
    knobs = dict(re.findall(r"^  (\w+): (.*)$", log, re.MULTILINE))
    assert set(knobs) == set(train_gpt.knob_fields(Hyperparameters))
    assert (knobs["num_layers"], knobs["matrix_lr"], knobs["compile"]) == ("4", "0.022", "False")
    assert f"torch:{torch.__version__} numpy:{np.__version__} commit:" in log
    (overrides,) = found(r"^device:cpu threads:\d+ overrides: (.*)$", log)
    named = {"NUM_LAYERS=4", "DTYPE=float32", f"DATA_PATH={dataset.folder}"}
    assert named <= set(overrides.split())
    assert "SEED=" not in overrides
    assert f"train_loader:dataset:{dataset.folder.name} train_shards:2" in log
    assert f"val_loader:shards pattern={dataset.folder}/fineweb_val_*.bin tokens:" in log
    warnings = re.findall(r"^warning: .*$", log, re.MULTILINE)
    assert warnings == ["warning: NUM_LAYER is not a knob; did you mean NUM_LAYERS?"]


def test_each_stage_ends_with_one_json_line_of_the_logged_scores_and_the_bytes_on_disk(chain):
    log, trained, scored = chain[0].log, chain[0].result.summary, chain[1].summary
    assert set(TRAIN_KEYS.split()) <= trained.keys()
    assert set(EVAL_KEYS.split()) <= scored.keys()
    assert (trained["event"], trained["run_id"]) == ("train_summary", "run")
    assert (trained["steps"], trained["tokens"]) == (8, 8 * 128)
    assert (scored["event"], scored["stride"], scored["partial"]) == ("eval_summary", 32, False)
    found(rf"^model_params:{trained['params']} ", log)
    found(rf"^pre-quantization post-ema .* val_bpb:{trained['val_bpb_float']:.8f} ", log)
    scores = r"val_loss:(\S+) val_bpb:(\S+)$"
    for kind, summary in (("roundtrip", trained), ("sliding_window", scored)):
        logged = found(rf"^final_{kind}_exact {scores}", log)
        assert logged == (f"{summary['val_loss']:.8f}", f"{summary['val_bpb']:.8f}")
    rates = re.findall(r"^step:\d+/8 .* step_avg:(\S+)ms .*tok/s: (\d+)$", log, re.MULTILINE)
    assert len(rates) == 8
    for step_avg, rate in rates:
        assert float(rate) * float(step_avg) / 1000 == pytest.approx(128, rel=0.01)

    code = len(pack_script(train_gpt.submission_source()))
    model = chain[0].artifact.stat().st_size
    reported = (trained["bytes_code"], trained["bytes_model"], trained["bytes_total"])
    assert reported == (code, model, code + model)
    found(rf"^Code size: {code} bytes$", log)
    found(rf"^Serialized model quantized\+\w+: {model} bytes$", log)
    found(rf"^Total submission size quantized\+\w+: {code + model} bytes$", log)


def test_a_whole_windows_stride_repeats_the_training_stages_score_and_a_small_one_does_not(
    chain, artifact, dataset
):
    trained, scored = chain[0].result.summary, chain[1].summary
    assert scored["val_bpb"] == pytest.approx(trained["val_bpb"], abs=1e-9)
    assert scored["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-9)
    sliding = score(artifact, dataset, EVAL_STRIDE=4).summary
    assert sliding["val_bpb"] != scored["val_bpb"]
    assert sliding["scored_bytes"] == scored["scored_bytes"]
    assert sliding["target_tokens"] == scored["target_tokens"]


def test_scoring_takes_the_model_from_the_artifact_and_not_from_the_environment(
    chain, artifact, dataset
):
    assert not set(eval_env(dataset)) & set(TINY_MODEL)
    other = {"NUM_LAYERS": 7, "VOCAB_SIZE": 999, "ACTIVATION": "swiglu", "MU": "off", "XSA": 0}
    again = score(artifact, dataset, EVAL_STRIDE=32, **other)
    assert again.summary["val_bpb"] == chain[1].summary["val_bpb"]


# ---- Modes in pairs

FACTORS = {
    "experts": [
        {"ROUTING": "zipf", "DISPATCH": "masked"},
        {"ROUTING": "zipf", "DISPATCH": "grouped"},
        {"ROUTING": "hash", "DISPATCH": "grouped"},
        {"ROUTING": "modulo"},
        {"ROUTING": "learned"},
        {"ROUTING": "hybrid"},
        {"ROUTING": "soft"},
        {"ROUTING": "dense"},
    ],
    "mu": [{"MU": "vector"}, {"MU": "full"}, {"MU": "pid"}, {"MU": "off"}],
    "average": [{"AVERAGE": "ema"}, {"AVERAGE": "swa"}, {"AVERAGE": "off"}],
    "rounding": [
        {"GPTQ_BATCHES": 1, "TARGET_BYTES": 0},
        {"GPTQ_BATCHES": 0},
        {"QAT_FROM": 0.5, "EXPERT_BITS": 2},
        {"QAT_FROM": 0.5, "EXPERT_BITS": 3, "GPTQ_BATCHES": 0},
        {"QAT_FROM": 0, "MATRIX_BITS": 2, "EXPERT_BITS": 2, "EMBED_BITS": 4},
    ],
    "dtype": [{"DTYPE": "float32"}, {"DTYPE": "bfloat16"}],
    "schedule": [{"SCHEDULE": "linear"}, {"SCHEDULE": "sgdr"}],
    "activation": [{"ACTIVATION": "leaky_relu2"}, {"ACTIVATION": "swiglu"}],
    "loop": [{"LOOP_FROM": 0, "ROUTING_PER_PASS": 1}, {"LOOP_FROM": 0, "ROUTING_PER_PASS": 0}],
    "gates": [{}, {"SKIP_GATES": 0, "ATTN_GATE": 0, "SMEAR_GATE": 0, "XSA": 0, "LN_SCALE": 0}],
}


def pairs_of(row: dict[str, int]) -> set[tuple]:
    return set(itertools.combinations(sorted(row.items()), 2))


def pairwise_rows() -> list[dict[str, int]]:
    """Return rows, by factor the index of its value, in which every pair of values occurs."""
    rng = random.Random(0)
    missing = set()
    for one, other in itertools.combinations(sorted(FACTORS), 2):
        indices = itertools.product(range(len(FACTORS[one])), range(len(FACTORS[other])))
        missing |= {((one, i), (other, j)) for i, j in indices}
    rows = []
    while missing:
        candidates = [
            {name: rng.randrange(len(values)) for name, values in FACTORS.items()}
            for _ in range(300)
        ]
        rows.append(max(candidates, key=lambda row: len(missing & pairs_of(row))))
        missing -= pairs_of(rows[-1])
    return rows


ROWS = pairwise_rows()
FEW = 4  # that are not slow
ROWS[FEW:] = [pytest.param(row, marks=pytest.mark.slow) for row in ROWS[FEW:]]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "".join(map(str, row.values())))
def test_modes_in_every_pair_train_export_reload_and_score(row, dataset, tmp_path):
    knobs = {"ITERATIONS": 2}
    for name, index in row.items():
        knobs |= FACTORS[name][index]
    run = train(tmp_path, dataset, **knobs)
    trained = run.result.summary
    assert len(run.losses) == trained["steps"] == 2
    assert not re.search(r"\b(nan|inf|warning)\b", run.result.out)
    assert 1 < trained["val_bpb"] < 8
    if "QAT_FROM" in knobs and ("MATRIX_BITS" in knobs or "GPTQ_BATCHES" in knobs):
        assert trained["val_bpb_float"] == pytest.approx(trained["val_bpb"], abs=1e-6)
    whole, half = [
        score(run.artifact, dataset, EVAL_STRIDE=stride, DTYPE=knobs["DTYPE"]).summary
        for stride in (32, 16)
    ]
    assert whole["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-9)
    assert 1 < half["val_bpb"] < 8
    assert half["val_bpb"] != whole["val_bpb"]
    assert half["target_tokens"] == whole["target_tokens"]
    model, hp, _ = train_gpt.load_artifact(run.artifact, Hyperparameters(), ALONE.device)
    assert (hp.model.routing, hp.model.mu) == (knobs["ROUTING"], knobs["MU"])
    assert model.expert_table.shape == (0 if knobs["ROUTING"] == "dense" else 4, VOCAB_SIZE)


# ---- What a result may depend on


def test_the_same_seed_repeats_losses_and_artifact_and_another_does_not(chain, dataset, tmp_path):
    assert train(tmp_path / "again", dataset).same_as(chain[0])
    assert not train(tmp_path / "other", dataset, SEED=1).same_as(chain[0])


def test_validation_text_never_reaches_the_artifact_and_training_text_does(chain, tmp_path):
    other_val = write_dataset(tmp_path / "other_val", val_seed=77, val_docs=11)
    run = train(tmp_path / "a", other_val, VAL_LOSS_EVERY=3)
    assert len(re.findall(r"^step:[36]/8 val_loss", run.log, re.MULTILINE)) == 2
    assert run.result.summary["val_bpb"] != chain[0].result.summary["val_bpb"]
    assert run.same_as(chain[0])
    other_train = write_dataset(tmp_path / "other_train", train_seed=78)
    assert not train(tmp_path / "b", other_train).same_as(chain[0])


def test_worlds_and_batches_that_do_not_divide_are_refused(dataset, tmp_path):
    for world_size in (3, 16):
        env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
        refused(cli_env(dataset) | env, tmp_path, f"WORLD_SIZE={world_size} does not divide 8")
    left_over = {
        "RANK=1 WORLD_SIZE=1: not set by torchrun": {"RANK": "1"},
        "RANK='first': expected a number": {"RANK": "first"},
        "WORLD_SIZE=2 without torchrun: ": {"WORLD_SIZE": "2"},
    }
    for message, env in left_over.items():
        refused(cli_env(dataset) | env, tmp_path, message)
    assert not list(tmp_path.iterdir())
    # Six sequences, of which four fit in a pass, are two passes.
    six = tiny_hp(train_batch_tokens=6 * 16, micro_batch_tokens=4 * 16)
    assert six.grad_accum_steps(1) == 2
    hp = Hyperparameters().override(train_seq_len=32, train_batch_tokens=128)
    message = refusal(hp.grad_accum_steps, 8)
    assert "not a whole number of sequences on each of 8 ranks" in message


def test_training_stops_inside_the_wall_clock_cap_at_a_low_learning_rate(dataset, tmp_path):
    knobs = {"MAX_WALLCLOCK_SECONDS": 1.6, "SCHEDULE": "linear", "ITERATIONS": 100_000}
    run = train(tmp_path, dataset, **knobs)
    summary = run.result.summary
    stopped = r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000$"
    milliseconds, step = map(int, found(stopped, run.log))
    assert step == summary["steps"]
    assert 800 < milliseconds < 1250, "a quarter is kept for the Hessians"
    (spent,) = found(r"^gptq: \d+ Hessians over 256 training tokens in ([\d.]+)s$", run.log)
    assert milliseconds / 1000 + float(spent) == pytest.approx(summary["train_seconds"], abs=0.1)
    assert summary["train_seconds"] < 1.6
    scales = [float(x) for x in re.findall(r"lr_scale:(\S+)", run.result.out)]
    assert scales[0] == 1.0
    assert scales[-1] < 0.4
    assert len(scales) < 70, "about fifty lines beside the first ten"


# ---- Knobs

BAD_KNOBS = [  # the message has to name the last variable of each, with its value
    {"ITERATIONS": "1" + "0" * 400},
    {"TRAIN_BATCH_TOKENS": "32" + "0" * 400},
    {"DISPATCH": "grouped", "ROUTING": "learned"},
    {"DISPATCH": "grouped", "EXPERT_DIM": "12"},
    {"MODEL_DIM": "32", "NUM_HEADS": "3"},
    {"NUM_HEADS": "4", "NUM_KV_HEADS": "3"},
    {"ROPE_DIMS": "3"},
    {"ROPE_DIMS": "10"},
    {"TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "130"},
    {"TRAIN_SEQ_LEN": "32", "TRAIN_BATCH_TOKENS": "16"},
    {"LOOP_START": "1", "NUM_LAYERS": "2", "LOOP_END": "2"},
    {"LOOP_START": "1", "LOOP_END": "0"},
    {"RUN_ID": "../run"},
    {"CHECKPOINT_EVERY": "0"},
    {"CHECKPOINT_EVERY": "5m"},
]


@pytest.mark.parametrize("knobs", BAD_KNOBS, ids=lambda knobs: f"{list(knobs)[-1]}")
def test_a_bad_knob_is_refused_with_its_name_and_value(knobs, dataset):
    name, value = list(knobs.items())[-1]
    message = refusal(Hyperparameters.from_env, cli_env(dataset, **knobs))
    assert f"{name}=" in message
    assert value in message


@pytest.mark.parametrize("cls", [Hyperparameters, EvalConfig])
def test_every_knob_has_limits_that_are_kept(cls):
    """Words outside the choices and numbers past either end are refused by name and value."""
    defaults = vars(EvalConfig()) | Hyperparameters().values()
    for name, f in train_gpt.knob_fields(cls).items():
        bad = {bool: ["2", "true"], str: [], int: ["two"], float: ["x", "nan", "inf"]}[f.type]
        if "choices" in f.metadata:
            bad = ["nothing", ""]
            assert defaults[name] == f.metadata["choices"][0]
        if "low" in f.metadata:
            bad += [str(f.type(f.metadata["low"] - 1))]
            assert f.metadata["low"] <= defaults[name] <= f.metadata["high"]
        if f.metadata.get("high", np.inf) < np.inf:
            bad += [str(f.type(f.metadata["high"] + 1))]
        for value in bad:
            message = refusal(cls.from_env, {name.upper(): value})
            assert re.search(f"{name.upper()}='?{re.escape(value)}", message)
    assert cls.from_env({}) == cls()


def test_refusals_end_the_command_with_one_line_before_anything_is_written(dataset, tmp_path):
    known = " ".join(ModelConfig.__dataclass_fields__["routing"].metadata["choices"])
    said = f"ROUTING='random': expected one of {known}"
    refused(cli_env(dataset, ROUTING="random"), tmp_path, said)
    argument = run_in_process(train_gpt.main, cli_env(dataset), tmp_path, "--seed=3")
    assert_refused(argument, "--seed=3: no arguments; knobs are environment variables")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", [train_gpt, eval_sliding], ids=lambda s: s.__name__)
def test_a_package_that_is_missing_is_named_in_one_line(script, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not here')")
    command = [sys.executable, script.__file__]
    env = full_environment({"PYTHONPATH": str(tmp_path)})
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr == "not here: pip install -r requirements.txt\n"


@pytest.mark.parametrize("place", ["logs", "logs/run.txt"])
def test_an_output_that_cannot_be_written_is_refused(place, dataset, tmp_path):
    if place == "logs":
        (tmp_path / place).write_text("mine")
    else:
        (tmp_path / place).mkdir(parents=True)
    refused(cli_env(dataset), tmp_path, place)


def test_a_model_over_the_cap_is_refused_before_training(dataset, tmp_path, monkeypatch):
    code = len(pack_script(train_gpt.submission_source()))
    monkeypatch.setattr(train_gpt, "MAX_SUBMISSION_BYTES", code + 1000)
    named = ("dry run: ", f"the cap is {code + 1000:,}", "MODEL_DIM=32", "MATRIX_CLIP=12.85")
    refused(cli_env(dataset), tmp_path, *named)
    assert train_losses((tmp_path / "logs" / "run.txt").read_text()) == []


def test_an_artifact_over_the_cap_is_never_written(chain, dataset, tmp_path, monkeypatch):
    cap = chain[0].result.summary["bytes_total"]
    monkeypatch.setattr(train_gpt, "estimate", lambda hp, model, log: None)
    monkeypatch.setattr(train_gpt, "MAX_SUBMISSION_BYTES", cap)
    refused(cli_env(dataset), tmp_path, "artifact: ", f"the cap is {cap:,}")


# ---- Scoring


def test_scoring_appends_to_the_artifacts_log_and_says_when_it_takes_too_long(artifact, dataset):
    for limit, warned in ((0.001, True), (0, False), (600, False)):
        artifact.with_suffix(".txt").unlink(missing_ok=True)
        result = score(artifact, dataset, EVAL_STRIDE=32, EVAL_MAX_SECONDS=limit)
        assert (f"are more than EVAL_MAX_SECONDS={limit:g}" in result.out) == warned
        assert result.summary["val_bpb"] > 0
        assert artifact.with_suffix(".txt").read_text() == result.out


def test_another_artifact_tokenizer_or_text_is_refused_by_scoring(artifact, dataset, tmp_path):
    score_refused(artifact.with_name("other.ptz"), dataset, "other.ptz: no such artifact")
    cut = artifact.with_name("cut.ptz")
    cut.write_bytes(artifact.read_bytes()[:-1])
    score_refused(cut, dataset, "cut.ptz: damaged artifact")
    other = tmp_path / "other.model"
    other.write_bytes(tiny_tokenizer(seed=50))
    said = "was trained with another tokenizer (TOKENIZER_PATH)"
    score_refused(artifact, replace(dataset, tokenizer=other), said)
    foreign = replace(dataset, folder=tmp_path / "foreign")
    write_shard(foreign.folder / "fineweb_val_0.bin", encoded(2, 8, tiny_tokenizer(seed=50)))
    score_refused(artifact, foreign, f"{foreign.folder}: ", "were made by another tokenizer")
    write_shard(foreign.folder / "fineweb_val_0.bin", encoded(2, 8, tiny_tokenizer()))
    assert score(artifact, foreign).code == 0, "control"


@pytest.mark.parametrize(
    ("argv", "knobs", "message"),
    [
        ([], {"EVAL_STRIDE": 33}, "EVAL_STRIDE=33: above the window of 32 tokens"),
        ([], {"EVAL_STRIDE": 8, "EVAL_SEQ_LEN": 7}, "EVAL_STRIDE=8: above the window of 7"),
        (["--self-check", 5], {"TTT": "sgd"}, "TTT=sgd: --self-check is for TTT=off"),
        (["--self-check", 5, "--audit"], {}, "usage: "),
        (["--self-check", -1], {}, "--self-check -1: expected a number of windows"),
        (["b.ptz"], {}, "usage: "),
    ],
    ids=str,
)
def test_options_of_scoring_that_cannot_be_met_are_refused(argv, knobs, message, artifact, dataset):
    assert_refused(score(artifact, dataset, *argv, **knobs), message)
    assert not artifact.with_suffix(".txt").exists()


def test_help_prints_the_description_and_succeeds(dataset, tmp_path):
    result = run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, "--help")
    assert (result.code, result.err) == (0, "")
    for option in ("eval_sliding.py logs/RUN_ID.ptz", "--self-check N", "--audit"):
        assert option in result.out


@pytest.mark.parametrize(("window", "stride", "base"), [(32, 8, 10_000), (64, 48, 40_000)])
def test_a_window_of_any_length_scores_as_its_windows_do_one_at_a_time(
    artifact, dataset, window, stride, base
):
    """The model was trained with 32 tokens, and has 4 rotations."""
    knobs = {"EVAL_SEQ_LEN": window, "EVAL_STRIDE": stride}
    result = score(artifact, dataset, "--self-check", 10_000, **knobs)
    assert result.code == 0, result.err
    found(rf"^sliding evaluation of \S+ window:{window} stride:{stride} ", result.out)
    found(rf"^trained_window:32 rope_base:{base} sidecar:False ttt:off$", result.out)
    line = r"^self_check: (\d+) of (\d+) windows one at a time: plain_bpb:(\S+) fast_bpb:(\S+) "
    checked, windows, *both = found(line, result.out)
    assert checked == windows
    assert list(map(float, both)) == pytest.approx([result.summary["val_bpb"]] * 2, abs=1e-6)
    assert result.summary["seq_len"] == window


def test_a_faster_way_that_scores_otherwise_fails_its_self_check(artifact, dataset, monkeypatch):
    honest = train_gpt.Scorer.batch

    def one_before(scorer, windows, stride, size):
        input_ids, target_ids, scored, columns = honest(scorer, windows, stride, size)
        return input_ids, target_ids, (scored - 1).clamp(min=0), columns

    monkeypatch.setattr(train_gpt.Scorer, "batch", one_before)
    result = score(artifact, dataset, "--self-check", 9)
    assert_refused(result, "self-check failed: ", " bits per byte apart")


# ---- Golden losses


def golden_losses(dispatch: str = "masked") -> list[float]:
    """Return the losses of 25 steps on generated tokens: float32, eager, zipf."""
    losses = []
    honest = train_gpt.train_step

    def observed(*args) -> torch.Tensor:
        loss = honest(*args)
        losses.append(loss.item())
        return loss

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        rng = np.random.default_rng(0)
        steps = (rng.zipf(1.6, 6000) % 97 + rng.integers(0, 3, 6000)).cumsum()
        write_shard(Path(folder) / "fineweb_train_000000.bin", steps % 101)
        sizes = {"vocab_size": 101, "train_seq_len": 32, "num_layers": 3, "iterations": 25}
        sizes |= {"train_batch_tokens": 256, "micro_batch_tokens": 128}
        layers = {"loop_end": 1, "parallel_start_layer": 2}
        hp = tiny_hp(**sizes, **layers, data_path=folder, dispatch=dispatch)
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        patch.setattr(train_gpt, "train_step", observed)
        loader, model = train_gpt.TokenLoader(hp, ALONE), train_gpt.GPT(hp.model)
        model.init_weights(hp.seed)
        counts = np.bincount(loader.sample(), minlength=hp.model.vocab_size)
        model.expert_table.copy_(train_gpt.build_expert_table(hp.model, counts))
        train_gpt.train(hp, ALONE, lambda text: None, model, loader, None)
        torch.set_float32_matmul_precision(precision)
    return losses


def deviation(losses: list[float]) -> float:
    """Return the largest relative difference from the golden file."""
    golden = np.array(json.loads(GOLDEN.read_text())["train_losses"])
    assert len(losses) == len(golden) == 25
    return float(np.abs(np.array(losses) / golden - 1).max())


@pytest.mark.parametrize("dispatch", ["masked", "grouped"])
def test_losses_of_the_fixed_run_are_the_golden_ones(dispatch):
    losses = golden_losses(dispatch)
    assert losses[-1] < losses[0] - 0.3
    assert deviation(losses) < GOLDEN_TOLERANCE


@pytest.mark.slow
def test_a_changed_constant_moves_the_golden_losses(monkeypatch):
    honest = train_gpt.lr_scale
    monkeypatch.setattr(train_gpt, "lr_scale", lambda hp, frac: 0.999 * honest(hp, frac))
    assert deviation(golden_losses()) > 2 * GOLDEN_TOLERANCE


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-golden"]:
        sys.exit(f"usage: {sys.argv[0]} --write-golden")
    torch.set_num_threads(1)
    losses = [round(loss, 6) for loss in golden_losses()]
    content = {"torch": torch.__version__, "train_losses": losses}
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {os.path.relpath(GOLDEN)}: {losses[0]} to {losses[-1]}")
