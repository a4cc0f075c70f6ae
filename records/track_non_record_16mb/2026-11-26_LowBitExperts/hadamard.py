"""Rotate the input of every matrix by a signed Hadamard matrix before rounding; score both ways.

    PYTHONPATH=. python hadamard.py CHECKPOINT.pt    # with the knobs of its run, in the environment

At equal bytes: k of the rotated weights is solved for the entropy of the others' symbols.
"""

import copy
import math
import os
import sys

import torch
from scipy.linalg import hadamard

import train_gpt
from train_gpt import CLIP_OF_FEW_LEVELS, Dist, Hyperparameters, find_role, run_entry_point


def rotation(size: int) -> torch.Tensor:
    """Return an orthogonal (size, size) matrix: Hadamard's with random signs of the inputs."""
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    return torch.tensor(hadamard(size)) / math.sqrt(size) * signs[:, None]


def quantized(hp: Hyperparameters, weights: dict, factor: float) -> tuple[dict, float]:
    """Round to nearest with k times `factor`. Also returns the bytes of the symbols' entropy."""
    clip = factor * CLIP_OF_FEW_LEVELS.get(hp.matrix_bits, hp.matrix_clip)
    tensors = {n: train_gpt.quantize_tensor(w, hp.matrix_bits, clip) for n, w in weights.items()}
    return tensors, train_gpt.entropy_bytes([tensor.symbols for tensor in tensors.values()])


def factor_for(hp: Hyperparameters, weights: dict, goal: float) -> float:
    """Return the factor on k that gives `goal` bytes of entropy, by bisection."""
    low = 0.3
    high = 3.0
    for _ in range(18):
        middle = math.sqrt(low * high)
        if quantized(hp, weights, middle)[1] > goal:
            low = middle
        else:
            high = middle
    return high


def round_by_gptq(hp: Hyperparameters, state: dict, weights: dict, tensors: dict, hessians: dict):
    """Replace the symbols of `tensors`, whose inputs' Hessians are rotated if `weights` are."""
    is_rotated = any(not torch.equal(weight, state[name]) for name, weight in weights.items())
    for name, hessian in hessians.items():
        if name not in weights:
            continue
        matrices = train_gpt.parts_with_input(state, name)
        for parts, moments in zip(matrices, hessian.view(-1, *hessian.shape[-2:]), strict=True):
            if is_rotated:
                turns = [rotation(weights[owner].size(-1)) for owner, _ in parts]
                turn = torch.block_diag(*turns)
                moments = turn.T @ moments @ turn
            train_gpt.round_by_gptq(hp, weights, tensors, parts, moments)


def main() -> None:
    """Print the score of the rounded weights, plain and rotated, by bits and way of rounding."""
    hp = Hyperparameters.from_env(os.environ)
    dist = Dist.from_torchrun()
    saved = torch.load(sys.argv[1], weights_only=True)
    model = train_gpt.GPT(hp.model, hp.torch_dtype)
    model.load_state_dict(saved["model"])
    for p, average in zip(model.parameters(), saved["average"], strict=True):
        p.data.copy_(average)
    train_gpt.choose_attention(hp.attention, model, dist.device, print)
    val = train_gpt.ValData.load(hp, dist.device)
    loader = train_gpt.TokenLoader(hp, dist)
    hessians, _ = train_gpt.collect_hessians(hp, dist, print, model, loader)
    state = copy.deepcopy(model.state_dict())
    names = [name for name in state if find_role(name).rule in ("matrix", "expert")]
    plain = {name: state[name] for name in names}
    turned = {name: weight @ rotation(weight.size(-1)) for name, weight in plain.items()}

    def score(changed: dict) -> float:
        model.load_state_dict(state | changed)
        return train_gpt.evaluate(model, val, hp, dist, "validate").bpb

    print("float", score({}))
    for bits in (6, 4, 3):
        of_bits = hp.override(matrix_bits=bits, expert_bits=bits)
        goal = quantized(of_bits, plain, 1.0)[1]
        factor = factor_for(of_bits, turned, goal)
        for way in ("gptq", "nearest"):
            scores = []
            for weights, k in ((plain, 1.0), (turned, factor)):
                tensors, size = quantized(of_bits, weights, k)
                if way == "gptq":
                    round_by_gptq(of_bits, state, weights, tensors, hessians)
                restored = {name: tensor.dequantize() for name, tensor in tensors.items()}
                if weights is turned:
                    restored = {n: w @ rotation(w.size(-1)).T for n, w in restored.items()}
                scores.append(score(restored))
            change = f"plain {scores[0]:.4f} rotated {scores[1]:.4f} {scores[1] - scores[0]:+.4f}"
            print(f"{bits} bits, {way}: {change} ({size:,.0f} bytes, k x {factor:.3f})", flush=True)


if __name__ == "__main__":
    run_entry_point(main)
