"""What the parts of a trained model do: load and specialisation of experts, what each branch is worth, mu by depth.

    python records/diagnose.py logs/RUN_ID.ptz                            # RUN_ID_diagnosis.md and .png beside it
    DEVICE=cpu DTYPE=float32 MICRO_BATCH_TOKENS=8192 \\
        python records/diagnose.py logs/RUN_ID.ptz --targets 16384 --out /tmp

Needs the artifact, its tokenizer and validation shards; DATA_PATH, TOKENIZER_PATH, DEVICE, DTYPE and MICRO_BATCH_TOKENS
are those of eval_sliding.py, and the model's knobs come from the artifact. Every cost is the change of the loss over
whole windows when parameters are set to zero, or experts exchanged; the weights are restored bit for bit.
"""

import argparse
import collections
import contextlib
import io
import math
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval_sliding import check_tokenizer_made
from train_gpt import (
    GPT,
    MATRIX_MU,
    Dist,
    Hyperparameters,
    Progress,
    Score,
    Scorer,
    ValData,
    choose_attention,
    load_artifact,
    load_tokenizer,
    require,
    run_entry_point,
    write_atomically,
)

ROUTERS = ("learned", "hybrid")  # choose experts from the stream; soft takes all of them
BLUE, ORANGE, GREEN, RED = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
)  # Okabe-Ito: safe for the colour-blind
DPI = 150
Cost = collections.namedtuple(
    "Cost", "nats bpb"
)  # rise of the loss, per token, and in bits per byte of text


@dataclass(frozen=True)
class Diagnosis:
    """All that the tables and the picture show. Layers count from 0; a depth is a place in the order of execution."""

    run_id: str
    hp: Hyperparameters
    score: Score
    load: dict[
        int, list[float]
    ]  # by layer, the share of each expert in the choices of all passes; E values, sum 1
    specialisation: dict[int, dict[str, float]]  # by layer and column
    costs: dict[
        str, dict[int | None, Cost]
    ]  # by branch and layer, None = all of its layers at once
    mu: list[dict[str, float]]  # by depth and column; empty without mu

    def title(self) -> str:
        """The run, and on how many targets which loss; a part of the split never looks like a result."""
        count, partial = self.score.target_tokens, self.score.partial
        what = (
            f"PARTIAL loss, first {count:,} targets"
            if partial
            else f"loss, all {count:,} targets of the split"
        )
        return f"{self.run_id}: {what}: {self.score.val_loss:.4f} nats per token, {self.score.bpb:.4f} bits per byte"


# ---- Measurements


def branches(model: GPT) -> dict[str, dict[int, list[Tensor]]]:
    """By branch and layer, views of the parameters that are zero when the branch is gone."""
    hp, found = model.hp, collections.defaultdict(dict)
    kv_dim = hp.num_kv_heads * hp.head_dim
    for layer, block in enumerate(model.blocks):
        if block.mlp.routed:
            found["routed experts"][layer] = [block.mlp.expert_down.detach()]
        found["shared expert" if block.mlp.routed else "dense MLP"][layer] = [
            block.mlp.down.weight.detach()
        ]
        if hp.mu in MATRIX_MU:
            readers = block.attn.mu_read.weight.detach().split([hp.model_dim, kv_dim, kv_dim])
        elif hp.mu != "off":
            readers = block.attn.mu_gain.detach().split(1)
        if hp.mu != "off":
            for target, rows in zip("qkv", readers, strict=True):
                found[f"mu into {target}"][layer] = [rows]
            found["mu into q, k and v"][layer] = list(readers)
        if hp.mu == "pid":
            found["pid velocity"][layer] = [block.pid_gains.detach()[2]]
        found["x0 re-injection"][layer] = [block.resid_mix.detach()[1]]
    return dict(found)


@contextlib.contextmanager
def zeroed(views: list[Tensor]):
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
def next_expert(mlp):
    """Give every token of a routed layer the expert after its own, for the length of a with block."""
    choose = mlp.choose
    mlp.choose = lambda *args: (
        choose(*args)[0].roll(1, -1),
        0.0,
    )  # before the method, and gone with the attribute
    try:
        yield
    finally:
        del mlp.choose


