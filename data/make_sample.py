"""Make the small data set `sample_sp1024` without a network, from documentation that pip already installed.

  python data/make_sample.py

The text is the docstrings of torch, numpy, sympy and networkx, read with `ast` from their source files without
importing them. One module is one document; one in seventeen is set aside for validation, and dropped where it repeats
training text. The same versions of the packages give byte-identical shards and tokenizer.
"""

import argparse
import ast
import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing
import os
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import tokenize_docs

from train_gpt import Progress, Refusal, run_entry_point, write_atomically

PACKAGES = ("torch", "numpy", "sympy", "networkx")
SKIPPED_FOLDERS = {"tests", "test", "_internal"}  # hardly any docstring in a fifth of the source
DATASET, TOKENIZER, VOCAB_SIZE = "sample_sp1024", "sample_1024_bpe", 1024
SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.5  # of a docstring's shingles seen before: drop the docstring
MAX_SHARED_SHARE = (
    0.02  # of a validation document's shingles that training also has: drop the document
)
VAL_PER_MILLE = 60


@dataclass(frozen=True)
class Package:
    """An installed package: folder of its source and its version."""

    name: str
    root: Path
    version: str


def installed_packages(names: tuple[str, ...] = PACKAGES) -> list[Package]:
    """Where each package lies, without importing it. Raises Refusal naming one that is not installed."""
    packages = []
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            raise Refusal(
                f"package {name} is not installed, and the sample is made from it: pip install {name}"
            )
        root = Path(next(iter(spec.submodule_search_locations)))
        packages.append(Package(name, root, importlib.metadata.version(name)))
    return packages


def module_name(package: Package, path: Path) -> str:
    """Dotted name, which does not depend on where the package is installed."""
    return ".".join([package.name, *path.relative_to(package.root).with_suffix("").parts])


def read_docstrings(path: Path) -> list[str]:
    """Cleaned docstrings of one source file in order; none if this Python cannot parse the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [
        ast.get_docstring(node, clean=False)
        for node in ast.walk(tree)
        if isinstance(node, documented)
    ]
    cleaned = [inspect.cleandoc(text).encode(errors="ignore").decode() for text in found if text]
    return [text for text in cleaned if text]


def read_modules(packages: list[Package], processes: int) -> dict[str, list[str]]:
    """Docstrings of every documented module, in the order of module names. Raises Refusal if there are none."""
    paths = {
        module_name(package, path): path
        for package in packages
        for path in package.root.rglob("*.py")
        if not SKIPPED_FOLDERS.intersection(path.relative_to(package.root).parts)
    }
    names = sorted(paths)
    progress = Progress("reading docstrings", len(names))
    modules = {}
    with contextlib.ExitStack() as stack:
        read = map
        if processes > 1:
            # spawn, because forking a process in which torch has started threads can hang
            pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(processes))
            read = functools.partial(pool.imap, chunksize=32)
        found = read(read_docstrings, [paths[name] for name in names])
        for done, (name, docstrings) in enumerate(zip(names, found, strict=True), 1):
            if docstrings:
                modules[name] = docstrings
            progress.update(done, "modules")
    if not modules:
        raise Refusal(f"no docstring in {', '.join(str(package.root) for package in packages)}")
    return modules


def stable_hash(name: str) -> int:
    """32-bit hash that is the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def is_validation(name: str) -> bool:
    """Split of a module, by its name alone."""
    return stable_hash(name) % 1000 < VAL_PER_MILLE


def shingles(text: str) -> set[int]:
    """64-bit hashes of all runs of SHINGLE_WORDS words; a shorter text is one run."""
    words = text.lower().split()
    runs = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {
        int.from_bytes(
            hashlib.blake2b(
                " ".join(words[i : i + SHINGLE_WORDS]).encode(), digest_size=8
            ).digest(),
            "big",
        )
        for i in runs
    }


def share_within(part: set[int], whole: set[int]) -> float:
    """Share of `part` that is in `whole`, 0 to 1."""
    return len(part & whole) / max(len(part), 1)


