"""Readers of files against damaged and hostile ones: one line each.   pytest tests/test_hostile.py

FUZZ_CASES=100000 pytest tests/test_hostile.py -k any_edit    searches longer, from new seeds
"""

import json
import math
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path

import brotli
import pytest
import tokenize_docs
import torch
import zstandard
from conftest import ALONE, make_checkpoints, tiny_hp
from helpers_cli import CPU, VOCAB_SIZE, make_sentences, tiny_tokenizer, write_dataset, write_shard
from helpers_hostile import SHA, Pieces, good_artifact, refusal, shapes_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import BROTLI, ZSTD, TokenLoader, ValData, load_artifact, load_tokenizer

MIB = 1 << 20
FUZZ_CASES = int(os.environ.get("FUZZ_CASES", "200"))

# ---- Damaged artifacts ---------------------------------------------------------------------------
# A damage changes the pieces of a good artifact in place, or returns the bytes of a file.


def damaged(damage: Callable[[Pieces], object]) -> bytes:
    """Return the good artifact after a damage."""
    pieces = Pieces.of(good_artifact()[1])
    content = damage(pieces)
    return content if isinstance(content, bytes) else pieces.seal()


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def repeated(unit: bytes, size: int) -> bytes:
    """Return JSON of about `size` bytes, most of them repetitions."""
    return b'{"model":[' + unit * (size // len(unit)) + b"0]}"


EXPERTS = 4
LARGEST = {"num_layers": 256, "loop_passes": 16, "loop_start": 0, "loop_end": 255}
LARGEST |= {"num_experts": 256, "vocab_size": 65_536, "model_dim": 65_536, "expert_dim": 65_536}
NOT_FINITE = struct.pack("<e", math.nan)
ABSURD_FRAME = b"\x28\xb5\x2f\xfd" + b"\xe0" + struct.pack("<Q", 1 << 55) + b"\x01\x00\x00"
ARTIFACTS = {
    "empty": (lambda p: b"", "too short or too long"),
    "one_byte_long": (lambda p: p.seal() + b"\0", "the checksum does not match"),
    "bit_of_a_stream": (lambda p: flipped(p.seal(), 2000), "the checksum does not match"),
    "zip_file": (lambda p: p.seal(magic=b"PK\3\4\0\0\0\0"), "not an artifact"),
    "older": (lambda p: p.seal(version=3), "version 3, this trainer reads "),
    "header_beyond_the_file": (lambda p: p.seal(length=2**32 - 1), "a header of 4,294,967,295"),
    "not_utf8": (lambda p: p.seal(text=b"\xff\xfe\xfd"), "bad header"),
    "nested": (lambda p: p.seal(text=b"[" * 60_000), "bad header"),
    "no_model": (lambda p: p.header.pop("model"), "bad header"),
    "no_knob": (lambda p: p.header["model"].pop("xsa"), "bad header"),
    "model_is_a_list": (lambda p: p.header.update(model=[1]), "bad header"),
    "unknown_word": (lambda p: p.header["model"].update(routing="no"), "ROUTING='no': expected"),
    "line_break": (lambda p: p.header["model"].update(routing="zipf\n"), r"ROUTING='zipf\n'"),
    "nan": (lambda p: p.header["model"].update(qk_gain_init=math.nan), "QK_GAIN_INIT=nan"),
    "heads": (lambda p: p.header["model"].update(num_heads=5), "NUM_HEADS=5"),
    "too_large": (lambda p: p.header["model"].update(LARGEST), "too large a model"),
    "other_mu": (lambda p: p.header["model"].update(mu="pid"), "storage of"),
    "other_width": (lambda p: p.header["model"].update(shared_dim=40), "does not unpack to"),
    "storage_unknown": (lambda p: p.store("tok_emb.weight", "x"), "cannot be stored as 'x'"),
    "matrix_as_float16": (lambda p: p.store("blocks.0.attn.c_k.weight", "h"), "cannot be stored"),
    "vector_as_float16": (lambda p: p.store("skip_weights", "h"), "does not unpack to"),
    "size_infinite": (lambda p: p.header["streams"].insert(0, [1, math.inf]), "bad header"),
    "one_more": (lambda p: p.header["streams"].append([1, 0]), "its streams do not fill it"),
    "body_cut": (lambda p: p.seal(body=b"".join(p.streams.values())[:-1]), "do not fill it"),
    "codec_unknown": (lambda p: p.put("table", 9, b""), "no codec 9"),
    "stream_not_brotli": (lambda p: p.put("table", BROTLI, b"not packed"), "does not unpack"),
    "absurd_frame": (lambda p: p.put("table", ZSTD, ABSURD_FRAME), "does not unpack"),
    "payload_short": (lambda p: p.change("vector", lambda x: x[:-1]), "does not unpack to"),
    "payload_long": (lambda p: p.change("scales", lambda x: x + b"\0", BROTLI), "does not unpack"),
    "no_expert": (lambda p: p.change("table", lambda x: bytes([EXPERTS]) + x[1:]), "not exist"),
    "not_finite": (lambda p: p.change("float16", lambda x: NOT_FINITE + x[2:]), "not finite"),
}
ZEROS = bytes(200 * MIB)
ZSTD_EMPTY_BLOCKS = b"\x28\xb5\x2f\xfd\x00\x58" + b"\0\0\0" * 5_000_000
BROTLI_EMPTY_BLOCKS = b"\x0c" + b"\x06" * 15_000_000 + b"\3"
NESTED_LISTS = b"[" * 900 + b"]" * 900 + b","
LONGEST = train_gpt.MAX_HEADER_BYTES - 20
ARTIFACTS |= {  # bombs
    "zstd": (lambda p: p.put("table", ZSTD, zstandard.compress(ZEROS)), "unpack to"),
    "brotli": (lambda p: p.put("table", BROTLI, brotli.compress(ZEROS, quality=1)), "unpack to"),
    "zstd_window": (lambda p: p.put("table", ZSTD, b"\x28\xb5\x2f\xfd\x00\xa8\1\0\0"), "unpack"),
    "zstd_empty_blocks": (lambda p: p.put("table", ZSTD, ZSTD_EMPTY_BLOCKS), "unpack to"),
    "brotli_empty_blocks": (lambda p: p.put("table", BROTLI, BROTLI_EMPTY_BLOCKS), "unpack"),
    "long_header": (lambda p: p.seal(text=repeated(b"[],", 15_000_000)), "a header of"),
    "lists": (lambda p: p.seal(text=repeated(NESTED_LISTS, LONGEST)), "bad header"),
}
INTACT = {
    "packed_by_brotli": lambda p: p.change("tok_emb.weight", bytes, BROTLI),
    "last_expert": lambda p: p.change("table", lambda x: bytes([EXPERTS - 1]) + x[1:]),
    "longest_window": lambda p: p.header["model"].update(train_seq_len=65_536),
}


def check_model(model: torch.nn.Module, config: train_gpt.ModelConfig) -> None:
    """Raise AssertionError unless `model` is what its config describes and can be run."""
    config.validate()
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes_of(config)
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert (state["expert_table"] < config.num_experts).all()
    ids = torch.arange(min(config.train_seq_len, 5))[None] % config.vocab_size
    with torch.no_grad():
        assert model(ids).shape == (*ids.shape, config.vocab_size)


@pytest.mark.parametrize("damage", INTACT.values(), ids=INTACT)
def test_an_artifact_that_is_put_together_again_is_read(tmp_path, damage):
    path = tmp_path / "a.ptz"
    path.write_bytes(damaged(damage))
    model, hp, sha = load_artifact(path, tiny_hp(), CPU)
    check_model(model, hp.model)
    assert sha == SHA


def growth_of(action: Callable) -> int:
    """Return the bytes by which an action raises the peak of this process's memory; 0 off Linux."""
    if not Path("/proc/self/clear_refs").exists():
        action()
        return 0
    peaks = []
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    for act in (lambda: None, action):
        act()
        status = Path("/proc/self/status").read_text()
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) << 10)
    return peaks[1] - peaks[0]


