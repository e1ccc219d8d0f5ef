"""GeoTIFFs of one's own: files of all bands or of one, names, masks, units, and what is refused."""

import json
import re

from running.errors import InputError

import numpy as np
import pytest
import rasterio
from scenes import prepare
from small_scenes import EDGE, local_item, values, write_raster
from stac_server import CRS, LEFT, TOP

import prepare_tiles
from preparation import builder, local_files, plan, sentinel2

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """Half of the time of these small tiles; test_prepare_maps.py has it drawn."""
    monkeypatch.setattr(prepare_tiles, "plot_quick_look", lambda folder: None)


DAYS = ["2018-04-15", "2018-06-04", "2018-09-02"]
BANDS = ["B02", "B04", "B8A"]
NODATA = -9999
NAMES = (*BANDS, "SCL")


def truth(day):
    """Reflectance x 10000 (h, w, 3) of a day with a gap of nodata, and its scene classes."""
    seed = DAYS.index(day)
    bands = np.stack([values(10 * seed + i) for i in range(3)], -1)
    bands[seed, :5] = NODATA
    classes = np.random.default_rng(seed).choice([4, 5, 8, 9], (EDGE, EDGE))
    return bands, classes


def arrays(day):
    bands, classes = truth(day)
    return [*np.moveaxis(bands, -1, 0), classes]


def write(path, *layers, **options):
    """A file of int16 whose nodata is -9999, as people have them."""
    return write_raster(path, *layers, **{"dtype": "int16", "nodata": NODATA} | options)


def write_stacks(folder, day, **options):
    write(folder / f"farm_{day}.tif", *arrays(day), **{"names": NAMES} | options)


def write_bands(folder, day, name="T33UUP_{time}_{band}_10m.tif"):
    """A file for each band; name: its path, from day, time (20180415T105031) and band."""
    time = f"{day.replace('-', '')}T105031"
    for band, layer in zip(NAMES, arrays(day), strict=True):
        write(folder / name.format(day=day, time=time, band=band), layer)


def make(base, keys=None, **more):
    """The tile of the GeoTIFFs in base/farm."""
    wanted = {"local_path": str(base / "farm"), "mgrs_tile": "", "year": "2018"}
    wanted |= {"bands": ",".join(BANDS), "offset": "applied"}
    (tile,) = prepare(base, **wanted | (keys or {}) | more)
    return tile


def check(tile, clear_classes=(4, 5)):
    """Compare a tile with the arrays that were written; no classes: all data is clear."""
    assert tile.info["dates"] == DAYS and tile.info["bands"] == BANDS
    assert tile.info["crs"] == CRS
    assert tile.info["transform"] == [10, 0, LEFT["33UUP"], 0, -10, TOP]
    assert tile.doys.tolist() == [105, 155, 245]
    for index, day in enumerate(DAYS):
        bands, classes = truth(day)
        has_data = (bands > 0).all(-1)
        np.testing.assert_array_equal(tile.bands[index], np.where(has_data[..., None], bands, 0))
        clear = has_data & (np.isin(classes, clear_classes) | (not clear_classes))
        np.testing.assert_array_equal(tile.masks[index], clear)
    seen = tile.bands[tile.masks == 1]
    np.testing.assert_allclose(tile.band_mean, seen.mean(0), rtol=1e-6)
    np.testing.assert_allclose(tile.band_std, seen.std(0), rtol=1e-5)


# ---- one file a date, or one a date and band -----------------------------------------------------


