"""Labels, splits, pictures, warnings, and tiles of others: what needs no catalogue."""

import json

from running.errors import InputError

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import make_tile
from rasterio.warp import transform as transform_places
from stac_server import FileServer

import prepare_tiles
import utils
from maps.land_cover import WORLDCOVER
from preparation import quick_look
from preparation.features import choose_splits
from preparation.labels import block_splits, worldcover_places
from preparation.quick_look import plot_quick_look
from tiles import Tile

CRS, LEFT, TOP, SIZE = "EPSG:32633", 300000, 5400000, 60
SHAPE = (4, SIZE, SIZE, 10)
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


@pytest.fixture
def tiles(tmp_path):
    """Two tiles side by side, the second shifted by 40 pixels to the east; they overlap."""
    folders = []
    for number, left in enumerate((LEFT, LEFT + 400)):
        folder = tmp_path / "data" / "toy" / "processed" / f"MGRS-{number}"
        place = {"crs": CRS, "transform": [10, 0, left, 0, -10, TOP]}
        folders.append(make_tile(folder, SHAPE, labels=False, seed=number, **place))
    return folders


def label(base_path, **changes):
    """Add labels to the tiles; returns them."""
    keys = {"base_path": str(base_path), "dataset_name": "toy", "statistics_only": True}
    return [Tile(f) for f in prepare_tiles.main(prepare_tiles.run_config | keys | changes)]


def field(column, row, width=8, height=8):
    """A rectangle whose corners are pixel corners of the first tile, in pixels."""
    left, top = LEFT + 10 * column, TOP - 10 * row
    return shapely.box(left, top - 10 * height, left + 10 * width, top)