@pytest.mark.parametrize(("damage", "line"), ARTIFACTS.values(), ids=ARTIFACTS)
def test_a_damaged_artifact_is_refused_in_one_line_in_seconds_and_little_memory(
    tmp_path, damage, line
):
    path = tmp_path / "a.ptz"
    path.write_bytes(damaged(damage))
    messages = []
    started = time.perf_counter()
    growth = growth_of(lambda: messages.append(refusal(load_artifact, path, tiny_hp(), CPU)))
    assert str(path) in messages[0]
    assert line in messages[0]
    assert growth < 100 * MIB
    assert time.perf_counter() - started < 20


WORDS = ["zipf", "dense", "full", "pid", "off", "grouped", "swiglu", "line\nbreak", "\ud800"]
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
    edits = draw(st.sets(st.sampled_from(["knobs", "payload", "packed", "header", "file"])))
    name = draw(st.sampled_from([*pieces.streams]))
    stream = pieces.streams[name]
    if "knobs" in edits:
        header["model"] |= draw(st.dictionaries(st.sampled_from([*header["model"]]), VALUES))
    if "payload" in edits:
        content = zstandard.ZstdDecompressor().decompress(stream)
        pieces.put(name, ZSTD, zstandard.compress(draw(edited(content))))
    if "packed" in edits:
        pieces.put(name, draw(st.sampled_from([ZSTD, BROTLI])), draw(edited(stream)))
    if "header" in edits:
        header[draw(st.sampled_from([*header]))] = draw(VALUES)
    return draw(edited(pieces.seal())) if "file" in edits else pieces.seal()


