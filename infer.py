"""Map tiles: representations, and land cover from a fine-tuned checkpoint.

    python infer.py checkpoint_path=checkpoints/simulated/best.pt \\
        tile_path=data/simulated/processed/MGRS-SIM1
    python infer.py checkpoint_path=checkpoints/landcover/best.pt \\
        tile_path=data/simulated/processed output_dir=outputs
    torchrun --nproc-per-node=2 infer.py ...      # the tiles of a folder, divided

Streams blocks of rows, so memory does not grow with the tile. Deterministic: same checkpoint and
tile, same map. Tiles already done are skipped unless overwrite=true; a tile that was stopped or
killed is gone on with, behind the last block on the disk.
"""

import os
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from backbones import Classifier, load_backbone, load_classifier
from maps.geotiff import write_geotiff, write_representation_tif
from maps.land_cover import class_legend, plot_class_map
from maps.reader import read_provenance
from maps.writer import MapWriter, quantise, remove_products
from running.checkpoints import load_checkpoint
from running.config import check
from running.device import start_runtime
from running.errors import InputError, Stopped, notice
from running.files import (
    describe_files,
    file_hash,
    lock_folder,
    make_output_dir,
    remove_parts,
    write_json,
)
from running.log import refuse_training_folder, start_log
from running.script import run_script, stop_on_signals
from tiles import Tile, check_tile, is_georeferenced
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
    "representation_tif": False,  # write it as a cloud-optimised GeoTIFF too
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in training
    "dates": 24,  # most clear dates of a pixel that are read, evenly spaced; 0: all
    "draws": 0,  # where not 0: the mean of so many even draws of sample_size from all clear dates
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

FORMATS = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
# what a map depends on; labels, splits and class names in tile.json may come later
TILE_FILES = ("bands.npy", "masks.npy", "doys.npy")


# ---- what is to be mapped ------------------------------------------------------------------------


def find_tiles(tile_path):
    """Folders of the tiles at a path. Raises InputError where there is none."""
    path = Path(tile_path)
    if (path / "bands.npy").exists() or path.name.startswith("MGRS-"):
        return [path]
    # a link that leads nowhere is a tile too: one that cannot be opened
    folders = sorted(f for f in path.glob("MGRS-*") if f.is_dir() or f.is_symlink())
    if not folders:
        raise InputError(f"{path}: found no tile, wanted one or a folder of MGRS-*")
    return folders


def output_folders(config, folders):
    """Where the files of each tile go. Raises InputError where two would share a folder."""
    targets = [Path(os.path.realpath(folder)) for folder in folders]
    if not config["output_dir"]:
        outputs = [Path("outputs") / target.name for target in targets]
    elif folders == [Path(config["tile_path"])]:
        outputs = [Path(config["output_dir"])]
    else:
        outputs = [Path(config["output_dir"]) / target.name for target in targets]
    taken = {}
    for folder, output_dir in zip(folders, outputs, strict=True):
        other = taken.setdefault(output_dir, folder)
        if other != folder:
            raise InputError(
                f"{folder}: found {other} that goes to {output_dir} too, wanted tiles of different "
                "names (or one call for each, with an output_dir of its own)"
            )
    return outputs


