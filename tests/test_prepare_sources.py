"""What sources declare: places on Earth, nodata, offsets, texts, names; and whether they answer."""

import json
import socket
import time

import numpy as np
import planetary_computer
import pystac
import pytest
import rasterio
from scenes import prepare, settings
from stac_server import CRS, LEFT, TOP, Catalogue, FileServer, write_collection

from preparation import items as sources
from preparation import pixels, place, plan, sentinel2
from running.errors import InputError

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "PendingDeprecationWarning",
        "rasterio.errors.NotGeoreferencedWarning",
    )
]
EDGE = 24  # pixels along an edge of the small scenes
LOCAL = 'LOCAL_CS["national grid",UNIT["metre",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
PLACED = {"crs": CRS, "transform": rasterio.Affine(10, 0, LEFT["33UUP"], 0, -10, TOP)}


def values(seed=0, edge=EDGE):
    """Reflectance x 10000 of 300 to 3999, (edge, edge)."""
    return np.random.default_rng(seed).integers(300, 4000, (edge, edge))


def write_raster(path, *arrays, dtype="uint16", names=(), scales=1, offsets=0, **options):
    """A GeoTIFF of bands (h, w), on the ground of 33UUP if options do not place it elsewhere."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stack = np.stack(arrays).astype(dtype)
    shape = dict(zip(("count", "height", "width"), stack.shape, strict=True))
    profile = {"driver": "GTiff", "dtype": dtype, **PLACED, **shape, **options}
    with rasterio.open(path, "w", **profile) as file:
        file.write(stack)
        if names:
            file.descriptions = names
        if scales != 1 or offsets:
            file.scales = (scales,) * len(stack)
            file.offsets = (offsets,) * len(stack)
    return path


def write_day(path, red, nir=None, **options):
    """A GeoTIFF of one day: B04, B8A and an SCL of vegetation."""
    nir = red if nir is None else nir
    names = ("B04", "B8A", "SCL")
    return write_raster(path, red, nir, np.full(red.shape, 4), names=names, **options)


def write_images(folder, **options):
    """B04, B8A and SCL of one scene, a file each: {band: path}."""
    bands = {"B04": values(1), "B8A": values(2), "SCL": np.full((EDGE, EDGE), 4)}
    return {band: write_raster(folder / f"{band}.tif", a, **options) for band, a in bands.items()}


def make_item(name, day, images, bbox=(14.9, 48.7, 15.1, 48.8), **properties):
    """A STAC item. properties: by name, with __ for a colon."""
    west, south, east, north = bbox
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    known = {"datetime": f"{day}T10:10:00Z"}
    known |= {key.replace("__", ":"): value for key, value in properties.items()}
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "collection": "sentinel-2-l2a",
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "bbox": list(bbox),
        "properties": known,
        "links": [],
        "assets": {band: {"href": str(href)} for band, href in images.items()},
    }


def save(folder, *items):
    """items_path of a saved search."""
    folder.mkdir(parents=True, exist_ok=True)
    return str(write_collection(folder / "collection.json", list(items)))


def local(folder, **keys):
    """The keys of a local folder of GeoTIFFs that declare no baseline."""
    keys = {"local_path": str(folder), "mgrs_tile": "", "offset": "applied"} | keys
    return {"bands": "B04,B8A"} | keys


def read(path, band=1, name="B04", grid=None, resampling="nearest"):
    """`read_band` of a file, on its own grid if no other is given."""
    item = pystac.Item("x", None, None, pystac.utils.str_to_datetime("2021-06-05T10:00:00Z"), {})
    fields = {sources.BAND_KEY: band}
    item.add_asset(name, pystac.Asset(str(path), extra_fields=fields))
    grid = grid or pixels.source_grid(item, name, 0)
    return pixels.read_band(item, name, grid, resampling, 0)


# ---- places across 180 degrees -------------------------------------------------------------------


def test_boxes_across_180_degrees_stay_in_one_piece():
    assert place.parse_bbox("179.5,-17,-179.5,-16") == (179.5, -17, 180.5, -16)
    assert place.parse_bbox("179.5,-17,180.5,-16") == (179.5, -17, 180.5, -16)
    assert place.split_at_180((179.5, -17, 180.5, -16)) == [
        (179.5, -17, 180, -16),
        (-180, -17, -179.5, -16),
    ]
    assert place.split_at_180((-180.25, -17, -179.5, -16))[0][0] == 179.75
    assert place.split_at_180((12, 48, 13, 49)) == [(12, 48, 13, 49)]
    for text in (
        "12.5,48.6,12.3,48.7",
        "12,49,13,48",
        "190,1,191,2",
        "1,2,3,95",
    ):  # swapped, too far
        with pytest.raises(InputError, match="wanted west < east"):
            place.parse_bbox(text)


@pytest.mark.parametrize("tile", ["01KAB", "60KZF", "01KAC", "33UUP"])
def test_a_tile_at_180_degrees_is_no_belt_around_the_earth(tile):
    """Regression: mgrs_tile=01KAB searched a belt of 359 degrees."""
    west, south, east, north = place.tile_bounds(tile)
    assert 0 < east - west < 2 and 0 < north - south < 2
    parts = place.split_at_180((west, south, east, north))
    assert len(parts) == (1 if tile == "33UUP" else 2)
    assert all(-180 <= part[0] < part[2] <= 180 for part in parts)


@pytest.fixture(scope="module")
def fiji(tmp_path_factory):
    """Items of 01KAB (179.24 E to 179.71 W) and 60KZF (179.81 E on), in pixels of 1 km."""
    folder = tmp_path_factory.mktemp("fiji")

    def scene(tile, crs, left, box):
        transform = rasterio.Affine(1000, 0, left, 0, -1000, 8200000)
        images = {
            band: write_raster(
                folder / tile / f"{band}.tif",
                np.full((110, 110), 4) if band == "SCL" else values(edge=110),
                crs=crs,
                transform=transform,
            )
            for band in ("B04", "SCL")
        }
        told = {"grid__code": f"MGRS-{tile}", "s2__processing_baseline": "02.14"}
        return make_item(f"S2A_{tile}_20210410_0_L2A", "2021-04-10", images, box, **told)

    east = scene("01KAB", "EPSG:32701", 99960, (179.24, -17.26, -179.71, -16.25))
    west = scene("60KZF", "EPSG:32760", 799980, (179.81, -17.26, -179.15, -16.25))
    return {"one": save(folder / "one", east), "both": save(folder / "both", east, west)}


@pytest.mark.parametrize(
    ("items", "bbox", "tiles"),
    [
        ("one", "179.5,-17.0,179.9,-16.5", ["01KAB"]),
        ("one", "-179.95,-17.0,-179.8,-16.5", ["01KAB"]),
        ("both", "179.85,-17.0,179.95,-16.5", ["01KAB"]),
        ("both", "179.5,-17.0,179.9,-16.5", ["01KAB"]),
        ("both", "179.9,-17.0,-179.9,-16.5", ["01KAB"]),
        ("both", "179.9,-17.0,180.6,-16.5", ["60KZF"]),
        ("both", "-179.99,-17.0,-179.8,-16.5", ["60KZF"]),  # one outline from 179.997, one to -180
        ("both", "179.5,-17.0,-179.5,-16.5", ["01KAB", "60KZF"]),
    ],
)
def test_a_bbox_near_180_degrees_is_covered(fiji, items, bbox, tiles):
    """Regression: the tile across 180 degrees was lost, or ended in a traceback."""
    keys = {"items_path": fiji[items], "mgrs_tile": "", "bbox": bbox, "bands": "B04"}
    request = plan.parse_request(settings(".", **keys))
    plans = plan.make_plans(plan.choose_items(sources.find_items(request), request), request)
    assert sorted(made.name for made in plans) == [f"MGRS-{tile}" for tile in tiles]
    west, south, east, north = place.parse_bbox(bbox)
    for x, y in ((west, south), (west, north), (east, south), (east, north)):
        assert any(
            made.grid.pad(2).extent.contains(
                place.box_near((x, y, x + 1e-6, y + 1e-6), place.outline(made.grid.extent)).to_crs(
                    made.grid.crs
                )
            )
            for made in plans
        )


def test_another_place_than_the_items_at_180_degrees_ends_in_one_line(fiji, tmp_path):
    """Regression: a catalogue that answers with such a tile for a box in Africa: a traceback."""
    keys = {"items_path": fiji["one"], "mgrs_tile": "", "bands": "B04"}
    with pytest.raises(InputError, match="bbox=20,-17,21,-16.5: found no pixel"):
        prepare(tmp_path, bbox="20,-17,21,-16.5", **keys)


def test_a_search_across_180_degrees_asks_on_both_edges(tmp_path, capsys):
    boxes = {"E": (179.3, -17, 179.9, -16.5), "W": (-179.9, -17, -179.8, -16.5)}
    boxes |= {"AFRICA": (20, -17, 21, -16.5)}
    items = [make_item(f"{name}_01KAB", "2021-04-10", {}, box) for name, box in boxes.items()]
    catalogue = Catalogue(tmp_path, items)
    try:
        for keys in ({"mgrs_tile": "01KAB"}, {"bbox": "179.2,-17,-179.7,-16.4", "mgrs_tile": ""}):
            request = plan.parse_request(settings(tmp_path, catalogue, **keys))
            found = {item.id for item in sources.find_items(request)}
            assert found == {"E_01KAB", "W_01KAB"}
    finally:
        catalogue.stop()


def test_a_local_file_across_180_degrees_has_the_day_of_its_place(tmp_path):
    transform = rasterio.Affine(1000, 0, 99960, 0, -1000, 8200000)
    file = write_day(
        tmp_path / "reef" / "a_20210605.tif",
        values(edge=110),
        crs="EPSG:32701",
        transform=transform,
    )
    item, _ = sources.geotiff_item(file, "reef", "")
    assert item.bbox[0] < item.bbox[2] < item.bbox[0] + 2
    assert str(sentinel2.solar_date(item)) == "2021-06-05"
    item.bbox = [179.24, -17.26, -179.71, -16.25]  # as catalogues write it
    item.datetime = pystac.utils.str_to_datetime("2021-06-04T22:30:00Z")
    assert str(sentinel2.solar_date(item)) == "2021-06-05"


# ---- names of tiles ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("T33UUP", "33UUP"),
        ("33uup", "33UUP"),
        ("MGRS-33UUP", "33UUP"),
        ("9VWK", "09VWK"),
        ("T9VWK", "09VWK"),
        ("MGRS-9VWK", "09VWK"),
        (" hill ", "HILL"),
        ("", ""),
    ],
)
def test_tiles_are_understood_as_names_and_catalogues_spell_them(text, wanted):
    assert place.parse_tile(text) == wanted


def test_a_tile_may_be_spelt_as_in_the_names_of_products(tmp_path):
    images = write_images(tmp_path / "in")
    item = make_item("S2B_9VWK_20210410_0_L2A", "2021-04-10", images, s2__mgrs_tile="9VWK")
    keys = {"items_path": save(tmp_path, item), "offset": "applied", "bands": "B04"}
    (tile,) = prepare(tmp_path, mgrs_tile="T9VWK", **keys)
    assert tile.name == "MGRS-09VWK" and tile.info["made_with"]["mgrs_tile"] == "09VWK"


UUID = "ec16dbaf-4cef-5a8f-9d72-5e83a8b9f30d"
PRODUCT = "S2B_MSIL2A_20210410T081011_N0300_R078_T37UDQ_20210410T120000"


@pytest.mark.parametrize(
    "properties",
    [
        {"sentinel:utm_zone": 37, "sentinel:latitude_band": "U", "sentinel:grid_square": "DQ"},
        {"mgrs:utm_zone": "37", "mgrs:latitude_band": "U", "mgrs:grid_square": "DQ"},
        {"odc:region_code": "37UDQ"},
        {"odc:region_code": "x30y12", "title": "S2B_37UDQ_20210410_0_L2A"},
        {"sentinel:product_id": PRODUCT},
        {"s2:mgrs_tile": "T37UDQ"},
        {"grid:code": "MGRS-37UDQ"},
    ],
)
def test_items_of_open_data_cube_have_their_tile(properties):
    """Regression: refused, or the tile 04CEF was read out of the UUID."""
    moment = pystac.utils.str_to_datetime("2021-04-10T08:10:11Z")
    assert sentinel2.tile_of(pystac.Item(UUID, None, None, moment, properties)) == "37UDQ"
    with pytest.raises(InputError, match="found no MGRS tile in the item"):
        sentinel2.tile_of(pystac.Item(UUID, None, None, moment, {}))


def test_an_item_of_open_data_cube_becomes_a_tile(tmp_path):
    images = write_images(tmp_path / "in", crs="EPSG:32637")
    item = make_item(UUID, "2021-04-10", images, (38.9, 48.7, 39.1, 48.8), odc__region_code="37UDQ")
    item["properties"]["sentinel:product_id"] = PRODUCT
    (tile,) = prepare(tmp_path, items_path=save(tmp_path, item), mgrs_tile="", bands="B04")
    assert tile.name == "MGRS-37UDQ" and tile.info["dates"] == ["2021-04-10"]
    assert tile.info["items"]["2021-04-10"][0]["baseline"] == "03.00"


def test_an_item_without_a_tile_can_be_left_out(tmp_path, capsys):
    images = write_images(tmp_path / "in")
    good = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", images)
    items_path = save(tmp_path, good, make_item("who", "2021-04-11", images))
    keys = {"items_path": items_path, "offset": "applied", "bands": "B04"}
    with pytest.raises(InputError, match="who: found no MGRS tile"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, skip_bad_items=True, **keys)
    assert tile.info["dates"] == ["2021-04-10"] and "1 bad" in capsys.readouterr().out


# ---- rasters that lie nowhere, or in other units -------------------------------------------------


@pytest.mark.parametrize(
    ("place_of", "message"),
    [
        ({"crs": LOCAL}, "found the coordinate system national grid, wanted a .* of the Earth"),
        ({"crs": None}, "found no coordinate system, wanted a"),
        ({"transform": rasterio.Affine.identity()}, "found no position of its pixels"),
        ({"transform": rasterio.Affine(10, 0, 9e8, 0, -10, 9e8)}, "no place on Earth"),
    ],
)
def test_rasters_without_a_place_end_in_one_line(tmp_path, place_of, message):
    """Regression: engineering systems of drone and FLAIR files ended in tracebacks."""
    write_day(tmp_path / "in" / "a_20210605.tif", values(), **place_of)
    for keys in (local(tmp_path / "in"), items_of(tmp_path, **place_of)):
        with pytest.raises(InputError, match=message) as error:
            prepare(tmp_path, **keys)
        assert "\n" not in str(error.value)
        write_day(tmp_path / "in" / "b_20210705.tif", values())
    (tile,) = prepare(tmp_path, **local(tmp_path / "in", skip_bad_items=True))
    assert tile.info["dates"] == ["2021-07-05"]


def items_of(tmp_path, **options):
    """Keys of a saved search of one scene, written with these options."""
    images = write_images(tmp_path / "items", **options)
    item = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", images)
    return {"items_path": save(tmp_path, item), "offset": "applied", "bands": "B04,B8A"}


def test_one_band_without_a_place_ends_in_one_line(tmp_path):
    keys = items_of(tmp_path)
    write_raster(tmp_path / "items" / "B8A.tif", values(), crs=LOCAL)
    with pytest.raises(InputError, match="S2A_33UUP_20210410_0_L2A: asset B8A: found the coord"):
        prepare(tmp_path, **keys)


@pytest.mark.parametrize(
    ("crs", "pixel", "at", "unit"),
    [
        ("EPSG:4326", 1e-4, (12.3, 48.7), "degree"),
        ("EPSG:2263", 30, (980000, 200000), "US survey foot"),
    ],
)
def test_a_resolution_in_metres_needs_files_in_metres(tmp_path, crs, pixel, at, unit):
    """Regression: resolution=20 made pixels of 20 degrees."""
    transform = rasterio.Affine(pixel, 0, at[0], 0, -pixel, at[1])
    write_day(tmp_path / "in" / "a_20210605.tif", values(), crs=crs, transform=transform)
    for resolution in (20.0, 0.005):
        with pytest.raises(InputError, match=f"resolution={resolution:g}: .*the unit {unit}"):
            prepare(tmp_path, **local(tmp_path / "in", resolution=resolution))
    (tile,) = prepare(tmp_path, **local(tmp_path / "in"))
    assert tile.shape == (1, EDGE, EDGE, 2)


def test_many_bad_items_before_the_first_good_one(tmp_path):
    """Regression: each of them was a call inside of the one before; 1000 ended in a traceback."""
    gone = {"B04": tmp_path / "gone.tif", "SCL": tmp_path / "gone.tif"}
    items = [make_item(f"S2A_33UUP_{number}", "2021-04-10", gone) for number in range(1100)]
    items.append(make_item("S2A_33UUP_9999", "2021-04-10", write_images(tmp_path / "in")))
    keys = {"items_path": save(tmp_path, *items), "offset": "applied", "bands": "B04"}
    request = plan.parse_request(settings(tmp_path, skip_bad_items=True, **keys))
    found = sources.find_items(request)
    assert plan.first_grid(found, request).shape == (EDGE, EDGE)


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
    item, _ = sources.geotiff_item(folder / "a_20210605.tif", "hill", "")
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


# ---- what the metadata of products and items say -------------------------------------------------


def write_safe(folder, baseline="0212", offset=None, metadata=True, day="20210606", level="L2A"):
    """A .SAFE folder whose MTD_MSIL2A.xml declares an offset (None: none). Returns its path."""
    name = f"S2A_MSI{level}_{day}T101031_N{baseline}_R022_T33UUP_{day}T233333.SAFE"
    product, shift = folder / name, -(offset or 0)
    for band, pixel in (("B04", 10), ("B8A", 20), ("SCL", 20)):
        edge = 480 // pixel
        array = np.full((edge, edge), 4) if band == "SCL" else values(edge=edge) + shift
        path = product / "GRANULE" / "L2A_T33UUP" / "IMG_DATA" / f"R{pixel}m"
        write_raster(
            path / f"T33UUP_{day}T101031_{band}_{pixel}m.jp2",
            array,
            driver="JP2OpenJPEG",
            REVERSIBLE="YES",
            QUALITY=100,
            transform=rasterio.Affine(pixel, 0, LEFT["33UUP"], 0, -pixel, TOP),
        )
    lines = [f"<BOA_ADD_OFFSET band_id='{i}'>{offset}</BOA_ADD_OFFSET>" for i in range(13)]
    lines = [] if offset is None else lines
    lines.append("<BOA_QUANTIFICATION_VALUE unit='none'>10000</BOA_QUANTIFICATION_VALUE>")
    if metadata:
        text = f"<n1:P xmlns:n1='x'><A>{''.join(lines)}</A></n1:P>"
        (product / "MTD_MSIL2A.xml").write_text(text)
    return product


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


# ---- files and folders ---------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no SCL", "SCL broken", "level 1C", "metadata broken"])
def test_a_bad_safe_folder_can_be_left_out(tmp_path, how, capsys):
    """Regression: skip_bad_items=true left none out."""
    write_safe(tmp_path / "in")
    bad = write_safe(tmp_path / "in", day="20210410", level="L1C" if how == "level 1C" else "L2A")
    (scl,) = bad.rglob("*_SCL_*")
    if how == "no SCL":
        scl.unlink()
    elif how == "SCL broken":
        scl.write_bytes(b"broken")
    elif how == "metadata broken":
        (bad / "MTD_MSIL2A.xml").write_text("<")
    keys = {"local_path": str(tmp_path / "in"), "bands": "B04", "mgrs_tile": ""}
    with pytest.raises(InputError, match="20210410"):
        prepare(tmp_path, **keys)
    (tile,) = prepare(tmp_path, skip_bad_items=True, **keys)
    assert tile.info["dates"] == ["2021-06-06"]
    assert f"left out: {bad}" in capsys.readouterr().out.replace(str(scl), str(bad))


def test_hidden_files_are_no_scenes_and_no_bands(tmp_path):
    """Regression: ._* files, which macOS leaves on other disks, were taken for bands."""
    product = write_safe(tmp_path / "in")
    for file in [*product.rglob("*.jp2"), product]:
        hidden = file.with_name(f"._{file.name}")
        hidden.write_bytes(b"\0\5\x16\7" + b"\0" * 80)
    (tile,) = prepare(tmp_path, local_path=str(tmp_path / "in"), bands="B04", mgrs_tile="")
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(edge=48))
    write_day(tmp_path / "tifs" / "a_20210605.tif", values())
    (tmp_path / "tifs" / "._a_20210605.tif").write_bytes(b"\0\5\x16\7")
    (tile,) = prepare(tmp_path, **local(tmp_path / "tifs"))
    assert tile.shape[0] == 1


def test_folders_may_have_any_name(tmp_path):
    """Regression: what stands after # or ? was cut off."""
    folder = tmp_path / "a #b?c%d"
    write_day(folder / "in" / "a_20210605.tif", values(1), values(2))
    (tile,) = prepare(folder, **local(folder / "in"))
    np.testing.assert_array_equal(tile.bands[0, ..., 1], values(2))
    item = make_item("S2A_33UUP_20210410_0_L2A", "2021-04-10", write_images(folder / "items"))
    keys = {"items_path": save(folder, item), "offset": "applied", "bands": "B8A"}
    (tile,) = prepare(folder, **keys)
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(2))
    write_safe(folder / "safe")
    (tile,) = prepare(folder, local_path=str(folder / "safe"), bands="B04", dataset_name="safe")
    np.testing.assert_array_equal(tile.bands[0, ..., 0], values(edge=48))


