"""sampling_design.py, and the labelled sample back in read_inference_map.py."""

import csv
import json
import shutil

from running.errors import InputError

import geopandas
import numpy as np
import pytest
import rasterio
from helpers import run
from scipy.ndimage import gaussian_filter
from shapely import MultiPoint

import read_inference_map
import sampling_design
from evaluation.areas import assess_classes
from evaluation.doubtful import (
    Labelled,
    cross_validate,
    find_contradicted,
    find_patches,
    read_labelled,
)
from evaluation.seen_pixels import hash_split
from maps.geotiff import write_geotiff
from maps.reader import RepresentationMap
from tiles import TEST, Tile

GEO = {"crs": "EPSG:32631", "transform": [10, 0, 500000, 0, -10, 5400000]}
NAMES = {1: "Wood", 2: "Crop", 3: "Lake"}
CLASSES = {str(code): {"name": name} for code, name in NAMES.items()}


def smooth_classes(seed, shape=(64, 80)):
    """A map of three classes in patches, of which code 3 is rare."""
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return np.digitize(noise, np.quantile(noise, [0.6, 0.95])).astype(np.uint8) + 1


@pytest.fixture
def folder(tmp_path):
    """A class map with its truth beside it, wrong in a tenth of the pixels; one row has no data."""
    path = tmp_path / "maps" / "MGRS-A"
    path.mkdir(parents=True)
    truth, rng = smooth_classes(0), np.random.default_rng(0)
    wrong = rng.random(truth.shape) < 0.1
    mapped = np.where(wrong, rng.integers(1, 4, truth.shape), truth).astype(np.uint8)
    mapped[0] = 0
    np.save(path / "classification_map.npy", mapped)
    np.save(path / "truth.npy", truth)
    (path / "infer.json").write_text(json.dumps({**GEO, "classes": CLASSES}))
    return path


def draw(folder, **keywords):
    keywords = {"map_path": folder / "classification_map.npy", "count": 120, **keywords}
    return run(sampling_design, **keywords, min_count=20)


def label(path, folder, names=NAMES, skip=()):
    """Fill the column reference with the truth, as an interpreter would."""
    truth, points = np.load(folder / "truth.npy"), geopandas.read_file(path)
    codes = truth[points["row"], points["column"]]
    points["reference"] = [
        "" if number in skip else names[code]
        for number, code in zip(points["id"], codes, strict=True)
    ]
    points.to_file(path)
    return points


def read(folder, path, **keywords):
    keywords = {"map_path": folder / "classification_map.npy", **keywords}
    return run(read_inference_map, sample_path=path, **keywords)


# ---- the sample ----------------------------------------------------------------------------------


def test_points_are_drawn_by_class_and_hide_it(folder, tmp_path, capsys):
    path, again = (draw(folder, output_dir=tmp_path / name, distance=25.0) for name in "ab")
    points, mapped = geopandas.read_file(path), np.load(folder / "classification_map.npy")
    assert points.equals(geopandas.read_file(again))
    other = geopandas.read_file(draw(folder, output_dir=tmp_path / "c", distance=25.0, seed=1))
    assert not points.geometry.equals(other.geometry)
    assert set(points.columns) == {"id", "reference", "tile", "row", "column", "geometry"}
    assert len(points) == 120 and not points["reference"].any() and points.crs == GEO["crs"]
    counts = np.bincount(mapped[points["row"], points["column"]], minlength=4)
    assert counts[0] == 0 and counts[3] == 20, "of 5 % of the map, as min_count says"
    x, y = points.geometry.x.to_numpy(), points.geometry.y.to_numpy()
    np.testing.assert_allclose(x, 500000 + 10 * (points["column"] + 0.5))
    np.testing.assert_allclose(y, 5400000 - 10 * (points["row"] + 0.5))
    apart = np.hypot(x - x[:, None], y - y[:, None]) + 1e9 * np.eye(len(x))
    assert apart.min() >= 25
    design = json.loads(path.with_suffix(".json").read_text())
    assert [one["points"] for one in design["strata"]] == counts[1:].tolist()
    assert [one["pixels"] for one in design["strata"]] == np.bincount(mapped.ravel())[1:].tolist()
    assert sum(one["weight"] for one in design["strata"]) == pytest.approx(1)
    assert "120 points: overall accuracy ±" in capsys.readouterr().out
    shown = geopandas.read_file(draw(folder, output_dir=tmp_path / "d", show_class=True))
    assert set(shown["map_class"]) == set(NAMES.values())
    with pytest.raises(InputError, match="points.gpkg: found an earlier sample, which may hav"):
        draw(folder, output_dir=tmp_path / "a")


