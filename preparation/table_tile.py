"""A tile of N x 1 pixels from a table in long form, so that its series can be trained on.

Shapes: N pixels, T days of year of the table, B bands.
"""

import os
import shutil

from running.errors import InputError
from running.files import create_npy, make_output_dir, write_error, write_json

import numpy as np

from preparation import need
from preparation.band_statistics import add_counts, count_block, statistics
from preparation.features import clean_classes, number_classes
from preparation.simulated import move_folder
from preparation.tables import OPTIONAL
from trained.encoder import check_unit, days_of_year


def write_table_tile(table, folder, scale):
    """Write a sorted Table (preparation/tables.py) as a tile; ids.npy says whose pixel a row is.

    Its dates are all days of year that the table has; a pixel is clear on its own. Labels are
    codes, or names, which are numbered in alphabetical order. Raises InputError for what does not
    fit.
    """
    make_output_dir(folder.parent)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    part.mkdir()
    try:
        info = {"bands": table.columns.bands} | _write_labels(table, part)
        days = np.concatenate([np.unique(days_of_year(dates)) for *_, dates in _walk(table)])
        days = np.unique(days)
        if not len(days):
            raise InputError(f"{table.path}: found no clear row, wanted some")
        counted = {}
        shape = (len(days), len(table.ids), 1, len(table.columns.bands))
        bands = create_npy(part / "bands.npy", np.uint16, shape)
        masks = create_npy(part / "masks.npy", np.uint8, shape[:3])
        for pixels, values, dates in _walk(table):
            values = values * np.float32(scale)
            check_unit(values, scale)
            values = values.round().clip(1, 65535).astype(np.uint16)
            date = np.searchsorted(days, days_of_year(dates)[:, 0])
            bands[date, pixels, 0], masks[date, pixels, 0] = values, 1
            clear = np.ones((len(values), 1), np.uint8)
            counted = add_counts(counted, count_block(values[:, None], clear, -1))
        for name, array in zip(("band_mean", "band_std"), statistics(counted), strict=True):
            np.save(part / f"{name}.npy", array)
        np.save(part / "doys.npy", days)
        np.save(part / "ids.npy", np.array(list(table.ids), str))
        write_json(part / "tile.json", info)
        shutil.rmtree(folder, ignore_errors=True)
        move_folder(part, folder)
    except OSError as error:
        raise write_error(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return shape


def _walk(table):
    """Yield pixels (n,), bands (n, B) and dates (n, 1) of the clear rows of groups of pixels."""
    for first, _, reflectance, dates in table.groups():
        pixel, place = np.nonzero(np.isfinite(reflectance).all(-1))
        yield first + pixel, reflectance[pixel, place], dates[pixel, place][:, None]


def _write_labels(table, folder):
    """Write labels.npy (N, 1), where the table has labels. Returns {"classes": ..} of names."""
    found = table.describe_pixels().get(table.columns.label, [])
    values = need("pandas", OPTIONAL).Series(found).convert_dtypes()
    if not values.notna().any():
        return {}
    values, labels = clean_classes(values, table.path), np.zeros((len(values), 1), np.uint8)
    known = values.notna().to_numpy()
    labels[known, 0], classes = number_classes(values[known], {}, table.path)
    np.save(folder / "labels.npy", labels)
    return {"classes": classes} if classes else {}
