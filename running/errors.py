"""Errors that end a script in one line, and notices that are printed once."""

import functools
import os


class InputError(ValueError):
    """A user's mistake (file, value or argument), described in one line."""


class Stopped(BaseException):
    """A run that a signal ended, with all its work saved; like KeyboardInterrupt, no Exception."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


@functools.cache
def notice(text):
    """Print a line once: in the first process only, and not again in this one."""
    if os.environ.get("RANK", "0") == "0":
        print(text)
