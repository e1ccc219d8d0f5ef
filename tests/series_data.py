"""Series of a tile as people have them: arrays, long tables, cubes; for the tests of embed.py."""

import numpy as np

from tiles import Tile


def read_series(folder):
    """A tile's reflectance (H, W, T, B), its masks (H, W, T), days (T,) and band names."""
    tile = Tile(folder)
    bands, masks = np.moveaxis(tile.bands, 0, 2), np.moveaxis(tile.masks, 0, 2)
    return np.ascontiguousarray(bands), np.ascontiguousarray(masks), tile.doys, tile.band_names


def dates_of(days, year=2021):
    """Days of year as numpy dates."""
    return np.datetime64(f"{year}-01-01") + (days.astype(int) - 1)


def long_table(folder, seed=0, **columns):
    """A tile as a pandas DataFrame in long form, its rows shuffled; id is the flat pixel index.

    columns: other names, such as id="point".
    """
    import pandas

    bands, masks, days, names = read_series(folder)
    height, width, num_dates, num_bands = bands.shape
    pixels = np.repeat(np.arange(height * width), num_dates)
    table = pandas.DataFrame(bands.reshape(-1, num_bands), columns=names)
    table.insert(0, "id", pixels)
    table.insert(1, "date", np.tile(dates_of(days).astype(str), height * width))
    table["clear"] = masks.ravel()
    order = np.random.default_rng(seed).permutation(len(table))
    return table.iloc[order].rename(columns=columns)


def cube(folder, scale=1.0):
    """A tile as an xarray DataArray (time, y, x, band) named reflectance, NaN where not clear."""
    import xarray

    bands, masks, days, names = read_series(folder)
    height, width = bands.shape[:2]
    values = np.where(masks[..., None] == 1, bands * np.float32(scale), np.nan)
    axes = {"y": 5400000 - 10 * np.arange(height), "x": 500000 + 10.0 * np.arange(width)}
    coords = axes | {"time": dates_of(days).astype("datetime64[ns]"), "band": names}
    array = xarray.DataArray(values, coords, ("y", "x", "time", "band"), "reflectance")
    return array.transpose("time", "y", "x", "band").astype("float32")
