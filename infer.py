"""Map tiles: representations, and land cover from a fine-tuned checkpoint.

    python infer.py checkpoint_path=checkpoints/simulated/best.pt \\
        tile_path=data/simulated/processed/MGRS-SIM1
    python infer.py checkpoint_path=checkpoints/landcover/best.pt \\
        tile_path=data/simulated/processed output_dir=outputs
    torchrun --nproc-per-node=2 infer.py ...      # the tiles of a folder, divided

Streams blocks of rows, so memory does not grow with the tile. Deterministic: same checkpoint and
tile, same map. Tiles already done are skipped unless overwrite=true.
"""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from tqdm import tqdm

from backbones import Classifier, load_backbone, load_classifier
from files import atomic_write, load_checkpoint, make_output_dir, write_json
from maps import is_georeferenced, plot_class_map, quantise, read_provenance, write_geotiff
from runlog import start_log
from runtime import InputError, check, run_script, start_runtime
from tiles import Tile, check_tile
from utils import extract_representations

run_config = {
    # input
    "checkpoint_path": "",  # of train.py or train_classification.py
    "tile_path": "data/simulated/processed/MGRS-SIM1",  # a tile, or a folder of tiles MGRS-*
    "output_dir": "",  # empty: outputs/<tile>; a folder of tiles gets one folder each in it
    "overwrite": False,  # map tiles again that are done
    "skip_bad_tiles": False,  # say what is wrong with a tile and go on
    # maps
    "classify": "auto",  # auto: where the checkpoint is fine-tuned; true: refuse others; false
    "representation_format": "float32",  # float32, float16, or int8 with a scale for each pixel
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in training
    "draws": 0,  # 0: all clear observations at once; else the mean of so many even draws
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

FORMATS = {"float32": np.float32, "float16": np.float16, "int8": np.int8}


def find_tiles(tile_path):
    """Folders of the tiles at a path. Raises InputError where there is none."""
    path = Path(tile_path)
    if (path / "bands.npy").exists() or path.name.startswith("MGRS-"):
        return [path]
    folders = sorted(folder for folder in path.glob("MGRS-*") if folder.is_dir())
    if not folders:
        raise InputError(f"{path}: found no tile, wanted one or a folder of MGRS-*")
    return folders


def output_folder(config, folder):
    """Where a tile's files go."""
    if not config["output_dir"]:
        return Path("outputs") / folder.resolve().name
    path = Path(config["output_dir"])
    is_tile = (Path(config["tile_path"]) / "bands.npy").exists()
    return path if is_tile else path / folder.resolve().name


def load_module(config, checkpoint):
    """Classifier or backbone, in eval mode, as `classify` says."""
    if config["classify"] == "true" or (
        config["classify"] == "auto" and checkpoint["kind"] == "classifier"
    ):
        return load_classifier(checkpoint)
    return load_backbone(checkpoint)


class MapWriter:
    """Maps of one tile, written block by block to temporary files and renamed all at the end."""

    def __init__(self, stack, output_dir):
        self.stack, self.output_dir, self.parts = stack, output_dir, {}

    def add(self, name, dtype, shape):
        """A new map, to be filled in blocks of rows with `write`."""
        part = self.stack.enter_context(atomic_write(self.output_dir / f"{name}.npy"))
        np.lib.format.open_memmap(part, "w+", dtype, shape)
        self.parts[name] = part

    def write(self, name, rows, block):
        # opened for each block: pages written before no longer count as this process's memory
        np.load(self.parts[name], mmap_mode="r+", allow_pickle=False)[slice(*rows)] = block

    def read(self, name):
        return np.load(self.parts[name], allow_pickle=False)


def map_blocks(tile, module, checkpoint, config, runtime, codes):
    """Yield (rows, maps) of a tile from north to south, each row once.

    maps: representation_map (rows, W, D) float32, NaN for no data, and with codes (C,) also
    classification_map (rows, W) uint8, 0 for no data, and confidence (rows, W) float32, NaN for it.
    """
    height, width = tile.shape[1:3]
    size = (module.backbone if len(codes) else module).latent_dim
    blocks = extract_representations(
        module,
        tile,
        checkpoint["mean"],
        checkpoint["std"],
        config["min_valid"] or checkpoint["config"]["min_valid"],
        runtime,
        draws=config["draws"],
    )
    done = 0
    for (_, last), row, column, y, logits in blocks:
        maps = empty_maps(last - done, width, size, codes)
        row = row - done
        maps["representation_map"][row, column] = y.numpy()
        if len(codes):
            probability, predicted = logits.softmax(1).max(1)
            maps["classification_map"][row, column] = codes[predicted.numpy()]
            maps["confidence"][row, column] = probability.numpy()
        yield (done, last), maps
        done = last
    if done < height:  # no valid pixel further south
        yield (done, height), empty_maps(height - done, width, size, codes)


def empty_maps(rows, width, size, codes):
    maps = {"representation_map": np.full((rows, width, size), np.nan, np.float32)}
    if len(codes):
        maps["classification_map"] = np.zeros((rows, width), np.uint8)
        maps["confidence"] = np.full((rows, width), np.nan, np.float32)
    return maps


def map_tile(tile, module, checkpoint, config, runtime, output_dir, made_by):
    """Write all files of one tile; infer.json, which says that it is done, comes last."""
    height, width = tile.shape[1:3]
    legend = (
        {int(c): e for c, e in checkpoint["classes"].items()} if hasattr(module, "head") else {}
    )
    legend = legend if made_by["classify"] else {}
    codes = np.array(list(legend), np.uint8)
    size = (module.backbone if len(codes) else module).latent_dim
    (output_dir / "infer.json").unlink(missing_ok=True)
    for stale in output_dir.glob(".*.part.*"):  # of a run that was killed
        stale.unlink()
    bar = tqdm(total=height, desc=tile.name, unit="row", disable=not runtime.is_main)
    with ExitStack() as stack:
        writer = MapWriter(stack, output_dir)
        kind = FORMATS[config["representation_format"]]
        writer.add("representation_map", kind, (height, width, size))
        if kind is np.int8:
            writer.add("representation_map_scales", np.float32, (height, width))
        if len(codes):
            writer.add("classification_map", np.uint8, (height, width))
            writer.add("confidence", np.float32, (height, width))
        writer.add("valid_count", np.uint16, (height, width))
        writer.write("valid_count", (0, height), tile.clear_counts())
        for rows, maps in map_blocks(tile, module, checkpoint, config, runtime, codes):
            if kind is np.int8:
                values, scales = quantise(maps["representation_map"])
                maps |= {"representation_map": values, "representation_map_scales": scales}
            for name, block in maps.items():
                writer.write(name, rows, block)
            bar.update(rows[1] - bar.n)
        write_pictures(writer, tile, legend, output_dir)
    bar.close()
    georeference = {key: tile.info[key] for key in ("crs", "transform") if key in tile.info}
    made_by = made_by | georeference | {"tile_path": str(tile.path), "tile": tile.title}
    write_json(output_dir / "infer.json", made_by | {"classes": legend})


def write_pictures(writer, tile, legend, output_dir):
    """PNG of the class map, and GeoTIFFs where the tile is georeferenced."""
    if legend:
        class_map = writer.read("classification_map")
        plot_class_map(class_map, legend, output_dir / "classification_map.png", tile.title)
    if not is_georeferenced(tile.info):
        return
    write_geotiff(output_dir / "valid_count.tif", writer.read("valid_count"), tile.info, None)
    if legend:
        path = output_dir / "classification_map.tif"
        write_geotiff(path, class_map, tile.info, 0, legend)
        confidence = writer.read("confidence")
        write_geotiff(output_dir / "confidence.tif", confidence, tile.info, np.nan)


def is_done(output_dir, made_by, overwrite):
    """Whether a tile was mapped already; InputError where it was by another checkpoint."""
    file = output_dir / "infer.json"
    before = read_provenance(file)
    if overwrite or not before:
        return False
    differ = [key for key, value in made_by.items() if before.get(key) != value]
    if differ:
        raise InputError(
            f"{file}: was made with another {', '.join(differ)}; wanted another output_dir or "
            "overwrite=true"
        )
    return True


def main(config):
    """Map the tiles. Returns the folders of those that are done now."""
    config = check(
        config,
        classify=("auto", "true", "false"),
        representation_format=FORMATS,
        min_valid=(0, 65535),
    )
    runtime = start_runtime(config["device"])

    # checkpoint
    kinds = ("classifier",) if config["classify"] == "true" else ("pretrained", "classifier")
    checkpoint = load_checkpoint(config["checkpoint_path"], kinds)
    module = load_module(config, checkpoint).to(runtime.device)
    made_by = {key: config[key] for key in ("representation_format", "min_valid", "draws")}
    made_by["classify"] = isinstance(module, Classifier)
    content = Path(config["checkpoint_path"]).read_bytes()
    made_by["checkpoint_sha256"] = hashlib.sha256(content).hexdigest()

    # tiles, divided among the processes
    folders = find_tiles(config["tile_path"])[runtime.rank :: runtime.world_size]
    done, log = [], None
    for number, folder in enumerate(folders):
        try:
            output_dir = make_output_dir(output_folder(config, folder))
            log = log or start_log(config, "infer", output_dir, runtime)
            if is_done(output_dir, made_by, config["overwrite"]):
                print(f"{output_dir}: done already (overwrite=true maps it again)")
            else:
                tile = Tile(folder)
                check_tile(tile, checkpoint, config["checkpoint_path"])
                map_tile(tile, module, checkpoint, config, runtime, output_dir, made_by)
                valid = np.load(output_dir / "valid_count.npy", mmap_mode="r")
                log.line({"step": number, "median_valid_count": float(np.median(valid))})
                print(f"{output_dir}: {', '.join(sorted(p.name for p in output_dir.glob('*.*')))}")
                if made_by["classify"]:
                    picture = output_dir / "classification_map.png"
                    log.images({f"classification_map/{tile.name}": picture})
            done.append(output_dir)
        except InputError as error:
            if not config["skip_bad_tiles"]:
                raise
            print(f"skipped: {error}")
    if log:
        log.finish()
    return done


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
