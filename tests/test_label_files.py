"""Label files as they come: tables, layers, GeoParquet, odd class names, rasters with nodata."""

import json
import sys

import geopandas
import numpy as np
import pandas
import pyogrio
import pytest
import rasterio
import shapely
from rasterio.enums import ColorInterp
from rasterio.warp import transform as transform_places

import prepare_tiles
from preparation.labels import block_splits, burn_features, open_labels, warp_rasters
from running.errors import InputError

PLANE = 'LOCAL_CS["drone",UNIT["metre",1]]'  # a coordinate system without a place on the Earth
UTM = "EPSG:32633"
GRID = rasterio.Affine(10, 0, 300000, 0, -10, 5400000)  # in UTM
POINTS = pandas.DataFrame({"lon": [15.5, 15.25], "lat": [48.75, 48.5], "crop": ["maize", "beet"]})


def settings(**changes):
    return prepare_tiles.run_config | {"class_column": "crop"} | changes


def read(path, **changes):
    """The labels of a file."""
    return open_labels(settings(labels=str(path), **changes))


def refused(message, **changes):
    """Opening the labels ends in one line that holds the message (a regular expression)."""
    with pytest.raises(InputError, match=message) as error:
        open_labels(settings(**{key: str(value) for key, value in changes.items()}))
    assert "\n" not in str(error.value)


def polygons(path, crs=UTM, layer="fields", **columns):
    """Write a file of squares of 20 m along the upper edge of GRID, one for each row."""
    count = len(next(iter(columns.values())))
    shapes = [shapely.box(300000 + 20 * i, 5399980, 300020 + 20 * i, 5400000) for i in range(count)]
    pyogrio.write_dataframe(geopandas.GeoDataFrame(columns, geometry=shapes, crs=crs), path, layer)
    return path


# ---- tables --------------------------------------------------------------------------------------


def write_table(folder, kind, table=POINTS):
    path = folder / f"points.{kind}"
    if kind in ("csv", "tsv"):
        table.to_csv(path, index=False, sep="," if kind == "csv" else "\t")
    elif kind == "dbf":
        pyogrio.write_dataframe(table, path, driver="ESRI Shapefile")
    else:
        pyogrio.write_dataframe(table, path, layer="points")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "dbf", "gpkg"])
def test_a_table_with_longitudes_and_latitudes_is_points(tmp_path, kind):
    """Regression: a traceback, as such a table has no coordinate system."""
    labels = read(write_table(tmp_path, kind))
    places = [(point.x, point.y) for point in labels.features.geometry]
    assert places == [(15.5, 48.75), (15.25, 48.5)]
    assert labels.features.crs == "EPSG:4326"
    assert labels.features["code"].tolist() == [2, 1]
    assert {code: entry["name"] for code, entry in labels.classes.items()} == {
        1: "beet",
        2: "maize",
    }


def test_tables_as_people_write_them(tmp_path, capsys):
    path = tmp_path / "points.csv"
    path.write_text("Crop;Longitude;LATITUDE\n7;15,5;48,75\n12;;48,5\n;15,5;48,5\n9;-15,25;-48\n")
    labels = read(path, class_column="Crop")
    assert labels.features["code"].tolist() == [7, 9], "codes, not names of codes"
    assert [point.wkt for point in labels.features.geometry][1] == "POINT (-15.25 -48)"
    text = capsys.readouterr().out
    assert "1 features without a class are left out" in text
    assert "1 features without a geometry are left out" in text


def test_a_table_on_a_regular_grid_is_no_raster(tmp_path):
    """GDAL reads such a table as a raster of points."""
    rows = [f"{15 + i / 10},{48 + j / 10},{i + 1}" for j in range(3) for i in range(3)]
    (tmp_path / "grid.csv").write_text("\n".join(["lon,lat,z", *rows]) + "\n")
    assert len(read(tmp_path / "grid.csv", class_column="z").features) == 9


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("x,y,crop", "500010,5399900,maize", "no geometries and the columns x, y, crop; wanted"),
        ("lon,lat,crop", "500010,5399900,maize", "found lon 500010.*, wanted degrees, -180 to 180"),
        ("lon,lat,crop", "15,120,maize", "found lat 120.*, wanted degrees, -90 to 90"),
        ("lon,lat,crop", "15 E,48 N,maize", "found lon 15 E, wanted degrees"),
        ("lon,lat,longitude,latitude,crop", "1,2,3,4,maize", "no geometries and the columns"),
        ("lon,lat,kind", "15,48,maize", "class_column=crop: wanted a column of"),
    ],
)
def test_a_table_without_degrees_ends_in_one_line(tmp_path, header, row, message):
    (tmp_path / "points.csv").write_text(f"{header}\n{row}\n")
    refused(message, labels=tmp_path / "points.csv")


