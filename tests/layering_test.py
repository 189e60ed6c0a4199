"""Nothing points up in the tree as it is, and the checker sees each kind of violation."""

import os
import pathlib

import layering
import pytest

# The tree itself, behind the links of the runfiles: a file that no target declares must not escape.
ROOT = pathlib.Path(__file__).resolve().parent.parent
GRAPHS = pathlib.Path(os.environ["TEST_SRCDIR"], os.environ["TEST_WORKSPACE"], "tests")

SAMPLES = {
    "cc/layer_norm/a.cc": ("#include <Python.h>\n", "cc/ includes Python.h"),
    "cc/layer_norm/b.cuh": ("  #  include <torch/extension.h>\n", "cc/ includes torch/extension.h"),
    "cc/common/c.h": ('#include "pybind11/pybind11.h"\n', "cc/ includes pybind11/pybind11.h"),
    "cc/common/d.py": ("", "Python in cc/"),
    "python/flashtrain/ops/a.py": (
        "import flashtrain.models.gpt\n",
        "ops imports flashtrain.models.gpt",
    ),
    "python/flashtrain/ops/b.py": (
        "from flashtrain import modules\n",
        "ops imports flashtrain.modules",
    ),
    "python/flashtrain/ops/c.py": (
        "from ..train import loop\n",
        "ops imports flashtrain.train.loop",
    ),
    "python/flashtrain/ops/d.py": (
        "def f():\n    import flashtrain.data\n",
        "ops imports flashtrain.data",
    ),
    "python/flashtrain/models/a.py": (
        "from flashtrain.train import loop\n",
        "models imports flashtrain.train.loop",
    ),
    "python/flashtrain/train/a.py": (
        "from experiments import train\n",
        "train imports experiments.train",
    ),
    "python/flashtrain/train/c.py": (
        "from flashtrain.compat import flash_attn\n",
        "train imports flashtrain.compat",
    ),
    "python/flashtrain/train/b.py": (
        "from absl import flags\n",
        "absl.flags is for experiments/ alone",
    ),
    "python/flashtrain/errors/a.pyi": (
        "import ml_collections\n",
        "ml_collections is for experiments/ alone",
    ),
    "python/flashtrain/novel/a.py": ("", "novel is in no layer"),
}

ALLOWED = {
    "cc/layer_norm/a.cc": "#include <vector>\n// #include <Python.h>\n",
    "python/flashtrain/bindings/module.cc": "#include <pybind11/pybind11.h>\n",
    "python/flashtrain/ops/a.py": "import torch\nfrom flashtrain import _kernels\n",
    "python/flashtrain/ops/b.py": "from . import a\nfrom .a import c\n",
    "python/flashtrain/train/a.py": "from flashtrain.models import gpt\nimport tensorboard\n",
    "experiments/a.py": "from absl import flags\nimport flashtrain.train\n",
}


def write(root: pathlib.Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_sources_do_not_point_up() -> None:
    violations, checked = layering.source_violations(ROOT)
    assert not violations, "\n".join(violations)
    assert checked >= 50, f"only {checked} files found under {ROOT}"


@pytest.mark.parametrize(
    "layer", ["cc", "compat", "ops", "modules", "models", "data", "distributed", "train"]
)
def test_targets_do_not_depend_upwards(layer: str) -> None:
    labels = (GRAPHS / f"{layer}_deps").read_text().split()
    assert any(label.lstrip("@").startswith("//") for label in labels)
    violations = layering.graph_violations(layer, labels)
    assert not violations, "\n".join(violations)


def test_every_package_is_in_a_graph() -> None:
    seen = set()
    for graph in GRAPHS.glob("*_deps"):
        seen |= {
            label.lstrip("@").removeprefix("//").split(":")[0]
            for label in graph.read_text().split()
        }
    folders = [*ROOT.glob("cc/*/BUILD"), *ROOT.glob("python/flashtrain/*/BUILD")]
    packages = {str(build.parent.relative_to(ROOT)) for build in folders}
    missing = packages - seen - {"python/flashtrain/testing"}
    assert not missing, f"in no genquery of tests/BUILD: {sorted(missing)}"


@pytest.mark.parametrize("path", SAMPLES)
def test_violation_is_found(tmp_path: pathlib.Path, path: str) -> None:
    text, message = SAMPLES[path]
    write(tmp_path, path, text)
    violations, _ = layering.source_violations(tmp_path)
    assert len(violations) == 1, violations
    assert violations[0].startswith(path)
    assert message in violations[0]


def test_what_points_down_is_allowed(tmp_path: pathlib.Path) -> None:
    for path, text in ALLOWED.items():
        write(tmp_path, path, text)
    assert layering.source_violations(tmp_path)[0] == []


@pytest.mark.parametrize(
    ("layer", "label"),
    [
        ("cc", "@pip//torch:torch"),
        ("cc", "@@python//:headers"),
        ("cc", "//python/flashtrain/ops:layer_norm"),
        ("ops", "@//python/flashtrain/models:gpt"),
        ("models", "//python/flashtrain/train:train"),
        ("train", "//experiments:train"),
        ("train", "@pip//absl_py:absl_py"),
        ("train", "@@pip//ml_collections:ml_collections"),
    ],
)
def test_upward_dependency_is_found(layer: str, label: str) -> None:
    assert len(layering.graph_violations(layer, [label])) == 1


def test_downward_dependencies_are_allowed() -> None:
    labels = [
        "//cc/layer_norm:layer_norm",
        "//python/flashtrain:_kernels",
        "@pip//torch:torch",
        "@@//tools/a:b",
    ]
    assert layering.graph_violations("ops", labels) == []
    assert (
        layering.graph_violations(
            "experiments", ["@pip//absl_py:absl_py", "//python/flashtrain/train"]
        )
        == []
    )
