"""From a catalogue on loopback to tiles: the truth pixel by pixel, stops, faults, labels, maps."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import date
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
from helpers import ROOT
from odc.geo import geom as geometry
from odc.geo.geobox import GeoBox
from scenes import DAYS, SCENES, fill, prepare, settings, truth
from stac_server import (
    CRS,
    LEFT,
    SIZE,
    TOP,
    Catalogue,
    FileServer,
    make_scene,
    pixel_size,
    true_classes,
    true_reflectance,
    write_collection,
)

import prepare_tiles
from preparation import pixels, plan, sentinel2
from running.errors import InputError
from running.files import lock_folder

pytestmark = [  # of libraries that we cannot change
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The scenes on a file server, and a catalogue of them."""
    folder = tmp_path_factory.mktemp("world")
    server = FileServer(folder)
    items = [
        make_scene(folder, server.url, name, day, shifted=shifted, **properties)
        for name, (day, shifted, properties) in SCENES.items()
    ]
    catalogue = Catalogue(folder, items[::-1] + items[:1])  # unsorted, and one listed twice
    yield SimpleNamespace(server=server, folder=folder, items=items, url=catalogue.url)
    catalogue.stop()
    server.shutdown()


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK", 128)  # so that a tile has four
        yield


@pytest.fixture
def fresh(world, tmp_path):
    """The items as a saved search, under addresses of which GDAL has kept nothing."""
    items = json.loads(json.dumps(world.items).replace(".tif", f".tif?{tmp_path.name}"))
    write_collection(tmp_path / "collection.json", items)
    return {"items_path": str(tmp_path / "items.json")}


@pytest.fixture
def no_waiting(monkeypatch):
    """Do not wait between attempts."""
    monkeypatch.setattr(pixels, "PAUSE", 0.001)


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """The tile of all dates."""
    return prepare(tmp_path_factory.mktemp("made"), world)[0]


# ---- bands, masks, days --------------------------------------------------------------------------


def test_reflectances_and_masks_are_the_truth_pixel_by_pixel(made):
    assert made.info["dates"] == DAYS
    assert made.shape == (len(DAYS), SIZE, SIZE, 10)
    for index, day in enumerate(DAYS):
        bands, clear = truth(day)
        np.testing.assert_array_equal(made.bands[index], bands, err_msg=day)
        np.testing.assert_array_equal(made.masks[index], clear, err_msg=day)
    assert made.doys.tolist() == [date.fromisoformat(day).timetuple().tm_yday for day in DAYS]


def test_statistics_are_those_of_the_clear_observations(made):
    clear = made.bands[made.masks == 1].astype(np.float64)
    np.testing.assert_allclose(made.band_mean, clear.mean(0), rtol=1e-6)
    np.testing.assert_allclose(made.band_std, clear.std(0), rtol=1e-6)


def test_tile_json_records_place_and_origin(made):
    assert made.info["crs"] == CRS
    assert made.info["transform"] == [10, 0, LEFT["33UUP"], 0, -10, TOP]
    assert made.info["bands"] == sentinel2.TESSERA_BANDS
    assert made.info["clear_scl"] == [4, 5, 6, 7, 10, 11]
    assert made.info["boa_offset_applied"] is True
    origins = made.info["items"]
    subtracted = [origins[day][0]["offset_subtracted"] for day in DAYS]
    assert subtracted == [0, 1000, 0, 1000, 0, 1000, 0, 1000, 1000]
    assert [entry["id"] for entry in origins["2021-09-07"]] == [
        "S2A_33UUP_20210907_1_L2A",  # the newer baseline first
        "S2A_33UUP_20210907_0_L2A",
    ]
    assert [entry["baseline"] for entry in origins["2021-01-10"]] == ["02.14"]  # listed twice


def test_any_twelve_months_are_ordered_by_day_of_year(world, tmp_path):
    (tile,) = prepare(tmp_path, world, year="2021-09", bands="B02", clear_scl="4")
    assert tile.info["dates"] == ["2022-01-04", "2021-09-07", "2021-12-31"]
    assert tile.doys.tolist() == [4, 250, 365]
    for index, day in enumerate(tile.info["dates"]):
        np.testing.assert_array_equal(tile.bands[index], truth(day, ["B02"])[0])
        np.testing.assert_array_equal(tile.masks[index], fill(true_classes(day)) == 4)


