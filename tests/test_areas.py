"""Accuracy and areas from reference labels: published examples, other code, naive references."""

import numpy as np
import pytest
import satscout
from scipy.stats import t
from sklearn.metrics import f1_score, precision_score, recall_score

from evaluation.areas import (
    MAX_BLOCKS,
    Z,
    assess_blocks,
    assess_classes,
    assess_strata,
    describe_assessment,
    explain_gaps,
    explain_no_width,
    find_intervals,
    join_classes,
    print_intervals,
)
from evaluation.sampling import allocate, find_sample_size

OLOFSSON = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
PIXELS = np.array([200_000, 150_000, 3_200_000, 6_450_000])  # table 8: of 30 m


def count(strata, mapped, labelled, classes="ABCD"):
    counts = np.zeros((len(set(strata)), len(classes), len(classes)))
    for stratum, one, other in zip(strata, mapped, labelled, strict=True):
        counts[classes.index(stratum), classes.index(one), classes.index(other)] += 1
    return counts


def test_the_example_of_olofsson_2014():
    """Sections 5.1 and 5.2: deforestation, forest gain, stable forest, stable non-forest."""
    found = assess_classes(OLOFSSON, PIXELS)
    half = Z * found.areas.error * PIXELS.sum()
    assert round(found.areas.value[0] * PIXELS.sum()) == 235_086
    assert round(half[0]) == 68_418
    assert found.overall.value.round(2) == 0.95 and (Z * found.overall.error).round(2) == 0.02
    np.testing.assert_allclose(found.users.value, [0.88, 0.73, 0.93, 0.96], atol=0.005)
    np.testing.assert_allclose(Z * found.users.error, [0.07, 0.10, 0.04, 0.02], atol=0.005)
    np.testing.assert_allclose(found.producers.value, [0.75, 0.85, 0.93, 0.96], atol=0.005)
    np.testing.assert_allclose(Z * found.producers.error, [0.21, 0.25, 0.03, 0.02], atol=0.006)
    users = [0.7, 0.6, 0.9, 0.95]
    assert find_sample_size(PIXELS, users, 0.01) == 641


def test_the_example_of_stehman_2014():
    """Strata that are not the classes of the map: table 2, results on pages 4932 to 4936."""
    strata, mapped = "A" * 10 + "B" * 10 + "C" * 10 + "D" * 10, "AAAAAAABBBABBBBBBBBBBBCCCCCCBB"
    labelled = "AAAAACBABCABBBBBAABBCCCCCDDBBADDDDDDDCCB"
    counts = count(strata, mapped + "D" * 10, labelled)
    found = assess_strata(counts, [40_000, 30_000, 20_000, 10_000])
    assert found.overall.value == pytest.approx(0.63)
    assert found.overall.error == pytest.approx(0.085, abs=5e-4)
    np.testing.assert_allclose(found.areas.value[[0, 2]], [0.35, 0.20])
    np.testing.assert_allclose(found.areas.error[[0, 2]], [0.082, 0.064], atol=5e-4)
    assert found.users.value[1] == pytest.approx(0.574, abs=5e-4)
    assert found.users.error[1] == pytest.approx(0.125, abs=5e-4)
    assert found.producers.value[1] == pytest.approx(0.794, abs=5e-4)
    assert found.producers.error[1] == pytest.approx(0.117, abs=5e-4)
    assert found.matrix[1, 2] == pytest.approx(0.08)


