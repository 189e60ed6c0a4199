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

import dataclasses
import json
import signal
import sys
from pathlib import Path

from experiments.arguments import Parser
from flashtrain.data.errors import DataError
from flashtrain.data.paths import user_path
from flashtrain.data.sources import prepare
from flashtrain.data.token_files import verify_folder
from flashtrain.train import launcher


def main() -> int:
    """Prepares, verifies where that is asked for, and prints what there is now."""
    parser = Parser(__doc__)
    parser.add_argument("--dataset", help="a name or description, see above")
    parser.add_argument(
        "--out",
        type=user_path,
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
    if arguments.workers < 0:
        raise DataError(f"--workers={arguments.workers} must be at least 0")

    try:
        summary = prepare(arguments.dataset, arguments.out, workers=arguments.workers)
        if arguments.verify:
            folder = Path(summary.manifest).parent
            verify_folder(folder)
            print(f"{folder}: all checksums are right", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; what is done is kept, run it again to go on", file=sys.stderr)
        return 128 + signal.SIGINT
    print(json.dumps(dataclasses.asdict(summary)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
