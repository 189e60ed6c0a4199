"""What every benchmark shares: how time is taken, the copy ceiling, and the table that is written.

Times are medians of runs with cold caches, after overwriting a buffer larger than the last-level
cache. On CUDA each function is timed twice: a call as `triton.testing.do_bench` sees it, where the
device waits for Python and for launches, and the device's own time, taken by CUDA events while the
device is held busy until all launches are queued (as in a training step, whose host runs ahead). On
the CPU `time.perf_counter` takes the call alone, and memory that is freed stays with the process:
the page faults of fresh memory take as long as these kernels, and come and go. Bandwidth counts
bytes once: every input read once and every output written once, whatever a kernel really moves. The
ceiling is a device-to-device copy measured in the same run. Where a row has FLOPs its rate is
FLOP/s, and its ceiling is the row of implementation MATMUL of the same case: the case's matrix
products alone, by torch.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import functools
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch

CACHE_BYTES = 256 * 2**20  # more than any last-level cache
MATMUL = "matmul"
HOLD_CYCLES = 4_000_000  # 2 ms at 2 GHz: far longer than any function here takes to launch


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: what ran, on what, how long."""

    case: str
    implementation: str
    call_seconds: float
    device_seconds: float | None  # None on the CPU
    bytes: int
    flops: int | None = None  # where given, the row's rate is FLOP/s instead of bytes/s

    def rate(self, seconds: float) -> float:
        """GB/s, or TFLOP/s where the row has FLOPs."""
        return self.bytes / seconds / 1e9 if self.flops is None else self.flops / seconds / 1e12

    @property
    def unit(self) -> str:
        return "GB/s" if self.flops is None else "TFLOP/s"


def parse_arguments(description: str, peers: tuple[str, ...]) -> argparse.Namespace:
    """--device, --peers, --out; the first line of the calling script's docstring as help."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--peers",
        default=None,
        help=f"comma-separated, of {', '.join(peers)}; default: all on CUDA, eager on the CPU",
    )
    parser.add_argument(
        "--out", help="a folder, or a .md file, for the table; default: stdout only"
    )
    arguments = parser.parse_args()
    arguments.device = torch.device(arguments.device)
    if arguments.peers is None:
        arguments.peers = peers if arguments.device.type == "cuda" else ("eager",)
    else:
        arguments.peers = tuple(filter(None, arguments.peers.split(",")))
        if unknown := set(arguments.peers) - set(peers):
            parser.error(f"--peers: {', '.join(unknown)}; supported: {', '.join(peers)}")
    if arguments.device.type == "cpu":
        _keep_freed_memory()
    return arguments


def _keep_freed_memory() -> None:
    """Has malloc take all memory from its heap, and never give back what lies at the heap's end."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
    libc.mallopt(m_mmap_max, 0)
    libc.mallopt(m_trim_threshold, -1)


def measure(
    case: str,
    implementation: str,
    function: Callable[[], object],
    moved_bytes: int,
    device: torch.device,
    flops: int | None = None,
) -> Row:
    """Times a function and prints the result."""
    on_device = device_seconds(function) if device.type == "cuda" else None
    row = Row(case, implementation, call_seconds(function, device), on_device, moved_bytes, flops)
    rate = row.rate(on_device or row.call_seconds)
    print(f"{case:60s} {implementation:8s} {rate:8.1f} {row.unit}", flush=True)
    return row


