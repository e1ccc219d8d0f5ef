"""Overrides of a config, and configs that cannot change."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

from runtime import InputError, check, override


def test_override_keeps_the_type_of_the_default():
    default = {"a": 1, "b": 0.5, "c": "x", "d": False}
    config = override(default, ["a=3", "b=2", "c=y=z", "d=TRUE"])
    assert config == {"a": 3, "b": 2.0, "c": "y=z", "d": True}
    assert type(config["b"]) is float
    assert default == {"a": 1, "b": 0.5, "c": "x", "d": False}
    for wrong in ("a=1.5", "b=x", "d=1", "e=1", "a", "=1"):
        with pytest.raises(InputError, match="wanted"):
            override(default, [wrong])


def test_a_frozen_config_cannot_change():
    with pytest.raises(TypeError):
        check({"seed": 1})["seed"] = 2


@pytest.mark.parametrize(("asked", "kept"), [(None, "512"), ("64", "64")])
def test_kernels_that_onednn_keeps(asked, kept):
    """Guards against maps that take 0.6 GB more by and by; whoever asks for less gets it."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= dict.fromkeys(names, asked) if asked else {}
    code = f"import os, runtime; runtime.start_runtime('cpu'); print(*map(os.environ.get, {names}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [kept, kept], done.stderr
