"""Statistics of tiles of others: added, renewed after a correction, refused."""

import json
import os

from running.errors import InputError

import numpy as np
import pytest
import rasterio
from helpers import make_tile

import prepare_tiles
from preparation import band_statistics
from preparation.band_statistics import check_reflectance, complete_tiles, count_block
from preparation.sentinel2 import TESSERA_BANDS
from tiles import Tile

CRS, LEFT, TOP, SIZE = "EPSG:32633", 300000, 5400000, 60
SHAPE = (4, SIZE, SIZE, 10)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


def prepare(base_path, **changes):
    """Complete the tiles; returns them."""
    keys = {"base_path": str(base_path), "dataset_name": "toy", "statistics_only": True}
    return [Tile(f) for f in prepare_tiles.main(prepare_tiles.run_config | keys | changes)]


def counts(blue, mask=None):
    bands = np.full((20, 20, 1), blue, np.uint16)
    mask = np.ones((20, 20), np.uint8) if mask is None else mask
    return count_block(bands, mask, 0)


def test_strange_reflectances_are_reported():
    good, bright = counts(400), counts(4000)
    assert check_reflectance({"2021-01-01": good}) == []
    few = np.zeros((20, 20), np.uint8)
    few[0, :5] = 1
    assert check_reflectance({"2021-01-01": counts(1, few)}) == []  # too few pixels to judge
    for value, message, key in (
        (1, "subtracted twice", "offset=applied"),
        (1400, "may not have been subtracted", "offset=raw"),
    ):
        (text,) = check_reflectance({"2021-01-01": good, "2021-02-01": counts(value)})
        assert f"{message} on 1 of 2 dates: 2021-02-01 (if so: {key} overwrite=true" in text
    texts = check_reflectance({"2021-01-01": bright})
    assert any("calls bright pixels clear" in text for text in texts)


def test_tiles_of_others_get_what_they_lack(tmp_path):
    folder = make_tile(tmp_path / "data" / "toy" / "processed" / "MGRS-0", SHAPE, labels=False)
    mean, std = (np.load(folder / f"{name}.npy") for name in ("band_mean", "band_std"))
    for name in ("band_mean.npy", "band_std.npy", "tile.json"):
        (folder / name).unlink()
    (tile,) = prepare(tmp_path)
    np.testing.assert_allclose(tile.band_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(tile.band_std, std, rtol=1e-5)
    assert tile.band_names == TESSERA_BANDS


def make_own_tile(base_path):
    """A tile without labels and what its statistics have to be."""
    folder = make_tile(base_path / "data" / "toy" / "processed" / "MGRS-0", SHAPE, labels=False)
    return folder, [np.load(folder / f"{name}.npy") for name in ("band_mean", "band_std")]


def complete(base_path):
    """Complete the one tile there is, as statistics_only=true does; returns it."""
    processed = base_path / "data" / "toy" / "processed"
    (folder,) = complete_tiles(processed, {"bands": "tessera"})
    return Tile(folder)


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".png"}


