"""Views of pixel series: drawing clear time steps, standardising them, mixing them.

Shapes: N pixels, T dates, V views, S drawn steps, B bands. Every function takes and returns
whole batches of tensors and runs the same code on CPU and GPU.
"""

import math

import torch


def draw_steps(clear, num_steps, num_views=1, generator=None):
    """Draw the clear observations of each pixel that make its views.

    Selection sampling (Knuth, TAOCP 2, 3.4.2, Algorithm S) run over the dates, all pixels at
    once: ascending in time, without replacement, every subset equally likely. A pixel with
    fewer than `num_steps` clear dates has each of them repeated equally often, and the rest of
    its draw is a subset drawn in the same way.

    clear: (N, T) bool, True where the observation is clear; at least one a pixel.
    generator: `torch.Generator` on clear's device, or None for torch's default one.
    Returns (N, V, S) int64 indices into the dates, ascending along S.
    Raises ValueError for a pixel with no clear observation.
    """
    num_pixels, num_dates = clear.shape
    by_date = clear.T.contiguous()  # (T, N): the loop below walks along memory
    num_clear = by_date.sum(0)
    if num_pixels and not bool(num_clear.all()):
        raise ValueError("a pixel without a clear observation has no views; select by min_valid")
    whole, rest = num_steps // num_clear, num_steps % num_clear

    weight = by_date.float()
    wanted = rest.float().repeat(num_views, 1)  # (V, N) still to be drawn
    left = num_clear.float()  # (N,) clear dates not yet passed
    taken = torch.rand(num_dates, num_views, num_pixels, generator=generator, device=clear.device)
    for take, is_clear in zip(taken, weight, strict=True):
        take.mul_(left).lt_(wanted).mul_(is_clear)  # clear: taken with chance wanted / left
        wanted -= take
        left -= is_clear

    # how often each date is used, (V * N, T), then the dates themselves in order
    repeats = (taken + (whole * by_date)[:, None]).byte().view(num_dates, -1).T.contiguous()
    most = int(repeats.max()) if num_pixels else 1
    used = repeats[..., None] > torch.arange(most, device=clear.device)  # (V * N, T, most)
    found = used.view(-1).nonzero().view(num_views * num_pixels, num_steps)
    found -= torch.arange(len(found), device=clear.device)[:, None] * (num_dates * most)
    dates = found.div_(most, rounding_mode="trunc").view(num_views, num_pixels, num_steps)
    return dates.transpose(0, 1).contiguous()


def take_steps(bands, doys, steps):
    """Gather drawn observations.

    bands: (T, N, B); doys: (T,); steps: (N, V, S) from `draw_steps`.
    Returns (N, V, S, B) bands and (N, V, S) days of year, in the dtypes given.
    """
    num_dates, num_pixels, num_bands = bands.shape
    pixel = torch.arange(num_pixels, device=bands.device).view(-1, 1, 1)
    rows = (steps * num_pixels + pixel).view(-1)
    series = bands.reshape(num_dates * num_pixels, num_bands).index_select(0, rows)
    return series.view(*steps.shape, num_bands), doys[steps]


def pack_clear(bands, doys, clear, num_steps):
    """All clear observations of each pixel, in order, moved to the front.

    bands: (T, N, B); doys: (T,); clear: (T, N) bool; num_steps: S, at least the most clear dates.
    Returns bands (N, S, B) and doys (N, S). Behind the last clear observation the doy is 0, which
    is how padding is told from data, and the bands mean nothing.
    """
    date, pixel = clear.nonzero(as_tuple=True)
    steps = torch.zeros(clear.shape[1], num_steps, dtype=torch.int64, device=clear.device)
    steps[pixel, clear.cumsum(0)[date, pixel] - 1] = date
    bands, doys = take_steps(bands, doys, steps[:, None])
    is_data = torch.arange(num_steps, device=clear.device) < clear.sum(0)[:, None]
    return bands[:, 0], doys[:, 0] * is_data


def even_draws(x, doys, num_steps, num_views):
    """Views without chance, for inference: observations at even distances in their order.

    View v takes those numbered floor((i + (v + 1/2) / V) n / S) of a pixel's n, i = 0 .. S - 1.
    x: (N, T, B) and doys: (N, T), padded with doy 0 at the end (`pack_clear`).
    Returns x (N, V, S, B), doys (N, V, S).
    """
    offset = (torch.arange(num_views, device=x.device) + 0.5) / num_views
    place = (torch.arange(num_steps, device=x.device) + offset[:, None]) / num_steps  # (V, S)
    rank = ((doys > 0).sum(1)[:, None, None] * place).long()  # (N, V, S)
    pixel = torch.arange(len(x), device=x.device)[:, None, None]
    return x[pixel, rank], doys[pixel, rank]


def gap_fill(x, doys, days):
    """Series interpolated linearly in time onto common days, for classical models.

    x: (N, T, B) and doys: (N, T), padded with doy 0 at the end; days: (G,).
    Before the first and after the last observation its value stands. Returns (N, G, B).
    """
    count = (doys > 0).sum(1, keepdim=True)
    times = doys.float().masked_fill(doys == 0, math.inf)
    days = days.float().expand(len(x), -1).contiguous()
    after = torch.searchsorted(times, days).clamp(max=count - 1)
    before = (torch.searchsorted(times, days, right=True) - 1).clamp(min=0)
    pixel = torch.arange(len(x))[:, None]
    gap = (times[pixel, after] - times[pixel, before]).clamp(min=1e-6)
    share = ((days - times[pixel, before]) / gap).clamp(0, 1)[..., None]
    return (1 - share) * x[pixel, before] + share * x[pixel, after]


def standardise(bands, mean, std):
    """Reflectance x 10000 as stored to float32 of mean 0 and deviation 1.

    bands: (..., B); mean, std: (B,) float32 in the units of bands.
    """
    return (bands.float() - mean) / std


def mix_up(x_a, doys_a, x_b, doys_b, weight):
    """Mixed views of Mixed Barlow Twins (arXiv 2312.02151): weight * a + (1 - weight) * b.

    The i-th steps of two ordered draws fall at like times of the year, so the days are mixed
    with the bands. x_a, x_b: (N, S, B); doys_a, doys_b: (N, S); weight: (N,) in [0, 1].
    Returns x (N, S, B) and doys (N, S), float32.
    """
    weight = weight[:, None]
    doys = weight * doys_a + (1 - weight) * doys_b
    return weight[..., None] * x_a + (1 - weight[..., None]) * x_b, doys
