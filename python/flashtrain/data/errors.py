"""The one error of the data package, and the OSErrors that become it."""

import errno
import os

from flashtrain import files
from flashtrain.errors import UserError

# What another folder may not have.
_ANOTHER_FOLDER_HELPS = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EFBIG,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


class DataError(UserError, ValueError):
    """Data that is missing, damaged or unfit; the message is one line that a user can act on."""


class TextGoneError(DataError):
    """The text that data would be made of is not there."""


def missing_package(package: str, error: ImportError) -> DataError:
    """The error of a missing Python package that only some data needs."""
    return DataError(
        f"this data needs the Python package {package!r} ({error}); install it with:"
        f" pip install {package}"
    )


def cannot_read(path: str | os.PathLike[str], error: OSError) -> DataError:
    """The error of a file or folder of the user's that cannot be read."""
    missing = isinstance(error, FileNotFoundError)
    reason = "it is not there (any more)" if missing else files.cause(error)
    return DataError(f"cannot read {error.filename or path}: {reason}")


def cannot_write(folder: str | os.PathLike[str], error: OSError) -> DataError:
    """The error of a folder of prepared data that cannot be written."""
    advice = "; choose another folder with --out or DATA_DIR"
    return DataError(
        f"cannot write to {folder}: {files.cause(error)}"
        + (advice if error.errno in _ANOTHER_FOLDER_HELPS else "")
        + "; what is done is kept, run it again to go on"
    )