def without_near_duplicates(docstrings: list[str], seen: set[int]) -> list[str]:
    """The docstrings that are new to `seen`, which learns their shingles."""
    kept = []
    for text in docstrings:
        found = shingles(text)
        if share_within(found, seen) <= NEAR_DUPLICATE_SHARE:
            kept.append(text)
            seen |= found
    return kept


def split_documents(modules: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """(training, validation) documents by module name, no near-duplicate in both.

    Training takes its pick first, so that a text found on both sides stays out of validation. The order is shuffled:
    by name, a short run would train on one package and validate on all.
    """
    names = sorted(modules, key=stable_hash)
    seen: set[int] = set()
    training, validation = {}, {}
    for name in names:
        if not is_validation(name):
            text = "\n\n".join(without_near_duplicates(modules[name], seen))
            if text:
                training[name] = text
    in_training = frozenset(seen)
    for name in names:
        if is_validation(name):
            text = "\n\n".join(without_near_duplicates(modules[name], seen))
            if text and share_within(shingles(text), in_training) <= MAX_SHARED_SHARE:
                validation[name] = text
    return training, validation


def fingerprint(packages: list[Package]) -> dict[str, str]:
    """What the bytes of the sample depend on: versions of the packages and of the code that reads them."""
    scripts = (Path(__file__), Path(tokenize_docs.__file__))
    versions = {package.name: package.version for package in packages}
    versions["sentencepiece"] = importlib.metadata.version("sentencepiece")
    versions["python"] = ".".join(
        map(str, sys.version_info[:2])
    )  # its grammar decides which files parse
    return versions | {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in scripts}


def file_sizes(destination: tokenize_docs.Destination) -> dict[str, int]:
    """Bytes of every file of the sample, by its path below the output folder."""
    paths = [path for path in [*destination.shards(), destination.model_path] if path.exists()]
    return {path.relative_to(destination.output).as_posix(): path.stat().st_size for path in paths}


def is_cached(
    stamp_path: Path, destination: tokenize_docs.Destination, made_by: dict[str, str]
) -> bool:
    """Whether the stamp, which is written last, names this maker and the files that are there."""
    try:
        stamp = json.loads(stamp_path.read_bytes())
    except (OSError, ValueError):
        return False
    return stamp == {"made_by": made_by, "files": file_sizes(destination)}


def make_sample(output: Path, packages: list[Package], processes: int) -> None:
    """Write tokenizer and shards of the sample below `output`, unless they are there already. Raises Refusal."""
    started = time.perf_counter()
    destination = tokenize_docs.Destination(output, DATASET, TOKENIZER, overwrite=True)
    stamp_path = destination.folder / "sample.json"
    made_by = fingerprint(packages)
    if is_cached(stamp_path, destination, made_by):
        print(f"{destination.folder} is complete and made by these versions; nothing to do")
        return
    print(
        f"reading the docstrings of {', '.join(f'{p.name} {p.version}' for p in packages)}",
        flush=True,
    )
    training, validation = split_documents(read_modules(packages, processes))
    print(f"training a tokenizer of {VOCAB_SIZE:,} pieces on the training split", flush=True)
    model = tokenize_docs.train_tokenizer(training.values(), VOCAB_SIZE)
    stamp_path.unlink(missing_ok=True)
    stats = tokenize_docs.write_dataset(
        destination, model, validation.values(), training.values(), processes
    )
    stamp = {"made_by": made_by, "files": file_sizes(destination)}
    write_atomically(stamp_path, (json.dumps(stamp, indent=2) + "\n").encode())
    for split, part in stats.items():
        print(part.line(split))
    print(
        f"wrote {destination.folder} and {destination.model_path} in {time.perf_counter() - started:.1f} seconds"
    )


def main(argv: list[str] | None = None) -> None:
    """Command line; `argv` defaults to the process's own arguments. Raises Refusal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(__file__).resolve().parent
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FOLDER", help="default: %(default)s"
    )
    args = parser.parse_args(argv)
    with tokenize_docs.refuse_os_errors():
        make_sample(args.output, installed_packages(), min(os.cpu_count() or 1, 8))


if __name__ == "__main__":
    run_entry_point(main)
