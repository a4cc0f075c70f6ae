"""Check that no document of finished shards is in both splits, by hashes of what is between BOS.

python data/check_splits.py data/datasets/fineweb10B_sp1024
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from tokenize_docs import document_hashes, say

from train_gpt import Progress, list_shards, require, run_entry_point


def main(argv: list[str] | None = None) -> None:
    """Run the command line. Raises ConfigError when training has a document of validation."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the shards")
    folder = parser.parse_args(argv).folder

    held_out = frozenset(document_hashes(list_shards(folder, "val")))
    count = 0
    repeated = []
    with Progress("checking", 0) as progress:
        for count, digest in enumerate(document_hashes(list_shards(folder, "train")), 1):
            if digest in held_out:
                repeated.append(count)
            progress.update(0, f"{count:,} training documents, {len(repeated):,} of validation")

    found = f"{folder}: {count:,} training and {len(held_out):,} different validation documents"
    first = f"number {repeated[0]:,} is the first" if repeated else ""
    require(not repeated, f"{found}, {len(repeated):,} of training are in validation, too; {first}")
    say(f"{found}, none in both splits")


if __name__ == "__main__":
    run_entry_point(main)
