"""Bits per weight of a trained model's symbols under every codec and order of storage, beside their entropy.

    CHECKPOINT_EVERY=1000000 RUN_ID=x ... python train_gpt.py
    MATRIX_CLIP=12.85 EMBED_CLIP=15 python records/codec_table.py logs/x.ptz

Reads the model's knobs from the artifact and the averaged float32 weights from the last checkpoint beside it
(logs/x.step*.npz, made at the end of the training), rounds them to nearest with MATRIX_CLIP, EMBED_CLIP, MATRIX_BITS
and EMBED_BITS of the environment, and compresses tensor by tensor.
Orders: row by row, column by column, and columns sorted by magnitude, whose permutation (2 bytes a column) is counted.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_gpt import (
    Hyperparameters,
    compress,
    entropy_bytes,
    load_artifact,
    quantize,
    require,
    role_of,
    run_entry_point,
)

CODECS = {"zstd-22": "zstd", "brotli-11": "brotli"}


def orders(symbols: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """The symbols (R, C) in each order of storage, and the bytes that this order adds."""
    sorted_columns = np.argsort(-np.abs(symbols).mean(0), kind="stable")
    return {
        "row": (symbols, 0),
        "column": (symbols.T, 0),
        "sorted": (symbols[:, sorted_columns].T, 2 * symbols.shape[1]),
    }


def averaged_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The state dict whose parameters are the checkpoint's average or, without one, its newest weights."""
    with np.load(checkpoint, allow_pickle=False) as file:
        _, (_, _, averaged) = json.loads(str(file["meta"]))
        tensors = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
    parts = ("model/", "average/") if averaged else ("model/",)
    return {
        n.removeprefix(part): t for part in parts for n, t in tensors.items() if n.startswith(part)
    }


def main() -> None:
    """Print the table of the artifact named on the command line. Raises Refusal."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    require(len(sys.argv) == 2, f"usage: {sys.argv[0]} ARTIFACT (more with --help)")
    path = Path(sys.argv[1])
    checkpoints = sorted(path.parent.glob(f"{path.stem}.step*.npz"))
    _, hp, _ = load_artifact(path, Hyperparameters.from_env(dict(os.environ)), torch.device("cpu"))
    require(
        len(checkpoints) > 0, f"{path.with_suffix('')}.step*.npz: no checkpoint (CHECKPOINT_EVERY)"
    )
    parts, _ = quantize(hp, averaged_weights(checkpoints[-1]))
    sizes, weights, entropy = defaultdict(int), defaultdict(int), defaultdict(float)
    for name, part in parts.items():
        if len(part) > 1 and role_of(name) != "vector":
            for role in (role_of(name), "all"):
                weights[role] += part[0].numel()
                entropy[role] += entropy_bytes(part[0])
                for order, (symbols, extra) in orders(part[0].flatten(0, -2).numpy()).items():
                    for codec, setting in CODECS.items():
                        sizes[role, codec, order] += (
                            len(compress(symbols.tobytes(), setting)[1]) + extra
                        )
    columns = [(codec, order) for codec in CODECS for order in ("row", "column", "sorted")]
    print(
        "| tensors | weights | entropy | "
        + " | ".join(f"{codec} {order}" for codec, order in columns)
        + " |"
    )
    print("|" + "---|" * (3 + len(columns)))
    for role, count in weights.items():
        cells = [entropy[role], *(sizes[role, codec, order] for codec, order in columns)]
        print(
            f"| {role} | {count:,} | "
            + " | ".join(f"{8 * cell / count:.3f}" for cell in cells)
            + " |"
        )


if __name__ == "__main__":
    run_entry_point(main)
