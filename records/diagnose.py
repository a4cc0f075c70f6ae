"""Show what the parts of a trained model do: experts' load and specialisation, branches, mu.

    python records/diagnose.py logs/RUN_ID.ptz    # RUN_ID_diagnosis.md and .png beside it
    python records/diagnose.py logs/RUN_ID.ptz --targets 100000 --out /tmp

Needs the artifact, its tokenizer and validation shards; DATA_PATH, TOKENIZER_PATH, DTYPE and
MICRO_BATCH_TOKENS are those of eval_sliding.py. DTYPE is float32 on a CPU unless it is set.
The sample is the first 8,192 targets of the split, so that a small model takes a CPU less than two
minutes; a larger one tells smaller costs from noise. Every cost is the change of the loss over
whole windows when parameters are zero, or experts exchanged; weights come back bit for bit.
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
from common import ArgumentParser, figure_png, markdown_table, optional
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
    write_atomically,
)

TARGETS = 8_192


@dataclass(frozen=True)
class Diagnosis:
    """All that the tables and the picture show, in pandas frames; layers count from 0."""

    run_id: str
    config: ModelConfig
    score: Score
    load: object  # layers x experts: share of the choices of all passes; then two measures
    specialisation: object  # layers x measures; both are empty without experts
    costs: object  # branches x (all, layers): rise of the loss, nats per token; dearest first
    mu: object  # places in the order of execution x measures; empty without mu

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


class Probe:
    """Sums over real tokens, by depth, that hooks on a masked model collect in forward passes."""

    def __init__(self, model: GPT, device: torch.device):
        self.config = model.config
        self.order = model.config.execution_order(True)
        self.depth = -1
        self.last_mu = None
        R, E = len(self.order), self.config.num_experts
        self.sums = collections.defaultdict(lambda: torch.zeros(R, dtype=torch.float64))
        self.load = torch.zeros(R, E, dtype=torch.float64, device=device)
        self.on_table = torch.zeros(R, E, dtype=torch.float64, device=device)
        self.handles = []
        for block in model.blocks:
            self.handles.append(block.attn.register_forward_pre_hook(self.see_attention))
            self.handles.append(block.mlp.register_forward_pre_hook(self.see_mlp))

    def begin(self, real_BT: Tensor) -> None:
        """Expect a batch, of which these tokens are no padding."""
        self.depth = -1
        self.last_mu = None
        self.real = real_BT

    def add(self, name: str, y: Tensor) -> None:
        """Count the squares of y (B, T, C) as a mean over channels and a sum over tokens."""
        self.sums[name][self.depth] += y[self.real].double().square().mean(-1).sum().item()

    def see_attention(self, attn: nn.Module, args: tuple) -> None:
        """Compare projections without and with mu, in float32, where a small bias counts."""
        self.depth += 1
        x, mu = args[:2]
        if mu is None:
            return
        x, mu = x.float(), mu.float()
        plain = attn.qkv(x, None, None)
        guided = attn.qkv(x, mu, None)
        for i, name in enumerate("qkv"):
            self.add(name, plain[i])
            self.add(f"bias {name}", guided[i] - plain[i])
        self.add("mu", mu)
        if self.last_mu is not None:
            cosine = F.cosine_similarity(mu, self.last_mu, dim=-1)[self.real]
            self.sums["cosine"][self.depth] += cosine.double().sum().item()
        self.last_mu = mu

    def see_mlp(self, mlp: nn.Module, args: tuple) -> None:
        if not self.config.is_routed:
            return
        x, table_BTE = args
        chosen_NE = mlp.choose(x, table_BTE)[0][self.real].double()
        self.load[self.depth] += chosen_NE.sum(0)
        self.on_table[self.depth] += (chosen_NE * table_BTE[self.real]).sum(0)

    def layer_load(self, layer: int) -> tuple[list[float], float]:
        """Return the share of each expert over all passes, and that of choices of the table."""
        depths = [depth for depth, run in enumerate(self.order) if run == layer]
        load = self.load[depths].sum(0)
        on_table = self.on_table[depths].sum() / load.sum()
        return (load / load.sum()).tolist(), on_table.item()

    def mu_by_depth(self, tokens: int) -> list[dict[str, float]]:
        """Return a row per place in the order of execution; what does not exist is NaN."""
        rows = []
        for depth, layer in enumerate(self.order):
            sums = {name: total[depth].item() for name, total in self.sums.items()}
            if "mu" not in sums:
                return []
            row = {"layer": layer}
            for name in "qkv":
                ratio = sums[f"bias {name}"] / sums[name] if sums[name] else math.nan
                row[name] = math.sqrt(ratio)
            row["rms mu"] = math.sqrt(sums["mu"] / tokens)
            row["cosine"] = sums["cosine"] / tokens if depth else math.nan
            rows.append(row)
        return rows


def balance(load: list[float]) -> dict[object, float]:
    """Return the shares by expert and two measures, of which 1 and 1 are a perfect balance."""
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    relative = entropy / math.log(len(load)) if len(load) > 1 else 1.0
    row = dict(enumerate(load))
    return row | {"max/mean": max(load) * len(load), "entropy / log E": relative}


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
    passes = 2 + len(routed) + len(found) * (1 + len(layers))

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
        probe = Probe(masked, device)
        scorer = new_scorer()
        for batch in scorer.windows.split(batch_size):
            input_ids, _, _, column_BT = scorer.batch(batch, seq_len, batch_size)
            probe.begin(column_BT < scorer.num_targets)
            masked.features(input_ids)
            progress.update(progress.done + len(batch))
        for handle in probe.handles:
            handle.remove()

        costs = {}
        for branch, views in found.items():
            everywhere = [view for layer in layers for view in views[layer]]
            costs[branch] = {"all": cost(zeroed(everywhere))}
            for layer in layers:
                costs[branch][layer] = cost(zeroed(views[layer]))
        specialisation = {}
        for layer in routed:
            mlp = masked.blocks[layer].mlp
            row = {"shift nats": cost(next_expert(mlp))}
            row["abs cos up"] = cosine(mlp.expert_up)
            row["abs cos down"] = cosine(mlp.expert_down)
            if config.has_router:
                _, row["keeps table"] = probe.layer_load(layer)
            specialisation[layer] = row
    assert same(masked.state_dict(), before), "weights were not restored"

    pandas = optional("pandas")
    load = {layer: balance(probe.layer_load(layer)[0]) for layer in routed}
    return Diagnosis(
        run_id,
        config,
        base,
        pandas.DataFrame.from_dict(load, orient="index"),
        pandas.DataFrame.from_dict(specialisation, orient="index"),
        pandas.DataFrame.from_dict(costs, orient="index").sort_values("all", ascending=False),
        pandas.DataFrame(probe.mu_by_depth(base.target_tokens)),
    )


# ---- Text and picture ----------------------------------------------------------------------------


def frame_table(corner: str, frame) -> str:
    """Return a frame as Markdown with four digits, and a dash for NaN."""
    rows = []
    for index, row in zip(frame.index, frame.itertuples(index=False), strict=True):
        cells = [f"{x:.4f}" if isinstance(x, float) else str(x) for x in row]
        rows.append([index, *("-" if cell == "nan" else cell for cell in cells)])
    return markdown_table([corner, *frame.columns], rows)


def report(found: Diagnosis) -> str:
    """Return the tables, each with how to read it."""
    config = found.config
    order = " ".join(map(str, config.execution_order(True)))
    per_byte = found.score.bpb / found.score.val_loss
    unit = "mean gate over E" if config.routing == "soft" else "share of the tokens' choices"
    load = f"By layer over all passes: {unit}; 1 is balance in the last columns."
    special = (
        "Shift: cost of giving each token the next expert in this layer alone, nats per token. "
    )
    special += (
        "Abs cos of two experts: 0 unrelated, 1 copies. Keeps table: share of a router's choices."
    )
    zeroing = (
        f"Rise of the loss, nats per token (times {per_byte:.4f}: bits per byte), in all layers "
    )
    zeroing += "or one. Costs do not add up: the others were trained beside the branch."
    mu = (
        "Q, k, v: RMS of what mu adds to the projection over the RMS of the projection without it. "
    )
    mu += "Cosine: with the mu of the depth before."
    sections = [
        ("Expert load", load, "layer", found.load, "No experts."),
        ("Specialisation", special, "layer", found.specialisation, "No experts."),
        ("Cost of zeroing a branch", zeroing, "branch", found.costs, ""),
        ("Mu by depth", mu, "depth", found.mu, "No mu."),
    ]
    experts = f"routing:{config.routing} experts:{config.num_experts} mu:{config.mu}"
    parts = [f"# {found.title()}", f"{experts} layers as run:{order}"]
    for title, text, corner, frame, absent in sections:
        parts.append(f"## {title}")
        parts += [text, frame_table(corner, frame)] if len(frame) else [absent]
    return "\n\n".join(parts) + "\n"


def draw_load(axes, found: Diagnosis) -> None:
    shares_LE = 100 * found.load[list(range(found.config.num_experts))]
    limit = 200 / found.config.num_experts
    image = axes.imshow(shares_LE.T, aspect="auto", cmap="PuOr_r", vmin=0, vmax=limit)
    axes.figure.colorbar(image, ax=axes, extend="max")
    axes.set(xlabel="layer", ylabel="expert", xticks=range(len(shares_LE)))


def draw_costs(axes, found: Diagnosis) -> None:
    costs = found.costs[::-1]  # the dearest on top
    # The numbers stand beside the names, where no bar can run into them.
    names = [f"{name}  {cost:+.4f}" for name, cost in costs["all"].items()]
    axes.barh(names, costs["all"], label="in all layers")
    for layer in costs.columns[1:]:
        axes.plot(costs[layer], names, "o", mec="black", label=f"in layer {layer}")
    axes.set_xscale("symlog", linthresh=1e-3)  # costs span decades and may be negative
    axes.set_xlabel("nats per token, logarithmic beyond 0.001")


def draw_specialisation(axes, found: Diagnosis) -> None:
    frame = found.specialisation
    axes.bar(frame.index, frame["shift nats"], label="cost of the next expert, nats per token")
    for name in ("abs cos up", "abs cos down"):
        axes.plot(frame.index, frame[name], "o-", label=name)
    axes.set(xlabel="layer", xticks=frame.index)


def draw_mu(axes, found: Diagnosis) -> None:
    for name in "qkv":
        axes.plot(found.mu[name], "o-", label=f"into {name}")
    axes.set_xticks(found.mu.index, found.mu["layer"])
    axes.set(xlabel="layer, in the order of execution", ylabel="ratio")
    axes.set_ylim(bottom=0)


def picture(found: Diagnosis) -> bytes:
    """Return a PNG of four panels; one whose subject the model lacks says so."""
    figure = optional("matplotlib.figure").Figure(figsize=(16, 10), layout="constrained")
    figure.suptitle(found.title(), fontsize=14, fontweight="bold")
    ratio = "Mu: RMS of what it adds over RMS of the projection"
    panels = [
        ("Expert load: share in %, white is balance", draw_load, found.load, "no experts"),
        ("Cost of zeroing a branch", draw_costs, found.costs, ""),
        ("Specialisation of experts", draw_specialisation, found.specialisation, "no experts"),
        (ratio, draw_mu, found.mu, "no mu"),
    ]
    for axes, (title, draw, subject, absent) in zip(
        figure.subplots(2, 2).flat, panels, strict=True
    ):
        axes.set_title(title)
        if len(subject):
            draw(axes, found)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, absent, ha="center", va="center", fontsize=16)
    return figure_png(figure)


# ---- Command line --------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises ConfigError; exits with 0 after --help."""
    parser = ArgumentParser(__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    sample = f"the first N; 0 = the whole split; default: {TARGETS}"
    parser.add_argument("--targets", type=int, default=TARGETS, metavar="N", help=sample)
    folder = "of the two files; default: the artifact's"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=folder)
    args = parser.parse_args()
    require(args.targets >= 0, f"--targets {args.targets}: expected a number of targets, 0 for all")
    return args


def main() -> None:
    """Print the tables of an artifact, write them and the picture. Raises ConfigError."""
    args = parse_arguments()
    for module in ("pandas", "matplotlib.figure"):
        optional(module)  # better now than after the measurements
    folder = args.out or args.artifact.parent
    require(folder.is_dir() or not folder.exists(), f"--out {folder}: not a folder")
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

    found = diagnose(model, val, hp, args.artifact.stem)
    text = report(found)
    write_atomically(folder / f"{found.run_id}_diagnosis.md", text.encode())
    write_atomically(folder / f"{found.run_id}_diagnosis.png", picture(found))
    print(text, end="")


if __name__ == "__main__":
    run_entry_point(main)
