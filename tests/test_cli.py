"""Properties of the command lines, from environment to artifact and score.   pytest tests/test_cli.py

The expected losses of a short fixed run live in golden_losses.json. After a change that is meant to alter training:
    python tests/test_cli.py --write-golden
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers_cli import (
    ALONE,
    BOS,
    ROOT,
    TINY_MODEL,
    Dataset,
    Result,
    assert_refused,
    cli_env,
    eval_env,
    full_environment,
    make_sentences,
    run_command,
    run_in_process,
    tiny_tokenizer,
    tokenize_docs,
    train_losses,
    write_dataset,
    write_shard,
)
from make_record import pack_script

import eval_sliding
import train_gpt
from train_gpt import CHOICES, Hyperparameters, Refusal

GOLDEN = Path(__file__).with_name("golden_losses.json")
GOLDEN_TOLERANCE = (
    2e-5  # relative; initial weights that are off by 1e-5 move the losses by less than 1e-6
)
TRAIN_KEYS = "event run_id artifact_path val_bpb_float val_bpb bytes_code bytes_model bytes_total train_seconds steps"
EVAL_KEYS = "event val_bpb val_loss target_tokens scored_bytes eval_seconds stride partial"
TRAIN_LINES = {
    "train_loss": r"^step:\d+/\d+ train_loss:[\d.]+ train_time:\d+ms step_avg:[\d.]+ms",
    "final_validation": r"^step:8/8 val_loss:[\d.]+ val_bpb:[\d.]+ train_time:\d+ms step_avg:[\d.]+ms$",
    "before_quantization": r"^pre-quantization post-ema val_loss:[\d.]+ val_bpb:[\d.]+ eval_time:\d+ms$",
    "artifact_size": r"^Serialized model quantized\+\w+: \d+ bytes",
    "submission_size": r"^Total submission size quantized\+\w+: \d+ bytes$",
    "after_quantization": r"^quantized val_loss:[\d.]+ val_bpb:[\d.]+ eval_time:\d+ms$",
    "roundtrip": r"^final_roundtrip_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    "model_params": r"^model_params:\d+ ",
    "warmup": r"^warmup_step:0/0 ",
}
EVAL_LINES = {
    "sliding": r"^quantized_sliding_window val_loss:[\d.]+ val_bpb:[\d.]+ eval_time:\d+ms$",
    "sliding_exact": r"^final_sliding_window_exact val_loss:\d+\.\d{8} val_bpb:\d+\.\d{8}$",
    "eval_time": r"^total_eval_time:[\d.]+s$",
}


class Run:
    """A finished training in a folder of its own."""

    def __init__(self, folder: Path, result: Result):
        self.folder, self.result = folder, result
        self.artifact = folder / "logs" / "run.ptz"
        assert result.code == 0, result.err

    @property
    def log(self) -> str:
        return (self.folder / "logs" / "run.txt").read_text(encoding="utf-8")

    @property
    def losses(self) -> list[float]:
        return train_losses(self.log)

    @property
    def model(self) -> train_gpt.GPT:
        return train_gpt.load_artifact(self.artifact, Hyperparameters(eval_stride=8), ALONE.device)[
            0
        ]

    def same_as(self, other: "Run") -> bool:
        assert len(self.losses) == len(other.losses) == 8
        return (
            self.losses == other.losses
            and self.artifact.read_bytes() == other.artifact.read_bytes()
        )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture
def train(tmp_path, dataset):
    """Function that trains in this process, each time in another folder."""

    def run(data=dataset, **knobs) -> Run:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        return Run(folder, run_in_process(train_gpt.main, cli_env(data, **knobs), folder))

    return run


@pytest.fixture(scope="module")
def baseline(tmp_path_factory, dataset) -> Run:
    """One training in this process, with the tiny defaults."""
    folder = tmp_path_factory.mktemp("baseline")
    return Run(folder, run_in_process(train_gpt.main, cli_env(dataset), folder))


@pytest.fixture(scope="module")
def chain(tmp_path_factory, dataset) -> tuple[Run, Result]:
    """The whole way by the real command lines: train, then score with a window-wide stride."""
    folder = tmp_path_factory.mktemp("chain")
    trained = Run(
        folder, run_command("train_gpt.py", cli_env(dataset, NUM_LAYER=5, LESS="-R"), folder)
    )
    return trained, run_command(
        "eval_sliding.py", eval_env(dataset, EVAL_STRIDE=32), folder, "logs/run.ptz"
    )


def refused(env: dict[str, str], cwd: Path, *fragments: str) -> None:
    """The training must be refused with one line, leaving no artifact."""
    assert_refused(run_in_process(train_gpt.main, env, cwd), *fragments)
    assert not list(cwd.rglob("*.ptz"))
    assert not list(cwd.rglob("*.tmp"))


# ---- The whole chain


def test_training_and_scoring_succeed_and_print_nothing_on_stderr(chain):
    trained, scored = chain
    assert (trained.result.code, scored.code) == (0, 0)
    assert (trained.result.err, scored.err) == ("", "")
    assert sorted(path.name for path in (trained.folder / "logs").iterdir()) == [
        "run.ptz",
        "run.txt",
    ]


def test_the_log_starts_with_the_source_and_holds_every_knob(chain):
    log = chain[0].log
    assert log.startswith((ROOT / "train_gpt.py").read_text(encoding="utf-8"))
    knobs = dict(re.findall(r"^  (\w+): (.*)$", log.split("=" * 100)[-1], re.MULTILINE))
    assert list(knobs) == train_gpt.ALL_KNOBS
    assert (knobs["num_layers"], knobs["matrix_lr"], knobs["compile"]) == ("2", "0.022", "False")


def test_the_log_names_versions_overrides_device_and_data(chain, dataset):
    log = chain[0].log
    assert f"torch:{torch.__version__} numpy:{np.__version__} commit:" in log
    overrides = re.search(r"^device:cpu threads:\d+ overrides: (.*)$", log, re.MULTILINE)[1].split()
    assert {"NUM_LAYERS=2", "ITERATIONS=8", "DTYPE=float32", f"DATA_PATH={dataset.folder}"} <= set(
        overrides
    )
    assert not any(
        override.startswith(("SEED=", "MATRIX_LR=", "ROUTING=")) for override in overrides
    )
    assert f"train_loader:dataset:{dataset.folder.name} train_shards:2" in log
    assert f"val_loader:shards pattern={dataset.folder}/fineweb_val_*.bin tokens:" in log


@pytest.mark.parametrize("name", TRAIN_LINES)
def test_training_prints_and_logs_the_lines_that_parsers_read(chain, name):
    assert re.search(TRAIN_LINES[name], chain[0].result.out, re.MULTILINE)
    assert re.search(TRAIN_LINES[name], chain[0].log.split("=" * 100)[-1], re.MULTILINE)


@pytest.mark.parametrize("name", EVAL_LINES)
def test_scoring_prints_the_lines_that_parsers_read_and_appends_them_to_the_log(chain, name):
    trained, scored = chain
    assert re.search(EVAL_LINES[name], scored.out, re.MULTILINE)
    assert not re.search(EVAL_LINES[name], trained.result.out, re.MULTILINE)
    assert trained.log.endswith(scored.out)


def test_each_stage_ends_with_one_json_line_of_the_documented_keys(chain):
    trained, scored = chain[0].result.summary, chain[1].summary
    assert {*TRAIN_KEYS.split(), "tokens", "params"} <= trained.keys()
    assert set(EVAL_KEYS.split()) <= scored.keys()
    assert (trained["event"], trained["run_id"], trained["artifact_path"]) == (
        "train_summary",
        "run",
        "logs/run.ptz",
    )
    assert (scored["event"], scored["stride"], scored["partial"]) == ("eval_summary", 32, False)
    assert (trained["steps"], trained["tokens"]) == (8, 8 * 128)
    assert f"model_params:{trained['params']} " in chain[0].log
    assert 0 < trained["train_seconds"] < 60
    assert 0 < scored["eval_seconds"] < 60


def test_the_summary_repeats_the_logged_scores(chain):
    log, trained, scored = chain[0].log, chain[0].result.summary, chain[1].summary
    before = re.search(r"^pre-quantization post-ema val_loss:\S+ val_bpb:(\S+)", log, re.MULTILINE)[
        1
    ]
    after = re.search(r"^final_roundtrip_exact val_loss:(\S+) val_bpb:(\S+)", log, re.MULTILINE)
    sliding = re.search(
        r"^final_sliding_window_exact val_loss:(\S+) val_bpb:(\S+)", log, re.MULTILINE
    )
    assert before == f"{trained['val_bpb_float']:.8f}"
    assert after.groups() == (f"{trained['val_loss']:.8f}", f"{trained['val_bpb']:.8f}")
    assert sliding.groups() == (f"{scored['val_loss']:.8f}", f"{scored['val_bpb']:.8f}")


def test_reported_bytes_are_those_on_disk_and_add_up(chain):
    trained = chain[0]
    code = len(pack_script(train_gpt.submission_source()))
    model = trained.artifact.stat().st_size
    summary = trained.result.summary
    assert (summary["bytes_code"], summary["bytes_model"], summary["bytes_total"]) == (
        code,
        model,
        code + model,
    )
    assert (
        int(re.findall(r"Total submission size quantized\+\w+: (\d+) bytes", trained.log)[-1])
        == code + model
    )
    assert (
        int(re.findall(r"Serialized model quantized\+\w+: (\d+) bytes", trained.log)[-1]) == model
    )
    assert re.findall(r"^Code size: (\d+) bytes$", trained.log, re.MULTILINE) == [str(code)]


def test_a_stride_of_a_whole_window_gives_the_score_of_the_training_stage(chain):
    trained, scored = chain[0].result.summary, chain[1].summary
    assert scored["val_bpb"] == pytest.approx(trained["val_bpb"], abs=1e-9)
    assert scored["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-9)


def test_a_small_stride_gives_another_score_of_the_same_text(chain, dataset):
    trained, scored = chain
    env = eval_env(dataset, EVAL_STRIDE=4)
    sliding = run_in_process(eval_sliding.main, env, trained.folder, "logs/run.ptz").summary
    assert sliding["val_bpb"] != scored.summary["val_bpb"]
    assert sliding["scored_bytes"] == scored.summary["scored_bytes"]
    assert sliding["target_tokens"] == scored.summary["target_tokens"]


def test_scoring_takes_the_model_from_the_artifact_and_not_from_the_environment(chain, dataset):
    assert not set(eval_env(dataset)) & set(TINY_MODEL)
    misleading = eval_env(
        dataset, EVAL_STRIDE=32, NUM_LAYERS=7, VOCAB_SIZE=999, ACTIVATION="swiglu", MU="off", XSA=0
    )
    again = run_in_process(eval_sliding.main, misleading, chain[0].folder, "logs/run.ptz")
    assert again.summary["val_bpb"] == pytest.approx(chain[1].summary["val_bpb"], abs=1e-12)


def test_a_run_in_this_process_equals_one_by_the_command_line(chain, baseline):
    """Which is why the tests below may save the start of a process."""
    assert baseline.same_as(chain[0])


def test_the_logged_rate_is_that_of_the_logged_time_per_step(baseline):
    lines = re.findall(
        r"^step:(\d+)/8 train_loss:.* step_avg:(\S+)ms .*tok/s: (\d+)$", baseline.log, re.MULTILINE
    )
    assert len(lines) == 8
    for _, step_avg, rate in lines:
        assert float(rate) * float(step_avg) / 1000 == pytest.approx(128, rel=0.01)


def test_a_window_longer_than_the_training_sequence_serves_scoring_alone(train, dataset):
    """EVAL_STRIDE may then exceed TRAIN_SEQ_LEN, which must not stop a training at its end."""
    run = train(EVAL_SEQ_LEN=64, EVAL_STRIDE=48)
    result = run_in_process(
        eval_sliding.main,
        eval_env(dataset, EVAL_SEQ_LEN=64, EVAL_STRIDE=48),
        run.folder,
        "logs/run.ptz",
    )
    assert result.code == 0, result.err
    assert (result.summary["seq_len"], result.summary["stride"]) == (64, 48)


def test_importing_the_trainer_prints_nothing_and_touches_no_data_and_no_gpu(dataset, tmp_path):
    script = (
        "import sys\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == 'open' else None)\n"
        "import train_gpt\n"
        "assert not [p for p in opened if p.endswith(('.bin', '.model', '.ptz'))], opened\n"
        "assert any('train_gpt' in p for p in opened)\n"
        "assert not train_gpt.torch.cuda.is_initialized()\n"
    )
    env = full_environment(cli_env(dataset)) | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---- Every router and every mu


EVERY_WAY = [
    (routing, mu, 1)
    for routing, mu in itertools.product(*(CHOICES[k].split() for k in ("routing", "mu")))
]
EVERY_WAY += [(routing, "pid", 2) for routing in CHOICES["routing"].split()]


@pytest.fixture(scope="module")
def short_dataset(tmp_path_factory) -> Dataset:
    """One with a validation split of two documents."""
    return write_dataset(tmp_path_factory.mktemp("short") / "set", val_docs=2)


@pytest.mark.parametrize(("routing", "mu", "top_k"), EVERY_WAY)
def test_every_router_and_mu_trains_exports_reloads_and_scores(
    short_dataset, tmp_path, routing, mu, top_k
):
    env = cli_env(short_dataset, ROUTING=routing, MU=mu, TOP_K=top_k, ITERATIONS=2, GPTQ_BATCHES=1)
    result = run_in_process(train_gpt.main, env | {"TARGET_BYTES": "0", "CODEC": "zstd"}, tmp_path)
    run = Run(tmp_path, result)
    trained, knobs = result.summary, run.model.hp
    assert (knobs.routing, knobs.mu, knobs.top_k) == (routing, mu, top_k)
    assert run.model.expert_table.shape == (0 if routing == "dense" else 2, 340, top_k)
    assert len(run.losses) == trained["steps"] == 2
    assert not re.search(r"\b(nan|inf|warning)\b", run.log.split("=" * 100)[-1])
    scored = [
        run_in_process(
            eval_sliding.main, eval_env(short_dataset, EVAL_STRIDE=stride), tmp_path, "logs/run.ptz"
        ).summary
        for stride in (32, 16)
    ]
    assert 1 < trained["val_bpb"] < 8
    assert scored[0]["val_loss"] == pytest.approx(trained["val_loss"], abs=1e-9)
    assert scored[0]["val_bpb"] == pytest.approx(trained["val_bpb"], abs=1e-9)
    assert 1 < scored[1]["val_bpb"] < 8
    assert scored[1]["val_bpb"] != scored[0]["val_bpb"]
    assert scored[1]["target_tokens"] == scored[0]["target_tokens"]


# ---- What a result may depend on


def test_the_same_seed_repeats_losses_and_artifact_and_another_does_not(baseline, train):
    assert train().same_as(baseline)
    other = train(SEED=1)
    assert other.losses != baseline.losses
    assert other.artifact.read_bytes() != baseline.artifact.read_bytes()


@pytest.mark.parametrize(
    "knobs", [{"ROUTING": "learned", "TOP_K": 2, "MU": "pid"}, {"ROUTING": "cluster"}]
)
def test_the_same_seed_repeats_what_routers_do_and_another_does_not(train, knobs):
    first, again, other = train(**knobs), train(**knobs), train(**knobs, SEED=1)
    assert first.same_as(again)
    assert first.losses != other.losses
    assert first.artifact.read_bytes() != other.artifact.read_bytes()


@pytest.mark.parametrize("knobs", [{}, {"ROUTING": "learned", "MU": "pid"}])
def test_warm_up_leaves_no_trace(train, knobs):
    assert train(**knobs, WARMUP_STEPS=2).same_as(train(**knobs))


def test_averaging_changes_the_artifact_and_never_the_losses(baseline, train):
    run = train(AVERAGE="off")
    assert run.losses == baseline.losses
    assert run.artifact.read_bytes() != baseline.artifact.read_bytes()


def test_gradient_accumulation_leaves_the_losses_alone(baseline, train):
    assert train(MICRO_BATCH_TOKENS=32).losses == pytest.approx(baseline.losses, abs=2e-4)


def test_validation_text_never_reaches_the_artifact_and_training_text_does(
    baseline, train, tmp_path
):
    run = train(write_dataset(tmp_path / "other_val", val_seed=77, val_docs=11), VAL_LOSS_EVERY=3)
    assert len(re.findall(r"^step:[36]/8 val_loss", run.log, re.MULTILINE)) == 2
    assert run.result.summary["val_bpb"] != baseline.result.summary["val_bpb"]
    assert run.same_as(baseline)
    assert not train(write_dataset(tmp_path / "other_train", train_seed=78)).same_as(baseline)


def test_validation_text_never_reaches_the_table_of_clusters_and_training_text_does(
    train, tmp_path
):
    knobs = {"ROUTING": "cluster", "TOP_K": 2}
    run, other_val = (
        train(**knobs),
        train(write_dataset(tmp_path / "other_val", val_seed=77, val_docs=11), **knobs),
    )
    assert other_val.result.summary["val_bpb"] != run.result.summary["val_bpb"]
    assert other_val.same_as(run)
    other_train = train(write_dataset(tmp_path / "other_train", train_seed=78), **knobs)
    assert not torch.equal(other_train.model.expert_table, run.model.expert_table)


AUDIT = """
import json, os, sys
events = []
def hook(event, args):
    if event in ("open", "os.rename") and isinstance(args[0], (str, bytes, os.PathLike)):
        frame, stack = sys._getframe(), []
        while frame:
            if frame.f_code.co_filename.endswith("train_gpt.py") and frame.f_code.co_name.isidentifier():
                stack.insert(0, frame.f_code.co_name)
            frame = frame.f_back
        events.append((event, os.path.basename(os.fsdecode(args[0 if event == "open" else 1])), stack))