@pytest.fixture
def fields(tmp_path):
    """A file in degrees of 64 fields of three crops; returns its path and its rows."""
    places = [(12 * i % 96 + 1, 12 * i // 96 * 7 + 1) for i in range(64)]
    crops = ["wheat", "maize", "beet"]
    frame = geopandas.GeoDataFrame(
        {
            "crop": [crops[i % 3] for i in range(64)],
            "code": [(i % 3) + 7 for i in range(64)],
            "use": [("train", "validation", "test")[i % 3] for i in range(64)],
        },
        geometry=[field(column, row, height=5) for column, row in places],
        crs=CRS,
    )
    frame.to_crs("EPSG:4326").to_file(tmp_path / "fields.gpkg")
    return str(tmp_path / "fields.gpkg"), list(zip(places, frame["crop"], strict=True))


def bad_classes(folder):
    """For classes_path: code 300 became 44, and other tables made tiles that nothing opens."""
    good = {"name": "beet", "color": "#00aa00"}
    tables = [{"300": good}, {"0": good}, {"1": good | {"color": "green"}}, {"1": {"name": 5}}]
    for number, table in enumerate(tables):
        (folder / f"classes{number}.json").write_text(json.dumps(table))
        yield str(folder / f"classes{number}.json")


def under(tile, array, place):
    """The values of a tile's array under a field of `fields`."""
    first = round((tile.info["transform"][2] - LEFT) / 10)
    column, row = place
    start = max(0, column - first)
    return array[row : row + 5, start : max(start, column - first + 8)]


def test_polygons_reappear_under_themselves(tiles, tmp_path, fields):
    path, rows = fields
    made = label(tmp_path, labels=path, class_column="crop")
    for tile in made:
        names = {int(code): e["name"] for code, e in tile.info["classes"].items()}
        assert names == {1: "beet", 2: "maize", 3: "wheat"}
        seen = np.zeros((SIZE, SIZE), bool)
        for place, crop in rows:
            values = under(tile, np.asarray(tile.labels), place)
            assert {names[code] for code in np.unique(values)} <= {crop}
            under(tile, seen, place)[:] = True
        assert ((np.asarray(tile.labels) > 0) == seen).all() and seen.any()
        assert tile.splits is None
    assert made[0].info["classes"] == made[1].info["classes"]


def test_codes_and_names_of_the_users_own(tiles, tmp_path, fields):
    path, rows = fields
    tile = label(tmp_path, labels=path, class_column="code")[0]
    assert sorted(map(int, tile.info["classes"])) == [7, 8, 9]
    classes = {"40": {"name": "wheat", "color": "#f096ff"}, "41": {"name": "maize"}}
    file = tmp_path / "classes.json"
    file.write_text(json.dumps(classes))
    keys = {"labels": path, "class_column": "crop", "classes_path": str(file)}
    with pytest.raises(InputError, match=r"found the classes \['beet'\], wanted those of"):
        label(tmp_path, **keys)
    file.write_text(json.dumps(classes | {"42": {"name": "beet"}}))
    tile = label(tmp_path, **keys)[0]
    assert set(np.unique(tile.labels)) == {0, 40, 41, 42}
    assert tile.info["classes"]["40"] == {"name": "wheat", "color": "#f096ff"}
    assert tile.info["classes"]["41"]["color"].startswith("#")


@pytest.mark.slow
def test_no_field_lies_in_two_splits(tiles, tmp_path, fields):
    path, rows = fields
    for splits in ("polygons", "blocks", "use"):
        keys = {"labels": path, "class_column": "crop", "splits": splits, "split_block": 130.0}
        made = label(tmp_path, **keys)
        split_of = {}
        for tile in made:
            assert ((np.asarray(tile.splits) > 0) == (np.asarray(tile.labels) > 0)).all()
            for place, crop in rows:
                found = np.unique(under(tile, np.asarray(tile.splits), place))
                if len(found):
                    assert len(found) == 1, (splits, place)
                    assert split_of.setdefault((place, crop), found[0]) == found[0]
        assert set(split_of.values()) == {1, 2, 3}
        if splits == "polygons":  # a fifth of each crop
            for crop in ("wheat", "maize", "beet"):
                ours = [split for (_, name), split in split_of.items() if name == crop]
                assert 0.1 < ours.count(2) / len(ours) < 0.35
                assert 0.1 < ours.count(3) / len(ours) < 0.35
        if splits == "use":
            wanted = {"wheat": 1, "maize": 2, "beet": 3}
            assert all(wanted[name] == split for (_, name), split in split_of.items())
    chosen = [
        np.array(label(tmp_path, **keys | {"splits": "polygons", "seed": seed})[0].splits)
        for seed in (0, 0, 1)
    ]
    assert (chosen[0] == chosen[1]).all() and (chosen[0] != chosen[2]).any()
    none = label(tmp_path, **keys | {"splits": ""})
    assert none[0].splits is None


def test_few_features_are_shared_out_and_twins_stay_together():
    frame = geopandas.GeoDataFrame(
        {"code": [1, 2, 2, 3, 3, 3, 4, 4]},
        geometry=[field(i, 0) for i in (0, 1, 2, 3, 4, 5, 6, 6)],
        crs=CRS,
    )
    splits = choose_splits(frame, 0)
    assert splits[0] == 1
    assert sorted(splits[1:3]) == [1, 3]
    assert sorted(splits[3:6]) == [1, 2, 3]
    assert splits[6] == splits[7] == 1
    shuffled = frame.iloc[::-1].reset_index(drop=True)
    assert choose_splits(shuffled, 0).tolist() == splits[::-1].tolist()


def test_points_fill_their_pixels(tiles, tmp_path):
    points = [shapely.Point(LEFT + 105, TOP - 205), shapely.Point(LEFT + 339, TOP - 1)]
    frame = geopandas.GeoDataFrame({"class": [3, 5]}, geometry=points, crs=CRS)
    frame.to_file(tmp_path / "points.geojson")
    tile = label(tmp_path, labels=str(tmp_path / "points.geojson"), class_column="class")[0]
    labels = np.asarray(tile.labels)
    assert labels[20, 10] == 3 and labels[0, 33] == 5 and (labels > 0).sum() == 2


def write_raster(path, array, left, top, pixel, crs=CRS, **options):
    profile = {"driver": "GTiff", "count": 1, "dtype": array.dtype, "crs": crs}
    profile |= {"height": array.shape[0], "width": array.shape[1]}
    profile["transform"] = rasterio.Affine(pixel, 0, left, 0, -pixel, top)
    with rasterio.open(path, "w", **profile | options) as file:
        file.write(array, 1)


def test_a_raster_is_put_in_place_by_nearest_pixel(tiles, tmp_path):
    """Classes 40 and 80 side by side: anything between them is a class that is not there."""
    array = np.random.default_rng(0).choice(np.array([40, 80, 255], np.uint8), (70, 50))
    path = tmp_path / "cover.tif"
    write_raster(path, array, LEFT - 60, TOP + 60, 20, nodata=255)
    tile = label(tmp_path, labels=str(path), splits="blocks", split_block=200.0)[0]
    wanted = np.kron(array, np.ones((2, 2), np.uint8))[6 : 6 + SIZE, 6 : 6 + SIZE]
    np.testing.assert_array_equal(tile.labels, np.where(wanted == 255, 0, wanted))
    assert tile.info["classes"]["40"]["name"] == "Cropland"
    splits = np.asarray(tile.splits)
    across = (splits[:, 1:] > 0) & (splits[:, :-1] > 0)
    assert (splits[:, 1:] != splits[:, :-1])[across].mean() < 0.1, "blocks of 26 pixels across"
    assert ((splits > 0) == (np.asarray(tile.labels) > 0)).all()


def test_blocks_are_of_the_ground_not_of_the_tile(tiles, tmp_path):
    array = np.full((100, 110), 40, np.uint8)
    write_raster(tmp_path / "cover.tif", array, LEFT, TOP, 10)
    keys = {"labels": str(tmp_path / "cover.tif"), "splits": "blocks", "split_block": 70.0}
    west, east = label(tmp_path, **keys)
    np.testing.assert_array_equal(west.splits[:, 40:], east.splits[:, : SIZE - 40])
    assert set(np.unique(west.splits)) == {1, 2, 3}


def test_the_same_ground_has_the_same_split_in_two_zones():
    """Regression: half of the polygons in the overlap of two zones had another split in each."""
    longitude, latitude = np.meshgrid(np.linspace(11.9, 12.1, 200), np.linspace(48, 48.2, 150))
    splits = []
    for crs in ("EPSG:32632", "EPSG:32633", "EPSG:4326"):
        x, y = transform_places("EPSG:4326", crs, longitude.ravel(), latitude.ravel())
        x, y = (np.reshape(values, longitude.shape) for values in (x, y))
        splits.append(block_splits(x, y, crs, 1600.0, 0))
    for other in splits[1:]:
        assert (splits[0] != other).mean() < 1e-3  # rounding along the borders
    assert set(np.unique(splits[0])) == {1, 2, 3}


def test_of_five_blocks_from_west_to_east_one_validates_and_one_tests():
    """Regression: each block was chosen by itself, so that a small tile could lack a split."""
    x, y = np.meshgrid(1600 * np.arange(100) + 800.0, 1600 * np.arange(30) + 5e6)
    splits = block_splits(x, y, "EPSG:6933", 1600.0, 0).reshape(30, 20, 5)
    assert (np.sort(splits, axis=2) == [1, 1, 1, 2, 3]).all()
    assert len(np.unique(splits.reshape(-1, 5), axis=0)) == 20, "all orders"


def test_labels_of_an_earlier_file_do_not_stay_beside_those_of_a_new_one(tiles, tmp_path, capsys):
    """One code would mean two classes in one data set."""
    write_raster(tmp_path / "cover.tif", np.full((100, 110), 40, np.uint8), LEFT, TOP, 10)
    label(tmp_path, labels=str(tmp_path / "cover.tif"), splits="blocks", split_block=70.0)
    write_raster(tmp_path / "west.tif", np.full((20, 20), 1, np.uint8), LEFT, TOP, 10)
    west, east = label(tmp_path, labels=str(tmp_path / "west.tif"))
    assert set(np.unique(west.labels)) == {0, 1}
    assert west.splits is east.labels is east.splits is None
    assert not {"classes", "labels_from"} & set(east.info)
    assert "cover.tif removed" in capsys.readouterr().out
    np.save(tiles[1] / "labels.npy", np.full((SIZE, SIZE), 7, np.uint8))  # of the user's own
    assert (label(tmp_path, labels=str(tmp_path / "west.tif"))[1].labels == 7).all()


def test_worldcover_of_two_squares_on_loopback(tmp_path):
    """A tile across the border of two 3 x 3 degree files, at 12 degrees east."""
    (x,), (y,) = transform_places("EPSG:4326", CRS, [12.0], [49.5])
    folder = tmp_path / "data" / "toy" / "processed" / "MGRS-0"
    place = {"crs": CRS, "transform": [10, 0, round(x) - 300, 0, -10, round(y) + 300]}
    make_tile(folder, SHAPE, labels=False, **place)
    (tmp_path / "web").mkdir()
    for name, left, code in (("N48E009", 9, 10), ("N48E012", 12, 80)):
        array = np.full((300, 300), code, np.uint8)
        path = tmp_path / "web" / f"{name}.tif"
        write_raster(path, array, left, 51, 0.01, "EPSG:4326", driver="COG", nodata=0)
    server = FileServer(tmp_path / "web")
    keys = {"labels": "worldcover", "worldcover_url": server.url + "/{place}.tif"}
    (tile,) = label(tmp_path, **keys)
    server.shutdown()
    row, column = np.mgrid[:SIZE, :SIZE] * 10 + 5
    xs, ys = place["transform"][2] + column.ravel(), place["transform"][5] - row.ravel()
    longitude = np.array(transform_places(CRS, "EPSG:4326", xs, ys)[0]).reshape(SIZE, SIZE)
    wanted = np.where(longitude < 12, 10, 80)
    assert (np.asarray(tile.labels) == wanted).mean() > 0.999  # to an eighth of a pixel
    assert tile.info["classes"]["80"] == WORLDCOVER[80]


def test_worldcover_squares_have_names():
    assert worldcover_places((11.9, 47.9, 12.1, 48.1)) == [
        "N45E009",
        "N45E012",
        "N48E009",
        "N48E012",
    ]
    assert worldcover_places((-0.5, -0.5, -0.1, -0.1)) == ["S03W003"]


def test_mistakes_in_labels_end_in_one_line(tiles, tmp_path, fields):
    path, _ = fields
    write_raster(tmp_path / "wide.tif", np.full((70, 70), 300, np.int32), LEFT, TOP, 10)
    write_raster(tmp_path / "real.tif", np.full((70, 70), 1.5, np.float32), LEFT, TOP, 10)
    write_raster(tmp_path / "far.tif", np.ones((70, 70), np.uint8), LEFT + 90000, TOP, 10)
    nowhere = geopandas.GeoDataFrame({"a": [1]}, geometry=[shapely.Point(1, 2)])
    nowhere.to_file(tmp_path / "nowhere.gpkg")
    (tmp_path / "text.gpkg").write_text("hello")
    for keys, message in [
        ({"labels": path}, "class_column=: wanted a column of .*: crop, code, use"),
        ({"labels": path, "class_column": "kind"}, "class_column=kind: wanted a column"),
        ({"labels": path, "class_column": "crop", "splits": "side"}, "splits=side: wanted a col"),
        ({"labels": path, "class_column": "crop", "splits": "crop"}, "splits=crop: found beet"),
        ({"labels": str(tmp_path / "wide.tif")}, "found code 300, wanted whole numbers 0 to 255"),
        ({"labels": str(tmp_path / "real.tif")}, "found code 1.5, wanted whole numbers"),
        ({"labels": str(tmp_path / "far.tif")}, "found no label inside any tile"),
        ({"labels": str(tmp_path / "real.tif"), "splits": "polygons"}, "wanted blocks"),
        ({"labels": str(tmp_path / "nowhere.gpkg"), "class_column": "a"}, "no coordinate system"),
        ({"labels": str(tmp_path / "text.gpkg"), "class_column": "a"}, "found no readable file"),
        ({"labels": "worldcover", "classes_path": path}, "classes_path=.* wanted JSON like"),
        *(
            ({"labels": path, "class_column": "crop", "classes_path": name}, "found {.*1 to 255")
            for name in bad_classes(tmp_path)
        ),
    ]:
        with pytest.raises(InputError, match=message) as error:
            label(tmp_path, **keys)
        assert "\n" not in str(error.value)
    assert not (tiles[0] / "labels.npy").exists()


# ---- pictures, warnings, tiles of others ---------------------------------------------------------


def test_the_picture_shows_the_median_of_the_clear_dates(tiles, monkeypatch):
    folder = tiles[0]
    info = json.loads((folder / "tile.json").read_text())
    names = ["B04", "B03", "B02", *info["bands"][3:]]
    days = len(np.load(folder / "doys.npy"))
    moments = [f"2021-06-{day:02d}T10:30:31Z" for day in range(1, days + 1)]  # as others write them
    (folder / "tile.json").write_text(json.dumps(info | {"bands": names, "dates": moments}))
    bands, masks = np.load(folder / "bands.npy"), np.load(folder / "masks.npy")
    seen = np.where(masks[..., None] > 0, bands[..., :3].astype(float), np.nan)
    with pytest.warns(RuntimeWarning, match="All-NaN"):
        wanted = np.nanmedian(seen, axis=0)
    np.testing.assert_allclose(plot_quick_look(folder), wanted)
    assert (folder / "quick_look.png").stat().st_size > 10_000
    monkeypatch.setattr(quick_look, "MAX_PIXELS", 20)
    monkeypatch.setattr(utils, "BLOCK_BYTES", 1)  # a row at a time
    np.testing.assert_allclose(plot_quick_look(folder), wanted[::3, ::3])


@pytest.mark.parametrize(
    ("place", "unit", "edge"),
    [
        ({"crs": CRS, "transform": [10, 0, LEFT, 0, -10, TOP]}, "km", 0.6),
        ({"crs": "EPSG:2263", "transform": [100, 0, LEFT, 0, -100, TOP]}, "km", 1.829),  # feet
        ({"crs": "EPSG:4326", "transform": [1e-4, 0, 12, 0, -1e-4, 48]}, "pixels", SIZE),
        ({}, "pixels", SIZE),
    ],
)
def test_the_picture_says_its_units(tmp_path, monkeypatch, place, unit, edge):
    names = ["B04", "B03", "B02", *"defghij"]
    folder = make_tile(tmp_path / "MGRS-0", SHAPE, bands=names, **place)
    figures = []
    monkeypatch.setattr(quick_look, "save_figure", lambda figure, path: figures.append(figure))
    plot_quick_look(folder)
    color, clear, labels, dates, bar = figures[0].axes
    for axes in (color, clear, labels):
        assert axes.get_xlabel() == axes.get_ylabel() == unit
        np.testing.assert_allclose((*axes.get_xlim(), *axes.get_ylim()), (0, edge, edge, 0), 1e-3)
    assert "reflectance 0 to 0." in color.get_title()
    (folder / "labels.npy").unlink()
    plot_quick_look(folder)
    assert len(figures[1].axes) == 4  # no empty box for labels that are not there
    assert bar.get_ylabel() == "clear dates of 4" and dates.get_ylabel() == "clear pixels (%)"


def test_few_dates_are_reported(tiles, tmp_path, capsys):
    label(tmp_path)
    assert "clear dates or fewer, wanted 10 to 20" in capsys.readouterr().out
