"""What loading batches adds to the steps of GPT-2 124M.

    tools/bazel run //experiments/benchmarks:bench_batch_loader -- --out=$PWD/results

The same steps (forward, backward, fused AdamW; eager, bf16) are timed with batches from the loader,
out of a token file that the page cache does not hold, and with one batch that is on the device from
the beginning; in turns, so that clocks and heat are the same. Peer: `blocking`, which reads, pins
and copies the batch when the step asks for it.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from flashtrain.data.dataset import TokenDataset
from flashtrain.data.loader import BatchLoader
from flashtrain.data.token_files import write_token_files
from flashtrain.models.gpt import GPT, GPTConfig

SEQ_LEN = 1024
BLOCK_STEPS = 8  # timed together
# Step time of the recipe with torch.compile, from results/gpt2s_h100_202611.md: 64 windows.
RECIPE_STEP_SECONDS = 64 * SEQ_LEN / 474_548

Batch = tuple[torch.Tensor, ...]


def write_tokens(folder: pathlib.Path, count: int) -> None:
    """Random tokens of GPT-2's vocabulary, documents of 1,000 tokens; not in the page cache."""
    generator = np.random.default_rng(0)
    train = generator.integers(0, 50256, count, dtype=np.uint16)
    ends = np.arange(1000, count + 1000, 1000).clip(max=count)
    write_token_files(
        folder,
        {"train": train, "val": train[:2000]},
        ends={"train": ends, "val": np.array([1000, 2000])},
        tokenizer="bytes",  # needs no vocabulary; nothing is decoded here
        vocab_size=50257,
        source={"dataset": "random"},
    )
    forget(folder / "train.bin")


def forget(path: pathlib.Path) -> None:
    """Drops a file from the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def build_step(batch_size: int, device: torch.device) -> Callable[[Batch], None]:
    """A function that does one optimizer step on a batch."""
    config = GPTConfig(
        vocab_size=50257, num_layers=12, d_model=768, num_heads=12, max_seq_len=SEQ_LEN
    )
    model = GPT(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(batch[0], batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds_per_step(step: Callable[[Batch], None], batches: Callable[[], Batch]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(BLOCK_STEPS):
        step(batches())
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / BLOCK_STEPS


def measure(batch_size: int, rounds: int, folder: pathlib.Path) -> dict[str, list[float]]:
    """Seconds per step of each way to get batches, a figure for each round."""
    device = torch.device("cuda")
    step = build_step(batch_size, device)
    dataset = TokenDataset(folder, seq_len=SEQ_LEN, seed=1, document_mask=True)
    loader = BatchLoader(dataset, device=device)
    blocking = iter(range(10**6, 10**9, batch_size))

    def load_now() -> Batch:
        batch = dataset.train_samples(next(blocking), batch_size)
        return tuple(t.pin_memory().to(device, non_blocking=True) for t in batch)

    resident = load_now()
    ways: dict[str, Callable[[], Batch]] = {
        "resident": lambda: resident,
        "loader": lambda: loader.next(batch_size),
        "blocking": load_now,
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    seconds_per_step(step, ways["loader"])  # warm-up
    for round_number in range(rounds):
        order = list(ways.items())
        for way, batches in order[round_number % len(order) :] + order[: round_number % len(order)]:
            forget(folder / "train.bin")
            times[way].append(seconds_per_step(step, batches))
    loader.close()
    return times


def load_seconds(batch_size: int, folder: pathlib.Path) -> tuple[float, float]:
    """Seconds to read one batch alone on the CPU: from the disk and from the page cache."""
    dataset = TokenDataset(folder, seq_len=SEQ_LEN, seed=1, document_mask=True)
    found = []
    for cold in (True, False):
        times = []
        for number in range(5):
            if cold:
                forget(folder / "train.bin")
            start = time.perf_counter()
            dataset.train_samples(number * batch_size, batch_size)
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times))
    return found[0], found[1]


def report(times: dict[str, list[float]], alone: tuple[float, float], batch_size: int) -> str:
    resident = statistics.median(times["resident"])
    lines = [
        "# batch_loader",
        "",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- device: {torch.cuda.get_device_name()}, torch {torch.__version__}",
        f"- date: {datetime.date.today().isoformat()}",
        f"- {batch_size} windows of {SEQ_LEN} tokens a step, with document masks;"
        f" {len(times['resident'])} rounds of {BLOCK_STEPS} steps, medians",
        f"- reading a batch alone takes {alone[0] * 1e3:.2f} ms from the disk,"
        f" {alone[1] * 1e3:.2f} ms from the page cache",
        "",
        "| batches | ms per step | more than resident | of a step of 138 ms (the recipe's) |",
        "|---|---:|---:|---:|",
    ]
    for way, seconds in times.items():
        # Round by round, so that a drift of the clocks cancels.
        more = statistics.median(a - b for a, b in zip(seconds, times["resident"]))
        lines.append(
            f"| {way} | {statistics.median(seconds) * 1e3:.2f} | {more / resident:+.2%} |"
            f" {more / RECIPE_STEP_SECONDS:+.2%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the token file")
    parser.add_argument("--out", help="a folder for the table; default: stdout only")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("bench_batch_loader: torch sees no GPU; without one nothing is copied")
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch) / "tokens"
        write_tokens(folder, arguments.tokens)
        alone = load_seconds(arguments.batch_size, folder)
        times = measure(arguments.batch_size, arguments.rounds, folder)
    text = report(times, alone, arguments.batch_size)
    print(text)
    print(json.dumps(times))
    if arguments.out:
        words = [w for w in torch.cuda.get_device_name().lower().split() if w != "nvidia"]
        name = f"batch_loader_{words[0]}_{datetime.date.today():%Y%m}.md"
        path = pathlib.Path(arguments.out) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
