"""What the benchmarks share: a tile to read, times and rates of products."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import train  # noqa: E402

BANDS, SAMPLE_SIZE = 11, 16
MODEL = {"width": 64, "depth": 3, "latent_dim": 64}  # ffn 4 x width
MAPPED = {key: train.run_config[key] for key in MODEL}  # the default encoder
STEP = {"loss": "barlow_twins", "barlow_lambda": 0.005, "augment": "none", "mix_up": 0.0}
STEP |= {"clip_norm": 1.0, "weight_decay": 1e-4, "seed": 0, "prediction": 0.0}
STEP |= {"min_sample_size": SAMPLE_SIZE, "blend": 0.0}
STEP |= {"backbone": "transformer", "sample_size": SAMPLE_SIZE, "projector_dim": 512, **MODEL}


def write_tile(base_path, name, size, num_dates, tile="MGRS-0"):
    """A tile of noise, half of it clear in stripes of its own for each pixel; returns its folder.

    One small block is drawn and laid side by side, so that a large tile is written quickly.
    """
    folder = Path(base_path) / "data" / name / "processed" / tile
    folder.mkdir(parents=True)
    rng = np.random.default_rng(size)
    block, shape = 128, (num_dates, size, size)
    repeats = -(-size // block)
    bands = np.lib.format.open_memmap(folder / "bands.npy", "w+", np.uint16, (*shape, BANDS))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, shape)
    for index in range(num_dates):
        values = rng.integers(1, 10_000, (block, block, BANDS), dtype=np.uint16)
        bands[index] = np.tile(values, (repeats, repeats, 1))[:size, :size]
        clear = (rng.random((block, block)) < 0.5).astype(np.uint8)
        masks[index] = np.tile(clear, (repeats, repeats))[:size, :size]
    np.save(folder / "doys.npy", np.linspace(1, 365, num_dates).astype(np.int16))
    np.save(folder / "band_mean.npy", np.full(BANDS, 5000, np.float32))
    np.save(folder / "band_std.npy", np.full(BANDS, 2887, np.float32))
    return folder


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def memory_of(batches):
    """GB of own memory that this process has more of, at most, while it reads batches."""
    status = Path("/proc/self/status")

    def own():
        return int(re.search(r"RssAnon:\s*(\d+)", status.read_text())[1]) / 2**20

    before = own()
    return max(own() for _ in batches) - before


def in_turn(rounds, **functions):
    """Median seconds of functions that run in turn, after a first time that does not count."""
    times = [{name: seconds(f) for name, f in functions.items()} for _ in range(rounds + 1)]
    return {name: float(np.median([t[name] for t in times[1:]])) for name in functions}


def gemm_rate(size, device="cpu", dtype=torch.float32):
    """FLOP/s of a product of two (size, size) matrices, the best of several."""
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    best = min(seconds(lambda: (a @ b, synchronise())) for _ in range(8))
    return 2 * size**3 / best


def synchronise():
    """Wait until a GPU, where there is one, has finished its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def encoder_flops(steps, *, width, depth, latent_dim):
    """FLOP of the encoder for series of this number of steps: two for each multiply-and-add."""
    layer = 24 * width**2 + 4 * steps * width  # projections and feed-forward; attention
    return steps * (2 * (BANDS * width + width**2) + depth * layer) + 2 * width * latent_dim


def run_child(arguments, threads, work, launcher=(), root=ROOT):
    """Run a script of the project, or of another checkout; returns the seconds that it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(work)}
    command = [sys.executable, *launcher, *arguments]
    start = time.perf_counter()
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{child.stderr.decode()}")
    return time.perf_counter() - start
