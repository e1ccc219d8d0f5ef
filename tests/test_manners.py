"""Manners of all modules and scripts: what importing does, what they contain, who imports whom."""

import ast
import graphlib
import importlib
import os
import runpy
import subprocess
import sys

import running
from running.errors import InputError

import pytest
from helpers import ROOT

FOLDERS = ("running", "maps", "evaluation", "training", "trained", "preparation", "explorer")
ROOT_FILES = sorted(ROOT.glob("*.py"))
PYTHON_FILES = ROOT_FILES + [
    file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))
]
SCRIPTS = [file.stem for file in ROOT_FILES if "\nif __name__ ==" in file.read_text()]
CORE = [file.stem for file in ROOT_FILES if file.stem not in SCRIPTS]
# which of our own folders and modules each folder may import, beside itself
MAY_IMPORT = {
    "running": set(),
    "maps": {"running", *CORE},
    "evaluation": {"running", "maps", *CORE},
    "training": {"running", "evaluation", "trained", *CORE},
    "trained": {"running", "maps", *CORE},
    "preparation": {"running", "maps", "trained", *CORE},
    "explorer": {"running", "maps", *CORE},
}


IMPORT_EACH = """
import importlib, os, sys
import matplotlib.pyplot, rasterio, scipy.stats, sklearn.ensemble, torch, wandb  # once for all
sys.path.insert(0, sys.argv[1])
for name in sys.argv[2:]:
    if not os.fork():
        importlib.import_module(name)
        sys.stdout.flush()
        os._exit(0)  # what the libraries do at an exit takes a second
    if os.wait()[1]:
        print(name, "cannot be imported")
"""


@pytest.mark.slow
def test_importing_does_no_work(tmp_path):
    """Guards against work done at import, which makes a module impossible to test."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PYTHON_FILES]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, str(ROOT), *names],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
    assert not list(tmp_path.iterdir())


def imported_by(path):
    """The first names of all that a file imports: its own folders and modules, and libraries."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_who_imports_whom(path):
    """Scripts import no script, the core imports running, a folder what MAY_IMPORT says."""
    ours = {*FOLDERS, *CORE, *SCRIPTS}
    folder = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if folder in SCRIPTS:
        allowed = {*FOLDERS, *CORE}
    elif folder in CORE:
        allowed = {"running", *CORE}
    else:
        allowed = MAY_IMPORT[folder] | {folder}
    assert set(imported_by(path)) & ours <= allowed


def test_no_circle_of_imports():
    """No module of ours imports another that imports it, directly or by others."""
    graph = {}
    for path in PYTHON_FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                graph[name] |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torch_is_imported_after_running(path):
    """OpenMP reads how its threads wait when torch is loaded, and running/ sets that."""
    names = list(imported_by(path))
    if "torch" in names and "running" in names:
        assert names.index("running") < names.index("torch")


@pytest.mark.parametrize(
    ("given", "expected"),
    [((None, None), ("PASSIVE", "5000")), (("ACTIVE", None), ("ACTIVE", None))]
    + [((None, "7"), ("PASSIVE", "7"))],
)
def test_threads_wait_as_the_user_says(monkeypatch, given, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    for name, value in zip(names, given, strict=True):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    importlib.reload(running)
    assert tuple(map(os.environ.get, names)) == expected


def test_the_house_is_small():
    """At most 21 Python files at the root, none above 450 lines."""
    assert len(ROOT_FILES) <= 21
    for path in PYTHON_FILES:
        assert len(path.read_text().splitlines()) <= 450, path


@pytest.mark.parametrize("path", PYTHON_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_device_or_absolute_path_is_hard_coded(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and path.name != "device.py":
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