# ---- layers and GeoParquet -----------------------------------------------------------------------


def test_one_of_several_layers_has_to_be_named(tmp_path, recwarn):
    """Regression: the first was read, with a warning of the library."""
    path = polygons(tmp_path / "project.gpkg", layer="roads", road=["A1"])
    polygons(path, crop=["maize"])
    refused("found the layers roads, fields, wanted labels_layer= one of them", labels=path)
    refused("labels_layer=field: wanted a layer of .*: roads", labels=path, labels_layer="field")
    labels = read(path, labels_layer="fields")
    assert labels.classes == {1: {"name": "maize"}}
    assert not [one for one in recwarn if "layer" in str(one.message)]


def test_tables_beside_the_only_layer_with_geometries_do_not_matter(tmp_path, capsys):
    """As the styles that QGIS keeps in a GeoPackage."""
    path = tmp_path / "project.gpkg"
    pyogrio.write_dataframe(pandas.DataFrame({"styleQML": ["..", ".."]}), path, layer="a_styles")
    polygons(path, crop=["maize"])
    assert len(read(path).features) == 1
    assert "reading the layer fields, the only one with geometries" in capsys.readouterr().out


def test_a_layer_is_of_a_vector_file(tmp_path):
    refused("labels_layer=fields: found no labels", labels_layer="fields")
    refused("labels_layer=a: wanted none, as the labels", labels="worldcover", labels_layer="a")
    refused("labels_layer=a: found a Parquet file", labels=tmp_path / "a.pq", labels_layer="a")


def test_warnings_of_a_library_are_lines(tmp_path, capsys, monkeypatch, recwarn):
    path, inner = polygons(tmp_path / "fields.gpkg", crop=["maize"]), geopandas.read_file

    def warn(*arguments, **keywords):
        pyogrio.geopandas.warnings.warn("odd ring\nin a shape", stacklevel=1)
        return inner(*arguments, **keywords)

    monkeypatch.setattr(geopandas, "read_file", warn)
    read(path)
    assert f"{path}: odd ring\n" in capsys.readouterr().out
    assert not list(recwarn)


def test_geoparquet(tmp_path):
    """Regression: a message about libduckdb."""
    pytest.importorskip("pyarrow")
    fields = geopandas.read_file(polygons(tmp_path / "fields.gpkg", crop=["maize", "beet"]))
    fields = fields.rename_geometry("shape")
    fields.to_parquet(tmp_path / "fields.parquet")
    labels = read(tmp_path / "fields.parquet")
    assert labels.features["code"].tolist() == [2, 1]
    assert labels.features.crs == UTM
    assert labels.features.geometry.geom_equals(fields.geometry).all()
    POINTS.to_parquet(tmp_path / "points.parquet")  # without geometries
    assert read(tmp_path / "points.parquet").features.crs == "EPSG:4326"
    (tmp_path / "text.parquet").write_text("hello")
    refused("text.parquet: found no readable file", labels=tmp_path / "text.parquet")
    refused(
        "class_column=shape: wanted a column of .*: crop$",
        **{"labels": tmp_path / "fields.parquet", "class_column": "shape"},
    )


def test_geoparquet_without_its_library_ends_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "fields.parquet").write_bytes(b"PAR1" + b"\0" * 64 + b"PAR1")
    refused("pyarrow: not installed, wanted pip install", labels=tmp_path / "fields.parquet")


# ---- classes and splits of features --------------------------------------------------------------


def test_blanks_and_empty_texts_make_no_class(tmp_path, capsys):
    """Regression: '', ' ', 'maize' and 'maize ' were four classes."""
    crops = ["maize", "maize ", "", " ", None, "winter  wheat", "winter wheat", "\tmaize"]
    path = polygons(tmp_path / "fields.gpkg", crop=crops, use=["1"] * 4 + ["2"] + [" Test "] * 3)
    labels = read(path, splits="use")
    names = [labels.classes[code]["name"] for code in labels.features["code"]]
    assert names == ["maize", "maize", "winter wheat", "winter wheat", "maize"]
    assert labels.features["split"].tolist() == [1, 1, 3, 3, 3]
    text = capsys.readouterr().out
    assert "3 features without a class are left out" in text
    assert "needless blanks removed from the class of 3 features" in text
    classes = {"5": {"name": "maize "}, "6": {"name": "winter wheat"}}
    (tmp_path / "classes.json").write_text(json.dumps(classes))
    labels = read(path, classes_path=str(tmp_path / "classes.json"))
    assert labels.features["code"].tolist() == [5, 5, 6, 6, 5]
    (tmp_path / "classes.json").write_text(json.dumps(classes | {"7": {"name": "maize"}}))
    refused("one name for two codes", labels=path, classes_path=tmp_path / "classes.json")


