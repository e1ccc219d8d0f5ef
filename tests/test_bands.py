"""Bands are found by name: tiles and checkpoints may list the same ones in other orders."""

import json

from running.checkpoints import load_checkpoint
from running.errors import InputError
from running.tile_json import band_key

import numpy as np
import pytest
import torch
from helpers import (
    assert_same_weights,
    fine_tune,
    make_dataset,
    make_tile,
    map_tile,
    run,
    save,
    tile_of,
    tiny,
    weights,
)

import label_efficiency
import train
from data import SentinelTimeSeriesDatasetForDownstreaming
from explorer.scene import series_bands
from tiles import Tile, open_dataset
from utils import median_color

ORDER = [3, 9, 0, 4, 8, 1, 2, 7, 6, 5]  # of the bands in a tile that was rewritten


def reorder(tile, order=ORDER, names=None):
    """Rewrite a tile with its bands in another order, some left out or spelled otherwise."""
    info = json.loads((tile / "tile.json").read_text())
    info["bands"] = names or [info["bands"][place] for place in order]
    (tile / "tile.json").write_text(json.dumps(info))
    for name in ("bands", "band_mean", "band_std"):
        save(tile, name, np.load(tile / f"{name}.npy")[..., order])
    return tile


def read_maps(folder):
    names = ("representation_map", "classification_map", "confidence")
    return {name: (folder / f"{name}.npy").read_bytes() for name in names}


@pytest.fixture
def toy(workplace, tmp_path):
    """The tiles of the fixture `workplace`, to be rewritten."""
    return make_like(workplace, tmp_path / "toy")


def make_like(workplace, path):
    """A copy of the tiles of a data set."""
    for number in (0, 1):
        folder = tile_of(path, number)
        folder.mkdir(parents=True)
        for file in tile_of(workplace, number).iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("spelled", ["B4", "b04", " B04", "B004"])
def test_a_band_in_several_spellings_is_one(spelled):
    assert band_key(spelled) == "B04"
    assert band_key("B8A") == band_key("b08a") != band_key("B08")
    assert band_key("nir") == band_key("NIR") != band_key("B08")


def test_a_tile_maps_alike_whatever_the_order_of_its_bands(workplace, toy, tmp_path):
    (one,) = map_tile(workplace, tmp_path / "one")
    (other,) = map_tile(workplace, tmp_path / "other", tile_path=reorder(tile_of(toy)))
    assert read_maps(one) == read_maps(other)


def test_a_checkpoint_of_some_of_the_bands_maps_and_fine_tunes(workplace, toy, tmp_path, capsys):
    """Beside those of the checkpoint, two bands that it does not know."""
    plain = [run_all(workplace, make_like(workplace, tmp_path / "plain"), tmp_path / "plain")]
    for number in (0, 1):
        tile = tile_of(toy, number)
        names = json.loads((tile / "tile.json").read_text())["bands"]
        order = [0, *ORDER, 5]
        reorder(tile, order, ["more", *(names[place] for place in ORDER), "B13"])
    assert [run_all(workplace, toy, tmp_path / "more")] == plain
    assert "MGRS-0: more,B13 not read" in capsys.readouterr().out


def run_all(workplace, base_path, out):
    """Scores of an encoder that is fine-tuned on a data set, and the maps of its first tile."""
    scores = fine_tune(workplace, out / "tuned", base_path=base_path, epochs=1)
    (folder,) = map_tile(workplace, out / "map", tile_path=tile_of(base_path))
    content = load_checkpoint(out / "tuned/best.pt")
    weights = [value.tolist() for value in content["backbone_state"].values()]
    return scores, weights, content["bands"], content["mean"].tolist(), read_maps(folder)