def test_random_matrices_as_another_implementation():
    rng = np.random.default_rng(0)
    for _ in range(30):
        size = rng.integers(2, 9)
        counts = rng.integers(0, 30, (size, size)) + 3 * np.eye(size, dtype=int)
        pixels = rng.integers(1_000, 10**7, size)
        ours, theirs = assess_classes(counts, pixels), satscout.assess(counts, pixels.tolist())
        total = pixels.sum()
        pairs = [
            (ours.overall.value, theirs.overall_accuracy),
            (ours.overall.error, theirs.overall_se),
            (ours.users.value, theirs.users),
            (ours.users.error, theirs.users_se),
            (ours.producers.value, theirs.producers),
            (ours.producers.error, theirs.producers_se),
            (ours.areas.value * total, theirs.adjusted_areas),
            (ours.areas.error * total, theirs.adjusted_areas_se),
        ]
        for one, other in pairs:
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_estimated_is_nan_and_says_why():
    """Never zero: a class that nobody found may be there, and one point has no variance."""
    counts = np.array([[20, 5, 0, 0], [1, 30, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    pixels, names = np.array([1000, 2000, 10, 0]), ["wood", "crop", "lake", "town"]
    found = assess_classes(counts, pixels)
    assert np.isfinite(found.overall.value) and np.isnan(found.overall.error)
    assert np.isfinite(found.users.error[:2]).all() and np.isnan(found.users.error[2])
    assert np.isnan(found.areas.value[2:]).all() and np.isnan(found.producers.value[2:]).all()
    strata = np.eye(4)[..., None] * counts
    assert explain_gaps(strata, pixels, (names, names)) == [
        "lake: found a single labelled point in 0.3% of the map, so no standard errors",
        "lake: found no labelled point of this class, so no area of it",
        "town: found no labelled point of this class, so no area of it",
    ]
    counts[2] = 0  # no sample in a stratum: its area is unknown, and so are all
    found = assess_classes(counts, pixels)
    assert np.isnan(found.areas.value).all() and np.isnan(found.overall.value)
    assert np.isfinite(found.users.value[:2]).all()
    legend = {code: {"name": name} for code, name in enumerate(names, 1)}
    result = describe_assessment(found, legend, pixels, None, counts)
    assert set(result["classes"]["3"]["area_pixels"].values()) == {None}
    assert explain_no_width(np.diag([30, 0]), names[:2])[0].endswith("wrong: wood 10.0%")


def test_a_stratum_that_is_sampled_whole_adds_no_variance():
    counts, pixels = np.array([[20, 5], [0, 1]]), [1000, 1]
    found = assess_classes(counts, pixels)
    assert np.isfinite(found.overall.error)
    assert found.users.error[1] == 0


def test_a_simple_sample_is_stratified_after_the_fact():
    """A class with few points has no variance of its own, so it joins the largest."""
    counts, pixels = np.array([[40, 5, 1], [3, 30, 0], [0, 0, 1]]), np.array([1000, 800, 20])
    stratum = join_classes(counts.sum(1), pixels)
    assert stratum.tolist() == [0, 1, 0]
    found = assess_classes(counts, pixels, stratum)
    assert np.isfinite(found.areas.error).all()
    assert found.areas.value.sum() == pytest.approx(1)
    one = assess_classes(counts, pixels, np.zeros(3, int))  # one stratum: plain means
    np.testing.assert_allclose(one.areas.value, counts.sum(0) / counts.sum())
    p = counts.sum(0) / counts.sum()
    np.testing.assert_allclose(one.areas.error, np.sqrt(p * (1 - p) / (counts.sum() - 1)))


def test_blocks_as_a_naive_jackknife():
    rng = np.random.default_rng(1)
    counts, pixels = rng.integers(1, 30, (7, 3, 3)), np.array([500, 300, 200])
    found = assess_blocks(counts, pixels)
    assert found.overall.z == pytest.approx(2.447, abs=1e-3), "t of 6 degrees of freedom"
    without = [assess_classes(np.delete(counts, g, 0).sum(0), pixels) for g in range(7)]
    for name in ("overall", "users", "producers", "areas"):
        values = np.array([getattr(one, name).value for one in without])
        error = np.sqrt(6 / 7 * ((values - values.mean(0)) ** 2).sum(0))
        np.testing.assert_allclose(getattr(found, name).error, error)
        whole = getattr(assess_classes(counts.sum(0), pixels), name)
        np.testing.assert_allclose(getattr(found, name).value, whole.value)
    single = assess_blocks(counts[:1], pixels)
    assert np.isnan(single.overall.error) and np.isfinite(single.overall.value)
    counts[1:, :, 2] = 0  # a class of the reference that lies in one block
    assert np.isnan(assess_blocks(counts, pixels).producers.error[2])
    many = rng.integers(1, 9, (3 * MAX_BLOCKS, 2, 2))
    assert assess_blocks(many, [10, 20]).overall.value == pytest.approx(
        assess_classes(many.sum(0), [10, 20]).overall.value
    )


def test_neighbours_that_are_alike_are_not_independent_points():
    """Four times the pixels in the same blocks: the interval stays as it is."""
    counts = np.random.default_rng(2).integers(1, 30, (7, 3, 3))
    one, four = (assess_blocks(k * counts, [500, 300, 200]) for k in (1, 4))
    np.testing.assert_allclose(one.areas.error, four.areas.error)


@pytest.mark.parametrize("seed", range(20))
def test_points_are_in_proportion_but_enough_in_each_class(seed):
    rng = np.random.default_rng(seed)
    sizes = (10 ** rng.uniform(0, 5, rng.integers(1, 9))).astype(int)
    count, least = int(rng.integers(1, 2000)), int(rng.integers(0, 80))
    points = allocate(min(count, sizes.sum()), sizes, least)
    assert (points <= sizes).all() and (points >= np.minimum(least, sizes)).all()
    enough = np.minimum(least, sizes)
    assert points.sum() == max(min(count, sizes.sum()), enough.sum())
    free = np.flatnonzero((points > enough) & (points < sizes))
    share = points[free] / sizes[free]
    assert np.ptp(share * sizes[free].min(initial=1)) <= 1.01 if len(free) else True


def test_intervals_of_scores_leave_out_each_block():
    """Of fine-tuning's report: by hand, from scikit-learn's scores."""
    rng = np.random.default_rng(0)
    codes, blocks = [10, 30, 80], np.repeat([3, 7, 8, 20], 30)
    labels = rng.choice(codes[:2], 120)
    labels[:5] = 80  # of one block alone
    predicted = np.where(rng.random(120) < 0.7, labels, rng.choice(codes, 120))
    found = find_intervals(labels, predicted, blocks, codes)
    keywords = {"average": None, "labels": codes, "zero_division": 0}

    def score(keep):
        pair = labels[keep], predicted[keep]
        present = np.isin(codes, pair[0])
        return {
            "overall_accuracy": np.mean(pair[0] == pair[1]),
            "macro_f1": f1_score(*pair, **keywords)[present].mean(),
            "precision": precision_score(*pair, **keywords)[1],
            "recall": recall_score(*pair, **keywords)[1],
        }

    whole, parts = score(blocks > 0), [score(blocks != block) for block in np.unique(blocks)]
    found |= {key: found[key]["30"] for key in ("precision", "recall")} | {"lone": found["recall"]}
    for key, value in whole.items():
        without = np.array([part[key] for part in parts])
        half = t.ppf(0.975, 3) * np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
        np.testing.assert_allclose(found[key], [max(0, value - half), min(1, value + half)])
    assert found["lone"]["80"] is None
    assert find_intervals(labels, predicted, blocks * 0, codes)["overall_accuracy"] is None


def test_intervals_are_printed_from_low_to_high(capsys):
    print_intervals({"overall_accuracy": [0.5, 0.7], "macro_f1": [0.25, 0.5]})
    words = "accuracy 0.500 to 0.700, macro-F1 0.250 to 0.500"
    assert capsys.readouterr().out.endswith(f"between blocks: {words}\n")
    print_intervals({"overall_accuracy": None, "macro_f1": None})
    assert capsys.readouterr().out.endswith("none, of a single block\n")


def test_of_very_many_blocks_each_has_as_many_joined():
    """The last one would hold all of the rest, and one block would be half of the pixels."""
    rng = np.random.default_rng(0)
    labels, blocks = rng.integers(0, 2, 4 * MAX_BLOCKS), np.arange(4 * MAX_BLOCKS)
    predicted = np.where(rng.random(len(labels)) < 0.8, labels, 1 - labels)
    low, high = find_intervals(labels, predicted, blocks, [0, 1])["overall_accuracy"]
    wanted = 2 * Z * np.sqrt(0.8 * 0.2 / len(labels))  # of independent pixels
    assert high - low == pytest.approx(wanted, rel=0.1)
    counts = np.zeros((len(labels), 2, 2))
    counts[blocks, predicted, labels] = 1
    overall = assess_blocks(counts, np.bincount(predicted)).overall
    assert 2 * overall.z * overall.error == pytest.approx(wanted, rel=0.1)


def test_a_class_of_two_points_keeps_a_stratum_of_its_own():
    assert join_classes([2, 1, 9], [50, 50, 50]).tolist() == [0, 1, 1]
