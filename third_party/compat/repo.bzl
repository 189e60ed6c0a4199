"""Stand-ins for the rule sets that Bazel's own BUILD files load, for machines that can fetch none of them.

BUILD files load cc_*, java_* and py_* from @rules_cc, @rules_java and @rules_python, as newer Bazels want it; here
those names are the native rules, which Bazel 4 to 7 still have. A workspace that declares the real rule sets first
keeps them.
"""

def _native_rules_impl(rctx):
    rctx.file("WORKSPACE", "workspace(name = \"%s\")\n" % rctx.name)
    rctx.file("BUILD.bazel", "")
    rctx.file(rctx.attr.package + "/BUILD.bazel", "")
    rctx.file(rctx.attr.package + "/defs.bzl", "\n".join(
        ["%s = native.%s" % (rule, rule) for rule in rctx.attr.rules] + [""],
    ))

native_rules_repository = repository_rule(
    implementation = _native_rules_impl,
    attrs = {"package": attr.string(), "rules": attr.string_list()},
)

def _no_coverage_tools_impl(rctx):
    rctx.file("WORKSPACE", "workspace(name = \"%s\")\n" % rctx.name)
    rctx.file("none.sh", "#!/bin/sh\necho 'coverage is not supported' >&2\nexit 1\n", executable = True)
    rctx.file("BUILD.bazel", """package(default_visibility = ["//visibility:public"])

[filegroup(
    name = name,
    srcs = ["none.sh"],
) for name in ["coverage_report_generator", "lcov_merger"]]
""")

no_coverage_tools_repository = repository_rule(
    implementation = _no_coverage_tools_impl,
    doc = "@remote_coverage_tools, which every cc_test names, without the download.",
)
