"""Readers of files against damaged and hostile ones: one line each.   pytest tests/test_hostile.py

FUZZ_CASES=100000 pytest tests/test_hostile.py -k any_edit    searches longer, from new seeds
"""

import json
import math
import os
import pickle
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import brotli
import numpy as np
import pytest
import tokenize_docs
import torch
import zstandard
from conftest import ALONE, make_model, tiny_hp
from helpers_cli import (
    CPU,
    VOCAB_SIZE,
    assert_refused,
    eval_env,
    make_sentences,
    run_in_process,
    tiny_tokenizer,
    write_dataset,
    write_shard,
)
from helpers_hostile import (
    CASE_SECONDS,
    SHA,
    Pieces,
    good_artifact,
    refusal,
    seal,
    shapes_of,
    time_limit,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import eval_sliding
import train_gpt
from train_gpt import (
    ARTIFACT_VERSION,
    MAX_HEADER_BYTES,
    MAX_SUBMISSION_BYTES,
    MAX_WEIGHTS,
    SHARD_MAGIC,
    SHARD_VERSION,
    ConfigError,
    ModelConfig,
    TokenLoader,
    ValData,
    knob_fields,
    layout,
    load_artifact,
    load_tokenizer,
    role_of,
)

MIB = 1 << 20
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "200"))
fuzz = settings(
    max_examples=FUZZ_CASES,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

# ---- Damaged artifacts ---------------------------------------------------------------------------
# A damage changes the pieces of a good artifact in place, or returns the bytes of a file; all of
# these but `raw` and `flipped` come with the right checksum.

Damage = Callable[[Pieces], bytes | None]


def damaged(damage: Damage) -> bytes:
    """Return the good artifact after a damage."""
    pieces = Pieces.of(good_artifact()[1])
    content = damage(pieces)
    return seal(pieces.text, pieces.body) if content is None else content


def raw(change: Callable[[bytes], bytes]) -> Damage:
    return lambda pieces: change(seal(pieces.text, pieces.body))


def flipped(position: int) -> Damage:
    return raw(lambda data: data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])


def sealed(**changes: object) -> Damage:
    return lambda pieces: seal(pieces.text, pieces.body, **changes)


def text(content: bytes) -> Damage:
    """Put other bytes in the place of the header."""
    return lambda pieces: seal(content, pieces.body)


def body(change: Callable[[bytes], bytes]) -> Damage:
    return lambda pieces: seal(pieces.text, change(pieces.body))


def header(**values: object) -> Damage:
    return lambda pieces: pieces.header.update(values)


def without(name: str) -> Damage:
    return lambda pieces: pieces.header.__delitem__(name)


def knob(**values: object) -> Damage:
    return lambda pieces: pieces.header["model"].update(values)


def entry(*value: object) -> Damage:
    """Declare another codec and size of the first stream, or something else."""
    return lambda pieces: pieces.header["streams"].__setitem__(0, value)


def sizes(first: int, second: int) -> Damage:
    """Add to the declared sizes of the first two streams."""

    def damage(pieces: Pieces) -> None:
        pieces.header["streams"][0][1] += first
        pieces.header["streams"][1][1] += second

    return damage


def letter(name: str, kind: str) -> Damage:
    """Give one tensor another storage."""

    def damage(pieces: Pieces) -> None:
        storage = list(pieces.header["storage"])
        storage[list(shapes_of(good_artifact()[0].model)).index(name)] = kind
        pieces.header["storage"] = "".join(storage)

    return damage


def packed(name: str, codec: int, content: bytes) -> Damage:
    """Replace the compressed bytes of a stream, rightly declared."""
    return lambda pieces: pieces.put(name, codec, content)


def payload(name: str, change: Callable[[bytes], bytes], codec: int = 1) -> Damage:
    """Change what a stream unpacks to, and compress it again."""

    def damage(pieces: Pieces) -> None:
        content = change(zstandard.ZstdDecompressor().decompress(pieces.streams[name]))
        pack = zstandard.compress if codec == 1 else brotli.compress
        pieces.put(name, codec, pack(content))

    return damage


def as_it_is(content: bytes) -> bytes:
    return content


def without_end(content: bytes) -> bytes:
    return content[:-1]


def with_one_more(content: bytes) -> bytes:
    return content + b"\0"


