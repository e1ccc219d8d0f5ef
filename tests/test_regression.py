"""A quantity: targets.npy, train_regression.py, its maps, and their picture."""

import json
import os
import signal

from running.checkpoints import load_checkpoint, remove_run
from running.errors import InputError, Stopped, notice
from running.files import file_hash

import numpy as np
import pytest
import rasterio
import torch
from helpers import GEOREFERENCE, lines, make_dataset, run, save, tile_of, tiny
from series_data import cube, long_table
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score

import embed
import infer
import make_demo_data
import read_inference_map
import train
import train_regression
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    SentinelTimeSeriesDatasetForRegression,
    iterate_batches,
)
from evaluation import regressors
from evaluation.networks import fit_ridge_start
from evaluation.quantities import score_quantity
from tiles import TEST, Tile
from trained.encoder import Encoder
from training import finetuning as loop

SMALL = {"shape": (12, 20, 16, 6), "clear": 0.8, **GEOREFERENCE}  # for `make_dataset`
TARGET = {"name": "yield", "unit": "t/ha"}


def add_targets(base_path, tiles=2):
    """A yield of about 20 and 40 t/ha where labels are 40 and 95; none in column 3."""
    for number in range(tiles):
        labels = np.load(tile_of(base_path, number) / "labels.npy")
        noise = np.random.default_rng(number).normal(0, 2, labels.shape)
        targets = (np.where(labels == 95, 40, 20) + noise).astype(np.float32)
        targets[:, 3] = np.nan
        save(tile_of(base_path, number), "targets", targets)
        path = tile_of(base_path, number) / "tile.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"target": TARGET}))
    return base_path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Tiles with a yield, a pretrained encoder and a regressor; read it, write elsewhere."""
    path = tmp_path_factory.mktemp("yields")
    add_targets(make_dataset(path, **SMALL))
    train.main(tiny(path, path / "pretrained", max_steps=4))
    fit(path, path / "regressor", epochs=4, learning_rate=3e-3)
    return path


def fit(place, output_dir, **keywords):
    keys = {"checkpoint_path": place / "pretrained/best.pt", "base_path": place, "batch_size": 64}
    return run(train_regression, dataset_name="toy", output_dir=output_dir, **keys | keywords)


def test_the_model_card_has_the_intervals_of_the_test_split(place):
    scores = json.loads((place / "regressor/metrics.json").read_text())
    text = (place / "regressor/model_card.md").read_text()
    low, high = scores["intervals"]["rmse"]
    row = f"| RMSE, test pixels | {scores['rmse']:.4g} t/ha | {low:.4g} to {high:.4g} |"
    assert row in text
    assert "16 dimensions and yield [t/ha]" in text
    assert f"encoder of SHA-256 `{file_hash(place / 'pretrained/best.pt')}`" in text
    outside = scores["outside_training_range"]
    assert f"Training values were {outside['low']:.4g} to {outside['high']:.4g} t/ha" in text


# ---- tiles and batches ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("targets", "target", "message"),
    [
        (np.zeros((16, 15), np.float32), TARGET, r"targets.npy: found shape \(16, 15\), wanted"),
        (np.zeros((16, 16)), TARGET, "targets.npy: found dtype float64, wanted float32"),
        (np.zeros((16, 16), np.uint8), TARGET, "targets.npy: found dtype uint8, wanted float32"),
        (np.full((16, 16), np.inf, np.float32), TARGET, "found an infinite value, wanted finite"),
        (np.zeros((16, 16), np.float32), {"name": "x"}, 'found target {"name": "x"}, wanted a "na'),
        (np.zeros((16, 16), np.float32), ["x", "m"], r'found target \["x", "m"\], wanted a "name"'),
    ],
)
def test_malformed_targets_end_in_one_line_when_the_tile_is_opened(
    tmp_path, targets, target, message
):
    folder = tile_of(make_dataset(tmp_path, tiles=1, target=target))
    save(folder, "targets", targets)
    with pytest.raises(InputError, match=message) as error:
        Tile(folder)
    assert "\n" not in str(error.value)


def test_a_data_set_yields_numbers_as_they_are(place):
    """Regression in public tools: targets cut to whole numbers, or turned into ranks."""
    keys = {"split": "train", "min_valid": 5, "block_size": 4}
    data = SentinelTimeSeriesDatasetForRegression(place, "toy", **keys)
    found = torch.cat([target for _, _, target, _ in iterate_batches(data)])
    expected = np.concatenate(
        [tile.targets[data.pixel_mask(n)] for n, tile in enumerate(data.tiles)]
    )
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.sort().values, np.sort(expected))
    assert data.target == TARGET
    labelled = SentinelTimeSeriesDatasetForDownstreaming(place, "toy", **keys)
    mask = labelled.pixel_mask(0)
    mask[:, 3] = False
    np.testing.assert_array_equal(data.pixel_mask(0), mask)  # the same rules but for the NaN
    few = SentinelTimeSeriesDatasetForRegression(place, "toy", label_count=30, **keys)
    assert few.num_pixels == 30
    masks = [few.pixel_mask(number) for number in range(2)]
    assert (masks[0] != masks[1]).any()
    expected = [tile.targets[mask] for tile, mask in zip(few.tiles, masks, strict=True)]
    np.testing.assert_array_equal(few.read_labels(), np.concatenate(expected))
    few.keep_at_most(20)
    assert few.num_pixels == 20, "no value is a class that has to stay"


def test_two_units_and_tiles_without_targets_are_refused(tmp_path):
    add_targets(make_dataset(tmp_path))
    path = tile_of(tmp_path, 1) / "tile.json"
    path.write_text(path.read_text().replace("t/ha", "kg/ha"))
    message = "found target 'yield' in 'kg/ha', wanted target 'yield' in 't/ha' as in .*MGRS-0"
    with pytest.raises(InputError, match=message):
        SentinelTimeSeriesDatasetForRegression(tmp_path, "toy", min_valid=5)
    for number in range(2):
        (tile_of(tmp_path, number) / "targets.npy").unlink()
    with pytest.raises(InputError, match="found no targets.npy, wanted a tile with a quantity"):
        SentinelTimeSeriesDatasetForRegression(tmp_path, "toy", min_valid=5)


def test_pretraining_leaves_out_the_test_pixels_of_tiles_with_targets_alone(tmp_path):
    add_targets(make_dataset(tmp_path))
    for number in range(2):
        (tile_of(tmp_path, number) / "labels.npy").unlink()
    data = SentinelTimeSeriesDataset(tmp_path, "toy", split="train", min_valid=5, block_size=4)
    for number, tile in enumerate(data.tiles):
        assert not data.pixel_mask(number)[tile.split_map(4) == TEST].any()


# ---- scores --------------------------------------------------------------------------------------


def test_scores_agree_with_counting():
    rng = np.random.default_rng(0)
    actual = rng.normal(1e4, 3, 400)
    predicted = actual + rng.normal(0.5, 1, 400)
    scores, error = score_quantity(actual, predicted), predicted - actual
    expected = {"rmse": (error**2).mean() ** 0.5, "mae": abs(error).mean(), "bias": error.mean()}
    expected |= {"r2": r2_score(actual, predicted), "pixels": 400}
    assert scores == pytest.approx(expected, rel=1e-6)
    assert score_quantity([2.0, 2.0], [1.0, 2.0])["r2"] is None, "JSON has no NaN"


def test_intervals_come_from_blocks():
    """Pixels of one block have errors alike: resampled pixels would promise far too much."""
    rng = np.random.default_rng(0)
    blocks = np.repeat(np.arange(20), 50)
    actual = rng.normal(0, 3, 1000)
    predicted = actual + rng.normal(0, 1, 20)[blocks]
    bias = score_quantity(actual, predicted, blocks)["intervals"]["bias"]
    pixels = score_quantity(actual, predicted, np.arange(1000))["intervals"]["bias"]
    assert bias[1] - bias[0] > 4 * (pixels[1] - pixels[0])
    assert bias[0] < 0 < bias[1], "the truth is a bias of 0"
    assert score_quantity(actual, predicted, np.zeros(1000))["intervals"] is None


def test_the_head_starts_from_ridge_regression():
    rng = np.random.default_rng(0)
    y = rng.normal(3, [1, 5, 0.1], (200, 3)).astype(np.float32)
    targets, blocks = y @ [1, -0.3, 2] + rng.normal(0, 0.1, 200), np.arange(200) // 20
    head = torch.nn.Sequential(torch.nn.BatchNorm1d(3, affine=False), torch.nn.Linear(3, 1)).eval()
    mean, var, weight, bias = fit_ridge_start(y, targets, blocks)
    head[0].running_mean, head[0].running_var = mean, var
    with torch.no_grad():
        head[1].weight.copy_(weight)
        head[1].bias.copy_(bias)
        found = head(torch.from_numpy(y))[:, 0].numpy()
    scaled = (y - y.mean(0)) / y.std(0)
    fits = [Ridge(alpha).fit(scaled, targets).predict(scaled) for alpha in regressors.ALPHAS]
    assert min(abs(found - fit).max() for fit in fits) < 1e-4, "it is one of the penalties"
    assert np.std(found - targets) < 0.15


# ---- training ------------------------------------------------------------------------------------


def test_learns_and_reports(place, capsys, tmp_path):
    notice.cache_clear()
    scores = fit(place, tmp_path / "out", epochs=4, learning_rate=3e-3)
    saved = json.loads((tmp_path / "out/metrics.json").read_text())
    assert saved == json.loads(json.dumps(scores))
    assert saved["rmse"] < 5, "two groups, 20 apart: a mean has 10"
    assert saved["split"] == "test"
    assert saved["target"] | TARGET == saved["target"], "with mean and deviation beside them"
    assert all(low <= saved[key] <= high for key, (low, high) in saved["intervals"].items())
    assert (tmp_path / "out/predicted_actual.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr().out
    assert "pixels with yield [t/ha]" in said
    outside = saved["outside_training_range"]
    assert ("predictions leave the range of the training targets" in said) == (
        outside["pixels"] > 0
    )
    first, *epochs, last = lines(tmp_path / "out")
    assert first["val_rmse"] < 10, "the head starts from ridge regression"
    assert saved["validation_rmse"] == min(line["val_rmse"] for line in [first, *epochs[1:]])
    assert last["test_rmse"] == saved["rmse"]


def test_the_best_is_of_the_start_or_of_the_last_epochs(place, tmp_path, monkeypatch):
    """Before, where the rates are high, a score may be the best by chance."""
    score, found = train_regression.Quantity.score, iter([9, 1, 1, 1, 5, 6, 7, 4.0])

    def scored(task, *predicted):
        return score(task, *predicted) | {"rmse": next(found)}

    monkeypatch.setattr(train_regression.Quantity, "score", scored)
    scores = fit(place, tmp_path / "out", epochs=6, freeze_backbone=True)
    assert [scores[key] for key in ("best_epoch", "validation_rmse", "rmse")] == [4, 5, 4]
    remove_run(tmp_path / "out", "regressor")
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert left == ["config.json"], "which the next run replaces"


def test_predictions_outside_the_range_are_counted(place, tmp_path, monkeypatch, capsys):
    notice.cache_clear()
    pairs = np.stack([[20, 30, 40, 20], [-1, 30, 1000, 21], [0, 0, 1, 1]]).astype(float)
    monkeypatch.setattr(train_regression, "predict_values", lambda *_: pairs)
    scores = fit(place, tmp_path / "out", freeze_backbone=True, loss="squared")
    assert scores["outside_training_range"]["pixels"] == 2
    assert (
        "2 of 4 predictions leave the range of the training targets, 1" in capsys.readouterr().out
    )


def test_a_stopped_run_resumes_to_the_same_weights(place, tmp_path, monkeypatch):
    keys = {"label_count": 40, "epochs": 2, "batch_size": 16}
    whole = fit(place, tmp_path / "whole", **keys)
    step, stop_at = loop.training_step, {4}

    def interrupted(run, *rest):
        if run.progress.step + 1 in stop_at:
            stop_at.clear()
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run, *rest)

    monkeypatch.setattr(loop, "training_step", interrupted)
    with pytest.raises(Stopped):
        fit(place, tmp_path / "stopped", **keys)
    assert fit(place, tmp_path / "stopped", **keys) == whole
    one, other = (load_checkpoint(tmp_path / name / "best.pt") for name in ("whole", "stopped"))
    for state in ("backbone_state", "head_state"):
        assert all(one[state][key].equal(value) for key, value in other[state].items())


def test_one_value_everywhere_and_other_targets_are_refused(place, tmp_path):
    base_path = add_targets(
        make_dataset(tmp_path, shape=(12, 20, 16, 6), clear=0.8, **GEOREFERENCE)
    )
    fit(place, tmp_path / "out", base_path=base_path, epochs=1)
    for number in range(2):
        save(tile_of(base_path, number), "targets", np.full((20, 16), 7, np.float32))
    with pytest.raises(InputError, match="found 7 in all [0-9]+ training pixels, wanted at least"):
        fit(place, tmp_path / "other", base_path=base_path)
    add_targets(base_path)
    path = tile_of(base_path) / "targets.npy"
    np.save(path, np.load(path) * 2)
    with pytest.raises(InputError, match="found a run on other data"):
        fit(place, tmp_path / "out", base_path=base_path, epochs=1)
    add_targets(base_path)
    for number in range(2):
        path = tile_of(base_path, number) / "tile.json"
        path.write_text(path.read_text().replace("t/ha", "kg/ha"))
    with pytest.raises(InputError, match="found a run on other data"):
        fit(place, tmp_path / "out", base_path=base_path, epochs=1)


# ---- maps ----------------------------------------------------------------------------------------


def test_a_map_has_its_unit_and_no_value_where_observations_lack(place, tmp_path, capsys):
    """Regression in public tools: a map in uint8, cut off at 255, with 0 for no data."""
    tile, checkpoint = tile_of(place), place / "regressor/best.pt"
    counts = Tile(tile).clear_counts()
    keys = {"checkpoint_path": checkpoint, "min_valid": int(np.median(counts))}
    (folder,) = run(infer, tile_path=tile, output_dir=tmp_path / "maps", **keys)
    values, far = (np.load(folder / f"{name}.npy") for name in ("regression_map", "applicability"))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(far), np.isnan(values))
    np.testing.assert_array_equal(np.isnan(values), counts < keys["min_valid"])
    with rasterio.open(folder / "regression_map.tif") as file:
        np.testing.assert_array_equal(file.read(1), values)
        assert np.isnan(file.nodata)
        assert (file.units, file.descriptions) == (("t/ha",), ("yield",))
        assert file.tags()["unit"] == "t/ha"
    encoder = Encoder.load(checkpoint)
    bands, masks = (np.moveaxis(np.load(tile / f"{n}.npy"), 0, 2) for n in ("bands", "masks"))
    series = bands, Tile(tile).doys, masks
    kept = np.isfinite(values)
    np.testing.assert_allclose(encoder.estimate(*series)[kept], values[kept], rtol=1e-4)
    assert "yield" in repr(encoder)
    with pytest.raises(InputError, match="found a checkpoint without classes"):
        encoder.classify(*series)

    capsys.readouterr()
    result = run(read_inference_map, map_path=folder / "regression_map.npy", pixels="all")
    targets = np.load(tile / "targets.npy")
    both = kept & np.isfinite(targets)
    expected = score_quantity(targets[both], values[both])
    assert result["agreement"] == pytest.approx(expected, rel=1e-5)
    tested = both & (Tile(tile).split_map(4) == TEST)
    assert 0 < tested.sum() < both.sum()
    for pixels in ("auto", "test"):
        of_test = run(read_inference_map, map_path=folder / "regression_map.npy", pixels=pixels)
        wanted = score_quantity(targets[tested], values[tested])
        assert of_test["agreement"] == pytest.approx(wanted, rel=1e-5)
    assert expected["rmse"] < 6, "in t/ha, as the targets are"
    assert result["values"] == {**TARGET, "pixels": kept.sum(), "no_value": (~kept).sum()}
    assert "RMSE" in capsys.readouterr().out
    for name in ("regression_map", "inference_map", "agreement"):
        assert (folder / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "other").mkdir()
    info = (tile / "tile.json").read_text().replace("t/ha", "kg/ha")
    (tmp_path / "other/tile.json").write_text(info)
    save(tmp_path / "other", "targets", targets)
    keys = {
        "map_path": folder / "regression_map.npy",
        "labels_path": f"{tmp_path}/other/targets.npy",
    }
    with pytest.raises(InputError, match="found target 'yield' in 'kg/ha', wanted target 'yield'"):
        run(read_inference_map, **keys)
    with pytest.raises(InputError, match="found uint16, wanted uint8 class codes"):
        run(read_inference_map, map_path=folder / "valid_count.npy")


def test_a_table_and_a_cube_get_the_values_of_the_map(place, tmp_path):
    """Of embed.py, NaN where the map has none; a cube has the unit, too."""
    pandas, xarray = (pytest.importorskip(name) for name in ("pandas", "xarray"))
    for name in ("pyarrow", "zarr", "dask.array"):
        pytest.importorskip(name)
    tile, keys = tile_of(place), {"checkpoint_path": place / "regressor/best.pt"}
    keys["min_valid"] = int(np.median(Tile(tile).clear_counts()))
    (folder,) = run(infer, tile_path=tile, output_dir=tmp_path / "maps", **keys)
    wanted = np.load(folder / "regression_map.npy")
    assert np.isnan(wanted).any()
    long_table(tile).to_csv(tmp_path / "series.csv", index=False)
    run(embed, data_path=tmp_path / "series.csv", output_path=tmp_path / "rows.csv", **keys)
    rows = pandas.read_csv(tmp_path / "rows.csv").sort_values("id")
    np.testing.assert_allclose(rows["value"], wanted.ravel(), rtol=1e-4)
    cube(tile).to_dataset().to_zarr(tmp_path / "cube.zarr", zarr_format=2)
    run(embed, data_path=tmp_path / "cube.zarr", output_path=tmp_path / "out.zarr", **keys)
    value = xarray.open_zarr(tmp_path / "out.zarr")["value"]
    np.testing.assert_allclose(value.values, wanted, rtol=1e-4)
    assert (value.attrs["long_name"], value.attrs["units"]) == ("yield", "t/ha")


def test_the_simulated_biomass_has_a_known_truth(tmp_path):
    run(make_demo_data, base_path=tmp_path, num_tiles=1, size=32)
    folder = tmp_path / "data/simulated/processed/MGRS-SIM1"
    tile, truth = Tile(folder), np.load(folder / "targets_truth.npy")
    assert tile.info["target"] == {"name": "biomass", "unit": "t/ha"}
    np.testing.assert_array_equal(np.isnan(tile.targets), np.isin(tile.labels, [50, 80]))
    error = (tile.targets - truth)[np.isfinite(truth)]
    assert abs(error.mean()) < 0.15
    assert error.std() == pytest.approx(1, abs=0.1)
    assert np.nanstd(truth) > 2