def test_every_pixel_is_as_probable_as_its_neighbours(folder, tmp_path):
    """With all of a class drawn, each of its pixels is there once."""
    path = draw(folder, count=5040, output_dir=tmp_path / "all", design="simple")
    points = geopandas.read_file(path)
    found = set(zip(points["row"], points["column"], strict=True))
    assert len(points) == len(found) == 63 * 80
    keys = {"design": "simple"}
    drawn = [draw(folder, **keys, seed=k, output_dir=tmp_path / f"{k}") for k in range(8)]
    rows = np.concatenate([geopandas.read_file(path)["row"] for path in drawn])
    assert abs(rows.mean() - 32) < 4 * 18.2 / np.sqrt(len(rows))


def test_as_many_points_as_the_standard_error_needs(folder, tmp_path):
    keywords = {"count": 0, "standard_error": 0.03}
    few = draw(folder, output_dir=tmp_path / "a", users_accuracy="0.9", **keywords)
    more = draw(folder, output_dir=tmp_path / "b", users_accuracy="crop=.6,3=.7,.9", **keywords)
    few, more = (len(json.loads(p.with_suffix(".json").read_text())["points"]) for p in (few, more))
    assert few == 99 and more > 120, "of 5040 pixels .09 / (.03^2 + .09 / 5040) = 98.04"
    with pytest.raises(InputError, match="standard_error=0.6: wanted 1e-06 to 0.5"):
        draw(folder, count=0, standard_error=0.6, output_dir=tmp_path / "c")
    for text in ("Sea=.9", ".9,1.5", "often"):
        with pytest.raises(InputError, match="users_accuracy=.*wanted a number between 0 and"):
            draw(folder, output_dir=tmp_path / "c", users_accuracy=text)


def test_no_room_for_all_points_is_said(folder, tmp_path, capsys):
    path = draw(folder, distance=150.0, output_dir=tmp_path / "out")
    assert 5 < len(geopandas.read_file(path)) < 60
    assert "distance=150: found room for " in capsys.readouterr().out


# ---- the labelled sample -------------------------------------------------------------------------


def test_a_labelled_sample_gives_accuracy_and_areas(folder, tmp_path, capsys):
    path = draw(folder)
    points = label(path, folder, names={1: " wood", 2: "2", 3: "Lake"})
    result = read(folder, path)
    mapped = np.load(folder / "classification_map.npy")
    counts = np.zeros((3, 3))
    place = points["row"], points["column"]
    np.add.at(counts, (mapped[place] - 1, np.load(folder / "truth.npy")[place] - 1), 1)
    expected = assess_classes(counts, np.bincount(mapped.ravel())[1:])
    assert result["error_matrix"] == counts.tolist()
    assert result["overall_accuracy"]["estimate"] == pytest.approx(expected.overall.value)
    area = result["classes"]["2"]["area_hectares"]
    assert area["estimate"] == pytest.approx(50.40 * expected.areas.value[1])
    assert area["standard_error"] == pytest.approx(50.40 * expected.areas.error[1])
    assert area["high"] - area["low"] == pytest.approx(2 * 1.96 * area["standard_error"])
    out = capsys.readouterr().out
    assert "from a random sample stratified by class of the map (Olofsson et al. 2014)" in out
    assert json.loads((path.parent / "areas.json").read_text()) == result
    with open(path.parent / "areas.csv") as file:
        rows = [*csv.DictReader(file)]
    assert float(rows[0]["estimate"]) == result["overall_accuracy"]["estimate"]
    assert (path.parent / "areas.png").exists()


def test_a_simple_sample_of_two_tiles(folder, tmp_path):
    other = shutil.copytree(folder, folder.with_name("MGRS-B"))
    moved = {"crs": "EPSG:32632", "transform": [10, 0, 300000, 0, -10, 5400000]}
    (other / "infer.json").write_text(json.dumps({**moved, "classes": CLASSES}))
    path = draw(folder, map_path=folder.parent, design="simple")
    points = geopandas.read_file(path)
    assert path.parent == folder.parent / "sample" and set(points["tile"]) == {"MGRS-A", "MGRS-B"}
    assert points.crs == "EPSG:4326", "one for both"
    is_east = points.geometry.x > 5
    assert (is_east == (points["tile"] == "MGRS-B")).all() and is_east.any()
    points = label(path, folder)
    points["geometry"] = [MultiPoint([point]) for point in points.geometry]  # of other software
    points.to_file(path)
    result = read(folder, path, map_path=folder.parent)
    assert result["pixels"] == 2 * 63 * 80 and result["points"] == 120
    assert "a simple random sample" in result["method"]
    share = sum(row["area_share"]["estimate"] for row in result["classes"].values())
    assert share == pytest.approx(1)