import train_gpt
sys.addaudithook(hook)
if sys.argv.pop() == "peek":
    sample = train_gpt.TokenLoader.sample
    def peek(loader):
        open(train_gpt.list_shards(loader.hp.dataset_dir, "val")[0], "rb").close()
        return sample(loader)
    train_gpt.TokenLoader.sample = peek
train_gpt.main()
print(json.dumps(events))
"""


@pytest.mark.parametrize(("mode", "clean"), [("honest", True), ("peek", False)])
def test_before_the_artifact_exists_only_the_validation_loader_opens_validation_files(
    mode, clean, dataset, tmp_path
):
    env = full_environment(cli_env(dataset, VAL_LOSS_EVERY=3, ROUTING="cluster")) | {
        "PYTHONPATH": str(ROOT)
    }
    command = [sys.executable, "-c", AUDIT, mode]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    events = json.loads(done.stdout.splitlines()[-1])
    written = next(
        i for i, (event, name, _) in enumerate(events) if event == "os.rename" and name == "run.ptz"
    )
    opened = [(name, stack) for event, name, stack in events[:written] if event == "open"]
    val_stacks = [stack for name, stack in opened if "fineweb_val" in name]
    assert val_stacks
    assert any("fineweb_train" in name for name, _ in opened)
    assert all(stack[:3] == ["main", "load", "load_data_shard"] for stack in val_stacks) == clean


def test_one_and_two_processes_agree_on_losses_and_score(baseline, dataset, tmp_path):
    two = Run(tmp_path, run_command("train_gpt.py", cli_env(dataset), tmp_path, nproc=2))
    assert "world_size:2" in two.log
    assert two.losses[:4] == pytest.approx(baseline.losses[:4], abs=1e-5)
    assert two.losses == pytest.approx(baseline.losses, abs=1e-2)
    assert two.result.summary["tokens"] == 8 * 128
    assert "warning:" not in two.log.split("=" * 100)[-1]
    alone = run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, "logs/run.ptz").summary
    both = run_command(
        "eval_sliding.py", eval_env(dataset), tmp_path, "logs/run.ptz", nproc=2
    ).summary
    assert both["val_bpb"] == pytest.approx(alone["val_bpb"], abs=1e-9)
    assert both["scored_bytes"] == alone["scored_bytes"]


def test_three_processes_are_refused(dataset, tmp_path):
    for world_size in (3, 5, 16):
        env = cli_env(dataset) | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
        refused(env, tmp_path, f"WORLD_SIZE={world_size} does not divide 8")
    assert not list(tmp_path.iterdir())


def test_a_batch_that_the_ranks_cannot_share_is_refused():
    hp = Hyperparameters(train_seq_len=32, train_batch_tokens=128, micro_batch_tokens=128)
    assert [hp.grad_accum_steps(n) for n in (1, 2, 4)] == [1, 1, 1]
    with pytest.raises(Refusal, match="not a whole number of sequences on each of 8 ranks"):
        hp.grad_accum_steps(8)


# ---- Clock


def test_training_stops_inside_the_wall_clock_cap(train):
    run = train(MAX_WALLCLOCK_SECONDS=3, GPTQ_RESERVE_SECONDS=1, ITERATIONS=100_000)
    summary = run.result.summary
    stopped = re.search(
        r"^stopping_early: wallclock_cap train_time:(\d+)ms step:(\d+)/100000$",
        run.log,
        re.MULTILINE,
    )
    assert int(stopped[2]) == summary["steps"] < 100_000
    assert 1500 < int(stopped[1]) < 2100
    hessians = re.search(
        r"^gptq: \d+ Hessians over 256 training tokens in ([\d.]+)s$", run.log, re.MULTILINE
    )
    assert int(stopped[1]) / 1000 + float(hessians[1]) == pytest.approx(
        summary["train_seconds"], abs=0.1
    )
    assert summary["train_seconds"] < 3


def test_without_a_cap_every_step_is_taken(baseline):
    assert baseline.result.summary["steps"] == 8
    assert not re.search(r"^stopping_early", baseline.log, re.MULTILINE)


def test_the_last_learning_rate_is_low_when_the_clock_ends_the_run(train):
    knobs = {"MAX_WALLCLOCK_SECONDS": 2, "GPTQ_RESERVE_SECONDS": 1, "SCHEDULE": "linear"}
    run = train(**knobs, ITERATIONS=100_000, TRAIN_LOG_EVERY=1)
    scales = [float(x) for x in re.findall(r"lr_scale:(\S+)", run.result.out)]
    assert scales[0] == 1.0
    assert scales[-1] < 0.25


# ---- Bad input


BAD_KNOBS = {  # the message has to name the last variable of each
    "routing": {"ROUTING": "random"},
    "dispatch": {"DISPATCH": "dense"},
    "mu": {"MU": "pd"},
    "activation": {"ACTIVATION": "gelu"},
    "schedule": {"SCHEDULE": "cosine"},
    "average": {"AVERAGE": "mean"},
    "codec": {"CODEC": "lzma"},
    "device": {"DEVICE": "tpu"},
    "dtype": {"DTYPE": "float16"},
    "int": {"NUM_LAYERS": "two"},
    "int_with_fraction": {"ITERATIONS": "1.5"},
    "int_empty": {"SEED": ""},
    "float": {"MATRIX_LR": "0,02"},
    "bool": {"COMPILE": "yes"},
    "bool_empty": {"XSA": ""},
    "nan": {"MATRIX_LR": "nan"},
    "inf": {"MAX_WALLCLOCK_SECONDS": "inf"},
    "minus_inf": {"EMBED_LR": "-inf"},
    "negative_float": {"SCALAR_LR": "-0.1"},
    "negative_int": {"WARMUP_STEPS": "-1"},
    "negative_seed": {"SEED": "-1"},
    "zero": {"ITERATIONS": "0"},
    "astronomic": {"ITERATIONS": "1" + "0" * 400},
    "astronomic_batch": {"TRAIN_BATCH_TOKENS": "32" + "0" * 400},
    "astronomic_warm_up": {"WARMUP_STEPS": "1" + "0" * 400},
    "momentum": {"MUON_MOMENTUM": "1.5"},
    "experts": {"NUM_EXPERTS": "257"},
    "no_expert": {"TOP_K": "0"},
    "three_experts": {"TOP_K": "3"},
    "half_an_expert": {"TOP_K": "1.5"},
    "two_of_one_expert": {"TOP_K": "2", "NUM_EXPERTS": "1"},
    "learned_grouped": {"ROUTING": "learned", "DISPATCH": "grouped"},
    "hybrid_grouped": {"ROUTING": "hybrid", "DISPATCH": "grouped"},
    "soft_grouped": {"ROUTING": "soft", "DISPATCH": "grouped"},
    "vocab": {"VOCAB_SIZE": "65537"},
    "heads": {"MODEL_DIM": "32", "NUM_HEADS": "3"},
    "kv_heads": {"NUM_HEADS": "4", "NUM_KV_HEADS": "3"},
    "odd_rope": {"ROPE_DIMS": "3"},
    "long_rope": {"ROPE_DIMS": "10"},
    "batch": {"TRAIN_BATCH_TOKENS": "130", "TRAIN_SEQ_LEN": "32"},
    "batch_below_a_sequence": {"TRAIN_BATCH_TOKENS": "16", "TRAIN_SEQ_LEN": "32"},
    "stride": {"EVAL_STRIDE": "33"},
    "stride_of_eval_window": {"EVAL_SEQ_LEN": "7", "EVAL_STRIDE": "8"},
    "swa": {"SCHEDULE": "sgdr", "AVERAGE": "swa", "SWA_START_FRAC": "0.2"},
    "swa_end": {"AVERAGE": "swa", "SWA_START_FRAC": "1.0"},
    "swa_linear": {
        "AVERAGE": "swa",
        "SCHEDULE": "linear",
        "WARMDOWN_FRAC": "0.1",
        "SWA_START_FRAC": "0.85",
    },
    "moe_start": {"MOE_START_LAYER": "2", "NUM_LAYERS": "2"},
    "grouped_expert": {"DISPATCH": "grouped", "EXPERT_DIM": "12"},
    "loop_after_the_last_layer": {"LOOP_START": "1", "NUM_LAYERS": "2", "LOOP_END": "2"},
    "loop_before_its_start": {"LOOP_START": "1", "LOOP_END": "0"},
    "loop_passes": {"LOOP_PASSES": "0"},
    "loop_from": {"LOOP_FROM": "1.5"},
    "attention": {"ATTENTION": "xformers"},
    "reserve": {"MAX_WALLCLOCK_SECONDS": "12", "GPTQ_RESERVE_SECONDS": "12"},
    "damping": {"GPTQ_DAMPING": "-0.01"},
    "target": {"TARGET_BYTES": "16000000"},
    "narrow": {"MODEL_DIM": "8"},
    "bits": {"MATRIX_BITS": "9"},
    "few_bits": {"EMBED_BITS": "1"},
    "slash": {"RUN_ID": "../run"},
    "space": {"RUN_ID": "a b"},
    "ttt": {"TTT": "adam"},
    "ttt_scope": {"TTT_SCOPE": "head"},
    "ttt_lr": {"TTT_LR": "-1"},
    "ttt_momentum": {"TTT_MOMENTUM": "2"},
    "ttt_epochs": {"TTT_EPOCHS": "0"},
    "ttt_chunk": {"TTT_CHUNK_TOKENS": "0"},
    "ttt_segments": {"TTT_SEGMENTS": "1.5"},
    "eval_seconds": {"EVAL_MAX_SECONDS": "nan"},
    "eval_stride": {"EVAL_STRIDE": "0"},
}
BAD_EVAL_KNOBS = [case for case in BAD_KNOBS if case.startswith(("ttt", "eval"))]
GOOD_KNOBS = {
    "eval_window": {"EVAL_STRIDE": "48", "EVAL_SEQ_LEN": "64"},
    "swa": {"AVERAGE": "swa", "SWA_START_FRAC": "0.4"},
    "swa_linear": {
        "AVERAGE": "swa",
        "SCHEDULE": "linear",
        "WARMDOWN_FRAC": "0.2",
        "SWA_START_FRAC": "0.85",
    },
    "moe_start": {"MOE_START_LAYER": "1"},
    "dense_ignores_dispatch": {"ROUTING": "dense", "DISPATCH": "grouped", "EXPERT_DIM": "12"},
    "grouped": {"DISPATCH": "grouped", "EXPERT_DIM": "16"},
    "grouped_pairs": {
        "DISPATCH": "grouped",
        "TOP_K": "2",
        "NUM_EXPERTS": "2",
        "ROUTING": "cluster",
    },
    "learned_pairs": {"ROUTING": "learned", "TOP_K": "2", "MU": "pid"},
    "soft": {"ROUTING": "soft", "NUM_EXPERTS": "1"},
    "rope": {"ROPE_DIMS": "8"},
    "bits": {"MATRIX_BITS": "2", "EMBED_BITS": "8"},
    "no_loop": {"LOOP_PASSES": "1", "LOOP_END": "7", "LOOP_START": "9"},
    "whole_loop": {"LOOP_PASSES": "4", "LOOP_START": "0", "LOOP_END": "1"},
    "no_reserve_without_hessians": {
        "GPTQ_BATCHES": "0",
        "GPTQ_RESERVE_SECONDS": "9",
        "MAX_WALLCLOCK_SECONDS": "5.0",
    },
    "no_reserve_without_a_clock": {"MAX_WALLCLOCK_SECONDS": "0.0", "GPTQ_RESERVE_SECONDS": "9"},
    "target": {"TARGET_BYTES": "15999999"},
    "run_id": {"RUN_ID": "a.b_c-1+2"},
    "ttt": {
        "TTT": "sgd",
        "TTT_SCOPE": "mu",
        "TTT_LR": "0.0",
        "TTT_MOMENTUM": "1.0",
        "TTT_SEGMENTS": "1",
    },
    "no_eval_limit": {"EVAL_MAX_SECONDS": "0.0"},
    "scientific": {"MATRIX_LR": "2.2e-2", "SEED": str(2**63 - 1)},
}


@pytest.mark.parametrize("case", BAD_KNOBS)
def test_a_bad_knob_is_refused_in_one_line_with_its_value_before_anything_is_written(
    case, dataset, tmp_path
):
    name, value = list(BAD_KNOBS[case].items())[-1]
    refused(cli_env(dataset, **BAD_KNOBS[case]), tmp_path, f"{name}=", value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", GOOD_KNOBS)
def test_a_knob_inside_its_limits_is_accepted(case, dataset):
    hp = Hyperparameters.from_env(cli_env(dataset, **GOOD_KNOBS[case]))
    for name, text in GOOD_KNOBS[case].items():
        value = getattr(hp, name.lower())
        assert value == type(value)(text)


def test_the_defaults_are_valid_and_cover_the_record():
    assert Hyperparameters.from_env({}) == Hyperparameters()
    assert [Hyperparameters().grad_accum_steps(n) for n in (1, 2, 4, 8)] == [8, 4, 2, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(dataset, tmp_path):
    refused(cli_env(dataset, DEVICE="cuda"), tmp_path, "DEVICE=cuda: rank 0 finds none among")


def test_a_bad_knob_by_the_command_line_is_one_line_and_status_2(dataset, tmp_path):
    result = run_command("train_gpt.py", cli_env(dataset, ROUTING="random"), tmp_path)
    known = "zipf cluster hash modulo learned hybrid soft dense"
    assert_refused(result, f"ROUTING='random': expected one of {known}")
    assert result.out == ""


@pytest.mark.parametrize(
    ("typo", "name"),
    [
        ("NUM_LAYER", "NUM_LAYERS"),
        ("ROUTNG", "ROUTING"),
        ("MATRX_LR", "MATRIX_LR"),
        ("EVAL_STRIDES", "EVAL_STRIDE"),
    ],
)
def test_a_misspelt_knob_is_named_with_its_nearest_and_changes_nothing(
    typo, name, dataset, tmp_path
):
    log, hp = train_gpt.Log(ALONE, tmp_path / "log.txt"), Hyperparameters.from_env(cli_env(dataset))
    train_gpt.log_provenance(
        log, hp, ALONE, {**cli_env(dataset), typo: "5", "PATH": "/bin", "EDITOR": "vi"}
    )
    warnings = re.findall(r"^warning: .*$", log.path.read_text(), re.MULTILINE)
    assert warnings == [f"warning: {typo} is not a knob; did you mean {name}?"]


def test_knobs_of_the_bigram_memory_are_gone_and_change_nothing(dataset, tmp_path):
    """They are as good as any other variable; the names left are too far from theirs for a warning."""
    hp, gone = (
        Hyperparameters.from_env(cli_env(dataset)),
        {"BIGRAM_BUCKETS": "-1", "BIGRAM_DIM": "many"},
    )
    assert Hyperparameters.from_env({**cli_env(dataset), **gone}) == hp
    log = train_gpt.Log(ALONE, tmp_path / "log.txt")
    train_gpt.log_provenance(log, hp, ALONE, {**cli_env(dataset), **gone})
    assert not re.search("warning|bigram", log.path.read_text().split("=" * 100)[-1], re.IGNORECASE)


def test_a_run_with_a_misspelt_knob_warns_and_goes_on(chain):
    warnings = re.findall(r"^warning: .*$", chain[0].result.out, re.MULTILINE)
    assert warnings == ["warning: NUM_LAYER is not a knob; did you mean NUM_LAYERS?"]


def test_a_kernel_whose_package_is_absent_is_refused_in_one_line(dataset, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    refused(cli_env(dataset, ATTENTION="fa3"), tmp_path, "flash_attn_interface")


def test_arguments_that_nobody_reads_are_refused(dataset, tmp_path):
    result = run_in_process(train_gpt.main, cli_env(dataset), tmp_path, "--seed=3")
    assert_refused(result, "--seed=3: no arguments; knobs are environment variables")
    assert not (tmp_path / "logs").exists()


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step(dataset, tmp_path):
    refused(
        cli_env(dataset, MATRIX_LR="1e30", EMBED_LR="1e30"),
        tmp_path,
        "training loss is nan at step ",
        "stopped",
    )
    assert len(train_losses((tmp_path / "logs" / "run.txt").read_text())) in range(1, 8)


def test_a_model_over_the_cap_is_refused_before_training(dataset, tmp_path, monkeypatch):
    code = len(pack_script(train_gpt.submission_source()))
    monkeypatch.setattr(train_gpt, "MAX_SUBMISSION_BYTES", code + 1000)
    refused(
        cli_env(dataset),
        tmp_path,
        "dry run: ",
        f"the cap is {code + 1000:,}",
        "MODEL_DIM=32",
        "MATRIX_CLIP=12.85",
    )
    assert train_losses((tmp_path / "logs" / "run.txt").read_text()) == []


def test_an_artifact_over_the_cap_is_never_written(dataset, tmp_path, monkeypatch, baseline):
    monkeypatch.setattr(
        train_gpt, "dry_run", lambda hp, model: SimpleNamespace(artifact=b"", budget=str)
    )
    total = baseline.result.summary["bytes_total"]
    monkeypatch.setattr(train_gpt, "MAX_SUBMISSION_BYTES", total)
    refused(cli_env(dataset), tmp_path, "artifact: ", f"the cap is {total:,}")
    assert len(train_losses((tmp_path / "logs" / "run.txt").read_text())) == 8
    monkeypatch.setattr(train_gpt, "MAX_SUBMISSION_BYTES", total + 1)
    assert run_in_process(train_gpt.main, cli_env(dataset), tmp_path).code == 0


def test_an_output_folder_that_is_a_file_is_refused(dataset, tmp_path):
    (tmp_path / "logs").write_text("mine")
    refused(cli_env(dataset), tmp_path, "logs")
    assert (tmp_path / "logs").read_text() == "mine"


def test_a_log_name_that_is_taken_by_a_folder_is_refused(dataset, tmp_path):
    (tmp_path / "logs" / "run.txt").mkdir(parents=True)
    refused(cli_env(dataset), tmp_path, "run.txt")


BAD_DATA = {
    "no_folder": ({"DATA_PATH": "nowhere"}, "nowhere: no such data folder (DATA_PATH)"),
    "no_tokenizer": (
        {"TOKENIZER_PATH": "nowhere.model"},
        "nowhere.model: no such tokenizer (TOKENIZER_PATH)",
    ),
    "vocab_above_tokenizer": ({"VOCAB_SIZE": "341"}, "has 340 pieces, but VOCAB_SIZE=341"),
    "sequence_above_shards": (
        {"TRAIN_SEQ_LEN": "8192", "TRAIN_BATCH_TOKENS": "8192"},
        "no training shard holds",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_unusable_data_are_refused_before_training(case, dataset, tmp_path):
    changes, expected = BAD_DATA[case]
    refused(cli_env(dataset, **changes), tmp_path, expected)


# ---- Scoring bad artifacts


@pytest.fixture
def artifact(baseline, tmp_path) -> Path:
    path = tmp_path / "model.ptz"
    path.write_bytes(baseline.artifact.read_bytes())
    return path


def score_refused(env: dict[str, str], artifact: Path, *fragments: str) -> None:
    """Scoring must be refused with one line, and write no log."""
    assert_refused(
        run_in_process(eval_sliding.main, env, artifact.parent, artifact.name), *fragments
    )
    assert not artifact.with_suffix(".txt").exists()


def test_an_intact_artifact_is_scored(artifact, dataset, baseline):
    result = run_in_process(
        eval_sliding.main, eval_env(dataset, EVAL_STRIDE=32), artifact.parent, artifact.name
    )
    assert result.summary["val_bpb"] == pytest.approx(baseline.result.summary["val_bpb"], abs=1e-9)
    assert artifact.with_suffix(".txt").read_text() == result.out


def test_an_evaluation_that_takes_too_long_says_so(artifact, dataset):
    for limit, warned in ((0.001, True), (0, False), (600, False)):
        env = eval_env(dataset, EVAL_STRIDE=32, EVAL_MAX_SECONDS=limit)
        result = run_in_process(eval_sliding.main, env, artifact.parent, artifact.name)
        assert (f"are more than EVAL_MAX_SECONDS={limit:g}" in result.out) == warned
        assert result.summary["val_bpb"] > 0


def test_a_missing_artifact_is_refused(artifact, dataset):
    score_refused(eval_env(dataset), artifact.with_name("other.ptz"), "other.ptz: no such artifact")
    score_refused(eval_env(dataset), artifact.parent, "no such artifact")


@pytest.mark.parametrize("keep", [0, 10, 51, 52, 1000, -1])
def test_a_truncated_artifact_is_refused(keep, artifact, dataset):
    artifact.write_bytes(artifact.read_bytes()[:keep])
    score_refused(eval_env(dataset), artifact, "model.ptz: ", "artifact")


def test_an_artifact_with_a_flipped_bit_is_refused_wherever_it_is(artifact, dataset):
    good = artifact.read_bytes()
    for place in [0, 9, 11, 13, 30, 60, len(good) // 2, len(good) - 1]:
        artifact.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        score_refused(eval_env(dataset), artifact, "model.ptz")


def test_another_tokenizer_of_the_same_size_is_refused(artifact, dataset, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(tokenize_docs.train_tokenizer(make_sentences(50, 200), 340))
    assert other.read_bytes() != tiny_tokenizer()
    env = eval_env(dataset, TOKENIZER_PATH=other)
    score_refused(env, artifact, "was trained with another tokenizer (TOKENIZER_PATH)")


def test_a_tokenizer_of_another_size_is_refused_by_scoring(artifact, dataset, tmp_path):
    other = tmp_path / "other.model"
    other.write_bytes(tokenize_docs.train_tokenizer(make_sentences(0, 200), 350))
    score_refused(
        eval_env(dataset, TOKENIZER_PATH=other), artifact, "has 350 pieces, but VOCAB_SIZE=340"
    )


def test_a_stride_above_the_window_of_the_artifact_is_refused(artifact, dataset):
    score_refused(
        eval_env(dataset, EVAL_STRIDE=33), artifact, "EVAL_STRIDE=33: above the window of 32 tokens"
    )


@pytest.mark.parametrize("case", BAD_EVAL_KNOBS)
def test_a_bad_knob_of_scoring_is_refused_in_one_line_with_its_value(case, artifact, dataset):
    ((name, value),) = BAD_KNOBS[case].items()
    score_refused(eval_env(dataset, **BAD_KNOBS[case]), artifact, f"{name}=", value)


def test_a_missing_tokenizer_is_refused_by_scoring(artifact, dataset):
    env = eval_env(dataset, TOKENIZER_PATH="nowhere.model")
    score_refused(env, artifact, "nowhere.model: no such tokenizer (TOKENIZER_PATH)")


@pytest.fixture
def with_val(dataset, tmp_path):
    """Function that makes a data set with the tokenizer of `dataset` and one validation shard of the given tokens."""

    def make(tokens) -> Dataset:
        write_shard(tmp_path / "val" / "fineweb_val_0.bin", tokens)
        return replace(dataset, folder=tmp_path / "val")

    return make


def test_shards_of_another_tokenizer_of_the_same_size_are_refused_by_scoring(artifact, with_val):
    """The artifact's own tokenizer then belongs to the artifact, but not to the shards."""
    other = tokenize_docs.train_tokenizer(make_sentences(50, 200), 340)
    for model, fits in ((tiny_tokenizer(), True), (other, False)):
        sp = train_gpt.spm.SentencePieceProcessor(model_proto=model)
        data = with_val(
            [token for text in make_sentences(2, 8) for token in [BOS, *sp.encode(text)]]
        )
        if fits:
            result = run_in_process(
                eval_sliding.main, eval_env(data), artifact.parent, artifact.name
            )
            assert result.code == 0, result.err
            artifact.with_suffix(".txt").unlink()
        else:
            score_refused(
                eval_env(data), artifact, f"{data.folder}: ", "were made by another tokenizer"
            )


