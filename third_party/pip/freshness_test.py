"""The locks hold what requirements.in asks for, are hashed, pinned, and agree (no network)."""

import pathlib
import re

import lock
import pytest
import split_site
from packaging.requirements import Requirement

FOLDER = pathlib.Path(__file__).parent
UPDATE = "run: bazel run //third_party/pip:update"
REQUIREMENTS = (FOLDER / "requirements.in").read_text()
CPU = (FOLDER / "requirements_cpu.txt").read_text()
CUDA = (FOLDER / "requirements_cuda13.txt").read_text()


def parse(text: str) -> dict[str, set[tuple[str, str, tuple[str, ...]]]]:
    """{name: {(version, marker, hashes)}} of a lock; each line must be pinned and hashed."""
    entries: dict[str, set[tuple[str, str, tuple[str, ...]]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        spec, *rest = line.split("--hash=")
        hashes = tuple(h.strip() for h in rest)
        match = re.fullmatch(r"([a-z0-9-]+)===?([^\s;=]+)\s*(?:;\s*(.+?))?\s*", spec)
        assert match, f"not an exact version: {spec}"
        assert hashes, f"no hash: {spec}"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), f"not a sha256: {line}"
        name, version, marker = match.groups()
        entries.setdefault(name, set()).add((version, marker or "", hashes))
    return entries


def check(requirements: str, cpu_text: str, cuda_text: str) -> None:
    """Raises AssertionError, with the reason, if the locks do not fit requirements.in."""
    digest = lock.requirements_digest(requirements)
    cpu, cuda = parse(cpu_text), parse(cuda_text)
    for name, text in (("requirements_cpu.txt", cpu_text), ("requirements_cuda13.txt", cuda_text)):
        assert f"requirements.in {digest}\n" in text, (
            f"{name} was resolved from another requirements.in; {UPDATE}"
        )
    for line in filter(None, (line.split("#")[0].strip() for line in requirements.splitlines())):
        wanted = Requirement(line)
        for entries in (cpu, cuda):
            locked = entries.get(lock.normalise(wanted.name))
            assert locked, f"{line} is not locked; {UPDATE}"
            for version, _, _ in locked:
                assert wanted.specifier.contains(version.removesuffix("+cpu")), (
                    f"{line}: locked is {version}; {UPDATE}"
                )
    (cpu_torch,), (cuda_torch,) = cpu.pop("torch"), cuda.pop("torch")
    assert cpu_torch[0] == cuda_torch[0] + "+cpu"
    assert len(cuda_torch[2]) == len(lock.PYTHON_VERSIONS), "a wheel of torch for each Python"
    assert not [name for name in cpu if lock.is_cuda_only(name)]
    assert {"triton", "nvidia-cublas"} <= cuda.keys()
    shared = {name: entries for name, entries in cuda.items() if not lock.is_cuda_only(name)}
    different = sorted(
        name for name in cpu.keys() | shared.keys() if cpu.get(name) != shared.get(name)
    )
    assert not different, f"the locks differ in {different}; {UPDATE}"


def test_locks_are_fresh():
    check(REQUIREMENTS, CPU, CUDA)


def edited(text: str, pattern: str, replacement: str) -> str:
    new, count = re.subn(pattern, replacement, text, flags=re.M)
    assert count
    return new


@pytest.mark.parametrize(
    ("requirements", "cpu", "cuda", "reason"),
    [
        (REQUIREMENTS + "flask\n", CPU, CUDA, "another requirements.in"),
        (edited(REQUIREMENTS, "^einops\n", ""), CPU, CUDA, "another requirements.in"),
        (REQUIREMENTS, edited(CPU, r"^numpy==\S+", "numpy>=2.0"), CUDA, "not an exact version"),
        (REQUIREMENTS, edited(CPU, r"^(einops==\S+) \\\n.*\n", r"\1\n"), CUDA, "no hash: einops"),
        (
            REQUIREMENTS,
            edited(CPU, r"^(einops==\S+ \\\n    --hash=sha256:)\w", r"\g<1>"),
            CUDA,
            "not a sha256",
        ),
        (REQUIREMENTS, edited(CPU, r"^numpy==\S+", "numpy==2.0.0"), CUDA, r"differ in \['numpy'\]"),
        (REQUIREMENTS, edited(CPU, r"^anyio==\S+ \\\n.*\n", ""), CUDA, r"differ in \['anyio'\]"),
        (REQUIREMENTS, edited(CPU, r"^einops==\S+ \\\n.*\n", ""), CUDA, "einops is not locked"),
        (REQUIREMENTS, CPU, edited(CUDA, r"^torch===\S+", "torch===2.12.0"), "locked is 2.12.0"),
        (REQUIREMENTS, edited(CPU, r"^torch===\S+", "torch===2.13.0"), CUDA, "cpu"),
    ],
)
def test_stale_or_broken_locks_are_found(requirements, cpu, cuda, reason):
    with pytest.raises(AssertionError, match=reason):
        check(requirements, cpu, cuda)


def test_flash_attn_asks_for_targets_that_are_there():
    """Nothing else builds it without a download of 0.3 GB."""
    packages = {name.replace("-", "_") for name in parse(CUDA)}
    asked = re.findall(r'"@pip//(\w+)"', (FOLDER.parent / "flash_attn/repo.bzl").read_text())
    assert split_site.TORCH in asked
    for package in asked:
        assert package in packages
        assert split_site.package_of(package) == package
