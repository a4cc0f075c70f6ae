"""Show what the parts of a trained model do: experts' load and specialisation, cost of branches.

    python records/diagnose.py logs/RUN_ID.ptz > diagnosis.md
    python records/diagnose.py logs/RUN_ID.ptz --targets 100000

Prints tables in Markdown, line by line as they are measured. DATA_PATH, TOKENIZER_PATH, DTYPE (on a
CPU, float32 by default) and MICRO_BATCH_TOKENS are those of eval_sliding.py. A cost is the change
of the loss when parameters are zero or experts exchanged. A small model takes a CPU less than two
minutes for the first 8,192 targets; more tell smaller costs from noise.
"""

import collections
import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ArgumentParser, markdown_table
from torch import Tensor, nn

from eval_sliding import check_tokenizer_made
from train_gpt import (
    GPT,
    Dist,
    Hyperparameters,
    Score,
    ValData,
    choose_attention,
    evaluate,
    load_artifact,
    load_tokenizer,
    require,
    run_entry_point,
)

TARGETS = 8_192
Row = dict[object, object]  # of a table, by column
Cost = Callable[[contextlib.AbstractContextManager], float]  # of a change: nats per token


# ---- Changes to a model --------------------------------------------------------------------------


def branches(model: GPT) -> dict[str, dict[int, list[Tensor]]]:
    """Return by branch and layer views of the parameters that are zero when the branch is gone."""
    config = model.config
    kv_dim = config.num_kv_heads * config.head_dim
    found = collections.defaultdict(dict)
    for layer, block in enumerate(model.blocks):
        if config.is_routed:
            found["routed experts"][layer] = [block.mlp.expert_down.detach()]
        plain = "shared expert" if config.is_routed else "dense MLP"
        found[plain][layer] = [block.mlp.down.weight.detach()]
        found["x0 re-injection"][layer] = [block.resid_mix.detach()[1]]
        if config.mu == "off":
            continue
        if config.mu == "full":
            readers = block.attn.mu_read.weight.detach().split([config.model_dim, kv_dim, kv_dim])
        else:
            readers = block.attn.mu_gain.detach().split(1)
        for target, rows in zip("qkv", readers, strict=True):
            found[f"mu into {target}"][layer] = [rows]
        found["mu into q, k and v"][layer] = list(readers)
        if config.mu == "pid":
            found["pid velocity"][layer] = [block.pid_gains.detach()[2]]
    return found


@contextlib.contextmanager
def zeroed(views: list[Tensor]) -> Iterator[None]:
    """Set parameters to zero in place for the length of a with block, whatever happens in it."""
    saved = [view.clone() for view in views]
    try:
        for view in views:
            view.zero_()
        yield
    finally:
        for view, old in zip(views, saved, strict=True):
            view.copy_(old)


@contextlib.contextmanager
def next_expert(mlp: nn.Module) -> Iterator[None]:
    """Give every token of a layer the expert after its own, for the length of a with block."""
    choose = mlp.choose

    def shifted(x: Tensor, table_BTE: Tensor) -> tuple[Tensor, float]:
        return choose(x, table_BTE)[0].roll(1, -1), 0.0

    mlp.choose = shifted
    try:
        yield
    finally:
        del mlp.choose  # which uncovers the method


def cosine(experts: Tensor) -> float:
    """Return the mean absolute cosine of all pairs of matrices (E, R, C); NaN for one."""
    flat = F.normalize(experts.detach().flatten(1).double(), dim=-1)
    rows, columns = torch.triu_indices(len(flat), len(flat), 1)
    return (flat @ flat.T)[rows, columns].abs().mean().item()


# ---- Measurements --------------------------------------------------------------------------------


@torch.no_grad()
def shares_of(model: GPT, tokens: Tensor, batch_size: int) -> list[list[float]]:
    """Return by layer the share of each expert in the choices for whole windows of tokens (N,).

    Over all passes of a layer; for soft routing, the mean gate. The model's dispatch is masked.
    """
    load = torch.zeros(model.config.num_layers, model.config.num_experts, dtype=torch.float64)
    handles = []
    for layer, block in enumerate(model.blocks):

        def count(mlp: nn.Module, args: tuple[Tensor, Tensor], layer: int = layer) -> None:
            load[layer] += mlp.choose(*args)[0].double().sum((0, 1)).cpu()

        handles.append(block.mlp.register_forward_pre_hook(count))
    seq_len = min(model.config.train_seq_len, len(tokens))
    windows = tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len).long()
    for batch in windows.split(batch_size):
        model.features(batch)
    for handle in handles:
        handle.remove()
    return (load / load.sum(1, keepdim=True)).tolist()


def expert_rows(model: GPT, shares: list[list[float]], cost: Cost) -> Iterator[Row]:
    """Yield a row of each layer: load and specialisation of its experts."""
    for layer, block in enumerate(model.blocks):
        row = {"layer": layer, **dict(enumerate(shares[layer]))}
        row["max/mean"] = max(shares[layer]) * len(shares[layer])
        row["shift"] = cost(next_expert(block.mlp))
        row["cos up"] = cosine(block.mlp.expert_up)
        row["cos down"] = cosine(block.mlp.expert_down)
        yield row