def cosines(experts: Tensor) -> tuple[float, float]:
    """Mean and mean absolute cosine of all pairs among matrices (E, R, C), each one long vector; NaN for one expert."""
    flat = F.normalize(experts.detach().flatten(1).double(), dim=-1)
    pairs = (flat @ flat.T)[torch.triu_indices(len(flat), len(flat), 1).unbind()]
    return pairs.mean().item(), pairs.abs().mean().item()


class Probe:
    """Sums over real tokens, by depth, that hooks on a model with masked dispatch collect in forward passes."""

    def __init__(self, model: GPT, device: torch.device):
        self.hp, self.order, self.depth, self.last_mu = (
            model.hp,
            model.hp.execution_order(True),
            -1,
            None,
        )
        R, E, V = len(self.order), self.hp.num_experts, self.hp.vocab_size
        self.sums = collections.defaultdict(
            lambda: torch.zeros(R, dtype=torch.float64, device=device)
        )
        self.load, self.on_table = (
            torch.zeros(R, E, dtype=torch.float64, device=device) for _ in range(2)
        )
        # How often a token id chose each expert, apart for even and odd targets.
        halves = 2 * V if self.hp.routing in ROUTERS else 0
        self.votes = [torch.zeros(halves, E, device=device) for _ in range(R)]
        self.handles = [
            block.attn.register_forward_pre_hook(self.see_attention) for block in model.blocks
        ]
        self.handles += [
            block.mlp.register_forward_pre_hook(self.see_mlp) for block in model.blocks
        ]
        self.handles += [block.register_forward_hook(self.see_block) for block in model.blocks]

    def begin(self, input_ids: Tensor, column_BT: Tensor, num_targets: int) -> None:
        """A batch (B, T) comes; columns beyond the targets are padding."""
        self.depth, self.last_mu, self.real = -1, None, column_BT < num_targets
        self.half_N = column_BT[self.real] % 2 * self.hp.vocab_size + input_ids[self.real]

    def add(self, name: str, y: Tensor) -> None:
        """Count the squares of y (B, T, C) as a mean over channels and a sum over tokens."""
        self.sums[name][self.depth] += y[self.real].double().square().mean(-1).sum()

    def see_attention(self, attn, args: tuple) -> None:
        """In float32, in which a small bias does not drown in the rounding of what it is added to."""
        self.depth, (x, mu) = self.depth + 1, args[:2]
        if mu is None:
            return
        x, mu = x.float(), mu.float()
        for name, plain, guided in zip(
            "qkv", attn.qkv(x, None, None), attn.qkv(x, mu, None), strict=True
        ):
            self.add(name, plain)
            self.add(f"bias {name}", guided - plain)
        self.add("mu", mu)
        if self.last_mu is not None:
            self.sums["cosine"][self.depth] += (
                F.cosine_similarity(mu, self.last_mu, dim=-1)[self.real].double().sum()
            )
        self.last_mu = mu

    def see_mlp(self, mlp, args: tuple) -> None:
        if not mlp.routed:
            return
        x, (table_BTE,) = args
        chosen_NE = mlp.choose(x, table_BTE)[0][self.real].double()
        self.load[self.depth] += chosen_NE.sum(0)
        self.on_table[self.depth] += (chosen_NE * table_BTE[self.real]).sum(0)
        if self.hp.routing in ROUTERS:
            self.votes[self.depth].index_add_(0, self.half_N, chosen_NE.float())

    def see_block(self, block, args: tuple, stream) -> None:
        if stream.velocity is not None:
            self.add("velocity", stream.velocity)

    def depths_of(self, layer: int) -> list[int]:
        return [depth for depth, run in enumerate(self.order) if run == layer]

    def layer_load(self, layer: int) -> Tensor:
        """Share of each expert in the choices of all passes, (E,)."""
        load = self.load[self.depths_of(layer)].sum(0)
        return load / load.sum()

    def lexical(self, layer: int) -> dict[str, float]:
        """Shares of the choices that are the table's, and that are the favourite of the same token id. A favourite is
        found on the other half of the targets: on its own, every id that occurs once would keep to it."""
        depths, kept, known = self.depths_of(layer), 0.0, 0.0
        for depth in depths:  # one by one, as the table differs from pass to pass
            even, odd = self.votes[depth].chunk(2)
            for votes, others in ((even, odd), (odd, even)):
                votes, others = (half[others.sum(-1) > 0] for half in (votes, others))
                kept += votes.gather(-1, others.topk(self.hp.top_k).indices).sum().item()
                known += votes.sum().item()
        on_table = self.on_table[depths].sum() / self.load[depths].sum()
        return {
            "keeps table": on_table.item(),
            "keeps favourite": kept / known if known else math.nan,
        }

    def mu_by_depth(self, tokens: int) -> list[dict[str, float]]:
        """Columns of the table of mu; a cosine or a ratio that does not exist is NaN."""
        sums, rows = {name: total.tolist() for name, total in self.sums.items()}, []
        for depth, layer in enumerate(self.order if "mu" in sums else ()):
            row = {"layer": layer}
            for name in "qkv":
                plain = sums[name][depth]
                row[name] = math.sqrt(sums[f"bias {name}"][depth] / plain) if plain else math.nan
            row["rms mu"] = math.sqrt(sums["mu"][depth] / tokens)
            row["cosine"] = sums["cosine"][depth] / tokens if depth else math.nan
            if "velocity" in sums:
                row["rms velocity"] = math.sqrt(sums["velocity"][depth] / tokens)
            rows.append(row)
        return rows


