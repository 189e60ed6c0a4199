"""op_library: all targets of one op in C++ and CUDA, from files that are named after it."""

load("@rules_cc//cc:defs.bzl", "cc_library", "cc_test")
load(":cpu.bzl", "cpu_kernels_library")
load(":cuda.bzl", "cuda_library")
load(":gpu.bzl", "GPU_TAGS", "REQUIRES_GPU")

# Names of dtypes in tables of kernels, and their C++ types.
_TYPES = {
    "BFloat16": "__nv_bfloat16",
    "Float16": "__half",
    "Float32": "float",
}

# One instantiation for each dtype, as op_library's `instantiations`.
EVERY_DTYPE = [[dtype] for dtype in ["Float32", "Float16", "BFloat16"]]

def op_library(
        name,
        instantiations = [],
        deps = [],
        header_deps = [],
        cpu_copts = [],
        cuda_deps = [],
        test_deps = [],
        cuda_test_size = "small"):
    """The op's public library and its tests on the CPU and on CUDA.

    | file | target |
    |---|---|
    | <op>.h, <op>.cc | <op>: the API, public |
    | <op>_*.h | internal_headers |
    | <op>_cpu.cc, <op>_cpu_kernels.cc | <op>_cpu, the latter once for each instruction set |
    | *.cuh, *.cu | kernel_headers, <op>_cuda |
    | <op>_cuda_typed.cu | <op>_cuda_<dtypes>: compiled once for each of `instantiations`, with FLASHTRAIN_A (and
      FLASHTRAIN_B) as the C++ types and FLASHTRAIN_TABLE as the name of the table of kernels, k<Op><dtypes> |
    | <op>_test.cc, <op>_test_problem.h | <op>_test; <op>_cuda_test drives the same on a GPU, with all other *_test.cc |

    Args:
      name: the op.
      instantiations: lists of one or two of BFloat16, Float16 and Float32.
      deps: further dependencies of <op>.cc.
      header_deps: of the headers.
      cpu_copts: compiler flags for the CPU's kernels.
      cuda_deps: further dependencies of the .cu files.
      test_deps: further dependencies of the tests.
      cuda_test_size: of the test on a GPU.
    """
    prefixes = {"include_prefix": "flashtrain", "strip_include_prefix": "/cc"}
    headers = native.glob(["*.h"], exclude = ["*_test_problem.h"])
    problem = native.glob(["*_test_problem.h"])
    cpu = native.glob([name + "_cpu.cc"])
    cuda = native.glob(["*.cu"], exclude = ["*_typed.cu"])
    test_only = {"testonly": True, "visibility": ["//visibility:private"]}
    private = {"visibility": ["//visibility:private"]}

    cc_library(
        name = name,
        srcs = [name + ".cc"],
        hdrs = [name + ".h"],
        visibility = ["//visibility:public"],
        deps = deps + [
            ":internal_headers",
            "//cc/common:check",
            "//cc/common:types",
        ] + [":%s_%s" % (name, device) for device, srcs in [("cpu", cpu), ("cuda", cuda)] if srcs],
        **prefixes
    )
    cc_library(
        name = "internal_headers",
        hdrs = headers,
        deps = header_deps + ["//cc/common:types"],
        **dict(prefixes, **private)
    )
    if cpu:
        cc_library(
            name = name + "_cpu",
            srcs = cpu,
            deps = [
                ":internal_headers",
                ":%s_cpu_kernels" % name,
                "//cc/common:cpu_isa",
                "//cc/common:parallel",
            ],
            **private
        )
        cpu_kernels_library(
            name = name + "_cpu_kernels",
            srcs = [name + "_cpu_kernels.cc"],
            copts = cpu_copts,
            deps = [
                ":internal_headers",
                "//cc/common:cpu_row",
            ],
        )
    if cuda:
        _cuda(name, cuda, instantiations, cuda_deps, prefixes)
    if problem:
        cc_library(
            name = "test_problem",
            hdrs = problem,
            deps = test_deps + [
                ":" + name,
                "//cc/common:test_tensor",
                "//cc/common:testing",
            ],
            **dict(prefixes, **test_only)
        )
    tests = test_deps + [
        ":" + name,
        "//cc/common:parallel",
        "//cc/common:test_tensor",
        "//cc/common:testing",
    ] + [":test_problem" for _ in problem]
    cc_test(
        name = name + "_test",
        size = "small",
        srcs = [name + "_test.cc"],
        deps = tests + ["//cc/common:test_memory_cpu"],
    )
    if cuda:
        # Fails if it finds no device.
        cc_test(
            name = name + "_cuda_test",
            size = cuda_test_size,
            srcs = native.glob(["*_test.cc"]),
            tags = GPU_TAGS,
            target_compatible_with = REQUIRES_GPU,
            deps = tests + ["//cc/common:test_memory_cuda"],
        )

def _cuda(name, srcs, instantiations, deps, prefixes):
    stem = "".join([word.capitalize() for word in name.split("_")])
    typed = {"%s_cuda_%s" % (name, "".join(dtypes)): dtypes for dtypes in instantiations}
    cc_library(
        name = "kernel_headers",
        hdrs = native.glob(["*.cuh"]),
        visibility = ["//visibility:private"],
        deps = [
            ":internal_headers",
            "//cc/common:cuda_kernel",
        ],
        **prefixes
    )
    cuda_library(
        name = name + "_cuda",
        srcs = srcs,
        visibility = ["//visibility:private"],
        deps = deps + [
            ":internal_headers",
            ":kernel_headers",
            "//cc/common:cuda_host",
        ] + [":" + target for target in typed],
    )
    for target, dtypes in typed.items():
        cuda_library(
            name = target,
            srcs = [name + "_cuda_typed.cu"],
            copts = ["-DFLASHTRAIN_%s=%s" % (letter, _TYPES[dtype]) for letter, dtype in zip(["A", "B"], dtypes)] +
                    ["-DFLASHTRAIN_TABLE=k%s%s" % (stem, "".join(dtypes))],
            visibility = ["//visibility:private"],
            deps = [":kernel_headers"],
        )
