"""Accuracy and areas of a map from reference labels, with standard errors and 95 % intervals.

Good practice for areas: the map's own count of pixels is biased by the map's errors, a reference
sample corrects it (Olofsson et al. 2014, 10.1016/j.rse.2014.02.015, "O" below). The estimators are
Stehman's (2014, 10.1080/01431161.2014.930207, "S" below), of strata that need not be the classes of
the map; where they are, these are the estimators of O.

Shapes: S strata, C classes: of the map in rows, of the reference in columns; G blocks of pixels.
"""

from functools import partial
from typing import NamedTuple

import numpy as np
from scipy.stats import t

Z = 1.96  # deviations of a 95 % interval, as in O
MAX_BLOCKS = 500  # of the jackknife: of more, some are joined


class Estimate(NamedTuple):
    """An estimate and its standard error; NaN where it cannot be made. z: errors of an interval."""

    value: np.ndarray
    error: np.ndarray
    z: float = Z


class Assessment(NamedTuple):
    """What a reference sample says of a map; areas are shares of the map's pixels.

    overall: (); users, producers, areas: (C,). matrix: (C, C), the estimated share of the map in
    each pair of classes (O 4).
    """

    overall: Estimate
    users: Estimate
    producers: Estimate
    areas: Estimate
    matrix: np.ndarray


# ---- samples of pixels ---------------------------------------------------------------------------


def assess_strata(counts, sizes, holds=None):
    """The Assessment of a stratified random sample.

    counts: (S, C, C) sampled pixels by stratum, class of the map and of the reference; sizes: (S,)
    pixels of each stratum; holds: (S, C) bool, which classes of the map a stratum may have, or None
    for all. Simple random samples come here in strata after the fact, see `join_classes`.
    Overall accuracy and areas are means (S 3, variance S 25), accuracies of a class ratios of means
    (S 27, S 28). The finite population correction is left out, as in O 5 to 10, except that a
    stratum which was sampled whole adds no variance. NaN where a stratum lacks a sample (no value)
    or has a single one (no standard error), and for a class that the sample lacks.
    """
    counts, sizes = np.asarray(counts, float), np.asarray(sizes, float)
    holds = np.ones(counts.shape[:2], bool) if holds is None else holds
    counts, sizes, holds = (part[sizes > 0] for part in (counts, sizes, holds))
    weights, taken = sizes / sizes.sum(), counts.sum((1, 2))
    shares = divide(counts, taken[:, None, None])
    shares = np.where(holds[..., None], shares, 0)
    is_whole = np.repeat((taken >= sizes)[:, None], shares.shape[1], 1)

    def ratio(y, x, adds_nothing):
        """Ratio of two means over the map, of indicators' means y, x (S, K), y a part of x."""
        total = weights @ x
        value = divide(weights @ y, total)
        spread = y * (1 - y) + value**2 * x * (1 - x) - 2 * value * (y - y * x)
        spread = divide(spread, (taken - 1)[:, None])
        variance = weights**2 @ np.where(adds_nothing, 0, spread)
        return Estimate(value, divide(np.sqrt(np.maximum(variance, 0)), total))

    right, ones = np.diagonal(shares, axis1=1, axis2=2), np.ones(shares.shape[:2])
    overall = ratio(right.sum(1, keepdims=True), ones[:, :1], is_whole[:, :1])
    return _hide_missing(
        Assessment(
            Estimate(overall.value[0], overall.error[0]),
            ratio(right, shares.sum(2), is_whole | ~holds),
            ratio(right, shares.sum(1), is_whole),
            ratio(shares.sum(1), ones, is_whole),
            np.tensordot(weights, shares, 1),
        ),
        counts.sum((0, 1)),
    )


def join_classes(found, sizes, least=2):
    """Strata after the fact of a sample that was not drawn by class: the classes of the map.

    A class with fewer than `least` sampled pixels (or blocks) has no variance of its own; it joins
    the class with the most. found, sizes: (C,) sampled and all pixels of each class of the map.
    Returns the stratum of each class, (C,) int, 0 .. S - 1.
    """
    found, sizes = np.asarray(found), np.asarray(sizes)
    stratum = np.arange(len(found))
    stratum[(sizes > 0) & (found < least)] = np.argmax(np.where(sizes > 0, found, -1))
    return np.unique(stratum, return_inverse=True)[1]


def assess_classes(counts, sizes, stratum=None):
    """The Assessment of a sample in strata that are classes of the map, or several of them.

    counts: (C, C) sampled pixels; sizes: (C,) pixels of each class of the map; stratum: (C,) as
    `join_classes` gives it, or None: each class is a stratum of its own.
    """
    stratum = np.arange(len(sizes)) if stratum is None else stratum
    holds = stratum == np.arange(stratum.max() + 1)[:, None]
    return assess_strata(holds[..., None] * counts, holds @ np.asarray(sizes), holds)


