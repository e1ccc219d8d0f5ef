"""RankMe, retrieval, pictures, median colours, representations of series and whole tiles.

Shapes: N pixels, T dates, S sampled dates, B bands, D dimensions of a representation, C classes.
"""

import math

from running.device import read_ahead
from running.errors import notice
from running.files import atomic_write
from running.tile_json import find_bands

import numpy as np
import torch
import torch.nn.functional as F
from scipy.linalg import hadamard

from transforms import clear_dates, even_dates, even_draws, standardise

BLOCK_BYTES = 1 << 26  # of bands.npy that are read at a time
DRAWS = 8  # samples of a series for a backbone that takes a fixed number of dates
LEADING = 8  # principal components that lead the dimensions


def rankme(representations):
    """RankMe (arXiv 2210.02885): the exponential of the entropy of the singular values' shares.

    representations: (N, D), several thousand rows for a steady value.
    Returns rankme in 1 .. D and its normalised form, entropy / log D, in 0 .. 1.
    """
    singular = torch.linalg.svdvals(torch.as_tensor(representations).double())
    shares = singular / singular.sum().clamp(min=1e-12) + 1e-7
    entropy = float(-(shares * shares.log()).sum())
    return math.exp(entropy), entropy / math.log(representations.shape[1])


def find_rotation(representations):
    """Rotation (D, D) float32 that orders the dimensions: representations (N, D) @ rotation.

    Dimensions 1, 9, 17, .. all hold principal component 1, and components 9, 17, .. with the signs
    of a Hadamard matrix; and so on to 8, 16, 24, .. So the first 16, 32, 64 dimensions hold nearly
    what that many components hold, and all vary about as much: the last components themselves are
    noise, which a classifier that scales each dimension would take for as much as the first. That
    is for D a power of two; for others fewer are mixed, and none where D is odd.
    """
    y = torch.as_tensor(representations).double()
    y, size = y - y.mean(0), y.shape[1]
    components = torch.linalg.eigh(y.T @ y).eigenvectors.flip(1)
    components = components * skew_signs(y @ components)
    groups = math.gcd(size, 1 << (max(1, size // LEADING).bit_length() - 1))
    mixing = torch.from_numpy(hadamard(groups) / math.sqrt(groups))
    within = torch.eye(size // groups, dtype=torch.float64)
    return (components @ torch.kron(mixing, within)).float()


def skew_signs(values):
    """1 or -1 for each column of centred values (N, K): with it, the long tail is positive.

    It fixes the signs of components by what they show, so that those of two encoders agree.
    """
    return 1 - 2 * ((values**3).sum(0) < 0)


def retrieval(a, b, rows=1024):
    """Same-pixel retrieval: the share of rows of `a` whose nearest neighbour in `b` is their own.

    a, b: (N, D) representations of the same N pixels from different dates. Nearest by cosine, after
    the common mean is subtracted: it is large beside the differences, and the length of a row
    depends on the number of its dates.
    rows: of `a` that are compared at once; memory grows with rows x N.
    Returns a share in 0 .. 1; chance is 1 / N, so values of different N cannot be compared.
    """
    a, b = (torch.as_tensor(values, dtype=torch.float32) for values in (a, b))
    mean = torch.cat([a, b]).mean(0)
    a, b = (F.normalize(values - mean, dim=1) for values in (a, b))
    own = torch.arange(len(a), device=a.device)
    parts = zip(a.split(rows), own.split(rows), strict=True)
    found = sum(int(((part @ b.T).argmax(1) == pixels).sum()) for part, pixels in parts)
    return found / len(a)


def keep_classes(rows, labels, rng, floor=5):
    """Rows that were chosen of all labels, some exchanged so that every class stays.

    Each class keeps `floor` rows, or all that it has, or as many as the number of rows allows; rows
    of the class with the most make room. Where no class is below that, nothing is exchanged.
    rows: (n,) indices into labels (N,), whole numbers from 0 on. Returns (n,).
    """
    rows, (codes, counts) = rows.copy(), np.unique(labels, return_counts=True)
    found, floor = labels[rows], max(1, min(floor, len(rows) // len(codes)))
    for code, count in zip(codes, counts, strict=True):
        missing = min(floor, count) - (found == code).sum()
        if missing > 0:
            others = np.setdiff1d(np.flatnonzero(labels == code), rows)
            for row in rng.choice(others, missing, replace=False):
                place = np.flatnonzero(found == np.bincount(found).argmax())[0]
                rows[place], found[place] = row, code
    return rows


# ---- pictures ------------------------------------------------------------------------------------


def new_figure(**keywords):
    """A matplotlib figure, in which a dollar sign in the name of a class or a tile is one."""
    from matplotlib import figure, rcParams  # take 0.4 s, and a first step draws nothing

    rcParams["text.parse_math"] = False
    return figure.Figure(**{"layout": "constrained"} | keywords)


def plot_cross_corr(correlation, path, title=""):
    """Draw a cross-correlation matrix (P, P) to a PNG, red 1, white 0, blue -1."""
    figure = new_figure(figsize=(5.5, 4.8))
    axes = figure.subplots()
    image = axes.imshow(correlation, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="none")
    axes.set(title=title, xlabel="dimension, view B", ylabel="dimension, view A")
    figure.colorbar(image, shrink=0.8, label="cross-correlation")
    save_figure(figure, path)


def save_figure(figure, path):
    """Write a matplotlib figure to a PNG."""
    with atomic_write(path) as part:
        figure.savefig(part, dpi=120)


def median_color(tile, stride=1):
    """Median red, green and blue over the clear dates of every stride-th row and column of a tile.

    Returns (h, w, 3) float32 in the units of bands.npy, NaN where no date is clear; None where
    tile.json does not name B04, B03 and B02. A block of rows is in memory at a time.
    """
    chosen = find_bands(tile.band_names, ("B04", "B03", "B02"))
    if None in chosen:
        return None
    dates, height, width, num_bands = tile.shape
    color = np.empty((-(-height // stride), -(-width // stride), 3), np.float32)
    rows = max(1, BLOCK_BYTES // (2 * dates * width * num_bands))
    for first in range(0, len(color), rows):
        part = np.s_[:, first * stride : (first + rows) * stride : stride, ::stride]
        clear = tile.masks[part] == 1
        values = np.asarray(tile.bands[part])[..., chosen]
        values[~clear] = 65535
        values.sort(0)  # what is not clear goes to the end
        count = clear.sum(0)[None, ..., None]
        lower, upper = (
            np.take_along_axis(values, index, 0)[0].astype(np.float32)
            for index in ((count - 1).clip(0) // 2, count // 2)
        )
        color[first : first + rows] = np.where(count[0] > 0, (lower + upper) / 2, np.nan)
    return color


def notice_few_clear(tiles, min_valid):
    """Say in which tiles a tenth or more of the pixels with clear observations have too few."""
    counts = [tile.clear_counts() for tile in tiles]
    shares = [np.mean(count[count > 0] >= min_valid) if count.any() else 0 for count in counts]
    few = [number for number, share in enumerate(shares) if share <= 0.9]
    if few:
        tile, count, share = (one[few[0]] for one in (tiles, counts, shares))
        notice(
            f"{tile.path}: found {share:.0%} of its pixels with min_valid={min_valid} clear "
            f"observations, the clearest has {count.max()} (so in {len(few)} of {len(tiles)} "
            "tiles); the others are left out, a lower min_valid keeps them"
        )


# ---- representations -----------------------------------------------------------------------------


def encode_series(module, x, doys, runtime, draws=0):
    """Representations of whole series, and logits of a classifier; deterministic for each pixel.

    draws: 0 reads all clear observations at once (a module that takes a fixed number of dates: 8
    draws); else the outputs of N even draws of `sample_size` dates are averaged.
    x: (N, T, B) standardised and doys: (N, T), padded with doy 0 at the end; on the CPU or GPU.
    Returns representations (N, D) and logits (N, C), or None for a backbone: float32 on the CPU.
    Raises ValueError for a series without an observation.
    """
    if len(doys) and not bool((doys > 0).any(1).all()):
        raise ValueError("a series without an observation has no representation; leave it out")
    x, doys = runtime.to_device(x, doys)
    if not module.any_length:
        draws = draws or DRAWS
    batches = _split_by_length((doys > 0).sum(1).cpu().numpy(), module, runtime, draws)

    def encode(batch):
        pixels, length = batch
        rows = torch.from_numpy(pixels).to(x.device)
        return _encode_batch(module, x[rows, :length], doys[rows, :length], runtime, draws)

    outputs = runtime.map_batches(encode, batches)
    order = np.argsort(np.concatenate([pixels for pixels, _ in batches]))
    representations, logits = zip(*outputs, strict=True)
    representations = torch.cat(representations).cpu()[order]
    return representations, None if logits[0] is None else torch.cat(logits).cpu()[order]


def _split_by_length(lengths, module, runtime, draws):
    """Split series into batches of similar length, so that little is computed for padding.

    lengths: (N,) clear observations. Returns a list of (pixels (n,) int, length). A batch of more
    than one series has at most `runtime.batch_dates` dates.
    """
    padded = -(-lengths // runtime.pad_dates) * runtime.pad_dates
    if draws:  # every draw costs the same, however long its series
        padded = np.full(len(lengths), lengths.max(initial=1))
    batches = [] if len(lengths) else [(np.empty(0, np.int64), 1)]  # its outputs are empty, too
    for length in np.unique(padded).tolist():
        pixels = np.flatnonzero(padded == length)
        size = max(1, runtime.batch_dates // (draws * module.sample_size or length))
        batches += [(pixels[i : i + size], length) for i in range(0, len(pixels), size)]
    return batches


def _encode_batch(module, x, doys, runtime, draws):
    """Representations and logits (or None) of series of one length, float32."""
    with runtime.inference(), runtime.autocast():
        if draws:
            x, doys = even_draws(x, doys, module.sample_size, draws)
            output = module(x.flatten(0, 1), doys.flatten(0, 1))
        else:
            padding = doys == 0
            output = module(x, doys, padding if padding.any() else None)
    # a classifier gives representations and logits, a backbone representations alone
    y, logits = (
        None if part is None else part.float()
        for part in (output if isinstance(output, tuple) else (output, None))
    )
    if draws:
        shape = x.shape[:2]
        y = y.unflatten(0, shape).mean(1)
        logits = None if logits is None else logits.unflatten(0, shape).mean(1)
    return y, logits


def extract_representations(
    module, tile, mean, std, min_valid, runtime, stride=1, draws=0, dates=0, first_row=0
):
    """Walk over a tile in blocks of rows and yield what `encode_series` gives for its pixels.

    module: a backbone or classifier in eval mode. stride: take every stride-th row and column (a
    quick look). draws, dates: as in `encode_series` and `even_dates`. first_row: where a block
    begins; blocks to its north are skipped. One block is encoded while the next is read.
    Yields (rows, row, column, representations, logits) for each block: rows is (first, last + 1);
    then for the N pixels with at least `min_valid` clear observations (maybe none) row (N,) int,
    column (N,) int, representations (N, D) and logits (N, C) or None, float32 on the CPU.
    """
    width = tile.shape[2]
    mean, std = runtime.to_device(mean, std)
    blocks = _read_blocks(tile, min_valid, runtime, stride, dates, first_row)
    for rows, pixels, bands, doys in read_ahead(blocks):
        bands, doys = runtime.to_device(bands, doys)
        y, logits = encode_series(module, standardise(bands, mean, std), doys, runtime, draws)
        yield rows, pixels // width, pixels % width, y, logits


def _read_blocks(tile, min_valid, runtime, stride, dates, first_row):
    """Yield (first, last + 1), flat indices (N,), bands and days of the valid pixels of blocks."""
    counts, width = tile.clear_counts(), tile.shape[2]
    for first, last in tile.row_ranges(runtime.block_pixels):
        if first < first_row:
            continue
        valid = counts[first:last] >= min_valid
        valid[(np.arange(first, last) % stride) > 0] = False
        valid[:, (np.arange(width) % stride) > 0] = False
        pixels = first * width + np.flatnonzero(valid)
        chosen = even_dates(clear_dates(tile.read_clear(pixels)), dates)
        yield (first, last), pixels, *tile.read_dates(pixels, chosen)


def learning_rate(peak, step, total_steps, warmup_steps, hold_fraction=0.0):
    """Linear warm-up, hold, and cosine decay to 0: a pure function of the step (from 0 on).

    hold_fraction: share of all steps after which the decay begins; 0: right after the warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    decay_start = max(warmup_steps, hold_fraction * total_steps)
    progress = max(0.0, (step - decay_start) / max(1, total_steps - decay_start))
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
