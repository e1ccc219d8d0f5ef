"""Draw representation maps as false colour: their first three principal components.

    python create_false_color_map.py representation_path=outputs/MGRS-SIM1/representation_map.npy
    python create_false_color_map.py basis_path=outputs/basis.npz \\
        representation_path=outputs/MGRS-SIM1/representation_map.npy,outputs/MGRS-SIM2/representation_map.npy
    python create_false_color_map.py checkpoint_path=checkpoints/simulated/best.pt \\
        tile_path=data/simulated/processed/MGRS-SIM1

Maps drawn with one basis match without a seam: a pixel's colour depends on its representation and
the basis alone. The basis is fitted to a sample of the valid pixels of all maps of the call.
"""

from pathlib import Path

import numpy as np
from matplotlib.image import imsave

import maps
from backbones import load_backbone
from files import atomic_write, load_checkpoint, make_output_dir
from runlog import start_log
from runtime import InputError, check, run_script, start_runtime
from tiles import Tile, check_tile
from utils import extract_representations

run_config = {
    # input: maps, or a checkpoint and a tile
    "representation_path": "",  # representation_map.npy of infer.py; several divided by commas
    "checkpoint_path": "",  # of train.py or train_classification.py
    "tile_path": "",  # a tile in the tile contract
    # output
    "output_dir": "",  # empty: beside each map, or outputs/<tile>
    "basis_path": "",  # .npz: used where it exists, else fitted and saved there; empty: fitted
    "sample_pixels": 50_000,  # valid pixels that the basis is fitted to
    "seed": 0,  # of the sample
    # running
    "device": "auto",  # auto, cpu or cuda; for a checkpoint
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

ROWS = 64  # of a map in memory at a time


class MapOnDisk:
    """A saved representation map, read in blocks of rows."""

    def __init__(self, path):
        self.path = Path(path)
        self.shape = maps.open_representations(path)[0].shape
        self.folder = self.path.parent
        self.name = self.folder.name
        self.info = maps.read_provenance(self.path)
        self.title = self.info.get("tile", self.name)

    def blocks(self):
        """Yield (first row, representations (rows, W, D))."""
        for first in range(0, self.shape[0], ROWS):
            yield first, maps.read_representations(self.path, slice(first, first + ROWS))


class MapOfTile:
    """The representations of a tile, made by a checkpoint while they are read."""

    def __init__(self, config, runtime):
        self.checkpoint = load_checkpoint(config["checkpoint_path"])
        self.backbone = load_backbone(self.checkpoint).to(runtime.device)
        self.tile, self.runtime = Tile(config["tile_path"]), runtime
        check_tile(self.tile, self.checkpoint, config["checkpoint_path"])
        self.shape = (*self.tile.shape[1:3], self.backbone.latent_dim)
        self.name, self.title, self.info = self.tile.name, self.tile.title, self.tile.info
        self.folder = Path("outputs") / self.name

    def blocks(self):
        """Yield (first row, representations (rows, W, D))."""
        for (first, last), row, column, y, _ in extract_representations(
            self.backbone,
            self.tile,
            self.checkpoint["mean"],
            self.checkpoint["std"],
            self.checkpoint["config"]["min_valid"],
            self.runtime,
        ):
            block = np.full((last - first, *self.shape[1:]), np.nan, np.float32)
            block[row - first, column] = y.numpy()
            yield first, block


def open_maps(config, runtime):
    """The maps to draw. Raises InputError for none, or for maps of different dimensions."""
    if bool(config["representation_path"]) == bool(config["checkpoint_path"]):
        raise InputError("wanted representation_path=, or checkpoint_path= and tile_path=")
    if config["checkpoint_path"]:
        return [MapOfTile(config, runtime)]
    first, *others = [MapOnDisk(path) for path in config["representation_path"].split(",")]
    for other in others:
        if other.shape[2] != first.shape[2]:
            raise InputError(
                f"{other.path}: found {other.shape[2]} dimensions, wanted {first.shape[2]} "
                f"({first.path})"
            )
    return [first, *others]


def fit_basis(opened, config):
    """A basis fitted to about `sample_pixels` valid pixels of all maps, in bounded memory."""
    rng = np.random.default_rng(config["seed"])
    total = sum(one.shape[0] * one.shape[1] for one in opened)
    share = min(1.0, 2 * config["sample_pixels"] / total)  # about half may have no data
    sample = []
    for one in opened:
        for _, block in one.blocks():
            pixels = block[np.isfinite(block).all(-1)]
            sample.append(pixels[rng.random(len(pixels)) < share])
    sample = rng.permutation(np.concatenate(sample))[: config["sample_pixels"]]
    if len(sample) <= 3:
        raise InputError(f"{opened[0].name}: found {len(sample)} valid pixels, wanted more than 3")
    return maps.fit_basis(sample)


def find_basis(opened, config):
    """The basis of basis_path where it exists, else a new one, saved there."""
    path = Path(config["basis_path"])
    if not config["basis_path"] or not path.exists():
        basis = fit_basis(opened, config)
        if config["basis_path"]:
            make_output_dir(path.parent)
            with atomic_write(path.with_suffix(".npz")) as part:
                np.savez(part, **basis)
        return basis
    try:
        with np.load(path, allow_pickle=False) as file:
            basis = dict(file)
        size = basis["components"].shape[1]
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise InputError(f"{path}: found no basis ({error}), wanted one of this script") from None
    if size != opened[0].shape[2]:
        raise InputError(f"{path}: found {size} dimensions, wanted {opened[0].shape[2]} of the map")
    return basis


def main(config):
    """Draw the maps. Returns the paths of the PNGs."""
    config = check(config)
    runtime = start_runtime(config["device"])
    opened = open_maps(config, runtime)
    basis = find_basis(opened, config)
    pictures, log = [], None
    for one in opened:
        folder = Path(config["output_dir"] or one.folder)
        if config["output_dir"] and len(opened) > 1:
            folder = folder / one.name
        folder = make_output_dir(folder)
        log = log or start_log(config, "create_false_color_map", folder, runtime)
        rgba = np.zeros((*one.shape[:2], 4), np.uint8)
        for first, block in one.blocks():
            rgba[first : first + len(block)] = maps.apply_basis(basis, block)
        picture = folder / "false_color.png"
        with atomic_write(picture) as part:
            imsave(part, rgba)
        if maps.is_georeferenced(one.info):
            maps.write_geotiff(folder / "false_color.tif", rgba, one.info, None)
        log.images({f"false_color/{one.name}": picture})
        print(f"{picture}: representations of {one.title} as false colour")
        pictures.append(picture)
    log.finish()
    return pictures


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