@settings(
    max_examples=FUZZ_CASES,
    deadline=None,
    derandomize="FUZZ_CASES" not in os.environ,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(content=hostile_artifacts())
def test_any_edit_of_an_artifact_is_refused_or_makes_a_valid_model(tmp_path, content):
    path = tmp_path / "a.ptz"
    path.write_bytes(content)
    try:
        model, hp, _ = load_artifact(path, tiny_hp(), CPU)
    except train_gpt.ConfigError as error:
        message = str(error)
    else:
        check_model(model, hp.model)
        return
    assert str(path) in message
    assert "\n" not in message


# ---- What is no file, or too large a file --------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_nobody_waits_for_what_is_no_file(tmp_path, kind):
    dataset = write_dataset(tmp_path / "data")
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")

    knobs = {"data_path": str(dataset.folder), "vocab_size": VOCAB_SIZE}
    hp = tiny_hp(**knobs, tokenizer_path=str(dataset.tokenizer))
    assert "no such artifact" in refusal(load_artifact, path, hp, CPU)
    assert "no such tokenizer" in refusal(load_tokenizer, hp.override(tokenizer_path=str(path)))
    assert "not a file of at most" in refusal(tokenize_docs.read_manifest, path)
    for name, read, place in (
        ("train_9", TokenLoader, ALONE),
        ("val_9", ValData.load, CPU),
        ("val_bytes_0", ValData.load, CPU),
    ):
        link = dataset.folder / f"fineweb_{name}.bin"
        link.symlink_to(path)
        assert refusal(read, hp, place) == f"{link}: no such shard"
        link.unlink()
        read(hp, place)


@pytest.mark.parametrize("size", [train_gpt.MAX_SUBMISSION_BYTES, 64 << 30])
def test_what_is_too_large_is_not_read(tmp_path, monkeypatch, size):
    path = tmp_path / "a.ptz"
    with open(path, "wb") as file:
        file.truncate(size)
    monkeypatch.delattr(Path, "read_bytes")
    assert "too short or too long" in refusal(load_artifact, path, tiny_hp(), CPU)
    assert "not a file of at most" in refusal(tokenize_docs.read_manifest, path)


# ---- Shards --------------------------------------------------------------------------------------

SHARDS = {  # the 50 tokens, what else is said of them, the line
    "magic": ({"magic": train_gpt.SHARD_MAGIC + 1}, "magic is 20240521"),
    "version": ({"version": 2}, "shard version 2"),
    "too_few": ({"count": 51}, "51 tokens do not make"),
    "too_many": ({"count": 49}, "49 tokens do not make"),
    "none": ({"count": 0}, "0 tokens do not make"),
    "odd_tail": ({"tail": b"\0"}, "50 tokens do not make"),
}


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


@pytest.mark.parametrize(("changes", "fragment"), SHARDS.values(), ids=SHARDS)
def test_a_damaged_shard_is_refused_in_one_line(tmp_path, split_hp, changes, fragment):
    for split in ("train", "val", "val_bytes"):
        path = tmp_path / f"fineweb_{split}_0.bin"
        intact = path.read_bytes()
        assert read_split(split_hp, split) == list(range(1, 51))
        write_shard(path, **{"tokens": range(1, 51), **changes})
        message = refusal(read_split, split_hp, split)
        assert message.startswith(f"{path}: ")
        assert fragment in message
        path.write_bytes(intact)


SIDECARS = {  # files by split and number, and the line that names the one at fault
    "longer": ({"val_bytes_0": [1] * 51}, "val_bytes_0.bin: bytes of 51 tokens, but the shard has"),
    "without_shard": ({"val_bytes_1": [1]}, "fineweb_val_bytes_1.bin"),
    "missing": ({"val_1": [1, 2]}, "fineweb_val_bytes_1.bin"),
    "swapped": ({"val_bytes_0": [1], "val_1": [1], "val_bytes_1": [1] * 50}, "bytes of 1 tokens"),
}


@pytest.mark.parametrize(("files", "fragment"), SIDECARS.values(), ids=SIDECARS)
def test_a_sidecar_that_does_not_fit_its_shard_is_refused(tmp_path, split_hp, files, fragment):
    for stem, tokens in files.items():
        write_shard(tmp_path / f"fineweb_{stem}.bin", tokens)
    message = refusal(read_split, split_hp, "val")
    assert str(tmp_path) in message
    assert fragment in message


def test_missing_or_short_data_is_refused_by_name(tmp_path, split_hp):
    seq_len = split_hp.model.train_seq_len
    empty = tmp_path / "empty"
    hp = split_hp.override(data_path=str(empty))
    assert "no such data folder (DATA_PATH)" in refusal(read_split, hp, "train")
    empty.mkdir()
    assert "empty: no fineweb_train_*.bin shards" in refusal(read_split, hp, "train")
    assert "empty: no fineweb_val_*.bin shards" in refusal(read_split, hp, "val")
    write_shard(empty / "fineweb_val_0.bin", [1])
    assert "no target to score" in refusal(read_split, hp, "val")
    (empty / "fineweb_val_0.bin").write_bytes(bytes(1023))
    assert "fineweb_val_0.bin: 1023 bytes is shorter" in refusal(read_split, hp, "val")
    write_shard(empty / "fineweb_train_0.bin", [1] * (2 * seq_len - 1))
    assert f"two sequences of TRAIN_SEQ_LEN={seq_len}" in refusal(read_split, hp, "train")
    write_shard(empty / "fineweb_train_0.bin", [1] * (2 * seq_len))
    assert len(read_split(hp, "train")) == 2 * seq_len


def test_a_token_outside_the_vocabulary_is_refused_also_beyond_the_sample(tmp_path, split_hp):
    tokens = [1] * 90 + [VOCAB_SIZE] + [1] * 9
    outside = f": token id {VOCAB_SIZE} is outside"
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_0.bin", tokens)
    assert outside in refusal(read_split, split_hp, "val")
    loader = TokenLoader(split_hp, ALONE)
    assert len(loader.sample(max_tokens=80)) == 80

    def read_an_epoch() -> None:
        for _ in range(loader.num_windows):
            loader.next_batch()

    assert outside in refusal(read_an_epoch)


# ---- Manifests and tokenizers --------------------------------------------------------------------

MANIFESTS = {
    "empty": (b"", "not a manifest"),
    "nameless": (json.dumps({"datasets": [{}], "tokenizers": []}).encode(), "not a manifest"),
    "nested": (b"[" * (tokenize_docs.MAX_JSON_BYTES - 1), "not a manifest"),
    "objects": (repeated(b'{"":{}},', tokenize_docs.MAX_JSON_BYTES - 20), "not a manifest"),
    "too_long": (bytes(tokenize_docs.MAX_JSON_BYTES + 1), "not a file of at most"),
}


@pytest.mark.parametrize(("content", "fragment"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path, content, fragment):
    path = tmp_path / "manifest.json"
    good = {"datasets": [{"name": "x"}], "tokenizers": []}
    path.write_text(json.dumps(good))
    assert tokenize_docs.read_manifest(path) == good
    path.write_bytes(content)
    message = refusal(tokenize_docs.read_manifest, path)
    assert message.startswith(f"{path}: ")
    assert fragment in message


def test_a_tokenizer_that_is_damaged_or_of_another_size_is_refused_in_one_line(split_hp, capfd):
    path = Path(split_hp.tokenizer_path)
    larger = split_hp.override(vocab_size=VOCAB_SIZE + 1)
    both = f"{path} has {VOCAB_SIZE} pieces, but VOCAB_SIZE={VOCAB_SIZE + 1}"
    assert refusal(load_tokenizer, larger).startswith(both)
    path.write_bytes(b"")
    unreadable = f"{path} is not a SentencePiece model (TOKENIZER_PATH)"
    assert refusal(load_tokenizer, split_hp).startswith(unreadable)
    # From text without a single space SentencePiece learns no U+2581 piece.
    glued = [text.replace(" ", "") for text in make_sentences(0, 200)]
    path.write_bytes(tokenize_docs.train_tokenizer(glued, VOCAB_SIZE))
    assert refusal(load_tokenizer, split_hp).startswith(f"{path} has no U+2581 piece")
    assert capfd.readouterr().err == ""  # no noise from the library


def test_a_tokenizer_without_a_path_is_looked_for_by_its_size(tmp_path, split_hp, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unnamed = split_hp.override(tokenizer_path="")
    default = Path(f"data/tokenizers/fineweb_{VOCAB_SIZE}_bpe.model")
    assert refusal(load_tokenizer, unnamed).startswith(f"{default}: no such tokenizer")
    default.parent.mkdir(parents=True)
    default.write_bytes(tiny_tokenizer())
    assert load_tokenizer(unnamed)[0].vocab_size() == VOCAB_SIZE


def test_the_tokenizer_that_the_manifest_names_is_found_beside_the_shards(tmp_path, split_hp):
    shards = tmp_path / "datasets" / "words"
    (tmp_path / "tokenizers").mkdir()
    (tmp_path / "tokenizers" / "word_pieces.model").write_bytes(tiny_tokenizer())
    unnamed = split_hp.override(data_path=str(shards), tokenizer_path="")
    assert "no such tokenizer" in refusal(load_tokenizer, unnamed)  # not by its place alone
    entry = {"name": "words", "tokenizer_name": "word_pieces"}
    (tmp_path / "manifest.json").write_text(json.dumps({"datasets": [entry]}))
    assert load_tokenizer(unnamed)[0].vocab_size() == VOCAB_SIZE


@pytest.mark.parametrize("content", ["[" * 100_000, '{"datasets": [1]}', '{"datasets": {}}', "\0"])
def test_a_manifest_that_says_nothing_of_the_shards_is_none(tmp_path, content):
    (tmp_path / "manifest.json").write_text(content)
    assert train_gpt.manifest_entry(tmp_path / "datasets" / "words") == {}
    assert train_gpt.manifest_entry(Path("/shards")) == {}  # no folder two levels above


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


CHECKPOINTS = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-500]),
    "intruder": lambda path: torch.save({"fixed": Intruder()}, path),
    "no_model": changed_checkpoint(lambda saved: saved.pop("model")),
    "other_clock": changed_checkpoint(lambda saved: saved["now"].update(hours=1)),
    "no_average": changed_checkpoint(lambda saved: saved["average"].pop()),
    "other_shape": changed_checkpoint(lambda saved: saved["model"].update(mu_init=torch.ones(3))),
}


@pytest.mark.parametrize("damage", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_runs_nothing(
    tmp_path, split_hp, monkeypatch, damage
):
    monkeypatch.chdir(tmp_path)
    checkpoints = make_checkpoints(split_hp.override(checkpoint_every="1", run_id="run"))
    checkpoints.save(train_gpt.Progression(step=3), at_once=True)
    (path,) = checkpoints.found()
    assert checkpoints.resume().step == 3
    damage(path)
    assert f"{path}: damaged checkpoint" in refusal(checkpoints.resume)
    assert not Path("intruded").exists()