# ---- blocks of pixels ----------------------------------------------------------------------------


def assess_blocks(counts, sizes):
    """The Assessment from all labelled pixels of G blocks, (G, C, C); sizes: (C,) as above.

    Areas are those of `assess_classes`, in strata after the fact, but neighbours are alike, so
    standard errors come from the variance between blocks: the jackknife that leaves out each block
    in turn, with Student's t of G - 1 degrees of freedom. NaN for a single block, and for a class
    that lies in one. As right as the blocks are a random sample of the map.
    """
    counts = np.asarray(counts, float)
    counts = counts[counts.any((1, 2))]
    if len(counts) > MAX_BLOCKS:
        joined = np.zeros((MAX_BLOCKS, *counts.shape[1:]))
        np.add.at(joined, np.arange(len(counts)) % MAX_BLOCKS, counts)
        counts = joined
    stratum = join_classes((counts.sum(2) > 0).sum(0), sizes)
    values = _assess_all(counts.sum(0), sizes, stratum)
    without = _assess_all(counts.sum(0) - counts, sizes, stratum)
    estimates = map(_jackknife, values[:-1], without[:-1])
    return _hide_missing(Assessment(*estimates, values[-1]), counts.sum((0, 1)))


def _jackknife(value, without):
    """The Estimate of a value (..) from G blocks, of its values without each of them (G, ..)."""
    number = len(without)
    deviation = without - without.mean(0) if number > 1 else np.full_like(without, np.nan)
    error = np.sqrt((number - 1) / max(1, number) * (deviation**2).sum(0))
    return Estimate(value, error, float(t.ppf(0.975, number - 1)) if number > 1 else np.nan)


def find_intervals(labels, predicted, blocks, codes):
    """95 % intervals of scores of test pixels, by the jackknife over blocks, see `assess_blocks`.

    labels, predicted, blocks: (N,), codes: (C,) of the classes. Returns {"overall_accuracy",
    "macro_f1": [low, high]; "precision", "recall": {code: [low, high]}}, as the scores of
    `score_classes`; None for one that blocks cannot give, as of a class that lies in one of them.
    """
    numbers = [np.unique(blocks, return_inverse=True)[1]]
    numbers += [np.searchsorted(codes, part) for part in (predicted, labels)]
    counts = np.zeros((min(MAX_BLOCKS, numbers[0].max() + 1), len(codes), len(codes)))
    np.add.at(counts, (numbers[0] % MAX_BLOCKS, *numbers[1:]), 1)

    def score(counts):
        right = np.diagonal(counts, axis1=-2, axis2=-1)
        mapped, labelled = counts.sum(-1), counts.sum(-2)
        f1 = np.where(labelled > 0, divide(2 * right, mapped + labelled), np.nan)
        parts = right.sum(-1) / counts.sum((-2, -1)), np.nanmean(f1, -1)
        return *parts, divide(right, mapped), divide(right, labelled)

    def ends(estimate, place=()):
        numbers = describe_estimate(estimate, place)
        return None if numbers["low"] is None else [numbers["low"], numbers["high"]]

    whole = counts.sum(0)
    without = score(whole - counts) if len(counts) > 1 else [part[None] for part in score(whole)]
    overall, macro, precision, recall = map(_jackknife, score(whole), without)
    return {
        "overall_accuracy": ends(overall),
        "macro_f1": ends(macro),
        "precision": {str(code): ends(precision, place) for place, code in enumerate(codes)},
        "recall": {str(code): ends(recall, place) for place, code in enumerate(codes)},
    }


def print_intervals(intervals):
    """Print what `find_intervals` gives of the whole split."""
    parts = [
        f"{words} {ends[0]:.3f} to {ends[1]:.3f}"
        for name, words in (("overall_accuracy", "accuracy"), ("macro_f1", "macro-F1"))
        if (ends := intervals[name])
    ]
    words = ", ".join(parts) or "none, of a single block"
    print(f"95 % intervals, from the variance between blocks: {words}")


def _assess_all(counts, sizes, stratum):
    """Values of `assess_classes`, of many samples at once: counts (.., C, C); see Assessment."""
    holds = (stratum == np.arange(stratum.max() + 1)[:, None]).astype(float)
    sizes = np.asarray(sizes, float)
    taken, weights = counts.sum(-1) @ holds.T, holds @ sizes / sizes.sum()
    matrix = counts * np.where(weights > 0, divide(weights, taken), 0)[..., stratum, None]
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    areas = matrix.sum(-2)
    return right.sum(-1), divide(right, matrix.sum(-1)), divide(right, areas), areas, matrix


def _hide_missing(assessment, found):
    """NaN for the area of a class that the reference lacks: it may exist. found: (C,) pixels."""
    value, error, z = assessment.areas
    value, error = (np.where(found > 0, part, np.nan) for part in (value, error))
    return assessment._replace(areas=Estimate(value, error, z))


