"""Coverage-guided search for files that a reader does not refuse as it should; needs `pip install atheris`.

    python tests/fuzz.py artifact --seconds 240        or shard, or manifest; exit status 1 after a crash

Cases are those of helpers_hostile.py. A case that takes 20 s or 4 GB counts as a crash. The case that crashed is saved
beside the corpus in logs/fuzz_TARGET/ and runs again by `python tests/fuzz.py TARGET --case FILE`."""

import argparse
import functools
import os
import random
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "data"), str(ROOT / "records")]
READERS = ["train_gpt", "cached_challenge_fineweb", "tokenize_docs"]
LIMITS = ["-timeout=20", "-rss_limit_mb=4096", "-max_len=200", "-len_control=0"]
SEEDS = 100


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", choices=["artifact", "shard", "manifest"])
    parser.add_argument(
        "--seconds", type=int, default=240, metavar="N", help="default: %(default)s"
    )
    parser.add_argument("--case", type=Path, metavar="FILE", help="run one saved case")
    parser.add_argument("--worker", type=Path, metavar="CORPUS", help=argparse.SUPPRESS)
    return parser.parse_args()


def work(args: argparse.Namespace) -> None:
    """The loop of libFuzzer, which ends its process itself."""
    import atheris

    with atheris.instrument_imports(include=READERS):
        import helpers_hostile
    run_case, folder = helpers_hostile.TARGETS[args.target], args.worker.with_name("files")
    folder.mkdir(exist_ok=True)
    run_case(
        folder, b""
    )  # the first model imports half of torch, which may take longer than a case may
    what = (
        [str(args.case)]
        if args.case
        else [f"-max_total_time={args.seconds}", *LIMITS, str(args.worker)]
    )
    command = [
        sys.argv[0],
        *what,
        f"-artifact_prefix={args.worker.parent}/",
        "-print_final_stats=1",
    ]
    atheris.Setup(command, functools.partial(run_case, folder))
    atheris.Fuzz()


def failures(folder: Path) -> set[Path]:
    return {path for kind in ("crash", "timeout", "oom") for path in folder.glob(f"{kind}-*")}


def main() -> None:
    """Run the search in a process of its own, for libFuzzer leaves by _exit, and report it in one line."""
    args = parse_arguments()
    if args.worker:
        return work(args)
    try:
        import atheris  # noqa: F401
    except ImportError:
        sys.exit("error: fuzzing needs the package atheris: pip install atheris")
    corpus, rng = ROOT / "logs" / f"fuzz_{args.target}" / "corpus", random.Random(0)
    corpus.mkdir(parents=True, exist_ok=True)
    for number in range(SEEDS):
        (corpus / f"seed{number}").write_bytes(rng.randbytes(rng.randint(8, 100)))
    before, log = failures(corpus.parent), corpus.with_name("log.txt")
    command, env = (
        [sys.executable, __file__, *sys.argv[1:], "--worker", str(corpus)],
        {"OMP_NUM_THREADS": "1"},
    )
    with open(log, "w") as out:
        code = subprocess.run(
            command, env=os.environ | env, stdout=out, stderr=out, check=False
        ).returncode
    text, crashes = log.read_text(errors="replace"), sorted(failures(corpus.parent) - before)
    if code or crashes:
        print(text[-6000:], *(f"crash: {path}" for path in crashes), sep="\n")
    count, seconds = (
        int(n)
        for n in re.search(r"Done (\d+) runs in (\d+) s", text + "Done 0 runs in 0 s").groups()
    )
    count = max([count, *map(int, re.findall(r"number_of_executed_units: (\d+)", text))])
    print(f"{args.target}: {count} cases, {max(len(crashes), code != 0)} crashes, {seconds} s")
    sys.exit(1 if code or crashes else 0)


if __name__ == "__main__":
    main()
