"""Registers the hermetic toolchains: clang and libc++ for C++, nvcc 13.0 for CUDA, CPython 3.11 or 3.12."""

def flashtrain_toolchains():
    """Call after flashtrain_deps(); toolchains that the workspace registers earlier take precedence."""
    native.register_toolchains(
        str(Label("//tools/toolchains/cc:clang_linux_x86_64")),
        str(Label("//tools/toolchains/cuda:wheels_linux_x86_64")),
        "@python//:toolchain",
    )