def test_a_split_without_a_target_is_refused_by_scoring(artifact, with_val):
    score_refused(
        eval_env(with_val([BOS])), artifact, "the validation split has no target to score"
    )


def test_a_sidecar_of_another_length_is_refused_by_scoring_and_a_fitting_one_counts(
    artifact, dataset, with_val
):
    tokens = train_gpt.load_data_shard(dataset.folder / "fineweb_val_0.bin")
    data = with_val(tokens)
    sidecar = write_shard(data.folder / "fineweb_val_bytes_0.bin", [7] * (len(tokens) + 1))
    score_refused(
        eval_env(data),
        artifact,
        f"{sidecar}: bytes of {len(tokens) + 1} tokens, but",
        str(len(tokens)),
    )
    write_shard(sidecar, [7] * len(tokens))
    scored = run_in_process(
        eval_sliding.main, eval_env(data), artifact.parent, artifact.name
    ).summary
    assert scored["scored_bytes"] == 7 * (len(tokens) - 1)


def test_segments_of_test_time_training_that_the_ranks_cannot_share_are_refused(
    artifact, dataset, monkeypatch
):
    monkeypatch.setattr(
        train_gpt.Dist, "from_torchrun", lambda device: train_gpt.Dist(0, 4, ALONE.device)
    )
    env = eval_env(dataset, TTT="sgd", TTT_SEGMENTS=6)
    score_refused(env, artifact, "TTT_SEGMENTS=6: not a multiple of 4 ranks")


