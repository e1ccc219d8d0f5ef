"""Arguments of each script: answered as a user starts it, before anything heavy is imported."""

import ast
import shutil
import subprocess
import sys
import tokenize

from running.config import MAX_INT, RANGES, check_early, check_paths, override
from running.errors import InputError
from running.script import TORCHRUN, start_script

import pytest
from helpers import ROOT

FILES = sorted(ROOT.glob("*.py"))
SCRIPTS = [path.stem for path in FILES if "\nif __name__ ==" in path.read_text()]
HEAVY = {"numpy", "torch", "matplotlib", "scipy", "sklearn", "rasterio", "tqdm", "wandb"}


def start(path, folder, *arguments):
    """A script started as a user does: the ended process, and the names of all that it imported."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", path, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    imports = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    other = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    done.stderr = "\n".join(other)
    return done, {line.rpartition("|")[2].strip() for line in imports}


def run_config_of(script):
    """The run_config of a script, read without importing it."""
    for node in ast.parse((ROOT / f"{script}.py").read_text()).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "run_config":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{script}.py: a run_config that is no literal is checked late")


def config_comments(script):
    """All comments of a script's run_config."""
    with open(ROOT / f"{script}.py", "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    (start,) = [t.start[0] for t in tokens if t.string == "run_config" and t.line[0] == "r"]
    end = next(t.start[0] for t in tokens if t.line.rstrip() == "}" and t.start[0] > start)
    comments = [t for t in tokens if t.type == tokenize.COMMENT]
    return [t.string.strip("# ") for t in comments if start < t.start[0] < end]


# ---- every script --------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_misspelt_key_is_answered_before_torch_is_imported(script, tmp_path):
    """Regression: it took 7 s of CPU time, and the answer was a list of all keys."""
    key = max(run_config_of(script), key=len)
    done, imported = start(ROOT / f"{script}.py", tmp_path, f"{key[:3]}{key[4:]}=x")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == (
        f"error: {key[:3]}{key[4:]}=x: found no such key, did you mean {key}? "
        "(--help lists all keys)"
    )
    assert imported and not imported & HEAVY


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_what_the_source_says_of_each_key(script, tmp_path):
    done, imported = start(ROOT / f"{script}.py", tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert not imported & HEAVY
    text, lines = " ".join(done.stdout.split()), done.stdout.splitlines()
    keys = lines[lines.index("Keys and their defaults, changed by key=value:") :]
    assert all(len(line) <= 100 for line in keys if "http" not in line)
    for comment in (comments := config_comments(script)):
        assert " ".join(comment.split()) in text
    run_config = run_config_of(script)
    for key, value in run_config.items():
        shown = str(value).lower() if isinstance(value, bool) else value
        assert f"  {key}={shown} " in done.stdout or f"  {key}={shown}\n  " in done.stdout
    assert len(comments) >= len(run_config)  # each key has one, headings come to that


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_default_is_refused_early(script):
    """A value that a script takes passes the ranges that are the same for all scripts."""
    check_early(run_config_of(script))


# ---- one script ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("epochs=1.5", "epochs=1.5: wanted a whole number (now 0)"),
        ("batch_size=1", "batch_size=1: wanted 2 or more"),
        ("skip_bad_tiles=1", "skip_bad_tiles=1: wanted true or false (now false)"),
        ("device=tpu", "device=tpu: wanted one of auto, cpu, cuda"),
        ("checkpoint_path=a/no.pt", "checkpoint_path=a/no.pt: found no such file or folder"),
        ("--epochs=3", "--epochs=3: found no such key, did you mean epochs? (--help lists all "),
        ("epochs", "epochs: wanted epochs=value (now 0)"),
        ("?", "?: found no such key, wanted key=value (--help lists all keys)"),
    ],
)
def test_a_wrong_value_is_answered_before_torch_is_imported(argument, message, tmp_path):
    done, imported = start(ROOT / "train.py", tmp_path, "sample_size=8", argument)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {message}") and "\n" not in done.stderr
    assert not imported & HEAVY
    assert not list(tmp_path.iterdir())