def test_unlabelled_points_are_counted_and_left_out(folder, capsys):
    path = draw(folder)
    label(path, folder, skip=range(1, 31))
    result = read(folder, path)
    assert result["points"] == 90
    assert "found 30 of 120 points without a label, which are left out" in capsys.readouterr().out
    design = json.loads(path.with_suffix(".json").read_text())
    rare = [point["id"] for point in design["points"] if point["stratum"] == 2]
    label(path, folder, skip=rare[1:])
    classes = read(folder, path)["classes"]  # a stratum of one point says nothing of itself alone
    errors = {code: row["users_accuracy"]["standard_error"] for code, row in classes.items()}
    assert [errors[code] is None for code in "123"] == [False, False, True]
    label(path, folder, skip=rare)
    assert read(folder, path)["overall_accuracy"]["estimate"] is None
    assert "Lake: found no labelled point in" in capsys.readouterr().out


def test_a_point_where_the_map_has_no_data_any_more_is_left_out(folder, capsys):
    path = draw(folder)
    points, mapped = label(path, folder), np.load(folder / "classification_map.npy")
    mapped[points["row"][:3], points["column"][:3]] = 0
    np.save(folder / "classification_map.npy", mapped)
    assert read(folder, path)["points"] == 117
    line = f"{path}: found 3 points where the map has no data; left out"
    assert line in capsys.readouterr().out


def test_another_map_keeps_the_strata_of_the_sample(folder, capsys):
    path = draw(folder)
    label(path, folder)
    before = read(folder, path)
    better = np.load(folder / "truth.npy")
    better[0] = 0
    np.save(folder / "classification_map.npy", better)
    result = read(folder, path)
    assert "found another map than the one that" in capsys.readouterr().out
    assert "stratified by another map" in result["method"]
    assert result["overall_accuracy"]["estimate"] == 1
    for code, row in result["classes"].items():  # the reference and its weights are the same
        known = before["classes"][code]["area_share"]
        assert row["area_share"]["estimate"] == pytest.approx(known["estimate"])


def test_a_geotiff_and_a_map_without_place(folder, tmp_path):
    """Of a GeoTIFF of other software, and points in a CSV where nothing says where the map lies."""
    mapped = np.load(folder / "classification_map.npy")
    mapped[mapped == 0] = 99
    write_geotiff(tmp_path / "map.tif", mapped, GEO, 99)
    path = draw(folder, map_path=tmp_path / "map.tif", output_dir=tmp_path / "a")
    label(path, folder, names={code: f"class {code}" for code in NAMES})
    from_tif = read(folder, path, map_path=tmp_path / "map.tif")
    (folder / "infer.json").write_text(json.dumps({"classes": CLASSES}))
    path = draw(folder, output_dir=tmp_path / "b", distance=2.0)
    assert path.name == "points.csv"
    with open(path) as file:
        rows = [*csv.DictReader(file)]
    truth = np.load(folder / "truth.npy")
    for row in rows:
        row["reference"] = int(truth[int(row["row"]), int(row["column"])])
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    result = read(folder, path)
    assert result["hectares"] is None and from_tif["hectares"] == pytest.approx(50.40)
    assert result["classes"]["1"]["area_pixels"]["estimate"] > 2000
    with rasterio.open(tmp_path / "two.tif", "w", **GEO_PROFILE, count=2) as file:
        file.write(np.stack([mapped, mapped]))
    with pytest.raises(InputError, match=r"two.tif: found 2 bands, wanted a map of one band"):
        draw(folder, map_path=tmp_path / "two.tif", output_dir=tmp_path / "c")


GEO_PROFILE = {"driver": "GTiff", "height": 64, "width": 80, "dtype": "uint8", "crs": GEO["crs"]}
GEO_PROFILE["transform"] = rasterio.Affine(*GEO["transform"])


def spoil_place(path, **move):
    points = geopandas.read_file(path)
    points.loc[3, "geometry"] = points.geometry[3].__class__(
        points.geometry[3].x + move.get("x", 0), points.geometry[3].y
    )
    points.to_file(path)


