"""What could be wrong in silence: bands, data, encoders and splits that are not what they seem."""

import json

from running.checkpoints import load_checkpoint
from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import (
    GEOREFERENCE,
    fine_tune,
    lines,
    make_dataset,
    make_tile,
    run,
    save,
    tile_of,
    tiny,
)

import label_efficiency
import tiles
import train
from tiles import Tile, open_dataset


def write_tile_json(tile, **content):
    (tile / "tile.json").write_text(json.dumps(content))


def test_bands_are_matched_though_the_first_tile_has_no_names(tmp_path):
    """Regression: tiles A0..A9 and A9..A0 trained together if the first had no band names."""
    base_path = make_dataset(tmp_path, tiles=3)
    names = [f"A{i}" for i in range(10)]
    (tile_of(base_path, 0) / "tile.json").unlink()
    write_tile_json(tile_of(base_path, 1), bands=names)
    write_tile_json(tile_of(base_path, 2), bands=names[::-1])
    orders = [tile.order.tolist() for tile in open_dataset(base_path, "toy")]
    assert orders == [[*range(10)], [*range(10)], [*range(10)][::-1]]


def test_unnamed_bands_among_named_ones_are_said_and_the_names_are_kept(tmp_path, capsys):
    base_path = make_dataset(tmp_path)
    (tile_of(base_path, 0) / "tile.json").unlink()
    train.main(tiny(base_path, tmp_path / "out", max_steps=1))
    out = capsys.readouterr().out
    assert "MGRS-0: no bands in tile.json (so in 1 of 2 tiles); taken to be ['X0'" in out
    assert load_checkpoint(tmp_path / "out/last.pt")["bands"][0] == "X0"


def test_every_tile_is_checked_against_the_checkpoint(workplace, tmp_path):
    """Regression: only the first tile was checked; others had another band order."""
    make_dataset(tmp_path)
    (tile_of(tmp_path, 0) / "tile.json").unlink()
    write_tile_json(tile_of(tmp_path, 1), bands=[f"Z{i}" for i in range(10)])
    with pytest.raises(InputError, match="MGRS-1: found no band X0 among Z0"):
        fine_tune(workplace, tmp_path / "out", base_path=tmp_path)


def test_a_resumed_run_refuses_other_data(tmp_path):
    """Regression: a tile added, changed or exchanged before a resumed run changed its steps."""
    base_path = make_dataset(tmp_path)
    config = tiny(base_path, tmp_path / "out", max_steps=4)
    train.main(config)
    before = (tmp_path / "out/last.pt").read_bytes()
    make_tile(tile_of(base_path, 2))
    with pytest.raises(InputError, match=r"found a run on other data \(training .*MGRS-2"):
        train.main({**config, "max_steps": 8})
    other = make_dataset(tmp_path / "other", clear=0.6)
    with pytest.raises(InputError, match="found a run on other data"):
        train.main({**config, "base_path": str(other), "max_steps": 8})
    assert (tmp_path / "out/last.pt").read_bytes() == before
    same = make_dataset(tmp_path / "moved")
    assert train.main({**config, "base_path": str(same), "max_steps": 8})["step"] == 8


def test_fine_tuning_refuses_to_go_on_from_another_encoder(workplace, tmp_path):
    """It is known by its content: the same one may have moved."""
    scores = fine_tune(workplace, tmp_path / "out", epochs=1)
    path = tmp_path / "encoder.pt"
    path.write_bytes((workplace / "pretrained/best.pt").read_bytes())
    assert fine_tune(workplace, tmp_path / "out", epochs=1, checkpoint_path=path) == scores
    encoder = torch.load(path, weights_only=True)
    next(iter(encoder["backbone_state"].values()))[0] += 1
    torch.save(encoder, path)
    with pytest.raises(InputError, match="found a run on other data .checkpoint_sha256"):
        fine_tune(workplace, tmp_path / "out", epochs=1, checkpoint_path=path)


def geotile(folder, name, x, shape=(20, 24, 40, 10), **keywords):
    transform = [10, 0, 500_000 + 10 * x, 0, -10, 5_400_000]
    info = {"crs": "EPSG:32631", "transform": transform}
    return Tile(make_tile(folder / name, shape, **{**info, **keywords}))


def test_the_same_ground_has_the_same_split_in_every_tile_and_year(tmp_path):
    """Regression: blocks by tile name put 0.7 of one year's test pixels into training."""
    one = geotile(tmp_path, "MGRS-2020", 0)
    year = geotile(tmp_path, "MGRS-2021", 0, seed=1, crs="epsg:32631")
    east = geotile(tmp_path, "MGRS-east", 17)
    other = geotile(tmp_path, "MGRS-other-zone", 0, crs="EPSG:32632")
    split = one.split_map(4)
    assert (split == year.split_map(4)).all()
    assert (split[:, 17:] == east.split_map(4)[:, :-17]).all()
    assert (split != other.split_map(4)).any()
    assert (split != one.split_map(4, seed=1)).any()
    assert not np.array_equal(split, geotile(tmp_path, "MGRS-far", 40).split_map(4))


@pytest.mark.parametrize("block_size", [1, 3, 4, 16, 1_000_000])
def test_about_a_fifth_of_the_blocks_validates_and_a_fifth_tests(tmp_path, block_size):
    """Regression: block_size=1000000 asked for 931 GiB."""
    shape = (2, 160, 160, 1)
    split = geotile(tmp_path, "MGRS-0", 3, shape=shape, bands=["B04"]).split_map(block_size)
    shares = [(split == code).mean() for code in (tiles.VALIDATION, tiles.TEST)]
    if block_size < 16:
        assert shares == pytest.approx([0.2, 0.2], abs=0.03)
    assert set(np.unique(split)) <= {tiles.TRAIN, tiles.VALIDATION, tiles.TEST}


def test_tiles_that_split_by_name_are_said(tmp_path, capsys):
    for number, info in enumerate(({}, GEOREFERENCE)):
        make_tile(tile_of(tmp_path, number), **info)
    train.main(tiny(tmp_path, tmp_path / "out", max_steps=1))
    assert "1 of 2 tiles (first MGRS-0) have neither splits.npy" in capsys.readouterr().out


def test_all_labels_are_counted_drawn_and_logged_in_order(workplace, tmp_path):
    """Regression: label_counts=0 stood at 0 on a log axis, and wandb dropped it."""
    keywords = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": workplace}
    keywords |= {"dataset_name": "toy", "output_dir": tmp_path / "out", "seeds": 1}
    results = run(label_efficiency, label_counts="0,20", models="harmonic", **keywords)
    counts = sorted({row["label_count"] for row in results["scores"]})
    assert counts[0] == 20
    assert counts[1] > 100
    assert [line["step"] for line in lines(tmp_path / "out")] == counts


def test_a_band_that_varies_needs_its_deviation(dataset):
    """Regression: a deviation of 0 for a band that varies trained on unscaled values."""
    tile = tile_of(dataset)
    std = np.load(tile / "band_std.npy")
    std[3] = 0
    save(tile, "band_std", std)
    with pytest.raises(InputError, match="band_std.npy: found .*wanted 0 only for constant bands"):
        Tile(tile)
    bands = np.load(tile / "bands.npy")
    bands[..., 3] = 77
    save(tile, "bands", bands)
    assert Tile(tile).band_std[3] == 0
