"""read_inference_map.py: class areas, and agreement with labels."""

import json
import re
import shutil

from running.checkpoints import load_checkpoint, save_checkpoint
from running.errors import InputError

import numpy as np
import pytest
from helpers import assert_pictures_logged, map_tile, run, tile_of
from map_helpers import BANDS, make_checkpoints, make_tile

import infer
import read_inference_map
from evaluation.seen_pixels import hash_split
from tiles import TEST, Tile


def test_areas_and_agreement(workplace, tmp_path, capsys):
    (folder,) = map_tile(workplace, tmp_path / "read")
    result = run(read_inference_map, map_path=folder / "classification_map.npy", show=True)
    class_map = np.load(folder / "classification_map.npy")
    assert result["areas"]["95"]["hectares"] == pytest.approx((class_map == 95).sum() * 0.01)
    labels = np.load(tile_of(workplace) / "labels.npy")
    is_tested = (class_map > 0) & (Tile(tile_of(workplace)).split_map(4) == TEST)  # as in training
    accuracy = (labels == class_map)[is_tested].mean()
    assert result["agreement"]["overall_accuracy"] == pytest.approx(accuracy)
    seen = json.loads((folder / "infer.json").read_text())["split"]["seen"]
    assert seen == [hash_split(Tile(tile_of(workplace)).split_map(4))]
    assert np.sum(result["agreement"]["confusion_matrix"]) == is_tested.sum()
    assert result["estimates"]["hectares"] == pytest.approx((class_map > 0).sum() * 0.01)
    out = capsys.readouterr().out
    assert "no display to open a window on" in out
    assert "mapped  area, ha" in out
    for row in result["estimates"]["classes"].values():
        area = row["area_hectares"]["estimate"]
        assert area is None or re.search(rf"{row['name'][:24]} .* {area:.2f} \(", out)
    np.save(folder / "wrong.npy", labels[:5])
    with pytest.raises(InputError, match=r"wrong.npy: found shape \(5, 16\), wanted \(24, 16\)"):
        run(
            read_inference_map,
            map_path=folder / "classification_map.npy",
            labels_path=folder / "wrong.npy",
        )


def test_areas_are_pixels_where_the_size_is_unknown(tmp_path, capsys):
    np.save(tmp_path / "map.npy", np.array([[0, 10], [10, 3]], np.uint8))
    result = run(read_inference_map, map_path=tmp_path / "map.npy")
    assert result["areas"]["10"]["pixels"] == 2
    assert result["areas"]["10"]["hectares"] is None
    assert result["areas"]["3"]["name"] == "class 3"
    assert "2 pixels" in capsys.readouterr().out


def test_classes_of_another_table_are_matched_by_name(tmp_path, capsys):
    """Regression: labels of another year whose codes mean other classes were scored by code."""
    names = {"1": {"name": "Maize"}, "2": {"name": "Wheat"}, "3": {"name": "Grass"}}
    (tmp_path / "infer.json").write_text(json.dumps({"classes": names}))
    np.save(tmp_path / "map.npy", np.array([[1, 2, 3, 3]], np.uint8))
    names = {"1": {"name": "wheat "}, "2": {"name": "Maize"}, "3": {"name": "Barley"}}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tile.json").write_text(json.dumps({"classes": names}))
    np.save(tmp_path / "other/labels.npy", np.array([[2, 1, 3, 0]], np.uint8))
    paths = {"map_path": tmp_path / "map.npy", "labels_path": tmp_path / "other/labels.npy"}
    scores = run(read_inference_map, **paths)["agreement"]
    assert scores["overall_accuracy"] == pytest.approx(2 / 3)
    assert [row["f1"] for row in scores["per_class"].values()] == [1, 1, 0, 0]
    assert [row["name"] for row in scores["per_class"].values()] == [
        "Maize",
        "Wheat",
        "Grass",
        "Barley",
    ]
    out = capsys.readouterr().out
    assert "labels.npy: found Barley, which the map cannot have" in out
    assert "of the pixels of other classes 100.0% are right" in out


