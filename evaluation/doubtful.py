"""Which labels to distrust: those that labels of other places contradict.

Discriminant analysis of the embeddings, fitted to the labels of other blocks, gives each labelled
pixel the probability of each class. By confident learning (Northcutt et al. 2021,
10.1613/jair.1.12125) a label is doubtful where another class is more probable, and at least as
probable as it is on average for the pixels with its label. Doubtful neighbours of one label and one
probable class are a patch; the less probable its label and the larger, the more doubtful it is.

Shapes: N labelled pixels, D dimensions, C classes, n patches, H x W pixels of a map.
"""

import warnings
from pathlib import Path
from typing import NamedTuple

from running.errors import InputError, notice
from running.tile_json import merge_classes

import numpy as np
from rasterio import Affine
from rasterio.features import shapes as polygons_of
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from evaluation.classifiers import FOLDS, fit_classifier
from evaluation.reference import find_blocks
from maps.land_cover import class_legend
from maps.reader import find_labels, read_codes

MAX_LABELS = 200_000  # pixels that are examined: of more, as many at random
SHOWN = 10  # patches that are printed
# Of planted errors, whole fields are ranked best with 0.5, single pixels with 0; see find_patches
SIZE_POWER = 0.25


class Labelled(NamedTuple):
    """Labelled pixels of maps: y (N, D), labels (N,), places (N, 3): map, row, column; blocks (N,).

    legend: of the labels.
    """

    y: np.ndarray
    labels: np.ndarray
    places: np.ndarray
    blocks: np.ndarray
    legend: dict


def read_labelled(maps, labels_path, seed=0):
    """The Labelled pixels of RepresentationMaps.

    labels_path: empty for those of the tiles that infer.json names. Raises InputError where there
    are none.
    """
    if labels_path and len(maps) > 1:
        raise InputError(f"labels_path={labels_path}: found {len(maps)} maps, wanted one map_path")
    parts, sources = [], []
    for number, one in enumerate(maps):
        path, tile_info = find_labels(labels_path, one.info)
        if not path:
            raise InputError(f"{one.path}: found no labels of its tile, wanted labels_path=")
        labels = np.asarray(read_codes(path, one.shape[:2]))
        rows, columns = find_blocks(path, one.info, labels.shape)
        sources.append((Path(path).parent / "tile.json", tile_info))
        for first, block in one.blocks():
            row, column = np.nonzero(labels[first : first + len(block)])
            y = block[row, column]
            known = np.isfinite(y).all(1)
            row, column = row[known] + first, column[known]
            place = np.stack([np.full_like(row, number), row, column], 1)
            block = np.stack([place[:, 0], rows[row], columns[column]], 1)
            parts.append((y[known], labels[row, column], place, block))
    y, labels, places, blocks = (np.concatenate(part) for part in zip(*parts, strict=True))
    if len(y) > MAX_LABELS:
        notice(f"{len(y)} labelled pixels: {MAX_LABELS} of them, chosen at random, are examined")
        kept = np.sort(np.random.default_rng(seed).permutation(len(y))[:MAX_LABELS])
        y, labels, places, blocks = (part[kept] for part in (y, labels, places, blocks))
    blocks = np.unique(blocks, axis=0, return_inverse=True)[1].ravel()
    legend = class_legend(np.unique(labels), merge_classes(sources, refuse=False))
    return Labelled(y, labels, places, blocks, legend)