@pytest.mark.slow
def test_training_takes_the_order_of_the_first_tile(toy, workplace, tmp_path):
    """Weights, statistics and names are the same ones, and so they are from a checkpoint on."""
    first = workplace / "pretrained/best.pt"
    runs = {}
    for name in ("plain", "reordered"):
        if name == "reordered":
            reorder(tile_of(toy, 1))
        config = tiny(toy, tmp_path / name, max_steps=3, val_interval=2)
        train.main(config)
        if name == "reordered":  # the order of the checkpoint counts, not that of the first tile
            reorder(tile_of(toy, 0), ORDER[::-1])
        keys = {"checkpoint_path": str(first), "test_tile_path": str(tile_of(toy, 1))}
        train.main({**config, **keys, "output_dir": str(tmp_path / f"{name}-on")})
        runs[name] = [load_checkpoint(tmp_path / each / "last.pt") for each in (name, f"{name}-on")]
        runs[name] += [weights(tmp_path / each) for each in (name, f"{name}-on")]
    for plain, other in zip(runs["plain"][:2], runs["reordered"][:2], strict=True):
        assert plain["bands"] == other["bands"] == [f"X{i}" for i in range(10)]
        assert torch.equal(plain["mean"], other["mean"])
        assert torch.equal(plain["std"], other["std"])
        assert plain["best_score"] == other["best_score"]
    for plain, other in zip(runs["plain"][2:], runs["reordered"][2:], strict=True):
        assert_same_weights(plain, other)
    pictures = [(tmp_path / f"{n}-on/false_color.png").read_bytes() for n in runs]
    assert pictures[0] == pictures[1]


def test_labelled_tiles_of_another_order_than_an_unlabelled_first_one(toy, tmp_path):
    """The names of a data set are those of its order, whichever of its tiles have labels."""
    (tile_of(toy, 0) / "labels.npy").unlink()
    reorder(tile_of(toy, 1))
    labelled = SentinelTimeSeriesDatasetForDownstreaming(toy, "toy", min_valid=5, block_size=4)
    assert labelled.band_names == [f"X{i}" for i in range(10)]
    np.testing.assert_allclose(labelled.mean, np.load(tile_of(toy, 0) / "band_mean.npy"), rtol=0.1)


@pytest.mark.slow
def test_scores_are_the_same_whatever_the_order(workplace, toy, tmp_path):
    keywords = {"checkpoint_path": workplace / "pretrained/best.pt", "dataset_name": "toy"}
    keywords |= {"seeds": 1, "label_counts": "20", "models": "embedding,series"}
    one, other = (
        run(label_efficiency, base_path=path, output_dir=tmp_path / str(number), **keywords)
        for number, path in enumerate((workplace, reorder_all(toy)))
    )
    for key in ("scores", "retrieval", "rankme"):
        assert one[key] == other[key]


def reorder_all(base_path):
    for number in (0, 1):
        reorder(tile_of(base_path, number), ORDER if number else ORDER[::-1])
    return base_path


def test_a_missing_band_says_what_the_tile_has_and_what_to_do(workplace, tmp_path):
    base_path = make_dataset(tmp_path, tiles=1)
    tile = make_tile(tile_of(base_path, 9), (20, 16, 16, 6))
    for refuse in (
        lambda: open_dataset(base_path, "toy"),
        lambda: map_tile(workplace, tmp_path / "out", tile_path=tile),
        lambda: fine_tune(workplace, tmp_path / "tuned", base_path=base_path),
        lambda: train.main(tiny(workplace, tmp_path / "on", test_tile_path=str(tile))),
    ):
        with pytest.raises(InputError) as error:
            refuse()
        assert f"{tile}: found no band X6 among X0,X1,X2,X3,X4,X5, wanted X0,X1," in str(
            error.value
        )
        assert "prepare_tiles.py bands=" in str(error.value)
        assert "\n" not in str(error.value)


def test_without_names_the_number_of_bands_has_to_agree(workplace, tmp_path):
    tile = make_tile(tmp_path / "MGRS-1", (20, 16, 16, 6))
    (tile / "tile.json").unlink()
    with pytest.raises(InputError, match=r"MGRS-1: found 6 bands, wanted \['X0'.*by name"):
        map_tile(workplace, tmp_path / "out", tile_path=tile)


def test_a_tile_that_names_a_band_twice_is_refused(tmp_path):
    tile = make_tile(tmp_path / "MGRS-0", (4, 8, 8, 2), bands=["B4", "b04"])
    with pytest.raises(InputError, match="tile.json: found bands .*different names"):
        Tile(tile)


def test_the_page_finds_bands_in_any_spelling(tmp_path):
    """Median colours and series of a tile whose names are written b2, b3 and b4."""
    names = ["b4", "b3", "b2", *(f"X{i}" for i in range(3, 10))]
    tile = reorder(make_tile(tmp_path / "MGRS-0"), [*range(10)], names)
    assert series_bands(Tile(tile), "") == ([2, 1, 0], ["B02", "B03", "B04"])
    assert series_bands(Tile(tile), "b04,X9") == ([0, 9], ["B04", "X9"])
    assert median_color(Tile(tile)).shape == (16, 16, 3)
