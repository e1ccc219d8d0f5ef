"""Fixtures: small tiles on disk, the real ones of ../shared, and quiet, private surroundings."""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TILES_DIR", ROOT.parent / "shared"))

# before any test imports the project: a private cache, and no wandb account
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="test-cache-")
os.environ["NETRC"] = os.devnull
for name in ("WANDB_API_KEY", "WANDB_MODE"):
    os.environ.pop(name, None)


def make_tile(folder, shape=(20, 16, 16, 10), clear=0.7, seed=0, labels=True, **info):
    """Write a tile whose pixels have one of two seasonal curves; returns its folder.

    Reflectance encodes the place: band 0 of a clear observation is 1000 + date, and the last band
    holds the flat index of the pixel plus 1, so that a test can tell where a value came from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    dates, height, width, num_bands = shape
    rng = np.random.default_rng(seed)
    doys = np.sort(rng.choice(np.arange(1, 366), dates, replace=False)).astype(np.int16)
    kind = (np.add.outer(np.arange(height) // 4, np.arange(width) // 4) % 2).astype(np.uint8)
    season = np.cos(2 * np.pi * (doys[:, None, None] - 200 * kind) / 365)[..., None]
    bands = 3000 + 1500 * season + rng.normal(0, 100, shape)
    bands[..., 0] = 1000 + np.arange(dates)[:, None, None]
    bands[..., -1] = 1 + np.arange(height * width).reshape(height, width)
    masks = (rng.random(shape[:3]) < clear).astype(np.uint8)
    bands[masks == 0] = rng.choice([0, 60000], (masks == 0).sum())[:, None]  # clouds, nodata
    bands = bands.astype(np.uint16)
    observed = bands[masks == 1].astype(np.float64)
    np.save(folder / "bands.npy", bands)
    np.save(folder / "masks.npy", masks)
    np.save(folder / "doys.npy", doys)
    np.save(folder / "band_mean.npy", observed.mean(0).astype(np.float32))
    np.save(folder / "band_std.npy", observed.std(0).astype(np.float32))
    if labels:
        np.save(folder / "labels.npy", np.where(kind == 1, 95, 40).astype(np.uint8))
    content = {"bands": [f"X{i}" for i in range(num_bands)], **info}
    (folder / "tile.json").write_text(json.dumps(content))
    return folder


def make_dataset(base_path, name="toy", tiles=2, **keywords):
    """Write `tiles` tiles MGRS-0, MGRS-1, ..; returns base_path."""
    for number in range(tiles):
        folder = Path(base_path) / "data" / name / "processed" / f"MGRS-{number}"
        make_tile(folder, seed=number, **keywords)
    return Path(base_path)


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path)


@pytest.fixture
def shared():
    if not SHARED.exists():
        pytest.skip("the real tiles of ../shared are not here")
    return SHARED


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # small batches; and other processes may be at work
