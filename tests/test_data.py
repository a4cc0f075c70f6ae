"""Properties of the training loader, validation and byte counts.   pytest tests/test_data.py

Damaged shards and tokenizers are in test_hostile.py.
"""

import io
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import ALONE, tiny_hp
from helpers_cli import (
    BOS,
    CPU,
    VOCAB_SIZE,
    make_sentences,
    tiny_tokenizer,
    write_dataset,
    write_shard,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train_gpt import Dist, Hyperparameters, TokenLoader, ValData, list_shards, token_bytes

T = 8
LENGTHS = (83, 257, 16)  # of three shards
WINDOWS_PER_EPOCH = 9 + 31 + 1  # of T + 1 tokens, at any phase


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of which no two tokens are equal, so that a token tells its shard and place."""
    start = 0
    for i, length in enumerate(LENGTHS):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", range(start, start + length))
        start += length
    return tmp_path


def loader_hp(folder: Path, **knobs) -> Hyperparameters:
    batch = {"train_batch_tokens": 8 * T, "micro_batch_tokens": 8 * T}
    sizes = {"vocab_size": 1000, "train_seq_len": T}
    return tiny_hp(**{"data_path": str(folder), **sizes, **batch, **knobs})


def windows(hp: Hyperparameters, count: int, dist: Dist = ALONE) -> list[tuple[int, ...]]:
    """Return the next `count` windows of T + 1 tokens that one rank gets."""
    loader = TokenLoader(hp, dist)
    found = []
    while len(found) < count:
        inputs, targets = loader.next_batch()
        assert inputs.shape == targets.shape == (loader.num_sequences, T)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        found += map(tuple, torch.cat([inputs, targets[:, -1:]], 1).tolist())
    return found[:count]


# ---- Loader --------------------------------------------------------------------------------------


def test_an_epoch_uses_every_token_once_up_to_less_than_two_windows_per_shard(folder):
    stream = windows(loader_hp(folder), 5 * WINDOWS_PER_EPOCH)
    epochs = [stream[i : i + WINDOWS_PER_EPOCH] for i in range(0, len(stream), WINDOWS_PER_EPOCH)]
    for epoch in epochs:
        for window in epoch:  # targets follow their inputs, and no window leaves its shard
            assert window == tuple(range(window[0], window[0] + T + 1))
        used = sorted(token for window in epoch for token in window[:-1])
        for start, length in zip((0, 83, 340), LENGTHS, strict=True):
            here = [token for token in used if start <= token < start + length]
            assert here == list(range(here[0], here[0] + len(here)))
            assert here[-1] + 1 < start + length
            assert length - 2 * T < len(here) < length
    assert len({min(epoch) for epoch in epochs}) > 1  # phases
    orders = {tuple(np.argsort([window[0] for window in epoch])) for epoch in epochs}
    assert len(orders) == 5
    assert tuple(range(WINDOWS_PER_EPOCH)) not in orders
    assert windows(loader_hp(folder, seed=1), WINDOWS_PER_EPOCH) != epochs[0]


@pytest.mark.parametrize(("world_size", "micro_sequences"), [(1, 1000), (2, 2), (8, 1)])
def test_a_step_has_the_same_content_at_any_world_size_and_accumulation(
    folder, world_size, micro_sequences
):
    steps, per_step = 12, 16  # more than an epoch
    per_rank = per_step // world_size
    batch = {"train_batch_tokens": per_step * T, "micro_batch_tokens": micro_sequences * T}
    hp = loader_hp(folder, **batch)
    assert hp.grad_accum_steps(world_size) == max(1, per_rank // micro_sequences)
    expected = windows(loader_hp(folder), steps * per_step)
    ranks = [Dist(rank, world_size, CPU) for rank in range(world_size)]
    streams = [windows(hp, steps * per_rank, rank) for rank in ranks]
    for step in range(steps):
        parts = [stream[step * per_rank : (step + 1) * per_rank] for stream in streams]
        together = sorted(itertools.chain(*parts))
        assert together == sorted(expected[step * per_step : (step + 1) * per_step])


# ---- Validation ----------------------------------------------------------------------------------

SIDECARS = {"000000": [0, 10, 65_535, 30], "000001": [40, 50], "000002": [0, 70]}


@pytest.fixture
def val_folder(tmp_path) -> Path:
    """Three validation shards of tokens 4, 5, ... and sidecars of unlikely numbers of bytes."""
    tmp_path = tmp_path / "datasets" / "mine"
    tmp_path.mkdir(parents=True)
    token = itertools.count(4)
    for name, sizes in SIDECARS.items():
        write_shard(tmp_path / f"fineweb_val_{name}.bin", [next(token) for _ in sizes])
        write_shard(tmp_path / f"fineweb_val_bytes_{name}.bin", sizes)
    write_shard(tmp_path / "fineweb_train_000000.bin", [60_000] * 9)
    write_shard(tmp_path / "fineweb_train_bytes_000000.bin", [99] * 9)
    (tmp_path / "fineweb_val_000003.bin.tmp").write_bytes(b"half")
    (tmp_path / "tiny.model").write_bytes(tiny_tokenizer())
    return tmp_path


def load_val(folder: Path, **knobs) -> ValData:
    paths = {"data_path": str(folder), "tokenizer_path": str(folder / "tiny.model")}
    return ValData.load(tiny_hp(**paths, vocab_size=VOCAB_SIZE, **knobs), CPU)


@pytest.mark.parametrize("val_max_tokens", [0, 1, 7, 8])
def test_shards_are_joined_in_order_and_sidecars_give_every_target_its_bytes(
    val_folder, val_max_tokens
):
    val = load_val(val_folder, val_max_tokens=val_max_tokens)
    count = min(val_max_tokens or 7, 7)
    sizes = list(itertools.chain(*SIDECARS.values()))
    assert val.tokens.tolist() == list(range(4, 4 + count + 1))
    assert val.target_bytes.tolist() == sizes[1 : count + 1]
    assert (val.partial, val.sidecar) == (count < 7, True)
    names = [path.name for path in list_shards(val_folder, "val")]
    assert names == [f"fineweb_val_{name}.bin" for name in SIDECARS]


def test_a_split_that_lacks_a_shard_or_tokens_of_the_manifest_is_partial(val_folder):
    manifest = val_folder.parents[1] / "manifest.json"
    for stated, lacks in ((8, ""), (9, "tokens: 8 of 9"), ("many", "")):
        entry = {"name": val_folder.name, "stats": {"tokens_val": stated}}
        manifest.write_text(json.dumps({"datasets": [entry]}))
        val = load_val(val_folder)
        assert val.partial == (lacks != "")
        assert val.lacks.startswith(lacks)
    for path in val_folder.glob("fineweb_val*_000001.bin"):
        path.unlink()
    assert load_val(val_folder).lacks.startswith("a shard of number 1, before fineweb_val_000002")


def test_a_generated_data_set_scores_the_bytes_of_its_sentences(tmp_path):
    dataset = write_dataset(tmp_path / "set", val_seed=9, val_docs=5)
    val = load_val(dataset.folder)
    assert int(val.target_bytes.sum()) == sum(map(len, make_sentences(9, 5)))
    assert int((val.tokens == BOS).sum()) == 5
    assert not val.sidecar


# ---- Bytes ---------------------------------------------------------------------------------------

TEXTS = [
    "",
    " ",
    "  two   spaces \t\n here  ",
    "in 1999, 12345 of 7",
    "na\u00efve caf\u00e9 e\u0301a\u030a\u0323 \u0301 Z\u0351\u036b\u0343",
    "\u4e2d\u6587 and \ud55c\uad6d\uc5b4 \U00020000\u9f98 \U0002a6d6 \u3400",
    "\u2581\u2581 b",
    "\u2047 a \u2047",
    "\n\nline\r\nline\n\tindented\n",
    "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "a\0b\x07\x7f\x85c",
    *make_sentences(3, 3),
]


def counted(sp: sentencepiece.SentencePieceProcessor, documents: list[list[int]]) -> list[int]:
    """Return the bytes of documents of token ids in a row, each after a BOS."""
    stream = np.concatenate([[BOS, *document] for document in documents])
    ends = np.cumsum([1 + len(document) for document in documents])
    sizes = np.insert(token_bytes(sp, stream), 0, 0)
    return [int(part.sum()) for part in np.split(sizes, ends[:-1])]


def assert_bytes_of_texts(sp: sentencepiece.SentencePieceProcessor, texts: list[str]) -> None:
    documents = [sp.encode(text) for text in texts]
    decoded = [sp.decode(document) for document in documents]
    assert counted(sp, documents) == [len(text.encode()) for text in decoded]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
@example(texts=TEXTS)
def test_counted_bytes_are_those_of_any_documents_in_a_row(texts):
    assert_bytes_of_texts(sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer()), texts)


@pytest.mark.parametrize("removed", [False, True])
def test_the_space_that_a_tokenizer_puts_before_every_document_has_no_bytes(removed):
    """The challenge's tokenizers add none, SentencePiece's defaults do."""
    model = io.BytesIO()
    texts = {"sentence_iterator": iter(make_sentences(0, 200)), "model_writer": model}
    ids = {"pad_id": 0, "bos_id": BOS, "eos_id": 2, "unk_id": 3, "minloglevel": 2}
    options = {"byte_fallback": True, "remove_extra_whitespaces": removed, "model_type": "bpe"}
    sentencepiece.SentencePieceTrainer.train(vocab_size=VOCAB_SIZE, **texts, **ids, **options)
    sp = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert sp.id_to_piece(sp.encode("the")[0]).startswith("\u2581")
    assert_bytes_of_texts(sp, TEXTS)


@pytest.mark.parametrize("places", [[0], [2, 3], [99]])
def test_an_unknown_token_has_no_bytes_and_parts_the_text_as_a_document_would(places):
    """SentencePiece decodes it as U+2047 between spaces, which were never in the text."""
    sp = sentencepiece.SentencePieceProcessor(model_proto=tiny_tokenizer())
    text = sp.encode("abc, hello " + make_sentences(0, 1)[0])
    parts = [part.tolist() for part in np.split(text, np.minimum(places, len(text)))]
    stream = list(itertools.chain(*([*part, sp.unk_id()] for part in parts)))
    assert counted(sp, [stream]) == [sum(len(sp.decode(part).encode()) for part in parts)]
