"""split_site on a small folder of installed distributions, made by hand."""

import importlib.util
import pathlib
import subprocess
import sys

import packaging
import pytest
import split_site


def install(
    folder: pathlib.Path,
    name: str,
    files: dict[str, str],
    requires: tuple[str, ...] = (),
    scripts: str = "",
):
    """Writes a distribution as pip does: its files, METADATA, RECORD."""
    info = f"{name}-1.0.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
    metadata += "".join(f"Requires-Dist: {r}\n" for r in requires)
    files = files | {f"{info}/METADATA": metadata}
    if scripts:
        files |= {f"{info}/entry_points.txt": scripts}
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    record = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD", "../../bin/tool"])
    (folder / info / "RECORD").write_text(record)


@pytest.fixture
def split(tmp_path):
    """Installs a set of distributions that has each of the difficulties, and splits it."""
    installed = tmp_path / "installed"
    install(
        installed,
        "Absl.Py",
        {"absl/__init__.py": "import shared\n", "absl/data.txt": "data", "shared.py": "X = 1\n"},
        requires=(
            "other[fast]>=1",
            "not-installed",
            "tool ; python_version < '3'",
            "torch ; extra == 'all'",
        ),
        scripts="[console_scripts]\nabsl-tool = absl.cli:main\n",
    )
    install(
        installed,
        "other",
        {"other/__init__.py": "", "shared.py": "X = 1\n"},
        requires=("speed ; extra == 'fast'",),
    )
    install(installed, "speed", {"speed.py": "", "broken.py": "def ("})
    install(installed, "tool", {"tool.py": ""})
    install(installed, "numpy", {"numpy.py": ""})
    install(
        installed,
        "torch",
        {"torch/__init__.py": "", "torch/BUILD.bazel": ""},
        requires=("triton", "nvidia-cublas", "speed"),
    )
    install(installed, "triton", {"triton/tests/test_a.py": ""}, requires=("torch", "tool"))
    install(installed, "nvidia-cublas", {"nvidia/lib/libcublas.so": ""})
    # The splitter takes `packaging` from the folder that it splits.
    (installed / "packaging").symlink_to(pathlib.Path(packaging.__file__).parent)
    out = tmp_path / "out"
    subprocess.run([sys.executable, split_site.__file__, str(installed), str(out)], check=True)
    return out


def deps(out: pathlib.Path, package: str) -> list[str]:
    """The deps in a package's BUILD file."""
    lines = (
        (out / package / "BUILD.bazel").read_text().split("deps = [")[1].split("]")[0].split("\n")
    )
    return [line.strip(' ",') for line in lines if line.strip()]


def test_each_distribution_has_its_files(split):
    assert (split / "absl_py/site/absl/data.txt").read_text() == "data"
    assert (split / "absl_py/site/Absl.Py-1.0.dist-info/METADATA").exists()
    assert not (split / "absl_py/site/other").exists()


def test_torch_and_cuda_share_a_site(split):
    assert (split / "torch/site/nvidia/lib/libcublas.so").exists()
    assert (split / "torch/site/triton/tests/test_a.py").exists()
    assert "//torch" in (split / "triton/BUILD.bazel").read_text()
    assert not (split / "nvidia_cublas").exists()


def test_file_of_two_distributions_is_in_both(split):
    assert (split / "absl_py/site/shared.py").exists()
    assert (split / "other/site/shared.py").exists()


def test_bazel_files_of_wheels_are_dropped(split):
    assert (split / "torch/site/torch/__init__.py").exists()
    assert not (split / "torch/site/torch/BUILD.bazel").exists()


def test_deps_are_the_requirements_that_apply(split):
    # Not: the uninstalled one, another Python's, an extra that nobody asks for.
    assert deps(split, "absl_py") == ["//:isolation", "//other"]
    # The extra that absl asks for.
    assert deps(split, "other") == ["//:isolation", "//speed"]
    # Those of triton too, and no cycle; numpy, which it uses without asking for it.
    assert deps(split, "torch") == ["//:isolation", "//numpy", "//speed", "//tool"]


def test_console_scripts_become_programs(split):
    assert "absl-tool_bin" in (split / "absl_py/BUILD.bazel").read_text()
    assert "from absl.cli import main" in (split / "absl_py/absl-tool_bin.py").read_text()


def compiled(path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(importlib.util.cache_from_source(str(path)))


def test_modules_are_compiled_by_hash(split):
    code = compiled(split / "absl_py/site/absl/__init__.py").read_bytes()
    assert code[4:8] == b"\x01\x00\x00\x00"  # PEP 552: by hash, not checked against the source
    assert str(split).encode() not in code
    assert not compiled(split / "speed/site/broken.py").exists()
    assert not compiled(split / "torch/site/triton/tests/test_a.py").exists()


def test_packages_of_the_interpreter_are_hidden(tmp_path):
    """What is on PYTHONPATH and the standard library stay, in child processes too."""
    (tmp_path / "wanted.py").write_text("")
    environment = {"PYTHONPATH": f"{tmp_path}:{pathlib.Path(split_site.__file__).parent}"}
    print_path = "import sys, wanted, json; print(*sys.path[1:], sep='\\n')"
    run = subprocess.run(
        [sys.executable, "-c", print_path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert str(tmp_path) in run.stdout
    assert "-packages" not in run.stdout
