"""A season: only observations from start= to end= are read, as if a tile had no others."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from running.checkpoints import load_checkpoint
from running.config import check_early, find_season, in_season, read_day
from running.errors import InputError

import numpy as np
import pytest
from helpers import ROOT, assert_same_weights, fine_tune, make_tile, map_tile, tile_of
from scenes import prepare, settings
from small_scenes import items_of, local, make_item, save, values, write_day

from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from preparation import items, plan
from tiles import Tile
from trained.encoder import Encoder

SEASONS = [(100, 250), (300, 60)]  # the second one crosses New Year


def cut(source, target, season):
    """A copy of a tile that has the dates of a season alone."""
    shutil.copytree(source, target)
    days = np.load(source / "doys.npy")
    start, end = season
    later, earlier = days >= start, days <= end
    chosen = later & earlier if start < end else later | earlier
    assert 0 < chosen.sum() < len(days)
    for name in ("doys", "masks", "bands"):
        np.save(target / f"{name}.npy", np.load(source / f"{name}.npy")[chosen])
    return target


@pytest.fixture(scope="module")
def cuts(workplace, tmp_path_factory):
    """{season: folder of the data set "toy", whose tiles have the dates of the season alone}."""
    folders = {season: tmp_path_factory.mktemp("cut") for season in SEASONS}
    for season, folder in folders.items():
        for number in range(2):
            target = tile_of(folder, number)
            target.parent.mkdir(parents=True, exist_ok=True)
            cut(tile_of(workplace, number), target, season)
    return folders


# ---- keys ----------------------------------------------------------------------------------------


def test_days_are_days_of_year_months_and_days_or_dates():
    days = {"": 0, "1": 1, "90": 90, "366": 366, "04-01": 91, "2023-04-01": 91, "2024-04-01": 92}
    assert {text: read_day("start", text) for text in days} == days
    assert find_season({"start": "", "end": ""}) == (1, 366)
    before = {"start": "11-01", "end": "60"}
    assert find_season({"start": "", "end": "90"}, before) == (305, 90)


@pytest.mark.parametrize("text", ["0", "367", "spring", "2024", "13-01", "2023-02-29", "4-1", "-5"])
def test_a_wrong_day_ends_in_one_line(text):
    with pytest.raises(InputError, match=f"^end={text}: wanted a day of year 1 to 366, .*04-01"):
        check_early({"start": "", "end": text})


@pytest.mark.parametrize("script", ["train_classification", "infer", "embed", "prepare_tiles"])
def test_a_wrong_day_is_refused_before_anything_heavy_is_imported(script):
    arguments = [sys.executable, "-X", "importtime", f"{script}.py", "start=spring"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    *imports, line = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and line.startswith("error: start=spring: wanted a day of year")
    assert not any(one.split("|")[-1].strip() in ("torch", "numpy") for one in imports)


def test_a_season_may_cross_new_year():
    days = np.array([1, 60, 61, 299, 300, 366], np.int16)
    assert days[in_season(days, 300, 60)].tolist() == [1, 60, 300, 366]
    assert days[in_season(days, 60, 300)].tolist() == [60, 61, 299, 300]
    assert in_season(days, 1, 366).all() and in_season(days, 61, 60).all()
    assert days[in_season(days, 61, 61)].tolist() == [61]


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("season", SEASONS)
def test_a_tile_is_read_as_if_it_had_no_other_dates(workplace, cuts, season):
    tile, other = Tile(tile_of(workplace)), Tile(tile_of(cuts[season]))
    tile.choose_dates(*season)
    assert tile.shape == other.shape and tile.doys.tolist() == other.doys.tolist()
    assert (tile.clear_counts() == other.clear_counts()).all()
    for kind, keys in (
        (SentinelTimeSeriesDataset, {"sample_size": 2}),
        (SentinelTimeSeriesDatasetForDownstreaming, {}),
    ):
        keys |= {"min_valid": 2, "batch_size": 32}
        pair = kind(workplace, "toy", season=season, **keys), kind(cuts[season], "toy", **keys)
        assert pair[0].describe() == pair[1].describe()
        for (x, doys, *rest), wanted in zip(*map(iterate_batches, pair), strict=True):
            known = doys > 0  # bands of padding have no meaning
            batch, wanted = [x[known], doys, *rest], [wanted[0][known], *wanted[1:]]
            assert all(one.equal(two) for one, two in zip(batch, wanted, strict=True))


def test_cached_counts_of_seasons_are_not_mixed(tmp_path):
    path = make_tile(tmp_path / "MGRS-A")
    for season in ((1, 366), *SEASONS, (1, 366), SEASONS[0]):
        tile = Tile(path)
        chosen = in_season(tile.doys, *season)
        tile.choose_dates(*season)
        assert (tile.clear_counts() == tile.masks[chosen].sum(0)).all()


def test_a_season_without_a_date_is_refused_in_one_line(workplace):
    tile = Tile(tile_of(workplace))
    day = int(tile.doys[0])
    with pytest.raises(InputError, match=r"MGRS-0/doys.npy: found no day from .*start= to end="):
        tile.choose_dates(day + 1, day + 1)


# ---- fine-tuning and mapping ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def winter(workplace, tmp_path_factory):
    """A folder with a classifier of the winter, fine-tuned on all tiles' dates of it."""
    folder = tmp_path_factory.mktemp("winter")
    keys = {"start": "300", "end": "03-01", "min_valid": 2, "epochs": 1}
    fine_tune(workplace, folder / "classifier", **keys)
    return folder