def cost_rows(model: GPT, cost: Cost) -> Iterator[Row]:
    """Yield a row of each branch: its cost in all layers at once, then in each."""
    for branch, views in branches(model).items():
        everywhere = [view for layer in views.values() for view in layer]
        row = {"branch": branch, "all": cost(zeroed(everywhere))}
        for layer, own in views.items():
            row[layer] = cost(zeroed(own))
        yield row


def diagnose(
    model: GPT, val: ValData, hp: Hyperparameters
) -> tuple[Score, Iterator[Row], Iterator[Row]]:
    """Return the score on `val`, and rows of experts (none without) and of branches to measure.

    Leaves `model` as it was.
    """
    # The masked dispatch computes the same, and has a factor on every expert to look at.
    with torch.device("meta"):
        masked = GPT(replace(model.config, dispatch="masked"), model.dtype)
    masked.load_state_dict(model.state_dict(), assign=True)
    for block, original in zip(masked.eval().blocks, model.blocks, strict=True):
        block.attn.attend = original.attn.attend
    dist = Dist(0, 1, val.tokens.device)
    base = evaluate(masked, val, hp, dist, "diagnose")

    def cost(change: contextlib.AbstractContextManager) -> float:
        with change:
            return evaluate(masked, val, hp, dist, "diagnose").val_loss - base.val_loss

    experts = iter(())
    if model.config.is_routed:
        batch_size = max(1, hp.micro_batch_tokens // model.config.train_seq_len)
        experts = expert_rows(masked, shares_of(masked, val.tokens[:-1], batch_size), cost)
    return base, experts, cost_rows(masked, cost)


def print_table(title: str, text: str, rows: Iterator[Row]) -> None:
    """Print rows as Markdown, each at once, with four digits and a dash for NaN. None: nothing."""
    for number, row in enumerate(rows):
        cells = [f"{x:.4f}" if isinstance(x, float) else x for x in row.values()]
        lines = markdown_table(row, [["-" if cell == "nan" else cell for cell in cells]])
        if number == 0:
            print(f"\n## {title}\n\n{text}\n\n{lines}", flush=True)
        else:
            print(lines.splitlines()[-1], flush=True)


# ---- Command line --------------------------------------------------------------------------------


def main() -> None:
    """Print the tables of an artifact. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    sample = f"the first N; 0 = all; default: {TARGETS}"
    parser.add_argument("--targets", type=int, default=TARGETS, metavar="N", help=sample)
    args = parser.parse_args()
    require(args.targets >= 0, f"--targets {args.targets}: expected a number of targets, 0 for all")
    dist = Dist.from_torchrun()
    require(dist.world_size == 1, f"WORLD_SIZE={dist.world_size}: diagnose.py is for one process")
    defaults = {} if dist.device.type == "cuda" else {"DTYPE": "float32"}
    knobs = defaults | os.environ | {"VAL_MAX_TOKENS": str(args.targets)}
    hp = Hyperparameters.from_env(knobs)
    torch.set_float32_matmul_precision("highest" if hp.dtype == "float32" else "high")

    model, hp, tokenizer_sha256 = load_artifact(args.artifact, hp, dist.device)
    val = ValData.load(hp, dist.device)
    known = val.tokenizer_sha256 == tokenizer_sha256
    require(known, f"{args.artifact} was trained with another tokenizer (TOKENIZER_PATH)")
    check_tokenizer_made(val.tokens, load_tokenizer(hp)[0], hp.dataset_dir)
    choose_attention(hp.attention, model, dist.device, lambda text: None)

    score, experts, costs = diagnose(model, val, hp)
    which = "PARTIAL loss, first" if score.partial else "loss, all"
    print(f"# {args.artifact.stem}: {which} {score.target_tokens:,} targets of the split: ", end="")
    print(f"{score.val_loss:.4f} nats per token, {score.bpb:.4f} bits per byte\n")
    config = model.config
    order = " ".join(map(str, config.execution_order(True)))
    print(f"routing:{config.routing} experts:{config.num_experts} mu:{config.mu} layers:{order}")

    load = "By expert, the share of the choices over all passes; max/mean is 1 where they are "
    load += "balanced. Shift: cost of giving each token the next expert in this layer alone, nats "
    load += "per token. Cos: mean absolute cosine of two experts, 0 unrelated, 1 copies."
    print_table("Experts", load, experts)
    zeroing = f"Rise of the loss, nats per token (times {score.bpb / score.val_loss:.4f}: bits per "
    zeroing += "byte), in all layers or one. Costs do not add up: others were trained beside it."
    print_table("Cost of zeroing a branch", zeroing, costs)


if __name__ == "__main__":
    run_entry_point(main)
