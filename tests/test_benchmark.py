"""The benchmark runs and says what it should; how fast anything is is not tested."""

import itertools
import json
import math
import subprocess
import sys
import time

from running.device import start_runtime

import bench
import mapping
import measures
import pytest
import torch
from helpers import ROOT, Fork, make_tile

import make_demo_data
import train
from backbones import build_backbone
from tiles import Tile
from utils import extract_representations


def figures(content):
    for value in content.values():
        if isinstance(value, dict):
            yield from figures(value)
        elif isinstance(value, float):
            yield value


def run_bench(*arguments):
    return subprocess.run(
        [sys.executable, "benchmarks/bench.py", *arguments, "wandb_mode=disabled"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


FORK_EACH = """
import infer, json, os, sys
for line in sys.stdin:
    if not (child := os.fork()):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        exec(json.loads(line), {})
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


def cheap_children(run_child):
    """In place of measures.run_child: only the first training is a process of its own.

    The other scripts are forked. So is what maps (python -c), whose memory is measured, by a
    process that has done nothing but its imports.
    """
    scripts = {"train.py": (train, []), "make_demo_data.py": (make_demo_data, ["size=64"])}
    seen, mappers = [], []

    def run(arguments, *rest, **keywords):
        kind, *texts = arguments
        seen.append(kind)
        if seen == ["train.py"]:
            return run_child(arguments, *rest, **keywords)
        start = time.perf_counter()
        if kind in scripts:
            script, more = scripts[kind]
            process = Fork(*texts, *more, script=script)
            _, stderr = process.communicate()
            assert process.returncode == 0, stderr
            return time.perf_counter() - start
        if not mappers:
            command, pipe = [sys.executable, "-c", FORK_EACH], subprocess.PIPE
            mappers.append(subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
        print(json.dumps(*texts), file=mappers[0].stdin, flush=True)
        assert mappers[0].stdout.readline() == "0\n"
        return time.perf_counter() - start

    return run


@pytest.mark.slow
def test_benchmark_at_a_tiny_size(tmp_path, monkeypatch):
    """Forked, with a small encoder; test_a_section_that_is_not_there runs the script itself."""
    small = {"width": 16, "depth": 1, "latent_dim": 16}
    cheap = {name: getattr(measures, name) | small for name in ("MODEL", "MAPPED", "STEP")}
    cheap["run_child"] = cheap_children(measures.run_child)
    cheap["synchronise"] = lambda: None  # a fork cannot ask for a GPU
    for module, (name, value) in itertools.product((measures, mapping, bench), cheap.items()):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, value)
    sections = [
        "input",
        "training",
        "family",
        "inference",
        "encoder",
        "mapping",
        "profile",
        "growth",
        "startup",
    ]
    sizes = ["size=32", "largest=32", "num_dates=40", "num_tiles=3", "rounds=1", "gemm_size=256"]
    arguments = [f"sections={','.join(sections)}", f"output_dir={tmp_path}", *sizes]
    process = Fork(*arguments, "wandb_mode=disabled", script=bench)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    result = json.loads(stdout.splitlines()[-1])
    assert result == json.loads((tmp_path / "bench.json").read_text())
    assert set(sections) < set(result)
    assert all(math.isfinite(value) and value >= 0 for value in figures(result))
    assert result["startup"]["tiles_counted"] == 3
    memory = [case["peak_memory_gb"] for case in result["growth"].values()]
    assert 0.1 < min(memory) <= max(memory) < 1.5


@pytest.mark.slow
def test_a_section_that_is_not_there():
    done = run_bench("sections=speed")
    assert done.returncode == 1
    assert done.stderr.startswith("error: sections=speed: wanted one of input, training")


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")


@pytest.mark.slow
@needs_gpu
def test_gpu_section(tmp_path):
    done = run_bench("sections=gpu", "device=cuda", "gpu_size=160", f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert all(value > 0 for value in figures(json.loads((tmp_path / "bench.json").read_text())))


@needs_gpu
def test_gpu_and_cpu_map_the_same_representations(tmp_path):
    """In bf16 and padded to few shapes there, in float32 without padding here."""
    tile = Tile(make_tile(tmp_path / "MGRS-0", (40, 16, 16, 10)))
    torch.manual_seed(0)
    sizes = {"num_bands": 10, "sample_size": 8, "latent_dim": 32, "width": 32, "depth": 2}
    backbone = build_backbone("transformer", **sizes).eval()
    mean, std = torch.from_numpy(tile.band_mean), torch.from_numpy(tile.band_std)
    maps = []
    for device in ("cpu", "cuda"):
        runtime = start_runtime(device)
        blocks = extract_representations(backbone.to(runtime.device), tile, mean, std, 5, runtime)
        maps.append(torch.cat([y for *_, y, _ in blocks]))
    assert torch.cosine_similarity(*maps).min() > 0.99
