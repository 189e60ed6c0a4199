"""Prints what the repository rules must know of the interpreter that runs this, as one JSON object.

Run by path with any CPython 3; uses nothing but the standard library.
"""

import importlib.util
import json
import os
import sys
import sysconfig

include = sysconfig.get_path("include")
# Debian's pyconfig.h includes <x86_64-linux-gnu/python3.11/pyconfig.h>, which lies beside the
# folder of the other headers.
platform_include = os.path.join(
    os.path.dirname(include), sysconfig.get_config_var("MULTIARCH") or "", os.path.basename(include)
)
print(
    json.dumps(
        {
            "version": ".".join(map(str, sys.version_info[:2])),
            "implementation": sys.implementation.name,
            "interpreter": sys.executable,  # behind pyenv's shims; a virtual environment's own
            "include": include if os.path.exists(os.path.join(include, "Python.h")) else "",
            "platform_include": platform_include
            if platform_include != include and os.path.isdir(platform_include)
            else "",
            "has_pip": importlib.util.find_spec("pip") is not None,
        }
    )
)
