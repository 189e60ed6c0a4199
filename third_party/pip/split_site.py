"""Splits one installed site-packages folder into a Bazel package for each distribution.

`<name>/site` holds the files of one distribution and is used as one label: a folder costs one link
in a target's runfiles, torch's 12,000 files would cost 12,000. `<name>/BUILD.bazel` makes it a
py_library whose deps are the distribution's requirements. Torch, triton and CUDA's libraries share
`torch/site`: they find each other by paths relative to one site-packages folder.

Run by the repository rule with the interpreter that the packages are for; needs `packaging` among
the packages.
"""

import argparse
import collections
import compileall
import importlib.metadata
import importlib.util
import os
import pathlib
import py_compile
import re
import sys
from collections.abc import Iterator

TORCH = "torch"
# But for nvidia-ml-py, which is plain Python and asks the driver.
_SHARES_TORCH_SITE = re.compile(r"(torch|triton|nvidia_(?!ml_py$).*|cuda_.*)$")
# What a distribution uses without saying so: torch warns at every start when there is no numpy.
_UNSAID_REQUIREMENTS = {"torch": {"numpy"}}
# A package of its own inside the folder would hide its files from Bazel; torch's wheel ships one.
_BAZEL_FILES = {"BUILD", "BUILD.bazel", "WORKSPACE", "WORKSPACE.bazel", "MODULE.bazel"}
# Nothing imports the packages' own tests; compiling them takes a third of the time.
_NOT_COMPILED = re.compile(r"/tests?/|/_?testing/")

_BUILD = """\
load("@rules_python//python:defs.bzl", "py_binary", "py_library")

package(default_visibility = ["//visibility:public"])

py_library(
    name = "{name}",
    data = ["site"],
    imports = ["site"],
    deps = [
        "//:isolation",{deps}
    ],
)
"""

_CONSOLE_SCRIPT = """
py_binary(
    name = "{script}_bin",
    srcs = ["{script}_bin.py"],
    python_version = "PY3",
    deps = [":{package}"],
)
"""

_CONSOLE_SCRIPT_MAIN = """\
import sys
from collections.abc import Iterator

from {module} import {function}

sys.exit({function}())
"""

_ALIAS = """\
alias(
    name = "{name}",
    actual = "{actual}",
    visibility = ["//visibility:public"],
)
"""


def label_name(name: str) -> str:
    """The distribution's name as a Bazel package: "Absl.Py" is absl_py."""
    return re.sub(r"[-_.]+", "_", name).lower()


def package_of(name: str) -> str:
    """The Bazel package whose site folder holds a distribution."""
    return TORCH if _SHARES_TORCH_SITE.match(name) else name


