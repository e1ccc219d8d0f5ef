"""Manners of all modules and scripts: what importing them does, and what they may contain."""

import ast
import importlib
import runpy
import subprocess
import sys

import pytest
from helpers import ROOT

from runtime import InputError

PYTHON_FILES = sorted(ROOT.glob("*.py"))
SCRIPTS = [file.stem for file in PYTHON_FILES if "\nif __name__ ==" in file.read_text()]


IMPORT_EACH = """
import os, sys
import matplotlib.pyplot, rasterio, scipy.stats, sklearn.ensemble, torch, wandb  # once for all
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    if not os.fork():
        __import__(name)
        sys.stdout.flush()
        os._exit(0)  # what the libraries do at an exit takes a second
    if os.wait()[1]:
        print(name, "cannot be imported")
"""


@pytest.mark.slow
def test_importing_does_no_work(tmp_path):
    """Guards against work done at import, which makes a module impossible to test."""
    names = [path.stem for path in PYTHON_FILES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, str(ROOT), *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: path.name)
def test_manners(path):
    """No hard-coded device or absolute path; and scripts import no scripts."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
            assert not names & set(SCRIPTS)
        if isinstance(node, ast.Attribute) and path.name != "runtime.py":
            assert node.attr != "cuda"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert not node.value.startswith(("/home", "/mnt", "/data/", "cuda:"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_explains_itself(name, monkeypatch, capsys):
    """What `python name.py --help` does: the docstring, and every key with its default."""
    path = ROOT / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    names = runpy.run_path(str(path), run_name="__main__")
    out = capsys.readouterr().out
    assert out.startswith(names["__doc__"].strip())
    assert all(f"  {key}=" in out for key in names["run_config"])


def numeric_keys():
    """(script, key) of every number in a run_config."""
    return [
        (name, key)
        for name in [*SCRIPTS, "bench"]
        for key, value in importlib.import_module(name).run_config.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


@pytest.mark.parametrize(("name", "key"), numeric_keys())
def test_every_number_has_a_range(name, key):
    """A value out of range ends in one line that names the key, before any work is done."""
    script = importlib.import_module(name)
    value = type(script.run_config[key])(-(10**9))
    with pytest.raises(InputError) as error:
        script.main({**script.run_config, key: value, "wandb_mode": "disabled"})
    assert str(error.value).startswith(f"{key}={value}: wanted ")
    assert "\n" not in str(error.value)
