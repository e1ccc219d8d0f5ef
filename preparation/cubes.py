"""Cubes of xarray: (time, y, x, band), or a variable for each band; read and written by blocks.

Shapes: H x W pixels, T dates, B bands, D dimensions of an embedding.
"""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass

from running.errors import InputError, notice
from running.files import write_error
from running.tile_json import match_bands

import numpy as np

from preparation import need
from preparation.tables import OPTIONAL
from trained.encoder import read_dates
from utils import BLOCK_BYTES


@dataclass
class Cube:
    """An opened cube.

    values: xarray DataArray with the axes (y, x, time, band), not loaded; clear: (y, x, time)
    DataArray or None; dates: (T,) as `read_dates` gives them; attributes: of its data set;
    grid_mapping: the name of the variable with its CRS, or None.
    """

    values: object
    clear: object
    dates: np.ndarray
    attributes: dict
    grid_mapping: str | None

    @property
    def shape(self):
        """(H, W)"""
        return self.values.shape[:2]

    def blocks(self):
        """Yield (rows, columns), slices of blocks that hold whole chunks where memory allows."""
        height, width, dates, bands = self.values.shape
        most = max(1, BLOCK_BYTES // (4 * dates * bands))
        tall, wide = (max(sizes) for sizes in self.values.chunks[:2])
        columns = _whole_chunks(wide, min(max(1, most // min(tall, height)), width))
        rows = _whole_chunks(tall, min(max(1, most // columns), height))
        for row in range(0, height, rows):
            for column in range(0, width, columns):
                last = min(row + rows, height), min(column + columns, width)
                yield slice(row, last[0]), slice(column, last[1])

    def read(self, block):
        """Reflectance (h, w, T, B) and whether it is clear, (h, w, T), or None, of a block."""
        clear = None if self.clear is None else self.clear[block].values
        if clear is not None and clear.dtype.kind == "f":
            clear = np.nan_to_num(clear)  # an empty cell is not clear
        return self.values[block].values, clear


def _whole_chunks(chunk, most):
    """The largest multiple of a chunk's size that is not above most; most where there is none."""
    return most // chunk * chunk or most


def open_cube(path, dims, variable, clear, bands):
    """The Cube of a path: a zarr folder, or another file that xarray can open.

    dims: names of time, y, x and band. variable: "" for the only one that has them all, or for one
    variable a band. clear: name of a variable (time, y, x), where there is one. bands: names that
    are wanted, or []. Raises InputError for what does not fit.
    """
    data = _open(path)
    if not variable and bands and set(bands) <= set(data.data_vars):
        values, one = data[bands].to_dataarray(dims[3]), data[bands[0]]
    else:
        one = values = data[_choose_variable(path, data, dims, variable, bands)]
    if set(values.dims) != set(dims) or 0 in values.shape:
        found = ", ".join(f"{name} ({size})" for name, size in values.sizes.items())
        raise InputError(f"{path}: found the dimensions {found}, wanted dims={','.join(dims)}")
    time, y, x, band = dims
    for name in (time, *([band] if bands else [])):
        if name not in values.coords:
            raise InputError(f"{path}: found no coordinates of {name}, wanted dates and band names")
    if bands:
        names = [str(name) for name in values[band].values]
        values = values.isel({band: match_bands(names, bands, path, "bands= or the checkpoint")})
    if clear not in data.data_vars:
        notice(f"{path}: found no variable {clear}; observations with data are taken as clear")
    is_clear = data[clear].transpose(y, x, time) if clear in data.data_vars else None
    dates = read_dates(values[time].values)
    mapping = one.encoding.get("grid_mapping")
    return Cube(values.transpose(y, x, time, band), is_clear, dates, dict(data.attrs), mapping)


def _open(path):
    xarray = need("xarray", OPTIONAL)
    for module in ("dask.array", "zarr"):
        need(module, OPTIONAL)
    try:
        if path.is_dir():
            return xarray.open_zarr(path, chunks={}, decode_coords="all")
        return xarray.open_dataset(path, decode_coords="all", chunks={})
    except InputError:
        raise
    except Exception as error:  # each of xarray's engines raises kinds of its own
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: found no readable cube ({line:.200})") from None


def _choose_variable(path, data, dims, variable, bands):
    """The name of the variable that is asked for, or of the only one that has all dimensions."""
    cubes = [name for name in data.data_vars if set(dims) <= set(data[name].dims)]
    if variable in data.data_vars or (len(cubes) == 1 and not variable):
        return variable or cubes[0]
    found = [f"{name} ({', '.join(map(str, one.dims))})" for name, one in data.data_vars.items()]
    wanted = f"variable= one of them with the dimensions {','.join(dims)} (dims=)"
    if bands:
        wanted += f", or a variable for each band: {', '.join(bands)}"
    raise InputError(f"{path}: found the variables {'; '.join(found) or 'none'}; wanted {wanted}")


@contextmanager
def cube_writer(path, cube, arrays):
    """Write a zarr cube beside `path` and rename it at the end; what was there is replaced.

    arrays: {name: (dtype, D or 0, no data, attributes of it)}. Yields write(block, {name: array}).
    Coordinates and attributes of the input's pixels are kept.
    """
    xarray, dask = need("xarray", OPTIONAL), need("dask.array", OPTIONAL)
    y, x = cube.values.dims[:2]
    chunk = tuple(part.stop - part.start for part in next(cube.blocks()))
    coords = {name: one.variable for name, one in cube.values.coords.items()}
    coords = {name: one for name, one in coords.items() if set(one.dims) <= {y, x}}
    variables, encoding = {}, {}
    for name, (dtype, size, no_data, described) in arrays.items():
        more = (size,) if size else ()
        chunks = (*map(min, chunk, cube.shape), *more)
        lazy = dask.full((*cube.shape, *more), no_data, dtype=dtype, chunks=chunks)
        variables[name] = xarray.Variable((y, x, "dimension")[: lazy.ndim], lazy, described)
        encoding[name] = {"chunks": chunks}
        if cube.grid_mapping:
            encoding[name]["grid_mapping"] = cube.grid_mapping
    data = xarray.Dataset(variables, coords, cube.attributes)
    for one in data.coords.values():
        one.encoding = {}  # chunks of the input do not fit
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")

    def write(block, values):
        named = {name: (variables[name].dims, array) for name, array in values.items()}
        region = dict(zip((y, x), block, strict=True))
        xarray.Dataset(named).to_zarr(part, region=region)

    try:
        data.to_zarr(part, compute=False, encoding=encoding, zarr_format=2, consolidated=True)
        yield write
        shutil.rmtree(path, ignore_errors=True)
        part.rename(path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def legend_attributes(names):
    """CF attributes of class codes {code: name}, and their names as they are, in JSON."""
    return {
        "flag_values": list(names),
        "flag_meanings": " ".join("_".join(name.split()) for name in names.values()),
        "classes": json.dumps({str(code): name for code, name in names.items()}),
    }


def is_cube(path):
    """Whether a path is a cube by its name; a Zarr cube is a folder."""
    return path.is_dir() or path.suffix.lower() in (".zarr", ".nc", ".nc4", ".h5")