def test_eleven_bands_and_other_resampling(world, tmp_path):
    keys = {"bands": "ancestor", "year": "2021-12", "resampling": "bilinear"}
    (tile,) = prepare(tmp_path, world, **keys)
    bands, clear = truth("2021-12-31", sentinel2.ANCESTOR_BANDS)
    day = tile.info["dates"].index("2021-12-31")
    for index, name in enumerate(sentinel2.ANCESTOR_BANDS):
        found, exact = tile.bands[day, ..., index].astype(int), bands[..., index].astype(int)
        if pixel_size(name) == 10:
            np.testing.assert_array_equal(found, exact)
        else:  # in between its neighbours', the same across a block's border
            coarse = true_reflectance("2021-12-31", name).astype(float)
            factor = SIZE // len(coarse)
            offsets = (np.arange(SIZE) + 0.5) / factor - 0.5
            low = np.clip(np.floor(offsets), 0, len(coarse) - 1).astype(int)
            high = np.minimum(low + 1, len(coarse) - 1)
            share = np.clip(offsets - low, 0, 1)
            rows = coarse[low] * (1 - share)[:, None] + coarse[high] * share[:, None]
            wanted = rows[:, low] * (1 - share) + rows[:, high] * share
            assert np.abs(found - wanted).max() <= 1
    np.testing.assert_array_equal(tile.masks[day], clear)  # classes are never mixed


