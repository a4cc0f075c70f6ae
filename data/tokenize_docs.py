"""Turn documents into a tokenizer, token shards and a manifest in the challenge's layout.

  python data/tokenize_docs.py --train a.jsonl.xz b.jsonl --val c.jsonl.xz \\
      --tokenizer fineweb_1024_bpe.model --output data --name fineweb10B_sp1024
  python data/tokenize_docs.py --train docs.jsonl.zst --num-val-docs 50000 \\
      --train-tokenizer 1024 --name mine_sp1024

Inputs are .jsonl files with {"text": ...} on every line, plain, .gz, .xz or .zst, .txt and .md
files, or folders of those. Formats are in data/README.md.
"""

import argparse
import collections
import gzip
import io
import itertools
import json
import lzma
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import sentencepiece
import zstandard

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_gpt
from train_gpt import ConfigError, Progress, require, run_entry_point, write_atomically

SPECIAL_IDS = (0, 1, 2, 3)  # of padding, BOS, EOS and unknown; the challenge's shards assume these
SPACE_PIECE = "\u2581"
MAX_PIECES = 1 << 16  # shards store uint16
DEFAULT_SHARD_TOKENS = 100_000_000
HEADER_TOKENS = train_gpt.SHARD_HEADER_INTS * 2  # the int32 header seen as uint16
TEXT_SUFFIXES = (".txt", ".md")
DAMAGE = (gzip.BadGzipFile, zlib.error, lzma.LZMAError, zstandard.ZstdError)
CHUNK_BYTES = 1 << 18
MAX_JSON_BYTES = 1 << 20  # of a manifest; as Python objects, text takes up to 50 times its size
BATCH_DOCS = 64  # enough work for every thread of one encode call, and little memory


@dataclass(frozen=True)
class Destination:
    """Final names of one dataset and of its tokenizer below `output`."""

    output: Path
    name: str
    tokenizer_name: str
    overwrite: bool = False
    shard_tokens: int = DEFAULT_SHARD_TOKENS

    @property
    def folder(self) -> Path:
        return self.output / "datasets" / self.name

    @property
    def model_path(self) -> Path:
        return self.output / "tokenizers" / f"{self.tokenizer_name}.model"

    def shards(self) -> list[Path]:
        """Return what a trainer's globs would read, byte sidecars of the validation split too."""
        train = self.folder.glob("fineweb_train_*.bin")
        return sorted([*train, *self.folder.glob("fineweb_val_*.bin")])

    def check_free(self, model: bytes | None = None) -> None:
        """Refuse to replace shards, or a tokenizer other than `model`, unasked."""
        for name in (self.name, self.tokenizer_name):
            require(Path(name).name == name, f"{name!r} is not a plain folder or file name")
        if self.overwrite:
            return
        old = len(self.shards())
        require(old == 0, f"{self.folder} already holds {old} shards; --overwrite replaces them")
        if model is not None and self.model_path.exists():
            same = self.model_path.read_bytes() == model
            require(same, f"{self.model_path} is another tokenizer; --overwrite replaces it")


def summary(split: str, counts: collections.Counter) -> str:
    """Return one line for people; text is counted before SentencePiece normalises it."""
    return (
        f"{split}: {counts['docs']:,} documents ({counts['empty']:,} empty ones skipped), "
        f"{counts['tokens']:,} tokens, {counts['bytes']:,} bytes of text, "
        f"{counts['tokens'] / counts['bytes']:.4f} tokens/byte, {counts['files']:,} shard(s)"
    )


def expand_inputs(paths: Iterable[Path]) -> list[Path]:
    """Return files in reading order, a folder's .txt and .md files sorted. Raises ConfigError."""
    files: list[Path] = []
    for path in paths:
        require(path.exists(), f"{path}: no such file or folder")
        if not path.is_dir():
            files.append(path)
            continue
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES)
        require(bool(found), f"{path}: no .txt or .md file in this folder")
        files += found
    return files


