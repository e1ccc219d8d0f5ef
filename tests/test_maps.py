"""What lies beside a map: legends, false-colour bases, smaller formats, GeoTIFFs, new products."""

import inspect
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from helpers import GEOREFERENCE, ROOT, map_tile, run
from rio_cogeo.cogeo import cog_validate

import create_false_color_map
import infer
from maps import products
from maps.false_color import apply_basis, fit_basis
from maps.geotiff import write_geotiff
from maps.land_cover import class_legend
from maps.reader import RepresentationMap
from maps.writer import quantise


def test_false_color_is_ruled_neither_by_outliers_nor_by_missing_pixels():
    """Missing pixels must not take part in the PCA, nor one outlier set the range of colours."""
    rng = np.random.default_rng(0)
    representations = rng.normal(5, 1, (40, 40, 6)).astype(np.float32)
    plain = apply_basis(fit_basis(representations.reshape(-1, 6)), representations)
    representations[:10] = np.nan
    representations[20, 20] = 60
    valid = np.isfinite(representations[..., 0])
    rgba = apply_basis(fit_basis(representations[valid]), representations)
    assert (rgba[:10] == 0).all()
    assert (rgba[10:, :, 3] == 255).all()
    spread = rgba[10:, :, :3].reshape(-1, 3).std(0)
    assert (spread > 0.7 * plain[..., :3].reshape(-1, 3).std(0)).all(), spread


def test_false_color_does_not_depend_on_the_basis_of_the_dimensions():
    """Two encoders that show the same have the same colours, not their complements."""
    rng = np.random.default_rng(0)
    y = rng.exponential(1, (300, 6)) * [5, 4, 3, 1, 1, 1]
    other = y @ -np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = (apply_basis(fit_basis(part), part).astype(int) for part in (y, other))
    assert np.abs(a - b).max() <= 1


def test_legends_come_from_the_tile_or_from_worldcover():
    """One legend for all scripts: a code has the same name and colour everywhere; 0 is no class."""
    assert class_legend([0, 40, 95], {}) == {
        40: {"name": "Cropland", "color": "#f096ff"},
        95: {"name": "Mangroves", "color": "#00cf75"},
    }
    legend = class_legend(
        [2, 3], {"2": {"name": "Corn"}, "3": {"name": "Rice", "color": "#123456"}}
    )
    assert legend[2]["name"] == "Corn"
    assert legend[2]["color"].startswith("#")
    assert legend[3] == {"name": "Rice", "color": "#123456"}
    assert class_legend([7], {"2": {"name": "Corn"}})[7]["name"] == "class 7"


@pytest.mark.parametrize("kind", ["float16", "int8"])
def test_smaller_formats(workplace, tmp_path, kind):
    (full,) = map_tile(workplace, tmp_path / "full")
    (small,) = map_tile(workplace, tmp_path / f"small-{kind}", representation_format=kind)
    wanted = np.load(full / "representation_map.npy")
    assert np.load(small / "representation_map.npy").dtype == kind
    ((_, read),) = RepresentationMap(small / "representation_map.npy").blocks()
    assert (np.isnan(read) == np.isnan(wanted)).all()
    valid = np.isfinite(wanted[..., 0])
    a, b = read[valid], wanted[valid]
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert cosine.min() > 0.999
    if kind == "int8":
        scales = np.load(small / "representation_map_scales.npy")
        assert scales.shape == (24, 16)
        assert scales.dtype == np.float32


def test_int8_values_times_their_scale_are_the_representations():
    representations = np.random.default_rng(0).normal(0, 3, (5, 4, 16)).astype(np.float32)
    representations[0, 0] = np.nan  # no data
    representations[1, 1] = 0
    values, scales = quantise(representations)
    assert values.dtype == np.int8
    assert scales.dtype == np.float32
    back = values * scales[..., None]
    assert (np.isnan(back) == np.isnan(representations)).all()
    np.testing.assert_allclose(back, representations, atol=0.51 * np.nanmax(scales))


def test_geotiffs_have_place_colours_and_names(workplace, tmp_path):
    (folder,) = map_tile(workplace, tmp_path / "geo")
    with rasterio.open(folder / "classification_map.tif") as file:
        assert file.crs.to_string() == "EPSG:32631"
        assert file.transform[:6] == (10, 0, 500000, 0, -10, 5400000)
        assert file.nodata == 0
        assert file.profile["tiled"]
        assert file.profile["compress"] == "deflate"
        assert file.colormap(1)[95][:3] == (0x00, 0xCF, 0x75)
        np.testing.assert_array_equal(file.read(1), np.load(folder / "classification_map.npy"))
    names = (folder / "classification_map.tif.aux.xml").read_text()
    assert names.count("<Category>") + names.count("<Category />") == 96
    assert "Cropland" in names
    with rasterio.open(folder / "confidence.tif") as file:
        np.testing.assert_array_equal(file.read(1), np.load(folder / "confidence.npy"))
    run(create_false_color_map, representation_path=folder / "representation_map.npy")
    with rasterio.open(folder / "false_color.tif") as file:
        assert file.count == 4
        assert file.transform[2] == 500000


LEGEND = {1: {"name": "Corn & rye", "color": "#ff0000"}, 7: {"name": "Ash", "color": "#00ff80"}}


