"""Plot representation maps as false colour: their first three principal components.

    python create_false_color_map.py representation_path=outputs/MGRS-SIM1/representation_map.npy
    python create_false_color_map.py basis_path=outputs/basis.npz \\
        representation_path=outputs/MGRS-SIM1/representation_map.npy,outputs/MGRS-SIM2/representation_map.npy

Maps with one basis match without a seam: a pixel's colour depends on its representation and the
basis alone. The basis is fitted to a sample of the valid pixels of all maps of the call.
"""

from pathlib import Path

from running.config import check
from running.device import start_runtime
from running.errors import InputError
from running.files import make_output_dir
from running.log import start_log
from running.script import refuse_torchrun, run_script
from running.tile_json import is_georeferenced

import numpy as np

from maps.false_color import apply_basis, find_basis
from maps.geotiff import write_geotiff
from maps.pictures import find_frame, plot_false_color
from maps.reader import RepresentationMap, check_together, read_provenance
from maps.writer import refuse_shared_folders

run_config = {
    "representation_path": "",  # representation_map.npy of infer.py; several divided by commas
    "output_dir": "",  # empty: beside each map
    "basis_path": "",  # .npz: used where it exists, else fitted and saved there; empty: fitted
    "format": "png",  # of the pictures: png, pdf or svg
    "sample_pixels": 50_000,  # valid pixels that the basis is fitted to
    "seed": 0,  # of the sample
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def open_maps(config):
    """The maps of the config. Raises InputError for none, or for maps that do not go together."""
    paths = [path for path in config["representation_path"].split(",") if path]
    if not paths:
        raise InputError("representation_path: found none, wanted a map of infer.py")
    maps = [RepresentationMap(path) for path in paths]
    check_together(maps)
    return maps


def picture_folders(maps, config):
    """Where the picture of each map goes.

    Raises InputError where two maps would share a folder, or where maps of another tile or
    checkpoint lie.
    """
    folders = [Path(config["output_dir"] or one.path.parent) for one in maps]
    if config["output_dir"] and len(maps) > 1:
        folders = [folder / one.name for folder, one in zip(folders, maps, strict=True)]
    refuse_shared_folders([one.path for one in maps], folders)
    for one, folder in zip(maps, folders, strict=True):
        there = read_provenance(folder / "infer.json")
        mine = {key: one.info.get(key) for key in ("checkpoint_sha256", "tile_path")}
        differ = [key for key in mine if mine[key] and there.get(key, mine[key]) != mine[key]]
        if differ:
            raise InputError(
                f"{folder / 'infer.json'}: found a map with another {', '.join(differ)} than "
                f"{one.path}, wanted another output_dir"
            )
    return folders


def main(config):
    """Plot the maps. Returns the paths of the pictures."""
    refuse_torchrun()
    config = check(config)
    maps = open_maps(config)
    folders = picture_folders(maps, config)
    basis = find_basis(maps, config)
    pictures, log = [], None
    for one, folder in zip(maps, folders, strict=True):
        make_output_dir(folder)
        log = log or start_log(config, "create_false_color_map", folder, start_runtime("cpu"))
        rgba = np.zeros((*one.shape[:2], 4), np.uint8)
        for first, block in one.blocks():
            rgba[first : first + len(block)] = apply_basis(basis, block)
        picture = folder / f"false_color.{config['format']}"
        thin = find_frame(rgba.shape[:2]).thin(rgba)
        plot_false_color(thin, rgba.shape[:2], picture, one.title, one.info)
        if is_georeferenced(one.info):
            write_geotiff(folder / "false_color.tif", rgba, one.info, None)
        log.images({f"false_color/{one.name}": picture})
        print(f"{picture}: representations of {one.title} as false colour")
        pictures.append(picture)
    log.finish()
    return pictures


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
