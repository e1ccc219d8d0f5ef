"""label_efficiency.py on embeddings of others, and on another year or region."""

import json
import re

from running.errors import InputError, notice

import numpy as np
import pytest
import rasterio
from helpers import GEOREFERENCE, make_dataset, make_tile, run, save, tile_of

import label_efficiency
from evaluation import classifiers
from evaluation.shared_labels import notice_same_ground
from evaluation.tasks import Classes
from maps.embeddings import EmbeddingMap, open_maps, parse_sources
from tiles import Tile

SHAPE = (20, 24, 16, 10)  # of the tiles of `workplace`
MATCHING = {1: "Cropland", 2: "Mangroves", 3: "Maize"}
ELSEWHERE = GEOREFERENCE | {"transform": [10, 0, 600000, 0, -10, 5400000]}


@pytest.fixture(autouse=True)
def quick_choice(monkeypatch):
    monkeypatch.setattr(classifiers, "FOLDS", 2)
    monkeypatch.setattr(classifiers, "REPEATS", 1)
    notice.cache_clear()


@pytest.fixture
def two_sets(workplace, tmp_path):
    """A folder above data/ with "toy" of `workplace`, and room for another data set."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data/toy").symlink_to(workplace / "data/toy")
    return tmp_path


def score(workplace, base_path, **keywords):
    standard = {"checkpoint_path": workplace / "pretrained/best.pt", "base_path": base_path}
    standard |= {"dataset_name": "toy", "output_dir": base_path / "out", "models": "harmonic"}
    return run(label_efficiency, **standard | {"seeds": 1, "label_counts": "40"} | keywords)


def refused(message, function, *arguments, **keywords):
    with pytest.raises(InputError, match=message) as error:
        function(*arguments, **keywords)
    assert "\n" not in str(error.value)


def write_tif(path, array, nodata=None, transform=GEOREFERENCE["transform"], **tags):
    """A GeoTIFF of an array (H, W, D) with what a tile of `workplace` has as CRS."""
    height, width, count = array.shape
    profile = {"height": height, "width": width, "count": count, "dtype": array.dtype}
    profile |= {"crs": GEOREFERENCE["crs"], "transform": rasterio.Affine(*transform)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", driver="GTiff", nodata=nodata, **profile) as file:
        file.write(np.moveaxis(array, -1, 0))
        for name, value in tags.items():
            setattr(file, name, value)


def class_map(tile, seed=0):
    """An embedding (H, W, 4) in which classes 40 and 95 differ by ten deviations."""
    values = np.random.default_rng(seed).normal(0, 0.1, (*SHAPE[1:3], 4)).astype(np.float32)
    values[..., 2] += np.load(tile / "labels.npy") == 95
    return values


# ---- maps of others ------------------------------------------------------------------------------


def test_maps_are_rows_on_the_pixels_of_all_rows(workplace, tmp_path, capsys):
    """Values of the right pixels, whatever the format; where one has none, no row has the pixel."""
    folder = tmp_path / "maps"
    first, second = (class_map(tile_of(workplace, number)) for number in (0, 1))
    first[5, 3:9] = np.nan
    second[:2, 7, 1] = -9999
    (folder / "MGRS-0").mkdir(parents=True)
    np.save(folder / "MGRS-0/any_name.npy", first)
    write_tif(folder / "MGRS-1/any_name.tif", second, nodata=-9999)
    keywords = {"output_dir": tmp_path / "out", "label_counts": "0"}
    whole = score(workplace, workplace, **keywords)
    result = score(workplace, workplace, maps=f"presto={folder}", **keywords)
    assert "presto: no value at 8 of 768 labelled pixels of toy, which are left" in (
        capsys.readouterr().out
    )
    rows = {row["model"]: row for row in result["scores"]}
    methods = ("", "_discriminant", "_vectors", "_neighbours")
    assert list(rows) == ["harmonic", *("presto" + method for method in methods)]
    assert all(rows[name]["macro_f1"] == 1 for name in list(rows)[1:])
    pixels = [
        one["all_labels"] + sum(entry["pixels"] for entry in one["test_classes"].values())
        for one in (whole, result)
    ]
    lost = [np.isnan(first).any(2), (second == -9999).any(2)]
    splits = [Tile(tile_of(workplace, number)).split_map(4) for number in (0, 1)]
    counted = sum(int((split[mask] != 2).sum()) for split, mask in zip(splits, lost, strict=True))
    assert pixels[0] - pixels[1] == counted > 0
    table = (tmp_path / "out/label_efficiency.md").read_text()
    assert "| presto + nearest neighbours | 1.000 |" in table
    assert result["config"]["base_path"] == str(workplace)


def test_numbers_mean_what_their_format_says(workplace, tmp_path, monkeypatch):
    monkeypatch.setattr("maps.reader.BLOCK_BYTES", 4 * 16 * 64 * 5)  # 5 rows
    tile = Tile(tile_of(workplace))
    codes = np.random.default_rng(0).integers(-127, 128, (*SHAPE[1:3], 64)).astype(np.int8)
    codes[3, 4] = -128
    wanted = np.sign(codes) * (codes / 127.5) ** 2
    wanted[3, 4] = np.nan
    np.save(tmp_path / "aef.npy", codes)
    write_tif(tmp_path / "aef.tif", codes, nodata=-128)
    pixels = np.random.default_rng(1).permutation(24 * 16)
    for name in ("aef.npy", "aef.tif"):
        (one,) = open_maps(parse_sources(f"a=alphaearth:{tmp_path / name}")["a"], "toy", [tile])
        np.testing.assert_allclose(one.read_rows(2, 7), wanted[2:7], atol=1e-6)
        np.testing.assert_allclose(
            one.read_pixels(pixels), wanted.reshape(-1, 64)[pixels], atol=1e-6
        )
        assert np.argwhere(one.find_missing()).tolist() == [[3, 4]]
    scales = np.linspace(0.1, 2, 24 * 16, dtype=np.float32).reshape(24, 16)
    scales[0, 0], scales[1, 1] = np.nan, 0
    np.save(tmp_path / "aef_scales.npy", scales)
    one = EmbeddingMap(tmp_path / "aef.npy", tile)  # of TESSERA, and of infer.py
    np.testing.assert_allclose(one.read_rows(2, 24), codes[2:] * scales[2:, :, None], rtol=1e-6)
    assert np.argwhere(one.find_missing()).tolist() == [[0, 0], [1, 1]]


FLOATS = np.ones((*SHAPE[1:3], 3), np.float32)
CODES = FLOATS.astype(np.int8)


@pytest.mark.parametrize(
    ("array", "keywords", "word", "message"),
    [
        (CODES, {}, "", "found int8, wanted floating.* or maps=NAME=alphaearth:PATH"),
        (CODES.astype(np.uint8), {}, "", "found uint8, wanted floating"),
        (FLOATS, {}, "alphaearth:", "found float32, wanted int8 after alphaearth:"),
        (FLOATS, {"scales": [0.5] * 3}, "", "found scales or offsets of GDAL, wanted floating"),
        (FLOATS[1:], {}, "", r"found shape \(23, 16, 3\), wanted \(24, 16, D\) as .*; gdalwarp"),
        (
            FLOATS,
            {"transform": [10, 0, 500005, 0, -10, 5400000]},
            "",
            r"found EPSG:32631 \(10.0, 0.0, 500005.0, 0.0, -10.0, 5400000.0\), wanted",
        ),
        (
            FLOATS,
            {"transform": [10, 0, 500000, 0, 10, 5399760]},
            "",
            r"found EPSG:32631 \(10.0, 0.0, 500000.0, 0.0, 10.0, .*wanted .*; gdalwarp -r near "
            r"-t_srs EPSG:32631 -te 500000 5399760 500160 5400000 -ts 16 24 .*map.tif NEW.tif$",
        ),
    ],
)
def test_what_is_ambiguous_or_elsewhere_is_refused(
    workplace, tmp_path, array, keywords, word, message
):
    write_tif(tmp_path / "map.tif", array, **keywords)
    source = parse_sources(f"a={word}{tmp_path / 'map.tif'}")["a"]
    refused(message, open_maps, source, "toy", [Tile(tile_of(workplace))])


def test_maps_that_are_not_there_end_in_one_line(workplace, tmp_path):
    tiles = [Tile(tile_of(workplace, number)) for number in (0, 1)]
    np.save(tmp_path / "one.npy", FLOATS)

    def open_from(text, tiles=tiles):
        return open_maps(parse_sources(f"a={text}")["a"], "toy", tiles)

    refused("found one map for 2 tiles of toy, wanted a folder", open_from, tmp_path / "one.npy")
    refused("none.npy: found no such file", open_from, tmp_path / "none.npy", tiles[:1])
    refused("MGRS-0: found no map, wanted one map", open_from, tmp_path)
    for number, count in ((0, 3), (1, 2)):
        (tmp_path / f"toy/MGRS-{number}").mkdir(parents=True)
        np.save(tmp_path / f"toy/MGRS-{number}/a.npy", FLOATS[..., :count])
    refused("MGRS-1/a.npy: found 2 dimensions, wanted 3 as .*MGRS-0", open_from, tmp_path)
    np.save(tmp_path / "toy/MGRS-0/b.npy", FLOATS)
    refused("MGRS-0: found a.npy, b.npy, wanted one map", open_from, tmp_path)
    np.save(tmp_path / "toy/MGRS-0/a.npy", CODES)
    (tmp_path / "toy/MGRS-0/b.npy").unlink()
    refused("a_scales.npy: found no such file", open_from, tmp_path, tiles[:1])
    refused("maps=a: wanted NAME=PATH", parse_sources, "a")
    refused("maps=forest=x: found forest twice or as", parse_sources, "forest=x", ["forest"])


# ---- another year or region ----------------------------------------------------------------------


def make_other(base_path, names, place, shape=(25, 16, 16, 10)):
    """A data set "other" with the curves of `workplace` on other days; names: {code: class name}.

    The codes are in the order of those of 40, of 95 and, on a stripe, of another class.
    """
    classes = {str(code): {"name": name} for code, name in names.items()}
    info = {"bands": [f"X{i}" for i in range(10)], "classes": classes, **place}
    tile = make_tile(tile_of(base_path, 0, "other"), shape=shape, clear=0.9, seed=7, **info)
    codes = list(names)
    labels = np.where(np.load(tile / "labels.npy") == 95, codes[1], codes[0])
    labels[:3] = codes[2]
    save(tile, "labels", labels.astype(np.uint8))
    save(tile, "splits", np.ones(shape[1:3], np.uint8))
    return tile


def test_another_year_is_scored_by_the_names_of_classes(workplace, two_sets, capsys):
    """Codes of two classes are exchanged; all labels of one set train, all of the other test."""
    make_other(two_sets, {95: "Cropland", 40: " mangroves", 3: "Maize"}, ELSEWHERE)
    models = "discriminant,series_discriminant,both,both_discriminant"
    result = score(workplace, two_sets, test_dataset_name="other", models=models, label_counts="0")
    out = capsys.readouterr().out
    assert "other: Cropland, Mangroves; left out: Maize (other alone)" in out
    assert "test pixels lie in blocks" not in out
    scores = {row["model"]: row["macro_f1"] for row in result["scores"]}
    assert min(scores[name] for name in models.split(",")[1:]) > 0.95
    tested = {code: entry["pixels"] for code, entry in result["test_classes"].items()}
    labels = np.load(tile_of(two_sets, 0, "other") / "labels.npy")
    assert tested == {"40": (labels == 95).sum(), "95": (labels == 40).sum()}
    assert result["all_labels"] == 2 * 24 * 16, "the splits of toy are not used"
    table = (two_sets / "out/label_efficiency.md").read_text()
    assert "Macro-F1 on all labels of other, trained on toy, mean" in table
    assert "| embedding and harmonics + discriminant analysis |" in table
    assert re.search(r"leaf size: chosen over folds of blocks in [1-9]", table)


def test_ground_of_both_sets_is_declared(workplace, two_sets, capsys):
    make_other(two_sets, {40: "Cropland", 95: "Mangroves", 3: "Maize"}, GEOREFERENCE)
    score(workplace, two_sets, test_dataset_name="other")
    assert "208 of 208 test pixels lie in blocks with labels to train on" in capsys.readouterr().out


def test_tiles_of_one_name_without_a_place_may_show_the_same_ground(tmp_path, capsys):
    for name in ("first", "second"):
        make_dataset(tmp_path, name, tiles=1)
    sets = [Classes.dataset(tmp_path, name, min_valid=1) for name in ("first", "second")]
    notice_same_ground(*sets)
    out = capsys.readouterr().out
    assert "tile MGRS-0 is in both sets and has no crs and transform in tile.json" in out


def test_years_that_cannot_be_compared_are_refused(workplace, two_sets):
    tile = make_other(two_sets, {1: "Cropland", 2: "Rice", 3: "Maize"}, ELSEWHERE)
    other = {"test_dataset_name": "other"}
    message = r"toy and other: found in both the classes Cropland; left out: Mangroves \(toy alone"
    refused(message, score, workplace, two_sets, **other)
    classes = {"classes": {str(code): {"name": name} for code, name in MATCHING.items()}}
    (tile / "tile.json").write_text(
        json.dumps(json.loads((tile / "tile.json").read_text()) | classes)
    )
    message = "models=all: found finetuned,scratch with test_dataset_name, wanted fast or"
    refused(message, score, workplace, two_sets, models="all", **other)
    message = "test_dataset_name=toy: found dataset_name, wanted another one"
    refused(message, score, workplace, two_sets, test_dataset_name="toy")
    message = r"found 768 labelled pixels \(split=train\), wanted label_count=800"
    refused(message, score, workplace, two_sets, label_counts="800", **other)
    for number in (0, 1):
        (two_sets / f"maps/MGRS-{number}").mkdir(parents=True)
        np.save(two_sets / f"maps/MGRS-{number}/a.npy", FLOATS[: 24 if number else 16])
    refused("wanted .24, 16, D.", score, workplace, two_sets, maps=f"a={two_sets}/maps", **other)
    assert not (two_sets / "out").exists()


def test_one_map_for_tiles_of_two_years_is_refused(workplace, two_sets):
    """Regression: tiles of two years have one name, and a map of 2018 was scored on 2019."""
    tile = make_other(two_sets, MATCHING, ELSEWHERE, shape=(25, *SHAPE[1:]))
    folder = two_sets / "maps"
    for number in (0, 1):
        (folder / f"MGRS-{number}").mkdir(parents=True)
        np.save(folder / f"MGRS-{number}/a.npy", class_map(tile_of(workplace, number)))
    keywords = {"maps": f"a={folder}", "test_dataset_name": "other"}
    message = "a.npy: found one map for tiles of toy and other, wanted <PATH>/toy/<TILE>/ and"
    refused(message, score, workplace, two_sets, **keywords)
    (folder / "other/MGRS-0").mkdir(parents=True)
    values = class_map(tile)
    values[..., 2] += np.load(tile / "labels.npy") == 2
    np.save(folder / "other/MGRS-0/a.npy", values)
    scores = score(workplace, two_sets, **keywords)["scores"]
    assert [row["macro_f1"] for row in scores if row["model"] == "a_discriminant"] == [1]