def device_seconds(function: Callable[[], object]) -> float:
    """Median time that the device works on a call whose launches were all queued before."""
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(31)]
    function()
    for start, end in events:
        cache.zero_()
        torch.cuda._sleep(HOLD_CYCLES)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def call_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Median time of a call, after a warm-up."""
    if device.type == "cuda":
        import triton  # only where there is CUDA

        return triton.testing.do_bench(function, warmup=50, rep=200, return_mode="median") / 1e3
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8)
    times: list[float] = []
    function()
    while len(times) < 5 or (sum(times) < 0.5 and len(times) < 50):
        cache.zero_()
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def copy_ceiling(device: torch.device) -> float:
    """GB/s of a copy within the device's memory, reads and writes both counted."""
    source = torch.ones(2**30 if device.type == "cuda" else 2**27, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    seconds = device_seconds(copy) if device.type == "cuda" else call_seconds(copy, device)
    return 2 * source.numel() / seconds / 1e9


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with open("/proc/cpuinfo") as file:
        models = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {torch.get_num_threads()} threads"


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _rounded(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2f}"


def _table(rows: list[Row], ceiling: float, seconds: Callable[[Row], float]) -> list[str]:
    """A line for each case, a column for each implementation; the first one is ours."""
    names = list(dict.fromkeys(row.implementation for row in rows))
    unit = rows[0].unit
    peers = [name for name in names[1:] if name != MATMUL]
    has_ceiling = unit == "GB/s" or MATMUL in names
    header = ["case", *(f"{name}, us ({unit})" for name in names)]
    header += [f"{names[0]} / {'copy' if unit == 'GB/s' else MATMUL}"] if has_ceiling else []
    header += [f"best other / {names[0]}, time"] if peers else []
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for case in dict.fromkeys(row.case for row in rows):
        of_case = {row.implementation: row for row in rows if row.case == case}
        rates = {name: row.rate(seconds(row)) for name, row in of_case.items()}
        ours = of_case[names[0]]
        others = [seconds(of_case[name]) for name in peers if name in of_case]
        cells = [
            f"{seconds(of_case[name]) * 1e6:.1f} ({_rounded(rates[name])})"
            if name in of_case
            else "-"
            for name in names
        ]
        if has_ceiling:
            limit = ceiling if unit == "GB/s" else rates.get(MATMUL)
            cells.append(f"{rates[names[0]] / limit:.2f}" if limit else "-")
        if peers:
            cells.append(f"{min(others) / seconds(ours):.2f}" if others else "-")
        lines.append([case, *cells])
    return [f"| {' | '.join(line)} |" for line in lines]


def _tables(rows: list[Row], ceiling: float, seconds: Callable[[Row], float]) -> list[str]:
    """A table for each unit among the rows."""
    lines: list[str] = []
    for unit in dict.fromkeys(row.unit for row in rows):
        lines += [""] if lines else []
        lines += _table([row for row in rows if row.unit == unit], ceiling, seconds)
    return lines


def report(
    what: str,
    rows: list[Row],
    ceiling: float,
    arguments: argparse.Namespace,
    notes: Sequence[str] = (),
) -> None:
    """Prints the table, then notes; with --out, writes them to <what>_<device>_<yyyymm>.md."""
    name = device_name(arguments.device)
    versions = {p: _version(p) for p in ("torch", "triton", "liger-kernel")}
    today = datetime.date.today()
    call_table = _tables(rows, ceiling, lambda row: row.call_seconds)
    if all(row.device_seconds for row in rows):
        device_table = _tables(rows, ceiling, lambda row: row.device_seconds or 0.0)
        tables = ["## On the device", "", *device_table, "", "## As called", "", *call_table]
    else:
        tables = call_table
    text = "\n".join(
        [
            f"# {what}",
            "",
            f"- command: `python {' '.join(sys.argv)}`",
            f"- device: {name}",
            f"- date: {today.isoformat()}",
            f"- versions: {', '.join(f'{p} {v}' for p, v in versions.items() if v)}, "
            f"Python {platform.python_version()}",
            f"- ceiling: copy at {_rounded(ceiling)} GB/s, measured in this run",
            "",
            *tables,
            "",
            *notes,
        ]
    )
    print(text)
    if not arguments.out:
        return
    path = pathlib.Path(arguments.out)
    if path.suffix != ".md":
        # "NVIDIA H100 80GB HBM3" -> "h100"
        words = [w for w in name.lower().split() if w != "nvidia"]
        short = words[0] if arguments.device.type == "cuda" else "cpu"
        path = path / f"{what}_{short}_{today:%Y%m}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(f"wrote {path}", file=sys.stderr)
