"""create_false_color_map.py: equal colours for equal representations."""

from types import SimpleNamespace

from running.errors import InputError

import matplotlib.pyplot as plt
import numpy as np
import pytest
from helpers import assert_pictures_logged, make_tile, map_tile, run
from map_helpers import map_in

import create_false_color_map
from maps import false_color
from maps.reader import RepresentationMap


def test_tiles_that_share_pixels_get_equal_colours_there(workplace, tmp_path):
    whole = make_tile(tmp_path / "tiles/MGRS-whole", (20, 24, 24, 10))
    for name, columns in (("west", slice(0, 16)), ("east", slice(8, 24))):
        part = make_tile(tmp_path / f"tiles/MGRS-{name}", (20, 24, 16, 10))
        for file in ("bands", "masks"):
            np.save(part / f"{file}.npy", np.load(whole / f"{file}.npy")[:, :, columns])
        np.save(part / "doys.npy", np.load(whole / "doys.npy"))
    map_tile(workplace, tmp_path / "seam", tile_path=tmp_path / "tiles", checkpoint="pretrained")
    maps = {
        name: tmp_path / f"seam/MGRS-{name}/representation_map.npy" for name in ("west", "east")
    }
    basis = tmp_path / "basis.npz"
    run(create_false_color_map, representation_path=maps["west"], basis_path=basis)
    assert basis.exists()
    run(create_false_color_map, representation_path=maps["east"], basis_path=basis)
    west, east = (map_in(path.parent / "false_color.png", (24, 16)) for path in maps.values())
    np.testing.assert_allclose(west[:, 8:], east[:, :8], atol=1)
    assert west.std() > 25


def test_int8_maps_look_the_same(workplace, tmp_path):
    basis, pictures = tmp_path / "basis.npz", []
    for kind in ("float32", "int8"):
        (folder,) = map_tile(workplace, tmp_path / kind, representation_format=kind)
        path = folder / "representation_map.npy"
        run(create_false_color_map, representation_path=path, basis_path=basis)
        pictures.append(plt.imread(folder / "false_color.png"))
    assert min(pictures[0].shape[:2]) > 512
    assert np.abs(pictures[0] - pictures[1]).mean() < 0.02
    with pytest.raises(InputError, match="representation_path: found none, wanted a map"):
        run(create_false_color_map)


def test_of_two_calls_at_once_one_basis_counts(workplace, tmp_path, monkeypatch):
    """Regression: each fitted a basis of its own, and their pictures did not match."""
    (folder,) = map_tile(workplace, tmp_path / "maps")
    path, basis = folder / "representation_map.npy", tmp_path / "basis.npz"
    fit, others = false_color.fit_basis, []

    def fit_beside_another(sample):
        fitted = fit(sample)
        others.append(fitted | {"low": fitted["low"] - 1})
        false_color.save_basis(others[0], RepresentationMap(path).made_by, basis)
        return fitted

    monkeypatch.setattr(false_color, "fit_basis", fit_beside_another)
    pictures = []
    for _ in range(2):
        run(create_false_color_map, representation_path=path, basis_path=basis)
        pictures.append(plt.imread(folder / "false_color.png"))
    np.testing.assert_array_equal(*pictures)
    assert len(others) == 1
    np.testing.assert_array_equal(false_color.load_basis(basis, 16)[0]["low"], others[0]["low"])


def test_the_sample_is_of_all_valid_pixels_however_few():
    """Regression: of 100 valid pixels in a large map 3 were found, as half counted as valid."""
    rng = np.random.default_rng(0)
    blocks = np.full((200, 50, 40, 4), np.nan, np.float32)
    valid = rng.random(blocks.shape[:3]) < 1e-3
    blocks[valid] = rng.normal(0, 1, (valid.sum(), 4))
    config = {"sample_pixels": 1000, "seed": 0}
    maps = [SimpleNamespace(path="map", blocks=lambda stride: enumerate(blocks))]
    assert len(false_color.sample_representations(maps, config)) == valid.sum() < 500
    blocks[..., 0], blocks[..., 1:] = np.arange(200)[:, None, None], 0
    sample = false_color.sample_representations(maps, config)
    assert len(sample) == 1000
    assert abs(sample[:, 0].mean() - 99.5) < 4 * 58 / np.sqrt(1000), "of all blocks alike"
    assert len(np.unique(sample[:, 0])) > 190


@pytest.mark.slow
def test_the_picture_is_logged_to_wandb(workplace, tmp_path):
    (folder,) = map_tile(workplace, tmp_path / "maps")
    path, out = folder / "representation_map.npy", tmp_path / "out"
    log = {"wandb_mode": "offline", "wandb_dir": out}
    run(create_false_color_map, representation_path=path, output_dir=out, **log)
    assert_pictures_logged(out)