def frame_lines(raw: BinaryIO, new_frame: Callable) -> Iterator[bytes]:
    """Yield the lines of all frames in `raw`. Raises EOFError when the last one is cut short.

    The libraries' own files lose text in silence: lzma.open() what follows padding or a damaged
    frame, zstandard.open() what follows the first frame, and half a frame is a file to it.
    """
    frame = None
    rest = b""
    while data := raw.read(CHUNK_BYTES):
        if frame is None:
            data = data.lstrip(b"\0")
        while data:
            if frame is None:
                frame = new_frame()
            *lines, rest = (rest + frame.decompress(data)).split(b"\n")
            yield from lines
            data = b""
            if frame.eof:
                data = frame.unused_data.lstrip(b"\0")
                frame = None
    if frame is not None:
        raise EOFError
    yield rest


def decode_utf8(data: bytes, where: str) -> str:
    """Decode strict UTF-8 without the byte-order mark that Windows adds. Raises ConfigError."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{where}: invalid UTF-8 at byte {error.start}") from error


def parse_line(line: bytes, where: str) -> str:
    """Return the "text" of one JSON line. Raises ConfigError naming `where`."""
    try:
        record = json.loads(decode_utf8(line, where))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: malformed JSON: {error}") from error
    require(isinstance(record, dict) and "text" in record, f'{where}: no "text" key')
    text = record["text"]
    kind = type(text).__name__
    require(isinstance(text, str), f'{where}: "text" is a {kind}, not a string')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{where}: invalid UTF-8: half of a surrogate pair") from error
    return text


def parse_documents(path: Path, raw: BinaryIO) -> Iterator[str]:
    """Yield the texts of one open file. Raises ConfigError naming file and line."""
    if path.suffix.lower() in TEXT_SUFFIXES:
        yield decode_utf8(raw.read(), str(path))
        return

    lines: Iterable[bytes] = raw
    if path.suffix == ".gz":
        lines = gzip.GzipFile(fileobj=raw)
    elif path.suffix == ".xz":
        lines = frame_lines(raw, lzma.LZMADecompressor)
    elif path.suffix == ".zst":
        # Its windows may be as large as those of `zstd --long=31`.
        lines = frame_lines(raw, zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj)
    number = 0
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield parse_line(line, f"{path}:{number}")
    except EOFError as error:
        raise ConfigError(f"{path}:{number + 1}: truncated {path.suffix} file") from error
    except DAMAGE as error:
        raise ConfigError(f"{path}:{number + 1}: damaged {path.suffix} file: {error}") from error


def read_documents(files: list[Path]) -> Iterator[str]:
    """Yield the texts of all documents in order, one in memory at a time. Raises ConfigError."""
    finished = 0
    with Progress("reading", sum(path.stat().st_size for path in files)) as progress:
        for path in files:
            with open(path, "rb") as raw:
                for text in parse_documents(path, raw):
                    yield text
                    progress.update(finished + raw.tell(), path.name)
            finished += path.stat().st_size


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> bytes:
    """Train a SentencePiece BPE model of exactly `vocab_size` pieces, and return it serialized.

    The trainer holds its text in memory. Equal texts give equal bytes. The settings are those of
    download_hf_docs_and_tokenize.py in openai/parameter-golf, with a hard limit of pieces and none
    of length. Raises ConfigError.
    """
    # The trainer drops a whole document for one NUL.
    sentences = [text.replace("\0", " ") for text in texts]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=True,
            character_coverage=0.999,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="nmt_nfkc",
            add_dummy_prefix=False,
            max_sentence_length=1 << 30,  # bytes; by default, documents over 4,192 are dropped
            pad_id=SPECIAL_IDS[0],
            bos_id=SPECIAL_IDS[1],
            eos_id=SPECIAL_IDS[2],
            unk_id=SPECIAL_IDS[3],
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = " ".join(str(error).rsplit("]", 1)[-1].split()) or "no text to learn from"
        raise ConfigError(f"cannot train a tokenizer of {vocab_size} pieces: {reason}") from error
    return model.getvalue()


def load_tokenizer(model: bytes, name: str) -> sentencepiece.SentencePieceProcessor:
    """Load a serialized model and check what shards and byte counts rely on. Raises ConfigError."""
    tokenizer = sentencepiece.SentencePieceProcessor()
    try:
        loaded = bool(model) and tokenizer.LoadFromSerializedProto(model)
    except RuntimeError:
        loaded = False
    require(loaded, f"{name}: not a SentencePiece model")

    pieces = tokenizer.vocab_size()
    require(pieces <= MAX_PIECES, f"{name}: {pieces:,} pieces do not fit the uint16 of a shard")
    ids = (tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id())
    expected = f"the challenge needs {SPECIAL_IDS}"
    require(ids == SPECIAL_IDS, f"{name}: special ids (pad, bos, eos, unk) are {ids}, {expected}")

    # Without it a lone space counts as the three bytes of U+2581 (openai/parameter-golf #897).
    space = tokenizer.piece_to_id(SPACE_PIECE)
    usable = not (tokenizer.is_unknown(space) or tokenizer.is_unused(space))
    usable = usable and not tokenizer.is_control(space)
    require(usable, f"{name}: no piece for a space alone (U+2581), so bytes would be miscounted")
    return tokenizer


class ShardWriter:
    """Packs one split into shards, and counts; a document may continue in the next shard."""

    def __init__(self, folder: Path, split: str, shard_tokens: int):
        self.folder = folder
        self.split = split
        self.shard = np.zeros(HEADER_TOKENS + shard_tokens, dtype="<u2")
        self.end = HEADER_TOKENS
        self.counts = collections.Counter()

    def encode(
        self, texts: Iterable[str], tokenizer: sentencepiece.SentencePieceProcessor, threads: int
    ) -> None:
        """Write every document that has any text as BOS + tokens."""
        texts = iter(texts)
        while batch := list(itertools.islice(texts, BATCH_DOCS)):
            encoded = tokenizer.encode(batch, add_bos=True, num_threads=threads)
            for text, ids in zip(batch, encoded, strict=True):
                if len(ids) == 1:
                    self.counts["empty"] += 1
                    continue
                self.counts["docs"] += 1
                self.counts["bytes"] += len(text.encode())
                self.add(np.array(ids, dtype="<u2"))
        self.flush()

    def add(self, tokens: np.ndarray) -> None:
        """Append (n,) token ids, writing every shard that becomes full."""
        self.counts["tokens"] += len(tokens)
        while len(tokens):
            taken = tokens[: len(self.shard) - self.end]
            self.shard[self.end : self.end + len(taken)] = taken
            self.end += len(taken)
            tokens = tokens[len(taken) :]
            if self.end == len(self.shard):
                self.flush()

    def flush(self) -> None:
        """Write the tokens held so far as one shard, if there are any."""
        count = self.end - HEADER_TOKENS
        if not count:
            return
        header = (train_gpt.SHARD_MAGIC, train_gpt.SHARD_VERSION, count)
        self.shard[:HEADER_TOKENS].view("<i4")[:3] = header
        path = self.folder / f"fineweb_{self.split}_{self.counts['files']:06d}.bin"
        write_atomically(path, self.shard[: self.end].tobytes())
        self.end = HEADER_TOKENS
        self.counts["files"] += 1


def write_dataset(
    destination: Destination, model: bytes, texts: dict[str, Iterable[str]], threads: int
) -> dict[str, collections.Counter]:
    """Write tokenizer and shards; return the counts of each split of `texts`. Raises ConfigError.

    Nothing has its final name before all is complete, and no shard of an older dataset stays.
    """
    destination.check_free(model)
    tokenizer = load_tokenizer(model, destination.tokenizer_name)
    staging = destination.folder.with_name(f".{destination.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    stats = {}
    try:
        staging.mkdir(parents=True)
        for split, documents in texts.items():
            writer = ShardWriter(staging, split, destination.shard_tokens)
            writer.encode(documents, tokenizer, threads)
            stats[split] = writer.counts
            require(stats[split]["docs"] > 0, f"the {split} split has no document with text")
        write_atomically(destination.model_path, model)
        destination.folder.mkdir(exist_ok=True)
        # Old shards go first: an interruption here may leave few shards, never mixed ones.
        for path in destination.shards():
            path.unlink()
        for path in sorted(staging.iterdir()):
            os.replace(path, destination.folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return stats


def parse_manifest(data: bytes, source: str) -> dict:
    """Return a manifest with lists of named datasets and tokenizers. Raises ConfigError."""
    what = f"{source}: not a manifest of datasets and tokenizers"
    try:
        manifest = json.loads(data)
        names = [entry["name"] for key in ("datasets", "tokenizers") for entry in manifest[key]]
        # What is nested too deeply to be written again is to fail before the work.
        json.dumps(manifest, indent=2)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{what}: {error!r}") from error
    for name in names:
        require(isinstance(name, str) and name.isprintable(), f"{what}: the name {name!r}")
    return manifest


def read_manifest(path: Path) -> dict:
    """Return the manifest at `path`, with empty lists when there is none. Raises ConfigError."""
    if not path.exists():
        return {"datasets": [], "tokenizers": []}
    readable = path.is_file() and path.stat().st_size <= MAX_JSON_BYTES
    require(readable, f"{path}: not a file of at most {MAX_JSON_BYTES:,} bytes")
    return parse_manifest(path.read_bytes(), str(path))


def write_manifest(
    destination: Destination, stats: dict[str, collections.Counter], vocab_size: int, inputs: dict
) -> None:
    """Add dataset and tokenizer to the manifest, in the challenge's keys; other entries stay."""
    name, tokenizer_name = destination.name, destination.tokenizer_name
    kind = "sentencepiece_bpe"
    spec = {"name": tokenizer_name, "kind": kind, "vocab_size": vocab_size}
    spec["dataset_suffix"] = f"sp{vocab_size}"
    shared = {"vocab_size": vocab_size, "bos_id": SPECIAL_IDS[1], "eos_id": SPECIAL_IDS[2]}
    shared["recommended_bigram_vocab_size"] = -(-vocab_size // 128) * 128 * 5

    totals = {}
    for unit in ("docs", "files", "tokens"):
        for split in ("train", "val"):
            totals[f"{unit}_{split}"] = stats[split][unit]
        totals[f"{unit}_total"] = stats["train"][unit] + stats["val"][unit]

    tokenizer = {"name": tokenizer_name, "kind": kind, **shared, "source_spec": spec}
    tokenizer["model_path"] = f"tokenizers/{tokenizer_name}.model"
    dataset = {
        "name": name,
        "tokenizer_name": tokenizer_name,
        "tokenizer_kind": kind,
        "path": f"datasets/{name}",
        "train_glob": f"datasets/{name}/fineweb_train_*.bin",
        "val_glob": f"datasets/{name}/fineweb_val_*.bin",
        **shared,
        "stats": totals,
    }
    path = destination.output / "manifest.json"
    old = read_manifest(path)
    tokenizers = [entry for entry in old["tokenizers"] if entry["name"] != tokenizer_name]
    datasets = [entry for entry in old["datasets"] if entry["name"] != name]
    manifest = {
        "version": "local",
        "num_docs": totals["docs_total"],
        "num_val_docs": totals["docs_val"],
        "shuffle_seed": None,
        "shard_size": destination.shard_tokens,
        "append_eos": False,
        "docs_jsonl": inputs["train"][0],
        "docs_meta": inputs,
        "tokenizer_specs": [spec],
        "tokenizers": [*tokenizers, tokenizer],
        "datasets": [*datasets, dataset],
    }
    write_atomically(path, (json.dumps(manifest, indent=2) + "\n").encode())


def positive_int(text: str) -> int:
    """Parse an integer of at least 1, for argparse."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the options of the command line; a wrong one exits with status 2 and the usage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", type=Path, nargs="+", required=True, metavar="FILE", help="training documents")
    val = parser.add_mutually_exclusive_group(required=True).add_argument
    val("--val", type=Path, nargs="+", metavar="FILE", help="validation documents")
    val("--num-val-docs", type=positive_int, metavar="N", help="instead: the first N of --train")
    tokenizer = parser.add_mutually_exclusive_group(required=True).add_argument
    tokenizer("--tokenizer", type=Path, metavar="MODEL", help="SentencePiece model to reuse")
    tokenizer("--train-tokenizer", type=positive_int, metavar="PIECES", help="instead: a new one")
    add("--tokenizer-train-docs", type=positive_int, metavar="N", help="on the first N documents")
    output = Path(__file__).resolve().parent
    add("--output", type=Path, default=output, metavar="FOLDER", help="default: %(default)s")
    add("--name", required=True, help="dataset name, for example fineweb10B_sp1024")
    add("--tokenizer-name", metavar="NAME", help="default: of --tokenizer, or <dataset name>_bpe")
    add("--shard-tokens", type=positive_int, default=DEFAULT_SHARD_TOKENS, metavar="N")
    add("--threads", type=positive_int, default=os.cpu_count() or 1, metavar="N")
    add("--overwrite", action="store_true", help="replace the shards that the dataset folder holds")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the command line; `argv` defaults to the process's own arguments. Raises ConfigError."""
    args = parse_arguments(argv)
    train_files = expand_inputs(args.train)
    val_files = expand_inputs(args.val or [])

    # A file of both splits would be trained on and then scored.
    counts = collections.Counter(path.resolve() for path in train_files + val_files)
    path, count = counts.most_common(1)[0]
    require(count == 1, f"{path}: given {count} times; a file belongs to one split, once")

    model_name = args.tokenizer.stem if args.tokenizer else f"{args.name}_bpe"
    destination = Destination(
        args.output, args.name, args.tokenizer_name or model_name, args.overwrite, args.shard_tokens
    )
    destination.check_free()
    read_manifest(args.output / "manifest.json")
    limited = args.tokenizer_train_docs is not None
    require(not limited or not args.tokenizer, "--tokenizer-train-docs needs --train-tokenizer")

    if args.tokenizer:
        model = args.tokenizer.read_bytes()
    else:
        pieces = args.train_tokenizer
        print(f"training a tokenizer of {pieces:,} pieces on the training split", flush=True)
        texts = itertools.islice(read_documents(train_files), args.num_val_docs or 0, None)
        model = train_tokenizer(itertools.islice(texts, args.tokenizer_train_docs), pieces)
    vocab_size = load_tokenizer(model, str(args.tokenizer or model_name)).vocab_size()

    # Validation is read first, because it may be the beginning of the training files.
    train_texts = read_documents(train_files)
    val_texts = read_documents(val_files)
    if args.num_val_docs:
        val_texts = itertools.islice(train_texts, args.num_val_docs)
    texts = {"val": val_texts, "train": train_texts}
    stats = write_dataset(destination, model, texts, args.threads)
    inputs = {"train": [str(p) for p in args.train], "val": [str(p) for p in args.val or []]}
    write_manifest(destination, stats, vocab_size, inputs)
    for split, counts in stats.items():
        print(summary(split, counts))
    print(f"wrote {destination.folder} and {destination.model_path}")


if __name__ == "__main__":
    run_entry_point(main)
