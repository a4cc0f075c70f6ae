"""Artifacts in pieces, and what a refusal must look like.   (no tests here)"""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass

import brotli
import pytest
import torch
import zstandard
from conftest import make_model, tiny_hp

import train_gpt
from train_gpt import PREFIX, ZSTD, ConfigError, Hyperparameters, ModelConfig, pack

SHA = "ab" * 32


def refusal(action: Callable, *args: object) -> str:
    """Return the one line with which an action has to refuse."""
    with pytest.raises(ConfigError) as refused:
        action(*args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's state dict, without the model."""
    with torch.device("meta"):
        state = train_gpt.GPT(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@dataclass
class Pieces:
    """An artifact's header and its compressed streams by name, to look at or to change."""

    header: dict
    streams: dict[str, bytes]

    @classmethod
    def of(cls, data: bytes) -> "Pieces":
        offset = PREFIX.size + PREFIX.unpack_from(data)[2]
        header = json.loads(data[PREFIX.size : offset])
        plan = train_gpt.streams_of(
            train_gpt.layout(ModelConfig(**header["model"]), header["storage"])
        )
        streams = {}
        for name, (_, size) in zip(plan, header["streams"], strict=True):
            streams[name] = data[offset : offset + size]
            offset += size
        assert offset == len(data)
        return cls(header, streams)

    def put(self, name: str, codec: int, content: bytes) -> None:
        """Replace a stream, and declare it rightly."""
        self.streams[name] = content
        self.header["streams"][list(self.streams).index(name)] = [codec, len(content)]

    def change(self, name: str, edit: Callable[[bytes], bytes], codec: int = ZSTD) -> None:
        """Change what a stream unpacks to, and compress it again."""
        content = edit(zstandard.ZstdDecompressor().decompress(self.streams[name]))
        pack = zstandard.compress if codec == ZSTD else brotli.compress
        self.put(name, codec, pack(content))

    def store(self, name: str, letter: str) -> None:
        """Give one tensor another storage."""
        letters = list(self.header["storage"])
        letters[list(shapes_of(ModelConfig(**self.header["model"]))).index(name)] = letter
        self.header["storage"] = "".join(letters)

    def seal(
        self,
        text: bytes | None = None,
        body: bytes | None = None,
        length: int | None = None,
        version: int = train_gpt.ARTIFACT_VERSION,
        magic: bytes = train_gpt.ARTIFACT_MAGIC,
    ) -> bytes:
        """Return the file with a right checksum, of other bytes than it has if they are given."""
        text = json.dumps(self.header).encode() if text is None else text
        body = b"".join(self.streams.values()) if body is None else body
        length = len(text) if length is None else length
        unsigned = PREFIX.pack(magic, version, length, bytes(32))
        return unsigned[:-32] + hashlib.sha256(unsigned + text + body).digest() + text + body


@functools.cache
def good_artifact() -> tuple[Hyperparameters, bytes]:
    """Return knobs and content of a small artifact that has streams of every kind."""
    sizes = {"model_dim": 12, "num_heads": 2, "num_kv_heads": 1, "rope_dims": 2, "vocab_size": 8}
    widths = {"expert_dim": 2, "shared_dim": 4, "num_layers": 2}
    hp = tiny_hp(**sizes, **widths, routing="learned", mu="full")
    state = make_model(hp).state_dict()
    state["mu_init"].fill_(0.034)[0] = 10.0  # eight bits would take all others to zero
    data, written = pack(hp.model, train_gpt.quantize(hp, state)[0], SHA, fast=True)
    shared = {"vector", "scales", "table", "float16"}
    assert shared | {"embedding", "matrix", "expert", "mu_matrix"} <= set(written)
    return hp, data
