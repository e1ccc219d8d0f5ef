"""Where sampled points lie, and how doubtful labels are joined and ranked."""

import json
from pathlib import Path

import numpy as np
import pytest
from map_helpers import GEO, refused, run

import sampling_design
from evaluation.doubtful import Labelled, cross_validate, find_patches
from evaluation.sampling import draw_points
from maps.reader import ClassMap
from preparation.points import match_labels, read_points

FEET = "EPSG:2263"  # of New York, in US survey feet


def class_map(codes, **info):
    return ClassMap(Path("map.npy"), np.asarray(codes, np.uint8), {**GEO, **info})


def distances(places):
    return np.hypot(*np.moveaxis(places[:, None] - places, -1, 0)) + 1e9 * np.eye(len(places))


def test_points_come_in_random_order():
    """Whoever labels them must not know the class of the map by the place in the list."""
    drawn = draw_points([class_map(np.repeat([[10, 30]], 40, 0))], [[10], [30]], [20, 20])
    changes = np.count_nonzero(np.diff(drawn[:, 0]))
    assert 10 < changes < 30


@pytest.mark.parametrize(("crs", "metres"), [("EPSG:32631", 1.0), (FEET, 1200 / 3937)])
def test_a_distance_is_in_metres_whatever_the_unit_of_the_crs(crs, metres):
    one = class_map(np.full((60, 60), 10), crs=crs)
    drawn = draw_points([one], [[10]], [25], distance=40.0)
    found = distances(drawn[:, 2:] * 10 * metres).min()
    assert 40 <= found < 40 + 12 * metres * 10


def test_a_distance_is_kept_between_tiles_of_one_crs_and_not_between_places():
    left = class_map(np.full((30, 30), 10))
    right = class_map(np.full((30, 30), 10), transform=[10, 0, 500300, 0, -10, 5400000])
    drawn = draw_points([left, right], [[10]], [40], distance=45.0)
    places = drawn[:, 2:] * 10 + np.outer(drawn[:, 1], [0, 300])
    assert set(drawn[:, 1]) == {0, 1} and distances(places).min() >= 45
    far = class_map(np.full((30, 30), 10), crs="EPSG:32632")  # the same numbers, another zone
    drawn = draw_points([left, far], [[10]], [40], distance=45.0)
    places = drawn[:, 2:] * 10
    assert distances(places).min() < 45, "another zone is another place"


def test_small_classes_choose_their_places_first():
    """A class of few pixels would find them taken by points of a class around it."""
    codes = np.full((40, 40), 10)
    codes[20, 20:23] = 30
    drawn = draw_points([class_map(codes)], [[10], [30]], [150, 1], distance=25.0)
    assert (drawn[:, 0] == 1).sum() == 1


def planted_patches():
    """Pixels of a row of one class: a patch of two rows, a lone pixel, and what is right."""
    places = np.array([[0, row, column] for row in range(4) for column in range(6)])
    labels = np.full(len(places), 10, np.uint8)
    probability = np.tile([0.9, 0.1], (len(places), 1))
    patch = [0, 1, 6, 7]  # rows 0 and 1, columns 0 and 1
    probability[patch] = [0.05, 0.95]
    probability[6] = [0.01, 0.99]  # the worst of them
    probability[17] = [0.02, 0.98]  # alone, in row 2
    labels[18:], probability[18:] = 30, [0.1, 0.9]
    legend = {10: {"name": "a", "color": "#000000"}, 30: {"name": "b", "color": "#ffffff"}}
    y, blocks = np.zeros((len(places), 2)), np.arange(len(places))
    return Labelled(y, labels, places, blocks, legend), probability


def test_neighbours_are_one_patch_ranked_by_size_and_named_by_its_worst_pixel():
    found = find_patches(*planted_patches())
    assert found.pixels.tolist() == [4, 1], "mean .03 of four pixels before .02 of one"
    assert found.places.tolist() == [[0, 1, 0], [0, 2, 5]]
    assert (found.of >= 0).sum() == 5


def test_folds_of_labels_to_distrust_have_a_seed():
    rng = np.random.default_rng(0)
    labels = rng.choice([10, 30], 90).astype(np.uint8)
    y = rng.normal(size=(90, 3)) + (labels == 30)[:, None]
    legend = {10: {"name": "a", "color": "#000000"}, 30: {"name": "b", "color": "#ffffff"}}
    pixels = Labelled(y, labels, np.zeros((90, 3), int), np.arange(90) // 2, legend)
    one, same, other = (cross_validate(pixels, seed) for seed in (0, 0, 1))
    assert (one == same).all() and (one != other).any()


def test_a_sample_in_a_csv(tmp_path, capsys):
    """Of a map without a place: codes as a spreadsheet writes them, rows that are gone."""
    np.save(tmp_path / "map.npy", np.repeat([[10], [30]], 40, 0).repeat(9, 1).astype(np.uint8))
    keys = {"map_path": tmp_path / "map.npy", "count": 60, "min_count": 20}
    path = run(sampling_design, **keys)
    half = 196 * np.sqrt(0.8 * 0.2 / 29)
    assert capsys.readouterr().out.count(f"30 points: user's accuracy ± {half:.1f}%") == 2
    refused("points.csv: found an earlier sample, which may", run, sampling_design, **keys)
    head, *rows = path.read_text().splitlines()
    place = head.split(",").index("reference")
    for number, row in enumerate(rows):
        cells = row.split(",")
        cells[place] = "10.0" if int(cells[head.split(",").index("row")]) < 40 else "30"
        rows[number] = ",".join(cells)
    path.write_text("\n".join([head, *rows[3:]]))
    design, labels = read_points(path)
    assert "found 3 of 60 points missing, which count as unlabelled" in capsys.readouterr().out
    assert set(labels.values()) == {"10", "30"}
    assert set(match_labels(path, labels, design["classes"]).values()) == {10, 30}


def test_the_design_has_what_was_drawn_and_classes_that_the_map_lacks(tmp_path, capsys):
    """Fewer points than wanted where there is no room; an interpreter may find any class."""
    np.save(tmp_path / "classification_map.npy", np.full((12, 12), 10, np.uint8))
    names = {"10": {"name": "Tree"}, "30": {"name": "Grass"}}
    (tmp_path / "infer.json").write_text(json.dumps({"classes": names}))
    keys = {"map_path": tmp_path / "classification_map.npy", "count": 50, "distance": 6.0}
    path = run(sampling_design, **keys)
    design = json.loads(path.with_suffix(".json").read_text())
    assert design["strata"][0]["points"] == len(design["points"]) < 50
    assert [entry["name"] for entry in design["classes"].values()] == ["Tree", "Grass"]
