"""False colour: a basis of three principal components, fitted, applied, saved and loaded."""

import json
import math
import zipfile
from pathlib import Path

from running.errors import InputError, notice
from running.files import atomic_write, make_output_dir

import numpy as np
from sklearn.decomposition import PCA

from maps.reader import MADE_BY, check_made_alike
from utils import extract_representations, skew_signs

MAX_VALUE = 1e12  # of a representation, so that sums of squares stay finite
MAX_BASIS_BYTES = 1 << 24  # of a basis file: one of 65536 dimensions has a megabyte


def sample_representations(maps, config, stride=1):
    """At most `sample_pixels` valid representations (N, D) of maps, at random, in bounded memory.

    Each valid pixel gets a random number, and those with the lowest are kept. maps: of
    `RepresentationMap`, of which every stride-th row and column is read.
    Raises InputError for too few to fit a basis to, and for values that cannot be squared.
    """
    rng, count = np.random.default_rng(config["seed"]), config["sample_pixels"]
    limit, parts = 1.0, []
    for block in (block for one in maps for _, block in one.blocks(stride)):
        pixels = block[np.isfinite(block).all(-1)]
        numbers = rng.random(len(pixels))
        parts.append((numbers[numbers < limit], pixels[numbers < limit]))
        if sum(len(numbers) for numbers, _ in parts) > 2 * count:
            parts = [_keep_lowest(parts, count)]
            limit = parts[0][0][-1]
    _, sample = _keep_lowest(parts, count)
    if len(sample) <= 3:
        raise InputError(f"{maps[0].path}: found {len(sample)} valid pixels, wanted more than 3")
    if (largest := np.abs(sample).max()) > MAX_VALUE:
        raise InputError(
            f"{maps[0].path}: found values up to {largest:.3g}, wanted at most {MAX_VALUE:g}"
        )
    return sample


def _keep_lowest(parts, count):
    """Of parts (numbers (N,), pixels (N, D)) the pixels with the lowest numbers, ascending."""
    numbers, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = numbers.argsort()[:count]
    return numbers[order], pixels[order]


def find_basis(maps, config, sample=None):
    """The basis of `basis_path` where that file exists, else one fitted to maps and saved there.

    maps: of `RepresentationMap`. sample: `sample_representations` of them, where it is at hand.
    Raises InputError for a file that is no basis, or one of another checkpoint.
    """
    path = Path(config["basis_path"])
    if path.suffix != ".npz" and not path.is_file():
        path = path.parent / f"{path.name}.npz"
    if not config["basis_path"] or not path.exists():
        basis = fit_basis(sample_representations(maps, config) if sample is None else sample)
        if not config["basis_path"]:
            return basis
        if not path.exists():  # another call may have been faster: then its basis counts
            make_output_dir(path.parent)
            save_basis(basis, maps[0].made_by, path)
            print(f"{path}: the basis of these colours, for other maps of the same encoder")
            return basis
    basis, made_by = load_basis(path, maps[0].shape[2])
    check_made_alike(path, "a basis", made_by, maps[0])
    return basis


def fit_basis(pixels):
    """False-colour basis: three principal components and the percentiles 2 and 98 along each.

    pixels: (N, D) representations, N > 3 of valid pixels. Returns a dict of float32 arrays: mean
    (D,), components (3, D), low (3,), high (3,).
    """
    pca = PCA(3, random_state=0).fit(pixels)
    places = pca.transform(pixels)
    signs = skew_signs(places)
    low, high = np.percentile(places * signs, (2, 98), axis=0)
    components = pca.components_ * signs[:, None]
    basis = {"mean": pca.mean_, "components": components, "low": low, "high": high}
    return {name: np.asarray(values, np.float32) for name, values in basis.items()}


def apply_basis(basis, representations):
    """Representations (.., D), NaN where there is no data, to RGBA (.., 4) uint8.

    A pixel's colour depends on its representation and the basis alone; no data is transparent.
    """
    valid = np.isfinite(representations).all(-1)
    pixels = representations[valid].astype(np.float32)
    places = (pixels - basis["mean"]) @ basis["components"].T
    places = (places - basis["low"]) / np.maximum(basis["high"] - basis["low"], 1e-12)
    rgba = np.zeros((*valid.shape, 4), np.uint8)
    rgba[valid, :3] = (places.clip(0, 1) * 255).round()
    rgba[valid, 3] = 255
    return rgba


def color_tile(backbone, tile, mean, std, min_valid, runtime, stride):
    """False colour of every stride-th row and column of a tile, (h, w, 4) uint8, by its own basis.

    backbone, mean, std, min_valid: as `extract_representations` takes them. None, and a notice,
    where too few pixels are valid.
    """
    height, width = (-(-size // stride) for size in tile.shape[1:3])
    image = np.full((height, width, backbone.latent_dim), np.nan, np.float32)
    for _, row, column, y, _ in extract_representations(
        backbone, tile, mean, std, min_valid, runtime, stride
    ):
        image[row // stride, column // stride] = y.numpy()
    pixels = image[np.isfinite(image[..., 0])]
    if len(pixels) <= 3:
        notice(f"{tile.path}: {len(pixels)} valid pixels, too few for a false-colour picture")
        return None
    return apply_basis(fit_basis(pixels), image)


def save_basis(basis, made_by, path):
    """Write a basis (`fit_basis`) of a map to a .npz. made_by: of its `RepresentationMap`."""
    checkpoint = np.array(made_by.get("checkpoint_sha256") or "")
    made_by = np.array(json.dumps({key: made_by.get(key) for key in MADE_BY}))
    with atomic_write(path) as part:
        np.savez(part, checkpoint_sha256=checkpoint, made_by=made_by, **basis)


def load_basis(path, num_dimensions):
    """A basis (`fit_basis`) on disk and what it was made by, as a `RepresentationMap` has it.

    Raises InputError for any other file, before memory is allocated.
    """
    shapes = {
        "mean": (num_dimensions,),
        "components": (3, num_dimensions),
        "low": (3,),
        "high": (3,),
    }
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BASIS_BYTES:
                raise ValueError("too large")
            basis = {name: _read_member(archive, name) for name in shapes}
            made_by = _read_made_by(archive)
    except Exception as error:  # a damaged file raises many kinds
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: found no basis ({line}), wanted one of this script") from None
    for name, shape in shapes.items():
        found = basis[name]
        if name == "mean" and found.ndim == 1 and len(found) != num_dimensions:
            raise InputError(
                f"{path}: found {len(found)} dimensions, wanted {num_dimensions} of the map"
            )
        if found.dtype != np.float32 or found.shape != shape or not np.isfinite(found).all():
            raise InputError(f"{path}: found no usable {name}, wanted finite float32 {shape}")
    return basis, made_by


def _read_made_by(archive):
    """The entries of MADE_BY that the file has; older ones have only the checkpoint's."""
    names, found = archive.namelist(), {}
    if "made_by.npy" in names:
        found = dict(json.loads(str(_read_member(archive, "made_by"))))
    if "checkpoint_sha256.npy" in names:
        found["checkpoint_sha256"] = str(_read_member(archive, "checkpoint_sha256"))
    return {key: found[key] for key, kind in MADE_BY.items() if isinstance(found.get(key), kind)}


def _read_member(archive, name):
    """One array of an .npz; ValueError where its header declares more bytes than the file has."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read()
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(content):
        raise ValueError(f"{name} is cut off")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
