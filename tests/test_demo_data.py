"""make_demo_data.py: simulated tiles that look like real ones where it matters."""

import hashlib

from running.errors import InputError

import numpy as np
import pytest
from helpers import run

import make_demo_data
from maps.land_cover import WORLDCOVER
from preparation import simulated
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


def test_another_year_is_of_the_same_ground(tmp_path):
    """The first year stays as it was; another has other dates, and some fields changed."""
    small = {"base_path": tmp_path, "size": 64, "num_tiles": 1, "num_dates": 20}
    run(make_demo_data, **small)
    run(make_demo_data, **small, year=2025, dataset_name="later")
    (first,), (later,) = (open_dataset(tmp_path, name) for name in ("simulated", "later"))
    content = np.asarray(first.labels).tobytes() + first.doys.tobytes()
    assert hashlib.sha256(content).hexdigest()[:16] == "27908260ec72635e", "the default changed"
    assert first.bands.mean() == pytest.approx(3352.66342, rel=1e-5)
    assert later.name == first.name and later.info["transform"] == first.info["transform"]
    assert {day[:4] for day in first.info["dates"]} == {"2024"}
    assert {day[:4] for day in later.info["dates"]} == {"2025"}
    assert not np.array_equal(first.doys, later.doys)

    changed = np.load(later.path / "changed.npy")
    assert changed.shape == (64, 64) and changed.dtype == bool
    assert 0.08 < changed.mean() < 0.2, "15 % of the fields, and these have several sizes"
    differ = np.asarray(first.labels) != np.asarray(later.labels)
    assert not (differ & ~changed).any()
    assert differ[changed].mean() > 0.6, "the rest are covers of one code: pasture, mown meadow"


def test_all_tiles_of_a_year_have_its_weather_and_the_soil_stays(monkeypatch):
    cover, field = simulated.simulate_covers(32, np.random.default_rng(0))
    pixels = simulated.grow(cover, field, np.random.default_rng(0))
    monkeypatch.setattr(simulated, "vary", lambda field, *rest: np.zeros((2, *field.shape)))
    one, other, later = (
        simulated.grow_in(year, pixels, field, 0, np.random.default_rng(seed))
        for year, seed in ((2025, 1), (2025, 2), (2026, 1))
    )
    for key in ("season", "strength"):
        assert (one[key] == other[key]).all() and (one[key] != later[key]).all()
    assert (one["soil"] == pixels["soil"]).all()


@pytest.mark.parametrize("seed", range(8))
def test_a_known_share_of_fields_changes(seed):
    rng = np.random.default_rng(seed)
    cover, field = simulated.simulate_covers(64, rng)
    differ = simulated.change_fields(cover, field, rng) != cover
    names = np.array(list(simulated.COVERS))[cover]
    is_field = np.isin(names, list(simulated.FIELD_SHARES))
    assert not differ[~is_field].any(), "rivers and towns stay"
    changed, unchanged = (set(field[is_field & where]) for where in (differ, ~differ))
    assert not changed & unchanged, "a field changes as a whole"
    assert len(changed) == round(0.15 * len(changed | unchanged))


def test_a_tile_without_clear_observations_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(
        simulated,
        "simulate_date",
        lambda *_: (np.ones((16, 16, 11), np.uint16), np.zeros((16, 16), np.uint8)),
    )
    with pytest.raises(InputError, match="num_dates=2 seed=0: found no clear observation"):
        run(make_demo_data, base_path=tmp_path, size=16, num_dates=2)
    assert not list((tmp_path / "data").iterdir())