def test_modes_that_exclude_each_other_are_refused(artifact, dataset):
    env, name = eval_env(dataset, TTT="sgd"), artifact.name
    argv_and_reason = [
        (("--self-check", 5, name), "TTT=sgd: --self-check is for TTT=off"),
        (("--self-check", 5, "--audit", name), "usage: "),
        (("--self-check", "many", name), "usage: "),
        (("--selfcheck", name), "usage: "),
        (("--audit",), "usage: "),
        ((), "usage: "),
    ]
    for argv, reason in argv_and_reason:
        assert_refused(run_in_process(eval_sliding.main, env, artifact.parent, *argv), reason)
    assert not artifact.with_suffix(".txt").exists()


WINDOWS = [
    (32, 8, 10_000),
    (64, 16, 40_000),
    (16, 16, 10_000),
]  # of models trained with 32 tokens and 4 rotations


@pytest.mark.parametrize(("window", "stride", "base"), WINDOWS)
def test_a_window_of_any_length_scores_and_the_log_says_how_it_is_rotated(
    artifact, dataset, window, stride, base
):
    env = eval_env(dataset, EVAL_SEQ_LEN=window, EVAL_STRIDE=stride)
    result = run_in_process(eval_sliding.main, env, artifact.parent, artifact.name)
    assert result.code == 0, result.err
    assert re.search(
        rf"^sliding evaluation of \S+ window:{window} stride:{stride} ", result.out, re.MULTILINE
    )
    assert re.search(
        rf"^trained_window:32 rope_base:{base} sidecar:False ttt:off$", result.out, re.MULTILINE
    )
    assert result.summary["seq_len"] == window
    assert 0 < result.summary["val_bpb"] < 8