def test_a_file_of_empty_classes_ends_in_one_line(tmp_path):
    path = polygons(tmp_path / "fields.gpkg", crop=["", " "])
    refused("found no feature with class and geometry", labels=path)


def test_a_column_called_code_keeps_its_splits(tmp_path):
    """Regression: the codes of the classes were read in its place."""
    path = polygons(tmp_path / "fields.gpkg", crop=["maize", "beet", "beet"], code=[1, 3, 2])
    assert read(path, splits="code").features["split"].tolist() == [1, 3, 2]


# ---- rasters -------------------------------------------------------------------------------------


def write_raster(path, array, corner=(300000, 5400000), pixel=10, crs=UTM, **options):
    """Write a raster of one band; mask= is its mask, meaning= adds bands of such meanings."""
    mask, others = options.pop("mask", None), options.pop("others", {})
    profile = {"driver": "GTiff", "count": 1 + len(others), "dtype": array.dtype, "crs": crs}
    profile |= {"height": array.shape[0], "width": array.shape[1]}
    profile["transform"] = rasterio.Affine(pixel, 0, corner[0], 0, -pixel, corner[1])
    with rasterio.open(path, "w", **profile | options) as file:
        file.colorinterp = [ColorInterp.gray, *others]
        for number, band in enumerate([array, *others.values()], 1):
            file.write(band, number)
        if mask is not None:
            file.write_mask(mask)
    return str(path)


CODES = np.arange(1, 17, dtype=np.uint8).reshape(4, 4)
HOLE = np.where(CODES == 7, 0, CODES)  # what has to come out: the class 7 is hidden below
WITH_NODATA = {
    "255": (np.where(CODES == 7, np.uint8(255), CODES), {"nodata": 255}),
    "7": (CODES, {"nodata": 7}),
    "-9999": (np.where(CODES == 7, np.int16(-9999), CODES), {"nodata": -9999}),
    "float": (np.where(CODES == 7, np.float32(-3e38), CODES), {"nodata": np.float32(-3e38)}),
    "NaN": (np.where(CODES == 7, np.float32(np.nan), CODES), {"nodata": np.nan}),
    "undeclared NaN": (np.where(CODES == 7, np.nan, CODES), {}),
    "mask": (CODES, {"mask": CODES != 7}),
    "alpha": (CODES, {"others": {ColorInterp.alpha: np.uint8(255) * (CODES != 7)}}),
    "alpha and nodata": (
        CODES,
        {"others": {ColorInterp.alpha: np.full((4, 4), 255, np.uint8)}, "nodata": 7},
    ),
}


@pytest.mark.parametrize("kind", WITH_NODATA)
def test_nodata_of_a_raster_is_no_class(tmp_path, kind):
    array, options = WITH_NODATA[kind]
    path = write_raster(tmp_path / "cover.tif", array, **options)
    open_labels(settings(labels=path))
    found = warp_rasters(path, GRID @ rasterio.Affine.translation(-1, 0), (5, 6), UTM)
    np.testing.assert_array_equal(found, np.pad(HOLE, ((0, 1), (1, 1))))


def test_rasters_that_are_no_class_codes_end_in_one_line(tmp_path, recwarn):
    two = {"others": {ColorInterp.undefined: CODES}}
    path = write_raster(tmp_path / "two.tif", CODES, **two)
    refused("found 2 bands, wanted one of class codes .*vrt://.*bands=1", labels=path)
    assert open_labels(settings(labels=f"vrt://{path}?bands=1"))
    for name, array, message in [
        ("half.tif", CODES + 0.5, "found code 1.5, wanted whole numbers 0 to 255"),
        ("wide.tif", CODES.astype(np.int32) * 100, "found code 300, wanted"),
        ("minus.tif", CODES.astype(np.int16) - 3, "found code -2, wanted"),
    ]:
        path = write_raster(tmp_path / name, array)
        with pytest.raises(InputError, match=message):
            warp_rasters(path, GRID, (4, 4), UTM)
    refused("found complex64", labels=write_raster(tmp_path / "c.tif", CODES.astype(np.complex64)))
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        path = write_raster(tmp_path / "nowhere.tif", CODES, transform=rasterio.Affine.identity())
    refused("found uint8, .* wanted whole numbers and a place on the Earth", labels=path)
    assert not list(recwarn)


