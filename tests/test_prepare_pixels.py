"""What the pixels and metadata of scenes declare: nodata, masks, scale, offsets, texts."""

from running.errors import InputError

import numpy as np
import pystac
import pytest
import rasterio
from scenes import prepare, settings
from small_scenes import (
    EDGE,
    PRODUCT,
    UUID,
    items_of,
    local,
    local_item,
    make_item,
    read,
    save,
    values,
    write_day,
    write_images,
    write_raster,
    write_safe,
)
from stac_server import LEFT, TOP

from preparation import items as sources
from preparation import pixels, plan, sentinel2

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "PendingDeprecationWarning",
        "rasterio.errors.NotGeoreferencedWarning",
    )
]


# ---- nodata, masks, scale and offset of a GeoTIFF ------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [
        ("uint16", 65535),
        ("uint16", 0),
        ("int16", 32767),
        ("int16", -9999),
        ("int32", 65535),
        ("float32", 65535.0),
        ("float32", -9999.0),
        ("float32", np.nan),
    ],
)
def test_a_declared_nodata_is_no_reflectance(tmp_path, dtype, nodata):
    """Regression: 65535 in one band became clear reflectance."""
    red, nir = values(1).astype(float), values(2).astype(float)
    red[:5] = nir[4:7] = nodata
    write_day(tmp_path / "in" / "a_20210605.tif", red, nir, dtype=dtype, nodata=nodata)
    (tile,) = prepare(tmp_path, **local(tmp_path / "in"))
    assert not tile.masks[0, :7].any() and tile.masks[0, 7:].all()
    assert not tile.bands[0, :7].any()
    np.testing.assert_array_equal(tile.bands[0, 7:, :, 0], red[7:])
    np.testing.assert_array_equal(tile.bands[0, 7:, :, 1], nir[7:])
    assert tile.band_mean[0] == np.float32(red[7:].mean())


@pytest.mark.parametrize("internal", [True, False])
def test_a_mask_band_is_obeyed(tmp_path, internal):
    """In the file, or in a file .msk beside it."""
    path, red = tmp_path / "B04.tif", values()
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        write_raster(path, red)
        with rasterio.open(path, "r+") as file:
            file.write_mask(np.arange(EDGE * EDGE).reshape(EDGE, EDGE) % 7 > 0)
    assert path.with_name("B04.tif.msk").exists() != internal
    found, _ = read(path)
    np.testing.assert_array_equal(
        found, np.where(np.arange(EDGE**2).reshape(red.shape) % 7, red, 0)
    )


def test_numbers_that_no_reflectance_has_are_nodata(tmp_path):
    """NaN, infinity and negative numbers, declared or not."""
    red = values().astype(float)
    red[0], red[1], red[2], red[3] = np.nan, np.inf, -9999, 0
    found, _ = read(write_raster(tmp_path / "B04.tif", red, dtype="float32"))
    assert not found[:4].any()
    np.testing.assert_array_equal(found[4:], red[4:])


def test_a_class_may_be_nodata(tmp_path):
    """SCL whose nodata is 255 was refused as no class."""
    classes = np.full((EDGE, EDGE), 4)
    classes[:3] = 255
    path = write_raster(tmp_path / "SCL.tif", classes, dtype="uint8", nodata=255)
    found, _ = read(path, name="SCL")
    assert not found[:3].any() and (found[3:] == 4).all()


@pytest.mark.parametrize("resampling", ["bilinear", "cubic", "average"])
def test_nodata_is_not_mixed_into_its_neighbours(tmp_path, resampling):
    """And a block shows what the whole shows."""
    red = values(edge=120).astype(float)
    red[:, 50:60] = -9999
    transform = rasterio.Affine(20, 0, LEFT["33UUP"], 0, -20, TOP)
    path = write_raster(tmp_path / "a.tif", red, dtype="int16", nodata=-9999, transform=transform)
    item = pystac.Item("x", None, None, pystac.utils.str_to_datetime("2021-06-05T10:00:00Z"), {})
    item.add_asset("B04", pystac.Asset(str(path)))
    for pixel in (10, 40):
        grid = pixels.source_grid(item, "B04", 0).zoom_to(resolution=pixel)
        whole, _ = read(path, grid=grid, resampling=resampling)
        seen = whole[whole > 0]
        low, high = (300, 3999) if resampling != "cubic" else (1, 6000)
        assert seen.min() >= low and seen.max() <= high and (whole == 0).any()
        part, _ = read(path, grid=grid[20:43, 8:31], resampling=resampling)
        np.testing.assert_array_equal(part, whole[20:43, 8:31])


