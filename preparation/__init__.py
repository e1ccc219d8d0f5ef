"""How tiles are made: from scenes of Sentinel-2 and label files, or simulated."""

import importlib

from running.errors import InputError


def need(module, file="requirements-prepare.txt"):
    """Import a module of a file of optional packages; InputError that names the file without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{module}: not installed, wanted pip install -r {file}") from None