def divide(a, b):
    """a / b, NaN where b is 0."""
    a, b = np.broadcast_arrays(np.asarray(a, float), np.asarray(b, float))
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b != 0)


# ---- words ---------------------------------------------------------------------------------------


def describe_estimate(estimate, place=(), scale=1):
    """Plain numbers for JSON of one value of an Estimate; None where it cannot be made.

    place: index of the value; scale: its largest possible value, in the unit that is wanted.
    """
    value, error = (float(part[place]) * scale for part in estimate[:2])
    half = estimate.z * error
    numbers = {"estimate": value, "standard_error": error, "half_width": half}
    numbers |= {"low": max(value - half, 0.0), "high": min(value + half, float(scale))}
    return {key: number if np.isfinite(number) else None for key, number in numbers.items()}


def describe_assessment(assessment, legend, mapped, hectares, counts):
    """What `print_assessment` prints, as plain numbers for JSON.

    legend: {code: {"name", ..}} of the C classes; mapped: (C,) pixels of each in the map; hectares:
    of the map, or None where they are not known; counts: (C, C) reference pixels.
    """
    pixels = float(np.sum(mapped))
    classes = {}
    for place, (code, entry) in enumerate(legend.items()):
        area = partial(describe_estimate, assessment.areas, place)
        classes[str(code)] = {
            "name": entry["name"],
            "mapped_pixels": int(mapped[place]),
            "area_share": area(),
            "area_pixels": area(pixels),
            "area_hectares": None if hectares is None else area(hectares),
            "users_accuracy": describe_estimate(assessment.users, place),
            "producers_accuracy": describe_estimate(assessment.producers, place),
            "reference_mapped": int(counts[place].sum()),
            "reference_labelled": int(counts[:, place].sum()),
        }
    return {
        "pixels": int(pixels),
        "hectares": hectares,
        "overall_accuracy": describe_estimate(assessment.overall),
        "classes": classes,
        "error_matrix": np.asarray(counts).astype(int).tolist(),
    }


def explain_gaps(counts, sizes, names, what="labelled point"):
    """Lines that say why an estimate is missing.

    counts: (S, C, C), sizes: (S,) as `assess_strata` takes them; names: of strata, and of classes;
    what: words for a pixel of the sample.
    """
    strata, classes = names
    taken, share, lines = counts.sum((1, 2)), sizes / sizes.sum(), []
    for name, number, part, size in zip(strata, taken, share, sizes, strict=True):
        found = {0: f"no {what}", 1: f"a single {what}"}.get(int(number))
        missing = "standard errors" if number else "areas and no overall accuracy"
        if found and size > number:
            lines.append(f"{name}: found {found} in {part:.1%} of the map, so no {missing}")
    for name, number in zip(classes, counts.sum((0, 1)), strict=True):
        if number == 0:
            lines.append(f"{name}: found no {what} of this class, so no area of it")
    return lines


def explain_no_width(counts, classes):
    """A line on classes in which no sampled pixel is wrong: [] where there are none.

    None of n independent points being wrong, up to 3 / n may be: the rule of three.
    counts: (C, C); classes: their names.
    """
    right, taken = np.diagonal(counts), counts.sum(1)
    words = [
        f"{name} {3 / number:.1%}"
        for name, number, hits in zip(classes, taken, right, strict=True)
        if number == hits > 0
    ]
    line = "no error among the points of a class, so no width of the interval; up to about"
    return [f"{line} 3 / points may be wrong: {', '.join(words)}"] if words else []


def print_assessment(result):
    """Print the content of `describe_assessment`; – where an estimate cannot be made."""
    unit, scale = "pixels", 1
    if result["hectares"] is not None:
        unit, scale = "ha", result["hectares"] / max(1, result["pixels"])
    print(f"overall accuracy {_words(result['overall_accuracy'], 100)} %")
    print(
        f"{'':30s}{'mapped':>12s}  {'area, ' + unit:28s}"
        f"user's accuracy, %      producer's accuracy, %"
    )
    for code, row in result["classes"].items():
        area = row["area_hectares"] or row["area_pixels"]
        print(
            f"{code:>4} {row['name']:24.24s} {row['mapped_pixels'] * scale:12.2f}  "
            f"{_words(area, 1, 2):28s}{_words(row['users_accuracy'], 100):24s}"
            f"{_words(row['producers_accuracy'], 100)}"
        )


def _words(estimate, scale, digits=1):
    """An estimate and its 95 % interval; "–" for what cannot be made."""
    value, low, high = (
        "–" if estimate[key] is None else f"{scale * estimate[key]:.{digits}f}"
        for key in ("estimate", "low", "high")
    )
    return value if value == "–" else f"{value} ({low} to {high})" if low != "–" else f"{value} (–)"
