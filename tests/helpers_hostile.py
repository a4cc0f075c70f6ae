"""Hostile artifacts, shards and manifests made from bytes, and what their readers may do with them.   (no tests here)

A case is a string of bytes that steers structure-aware edits of a good file: hypothesis draws it in test_hostile.py,
and libFuzzer searches for it in fuzz.py. `run_case` of a target raises AssertionError or lets a foreign exception pass
when a reader does anything but return something valid or raise Refusal with one line that names the file."""

import functools
import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import brotli
import cached_challenge_fineweb as downloader
import numpy as np
import tokenize_docs
import torch
import zstandard
from conftest import make_model, tiny_hp
from helpers_cli import ALONE, CPU, VOCAB_SIZE, tiny_tokenizer

import train_gpt
from train_gpt import (
    ARTIFACT_MAGIC,
    ARTIFACT_VERSION,
    CHOICES,
    GPT,
    MODEL_KNOBS,
    PREFIX,
    Hyperparameters,
    Refusal,
    layout,
    pack,
    quantize,
    role_of,
)

SHA = "ab" * 32
SMALL = 20_000  # weights of a model that a case may build and run
PACKERS = {1: zstandard.compress, 2: functools.partial(brotli.compress, quality=1)}
STORED_AS = {"vector": "q", "router": "h", "table": "t"}  # and all others q
WORDS = sorted({word for knob in MODEL_KNOBS for word in CHOICES.get(knob, "").split()})
NUMBERS = [
    0,
    1,
    -1,
    2,
    12,
    255,
    256,
    1024,
    65_535,
    65_536,
    65_537,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**70,
    10**4000,
]
NUMBERS += [0.0, 0.5, -1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf]
VALUES = [
    *NUMBERS,
    True,
    False,
    None,
    "",
    "7",
    "line\nbreak",
    "\ud800",
    "\x1b[2J",
    [],
    {},
    [[]],
    {"a": {}},
    [1, 2, 3],
]
VALUES += [functools.reduce(lambda inner, _: [inner], range(300), [])]


