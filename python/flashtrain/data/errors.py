"""The one error of the data package."""

from flashtrain.errors import UserError


class DataError(UserError, ValueError):
    """Data that is missing, damaged or unfit; the message is one line that a user can act on."""


def missing_package(package: str, error: ImportError) -> DataError:
    """The error of a Python package that only some data needs, and that is not there."""
    return DataError(
        f"this data needs the Python package {package!r} ({error}); install it with:"
        f" pip install {package}"
    )
