"""Validation: the loss, RankMe and the probe, and the pixels that they look at."""

import json
import re

from running.device import start_runtime
from running.errors import notice

import numpy as np
import pytest
import torch
from helpers import make_dataset, save, tile_of, tiny

from barlow_twins import pretraining_loss
from data import SentinelTimeSeriesDatasetForDownstreaming
from evaluation.validation import LinearProbe, Validation
from tiles import VALIDATION, Tile
from train import build_model, open_data
from utils import rankme


def test_validation_loss_is_the_mean_over_pixels(dataset, tmp_path):
    """Guards against a sum of n + 1 batches divided by n, and equal weights of unequal batches."""
    config = tiny(dataset, tmp_path / "out", batch_size=30)
    runtime = start_runtime("cpu")
    _, (train_set, val_set, labelled, _) = open_data(config, runtime)
    validate = Validation(val_set, labelled, config, runtime)
    torch.manual_seed(0)
    model = build_model(config, train_set.num_bands)
    val_loss = validate(model)["val_loss"]
    assert model.training, "validation must give the model back in train mode"
    model.eval()
    assert len(validate.batches) > 2
    sizes, losses = [], []
    for x, doys in validate.batches:
        with torch.no_grad():
            _, z, predicted = model(x, doys, doys)
            loss, _ = pretraining_loss(z, predicted, x, config)
        losses.append(float(loss))
        sizes.append(len(x))
    assert val_loss == pytest.approx(np.average(losses, weights=sizes), rel=1e-5)
    assert validate(model)["val_loss"] == pytest.approx(val_loss, rel=1e-6), "the views are fixed"


def test_validation_never_sees_training_or_test_pixels(dataset, tmp_path):
    config = tiny(dataset, tmp_path / "out")
    _, (train_set, val_set, labelled, _) = open_data(config, start_runtime("cpu"))
    for index in range(2):
        taken = train_set.pixel_mask(index)
        test = train_set.tiles[index].split_map(4) == 3
        for other in (val_set, labelled):
            assert not (other.pixel_mask(index) & (taken | test)).any()
        assert not (taken & test).any()


@pytest.mark.parametrize("has_labels", [True, False])
def test_the_score_is_the_probe_or_minus_the_loss(tmp_path, has_labels):
    config = tiny(make_dataset(tmp_path, labels=has_labels), tmp_path / "out")
    runtime = start_runtime("cpu")
    _, (train_set, val_set, labelled, _) = open_data(config, runtime)
    assert (labelled is not None) == has_labels
    validate = Validation(val_set, labelled, config, runtime)
    model = build_model(config, train_set.num_bands)
    result = validate(model)
    assert ("probe_macro_f1" in result) == has_labels
    assert result["score"] == (result["probe_macro_f1"] if has_labels else -result["val_loss"])
    model.eval()
    with torch.no_grad():
        y = torch.cat([model.backbone(x[:, 0], doys[:, 0]) for x, doys in validate.batches])
    assert result["rankme"] == pytest.approx(rankme(y)[0], rel=1e-3)
    assert result["rankme_normalised"] == pytest.approx(rankme(y)[1], rel=1e-3)


def open_labelled(base_path):
    return SentinelTimeSeriesDatasetForDownstreaming(
        base_path, "toy", split="all", block_size=4, batch_size=512, min_valid=5
    )


class Encoder(torch.nn.Module):
    """Stands for a backbone: `encode` gives the representations of series."""

    any_length, sample_size = True, 8

    def __init__(self, encode):
        super().__init__()
        self.encode = encode

    def forward(self, x, doys, padding_mask=None):
        return self.encode(x, doys)


def mean_summer(x, doys):
    """Mean of a band in summer, which differs in the two classes of make_tile; and a constant."""
    summer = ((doys > 120) & (doys < 280)).float()
    value = (x[..., 4] * summer).sum(1) / summer.sum(1).clamp(min=1)
    return torch.stack([value, torch.ones_like(value)], 1)


def noise(x, doys):
    return torch.randn(len(x), 2, generator=torch.Generator().manual_seed(0))


def test_the_probe_scores_what_representations_know_of_the_classes(dataset):
    probe, runtime = LinearProbe.open(open_labelled(dataset)), start_runtime("cpu")
    assert set(probe.labels.tolist()) == {40, 95}
    assert probe.score(Encoder(mean_summer), runtime) > 0.95
    assert probe.score(Encoder(noise), runtime) < 0.7
    again = [probe.score(Encoder(mean_summer), runtime) for _ in range(2)]
    assert again[0] == again[1]


def test_the_probe_leaves_out_classes_of_a_single_block(tmp_path):
    """Blocks are left out whole in the cross-validation; such a class could never be learnt."""
    base_path = make_dataset(tmp_path, tiles=1, clear=1.0)
    labels = np.load(tile_of(base_path) / "labels.npy")
    labels[:4, :4] = 10
    save(tile_of(base_path), "labels", labels)
    probe = LinearProbe.open(open_labelled(base_path))
    assert set(probe.labels.tolist()) == {40, 95}
    assert len(probe.x) == len(probe.doys) == len(probe.labels) == 15 * 16


def test_no_probe_for_a_single_class(tmp_path):
    base_path = make_dataset(tmp_path, tiles=1)
    save(tile_of(base_path), "labels", np.full((16, 16), 40, np.uint8))
    assert LinearProbe.open(open_labelled(base_path)) is None


def test_classes_of_another_name_in_two_tiles_are_not_probed(dataset, tmp_path, capsys):
    """Regression: codes that mean different crops were mixed, and this probe chose best.pt."""
    for number, name in enumerate(("Maize", "Wheat")):
        path = tile_of(dataset, number) / "tile.json"
        path.write_text(json.dumps({"classes": {"40": {"name": name}}}))
    notice.cache_clear()
    assert open_data(tiny(dataset, tmp_path / "out"), start_runtime("cpu"))[1].labelled is None
    said = r"MGRS-1/tile.json: found name 'Wheat' for class 40, wanted 'Maize' as in .*tile.json; "
    assert re.search(said + "without a probe, the loss chooses best.pt", capsys.readouterr().out)


def test_classes_that_the_probe_leaves_out_are_named(tmp_path, capsys):
    base_path, config = make_dataset(tmp_path, clear=1.0), tiny(tmp_path, tmp_path / "out")
    tile = tile_of(base_path)
    labels = np.load(tile / "labels.npy")
    labels.flat[np.flatnonzero(Tile(tile).split_map(4) == VALIDATION)[0]] = 10
    save(tile, "labels", labels)
    notice.cache_clear()
    runtime = start_runtime("cpu")
    _, (_, val_set, labelled, _) = open_data(config, runtime)
    Validation(val_set, labelled, config, runtime)
    assert "val_pixels=4096: the probe leaves out classes [10], of which" in capsys.readouterr().out
