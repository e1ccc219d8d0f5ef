"""Errors that end a script in one line, and notices that are printed once."""

import difflib
import functools
import os
from pathlib import Path

NEAR_NAMES = 6  # that a message lists of a folder


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


def what_is_there(path):
    """The end of a message on a wrong path: what the nearest folder that exists has instead.

    Names like the wrong one come first. "" where the folder cannot be read.
    """
    path, missing = Path(path), ""
    while not path.is_dir() and path != path.parent:
        path, missing = path.parent, path.name
    try:
        names = sorted(n for n in os.listdir(path) if n.isprintable() and not n.startswith("."))
    except OSError:
        return ""
    alike = {name: difflib.SequenceMatcher(None, missing, name).ratio() for name in names}
    names.sort(key=lambda name: -alike[name] if alike[name] > 0.5 else 0)
    listed = ", ".join(names[:NEAR_NAMES])
    more = f" and {len(names) - NEAR_NAMES} more" if len(names) > NEAR_NAMES else ""
    folder = "this folder" if path == Path() else path
    return f"; {folder} has {listed or 'nothing'}{more}"
