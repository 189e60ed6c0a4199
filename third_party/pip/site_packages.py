"""Prints, as JSON, the version of each named distribution (null: it is not installed).

Usage: site_packages.py FOLDER NAME...    FOLDER "" looks where the interpreter itself does.
"""

import importlib.metadata
import json
import re
import sys


def main() -> None:
    """Looks at metadata only; imports nothing."""
    folder, names = sys.argv[1], sys.argv[2:]
    path = [folder] if folder else sys.path[1:]  # without the folder of this script
    found = {
        re.sub(r"[-_.]+", "_", d.metadata["Name"]).lower(): d.version
        for d in importlib.metadata.distributions(path=path)
        if d.metadata["Name"]
    }
    print(json.dumps({name: found.get(name) for name in names}))


if __name__ == "__main__":
    main()
