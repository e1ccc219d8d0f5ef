"""Where sampled points lie, and how doubtful labels are joined and ranked."""

from pathlib import Path

import numpy as np
import pytest
from map_helpers import GEO

from evaluation.doubtful import Labelled, cross_validate, find_patches
from evaluation.sampling import draw_points
from maps.reader import ClassMap

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
