"""An encoder from Python: the numbers of infer.py, and one line for what does not fit."""

import re
from datetime import date, datetime

from running.device import Runtime
from running.errors import InputError

import numpy as np
import pytest
from helpers import map_tile, tile_of
from series_data import dates_of, read_series

from trained.encoder import Encoder, days_of_year


@pytest.fixture(scope="session")
def encoder(workplace):
    return Encoder.load(workplace / "classifier/best.pt", device="cpu", min_valid=14)


@pytest.fixture(scope="session")
def maps(workplace, tmp_path_factory):
    """Maps of infer.py: representations, class codes, confidence."""
    (folder,) = map_tile(workplace, tmp_path_factory.mktemp("maps"), dates=12, min_valid=14)
    names = ("representation_map", "classification_map", "confidence")
    return [np.load(folder / f"{name}.npy") for name in names]


@pytest.fixture(scope="session")
def series(workplace):
    return read_series(tile_of(workplace))


def same(a, b):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_numbers_are_those_of_infer(encoder, maps, series, monkeypatch):
    """Whatever the order of dates and bands, the unit, and how pixels are put into blocks."""
    bands, masks, days, names = series
    representations, codes, confidence = maps
    y = encoder.embed(bands, days, masks, max_dates=12)
    assert y.dtype == np.float32
    assert np.isnan(y).any() and np.isfinite(y).any()
    same(y, representations)
    monkeypatch.setattr(Runtime, "block_pixels", 50)
    found = encoder.classify(bands, days, masks, max_dates=12)
    assert (found.codes == codes).all()
    same(found.probabilities.max(-1), confidence)
    known = codes > 0
    wanted = [encoder.class_names[code] for code in codes[known]]
    assert found.names[known].tolist() == wanted
    assert set(found.names[~known]) == {""}
    order = np.random.default_rng(0).permutation(len(days))
    more = np.concatenate([np.full_like(bands[..., :1], 7), bands[..., ::-1]], -1)[:, :, order]
    y = encoder.embed(
        more / 10_000,
        dates_of(days)[order],
        masks[..., order],
        bands=["B10", *names[::-1]],
        scale=10_000,
        max_dates=12,
    )
    same(y, representations)


def test_draws_are_those_of_infer(encoder, series, workplace, tmp_path):
    bands, masks, days, _ = series
    (folder,) = map_tile(workplace, tmp_path / "draws", draws=4, min_valid=14)
    same(encoder.embed(bands, days, masks, draws=4), np.load(folder / "representation_map.npy"))


def test_what_has_no_data_is_not_clear(encoder, maps, series, monkeypatch):
    """Masks, NaN, zeros in all bands, and dates that are padding: one and the same."""
    bands, masks, days, _ = series
    bands, masks = bands.reshape(-1, 20, 10).astype(np.float32), masks.reshape(-1, 20)
    with_nan, zeros, padded = bands.copy(), bands.copy(), np.where(masks == 1, days, 0)
    with_nan[masks == 0, 3] = np.nan
    zeros[masks == 0] = 0
    wanted = maps[0].reshape(len(bands), -1)
    for y in (
        encoder.embed(with_nan, days, max_dates=12),
        encoder.embed(zeros, days, max_dates=12),
        encoder.embed(bands, padded, max_dates=12),
        encoder.embed(bands, days, masks.astype(bool), max_dates=12),
    ):
        same(y, wanted)
    monkeypatch.setattr(Runtime, "pad_dates", 8)  # as on a GPU: series of one batch are padded
    every = encoder.embed(bands, days, masks, max_dates=0)
    assert (np.isfinite(every) == np.isfinite(wanted)).all()
    same(encoder.embed(with_nan, days, max_dates=0), every)