def double(path):
    points = geopandas.read_file(path)
    points.loc[7] = points.loc[8]
    points.to_file(path)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (
            lambda p: p.with_suffix(".json").unlink(),
            "found no points.json beside it, wanted",
        ),
        (lambda p: p.with_suffix(".json").write_text("{}"), "found no points.json beside it"),
        (lambda p: p.with_suffix(".json").write_text('{"a": 1}'), "found no design in points.json"),
        (
            lambda p: spoil_place(p, x=5000),
            "found point 4 outside the map .*_map.npy",
        ),
        (lambda p: spoil_place(p, x=np.nan), "found point 4 outside the map .*_map.npy"),
        (lambda p: double(p), "found an id of several points, wanted each point once"),
        (lambda p: spoil_place(p, x=30), "found point 4 in row .*: its place must stay"),
        (
            lambda p: geopandas.read_file(p).assign(reference="Vineyard").to_file(p),
            "found the class Vineyard, wanted Wood, Crop, Lake, or a code",
        ),
        (
            lambda p: geopandas.read_file(p).assign(reference="").to_file(p),
            "found no labelled point on the map, wanted labels in reference",
        ),
        (
            lambda p: geopandas.read_file(p).drop(columns="reference").to_file(p),
            "found no column reference, wanted id and reference",
        ),
        (
            lambda p: np.save(p.parents[1] / "classification_map.npy", np.ones((9, 9), np.uint8)),
            "found another place or size than .*points.gpkg was drawn from, wanted a map",
        ),
        (
            lambda p: (p.parents[1] / "infer.json").write_text(
                json.dumps({**GEO, "transform": [10, 0, 500010, 0, -10, 5400000]})
            ),
            "found another place or size than .*points.gpkg was drawn from, wanted a map",
        ),
    ],
)
def test_a_sample_that_does_not_fit_ends_in_one_line(folder, spoil, line):
    path = draw(folder)
    label(path, folder)
    spoil(path)
    with pytest.raises(InputError, match=line) as error:
        read(folder, path)
    assert "\n" not in str(error.value)


# ---- all labelled pixels -------------------------------------------------------------------------


