"""Make the small data set `sample_sp1024` without a network, from documentation that is installed.

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
from tokenize_docs import say, train_tokenizer, write_dataset

from train_gpt import Progress, require, run_entry_point

PACKAGES = ("torch", "numpy", "sympy", "networkx")
SKIPPED_FOLDERS = {"tests", "test", "_internal"}  # hardly any docstring in a fifth of the source
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
VOCAB_SIZE = 1024
SHINGLE_WORDS = 8
NEAR_DUPLICATE_SHARE = 0.5  # of a docstring's shingles that were seen before
MAX_SHARED_SHARE = 0.02  # of a validation document's shingles that training has, too
VAL_PER_MILLE = 60


def read_docstrings(path: Path) -> list[str]:
    """Return the cleaned docstrings of a file in order; none if this Python cannot parse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            return []
    nodes = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    texts = [ast.get_docstring(node) or "" for node in nodes]
    return [text.encode(errors="ignore").decode() for text in texts if text]


def read_modules(packages: Iterable[str]) -> dict[str, list[str]]:
    """Return the docstrings of every module by dotted name, in order. Raises ConfigError."""
    paths = {}
    for package in packages:
        spec = importlib.util.find_spec(package)  # which does not import it
        require(
            bool(spec and spec.origin), f"package {package} is not installed: pip install {package}"
        )
        root = Path(spec.origin).parent
        for path in root.rglob("*.py"):
            inside = path.relative_to(root)
            if not SKIPPED_FOLDERS.intersection(inside.parts):
                paths[".".join([package, *inside.with_suffix("").parts])] = path

    modules = {}
    with Progress("reading docstrings", len(paths)) as progress:
        for done, name in enumerate(sorted(paths), 1):
            modules[name] = read_docstrings(paths[name])
            progress.update(done, "modules")
    return modules


def stable_hash(name: str) -> int:
    """Return a 32-bit hash that is the same in every process, unlike hash()."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def shingles(text: str) -> set[int]:
    """Return 64-bit hashes of all runs of SHINGLE_WORDS words; a shorter text is one run."""
    words = text.lower().split()
    starts = range(max(1, len(words) - SHINGLE_WORDS + 1))
    return {hash(tuple(words[start : start + SHINGLE_WORDS])) for start in starts}


def new_text(docstrings: list[str], seen: set[int]) -> str:
    """Join the docstrings that are new to `seen`, which learns their shingles."""
    kept = []
    for text in docstrings:
        found = shingles(text)
        if len(found & seen) / len(found) <= NEAR_DUPLICATE_SHARE:
            kept.append(text)
            seen |= found
    return "\n\n".join(kept)


def split_documents(modules: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    """Return (training, validation) documents, no near-duplicate in both.

    Training takes its pick first, so that a text found on both sides stays out of validation. The
    order is by hash: by name, a short run would train on one package and validate on all.
    """
    names = sorted(modules, key=stable_hash)
    held_out = [name for name in names if stable_hash(name) % 1000 < VAL_PER_MILLE]
    seen: set[int] = set()
    training = [new_text(modules[name], seen) for name in names if name not in held_out]
    in_training = frozenset(seen)
    validation = []
    for name in held_out:
        text = new_text(modules[name], seen)
        found = shingles(text)
        if text and len(found & in_training) / len(found) <= MAX_SHARED_SHARE:
            validation.append(text)
    return list(filter(None, training)), validation


def make_sample(output: Path, packages: Iterable[str] = PACKAGES) -> None:
    """Write the sample below `output`, unless it is there already. Raises ConfigError."""
    folder = output / "datasets" / "sample_sp1024"
    # The folder has its name when all is complete.
    if folder.exists():
        say(f"{folder} is complete; nothing to do")
        return

    say(f"reading the docstrings of {', '.join(packages)}")
    training, validation = split_documents(read_modules(packages))
    say(f"training a tokenizer of {VOCAB_SIZE:,} pieces on the training split")
    model = train_tokenizer(training, VOCAB_SIZE)
    model_path = output / "tokenizers" / f"sample_{VOCAB_SIZE}_bpe.model"
    write_dataset(folder, model_path, model, validation, training)


def main() -> None:
    """Make the sample in this folder. Raises ConfigError."""
    require(len(sys.argv) < 2, f"{sys.argv[-1]}: no arguments; the place is beside this script")
    make_sample(Path(__file__).resolve().parent)


if __name__ == "__main__":
    run_entry_point(main)
