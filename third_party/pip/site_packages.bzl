"""--config=site_packages: @pip over packages that are on the machine already, with no lock and no pip."""

_SUPPORTED_TORCH = ["2.11", "2.12", "2.13"]

_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

py_library(
    name = "{name}",
    visibility = ["//visibility:public"],
    deps = ["//:site_packages"],
)
"""

# Targets that need it are skipped by wildcards such as //..., and refused with the reason when named.
_MISSING_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

py_library(
    name = "{name}",
    target_compatible_with = ["//:not_installed"],
    visibility = ["//visibility:public"],
)
"""

# No platform has this property. (@platforms//:incompatible is newer than Bazel 4.)
# With a folder of its own, "data" and "imports" name it; the interpreter's own packages are found without.
_ROOT_BUILD = """load("@rules_python//python:defs.bzl", "py_library")

package(default_visibility = ["//visibility:public"])

constraint_setting(name = "installation")

constraint_value(
    name = "not_installed",
    constraint_setting = ":installation",
)

py_library(
    name = "site_packages",
    data = ["versions.json"] + {site},
    imports = {site},
)
"""

def _names(requirements):
    """Label names of the distributions that a requirements file lists."""
    names = []
    for line in requirements.split("\n"):
        if line and line[0].isalnum():
            name = line
            for end in " =<>!~;[".elems():
                name = name.split(end)[0]
            names.append(name.lower().replace("-", "_").replace(".", "_"))
    return names

def use_site_packages(rctx, python, wanted, requirements_in, lock):
    """Writes @pip over a site-packages folder.

    Args:
      rctx: the repository context.
      python: the interpreter.
      wanted: $FLASHTRAIN_SITE_PACKAGES: "1" for the interpreter's own packages, or a folder.
      requirements_in: text of requirements.in, the packages that are imported directly.
      lock: text of a lock, the packages that have a label.
    """
    folder = wanted if "/" in wanted else ""
    if folder and not rctx.path(folder).exists:
        fail("FLASHTRAIN_SITE_PACKAGES=%s: no such folder; give a site-packages folder, or 1 for the interpreter's own" % folder)
    direct = _names(requirements_in)
    names = depset(direct + _names(lock)).to_list()
    result = rctx.execute([python, rctx.path(rctx.attr._site_packages), folder] + names, environment = {"PYTHONPATH": ""})
    if result.return_code != 0:
        fail("%s cannot list its packages:\n%s" % (python, result.stderr))
    versions = json.decode(result.stdout)

    where = folder or python
    torch = versions["torch"]
    if not torch:
        fail("--config=site_packages: %s has no torch; install torch %s there, or leave the flag out to use the lock" %
             (where, " to ".join([_SUPPORTED_TORCH[0], _SUPPORTED_TORCH[-1]])))
    notes = []
    if ".".join(torch.split(".")[:2]) not in _SUPPORTED_TORCH:
        notes.append("torch %s is not among the supported %s" % (torch, ", ".join(_SUPPORTED_TORCH)))
    missing = [name for name in direct if not versions[name]]
    if missing:
        notes.append("targets that need these are incompatible, as they are not installed: " + " ".join(missing))

    # buildifier: disable=print
    print("Python packages: those of %s, torch %s%s" % (where, torch, "".join(["; " + note for note in notes])))
    if folder:
        rctx.symlink(folder, "site")
    rctx.file("versions.json", result.stdout)
    rctx.file("BUILD.bazel", _ROOT_BUILD.format(site = "[\"site\"]" if folder else "[]"))
    for name in names:
        build = _MISSING_BUILD if name in missing else _BUILD
        rctx.file(name + "/BUILD.bazel", build.format(name = name))
