"""train_classification_maddy.py, the simple loop on a saved representation map."""

import json

import numpy as np
import pytest
from helpers import ROOT, map_tile, run, tile_of

import train_classification_maddy


@pytest.mark.parametrize("loss", ["cross_entropy", "focal"])
def test_the_simple_loop(workplace, tmp_path, loss, capsys):
    (folder,) = map_tile(workplace, tmp_path / f"maddy-{loss}")
    keywords = {
        "representation_path": folder / "representation_map.npy",
        "labels_path": tile_of(workplace) / "labels.npy",
        "output_dir": tmp_path / "out",
        "loss": loss,
        "batch_size": 32,
    }
    scores = run(train_classification_maddy, **keywords)
    assert "of an encoder that was fine-tuned on labels" in capsys.readouterr().out
    lines = (tmp_path / "out/metrics.jsonl").read_text().splitlines()
    assert len(lines) == 20
    assert {"loss", "overall_accuracy", "macro_f1"} <= set(json.loads(lines[-1]))
    assert sum(row["support"] for row in scores["per_class"].values()) == round(0.2 * 24 * 16)
    splits = np.ones((24, 16), np.uint8)
    splits[:6] = 3
    np.save(tmp_path / "splits.npy", splits)
    scores = run(train_classification_maddy, splits_path=tmp_path / "splits.npy", **keywords)
    assert sum(row["support"] for row in scores["per_class"].values()) == 6 * 16
    assert len((ROOT / "train_classification_maddy.py").read_text().splitlines()) < 150
