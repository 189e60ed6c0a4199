"""The one error of the data package."""


class DataError(ValueError):
    """Data that is missing, damaged or unfit; the message is one line that a user can act on."""
