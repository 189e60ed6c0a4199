"""cuda_library: .cu sources compiled by the registered CUDA toolchain, for use in the deps of cc_* targets."""

load("@bazel_tools//tools/build_defs/cc:action_names.bzl", "ACTION_NAMES")
load("@bazel_tools//tools/cpp:toolchain_utils.bzl", "find_cpp_toolchain")
load("@rules_cc//cc:defs.bzl", "cc_library")
load("//tools/toolchains/cuda:cuda_toolchain.bzl", "CudaArchsInfo")

_CUDA_TOOLCHAIN = str(Label("//tools/toolchains/cuda:toolchain_type"))

def _gencode(archs):
    """One -gencode for each virtual architecture, so that PTX and machine code of one share its front-end pass."""
    codes = {}
    for arch in archs:
        codes.setdefault(arch.split("_")[1], []).append(arch)
    return ["-gencode=arch=compute_%s,code=[%s]" % (number, ",".join(code)) for number, code in codes.items()]

def _compile(ctx, src, compilation_context, deps_files, host_compiler):
    cuda = ctx.toolchains[_CUDA_TOOLCHAIN]
    obj = ctx.actions.declare_file("_objs/%s/%s.pic.o" % (ctx.label.name, src.basename[:-len(".cu")]))
    args = ctx.actions.args()
    args.add("-ccbin", host_compiler)
    args.add_all(["-std=c++17", "-O3", "-DNDEBUG"])
    args.add_all(_gencode(ctx.attr._archs[CudaArchsInfo].archs))
    args.add("-Xcompiler=-fPIC,-g0,-fvisibility=hidden")
    args.add_all(cuda.copts)
    args.add_all(ctx.attr.copts)
    args.add_all(compilation_context.defines, format_each = "-D%s")
    args.add_all(compilation_context.quote_includes, before_each = "-I")
    args.add_all(compilation_context.includes, before_each = "-I")
    args.add_all(compilation_context.system_includes, before_each = "-isystem")

    # Temporary files go beside the object: nvcc names them by its process id, which is the same in every sandbox, and two
    # compilations of one file would write into each other's in /tmp.
    args.add("--objdir-as-tempdir")
    args.add("-c", src)
    args.add("-o", obj)
    ctx.actions.run(
        executable = cuda.nvcc,
        arguments = [args],
        inputs = depset([src], transitive = [compilation_context.headers, cuda.files, deps_files]),
        outputs = [obj],
        env = {"PATH": "/usr/bin:/bin"},  # nvcc calls rm, cat and sh
        mnemonic = "CudaCompile",
        progress_message = "Compiling CUDA %s" % src.short_path,
    )
    return obj

def _cuda_library_impl(ctx):
    cc_toolchain = find_cpp_toolchain(ctx)
    cuda = ctx.toolchains[_CUDA_TOOLCHAIN]
    features = cc_common.configure_features(
        ctx = ctx,
        cc_toolchain = cc_toolchain,
        requested_features = ctx.features,
        unsupported_features = ctx.disabled_features,
    )
    host_compiler = cc_common.get_tool_for_action(
        feature_configuration = features,
        action_name = ACTION_NAMES.cpp_compile,
    )
    deps = cc_common.merge_cc_infos(cc_infos = [dep[CcInfo] for dep in ctx.attr.deps] + [cuda.runtime])
    host_files = cuda.host_files if cuda.host_files.to_list() else cc_toolchain.all_files
    objects = depset([
        _compile(ctx, src, deps.compilation_context, host_files, host_compiler)
        for src in ctx.files.srcs
    ])
    linking_context, _ = cc_common.create_linking_context_from_compilation_outputs(
        actions = ctx.actions,
        name = ctx.label.name,
        feature_configuration = features,
        cc_toolchain = cc_toolchain,
        compilation_outputs = cc_common.create_compilation_outputs(objects = objects, pic_objects = objects),
        linking_contexts = [deps.linking_context],
        disallow_dynamic_library = True,
    )
    return [
        DefaultInfo(files = objects),
        CcInfo(compilation_context = deps.compilation_context, linking_context = linking_context),
    ]

_cuda_library = rule(
    implementation = _cuda_library_impl,
    attrs = {
        "copts": attr.string_list(),
        "deps": attr.label_list(providers = [CcInfo]),
        "srcs": attr.label_list(allow_files = [".cu"]),
        "_archs": attr.label(default = "//tools/toolchains/cuda:archs"),
        "_cc_toolchain": attr.label(default = "@bazel_tools//tools/cpp:current_cc_toolchain"),
    },
    fragments = ["cpp"],
    toolchains = [_CUDA_TOOLCHAIN, "@bazel_tools//tools/cpp:toolchain_type"],
)

def cuda_library(name, srcs, hdrs = [], deps = [], copts = [], strip_include_prefix = None, include_prefix = None, **kwargs):
    """A library of CUDA sources; what depends on it needs neither nvcc nor a GPU to link.

    Args:
      name: the target, a dependency for cc_library, cc_binary, cc_test, pybind_extension and cuda_library.
      srcs: .cu files, one nvcc call each.
      hdrs: headers that the sources and dependants include.
      deps: cc_library and cuda_library targets. The CUDA runtime comes in by itself, linked statically.
      copts: further nvcc flags.
      strip_include_prefix: as in cc_library, for hdrs.
      include_prefix: as in cc_library, for hdrs.
      **kwargs: attributes common to all rules.
    """
    headers = []
    if hdrs:
        headers = [name + "_hdrs"]
        cc_library(
            name = headers[0],
            hdrs = hdrs,
            include_prefix = include_prefix,
            strip_include_prefix = strip_include_prefix,
            deps = deps,
            **kwargs
        )
    _cuda_library(
        name = name,
        srcs = srcs,
        copts = copts,
        deps = deps + headers,
        **kwargs
    )
