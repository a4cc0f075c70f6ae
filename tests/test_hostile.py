"""Readers of artifacts, shards and manifests against files made to harm.   pytest tests/test_hostile.py"""

import contextlib
import functools
import json
import multiprocessing
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import brotli
import cached_challenge_fineweb as downloader
import helpers_hostile as hostile
import pytest
import tokenize_docs
import torch
import zstandard
from conftest import tiny_hp
from helpers_cli import (
    CPU,
    ROOT,
    assert_refused,
    cli_env,
    eval_env,
    run_in_process,
    write_dataset,
    write_shard,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import eval_sliding
import train_gpt
from train_gpt import (
    MAX_HEADER_BYTES,
    MAX_SUBMISSION_BYTES,
    MAX_WEIGHTS,
    RANGES,
    Hyperparameters,
    Refusal,
    load_artifact,
)

MIB, GIB = 1 << 20, 1 << 30
CASE_SECONDS = 20
READER_BYTES = 2 * GIB  # that reading any artifact may take, beside what the process has
SMALL_BYTES = 100 * MIB  # that refusing one may take, and any manifest
cases = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
steering = st.binary(min_size=8, max_size=100)


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(action: Callable, *args: object) -> str:
    """The line with which an action refuses, within the time of a case."""
    with time_limit(CASE_SECONDS), pytest.raises(Refusal) as refused:
        action(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def refused_artifact(path: Path, data: bytes | None = None) -> str:
    """Why the reader refuses a file, after `data` is written to it, or as it is."""
    if data is not None:
        path.write_bytes(data)
    message = refusal(load_artifact, path, hostile.good_artifact()[0], CPU)
    assert str(path) in message
    return message


def seeded_cases(count: int) -> Iterator[bytes]:
    rng = random.Random(0)
    return (rng.randbytes(rng.randint(8, 100)) for _ in range(count))


# ---- Fuzzing


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_an_untouched_file_is_read(tmp_path, target):
    assert hostile.TARGETS[target](tmp_path, b"") == ""


@cases
@given(data=steering)
def test_an_artifact_with_any_edits_is_refused_or_a_valid_model(tmp_path, data):
    with time_limit(CASE_SECONDS):
        hostile.run_artifact_case(tmp_path, data)


@cases
@given(data=steering)
def test_shards_with_any_edits_are_refused_or_what_the_format_says(tmp_path, data):
    with time_limit(CASE_SECONDS):
        hostile.run_shard_case(tmp_path, data)


@cases
@given(data=steering)
def test_a_manifest_or_ledger_with_any_edits_is_refused_or_names_known_files_alone(tmp_path, data):
    with time_limit(CASE_SECONDS):
        hostile.run_manifest_case(tmp_path, data)


@cases
@given(
    head=st.sampled_from([b"", train_gpt.ARTIFACT_MAGIC, train_gpt.ARTIFACT_MAGIC + b"\3\0"]),
    tail=st.binary(),
)
@example(head=b"", tail=b"PK\3\4" * 20)
def test_any_other_bytes_are_no_artifact(tmp_path, head, tail):
    refused_artifact(tmp_path / "a.ptz", head + tail)


REACHED = {
    "artifact": r"checksum|bad header|a header of|do not fill|no codec|does not unpack|zstd says|brotli says|or twice|"
    r"cannot be stored|finite number|one of|heads must",
    "shard": "shorter than|magic is|shard version|do not make|outside VOCAB_SIZE|bytes of|two sequences",
    "manifest": "KeyError|TypeError|JSONDecode|the name|incomplete|not below|lacks|no validation|names no file",
}


@pytest.mark.parametrize("target", hostile.TARGETS)
def test_the_cases_get_to_every_check_and_past_all_of_them(tmp_path, target):
    messages = [hostile.TARGETS[target](tmp_path, data) for data in seeded_cases(300)]
    assert 0.1 < messages.count("") / len(messages) < 0.7
    for part in REACHED[target].split("|"):
        assert any(part in message for message in messages), part


def other_depth(path, hp, device):
    model, hp, sha = load_artifact(path, hp, device)
    return model, train_gpt.replace(hp, num_layers=hp.num_layers + 1), sha


def two_lines(data: bytes, number: int, size: int, source: Path) -> bytes:
    raise Refusal(f"{source}: damaged\nstream")


def failing(kind: type[BaseException]) -> Callable:
    def fail(*args, **kwargs):
        raise kind

    return fail


def run_all(target: str, folder: Path) -> None:
    for data in seeded_cases(60):
        hostile.TARGETS[target](folder, data)


def whatever_the_vocabulary(path: Path, vocab_size: int = 0):
    return train_gpt.read_shard(path, 0, train_gpt.shard_length(path))


LEAKS = {
    "codec": ("artifact", train_gpt, "decompress", failing(zstandard.ZstdError)),
    "memory": ("artifact", train_gpt, "decompress", failing(MemoryError)),
    "layout": ("artifact", train_gpt, "layout", failing(IndexError)),
    "two_lines": ("artifact", train_gpt, "decompress", two_lines),
    "other_model": ("artifact", train_gpt, "load_artifact", other_depth),
    "shard": ("shard", train_gpt, "load_data_shard", failing(ValueError)),
    "vocabulary": ("shard", train_gpt, "load_data_shard", whatever_the_vocabulary),
    "manifest": ("manifest", downloader, "parse_manifest", failing(KeyError)),
    "outside": ("manifest", downloader, "select", lambda hub, *args: [hub.file("evil")]),
    "kept": ("manifest", tokenize_docs, "read_manifest", failing(RecursionError)),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_reader_that_leaks_or_returns_what_is_not_there_is_noticed(tmp_path, monkeypatch, leak):
    target, module, name, replacement = LEAKS[leak]
    run_all(target, tmp_path)
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(
        (AssertionError, LookupError, ValueError, MemoryError, RecursionError, zstandard.ZstdError)
    ):
        run_all(target, tmp_path)


def test_a_reader_that_hangs_is_noticed():
    with pytest.raises(TimeoutError), time_limit(0.05):
        time.sleep(5)


# ---- Bombs: written, read and measured in another process

NARROW = {"model_dim": 12, "num_heads": 1, "num_kv_heads": 1, "rope_dims": 0}


def with_stream(name: str, number: int, stream: bytes) -> bytes:
    """The good artifact with one stream replaced, rightly declared."""
    hp, data = hostile.good_artifact()
    header, streams = hostile.split_artifact(data)
    at = [*train_gpt.layout(hostile.shapes_of(hp), header["storage"])].index(name)
    streams[at], header["streams"][at] = stream, [number, len(stream)]
    return hostile.seal(json.dumps(header).encode(), b"".join(streams))


def with_knobs(**knobs: object) -> bytes:
    """A header that lacks nothing, for a model of absurd size, and no streams."""
    header = hostile.split_artifact(hostile.good_artifact()[1])[0]
    header["model"] |= NARROW | {"routing": "zipf", "mu": "vector"} | knobs
    return hostile.seal(json.dumps(header).encode(), b"")


def consistent(**knobs: object) -> bytes:
    """An artifact without a fault but its size: two experts a token, and symbols and steps of 0 and 1."""
    hp = tiny_hp(
        **{**NARROW, "expert_dim": 1, "shared_dim": 1, "train_batch_tokens": 65_536, **knobs}
    )
    header, streams = hostile.consistent(hp, lambda size: (b"\0\1" * (size // 2 + 1))[:size])
    return hostile.seal(json.dumps(header, separators=(",", ":")).encode(), b"".join(streams))


def repeated(unit: bytes, size: int) -> bytes:
    return b'{"model":[' + unit * (size // len(unit)) + b"0]}"


LIMITS = {
    knob: RANGES[knob][1]
    for knob in train_gpt.MODEL_KNOBS
    if knob in {*RANGES} - {"moe_start_layer"}
}
NEST = b"[" * 900 + b"]" * 900 + b","
BOMBS = {
    "zstd": lambda: with_stream("table", 1, zstandard.compress(bytes(1 << 29))),
    "brotli": lambda: with_stream("table", 2, brotli.compress(bytes(1 << 29), quality=1)),
    "zstd_window": lambda: with_stream("table", 1, b"\x28\xb5\x2f\xfd\x00\xa8" + b"\1\0\0"),
    "zstd_empty_frames": lambda: with_stream("table", 1, zstandard.compress(b"") * 1_000_000),
    "zstd_empty_blocks": lambda: with_stream(
        "table", 1, b"\x28\xb5\x2f\xfd\x00\x58" + b"\0\0\0" * 5_000_000
    ),
    "zstd_skippable": lambda: with_stream("table", 1, b"\x50\x2a\x4d\x18\0\0\0\0" * 1_500_000),
    "brotli_empty_blocks": lambda: with_stream("table", 2, b"\x0c" + b"\x06" * 15_000_000 + b"\3"),
    "lists": lambda: hostile.seal(repeated(b"[],", 15_000_000), b""),
    "objects": lambda: hostile.seal(repeated(b"{},", 15_000_000), b""),
    "nested_lists": lambda: hostile.seal(repeated(NEST, 15_000_000), b""),
    "digits": lambda: hostile.seal(repeated(b"9", 15_000_000), b""),
    "brackets": lambda: hostile.seal(b"[" * 15_000_000, b""),
    "lists_within_the_limit": lambda: hostile.seal(repeated(NEST, MAX_HEADER_BYTES - 20), b""),
    "brackets_within_the_limit": lambda: hostile.seal(b"[" * MAX_HEADER_BYTES, b""),
    "digits_within_the_limit": lambda: hostile.seal(repeated(b"9", MAX_HEADER_BYTES - 20), b""),
    "all_limits": lambda: with_knobs(
        **{**LIMITS, **NARROW, "loop_start": 0, "loop_end": 255, "model_dim": 65_536}
    ),
    "layers_and_passes": lambda: with_knobs(
        num_layers=256, loop_passes=16, loop_start=0, loop_end=255
    ),
    "experts": lambda: with_knobs(
        num_experts=256, expert_dim=65_536, model_dim=65_536, activation="swiglu"
    ),
    "routers": lambda: with_knobs(
        routing="soft", num_experts=256, model_dim=65_536, vocab_size=65_536
    ),
    "guidance": lambda: with_knobs(
        mu="lowrank", mu_rank=65_536, model_dim=65_536, num_heads=65_536
    ),
}


FLAT = {"num_layers": 1, "loop_passes": 1, "routing": "dense", "mu": "off"}
VALID = {
    "deepest": lambda: consistent(
        num_layers=256, num_experts=2, top_k=2, vocab_size=4, mu="lowrank", mu_rank=1
    ),
    "largest_matrix": lambda: consistent(**FLAT, vocab_size=65_536, model_dim=1_800),
}


def peak_bytes() -> int:
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10


def measured(action: Callable) -> tuple[object, float, int]:
    """(result, seconds, bytes by which the peak of this process's memory grew) of an action."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, started = peak_bytes(), time.perf_counter()
    result = action()
    return result, time.perf_counter() - started, peak_bytes() - before


def read_bomb(name: str, folder: Path) -> tuple[str, int, float, int]:
    """(Refusal or "", weights, seconds, growth) of reading a bomb, in this process."""
    good, path, hp = folder / "good.ptz", folder / f"{name}.ptz", hostile.good_artifact()[0]
    good.write_bytes(hostile.good_artifact()[1])
    load_artifact(good, hp, CPU)
    path.write_bytes((BOMBS | VALID)[name]())
    read = functools.partial(hostile.refusal_of, lambda: load_artifact(path, hp, CPU), path)
    (loaded, message), seconds, growth = measured(read)
    path.unlink()
    return (
        message,
        sum(t.numel() for t in loaded[0].state_dict().values()) if loaded else 0,
        seconds,
        growth,
    )


def read_manifests(folder: Path, content: bytes) -> tuple[list[str], float, int]:
    """(Refusals, seconds, growth) of all readers of a manifest and of a ledger, in this process."""
    path, ledger = folder / "manifest.json", folder / "datasets" / ".download.json"
    ledger.parent.mkdir(exist_ok=True)
    for file in (path, ledger):
        file.write_bytes(content)

    def read() -> list[str]:
        kept = hostile.refusal_of(lambda: tokenize_docs.read_manifest(path), path)[1]
        assert downloader.Ledger(folder).entries == {}
        return [
            kept,
            hostile.refusal_of(
                lambda: downloader.parse_manifest(path.read_bytes(), "here"), "here"
            )[1],
        ]

    return measured(read)


def hog(size: int) -> int:
    return measured(lambda: len(bytearray(size)))[2]


def limit_memory() -> None:
    torch.set_num_threads(1)
    mapped = int(re.search(r"VmSize:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
    resource.setrlimit(
        resource.RLIMIT_AS, (mapped + 2 * READER_BYTES,) * 2
    )  # a failed test, not a machine without any


@pytest.fixture(scope="module")
def child() -> Iterator[ProcessPoolExecutor]:
    """A process that may take some memory, for what is to be measured."""
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux says how much memory a process took")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), limit_memory) as pool:
        yield pool


def test_the_measurement_sees_what_was_taken_and_given_back_and_the_limit_holds(child):
    for size in (200 * MIB, 400 * MIB, 100 * MIB):
        assert size - 16 * MIB < child.submit(hog, size).result(timeout=60) < size + 16 * MIB
    with pytest.raises(MemoryError):
        child.submit(hog, 2 * READER_BYTES + MIB).result(timeout=60)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_in_seconds_and_little_memory(tmp_path, child, name):
    message, _, seconds, growth = child.submit(read_bomb, name, tmp_path).result(timeout=60)
    print(f"{name}: {message[-60:]}, {seconds:.2f} s, {growth / MIB:.0f} MiB")
    assert message
    assert seconds < CASE_SECONDS
    assert growth < SMALL_BYTES


@pytest.mark.parametrize("name", VALID)
def test_the_largest_models_are_read_within_the_bound(tmp_path, child, name):
    message, weights, seconds, growth = child.submit(read_bomb, name, tmp_path).result(timeout=60)
    print(f"{name}: {message[-60:]}, {weights} weights, {seconds:.2f} s, {growth / MIB:.0f} MiB")
    assert message == ""
    assert name != "largest_matrix" or 0.95 * MAX_WEIGHTS < weights <= MAX_WEIGHTS
    assert seconds < CASE_SECONDS
    assert growth < READER_BYTES


@pytest.mark.parametrize("unit", [NEST, b'{"":{}},', b"7"], ids=["lists", "objects", "digits"])
def test_the_largest_manifest_is_refused_in_little_memory(tmp_path, child, unit):
    content = repeated(unit, downloader.MAX_JSON_BYTES - 20)
    messages, seconds, growth = child.submit(read_manifests, tmp_path, content).result(timeout=60)
    print(f"{unit[:8]}: {seconds:.2f} s, {growth / MIB:.0f} MiB")
    assert all("not a manifest" in message for message in messages)
    assert seconds < CASE_SECONDS
    assert growth < SMALL_BYTES


# ---- Files that are too large, or no files


def sparse(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("size", [0, 1, train_gpt.PREFIX.size - 1, MAX_SUBMISSION_BYTES, 64 * GIB])
def test_a_file_that_cannot_be_an_artifact_is_refused_before_it_is_read(
    tmp_path, monkeypatch, size
):
    hp, data = hostile.good_artifact()
    path = sparse(tmp_path / "a.ptz", size)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", failing(AssertionError))
        assert "too short or too long" in refused_artifact(path)
    assert "not an artifact" in refused_artifact(path, bytes(MAX_SUBMISSION_BYTES - 1))
    path.write_bytes(data)
    load_artifact(path, hp, CPU)


def irregular(folder: Path) -> dict[str, Path]:
    """Paths with something else than a file, all but the first two readable without end or not at all."""
    paths = {
        name: folder / name for name in ("folder", "absent", "fifo", "device", "zeros", "loop")
    }
    paths["folder"].mkdir()
    os.mkfifo(paths["fifo"])
    paths["zeros"].symlink_to("/dev/zero")
    paths["loop"].symlink_to(paths["loop"])
    return paths | {"device": Path("/dev/zero")}


def test_what_is_no_regular_file_is_no_artifact_and_nobody_waits_for_it(tmp_path):
    for path in irregular(tmp_path).values():
        assert "no such artifact" in refused_artifact(path)


def test_what_is_no_regular_file_is_no_manifest_and_nobody_waits_for_it(tmp_path):
    paths, hub = irregular(tmp_path), hostile.hub_of(hostile.FILES)
    for name in ("folder", "fifo", "device", "zeros"):
        assert "not a file" in refusal(tokenize_docs.read_manifest, paths[name])
        assert "no such file" in refusal(downloader.load_manifest, hub, paths[name], True)
    assert tokenize_docs.read_manifest(paths["absent"]) == {"tokenizers": [], "datasets": []}
    (tmp_path / "datasets").mkdir()
    for path in paths.values():
        ledger = tmp_path / "datasets" / ".download.json"
        ledger.unlink(missing_ok=True)
        ledger.symlink_to(path)
        with time_limit(CASE_SECONDS):
            assert downloader.Ledger(tmp_path).entries == {}


def test_a_manifest_that_is_far_too_large_is_not_read(tmp_path, monkeypatch):
    path, hub = sparse(tmp_path / "manifest.json", 64 * GIB), hostile.hub_of(["manifest.json"])
    (tmp_path / "datasets").mkdir()
    sparse(tmp_path / "datasets" / ".download.json", 64 * GIB)
    hub.files["manifest.json"] = downloader.RemoteFile("manifest.json", 64 * GIB, "0" * 64)
    monkeypatch.setattr(Path, "read_bytes", failing(AssertionError))
    assert "not a file of at most 1,048,576 bytes" in refusal(tokenize_docs.read_manifest, path)
    for skip in (True, False):
        assert "bytes" in refusal(downloader.load_manifest, hub, path, skip)
    assert downloader.Ledger(tmp_path).entries == {}


@pytest.mark.parametrize("name", ["folder", "absent", "fifo", "device", "zeros", "loop"])
@pytest.mark.parametrize("split", ["train", "val", "val_bytes"])
def test_what_is_no_regular_file_is_no_shard_and_nobody_waits_for_it(tmp_path, name, split):
    dataset = write_dataset(tmp_path / "data")
    path = dataset.folder / f"fineweb_{split}_9.bin"
    path.symlink_to(irregular(tmp_path)[name])
    if split == "val_bytes":
        for val in dataset.folder.glob("fineweb_val_0.bin"):
            write_shard(
                dataset.folder / "fineweb_val_bytes_0.bin", [1] * (val.stat().st_size // 2 - 512)
            )
        write_shard(dataset.folder / "fineweb_val_9.bin", [5] * 9)
    with time_limit(CASE_SECONDS):
        result = run_in_process(train_gpt.main, cli_env(dataset), tmp_path)
    assert result.code == 2, result
    assert result.err.startswith("error: "), result.err
    assert result.err.count("\n") == 1, result.err


# ---- Knobs that a later step would have to pay for


@pytest.mark.parametrize("window", [65_537, 2**31, 2**62, 2**63 - 1])
def test_a_window_without_bound_is_refused_before_anybody_scores_with_it(tmp_path, window):
    data = with_knobs(train_seq_len=window)
    assert f"TRAIN_SEQ_LEN={window}" in refused_artifact(tmp_path / "a.ptz", data).replace(
        "TRAIN_BATCH_TOKENS", ""
    )
    with pytest.raises(Refusal, match=f"EVAL_SEQ_LEN={window}: expected"):
        Hyperparameters.from_env({"EVAL_SEQ_LEN": str(window)})


def test_the_longest_window_is_read_and_scored_in_the_environment_s(tmp_path):
    hp, path = tiny_hp(), tmp_path / "a.ptz"
    path.write_bytes(consistent(train_seq_len=65_536))
    model, loaded, _ = load_artifact(path, hp, CPU)
    assert loaded.train_seq_len == 65_536
    hostile.check_model(model, loaded)
    assert load_artifact(path, train_gpt.replace(hp, eval_seq_len=8), CPU)[1].eval_seq_len == 8


def test_a_model_that_could_not_be_read_again_is_not_written():
    hp = tiny_hp(vocab_size=65_536, model_dim=2_100, num_heads=1, num_kv_heads=1, rope_dims=0)
    parts = {
        name: (torch.empty(s, device="meta", dtype=torch.int8),)
        for name, s in hostile.shapes_of(hp).items()
    }
    assert "too large a model" in refusal(train_gpt.pack, hp, parts, hostile.SHA, "zstd")


def test_scoring_a_hostile_artifact_is_one_line(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    for name in ("zstd_skippable", "lists", "experts"):
        (tmp_path / f"{name}.ptz").write_bytes(BOMBS[name]())
        result = run_in_process(
            eval_sliding.main, eval_env(dataset), tmp_path, tmp_path / f"{name}.ptz"
        )
        assert_refused(result, f"{name}.ptz")


# ---- The longer search


def test_without_atheris_fuzzing_is_refused_in_one_line(tmp_path):
    (tmp_path / "atheris.py").write_text("raise ImportError")
    env, command = (
        {"PYTHONPATH": str(tmp_path)},
        [sys.executable, str(ROOT / "tests" / "fuzz.py"), "shard"],
    )
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | env, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: fuzzing needs the package atheris: pip install atheris\n"
