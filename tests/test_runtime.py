"""Overrides of a config, and configs that cannot change."""

import pytest

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
