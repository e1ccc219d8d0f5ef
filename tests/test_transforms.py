"""Drawing, packing, mixing: properties that hold for every pixel of every batch."""

from running.distributed import BatchGenerator

import numpy as np
import pytest
import torch
from helpers import make_tile
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from tiles import Tile
from transforms import (
    AUGMENTATIONS,
    blend,
    clear_dates,
    drop_dates,
    even_dates,
    even_draws,
    gap_fill,
    harmonic_coefficients,
    sample_dates,
    split_dates,
    standardise,
    thin_dates,
)


def random_clear(pixels, dates, seed):
    generator = torch.Generator().manual_seed(seed)
    clear = torch.rand(dates, pixels, generator=generator) < 0.5
    clear[torch.randint(dates, (pixels,)), torch.arange(pixels)] = True  # at least one each
    return clear


def draw(clear, num_drawn, views=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    random = torch.rand(num_drawn, clear.shape[1], views, generator=generator)
    return sample_dates(clear, num_drawn, random)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 24), st.integers(1, 3), st.integers())
def test_draw_is_clear_ordered_and_without_replacement(pixels, dates, num_drawn, views, seed):
    clear = random_clear(pixels, dates, seed % 1000)
    drawn = draw(clear, num_drawn, views, seed % 1000)
    assert drawn.shape == (pixels, views, num_drawn)
    assert clear.T.gather(1, drawn.flatten(1)).all(), "a cloudy date was drawn"
    assert (drawn.diff(dim=-1) >= 0).all(), "days must ascend"
    for pixel in range(pixels):
        have = int(clear[:, pixel].sum())
        for view in drawn[pixel]:
            times = torch.bincount(view, minlength=dates)[clear[:, pixel]]
            assert times.max() - times.min() <= 1, "as even as can be, so distinct where enough"
            assert int(times.count_nonzero()) == min(have, num_drawn)


@pytest.mark.parametrize("num_drawn", [2, 6])  # of 4 dates: a subset; all, two of them twice
def test_every_subset_is_equally_likely(num_drawn):
    clear = torch.tensor([True, False, True, True, False, True])[:, None].expand(-1, 30_000)
    drawn = draw(clear.contiguous(), num_drawn)[:, 0]
    times = torch.stack([(drawn == date).sum(1) for date in range(6)], 1)
    subset = (times == times.amax(1, keepdim=True)).long() @ 2 ** torch.arange(6)
    counts = torch.bincount(subset)
    counts = counts[counts > 0].double()
    assert len(counts) == 6
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 25, counts  # 5 degrees of freedom: p = 1.4e-4


def test_views_differ_from_each_other_and_between_seeds():
    """Guards against one seed for all, so that every view and epoch is the same."""
    clear = torch.ones(40, 500, dtype=bool)
    first, again, other = (draw(clear, 8, 2, seed) for seed in (0, 0, 1))
    assert first.equal(again)
    assert not first.equal(other)
    assert (first[:, 0] != first[:, 1]).any(1).float().mean() > 0.99


def test_a_pixel_without_observation_is_refused():
    with pytest.raises(ValueError, match="min_valid"):
        draw(torch.zeros(5, 2, dtype=bool), 3)


@pytest.mark.parametrize(
    "pixels", [np.arange(40, 240), np.arange(0, 256, 60), np.array([9, 3, 250])]
)
def test_read_dates_brings_bands_and_days_of_the_same_date_and_pixel(tmp_path, pixels):
    """Pixels side by side are read through a copy, those far apart or out of order one by one."""
    tile = Tile(make_tile(tmp_path / "MGRS-0", (20, 16, 16, 3)))
    clear = tile.read_clear(pixels)
    assert clear.equal(torch.from_numpy(tile.masks.reshape(20, -1)[:, pixels] == 1))
    drawn = draw(clear, 4, 2)
    bands, doys = tile.read_dates(pixels, drawn)
    for place in np.ndindex(*drawn.shape):
        date = int(drawn[place])
        row, column = divmod(pixels[place[0]], 16)
        assert bands[place].tolist() == tile.bands[date, row, column].tolist()
        assert doys[place] == tile.doys[date]


