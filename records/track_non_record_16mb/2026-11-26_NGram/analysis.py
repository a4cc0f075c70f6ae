"""Print what n-gram mixing gains, by seed, setting and document.   analysis.py NAME LOSSES.pt ...

LOSSES holds the tokens of the validation split, the bytes of every target, and as nll the losses
in nats that eval_sliding.py gave it, (targets,).
"""

import math
import statistics
import sys
from typing import NamedTuple
from unittest import mock

import torch

import eval_sliding
from eval_sliding import bits_per_byte, documents_of, mix


class Document(NamedTuple):
    start: int  # first target
    tokens: int
    bytes: int
    off: float  # bits per byte
    on: float


KINDS = {  # of documents: what they are told apart by, its edges, and names between these
    "tokens": (
        lambda document, targets: document.tokens,
        (500, 1500, 5000),
        ("below 500", "500 to 1,500", "1,500 to 5,000", "5,000 and more"),
    ),
    "place in the split": (
        lambda document, targets: document.start / targets,
        (0.05, 0.25, 0.5, 0.75),
        ("first 5 %", "5 to 25 %", "25 to 50 %", "50 to 75 %", "last quarter"),
    ),
    "val_bpb off": (
        lambda document, targets: document.off,
        (2.2, 2.5, 2.8),
        ("below 2.2", "2.2 to 2.5", "2.5 to 2.8", "2.8 and more"),
    ),
}


def mixed_bpb(run: dict, delay: int = 1, **constants: int) -> float:
    """Return bits per byte with other constants of eval_sliding.py."""
    with mock.patch.multiple(eval_sliding, **{"NGRAM_ORDER": 8, **constants}):
        losses, _ = mix(run["nll"], run["tokens"], delay)
    return bits_per_byte(losses, run["bytes"])


def print_row(title: str, values: list[float], off: list[float]) -> None:
    gains = [before - after for before, after in zip(off, values, strict=True)]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    each = " ".join(f"{value:.4f}" for value in values)
    means = f"{statistics.mean(values):.4f} | {statistics.mean(gains):.4f} | {spread:.4f}"
    print(f"| {title} | {each} | {means} |", flush=True)


def print_settings(runs: list[dict]) -> None:
    print("| | val_bpb of each seed | mean | gain | std of gain |\n|---|---|---|---|---|")
    off = [bits_per_byte(run["nll"], run["bytes"]) for run in runs]
    print_row("off", off, off)
    print_row("on", [mixed_bpb(run) for run in runs], off)
    uniform = {**runs[0], "nll": torch.full_like(runs[0]["nll"], math.log(1024))}
    title = "on, of a model that gives all tokens the same"
    print(f"| {title} | {mixed_bpb(uniform):.4f} | | | |")

    for order in (0, 1, 2, 3, 4, 6, 12):
        values = [mixed_bpb(run, NGRAM_ORDER=order) for run in runs]
        print_row(f"contexts of {order} tokens at most", values, off)
    values = [mixed_bpb(run, NGRAM_LOCAL_ORDER=-1) for run in runs]
    print_row("nothing by document", values, off)
    values = [mixed_bpb(run, NGRAM_LOCAL_ORDER=8) for run in runs]
    print_row("all orders by document too", values, off)
    for delay in (64, 8192, 32768):
        values = [mixed_bpb(run, delay) for run in runs]
        print_row(f"counts {delay} targets late", values, off)


def score_documents(run: dict) -> list[Document]:
    mixed, _ = mix(run["nll"], run["tokens"])
    documents = []
    start = 0
    for tokens in documents_of(run["tokens"][:-1]):
        part = slice(start, start + len(tokens))
        sizes = run["bytes"][part]
        off = bits_per_byte(run["nll"][part], sizes)
        on = bits_per_byte(mixed[part], sizes)
        documents.append(Document(start, len(tokens), int(sizes.sum()), off, on))
        start += len(tokens)
    return documents


def mean_bpb(documents: list[Document], name: str) -> float:
    bits = sum(getattr(document, name) * document.bytes for document in documents)
    return bits / sum(document.bytes for document in documents)


def print_seed(seed: int, documents: list[Document]) -> None:
    gains = sorted(document.off - document.on for document in documents)
    loses = sum(gain < 0 for gain in gains)
    worst = min(documents, key=lambda document: document.off - document.on)
    longest = max(documents, key=lambda document: document.tokens)
    rest = [document for document in documents if document is not longest]
    cells = [seed, len(documents), f"{statistics.median(gains):.4f}"]
    cells += [f"{gains[len(gains) // 10]:.4f}", f"{loses} of {len(documents)}"]
    cells += [f"{max(worst.on - worst.off, 0):.4f}", worst.bytes]
    cells += [f"{mean_bpb(rest, 'off'):.4f}", f"{mean_bpb(rest, 'on'):.4f}"]
    print(f"| {' | '.join(map(str, cells))} |")


def print_groups(seeds: list[list[Document]], targets: int) -> None:
    head = "| documents by | | documents (seed 1) | off | on | gain | lose (seed 1) |"
    print(f"\n{head}\n|---|---|---|---|---|---|---|")
    for kind, (key, edges, names) in KINDS.items():
        for place, name in enumerate(names):
            groups = []
            for documents in seeds:
                groups.append([])
                for document in documents:
                    if sum(key(document, targets) >= edge for edge in edges) == place:
                        groups[-1].append(document)
            groups = [group for group in groups if group]
            off = statistics.mean(mean_bpb(group, "off") for group in groups)
            on = statistics.mean(mean_bpb(group, "on") for group in groups)
            loses = sum(document.on > document.off for document in groups[0])
            means = f"{off:.4f} | {on:.4f} | {off - on:.4f}"
            print(f"| {kind} | {name} | {len(groups[0])} | {means} | {loses} |")


name, *paths = sys.argv[1:]
runs = [torch.load(path) for path in paths]
targets = len(runs[0]["nll"])
total_bytes = int(runs[0]["bytes"].sum())
print(f"## {name}: {len(runs)} seeds, {targets} targets, {total_bytes} bytes")
print_settings(runs)
head = "| seed | documents | median gain | 10 % gain less than | share that lose | largest loss "
head += "| of its bytes | without the longest: off | on |"
print(f"\n## By document\n{head}\n|---|---|---|---|---|---|---|---|---|")
seeds = [score_documents(run) for run in runs]
for seed, documents in enumerate(seeds, 1):
    print_seed(seed, documents)
print_groups(seeds, targets)
