"""The rules of Sentinel-2, and sources on the disk: GeoTIFFs, .SAFE folders, overviews."""

from running.errors import InputError

import numpy as np
import pystac
import pytest
import rasterio
from scenes import fill, prepare, truth
from stac_server import CRS, LEFT, SIZE, TOP, pixel_size, true_classes, true_reflectance, write_cog

from preparation import builder, pixels, sentinel2
from preparation.pixels import read_band, sign, source_grid, with_retries

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


def test_overviews_are_never_read(tmp_path):
    """Averaged classes mean nothing: 4 and 9 give 7, unclassified."""
    classes = np.tile(np.array([[4, 9], [9, 4]], np.uint8), (600, 600))
    write_cog(tmp_path / "SCL.tif", classes, 20, overview_resampling="AVERAGE", blocksize=128)
    with rasterio.open(tmp_path / "SCL.tif") as file:
        assert file.overviews(1) and 7 in file.read(1, out_shape=(600, 600))
    item = pystac.Item("x", None, None, a_moment(), {})
    item.add_asset("SCL", pystac.Asset(str(tmp_path / "SCL.tif")))
    grid = source_grid(item, "SCL", 0)
    found, _ = read_band(item, "SCL", grid.zoom_to(resolution=80), "nearest", 0)
    assert found.shape == (300, 300) and set(np.unique(found)) <= {4, 9}