class Distributions:
    """The distributions installed in one folder, by their label names."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self.by_name = {
            label_name(d.metadata["Name"]): d
            for d in importlib.metadata.distributions(path=[str(folder)])
        }

    def _requirements(self, name: str) -> Iterator:
        from packaging.requirements import (
            Requirement,
        )  # of the installed packages; main() puts them on sys.path

        for text in self.by_name[name].requires or []:
            requirement = Requirement(text)
            if label_name(requirement.name) in self.by_name:
                yield requirement

    def requirements(self) -> dict[str, set[str]]:
        """What each distribution needs of the others, as far as it is installed.

        An optional requirement counts if a distribution asks for that extra ("fsspec[http]").
        """
        extras: dict[str, set[str]] = collections.defaultdict(lambda: {""})
        needs: dict[str, set[str]] = {}
        while True:
            before = {name: set(e) for name, e in extras.items()}, dict(needs)
            for name in self.by_name:
                needs[name] = _UNSAID_REQUIREMENTS.get(name, set()) & self.by_name.keys()
                for r in self._requirements(name):
                    if r.marker and not any(r.marker.evaluate({"extra": e}) for e in extras[name]):
                        continue
                    needs[name].add(label_name(r.name))
                    extras[label_name(r.name)] |= r.extras
            if before == ({name: set(e) for name, e in extras.items()}, needs):
                return needs

    def files(self, name: str) -> Iterator[pathlib.PurePosixPath]:
        """Files that a distribution has in the folder, compiled ones included, from its RECORD."""
        for path in self.by_name[name].files or []:
            if (
                path.is_absolute() or ".." in path.parts
            ):  # scripts and man pages, which lie beside the folder
                continue
            if path.name not in _BAZEL_FILES:
                yield pathlib.PurePosixPath(path)
            if path.suffix == ".py":
                compiled = pathlib.PurePosixPath(importlib.util.cache_from_source(str(path)))
                if (self.folder / compiled).exists():
                    yield compiled

    def console_scripts(self, name: str) -> dict[str, tuple[str, str]]:
        """{script: (module, function)} of a distribution."""
        points = self.by_name[name].entry_points.select(group="console_scripts")
        return {p.name: (p.module, p.attr) for p in points if p.attr and p.attr.isidentifier()}


def byte_compile(folder: pathlib.Path) -> None:
    """Compiles what can be compiled, so that nothing is compiled again in every test's sandbox.

    By hash, not by time stamp, and with relative paths, so that equal wheels give equal bytes.
    """
    compileall.compile_dir(
        folder,
        quiet=2,  # some wheels ship files of other Python versions
        rx=_NOT_COMPILED,
        workers=0,
        stripdir=str(folder),
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def move_files(installed: Distributions, out: pathlib.Path) -> None:
    """Moves each distribution's files to its package's site folder."""
    moved: dict[pathlib.PurePosixPath, pathlib.Path] = {}
    for name in sorted(installed.by_name):
        for path in installed.files(name):
            target = out / package_of(name) / "site" / path
            if target.exists():
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            if path in moved:  # two distributions ship the same file: each keeps it
                os.link(moved[path], target)
            else:
                os.rename(installed.folder / path, target)
                moved[path] = target


def write_packages(installed: Distributions, out: pathlib.Path) -> None:
    """Writes <name>/BUILD.bazel for each distribution, and the programs that it names."""
    needs: dict[str, set[str]] = collections.defaultdict(set)
    for name, required in installed.requirements().items():
        package = package_of(name)
        needs[package] |= {package_of(r) for r in required} - {package}
    for package, required in needs.items():
        deps = "".join(f'\n        "//{r}",' for r in sorted(required))
        (out / package).mkdir(parents=True, exist_ok=True)
        build = _BUILD.format(name=package, deps=deps)
        for script, (module, function) in sorted(installed.console_scripts(package).items()):
            main = _CONSOLE_SCRIPT_MAIN.format(module=module, function=function)
            (out / package / f"{script}_bin.py").write_text(main)
            build += _CONSOLE_SCRIPT.format(script=script, package=package)
        (out / package / "BUILD.bazel").write_text(build)


def write_alias(out: pathlib.Path, name: str, actual: str) -> None:
    """Writes <name>/BUILD.bazel that stands for another label."""
    (out / name).mkdir(parents=True, exist_ok=True)
    (out / name / "BUILD.bazel").write_text(_ALIAS.format(name=name, actual=actual))


def main(argv: list[str] | None = None) -> None:
    """Splits one folder; what no RECORD lists stays behind in it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("installed", type=pathlib.Path, help="folder of `pip install --target`")
    parser.add_argument("out", type=pathlib.Path, help="folder of the Bazel packages")
    args = parser.parse_args(argv)
    folder = args.installed.resolve()
    sys.path.insert(0, str(folder))
    installed = Distributions(folder)
    byte_compile(folder)
    write_packages(installed, args.out)
    write_alias(
        args.out, "triton", "//" + TORCH
    )  # in the CPU lock too, so that the label is always there
    move_files(installed, args.out)


if __name__ == "__main__":
    main()
