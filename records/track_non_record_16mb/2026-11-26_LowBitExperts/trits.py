"""Compare two ways to store ternary symbols: a byte each, or five to a byte; then the codec.

PYTHONPATH=. python trits.py ARTIFACT.ptz ...    # from the root of the repository
"""

import sys
from pathlib import Path

import torch

from train_gpt import Hyperparameters, compress, entropy_bytes, load_artifact, run_entry_point

POWERS = torch.tensor([1, 3, 9, 27, 81])


def five_to_a_byte(symbols: torch.Tensor) -> bytes:
    """Return symbols -1, 0 and 1 as digits of base 3, the last byte filled up with zeros."""
    digits = symbols.flatten().long() + 1
    rest = -len(digits) % len(POWERS)
    digits = torch.cat([digits, torch.zeros(rest, dtype=torch.long)]).view(-1, len(POWERS))
    return (digits * POWERS).sum(-1).to(torch.uint8).numpy().tobytes()


def main() -> None:
    """Print bits per weight of all ternary tensors of each artifact."""
    print(f"{'artifact':<24}{'weights':>10}{'entropy':>9}{'bytes':>9}{'base 3':>9}")
    for path in map(Path, sys.argv[1:]):
        model, _, _ = load_artifact(path, Hyperparameters(), torch.device("cpu"))
        weights = 0
        floor = 0.0
        by_byte = 0
        by_five = 0
        for tensor in model.parameters():
            symbols = tensor.detach().sign().to(torch.int8)
            largest = tensor.abs().amax(-1, keepdim=True)
            if tensor.dim() < 2 or not torch.equal(symbols * largest, tensor):
                continue
            weights += tensor.numel()
            floor += entropy_bytes([symbols])
            by_byte += len(compress(symbols.numpy().tobytes())[1])
            by_five += len(compress(five_to_a_byte(symbols))[1])
        bits = [8 * size / weights for size in (floor, by_byte, by_five)]
        print(f"{path.stem:<24}{weights:>10,}" + "".join(f"{value:>9.3f}" for value in bits))


if __name__ == "__main__":
    run_entry_point(main)
