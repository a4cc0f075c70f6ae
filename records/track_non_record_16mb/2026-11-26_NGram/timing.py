"""Print time and memory of n-gram mixing.   timing.py TARGETS THREADS zipf|text|one

zipf: 8,192 tokens by Zipf's law, documents of 900 tokens, a third of the text copied from earlier
text; text: the first training shard of DATA_PATH over and over; one: a single token.
"""

import os
import resource
import sys
import time

import numpy as np
import torch

import eval_sliding


def zipf_text(count: int, vocab_size: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    shares = 1 / (np.arange(vocab_size - 2) + 3.7)
    ranks = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(count))
    tokens = (ranks + 2).clip(max=vocab_size - 1).astype(np.int32)
    lengths = rng.geometric(1e-3, size=count // 900)
    tokens[np.cumsum(lengths) % count] = 1  # BOS

    place = 1000
    while place < count:
        place += int(rng.geometric(1 / 400))
        source = int(rng.integers(0, place))
        length = min(int(rng.geometric(1 / 200)), count - place, place - source)
        if length > 0:
            tokens[place : place + length] = tokens[source : source + length]
            place += length
    return tokens


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


targets = int(sys.argv[1])
threads = int(sys.argv[2])
kind = sys.argv[3]
torch.set_num_threads(threads)
if kind == "zipf":
    tokens = zipf_text(targets + 1, 8192)
elif kind == "text":
    shard = f"{os.environ['DATA_PATH']}/fineweb_train_000000.bin"
    text = np.fromfile(shard, np.uint16, offset=1024).astype(np.int32)
    tokens = np.resize(text, targets + 1)
else:
    tokens = np.full(targets + 1, 7, np.int32)
tokens = torch.from_numpy(tokens)
losses = 6 * torch.rand(targets)

before = peak_bytes()
started = time.perf_counter()
worked = time.process_time()
mixed, _ = eval_sliding.mix(losses, tokens)
wall = time.perf_counter() - started
cpu = time.process_time() - worked
per_target = (peak_bytes() - before) / targets
print(
    f"{kind} {targets} targets, {threads} threads: {wall:.1f} s, {cpu:.1f} s of CPU, "
    f"{per_target:.0f} bytes a target, {peak_bytes() / 1e9:.1f} GB in all, "
    f"mean loss {losses.mean():.4f} -> {mixed.mean():.4f}"
)