@pytest.mark.parametrize(
    ("name", "day"),
    [
        ("plot_12345678_20210605", "2021-06-05"),
        ("20991231_20210605", "2021-06-05"),
        ("19900101_2021-06-05", "2021-06-05"),
        ("S2A_MSIL2A_20210605T101031_N0500_R022_T33UUP_20230118T013017", "2021-06-05"),
        ("123456789_20210605", "2021-06-05"),
        ("plot_12345678", None),
        ("plot", None),
    ],
)
def test_eight_digits_before_the_date_are_no_date(tmp_path, name, day):
    """Regression: they were taken for the date."""
    file = write_day(tmp_path / f"{name}.tif", values())
    if day is None:
        with pytest.raises(InputError, match="found no date of Sentinel-2"):
            sources.geotiff_item(file, "hill", "")
    else:
        item, _ = sources.geotiff_item(file, "hill", "")
        assert str(sentinel2.solar_date(item)) == day


# ---- servers that do not answer, and access that has run out -------------------------------------


@pytest.fixture
def mute():
    """The address of a server that accepts and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(100)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_search_without_an_answer_ends(mute, tmp_path, monkeypatch):
    """Regression: it waited for ever."""
    monkeypatch.setattr(sources, "SECONDS", (1, 0.2))
    start = time.monotonic()
    with pytest.raises(InputError, match="the search failed .*timed out.*wanted a STAC API"):
        prepare(tmp_path, stac_url=f"{mute}/?token=secret", retries=1)
    assert time.monotonic() - start < 10


def test_a_search_shows_no_token(tmp_path):
    with pytest.raises(InputError, match="the search failed") as error:
        prepare(tmp_path, stac_url="http://me:secret@127.0.0.1:9/?token=secret", retries=0)
    assert "secret" not in str(error.value) and "127.0.0.1:9" in str(error.value)


def test_a_signature_without_an_answer_ends(monkeypatch):
    monkeypatch.setattr(pixels, "SIGN_SECONDS", 0.1)
    monkeypatch.setattr(planetary_computer, "sign_url", lambda href: time.sleep(5))
    start = time.monotonic()
    with pytest.raises(OSError, match="the signing service timed out"):
        pixels.sign("https://x.blob.core.windows.net/a.tif")
    assert time.monotonic() - start < 3


@pytest.fixture
def signed(tmp_path, monkeypatch):
    """A server of two dates, and the keys of a search whose addresses have a signature."""
    monkeypatch.setattr(pixels, "PAUSE", 0.001)
    folder = tmp_path / "served"
    server = FileServer(folder)

    def search(signature="sig=secret"):
        items = []
        for day in ("2021-04-10", "2021-06-05"):
            address = f"{server.url}/{day}"
            hrefs = {
                name: f"{address}/{name}.tif?{tmp_path.name}&{signature}" for name in ("B04", "SCL")
            }
            items.append(make_item(f"S2A_33UUP_{day.replace('-', '')}_0_L2A", day, hrefs))
        keys = {"items_path": save(tmp_path, *items), "offset": "applied", "bands": "B04"}
        return keys | {"skip_bad_items": True, "retries": 1}

    for day in ("2021-04-10", "2021-06-05"):
        blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64}
        write_raster(folder / day / "B04.tif", values(edge=512), **blocks)
        write_raster(folder / day / "SCL.tif", np.full((512, 512), 4), **blocks)
    yield server, search
    server.shutdown()


@pytest.mark.parametrize("answered", [0, 1])
@pytest.mark.parametrize("retries", [0, 1])
def test_access_that_has_run_out_blanks_no_date(signed, tmp_path, capsys, answered, retries):
    """Regression: a finished tile had empty dates, and signatures were printed.

    At once, and in the middle of a file, where GDAL does not say why it fails.
    """
    server, search = signed
    server.denied["/2021-06-05/B04.tif"] = answered
    with pytest.raises(InputError, match=r"0605_0_L2A: asset B04 .*403.* wanted access") as error:
        prepare(tmp_path, **search() | {"retries": retries})
    assert "\n" not in str(error.value) and "secret" not in str(error.value)
    assert "secret" not in "".join(capsys.readouterr())
    server.denied, server.expired = {}, "sig=secret"
    # the same command resumes; a new search has new signatures, and the saved ones are not used
    (tile,) = prepare(tmp_path, **search("sig=fresh"))
    assert tile.info["left_out"] == {} and tile.masks[:].all()


def test_an_image_that_is_gone_or_damaged_is_left_out(signed, tmp_path, capsys):
    server, search = signed
    file = server.folder / "2021-06-05" / "B04.tif"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    (tile,) = prepare(tmp_path, **search())
    (line,) = tile.info["left_out"].values()
    assert "asset B04 cannot be read" in line and "wanted a whole image at http" in line
    assert "secret" not in line and "secret" not in "".join(capsys.readouterr())
    assert tile.masks[0].all() and not tile.masks[1].any()


def test_an_outage_in_the_middle_of_a_file_blanks_no_date(signed, tmp_path, monkeypatch):
    server, search = signed

    def stop(*arguments):
        for path in ("B04", "SCL"):
            server.faults |= {f"/{day}/{path}.tif": 100 for day in ("2021-04-10", "2021-06-05")}
        raise rasterio.errors.RasterioIOError("Read failed. See previous exception for details.")

    monkeypatch.setattr(pixels, "_read_larger", stop)
    with pytest.raises(InputError, match="wanted a network that works"):
        prepare(tmp_path, **search() | {"retries": 0})


def test_s3_without_keys_blanks_no_date(tmp_path, monkeypatch):
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    images = write_images(tmp_path / "in")
    items = [
        make_item(f"S2A_33UUP_{day.replace('-', '')}_0_L2A", day, hrefs)
        for day, hrefs in (
            ("2021-04-10", images),
            ("2021-06-05", {"B04": "s3://bucket/B04.tif", "SCL": images["SCL"]}),
        )
    ]
    keys = {"items_path": save(tmp_path, *items), "offset": "applied", "bands": "B04"}
    with pytest.raises(
        InputError, match="0605_0_L2A: asset B04 .*AWS_.* wanted access to s3://buc"
    ):
        prepare(tmp_path, skip_bad_items=True, **keys)


def test_the_request_holds_the_config_as_it_is(tmp_path):
    config = settings(tmp_path, skip_items=" a, b,", bbox="1,2,3,4", year="2020-10")
    request = plan.parse_request(config)
    assert request.skip_items == {"a", "b"} and request.bbox == (1, 2, 3, 4)
    assert (str(request.first), str(request.last)) == ("2020-10-01", "2021-09-30")
    assert request.made_with == {key: config[key] for key in plan.RESULT_KEYS}
    assert json.loads(json.dumps(request.made_with)) == request.made_with