@pytest.mark.parametrize(
    ("stored", "scale", "offset", "subtracted"),
    [
        (lambda red: red + 1000, 1e-4, -0.1, 1000),  # as Element 84's sentinel-2-c1-l2a
        (lambda red: red, 1e-4, 0, 0),
        (lambda red: red + 1000, 1, -1000, 1000),
        (lambda red: (red + 2000) / 0.275, 2.75e-5, -0.2, 2000),  # as Landsat's collection 2
        (lambda red: red / 10, 1e-3, 0, 0),
    ],
)
def test_scale_and_offset_tags_are_applied(tmp_path, stored, scale, offset, subtracted):
    red = values() // 10 * 10
    folder, tags = tmp_path / "in", {"scales": scale, "offsets": offset}
    write_raster(
        folder / "a_20210605.tif", np.rint(stored(red)), names=("B04",), dtype="uint16", **tags
    )
    with rasterio.open(folder / "a_20210605.tif", "r+") as file:
        file.update_tags(PROCESSING_BASELINE="02.14")  # the tags of the bands come first
    item = local_item(folder / "a_20210605.tif")
    assert sentinel2.offset_of(item) == subtracted
    numbers, declared = read(folder / "a_20210605.tif")
    assert declared == (subtracted or None)
    found = sentinel2.to_reflectance(numbers, subtracted).astype(int)
    assert np.abs(found - red).max() <= (1 if scale == 2.75e-5 else 0)


def test_an_offset_in_the_tags_is_subtracted_once(tmp_path):
    red = values()
    options = {"scales": 1e-4, "offsets": -0.1}
    write_day(tmp_path / "in" / "a_20210605.tif", red + 1000, **options)
    (tile,) = prepare(tmp_path, **local(tmp_path / "in", offset="auto"))
    np.testing.assert_array_equal(tile.bands[0, ..., 0], red)
    assert tile.info["items"]["2021-06-05"][0]["offset_subtracted"] == 1000

    images = write_images(tmp_path / "items", **options)
    flags = {"earthsearch__boa_offset_applied": True, "s2__processing_baseline": "04.00"}
    item = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", images, **flags)
    keys = {"items_path": save(tmp_path, item), "bands": "B04"}
    with pytest.raises(InputError, match="an offset of -1000 in the tags of B04 and of 0 by"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, offset="applied", overwrite=True, **keys)
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(1))


@pytest.mark.parametrize(
    "tags", [{"scales": 0.01}, {"scales": 1, "offsets": -0.1}, {"scales": 1e-4, "offsets": 0.1}]
)
def test_tags_that_are_not_those_of_reflectance_end_in_one_line(tmp_path, tags):
    write_day(tmp_path / "in" / "a_20210605.tif", values(), **tags)
    for keys in (local(tmp_path / "in"), items_of(tmp_path, **tags)):
        with pytest.raises(InputError, match="B04: found the tags scale .* wanted those of refl"):
            prepare(tmp_path, **keys)


def test_reflectance_of_0_to_1_ends_in_one_line(tmp_path):
    """Of items too, whose files are not looked at before."""
    with pytest.raises(InputError, match=r"asset B04: found values up to 0.399, wanted .* x 10000"):
        write_images(tmp_path / "items")
        keys = items_of(tmp_path)
        for band in ("B04", "B8A"):
            write_raster(tmp_path / "items" / f"{band}.tif", values() / 1e4, dtype="float32")
        prepare(tmp_path, **keys)


