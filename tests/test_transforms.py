"""Drawing, packing, mixing: properties that hold for every pixel of every batch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms import draw_steps, even_draws, gap_fill, mix_up, pack_clear, take_steps


def random_clear(pixels, dates, seed):
    clear = torch.rand(pixels, dates, generator=torch.Generator().manual_seed(seed)) < 0.5
    clear[torch.arange(pixels), torch.randint(dates, (pixels,))] = True  # at least one each
    return clear


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 40), st.integers(1, 30), st.integers(1, 24), st.integers(1, 3), st.integers())
def test_draw_is_clear_ordered_and_without_replacement(pixels, dates, steps, views, seed):
    clear = random_clear(pixels, dates, seed % 1000)
    drawn = draw_steps(clear, steps, views, torch.Generator().manual_seed(seed % 1000))
    assert drawn.shape == (pixels, views, steps)
    assert clear.gather(1, drawn.flatten(1)).all(), "a cloudy date was drawn"
    assert (drawn.diff(dim=-1) >= 0).all(), "days must ascend"
    for pixel in range(pixels):
        have = int(clear[pixel].sum())
        for view in drawn[pixel]:
            times = torch.bincount(view, minlength=dates)[clear[pixel]]
            assert times.max() - times.min() <= 1, "as even as can be, so distinct where enough"
            assert int(times.count_nonzero()) == min(have, steps)


def test_every_subset_is_equally_likely():
    clear = torch.tensor([[True, False, True, True, False, True]]).expand(30_000, -1)
    drawn = draw_steps(clear, 2, 1, torch.Generator().manual_seed(0))[:, 0]
    pairs = torch.bincount(drawn[:, 0] * 6 + drawn[:, 1])
    counts = pairs[pairs > 0].double()
    assert len(counts) == 6
    chi_square = ((counts - 5000) ** 2 / 5000).sum()
    assert chi_square < 25, counts  # 5 degrees of freedom: p = 1.4e-4


def test_views_differ_from_each_other_and_between_seeds():
    """Defect 6: one seed for all, so that every view and epoch is the same."""
    clear = torch.ones(500, 40, dtype=bool)
    first = draw_steps(clear, 8, 2, torch.Generator().manual_seed(0))
    again = draw_steps(clear, 8, 2, torch.Generator().manual_seed(0))
    other = draw_steps(clear, 8, 2, torch.Generator().manual_seed(1))
    assert first.equal(again)
    assert not first.equal(other)
    assert (first[:, 0] != first[:, 1]).any(1).float().mean() > 0.99


def test_a_pixel_without_observation_is_refused():
    with pytest.raises(ValueError, match="min_valid"):
        draw_steps(torch.zeros(2, 5, dtype=bool), 3)


def test_take_steps_brings_bands_and_days_of_the_same_date():
    dates, pixels, bands = 9, 5, 3
    series = torch.arange(dates * pixels * bands).view(dates, pixels, bands).to(torch.uint16)
    doys = torch.arange(10, 10 + dates)
    steps = draw_steps(torch.ones(pixels, dates, dtype=bool), 4, 2)
    x, days = take_steps(series, doys, steps)
    for pixel, view, step in np.ndindex(*steps.shape):
        date = int(steps[pixel, view, step])
        assert x[pixel, view, step].tolist() == series[date, pixel].tolist()
        assert days[pixel, view, step] == doys[date]


def test_pack_clear_keeps_order_and_marks_padding():
    clear = torch.tensor([[1, 0], [0, 0], [1, 1], [1, 0]], dtype=bool)  # (T, N)
    bands = torch.arange(8).view(4, 2, 1).to(torch.uint16)
    x, doys = pack_clear(bands, torch.tensor([5, 9, 50, 300]), clear, 4)
    assert doys.tolist() == [[5, 50, 300, 0], [50, 0, 0, 0]]
    assert x[0, :3, 0].tolist() == [0, 4, 6]
    assert x[1, 0, 0] == 5


def test_even_draws_are_ordered_whole_and_alike_in_any_batch():
    clear = random_clear(50, 30, 3)
    x, doys = pack_clear(torch.rand(30, 50, 2), torch.arange(1, 31), clear.T, 30)
    drawn, days = even_draws(x, doys, 6, 8)
    assert drawn.shape == (50, 8, 6, 2)
    assert (days > 0).all(), "padding was drawn"
    assert (days.diff(dim=-1) >= 0).all()
    alone, _ = even_draws(x[7:8], doys[7:8], 6, 8)
    assert drawn[7:8].equal(alone)


def test_gap_fill_agrees_with_numpy():
    clear = random_clear(20, 12, 5)
    doys = torch.arange(12) * 25 + 1
    x, days = pack_clear(torch.rand(12, 20, 2), doys, clear.T, 12)
    filled = gap_fill(x, days, doys)
    for pixel, band in np.ndindex(20, 2):
        have = int((days[pixel] > 0).sum())
        wanted = np.interp(doys, days[pixel, :have], x[pixel, :have, band])
        np.testing.assert_allclose(filled[pixel, :, band], wanted, atol=1e-5)


def test_mix_up_is_linear_in_bands_and_days():
    a, b = torch.rand(2, 4, 3, 5)
    days = torch.tensor([[10, 20, 30]]).expand(4, -1)
    weight = torch.tensor([0.0, 0.25, 0.5, 1.0])
    x, doys = mix_up(a, days, b, days + 100, weight)
    torch.testing.assert_close(x[0], b[0])
    torch.testing.assert_close(x[3], a[3])
    torch.testing.assert_close(x[1], 0.25 * a[1] + 0.75 * b[1])
    assert doys[1].tolist() == [85, 95, 105]
