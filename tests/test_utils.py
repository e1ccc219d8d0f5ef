"""RankMe, and the representations of series and tiles."""

from running.device import start_runtime

import numpy as np
import pytest
import torch
from helpers import make_tile

from backbones import BACKBONES, build_backbone
from data import SentinelTimeSeriesDatasetForDownstreaming, iterate_batches
from tiles import Tile
from utils import encode_series, extract_representations, find_rotation, rankme, retrieval


def test_rankme_counts_equal_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2000, 16, generator=generator)).Q
    rank, share = rankme(basis)
    assert rank == pytest.approx(16, rel=1e-3)
    assert share == pytest.approx(1, rel=1e-3)
    basis[:, 4:] = 0
    assert rankme(basis)[0] == pytest.approx(4, rel=1e-3)


def test_retrieval_finds_the_same_pixel_whatever_all_have_in_common():
    """Without centring, a large common part rules the cosine; scales of rows mean nothing."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(500, 8, generator=generator)
    b = (a + 0.01 * torch.randn(500, 8, generator=generator)) * 2 + 1000
    assert retrieval(a * 2 + 1000, b) > 0.95
    assert retrieval(a * (0.2 + torch.rand(500, 1, generator=generator)), a) > 0.95
    order = torch.randperm(500, generator=generator)
    swapped = int((order == torch.arange(500)).sum())
    assert retrieval(a, a[order]) == swapped / 500


def test_retrieval_is_the_share_of_own_nearest_neighbours_however_many_rows_at_once():
    a, b = torch.randn(2, 90, 4, generator=torch.Generator().manual_seed(0))
    b[:60] += 2 * a[:60]
    centred = [values.numpy() - np.concatenate([a, b]).mean(0) for values in (a, b)]
    one, other = (values / np.linalg.norm(values, axis=1, keepdims=True) for values in centred)
    wanted = np.mean((one @ other.T).argmax(1) == np.arange(90))
    assert 0.1 < wanted < 0.9
    for rows in (1, 7, 90, 1000):
        assert retrieval(a, b, rows) == pytest.approx(wanted)


def share_lost(y, kept):
    """Share of the variance of y (N, D) that a linear model of its first dimensions misses."""
    y = y - y.mean(0)
    found = torch.linalg.lstsq(y[:, :kept], y).solution
    return float((y - y[:, :kept] @ found).square().sum() / y.square().sum())


def test_ordered_dimensions_keep_products_and_come_out_alike():
    """Whatever the basis that training ended in; the first ones hold what the leading ones do."""
    generator = torch.Generator().manual_seed(0)
    y = (torch.rand(500, 64, generator=generator) ** 3 * 0.9 ** torch.arange(64)).flip(1)
    rotation = find_rotation(y)
    ordered = y @ rotation
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(ordered @ ordered.T, y @ y.T)
    other = y @ torch.linalg.qr(torch.randn(64, 64, generator=generator))[0]
    torch.testing.assert_close(other @ find_rotation(other), ordered, atol=1e-4, rtol=0)
    assert share_lost(y, 16) > 0.9 and share_lost(ordered, 16) < 0.07
    assert share_lost(ordered, 32) < 0.003
    deviation = ordered.std(0)
    assert deviation.max() < 4 * deviation.min(), "no noise that scaling would blow up"


@pytest.mark.parametrize("size", [3, 7, 8, 12, 100, 128])
def test_any_number_of_dimensions_is_rotated(size):
    rotation = find_rotation(torch.randn(5, size))  # fewer pixels than dimensions, too
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size), atol=1e-6, rtol=0)


def test_retrieval_of_a_collapsed_encoder_is_chance():
    assert retrieval(torch.ones(100, 4), torch.ones(100, 4)) == 0.01


@pytest.fixture
def tile(tmp_path):
    return Tile(make_tile(tmp_path / "MGRS-1", (24, 20, 16, 4), clear=0.5))


@pytest.fixture(params=BACKBONES)
def backbone(request):
    torch.manual_seed(0)
    sizes = {"num_bands": 4, "sample_size": 6, "latent_dim": 8, "width": 16, "depth": 1}
    return build_backbone(request.param, **sizes).eval()


def test_representations_cover_just_the_valid_pixels(tile, backbone):
    """A pixel with too few observations gets no representation: neither zeros nor old memory."""
    mean, std = torch.from_numpy(tile.band_mean), torch.from_numpy(tile.band_std)
    seen = np.zeros((20, 16), int)
    for _, row, column, y, _ in extract_representations(
        backbone, tile, mean, std, 10, start_runtime("cpu")
    ):
        seen[row, column] += 1
        assert y.shape == (len(row), 8)
        assert y.isfinite().all()
    assert (seen == (tile.clear_counts() >= 10)).all()


def test_inference_is_like_the_labelled_data_set(tmp_path, backbone):
    """Guards against inference that does not standardise or sort its input as training does."""
    folder = tmp_path / "data/toy/processed/MGRS-1"
    tile = Tile(make_tile(folder, (24, 20, 16, 4), clear=0.5))
    runtime = start_runtime("cpu")
    dataset = SentinelTimeSeriesDatasetForDownstreaming(
        tmp_path, "toy", split="train", block_size=4
    )
    mapped = np.full((20, 16, 8), np.nan, np.float32)
    for _, row, column, y, _ in extract_representations(
        backbone, tile, dataset.mean, dataset.std, 10, runtime
    ):
        mapped[row, column] = y.numpy()
    for x, doys, *_ in iterate_batches(dataset):
        y, _ = encode_series(backbone, x, doys, runtime)
        pixel = (x[:, 0, -1] * dataset.std[-1] + dataset.mean[-1]).round().long().numpy() - 1
        np.testing.assert_allclose(y, mapped.reshape(-1, 8)[pixel], atol=1e-4)


def test_a_series_without_an_observation_is_refused(backbone):
    """Regression: it crashed, or got an embedding of nothing."""
    x, doys = torch.randn(3, 5, 4), torch.ones(3, 5, dtype=torch.int16)
    doys[1] = 0
    with pytest.raises(ValueError, match="a series without an observation"):
        encode_series(backbone, x, doys, start_runtime("cpu"))
