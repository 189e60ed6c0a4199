"""@zig_sdk: clang, lld, libc++ and glibc headers as plain folders, out of the hashed ziglang wheel."""

load("//third_party/pip:pip.bzl", "find_python", "pip_install")

# The oldest glibc that what we build runs on: Debian 10, RHEL 8, Ubuntu 20.04.
_TARGET = "x86_64-linux-gnu.2.28"

def _zig_sdk_impl(rctx):
    python = find_python(rctx)
    pip_install(rctx, python, rctx.path(rctx.attr._requirements), "wheel")
    rctx.report_progress("building libc++ (about a minute, once)")
    result = rctx.execute(
        [python, rctx.path(rctx.attr._harvest), "wheel", ".", _TARGET],
        timeout = 1800,
        quiet = True,
    )
    if result.return_code != 0:
        fail("the C++ toolchain could not be made from the ziglang wheel:\n%s\n%s" % (result.stdout, result.stderr))
    rctx.symlink(rctx.attr._config, "cc_toolchain_config.bzl")
    rctx.symlink(rctx.attr._build, "BUILD.bazel")

zig_sdk_repository = repository_rule(
    implementation = _zig_sdk_impl,
    attrs = {
        "_build": attr.label(default = "//third_party/zig:zig.BUILD"),
        "_config": attr.label(default = "//third_party/zig:cc_toolchain_config.bzl"),
        "_harvest": attr.label(default = "//third_party/zig:harvest.py"),
        "_requirements": attr.label(default = "//third_party/zig:requirements.txt"),
    },
)