def test_fine_tuning_in_a_season_is_that_on_tiles_without_other_dates(winter, cuts, workplace):
    checkpoint = workplace / "pretrained/best.pt"
    keys = {"checkpoint_path": checkpoint, "min_valid": 2, "epochs": 1}
    fine_tune(cuts[300, 60], winter / "cut", **keys)
    found, wanted = (load_checkpoint(winter / one / "best.pt") for one in ("classifier", "cut"))
    assert found["days"] == wanted["days"] and max(found["days"]) > 300
    for part in ("backbone_state", "head_state"):
        assert_same_weights(found[part], wanted[part])


def test_a_run_of_another_season_is_not_resumed(winter, workplace):
    keys = {"start": "300", "min_valid": 2, "epochs": 1}
    with pytest.raises(InputError, match=r"\bend\b"):
        fine_tune(workplace, winter / "classifier", end="90", **keys)


def test_a_map_has_the_season_of_its_classifier(winter, workplace, cuts, tmp_path, capsys):
    """Bit for bit that of a tile without the other dates; another season is another map."""
    path = winter / "classifier/best.pt"
    (folder,) = map_tile(winter, tmp_path / "winter", tile_path=tile_of(workplace))
    keys = {"start": "1", "end": "366"}  # all that the tile has
    (other,) = map_tile(winter, tmp_path / "cut", tile_path=tile_of(cuts[300, 60]), **keys)
    for name in ("representation_map", "valid_count", "classification_map", "confidence"):
        one, two = (np.load(place / f"{name}.npy") for place in (folder, other))
        np.testing.assert_array_equal(one, two)
    seasons = [json.loads((one / "infer.json").read_text())["season"] for one in (folder, other)]
    assert seasons == ["300 to 60", "1 to 366"]
    assert "doubtful: it lacks dates" not in capsys.readouterr().out
    with pytest.raises(InputError, match=r"made with another season \(was 300 to 60\)"):
        map_tile(winter, folder, tile_path=tile_of(workplace), end="90")
    tile, encoder = Tile(tile_of(workplace)), Encoder.load(path)
    series = np.moveaxis(tile.bands, 0, 2), tile.doys, np.moveaxis(tile.masks, 0, 2)
    found, wanted = encoder.embed(*series), np.load(folder / "representation_map.npy")
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_map_of_a_season_by_a_classifier_of_the_year(workplace, tmp_path, capsys):
    """Of pixels with too few dates there is none, which is said, unless min_valid asks for less."""
    keys = {"end": "180"}
    (folder,) = map_tile(workplace, tmp_path / "few", **keys, min_valid=9)
    lines = capsys.readouterr().out
    tile = Tile(tile_of(workplace))
    tile.choose_dates(1, 180)
    share = (tile.clear_counts() >= 9).mean()
    assert f"MGRS-0: found {share:.0%} of its pixels with min_valid=9" in lines and share < 0.9
    assert "doubtful: it lacks dates of days" in lines
    (more,) = map_tile(workplace, tmp_path / "more", **keys, min_valid=1)
    empty = [np.isnan(np.load(one / "confidence.npy")).mean() for one in (folder, more)]
    assert empty == pytest.approx([1 - share, 0])


# ---- tiles ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_a_tile_has_the_scenes_of_a_season_alone(tmp_path):
    """Of the twelve months from October; the winter is one, across New Year."""
    days = ["2020-09-30", "2020-10-20", "2020-12-24", "2021-02-28", "2021-03-02", "2021-09-30"]
    images = json.loads(Path(items_of(tmp_path)["items_path"]).read_text())["features"][0]["assets"]
    images = {band: asset["href"] for band, asset in images.items()}
    found = [make_item(f"S2A_33UUP_{day.replace('-', '')}_0_L2A", day, images) for day in days]
    keys = {"year": "2020-10", "start": "11-01", "end": "03-01", "bands": "B04,B8A"}
    request = plan.parse_request(settings(tmp_path, offset="applied", **keys))
    scenes = [items.need("pystac").Item.from_dict(item) for item in found]
    (chosen,) = plan.choose_items(scenes, request).values()
    ordered = [str(day) for day, _ in plan.order_days(chosen)]
    assert ordered == ["2021-02-28", "2020-12-24"]
    keys["items_path"] = save(tmp_path, *found)
    (tile,) = prepare(tmp_path, offset="applied", **keys)
    assert tile.info["dates"] == ordered and tile.doys.tolist() == [59, 359]
    assert (tile.masks == 1).all() and (tile.bands[0] == tile.bands[1]).all()
    with pytest.raises(InputError, match="was made with another start, end"):
        plan.check_same(tmp_path, {**request.made_with, "start": "", "end": ""}, request.made_with)


def test_local_scenes_of_another_season_are_refused_in_one_line(tmp_path):
    """Regression: the year that was asked for was named as the one to ask for."""
    write_day(tmp_path / "in/a_2021-04-10.tif", values())
    keys = local(tmp_path / "in", year="2021", start="11-01", end="12-31")
    line = "found none of its dates .*, wanted another start and end, or a year like year=2021$"
    with pytest.raises(InputError, match=line):
        prepare(tmp_path, **keys)
