"""Score an artifact of train_gpt.py by sliding window, from the artifact, a tokenizer and validation shards alone.

    python eval_sliding.py logs/RUN_ID.ptz
    torchrun --standalone --nproc_per_node=8 eval_sliding.py logs/RUN_ID.ptz

Every window but the first scores only its last EVAL_STRIDE targets, so that each has a long context and none is scored
twice. The model comes from the artifact; the environment sets DATA_PATH, TOKENIZER_PATH, EVAL_STRIDE, EVAL_SEQ_LEN,
VAL_MAX_TOKENS (a PARTIAL score), MICRO_BATCH_TOKENS, DTYPE, ATTENTION, DEVICE and COMPILE. It appends to the log of the
training.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch

from train_gpt import (
    Dist,
    Hyperparameters,
    Log,
    ValData,
    can_compile,
    choose_attention,
    evaluate,
    load_artifact,
    require,
    run_entry_point,
)


def main() -> None:
    """Score the artifact named on the command line and end the log with one JSON line. Raises Refusal."""
    if sys.argv[1:] in (["-h"], ["--help"]):
        print(__doc__)
        return
    require(len(sys.argv) == 2, f"usage: {sys.argv[0]} ARTIFACT (more with --help)")
    started, path, hp = time.perf_counter(), Path(sys.argv[1]), Hyperparameters.from_env(os.environ)
    dist = Dist.from_torchrun(hp.device)
    torch.set_float32_matmul_precision("high")
    model, hp, tokenizer_sha256 = load_artifact(path, hp, dist.device)
    val = ValData.load(hp, dist.device)
    require(val.tokenizer_sha256 == tokenizer_sha256, f"{path} was trained with another tokenizer (TOKENIZER_PATH)")
    log = Log(dist, path.with_suffix(".txt"))
    window, compiles = hp.eval_seq_len or hp.train_seq_len, can_compile(hp, dist.device)
    log(f"sliding evaluation of {path} window:{window} stride:{hp.eval_stride} world_size:{dist.world_size}")
    choose_attention(model, dist.device, log)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiles else model
    score = evaluate(forward, val, hp, dist, hp.eval_stride, "slide")
    log(f"quantized_sliding_window {score} eval_time:{1000 * score.seconds:.0f}ms")
    log(f"final_sliding_window_exact {score}")
    log(f"target_tokens:{score.target_tokens} scored_bytes:{score.scored_bytes}")
    log(f"total_eval_time:{time.perf_counter() - started:.1f}s")
    result = {"event": "eval_summary", "artifact_path": str(path), "partial": score.partial, "stride": hp.eval_stride}
    result |= {"val_bpb": None if score.partial else score.bpb, "val_loss": score.val_loss, "seq_len": window}
    result |= {"target_tokens": score.target_tokens, "scored_bytes": score.scored_bytes, "eval_seconds": score.seconds}
    log(json.dumps(result))
    if dist.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_entry_point(main)
