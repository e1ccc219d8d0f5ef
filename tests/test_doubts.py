"""infer.py says what makes the maps of a tile doubtful, and maps it all the same."""

import re
from types import SimpleNamespace

import numpy as np
import torch
from helpers import make_tile, map_tile, tile_of

from maps.doubts import unlike_bands, unlike_days


def test_a_tile_unlike_those_of_training_is_doubtful(workplace, tmp_path, capsys):
    """Of another year, say: other statistics, days, classes. Those of training are not named."""
    keywords = {"tile_path": tile_of(workplace).parent}
    map_tile(workplace, tmp_path / "same", **keywords)
    assert "doubtful" not in capsys.readouterr().out
    classes = {"40": {"name": "cropland "}, "95": {"name": "Oats"}, "7": {"name": "Rye"}}
    tile = make_tile(tmp_path / "MGRS-year", (20, 24, 16, 10), clear=0.8, classes=classes)
    doys = np.load(tile / "doys.npy")
    np.save(tile / "doys.npy", doys // 2 + 1)  # ends in July
    std = np.load(workplace / "data/toy/processed/MGRS-0/band_std.npy")
    np.save(tile / "band_mean.npy", np.load(tile / "band_mean.npy") + std * [0, 2, *[0] * 8])
    map_tile(workplace, tmp_path / "other", tile_path=tile)
    bands, days, names = [s for s in capsys.readouterr().out.splitlines() if "doubtful: " in s]
    assert "(x: ratio of the deviations): X1 +2." in bands and "X2" not in bands
    assert re.search(r"it lacks dates of days 2\d\d to 3\d\d \(so 1 of 1 tiles\)$", days)
    january, december = SimpleNamespace(doys=np.array([5])), {"days": [360]}
    assert unlike_days(january, SimpleNamespace(checkpoint=december)) == "", "a year is a circle"
    assert "classes that the checkpoint lacks: Oats; that it lacks: Mangroves" in names


def test_a_smaller_spread_is_as_doubtful_as_a_larger_one():
    """In the training's deviations, which differ from band to band; a constant band has 1."""
    checkpoint = {"mean": torch.tensor([1000.0] * 6), "std": torch.tensor([200.0] * 5 + [1.0])}
    tile = SimpleNamespace(order=np.arange(6), read_names=list("ABCDEF"))
    tile.band_mean = np.array([1000, 1000, 1095, 1105, 895, 1000])
    tile.band_std = np.array([90, 410, 110, 200, 390, 0])
    found = unlike_bands(tile, SimpleNamespace(checkpoint=checkpoint))
    assert found.endswith(": A +0.0 (x 0.5), B +0.0 (x 2.0), D +0.5 (x 1.0), E -0.5 (x 1.9)")