def test_larger_pixels_are_repeated_as_gdal_resamples_them(tmp_path, monkeypatch):
    """Windows that begin and end inside of larger pixels, and one that reaches over the edge."""
    rng = np.random.default_rng(0)
    for name, pixel in (("B02", 10), ("B11", 20), ("B09", 60)):
        array = rng.integers(1, 10_000, (SIZE * 10 // pixel,) * 2, np.uint16)
        write_cog(tmp_path / f"{name}.tif", array, pixel)
        item = pystac.Item("x", None, None, a_moment(), {})
        item.add_asset(name, pystac.Asset(str(tmp_path / f"{name}.tif")))
        grid = source_grid(item, name, 0).zoom_to(resolution=10)
        assert grid.shape == (SIZE, SIZE)
        windows = rng.integers(0, SIZE // 2, (6, 2)), rng.integers(1, SIZE // 2, (6, 2))
        grids = [grid[r : r + h, c : c + w] for (r, c), (h, w) in zip(*windows, strict=True)]
        fast = [read_band(item, name, part, "nearest", 0)[0] for part in grids]
        edge, _ = read_band(item, name, grid.pad(7), "nearest", 0)
        np.testing.assert_array_equal(edge[7:-7, 7:-7], fill(array))
        assert not edge[:7].any() and not edge[:, -7:].any()
        with monkeypatch.context() as patch:
            patch.setattr(pixels, "_read_larger", lambda *_: None)
            for part, found in zip(grids, fast, strict=True):
                wanted, _ = read_band(item, name, part, "nearest", 0)
                np.testing.assert_array_equal(found, wanted)


def a_moment():
    return pystac.utils.str_to_datetime("2021-06-05T10:00:00Z")


@pytest.mark.parametrize(
    ("properties", "setting", "wanted"),
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
def test_offset_follows_from_baseline_and_provider(properties, setting, wanted):
    item = pystac.Item("S2A_33UUP_20230605_0_L2A", None, None, a_moment(), properties)
    assert sentinel2.offset_of(item, setting) == wanted


def test_offset_keeps_nodata_and_stays_above_it():
    numbers = np.array([0, 1, 999, 1000, 1001, 1002, 65535], np.uint16)
    found = sentinel2.to_reflectance(numbers, 1000)
    assert found.dtype == np.uint16 and found.tolist() == [0, 1, 1, 1, 1, 2, 64535]


def test_classes_are_clear_data_or_nodata():
    ranks = sentinel2.rank_pixels(np.arange(12, dtype=np.uint16), "SCL", [4, 5, 11])
    assert ranks.tolist() == [0, 1, 1, 1, 2, 2, 1, 1, 1, 1, 1, 2]
    assert sentinel2.rank_pixels(np.array([0, 1], np.uint16), "MASK", [4]).tolist() == [1, 2]
    for value, name in ((12, "SCL"), (2, "MASK")):
        with pytest.raises(ValueError, match=f"found the value {value}, wanted"):
            sentinel2.rank_pixels(np.array([value], np.uint16), name, [4])


def test_solar_day_is_the_tiles_own():
    def item(tile, moment):
        properties = {"grid:code": f"MGRS-{tile}"}
        return pystac.Item("x", None, None, pystac.utils.str_to_datetime(moment), properties)

    assert str(sentinel2.solar_date(item("60HTE", "2021-06-04T22:30:00Z"))) == "2021-06-05"
    assert str(sentinel2.solar_date(item("01KAB", "2021-06-05T22:30:00Z"))) == "2021-06-05"
    assert str(sentinel2.solar_date(item("33UUP", "2021-06-05T10:00:00Z"))) == "2021-06-05"


def write_scene(folder, day, mask="MASK", dtype="uint16", scale=1):
    """A GeoTIFF of B04, B8A and a mask of one day, with the offset of baseline 04.00."""
    bands, clear = truth(day, ["B04", "B8A"])
    bands[3, 4, 1] = 0  # a hole of one band
    last = fill(true_classes(day)) if mask == "SCL" else clear
    with rasterio.open(
        folder / f"scene_{day.replace('-', '')}.tif",
        "w",
        driver="GTiff",
        height=SIZE,
        width=SIZE,
        count=3,
        dtype=dtype,
        crs=CRS,
        transform=rasterio.Affine(10, 0, LEFT["33UUP"], 0, -10, TOP),
    ) as file:
        shifted = [bands[..., 0] + 1000, np.where(bands[..., 1], bands[..., 1] + 1000, 0)]
        file.write(np.stack([*(band * scale for band in shifted), last]).astype(dtype))
        file.descriptions = ("B04", "B8A", mask)


@pytest.mark.parametrize("mask", ["SCL", "MASK"])
def test_a_folder_of_geotiffs(tmp_path, mask):
    folder, days = tmp_path / "hill", ["2021-04-10", "2021-06-06"]
    folder.mkdir()
    for day in days:
        write_scene(folder, day, mask)
    keys = {"local_path": str(folder), "mgrs_tile": "", "bands": "B8A,B04"}
    with pytest.raises(InputError, match="found no processing baseline, wanted .* offset=applied"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, offset="raw", **keys)
    assert tile.name == "MGRS-hill" and tile.info["dates"] == days
    for index, day in enumerate(days):
        bands, clear = truth(day, ["B8A", "B04"])
        bands[3, 4] = clear[3, 4] = 0
        np.testing.assert_array_equal(tile.bands[index], bands)
        np.testing.assert_array_equal(tile.masks[index], clear)


def test_geotiffs_that_cannot_be_right(tmp_path, capsys):
    """Regression: reflectance of 0 to 1 became nodata; a broken file could not be left out."""
    folder, days = tmp_path / "hill", ["2021-04-10", "2021-06-06"]
    folder.mkdir()
    keys = {"local_path": str(folder), "mgrs_tile": "", "bands": "B8A,B04", "offset": "raw"}
    write_scene(folder, days[0])
    write_scene(folder, days[1], dtype="float32", scale=1e-4)
    with pytest.raises(InputError, match=r"20210606.tif: found B04 up to 0.* x 10000"):
        prepare(tmp_path, **keys)
    write_scene(folder, days[0], dtype="float32")  # a MASK of 0 and 1 is no reflectance
    with pytest.raises(InputError, match="found 3 bands, wanted 2 as in local_bands"):
        prepare(tmp_path, **keys, local_bands="B04,MASK")
    (folder / "junk_20210101.tif").write_bytes(b"II*")
    (tile,) = prepare(tmp_path, skip_bad_items=True, **keys)
    assert tile.info["dates"] == days[:1]
    assert capsys.readouterr().out.count("left out: ") == 2


def test_a_tile_that_was_begun_with_other_files_begins_anew(tmp_path, monkeypatch):
    """Regression: a file that was mended meanwhile was not read again."""
    folder = tmp_path / "hill"
    folder.mkdir()
    keys = {"local_path": str(folder), "mgrs_tile": "", "bands": "B8A,B04", "offset": "raw"}
    for day in ("2021-04-10", "2021-06-06"):
        write_scene(folder, day)
    with monkeypatch.context() as patch:
        patch.setattr(builder, "_write_rest", lambda *_: 1 / 0)  # as a kill there
        with pytest.raises(ZeroDivisionError):
            prepare(tmp_path, **keys)
    write_scene(folder, "2021-04-10", dtype="int32")
    with pytest.raises(InputError, match="was begun with another scene_20210410; wanted overwrite"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, overwrite=True, **keys)
    assert len(tile.doys) == 2


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


def test_only_planetary_computers_addresses_are_signed(monkeypatch):
    """And no message shows the signature."""
    import planetary_computer

    monkeypatch.setattr(planetary_computer, "sign_url", lambda href: f"{href}?sig=secret")
    address = "http://127.0.0.1:9/sentinel2l2a01.blob.core.windows.net/scl.tif"
    assert sign(address) == f"{address}?sig=secret"
    assert sign("https://other.host/scl.tif") == "https://other.host/scl.tif"
    item = pystac.Item("x", None, None, a_moment(), {})
    item.add_asset("SCL", pystac.Asset(address))

    def fail(href):
        raise rasterio.errors.RasterioIOError(f"{href} cannot be read")

    with pytest.raises(InputError, match="asset SCL cannot be read") as error:
        with_retries(fail, item, "SCL", 0)
    assert "secret" not in str(error.value)
