"""Prepares a dataset: text to files of tokens that training reads.

    tools/bazel run //experiments:prepare_data -- --dataset=openwebtext
    tools/bazel run //experiments:prepare_data -- --dataset='jsonl:in/*.jsonl.zst:text' --out=tokens

Datasets: openwebtext, wikitext103, wikitext2, pile_uncopyrighted, pile_deduplicated, shakespeare,
shakespeare_gpt2, the_pile:<folder of its shards>, text:<glob>, jsonl:<glob>:<field>,
parquet:<glob>:<column>, hf:<name>[:<config>[:<column>]]; quote globs from the shell.

Killed at any moment, it goes on where it was when it is started again; when all is done, it does
nothing. The last line is JSON. Format and details: docs/data_format.md.
Exit codes: flashtrain/errors.
"""

from flashtrain import environment

if __name__ == "__main__":
    environment.start("interrupted")  # before the other imports, which take long

import dataclasses
import json
import sys
from pathlib import Path

from experiments.arguments import Parser
from flashtrain.data.errors import DataError
from flashtrain.data.paths import user_path
from flashtrain.data.sources import prepare
from flashtrain.data.token_files import verify_folder
from flashtrain.train import launcher
from flashtrain.train.console import answer, say

_MOST_WORKERS = 4096


def main() -> int:
    """Prepares, verifies where that is asked for, and prints what there is now."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", help="a name or description, see above")
    parser.add_argument(
        "--out",
        help="the folder of the prepared data; default: ${DATA_DIR}/<name>, else ./data/<name>",
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that tokenise; default: one for each core"
    )
    parser.add_argument(
        "--verify", action="store_true", help="read all files again and compare their checksums"
    )
    arguments = parser.parse()
    if not arguments.dataset:
        raise DataError("--dataset=<name> says what to prepare; --help shows the names")
    if not 0 <= arguments.workers <= _MOST_WORKERS:
        raise DataError(f"--workers={arguments.workers} must be from 0 to {_MOST_WORKERS:,}")
    if arguments.out == "":
        raise DataError("--out= names no folder; leave it out for ${DATA_DIR}/<name>")
    out = None if arguments.out is None else user_path(arguments.out)

    with launcher.interruptible("interrupted; what is done is kept, run it again to go on"):
        summary = prepare(arguments.dataset, out, workers=arguments.workers)
        if arguments.verify:
            folder = Path(summary.manifest).parent
            verify_folder(folder)
            say(f"{folder}: all checksums are right")
    answer(json.dumps(dataclasses.asdict(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
