"""Make the small data set `sample_sp1024` without a network, from documentation that is installed.

  python data/make_sample.py

The text is the docstrings of torch, numpy, sympy and networkx, read with `ast`, one module a
document. Equal versions of the packages give byte-identical shards and tokenizer. A sample that is
there is kept.
"""

import ast
import hashlib
import importlib.util
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import tokenize_docs

from train_gpt import Progress, require, run_entry_point

PACKAGES = ("torch", "numpy", "sympy", "networkx")
SKIPPED_FOLDERS = {"tests", "test", "_internal"}  # hardly any docstring in a fifth of the source
VOCAB_SIZE = 1024
SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.5  # of a docstring's shingles that were seen before
MAX_SHARED_SHARE = 0.02  # of a validation document's shingles that training has, too
VAL_PER_MILLE = 60


def installed_packages(names: Iterable[str] = PACKAGES) -> dict[str, Path]:
    """Return by name where each package lies, without importing it. Raises ConfigError."""
    roots = {}
    for name in names:
        spec = importlib.util.find_spec(name)
        found = spec is not None and spec.submodule_search_locations
        require(bool(found), f"package {name} is not installed: pip install {name}")
        roots[name] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def read_docstrings(path: Path) -> list[str]:
    """Return the cleaned docstrings of a file in order; none if this Python cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return []
    docstrings = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node) or ""
            docstrings.append(text.encode(errors="ignore").decode())
    return [text for text in docstrings if text]


def read_modules(packages: dict[str, Path]) -> dict[str, list[str]]:
    """Return the docstrings of every documented module by dotted name, in order of the names."""
    paths = {}
    for package, root in packages.items():
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not SKIPPED_FOLDERS.intersection(inside.parts):
                paths[".".join([package, *inside.with_suffix("").parts])] = path

    modules = {}
    with Progress("reading docstrings", len(paths)) as progress:
        for done, name in enumerate(sorted(paths), 1):
            docstrings = read_docstrings(paths[name])
            if docstrings:
                modules[name] = docstrings
            progress.update(done, "modules")
    require(bool(modules), f"no docstring in {', '.join(map(str, packages.values()))}")
    return modules


def stable_hash(name: str) -> int:
    """Return a 32-bit hash that is the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def is_validation(name: str) -> bool:
    """Tell the split of a module, by its name alone."""
    return stable_hash(name) % 1000 < VAL_PER_MILLE


def shingles(text: str) -> set[int]:
    """Return 64-bit hashes of all runs of SHINGLE_WORDS words; a shorter text is one run."""
    words = text.lower().split()
    hashes = set()
    for start in range(max(1, len(words) - SHINGLE_WORDS + 1)):
        run = " ".join(words[start : start + SHINGLE_WORDS]).encode()
        hashes.add(int.from_bytes(hashlib.blake2b(run, digest_size=8).digest(), "big"))
    return hashes


def share_within(part: set[int], whole: set[int]) -> float:
    """Return the share of `part` that is in `whole`, 0 to 1."""
    return len(part & whole) / max(len(part), 1)


def new_text(docstrings: list[str], seen: set[int]) -> str:
    """Join the docstrings that are new to `seen`, which learns their shingles."""
    kept = []
    for text in docstrings:
        found = shingles(text)
        if share_within(found, seen) <= NEAR_DUPLICATE_SHARE:
            kept.append(text)
            seen |= found
    return "\n\n".join(kept)


def split_documents(modules: dict[str, list[str]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return (training, validation) documents by module name, no near-duplicate in both.

    Training takes its pick first, so that a text found on both sides stays out of validation. The
    order is by hash: by name, a short run would train on one package and validate on all.
    """
    names = sorted(modules, key=stable_hash)
    seen: set[int] = set()
    training = {name: new_text(modules[name], seen) for name in names if not is_validation(name)}
    training = {name: text for name, text in training.items() if text}

    in_training = frozenset(seen)
    validation = {}
    for name in names:
        if is_validation(name):
            text = new_text(modules[name], seen)
            if text and share_within(shingles(text), in_training) <= MAX_SHARED_SHARE:
                validation[name] = text
    return training, validation


def make_sample(output: Path, packages: dict[str, Path]) -> None:
    """Write the sample below `output`, unless it is there already. Raises ConfigError."""
    sample = tokenize_docs.Destination(output, "sample_sp1024", "sample_1024_bpe")
    # The folder has its name when all is complete.
    if sample.folder.exists():
        tokenize_docs.say(f"{sample.folder} is complete; nothing to do")
        return

    tokenize_docs.say(f"reading the docstrings of {', '.join(packages)}")
    training, validation = split_documents(read_modules(packages))
    tokenize_docs.say(f"training a tokenizer of {VOCAB_SIZE:,} pieces on the training split")
    model = tokenize_docs.train_tokenizer(training.values(), VOCAB_SIZE)
    tokenize_docs.write_dataset(sample, model, validation.values(), training.values())


def main() -> None:
    """Make the sample in this folder. Raises ConfigError."""
    arguments = " ".join(sys.argv[1:])
    require(not arguments, f"{arguments}: no arguments; the sample is made beside this script")
    make_sample(Path(__file__).resolve().parent, installed_packages())


if __name__ == "__main__":
    run_entry_point(main)
