"""Embedding maps of others, (H, W, D) on a tile's grid: read from .npy files and GeoTIFFs.

AlphaEarth's COGs are int8: a value v stands for (v / 127.5)^2 sign(v), and -128 for no value
(developers.google.com/earth-engine/guides/aef_on_gcs_readme). The file does not say so, and int8 of
TESSERA and infer.py means another thing, so the user says it: NAME=alphaearth:PATH.
"""

import re
from pathlib import Path
from typing import NamedTuple

from running.errors import InputError, what_is_there
from running.files import describe_files, open_npy
from running.tile_json import is_georeferenced

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import array_bounds
from rasterio.windows import Window

from maps.reader import block_rows, open_representations, read_provenance, scales_path

ALPHAEARTH, ALPHAEARTH_NODATA = "alphaearth:", -128
SUFFIXES = (".npy", ".tif", ".tiff")


class Source(NamedTuple):
    """Where the maps of one kind lie: a file, or a folder with maps of several tiles."""

    path: Path
    is_alphaearth: bool


def parse_sources(text, reserved=()):
    """{name: Source} of `maps=NAME=PATH,NAME=alphaearth:PATH`; {} for "".

    reserved: names that are taken.
    """
    sources = {}
    for part in filter(None, text.split(",")):
        name, _, path = part.partition("=")
        if not path or not re.fullmatch("[A-Za-z][A-Za-z0-9]*", name):
            raise InputError(f"maps={part}: wanted NAME=PATH, the name of letters and digits")
        if name in (*reserved, *sources):
            raise InputError(f"maps={part}: found {name} twice or as the name of another row")
        path, is_alphaearth = path.removeprefix(ALPHAEARTH), path.startswith(ALPHAEARTH)
        sources[name] = Source(Path(path).expanduser(), is_alphaearth)
    return sources


def open_maps(source, dataset_name, tiles):
    """The EmbeddingMap of each tile of a data set, all of one D.

    Of a folder that of <PATH>/<dataset_name>/<TILE>/ or <PATH>/<TILE>/; a file is for one tile.
    """
    paths = [_find_file(source.path, dataset_name, tile, len(tiles)) for tile in tiles]
    pairs = zip(paths, tiles, strict=True)
    maps = [EmbeddingMap(path, tile, source.is_alphaearth) for path, tile in pairs]
    for other in maps:
        if other.shape[2] != maps[0].shape[2]:
            found, wanted = other.shape[2], maps[0].shape[2]
            raise InputError(
                f"{other.path}: found {found} dimensions, wanted {wanted} as {maps[0].path}"
            )
    return maps


def _find_file(path, dataset_name, tile, num_tiles):
    """The file of a tile's map."""
    if not path.is_dir():
        if num_tiles > 1:
            raise InputError(
                f"{path}: found one map for {num_tiles} tiles of {dataset_name}, wanted a folder "
                f"of one for each, <folder>/{tile.path.name}/"
            )
        return path
    folder = path / dataset_name / tile.path.name
    folder = folder if folder.is_dir() else path / tile.path.name
    files = [file for file in sorted(folder.glob("*")) if file.suffix.lower() in SUFFIXES]
    files = [file for file in files if not file.stem.endswith("_scales")]
    own = [file for file in files if file.name == "representation_map.npy"]  # of infer.py
    if len(own or files) != 1:
        found = ", ".join(file.name for file in files) or "no map"
        raise InputError(
            f"{folder}: found {found}, wanted one map (.npy or .tif){what_is_there(folder)}"
        )
    return (own or files)[0]


