"""The CUDA toolchain's rule and the build setting that says which architectures are compiled."""

CudaArchsInfo = provider(
    doc = "The GPU architectures to compile for.",
    fields = {"archs": "list of sm_<number> (machine code) and compute_<number> (PTX), presets expanded"},
)

def _is_arch(value):
    for prefix in ["sm_", "compute_"]:
        if value.startswith(prefix) and value[len(prefix):].rstrip("af").isdigit():
            return True
    return False

def _cuda_archs_flag_impl(ctx):
    archs = []
    for value in ctx.build_setting_value:
        if value in ctx.attr.presets:
            archs += ctx.attr.presets[value]
        elif _is_arch(value):
            archs.append(value)
        else:
            fail("%s: \"%s\" is no GPU architecture; supported are sm_<number> such as sm_90a, compute_<number>, and the presets %s" % (
                ctx.label,
                value,
                ", ".join(sorted(ctx.attr.presets)),
            ))
    return CudaArchsInfo(archs = archs)

cuda_archs_flag = rule(
    implementation = _cuda_archs_flag_impl,
    build_setting = config.string_list(flag = True),
    attrs = {"presets": attr.string_list_dict(doc = "short names for lists of architectures")},
)

def _cuda_toolchain_impl(ctx):
    return [platform_common.ToolchainInfo(
        nvcc = ctx.executable.compiler,
        files = depset(ctx.files.toolkit),
        runtime = ctx.attr.runtime[CcInfo],
        copts = ctx.attr.copts,
        host_files = depset(ctx.files.host_compiler_files),
    )]

cuda_toolchain = rule(
    implementation = _cuda_toolchain_impl,
    attrs = {
        "compiler": attr.label(mandatory = True, allow_single_file = True, executable = True, cfg = "exec", doc = "nvcc"),
        "copts": attr.string_list(doc = "flags for every nvcc call"),
        "host_compiler_files": attr.label(allow_files = True, cfg = "exec", doc = "the host compiler's files; default: all of the C++ toolchain's"),
        "runtime": attr.label(mandatory = True, providers = [CcInfo], doc = "cudart and its headers"),
        "toolkit": attr.label(mandatory = True, allow_files = True, cfg = "exec", doc = "everything that nvcc reads"),
    },
)