@contextmanager
def skipping(config, bad, say=print):
    """Say what is wrong with a tile and go on, where skip_bad_tiles=true; count it in `bad`.

    To be put around what reads tiles alone: the user's own mistakes are no fault of a tile.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if not config["skip_bad_tiles"]:
            raise
        bad.append(error)
        say(f"skipped: {error}")


def open_tiles(config, checkpoint, bad):
    """All tiles that can be opened, and their output folders: [(tile, folder)].

    Raises InputError where there is none.
    """
    folders, tiles = find_tiles(config["tile_path"]), []
    for folder, output_dir in zip(folders, output_folders(config, folders), strict=True):
        with skipping(config, bad, notice):
            tile = Tile(folder)
            check_tile(tile, checkpoint, config["checkpoint_path"])
            if config["representation_tif"] and not is_georeferenced(tile.info):
                raise InputError(
                    f"{folder / 'tile.json'}: found no crs and transform, wanted both for "
                    "representation_tif=true"
                )
            tiles.append((tile, output_dir))
    if not tiles:
        raise InputError(f"{config['tile_path']}: found {len(bad)} bad tiles and no good one")
    return tiles


def load_module(config, checkpoint):
    """Classifier or backbone, in eval mode, as `classify` says.

    Raises InputError for a classifier that does not tell of its classes.
    """
    if config["classify"] == "false" or checkpoint["kind"] != "classifier":
        return load_backbone(checkpoint)
    module, classes = load_classifier(checkpoint), checkpoint.get("classes")
    if not isinstance(classes, dict) or len(classes) != checkpoint["head"]["num_classes"]:
        raise InputError(
            f"{config['checkpoint_path']}: found classes {classes}, wanted "
            f"{checkpoint['head']['num_classes']}, as its head has"
        )
    return module


def describe_source(tile):
    """Which tile is mapped, for infer.json: its real path, its place, sizes and times of files."""
    path = os.path.realpath(tile.path)
    place = {key: tile.info[key] for key in ("crs", "transform") if key in tile.info}
    return {"tile_path": path, "tile_files": describe_files(path, TILE_FILES), **place}


def is_done(output_dir, made_by, overwrite):
    """Whether a tile was mapped already; InputError where it was another tile or checkpoint."""
    file = output_dir / "infer.json"
    before = {} if overwrite else read_provenance(file)
    if not before:
        return False
    differ = [
        key if isinstance(value, dict) else f"{key} (was {before.get(key, 'not told')})"
        for key, value in made_by.items()
        if before.get(key) != value
    ]
    if differ:
        raise InputError(
            f"{file}: was made with another {', '.join(differ)}; wanted another output_dir or "
            "overwrite=true"
        )
    names = map_arrays((0, 0), made_by, 0)
    return all((output_dir / f"{name}.npy").exists() for name in names)


# ---- maps ----------------------------------------------------------------------------------------


def map_blocks(tile, module, checkpoint, config, runtime, codes, first_row):
    """Yield (rows, maps) of a tile from north to south, each row from `first_row` on once.

    maps: representation_map (rows, W, D) float32, NaN for no data, and with codes (C,) also
    classification_map (rows, W) uint8, 0 for no data, and confidence (rows, W) float32, NaN for it.
    """
    width = tile.shape[2]
    size = (module.backbone if len(codes) else module).latent_dim
    blocks = extract_representations(
        module,
        tile,
        checkpoint["mean"],
        checkpoint["std"],
        find_min_valid(config, checkpoint),
        runtime,
        draws=config["draws"],
        dates=0 if config["draws"] else config["dates"],
        first_row=first_row,
    )
    for (first, last), row, column, y, logits in blocks:
        maps = empty_maps(last - first, width, size, codes)
        row = row - first
        maps["representation_map"][row, column] = y.numpy()
        if len(codes):
            probability, predicted = logits.softmax(1).max(1)
            maps["classification_map"][row, column] = codes[predicted.numpy()]
            maps["confidence"][row, column] = probability.numpy()
        yield (first, last), maps


def find_min_valid(config, checkpoint):
    """Clear observations that a pixel needs."""
    return config["min_valid"] or checkpoint["config"]["min_valid"]


def notice_empty(tile, min_valid):
    """Say that a tile's maps will be empty, where they will."""
    if (most := tile.clear_counts().max()) < min_valid:
        notice(
            f"{tile.path}: found no pixel with min_valid={min_valid} clear observations, the "
            f"clearest has {most}; its maps are empty"
        )


def empty_maps(rows, width, size, codes):
    maps = {"representation_map": np.full((rows, width, size), np.nan, np.float32)}
    if len(codes):
        maps["classification_map"] = np.zeros((rows, width), np.uint8)
        maps["confidence"] = np.full((rows, width), np.nan, np.float32)
    return maps


def map_arrays(shape, made_by, size):
    """{name: (dtype, shape)} of the maps of a tile. shape: (H, W); size: D."""
    kind = FORMATS[made_by["representation_format"]]
    arrays = {"valid_count": (np.uint16, shape), "representation_map": (kind, (*shape, size))}
    if kind is np.int8:
        arrays["representation_map_scales"] = (np.float32, shape)
    if made_by["classify"]:
        arrays |= {"classification_map": (np.uint8, shape), "confidence": (np.float32, shape)}
    return arrays


def map_tile(tile, module, checkpoint, config, runtime, output_dir, made_by, stop):
    """Write all files of one tile; infer.json, which says that it is done, comes last.

    Goes on where a run that was killed had come to. Raises Stopped by a signal.
    """
    classes = checkpoint["classes"] if made_by["classify"] else {}
    legend = class_legend(classes, classes)
    codes = np.array([int(code) for code in classes], np.uint8)  # in the order of the head
    size = (module.backbone if len(codes) else module).latent_dim
    height, width = shape = tile.shape[1:3]
    # the bytes of a map depend on how its pixels are put into batches
    batches = [runtime.device.type, runtime.block_pixels, runtime.batch_dates, runtime.pad_dates]
    room = 8 * height * width  # the pictures that follow are smaller
    if config["representation_tif"]:  # written twice, see maps/geotiff.py
        room += 8 * size * height * width
    writer = MapWriter(
        output_dir,
        map_arrays(shape, made_by, size),
        made_by | {"batches": batches},
        room=room,
    )
    if writer.rows:
        print(f"{output_dir}: goes on behind row {writer.rows} of {height}")
    else:
        writer.fill("valid_count", 0, tile.clear_counts())
    notice_empty(tile, find_min_valid(config, checkpoint))
    bar = tqdm(
        total=height, initial=writer.rows, desc=tile.name, unit="row", disable=not runtime.is_main
    )
    blocks = map_blocks(tile, module, checkpoint, config, runtime, codes, first_row=writer.rows)
    for rows, maps in runtime.read_ahead(blocks):  # a GPU computes the next while one is written
        if config["representation_format"] == "int8":
            values, scales = quantise(maps["representation_map"])
            maps |= {"representation_map": values, "representation_map_scales": scales}
        writer.write(rows, maps)
        bar.update(rows[1] - bar.n)
        raise_if_stopped(stop, f"{tile.name} behind row {rows[1]} of {height}")
    bar.close()
    finish(writer, tile, legend, output_dir, made_by)