@pytest.mark.parametrize(("window", "stride", "base"), WINDOWS)
def test_windows_one_at_a_time_give_the_same_score_whatever_their_length(
    artifact, dataset, window, stride, base
):
    env = eval_env(dataset, EVAL_SEQ_LEN=window, EVAL_STRIDE=stride)
    result = run_in_process(
        eval_sliding.main, env, artifact.parent, "--self-check", 10_000, artifact.name
    )
    assert result.code == 0, result.err
    checked = re.search(
        r"^self_check: (\d+) of (\d+) windows .* plain_bpb:(\S+) fast_bpb:(\S+)", result.out, re.M
    )
    assert checked[1] == checked[2]
    assert float(checked[4]) == pytest.approx(result.summary["val_bpb"], abs=1e-7)
    assert float(checked[3]) == pytest.approx(result.summary["val_bpb"], abs=1e-6)


@pytest.mark.parametrize("spoil", [False, True])
def test_a_faster_way_that_scores_otherwise_fails_its_self_check(
    artifact, dataset, spoil, monkeypatch
):
    attend = train_gpt.attend_at
    monkeypatch.setattr(
        train_gpt, "attend_at", lambda at, *qkv: attend((at - int(spoil)).clamp(min=0), *qkv)
    )
    result = run_in_process(
        eval_sliding.main, eval_env(dataset), artifact.parent, "--self-check", 9, artifact.name
    )
    if spoil:
        assert_refused(result, "self-check failed: ", " bits per byte apart")
    else:
        assert result.code == 0, result.err


