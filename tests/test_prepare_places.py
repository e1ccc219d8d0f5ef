"""Where scenes lie: across 180 degrees, names of tiles, rasters without a place, other units."""

from running.errors import InputError

import numpy as np
import pystac
import pytest
import rasterio
from scenes import prepare, settings
from small_scenes import (
    EDGE,
    LOCAL,
    PRODUCT,
    UUID,
    items_of,
    local,
    local_item,
    make_item,
    save,
    values,
    write_day,
    write_images,
    write_raster,
)
from stac_server import Catalogue

from preparation import items as sources
from preparation import place, plan, sentinel2

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in (
        "DeprecationWarning",
        "PendingDeprecationWarning",
        "rasterio.errors.NotGeoreferencedWarning",
    )
]


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
        known = {"grid__code": f"MGRS-{tile}", "s2__processing_baseline": "02.14"}
        return make_item(f"S2A_{tile}_20210410_0_L2A", "2021-04-10", images, box, **known)

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
    item = local_item(file)
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