class Choices:
    """Decisions read from bytes; zeros follow the last one, so that any bytes make a case."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        return self.data[start : self.at].ljust(count, b"\0")

    def below(self, limit: int) -> int:
        return int.from_bytes(self.take(1 if limit <= 256 else 4), "little") % limit

    def pick(self, options):
        return options[self.below(len(options))]

    def blob(self) -> bytes:
        return self.take(self.below(24))


def any_value(choices: Choices) -> object:
    """A JSON value that a file might have in the place of another."""
    kind = choices.below(4)
    return [choices.pick(VALUES), choices.pick(WORDS), choices.below(70), choices.below(2**20)][
        kind
    ]


def edit_bytes(data: bytes, choices: Choices) -> bytes:
    """`data` with bytes replaced, inserted, cut out, cut off, repeated or added."""
    at, blob = choices.below(len(data) + 1), choices.blob()
    end = at + choices.below(16)
    return [
        data[:at] + blob + data[at + len(blob) :],
        data[:at] + blob + data[at:],
        data[:at] + data[end:],
        data[:at],
        data[:end] + data[at:],
        data + blob,
    ][choices.below(6)]


def refusal_of(action: Callable, source: str | Path) -> tuple[object, str]:
    """(result, "") of `action`, or (None, message) of its Refusal; other exceptions pass."""
    try:
        return action(), ""
    except Refusal as refusal:
        message = str(refusal)
        assert str(source) in message, message
        assert "\n" not in message, message
        return None, message


# ---- Artifacts


@functools.cache
def good_artifact() -> tuple[Hyperparameters, bytes]:
    """Knobs and content of an artifact with streams of every kind, from a model of 2,000 weights."""
    sizes = {
        "model_dim": 12,
        "num_heads": 2,
        "num_kv_heads": 1,
        "rope_dims": 2,
        "vocab_size": 8,
        "expert_dim": 2,
    }
    hp = tiny_hp(
        **sizes, shared_dim=4, num_layers=2, routing="learned", top_k=2, mu="lowrank", mu_rank=12
    )
    state = make_model(hp).state_dict()
    state["mu_init"][:] = torch.cat([torch.full((1,), 10.0), torch.full((hp.mu_rank - 1,), 0.034)])
    data, written = pack(hp, quantize(hp, state)[0], SHA, "zstd")
    assert {
        "vector",
        "steps",
        "table",
        "float16",
        "embedding",
        "matrix",
        "expert",
        "mu_matrix",
    } <= set(written)
    return hp, data


def split_artifact(data: bytes) -> tuple[dict, list[bytes]]:
    """The header of an artifact and its streams, still compressed."""
    length = PREFIX.unpack_from(data)[2]
    header, streams, offset = (
        json.loads(data[PREFIX.size : PREFIX.size + length]),
        [],
        PREFIX.size + length,
    )
    for _, size in header["streams"]:
        streams.append(data[offset : offset + size])
        offset += size
    assert offset == len(data)
    return header, streams


def seal(
    text: bytes,
    body: bytes,
    version=ARTIFACT_VERSION,
    magic=ARTIFACT_MAGIC,
    length: int | None = None,
) -> bytes:
    """An artifact with a valid checksum around any header and streams."""
    prefix = PREFIX.pack(magic, version, len(text) if length is None else length, bytes(32))
    return prefix[:-32] + hashlib.sha256(prefix + text + body).digest() + text + body


@functools.lru_cache(64)
def shapes_of(hp: Hyperparameters) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(hp).state_dict().items()}


def consistent(
    hp: Hyperparameters, fill: Callable[[int], bytes], number: int = 1
) -> tuple[dict, list[bytes]]:
    """Header and streams that fit the model of `hp`; `fill` gives the payload of a stream of some bytes."""
    shapes = shapes_of(hp)
    storage = "".join(STORED_AS.get(role_of(name), "q") for name in shapes)
    streams = []
    for entries in layout(shapes, storage).values():
        streams.append(
            PACKERS[number](
                fill(sum(math.prod(shape) * dtype.itemsize for *_, dtype, shape in entries))
            )
        )
    header = {
        "model": {name: getattr(hp, name) for name in MODEL_KNOBS},
        "tokenizer_sha256": SHA,
        "storage": storage,
    }
    return header | {"streams": [[number, len(stream)] for stream in streams]}, streams


def edit_knob(header: dict, streams: list[bytes], choices: Choices) -> None:
    header["model"][choices.pick(MODEL_KNOBS)] = any_value(choices)


def drop_key(header: dict, streams: list[bytes], choices: Choices) -> None:
    name = choices.pick([*header, *MODEL_KNOBS])
    (header if name in header else header["model"]).pop(name, None)


def edit_key(header: dict, streams: list[bytes], choices: Choices) -> None:
    header[choices.pick(["model", "tokenizer_sha256", "storage", "streams", "other"])] = any_value(
        choices
    )


def edit_entry(header: dict, streams: list[bytes], choices: Choices) -> None:
    at, value = choices.below(len(streams)), any_value(choices)
    header["streams"][at] = [value, [value, header["streams"][at][1]], [1, value], [value] * 2][
        choices.below(4)
    ]


def edit_storage(header: dict, streams: list[bytes], choices: Choices) -> None:
    letters = [*header["storage"]]
    letters[choices.below(len(letters))] = choices.pick([*"qht", "", "qq", "\0", "\ud800"])
    header["storage"] = letters if choices.below(8) == 1 else "".join(letters)


def edit_stream(header: dict, streams: list[bytes], choices: Choices) -> None:
    """Compressed bytes changed, rightly declared."""
    at = choices.below(len(streams))
    streams[at] = edit_bytes(streams[at], choices)
    header["streams"][at] = [choices.pick([1, 1, 2]), len(streams[at])]


def edit_payload(header: dict, streams: list[bytes], choices: Choices) -> None:
    """Content changed and compressed again, by either codec."""
    at, number = choices.below(len(streams)), choices.pick([1, 2])
    try:
        payload = zstandard.ZstdDecompressor().decompress(streams[at], max_output_size=1 << 16)
    except zstandard.ZstdError:
        payload = b""
    streams[at] = PACKERS[number](edit_bytes(payload, choices))
    header["streams"][at] = [number, len(streams[at])]


def replace_stream(header: dict, streams: list[bytes], choices: Choices) -> None:
    """Bytes of the case itself, for either codec's reader; the magic number of zstd comes for free."""
    at, number, blob = (
        choices.below(len(streams)),
        choices.pick([1, 2]),
        choices.take(choices.below(64)),
    )
    streams[at] = b"\x28\xb5\x2f\xfd" * (number == 1) + blob
    header["streams"][at] = [number, len(streams[at])]