@pytest.mark.parametrize(
    ("baseline", "offset"),
    [("9999", None), ("9999", -1000), ("9933", -1000), ("0500", -1000), ("0212", None)],
)
def test_the_metadata_of_a_product_decide_about_its_offset(tmp_path, baseline, offset):
    """Regression: 1000 was subtracted from products of the sen2cor toolbox that have no offset."""
    write_safe(tmp_path / "in", baseline, offset)
    keys = {"local_path": str(tmp_path / "in"), "bands": "B04,B8A", "mgrs_tile": ""}
    (tile,) = prepare(tmp_path, **keys)
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(edge=48))
    entry = tile.info["items"]["2021-06-06"][0]
    assert entry["offset_subtracted"] == -(offset or 0)
    assert entry["baseline"] == f"{baseline[:2]}.{baseline[2:]}"


def test_a_toolbox_product_without_metadata_ends_in_one_line(tmp_path):
    product = write_safe(tmp_path / "in", "9999", metadata=False)
    keys = {"local_path": str(tmp_path / "in"), "bands": "B04", "mgrs_tile": ""}
    with pytest.raises(InputError, match="baseline 99.99 of the sen2cor toolbox, .*offset=applied"):
        prepare(tmp_path, **keys)
    (product / "MTD_MSIL2A.xml").write_text("<n1:P><BOA_ADD_OFF")  # a download that broke off
    with pytest.raises(InputError, match="MTD_MSIL2A.xml: found no readable metadata"):
        prepare(tmp_path, **keys)
    text = "<P><BOA_ADD_OFFSET>-1000</BOA_ADD_OFFSET><BOA_ADD_OFFSET>0</BOA_ADD_OFFSET></P>"
    (product / "MTD_MSIL2A.xml").write_text(text)
    with pytest.raises(InputError, match=r"found the offsets \[0, 1000\]"):
        prepare(tmp_path, **keys)
    (product / "MTD_MSIL2A.xml").unlink()
    (tile,) = prepare(tmp_path, offset="applied", **keys)
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(edge=48))


@pytest.mark.parametrize(
    ("properties", "wanted"),
    [
        ({"s2:processing_baseline": "05.00"}, 1000),
        ({"s2:processing_baseline": 5.0}, 1000),
        ({"s2:processing_baseline": 5}, 1000),
        ({"s2:processing_baseline": "N0500"}, 1000),
        ({"s2:processing_baseline": "0209"}, 0),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": "true"}, 0),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": "True"}, 0),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": 1}, 0),
        ({"s2:processing_baseline": "04.00", "sentinel:boa_offset_applied": "yes"}, 0),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": "false"}, 1000),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": "0"}, 1000),
        ({"s2:processing_baseline": "04.00", "earthsearch:boa_offset_applied": None}, 1000),
        ({"sentinel:product_id": PRODUCT.replace("N0300", "N0400")}, 1000),
    ],
)
def test_numbers_and_flags_may_be_texts(properties, wanted):
    """Regression: an offset was subtracted twice."""
    moment = pystac.utils.str_to_datetime("2021-04-10T08:10:11Z")
    assert sentinel2.offset_of(pystac.Item(UUID, None, None, moment, properties)) == wanted


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"eo__cloud_cover": [12.5]}, r"found eo:cloud_cover \[12.5\], wanted a number"),
        ({"eo__cloud_cover": "little"}, "found eo:cloud_cover 'little', wanted a number"),
        ({"eo__cloud_cover": "nan"}, "found eo:cloud_cover 'nan', wanted a number"),
        ({"earthsearch__boa_offset_applied": "perhaps"}, "'perhaps', wanted true or false"),
        ({"eo__cloud_cover": "95.5"}, "found no item to use among 1 .*1 too cloudy"),
        ({"eo__cloud_cover": "12"}, None),
        ({"eo__cloud_cover": None}, None),
    ],
)
def test_texts_that_are_no_numbers_end_in_one_line(tmp_path, properties, message):
    known = {"s2__processing_baseline": "02.14"} | properties
    images = {"B04": "B04.tif", "SCL": "SCL.tif"}
    item = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", images, **known)
    keys = {"items_path": save(tmp_path, item), "bands": "B04"}
    request = plan.parse_request(settings(tmp_path, **keys))
    if message is None:
        chosen = plan.choose_items(sources.find_items(request), request)
        assert [len(plan.order_days(days)) for days in chosen.values()] == [1]
        return
    with pytest.raises(InputError, match=message):
        plan.choose_items(sources.find_items(request), request)