@torch.no_grad()
def diagnose(model: GPT, val: ValData, hp: Hyperparameters, run_id: str) -> Diagnosis:
    """Measure everything on all targets of `val`, in whole windows. `model` is as before when this returns. Raises
    Refusal when a loss is not finite."""
    with torch.device(
        "meta"
    ):  # the masked dispatch computes the same, and has a factor on every expert to look at
        masked = GPT(replace(hp, dispatch="masked"))
    masked.load_state_dict(model.state_dict(), assign=True)
    for block, original in zip(masked.eval().blocks, model.blocks, strict=True):
        block.attn.attend = original.attn.attend
    model, before = masked, {name: tensor.clone() for name, tensor in masked.state_dict().items()}
    found, dist, T = branches(model), Dist(0, 1, val.tokens.device), hp.train_seq_len
    passes = 2 + len(hp.routed_layers) + sum(1 + len(layers) for layers in found.values())
    progress = Progress("diagnose", passes * math.ceil((len(val.tokens) - 1) / T))

    def score() -> Score:
        scorer = Scorer(model, val, hp, dist, T, "diagnose")
        scorer.progress = progress  # one line with one ETA for all passes
        scorer.score(scorer.share)
        return scorer.total()

    base, probe, scorer = (
        score(),
        Probe(model, val.tokens.device),
        Scorer(model, val, hp, dist, T, "diagnose"),
    )
    for windows in scorer.windows.split(scorer.batch_size):
        input_ids, _, _, column_BT = scorer.batch(windows, T, scorer.batch_size)
        probe.begin(input_ids, column_BT, scorer.num_targets)
        model.features(input_ids)
        progress.update(progress.done + len(windows))
    for handle in probe.handles:
        handle.remove()

    def cost(change) -> Cost:
        with change:
            changed = score()
        return Cost(changed.val_loss - base.val_loss, changed.bpb - base.bpb)

    costs, specialisation = {}, {}
    for branch, views in found.items():
        everywhere = [view for layer_views in views.values() for view in layer_views]
        costs[branch] = {
            layer: cost(zeroed(some)) for layer, some in ({None: everywhere} | views).items()
        }
    for layer in hp.routed_layers:
        mlp = model.blocks[layer].mlp
        row = dict(zip(("shift nats", "shift bpb"), cost(next_expert(mlp)), strict=True))
        for name, experts in (("up", mlp.expert_up), ("down", mlp.expert_down)):
            row[f"cos {name}"], row[f"abs cos {name}"] = cosines(experts)
        specialisation[layer] = row | (probe.lexical(layer) if hp.routing in ROUTERS else {})
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), (
            f"{name} was not restored"
        )
    load = {layer: probe.layer_load(layer).tolist() for layer in hp.routed_layers}
    return Diagnosis(
        run_id, hp, base, load, specialisation, costs, probe.mu_by_depth(base.target_tokens)
    )