def raise_if_stopped(stop, where):
    if stop.is_set():
        raise Stopped(f"stopped {where}; the same command goes on", stop.status)


def finish(writer, tile, legend, output_dir, made_by):
    """Put the new maps in the place of earlier ones.

    infer.json goes first and comes last, so whenever a kill comes, no mix of both looks finished.
    """
    (output_dir / "infer.json").unlink(missing_ok=True)
    published = [f"{name}.npy" for name in writer.arrays if writer.is_published(name)]
    remove_products(output_dir, kept=published)
    writer.free_room()
    write_pictures(writer, tile, legend, output_dir)
    if made_by.get("representation_tif"):
        is_int8 = made_by["representation_format"] == "int8"
        write_representation_tif(output_dir, writer.read, is_int8, tile.info)
    writer.publish()
    made_by = made_by | {"tile": tile.title, "classes": legend}
    write_json(output_dir / "infer.json", made_by)
    remove_parts(output_dir)


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


def main(config):
    """Map the tiles. Returns the folders of those that are done now."""
    config = check(
        config,
        classify=("auto", "true", "false"),
        representation_format=FORMATS,
        min_valid=(0, 65535),
    )
    runtime = start_runtime(config["device"])
    stop = stop_on_signals()

    # checkpoint
    kinds = ("classifier",) if config["classify"] == "true" else ("pretrained", "classifier")
    checkpoint = load_checkpoint(config["checkpoint_path"], kinds)
    module = load_module(config, checkpoint).to(runtime.device)
    made_by = {key: config[key] for key in ("representation_format", "min_valid", "dates", "draws")}
    made_by["classify"] = isinstance(module, Classifier)
    if config["representation_tif"]:  # maps that were made with it are done without it too
        made_by["representation_tif"] = True
    made_by["checkpoint_sha256"] = file_hash(config["checkpoint_path"])

    # tiles, divided among the processes: all are looked at before the first is mapped
    bad, jobs = [], []
    for tile, output_dir in open_tiles(config, checkpoint, bad)[runtime.rank :: runtime.world_size]:
        raise_if_stopped(stop, f"before {tile.name}")
        done = is_done(output_dir, made_by | describe_source(tile), config["overwrite"])
        with skipping(config, bad):
            if not done:
                tile.clear_counts()  # looks at all masks, and keeps the counts in the cache
            jobs.append((tile, output_dir))
    if bad and not jobs and runtime.world_size == 1:
        raise InputError(f"{config['tile_path']}: found {len(bad)} bad tiles and no good one")
    for _, output_dir in jobs:
        refuse_training_folder(make_output_dir(output_dir))

    # maps
    with ExitStack() as stack:
        if jobs:
            log = start_log(config, "infer", jobs[0][1], runtime)
            stack.callback(log.finish)  # at a signal too
        for number, (tile, output_dir) in enumerate(jobs):
            raise_if_stopped(stop, f"before {tile.name}")
            with lock_folder(output_dir):
                source = made_by | describe_source(tile)
                if is_done(output_dir, source, config["overwrite"]):
                    remove_parts(output_dir)
                    print(f"{output_dir}: done already (overwrite=true maps it again)")
                    continue
                map_tile(tile, module, checkpoint, config, runtime, output_dir, source, stop)
            log_map(log, number, tile, output_dir, made_by["classify"])
    if bad:
        print(f"{len(bad)} bad tiles skipped")
    return [output_dir for _, output_dir in jobs]


def log_map(log, number, tile, output_dir, classify):
    """Say and log what lies in the folder of a tile that was mapped."""
    valid = np.load(output_dir / "valid_count.npy", mmap_mode="r", allow_pickle=False)
    log.line({"step": number, "median_valid_count": float(np.median(valid))})
    print(f"{output_dir}: {', '.join(sorted(path.name for path in output_dir.glob('*.*')))}")
    if classify:
        log.images({f"classification_map/{tile.name}": output_dir / "classification_map.png"})


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
