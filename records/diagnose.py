"""Show what the parts of a trained model do: experts' load and specialisation, cost of branches.

    python records/diagnose.py logs/RUN_ID.ptz > diagnosis.md
    python records/diagnose.py logs/RUN_ID.ptz --targets 100000

Prints tables in Markdown. Needs the artifact, its tokenizer and validation shards; DATA_PATH,
TOKENIZER_PATH, DTYPE and MICRO_BATCH_TOKENS are those of eval_sliding.py. DTYPE is float32 on a CPU
unless it is set. The sample is the first 8,192 targets of the split, so that a small model takes a
CPU less than two minutes; a larger one tells smaller costs from noise. Every cost is the change of
the loss over whole windows when parameters are zero, or experts exchanged; weights come back bit
for bit.
"""

import argparse
import collections
import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import ArgumentParser, markdown_table
from torch import Tensor, nn

from eval_sliding import check_tokenizer_made, same, snapshot
from train_gpt import (
    GPT,
    Dist,
    Hyperparameters,
    ModelConfig,
    Progress,
    Score,
    Scorer,
    ValData,
    Windowing,
    choose_attention,
    load_artifact,
    load_tokenizer,
    require,
    run_entry_point,
)

TARGETS = 8_192
Row = dict[object, object]  # of a table, by column


@dataclass(frozen=True)
class Diagnosis:
    """All that the tables show, none of experts in a dense model; layers count from 0."""

    run_id: str
    config: ModelConfig
    score: Score
    experts: list[Row]  # of each layer: shares of the choices of all passes, then measures
    costs: list[Row]  # of each branch: rise of the loss, nats per token, in all layers and in each

    def title(self) -> str:
        """Return the run, and which loss on how many targets: a part never looks like a result."""
        which = "PARTIAL loss, first" if self.score.partial else "loss, all"
        loss = f"{self.score.val_loss:.4f} nats per token, {self.score.bpb:.4f} bits per byte"
        return f"{self.run_id}: {which} {self.score.target_tokens:,} targets of the split: {loss}"


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


