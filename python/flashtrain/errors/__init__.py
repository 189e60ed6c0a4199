"""Errors that are a user's to mend, and the exit codes they end a program with.

A `UserError` is one line that says what came, what is supported and what to do next. Programs print
that line alone; every other exception is a defect and keeps its traceback.

| exit code | meaning                                                                        |
|-----------|--------------------------------------------------------------------------------|
| 0         | done                                                                           |
| 1         | a defect: the traceback shows where; or a process of the run was killed        |
| 2         | `UserError`: a flag, a config, a path, a file or a machine                     |
| 3         | `TrainingDivergedError`: the loss stayed non-finite                            |
| 75        | `RunInterruptedError`: state was saved, start again to go on (EX_TEMPFAIL)     |
| 128 + n   | signal n (SIGHUP 129, SIGINT 130, SIGTERM 143) came before training began, or  |
|           | to a program that does not train                                               |
"""

from collections.abc import Iterable


class UserError(Exception):
    """A mistake the user can mend; the message is one line without a traceback."""

    exit_code = 2


class TrainingDivergedError(UserError):
    """The loss or the gradient was non-finite too many steps in a row."""

    exit_code = 3


class RunInterruptedError(UserError):
    """A signal asked the run to stop; its state was saved before it left."""

    exit_code = 75


def did_you_mean(given: object, valid: Iterable[str]) -> str:
    """The end of an error message: the nearest valid name if one is near, and else all of them."""
    import difflib  # here: it would delay the start of every program

    valid = list(valid)
    near = difflib.get_close_matches(str(given), valid, n=1, cutoff=0.5)
    if near:
        return f"did you mean {near[0]!r}?"
    if not valid:
        return "there is none"
    return "valid: " + ", ".join(valid)
