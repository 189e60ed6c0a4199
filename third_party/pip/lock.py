"""Resolves requirements.in into hashed locks: requirements_cuda13.txt and requirements_cpu.txt.

Each lock serves every supported Python. pip resolves for the oldest one first; the others are
held to the same versions where that is possible, and where it is not, the lock has a line for each,
with a marker. The CPU lock is the CUDA lock without CUDA's packages and with another torch.

Run by `bazel run //third_party/pip:update`. Needs an interpreter of each supported version and
pip 23 or newer.
"""

import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

import split_site

PYTHON_VERSIONS = ("3.11", "3.12")
_HEADER = """\
# {title} for CPython {pythons} on Linux x86_64.
# Written by: bazel run //third_party/pip:update
# Resolved from requirements.in {digest}
"""

# {normalised name: {version: {hash: set of Python versions}}}
Lock = dict[str, dict[str, dict[str, set[str]]]]


def normalise(name: str) -> str:
    """The name as package indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_cuda_only(name: str) -> bool:
    """Whether a package belongs to torch's CUDA build: triton and CUDA's libraries."""
    return (
        name != split_site.TORCH
        and split_site.package_of(split_site.label_name(name)) == split_site.TORCH
    )


def requirements_digest(requirements: str) -> str:
    """A short hash of what requirements.in asks for, comments and order aside."""
    lines = sorted(line.split("#")[0].strip() for line in requirements.splitlines())
    return "sha256:" + hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()[:16]


def find_interpreter(version: str) -> str:
    """A CPython of that version with pip, on PATH or in pyenv's folder; exits if there is none."""
    root = pathlib.Path(os.environ.get("PYENV_ROOT", pathlib.Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}")]
    candidates += sorted(str(p) for p in root.glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in filter(None, candidates):
        # pyenv puts wrappers on PATH that fail when the version is not the selected one.
        if (
            subprocess.run([candidate, "-m", "pip", "--version"], capture_output=True).returncode
            == 0
        ):
            return candidate
    sys.exit(f"update needs CPython {' and '.join(PYTHON_VERSIONS)} with pip; no {version} found")


def resolve(python: str, args: list[str]) -> list[dict] | str:
    """What pip would install: the entries of its report, or its error output."""
    with tempfile.TemporaryDirectory() as folder:
        report = os.path.join(folder, "report.json")
        command = [python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        command += ["--only-binary=:all:", "--report", report, *args]
        env = os.environ | {"PYTHONPATH": ""}
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        if run.returncode != 0:
            return run.stderr
        return json.loads(pathlib.Path(report).read_text())["install"]


def add(lock: Lock, entries: list[dict], python_version: str) -> None:
    """Enters pip's choices for one Python."""
    for entry in entries:
        name, version = normalise(entry["metadata"]["name"]), entry["metadata"]["version"]
        digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        lock.setdefault(name, {}).setdefault(version, {}).setdefault(digest, set()).add(
            python_version
        )


def pins(lock: Lock) -> str:
    """The lock as a constraints file without hashes."""
    return "".join(f"{name}=={version}\n" for name in lock for version in lock[name])


def render(lock: Lock, title: str, digest: str) -> str:
    """The lock as a requirements file."""
    lines = [_HEADER.format(title=title, pythons=" and ".join(PYTHON_VERSIONS), digest=digest)]
    for name in sorted(lock):
        for version, hashes in sorted(lock[name].items()):
            pythons = set().union(*hashes.values())
            marker = ""
            if pythons != set(PYTHON_VERSIONS):
                marker = " ; " + " or ".join(f'python_version == "{v}"' for v in sorted(pythons))
            # "==2.13.0" would also take a 2.13.0+cpu that pip happens to find.
            operator = "===" if name == "torch" else "=="
            lines.append(f"{name}{operator}{version}{marker} \\\n")
            lines.append(
                " \\\n".join(f"    --hash=sha256:{digest}" for digest in sorted(hashes)) + "\n"
            )
    return "".join(lines)


def resolve_cuda(requirements: pathlib.Path, interpreters: dict[str, str]) -> Lock:
    """Resolves everything, with torch's CUDA build, for each Python."""
    lock: Lock = {}
    for version, python in interpreters.items():
        print(f"resolving for CPython {version}", flush=True)
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(pins({name: v for name, v in lock.items() if name != "torch"}))
            constraints.flush()
            entries = resolve(python, ["-r", str(requirements), "-c", constraints.name])
        if isinstance(entries, str):
            print(
                f"CPython {version} cannot have the same versions; resolving on its own", flush=True
            )
            entries = resolve(python, ["-r", str(requirements)])
        if isinstance(entries, str):
            sys.exit(f"pip finds no solution for CPython {version}:\n{entries}")
        add(lock, entries, version)
    return lock


def cpu_torch(
    version: str, interpreters: dict[str, str], old_lock: str
) -> dict[str, dict[str, set[str]]]:
    """Hashes of torch's CPU wheels: those that pip finds, and those in the lock so far."""
    hashes: dict[str, set[str]] = {}
    for python_version, python in interpreters.items():
        entries = resolve(python, ["--no-deps", f"torch=={version}"])
        if isinstance(entries, str):
            print(
                f"pip finds no torch {version} for CPython {python_version}; known hashes are kept"
            )
            continue
        hashes[entries[0]["download_info"]["archive_info"]["hashes"]["sha256"]] = set(
            PYTHON_VERSIONS
        )
    line = re.search(
        rf"^torch==={re.escape(version)}[^#\n]*\\\n((?:    --hash=.*\n)+)", old_lock, re.M
    )
    for digest in re.findall(r"sha256:(\w+)", line.group(1)) if line else []:
        hashes[digest] = set(PYTHON_VERSIONS)
    if not hashes:
        sys.exit(f"pip finds no wheel of torch {version}, so the CPU lock cannot be made here")
    return {version: hashes}


def main() -> None:
    """Rewrites both locks in the source tree."""
    folder = pathlib.Path(os.environ.get("BUILD_WORKSPACE_DIRECTORY", "."), "third_party/pip")
    interpreters = {version: find_interpreter(version) for version in PYTHON_VERSIONS}
    digest = requirements_digest((folder / "requirements.in").read_text())
    cuda = resolve_cuda(folder / "requirements.in", interpreters)
    (torch_version,) = cuda["torch"]
    cpu_path = folder / "requirements_cpu.txt"
    old = cpu_path.read_text() if cpu_path.exists() else ""
    cpu = {name: versions for name, versions in cuda.items() if not is_cuda_only(name)}
    cpu["torch"] = cpu_torch(f"{torch_version}+cpu", interpreters, old)
    (folder / "requirements_cuda13.txt").write_text(
        render(cuda, "Every package, with torch for CUDA 13,", digest)
    )
    cpu_path.write_text(render(cpu, "Every package, with torch for CPUs only,", digest))
    print(f"locked {len(cuda)} packages for CUDA 13 and {len(cpu)} for CPUs")


if __name__ == "__main__":
    main()
