"""analysis.py NAME LOSSES.pt...: what n-gram mixing gains, by seed; LOSSES has nll, tokens, bytes.

nll (targets,) are eval_sliding.py's losses of the validation split, in nats.
"""
import math, statistics, sys
from unittest import mock
import torch
import eval_sliding
from eval_sliding import bits_per_byte, count_contexts, mix

name, *paths = sys.argv[1:]
runs = [torch.load(path) for path in paths]


def bpb(run, delay=1, **constants):
    with mock.patch.multiple(eval_sliding, **{"NGRAM_ORDER": eval_sliding.NGRAM_ORDER, **constants}):
        losses, _ = mix(run["nll"], run["tokens"], delay)
    return bits_per_byte(losses, run["bytes"])


def row(title, values, base):
    gains = [b - v for b, v in zip(base, values)]
    each = " ".join(f"{v:.4f}" for v in values)
    print(f"| {title} | {each} | {statistics.mean(values):.4f} | {statistics.mean(gains):.4f} | {statistics.stdev(gains) if len(gains) > 1 else 0:.4f} |", flush=True)


print(f"## {name}: {len(runs)} seeds, {len(runs[0]['nll'])} targets, {int(runs[0]['bytes'].sum())} bytes")
print("| | val_bpb of each seed | mean | gain | std of gain |\n|---|---|---|---|---|")
off = [bits_per_byte(r["nll"], r["bytes"]) for r in runs]
row("off", off, off)
row("on", [bpb(r) for r in runs], off)
uniform = [dict(r, nll=torch.full_like(r["nll"], math.log(1024))) for r in runs[:1]]
print(f"| on, of a model that gives all tokens the same | {bpb(uniform[0]):.4f} | | | |")
for order in (0, 1, 2, 3, 4, 6, 12):
    row(f"contexts of {order} tokens at most", [bpb(r, NGRAM_ORDER=order) for r in runs], off)
row("nothing by document", [bpb(r, NGRAM_LOCAL_ORDER=-1) for r in runs], off)
row("all orders by document too", [bpb(r, NGRAM_LOCAL_ORDER=8) for r in runs], off)
for delay in (64, 8192, 32768):
    row(f"counts {delay} targets late", [bpb(r, delay) for r in runs], off)

print("\n## By document\n| seed | documents | median gain | 10 % gain less than | share that lose | largest loss | of its bytes | without the longest: off | on |\n|---|---|---|---|---|---|---|---|---|")
groups = {}
for seed, r in enumerate(runs, 1):
    mixed, _ = mix(r["nll"], r["tokens"])
    bos = (r["tokens"][:-1] == 1).nonzero()[:, 0].tolist()
    ends = bos[1:] + [len(mixed)]
    docs = []
    for a, b in zip(bos, ends):
        size = int(r["bytes"][a:b].sum())
        before = bits_per_byte(r["nll"][a:b], r["bytes"][a:b]); after = bits_per_byte(mixed[a:b], r["bytes"][a:b])
        docs.append((before - after, size, before, after, b - a, a))
    gains = sorted(d[0] for d in docs)
    worst = min(docs)
    longest = max(docs, key=lambda d: d[4])
    rest = torch.ones(len(mixed), dtype=torch.bool); rest[longest[5]:longest[5] + longest[4]] = False
    lose = sum(g < 0 for g in gains)
    print(f"| {seed} | {len(docs)} | {statistics.median(gains):.4f} | {gains[len(gains) // 10]:.4f} | {lose} of {len(docs)} | {max(-worst[0], 0):.4f} | {worst[1]} | {bits_per_byte(r['nll'][rest], r['bytes'][rest]):.4f} | {bits_per_byte(mixed[rest], r['bytes'][rest]):.4f} |")
    def group(kind, key, edges, names):
        for d in docs:
            groups.setdefault((kind, names[sum(key(d) >= e for e in edges)]), [[] for _ in runs])[seed - 1].append(d)
    group("tokens", lambda d: d[4], (500, 1500, 5000), ("below 500", "500 to 1,500", "1,500 to 5,000", "5,000 and more"))
    group("place in the split", lambda d: d[5] / len(mixed), (.05, .25, .5, .75), ("first 5 %", "5 to 25 %", "25 to 50 %", "50 to 75 %", "last quarter"))
    group("val_bpb off", lambda d: d[2], (2.2, 2.5, 2.8), ("below 2.2", "2.2 to 2.5", "2.5 to 2.8", "2.8 and more"))
print("\n| documents by | | documents (seed 1) | off | on | gain | lose (seed 1) |\n|---|---|---|---|---|---|---|")
for (kind, value), seeds in groups.items():
    def total(docs, i): return sum(d[i] * d[1] for d in docs) / sum(d[1] for d in docs)
    seeds = [s for s in seeds if s]
    a = statistics.mean(total(s, 2) for s in seeds); b = statistics.mean(total(s, 3) for s in seeds)
    print(f"| {kind} | {value} | {len(seeds[0])} | {a:.4f} | {b:.4f} | {a - b:.4f} | {sum(d[0] < 0 for d in seeds[0])} |")
