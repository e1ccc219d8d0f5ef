"""Views of pixel series: clear dates sampled, bands standardised, pixels augmented and mixed.

Shapes: N pixels, T dates, V views, S sampled dates, B bands. Every function takes and returns
whole batches of tensors and runs the same code on CPU and GPU.
"""

import math

from running.distributed import BatchGenerator, gather, share

import numpy as np
import torch

DAYS = 365.25  # of a year
NO_RANK = 1 << 14  # larger than any rank: marks a date that is not sampled


def encode_days(doys, num_features):
    """Sines and cosines of 2 pi k doy / 365.25 for k = 1 .. num_features / 2: the yearly harmonics.

    doys: (N, S) of any number type. Returns (N, S, num_features) float32.
    """
    k = torch.arange(1, num_features // 2 + 1, device=doys.device)
    angle = doys.float()[..., None] * (2 * math.pi / DAYS * k)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def sample_dates(clear, num_sampled, random):
    """Sample the clear observations that make each pixel's views.

    Dates ascend, none is sampled twice, and every subset is equally likely. Where a pixel has fewer
    than `num_sampled` clear dates, each of them is repeated equally often, and the rest is a random
    subset: of 3 clear dates (a b c), 5 sampled ones are for example a a b c c.

    clear: (T, N) bool, True where the observation is clear; at least one a pixel.
    random: (S, N, V) float32, uniform in [0, 1), on clear's device; S is num_sampled.
    Returns (N, V, S) int64 indices into the dates, ascending along S.
    Raises ValueError for a pixel with no clear observation.
    """
    by_pixel = clear.T.contiguous()
    num_clear = by_pixel.sum(1, dtype=torch.int32)
    if len(num_clear) and not bool(num_clear.all()):
        raise ValueError("a pixel without a clear observation has no views; select by min_valid")
    num_views = random.shape[2]
    series = num_clear.repeat_interleave(num_views)  # one a view: (N V,)
    ranks = _sample_ranks(series, num_sampled, random.flatten(1)).T.contiguous().long()  # (N V, S)
    # rank r of a pixel is the r-th of its entries in the list of all clear observations
    start = num_clear.cumsum(0) - num_clear
    ranks += start.repeat_interleave(num_views)[:, None]
    dates = _flatnonzero(by_pixel).take(ranks).view(-1, num_views, num_sampled)
    pixel = torch.arange(len(num_clear), device=clear.device)
    return dates.sub_((pixel * len(clear)).view(-1, 1, 1))


def _sample_ranks(num_clear, num_sampled, random):
    """`sample_dates` for series (N,) whose dates are all clear: (S, N) int16, ascending along S.

    Insertion sort over all series at once. Sample i is one of the n - i ranks that are left; each
    earlier rank that is not larger raises it by one while it moves up the sorted list. For example,
    after ranks 1 and 3 of 5, the third sample is number 1 of the ranks left (0 2 4): 1 is raised to
    2 by rank 1, and rank 3 is larger.
    """
    repeats = (num_sampled - 1) // num_clear  # full rounds through all dates
    rest = num_sampled - repeats * num_clear  # dates to sample, at most num_clear
    number = torch.arange(num_sampled, device=num_clear.device)[:, None]
    ranks = (random * (num_clear.float() - number)).short()
    few = repeats > 0
    if some_few := bool(few.any()):
        ranks.masked_fill_(number >= rest, NO_RANK)
    # in place and int16: these many small operations are limited by memory traffic
    rows, spare = ranks.unbind(0), torch.empty_like(ranks[0])
    for i, rank in enumerate(rows):
        for other in rows[:i]:
            rank += torch.ge(rank, other, out=spare)
            torch.minimum(rank, other, out=spare)
            torch.maximum(rank, other, out=rank)
            other.copy_(spare)
    if some_few:
        sampled, repeated = ranks[:, few], (number - rest[few]) % num_clear[few]
        ranks[:, few] = torch.where(sampled < NO_RANK, sampled, repeated.short()).sort(0).values
    return ranks


def _flatnonzero(mask):
    """Flat indices of the True entries. On the CPU numpy is eight times as fast as torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.view(-1).nonzero().view(-1)


def thin_dates(x, doys, min_dates, seed):
    """Keep a random number of the sampled dates: views of several lengths, one length a step.

    The positions kept are random and the same for all pixels and views. Since the samples are
    random subsets of each pixel's clear dates, so is what is kept. There are four lengths, from
    `min_dates` to S, so that a network is compiled for few shapes.
    x: (N, V, S, B); doys: (N, V, S). Returns x (N, V, s, B), doys (N, V, s).
    """
    num_dates, rng = x.shape[2], np.random.default_rng(seed)
    lengths = np.linspace(min(min_dates, num_dates), num_dates, 4).round().astype(int)
    places = np.sort(rng.choice(num_dates, rng.choice(lengths), replace=False))
    keep = torch.from_numpy(places).to(x.device, non_blocking=True)
    return x[:, :, keep], doys[:, :, keep]


def clear_dates(clear):
    """All clear observations of each pixel, in order.

    clear: (T, N) bool. Returns (N, S) int64 indices into the dates, S the largest number of a
    pixel; shorter rows are padded with -1.
    """
    num_dates, num_pixels = clear.shape
    num_clear = clear.sum(0)
    longest = int(num_clear.max()) if num_pixels else 0
    dates = torch.full((num_pixels, longest), -1, device=clear.device)
    is_data = torch.arange(longest, device=clear.device) < num_clear[:, None]
    dates[is_data] = _flatnonzero(clear.T.contiguous()) % num_dates
    return dates


def even_dates(dates, max_dates):
    """At most `max_dates` of each pixel's dates, evenly spaced in their order.

    Of n dates, number floor((i + 1/2) n / max_dates) is kept, i = 0 .. max_dates - 1; all where n
    is smaller.
    dates: (N, S) as `clear_dates` gives them; max_dates: 0 keeps all. Returns (N, S or max_dates).
    """
    if not 0 < max_dates < dates.shape[1]:
        return dates
    count = (dates >= 0).sum(1, keepdim=True)
    place, number = torch.arange(max_dates, device=dates.device), count.clamp(max=max_dates)
    rank = ((2 * place + 1) * count // (2 * number).clamp(min=1)).clamp(max=dates.shape[1] - 1)
    return dates.gather(1, rank).masked_fill(place >= number, -1)


def even_draws(x, doys, num_sampled, num_views):
    """Deterministic views, for inference: observations evenly spaced in their order.

    View v takes observation floor((i + (v + 1/2) / V) n / S) of a pixel's n, i = 0 .. S - 1.
    x: (N, T, B) and doys: (N, T), padded with doy 0 at the end (`Tile.read_dates`); num_sampled: S;
    num_views: V.
    Returns x (N, V, S, B), doys (N, V, S).
    """
    offset = (torch.arange(num_views, device=x.device) + 0.5) / num_views
    position = (
        torch.arange(num_sampled, device=x.device) + offset[:, None]
    ) / num_sampled  # (V, S)
    rank = ((doys > 0).sum(1)[:, None, None] * position).long()  # (N, V, S)
    pixel = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x[pixel, rank], doys[pixel, rank]


def drop_dates(doys, min_share, seed, longest):
    """Days of random subsets of the observations: those left out get 0, the day of padding.

    A pixel keeps each observation with a probability of its own, random in min_share .. 1, and at
    least one observation.
    doys: (N, S), 0 for padding; longest: the largest S of any batch, for which random numbers are
    made, so that they depend on the seed alone. Returns (N, S).
    """
    generator = BatchGenerator(*share(len(doys)), seed, doys.device)
    random = generator.uniform(1 + longest)[:, : 1 + doys.shape[1]]
    if not doys.numel():  # a process may have no pixel of a small batch
        return doys
    stays = min_share + (1 - min_share) * random[:, :1]
    random = random[:, 1:].masked_fill(doys == 0, 2.0)
    return doys * (random <= stays.maximum(random.amin(1, keepdim=True)))


def gap_fill(x, doys, days):
    """Series interpolated linearly in time onto given days.

    x: (N, T, B) and doys: (N, T), padded with doy 0 at the end; days: (G,) for all series, or
    (N, G). Before the first observation its value is used, and the last one's after the last.
    Returns (N, G, B).
    """
    count = (doys > 0).sum(1, keepdim=True)
    times = doys.float().masked_fill(doys == 0, math.inf)
    days = days.float().expand(len(x), -1).contiguous()
    after = torch.searchsorted(times, days).clamp(max=count - 1)
    before = (torch.searchsorted(times, days, right=True) - 1).clamp(min=0)
    pixel = torch.arange(len(x), device=x.device)[:, None]
    gap = (times[pixel, after] - times[pixel, before]).clamp(min=1e-6)
    share = ((days - times[pixel, before]) / gap).clamp(0, 1)[..., None]
    return (1 - share) * x[pixel, before] + share * x[pixel, after]


def harmonic_coefficients(x, doys, order=3, ridge=1.0):
    """Harmonic regression of each band on the day of year, the classical features of a series.

    Per band the intercept, then the sines, then the cosines of 1 .. order cycles a year (365.25
    days), by ridge regression, so that fewer dates than coefficients suffice: minimises the sum of
    squared errors plus `ridge` times the sum of squared coefficients of sines and cosines. The
    intercept is not penalised. Model: Zhu and Woodcock 2014 (10.1016/j.rse.2014.01.011).
    x: (N, T, B) standardised and doys: (N, T), padded with doy 0 at the end; at least one
    observation each. ridge: above 0.
    Returns (N, (1 + 2 order) B) float32.
    """
    design = torch.cat([torch.ones_like(doys)[..., None], encode_days(doys, 2 * order)], dim=-1)
    design = design.double() * (doys > 0)[..., None]  # (N, T, 1 + 2 order), 0 for padding
    penalty = torch.full((design.shape[2],), float(ridge), device=x.device).double()
    penalty[0] = 0
    gram = design.mT @ design + penalty.diag()
    return torch.linalg.solve(gram, design.mT @ x.double()).mT.flatten(1).float()


def split_dates(x, doys, generator):
    """Two disjoint random halves of each pixel's observations; dates stay in order.

    x: (N, T, B) and doys: (N, T), padded with doy 0 at the end; generator: a torch.Generator.
    Returns (x, doys) of the first and of the second half, padded in the same way; the second has
    one more of an odd number.
    """
    is_data = doys > 0
    first = is_data.sum(1, keepdim=True) // 2
    random = torch.rand(doys.shape, generator=generator).masked_fill(~is_data, 2)
    rank = random.argsort(1).argsort(1)  # padding comes last
    pixel, halves = torch.arange(len(x))[:, None], []
    for mask in (rank < first, (rank >= first) & is_data):
        dates = clear_dates(mask.T)
        halves.append((x[pixel, dates], doys[pixel, dates].masked_fill(dates < 0, 0)))
    return halves


def standardise(bands, mean, std):
    """Reflectance x 10000 as stored to float32 of mean 0 and deviation 1.

    bands: (N, .., B); mean, std: (B,) float32 in the units of bands.
    """
    # long rows: a loop over B numbers alone is slow; a copy: bands stay as they are
    x = bands.flatten(1).to(torch.float32, copy=True)
    repeats = x.shape[1] // len(mean)
    mean, scale = (values.expand(repeats, -1).flatten() for values in (mean, 1 / std))
    return x.sub_(mean).mul_(scale).view(bands.shape)


# ---- augmentation --------------------------------------------------------------------------------


def blend(x, doys, x_other, doys_other, weight):
    """New pixels on the lines through pairs of pixels: x + weight * (other - x).

    A weight above 0 mixes two pixels as a sensor does whose pixel covers both (linear mixing); a
    weight below 0 moves away from the other pixel (DeVries and Taylor 2017, arXiv 1702.05538). The
    weight is the same in all views, so that they stay views of one place. The other pixel, from
    its observations in all views, is interpolated to the days of this one.
    x: (N, V, S, B); doys: (N, V, S); x_other: (N, U, S, B); doys_other: (N, U, S); weight: (N,).
    Returns (N, V, S, B).
    """
    days, order = doys_other.flatten(1).sort(1)
    series = x_other.flatten(1, 2).take_along_dim(order[..., None], 1)
    other = gap_fill(series, days, doys.flatten(1)).view_as(x)
    return x.lerp(other, weight.view(-1, 1, 1, 1))


def random_partners(seed, total, device):
    """A number in [0, 1) and a partner for each pixel of the whole batch: (total,) each."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.rand(total, generator=generator), torch.randperm(total, generator=generator)
    return (part.to(device, non_blocking=True) for part in numbers)


def blend_pixels(x, doys, blended, seed, rows, total):
    """A share of the pixels replaced by x + w (other - x), w in -0.5 .. 0.5, others of the batch.

    x: (N, 2, S, B); doys: (N, 2, S); blended: the share; rows, total: as `share` gives them.
    Returns x (N, 2, S, B).
    """
    number, order = random_partners(seed, total, x.device)
    weight = torch.where(number < blended, number / blended - 0.5, 0.0)[rows]
    return blend(x, doys, *(gather(part)[order][rows] for part in (x, doys.float())), weight)


def add_mixed_view(x, doys, seed, rows, total):
    """A third view: view a mixed with a random other pixel of the whole batch, at a's days.

    As in Mixed Barlow Twins (arXiv 2312.02151), which mixes images pixel by pixel.
    x: (N, 2, S, B); doys: (N, 2, S); rows, total: as `share` gives them.
    Returns x (N, 3, S, B), doys (N, 3, S) and the mixture of the whole batch: the weights of view
    a and the order that picks the partners.
    """
    weight, order = random_partners(seed, total, x.device)
    others = (gather(part)[order][rows] for part in (x, doys.float()))
    x_m = blend(x[:, :1], doys[:, :1], *others, 1 - weight[rows])
    return torch.cat([x, x_m], 1), torch.cat([doys, doys[:, :1]], 1), (weight, order)


def no_augmentation(x, doys, generator):
    """The views as they were sampled."""
    return x, doys


def jitter_bands(x, doys, generator):
    """Shift every band of every view by a normal number of deviation 0.1, the same on all dates."""
    return x + 0.1 * generator.normal(x.shape[1], 1, x.shape[3]), doys


def vary_years(x, doys, generator):
    """Views as of two other years: seasons early or late, short or long; bands brighter or darker.

    In each view by itself, days are shifted (6 days) and stretched about the middle of the year
    (2 %), bands are scaled (10 %, all alike) and shifted (0.1 each). These are deviations of normal
    numbers, those of days cut at two. Time shift, scale and magnitude: as in arXiv 2509.03497.
    """
    normal = generator.normal(x.shape[1], 1, 3 + x.shape[3])  # (N, V, 1, 3 + B)
    shift, stretch, scale = normal[..., :3].unbind(-1)
    shift, stretch = 6 * shift.clamp(-2, 2), 1 + 0.02 * stretch.clamp(-2, 2)
    days = (doys - DAYS / 2) * stretch + DAYS / 2 + shift
    x = x * (1 + 0.1 * scale[..., None]) + 0.1 * normal[..., 3:]
    return x, days.round().clamp(1, 366).to(doys.dtype)


# An augmentation takes the views x (N, V, S, B), doys (N, V, S) and a generator whose
# normal(*shape) and uniform(*shape) give (N, *shape) random numbers. It returns new x and doys,
# with days that still ascend. It comes after the views are thinned and before mix-up; the bands to
# predict and validation are never augmented. Register it here.
AUGMENTATIONS = {"none": no_augmentation, "jitter_bands": jitter_bands, "vary_years": vary_years}
