"""The confidence of a classifier: its temperature, its error; that all scripts have the same."""

import json

from running.checkpoints import load_checkpoint, save_checkpoint
from running.device import start_runtime
from running.errors import InputError

import numpy as np
import pytest
import torch
from helpers import fine_tune, read_wandb, run, tile_of
from scipy.special import log_softmax, softmax

import infer
import train_classification
from backbones import load_classifier
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from evaluation import calibration
from evaluation.calibration import (
    fit_temperature,
    measure_calibration,
    plot_reliability,
    predict_folds,
    print_calibration,
    score_calibration,
)
from evaluation.classifiers import find_label_folds, fit_classifier
from tiles import checkpoint_bands
from trained.encoder import Encoder
from training import report
from utils import encode_series


def planted(temperature, count=4000, classes=5, seed=0):
    """Logits (N, C); class numbers (N,), drawn with the probabilities of logits / temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (count, classes))
    shares = softmax(logits / temperature, 1).cumsum(1)
    return logits, (rng.random((count, 1)) > shares).sum(1).clip(0, classes - 1)


@pytest.mark.parametrize("temperature", [0.5, 1, 3])
def test_a_planted_temperature_is_found(temperature):
    logits, labels = planted(temperature)
    found = fit_temperature(logits, labels)
    assert found == pytest.approx(temperature, rel=0.05)
    error = measure_calibration(logits, labels, found)["expected_calibration_error"]
    assert error < 0.03
    grid = np.exp(np.linspace(-2, 2, 401))
    rows = np.arange(len(labels))
    losses = [-log_softmax(logits / t, 1)[rows, labels].sum() + np.log(t) ** 2 for t in grid]
    assert found == pytest.approx(grid[np.argmin(losses)], rel=0.01)


def test_few_labels_that_are_all_right_do_not_make_confidence_infinite():
    logits = np.eye(2)[[0, 1] * 5] * 3
    assert 0.3 < fit_temperature(logits, np.array([0, 1] * 5)) < 1
    assert fit_temperature(np.empty((0, 2)), []) == pytest.approx(1, abs=1e-3)


def test_the_error_is_the_distance_of_confidence_and_accuracy():
    """Half of the pixels have confidence .9 and are right, half have .6 and are wrong."""
    logits = np.log([[0.9, 0.1], [0.6, 0.4]] * 10)
    found = measure_calibration(logits, np.array([0, 1] * 10), 1.0)
    assert found["expected_calibration_error"] == pytest.approx((0.1 + 0.6) / 2)
    filled = {place: one for place, one in enumerate(found["bins"]) if one["pixels"]}
    assert list(filled) == [9, 13], "of 15 of equal width"
    assert filled[9] == {"pixels": 10, "confidence": pytest.approx(0.6), "accuracy": 0}


def test_labels_out_of_folds_were_not_seen():
    """Labels at random: a model that has seen them would be right more often than by chance."""
    rng = np.random.default_rng(0)
    y, labels = rng.normal(size=(200, 120)).astype(np.float32), rng.integers(0, 2, 200)
    logits, numbers = predict_folds(y, labels, 3, np.arange(200))
    assert (logits.argmax(1) == numbers).mean() < 0.65
    assert fit_temperature(logits, numbers) > 3
    assert len(predict_folds(y[:2], np.array([0, 1]), 2, np.arange(2))[1]) == 0


def logits_of(workplace, best, split):
    """Logits (N, C) and numbers (N,) of the classes of labelled pixels, from the weights alone."""
    bands = checkpoint_bands(best, "best.pt")
    keys = {"split": split, "bands": bands, "block_size": best["config"]["block_size"]}
    keys |= {"min_valid": best["config"]["min_valid"], "batch_size": 512}
    data = SentinelTimeSeriesDatasetForDownstreaming(workplace, "toy", **keys)
    x, doys, labels, _ = (torch.cat(parts) for parts in zip(*iterate_batches(data), strict=True))
    _, logits = encode_series(load_classifier(best), x, doys, start_runtime("cpu", "float32"))
    return logits.double().numpy(), np.searchsorted(
        sorted(map(int, best["classes"])), labels.numpy()
    )


@pytest.mark.parametrize("label_count", [0, 40])
def test_a_fine_tuned_checkpoint_is_calibrated(workplace, tmp_path, label_count, capsys):
    logged = {"wandb_mode": "offline", "wandb_dir": tmp_path / "out"} if label_count else {}
    scores = fine_tune(workplace, tmp_path / "out", epochs=2, label_count=label_count, **logged)
    best = load_checkpoint(tmp_path / "out/best.pt")
    source = "folds of the training labels" if label_count else "the validation split"
    assert best["temperature"] != 1
    assert scores["calibration"]["temperature"] == best["temperature"]
    assert scores["calibration"]["fitted_to"] == source
    out = capsys.readouterr().out
    assert f"temperature {best['temperature']:.2f}, fitted to {source}" in out
    assert "95 % intervals, from the variance between blocks: accuracy " in out
    if not label_count:
        found = fit_temperature(*logits_of(workplace, best, "validation"))
        assert best["temperature"] == pytest.approx(found, rel=1e-3)
    tested = measure_calibration(*logits_of(workplace, best, "test"), best["temperature"])
    error = scores["expected_calibration_error"]
    assert error == pytest.approx(tested["expected_calibration_error"], abs=1e-3)
    pixels = [
        sum(one["pixels"] for one in scores["calibration"][k]) for k in ("bins", "bins_before")
    ]
    assert pixels == [np.sum(scores["confusion_matrix"])] * 2, "all pixels of the test split"
    assert (tmp_path / "out/reliability.png").read_bytes()[:4] == b"\x89PNG"
    if logged:
        pictures = [file.name for file in read_wandb(tmp_path / "out")[1] if file.exists()]
        assert any(name.startswith("reliability_") for name in pictures)
    last = json.loads((tmp_path / "out/metrics.jsonl").read_text().splitlines()[-1])
    key = "expected_calibration_error"
    assert last[f"test_{key}"] == scores[key]
    before = (tmp_path / "out/best.pt").read_bytes()
    fine_tune(workplace, tmp_path / "out", epochs=2, label_count=label_count)
    assert (tmp_path / "out/best.pt").read_bytes() == before, "the run had ended"


def test_maps_have_the_temperature_and_the_same_classes(workplace, tmp_path):
    """A checkpoint without a temperature is of an older version: it has 1."""
    content = load_checkpoint(workplace / "classifier/best.pt")
    maps = {}
    for temperature in (None, 1.0, 2.5):
        more = {} if temperature is None else {"temperature": temperature}
        rest = {key: value for key, value in content.items() if key != "temperature"}
        save_checkpoint(path := tmp_path / f"{temperature}.pt", **rest | more)
        keywords = {"checkpoint_path": path, "tile_path": tile_of(workplace)}
        (folder,) = run(infer, output_dir=tmp_path / f"{temperature}", **keywords)
        maps[temperature] = [
            np.load(folder / f"{name}.npy") for name in ("classification_map", "confidence")
        ]
    codes = [codes for codes, _ in maps.values()]
    assert all((one == codes[0]).all() for one in codes[1:])
    known = codes[0] > 0
    one, two = maps[1.0][1][known], maps[2.5][1][known]
    np.testing.assert_array_equal(maps[None][1][known], one)
    fine = one < 1 - 1e-4
    odds, scaled = (np.log(p[fine] / (1 - p[fine])) for p in (one, two))  # differences of logits
    np.testing.assert_allclose(scaled, odds / 2.5, rtol=1e-2)


def test_a_checkpoint_with_a_bad_temperature_is_refused(workplace, tmp_path):
    content = load_checkpoint(workplace / "classifier/best.pt")
    save_checkpoint(tmp_path / "bad.pt", **content | {"temperature": 0.0})
    with pytest.raises(InputError, match="found temperature 0.0, wanted a number above 0$"):
        Encoder.load(tmp_path / "bad.pt", device="cpu")


def test_logits_out_of_folds_are_those_of_discriminant_analysis():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 90)
    y = (rng.normal(size=(90, 4)) + 2 * labels[:, None] + 5).astype(np.float32)
    groups = np.arange(90) // 3
    logits, numbers = predict_folds(y, labels, 3, groups)
    folds, unit = find_label_folds(labels, 0, groups)
    assert unit == "blocks"
    wanted = [
        fit_classifier("discriminant analysis", y[train], labels[train])[0].predict_proba(y[test])
        for train, test in folds
    ]
    np.testing.assert_allclose(softmax(logits, 1), np.concatenate(wanted), atol=2e-3)
    assert (numbers == np.concatenate([labels[test] for _, test in folds])).all()


def test_the_report_has_before_and_after(tmp_path, monkeypatch, capsys):
    """In words, in metrics.json and in the picture, whose axis along is confidence."""
    logits, labels = planted(3)
    scores = score_calibration(logits, labels, 3.0, "validation")
    before, after = (measure_calibration(logits, labels, t) for t in (1.0, 3.0))
    key = "expected_calibration_error"
    assert before[key] > 0.1 > 0.03 > after[key]
    assert (scores[f"{key}_before"], scores[key]) == (before[key], after[key])
    assert scores["calibration"]["bins_before"] == before["bins"]
    assert scores["calibration"]["bins"] == after["bins"]
    print_calibration(scores)
    words = f"error {after[key]:.3f} with temperature 3.00, fitted to the validation split; "
    assert f"{words}{before[key]:.3f} without" in capsys.readouterr().out
    drawn = []
    monkeypatch.setattr(calibration, "save_figure", lambda figure, path: drawn.append(figure))
    plot_reliability(scores["calibration"], tmp_path / "r.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    for label, bins in (("before", before["bins"]), ("temperature 3.00", after["bins"])):
        filled = [one for one in bins if one["pixels"]]
        assert list(lines[label].get_xdata()) == [one["confidence"] for one in filled]
        assert list(lines[label].get_ydata()) == [one["accuracy"] for one in filled]


def test_a_best_that_is_complete_stays_and_is_what_is_scored(workplace, tmp_path, monkeypatch):
    """The run had ended: whatever its best.pt holds is kept, byte for byte."""
    keys = {"epochs": 2, "label_count": 40}
    seen, few = [], {"MAX_LABELS": 7}
    for name, value in few.items():
        monkeypatch.setattr(report, name, value)
    blocks = train_classification.predict_folds

    def record(y, labels, size, groups, seed):
        seen.append(len(np.unique(groups)) / len(groups))
        return blocks(y, labels, size, groups, seed)

    monkeypatch.setattr(train_classification, "predict_folds", record)
    fine_tune(workplace, tmp_path / "out", **keys)
    best = load_checkpoint(path := tmp_path / "out/best.pt")
    assert len(best["applicability"]["labels"]) == 7
    assert seen[0] < 1, "of blocks, not of pixels"
    best["temperature"] = 2.5
    for part in best["head_state"].values():
        part.zero_()
    save_checkpoint(path, **best)
    before = path.read_bytes()
    scores = fine_tune(workplace, tmp_path / "out", **keys)
    assert path.read_bytes() == before
    assert scores["calibration"]["temperature"] == 2.5
    mapped = np.sum(scores["confusion_matrix"], 0)
    assert np.count_nonzero(mapped) == 1, "a head of zeros knows one class"
