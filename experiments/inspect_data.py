"""Shows what prepared data holds and what a step of training reads of it.

    tools/bazel run //experiments:inspect_data -- --path=data/openwebtext
    tools/bazel run //experiments:inspect_data -- --dataset=openwebtext --window=7
    tools/bazel run //experiments:inspect_data -- --dataset=openwebtext --step=1000

Prints the manifest; the text of a window; the windows and documents of a global step, given the
data.seq_len, data.seed and trainer.global_batch_size of the run. Prepares nothing.
"""

import sys

import numpy as np

from experiments.arguments import Parser
from flashtrain.data import DataError, TokenDataset, describe_samples
from flashtrain.data.dataset import Part
from flashtrain.data.load import parse_mixture
from flashtrain.data.paths import user_path
from flashtrain.data.sources import default_folder
from flashtrain.data.token_files import MANIFEST, read_manifest
from flashtrain.train import launcher


def main() -> int:
    """Prints what the flags ask for."""
    parser = Parser(__doc__)
    parser.add_argument("--path", type=user_path, help="a folder of prepared data")
    parser.add_argument("--dataset", help="instead of --path: as data.source, also a mixture")
    parser.add_argument("--window", type=int, help="print the text of this training window")
    parser.add_argument("--step", type=int, help="list the samples of this global step, from 0 on")
    parser.add_argument("--global_batch_size", type=int, default=512, help="default: 512")
    parser.add_argument("--seq_len", type=int, default=1024, help="default: 1024")
    parser.add_argument("--seed", type=int, default=1111, help="data.seed; default: 1111")
    arguments = parser.parse()
    if (arguments.path is None) == (arguments.dataset is None):
        raise DataError("give either --path=<folder> or --dataset=<name>")
    if arguments.path is not None:
        parts = [Part(arguments.path, 1.0)]
    else:
        mixture = parse_mixture(arguments.dataset)
        parts = [Part(default_folder(name), weight) for weight, name in mixture]
    for part in parts:
        print(f"{part.folder / MANIFEST}\n{read_manifest(part.folder).to_json()}", end="")
    if arguments.window is None and arguments.step is None:
        return 0
    dataset = TokenDataset(parts, seq_len=arguments.seq_len, seed=arguments.seed)
    if arguments.window is not None:
        print(dataset.tokenizer.decode(_window(dataset, arguments.window).tolist()))
    if arguments.step is not None:
        if arguments.step < 0 or arguments.global_batch_size < 1:
            raise DataError("--step must be at least 0 and --global_batch_size at least 1")
        first = arguments.step * arguments.global_batch_size
        samples = range(first, first + arguments.global_batch_size)
        print("\n".join(describe_samples(dataset, samples)))
    return 0


def _window(dataset: TokenDataset, window: int) -> np.ndarray:
    """The tokens of a training window of the first folder."""
    source = dataset.sources[0]
    if not 0 <= window < source.num_windows:
        raise DataError(f"--window={window} must be in [0, {source.num_windows})")
    first = window * dataset.seq_len
    return source.train.tokens[first : first + dataset.seq_len + 1]


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