@settings(max_examples=50, deadline=None)
@given(most=st.integers(1, 20), fewest=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_thinned_views_keep_dates_in_order_with_their_bands(most, fewest, seed):
    doys = torch.arange(1, most + 1).expand(3, 2, -1)
    x = doys[..., None] * torch.tensor([1.0, 10.0])
    thin_x, thin_doys = thin_dates(x, doys, fewest, seed)
    assert min(fewest, most) <= thin_doys.shape[2] <= most
    assert (thin_doys.diff(dim=2) > 0).all()
    torch.testing.assert_close(thin_x, thin_doys[..., None] * torch.tensor([1.0, 10.0]))
    again, _ = thin_dates(x, doys, fewest, seed)
    torch.testing.assert_close(again, thin_x)


def test_thinning_leaves_every_place_out_equally_often_and_has_few_lengths():
    """A network is compiled for each length; places that always stay would be learned by heart."""
    doys = torch.arange(16).expand(1, 2, -1)
    x = doys[..., None].float()
    kept = [thin_dates(x, doys, 8, seed)[1][0, 0] for seed in range(2000)]
    assert len({len(places) for places in kept}) == 4
    count = torch.cat(kept).bincount(minlength=16) / len(kept)
    assert float((count - count.mean()).abs().max()) < 0.05


def test_clear_dates_keep_order_and_mark_padding(tmp_path):
    clear = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 0]], dtype=bool)  # (T, N)
    dates = clear_dates(clear)
    assert dates.tolist() == [[0, 2, 3], [2, -1, -1]]
    tile = Tile(make_tile(tmp_path / "MGRS-0", (4, 1, 2, 3)))
    bands, doys = tile.read_dates(np.array([0, 1]), dates)
    assert doys.tolist() == [[*tile.doys[[0, 2, 3]]], [tile.doys[2], 0, 0]]
    assert bands[1, 0].tolist() == tile.bands[2, 0, 1].tolist()


def test_standardise_agrees_with_the_formula():
    bands = torch.randint(0, 65536, (7, 2, 5, 3)).to(torch.uint16)
    mean, std = torch.tensor([10.0, 2000.0, 3e4]), torch.tensor([1.0, 700.0, 2e4])
    torch.testing.assert_close(standardise(bands, mean, std), (bands.float() - mean) / std)


