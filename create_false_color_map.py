"""Draw representation maps as false colour: their first three principal components.

    python create_false_color_map.py representation_path=outputs/MGRS-SIM1/representation_map.npy
    python create_false_color_map.py basis_path=outputs/basis.npz \\
        representation_path=outputs/MGRS-SIM1/representation_map.npy,outputs/MGRS-SIM2/representation_map.npy
    python create_false_color_map.py checkpoint_path=checkpoints/simulated/best.pt \\
        tile_path=data/simulated/processed/MGRS-SIM1

Maps drawn with one basis match without a seam: a pixel's colour depends on its representation and
the basis alone. The basis is fitted to a sample of the valid pixels of all maps of the call.
"""

import os
from pathlib import Path

import numpy as np
from matplotlib.image import imsave

from backbones import load_backbone
from maps import false_color
from maps.geotiff import write_geotiff
from maps.reader import (
    check_same_checkpoint,
    check_together,
    open_representations,
    read_provenance,
    representation_blocks,
)
from running.checkpoints import load_checkpoint
from running.config import check
from running.device import start_runtime
from running.errors import InputError
from running.files import atomic_write, file_hash, make_output_dir
from running.log import start_log
from running.script import refuse_torchrun, run_script
from tiles import Tile, check_tile, is_georeferenced
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


class MapOnDisk:
    """A saved representation map, read in blocks of rows."""

    def __init__(self, path):
        self.path = Path(path)
        self.shape = open_representations(path)[0].shape
        self.folder = self.path.parent
        self.name = self.folder.name
        self.info = read_provenance(self.path)
        self.made_by = self.info.get("checkpoint_sha256", "")  # "" where it is not known
        self.title = self.info.get("tile", self.name)

    def blocks(self):
        """Yield (first row, representations (rows, W, D))."""
        return representation_blocks(self.path)


class MapOfTile:
    """The representations of a tile, made by a checkpoint while they are read."""

    def __init__(self, config, runtime):
        self.checkpoint = load_checkpoint(config["checkpoint_path"])
        self.backbone = load_backbone(self.checkpoint).to(runtime.device)
        self.tile, self.runtime = Tile(config["tile_path"]), runtime
        check_tile(self.tile, self.checkpoint, config["checkpoint_path"])
        self.shape = (*self.tile.shape[1:3], self.backbone.latent_dim)
        self.name, self.title = self.tile.name, self.tile.title
        self.made_by = file_hash(config["checkpoint_path"])
        self.info = {**self.tile.info, "tile_path": os.path.realpath(self.tile.path)}
        self.path, self.folder = self.tile.path, Path("outputs") / self.name

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
    """The maps to draw. Raises InputError for none, or for maps that do not go together."""
    if bool(config["representation_path"]) == bool(config["checkpoint_path"]):
        raise InputError("wanted representation_path=, or checkpoint_path= and tile_path=")
    if config["checkpoint_path"]:
        return [MapOfTile(config, runtime)]
    opened = [MapOnDisk(path) for path in config["representation_path"].split(",")]
    check_together(opened)
    return opened


def output_folders(opened, config):
    """Where the picture of each map goes.

    Raises InputError where two maps would share a folder, or where the maps of another tile or
    checkpoint lie.
    """
    folders, taken = [], {}
    for one in opened:
        folder = Path(config["output_dir"] or one.folder)
        if config["output_dir"] and len(opened) > 1:
            folder = folder / one.name
        folders.append(folder)
        other = taken.setdefault(Path(os.path.realpath(folder)), one)
        if other is not one:
            raise InputError(
                f"{one.path}: found {other.path} whose picture goes to {folder} too, wanted "
                "folders of different names (or a call for each, with an output_dir of its own)"
            )
        there = read_provenance(folder / "infer.json")
        mine = {"checkpoint_sha256": one.made_by, "tile_path": one.info.get("tile_path")}
        differ = [key for key in mine if mine[key] and there.get(key, mine[key]) != mine[key]]
        if differ:
            raise InputError(
                f"{folder / 'infer.json'}: found a map with another {', '.join(differ)} than "
                f"{one.path}, wanted another output_dir"
            )
    return folders


def fit_basis(opened, config):
    """A basis fitted to at most `sample_pixels` valid pixels of all maps."""
    blocks = (block for one in opened for _, block in one.blocks())
    return false_color.fit_basis(false_color.draw_sample(blocks, config, opened[0].path))


def find_basis(opened, config):
    """The basis of basis_path where it exists, else a new one, saved there."""
    if not config["basis_path"]:
        return fit_basis(opened, config)
    path = Path(config["basis_path"])
    if path.suffix != ".npz" and not path.is_file():
        path = path.parent / f"{path.name}.npz"
    if not path.exists():
        basis = fit_basis(opened, config)
        if not path.exists():  # another call may have been faster: then its basis counts
            make_output_dir(path.parent)
            false_color.save_basis(basis, opened[0].made_by, path)
            return basis
    basis, made_by = false_color.load_basis(path, opened[0].shape[2])
    check_same_checkpoint(path, "a basis", made_by, opened[0])
    return basis


def main(config):
    """Draw the maps. Returns the paths of the PNGs."""
    refuse_torchrun()
    config = check(config)
    runtime = start_runtime(config["device"])
    opened = open_maps(config, runtime)
    folders = output_folders(opened, config)
    basis = find_basis(opened, config)
    pictures, log = [], None
    for one, folder in zip(opened, folders, strict=True):
        make_output_dir(folder)
        log = log or start_log(config, "create_false_color_map", folder, runtime)
        rgba = np.zeros((*one.shape[:2], 4), np.uint8)
        for first, block in one.blocks():
            rgba[first : first + len(block)] = false_color.apply_basis(basis, block)
        picture = folder / "false_color.png"
        with atomic_write(picture) as part:
            imsave(part, rgba)
        if is_georeferenced(one.info):
            write_geotiff(folder / "false_color.tif", rgba, one.info, None)
        log.images({f"false_color/{one.name}": picture})
        print(f"{picture}: representations of {one.title} as false colour")
        pictures.append(picture)
    log.finish()
    return pictures


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
