"""Maps of other tiles, of another year for example, when a fine-tuning is done."""

from running.errors import InputError
from running.script import start_script


def map_tiles(tiles, config, name, output_dir):
    """Map tiles with the best.pt of a run, and compare the maps with labels or targets, if any.

    By infer.py, which says what makes a map doubtful, and read_inference_map.py, which matches
    classes by their names: in processes of their own, as a user would run them. name: of the map.
    Raises InputError where one of them fails; its own message is above that one. Raises Stopped
    where a signal ends one.
    """
    logged = {key: config[key] for key in ("wandb_mode", "wandb_dir")}
    keys = {key: config[key] for key in ("device", "overwrite", "skip_bad_tiles")}
    keys |= {"checkpoint_path": output_dir / "best.pt", "tile_path": tiles[0].path.parent}
    jobs = [("infer.py", keys | {"output_dir": output_dir / "maps"})]
    folders = [output_dir / "maps" / tile.path.resolve().name for tile in tiles]
    jobs += [("read_inference_map.py", {"map_path": folder / f"{name}.npy"}) for folder in folders]
    for script, keys in jobs:
        if status := start_script(script, keys | logged).returncode:
            raise InputError(f"{script} ended with status {status}, see above")