def padded(pixels, dates, bands, seed):
    """Series (N, T, B) and days (N, T), padded with doy 0 after the clear observations."""
    clear = random_clear(pixels, dates, seed)
    drawn = clear_dates(clear)
    return torch.rand(*drawn.shape, bands), (drawn + 1) * 25


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 30))
def test_even_dates_are_spread_over_the_year_of_each_pixel(counts, most):
    """Guards against a pixel whose dates depend on how many its neighbours have."""
    dates = torch.full((len(counts), max(counts)), -1)
    for row, count in zip(dates, counts, strict=True):
        row[:count] = torch.arange(count) * 3  # every third date of the tile is clear
    for row, count in zip(even_dates(dates, most).tolist(), counts, strict=True):
        kept = [date // 3 for date in row if date >= 0]
        assert row == [3 * rank for rank in kept] + [-1] * (len(row) - len(kept))
        number = min(count, most)
        assert kept == [(2 * i + 1) * count // (2 * number) for i in range(number)]
    assert even_dates(dates, 0).equal(dates)


def test_even_draws_are_ordered_whole_and_alike_in_any_batch():
    x, doys = padded(50, 14, 2, seed=3)
    drawn, days = even_draws(x, doys, 6, 8)
    assert drawn.shape == (50, 8, 6, 2)
    assert (days > 0).all(), "padding was drawn"
    assert (days.diff(dim=-1) >= 0).all()
    alone, _ = even_draws(x[7:8], doys[7:8], 6, 8)
    assert drawn[7:8].equal(alone)


def test_gap_fill_agrees_with_numpy():
    x, days = padded(20, 12, 2, seed=5)
    doys = torch.arange(12) * 25 + 1
    filled = gap_fill(x, days, doys)
    for pixel, band in np.ndindex(20, 2):
        have = int((days[pixel] > 0).sum())
        wanted = np.interp(doys, days[pixel, :have], x[pixel, :have, band])
        np.testing.assert_allclose(filled[pixel, :, band], wanted, atol=1e-5)


def harmonics(days, order):
    """Sines, then cosines, of 1 .. order cycles a year: (T, 2 order)."""
    angle = 2 * np.pi * np.outer(days, np.arange(1, order + 1)) / 365.25
    return np.concatenate([np.sin(angle), np.cos(angle)], 1)


def test_harmonic_coefficients_are_those_of_least_squares():
    x, days = torch.rand(20, 30, 3), torch.arange(1, 361, 12).expand(20, -1)
    design = np.concatenate([np.ones((30, 1)), harmonics(days[0].numpy(), 3)], 1)
    wanted = np.linalg.lstsq(design, x.permute(1, 0, 2).flatten(1).numpy().astype(float))[0]
    found = harmonic_coefficients(x, days, ridge=1e-9)
    assert found.dtype == torch.float32
    # band by band: the intercept, 3 sines, 3 cosines
    np.testing.assert_allclose(found.view(20, 3, 7), wanted.T.reshape(20, 3, 7), atol=1e-4)


@pytest.mark.parametrize("order", [1, 3])
def test_harmonic_coefficients_of_few_padded_dates_are_those_of_ridge_regression(order):
    """Also with fewer dates than coefficients, and one; what stands in the padding is not read."""
    x, days = padded(30, 9, 2, seed=1)
    days[0, 1:] = 0  # a pixel with a single date
    found = harmonic_coefficients(x, days, order, ridge=0.5).view(30, 2, 1 + 2 * order)
    for pixel in range(30):
        have = int((days[pixel] > 0).sum())
        reference = Ridge(0.5).fit(harmonics(days[pixel, :have], order), x[pixel, :have])
        np.testing.assert_allclose(found[pixel, :, 0], reference.intercept_, atol=1e-5)
        np.testing.assert_allclose(found[pixel, :, 1:], reference.coef_, atol=1e-5)
    x[days == 0] = 1e6
    torch.testing.assert_close(harmonic_coefficients(x, days, order, 0.5).view(found.shape), found)


def test_the_intercept_is_not_penalised():
    x, days = torch.full((1, 12, 1), 50.0), torch.arange(1, 361, 30)[None]
    assert float(harmonic_coefficients(x, days, ridge=1e6)[0, 0]) == pytest.approx(50)


def test_split_dates_gives_each_date_to_one_half_in_order():
    x, days = padded(60, 13, 2, seed=7)
    x[..., 0] = days.float()  # a mark, to see that bands and days stay together
    halves = split_dates(x, days, torch.Generator().manual_seed(0))
    for pixel in range(60):
        parts = [half_days[pixel][half_days[pixel] > 0] for _, half_days in halves]
        assert sorted(torch.cat(parts).tolist()) == days[pixel][days[pixel] > 0].tolist()
        assert len(parts[1]) - len(parts[0]) in (0, 1)
        for (half, half_days), part in zip(halves, parts, strict=True):
            assert half_days[pixel, : len(part)].equal(part), "padding is at the end"
            assert (part.diff() > 0).all()
            assert half[pixel, : len(part), 0].equal(part.float())
    again = split_dates(x, days, torch.Generator().manual_seed(1))
    assert not again[0][1].equal(halves[0][1]), "drawn at random"


def test_blended_pixels_lie_on_the_line_to_another_pixel_in_both_views():
    """So that the views of a blended pixel are of one place: the other is looked up by day."""
    x, x_other = torch.rand(2, 30, 2, 6, 3)
    days = torch.rand(2, 30, 365).argsort(2)[:, :, :12] + 1  # none twice
    doys, doys_other = days.view(2, 30, 2, 6).sort(3).values
    weight = torch.linspace(-0.5, 1, 30)
    blended = blend(x, doys, x_other, doys_other.float(), weight)
    for pixel in range(30):
        order = doys_other[pixel].flatten().argsort()
        days = doys_other[pixel].flatten()[order]
        for band in range(3):
            series = x_other[pixel, ..., band].flatten()[order]
            other = torch.from_numpy(np.interp(doys[pixel], days, series)).float()
            moved = x[pixel, ..., band] + weight[pixel] * (other - x[pixel, ..., band])
            torch.testing.assert_close(blended[pixel, ..., band], moved)
    assert blend(x, doys, x_other, doys_other, torch.zeros(30)).equal(x)


def augmented(name, x, doys, rows=slice(None), seed=0):
    """Some rows of a batch as an augmentation leaves them."""
    generator = BatchGenerator(rows, len(x), seed, x.device)
    return AUGMENTATIONS[name](x[rows], doys[rows], generator)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_changes_a_pixel_alike_in_whole_and_divided_batches(name):
    """So that one process and several train on the same views."""
    x, doys = torch.rand(10, 2, 5, 3), torch.arange(5).expand(10, 2, 5)
    whole_x, whole_doys = augmented(name, x, doys)
    assert whole_x.shape == x.shape
    assert whole_doys.shape == doys.shape
    parts = [augmented(name, x, doys, rows) for rows in (slice(0, 7), slice(7, 10))]
    assert torch.cat([part for part, _ in parts]).equal(whole_x)
    assert torch.cat([days for _, days in parts]).equal(whole_doys)


def test_jitter_shifts_each_band_of_each_view_by_the_same_on_all_dates():
    x, doys = torch.rand(400, 2, 5, 3), torch.arange(5).expand(400, 2, 5)
    moved, same_doys = augmented("jitter_bands", x, doys)
    shift = moved - x
    torch.testing.assert_close(shift, shift[:, :, :1].expand_as(x), atol=1e-6, rtol=0)
    assert float(shift[:, :, 0].std()) == pytest.approx(0.1, rel=0.1)
    assert (shift[:, 0, 0] - shift[:, 1, 0]).abs().min(1).values.median() > 1e-3, "views differ"
    assert same_doys.equal(doys)
    assert not moved.equal(augmented("jitter_bands", x, doys, seed=1)[0])


def test_views_of_other_years_differ_in_days_and_brightness_and_keep_their_order():
    x = 1 + torch.rand(400, 2, 5, 3)
    doys = torch.tensor([20, 90, 180, 270, 350], dtype=torch.int16).expand(400, 2, 5)
    moved, days = augmented("vary_years", x, doys)
    shift = (days - doys).float()
    assert days.dtype == doys.dtype and int(days.min()) >= 1 and int(days.max()) <= 366
    assert bool((days.diff(dim=-1) > 0).all()), "dates ascend"
    assert float(shift[..., 2].std()) == pytest.approx(5.3, rel=0.1)  # 6 days, cut at 12
    assert float(shift[..., 2].abs().max()) <= 12, "about the middle of the year"
    _, edges = augmented("vary_years", x, torch.tensor([1, 2, 3, 4, 366]).expand_as(doys))
    assert int(edges.min()) == 1 and int(edges.max()) == 366, "day 0 would be no observation"
    assert float(shift.abs().max()) < 25
    assert float((shift[..., 4] - shift[..., 0]).std()) == pytest.approx(5.8, rel=0.15), "stretch"
    assert float((shift[:, 0] - shift[:, 1]).std()) > 5, "views differ"
    zeros, _ = augmented("vary_years", torch.zeros_like(x), doys)
    assert float(zeros[:, :, 0].std()) == pytest.approx(0.1, rel=0.1)
    scale = (moved - zeros) / x
    torch.testing.assert_close(scale, scale[:, :, :1, :1].expand_as(x), atol=1e-4, rtol=0)
    assert float(scale[:, :, 0, 0].std()) == pytest.approx(0.1, rel=0.1)


def test_no_augmentation_leaves_the_views():
    x, doys = torch.rand(4, 2, 5, 3), torch.arange(5).expand(4, 2, 5)
    same_x, same_doys = augmented("none", x, doys)
    assert same_x.equal(x)
    assert same_doys.equal(doys)


def test_standardise_leaves_what_it_is_given():
    """Regression: values that were float32 already were changed in place."""
    bands = torch.full((3, 2, 4), 1000.0)
    mean, std = torch.full((4,), 500.0), torch.full((4,), 100.0)
    assert (standardise(bands, mean, std) == 5).all()
    assert (bands == 1000).all()


def test_dropped_dates_are_a_random_share_and_leave_one():
    doys = torch.arange(1, 31).repeat(2000, 1)
    doys[:, 20:] = 0  # padding
    kept = drop_dates(doys, 0.6, 0, 40)
    assert ((kept == doys) | (kept == 0)).all()
    count = (kept > 0).sum(1).float()
    assert count.mean() == pytest.approx(0.8 * 20, abs=0.5), "shares are 0.6 to 1"
    assert count.std() > 2.5, "pixels have shares of their own"
    assert (kept[:, :20] > 0).float().mean(0).std() < 0.03, "no date is preferred"
    assert drop_dates(doys, 0.6, 0, 40).equal(kept), "by the seed alone"
    assert (drop_dates(doys, 0.0, 1, 40) > 0).any(1).all()
    assert drop_dates(doys, 1.0, 2, 40).equal(doys)
    assert drop_dates(torch.zeros(0, 0), 0.6, 3, 40).shape == (0, 0), "no pixel"
