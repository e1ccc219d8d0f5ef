"""The benchmark runs and says what it should; how fast anything is is not tested."""

import json
import math
import subprocess
import sys

from conftest import ROOT


def figures(content):
    for value in content.values():
        if isinstance(value, dict):
            yield from figures(value)
        elif isinstance(value, float):
            yield value


def test_benchmark_at_a_tiny_size(tmp_path):
    sections = ["input", "training", "inference", "growth", "startup"]
    arguments = [f"sections={','.join(sections)}", f"output_dir={tmp_path}"]
    arguments += ["size=32", "largest=32", "num_dates=40", "num_tiles=3", "rounds=1"]
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", *arguments, "wandb_mode=disabled"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert set(sections) < set(result)
    assert all(math.isfinite(value) and value >= 0 for value in figures(result))
    assert result["startup"]["tiles_counted"] == 3
    memory = [case["peak_memory_gb"] for case in result["growth"].values()]
    assert 0.1 < min(memory) <= max(memory) < 1.5


def test_a_section_that_is_not_there():
    done = subprocess.run(
        [sys.executable, "benchmarks/bench.py", "sections=speed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: sections=speed: wanted one of input, training")
