"""Flags of the programs that read no recipe; a mistake is a UserError of one line."""

import argparse
from typing import NoReturn

from flashtrain.errors import UserError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, and without a page of usage for a mistake."""

    def __init__(self, docstring: str | None):
        super().__init__(
            description=docstring,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self) -> argparse.Namespace:
        """The flags of the command line. Raises UserError."""
        arguments, unknown = self.parse_known_args()
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].split("=")[0]
            raise UserError(f"there is no flag {name}; {did_you_mean(name, flags)}")
        return arguments

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help shows the flags")
