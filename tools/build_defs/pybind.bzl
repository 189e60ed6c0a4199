"""pybind_extension: one Python extension module out of C++ sources and libraries."""

load("@rules_cc//cc:defs.bzl", "cc_binary")
load("@rules_python//python:defs.bzl", "py_library")

def pybind_extension(name, srcs, deps = [], copts = [], linkopts = [], imports = [], data = [], **kwargs):
    """<name>.so, importable as <name>, and the py_library <name> that carries it.

    The module exports its init symbol alone: libc++, cudart and our own symbols are linked in statically and hidden,
    so it meets neither torch's libstdc++ nor another extension's copy.

    Args:
      name: the module's name.
      srcs: .cc and .h files; one defines PYBIND11_MODULE(<name>, m).
      deps: cc_library and cuda_library targets.
      copts: further compiler flags.
      linkopts: further linker flags.
      imports: as in py_library.
      data: further files for the py_library, such as the .pyi stub.
      **kwargs: attributes common to all rules.
    """
    native.genrule(
        name = name + "_exports",
        outs = [name + ".lds"],
        cmd = "echo '{ global: PyInit_%s; local: *; };' > $@" % name,
    )
    cc_binary(
        name = name + ".so",
        srcs = srcs,
        copts = copts + ["-fvisibility=hidden"],
        linkopts = linkopts + [
            "-Wl,--version-script=$(location :%s.lds)" % name,
            "-Wl,-Bsymbolic",
        ],
        linkshared = True,
        linkstatic = True,
        deps = deps + [
            ":%s.lds" % name,
            Label("@pybind11//:pybind11"),
            Label("@python//:headers"),
        ],
        **kwargs
    )
    py_library(
        name = name,
        data = data + [name + ".so"],
        imports = imports,
        **kwargs
    )
