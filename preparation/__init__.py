"""How tiles are made: from scenes of Sentinel-2 and label files, or simulated."""

import importlib

from running.errors import InputError


def need(module):
    """Import a module of requirements-prepare.txt; InputError that names the file without it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(
            f"{module}: not installed, wanted pip install -r requirements-prepare.txt"
        ) from None