# ---- places --------------------------------------------------------------------------------------


def test_labels_at_180_degrees(tmp_path):
    """Regression: a tile across 180 degrees found no square of WorldCover."""
    grid, crs = rasterio.Affine(1000, 0, 99960, 0, -1000, 8200000), "EPSG:32701"  # tile 01KAB
    row, column = np.mgrid[:110, :110] * 1000 + 500
    places = transform_places(crs, "EPSG:4326", 99960 + column.ravel(), 8200000 - row.ravel())
    longitudes = np.reshape(places[0], row.shape)
    wanted = np.where(longitudes > 0, 9, 7)
    assert set(np.unique(wanted)) == {7, 9} and np.abs(longitudes).min() > 179
    for place, left, code in (("E177", 177, 9), ("W180", -180, 7)):
        for south in (15, 18):
            array = np.full((30, 30), code, np.uint8)
            path = tmp_path / f"S{south}{place}.tif"
            write_raster(path, array, (left, 3 - south), 0.1, "EPSG:4326")
    found = warp_rasters(str(tmp_path / "{place}.tif"), grid, (110, 110), crs)
    assert (found == wanted).mean() > 0.99
    world = np.full((180, 360), 7, np.uint8)
    world[:, 180:] = 9
    path = write_raster(tmp_path / "world.tif", world, (-180, 90), 1, "EPSG:4326")
    assert (warp_rasters(path, grid, (110, 110), crs) == wanted).mean() > 0.99
    shapes = [shapely.Point(longitudes[50, i], -16.7) for i in (0, 109)]
    shapes += [shapely.box(179.8, -17, 180, -16.8), shapely.box(-180, -17, -179.8, -16.8)]
    points = geopandas.GeoDataFrame({"code": [1, 2, 3, 4]}, geometry=shapes, crs="EPSG:4326")
    codes, _ = burn_features(points, grid, (110, 110), crs, settings())
    row = codes[int(np.flatnonzero((codes == 3).any(1)).mean())]
    assert set(np.unique(codes)) == {0, 1, 2, 3, 4}
    assert (np.diff(np.flatnonzero(row)) == 1).all(), "the halves touch at 180 degrees"


def test_labels_without_a_place_on_the_earth_end_in_one_line(tmp_path):
    """Regression: tracebacks of two libraries."""
    raster = write_raster(tmp_path / "plane.tif", CODES, crs=PLANE)
    vector = polygons(tmp_path / "plane.gpkg", crs=PLANE, crop=["maize"])
    for path in (raster, vector):
        refused("coordinate system .*, which cannot be transformed to 'WGS 84'", labels=path)
    labels = read(vector, statistics_only=True)
    message = "labels=.*plane.*cannot be transformed to 'WGS 84 / UTM zone 33N'"
    with pytest.raises(InputError, match=message):
        burn_features(labels.features, GRID, (4, 4), UTM, settings(labels=str(vector)))
    with pytest.raises(InputError, match=message):
        warp_rasters(raster, GRID, (4, 4), UTM)
    for function in (  # the last two: coordinates that no place on the Earth has
        lambda: warp_rasters("{place}.tif", GRID, (4, 4), PLANE),
        lambda: block_splits(np.zeros(2), np.zeros(2), PLANE, 100.0, 0),
        lambda: block_splits(np.array([1e12]), np.zeros(1), UTM, 100.0, 0),
        lambda: warp_rasters("{place}.tif", rasterio.Affine(10, 0, 1e9, 0, -10, 0), (4, 4), UTM),
    ):
        with pytest.raises(InputError, match="wanted .* Earth|is not on the Earth"):
            function()


def test_labels_and_tile_in_one_plane_fit(tmp_path):
    """As drone images have it, whose plane has no place on the Earth."""
    raster = write_raster(tmp_path / "plane.tif", CODES, crs=PLANE)
    np.testing.assert_array_equal(warp_rasters(raster, GRID, (4, 4), PLANE), CODES)
    vector = polygons(tmp_path / "plane.gpkg", crs=PLANE, crop=["maize"])
    features = read(vector, statistics_only=True).features
    codes, _ = burn_features(features, GRID, (4, 4), PLANE, settings())
    assert codes.sum() == 4
    other = PLANE.replace("drone", "another drone")
    with pytest.raises(InputError, match="'drone', which cannot be transformed to 'another drone'"):
        warp_rasters(raster, GRID, (4, 4), other)
