"""Overrides of a config, and configs that cannot change."""

import os
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from runtime import InputError, check, override, run_script, start_runtime


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


@pytest.mark.slow
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


def test_more_processes_than_gpus_end_in_one_line(monkeypatch):
    """Regression: CUDA's own error came as a traceback from each of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="device=auto: found 1 GPUs, wanted one for each process"):
        start_runtime()


@pytest.mark.parametrize(
    ("cpu_name", "instructions", "is_fast"),
    [
        ("AMD EPYC", ["avx512_bf16"], True),
        ("AMD EPYC", [], False),
        ("Intel Xeon", ["avx512_bf16"], False),
        ("Intel Xeon", ["avx512_bf16", "amx_bf16"], True),
    ],
)
def test_bf16_where_it_is_faster(monkeypatch, cpu_name, instructions, is_fast):
    """Regression: Intel's avx512_bf16 without AMX trained 1.6 times as long as float32."""
    cpu = {"cpu_name": cpu_name, **dict.fromkeys(instructions, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert start_runtime("cpu", "auto").trains_in_bf16 == is_fast
    assert start_runtime("cpu", "bfloat16").trains_in_bf16
    assert not start_runtime("cpu", "float32").trains_in_bf16


def test_an_error_without_text_is_told_by_its_kind(monkeypatch):
    def fail(config):
        raise TimeoutError

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    with pytest.raises(SystemExit, match="error: TimeoutError"):
        run_script(fail, {}, "")
