"""item.json beside a map: a STAC item, where a tile has a place and dates."""

import json
import sys

from running.errors import notice
from running.files import file_hash

import numpy as np
import pystac
import pytest
import rasterio
from map_helpers import CLASSES, make_checkpoints, make_tile, map_tile, run
from pystac.extensions.classification import ClassificationExtension

import infer
from maps import stac

DATES = [f"2021-{month:02}-05" for month in range(1, 13)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("place")
    make_tile(path / "MGRS-A", dates=DATES)
    make_checkpoints(path)
    return path


def test_an_item_is_valid_and_says_what_a_map_is(place, tmp_path):
    """By the schemas of the core that pystac brings; those of extensions are on the web alone."""
    map_tile(place, tmp_path, start="40", end="250")
    item = pystac.Item.from_file(str(tmp_path / "item.json"))
    extensions = [url.split("/")[3] for url in item.stac_extensions]
    assert sorted(extensions) == ["classification", "processing", "projection", "raster"]
    properties = item.properties
    assert properties["start_datetime"] == "2021-03-05T00:00:00Z"  # the season alone
    assert properties["end_datetime"] == "2021-09-05T23:59:59Z"
    assert file_hash(place / "classifier.pt") in properties["processing:lineage"]
    assert "season=40 to 250" in properties["processing:lineage"]
    assert set(item.assets) == {
        "valid_count", "classification_map", "confidence", "applicability", "overview", "provenance"
    }  # fmt: skip
    for asset in item.assets.values():
        assert (tmp_path / asset.href).exists()
    with rasterio.open(tmp_path / "confidence.tif") as file:
        assert tuple(properties["proj:bbox"]) == tuple(file.bounds)
        assert properties["proj:shape"] == [file.height, file.width]
    (band,) = item.assets["confidence"].extra_fields["raster:bands"]
    confidence = np.load(tmp_path / "confidence.npy")
    np.testing.assert_allclose(band["statistics"]["mean"], np.nanmean(confidence), rtol=1e-5)
    assert band["nodata"] == "nan"
    classes = ClassificationExtension.ext(item.assets["classification_map"]).classes
    names = [(one.value, one.to_dict()["title"]) for one in classes]
    assert names == [(0, "no data")] + [(int(c), entry["name"]) for c, entry in CLASSES.items()]
    assert classes[1].color_hint == CLASSES["40"]["color"].lstrip("#")
    item.stac_extensions = []
    assert item.validate()  # raises where it is not


def test_no_item_where_something_is_missing(place, tmp_path, monkeypatch, capsys):
    """Dates, degrees, rio-stac: one line, and the map is whole."""
    local = 'LOCAL_CS["drawing",UNIT["metre",1]]'
    make_tile(tmp_path / "undated/MGRS-A")
    make_tile(tmp_path / "drawing/MGRS-A", dates=DATES, crs=local)
    cases = [("undated", "found no dates, so"), ("drawing", "found a crs without degrees, so")]
    for name, line in cases:
        keys = {"tile_path": tmp_path / name / "MGRS-A", "output_dir": tmp_path / f"{name}_map"}
        run(infer, checkpoint_path=place / "classifier.pt", **keys)
        assert f"{line} there is no item.json" in capsys.readouterr().out
        assert (tmp_path / f"{name}_map/infer.json").exists()
        assert not (tmp_path / f"{name}_map/item.json").exists()
    monkeypatch.setitem(sys.modules, "rio_stac", None)
    notice.cache_clear()
    for name in ("one", "two"):
        map_tile(place, tmp_path / name)
        assert not (tmp_path / name / "item.json").exists()
    text = capsys.readouterr().out
    assert text.count("wanted pip install -r requirements-export.txt") == 1


def test_a_map_that_is_replaced_leaves_no_old_item(place, tmp_path, monkeypatch):
    map_tile(place, tmp_path)
    before = json.loads((tmp_path / "item.json").read_text())
    monkeypatch.setitem(sys.modules, "rio_stac", None)
    map_tile(place, tmp_path, overwrite=True, min_valid=4)
    assert before["id"].startswith("MGRS-A_20210105_20211205_")
    assert not (tmp_path / "item.json").exists()


def test_assets_say_what_they_are(place, tmp_path):
    """GeoTIFFs that are cloud-optimised, and names of classes without signs or spaces."""
    map_tile(place, tmp_path)
    assets = json.loads((tmp_path / "item.json").read_text())["assets"]
    kinds = {name: one["type"] for name, one in assets.items()}
    cog = "image/tiff; application=geotiff; profile=cloud-optimized"
    assert kinds["classification_map"] == kinds["confidence"] == cog
    assert assets["overview"]["href"] == "./classification_map.png"
    classes = {3: "Bare / sparse", 4: "草"}
    named = {code: {"name": name, "color": "#000000"} for code, name in classes.items()}
    names = [entry["name"] for entry in stac.describe_classes(named)]
    assert names == ["no_data", "Bare_sparse", "class_4"]
