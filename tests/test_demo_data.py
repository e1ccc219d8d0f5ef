"""make_demo_data.py: simulated tiles that look like real ones where it matters."""

import numpy as np
import pytest
from helpers import run

import make_demo_data
from maps.land_cover import WORLDCOVER
from preparation import simulated
from running.errors import InputError
from tiles import open_dataset


def test_simulated_tiles(tmp_path):
    small = {"base_path": tmp_path, "size": 48, "num_tiles": 2}
    run(make_demo_data, **small)
    tiles = open_dataset(tmp_path, "simulated")
    assert [tile.name for tile in tiles] == ["MGRS-SIM1", "MGRS-SIM2"]
    for tile in tiles:
        assert tile.shape == (60, 48, 48, 11)
        assert "(simulated)" in tile.title
        assert tile.info["crs"].startswith("EPSG:")
        assert len(set(np.diff(tile.doys).tolist())) > 1, "irregular dates"
        assert set(np.unique(tile.labels)) <= set(WORLDCOVER)
        assert (tile.bands[tile.masks == 1] > 0).all()
        masks = tile.masks.astype(bool)
        alike = (masks[:, 1:] == masks[:, :-1]).mean()
        assert alike > 0.9, "clouds hang together in space"
        blue = tile.bands[..., 1]
        assert ((blue > 4000) & masks).sum() > 20, "some clouds are left undetected"
    assert not np.array_equal(tiles[0].labels, tiles[1].labels)
    with pytest.raises(InputError, match="exists already"):
        run(make_demo_data, **small)


def test_a_tile_without_clear_observations_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        simulated,
        "simulate_date",
        lambda *_: (np.ones((16, 16, 11), np.uint16), np.zeros((16, 16), np.uint8)),
    )
    with pytest.raises(InputError, match="num_dates=2 seed=0: found no clear observation"):
        run(make_demo_data, base_path=tmp_path, size=16, num_dates=2)
    assert not list((tmp_path / "data").iterdir())
