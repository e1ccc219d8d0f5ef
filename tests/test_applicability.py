"""The area of applicability: where a pixel is like a training label, and what says so."""

import json

from running.checkpoints import load_checkpoint, save_checkpoint
from running.device import start_runtime
from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import make_tile, map_tile, run, save, tile_of
from scipy.spatial.distance import cdist, pdist

import infer
from evaluation import applicability
from evaluation.applicability import (
    describe_labels,
    measure_dissimilarity,
    share_outside,
    upper_whisker,
)
from explorer.scene import Scene, number_dissimilarity
from trained.encoder import Encoder


def test_the_index_is_that_of_the_paper():
    """By scipy: nearest label over mean distance; of a label, the nearest of other blocks."""
    rng = np.random.default_rng(0)
    y, blocks = rng.normal(3, [1, 5, 0.1], (80, 3)).astype(np.float32), rng.integers(0, 9, 80)
    y[:, 2] = 7  # a constant dimension
    known = describe_labels(y, blocks)
    scaled = (y - y.mean(0)) / np.where(y.std(0) > 0, y.std(0), 1)
    mean = pdist(scaled).mean()
    assert known["distance"] == pytest.approx(mean, rel=1e-3)
    others = np.where(blocks[:, None] == blocks, np.inf, cdist(scaled, scaled))
    wanted = upper_whisker(others.min(1) / mean)
    assert known["threshold"] == pytest.approx(wanted, rel=1e-2)
    pixels = rng.normal(3, [2, 9, 0.1], (500, 3)).astype(np.float32)
    pixels[0] = y[0]
    far = measure_dissimilarity(torch.from_numpy(pixels), known, start_runtime("cpu")).numpy()
    to_scaled = (pixels - y.mean(0)) / np.where(y.std(0) > 0, y.std(0), 1)
    np.testing.assert_allclose(far, cdist(to_scaled, scaled).min(1) / mean, atol=5e-3)


def test_distances_are_those_of_seapig():
    """Of EuclideanScore(k=1) of seapig 0.3.0, whose requirements are too heavy to install here."""
    labels = torch.tensor([[0.0, 0], [1, 0], [0, 2], [4, 1]])
    known = {"mean": torch.zeros(2), "std": torch.ones(2), "labels": labels.half(), "distance": 1.0}
    pixels = torch.tensor([[0.5, 0.25], [3, 3], [-2, -1], [4, 1]])
    far = measure_dissimilarity(pixels, known, start_runtime("cpu"))
    np.testing.assert_allclose(far, [0.5590, 2.2361, 2.2361, 0.0], atol=1e-4)


def test_the_threshold_leaves_outliers_out():
    """The largest value below the upper quartile plus 1.5 interquartile ranges."""
    assert upper_whisker(np.array([*range(1, 10), 12, 40.0])) == 12
    assert upper_whisker(np.array([1.0, 1, 1, 1])) == 1


def test_labels_of_a_single_block_have_a_threshold():
    y = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
    assert 0 < describe_labels(y, np.zeros(20))["threshold"] < 2
    assert describe_labels(np.ones((5, 4), np.float32), np.arange(5))["threshold"] == 0


def test_what_training_has_not_seen_lies_outside(workplace, tmp_path, capsys):
    """A tile of the training, half of which is another cover now."""
    tile = make_tile(tmp_path / "MGRS-new", (20, 24, 16, 10), clear=0.8)
    bands = np.load(tile / "bands.npy")
    new = np.zeros(bands.shape[1:3], bool)
    new[:, 8:] = True
    bands[:, new, 1:9] = 12_000 - bands[:, new, 1:9].clip(0, 11_000)
    save(tile, "bands", bands)
    capsys.readouterr()
    (folder,) = map_tile(workplace, tmp_path / "maps", tile_path=tile)
    far, info = (
        np.load(folder / "applicability.npy"),
        json.loads((folder / "infer.json").read_text()),
    )
    threshold = load_checkpoint(workplace / "classifier/best.pt")["applicability"]["threshold"]
    assert info["applicability_threshold"] == threshold
    known = np.isfinite(far)
    assert (known == (np.load(folder / "classification_map.npy") > 0)).all()
    outside = far > threshold
    assert outside[known & new].mean() > 0.9
    assert outside[known & ~new].mean() < 0.2
    share = f"MGRS-new: {outside[known].mean():.1%} of the pixels lie outside"
    assert share in capsys.readouterr().out


def test_a_checkpoint_without_labels_has_no_such_map(workplace, tmp_path, capsys):
    """Of an older version, say: one line, and the maps are those of before."""
    content = load_checkpoint(workplace / "classifier/best.pt")
    del content["applicability"]
    save_checkpoint(tmp_path / "old.pt", **content)
    keywords = {"checkpoint_path": tmp_path / "old.pt", "tile_path": tile_of(workplace)}
    (folder,) = run(infer, output_dir=tmp_path / "maps", **keywords)
    assert not (folder / "applicability.npy").exists()
    assert "applicability" not in (folder / "infer.json").read_text()
    said = [s for s in capsys.readouterr().out.splitlines() if "no applicability.npy" in s]
    assert len(said) == 1
    content["applicability"] = {"labels": torch.zeros(3, 2)}
    save_checkpoint(tmp_path / "bad.pt", **content)
    with pytest.raises(InputError, match=r"bad.pt: found an applicability that cannot be read"):
        Encoder.load(tmp_path / "bad.pt", device="cpu")


def test_the_page_needs_the_threshold_of_the_map(workplace, tmp_path):
    (folder,) = map_tile(workplace, tmp_path / "maps")
    scene = Scene(folder / "representation_map.npy")
    far = np.load(folder / "applicability.npy")
    steps, limit = number_dissimilarity(scene), scene.info.pop("applicability_threshold")
    assert ((steps > 128) == (far > limit)).all()
    assert ((steps > 0) == np.isfinite(far)).all()
    with pytest.raises(InputError, match="found None as applicability_threshold in infer.json"):
        number_dissimilarity(scene)
    scene.info["applicability_threshold"] = limit
    np.save(folder / "applicability.npy", far[1:])
    with pytest.raises(InputError, match="applicability.npy: found"):
        number_dissimilarity(scene)


def test_the_share_outside_is_of_the_pixels_with_data():
    """A pixel at the threshold lies inside."""
    far = np.array([[np.nan, 1.0], [2.0, 3.0], [np.nan, 2.5]])
    assert share_outside(far, 2.0) == 0.5
    assert share_outside(np.full((2, 2), np.nan), 2.0) == 0


def test_distances_do_not_depend_on_batches(monkeypatch):
    rng = np.random.default_rng(0)
    known = describe_labels(rng.normal(size=(30, 4)).astype(np.float32), np.arange(30))
    y, runtime = torch.from_numpy(rng.normal(size=(50, 4)).astype(np.float32)), start_runtime("cpu")
    whole = measure_dissimilarity(y, known, runtime)
    monkeypatch.setattr(applicability, "BATCH", 7)
    torch.testing.assert_close(measure_dissimilarity(y, known, runtime), whole)
    assert len(measure_dissimilarity(y[:0], known, runtime)) == 0