def repeated(unit: bytes, size: int) -> bytes:
    """Return JSON of about `size` bytes, most of them repetitions."""
    return b'{"model":[' + unit * (size // len(unit)) + b"0]}"


EXPERTS = 4
NOT_FINITE = struct.pack("<e", math.nan)
ABSURD_FRAME = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 55) + b"\x01\x00\x00"
ARTIFACTS = [
    ("empty", raw(lambda data: b""), "too short or too long"),
    ("cut_in_half", raw(lambda data: data[: len(data) // 2]), "the checksum does not match"),
    ("one_byte_long", raw(with_one_more), "the checksum does not match"),
    ("bit_of_the_magic", flipped(0), "not an artifact"),
    ("bit_of_the_length", flipped(11), "the checksum does not match"),
    ("bit_of_the_header", flipped(60), "the checksum does not match"),
    ("bit_of_a_stream", flipped(2000), "the checksum does not match"),
    ("zip_file", sealed(magic=b"PK\3\4\0\0\0\0"), "not an artifact"),
    ("older", sealed(version=3), f"version 3, this trainer reads {ARTIFACT_VERSION}"),
    ("no_header", sealed(length=0), "bad header"),
    ("header_beyond_the_file", sealed(length=2**32 - 1), "a header of 4,294,967,295 bytes"),
    ("header_into_the_streams", sealed(length=MAX_HEADER_BYTES), "bad header"),
    ("not_json", text(b"{"), "bad header"),
    ("not_utf8", text(b"\xff\xfe\xfd"), "bad header"),
    ("list", text(b"[]"), "bad header"),
    ("nested", text(b"[" * 60_000), "bad header"),
    ("huge_number", text(b'{"model":' + b"9" * 5000 + b"}"), "bad header"),
    ("no_model", without("model"), "bad header"),
    ("no_knob", header(model={}), "bad header"),
    ("no_streams", without("streams"), "bad header"),
    ("model_is_a_list", header(model=[1]), "bad header"),
    ("word_for_int", knob(num_layers="2"), "NUM_LAYERS='2': expected int"),
    ("float_for_int", knob(num_layers=2.0), "NUM_LAYERS=2.0: expected int"),
    ("null", knob(model_dim=None), "MODEL_DIM=None"),
    ("unknown_word", knob(routing="random"), "ROUTING='random': expected one of"),
    ("line_break", knob(routing="zipf\n"), r"ROUTING='zipf\n'"),
    ("nan", knob(qk_gain_init=math.nan), "QK_GAIN_INIT=nan"),
    ("zero_layers", knob(num_layers=0), "NUM_LAYERS=0"),
    ("heads", knob(num_heads=5), "NUM_HEADS=5"),
    ("grouped_router", knob(dispatch="grouped"), "DISPATCH=grouped"),
    ("endless_window", knob(train_seq_len=65_537), "TRAIN_SEQ_LEN=65537"),
    ("beyond_64_bits", knob(model_dim=1 << 70), "MODEL_DIM="),
    ("too_large_a_model", knob(shared_dim=65_536, model_dim=65_536), "too large a model"),
    ("too_many_experts", knob(num_experts=256, expert_dim=65_536), "too large a model"),
    ("tensors_of_other_mu", knob(mu="pid"), "storage of"),
    ("one_layer_less", knob(num_layers=1, loop_passes=1), "storage of"),
    ("other_width", knob(shared_dim=40), "does not unpack to"),
    ("fewer_experts", knob(num_experts=3), "does not unpack to"),
    ("storage_empty", header(storage=""), "storage of 0 tensors"),
    ("storage_unknown", letter("tok_emb.weight", "x"), "cannot be stored as 'x'"),
    ("matrix_as_float16", letter("blocks.0.attn.c_k.weight", "h"), "cannot be stored as 'h'"),
    ("table_as_symbols", letter("expert_table", "q"), "cannot be stored as 'q'"),
    ("vector_as_float16", letter("skip_weights", "h"), "does not unpack to"),
    ("float16_as_vector", letter("mu_init", "q"), "does not unpack to"),
    ("streams_number", header(streams=5), "bad header"),
    ("entry_of_three", entry(1, 2, 3), "bad header"),
    ("size_huge", entry(1, 1 << 62), "its streams do not fill it"),
    ("size_infinite", entry(1, math.inf), "bad header"),
    ("size_word", entry(1, "x\ny"), "bad header"),
    ("size_too_large", sizes(1, 0), "its streams do not fill it"),
    ("size_negative", sizes(-(10**6), 10**6), "its streams do not fill it"),
    ("sizes_shifted", sizes(1, -1), "damaged"),
    ("codec_unknown", packed("table", 9, b""), "no codec 9"),
    ("codec_other", packed("table", 2, zstandard.compress(bytes(16))), "does not unpack"),
    ("body_cut", body(without_end), "its streams do not fill it"),
    ("body_longer", body(with_one_more), "its streams do not fill it"),
    ("stream_empty", packed("table", 1, b""), "does not unpack"),
    ("stream_not_packed_brotli", packed("table", 2, b"not packed"), "does not unpack"),
    ("stream_of_absurd_size", packed("table", 1, ABSURD_FRAME), "does not unpack"),
    ("payload_short", payload("vector", without_end), "does not unpack to"),
    ("payload_long", payload("scales", with_one_more), "does not unpack to"),
    ("payload_long_brotli", payload("float16", with_one_more, 2), "does not unpack to"),
    ("no_such_expert", payload("table", lambda p: p[:-1] + bytes([EXPERTS])), "does not exist"),
    ("not_finite", payload("float16", lambda p: p[:-2] + NOT_FINITE), "not finite"),
]
INTACT = [
    ("resealed", header()),
    ("packed_by_brotli", payload("tok_emb.weight", as_it_is, 2)),
    ("last_expert", payload("table", lambda p: p[:-1] + bytes([EXPERTS - 1]))),
    ("other_scales", payload("scales", lambda p: bytes(len(p)))),
    ("other_window", knob(train_seq_len=65_536)),
]


def check_model(model: torch.nn.Module, config: ModelConfig) -> None:
    """Raise AssertionError unless `model` is what its config describes and can be run."""
    config.validate()
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes_of(config)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (state["expert_table"] < config.num_experts).all()
    ids = torch.arange(min(config.train_seq_len, 5))[None] % config.vocab_size
    with torch.no_grad():
        assert model(ids).shape == (*ids.shape, config.vocab_size)


@pytest.mark.parametrize(("name", "damage"), INTACT)
def test_an_artifact_that_is_put_together_again_is_read(tmp_path, name, damage):
    path = tmp_path / "a.ptz"
    path.write_bytes(damaged(damage))
    model, hp, sha = load_artifact(path, tiny_hp(), CPU)
    check_model(model, hp.model)
    assert sha == SHA


@pytest.mark.parametrize(("name", "damage", "fragment"), ARTIFACTS, ids=[a[0] for a in ARTIFACTS])
def test_a_damaged_artifact_is_refused_in_one_line(tmp_path, name, damage, fragment):
    path = tmp_path / "a.ptz"
    path.write_bytes(damaged(damage))
    message = refusal(load_artifact, path, tiny_hp(), CPU)
    assert str(path) in message
    assert fragment in message


def test_scoring_a_damaged_artifact_is_one_line(tmp_path):
    dataset = write_dataset(tmp_path / "data")
    path = tmp_path / "a.ptz"
    path.write_bytes(damaged(packed("table", 1, ABSURD_FRAME)))
    result = run_in_process(eval_sliding.main, eval_env(dataset), tmp_path, path)
    assert_refused(result, "a.ptz: damaged artifact")


# ---- Any edits ---------------------------------------------------------------------------------

WORDS = [
    "zipf",
    "dense",
    "soft",
    "full",
    "pid",
    "off",
    "grouped",
    "swiglu",
    "line\nbreak",
    "\ud800",
]
VALUES = st.one_of(
    st.sampled_from([None, True, False, math.nan, math.inf, 2**63, 10**400, [], {}, [[]], *WORDS]),
    st.integers(-1, 70),
    st.integers(),
    st.floats(),
)


@st.composite
def edited(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw `content` with bytes replaced, inserted, cut out or added."""
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, min(start + 16, len(content))))
    return content[:start] + draw(st.binary(max_size=24)) + content[end:]


@st.composite
def hostile_artifacts(draw: st.DrawFn) -> bytes:
    """Draw an artifact with a right checksum and a few edits in the pieces that it is made of."""
    pieces = Pieces.of(good_artifact()[1])
    header = pieces.header
    kinds = ["knobs", "payload", "packed", "entry", "storage", "header", "file"]
    edits = draw(st.sets(st.sampled_from(kinds), max_size=3))

    if "knobs" in edits:
        header["model"] |= draw(st.dictionaries(st.sampled_from([*header["model"]]), VALUES))
    if "payload" in edits:
        name = draw(st.sampled_from([*pieces.streams]))
        content = zstandard.ZstdDecompressor().decompress(pieces.streams[name])
        pieces.put(name, 1, zstandard.compress(draw(edited(content))))
    if "packed" in edits:
        name = draw(st.sampled_from([*pieces.streams]))
        pieces.put(name, draw(st.sampled_from([1, 2])), draw(edited(pieces.streams[name])))
    if "entry" in edits:
        place = draw(st.integers(0, len(header["streams"]) - 1))
        header["streams"][place] = draw(st.one_of(VALUES, st.lists(VALUES, max_size=3)))
    if "storage" in edits:
        place = draw(st.integers(0, len(header["storage"]) - 1))
        letters = [*header["storage"]]
        letters[place] = draw(st.sampled_from(["q", "h", "t", "", "qq", "\0"]))
        header["storage"] = "".join(letters)
    if "header" in edits:
        header[draw(st.sampled_from([*header]))] = draw(VALUES)
    content = seal(pieces.text, pieces.body)
    return draw(edited(content)) if "file" in edits else content


@fuzz
@given(content=hostile_artifacts())
def test_any_edit_of_an_artifact_is_refused_or_makes_a_valid_model(tmp_path, content):
    path = tmp_path / "a.ptz"
    path.write_bytes(content)
    with time_limit(CASE_SECONDS):
        try:
            model, hp, _ = load_artifact(path, tiny_hp(), CPU)
        except ConfigError as error:
            message = str(error)
        else:
            check_model(model, hp.model)
            return
    assert str(path) in message
    assert "\n" not in message


# ---- Bombs ---------------------------------------------------------------------------------------

ZSTD_EMPTY_BLOCKS = b"\x28\xb5\x2f\xfd\x00\x58" + b"\0\0\0" * 5_000_000
BROTLI_EMPTY_BLOCKS = b"\x0c" + b"\x06" * 15_000_000 + b"\3"
NESTED_LISTS = b"[" * 900 + b"]" * 900 + b","
LIMITS = {
    name: field.metadata["high"]
    for name, field in knob_fields(ModelConfig).items()
    if field.metadata.get("high", math.inf) < math.inf
}
ALL_LIMITS = {**LIMITS, "loop_start": 0, "loop_end": 255, "num_heads": 1, "num_kv_heads": 1}
BOMBS = [
    ("zstd", packed("table", 1, zstandard.compress(bytes(1 << 28)))),
    ("brotli", packed("table", 2, brotli.compress(bytes(1 << 28), quality=1))),
    ("zstd_window", packed("table", 1, b"\x28\xb5\x2f\xfd\x00\xa8" + b"\1\0\0")),
    ("zstd_empty_blocks", packed("table", 1, ZSTD_EMPTY_BLOCKS)),
    ("zstd_skippable_frames", packed("table", 1, b"\x50\x2a\x4d\x18\0\0\0\0" * 1_500_000)),
    ("brotli_empty_blocks", packed("table", 2, BROTLI_EMPTY_BLOCKS)),
    ("long_header", text(repeated(b"[],", 15_000_000))),
    ("nested_header", text(repeated(NESTED_LISTS, MAX_HEADER_BYTES - 20))),
    ("digits", text(repeated(b"9", MAX_HEADER_BYTES - 20))),
    ("all_limits", knob(**ALL_LIMITS)),
    ("layers_and_passes", knob(num_layers=256, loop_passes=16, loop_start=0, loop_end=255)),
]


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10


def growth_of(action: Callable) -> int:
    """Return the bytes by which an action raises the peak of this process's memory."""
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = peak_bytes()
    action()
    return peak_bytes() - before


needs_peak = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK),
    reason="only Linux says how much memory a process took",
)


@needs_peak
def test_the_measurement_sees_what_was_taken_and_given_back():
    assert 190 * MIB < growth_of(lambda: bytearray(200 * MIB)) < 220 * MIB


@needs_peak
@pytest.mark.parametrize(("name", "damage"), BOMBS, ids=[bomb[0] for bomb in BOMBS])
def test_a_bomb_is_refused_in_seconds_and_little_memory(tmp_path, name, damage):
    path = tmp_path / "a.ptz"
    path.write_bytes(damaged(damage))
    messages = []

    def read() -> None:
        messages.append(refusal(load_artifact, path, tiny_hp(), CPU))

    assert growth_of(read) < 100 * MIB
    assert str(path) in messages[0]


@pytest.mark.slow
@needs_peak
def test_the_largest_model_is_read_within_the_bound(tmp_path):
    sizes = {"model_dim": 1800, "num_heads": 1, "num_kv_heads": 1, "rope_dims": 0}
    sizes |= {"vocab_size": 65_536, "expert_dim": 1, "shared_dim": 1, "num_layers": 1}
    config = tiny_hp(**sizes, routing="dense", mu="off", train_batch_tokens=65_536).model
    shapes = shapes_of(config)
    assert 0.9 * MAX_WEIGHTS < sum(map(math.prod, shapes.values())) <= MAX_WEIGHTS
    stored = {"vector": "q", "table": "t"}
    storage = "".join(stored.get(role_of(name), "q") for name in shapes)
    pieces = Pieces({"model": vars(config), "tokenizer_sha256": SHA, "storage": storage}, {})
    pieces.header["streams"] = []
    for name, parts in layout(shapes, storage).items():
        size = sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
        pieces.header["streams"].append(None)
        pieces.streams[name] = b""
        pieces.put(name, 1, zstandard.compress(bytes(size)))
    path = tmp_path / "a.ptz"
    path.write_bytes(seal(pieces.text, pieces.body))
    started = time.perf_counter()
    assert growth_of(lambda: load_artifact(path, tiny_hp(), CPU)) < 2048 * MIB
    assert time.perf_counter() - started < CASE_SECONDS


# ---- What is no file, or too large a file --------------------------------------------------------


def irregular(folder: Path) -> dict[str, Path]:
    """Return paths with something else than a file, some readable without end or not at all."""
    paths = {name: folder / name for name in ("folder", "absent", "fifo", "zeros", "loop")}
    paths["folder"].mkdir()
    os.mkfifo(paths["fifo"])
    paths["zeros"].symlink_to("/dev/zero")
    paths["loop"].symlink_to(paths["loop"])
    return paths


def sparse(path: Path, size: int) -> Path:
    with open(path, "wb") as file:
        file.truncate(size)
    return path


@pytest.mark.parametrize("name", ["folder", "absent", "fifo", "zeros", "loop"])
def test_nobody_waits_for_what_is_no_file(tmp_path, name):
    dataset = write_dataset(tmp_path / "data")
    knobs = {"data_path": str(dataset.folder), "vocab_size": VOCAB_SIZE}
    hp = tiny_hp(**knobs, tokenizer_path=str(dataset.tokenizer))
    path = irregular(tmp_path)[name]
    assert "no such artifact" in refusal(load_artifact, path, hp, CPU)
    other = hp.override(tokenizer_path=str(path))
    assert "no such tokenizer" in refusal(load_tokenizer, other)
    if path.exists():
        assert "not a file of at most" in refusal(tokenize_docs.read_manifest, path)
    for split, read in (("train", TokenLoader), ("val", ValData.load), ("val_bytes", ValData.load)):
        link = dataset.folder / f"fineweb_{split}_9.bin"
        link.symlink_to(path)
        place = ALONE if split == "train" else CPU
        assert str(dataset.folder) in refusal(read, hp, place)
        link.unlink()
        read(hp, place)


@pytest.mark.parametrize("size", [MAX_SUBMISSION_BYTES, 64 << 30])
def test_what_is_too_large_is_not_read(tmp_path, monkeypatch, size):
    def forbidden(path: Path) -> bytes:
        raise AssertionError(f"{path} was read")

    path = sparse(tmp_path / "a.ptz", size)
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    assert "too short or too long" in refusal(load_artifact, path, tiny_hp(), CPU)
    assert "not a file of at most" in refusal(tokenize_docs.read_manifest, path)


# ---- Shards --------------------------------------------------------------------------------------

SHARDS = [  # the 50 tokens, what else is said of them, the line
    ("magic", {"magic": SHARD_MAGIC + 1}, "magic is 20240521"),
    ("version", {"version": 2}, "shard version 2"),
    ("too_few", {"count": 51}, "51 tokens do not make"),
    ("too_many", {"count": 49}, "49 tokens do not make"),
    ("none", {"count": 0}, "0 tokens do not make"),
    ("negative", {"count": -1}, "-1 tokens do not make"),
    ("odd_tail", {"tail": b"\0"}, "50 tokens do not make"),
    ("outside", {"tokens": [VOCAB_SIZE] * 50}, f"token id {VOCAB_SIZE} is outside VOCAB_SIZE"),
]
TOO_SHORT = [0, 11, 1023]


@pytest.fixture
def split_hp(tmp_path):
    """Return knobs of a folder with a training, a validation and a sidecar shard of 50 tokens."""
    for split in ("train", "val", "val_bytes"):
        write_shard(tmp_path / f"fineweb_{split}_0.bin", range(1, 51))
    tokenizer = tmp_path / "tiny.model"
    tokenizer.write_bytes(tiny_tokenizer())
    knobs = {"data_path": str(tmp_path), "tokenizer_path": str(tokenizer)}
    return tiny_hp(**knobs, vocab_size=VOCAB_SIZE)


def read_split(hp: train_gpt.Hyperparameters, split: str) -> list[int]:
    """Return all tokens of a split, or its bytes."""
    if split == "train":
        return TokenLoader(hp, ALONE).sample().tolist()
    val = ValData.load(hp, CPU)
    return val.tokens.tolist() if split == "val" else [1, *val.target_bytes.tolist()]


@pytest.mark.parametrize(("name", "changes", "fragment"), SHARDS, ids=[s[0] for s in SHARDS])
def test_a_damaged_shard_is_refused_in_one_line(tmp_path, split_hp, name, changes, fragment):
    for split in ("train", "val", "val_bytes"):
        path = tmp_path / f"fineweb_{split}_0.bin"
        intact = path.read_bytes()
        assert read_split(split_hp, split) == list(range(1, 51))
        write_shard(path, **{"tokens": range(1, 51), **changes})
        if split == "val_bytes" and name == "outside":
            assert read_split(split_hp, split)[1:] == [VOCAB_SIZE] * 49  # bytes, not ids
        else:
            message = refusal(read_split, split_hp, split)
            assert message.startswith(f"{path}: ")
            assert fragment in message
        path.write_bytes(intact)


@pytest.mark.parametrize("size", TOO_SHORT)
def test_a_shard_shorter_than_its_header_is_refused(tmp_path, split_hp, size):
    path = tmp_path / "fineweb_train_0.bin"
    path.write_bytes(path.read_bytes()[:size])
    assert f"{path}: {size} bytes is shorter" in refusal(read_split, split_hp, "train")


@st.composite
def hostile_shards(draw: st.DrawFn) -> bytes:
    """Draw a shard whose header or tokens may be wrong."""
    tokens = np.array(draw(st.lists(st.integers(0, VOCAB_SIZE), max_size=60)), "<u2")
    counts = st.sampled_from([len(tokens)] * 3 + [-1, 0, 2**31 - 1])
    right = np.array([SHARD_MAGIC, SHARD_VERSION, draw(counts), *[0] * 253], "<i4")
    content = right.tobytes() + tokens.tobytes()
    return content if draw(st.booleans()) else draw(edited(content))


def tokens_of(content: bytes) -> list[int] | None:
    """Return the tokens of a shard by the definition of the format, None if it is none."""
    start = np.frombuffer(content[:12].ljust(12, b"\0"), "<i4").tolist()
    count = (len(content) - 1024) / 2
    if count < 1 or start != [SHARD_MAGIC, SHARD_VERSION, count]:
        return None
    return np.frombuffer(content, "<u2", offset=1024).tolist()


@fuzz
@given(content=hostile_shards())
def test_any_edit_of_a_shard_is_refused_or_read_as_the_format_says(tmp_path, content):
    path = tmp_path / "fineweb_val_0.bin"
    path.write_bytes(content)
    tokens = tokens_of(content)
    if tokens is None or max(tokens) >= VOCAB_SIZE:
        assert str(path) in refusal(train_gpt.load_data_shard, path, VOCAB_SIZE)
    else:
        assert train_gpt.load_data_shard(path, VOCAB_SIZE).tolist() == tokens


SIDECARS = [  # files by split and number, and the line that names the one at fault
    ("longer", {"val_bytes_0": [1] * 51}, "val_bytes_0.bin: bytes of 51 tokens, but the shard has"),
    ("without_shard", {"val_bytes_1": [1]}, "fineweb_val_bytes_1.bin"),
    ("missing", {"val_1": [1, 2]}, "fineweb_val_bytes_1.bin"),
    ("swapped", {"val_bytes_0": [1], "val_1": [1], "val_bytes_1": [1] * 50}, "bytes of 1 tokens"),
]


@pytest.mark.parametrize(("name", "files", "fragment"), SIDECARS, ids=[s[0] for s in SIDECARS])
def test_a_sidecar_that_does_not_fit_its_shard_is_refused(
    tmp_path, split_hp, name, files, fragment
):
    for stem, tokens in files.items():
        write_shard(tmp_path / f"fineweb_{stem}.bin", tokens)
    message = refusal(read_split, split_hp, "val")
    assert str(tmp_path) in message
    assert fragment in message


def test_missing_or_short_data_is_refused_by_name(tmp_path, split_hp):
    seq_len = split_hp.model.train_seq_len
    empty = tmp_path / "empty"
    assert "no such data folder (DATA_PATH)" in refusal(
        read_split, split_hp.override(data_path=str(empty)), "train"
    )
    empty.mkdir()
    hp = split_hp.override(data_path=str(empty))
    assert "empty: no fineweb_train_*.bin shards" in refusal(read_split, hp, "train")
    assert "empty: no fineweb_val_*.bin shards" in refusal(read_split, hp, "val")
    write_shard(empty / "fineweb_val_0.bin", [1])
    assert "no target to score" in refusal(read_split, hp, "val")
    write_shard(empty / "fineweb_train_0.bin", [1] * (2 * seq_len - 1))
    assert f"two sequences of TRAIN_SEQ_LEN={seq_len}" in refusal(read_split, hp, "train")
    write_shard(empty / "fineweb_train_0.bin", [1] * (2 * seq_len))
    assert len(read_split(hp, "train")) == 2 * seq_len


def test_a_token_outside_the_vocabulary_is_refused_mid_stream_beyond_the_sample(tmp_path, split_hp):
    path = write_shard(tmp_path / "fineweb_train_0.bin", [1] * 90 + [VOCAB_SIZE] + [1] * 9)
    loader = TokenLoader(split_hp, ALONE)
    assert len(loader.sample(max_tokens=80)) == 80

    def read_an_epoch() -> None:
        for _ in range(loader.num_windows):
            loader.next_batch()

    assert f"{path}: token id {VOCAB_SIZE} is outside" in refusal(read_an_epoch)


# ---- Manifests ---------------------------------------------------------------------------------

NAMED = {"name": "x"}
MANIFESTS = [
    ("empty", b"", "not a manifest"),
    ("list", b"[]", "not a manifest"),
    ("no_tokenizers", json.dumps({"datasets": [NAMED]}).encode(), "not a manifest"),
    ("nameless", json.dumps({"datasets": [{}], "tokenizers": []}).encode(), "not a manifest"),
    ("word", json.dumps({"datasets": "x", "tokenizers": []}).encode(), "not a manifest"),
    ("number", json.dumps({"datasets": [{"name": 1}], "tokenizers": []}).encode(), "has no name"),
    ("nested", b"[" * (tokenize_docs.MAX_JSON_BYTES - 1), "not a manifest"),
    ("objects", repeated(b'{"":{}},', tokenize_docs.MAX_JSON_BYTES - 20), "not a manifest"),
    ("too_long", bytes(tokenize_docs.MAX_JSON_BYTES + 1), "not a file of at most"),
]


@pytest.mark.parametrize(("name", "content", "fragment"), MANIFESTS, ids=[m[0] for m in MANIFESTS])
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path, name, content, fragment):
    path = tmp_path / "manifest.json"
    good = {"datasets": [NAMED], "tokenizers": []}
    path.write_text(json.dumps(good))
    assert tokenize_docs.read_manifest(path) == good
    path.write_bytes(content)
    message = refusal(tokenize_docs.read_manifest, path)
    assert message.startswith(f"{path}: ")
    assert fragment in message


# ---- Tokenizers ----------------------------------------------------------------------------------


def glued_tokenizer() -> bytes:
    """Train on text without a single space: SentencePiece learns no U+2581 piece."""
    texts = [text.replace(" ", "") for text in make_sentences(0, 200)]
    return tokenize_docs.train_tokenizer(texts, VOCAB_SIZE)


NOT_SENTENCEPIECE = "is not a SentencePiece model (TOKENIZER_PATH)"
TOKENIZERS = [
    ("empty", lambda: b"", NOT_SENTENCEPIECE),
    ("text", lambda: b"garbage" * 100, NOT_SENTENCEPIECE),
    ("nul", lambda: b"\0", NOT_SENTENCEPIECE),
    ("truncated", lambda: tiny_tokenizer()[:1000], NOT_SENTENCEPIECE),
    ("without_lone_space", glued_tokenizer, "has no U+2581 piece"),
]


@pytest.mark.parametrize(("name", "make", "fragment"), TOKENIZERS, ids=[t[0] for t in TOKENIZERS])
def test_a_damaged_tokenizer_is_refused_in_one_line(
    tmp_path, split_hp, capfd, name, make, fragment
):
    path = Path(split_hp.tokenizer_path)
    assert load_tokenizer(split_hp)[0].vocab_size() == VOCAB_SIZE
    path.write_bytes(make())
    message = refusal(load_tokenizer, split_hp)
    assert message.startswith(str(path))
    assert fragment in message
    assert capfd.readouterr().err == ""  # no noise from the library


def test_a_tokenizer_that_is_missing_or_of_another_size_is_refused(tmp_path, split_hp, monkeypatch):
    monkeypatch.chdir(tmp_path)
    larger = split_hp.override(vocab_size=VOCAB_SIZE + 1)
    both = f"tiny.model has {VOCAB_SIZE} pieces, but VOCAB_SIZE={VOCAB_SIZE + 1}"
    assert both in refusal(load_tokenizer, larger)
    unnamed = split_hp.override(tokenizer_path="")
    default = Path(f"data/tokenizers/fineweb_{VOCAB_SIZE}_bpe.model")
    assert refusal(load_tokenizer, unnamed).startswith(f"{default}: no such tokenizer")
    default.parent.mkdir(parents=True)
    default.write_bytes(tiny_tokenizer())
    assert load_tokenizer(unnamed)[0].vocab_size() == VOCAB_SIZE


# ---- Checkpoints ---------------------------------------------------------------------------------


class Intruder:
    """Unpickled by a careless reader, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("intruded",)


def changed_checkpoint(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        saved = torch.load(path, weights_only=True)
        change(saved)
        torch.save(saved, path)

    return damage


CHECKPOINTS = [
    ("empty", lambda path: path.write_bytes(b"")),
    ("text", lambda path: path.write_bytes(b"garbage" * 100)),
    ("truncated", lambda path: path.write_bytes(path.read_bytes()[:-500])),
    ("pickle", lambda path: path.write_bytes(pickle.dumps(Intruder()))),
    ("intruder", lambda path: torch.save({"fixed": Intruder()}, path)),
    ("list", lambda path: torch.save([1, 2], path)),
    ("no_state", changed_checkpoint(lambda saved: saved.pop("state"))),
    ("other_clock", changed_checkpoint(lambda saved: saved["now"].update(hours=1))),
    ("no_average", changed_checkpoint(lambda saved: saved["state"]["average"].popitem())),
    ("tensor_for_number", changed_checkpoint(lambda s: s["state"].update(model=torch.ones(3)))),
]


@pytest.fixture
def checkpoints(split_hp, tmp_path, monkeypatch):
    """Return a run's Checkpoints, with one saved in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    hp = split_hp.override(checkpoint_every="1", run_id="run")
    model = make_model(hp)
    ids = torch.ones(1, 4, dtype=torch.long)
    model(ids, ids).backward()
    optimizers = train_gpt.build_optimizers(hp, model, ALONE)
    for optimizer in optimizers:
        optimizer.step()
    log = train_gpt.Log(ALONE, tmp_path / "log.txt")
    average = [p.detach().clone() for p in model.parameters()]
    loader = TokenLoader(hp, ALONE)
    kept = train_gpt.Checkpoints(log, model, optimizers, average, loader)
    kept.save(train_gpt.Progression(step=3), at_once=True)
    return kept


@pytest.mark.parametrize(("name", "damage"), CHECKPOINTS, ids=[c[0] for c in CHECKPOINTS])
def test_a_damaged_checkpoint_is_refused_in_one_line_and_runs_nothing(checkpoints, name, damage):
    (path,) = checkpoints.found()
    assert checkpoints.resume().step == 3
    damage(path)
    assert f"{path}: damaged checkpoint" in refusal(checkpoints.resume)
    assert not Path("intruded").exists()
