"""Shows what prepared data holds and what a step of training reads of it.

    tools/bazel run //experiments:inspect_data -- --path=data/openwebtext
    tools/bazel run //experiments:inspect_data -- --dataset=openwebtext --window=7
    tools/bazel run //experiments:inspect_data -- --dataset=openwebtext --step=1000

Prints the manifest; the text of a window; the windows and documents of a global step, given the
data.seq_len, data.seed and trainer.global_batch_size of the run. Prepares nothing.
"""

from flashtrain import environment

if __name__ == "__main__":
    environment.start("interrupted")  # before the other imports, which take long

import sys
from collections.abc import Iterator

import numpy as np

from experiments.arguments import Parser
from flashtrain.data import DataError, TokenDataset, describe_samples
from flashtrain.data.dataset import Part
from flashtrain.data.load import parse_mixture
from flashtrain.data.manifest import MANIFEST, read_manifest
from flashtrain.data.paths import user_path
from flashtrain.data.sources import default_folder
from flashtrain.train import launcher
from flashtrain.train.console import answer

_SHOWN_AT_ONCE = 1024


def main() -> int:
    """Prints what the flags ask for."""
    parser = Parser(__doc__)
    parser.add_argument("--path", help="a folder of prepared data")
    parser.add_argument("--dataset", help="instead of --path: as data.source, also a mixture")
    parser.add_argument("--window", type=int, help="print the text of this training window")
    parser.add_argument("--step", type=int, help="list the samples of this global step, from 0 on")
    parser.add_argument("--global_batch_size", type=int, default=512, help="default: 512")
    parser.add_argument("--seq_len", type=int, default=1024, help="default: 1024")
    parser.add_argument("--seed", type=int, default=1111, help="data.seed; default: 1111")
    arguments = parser.parse()
    if bool(arguments.path) == bool(arguments.dataset):
        raise DataError("give either --path=<folder> or --dataset=<name>")
    if arguments.path:
        parts = [Part(user_path(arguments.path), 1.0)]
    else:
        mixture = parse_mixture(arguments.dataset)
        parts = [Part(default_folder(name), weight) for weight, name in mixture]
    for part in parts:
        answer(f"{part.folder / MANIFEST}\n{read_manifest(part.folder).to_json().rstrip()}")
    if arguments.window is None and arguments.step is None:
        return 0
    dataset = TokenDataset(parts, seq_len=arguments.seq_len, seed=arguments.seed)
    if arguments.window is not None:
        answer(dataset.tokenizer.decode(_window(dataset, arguments.window).tolist()))
    if arguments.step is not None:
        for samples in _samples(arguments.step, arguments.global_batch_size):
            answer("\n".join(describe_samples(dataset, samples)))
    return 0


def _samples(step: int, global_batch_size: int) -> Iterator[range]:
    """The numbers of a step's samples, some at a time: there may be many."""
    if step < 0 or global_batch_size < 1:
        raise DataError("--step must be at least 0 and --global_batch_size at least 1")
    first, end = step * global_batch_size, (step + 1) * global_batch_size
    if end >= 2**63:
        raise DataError(f"--step={step} of --global_batch_size={global_batch_size} is too far")
    for begin in range(first, end, _SHOWN_AT_ONCE):
        yield range(begin, min(begin + _SHOWN_AT_ONCE, end))


def _window(dataset: TokenDataset, window: int) -> np.ndarray:
    """The tokens of a training window of the first folder."""
    source = dataset.sources[0]
    if not 0 <= window < source.num_windows:
        raise DataError(f"--window={window} must be in [0, {source.num_windows})")
    first = window * dataset.seq_len
    return source.train.read(first, dataset.seq_len + 1)


if __name__ == "__main__":
    sys.exit(launcher.run_main(main))