def test_statistics_follow_a_correction_of_the_observations(tmp_path, monkeypatch, capsys):
    """Regression: bands.npy was corrected in place, and its statistics stayed as they were."""
    folder, (mean, std) = make_own_tile(tmp_path)
    complete(tmp_path)
    bands, masks = np.load(folder / "bands.npy"), np.load(folder / "masks.npy")
    times = folder.joinpath("bands.npy").stat()
    np.save(folder / "bands.npy", bands // 2)
    os.utime(folder / "bands.npy", ns=(times.st_atime_ns, times.st_mtime_ns))
    np.testing.assert_allclose(complete(tmp_path).band_mean, mean / 2, atol=1)
    assert "renewed, as the old ones were others" in capsys.readouterr().out
    # written before the statistics, so that the sample of the observations alone differs
    np.save(folder / "bands.npy", bands)
    for name in ("band_mean", "band_std"):
        (folder / f"{name}.npy").touch()
    np.testing.assert_allclose(complete(tmp_path).band_std, std, rtol=1e-5)
    # outside the sample, so that the time alone differs
    monkeypatch.setattr(Tile, "fingerprint", lambda tile: "same")
    complete(tmp_path)
    np.save(folder / "masks.npy", masks * (np.arange(SIZE) < 30))
    wanted = bands[:, :, :30][masks[:, :, :30] == 1].mean(0)
    np.testing.assert_allclose(complete(tmp_path).band_mean, wanted, rtol=1e-5)


def test_statistics_of_unknown_origin_are_checked_once(tmp_path, monkeypatch, capsys):
    folder, (mean, std) = make_own_tile(tmp_path)
    np.save(folder / "band_mean.npy", mean * np.float32(1 + 1e-5))  # as others round them
    (folder / "bands.npy").touch()
    before = content(folder)
    complete(tmp_path)
    assert "checked: they are those of the" in capsys.readouterr().out
    after = content(folder)
    assert json.loads(after.pop("tile.json")) == json.loads(before.pop("tile.json")) | {
        "statistics_of": Tile(folder).fingerprint()
    }
    assert after == before
    with monkeypatch.context() as patch:
        patch.delattr(band_statistics, "count_block")  # nothing is read again
        complete(tmp_path)
    info = json.loads((folder / "tile.json").read_text())
    (folder / "tile.json").write_text(json.dumps({"bands": info["bands"]}))
    np.save(folder / "band_mean.npy", np.full(10, 7, np.float32))
    np.testing.assert_allclose(complete(tmp_path).band_mean, mean, rtol=1e-5)
    assert "renewed" in capsys.readouterr().out


def test_observations_that_change_while_they_are_counted_are_refused(tmp_path, monkeypatch):
    folder, _ = make_own_tile(tmp_path)
    bands = np.load(folder / "bands.npy")

    def count_and_correct(*arguments):
        np.save(folder / "bands.npy", bands + 1)
        return count_block(*arguments)

    monkeypatch.setattr(band_statistics, "count_block", count_and_correct)
    with pytest.raises(InputError, match="bands.npy: found that it changed while it was read"):
        complete(tmp_path)
    assert "statistics_of" not in json.loads((folder / "tile.json").read_text())


@pytest.mark.parametrize("has_statistics", [True, False])
def test_masks_of_other_values_are_refused_before_anything_is_written(tmp_path, has_statistics):
    """Regression: masks of 0 and 255 were completed to a tile that every other script refused."""
    folder, _ = make_own_tile(tmp_path)
    np.save(folder / "masks.npy", 255 * np.load(folder / "masks.npy"))
    if not has_statistics:
        for name in ("band_mean.npy", "band_std.npy", "tile.json"):
            (folder / name).unlink()
    before = content(folder)
    with pytest.raises(InputError, match=r"masks.npy: found value 255, wanted 0 .* or 1 \(clear\)"):
        complete(tmp_path)
    assert content(folder) == before


def test_a_tile_that_was_made_here_need_not_be_checked(tmp_path, monkeypatch):
    """Its statistics and warnings are renewed, too, where its bands are corrected."""
    (tmp_path / "33UUP").mkdir()
    profile = {"count": 3, "height": 20, "width": 20, "dtype": "uint16", "crs": CRS}
    profile["transform"] = rasterio.Affine(10, 0, LEFT, 0, -10, TOP)
    values = np.random.default_rng(0).integers(100, 900, (3, 20, 20))
    values[2] = 4
    with rasterio.open(tmp_path / "33UUP" / "20210606.tif", "w", "GTiff", **profile) as file:
        file.write(values.astype(np.uint16))
        file.descriptions = ("B02", "B04", "SCL")
    keys = {"bands": "B02,B04", "local_path": str(tmp_path / "33UUP"), "offset": "applied"}
    prepare(tmp_path, statistics_only=False, **keys)
    with monkeypatch.context() as patch:
        patch.delattr(band_statistics, "count_block")
        tile = complete(tmp_path)
    bands = np.asarray(tile.bands) + np.uint16(2000)
    before = tile.info["counts"]["2021-06-06"]
    np.save(tile.path / "bands.npy", bands)
    tile = complete(tmp_path)
    after = tile.info["counts"]["2021-06-06"]
    assert after["dark"] == 0 < before["dark"] and before.keys() == after.keys()
    np.testing.assert_allclose(tile.band_mean, bands.mean((0, 1, 2)), rtol=1e-5)


def test_tiles_of_others_that_are_none_end_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"found no MGRS-\*/bands.npy"):
        prepare(tmp_path)
    folder = make_tile(tmp_path / "data" / "toy" / "processed" / "MGRS-0", SHAPE)
    (folder / "band_mean.npy").unlink()
    np.save(folder / "masks.npy", np.zeros(SHAPE[:3], np.uint8))
    with pytest.raises(InputError, match="found no clear observation"):
        prepare(tmp_path)
    np.save(folder / "masks.npy", np.zeros((2, 2, 2), np.uint8))
    with pytest.raises(InputError, match="masks.npy: found shape"):
        prepare(tmp_path)
    np.save(folder / "bands.npy", np.zeros((2, 2, 2, 1), np.float32))
    with pytest.raises(InputError, match="bands.npy: found dtype float32, wanted uint16"):
        prepare(tmp_path)
