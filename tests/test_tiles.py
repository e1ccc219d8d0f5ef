"""The tile contract: what is opened, what is refused, statistics, counts, and the splits."""

import json
import shutil

from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import make_dataset, make_tile, save

from data import SentinelTimeSeriesDataset
from tiles import Tile, open_dataset


def test_opens_without_reading_the_bands(dataset):
    tile = open_dataset(dataset, "toy")[0]
    assert tile.name == "MGRS-0"
    assert isinstance(tile.bands, np.memmap)
    assert tile.shape == (20, 16, 16, 10)


def cut(tile, name):
    file = tile / f"{name}.npy"
    file.write_bytes(file.read_bytes()[:-100])


BREAK = {
    "masks.npy: found no such file": lambda t: (t / "masks.npy").unlink(),
    "bands.npy: found no readable array": lambda t: cut(t, "bands"),
    "bands.npy: found shape (3, 4)": lambda t: save(t, "bands", np.zeros((3, 4), np.uint16)),
    "bands.npy: found dtype float32": lambda t: save(
        t, "bands", np.zeros((20, 16, 16, 10), np.float32)
    ),
    "masks.npy: found shape (1, 16, 16)": lambda t: save(
        t, "masks", np.ones((1, 16, 16), np.uint8)
    ),
    "doys.npy: found [": lambda t: save(t, "doys", np.arange(20, 0, -1)),
    "doys.npy: found [0,": lambda t: save(t, "doys", np.arange(20)),
    "doys.npy: found dtype float64": lambda t: save(t, "doys", np.arange(1.0, 21)),
    "band_std.npy: found [nan": lambda t: save(t, "band_std", np.full(10, np.nan, np.float32)),
    "labels.npy: found shape (16, 15)": lambda t: save(t, "labels", np.zeros((16, 15), np.uint8)),
    "splits.npy: found value 7": lambda t: save(t, "splits", np.full((16, 16), 7, np.uint8)),
    "tile.json: found no readable JSON": lambda t: (t / "tile.json").write_text("{"),
    "tile.json: found dates": lambda t: (t / "tile.json").write_text(
        json.dumps({"dates": ["yesterday"] * len(np.load(t / "doys.npy"))})
    ),
    "tile.json: found bands": lambda t: (t / "tile.json").write_text('{"bands": ["B02"]}'),
    "masks.npy: found no readable array": lambda t: np.save(
        t / "masks.npy", np.array([{}]), allow_pickle=True
    ),
}


@pytest.mark.parametrize("message", BREAK)
def test_a_tile_out_of_contract_is_refused_in_one_line(dataset, message):
    """A missing mask must not pass for an all-clear one; nor a cut or foreign file for data."""
    tile = dataset / "data/toy/processed/MGRS-1"
    BREAK[message](tile)
    with pytest.raises(InputError) as error:
        open_dataset(dataset, "toy")
    assert message in str(error.value)
    assert str(tile) in str(error.value)
    assert "wanted" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mask_of_other_values_is_refused(dataset):
    save(dataset / "data/toy/processed/MGRS-0", "masks", np.full((20, 16, 16), 255, np.uint8))
    with pytest.raises(InputError, match=r"masks.npy: found value 255, wanted 0"):
        SentinelTimeSeriesDataset(dataset, "toy", min_valid=5)


def test_an_empty_data_set_says_where_it_looked(tmp_path):
    with pytest.raises(InputError, match="data/nowhere/processed: found no tile"):
        open_dataset(tmp_path, "nowhere")


def test_bands_are_optional_in_tile_json(dataset):
    tile = dataset / "data/toy/processed/MGRS-0"
    (tile / "tile.json").unlink()
    assert Tile(tile).band_names == []
    shutil.copy(dataset / "data/toy/processed/MGRS-1/tile.json", tile)
    assert Tile(tile).band_names == json.loads((tile / "tile.json").read_text())["bands"]


def test_statistics_are_pooled_over_clear_observations(tmp_path):
    base_path = make_dataset(tmp_path, tiles=1)
    make_tile(base_path / "data/toy/processed/MGRS-9", (30, 8, 24, 10), clear=0.3, seed=4)
    dataset = SentinelTimeSeriesDataset(base_path, "toy", min_valid=1)
    observed = np.concatenate(
        [tile.bands[tile.masks == 1] for tile in open_dataset(base_path, "toy")]
    ).astype(float)
    np.testing.assert_allclose(dataset.mean, observed.mean(0), rtol=1e-5)
    np.testing.assert_allclose(dataset.std, observed.std(0), rtol=1e-4)


def test_clear_counts_are_kept_until_the_masks_change(dataset):
    tile = Tile(dataset / "data/toy/processed/MGRS-0")
    counts = tile.clear_counts()
    np.testing.assert_array_equal(counts, tile.masks.sum(0))
    np.testing.assert_array_equal(tile.clear_counts(), counts)
    save(tile.path, "masks", np.ones((20, 16, 16), np.uint8))
    assert (Tile(tile.path).clear_counts() == 20).all()


def test_blocks_are_square_and_depend_on_name_and_seed(dataset):
    one, other = open_dataset(dataset, "toy")
    split = one.split_map(block_size=4)
    blocks = split.reshape(4, 4, 4, 4).swapaxes(1, 2).reshape(16, 16)
    assert (blocks == blocks[:, :1]).all()
    assert (one.split_map(4) == split).all()
    assert (other.split_map(4) != split).any()
    assert (one.split_map(4, seed=1) != split).any()


def test_any_pixels_are_read_as_they_are_stored(tmp_path):
    """Blocks that do not begin at the tile's first pixel, far apart, and single points."""
    tile = Tile(make_tile(tmp_path / "MGRS-0", (20, 60, 90, 4)))
    bands = np.load(tile.path / "bands.npy").reshape(20, -1, 4)
    for pixels in (np.arange(4000, 5400), np.r_[900:2300, 4700:5400], np.arange(7, 5400, 601)):
        dates = torch.from_numpy(np.random.default_rng(0).integers(0, 20, (len(pixels), 3)))
        found, doys = tile.read_dates(pixels, dates)
        np.testing.assert_array_equal(found, bands[dates.numpy(), pixels[:, None]])
        np.testing.assert_array_equal(doys, tile.doys[dates.numpy()])
