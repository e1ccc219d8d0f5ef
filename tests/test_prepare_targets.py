"""prepare_tiles.py targets=..: a quantity from a raster, or from polygons and points."""

from running.errors import InputError

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from helpers import make_tile

import prepare_tiles
from preparation import quick_look
from tiles import Tile

CRS, LEFT, TOP, SIZE = "EPSG:32633", 300000, 5400000, 20
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")
    for kind in ("DeprecationWarning", "PendingDeprecationWarning")
]


@pytest.fixture
def folder(tmp_path):
    place = {"crs": CRS, "transform": [10, 0, LEFT, 0, -10, TOP]}
    path = tmp_path / "data/toy/processed/MGRS-0"
    return make_tile(path, (2, SIZE, SIZE, 3), labels=False, **place)


def add(folder, **changes):
    """Add a quantity to the tile; returns it."""
    base_path = str(folder.parents[3])
    keys = {"base_path": base_path, "dataset_name": "toy", "statistics_only": True}
    return Tile(prepare_tiles.main(prepare_tiles.run_config | keys | changes)[0])


def write_features(path, values, shapes):
    geopandas.GeoDataFrame({"height": values}, geometry=shapes, crs=CRS).to_file(path)
    return str(path)


def square(column, row, size):
    left, top = LEFT + 10 * column, TOP - 10 * row
    return shapely.box(left, top - 10 * size, left + 10 * size, top)


def test_a_raster_of_whole_numbers_gives_means_and_no_value_where_it_has_none(tmp_path, folder):
    """Regression in public tools: integers cut off, nodata read as 0 or as -9999."""
    values = np.random.default_rng(0).integers(-500, 30_000, (2 * SIZE, 2 * SIZE)).astype(np.int16)
    values[:4, :4] = -9999
    grid = {"crs": CRS, "transform": rasterio.Affine(5, 0, LEFT, 0, -5, TOP)}
    grid |= {"width": 2 * SIZE, "height": 2 * SIZE, "count": 1, "dtype": "int16", "nodata": -9999}
    with rasterio.open(tmp_path / "height.tif", "w", **grid) as file:
        file.write(values, 1)
        file.scales, file.offsets = (0.01,), (-1.5,)
    tile = add(folder, targets=str(tmp_path / "height.tif"), target_unit="m", splits="blocks")
    assert tile.info["target"] == {"name": "height", "unit": "m"}
    expected = values.reshape(SIZE, 2, SIZE, 2).mean((1, 3)) * 0.01 - 1.5
    expected[:2, :2] = np.nan
    assert tile.targets.dtype == np.float32
    np.testing.assert_allclose(tile.targets, expected, rtol=1e-5)
    assert not np.isin(expected[2:] % 0.01, [0]).all(), "fractions of the raster's own steps"
    assert (np.asarray(tile.splits) > 0).tolist() == np.isfinite(expected).tolist()


def test_the_picture_of_a_tile_shows_its_quantity(tmp_path, folder, monkeypatch, capsys):
    figures = []
    monkeypatch.setattr(quick_look, "save_figure", lambda figure, path: figures.append(figure))
    shapes = [square(2, 3, 4), square(12, 12, 3)]
    path = write_features(tmp_path / "fields.gpkg", [1.25, 7], shapes)
    tile = add(folder, targets=path, target_column="height", target_unit="m")
    assert "median colours, clear dates, targets" in capsys.readouterr().out
    (axes,) = [axes for axes in figures[0].axes if axes.get_title() == "targets"]
    (image,) = axes.images
    np.testing.assert_array_equal(image.get_array().filled(np.nan), tile.targets)
    assert image.colorbar.ax.get_ylabel() == "height [m]" and image.get_clim() == (1.25, 7)


def test_polygons_and_points_give_the_mean_within_a_pixel(tmp_path, folder):
    shapes = [square(2, 3, 4), square(4, 3, 4), square(12, 12, 3), square(15, 2, 2)]
    tile = add(
        folder,
        targets=write_features(tmp_path / "fields.gpkg", [1.25, 2.5, 7, np.nan], shapes),
        target_column="height",
        target_name="canopy height",
        splits="polygons",
    )
    expected = np.full((SIZE, SIZE), np.nan)
    expected[3:7, 2:6], expected[3:7, 4:8], expected[12:15, 12:15] = 1.25, 2.5, 7
    expected[3:7, 4:6] = (1.25 + 2.5) / 2
    np.testing.assert_array_equal(tile.targets, expected.astype(np.float32))
    assert tile.info["target"] == {"name": "canopy height", "unit": ""}
    for corner in (np.s_[3:7, 2:4], np.s_[3:7, 6:8], np.s_[12:15, 12:15]):
        assert len(np.unique(tile.splits[corner])) == 1, "a polygon has one split"
    points = [shapely.Point(LEFT + x, TOP - y) for x, y in ((11, 12), (19, 18), (55, 5))]
    path = write_features(tmp_path / "points.gpkg", [10, 13, 4], points)
    tile = add(folder, targets=path, target_column="height", target_unit="m")
    assert tile.splits is None, "those of the polygons are not of these points"
    known = np.argwhere(np.isfinite(tile.targets)).tolist()
    assert known == [[0, 5], [1, 1]]
    assert tile.targets[1, 1] == 11.5


@pytest.mark.parametrize(
    ("values", "column", "message"),
    [
        ([1.0, 2.0], "hight", "target_column=hight: wanted a column of .*: height"),
        (["tall", "low"], "height", r"target_column=height: found .* like .'tall', 'low'. in"),
        ([np.inf, 2.0], "height", "target_column=height: found an infinite number, wanted finite"),
        ([np.nan, np.nan], "height", "found no feature with number and geometry, wanted"),
        ([1.0, 2.0], "", "cannot be read .*, wanted a raster, or target_column= of a file"),
    ],
)
def test_what_is_no_quantity_ends_in_one_line(tmp_path, folder, values, column, message):
    path = write_features(tmp_path / "a.gpkg", values, [square(0, 0, 1), square(5, 5, 2)])
    with pytest.raises(InputError, match=message) as error:
        add(folder, targets=path, target_column=column)
    assert "\n" not in str(error.value)
    assert not (folder / "targets.npy").exists()


def test_a_tile_without_any_target_loses_those_of_an_earlier_call(tmp_path, folder):
    keys = {"target_column": "height"}
    here = write_features(tmp_path / "here.gpkg", [1.5], [square(2, 2, 2)])
    assert add(folder, targets=here, splits="polygons", **keys).splits is not None
    far = write_features(tmp_path / "far.gpkg", [1.5], [square(200, 200, 2)])
    with pytest.raises(InputError, match="found no target inside any tile"):
        add(folder, targets=far, **keys)
    assert Tile(folder).targets is None and Tile(folder).splits is None
    assert "target" not in Tile(folder).info
    with pytest.raises(InputError, match="target_unit=m: found no targets, wanted targets="):
        add(folder, target_unit="m")