def test_whole_numbers_may_have_an_exponent():
    default = {"min_samples": 1_000_000, "learning_rate": 0.1}
    for text, value in {"1e6": 10**6, "1.5e3": 1500, "2_000": 2000, "-3": -3, "4.0": 4}.items():
        config = override(default, [f"min_samples={text}"])
        assert config["min_samples"] == value
        assert type(config["min_samples"]) is int
    for text in ("1.5", "1e-3", "inf", "nan", "1e999", "e6", "1e6x", ""):
        with pytest.raises(InputError, match=f"min_samples={text}: wanted a whole number"):
            override(default, [f"min_samples={text}"])


def test_paths_have_to_be_there(tmp_path):
    (tmp_path / "a,b.npy").touch()
    (tmp_path / "c.npy").touch()
    both = f"{tmp_path}/a,b.npy"  # one file, or several with commas between
    check_paths({"map_path": both, "labels_path": "", "tile_path": f"{tmp_path},{tmp_path}/c.npy"})
    check_paths({"base_path": "new", "basis_path": "new.npz", "output_dir": "new", "labels": "new"})
    with pytest.raises(InputError, match="tile_path=.*/d.npy: found no such file or folder"):
        check_paths({"tile_path": f"{tmp_path}/c.npy,{tmp_path}/d.npy"})


# ---- who is asked --------------------------------------------------------------------------------

OWN = """
import sys
import running
assert "torch" not in sys.modules
print("started")
"""


@pytest.mark.parametrize(
    ("content", "is_checked"),
    [
        (OWN + "run_config = {'seed': 0}", True),
        (OWN + "run_config = {'seed': len(sys.argv)}", False),  # left to run_script
        (OWN, False),  # another program, whose arguments are its own
    ],
)
def test_only_the_arguments_of_a_script_are_checked(content, is_checked, tmp_path):
    shutil.copytree(ROOT / "running", tmp_path / "running")
    (tmp_path / "own.py").write_text(content)
    done, _ = start("own.py", tmp_path, "sead=1")
    assert (done.returncode, "seed?" in done.stderr) == ((1, True) if is_checked else (0, False))
    assert ("started" in done.stdout) is not is_checked


def test_python_without_a_script_is_not_asked():
    code = "import running, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, "sead=1"], cwd=ROOT).returncode == 0


def test_ranges_that_scripts_narrow_are_the_widest():
    """`check_early` knows RANGES alone, so what is wider in a script would be refused early."""
    ranges = []  # as keywords of `check`, or in a dict of them
    for script in (*SCRIPTS, "training/finetuning"):
        for node in ast.walk(ast.parse((ROOT / f"{script}.py").read_text())):
            if isinstance(node, ast.keyword):
                ranges.append((node.arg, node.value))
            if isinstance(node, ast.Dict):
                keys = (getattr(key, "value", None) for key in node.keys)
                ranges += zip(keys, node.values, strict=True)
    ranges = {key: node.elts for key, node in ranges if key in RANGES and hasattr(node, "elts")}
    assert {"epochs", "sample_size", "stride"} <= set(ranges)
    for key, numbers in ranges.items():
        names = {"MAX_INT": MAX_INT, "any_length": True}
        low, high = (eval(ast.unparse(number), names) for number in numbers)
        assert RANGES[key][0] <= low and high <= RANGES[key][1], key


def test_a_script_that_a_script_starts_is_no_process_of_torchrun(tmp_path, monkeypatch):
    """It would wait for the others, who know nothing of it; its keys are those that are given."""
    code = "import os, sys; print(sys.argv[1:], [k for k in os.environ if 'RANK' in k])"
    (tmp_path / "said.py").write_text(code)
    monkeypatch.setattr("running.script.ROOT", tmp_path)
    for key in TORCHRUN:
        monkeypatch.setenv(key, "1")
    done = start_script("said.py", {"a": 1, "b": ""}, capture_output=True, text=True)
    assert done.stdout == "['a=1', 'b='] []\n"
