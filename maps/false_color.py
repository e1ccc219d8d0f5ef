"""False colour: a basis of three principal components, fitted, applied, saved and loaded."""

import math
import zipfile

import numpy as np
from sklearn.decomposition import PCA

from running.errors import InputError
from running.files import atomic_write

MOST_VALUE = 1e12  # of a representation: its square times all that is summed up stays finite
BASIS_BYTES = 1 << 24  # most that a file of a basis can hold: 65536 dimensions need a megabyte


def draw_sample(blocks, config, path):
    """At most `sample_pixels` valid representations (N, D), drawn at random in bounded memory.

    Each valid pixel draws a number, and those with the lowest are kept. blocks: arrays (.., D), NaN
    where there is no data. path: for the error. Raises InputError for too few to fit a basis to,
    and for values that cannot be squared.
    """
    rng, most = np.random.default_rng(config["seed"]), config["sample_pixels"]
    limit, parts = 1.0, []
    for block in blocks:
        pixels = block[np.isfinite(block).all(-1)]
        numbers = rng.random(len(pixels))
        parts.append((numbers[numbers < limit], pixels[numbers < limit]))
        if sum(len(numbers) for numbers, _ in parts) > 2 * most:
            parts = [_find_lowest(parts, most)]
            limit = parts[0][0][-1]
    _, sample = _find_lowest(parts, most)
    if len(sample) <= 3:
        raise InputError(f"{path}: found {len(sample)} valid pixels, wanted more than 3")
    if (most := np.abs(sample).max()) > MOST_VALUE:
        raise InputError(f"{path}: found values up to {most:.3g}, wanted at most {MOST_VALUE:g}")
    return sample


def _find_lowest(parts, most):
    """Of parts (numbers (N,), pixels (N, D)) the pixels with the lowest numbers, ascending."""
    numbers, pixels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = numbers.argsort()[:most]
    return numbers[order], pixels[order]


def fit_basis(pixels):
    """False-colour basis: three principal components and the percentiles 2 and 98 along each.

    pixels: (N, D) representations, N > 3 of valid pixels. Returns a dict of float32 arrays: mean
    (D,), components (3, D), low (3,), high (3,).
    """
    pca = PCA(3, random_state=0).fit(pixels)
    low, high = np.percentile(pca.transform(pixels), (2, 98), axis=0)
    basis = {"mean": pca.mean_, "components": pca.components_, "low": low, "high": high}
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


def save_basis(basis, checkpoint_sha256, path):
    """Write a basis of the representations of a checkpoint ("" where that is not known)."""
    with atomic_write(path) as part:
        np.savez(part, checkpoint_sha256=np.array(checkpoint_sha256), **basis)


def load_basis(path, num_dimensions):
    """A basis (`fit_basis`) on disk and the hash of its checkpoint, "" where that is not told.

    Raises InputError for anything else, before memory is asked for.
    """
    wanted = {
        "mean": (num_dimensions,),
        "components": (3, num_dimensions),
        "low": (3,),
        "high": (3,),
    }
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > BASIS_BYTES:
                raise ValueError("too large")
            basis = {name: _read_member(archive, name) for name in wanted}
            has_hash = "checkpoint_sha256.npy" in archive.namelist()
            told = str(_read_member(archive, "checkpoint_sha256")) if has_hash else ""
    except Exception as error:  # damage shows itself in many kinds, according to the byte it hits
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path}: found no basis ({line}), wanted one of this script") from None
    for name, shape in wanted.items():
        found = basis[name]
        if name == "mean" and found.ndim == 1 and len(found) != num_dimensions:
            raise InputError(
                f"{path}: found {len(found)} dimensions, wanted {num_dimensions} of the map"
            )
        if found.dtype != np.float32 or found.shape != shape or not np.isfinite(found).all():
            raise InputError(f"{path}: found no usable {name}, wanted finite float32 {shape}")
    return basis, told


def _read_member(archive, name):
    """One array of an .npz; ValueError where its header tells of more bytes than the file has."""
    with archive.open(f"{name}.npy") as file:
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        content = file.read()
    if dtype.hasobject or dtype.itemsize * math.prod(shape) != len(content):
        raise ValueError(f"{name} is cut off")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C")
