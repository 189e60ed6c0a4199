"""@pybind11: the headers out of the hashed wheel, or under --config=site_packages the machine's own."""

load("//third_party/pip:pip.bzl", "find_python", "pip_install", "site_packages_module")

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
    python = find_python(rctx)
    if rctx.os.environ.get("FLASHTRAIN_SITE_PACKAGES", "0") != "0":
        folder = site_packages_module(rctx, python, "pybind11")
        if not folder:
            fail("--config=site_packages: %s has no pybind11; install pybind11 3 there, or leave the flag out to use the locks" % python)
        rctx.symlink(folder + "/include", "include")
    else:
        pip_install(rctx, python, rctx.path(rctx.attr._requirements), "wheel")
        rctx.symlink("wheel/pybind11/include", "include")
    rctx.file("BUILD.bazel", _BUILD)

pybind11_repository = repository_rule(
    implementation = _pybind11_impl,
    attrs = {"_requirements": attr.label(default = "//third_party/pybind11:requirements.txt")},
    doc = "@pybind11//:pybind11, a cc_library of the headers, which brings those of @python.",
    environ = ["FLASHTRAIN_SITE_PACKAGES"],
)