def rebuild(header: dict, streams: list[bytes], choices: Choices) -> None:
    """Another small model, whose header and streams fit each other, if its knobs are valid."""
    hp, _ = good_artifact()
    try:
        hp = train_gpt.replace(hp, **header["model"])
        hp = train_gpt.replace(
            hp, **{choices.pick(MODEL_KNOBS): any_value(choices) for _ in range(choices.below(4))}
        )
        hp = train_gpt.replace(hp, train_batch_tokens=hp.train_seq_len)
        hp.validate()
    except (Refusal, TypeError, RecursionError):
        return
    if (
        hp.num_layers > 8
        or hp.loop_passes > 4
        or sum(map(math.prod, shapes_of(hp).values())) > SMALL
    ):
        return
    pattern = choices.blob() or b"\0\1"
    new_header, streams[:] = consistent(
        hp, lambda size: (pattern * (size // len(pattern) + 1))[:size], choices.pick([1, 2])
    )
    header.update(new_header)


EDITS = [
    edit_knob,
    edit_knob,
    drop_key,
    edit_key,
    edit_entry,
    edit_storage,
    edit_stream,
    edit_payload,
]
EDITS += [replace_stream, rebuild, rebuild]


def hostile_artifact(data: bytes) -> bytes:
    """The artifact of a case; its checksum is right unless the last edit is one of the whole file."""
    choices = Choices(data)
    header, streams = split_artifact(good_artifact()[1])
    for _ in range(choices.below(4)):
        try:
            choices.pick(EDITS)(header, streams, choices)
        except (KeyError, TypeError, AttributeError, IndexError):
            break  # an earlier edit took away what this one would change
    text, length, last = json.dumps(header).encode(), None, choices.below(8)
    if last == 1:
        text = edit_bytes(text, choices)
    elif last == 2:
        length = choices.pick(
            [0, len(text) - 1, len(text) + 1, 2**31, 2**32 - 1, choices.below(2**32)]
        )
    elif last == 3:  # the last of two equal keys counts
        text = (
            text[:-1]
            + b","
            + json.dumps({choices.pick([*MODEL_KNOBS, *header, "streams"]): "x"}).encode()[1:]
        )
    content = seal(text, b"".join(streams), length=length)
    return edit_bytes(content, choices) if last == 4 else content


def check_model(model: GPT, hp: Hyperparameters) -> None:
    """Raise AssertionError unless `model` is what `hp` describes and, if it is small, can be run."""
    hp.validate()
    state = model.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == shapes_of(hp)
    assert {tensor.dtype for name, tensor in state.items() if name != "expert_table"} == {
        torch.float32
    }
    assert all(tensor.isfinite().all() for tensor in state.values())
    assert state["expert_table"].dtype == torch.uint8
    assert (state["expert_table"] < hp.num_experts).all()
    if (
        sum(tensor.numel() for tensor in state.values()) <= SMALL
        and hp.num_layers * hp.loop_passes <= 64
    ):
        ids = torch.arange(min(hp.train_seq_len, 5))[None] % hp.vocab_size
        with torch.no_grad():
            assert model(ids).shape == (*ids.shape, hp.vocab_size)


def run_artifact_case(folder: Path, data: bytes) -> str:
    """The Refusal's message, or "" for a model that is valid."""
    path, hp = folder / "a.ptz", good_artifact()[0]
    path.write_bytes(hostile_artifact(data))
    loaded, message = refusal_of(lambda: train_gpt.load_artifact(path, hp, CPU), path)
    if loaded:
        check_model(*loaded[:2])
        assert isinstance(loaded[2], str)
    return message


# ---- Shards

HEADER = np.array([train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, 40, *[0] * 253], "<i4")
SPLITS = ("train", "val", "val_bytes")


def tokens_of(data: bytes) -> np.ndarray | None:
    """The tokens of a shard by the definition of the format, None if it is none."""
    magic, version, count = np.frombuffer(data[:12].ljust(12, b"\0"), "<i4").tolist()
    right = (magic, version, len(data)) == (*HEADER[:2].tolist(), 1024 + 2 * count) and count > 0
    return np.frombuffer(data, "<u2", offset=1024) if right else None


def hostile_shards(data: bytes) -> dict[str, bytes]:
    """The training, validation and sidecar shard of a case, by the middle of their names; the last may be missing."""
    choices, shards = Choices(data), {}
    for split in SPLITS[: 2 + choices.below(2)]:
        header, tokens = HEADER.copy(), np.arange(40, dtype="<u2") + choices.below(3)
        kind = choices.below(8)
        if kind == 1:
            header[choices.below(3)] = (
                choices.pick([n for n in NUMBERS if type(n) is int]) & 0x7FFFFFFF
            )
        elif kind == 2:
            header[2] = choices.pick([-1, 0, 39, 41, 2**31 - 1, -(2**31)])
        elif kind == 3:
            tokens[choices.below(40)] = choices.below(65_536)
        elif kind == 4:
            tokens = tokens[: choices.below(40)]
            header[2] = len(tokens)
        shards[split] = header.tobytes() + tokens.tobytes()
        shards[split] = edit_bytes(shards[split], choices) if kind >= 6 else shards[split]
    return shards


def run_shard_case(folder: Path, data: bytes) -> str:
    """The first Refusal's message, or "" where all shards are read, as what they are."""
    (folder / "tiny.model").write_bytes(tiny_tokenizer())
    shards = hostile_shards(data)
    for split in SPLITS:
        path = folder / f"fineweb_{split}_000000.bin"
        path.write_bytes(shards[split]) if split in shards else path.unlink(missing_ok=True)
    expected = {split: tokens_of(content) for split, content in shards.items()}
    paths = {"data_path": str(folder), "tokenizer_path": str(folder / "tiny.model")}
    hp = Hyperparameters(
        **paths,
        vocab_size=VOCAB_SIZE,
        train_seq_len=8,
        train_batch_tokens=16,
        micro_batch_tokens=16,
    )
    train, val = expected["train"], expected["val"]
    loader, refusal = refusal_of(lambda: train_gpt.TokenLoader(hp, ALONE), folder)
    assert (loader is not None) == (train is not None and len(train) >= 2 * 8), refusal
    if loader:
        sample, refusal = refusal_of(loader.sample, folder)
        assert (sample is None) == bool(train.max() >= VOCAB_SIZE), refusal
        assert sample is None or np.array_equal(sample, train)
    split, message = refusal_of(lambda: train_gpt.ValData.load(hp, CPU), folder)
    fits = val is not None and len(val) > 1 and val.max() < VOCAB_SIZE
    if "val_bytes" in shards:
        sizes = expected["val_bytes"]
        fits = fits and sizes is not None and len(sizes) == len(val)
    assert (split is not None) == fits, message
    if split:
        assert split.tokens.tolist() == val.tolist()
        assert (
            "val_bytes" not in shards
            or split.target_bytes.tolist() == expected["val_bytes"][1:].tolist()
        )
    return refusal or message


# ---- Manifests

NAME, MODEL = "fineweb10B_sp1024", "fineweb_1024_bpe"
FILES = [
    f"datasets/{NAME}/fineweb_{split}_{n:06d}.bin" for split in ("val", "train") for n in range(2)
]
FILES += [
    f"tokenizers/{MODEL}.model",
    f"datasets/{NAME}/fineweb_val_bytes_000000.bin",
    "tokenizers/other",
    "evil",
]
MANIFEST_VALUES = [
    *VALUES,
    NAME,
    MODEL,
    "tokenizers/other",
    "tokenizers/../evil",
    "/evil",
    "evil",
    "tokenizers/x\n",
]


def hub_of(files: list[str]) -> downloader.Hub:
    """A repository that has been listed, without a network."""
    hub = downloader.Hub.__new__(downloader.Hub)
    hub.repo_id, hub.prefix, hub.manifests = "owner/golf", "datasets/", []
    hub.files = {path: downloader.RemoteFile(path, 1, "0" * 64) for path in files}
    return hub


def hostile_manifest(data: bytes) -> bytes:
    """The manifest of a case."""
    choices = Choices(data)
    dataset = {"name": NAME, "tokenizer_name": MODEL, "stats": {"files_val": 2, "files_train": 2}}
    tokenizer = {
        "name": MODEL,
        "model_path": f"tokenizers/{MODEL}.model",
        "vocab_path": f"tokenizers/{MODEL}.vocab",
    }
    manifest = {"datasets": [dataset], "tokenizers": [tokenizer]}
    places = [manifest, dataset, dataset["stats"], tokenizer]
    for _ in range(choices.below(4)):
        place = choices.pick(places)
        name = choices.pick([*place, "path"])
        value = choices.pick(MANIFEST_VALUES) if choices.below(2) else choices.below(5)
        if choices.below(4) == 3:
            place.pop(name, None)
        else:
            place[name] = [value, [value], [{**tokenizer}, value], {"name": value}][
                choices.below(4) * choices.below(2)
            ]
    text = json.dumps(manifest).encode()
    return edit_bytes(text, choices) if choices.below(4) == 3 else text


def hostile_ledger(data: bytes, state: dict[str, int]) -> bytes:
    """The ledger of a case, about a file in some state."""
    choices, entry = Choices(data), {"digest": "0" * 64, "source": "owner/golf@main", **state}
    for _ in range(choices.below(4)):
        entry[choices.pick([*entry])] = choices.pick(MANIFEST_VALUES)
    text = json.dumps(
        {choices.pick(["manifest.json", "other"]): choices.pick([entry, entry, [entry]])}
    ).encode()
    return edit_bytes(text, choices) if choices.below(4) == 3 else text


def run_manifest_case(folder: Path, data: bytes) -> str:
    """The first Refusal's message of all readers of manifests, or "" if they take it."""
    path, content, hub, name = (
        folder / "manifest.json",
        hostile_manifest(data),
        hub_of(FILES),
        "here",
    )
    path.write_bytes(content)
    manifest, message = refusal_of(lambda: downloader.parse_manifest(content, name), name)
    if manifest:
        files, message = refusal_of(lambda: downloader.select(hub, manifest, NAME, 1), hub.repo_id)
        assert files is None or {file.path for file in files} <= {*FILES} - {"evil"}
    kept, other = refusal_of(lambda: tokenize_docs.read_manifest(path), path)
    if kept:
        names = [entry["name"] for key in ("tokenizers", "datasets") for entry in kept[key]]
        assert all(isinstance(name, str) for name in names)
    ledger = downloader.Ledger(folder)
    ledger.path.parent.mkdir(exist_ok=True)
    ledger.path.write_bytes(hostile_ledger(data, ledger.state(path)))
    downloader.Ledger(folder).digest(
        path
    )  # a damaged one costs a checksum, and is not worth a Refusal
    return message or other


TARGETS = {"artifact": run_artifact_case, "shard": run_shard_case, "manifest": run_manifest_case}
