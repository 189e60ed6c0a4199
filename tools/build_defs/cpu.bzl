"""cpu_kernels_library: C++ compiled once for each instruction set that is chosen from at run time."""

load("@rules_cc//cc:defs.bzl", "cc_library")

_V3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt"]
_V4 = _V3 + ["-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]

def cpu_kernels_library(name, srcs, deps = [], copts = []):
    """A library with the baseline, x86-64-v3 and x86-64-v4 compilation of srcs; see //cc/common:cpu_isa.h.

    Args:
      name: the target.
      srcs: .cc files that name what they define by FLASHTRAIN_CPU_ISA_NAME: Baseline, V3 or V4.
      deps: cc_library targets.
      copts: further compiler flags.
    """
    for isa, flags in [("Baseline", []), ("V3", _V3), ("V4", _V4)]:
        cc_library(
            name = "%s_%s" % (name, isa),
            srcs = srcs,
            copts = ["-O3"] + flags + copts,
            local_defines = ["FLASHTRAIN_CPU_ISA_NAME=" + isa],
            deps = deps,
        )
    cc_library(
        name = name,
        deps = ["%s_%s" % (name, isa) for isa in ("Baseline", "V3", "V4")],
    )