def test_dates_as_people_have_them():
    wanted = [1, 60, 366]
    texts = ["2020-01-01", "2020-02-29", "2020-12-31"]
    for dates in (
        wanted,
        np.array(wanted, float),
        texts,
        np.array(texts, "datetime64[ns]"),
        [date.fromisoformat(text) for text in texts],
        [datetime.fromisoformat(f"{text}T10:50:31+00:00") for text in texts],
        [f"{text}T10:50:31Z" for text in texts],
    ):
        assert days_of_year(dates).tolist() == wanted
    assert days_of_year([np.datetime64("NaT"), np.datetime64("2021-03-01")]).tolist() == [0, 60]
    assert days_of_year([["2020-10-01", "2021-09-30"], ["2019-03-01", None]]).tolist() == [
        [275, 273],
        [60, 0],
    ]


@pytest.mark.parametrize(
    ("dates", "message"),
    [
        (["2021-01-01", "yesterday"], "dates: found yesterday, wanted days of year"),
        ([20210605], "dates: found 20210605, wanted days of year"),
        (["20210605"], "dates: found 20210605, wanted days of year"),
        (np.array(["2021-06-05", "5"], object), "dates: found 5, wanted days of year"),
        ([367], "dates: found 367, wanted days of year 1..366"),
        (["2019-01-03", "2021-06-01"], "found 2019-01-03 to 2021-06-01, wanted a year at most"),
    ],
)
def test_dates_that_cannot_be_read(dates, message):
    with pytest.raises(InputError, match=message) as error:
        days_of_year(dates)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reflectance": np.ones((3, 20, 9))}, "found 9 bands, wanted 10: X0, X1"),
        ({"reflectance": np.ones((3, 10))}, "found float64 of shape \\(3, 10\\), wanted numbers"),
        ({"reflectance": np.full((3, 20, 10), "a")}, "wanted numbers of shape"),
        ({"reflectance": np.full((3, 20, 10), 0.3)}, "found a median of 0.3, wanted .*scale=10000"),
        ({"scale": 10_000}, "found a median of 3000 times scale=10000, wanted .* x 10000"),
        (
            {"dates": np.arange(1, 20)},
            "dates: found shape \\(19,\\) beside reflectance",
        ),
        ({"masks": np.full((3, 20), 4)}, "masks: found value 4, wanted 0 .*or 1"),
        ({"masks": np.ones((4, 20))}, "masks: found shape \\(4, 20\\)"),
        ({"dates": None}, "dates: found None, wanted days of year"),
        ({"draws": -1}, "draws=-1: wanted 0"),
        ({"bands": ["X0", "X1"]}, "bands: found 2 names, wanted 10"),
        (
            {"bands": [f"B{i}" for i in range(10)]},
            "bands: found no band X0 among B0,.*, wanted X0,",
        ),
    ],
)
def test_mistakes_end_in_one_line(encoder, change, message):
    arguments = {"reflectance": np.full((3, 20, 10), 3000.0), "dates": np.arange(1, 21)} | change
    with pytest.raises(InputError, match=message) as error:
        encoder.embed(**arguments)
    assert "\n" not in str(error.value)


def test_a_checkpoint_without_classes_has_none_to_give(workplace):
    encoder = Encoder.load(workplace / "pretrained/best.pt", device="cpu")
    with pytest.raises(InputError, match="pretrained/best.pt: found a checkpoint without classes"):
        encoder.classify(np.full((3, 20, 10), 3000.0), np.arange(1, 21))
    with pytest.raises(InputError, match="found no file"):
        Encoder.load(workplace / "nothing.pt")


def test_no_series_and_no_dates(encoder):
    assert encoder.embed(np.empty((0, 20, 10)), np.arange(1, 21)).shape == (0, 16)
    assert np.isnan(encoder.embed(np.empty((2, 0, 10)), [])).all()


def test_an_encoder_prints_as_one_line(encoder):
    """Regression: a notebook's cell showed all weights."""
    assert re.fullmatch(r"Encoder\(.*best.pt: X0, .*; \d+ dimensions, 2 classes\)", repr(encoder))


def test_series_without_a_clear_observation_are_named(encoder, capsys):
    """Regression: of masks that are the other way round came NaN, and nothing was said."""
    series = np.full((3, 20, 10), 3000.0)
    assert np.isnan(encoder.embed(series, np.arange(1, 21), np.zeros((3, 20)))).all()
    assert "no series has" in capsys.readouterr().out
