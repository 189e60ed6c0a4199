"""@pybind11: the headers out of the hashed wheel, without the rest of the Python packages."""

load("//third_party/pip:pip.bzl", "find_python", "pip_install")

_BUILD = """load("@rules_cc//cc:defs.bzl", "cc_library")

cc_library(
    name = "pybind11",
    hdrs = glob(["include/**/*.h"]),
    includes = ["include"],
    visibility = ["//visibility:public"],
    deps = ["@python//:headers"],
)
"""

def _pybind11_impl(rctx):
    pip_install(rctx, find_python(rctx), rctx.path(rctx.attr._requirements), "wheel")
    rctx.symlink("wheel/pybind11/include", "include")
    rctx.file("BUILD.bazel", _BUILD)

pybind11_repository = repository_rule(
    implementation = _pybind11_impl,
    attrs = {"_requirements": attr.label(default = "//third_party/pybind11:requirements.txt")},
    doc = "@pybind11//:pybind11, a cc_library of the headers, which brings those of @python.",
)
