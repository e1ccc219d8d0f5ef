"""From a catalogue on loopback to tiles: the truth pixel by pixel, stops, faults, labels, maps."""

import json
import shutil
import signal
import subprocess
import sys
from datetime import date
from types import SimpleNamespace

import numpy as np
import pystac
import pytest
import rasterio
from conftest import ROOT
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
    write_cog,
    write_collection,
)

import prepare_tiles
import sentinel2
import sources
import tile_builder
from runtime import InputError
from tiles import Tile

pytestmark = [  # of libraries that we cannot change
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]
WEST, EAST = (0, 150), (120, SIZE)  # columns of two scenes of one datatake
OLD = {"s2__processing_baseline": "02.14", "earthsearch__boa_offset_applied": False}
RAW = {"s2__processing_baseline": "04.00", "earthsearch__boa_offset_applied": False}
DONE = {"s2__processing_baseline": "04.00", "earthsearch__boa_offset_applied": True}
SCENES = {  # id: day, whether its numbers are shifted, and what make_scene takes
    "S2A_33UUP_20210110_0_L2A": ("2021-01-10", False, OLD),
    "S2A_33UUP_20210311_0_L2A": ("2021-03-11", True, RAW),
    "S2A_33UUP_20210410_0_L2A": ("2021-04-10", False, DONE),
    "S2B_MSIL2A_20210505T101031_R022_T33UUP_20210505T1": (  # named as by Planetary Computer
        "2021-05-05",
        True,
        {"s2__processing_baseline": "05.00"},
    ),
    "S2A_33UUP_20210606_0_L2A": (
        "2021-06-06",
        False,
        DONE | {"s2__processing_baseline": "05.00"},
    ),
    "S2A_33UUP_20210701_0_L2A": ("2021-07-01", True, RAW | {"covers": WEST}),
    "S2A_33UUP_20210701_1_L2A": ("2021-07-01", True, RAW | {"covers": EAST}),
    "S2A_33UUP_20210805_0_L2A": ("2021-08-05", False, DONE | {"covers": (0, 120)}),
    # reprocessed: the older baseline shows another day, to be told from the newer one
    "S2A_33UUP_20210907_0_L2A": ("2021-09-07", False, OLD | {"shows": "2021-09-08"}),
    "S2A_33UUP_20210907_1_L2A": ("2021-09-07", True, RAW | {"s2__processing_baseline": "05.00"}),
    "S2A_33UUP_20211002_0_L2A": ("2021-10-02", True, RAW | {"eo__cloud_cover": 95}),
    "S2A_33UUP_20211231_0_L2A": ("2021-12-31", True, RAW),
    "S2A_33UUP_20220104_0_L2A": ("2022-01-04", True, RAW),
    "S2A_33UVP_20210311_0_L2A": ("2021-03-11", True, RAW | {"tile": "33UVP"}),
    "S2A_33UVP_20210606_0_L2A": ("2021-06-06", False, DONE | {"tile": "33UVP"}),
}
DAYS = ["2021-01-10", "2021-03-11", "2021-04-10", "2021-05-05", "2021-06-06"]
DAYS += ["2021-07-01", "2021-08-05", "2021-09-07", "2021-12-31"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The scenes on a file server, and the catalogue that tells of them."""
    folder = tmp_path_factory.mktemp("world")
    server = FileServer(folder)
    items = [
        make_scene(folder, server.url, name, day, shifted=shifted, **told)
        for name, (day, shifted, told) in SCENES.items()
    ]
    catalogue = Catalogue(folder, items[::-1] + items[:1])  # unsorted, and one told twice
    yield SimpleNamespace(server=server, folder=folder, items=items, url=catalogue.url)
    catalogue.stop()
    server.shutdown()


@pytest.fixture(autouse=True, scope="module")
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_builder, "BLOCK", 128)  # so that a tile has four
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
    monkeypatch.setattr(sources, "PAUSE", 0.001)


def settings(base_path, world=None, **changes):
    config = prepare_tiles.run_config | {"base_path": str(base_path), "mgrs_tile": "33UUP"}
    config |= {"stac_url": world.url} if world else {}
    return config | {"retries": 2, "threads": 2} | changes


def prepare(base_path, world=None, **changes):
    """Run prepare_tiles.py; returns the tiles."""
    return [Tile(folder) for folder in prepare_tiles.main(settings(base_path, world, **changes))]


def fill(array):
    """An array of a band's own pixels in 10 m pixels."""
    return np.kron(array, np.ones((SIZE // len(array),) * 2, array.dtype))


def truth(day, bands=sentinel2.TESSERA_BANDS, tile="33UUP"):
    """Bands and mask of a day at 10 m, as they should come out."""
    covered = np.ones((SIZE, SIZE), bool)
    if day == "2021-08-05":
        covered[:, 120:] = False
    values = np.stack([fill(true_reflectance(day, band, tile)) for band in bands], -1)
    clear = np.isin(fill(true_classes(day, tile)), (4, 5)) & covered
    return values * covered[..., None].astype(np.uint16), clear


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


def test_tile_json_tells_place_and_origin(made):
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
    assert origins["2021-01-10"][0]["baseline"] == "02.14"


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
        else:  # in between its neighbours', the same on both sides of a block's border
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
    west, north = rasterio.warp.transform(CRS, "EPSG:4326", [LEFT["33UUP"] + 605], [TOP - 705])
    east, south = rasterio.warp.transform(CRS, "EPSG:4326", [LEFT["33UUP"] + 1500], [TOP - 1700])
    bbox = f"{west[0]},{south[0]},{east[0]},{north[0]}"
    (part,) = prepare(tmp_path / "a", world, bbox=bbox)
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


def test_overviews_are_never_read(tmp_path):
    """Averaged classes are classes of nothing: 4 and 9 give 7, unclassified."""
    classes = np.tile(np.array([[4, 9], [9, 4]], np.uint8), (600, 600))
    write_cog(tmp_path / "SCL.tif", classes, 20, overview_resampling="AVERAGE", blocksize=128)
    with rasterio.open(tmp_path / "SCL.tif") as file:
        assert file.overviews(1) and 7 in file.read(1, out_shape=(600, 600))
    item = pystac.Item("x", None, None, a_moment(), {})
    item.add_asset("SCL", pystac.Asset(str(tmp_path / "SCL.tif")))
    grid = sources.source_grid(item, "SCL", 0)
    found = sources.read_band(item, "SCL", grid.zoom_to(resolution=80), "nearest", 0)
    assert found.shape == (300, 300) and set(np.unique(found)) <= {4, 9}


def a_moment():
    return pystac.utils.str_to_datetime("2021-06-05T10:00:00Z")


@pytest.mark.parametrize(
    ("told", "setting", "wanted"),
    [
        ({"s2:processing_baseline": "02.14"}, "auto", 0),
        ({"s2:processing_baseline": "03.01"}, "raw", 0),
        ({"s2:processing_baseline": "04.00"}, "auto", 1000),
        ({"s2:processing_baseline": "05.11"}, "auto", 1000),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": True}, "auto", 0),
        ({"s2:processing_baseline": "04.00", "sentinel:boa_offset_applied": True}, "auto", 0),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": True}, "raw", 1000),
        ({"s2:processing_baseline": "04.00"}, "applied", 0),
        ({"processing:version": "05.09"}, "auto", 1000),
        ({"s2:product_uri": "S2A_MSIL2A_20180605T1_N0500_R022_T33UUP_2.SAFE"}, "auto", 1000),
        ({"s2:datatake_id": "GS2A_20231107T144731_043751_N02.12"}, "auto", 0),
        ({}, "raw", 1000),
        ({}, "applied", 0),
    ],
)
def test_offset_is_told_by_baseline_and_provider(told, setting, wanted):
    item = pystac.Item("S2A_33UUP_20230605_0_L2A", None, None, a_moment(), told)
    assert sentinel2.offset_of(item, setting) == wanted


def test_offset_keeps_nodata_and_stays_above_it():
    numbers = np.array([0, 1, 999, 1000, 1001, 1002, 65535], np.uint16)
    found = sentinel2.to_reflectance(numbers, 1000)
    assert found.dtype == np.uint16 and found.tolist() == [0, 1, 1, 1, 1, 2, 64535]


def test_solar_day_is_the_tiles_own():
    def item(tile, moment):
        told = {"grid:code": f"MGRS-{tile}"}
        return pystac.Item("x", None, None, pystac.utils.str_to_datetime(moment), told)

    assert str(sentinel2.solar_date(item("60HTE", "2021-06-04T22:30:00Z"))) == "2021-06-05"
    assert str(sentinel2.solar_date(item("01KAB", "2021-06-05T22:30:00Z"))) == "2021-06-05"
    assert str(sentinel2.solar_date(item("33UUP", "2021-06-05T10:00:00Z"))) == "2021-06-05"


# ---- other sources -------------------------------------------------------------------------------


def test_a_saved_search_gives_the_same_tile(world, tmp_path, made):
    path = write_collection(tmp_path / "collection.json", world.items)
    (tile,) = prepare(tmp_path, items_path=str(path), bands="B11,B04")
    np.testing.assert_array_equal(tile.bands, made.bands[..., [8, 0]])
    np.testing.assert_array_equal(tile.masks, made.masks)


@pytest.mark.parametrize("mask", ["SCL", "MASK"])
def test_a_folder_of_geotiffs(tmp_path, mask):
    folder, days = tmp_path / "hill", ["2021-04-10", "2021-06-06"]
    folder.mkdir()
    for day in days:
        bands, clear = truth(day, ["B04", "B8A"])
        last = fill(true_classes(day)) if mask == "SCL" else clear
        with rasterio.open(
            folder / f"scene_{day.replace('-', '')}.tif",
            "w",
            driver="GTiff",
            height=SIZE,
            width=SIZE,
            count=3,
            dtype="uint16",
            crs=CRS,
            transform=rasterio.Affine(10, 0, LEFT["33UUP"], 0, -10, TOP),
        ) as file:
            file.write(np.stack([bands[..., 0] + 1000, bands[..., 1] + 1000, last]))
            file.descriptions = ("B04", "B8A", mask)
    keys = {"local_path": str(folder), "mgrs_tile": "", "bands": "B8A,B04"}
    with pytest.raises(InputError, match="found no processing baseline, wanted .* offset=applied"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, offset="raw", **keys)
    assert tile.name == "MGRS-hill" and tile.info["dates"] == days
    for index, day in enumerate(days):
        bands, clear = truth(day, ["B8A", "B04"])
        np.testing.assert_array_equal(tile.bands[index], bands)
        np.testing.assert_array_equal(tile.masks[index], clear)


def test_safe_folders(tmp_path):
    day, name = "2021-06-06", "S2A_MSIL2A_20210606T101031_N0500_R022_T33UUP_20230118T013017.SAFE"
    for band in ("B04", "B11", "SCL"):
        pixel = 20 if band == "SCL" else pixel_size(band)
        images = tmp_path / "in" / name / "GRANULE" / "L2A_T33UUP" / "IMG_DATA" / f"R{pixel}m"
        images.mkdir(parents=True, exist_ok=True)
        array = true_classes(day) if band == "SCL" else true_reflectance(day, band) + 1000
        lossless = {"REVERSIBLE": "YES", "QUALITY": 100}
        path = images / f"T33UUP_20210606T101031_{band}_{pixel}m.jp2"
        write_cog(path, array, pixel, driver="JP2OpenJPEG", compress=None, nodata=None, **lossless)
    (tile,) = prepare(tmp_path, local_path=str(tmp_path / "in"), bands="B04,B11")
    bands, clear = truth(day, ["B04", "B11"])
    np.testing.assert_array_equal(tile.bands[0], bands)
    np.testing.assert_array_equal(tile.masks[0], clear)
    assert tile.info["items"][day][0]["offset_subtracted"] == 1000


# ---- stops and faults ----------------------------------------------------------------------------


def script(*arguments, **keywords):
    command = [sys.executable, str(ROOT / "prepare_tiles.py"), *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, **keywords
    )


def files_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


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

    (tile,) = prepare(tmp_path, skip_bad_items=True, **keys)  # goes on from there
    assert list(tile.info["left_out"]) == ["S2A_33UUP_20210410_0_L2A"]
    for index, day in enumerate(DAYS):
        bands, clear = truth(day, ["B8A", "B04"])
        left_out = day == "2021-04-10"
        np.testing.assert_array_equal(tile.bands[index], 0 if left_out else bands)
        np.testing.assert_array_equal(tile.masks[index], 0 if left_out else clear)


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


def test_sources_that_are_none_end_in_one_line(tmp_path):
    (tmp_path / "text.json").write_text("hello")
    for keys, message in [
        ({"items_path": str(tmp_path / "none.json")}, "found no file, wanted an ItemCollection"),
        ({"items_path": str(tmp_path / "text.json")}, "found no ItemCollection"),
        ({"local_path": str(tmp_path / "none")}, "found no folder"),
        ({"local_path": str(tmp_path)}, "found no .tif and no .SAFE"),
        ({"stac_url": "http://127.0.0.1:9", "retries": 0}, "the search failed"),
        ({"mgrs_tile": "hello"}, "mgrs_tile=HELLO: wanted a tile like 33UUP"),
        ({"mgrs_tile": ""}, "mgrs_tile: found none"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            prepare(tmp_path, **keys)
        assert "\n" not in str(error.value)


def test_a_page_that_is_no_catalogue_ends_in_one_line(world, tmp_path):
    (world.folder / "index.html").write_text("<html>hello</html>")
    url = f"{world.server.url}/index.html"
    with pytest.raises(InputError, match="the search failed"):
        prepare(tmp_path, stac_url=url)


def test_a_full_disk_is_found_before_anything_is_fetched(world, tmp_path, fresh, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    world.server.seen.clear()
    with pytest.raises(InputError, match=r"bands.npy: found 0.0 GB free, wanted 0.0 GB"):
        prepare(tmp_path, **fresh)
    assert list(world.server.seen) == ["/S2A_33UUP_20210110_0_L2A/B02.tif"]  # the grid


def test_two_processes_do_not_make_one_tile(world, tmp_path):
    part = tmp_path / "data" / "sentinel2" / "processed" / ".MGRS-33UUP.part"
    with tile_builder.locked(part), pytest.raises(InputError, match="another process is making"):
        prepare(tmp_path, world)


def test_without_its_requirements_one_line_tells_what_to_install(tmp_path):
    code = (
        "import sys\n"
        "for name in ('pystac', 'pystac_client', 'odc', 'geopandas', 'mgrs', 'pyogrio'):\n"
        "    sys.modules[name] = None\n"
        "import prepare_tiles, runtime\n"
        "sys.argv[1:] = ['mgrs_tile=33UUP', 'base_path=' + sys.argv[1]]\n"
        "runtime.run_script(prepare_tiles.main, prepare_tiles.run_config, '')\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 1 and len(lines) == 1
    assert lines[0].endswith("not installed, wanted pip install -r requirements-prepare.txt")