def cross_validate(pixels, seed=0):
    """Probability of each class of the legend for Labelled pixels, from other blocks: (N, C).

    NaN where the other blocks have no label of the pixel's class.
    """
    codes = np.array(list(pixels.legend))
    probability = np.full((len(pixels.labels), len(codes)), np.nan)
    blocks = len(np.unique(pixels.blocks))
    if min(blocks, len(codes)) < 2:
        raise InputError(
            f"labels: found {len(codes)} classes in {blocks} blocks, wanted two or more of both"
        )
    splitter = StratifiedGroupKFold(min(FOLDS, blocks), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a class with fewer labels than folds
        parts = list(splitter.split(pixels.y, pixels.labels, pixels.blocks))
    for train, test in parts:
        model, _ = fit_classifier("discriminant analysis", pixels.y[train], pixels.labels[train])
        test = test[np.isin(pixels.labels[test], model.classes_)]
        places = np.searchsorted(codes, model.classes_)
        probability[test] = 0
        probability[np.ix_(test, places)] = model.predict_proba(pixels.y[test])
    missing = np.isnan(probability).any(1)
    if missing.any():
        names = [pixels.legend[int(code)]["name"] for code in np.unique(pixels.labels[missing])]
        notice(
            f"{missing.sum()} of {len(missing)} labelled pixels not examined: other blocks have no "
            f"label of {', '.join(names)}"
        )
    return probability


def find_contradicted(probability, own):
    """The class that is more probable than the label, (N,) place in the legend; -1 for none.

    probability: (N, C), NaN for unknown; own: (N,) the place of the label.
    """
    rows = np.arange(len(own))
    known = ~np.isnan(probability).any(1)
    usual = np.array(  # self-confidence of the pixels of each class
        [
            probability[known & (own == k), k].mean() if (known & (own == k)).any() else np.inf
            for k in range(probability.shape[1])
        ]
    )
    likely = np.where(known[:, None] & (probability >= usual), probability, -1)
    other = likely.argmax(1)
    is_doubtful = (likely[rows, other] >= 0) & (other != own)
    is_doubtful &= probability[rows, other] > probability[rows, own]
    return np.where(is_doubtful, other, -1)


class Patches(NamedTuple):
    """Patches of doubtful labels, the most doubtful first.

    label, other (n,): class codes, of the label and of the probable class; pixels (n,): how many;
    own, probable (n,): geometric mean of the probability of the label, mean of the other's. places
    (n, 3): map, row, column of the most doubtful pixel. of (N,): the patch of each Labelled pixel,
    -1 for none. legend: of the labels.
    """

    label: np.ndarray
    other: np.ndarray
    pixels: np.ndarray
    own: np.ndarray
    probable: np.ndarray
    places: np.ndarray
    of: np.ndarray
    legend: dict


def find_patches(pixels, probability):
    """The Patches of Labelled pixels with cross-validated probabilities (N, C).

    Ranked by the mean logarithm of the probability of the label, times pixels to SIZE_POWER.
    """
    codes = np.array(list(pixels.legend))
    own = np.searchsorted(codes, pixels.labels)
    other = find_contradicted(probability, own)
    chosen = np.flatnonzero(other >= 0)
    component = _connect(pixels.places[chosen], own[chosen] * len(codes) + other[chosen])
    first = np.unique(component, return_index=True)[1]
    size = np.bincount(component)
    log_own = np.log(np.maximum(probability[chosen, own[chosen]], np.finfo(float).tiny))
    mean_own = np.bincount(component, log_own) / size
    mean_other = np.bincount(component, probability[chosen, other[chosen]]) / size
    order = np.argsort(mean_own * size**SIZE_POWER, kind="stable")
    worst = np.lexsort([log_own, component])
    worst = chosen[worst[np.searchsorted(component[worst], np.arange(len(size)))]]
    of = np.full(len(own), -1)
    of[chosen] = np.argsort(order)[component]
    columns = codes[own[chosen]][first], codes[other[chosen]][first], size, np.exp(mean_own)
    columns += (mean_other, pixels.places[worst])
    return Patches(*(part[order] for part in columns), of, pixels.legend)


def _connect(places, values):
    """Components (M,) of pixels (M, 3) that are neighbours (above, below, beside), of one value."""
    if not len(places):
        return np.empty(0, int)
    step = int(places[:, 2].max(initial=0)) + 2
    high = int(places[:, 1].max(initial=0)) + 2
    index = (places[:, 0] * high + places[:, 1]) * step + places[:, 2]
    order = np.argsort(index)
    edges = []
    for ahead in (1, step):
        found = np.searchsorted(index, index + ahead, sorter=order).clip(max=len(index) - 1)
        found = order[found]
        is_edge = (index[found] == index + ahead) & (values[found] == values)
        edges.append(np.stack([np.flatnonzero(is_edge), found[is_edge]]))
    rows, columns = np.concatenate(edges, 1)
    graph = coo_array((np.ones(len(rows)), (rows, columns)), (len(index), len(index)))
    return connected_components(graph, directed=False)[1]


def outline(patches, pixels, maps, count):
    """Polygons of the first patches in the CRS of their maps, as a list of GeoJSON geometries."""
    found = {}
    for number, one in enumerate(maps):
        own = (pixels.places[:, 0] == number) & (patches.of >= 0) & (patches.of < count)
        raster = np.zeros(one.shape[:2], np.int32)
        raster[tuple(pixels.places[own, 1:].T)] = patches.of[own] + 1
        transform = Affine(*one.info["transform"])
        shapes = polygons_of(raster, mask=raster > 0, transform=transform)
        found |= {int(value) - 1: geometry for geometry, value in shapes}
    return [found[place] for place in range(count)]


def print_patches(patches, pixels, maps):
    """Print how many labels are doubtful, and the first patches."""
    count, total = int((patches.of >= 0).sum()), len(pixels.labels)
    print(
        f"{count} of {total} labelled pixels ({count / total:.1%}) are doubtful, in "
        f"{len(patches.label)} patches; the most doubtful:"
    )
    names = {code: entry["name"] for code, entry in patches.legend.items()}
    for place in range(min(SHOWN, len(patches.label))):
        number, row, column = patches.places[place]
        size = f"{patches.pixels[place]} pixel{'s' * bool(patches.pixels[place] > 1)}"
        label, other = (names[int(codes[place])] for codes in (patches.label, patches.other))
        print(
            f"{place + 1:4d} {maps[number].path.parent.name} row {row} column {column}: "
            f"{size} labelled {label} ({patches.own[place]:.2f}), probably {other} "
            f"({patches.probable[place]:.2f})"
        )