def test_scoring_without_an_artifact_shows_its_usage_in_one_line(dataset, tmp_path):
    result = run_command("eval_sliding.py", eval_env(dataset), tmp_path)
    assert_refused(result, "usage: eval_sliding.py [--self-check N | --audit] ARTIFACT")
    assert_refused(
        run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, "a.ptz", "b.ptz"), "usage: "
    )


def test_help_prints_the_description_and_succeeds(dataset, tmp_path):
    for option in ("-h", "--help"):
        result = run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, option)
        assert (result.code, result.err) == (0, "")
        assert "eval_sliding.py logs/RUN_ID.ptz" in result.out
        assert "--self-check N" in result.out
        assert "--audit" in result.out


# ---- Golden losses


def golden_losses() -> list[float]:
    """Losses of 25 steps on generated tokens: float32, eager, zipf routing, masked dispatch."""
    losses = []
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        rng = np.random.default_rng(0)
        steps = (rng.zipf(1.6, 6000) % 97 + rng.integers(0, 3, 6000)).cumsum()
        write_shard(Path(folder) / "fineweb_train_000000.bin", steps % 101)
        hp = Hyperparameters(
            **{
                "vocab_size": 101,
                "train_seq_len": 32,
                "num_layers": 3,
                "model_dim": 32,
                "num_heads": 4,
            },
            **{
                "num_kv_heads": 2,
                "rope_dims": 4,
                "expert_dim": 8,
                "shared_dim": 32,
                "iterations": 25,
            },
            **{
                "dtype": "float32",
                "compile": False,
                "warmup_steps": 0,
                "max_wallclock_seconds": 0.0,
            },
            **{
                "train_batch_tokens": 256,
                "micro_batch_tokens": 128,
                "data_path": folder,
                "eval_stride": 32,
            },
            **{
                "schedule": "sgdr",
                "loop_start": 1,
                "loop_end": 1,
                "loop_passes": 2,
                "parallel_start_layer": 2,
            },
        )
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        step = train_gpt.train_step
        patch.setattr(
            train_gpt, "train_step", lambda *args: losses.append(step(*args)) or losses[-1]
        )
        loader, model = train_gpt.TokenLoader(hp, ALONE), train_gpt.GPT(hp)
        model.init_weights()
        counts = np.bincount(loader.sample(), minlength=hp.vocab_size)
        model.expert_table.copy_(train_gpt.build_expert_table(hp, counts))
        train_gpt.train(hp, ALONE, lambda text: None, model, loader, None)
        torch.set_float32_matmul_precision(precision)
    return [loss.item() for loss in losses]