# ---- Text


def table(header: list[str], rows: list[list]) -> str:
    """Markdown. Floats have four digits, NaN is a dash."""
    cells = [
        [f"{x:.4f}".replace("nan", "-") if isinstance(x, float) else str(x) for x in row]
        for row in rows
    ]
    lines = ["| " + " | ".join(row) + " |" for row in [header, *cells]]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def balance(load: list[float]) -> tuple[float, float]:
    """Load of the busiest expert over the mean, and the entropy in units of log E; 1 and 1 are a perfect balance."""
    entropy = -sum(share * math.log(share) for share in load if share > 0)
    return max(load) * len(load), entropy / math.log(len(load)) if len(load) > 1 else 1.0


def by_cost(found: Diagnosis) -> list[str]:
    """Branches, the most costly to lose first."""
    return sorted(found.costs, key=lambda branch: -found.costs[branch][None].nats)


def report(found: Diagnosis) -> str:
    """The tables, each with how to read it."""
    hp, layers = found.hp, list(range(found.hp.num_layers))
    lines = [f"# {found.title()}", ""]
    lines += [
        f"routing:{hp.routing} experts:{hp.num_experts} top_k:{hp.top_k} mu:{hp.mu} "
        f"layers as run:{' '.join(map(str, hp.execution_order(True)))}"
    ]
    lines += ["", "## Expert load", ""]
    if found.load:
        unit = "mean gate over E" if hp.routing == "soft" else "share of the tokens' choices"
        lines += [f"By layer over all passes: {unit}; 1 is balance in the last columns.", ""]
        header = ["layer", *map(str, range(hp.num_experts)), "max/mean", "entropy / log E"]
        lines += [
            table(header, [[layer, *load, *balance(load)] for layer, load in found.load.items()])
        ]
        lines += [
            "",
            "## Specialisation",
            "",
            "Shift: cost of giving each token the next expert in this layer alone. "
            "Cosines between experts: 0 unrelated, 1 copies.",
        ]
        lines += [
            "Keeps table, keeps favourite: shares of the choices that are the table's, and the most frequent of "
            "the same token id on the other half of the targets."
        ] * (hp.routing in ROUTERS)
        rows = [[layer, *row.values()] for layer, row in found.specialisation.items()]
        lines += ["", table(["layer", *next(iter(found.specialisation.values()))], rows)]
    else:
        lines += ["No experts."]
    lines += [
        "",
        "## Cost of zeroing a branch",
        "",
        "Rise of the loss, all layers at once and one at a time. "
        "Costs do not add up: the others were trained beside the branch.",
    ]
    for unit, name in (("nats", "nats per token"), ("bpb", "bits per byte")):
        rows = [
            [
                branch,
                *(
                    getattr(costs[layer], unit) if layer in costs else math.nan
                    for layer in (None, *layers)
                ),
            ]
            for branch in by_cost(found)
            for costs in [found.costs[branch]]
        ]
        lines += ["", table([name, "all", *map(str, layers)], rows)]
    lines += ["", "## Mu by depth", ""]
    if found.mu:
        lines += [
            "Q, k, v: RMS of what mu adds to the projection over the RMS of the projection without it. "
            "Cosine: with the mu of the depth before.",
            "",
        ]
        lines += [
            table(
                ["depth", *found.mu[0]],
                [[depth, *row.values()] for depth, row in enumerate(found.mu)],
            )
        ]
    else:
        lines += ["No mu."]
    return "\n".join(lines) + "\n"