def test_bbox_stride_and_resolution_keep_to_the_pixels(world, tmp_path, made):
    (part,) = prepare(tmp_path / "a", world, bbox=bbox_of(605, 705, 1500, 1700))
    column = (part.info["transform"][2] - LEFT["33UUP"]) / 10
    row = (TOP - part.info["transform"][5]) / 10
    assert row == round(row) and column == round(column)
    rows, columns = (
        slice(int(first), int(first) + size)
        for first, size in zip((row, column), part.shape[1:3], strict=True)
    )
    assert rows.start <= 70 and rows.stop >= 170 and columns.start <= 60 and columns.stop >= 150
    assert part.shape[1] < 120 and part.shape[2] < 110
    np.testing.assert_array_equal(part.bands, made.bands[:, rows, columns])
    np.testing.assert_array_equal(part.masks, made.masks[:, rows, columns])

    (few,) = prepare(tmp_path / "b", world, stride=7)
    np.testing.assert_array_equal(few.bands, made.bands[:, 3::7, 3::7][:, : SIZE // 7, : SIZE // 7])
    np.testing.assert_array_equal(few.masks, made.masks[:, 3::7, 3::7][:, : SIZE // 7, : SIZE // 7])
    assert few.info["transform"] == [70, 0, LEFT["33UUP"], 0, -70, TOP]

    (coarse,) = prepare(
        tmp_path / "c", world, resolution=20.0, resampling="average", bands="B04,B11"
    )
    assert coarse.info["transform"] == [20, 0, LEFT["33UUP"], 0, -20, TOP]
    day = DAYS.index("2021-04-10")
    red = true_reflectance("2021-04-10", "B04").reshape(SIZE // 2, 2, SIZE // 2, 2).mean((1, 3))
    assert np.abs(coarse.bands[day, ..., 0] - red).max() <= 0.5
    np.testing.assert_array_equal(coarse.bands[day, ..., 1], true_reflectance("2021-04-10", "B11"))
    np.testing.assert_array_equal(coarse.masks[day], np.isin(true_classes("2021-04-10"), (4, 5)))


def bbox_of(left, top, right, bottom):
    """bbox of a rectangle in metres from the corner of 33UUP, to the south and east."""
    x, y = [LEFT["33UUP"] + left, LEFT["33UUP"] + right], [TOP - bottom, TOP - top]
    west, south = (value[0] for value in rasterio.warp.transform(CRS, "EPSG:4326", x[:1], y[:1]))
    east, north = (value[0] for value in rasterio.warp.transform(CRS, "EPSG:4326", x[1:], y[1:]))
    return f"{west},{south},{east},{north}"


def test_a_place_in_one_tile_is_made_of_one_tile(world, tmp_path, capsys):
    """33UVP covers the eastern edge of 33UUP: no second tile of the same ground."""
    keys = {"mgrs_tile": "", "bands": "B04"}
    inside = bbox_of(2200, 300, 2350, 500)
    made = prepare(tmp_path / "a", world, bbox=inside, **keys)
    assert [tile.name for tile in made] == ["MGRS-33UUP"]
    assert "MGRS-33UVP: not made, its part of bbox is covered" in capsys.readouterr().out
    across = bbox_of(2000, 300, 2600, 500)
    made = prepare(tmp_path / "b", world, bbox=across, **keys)
    assert sorted(tile.name for tile in made) == ["MGRS-33UUP", "MGRS-33UVP"]


def test_a_place_in_two_zones_is_made_of_one_tile(monkeypatch):
    """Each tile holds the bbox, and neither holds the other, whose rectangle lies askew."""
    box = geometry.box(11.95, 48.60, 12.05, 48.66, "EPSG:4326")
    grids = [GeoBox.from_geopolygon(box.to_crs(f"EPSG:{zone}"), 10) for zone in (32632, 32633)]
    monkeypatch.setattr(plan, "tile_grid", lambda days, request: grids.pop())
    config = prepare_tiles.run_config | {"bbox": "11.95,48.60,12.05,48.66"}
    chosen = {"32UQU": {}, "33UUP": {}}
    assert len(plan.make_plans(chosen, plan.parse_request(config))) == 1


# ---- other sources -------------------------------------------------------------------------------


def test_a_saved_search_gives_the_same_tile(world, tmp_path, made):
    path = write_collection(tmp_path / "collection.json", world.items)
    (tile,) = prepare(tmp_path, items_path=str(path), bands="B11,B04")
    np.testing.assert_array_equal(tile.bands, made.bands[..., [8, 0]])
    np.testing.assert_array_equal(tile.masks, made.masks)


# ---- stops and faults ----------------------------------------------------------------------------


def script(*arguments, **keywords):
    command = [sys.executable, str(ROOT / "prepare_tiles.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **keywords
    )


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_a_kill_and_a_second_run_give_the_same_bytes(world, tmp_path, made):
    arguments = [f"{key}={value}" for key, value in settings(tmp_path, world, threads=1).items()]
    processed = tmp_path / "data" / "sentinel2" / "processed"
    progress = processed / ".MGRS-33UUP.part" / "progress.json"
    world.server.delay = 0.02
    first = script(*arguments)
    while first.poll() is None:
        if progress.exists() and len(json.loads(progress.read_text())["done"]) >= 3:
            first.send_signal(signal.SIGKILL)
            break
        time.sleep(0.01)
    first.communicate()
    world.server.delay = 0
    assert first.returncode == -signal.SIGKILL and not (processed / "MGRS-33UUP").exists()

    done = json.loads(progress.read_text())["done"]
    assert 3 <= len(done) < len(DAYS)
    world.server.seen.clear()
    second = script(*arguments)
    output, errors = second.communicate()
    assert second.returncode == 0, errors
    fetched = {path.split("/")[1] for path in world.server.seen}
    for name, (day, _, _) in SCENES.items():
        if day in done and name != "S2A_33UUP_20210110_0_L2A":  # whose grid is looked at
            assert name not in fetched
    assert files_of(processed / "MGRS-33UUP") == files_of(made.path)
    assert not list(processed.glob(".*"))


def test_a_tile_that_is_done_stays(world, made, capsys):
    before = files_of(made.path)
    keys = {"base_path": made.path.parents[3], "world": world}
    prepare(**keys)
    assert "done already" in capsys.readouterr().out
    with pytest.raises(InputError, match="was made with another clear_scl; wanted .* overwrite"):
        prepare(clear_scl="4,5", **keys)
    assert files_of(made.path) == before


def test_a_changed_catalogue_does_not_change_a_tile_that_was_begun(world, tmp_path, made, fresh):
    broken = "/S2A_33UUP_20210606_0_L2A/B12.tif"
    world.server.faults[broken] = 10**6
    with pytest.raises(InputError, match="asset B12 cannot be read"):
        prepare(tmp_path, retries=0, bands="B04,B12", **fresh)
    world.server.faults.clear()
    items = json.loads((tmp_path / "items.json").read_text())["features"]
    write_collection(tmp_path / "collection.json", items[:4])
    (tile,) = prepare(tmp_path, bands="B04,B12", **fresh)
    assert tile.info["dates"] == DAYS
    np.testing.assert_array_equal(tile.bands, made.bands[..., [0, 9]])


def test_an_asset_that_fails_twice_is_read_in_the_end(world, tmp_path, fresh, no_waiting):
    broken = ["/S2A_33UUP_20210410_0_L2A/SCL.tif", "/S2A_33UUP_20210606_0_L2A/B04.tif"]
    for path in broken:
        world.server.faults[path] = 2
    (tile,) = prepare(tmp_path, bands="B04", **fresh)
    assert all(world.server.faults[path] == 0 for path in broken)
    for index, day in enumerate(DAYS):
        bands, clear = truth(day, ["B04"])
        np.testing.assert_array_equal(tile.bands[index], bands)
        np.testing.assert_array_equal(tile.masks[index], clear)


def test_no_date_is_left_out_for_an_outage(world, tmp_path, fresh, no_waiting):
    """Regression: skip_bad_items=true made a finished tile with an empty date."""
    path = "/S2A_33UUP_20210606_0_L2A/B04.tif"
    world.server.faults[path] = 1_000_000
    keys = {"bands": "B04", "skip_bad_items": True, "retries": 1, **fresh}
    with pytest.raises(InputError, match="asset B04 cannot be read .* wanted a network that works"):
        prepare(tmp_path, **keys)
    world.server.faults[path] = 0
    (tile,) = prepare(tmp_path, **keys)
    assert tile.info["left_out"] == {}
    np.testing.assert_array_equal(tile.masks[DAYS.index("2021-06-06")], truth("2021-06-06")[1])


def test_an_asset_that_is_not_there_is_asked_for_once(world, tmp_path, fresh):
    """A second attempt does not bring a file back; and a date like 20210404 is no 404."""
    path = world.folder / "S2A_33UUP_20210606_0_L2A" / "B03.tif"
    path.rename(path.with_suffix(".gone"))
    try:
        with pytest.raises(InputError, match="asset B03 cannot be read .*404; 1 attempts"):
            prepare(tmp_path, bands="B03", **fresh)
    finally:
        path.with_suffix(".gone").rename(path)
    assert not pixels._blame("'/vsicurl/http://host/20210404/B03.tif' not recognized")


@pytest.fixture
def truncated(world, tmp_path):
    """A saved search among whose scenes one has a file that ends in the middle."""
    server = FileServer(tmp_path)
    path = "S2A_33UUP_20210410_0_L2A/B8A.tif"
    shutil.copytree(world.folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / path).write_bytes((world.folder / path).read_bytes()[:4000])
    items = json.loads(json.dumps(world.items).replace(world.server.url, server.url))
    yield write_collection(tmp_path / "collection.json", items)
    server.shutdown()


def test_a_truncated_asset_is_named(tmp_path, truncated, no_waiting):
    keys = {"items_path": str(truncated), "bands": "B8A,B04"}
    with pytest.raises(InputError, match=r"S2A_33UUP_20210410_0_L2A: asset B8A .*3 attempts") as e:
        prepare(tmp_path, **keys)
    assert "\n" not in str(e.value)
    processed = tmp_path / "data" / "sentinel2" / "processed"
    assert not (processed / "MGRS-33UUP").exists()

    (tile,) = prepare(tmp_path, skip_bad_items=True, **keys)  # resumes there
    assert list(tile.info["left_out"]) == ["S2A_33UUP_20210410_0_L2A"]
    for index, day in enumerate(DAYS):
        bands, clear = truth(day, ["B8A", "B04"])
        left_out = day == "2021-04-10"
        np.testing.assert_array_equal(tile.bands[index], 0 if left_out else bands)
        np.testing.assert_array_equal(tile.masks[index], 0 if left_out else clear)


def test_the_first_date_may_be_the_bad_one(world, tmp_path, no_waiting):
    """Regression: its grid was read before anything could be left out."""
    items = json.loads(json.dumps(world.items))
    for asset in items[0]["assets"].values():
        asset["href"] = asset["href"].replace(".tif", ".gone.tif")
    path = write_collection(tmp_path / "collection.json", items)
    (tile,) = prepare(tmp_path, items_path=str(path), bands="B04", skip_bad_items=True)
    assert list(tile.info["left_out"]) == [items[0]["id"]]


def without(items, *names):
    """Copies of the items, which lack some assets."""
    items = json.loads(json.dumps(items))
    for item in items:
        item["assets"] = {key: a for key, a in item["assets"].items() if key not in names}
    return items


@pytest.mark.parametrize(
    ("change", "keys", "message"),
    [
        (lambda items: without(items, "scl", "SCL"), {}, "found the assets .* wanted SCL too"),
        (lambda items: without(items, "red", "B04"), {}, "found the assets .* wanted B04 too"),
        (lambda items: [], {}, "found no item to use among 0"),
        (
            lambda items: items,
            {"year": "2019"},
            "found no item to use among 15 .*13 of other dates",
        ),
        (lambda items: items, {"mgrs_tile": "31TCJ"}, "15 of another tile"),
        (lambda items: items, {"max_cloud_cover": 1.0}, "12 too cloudy"),
        (lambda items: items, {"year": "21"}, "year=21: wanted a year"),
        (lambda items: items, {"year": "0000"}, "year=0000: wanted a year"),
        (lambda items: items, {"skip_items": "S2A_typo"}, "skip_items: found S2A_typo, wanted ids"),
        (lambda items: items, {"bands": "B04,B99"}, "bands=B04,B99: wanted"),
        (lambda items: items, {"clear_scl": "0,4"}, "clear_scl=0,4: wanted classes 1 to 11"),
        (lambda items: items, {"bbox": "1,2,3"}, "bbox=1,2,3: wanted west,south,east,north"),
        (lambda items: items, {"bbox": "100,1,101,2"}, "found no pixel of the items' tiles"),
        (lambda items: items, {"resampling": "magic"}, "resampling=magic: wanted one of"),
        (lambda items: items, {"offset": "maybe"}, "offset=maybe: wanted one of"),
        (lambda items: items, {"stride": 0}, "stride=0: wanted 1 to 1000"),
        (lambda items: items, {"splits": "blocks"}, "found no labels, wanted labels="),
        (lambda items: items, {"labels": "nowhere.tif"}, "labels=nowhere.tif: found no file"),
    ],
)
def test_mistakes_end_in_one_line(world, tmp_path, change, keys, message):
    path = write_collection(tmp_path / "collection.json", change(world.items))
    with pytest.raises(InputError, match=message) as error:
        prepare(tmp_path, items_path=str(path), **keys)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("data/*/processed/*/bands.npy"))


def test_bad_items_can_be_left_out(world, tmp_path, capsys):
    items = without(world.items[:3], "scl") + without(world.items[3:], "nothing")
    path = write_collection(tmp_path / "collection.json", items)
    (tile,) = prepare(tmp_path, items_path=str(path), bands="B04", skip_bad_items=True)
    assert tile.info["dates"] == DAYS[3:]
    assert "3 bad" in capsys.readouterr().out


def test_a_year_without_a_clear_pixel_ends_in_one_line(world, tmp_path):
    with pytest.raises(InputError, match="found no clear observation on any date"):
        prepare(tmp_path, world, bands="B04", clear_scl="11")


def test_a_page_that_is_no_catalogue_ends_in_one_line(world, tmp_path):
    (world.folder / "index.html").write_text("<html>hello</html>")
    url = f"{world.server.url}/index.html"
    with pytest.raises(InputError, match="the search failed"):
        prepare(tmp_path, stac_url=url)


def test_a_full_disk_is_found_before_anything_is_fetched(world, tmp_path, fresh, monkeypatch):
    def full(handle, start, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    world.server.seen.clear()
    with pytest.raises(InputError, match="bands.npy: could not be written: disk full .* missing"):
        prepare(tmp_path, **fresh)
    assert list(world.server.seen) == ["/S2A_33UUP_20210110_0_L2A/B02.tif"]  # the grid


def test_two_processes_do_not_make_one_tile(world, tmp_path):
    part = tmp_path / "data" / "sentinel2" / "processed" / ".MGRS-33UUP.part"
    part.mkdir(parents=True)
    with lock_folder(part), pytest.raises(InputError, match="another run that writes there"):
        prepare(tmp_path, world)