@pytest.mark.slow
def test_the_pictures_are_logged_to_wandb(workplace, tmp_path):
    (folder,) = map_tile(workplace, tmp_path / "maps")
    path, out = folder / "classification_map.npy", tmp_path / "out"
    run(read_inference_map, map_path=path, output_dir=out, wandb_mode="offline", wandb_dir=out)
    assert_pictures_logged(out)


def test_an_earlier_estimate_does_not_stay_beside_a_map_without_labels(tmp_path):
    tmp_path = tmp_path / "map"
    tmp_path.mkdir()
    rng = np.random.default_rng(0)
    codes = rng.choice([10, 30], (40, 40)).astype(np.uint8)
    np.save(tmp_path / "map.npy", codes)
    np.save(tmp_path / "labels.npy", np.where(rng.random((40, 40)) < 0.9, codes, 40 - codes))
    path, labels = tmp_path / "map.npy", tmp_path / "labels.npy"
    result = run(read_inference_map, map_path=path, labels_path=labels)
    assert (tmp_path / "areas.json").exists() and (tmp_path / "areas.csv").exists()
    (line,) = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["overall_accuracy"] == result["estimates"]["overall_accuracy"]["estimate"]
    run(read_inference_map, map_path=path)
    assert not (tmp_path / "areas.json").exists() and not (tmp_path / "areas.csv").exists()


def test_a_class_that_lies_in_one_block_is_named(tmp_path, capsys):
    codes = np.full((40, 40), 10, np.uint8)
    codes[:4, :4] = 30
    np.save(tmp_path / "map.npy", codes)
    np.save(tmp_path / "labels.npy", codes)
    keys = {"map_path": tmp_path / "map.npy", "labels_path": tmp_path / "labels.npy"}
    notes = run(read_inference_map, **keys)["estimates"]["notes"]
    assert notes == ["Grassland: found in one block only, so not all of its intervals"]


def test_a_map_says_how_training_split_its_pixels_only_where_that_is_known(tmp_path):
    """A tile has the split of the training if it lies on a grid, or was in the training."""
    make_checkpoints(tmp_path)
    content = load_checkpoint(tmp_path / "classifier.pt")
    save_checkpoint(tmp_path / "seen.pt", **content | {"splits": {"MGRS-none": ["0123"]}})
    make_tile(tmp_path / "MGRS-grid")
    make_tile(tmp_path / "MGRS-none")
    (tmp_path / "MGRS-none/tile.json").write_text(json.dumps({"bands": BANDS}))
    cases = ("classifier", "grid", True), ("classifier", "none", False), ("seen", "none", True)
    for checkpoint, name, known in cases:
        keys = {"tile_path": tmp_path / f"MGRS-{name}", "output_dir": tmp_path / "out"}
        path = tmp_path / f"{checkpoint}.pt"
        (folder,) = run(infer, checkpoint_path=path, overwrite=True, **keys)
        assert ("split" in json.loads((folder / "infer.json").read_text())) == known


def test_without_a_labelled_test_pixel_all_are_compared(workplace, tmp_path):
    (folder,) = map_tile(workplace, tmp_path / "map")
    tile = tmp_path / "MGRS-0"
    shutil.copytree(tile_of(workplace), tile)
    labels = np.load(tile / "labels.npy")
    labels[Tile(tile).split_map(4) == TEST] = 0
    np.save(tile / "labels.npy", labels)
    keys = {"map_path": folder / "classification_map.npy", "labels_path": tile / "labels.npy"}
    agreement = run(read_inference_map, **keys)["agreement"]
    covered = np.load(folder / "classification_map.npy") > 0
    assert np.sum(agreement["confusion_matrix"]) == (covered & (labels > 0)).sum()
    with pytest.raises(InputError, match="found no labelled test pixel that infer.json knows of"):
        run(read_inference_map, pixels="test", **keys)