def test_geotiffs_are_cloud_optimised_and_keep_their_meaning_when_zoomed_out(tmp_path):
    """Regression: the directory came last and there were no overviews. No class is invented."""
    codes = np.random.default_rng(0).choice([0, 1, 7], (600, 700)).astype(np.uint8)
    legend = LEGEND | {9: {"name": "between", "color": "#808040"}}  # the mean of their colours
    values = codes.astype(np.float32)
    write_geotiff(tmp_path / "codes.tif", codes, GEOREFERENCE, 0, legend)
    write_geotiff(tmp_path / "values.tif", values, GEOREFERENCE, np.nan)
    write_geotiff(tmp_path / "rgba.tif", np.stack([codes] * 4, -1), GEOREFERENCE, None)
    for path in tmp_path.glob("*.tif"):
        assert cog_validate(path, strict=True, quiet=True) == (True, [], [])
    smaller = {}
    for name, array in (("codes", codes), ("values", values)):
        with rasterio.open(tmp_path / f"{name}.tif") as file:
            np.testing.assert_array_equal(file.read(1), array)
            assert file.overviews(1) == [2, 4]
        with rasterio.open(tmp_path / f"{name}.tif", overview_level=0) as file:
            smaller[name] = file.read(1)
    blocks = codes.reshape(300, 2, 350, 2)
    assert (blocks == smaller["codes"][:, None, :, None]).any((1, 3)).all()
    means = values.reshape(300, 2, 350, 2).mean((1, 3))
    np.testing.assert_allclose(smaller["values"], means, atol=1e-5)


def test_gdal_reads_names_and_colours_of_classes(tmp_path):
    """As QGIS does, by the attribute table: GDAL writes beside a copy what it has understood."""
    codes = np.array([[1, 7]], np.uint8)
    write_geotiff(tmp_path / "codes.tif", codes, GEOREFERENCE, 0, LEGEND)
    rasterio.shutil.copy(tmp_path / "codes.tif", tmp_path / "copy.tif", driver="GTiff")
    band = ElementTree.parse(tmp_path / "copy.tif.aux.xml").find("PAMRasterBand")
    names = [entry.text for entry in band.find("CategoryNames")]
    assert names == ["no data", "Corn & rye", None, None, None, None, None, "Ash"]
    table = band.find("GDALRasterAttributeTable")
    fields = [[part.text for part in field] for field in table.iter("FieldDefn")]
    # GDAL's usages: 5 the value, 2 the name, 6 to 8 red, green and blue
    assert [usage for _, _, usage in fields] == ["5", "2", "6", "7", "8"]
    rows = [[cell.text for cell in row] for row in table.iter("Row")]
    assert rows == [["1", "Corn & rye", "255", "0", "0"], ["7", "Ash", "0", "255", "128"]]
    with rasterio.open(tmp_path / "copy.tif") as file:
        assert file.colormap(1)[7] == (0, 255, 128, 255)


def test_a_product_is_added_as_the_docs_say(workplace, tmp_path, monkeypatch):
    """One row, and one line after the one that the docs show before it."""
    map_tile(workplace, tmp_path / "out")
    text = (ROOT / "docs/extend.md").read_text()
    row, fill = re.findall(r"^```diff\n .*\n(.*)\n\+(.*)\n```$", text, flags=re.MULTILINE)
    assert row[0][1:] in inspect.getsource(products)
    added = eval(row[1].strip(" ,"), vars(products))
    monkeypatch.setattr(products, "PRODUCTS", [*products.PRODUCTS, added])
    source = inspect.getsource(infer.map_blocks)
    assert source.count(fill[0][1:]) == 1
    names = dict(vars(infer))
    exec(source.replace(fill[0][1:], f"{fill[0][1:]}\n{fill[1]}"), names)
    monkeypatch.setattr(infer, "map_blocks", names["map_blocks"])
    (folder,) = map_tile(workplace, tmp_path / "out")  # was done, but without the new map
    margin, confidence = (np.load(folder / f"{name}.npy") for name in ("margin", "confidence"))
    # of two classes the second has the rest of the probability
    np.testing.assert_allclose(margin, 2 * confidence - 1, atol=1e-6)
    with rasterio.open(folder / "margin.tif") as file:
        np.testing.assert_array_equal(file.read(1), margin)
    map_tile(workplace, folder, checkpoint="pretrained", overwrite=True)
    assert not list(folder.glob("margin*"))


def test_what_cannot_be_averaged_is_not_when_zoomed_out(tmp_path):
    """Dimensions of a representation: the upper left pixel of four, not their mean."""
    array = np.zeros((600, 600, 2), np.float32)
    array[::2, ::2] = 8
    names = ["dimension 0", "dimension 1"]
    write_geotiff(tmp_path / "map.tif", array, GEOREFERENCE, np.nan, band_names=names)
    with rasterio.open(tmp_path / "map.tif", overview_level=0) as file:
        assert set(np.unique(file.read())) <= {0, 8}


def test_a_colour_table_has_no_data_transparent_and_pictures_an_alpha_band(tmp_path):
    legend = {2: {"name": "Corn", "color": "#102030"}}
    codes = np.full((4, 5), 2, np.uint8)
    write_geotiff(tmp_path / "codes.tif", codes, GEOREFERENCE, 0, legend)
    with rasterio.open(tmp_path / "codes.tif") as file:
        assert file.colormap(1)[0][3] == 0 and file.colormap(1)[2] == (16, 32, 48, 255)
    rgba = np.full((4, 5, 4), 9, np.uint8)
    write_geotiff(tmp_path / "rgba.tif", rgba, GEOREFERENCE, None)
    with rasterio.open(tmp_path / "rgba.tif") as file:
        assert file.colorinterp[3].name == "alpha"
