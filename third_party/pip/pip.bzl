"""Installs hashed requirements with the pip client of the interpreter; pip's own configuration decides where from."""

load("//third_party/python:interpreter.bzl", "find_interpreter", "missing_pip_message", _PYTHON_ENVIRON = "PYTHON_ENVIRON")

PYTHON_ENVIRON = _PYTHON_ENVIRON

_NO_NETWORK = [
    "Connection refused",
    "ConnectTimeoutError",
    "Failed to establish a new connection",
    "Name or service not known",
    "NewConnectionError",
    "ProxyError",
    "ReadTimeoutError",
    "Temporary failure in name resolution",
]

def find_python(rctx):
    """Path of the workspace's interpreter, for rules whose packages are the same for every Python version.

    Args:
      rctx: the repository context.

    Returns:
      The absolute path of a supported CPython.
    """
    return find_interpreter(rctx).interpreter

def _after(text, marker):
    """The first word after a marker, or "" if it is not there."""
    return text.split(marker, 1)[1].strip().split("\n")[0].split(" ")[0] if marker in text else ""

def explain_failure(python, output):
    """One line on why pip failed: what is wrong and what to do.

    Args:
      python: the interpreter whose pip it was.
      output: all that pip wrote.

    Returns:
      The line.
    """
    if "No module named pip" in output:
        return missing_pip_message(python)
    if "DO NOT MATCH THE HASHES" in output:
        listed = output.split("DO NOT MATCH THE HASHES", 1)[1]
        package = [line.strip().split(" from ")[0] for line in listed.split("\n")[1:] if line.strip()][0]
        return ("%s: the file that pip found has another hash than the lock: expected sha256 %s, got %s; " +
                "it was tampered with, broken on its way (try: %s -m pip cache purge), or the lock is stale " +
                "(bazel run //third_party/pip:update)") % (
            package,
            _after(listed, "Expected sha256"),
            _after(listed, "Got"),
            python,
        )
    for sign in _NO_NETWORK:
        if sign in output:
            return ("pip cannot reach its package index (%s); check the network and pip's configuration " +
                    "(%s -m pip config list), or use the interpreter's own packages with --config=site_packages") % (sign, python)

    # The second is what pip says where its configuration holds a constraints file.
    for sign in ["No matching distribution found for", "ERROR: Cannot install"]:
        if sign in output:
            package = _after(output, sign)
            remedy = "the CUDA build runs without a GPU too: --repo_env=FLASHTRAIN_LOCK=cuda13" if "+cpu" in package else (
                "see the index and constraints that pip is configured for: %s -m pip config list" % python
            )
            return ("pip finds no wheel of %s for this Python and machine (supported: CPython 3.11 and 3.12 on Linux x86_64); " +
                    "%s") % (package, remedy)
    if "No space left on device" in output:
        return "no space is left on the disk for the Python packages"
    return "pip could not install the packages"

def run_pip(rctx, python, args, pythonpath = ""):
    """Runs pip without the settings of a developer's shell that would send packages elsewhere.

    Args:
      rctx: the repository context.
      python: the interpreter.
      args: pip's arguments.
      pythonpath: folder of modules that pip's children can import.

    Returns:
      The result of rctx.execute.
    """

    # pip unpacks into TMPDIR and moves from there: in the same file system that is a rename.
    rctx.file("_tmp/.keep", "")
    result = rctx.execute(
        [python, "-m", "pip"] + args,
        environment = {
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "PIP_NO_INPUT": "1",
            "PIP_REQUIRE_VIRTUALENV": "0",
            "PIP_ROOT_USER_ACTION": "ignore",
            "PIP_USER": "0",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": pythonpath,
            "TMPDIR": str(rctx.path("_tmp")),
        },
        quiet = True,
        timeout = 7200,
    )
    rctx.delete("_tmp")
    return result

def pip_install(rctx, python, requirements, target, args = ["--only-binary=:all:"], pythonpath = ""):
    """Installs every line of a hashed requirements file, and nothing else, into a folder.

    Args:
      rctx: the repository context.
      python: the interpreter whose pip is used.
      requirements: path of the file.
      target: folder, relative to the repository.
      args: further arguments of `pip install`.
      pythonpath: folder of modules that building a source distribution needs.
    """
    result = run_pip(rctx, python, [
        "install",
        "--quiet",
        "--no-deps",
        "--require-hashes",
        "--no-compile",
        "--target",
        target,
        "--requirement",
        requirements,
    ] + args, pythonpath)
    if result.return_code != 0:
        output = result.stdout + result.stderr

        # The end, and without the warnings, such as one for each retry and each folder that holds no such package.
        details = [line[:300] for line in output.split("\n") if line.strip() and not line.startswith("WARNING")]
        fail("%s\npip said:\n%s" % (explain_failure(python, output), "\n".join(details[-20:])))

def site_packages_module(rctx, python, module):
    """Where --config=site_packages has a package.

    Args:
      rctx: the repository context; $FLASHTRAIN_SITE_PACKAGES is 1 or a folder.
      python: the interpreter whose own packages 1 means.
      module: the package's import name.

    Returns:
      Its folder, or "" if it is not there.
    """
    wanted = rctx.os.environ["FLASHTRAIN_SITE_PACKAGES"]
    if "/" in wanted:
        folder = wanted + "/" + module
        return folder if rctx.path(folder).exists else ""
    script = "import importlib.util as u; s = u.find_spec('%s'); print(s.submodule_search_locations[0] if s else '')" % module
    return rctx.execute([python, "-c", script], environment = {"PYTHONPATH": ""}).stdout.strip()
