"""read_inference_map.py: class areas, and agreement with labels."""

import json

from running.errors import InputError

import numpy as np
import pytest
from helpers import assert_pictures_logged, map_tile, run, tile_of

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
    assert " ha" in out
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