def test_areas_from_blocks_of_test_pixels(folder, capsys):
    """By default of the pixels that training did not see, where infer.json knows them."""
    truth, mapped = (np.load(folder / f"{n}.npy") for n in ("truth", "classification_map"))
    np.save(folder / "labels.npy", truth)
    info = {**GEO, "classes": CLASSES, "split": {"block_size": 8, "seed": 0}}
    (folder / "infer.json").write_text(json.dumps(info))
    arrays = {"bands": np.ones((1, 64, 80, 1), np.uint16), "masks": np.ones((1, 64, 80), np.uint8)}
    arrays["doys"] = np.array([1])
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "tile.json").write_text(json.dumps({**GEO, "classes": CLASSES}))
    keys = {"map_path": folder / "classification_map.npy", "labels_path": folder / "labels.npy"}
    tested = run(read_inference_map, **keys)
    assert "labels.npy, of test pixels:" in capsys.readouterr().out
    every = run(read_inference_map, **keys, pixels="all")
    assert sum(row["support"] for row in every["agreement"]["per_class"].values()) == 63 * 80
    support = sum(row["support"] for row in tested["agreement"]["per_class"].values())
    assert 0.1 < support / (63 * 80) < 0.3
    splits = Tile(folder, statistics=False).split_map(8, 0)
    blocks = len({(row // 8, column // 8) for row, column in np.argwhere(splits == TEST)})
    words = f"test pixels in {blocks} blocks; intervals from the variance between blocks"
    assert words in tested["estimates"]["method"]
    right = (truth == mapped)[1:].mean()
    estimates = tested["estimates"]["overall_accuracy"], every["estimates"]["overall_accuracy"]
    assert estimates[0]["low"] < right < estimates[0]["high"]
    assert estimates[1]["estimate"] == pytest.approx(right)
    assert estimates[0]["standard_error"] > estimates[1]["standard_error"] > 0
    assert "found another split" not in capsys.readouterr().out
    info["split"]["seen"] = [hash_split(splits), "0" * 12]
    (folder / "infer.json").write_text(json.dumps(info))
    run(read_inference_map, **keys)
    assert "MGRS-A: found another split of its pixels than when" in capsys.readouterr().out
    (folder / "infer.json").write_text(json.dumps({**GEO, "classes": CLASSES}))
    with pytest.raises(InputError, match="pixels=all, labels of the tile that was mapped"):
        run(read_inference_map, **keys, pixels="test")


# ---- doubtful labels -----------------------------------------------------------------------------


def plant_errors(truth, rng):
    """Labels with a wrong rectangle of 6 x 6 pixels in ten places, and 1 % of the pixels wrong."""
    wrong = rng.random(truth.shape) < 0.01
    for row, column in zip(rng.integers(0, 58, 10), rng.integers(0, 74, 10), strict=True):
        wrong[row : row + 6, column : column + 6] = True
    return np.where(wrong, truth % 3 + 1, truth).astype(np.uint8), wrong


def test_planted_errors_in_labels_are_found(folder, capsys):
    truth, rng = np.load(folder / "truth.npy"), np.random.default_rng(3)
    centers = rng.normal(0, 1, (4, 8))
    y = centers[truth] + rng.normal(0, 0.7, (*truth.shape, 8))
    labels, wrong = plant_errors(truth, rng)
    np.save(folder / "representation_map.npy", y.astype(np.float32))
    np.save(folder / "labels.npy", labels)
    (folder / "tile.json").write_text(json.dumps({**GEO, "classes": CLASSES}))
    keys = {"labels_path": folder / "labels.npy", "design": "doubtful"}
    path = draw(folder, **keys, count=0)
    out = capsys.readouterr().out
    assert "labelled pixels (" in out and "the most doubtful:" in out
    maps = [RepresentationMap(folder / "representation_map.npy")]
    pixels = read_labelled(maps, folder / "labels.npy")
    patches = find_patches(pixels, cross_validate(pixels))
    is_wrong = wrong[tuple(pixels.places[:, 1:].T)]
    found = patches.of >= 0
    recall, precision = found[is_wrong].mean(), is_wrong[found].mean()
    first = (patches.of >= 0) & (patches.of < 20)
    print(f"recall {recall:.2f}, precision {precision:.2f}, of 20: {is_wrong[first].mean():.2f}")
    assert recall > 0.8 and precision > 0.6
    assert is_wrong[first].mean() > 0.9
    table = geopandas.read_file(path)
    assert table["pixels"].tolist() == patches.pixels.tolist()
    np.testing.assert_allclose(table.area, 100 * patches.pixels)
    center = table.geometry[0].representative_point()
    row, column = int((5400000 - center.y) // 10), int((center.x - 500000) // 10)
    assert table["label"][0] == NAMES[int(labels[row, column])]
    few = geopandas.read_file(draw(folder, **keys, count=5, output_dir=folder / "few"))
    assert len(few) == 5 and (few["rank"] == [1, 2, 3, 4, 5]).all()


def test_a_label_is_contradicted_by_a_class_as_probable_as_usual():
    """A class of high probabilities needs a high one; NaN is unknown."""
    probability = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.6, 0.4], [0.3, 0.7], [0.8, 0.2]])
    probability = np.vstack([probability, [np.nan, np.nan]])
    own = np.array([0, 0, 1, 1, 0, 1, 0])  # usual: 0.7 of class 0, 0.4 of class 1
    assert find_contradicted(probability, own).tolist() == [-1, -1, -1, -1, 1, 0, -1]


def test_a_class_of_a_single_block_is_not_examined(capsys):
    rng = np.random.default_rng(0)
    labels, blocks = np.repeat([1, 2, 3], [40, 40, 5]), np.arange(85) % 8
    blocks[80:] = 0
    y = labels[:, None] + rng.normal(0, 0.1, (85, 3))
    legend = {code: {"name": name} for code, name in NAMES.items()}
    probability = cross_validate(Labelled(y, labels, np.zeros((85, 3), int), blocks, legend))
    assert np.isnan(probability[80:]).all() and np.isfinite(probability[:80]).all()
    assert "5 of 85 labelled pixels not examined: other blocks have no label of Lake" in (
        capsys.readouterr().out
    )


def test_where_no_label_is_doubtful_nothing_is_written(folder, capsys):
    truth = np.load(folder / "truth.npy")
    np.save(folder / "labels.npy", truth)
    y = np.eye(4)[truth] + np.random.default_rng(0).normal(0, 0.01, (*truth.shape, 4))
    np.save(folder / "representation_map.npy", y.astype(np.float32))
    assert draw(folder, design="doubtful", labels_path=folder / "labels.npy") is None
    assert "none of 5120 labelled pixels is doubtful" in capsys.readouterr().out
    assert not (folder / "sample").exists()


def test_doubtful_labels_need_labels_and_embeddings(folder, tmp_path):
    np.save(folder / "labels.npy", np.ones((64, 80), np.uint8))
    with pytest.raises(InputError, match="MGRS-A: found no representation_map.npy in it or its fo"):
        draw(folder, design="doubtful")
    np.save(folder / "representation_map.npy", np.zeros((64, 80, 3), np.float32))
    with pytest.raises(InputError, match="found no labels of its tile, wanted labels_path="):
        draw(folder, design="doubtful")
    with pytest.raises(InputError, match="found 1 classes in 20 blocks, wanted two or more"):
        draw(folder, design="doubtful", labels_path=folder / "labels.npy")