class EmbeddingMap:
    """An embedding map of a tile on disk.

    path: a .npy of floating-point numbers, or of int8 with <name>_scales.npy (H, W) beside it; or a
    GeoTIFF of D bands. shape: (H, W, D).
    Raises InputError for another type, shape or place than the tile's.
    """

    def __init__(self, path, tile, is_alphaearth=False):
        self.path, self.is_alphaearth = Path(path), is_alphaearth
        self.is_tif = self.path.suffix.lower() != ".npy"
        self.shape, info = self._open_tif() if self.is_tif else self._open_npy()
        (height, width), place = tile.shape[1:3], _find_place(tile.info)
        if self.shape[:2] != (height, width):
            self._refuse(f"shape {self.shape}", f"({height}, {width}, D)", tile)
        found = _find_place(info)
        if found and place and (found[0] != place[0] or not np.allclose(found[1], place[1], 1e-9)):
            self._refuse(*(f"{crs.to_string()} {numbers}" for crs, numbers in (found, place)), tile)

    def _refuse(self, found, wanted, tile):
        """InputError for another grid than the tile's, with the command that mends it."""
        mend, place = "", _find_place(tile.info)
        if self.is_tif and place:
            height, width = tile.shape[1:3]
            bounds = array_bounds(height, width, rasterio.Affine(*place[1]))
            bounds = " ".join(f"{number:.10g}" for number in bounds)
            grid = f"-t_srs {place[0].to_string()} -te {bounds} -ts {width} {height}"
            mend = f"; gdalwarp -r near {grid} {self.path} NEW.tif"
        raise InputError(f"{self.path}: found {found}, wanted {wanted} as {tile.path}{mend}")

    def _open_npy(self):
        """Shape, and what is known of the place."""
        if not self.is_alphaearth:
            return open_representations(self.path)[0].shape, read_provenance(self.path)
        array = open_npy(self.path, "a map (.npy)")
        self._check_alphaearth({str(array.dtype)})
        if array.ndim != 3 or 0 in array.shape:
            raise InputError(f"{self.path}: found shape {array.shape}, wanted (H, W, D)")
        return array.shape, {}

    def _open_tif(self):
        """Shape, and what is known of the place."""
        try:
            with rasterio.open(self.path) as file:
                dtypes, shape = {*file.dtypes}, (file.height, file.width, file.count)
                is_scaled = {*file.scales} != {1.0} or {*file.offsets} != {0.0}
                info = {"crs": file.crs, "transform": file.transform} if file.crs else {}
        except RasterioError as error:
            raise InputError(
                f"{self.path}: found no readable map ({error}), wanted .npy or a GeoTIFF"
            ) from None
        if self.is_alphaearth:
            self._check_alphaearth(dtypes)
        elif is_scaled or not dtypes <= {"float32", "float64"}:
            found = "scales or offsets of GDAL" if is_scaled else ", ".join(dtypes)
            raise InputError(
                f"{self.path}: found {found}, wanted floating-point numbers that are the "
                f"embedding, or maps=NAME={ALPHAEARTH}PATH for AlphaEarth's int8"
            )
        return shape, info

    def _check_alphaearth(self, dtypes):
        if dtypes != {"int8"}:
            raise InputError(
                f"{self.path}: found {', '.join(dtypes)}, wanted int8 after {ALPHAEARTH} (leave "
                "that word out where the numbers are the embedding)"
            )

    def describe(self):
        """The path, and size and time of its files."""
        names = [self.path.name, scales_path(self.path).name]
        return [str(self.path), describe_files(self.path.parent, names)]

    def read_rows(self, first, last):
        """Values (rows, W, D) float32 of the rows first .. last - 1, NaN where there is none."""
        values = (self._read_tif if self.is_tif else self._read_npy)(first, last)
        if self.is_alphaearth:
            values[values == ALPHAEARTH_NODATA] = np.nan
            values = (values / 127.5) ** 2 * np.sign(values)
        values[~np.isfinite(values)] = np.nan
        return values

    def _read_tif(self, first, last):
        with rasterio.open(self.path) as file:
            window = Window(0, first, self.shape[1], last - first)
            values = file.read(window=window, masked=True).astype(np.float32)
        return np.moveaxis(values.filled(np.nan), 0, -1)

    def _read_npy(self, first, last):
        if self.is_alphaearth:
            return open_npy(self.path, "a map (.npy)")[first:last].astype(np.float32)
        array, scales = open_representations(self.path)
        values = array[first:last].astype(np.float32)
        if scales is not None:  # where there is no value they are NaN or, of TESSERA, 0
            values *= np.where(scales[first:last] > 0, scales[first:last], np.nan)[..., None]
        return values

    def find_missing(self):
        """Whether a pixel has no value, or lacks one of the D, (H, W) bool."""
        blocks = block_rows(self.shape)
        return np.concatenate([np.isnan(self.read_rows(*rows)).any(2) for rows in blocks])

    def read_pixels(self, pixels):
        """Values (N, D) float32 of pixels (N,), flat indices in any order."""
        width, values = self.shape[1], np.empty((len(pixels), self.shape[2]), np.float32)
        for first, last in block_rows(self.shape):
            chosen = np.flatnonzero((pixels >= first * width) & (pixels < last * width))
            if len(chosen):
                row, column = np.divmod(pixels[chosen], width)
                values[chosen] = self.read_rows(first, last)[row - first, column]
        return values


def _find_place(info):
    """CRS, and the transform (a, b, c, d, e, f), of what a tile.json has; None without a place."""
    if not is_georeferenced(info):
        return None
    return CRS.from_user_input(info["crs"]), tuple(map(float, info["transform"][:6]))