def load_of(masked: GPT, scorer: Scorer, batch_size: int) -> Tensor:
    """Return how many real tokens (layer, expert) chose each expert, over all passes of a layer."""
    config = masked.config
    order = iter(())
    real_BT = None
    load = torch.zeros(config.num_layers, config.num_experts, dtype=torch.float64)

    def count(mlp: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        chosen_NE = mlp.choose(*args)[0][real_BT]
        load[next(order)] += chosen_NE.double().sum(0).cpu()

    handles = [block.mlp.register_forward_pre_hook(count) for block in masked.blocks]
    for batch in scorer.windows.split(batch_size):
        input_ids, _, _, column_BT = scorer.batch(batch, config.train_seq_len, batch_size)
        real_BT = column_BT < scorer.num_targets
        order = iter(config.execution_order(True))
        masked.features(input_ids)
        scorer.progress.update(scorer.progress.done + len(batch))
    for handle in handles:
        handle.remove()
    return load


@torch.no_grad()
def diagnose(model: GPT, val: ValData, hp: Hyperparameters, run_id: str) -> Diagnosis:
    """Measure everything on all targets of `val`, in whole windows. Leaves `model` as it was."""
    # The masked dispatch computes the same, and has a factor on every expert to look at.
    with torch.device("meta"):
        masked = GPT(replace(model.config, dispatch="masked"), model.dtype)
    masked.load_state_dict(model.state_dict(), assign=True)
    for block, original in zip(masked.eval().blocks, model.blocks, strict=True):
        block.attn.attend = original.attn.attend
    before = snapshot(masked)

    config = masked.config
    device = val.tokens.device
    seq_len = config.train_seq_len
    windows = math.ceil((len(val.tokens) - 1) / seq_len)
    batch_size = max(1, min(hp.micro_batch_tokens // seq_len, windows))
    windowing = Windowing(seq_len, seq_len, batch_size)
    layers = range(config.num_layers)
    found = branches(masked)
    routed = layers if config.is_routed else ()
    passes = 1 + bool(routed) + len(routed) + len(found) * (1 + len(layers))

    with Progress("diagnose", passes * windows) as progress:

        def new_scorer() -> Scorer:
            scorer = Scorer(masked, val, Dist(0, 1, device), windowing, "diagnose")
            scorer.progress = progress  # one for all passes
            return scorer

        def score() -> Score:
            scorer = new_scorer()
            scorer.score(scorer.share)
            return scorer.total()

        def cost(change: contextlib.AbstractContextManager) -> float:
            with change:
                return score().val_loss - base.val_loss

        base = score()
        costs = []
        for branch, views in found.items():
            everywhere = [view for layer in layers for view in views[layer]]
            row = {"branch": branch, "all": cost(zeroed(everywhere))}
            for layer in layers:
                row[layer] = cost(zeroed(views[layer]))
            costs.append(row)
        costs.sort(key=lambda row: -row["all"])
        counts = load_of(masked, new_scorer(), batch_size) if routed else None
        experts = []
        for layer in routed:
            shares = (counts[layer] / counts[layer].sum()).tolist()
            mlp = masked.blocks[layer].mlp
            row = {"layer": layer, **dict(enumerate(shares)), "max/mean": max(shares) * len(shares)}
            row["shift"] = cost(next_expert(mlp))
            row |= {"cos up": cosine(mlp.expert_up), "cos down": cosine(mlp.expert_down)}
            experts.append(row)
    assert same(masked.state_dict(), before), "weights were not restored"
    return Diagnosis(run_id, config, base, experts, costs)


# ---- Text ----------------------------------------------------------------------------------------


def table(rows: list[Row]) -> str:
    """Return rows as Markdown with four digits, and a dash for NaN."""
    lines = []
    for row in rows:
        cells = [f"{x:.4f}" if isinstance(x, float) else str(x) for x in row.values()]
        lines.append(["-" if cell == "nan" else cell for cell in cells])
    return markdown_table(rows[0], lines)


def report(found: Diagnosis) -> str:
    """Return the tables, each with how to read it."""
    config = found.config
    per_byte = found.score.bpb / found.score.val_loss
    unit = "mean gate over E" if config.routing == "soft" else "share of the tokens' choices"
    load = (
        f"By expert, over all passes: {unit}; max/mean is 1 where they are balanced. Shift: cost "
    )
    load += "of giving each token the next expert in this layer alone, nats per token. Cos: mean "
    load += "absolute cosine of two experts, 0 unrelated, 1 copies."
    zeroing = f"Rise of the loss, nats per token (times {per_byte:.4f}: bits per byte), in all "
    zeroing += "layers or one. Costs do not add up: the others were trained beside the branch."
    sections = [("Experts", load, found.experts)]
    sections += [("Cost of zeroing a branch", zeroing, found.costs)]
    order = " ".join(map(str, config.execution_order(True)))
    experts = f"routing:{config.routing} experts:{config.num_experts} mu:{config.mu}"
    parts = [f"# {found.title()}", f"{experts} layers as run:{order}"]
    for title, text, rows in sections:
        if rows:
            parts += [f"## {title}", text, table(rows)]
    return "\n\n".join(parts) + "\n"


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    sample = f"the first N; 0 = the whole split; default: {TARGETS}"
    parser.add_argument("--targets", type=int, default=TARGETS, metavar="N", help=sample)
    args = parser.parse_args()
    require(args.targets >= 0, f"--targets {args.targets}: expected a number of targets, 0 for all")
    return args


def main() -> None:
    """Print the tables of an artifact. Raises ConfigError."""
    args = parse_arguments()
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

    print(report(diagnose(model, val, hp, args.artifact.stem)), end="")


if __name__ == "__main__":
    run_entry_point(main)
