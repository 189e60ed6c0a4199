"""@python: the interpreter that the workspace uses, its headers, and the toolchain that Python targets run on."""

load(":interpreter.bzl", "PYTHON_ENVIRON", "find_interpreter", "missing_headers_message")

_BUILD = """load("@bazel_tools//tools/python:toolchain.bzl", "py_runtime_pair")
load("@rules_cc//cc:defs.bzl", "cc_library")
load("@rules_python//python:defs.bzl", "py_runtime")
load(":missing.bzl", "missing")

package(default_visibility = ["//visibility:public"])

exports_files(["interpreter.json"])

py_runtime(
    name = "runtime",
    interpreter_path = "{interpreter}",
    python_version = "PY3",
    stub_shebang = "#!{interpreter}",
)

py_runtime_pair(
    name = "runtime_pair",
    py3_runtime = ":runtime",
)

toolchain(
    name = "toolchain",
    toolchain = ":runtime_pair",
    toolchain_type = "@bazel_tools//tools/python:toolchain_type",
)

{headers}"""

_HEADERS = """cc_library(
    name = "headers",
    hdrs = glob(["include/**/*.h"]),
    includes = [
        "include",
        "include/{folder}",
    ],
)
"""

_MISSING_HEADERS = """missing(
    name = "headers",
    message = "{message}",
)
"""

# Raised only when something is compiled against the headers: pure Python targets need none.
_MISSING_RULE = '''"""Written by python_repository."""

def _missing_impl(ctx):
    fail(ctx.attr.message)

missing = rule(
    implementation = _missing_impl,
    attrs = {"message": attr.string(mandatory = True)},
    provides = [CcInfo],
)
'''

def _python_impl(rctx):
    info = find_interpreter(rctx)
    if info.include:
        folder = info.include.split("/")[-1]
        rctx.symlink(info.include, "include/" + folder)
        if info.platform_include:
            rctx.symlink(info.platform_include, "include/" + "/".join(info.platform_include.split("/")[-2:]))
        headers = _HEADERS.format(folder = folder)
    else:
        headers = _MISSING_HEADERS.format(message = missing_headers_message(info))
    rctx.file("BUILD.bazel", _BUILD.format(interpreter = info.interpreter, headers = headers))
    rctx.file("missing.bzl", _MISSING_RULE)
    rctx.file("defs.bzl", '"""Written by python_repository."""\n\nPYTHON_VERSION = "%s"\n\nINTERPRETER = "%s"\n' %
                          (info.version, info.interpreter))
    rctx.file("interpreter.json", json.encode({"interpreter": info.interpreter, "version": info.version}) + "\n")

python_repository = repository_rule(
    implementation = _python_impl,
    environ = PYTHON_ENVIRON + ["PATH"],
    doc = """@python//:toolchain (to be registered), @python//:headers (a cc_library), and @python//:defs.bzl with
PYTHON_VERSION ("3.11" or "3.12") and INTERPRETER (its path). It takes no time to make, so it follows every change of PATH;
the repositories of packages follow only if another interpreter was found (they read interpreter.json).""",
)
