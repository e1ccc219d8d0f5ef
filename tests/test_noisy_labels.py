"""What fine-tuning reports of labels that are partly wrong: no score is 1, no two are alike."""

import json

from running.checkpoints import load_checkpoint

import numpy as np
import pytest
from helpers import GEOREFERENCE, fine_tune, make_dataset, run, save, tile_of, tiny
from scipy.spatial.distance import cdist
from scipy.stats import t

import infer
import train
from backbones import load_classifier
from evaluation.applicability import describe_labels
from tiles import TEST, TRAIN, Tile

BLOCK = 4  # pixels along a block of the training


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """Tiles, a quarter of whose labels are another class; run and maps of a fine-tuning on them."""
    path, rng = tmp_path_factory.mktemp("noisy"), np.random.default_rng(0)
    make_dataset(path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    for number in range(2):
        labels = np.load(tile_of(path, number) / "labels.npy")
        wrong = rng.random(labels.shape) < np.where(labels == 40, 0.4, 0.1)
        save(tile_of(path, number), "labels", np.where(wrong, 135 - labels, labels).astype("u1"))
    train.main(tiny(path, path / "pretrained", max_steps=4, split_seed=2))
    fine_tune(path, path / "out", epochs=2)
    keys = {"checkpoint_path": path / "out/best.pt", "tile_path": path / "data/toy/processed"}
    run(infer, output_dir=path / "maps", **keys)
    return path


def read_split(path, split, names):
    """Maps (n, ..) of the pixels of a split of both tiles, and their blocks (n,)."""
    parts, blocks = [], []
    for number in range(2):
        tile = Tile(tile_of(path, number))
        where = tile.split_map(BLOCK, 2) == split
        folder = path / f"maps/MGRS-{number}"
        maps = {"labels": np.load(tile.path / "labels.npy")}
        maps |= {name: np.load(folder / f"{name}.npy") for name in names}
        parts.append([one[where] for one in maps.values()])
        rows, columns = tile.block_numbers(BLOCK)
        blocks.append((rows[:, None] * 10**6 + columns)[where])  # both tiles are of one place
    return [np.concatenate(part) for part in zip(*parts, strict=True)], np.concatenate(blocks)


def test_intervals_are_of_blocks_of_test_pixels(noisy, capsys):
    """By hand, of the map that the checkpoint makes; the card and the split's seed agree."""
    scores = json.loads((noisy / "out/metrics.json").read_text())
    (labels, codes), blocks = read_split(noisy, TEST, ["classification_map"])
    assert scores["overall_accuracy"] == pytest.approx((labels == codes).mean())
    values = {
        "overall_accuracy": lambda keep: (labels == codes)[keep].mean(),
        "precision": lambda keep: (labels == 40)[keep & (codes == 40)].mean(),
        "recall": lambda keep: (codes == 40)[keep & (labels == 40)].mean(),
    }
    found = scores["intervals"]
    found |= {key: found[key]["40"] for key in ("precision", "recall")}
    names = np.unique(blocks)
    for key, score in values.items():
        without = np.array([score(blocks != name) for name in names])
        error = np.sqrt((len(names) - 1) * without.var())
        half, whole = t.ppf(0.975, len(names) - 1) * error, score(blocks >= 0)
        np.testing.assert_allclose(found[key], [max(0, whole - half), min(1, whole + half)])
    assert found["precision"] != found["recall"]
    text = (noisy / "out/model_card.md").read_text()
    low, high = found["overall_accuracy"]
    value = f"{scores['overall_accuracy']:.4g} | {low:.4g} to {high:.4g}"
    assert f"| overall accuracy, test pixels | {value} |" in text
    info = json.loads((noisy / "maps/MGRS-0/infer.json").read_text())
    assert (info["split"]["block_size"], info["split"]["seed"]) == (BLOCK, 2)


def test_the_card_has_the_scores_of_each_class(noisy, capsys):
    """Columns and rows in their order, and the parameters; of a perfect map all of them are 1."""
    scores = json.loads((noisy / "out/metrics.json").read_text())
    text = (noisy / "out/model_card.md").read_text()
    for code, row in scores["per_class"].items():
        cells = " | ".join(f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        assert f"| {code} | {row['name']} | {cells} | {row['support']} |" in text
    assert scores["per_class"]["40"]["precision"] != scores["per_class"]["40"]["recall"]
    error = scores["expected_calibration_error"]
    assert error != scores["expected_calibration_error_before"]
    assert f"| expected calibration error, test pixels | {error:.4g} | not measured |" in text
    best = load_checkpoint(noisy / "out/best.pt")
    parameters = sum(part.numel() for part in load_classifier(best).parameters())
    assert f" of {parameters} parameters" in text


def test_best_keeps_what_its_encoder_makes_of_training_labels(noisy):
    """Without dropout, and with the distances to labels of other blocks."""
    (_, y), blocks = read_split(noisy, TRAIN, ["representation_map"])
    best = load_checkpoint(noisy / "out/best.pt")["applicability"]
    wanted = describe_labels(y, blocks)
    assert best["threshold"] == pytest.approx(wanted["threshold"], rel=1e-2)
    assert best["distance"] == pytest.approx(wanted["distance"], rel=1e-3)
    assert cdist(best["labels"].double(), wanted["labels"].double()).min(1).max() < 0.02
    assert len(best["labels"]) == len(y)
