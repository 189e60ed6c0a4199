"""Hides the interpreter's own packages: a target imports what it depends on and nothing else.

Python imports this module at its start, in child processes too, since the targets that use @pip
have it on PYTHONPATH. Without it, packages of the interpreter that ours use when they find them
(tensorboard TensorFlow, pytest any plugin) would meet versions that they were not made for.
"""

import os
import sys

_STANDARD_LIBRARY = os.path.dirname(os.__file__)
_GIVEN = [os.path.abspath(p) for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]


def _is_wanted(path: str) -> bool:
    """Whether a folder of sys.path holds what was asked for or the standard library."""
    if path in _GIVEN:
        return True
    is_standard = path.startswith(_STANDARD_LIBRARY) or path.endswith(".zip")
    return is_standard and os.path.basename(path) not in ("site-packages", "dist-packages")


sys.path[:] = [path for path in sys.path if _is_wanted(path)]
