"""Features of labelled pixels: representations, and what they are compared with.

Shapes: N pixels, T dates, B bands, F features.
"""

from functools import partial

from running.config import ALL_YEAR
from running.errors import InputError

import numpy as np
import torch

from backbones import build_backbone, load_backbone
from evaluation.networks import walk
from tiles import find_days
from transforms import gap_fill, harmonic_coefficients, split_dates
from utils import encode_series, rankme, retrieval

MAX_DAYS = 73  # that series are gap-filled to; many tiles have more days, 5 days apart suffices
OF_CHECKPOINTS = ("embedding", "untrained")  # the other features need no encoder


def find_key(features, number):
    """The key of `build_extractors` for features, of checkpoint `number` where they need one."""
    return features, number if features in OF_CHECKPOINTS else 0


def build_extractors(checkpoints, tiles, draws, runtime, until=ALL_YEAR[1]):
    """{`find_key`: function of x (N, T, B) and doys (N, T) that gives features (N, F)}.

    draws: as `encode_series` takes them; until: the last day of year that is read. The
    untrained encoder of a checkpoint has the same architecture; its random weights have the
    checkpoint's number as seed.
    """
    days = np.array(find_days(tiles))
    days = days[days <= until]
    if len(days) > MAX_DAYS:
        days = np.linspace(days[0], days[-1], MAX_DAYS)
    days = torch.from_numpy(days)

    def encode(module, x, doys):
        return encode_series(module, x, doys, runtime, draws)[0]

    extractors = {
        ("series", 0): lambda x, doys: gap_fill(x, doys, days).flatten(1),
        ("harmonic", 0): harmonic_coefficients,
    }
    for number, checkpoint in enumerate(checkpoints):
        torch.manual_seed(number)
        untrained = build_backbone(**checkpoint["backbone"]).eval().to(runtime.device)
        trained = load_backbone(checkpoint).to(runtime.device)
        extractors["embedding", number] = partial(encode, trained)
        extractors["untrained", number] = partial(encode, untrained)
    if until == ALL_YEAR[1]:
        return extractors
    return {key: partial(_extract_until, extract, until) for key, extract in extractors.items()}


def _extract_until(extract, until, x, doys):
    """Features of the observations up to a day, of which each pixel has one or more."""
    doys = doys.masked_fill(doys > until, 0)  # days ascend, so padding stays at the end
    longest = int((doys > 0).sum(1).max()) if len(doys) else 0
    return extract(x[:, :longest], doys[:, :longest])


def stack_features(features, names, number):
    """Features (N, F) of names joined by "+", side by side. features: of `read_split`."""
    return np.hstack([features[find_key(name, number)] for name in names.split("+")])


def read_split(dataset, extractors, maps=None, known_by=ALL_YEAR[1]):
    """Features {key: (N, F) float32}, labels (N,) and blocks (N,) of a labelled data set, numpy.

    maps: {name: the EmbeddingMap of each tile}; their values are the features (name, 0).
    known_by: without maps, pixels without an observation up to that day of year are left out.
    """
    features, labels, groups = {key: [] for key in extractors}, [], []
    for batch in walk(dataset):
        is_known = batch[1][:, 0] <= known_by  # the first day of each pixel
        if not is_known.any():
            continue
        x, doys, label, group = batch if is_known.all() else (part[is_known] for part in batch)
        for key, extract in extractors.items():
            features[key].append(extract(x, doys))
        labels.append(label)
        groups.append(group)
    if not labels:
        folder = dataset.tiles[0].path.parent
        raise InputError(f"{folder}: found no {dataset.split} pixel seen up to day {known_by}")
    features = {key: torch.cat(parts).numpy() for key, parts in features.items()}
    tiles, pixels = dataset.read_places() if maps else (None, None)
    for name, of_tiles in (maps or {}).items():
        features[name, 0] = np.empty((len(pixels), of_tiles[0].shape[2]), np.float32)
        for number, values in enumerate(of_tiles):
            own = tiles == number
            features[name, 0][own] = values.read_pixels(pixels[own])
    return features, torch.cat(labels).numpy(), torch.cat(groups).numpy()


def measure_steadiness(dataset, extractors):
    """How well a pixel is found again from other dates: {features: a share for each checkpoint}.

    The dates of each pixel are divided at random into two halves, each read as a whole year.
    "pixels": how many have two dates or more, among which each of them is searched.
    """
    halves, generator = {key: ([], []) for key in extractors}, torch.Generator().manual_seed(0)
    pixels = 0
    for x, doys, *_ in walk(dataset):
        two = (doys > 0).sum(1) > 1
        pixels += int(two.sum())
        for place, half in enumerate(split_dates(x[two], doys[two], generator)):
            for key, extract in extractors.items() if two.any() else ():
                halves[key][place].append(extract(*half))
    result = {"pixels": pixels}
    for name, number in halves if pixels > 1 else ():
        a, b = (torch.cat(parts) for parts in halves[name, number])
        result.setdefault(name, []).append(retrieval(a, b))
    return result


def measure_ranks(features, max_pixels):
    """RankMe of at most max_pixels representations: {features: a value for each checkpoint}.

    features: of `read_split`.
    """
    ranks = {}
    for (name, _), values in sorted(features.items()):
        if name in OF_CHECKPOINTS:
            ranks.setdefault(name, []).append(rankme(values[:max_pixels])[0])
    return ranks
