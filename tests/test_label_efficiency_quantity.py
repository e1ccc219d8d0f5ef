"""label_efficiency.py on a quantity in place of classes, and up to a day of the season."""

import json
import re
from types import SimpleNamespace

from running.checkpoints import load_checkpoint
from running.device import start_runtime
from running.errors import InputError, notice

import numpy as np
import pytest
from helpers import GEOREFERENCE, Fork, make_dataset, run, save, tile_of

import label_efficiency
import train_regression
from evaluation import regressors
from evaluation.comparison import open_split
from evaluation.differences import block_bootstrap
from evaluation.features import build_extractors, read_split
from evaluation.quantities import resample_rmse
from evaluation.regressors import find_target_folds, fit_regressor
from evaluation.rows import FEATURES, MODELS, QUANTITY_MODELS
from evaluation.tasks import Classes, find_task
from tiles import TEST, Tile, checkpoint_bands

TARGET = {"name": "yield", "unit": "t/ha"}
QUICK = "embedding,series,harmonic"


@pytest.fixture(autouse=True)
def quick_choice(monkeypatch):
    monkeypatch.setattr(regressors, "FOLDS", 2)
    notice.cache_clear()


@pytest.fixture
def yields(tmp_path):
    """The tiles of `workplace` with a yield of about 20 and 40 t/ha in place of the labels."""
    make_dataset(tmp_path, shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    for number in range(2):
        tile = tile_of(tmp_path, number)
        is_high = np.load(tile / "labels.npy") == 95
        noise = np.random.default_rng(number).normal(0, 2, is_high.shape)
        save(tile, "targets", np.where(is_high, 40, 20).astype(np.float32) + np.float32(noise))
        info = json.loads((tile / "tile.json").read_text()) | {"target": TARGET}
        (tile / "tile.json").write_text(json.dumps(info))
        (tile / "labels.npy").unlink()
    return tmp_path


def score(workplace, base_path, **keywords):
    standard = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": base_path}
    standard |= {"dataset_name": "toy", "output_dir": base_path / "out", "models": QUICK}
    return run(label_efficiency, **standard | {"seeds": 1, "label_counts": "40"} | keywords)


# ---- a quantity ----------------------------------------------------------------------------------


def test_a_quantity_is_scored(workplace, yields, capsys):
    """RMSE and R2 in table and figure; the lowest RMSE is the best baseline."""
    result = score(workplace, yields, seeds=2)
    rmse = {name: [] for name in QUICK.split(",")}
    for row in result["scores"]:
        rmse[row["model"]].append(row["rmse"])
        assert 1.5 < row["rmse"] < 8, "the noise is 2, the deviation of all yields 10"
        assert row["folds"] == "blocks"
    (test,) = result["tests"]
    best = min(("series", "harmonic"), key=lambda name: np.mean(rmse[name]))
    assert test["baseline"] == best
    assert test["difference"] == pytest.approx(np.mean(rmse["embedding"]) - np.mean(rmse[best]))
    low, high = test["interval_blocks"]
    assert low <= high
    assert result["target"] == TARGET
    table = (yields / "out/label_efficiency.md").read_text()
    assert table in capsys.readouterr().out
    assert table.startswith("RMSE [t/ha] on the test split of toy, mean and standard deviation")
    assert "\nR2 on the test split" in table
    assert re.search(r"\| embedding \+ ridge regression \| 0\.[5-9]\d\d ± 0\.\d+ \|\n", table)
    assert "| difference (below 0: better) |" in table
    assert "yield: a lower RMSE is better; that of the mean of the test pixels is 10" in table
    assert "Penalty, k and leaf size: chosen over folds of blocks in 6 fits, of pixels" in table
    assert (yields / "out/label_efficiency.png").read_bytes()[:4] == b"\x89PNG"


def test_classes_are_scored_where_there_are_both(workplace, yields):
    for number in range(2):
        labels = np.where(np.load(tile_of(yields, number) / "targets.npy") > 30, 95, 40)
        save(tile_of(yields, number), "labels", labels.astype(np.uint8))
    config = {"base_path": yields, "dataset_name": "toy"}
    assert find_task(config | {"task": "auto"}) is Classes
    result = score(workplace, yields, task="quantity", models="harmonic")
    assert "rmse" in result["scores"][0]
    with pytest.raises(InputError, match="task=height: wanted auto or one of classes, quantity"):
        score(workplace, yields, task="height")


def test_maps_of_others_are_rows_for_a_quantity(workplace, yields):
    """Where a map has no value no row has the pixel; a map that knows the yield is right."""
    for number in range(2):
        tile = tile_of(yields, number)
        values = np.load(tile / "targets.npy")[..., None].repeat(3, 2)
        values[:4, :4] = np.nan
        (yields / f"maps/MGRS-{number}").mkdir(parents=True)
        np.save(yields / f"maps/MGRS-{number}/a.npy", values)
    keywords = {"maps": f"height={yields}/maps", "models": "harmonic", "label_counts": "0"}
    result = score(workplace, yields, **keywords)
    rmse = {row["model"]: row["rmse"] for row in result["scores"]}
    assert list(rmse) == ["harmonic", "height", "height_neighbours"]
    assert rmse["height"] < 0.1 < 1.5 < rmse["harmonic"]
    splits = [Tile(tile_of(yields, number)).split_map(4) for number in range(2)]
    assert result["all_labels"] == sum(
        (one == 1).sum() - (one[:4, :4] == 1).sum() for one in splits
    )


@pytest.mark.slow
def test_a_fine_tuned_network_is_a_row_for_a_quantity(workplace, yields, monkeypatch):
    def run_forked(command, **_):
        process = Fork(*command[2:], script=train_regression)
        stdout, stderr = process.communicate()
        return SimpleNamespace(returncode=process.returncode, stdout=stdout, stderr=stderr)

    monkeypatch.setattr("subprocess.run", run_forked)
    result = score(workplace, yields, models="finetuned,harmonic", label_counts="20")
    assert [row["model"] for row in result["scores"]] == ["finetuned", "harmonic"]
    assert 1.5 < result["scores"][0]["rmse"] < 12


def test_settings_are_chosen_over_blocks():
    """Pixels of a block are alike, so that over pixels the nearest one would win."""
    rng, groups = np.random.default_rng(0), np.arange(300) // 10
    level = rng.normal(0, 1, 30)[groups]
    x = rng.normal(0, 1, 30)[groups] + rng.normal(0, 1e-3, 300)
    found = [
        fit_regressor("k nearest neighbours", x[:, None], level, 0, units)[1]
        for units in (None, groups)
    ]
    assert found[0] <= 5 < found[1]
    assert fit_regressor("ridge regression", x[:1, None], level[:1])[1] is None, "of one target"


def test_the_setting_has_the_lowest_squared_error_over_the_folds():
    """Another error would choose another one here, where a few targets are far off."""
    rng, groups = np.random.default_rng(0), np.arange(200) // 10
    x = rng.normal(0, 1, (200, 1))
    targets = x[:, 0] + np.where(rng.random(200) < 0.1, 8, 0.05) * rng.normal(0, 1, 200)
    squares = {}
    for k in (1, 3, 5, 9, 15, 25, 45):
        errors = []
        for train, test in find_target_folds(targets, 0, groups)[0]:
            near = abs(x[test] - x[train].T).argsort(1)[:, :k]
            errors.append(np.mean((targets[train][near].mean(1) - targets[test]) ** 2))
        squares[k] = np.mean(errors)
    chosen = fit_regressor("k nearest neighbours", x, targets, 0, groups)[1]
    assert chosen == min(squares, key=squares.get)


def test_a_forest_is_that_of_its_seed():
    """On one thread: with more, the order in which they add the trees' answers changes rounding."""
    x = np.random.default_rng(0).normal(0, 1, (40, 3))

    def grow(seed):
        forest = regressors.regressors(seed)["random forest"][0]
        return forest.set_params(n_estimators=5, n_jobs=1).fit(x, x)

    assert (grow(1).predict(x) == grow(1).predict(x)).all()
    assert (grow(1).predict(x) != grow(2).predict(x)).any()


def test_a_row_is_of_the_features_in_its_name():
    for models in (MODELS, QUANTITY_MODELS):
        assert len({one.label for one in models.values()}) == len(models)
        for name, one in models.items():
            first = name.split("_")[0]
            assert first not in FEATURES or one.features == first


def test_the_interval_is_of_resampled_blocks():
    rng = np.random.default_rng(0)
    actual, groups = rng.normal(0, 1, 300), np.arange(300) // 10
    ours, theirs = (actual + rng.normal(0, size, (2, 300)) for size in (0.5, 1))
    found = block_bootstrap(resample_rmse, actual, groups, ours, theirs)
    rng, differences = np.random.default_rng(5), []
    for _ in range(500):
        rows = np.concatenate([np.arange(10) + 10 * block for block in rng.integers(0, 30, 30)])
        rmse = [np.sqrt(((one - actual)[:, rows] ** 2).mean(1)) for one in (ours, theirs)]
        differences.append((rmse[0] - rmse[1]).mean())
    wanted = np.percentile(differences, [2.5, 97.5])
    np.testing.assert_allclose(found, wanted, atol=0.02)
    assert found[1] < -0.3


def test_pixels_need_the_clear_observations_that_are_asked_for(workplace):
    path = workplace / "pretrained/best.pt"
    checkpoint, config = load_checkpoint(path), {"checkpoint_path": str(path), "min_valid": 17}
    config |= {"base_path": workplace, "dataset_name": "toy"}
    data = open_split("test", checkpoint, label_efficiency.run_config | config)
    tiles = [Tile(tile_of(workplace, number)) for number in range(2)]
    counts = np.concatenate([one.clear_counts()[one.split_map(4) == TEST] for one in tiles])
    assert 0 < (counts >= 17).sum() == data.num_pixels < len(counts)


# ---- up to a day ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_nothing_after_the_day_is_read(workplace, tmp_path):
    """With other observations after the day, its scores stay and those of the year change."""
    day, shape, found = 180, (20, 24, 16, 10), []
    for name in ("as_it_was", "changed_later"):
        base_path = make_dataset(tmp_path / name, tiles=1, shape=shape, clear=0.5, **GEOREFERENCE)
        tile = Tile(tile_of(base_path))
        bands, late = np.array(tile.bands), tile.doys > day
        if name == "changed_later":
            bands[late] = np.random.default_rng(1).integers(1, 9000, bands[late].shape)
        save(tile.path, "bands", bands)
        models = "discriminant,series_discriminant,harmonic_discriminant"
        keywords = {"models": models, "until": f"366,40,{day}"}
        found.append(score(workplace, base_path, **keywords)["season"])
    keys = ("until", "model", "macro_f1")
    scores = [{row["until"]: [] for row in one["scores"]} for one in found]
    for one, own in zip(found, scores, strict=True):
        for row in one["scores"]:
            own[row["until"]].append([row[key] for key in keys])
    assert list(scores[0]) == [40, day, 366]
    assert scores[0][day] == scores[1][day] != scores[0][40]
    assert scores[0][366] != scores[1][366]
    is_test = (tile.split_map(4) == TEST) & (tile.clear_counts() >= 5)  # min_valid
    known = (tile.masks[tile.doys <= 40] == 1).any(0)[is_test]
    assert found[0]["test_pixels"] == known.sum() < len(known), "the same at every cut"
    table = (base_path / "out/season.md").read_text()
    assert "| up to day | 40 (9 Feb) | 180 (29 Jun) | 366 (31 Dec) |" in table
    assert f"those with an observation up to day 40 ({(~known).sum()} have none" in table
    assert (base_path / "out/season.png").read_bytes()[:4] == b"\x89PNG"


def test_features_up_to_a_day_are_those_of_tiles_without_later_ones(workplace):
    """The day itself is read; series are filled up to it, and not with its value after it."""
    path, day = workplace / "pretrained/best.pt", int(Tile(tile_of(workplace)).doys[9])
    checkpoint, found = load_checkpoint(path), []
    keys = {"min_valid": 1, "bands": checkpoint_bands(checkpoint, path)}
    for season, until in (((1, 366), day), ((1, day), 366)):
        data = Classes.dataset(workplace, "toy", season=season, **keys)
        extractors = build_extractors([checkpoint], data.tiles, 0, start_runtime("cpu"), until)
        found.append(read_split(data, extractors, known_by=until)[0])
    assert len(found[0]) == 4
    for key, features in found[0].items():
        np.testing.assert_allclose(features, found[1][key], atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"until": "120,0"}, "until=0: wanted a day of year 1 to 366"),
        ({"until": "May", "start": "7"}, "until=May: wanted a day of year 1 to 366"),
        ({"until": "120", "start": "300", "end": "20"}, "until=120: found start=300 after end=20"),
        ({"until": "120", "models": "finetuned"}, "until with models=finetuned: wanted a row of"),
        ({"until": "1"}, "toy/processed: found no test pixel seen up to day 1"),
    ],
)
def test_days_that_cannot_be_read_are_refused(workplace, tmp_path, keywords, message):
    keywords = {"output_dir": tmp_path / "out", "models": "harmonic"} | keywords
    with pytest.raises(InputError, match=message):
        score(workplace, workplace, **keywords)
    assert not (tmp_path / "out").exists(), "before any work"


def test_a_season_is_all_that_is_read(workplace, tmp_path):
    """Scores of start= and end= are those of tiles without the other dates."""
    whole = make_dataset(tmp_path / "whole", shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    cut = make_dataset(tmp_path / "cut", shape=(20, 24, 16, 10), clear=0.8, **GEOREFERENCE)
    for number in range(2):
        tile = Tile(tile_of(cut, number))
        chosen = (tile.doys >= 60) & (tile.doys <= 200)
        for name in ("bands", "masks", "doys"):
            save(tile.path, name, np.array(getattr(tile, name))[chosen])
    models = "discriminant,series_discriminant,harmonic_discriminant"
    keywords = {"models": models, "min_valid": 3}
    one = score(workplace, whole, start="03-01", end="200", **keywords)
    other = score(workplace, cut, **keywords)
    assert one["scores"] == other["scores"]
    assert one["retrieval"] == other["retrieval"]
