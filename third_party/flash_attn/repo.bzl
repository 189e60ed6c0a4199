"""@flash_attn: the package flash-attn-4 and its compiler under --config=flash_attn, else an empty library."""

load("//third_party/pip:pip.bzl", "pip_install")
load("//third_party/python:interpreter.bzl", "PYTHON_ENVIRON")

# Its other requirements are in the CUDA lock of @pip, cuda-bindings beside torch. cutlass lies in a folder that its own wheel
# puts on the path.
_INSTALLED = """
    imports = [
        "site",
        "site/nvidia_cutlass_dsl/dsl_packages",
    ],
    deps = [
        "@pip//einops",
        "@pip//protobuf",
        "@pip//torch",
        "@pip//typing_extensions",
    ],
    srcs = glob(["site/**/*.py"]),
    data = glob(["site/**"], exclude = ["site/**/*.py", "site/**/* *"]),"""

_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

py_library(
    name = "flash_attn",
    visibility = ["//visibility:public"],%s
)
"""

def _flash_attn_impl(rctx):
    installed = ""
    if rctx.os.environ.get("FLASHTRAIN_FLASH_ATTN", "0") not in ["", "0"]:
        if rctx.os.environ.get("FLASHTRAIN_LOCK", "cuda13") == "cpu":
            fail("--config=flash_attn with --config=cpu: flash-attn-4 runs on CUDA only; leave one of the two out")
        python = json.decode(rctx.read(rctx.attr._interpreter))["interpreter"]
        rctx.report_progress("installing flash-attn-4 (0.3 GB)")
        pip_install(rctx, python, rctx.path(rctx.attr._requirements), "site")
        installed = _INSTALLED
    rctx.file("BUILD.bazel", _BUILD % installed)

flash_attn_repository = repository_rule(
    implementation = _flash_attn_impl,
    attrs = {
        "_interpreter": attr.label(default = "@python//:interpreter.json"),
        "_requirements": attr.label(default = "//third_party/flash_attn:requirements.txt"),
    },
    environ = PYTHON_ENVIRON + [
        "FLASHTRAIN_FLASH_ATTN",
        "FLASHTRAIN_LOCK",
    ],
    doc = "@flash_attn//:flash_attn, which flashtrain.ops.attention takes for a backend where it is not empty.",
)