# ---- Picture


def import_figure():
    """matplotlib's Figure, without pyplot's state and backends. Raises Refusal when it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        require(False, f"the picture needs matplotlib: pip install matplotlib ({error})")
    return Figure


def label_ticks(set_ticks, labels: list) -> None:
    """At most 24 ticks, at the positions 0, 1, ... that have these labels."""
    step = math.ceil(len(labels) / 24)
    set_ticks(range(0, len(labels), step), map(str, labels[::step]))


def legend(*both: object) -> None:
    """One legend below a panel for its left and right axes, where no line or bar can be under it."""
    handles = [handle for axes in both for handle in axes.get_legend_handles_labels()[0]]
    both[0].legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=4, frameon=False
    )


def draw_load(axes, found: Diagnosis) -> None:
    shares_EL = 100 * torch.tensor(list(found.load.values())).T
    image = axes.imshow(
        shares_EL.numpy(), aspect="auto", cmap="PuOr_r", vmin=0, vmax=200 / len(shares_EL)
    )
    axes.figure.colorbar(image, ax=axes, extend="max")
    axes.set(xlabel="layer", ylabel="expert")
    label_ticks(axes.set_xticks, list(found.load))
    label_ticks(axes.set_yticks, list(range(len(shares_EL))))
    for expert, x in np.ndindex(shares_EL.shape) if shares_EL.numel() < 200 else ():
        share = shares_EL[expert, x].item()
        colour = "black" if 50 < share * len(shares_EL) < 150 else "white"
        axes.text(x, expert, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=9)


def draw_costs(axes, found: Diagnosis) -> None:
    names = by_cost(found)[::-1]
    everywhere = [found.costs[name][None].nats for name in names]
    costs = [
        (layer, cost.nats, y)
        for y, name in enumerate(names)
        for layer, cost in found.costs[name].items()
    ]
    alone = [(nats, y) for layer, nats, y in costs if layer is not None]
    axes.set_xscale("symlog", linthresh=1e-3)  # costs span decades and may be negative
    axes.barh(range(len(names)), everywhere, color=BLUE, label="in all layers")
    axes.plot(
        *zip(*alone, strict=True),
        "o",
        color=ORANGE,
        mec="black",
        mew=0.5,
        ms=5,
        label="in one layer",
    )
    # The numbers stand beside the names, where no bar can run into them.
    axes.set_yticks(
        range(len(names)),
        [f"{name}  {cost:+.4f}" for name, cost in zip(names, everywhere, strict=True)],
    )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.05)
    axes.set_xlabel("nats per token, logarithmic beyond 0.001")
    legend(axes)


def draw_specialisation(axes, found: Diagnosis) -> None:
    rows, right = list(found.specialisation.values()), axes.twinx()
    axes.bar(
        range(len(rows)),
        [row["shift nats"] for row in rows],
        color=BLUE,
        label="tokens to the next expert",
    )
    axes.set(xlabel="layer", ylabel="cost, nats per token")
    label_ticks(axes.set_xticks, list(found.specialisation))
    for name, style, colour in (("up", "o-", ORANGE), ("down", "s--", RED)):
        values = [row[f"abs cos {name}"] for row in rows]
        right.plot(values, style, color=colour, mec="black", label=f"|cosine| of {name} (right)")
    right.set(ylabel="mean |cosine| between experts", ylim=(0, 1))
    legend(axes, right)


def draw_mu(axes, found: Diagnosis) -> None:
    for name, style, colour in (("q", "o-", BLUE), ("k", "s-", ORANGE), ("v", "^-", GREEN)):
        axes.plot([row[name] for row in found.mu], style, color=colour, label=f"into {name}")
    axes.set(xlabel="layer, in the order of execution", ylabel="ratio")
    axes.set_ylim(bottom=0)
    label_ticks(axes.set_xticks, [row["layer"] for row in found.mu])
    right = axes.twinx() if "rms velocity" in found.mu[0] else None
    if right:
        right.plot([row["rms velocity"] for row in found.mu], "k--", label="velocity (right)")
        right.set_ylabel("RMS of the velocity")
        right.set_ylim(bottom=0)
    legend(*filter(None, (axes, right)))


def picture(found: Diagnosis) -> bytes:
    """A PNG of four panels; one whose subject the model lacks says so. Raises Refusal without matplotlib."""
    figure = import_figure()(figsize=(16, 10), layout="constrained")
    panels = [("Expert load: share in %, white is balance", draw_load, found.load, "no experts")]
    panels += [("Cost of zeroing a branch", draw_costs, found.costs, "")]
    panels += [
        ("Specialisation of experts", draw_specialisation, found.specialisation, "no experts")
    ]
    panels += [("Mu: RMS of what it adds over RMS of the projection", draw_mu, found.mu, "no mu")]
    rows = [
        row.subplots(1, 2) for row in figure.subfigures(2, 1)
    ]  # so that labels of one row do not indent the other
    for axes, (title, draw, subject, absent) in zip(
        [axes for row in rows for axes in row], panels, strict=True
    ):
        axes.set_title(title)
        if subject:
            draw(axes, found)
        else:
            axes.text(
                0.5, 0.5, absent, ha="center", va="center", fontsize=16, transform=axes.transAxes
            )
            axes.set(xticks=[], yticks=[])
    figure.suptitle(found.title(), fontsize=14, fontweight="bold")
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=DPI)
    return png.getvalue()


# ---- Command line


def parse_arguments() -> argparse.Namespace:
    """The command line. Raises Refusal; exits with 0 after --help."""
    usage = "diagnose.py ARTIFACT [--targets N] [--out FOLDER]"
    parser = argparse.ArgumentParser(
        usage=usage,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.error = lambda message: require(False, f"usage: {usage}: {message}")
    parser.add_argument(
        "artifact", type=Path, metavar="ARTIFACT", help="logs/RUN_ID.ptz, as train_gpt.py wrote it"
    )
    parser.add_argument(
        "--targets", type=int, default=100_000, metavar="N", help="the first N; 0 = the whole split"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the two files; default: the artifact's"
    )
    args = parser.parse_args()
    require(args.targets >= 0, f"--targets {args.targets}: expected a number of targets, 0 for all")
    return args


def main() -> None:
    """Diagnose the artifact named on the command line: print the tables, write them and the picture. Raises Refusal."""
    args, hp = parse_arguments(), Hyperparameters.from_env(dict(os.environ))
    folder = args.out or args.artifact.parent
    import_figure()  # better now than after the measurements
    require(folder.is_dir() or not folder.exists(), f"--out {folder}: not a folder")
    hp, dist = (
        replace(hp, eval_seq_len=0, eval_stride=1, val_max_tokens=args.targets),
        Dist.from_torchrun(hp.device),
    )
    require(dist.world_size == 1, f"WORLD_SIZE={dist.world_size}: diagnose.py is for one process")
    torch.set_float32_matmul_precision("highest" if hp.dtype == "float32" else "high")
    model, hp, tokenizer_sha256 = load_artifact(args.artifact, hp, dist.device)
    val = ValData.load(hp, dist.device)
    same = val.tokenizer_sha256 == tokenizer_sha256
    require(same, f"{args.artifact} was trained with another tokenizer (TOKENIZER_PATH)")
    check_tokenizer_made(val.tokens, load_tokenizer(hp)[0], hp.dataset_dir)
    choose_attention(model, dist.device, lambda text: None)
    found = diagnose(model, val, hp, args.artifact.stem)
    text = report(found)
    for data, kind in ((text.encode(), "md"), (picture(found), "png")):
        write_atomically(folder / f"{found.run_id}_diagnosis.{kind}", data)
    print(text, end="")


if __name__ == "__main__":
    run_entry_point(main)