FORMS = {  # name: what writes a day, its keyword, and keys of prepare_tiles.py
    "a file a date": (write_stacks, {}, {}),
    "local_bands": (write_stacks, {"names": ()}, {"local_bands": "B02,b4,B8A,scl"}),
    "other names": (write_stacks, {"names": ("blue", "B4", "S2 B8A_20m", "SCL")}, {}),
    "a file a band": (write_bands, {}, {}),
    "short names": (write_bands, {"name": "{day}_{band}.TIF"}, {}),
    "folders of dates": (write_bands, {"name": "{day}/{band}.tif"}, {}),
    "folders of bands": (write_bands, {"name": "{band}/{time}.tif"}, {}),
    "as unzipped": (write_bands, {"name": "{time}/IMG/R10m/{band}_10m.tiff"}, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_the_same_data_give_the_same_tile(tmp_path, form):
    write_form, options, keys = FORMS[form]
    for day in DAYS:
        write_form(tmp_path / "farm", day, **options)
    tile = make(tmp_path, keys)
    check(tile)
    assert tile.name == ("MGRS-33UUP" if form == "a file a band" else "MGRS-farm")


def test_a_stack_and_a_mask_beside_it_are_joined(tmp_path):
    for day in DAYS:
        *bands, classes = arrays(day)
        write(tmp_path / "farm" / f"{day}.tif", *bands, names=BANDS)
        write(tmp_path / "farm" / f"{day}_SCL.tif", classes)
    check(make(tmp_path, clear_scl="4"), clear_classes=(4,))


def test_bands_of_20_and_60_metres_are_resampled_to_10(tmp_path):
    """And of a band with several pixel sizes the finest is taken."""
    folder, place = tmp_path / "farm", {}
    for pixel in (10, 20, 60):
        place[pixel] = rasterio.Affine(pixel, 0, LEFT["33UUP"], 0, -pixel, TOP)
    for band, pixel, layer in (
        ("B04", 20, values(1, 24)),
        ("B04", 10, values(2, 48)),
        ("B11", 20, values(3, 24)),
        ("B09", 60, values(4, 8)),
        ("SCL", 20, np.full((24, 24), 4)),
    ):
        name = f"R{pixel}m/T33UUP_20180415T105031_{band}_{pixel}m.tif"
        write(folder / name, layer, transform=place[pixel])
    tile = make(tmp_path, bands="B04,B11,B09")
    wanted = [values(2, 48), np.kron(values(3, 24), np.ones((2, 2), int))]
    wanted.append(np.kron(values(4, 8), np.ones((6, 6), int)))
    np.testing.assert_array_equal(tile.bands[0], np.stack(wanted, -1))
    assert tile.masks.all()


def test_files_of_no_band_are_not_read_and_reported(tmp_path, capsys):
    for day in DAYS:
        write_bands(tmp_path / "farm", day)
        write_raster(tmp_path / "farm" / f"T33UUP_{day}_TCI_10m.tif", *[values()] * 3)
        write(tmp_path / "farm" / f"{day}_cloud_mask.tif", np.ones((EDGE, EDGE)))  # 1 is cloud
    check(make(tmp_path))
    out = capsys.readouterr().out
    assert "farm: 18 files, 2018-04-15 to 2018-09-02, with B02, B04, B8A, SCL" in out
    assert "not read: 6 files that name no band, like " in out and "found 3 scenes" in out


def test_two_files_of_all_bands_are_two_scenes_of_their_date(tmp_path):
    west, east = (np.where(np.arange(EDGE) < 12, values(), 0), values())
    full = np.full((EDGE, EDGE), 4)
    for name, layer in (("a", west), ("b", east)):
        classes = np.where(layer, full, 0)
        write_raster(tmp_path / f"farm/{name}_20180415.tif", *[layer] * 3, classes, names=NAMES)
    tile = make(tmp_path)
    assert tile.shape[0] == 1 and tile.masks.all()
    np.testing.assert_array_equal(tile.bands[0, ..., 1], values())


@pytest.mark.parametrize(
    ("texts", "day"),
    [
        (("2018-04-15_B04",), "2018-04-15"),
        (("B04_20180415",), "2018-04-15"),
        (("T31UES_20180415T105031_B04_10m",), "2018-04-15"),
        (("S2_2018_04_15_B04",), "2018-04-15"),
        (("2018.04.15",), "2018-04-15"),
        (("B04_2018105",), "2018-04-15"),
        (("B04_2018-105",), "2018-04-15"),
        (("B04", "2018105"), "2018-04-15"),
        (("B04_2018105", "2018-06-04"), "2018-06-04"),  # a number, and a date
        (("B04_2018105_2018106",), None),
        (("B04_2018367",), None),
        (("B04_1234567",), None),
        (("B04_2018_13_40",), None),
        (("B04",), None),
    ],
)
def test_dates_in_names(texts, day):
    found = local_files.day_in(texts)
    assert (str(found.date()) if found else None) == day


@pytest.mark.parametrize(
    ("text", "band"),
    [
        ("T31UES_20180415T105031_B04_10m", "B04"),
        ("SENTINEL2A_20180415-105031-463_L2A_T31UES_C_V1-7_FRE_B4", "B04"),
        ("b8a", "B8A"),
        ("2018-04-15_red", "B04"),
        ("nir08", "B8A"),
        ("2018-04-15-scl", "SCL"),
        ("2018-04-15_MASK", "MASK"),
        ("2018-04-15_cloud_mask", ""),
        ("red_edge_1", ""),
        ("2018-04-15_narrow_nir", ""),
        ("B04_SCL", ""),
        ("B10", ""),
        ("B99", ""),
        ("20180415_TCI_10m", ""),
    ],
)
def test_bands_in_names(text, band):
    assert local_files.band_in(text) == band


# ---- what is clear -------------------------------------------------------------------------------


def test_a_mask_may_be_a_file_or_a_band(tmp_path):
    for day in DAYS:
        *bands, classes = arrays(day)
        clear = np.isin(classes, (4, 5))
        one, two = (tmp_path / form / "farm" for form in ("one", "two"))
        write(one / f"{day}.tif", *bands, clear, names=[*BANDS, "MASK"])
        write(two / f"{day}.tif", *bands, names=BANDS)
        write_raster(two / f"{day}_mask.tif", clear, dtype="uint8")
    check(make(tmp_path / "one"))
    check(make(tmp_path / "two"))


def test_of_two_masks_one_may_be_chosen(tmp_path):
    for day in DAYS:
        write_bands(tmp_path / "farm", day)
        write(tmp_path / "farm" / f"T33UUP_{day}_MASK.tif", truth(day)[1] == 9)
    check(make(tmp_path, local_mask="MASK"), clear_classes=(9,))
    check(make(tmp_path, dataset_name="scl"))
    with pytest.raises(InputError, match="was made with another local_mask"):
        make(tmp_path)


def test_without_a_mask_all_data_is_clear_if_that_is_wanted(tmp_path, capsys):
    for day in DAYS:
        write(tmp_path / "farm" / f"{day}.tif", *arrays(day)[:3], names=BANDS)
    message = r"2018-04-15: found the bands B02, B04, B8A, wanted SCL or MASK too \(local_mask=none"
    with pytest.raises(InputError, match=message):
        make(tmp_path)
    check(make(tmp_path, local_mask="none"), clear_classes=())
    assert "local_mask=none: every pixel with data counts as clear" in capsys.readouterr().out


def test_a_mask_of_other_values_names_its_file(tmp_path):
    for day in DAYS:
        write(tmp_path / "farm" / f"{day}.tif", *arrays(day)[:3], names=BANDS)
        write_raster(tmp_path / "farm" / f"{day}_MASK.tif", np.full((EDGE, EDGE), 7), dtype="uint8")
    with pytest.raises(
        InputError, match=r"MASK \(2018-\S+_MASK.tif\): found the value 7, wanted 0"
    ):
        make(tmp_path)


# ---- units ---------------------------------------------------------------------------------------


TENTHS = {"scales": 1e-4, "offsets": -0.1}
SCALED, LOCAL_SCALE = {"dtype": "int16", "scales": 1e-4}, {"local_scale": 10000.0}


@pytest.mark.parametrize(
    ("store", "options", "keys"),
    [
        (lambda x: x, {"dtype": "uint16", "nodata": 0}, {}),
        (lambda x: x, {"dtype": "int16"}, {}),
        (lambda x: x, {"dtype": "float32"}, {}),
        (lambda x: x / 1e4, {"dtype": "float32"}, LOCAL_SCALE),
        (lambda x: x / 1e4, {"dtype": "float64", "nodata": np.nan}, LOCAL_SCALE),
        (lambda x: x / 1e4, {"dtype": "float32", "scales": 0.5}, LOCAL_SCALE),
        (lambda x: x / 100, {"dtype": "float32"}, {"local_scale": 100.0}),
        (lambda x: x, SCALED, {}),
        (lambda x: x, SCALED, {"offset": "auto", "baseline": "02.06"}),
        (lambda x: x + 1000, SCALED | TENTHS, {"offset": "auto"}),
        (lambda x: x + 1000, {"dtype": "int16"}, {"offset": "raw"}),
    ],
)
@pytest.mark.parametrize("form", ["a file a date", "a file a band"])
def test_numbers_of_all_kinds_become_reflectance_x_10000(tmp_path, store, options, keys, form):
    keys, options, folder = dict(keys), {"nodata": NODATA} | options, tmp_path / "farm"
    baseline = keys.pop("baseline", "")
    for day in DAYS:
        *bands, classes = arrays(day)
        bands = [np.where(band == NODATA, options["nodata"], store(band)) for band in bands]
        paths = [write_raster(folder / f"{day}_SCL.tif", classes)]
        if form == "a file a date":
            paths.append(write_raster(folder / f"{day}.tif", *bands, names=BANDS, **options))
        else:
            for name, band in zip(BANDS, bands, strict=True):
                paths.append(write_raster(folder / f"{day}_{name}.tif", band, **options))
        for path in paths if baseline else []:
            with rasterio.open(path, "r+") as file:
                file.update_tags(PROCESSING_BASELINE=baseline)
    check(make(tmp_path, keys))


@pytest.mark.parametrize(
    ("factor", "keys", "message"),
    [
        (1e-4, {}, r"B02.tif: found B02 up to 0.399, wanted .* x 10000 \(local_scale=10000"),
        (1, LOCAL_SCALE, r"B02 from 3.01e\+06 on x local_scale=10000, wanted reflectance x 10000"),
        (1, {"local_scale": 1e-4}, "B02 up to 0.399 x local_scale=0.0001, wanted reflectance x"),
    ],
)
def test_numbers_that_are_no_reflectance_end_in_one_line(tmp_path, factor, keys, message):
    for band, layer in zip(NAMES, arrays(DAYS[0]), strict=True):
        stored = layer if band == "SCL" else np.where(layer == NODATA, 0, layer * factor)
        write(tmp_path / f"farm/{DAYS[0]}_{band}.tif", stored, dtype="float32")
    with pytest.raises(InputError, match=message) as error:
        make(tmp_path, keys)
    assert "\n" not in str(error.value)


# ---- messages ------------------------------------------------------------------------------------


def add(name, *layers, **options):
    return lambda folder: write(folder / name, *layers or [values()], **options)


def remove(name):
    return lambda folder: (folder / name).unlink()


AWAY = rasterio.Affine(5, 0, LEFT["33UUP"] + 5000, 0, -5, TOP)
NOTHING = add("2018-04-15_TCI.tif")
MISTAKES = [
    (NOTHING, {"offset": "auto"}, "found no processing baseline, wanted the tag PROCESSING_BASELI"),
    (NOTHING, {"offset": "auto"}, "offset=applied .the values are reflectance x 10000 already, no"),
    (NOTHING, {"offset": "auto"}, "offset=raw .the values still hold the 1000 .* it is subtracted"),
    (NOTHING, {"year": "2021"}, "none of its dates among 3 scenes of 2018-04-15 to 2018-09-02, wa"),
    (NOTHING, {"year": "2021"}, "wanted a year like year=2018"),
    (NOTHING, {"bands": "tessera"}, "found the bands B02, B04, B8A, SCL, wanted B03, .*B12 too"),
    (NOTHING, {"bands": "tessera"}, "too .bands=B02,B04,B8A takes what is there, skip_"),
    (NOTHING, {"skip_items": "x"}, r"wanted ids of the 3 scenes \(2018-04-15, 2018-06-04, 2018-09"),
    (NOTHING, {"local_mask": "cloud"}, "local_mask=cloud: wanted one of auto, SCL"),
    (NOTHING, {"local_scale": -1.0}, "local_scale=-1.0: wanted 0 to"),
    (NOTHING, {"local_path": "", "mgrs_tile": "33UUP", "local_mask": "none"}, "local_mask=none: i"),
    (remove("2018-06-04_B8A.tif"), {}, "2018-06-04: found the bands B02, B04, SCL, wanted B8A too"),
    (remove("2018-06-04_SCL.tif"), {}, "2018-06-04: found the bands .* wanted SCL or MASK too"),
    (add("x_2018-06-04_B04.tif"), {}, "x_2018-06-04_B04.tif: found B04 of this date in .*/2018-06"),
    (
        add("2018-06-04.tif", *[values()] * 3, names=["B04", "", "B4"]),
        {},
        "2018-06-04.tif: found B04 twice among its bands",
    ),
    (add("2018-06-05.tif", *[values()] * 4), {}, "06-05.tif: found no name of a band, .*local_ba"),
    (add("B04_new.tif"), {}, "B04_new.tif: found no date of Sentinel-2"),
    (
        add("2018-06-04_B04.tif", values(edge=12)),
        {},
        "2018-06-04_B04.tif: found 12 x 12 pixels of 10 from 300000, 5400000 in EPSG:32633, "
        "wanted 24 x 24 pixels .* as 2018-04-15_B04.tif has",
    ),
    (
        add("2018-06-04_SCL.tif", np.full((48, 48), 4), transform=AWAY),
        {},
        "2018-06-04_SCL.tif: found it at .* wanted it to cover 2018-04-15_B02.tif",
    ),
    (lambda folder: (folder / "2018-06-04_B04.tif").write_bytes(b"II*"), {}, "found no readable"),
]


@pytest.mark.parametrize(("spoil", "keys", "message"), MISTAKES)
def test_mistakes_end_in_one_line_of_files_and_bands(tmp_path, spoil, keys, message):
    for day in DAYS:
        write_bands(tmp_path / "farm", day, "{day}_{band}.tif")
    spoil(tmp_path / "farm")
    with pytest.raises(InputError, match=message) as error:
        make(tmp_path, keys)
    assert "\n" not in str(error.value)
    assert not re.search("asset|STAC", str(error.value))


def test_a_file_that_cannot_be_read_is_named_by_band_and_file(tmp_path):
    """One that was whole when it was listed, and is broken behind its header."""
    for day in DAYS:
        write_bands(tmp_path / "farm", day)
    path = tmp_path / "farm" / "T33UUP_20180604T105031_B04_10m.tif"
    rng = np.random.default_rng(0)
    with rasterio.open(path, "r+") as file:
        profile = file.profile
    with rasterio.open(path, "w", **profile | {"compress": "deflate"}) as file:
        file.write(rng.integers(1, 9999, (1, EDGE, EDGE)).astype("int16"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * (len(content) - len(content) // 2)
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"2018-06-04: B04 \(T33UUP_\S+_B04_10m.tif\) cannot be"):
        make(tmp_path)
    tile = make(tmp_path, skip_bad_items=True, overwrite=True)
    assert not tile.masks[1].any() and tile.masks[0].any()
    assert "2018-06-04" in tile.info["left_out"]


def test_a_band_file_that_changed_since_a_tile_was_begun_is_noticed(tmp_path, monkeypatch):
    for day in DAYS:
        write_bands(tmp_path / "farm", day)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_write_rest", lambda *_: 1 / 0)  # as a kill there
        with pytest.raises(ZeroDivisionError):
            make(tmp_path)
    check(make(tmp_path, dataset_name="whole"))
    write(tmp_path / "farm" / "T33UUP_20180604T105031_B8A_10m.tif", values(), dtype="int32")
    with pytest.raises(InputError, match="begun with another 2018-06-04; wanted overwrite=true"):
        make(tmp_path)


def test_a_name_may_hold_the_baseline_of_a_product(tmp_path):
    name = "S2A_MSIL2A_20180415T105031_N0500_R051_T31UES_20230101T000000_{band}.tif"
    write_bands(tmp_path, DAYS[0], name)
    item = local_item(tmp_path / name.format(band="B04"))
    assert sentinel2.offset_of(item) == 1000 and sentinel2.tile_of(item) == "31UES"


def test_a_tile_of_before_these_keys_need_not_be_made_again(tmp_path, capsys):
    for day in DAYS:
        write_stacks(tmp_path / "farm", day)
    path = make(tmp_path).path / "tile.json"
    info = json.loads(path.read_text())
    for key in plan.LATER_KEYS:
        del info["made_with"][key]
    path.write_text(json.dumps(info))
    check(make(tmp_path))
    assert "done already" in capsys.readouterr().out
