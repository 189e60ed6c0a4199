"""The rule that nothing points up, as functions over source files and over `bazel query`'s labels.

A file or target belongs to a layer by its folder; it may use its own layer and those below it:

    experiments > train > eval > models > modules > data, distributed, ops > environment, testing
                                                                > errors, files > _kernels > cc

compat/, which has the names of other packages, is beside the models, and no layer uses it.

`cc/` knows neither Python nor torch, so that C++ programs can depend on it alone; absl and
ml_collections, which decide how a program is configured, are known to experiments/ only.
"""

import ast
import pathlib
import re
from collections.abc import Iterator

# Lowest first. Layers of one line are siblings and do not know each other.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("cc",),
    ("_kernels",),
    ("errors", "files"),
    ("environment", "testing"),
    ("data", "distributed", "ops"),
    ("modules",),
    ("compat", "models"),
    ("eval",),
    ("train",),
    ("experiments",),
)
RANK = {layer: rank for rank, layers in enumerate(LAYERS) for layer in layers}

_PACKAGE = pathlib.PurePosixPath("python/flashtrain")
_CONFIGURATION = ("absl", "ml_collections")
# Packages as labels name them (@pip//absl_py) and as modules (import absl).
_CONFIGURATION_LABELS = ("absl_py", "ml_collections")
_PYTHON_OR_TORCH_HEADER = re.compile(r"(Python\.h|pybind11/|torch/|ATen/|c10/|caffe2/)")
_INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
_CC_SUFFIXES = {".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".inc"}


def layer_of_path(path: pathlib.PurePosixPath) -> str | None:
    """The layer of a file or package by its path, None where the rule does not apply."""
    if path.parts[0] in ("cc", "experiments"):
        return path.parts[0]
    if not path.is_relative_to(_PACKAGE):
        return None
    inside = path.relative_to(_PACKAGE).parts
    if len(inside) < 2:
        return None  # flashtrain/__init__.py and its test
    return "_kernels" if inside[0] == "bindings" else inside[0]


def layer_of_module(module: str) -> str | None:
    """The layer of an imported module, None for what is not ours and for flashtrain itself."""
    parts = module.split(".")
    if parts[0] == "experiments":
        return "experiments"
    return parts[1] if parts[0] == "flashtrain" and len(parts) > 1 and parts[1] in RANK else None


def may_use(user: str, used: str) -> bool:
    """Whether the layer may import, include or depend on the other."""
    return user == used or (RANK[used] < RANK[user] and used != "compat")


def imported_modules(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that Python source imports, wherever in the file.

    Args:
        source: the file's text.
        package: the package that holds it, to which relative imports refer.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(
                [*(parents if node.level else []), *([node.module] if node.module else [])]
            )
            for (
                alias
            ) in node.names:  # `from flashtrain import ops` names a module in the second place
                yield node.lineno, f"{base}.{alias.name}"


def _python_violations(path: pathlib.PurePosixPath, layer: str, source: str) -> Iterator[str]:
    package = ".".join(path.parent.parts).removeprefix("python.")
    for line, module in imported_modules(source, package):
        used = layer_of_module(module)
        if used and not may_use(layer, used):
            yield f"{path}:{line}: {layer} imports {module}"
        if module.split(".")[0] in _CONFIGURATION and layer != "experiments":
            yield f"{path}:{line}: {module} is for experiments/ alone"


def _cc_violations(path: pathlib.PurePosixPath, source: str) -> Iterator[str]:
    for number, text in enumerate(source.splitlines(), start=1):
        match = _INCLUDE.match(text)
        if match and _PYTHON_OR_TORCH_HEADER.match(match[1]):
            yield f"{path}:{number}: cc/ includes {match[1]}"


def source_violations(root: pathlib.Path) -> tuple[list[str], int]:
    """Checks what every source file under the repository's root imports and includes.

    Returns:
        One line for each violation, and the number of files that were checked.
    """
    violations: list[str] = []
    checked = 0
    for folder in ("cc", str(_PACKAGE), "experiments"):
        for file in sorted((root / folder).rglob("*")):
            path = pathlib.PurePosixPath(file.relative_to(root).as_posix())
            if not file.is_file():
                continue
            layer = layer_of_path(path)
            if layer and layer not in RANK:
                violations.append(
                    f"{path}: {layer} is in no layer: add it to LAYERS in tests/layering.py"
                )
            elif layer and file.suffix in (".py", ".pyi"):
                if layer == "cc":
                    violations.append(f"{path}: Python in cc/")
                violations += _python_violations(path, layer, file.read_text())
                checked += 1
            elif layer == "cc" and file.suffix in _CC_SUFFIXES:
                violations += _cc_violations(path, file.read_text())
                checked += 1
    return violations, checked


def _package_of_label(label: str) -> pathlib.PurePosixPath:
    return pathlib.PurePosixPath(label.removeprefix("//").split(":")[0] or ".")


def graph_violations(layer: str, labels: list[str]) -> list[str]:
    """Checks all that the targets of a layer depend on.

    Args:
        layer: the layer.
        labels: the labels of its targets and of their dependencies, as `bazel query` prints them.

    Returns:
        One line for each violation.
    """
    violations = []
    for label in labels:
        label = re.sub(r"^@+(?=//)", "", label)  # newer Bazels write @@//cc for //cc
        if not label.startswith("//"):
            repository, _, package = label.lstrip("@").partition("//")
            package = package.split(":")[0]
            if layer == "cc" and repository in ("pip", "pybind11", "python"):
                violations.append(f"{layer} depends on {label}")
            if layer != "experiments" and repository == "pip" and package in _CONFIGURATION_LABELS:
                violations.append(f"{layer} depends on {label}, which is for experiments/ alone")
            continue
        path = _package_of_label(label)
        used = (
            "_kernels"
            if path == _PACKAGE and "_kernels" in label
            else layer_of_path(path / "BUILD")
        )
        if used and used not in RANK:
            violations.append(
                f"{label}: {used} is in no layer: add it to LAYERS in tests/layering.py"
            )
        elif used and not may_use(layer, used):
            violations.append(f"{layer} depends on {label}")
    return violations
