"""Finds the CPython that a workspace runs, builds extensions for and installs packages with."""

SUPPORTED_VERSIONS = ["3.11", "3.12"]

# What the choice depends on besides PATH, for the `environ` of repository rules whose content depends on it.
PYTHON_ENVIRON = [
    "FLASHTRAIN_PYTHON",
    "PYENV_ROOT",
]

_HOW_TO_GET_ONE = ("on Debian 12 or Ubuntu 24.04: apt-get install python3-dev python3-pip; " +
                   "or name an interpreter with --repo_env=FLASHTRAIN_PYTHON=/path/to/python3")

def _candidates(rctx, versions):
    """Programs that may be an interpreter of one of the versions, best first; some may be wrappers that fail."""
    programs = ["python" + version for version in versions] + ["python3"]
    found = [rctx.which(program) for program in programs]

    root = rctx.os.environ.get("PYENV_ROOT") or rctx.os.environ.get("HOME", "/nonexistent") + "/.pyenv"
    installed = rctx.path(root + "/versions")
    folders = sorted([str(folder) for folder in installed.readdir()]) if installed.exists else []
    for version in versions:
        for folder in folders:
            if folder.split("/")[-1].startswith(version + "."):
                found.append(rctx.path(folder + "/bin/python" + version))
    return [program for program in found if program and program.exists]

def _probe(rctx, program):
    """What probe.py says of a program, or None if it is no CPython 3."""
    result = rctx.execute(
        [program, rctx.path(Label("//third_party/python:probe.py"))],
        environment = {"PYTHONPATH": ""},
        timeout = 60,
    )
    if result.return_code != 0 or not result.stdout.startswith("{"):
        return None
    info = json.decode(result.stdout)
    return struct(**info) if info["implementation"] == "cpython" else None

def find_interpreter(rctx):
    """Finds a supported CPython.

    $FLASHTRAIN_PYTHON decides: a version ("3.12") or the path of an interpreter. Without it, the first of python3.11,
    python3.12 and python3 on PATH and in pyenv's folder that has pip and headers, else the first one at all.

    Args:
      rctx: the repository context.

    Returns:
      A struct of version ("3.11"), interpreter (an absolute path), include (the folder of Python.h, or ""),
      platform_include (Debian's second folder of headers, or "") and has_pip.
    """
    supported = " and ".join(SUPPORTED_VERSIONS)
    wanted = rctx.os.environ.get("FLASHTRAIN_PYTHON", "")
    if "/" in wanted:
        info = _probe(rctx, rctx.path(wanted)) if rctx.path(wanted).exists else None
        if not info:
            fail("FLASHTRAIN_PYTHON=%s is not a CPython interpreter; supported are the versions %s" % (wanted, supported))
        if info.version not in SUPPORTED_VERSIONS:
            fail("FLASHTRAIN_PYTHON=%s is CPython %s; supported are the versions %s" % (wanted, info.version, supported))
        return info
    if wanted and wanted not in SUPPORTED_VERSIONS:
        fail("FLASHTRAIN_PYTHON=%s: supported are the versions %s, or the path of such an interpreter" % (wanted, supported))

    versions = [wanted] if wanted else SUPPORTED_VERSIONS
    first = None
    for program in _candidates(rctx, versions):
        info = _probe(rctx, program)
        if not info or info.version not in versions:
            continue
        if info.has_pip and info.include:
            return info
        first = first or info
    if not first:
        fail("no CPython %s found on PATH or in pyenv's folder; supported are %s; %s" %
             (" or ".join(versions), supported, _HOW_TO_GET_ONE))
    return first

def missing_headers_message(info):
    """The error for an interpreter without Python.h.

    Args:
      info: what find_interpreter returned.

    Returns:
      One line.
    """
    return ("%s (CPython %s) has no Python.h, which extensions are compiled with; %s" %
            (info.interpreter, info.version, _HOW_TO_GET_ONE))

def missing_pip_message(interpreter):
    """The error for an interpreter without pip.

    Args:
      interpreter: its path.

    Returns:
      One line.
    """
    return "%s has no pip module, which packages are installed with; %s" % (interpreter, _HOW_TO_GET_ONE)