def deviation(losses: list[float]) -> float:
    """Largest relative difference from the golden file."""
    golden = np.array(json.loads(GOLDEN.read_text())["train_losses"])
    assert len(losses) == len(golden) == 25
    return float(np.abs(np.array(losses) / golden - 1).max())


def test_losses_of_the_fixed_run_are_the_golden_ones():
    losses = golden_losses()
    assert losses[-1] < losses[0] - 0.3
    assert deviation(losses) < GOLDEN_TOLERANCE


def other_rotary_base(seq_len, base, dims, device):
    angles = torch.arange(seq_len)[:, None, None] * 5_000.0 ** (-torch.arange(0, dims, 2) / dims)
    return angles.cos(), angles.sin()


def other_slope(h, kind):
    return torch.nn.functional.leaky_relu(h, 0.29).square()


def other_table(hp, token_counts):
    return (
        torch.arange(hp.vocab_size).remainder(hp.num_experts)[:, None].expand(hp.num_layers, -1, 1)
    )


def slower_schedule(hp, frac, original=train_gpt.lr_scale):
    return 0.999 * original(hp, frac)


MUTATIONS = {
    "slope": ("activate", other_slope),
    "rotary": ("rotary_tables", other_rotary_base),
    "routing": ("build_expert_table", other_table),
    "polar": ("POLAR_EXPRESS", train_gpt.POLAR_EXPRESS[:4]),
    "schedule": ("lr_scale", slower_schedule),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_changed_constant_moves_the_golden_losses_beyond_the_tolerance(name, monkeypatch):
    monkeypatch.setattr(train_gpt, *MUTATIONS[name])
    assert deviation(golden_losses()) > 2 * GOLDEN_TOLERANCE


if __name__ == "__main__":
    if sys.argv[1:] != ["--write-golden"]:
        sys.exit(f"usage: {sys.argv[0]} --write-golden")
    torch.set_num_threads(1)
    content = {
        "torch": torch.__version__,
        "train_losses": [round(loss, 6) for loss in golden_losses()],
    }
    GOLDEN.write_text(json.dumps(content, indent=1) + "\n")
    print(
        f"wrote {os.path.relpath(GOLDEN)}: {content['train_losses'][0]} to {content['train_losses'][-1]}"
    )
