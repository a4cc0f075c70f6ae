"""Properties of shards, the training loader, tokenizers and byte tables.   pytest tests/test_data.py"""

import io
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from helpers_cli import (
    ALONE,
    BOS,
    CPU,
    SHARED,
    VOCAB_SIZE,
    cli_env,
    make_sentences,
    tiny_tokenizer,
    tokenize_docs,
    write_dataset,
    write_shard,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import Dist, Hyperparameters, Refusal, TokenLoader, ValData

T = 8
LENGTHS = (83, 257, 16)  # of three shards; windows of T + 1 at any phase: 9, 31 and 1
WINDOWS_PER_EPOCH = 9 + 31 + 1
TOKENIZERS = sorted((SHARED / "tokenizers").glob("*.model"))
TEXTS = {
    "empty": "",
    "space": " ",
    "word": "hello",
    "leading_space": " hello",
    "multiple_spaces": "  two   spaces \t\n here  ",
    "digits": "in 1999, 12345 of 7",
    "accents": "na\u00efve caf\u00e9 \u00c5ngstr\u00f6m",
    "cjk": "\u4e2d\u6587\u6587\u672c and \ud55c\uad6d\uc5b4 \u65e5\u672c\u8a9e",
    "emoji": "ok \U0001f600\U0001f468\u200d\U0001f469 \U0001f1eb\U0001f1f7 ok",
    "emoji_first": "\U0001f9d1\U0001f3fd\u200d\U0001f680",
    "rare_cjk": "\U00020000\u9f98 \U0002a6d6 \u3400",
    "space_mark": "a \u2581 b\u2581c",
    "space_mark_first": "\u2581\u2581 b",
    "double_question_mark": "\u2047 a \u2047",
    "leading_spaces": "   hello",
    "trailing_spaces": "hello   ",
    "newlines": "\n\nline\r\nline\n\tindented\n",
    "unusual_spaces": "a\u00a0b\u2003c\u3000d\u200be\ufefff",
    "arabic": "\u0627\u0644\u0633\u0644\u0627\u0645 \u0639\u0644\u064a\u0643\u0645\u060c \u0661\u0662\u0663",
    "hindi": "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e\u0964",
    "thai": "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 \u0e0a\u0e32\u0e27\u0e42\u0e25\u0e01",
    "cyrillic": "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "combining_marks": "e\u0301a\u030a\u0323 \u0301 Z\u0351\u036b\u0343",
    "nul_and_controls": "a\0b\x07\x7f\x85c",
    "sentence": make_sentences(3, 1)[0],
    "long": "The quick brown fox, 42 dogs; \u00abquoted\u00bb \u2014 and so on. " * 20,
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three shards of which no two tokens are equal, so that a token tells its shard and place."""
    start = 0
    for i, length in enumerate(LENGTHS):
        write_shard(tmp_path / f"fineweb_train_{i:06d}.bin", range(start, start + length))
        start += length
    return tmp_path


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    path.write_bytes(tiny_tokenizer())
    return path


def knobs(folder: Path, **changes) -> Hyperparameters:
    base = {
        "data_path": str(folder),
        "vocab_size": 1000,
        "train_seq_len": T,
        "train_batch_tokens": 8 * T,
    }
    return Hyperparameters(**{**base, "micro_batch_tokens": 8 * T, **changes})


def windows(hp: Hyperparameters, count: int, dist: Dist = ALONE) -> list[tuple[int, ...]]:
    """The next `count` windows of T + 1 tokens that one rank gets."""
    loader, result = TokenLoader(hp, dist), []
    while len(result) < count:
        inputs, targets = loader.next_batch()
        assert inputs.shape == targets.shape == (loader.num_sequences, hp.train_seq_len)
        assert inputs.dtype == targets.dtype == torch.int64
        assert torch.equal(inputs[:, 1:], targets[:, :-1])
        result += [
            (*row, int(last)) for row, last in zip(inputs.tolist(), targets[:, -1], strict=True)
        ]
    return result[:count]


def val_hp(folder: Path, tokenizer: Path, **changes) -> Hyperparameters:
    return Hyperparameters(
        data_path=str(folder), tokenizer_path=str(tokenizer), vocab_size=VOCAB_SIZE, **changes
    )


# ---- Loader


def test_targets_are_the_tokens_that_follow_the_inputs(folder):
    for window in windows(knobs(folder), 100):
        assert window == tuple(range(window[0], window[0] + T + 1))


def test_an_epoch_uses_every_training_token_once_up_to_less_than_two_windows_per_shard(folder):
    for epoch in range(5):
        inputs = [window[:-1] for window in windows(knobs(folder), (epoch + 1) * WINDOWS_PER_EPOCH)]
        used = sorted(token for window in inputs[epoch * WINDOWS_PER_EPOCH :] for token in window)
        assert len(set(used)) == len(used) == WINDOWS_PER_EPOCH * T
        shard_start = 0
        for length in LENGTHS:
            here = [token for token in used if shard_start <= token < shard_start + length]
            assert here == list(range(here[0], here[0] + len(here)))
            assert length - 2 * T < len(here) < length
            shard_start += length


def test_no_window_crosses_from_one_shard_into_the_next(folder):
    edges = np.cumsum(LENGTHS)
    for window in windows(knobs(folder), 3 * WINDOWS_PER_EPOCH):
        assert np.searchsorted(edges, window[0], side="right") == np.searchsorted(
            edges, window[-1], side="right"
        )


def test_the_next_epoch_has_another_phase_and_another_order(folder):
    hp = knobs(folder)
    stream = windows(hp, 6 * WINDOWS_PER_EPOCH)
    epochs = [stream[i * WINDOWS_PER_EPOCH : (i + 1) * WINDOWS_PER_EPOCH] for i in range(6)]
    assert len({min(window[0] for window in epoch) for epoch in epochs}) > 1
    ranks = [np.argsort([window[0] for window in epoch]).tolist() for epoch in epochs]
    assert all(ranks[0] != other for other in ranks[1:])
    assert ranks[0] != sorted(ranks[0])


def test_the_order_is_a_function_of_the_seed_alone(folder):
    stream = windows(knobs(folder), 120)
    assert windows(knobs(folder), 120) == stream
    assert windows(knobs(folder, train_batch_tokens=2 * T, micro_batch_tokens=T), 120) == stream
    assert windows(knobs(folder, num_layers=3, matrix_lr=0.5), 120) == stream
    assert windows(knobs(folder, seed=1), 120) != stream


@pytest.mark.parametrize("micro_batch_tokens", [T, 2 * T, 8 * T, 1000 * T])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_every_step_has_the_same_content_at_any_world_size_and_accumulation(
    folder, world_size, micro_batch_tokens
):
    steps, per_step = 12, 16  # more than an epoch
    hp = knobs(folder, train_batch_tokens=per_step * T, micro_batch_tokens=micro_batch_tokens)
    expected = windows(knobs(folder), steps * per_step)
    per_rank = per_step // world_size
    streams = [
        windows(hp, steps * per_rank, Dist(rank, world_size, CPU)) for rank in range(world_size)
    ]
    for step in range(steps):
        parts = [stream[step * per_rank : (step + 1) * per_rank] for stream in streams]
        together = sorted(window for part in parts for window in part)
        assert together == sorted(expected[step * per_step : (step + 1) * per_step])
    assert hp.grad_accum_steps(world_size) == max(1, -(-per_rank * T // micro_batch_tokens))


@pytest.mark.parametrize("max_tokens", [3, 6, 48, 50, 51, 249, 252, 770, 771, 10_000])
def test_the_sample_takes_as_many_tokens_from_the_start_of_every_shard(folder, max_tokens):
    """Shards are in the order of the crawl: the first of them alone would be another text than the whole."""
    tokens, starts = TokenLoader(knobs(folder), ALONE).sample(max_tokens), np.cumsum([0, *LENGTHS])
    expected = [
        start + i
        for start, n in zip(starts, LENGTHS, strict=False)
        for i in range(min(n, max_tokens // 3))
    ]
    assert tokens.tolist() == expected
    assert tokens.dtype == np.uint16
    assert len(tokens) <= max_tokens
    assert (len(tokens) == sum(LENGTHS)) == (max_tokens >= 3 * max(LENGTHS))


def test_the_sample_is_the_same_on_every_rank_and_leaves_the_batches_alone(folder):
    loaders = [TokenLoader(knobs(folder), Dist(rank, 4, CPU)) for rank in range(4)]
    assert len({loader.sample(60).tobytes() for loader in loaders}) == 1
    asked, other = (TokenLoader(knobs(folder), ALONE) for _ in range(2))
    asked.sample()
    assert asked.position == 0
    assert torch.equal(asked.next_batch()[0], other.next_batch()[0])


def test_train_and_val_take_their_own_shards_and_no_byte_sidecar(tmp_path):
    names = (
        "train_000001",
        "train_000000",
        "val_000001",
        "val_000000",
        "val_bytes_000000",
        "test_000000",
    )
    for name in names:
        write_shard(tmp_path / f"fineweb_{name}.bin", range(50))
    (tmp_path / "fineweb_train_000002.bin.tmp").write_bytes(b"half")
    for split in ("train", "val"):
        stems = [path.stem for path in train_gpt.list_shards(tmp_path, split)]
        assert stems == [f"fineweb_{split}_000000", f"fineweb_{split}_000001"]


def test_validation_joins_its_shards_in_order(tmp_path, tokenizer_path):
    write_shard(tmp_path / "fineweb_val_000001.bin", [7, 8])
    write_shard(tmp_path / "fineweb_val_000000.bin", [4, 5, 6])
    write_shard(tmp_path / "fineweb_train_000000.bin", [60_000] * 9)
    assert ValData.load(val_hp(tmp_path, tokenizer_path), CPU).tokens.tolist() == [4, 5, 6, 7, 8]


# ---- Byte sidecars


SIDECARS = {
    "000000": [0, 10, 65_535, 30],
    "000001": [40, 50],
    "000002": [0, 70],
}  # the first entry has no target


@pytest.fixture
def with_sidecars(tmp_path) -> Path:
    """Three validation shards of tokens 4, 5, ... with a sidecar each that gives them unlikely numbers of bytes."""
    token = itertools.count(4)
    for name, sizes in SIDECARS.items():
        write_shard(tmp_path / f"fineweb_val_{name}.bin", [next(token) for _ in sizes])
        write_shard(tmp_path / f"fineweb_val_bytes_{name}.bin", sizes)
    return tmp_path


@pytest.mark.parametrize("val_max_tokens", range(9))
def test_sidecars_give_every_target_its_bytes(with_sidecars, tokenizer_path, val_max_tokens):
    val = ValData.load(val_hp(with_sidecars, tokenizer_path, val_max_tokens=val_max_tokens), CPU)
    sizes, count = [size for sizes in SIDECARS.values() for size in sizes], val_max_tokens or 7
    assert val.target_bytes.tolist() == sizes[1 : min(count, 7) + 1]
    assert val.tokens.tolist() == list(range(4, 4 + min(count, 7) + 1))
    assert val.partial == (count < 7)
    assert val.target_bytes.dtype == torch.int32


def test_without_sidecars_the_bytes_are_those_of_the_tokenizer(with_sidecars, tokenizer_path):
    for path in with_sidecars.glob("fineweb_val_bytes_*.bin"):
        path.unlink()
    write_shard(with_sidecars / "fineweb_train_bytes_000000.bin", [99] * 8)
    val = ValData.load(val_hp(with_sidecars, tokenizer_path), CPU)
    assert val.target_bytes.tolist() == [1] * 7  # tokens 5 to 11 are byte tokens


BROKEN_SIDECARS = {
    "longer": (
        {"tokens": [40, 50, 60]},
        "fineweb_val_bytes_000001.bin: bytes of 3 tokens, but the shard has 2",
    ),
    "shorter": (
        {"tokens": [40]},
        "fineweb_val_bytes_000001.bin: bytes of 1 tokens, but the shard has 2",
    ),
    "missing": ({}, "without a sidecar of bytes, or the shard to it: fineweb_val_000001.bin"),
    "magic": ({"tokens": [40, 50], "magic": 1}, "magic is 1 instead of 20240520"),
    "version": ({"tokens": [40, 50], "version": 2}, "shard version 2, expected 1"),
    "count": ({"tokens": [40, 50], "count": 3}, "3 tokens do not make"),
}


@pytest.mark.parametrize("case", BROKEN_SIDECARS)
def test_a_sidecar_that_does_not_fit_its_shard_is_refused_in_one_line(
    with_sidecars, tokenizer_path, case
):
    changes, expected = BROKEN_SIDECARS[case]
    path = with_sidecars / "fineweb_val_bytes_000001.bin"
    assert len(ValData.load(val_hp(with_sidecars, tokenizer_path), CPU).target_bytes) == 7
    path.unlink()
    if changes:
        write_shard(path, **changes)
    with pytest.raises(Refusal) as caught:
        ValData.load(val_hp(with_sidecars, tokenizer_path), CPU)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert str(path.parent) in str(caught.value)


def test_a_sidecar_without_its_shard_is_refused(with_sidecars, tokenizer_path):
    (with_sidecars / "fineweb_val_000002.bin").unlink()
    with pytest.raises(Refusal, match=r"the shard to it: fineweb_val_000002\.bin$"):
        ValData.load(val_hp(with_sidecars, tokenizer_path), CPU)


def test_sidecars_whose_total_fits_but_not_shard_by_shard_are_refused(
    with_sidecars, tokenizer_path
):
    write_shard(with_sidecars / "fineweb_val_bytes_000000.bin", [1] * 2)
    write_shard(with_sidecars / "fineweb_val_bytes_000001.bin", [1] * 4)
    with pytest.raises(Refusal, match=r"bytes_000000\.bin: bytes of 2 tokens, but the shard has 4"):
        ValData.load(val_hp(with_sidecars, tokenizer_path), CPU)


# ---- Token ids outside the vocabulary


def test_a_token_outside_the_vocabulary_is_refused_by_the_sample(folder):
    inside, outside = (
        TokenLoader(knobs(folder, vocab_size=v), ALONE) for v in (sum(LENGTHS), sum(LENGTHS) - 1)
    )
    assert len(inside.sample()) == sum(LENGTHS)
    with pytest.raises(
        Refusal, match=r"fineweb_train_000002\.bin: token id 355 is outside VOCAB_SIZE=355"
    ):
        outside.sample()
    assert len(outside.sample(45)) == 45  # which ends before that token
    with pytest.raises(
        Refusal, match=r"fineweb_train_000000\.bin: token id 82 is outside VOCAB_SIZE=80"
    ):
        TokenLoader(knobs(folder, vocab_size=80), ALONE).sample()


def test_a_token_outside_the_vocabulary_is_refused_mid_stream_beyond_the_sample(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", range(99))
    write_shard(tmp_path / "fineweb_train_000001.bin", [*range(50), 100, *range(48)])
    loader = TokenLoader(knobs(tmp_path, vocab_size=100), ALONE)
    assert len(loader.sample(max_tokens=100)) == 100
    with pytest.raises(
        Refusal, match=r"fineweb_train_000001\.bin: token id 100 is outside VOCAB_SIZE=100"
    ):
        list(itertools.islice(iter(loader.next_batch, None), 10))
    fitting = TokenLoader(knobs(tmp_path, vocab_size=101), ALONE)
    assert len(list(itertools.islice(iter(fitting.next_batch, None), 10))) == 10


def test_a_token_outside_the_vocabulary_is_refused_by_validation(tmp_path, tokenizer_path):
    path = write_shard(tmp_path / "fineweb_val_000000.bin", [1, VOCAB_SIZE - 1])
    assert ValData.load(val_hp(tmp_path, tokenizer_path), CPU).tokens.tolist() == [
        1,
        VOCAB_SIZE - 1,
    ]
    write_shard(path, [1, VOCAB_SIZE])
    with pytest.raises(
        Refusal, match=rf"{path}: token id {VOCAB_SIZE} is outside VOCAB_SIZE={VOCAB_SIZE}"
    ):
        ValData.load(val_hp(tmp_path, tokenizer_path), CPU)


# ---- Broken input


BROKEN_SHARDS = {
    "magic": ({"magic": 20240521}, "magic is 20240521 instead of 20240520"),
    "version": ({"version": 2}, "shard version 2, expected 1"),
    "too_few_tokens": ({"count": 41}, "41 tokens"),
    "too_many_tokens": ({"count": 39}, "39 tokens"),
    "no_tokens": ({"count": 0}, " 0 tokens"),
    "negative_count": ({"count": -1}, "-1 tokens"),
    "odd_tail": ({"tail": b"\0"}, "1105 bytes"),
}


@pytest.mark.parametrize("case", BROKEN_SHARDS)
def test_a_broken_shard_is_refused_in_one_line_that_names_it(case, tmp_path):
    changes, expected = BROKEN_SHARDS[case]
    path = write_shard(tmp_path / "fineweb_train_000000.bin", range(40))
    assert train_gpt.load_data_shard(path).tolist() == list(range(40))
    write_shard(path, range(40), **changes)
    with pytest.raises(Refusal) as caught:
        TokenLoader(knobs(tmp_path), ALONE)
    assert str(caught.value).startswith(str(path))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("size", [0, 1, 11, 12, 1023])
def test_a_shard_shorter_than_its_header_is_refused(size, tmp_path):
    path = write_shard(tmp_path / "fineweb_train_000000.bin", range(40))
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(
        Refusal, match=rf"{path}: {size} bytes is shorter than the 1024-byte shard header"
    ):
        train_gpt.load_data_shard(path)


def test_missing_and_empty_folders_are_refused_by_name(tmp_path, tokenizer_path):
    write_shard(tmp_path / "full" / "fineweb_train_000000.bin", range(40))
    write_shard(tmp_path / "full" / "fineweb_val_bytes_000000.bin", range(40))
    (tmp_path / "empty").mkdir()
    assert TokenLoader(knobs(tmp_path / "full"), ALONE).num_windows == 4
    with pytest.raises(Refusal, match=r"missing: no such data folder \(DATA_PATH\)"):
        TokenLoader(knobs(tmp_path / "missing"), ALONE)
    with pytest.raises(Refusal, match=r"empty: no fineweb_train_\*\.bin shards \(DATA_PATH\)"):
        TokenLoader(knobs(tmp_path / "empty"), ALONE)
    with pytest.raises(Refusal, match=r"full: no fineweb_val_\*\.bin shards \(DATA_PATH\)"):
        ValData.load(val_hp(tmp_path / "full", tokenizer_path), CPU)


def test_training_data_too_short_for_a_sequence_is_refused(tmp_path):
    write_shard(tmp_path / "fineweb_train_000000.bin", range(2 * T - 1))
    with pytest.raises(
        Refusal, match=rf"no training shard holds two sequences of TRAIN_SEQ_LEN={T}"
    ):
        TokenLoader(knobs(tmp_path), ALONE)
    write_shard(tmp_path / "fineweb_train_000001.bin", range(2 * T))
    assert {window[0] < T for window in windows(knobs(tmp_path), 20)} == {True}


def test_a_validation_split_without_a_target_is_refused(tmp_path, tokenizer_path):
    write_shard(tmp_path / "fineweb_val_000000.bin", [1])
    with pytest.raises(Refusal, match="the validation split has no target to score"):
        ValData.load(val_hp(tmp_path, tokenizer_path), CPU)
    write_shard(tmp_path / "fineweb_val_000000.bin", [1, 5])
    assert len(ValData.load(val_hp(tmp_path, tokenizer_path), CPU).tokens) == 2


def test_a_tokenizer_of_another_size_is_refused(tmp_path, tokenizer_path):
    assert train_gpt.load_tokenizer(val_hp(tmp_path, tokenizer_path))[0].vocab_size() == VOCAB_SIZE
    with pytest.raises(
        Refusal, match=rf"tiny\.model has {VOCAB_SIZE} pieces, but VOCAB_SIZE={VOCAB_SIZE + 1}"
    ):
        train_gpt.load_tokenizer(
            replace(val_hp(tmp_path, tokenizer_path), vocab_size=VOCAB_SIZE + 1)
        )


def test_a_missing_tokenizer_is_refused_by_its_default_name_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refusal, match=r"nowhere\.model: no such tokenizer \(TOKENIZER_PATH\)"):
        train_gpt.load_tokenizer(val_hp(tmp_path, tmp_path / "nowhere.model"))
    with pytest.raises(Refusal, match=r"data/tokenizers/fineweb_512_bpe\.model: no such tokenizer"):
        train_gpt.load_tokenizer(Hyperparameters(vocab_size=512))
    (tmp_path / "data" / "tokenizers").mkdir(parents=True)
    (tmp_path / "data" / "tokenizers" / f"fineweb_{VOCAB_SIZE}_bpe.model").write_bytes(
        tiny_tokenizer()
    )
    assert (
        train_gpt.load_tokenizer(Hyperparameters(vocab_size=VOCAB_SIZE))[0].vocab_size()
        == VOCAB_SIZE
    )


@pytest.mark.parametrize("damage", ["text", "nul", "truncated"])
def test_a_damaged_tokenizer_is_refused_in_one_line(damage, tmp_path):
    path = tmp_path / "bad.model"
    path.write_bytes(
        {"text": b"garbage" * 100, "nul": b"\0", "truncated": tiny_tokenizer()[:1000]}[damage]
    )
    with pytest.raises(Refusal) as caught:
        train_gpt.load_tokenizer(val_hp(tmp_path, path))
    assert str(caught.value) == f"{path} is not a SentencePiece model (TOKENIZER_PATH)"


def test_an_empty_tokenizer_file_is_refused_without_noise_from_the_library(tmp_path, capfd):
    path = tmp_path / "empty.model"
    path.write_bytes(b"")
    with pytest.raises(Refusal) as caught:
        train_gpt.load_tokenizer(val_hp(tmp_path, path))
    assert str(caught.value) == f"{path} is not a SentencePiece model (TOKENIZER_PATH)"
    assert capfd.readouterr().err == ""


def test_a_tokenizer_without_a_piece_for_the_lone_space_is_refused(tmp_path, tokenizer_path):
    """Trained on text without a single space, SentencePiece learns no U+2581 piece."""
    glued = [text.replace(" ", "") for text in make_sentences(0, 200)]
    model = tokenize_docs.train_tokenizer(glued, VOCAB_SIZE)
    assert sentencepiece.SentencePieceProcessor(model_proto=model).piece_to_id("\u2581") == 3
    path = tmp_path / "glued.model"
    path.write_bytes(model)
    with pytest.raises(Refusal, match=r"glued\.model has no U\+2581 piece"):
        train_gpt.load_tokenizer(val_hp(tmp_path, path))
    train_gpt.load_tokenizer(val_hp(tmp_path, tokenizer_path))


# ---- Bytes


def processor(model: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def counted_bytes(sp: sentencepiece.SentencePieceProcessor, document: list[int]) -> int:
    return int(train_gpt.token_bytes(sp, np.array(document)).sum())


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_counted_bytes_are_the_bytes_of_the_decoded_document(text):
    sp = processor(tiny_tokenizer())
    assert counted_bytes(sp, [BOS, *sp.encode(text)]) == len(sp.decode(sp.encode(text)).encode())


def test_the_texts_reach_byte_fallback_lone_spaces_and_leading_spaces():
    sp = processor(tiny_tokenizer())
    ids = {i for text in TEXTS.values() for i in sp.encode(text)}
    assert any(sp.is_byte(i) for i in ids)
    assert sp.piece_to_id("\u2581") in ids
    assert any(len(sp.id_to_piece(i)) > 1 and sp.id_to_piece(i).startswith("\u2581") for i in ids)


@pytest.mark.skipif(not TOKENIZERS, reason="shared/data/tokenizers is not here")
@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.stem)
def test_counted_bytes_are_the_bytes_of_the_decoded_document_with_real_tokenizers(path):
    sp = processor(path.read_bytes())
    for text in [*TEXTS.values(), *make_sentences(4, 20)]:
        assert counted_bytes(sp, [BOS, *sp.encode(text)]) == len(
            sp.decode(sp.encode(text)).encode()
        ), text


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data is not here")
@pytest.mark.parametrize(
    "path", [*TOKENIZERS, None], ids=lambda path: path.stem if path else "tiny"
)
def test_counted_bytes_are_right_on_real_documents_in_a_row(path):
    """All of FineWeb's sample and 50 of Wikipedia, document by document within one stream."""
    sp = processor(path.read_bytes() if path else tiny_tokenizer())
    texts = list(tokenize_docs.read_documents([SHARED / "fineweb_val.jsonl.xz"]))
    assert len(texts) == 200
    texts += itertools.islice(tokenize_docs.read_documents([SHARED / "wiki_val.jsonl.xz"]), 50)
    documents = [[BOS, *sp.encode(text)] for text in texts]
    stream, ends = np.concatenate(documents), np.cumsum([len(document) for document in documents])
    assert sp.unk_id() not in stream  # with byte fallback nothing is unknown
    assert any(map(sp.is_byte, set(stream.tolist())))
    sizes = np.insert(train_gpt.token_bytes(sp, stream), 0, 0)
    counted = [int(part.sum()) for part in np.split(sizes, ends[:-1])]
    assert counted == [len(sp.decode(document[1:]).encode()) for document in documents]


@settings(max_examples=250, deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=4))
@example(texts=[" ", "", "  "])
@example(texts=["\u2581", "\u2581a", " \u2581"])
def test_counted_bytes_are_those_of_any_documents_in_a_row(texts):
    sp = processor(tiny_tokenizer())
    stream = [token for text in texts for token in [BOS, *sp.encode(text)]]
    assert counted_bytes(sp, stream) == sum(
        len(sp.decode(sp.encode(text)).encode()) for text in texts
    )


@pytest.mark.parametrize("remove_extra_whitespaces", [False, True])
def test_the_space_that_a_tokenizer_puts_before_every_document_has_no_bytes(
    remove_extra_whitespaces,
):
    """The challenge's tokenizers add none, SentencePiece's defaults do."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(make_sentences(0, 200)),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCAB_SIZE,
        byte_fallback=True,
        remove_extra_whitespaces=remove_extra_whitespaces,
        minloglevel=2,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    )
    sp = processor(model.getvalue())
    assert sp.id_to_piece(sp.encode("the")[0]).startswith("\u2581")
    for text in TEXTS.values():
        stream = [BOS, *sp.encode(text)]
        assert counted_bytes(sp, stream) == len(sp.decode(stream).encode()), text


@pytest.mark.parametrize("places", [[0], [3], [2, 3], [99]])
def test_an_unknown_token_has_no_bytes_and_parts_the_text_as_a_document_would(places):
    """SentencePiece decodes it as U+2047 between spaces, which were never in the text, so they must not be paid for."""
    sp = processor(tiny_tokenizer())
    text = sp.encode("abc, hello " + make_sentences(0, 1)[0])
    parts = np.split(text, np.minimum(places, len(text)))
    stream = [BOS, *itertools.chain(*([*part, sp.unk_id()] for part in parts))]
    expected = sum(len(sp.decode(part.tolist()).encode()) for part in parts)
    assert counted_bytes(sp, stream) == expected
    assert len(sp.decode(stream).encode()) > expected


def test_each_piece_has_its_own_bytes():
    sp = processor(tiny_tokenizer())
    letter = sp.piece_to_id("a")
    for i in range(sp.vocab_size()):
        piece, (after_text, after_bos) = (
            sp.id_to_piece(i),
            (counted_bytes(sp, [before, i]) for before in (letter, BOS)),
        )
        if i in (0, 1, 2, 3):
            assert (after_text, after_bos) == (0, 0)
        elif piece.startswith("<0x"):
            assert (after_text, after_bos) == (1, 1)
        else:
            assert after_text == len(piece.replace("\u2581", " ").encode())
            assert after_bos == len(piece.removeprefix("\u2581").encode())


def test_a_space_inside_a_piece_counts_one_byte():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["of the people by the people"] * 50),
        model_writer=model,
        model_type="bpe",
        vocab_size=30,
        split_by_whitespace=False,
        add_dummy_prefix=False,
        minloglevel=2,
        **{"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3},
    )
    sp = processor(model.getvalue())
    ids = sp.encode("of the people")
    assert any("\u2581" in sp.id_to_piece(i)[1:] for i in ids)
    assert counted_bytes(sp, [BOS, *ids]) == len("of the people")


def test_operators_of_a_lossless_transform_stand_for_no_bytes():
    model = io.BytesIO()
    options = {
        "pad_id": 0,
        "bos_id": 1,
        "eos_id": 2,
        "unk_id": 3,
        "minloglevel": 2,
        "model_type": "bpe",
    }
    sentences, symbols = iter(["of the people by the people"] * 50), ["\ue001", "\ue002x"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=model,
        vocab_size=25,
        user_defined_symbols=symbols,
        **options,
    )
    sp = processor(model.getvalue())
    ids = sp.encode("\ue001the \ue002xpeople")
    assert {sp.piece_to_id(symbol) for symbol in symbols} <= set(ids)
    assert counted_bytes(sp, [BOS, *ids]) == len("the xpeople")


@pytest.mark.parametrize(
    ("previous", "target", "expected"),
    [
        ("\u2581", "\u2581", 1),
        ("a", "\u2581", 1),
        ("a", "a", 1),
        ("a", BOS, 0),
        ("<0x41>", "\u2581", 1),
        ("<0xE2>", "<0x96>", 1),
        (BOS, "a", 1),
        (BOS, "\u2581", 0),
        (0, "\u2581", 0),
        (2, "\u2581", 0),
        (3, "\u2581", 0),
    ],
)
def test_a_leading_space_counts_unless_it_follows_a_boundary_token(previous, target, expected):
    sp = processor(tiny_tokenizer())
    ids = [
        sp.piece_to_id(piece) if isinstance(piece, str) else piece for piece in (previous, target)
    ]
    assert counted_bytes(sp, ids) == expected


def test_a_generated_data_set_decodes_to_its_sentences_and_scores_their_bytes(tmp_path):
    dataset = write_dataset(tmp_path / "set", val_seed=9, val_docs=5)
    val = ValData.load(Hyperparameters.from_env(cli_env(dataset)), CPU)
    assert int(val.target_bytes.sum()) == sum(map(len, make_sentences(9, 5)))
    assert int((val.tokens == BOS).sum()) == 5
