"""What pretraining takes from the data: the dates of a view, and how long it is.

Two views of one pixel should differ. So a view has at most half of the clear dates that three of
four pixels have, and no more than 16. And an encoder that reads few observations for long knows
the pixels by heart, so the length follows their number (experiments/README.md).
"""

from types import MappingProxyType
from typing import NamedTuple

import numpy as np

MAX_DATES = 16  # of a view: more gain nothing
SHORTEST = 0.5  # the shortest views, as a share of the longest; two dates at least
READS = 10  # pixels read for each clear observation ..
LEAST, MOST = 100_000, 1_000_000  # .. between these, or one pass over the pixels


class Recipe(NamedTuple):
    """The keys of train.py's run_config that are 0 follow from these."""

    dates: int  # clear ones that three of four training pixels have, or more
    observations: int  # clear ones, of all training pixels


def read_recipe(dataset):
    """The Recipe of a data set's pixels."""
    counts = np.zeros(1, np.int64)  # how many pixels have 0, 1, .. clear dates
    for index, tile in enumerate(dataset.tiles):
        here = np.bincount(tile.clear_counts()[dataset.pixel_mask(index)])
        counts = np.pad(counts, (0, max(0, len(here) - len(counts))))
        counts[: len(here)] += here
    dates = np.searchsorted(counts.cumsum(), counts.sum() / 4)
    return Recipe(int(dates), int(counts @ np.arange(len(counts))))


def fill_in(config, recipe):
    """The config, frozen, with sample_size, min_sample_size and min_samples in place of 0."""
    size = config["sample_size"] or min(MAX_DATES, max(2, recipe.dates // 2))
    samples = min(max(READS * recipe.observations, LEAST), MOST, config["max_samples"])
    found = {"sample_size": size, "min_sample_size": min(size, max(2, round(SHORTEST * size)))}
    found |= {"min_samples": samples}
    return MappingProxyType(config | {key: config[key] or found[key] for key in found})


class Length(NamedTuple):
    """How long a training is, in steps."""

    steps_per_epoch: int  # visit every pixel once
    total_steps: int  # of the schedule
    stop_step: int  # where this run ends: total_steps, or earlier by max_steps


def find_length(config, train_set):
    """Length of a training: `epochs` passes, or one pass between min_samples and max_samples."""
    steps_per_epoch, pixels = train_set.steps_per_epoch, train_set.num_pixels
    samples = min(max(pixels, config["min_samples"]), config["max_samples"])
    total_steps = config["epochs"] * steps_per_epoch or -(-samples * steps_per_epoch // pixels)
    stop_step = min(total_steps, config["max_steps"] or total_steps)
    return Length(steps_per_epoch, total_steps, stop_step)
