"""Map tiles: representations, and land cover or a quantity from a fine-tuned checkpoint.

    python infer.py checkpoint_path=checkpoints/simulated/best.pt \\
        tile_path=data/simulated/processed/MGRS-SIM1
    python infer.py checkpoint_path=checkpoints/landcover/best.pt \\
        tile_path=data/simulated/processed output_dir=outputs
    torchrun --nproc-per-node=2 infer.py ...      # the tiles of a folder, divided

Reads and writes blocks of rows, so memory does not grow with the tile. Deterministic: same
checkpoint and tile, same map. Tiles already done are skipped unless overwrite=true; a tile that was
stopped or killed is resumed after the last block on the disk.
"""

import os
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from running.config import ALL_YEAR, check, name_season
from running.device import read_ahead, start_runtime
from running.errors import InputError, Stopped, notice, what_is_there
from running.files import (
    describe_files,
    lock_folder,
    make_output_dir,
    remove_parts,
    write_json,
)
from running.log import ProgressBar, refuse_training_folder, start_log
from running.script import run_script, stop_on_signals
from running.tile_json import TARGET, describe_target, find_years, is_georeferenced

import numpy as np

from evaluation.applicability import measure_dissimilarity, share_outside
from evaluation.seen_pixels import read_splits
from maps.doubts import notice_doubts
from maps.geotiff import write_geotiff, write_representation_tif
from maps.land_cover import class_legend
from maps.pictures import plot_class_map, plot_values
from maps.products import empty_maps, made_products, map_arrays, remove_products
from maps.reader import read_provenance
from maps.stac import write_item
from maps.writer import MapWriter, quantise, refuse_shared_folders
from tiles import OBSERVATIONS, Tile, checkpoint_bands, notice_unnamed
from trained.encoder import Encoder
from utils import extract_representations, notice_few_clear

run_config = {
    # input
    "checkpoint_path": "",  # of train.py, train_classification.py or train_regression.py
    "tile_path": "data/simulated/processed/MGRS-SIM1",  # a tile, or a folder of tiles MGRS-*
    "output_dir": "",  # empty: outputs/<tile>; of a folder of tiles <output_dir>/<tile>
    "overwrite": False,  # map tiles again that are done
    "skip_bad_tiles": False,  # print what is wrong with a tile, and map the others
    # maps
    "classify": "auto",  # auto: where the checkpoint is fine-tuned; true: refuse others; false
    "dimensions": 0,  # of the representations, the first ones; 0: all
    "representation_format": "float32",  # float32, float16, or int8 with a scale for each pixel
    "format": "png",  # of the pictures: png, pdf or svg
    "representation_tif": False,  # write it as a cloud-optimised GeoTIFF too
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in training
    "start": "",  # day of year or date (90, 04-01) of the first observation that is read, and ..
    "end": "",  # .. of the last; before start: across New Year; empty: as in training
    "dates": 24,  # clear dates of a pixel that are read, at most, evenly spaced; 0: all
    "draws": 0,  # above 0: the mean of N even samples of sample_size dates, from all clear dates
    # running
    "device": "auto",  # auto, cpu or cuda
    "precision": "auto",  # of products: float32, bfloat16, or auto: bfloat16 where it is fast
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


# ---- what is to be mapped ------------------------------------------------------------------------


def find_tiles(tile_path):
    """Folders of the tiles at a path. Raises InputError where there is none."""
    path = Path(tile_path)
    if (path / "bands.npy").exists() or path.name.startswith("MGRS-"):
        return [path]
    # a link that leads nowhere is a tile too: one that cannot be opened
    folders = sorted(f for f in path.glob("MGRS-*") if f.is_dir() or f.is_symlink())
    if not folders:
        wanted = f"wanted one or a folder of MGRS-*{what_is_there(path)}"
        raise InputError(f"{path}: found no tile, {wanted}")
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
    refuse_shared_folders(folders, outputs)
    return outputs


@contextmanager
def skipping(config, bad, say=print):
    """With skip_bad_tiles=true, print what is wrong with a tile instead of raising it.

    Only for code that reads tiles: no other mistake of the user may be skipped. bad: receives the
    errors.
    """
    try:
        yield
    except (InputError, OSError) as error:
        if not config["skip_bad_tiles"]:
            raise
        bad.append(error)
        say(f"skipped: {error}")


def open_tiles(config, model, bad):
    """All tiles that can be opened, and their output folders: [(tile, folder)].

    Raises InputError where there is none.
    """
    folders, jobs = find_tiles(config["tile_path"]), []
    bands = checkpoint_bands(model.checkpoint, config["checkpoint_path"])
    for folder, output_dir in zip(folders, output_folders(config, folders), strict=True):
        with skipping(config, bad, notice):
            tile = Tile(folder)
            tile.choose_bands(bands)
            tile.choose_dates(*model.season)
            if config["representation_tif"] and not is_georeferenced(tile.info):
                raise InputError(
                    f"{folder / 'tile.json'}: found no crs and transform, wanted both for "
                    "representation_tif=true"
                )
            jobs.append((tile, output_dir))
    if not jobs:
        raise InputError(f"{config['tile_path']}: found {len(bad)} bad tiles and no good one")
    tiles = [tile for tile, _ in jobs]
    notice_unnamed(tiles, bands)
    notice_doubts(tiles, model)
    if (model.classes or model.target) and not model.applicability:
        notice(
            f"{config['checkpoint_path']}: found no representations of its training labels (of an "
            "older version), so there is no applicability.npy; train_*.py again writes them"
        )
    return jobs


def describe_run(config, model):
    """What all maps of a call are made with, for infer.json."""
    keys = ("representation_format", "min_valid", "dates", "draws", "dimensions")
    made_by = {key: config[key] for key in keys}
    made_by |= {"season": name_season(model.season), "classify": bool(model.classes)}
    # maps that were made with these are done without them too
    made_by |= {"estimate": True} if model.target else {}
    made_by |= {"applicability": True} if model.applicability else {}
    made_by |= {"representation_tif": True} if config["representation_tif"] else {}
    # infer.json has the precision in any case; "auto" takes a map of either as done
    made_by |= {"precision": model.precision} if config["precision"] != "auto" else {}
    return made_by | {"checkpoint_sha256": model.sha256}


def describe_source(tile):
    """Which tile is mapped, for infer.json: its real path, its place, sizes and times of files."""
    path = os.path.realpath(tile.path)
    place = {key: tile.info[key] for key in ("crs", "transform") if key in tile.info}
    return {"tile_path": path, "tile_files": describe_files(path, OBSERVATIONS), **place}


def is_done(output_dir, made_by, overwrite):
    """Whether a tile was mapped already; InputError where it was another tile or checkpoint."""
    file = output_dir / "infer.json"
    before = {} if overwrite else read_provenance(file)
    if not before:
        return False
    # which older maps do not record
    older = {"dimensions": 0, "season": name_season(ALL_YEAR), "precision": "float32"}
    before = older | before
    differ = [
        key if isinstance(value, dict) else f"{key} (was {before.get(key, 'not recorded')})"
        for key, value in made_by.items()
        if before.get(key) != value
    ]
    if differ:
        raise InputError(
            f"{file}: was made with another {', '.join(differ)}; wanted another output_dir or "
            "overwrite=true"
        )
    return all((output_dir / f"{one.name}.npy").exists() for one in made_products(made_by))


# ---- maps ----------------------------------------------------------------------------------------


def map_blocks(tile, model, config, runtime, made_by, first_row):
    """Yield (rows, maps) of a tile from north to south, each row from `first_row` on once.

    rows: (first, last + 1). maps: {name: array (rows, W), or (rows, W, D) of representations} of
    the rows of maps/products.py that are made.
    """
    width, counts = tile.shape[2], tile.clear_counts()
    blocks = extract_representations(
        model.module,
        tile,
        model.checkpoint["mean"],
        model.checkpoint["std"],
        model.min_valid,
        runtime,
        draws=config["draws"],
        dates=0 if config["draws"] else config["dates"],
        first_row=first_row,
    )
    for (first, last), row, column, y, logits in blocks:
        maps = empty_maps((last - first, width), made_by, model.size)
        row = row - first
        maps["valid_count"][:] = counts[first:last]
        maps["representation_map"][row, column] = y[:, : model.size].numpy()
        if model.classes:
            probability, predicted = model.decode(logits).max(1)
            maps["classification_map"][row, column] = model.codes[predicted.numpy()]
            maps["confidence"][row, column] = probability.numpy()
        if model.target:
            maps["regression_map"][row, column] = model.decode(logits).numpy()
        if model.applicability:
            far = measure_dissimilarity(y, model.applicability, runtime)
            maps["applicability"][row, column] = far.numpy()
        if made_by["representation_format"] == "int8":
            values, scales = quantise(maps["representation_map"])
            maps |= {"representation_map": values, "representation_map_scales": scales}
        yield (first, last), maps


def map_tile(tile, output_dir, model, config, runtime, made_by, stop):
    """Write all files of one tile; infer.json, which marks it as done, comes last.

    Resumes a run that was stopped or killed. Raises Stopped by a signal, and InputError where the
    tile changes while it is read.
    """
    height, width = shape = tile.shape[1:3]
    made_by = made_by | describe_source(tile)
    # the bytes of a map depend on how its pixels are put into batches
    batches = [runtime.device.type, runtime.block_pixels, runtime.batch_dates, runtime.pad_dates]
    batches += [model.precision]
    made_from = made_by | {"batches": batches, "files": tile.watch.before}
    # GeoTIFFs are written twice, see maps/geotiff.py; other pictures are smaller
    room = (16 + 8 * model.size * config["representation_tif"]) * height * width
    writer = MapWriter(output_dir, map_arrays(shape, made_by, model.size), made_from, room=room)
    if writer.rows:
        print(f"{output_dir}: resumes after row {writer.rows} of {height}")
    notice_few_clear([tile], model.min_valid)
    bar = ProgressBar(
        total=height, initial=writer.rows, desc=tile.name, unit="row", disable=not runtime.is_main
    )
    blocks = map_blocks(tile, model, config, runtime, made_by, first_row=writer.rows)
    with bar, tile.watch:
        for rows, maps in read_ahead(blocks):  # the next block is computed while one is written
            writer.write(rows, maps)
            tile.watch.check()
            bar.update(rows[1] - bar.n)
            raise_if_stopped(stop, f"{tile.name} after row {rows[1]} of {height}")
    finish(writer, tile, model, output_dir, made_by, config["format"])


def finish_earlier(tile, output_dir, model, config, made_by):
    """Whether a tile was mapped already; its pictures of another format are drawn then."""
    source = made_by | describe_source(tile)
    if not is_done(output_dir, source, config["overwrite"]):
        return False
    remove_parts(output_dir)
    read = partial(read_done, output_dir)
    new = write_pictures(read, tile, model, output_dir, source, config["format"])
    drawn = f"; drawn: {', '.join(new)}" if new else ""
    print(f"{output_dir}: done already (overwrite=true maps it again){drawn}")
    return True


def raise_if_stopped(stop, where):
    if stop.is_set():
        raise Stopped(f"stopped {where}; the same command resumes", stop.status)


def finish(writer, tile, model, output_dir, made_by, kind):
    """Replace earlier maps by the new ones; kind: of their pictures.

    infer.json is removed first and written last, so that a kill never leaves a mix of both that
    looks finished.
    """
    (output_dir / "infer.json").unlink(missing_ok=True)
    published = [f"{name}.npy" for name in writer.arrays if writer.is_published(name)]
    remove_products(output_dir, kept=published)
    writer.free_room()
    legend = class_legend(model.classes, model.classes)
    target = {key: model.target[key] for key in TARGET if model.target}
    write_pictures(writer.read, tile, model, output_dir, made_by, kind)
    write_geotiffs(writer, tile, legend, target, output_dir, made_by)
    writer.publish()
    if is_georeferenced(tile.info):
        write_item(output_dir, tile, made_by, legend)
    about = {"tile": tile.title, "years": find_years(tile.info), "classes": legend}
    about |= {"precision": model.precision}
    about |= {"target": target} if target else {}
    seen, config = read_splits(model.checkpoint).get(tile.path.name, []), model.checkpoint["config"]
    if (legend or target) and (tile.has_grid or seen):  # then it is known what training did not see
        about["split"] = {"block_size": config["block_size"], "seed": config["split_seed"]}
        about["split"]["seen"] = seen
    if model.applicability:
        about["applicability_threshold"] = model.applicability["threshold"]
    write_json(output_dir / "infer.json", made_by | about)
    remove_parts(output_dir)


def write_pictures(read, tile, model, output_dir, made_by, kind):
    """Draw those pictures of the maps that are not there yet; returns their file names.

    read: gives a map by its name; kind: png, pdf or svg.
    """
    title, days = tile.title, made_by["season"]
    title += f", days {days}" if days != name_season(ALL_YEAR) else ""
    plots = {}
    if model.classes:
        legend = class_legend(model.classes, model.classes)
        plots = {"classification_map": partial(plot_class_map, legend=legend)}
        plots |= {"confidence": partial(plot_values, label="probability of the mapped class")}
    if model.target:
        plots["regression_map"] = partial(plot_values, label=describe_target(model.target))
    paths = {name: output_dir / f"{name}.{kind}" for name in plots}
    missing = [name for name, path in paths.items() if not path.exists()]
    for name in missing:
        plots[name](read(name), path=paths[name], title=title, info=tile.info)
    return [paths[name].name for name in missing]


def write_geotiffs(writer, tile, legend, target, output_dir, made_by):
    """GeoTIFFs of the maps, where the tile is georeferenced."""
    for one in made_products(made_by) if is_georeferenced(tile.info) else ():
        if one.geotiff:
            path, values = output_dir / f"{one.name}.tif", writer.read(one.name)
            names = legend if one.name == "classification_map" else None
            about = target if one.name == "regression_map" else None
            write_geotiff(path, values, tile.info, one.no_data, names, about=about)
    if made_by.get("representation_tif"):
        is_int8 = made_by["representation_format"] == "int8"
        write_representation_tif(output_dir, writer.read, is_int8, tile.info)


def main(config):
    """Map the tiles. Returns the folders of those that are done now."""
    config = check(config)
    runtime = start_runtime(config["device"], config["precision"])
    stop = stop_on_signals()

    # checkpoint
    keys = ("checkpoint_path", "device", "classify", "min_valid", "dimensions", "start", "end")
    model = Encoder.load(*(config[key] for key in (*keys, "precision")))
    made_by = describe_run(config, model)

    # tiles, divided among the processes: all are looked at before the first is mapped
    bad, jobs = [], []
    for tile, output_dir in open_tiles(config, model, bad)[runtime.rank :: runtime.world_size]:
        raise_if_stopped(stop, f"before {tile.name}")
        done = is_done(output_dir, made_by | describe_source(tile), config["overwrite"])
        with skipping(config, bad):
            if not done:
                tile.clear_counts()  # reads all masks, and keeps the counts in the cache
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
                if finish_earlier(tile, output_dir, model, config, made_by):
                    continue
                map_tile(tile, output_dir, model, config, runtime, made_by, stop)
            log_map(log, number, tile, output_dir, model)
    if bad:
        print(f"{len(bad)} bad tiles skipped")
    return [output_dir for _, output_dir in jobs]


def read_done(folder, name):
    """A finished map (H, W) as a memory map."""
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def log_map(log, number, tile, output_dir, model):
    """Print and log the files in the folder of a tile that was mapped."""
    valid = read_done(output_dir, "valid_count")
    line = {"step": number, "median_valid_count": float(np.median(valid))}
    if known := model.applicability:
        far = read_done(output_dir, "applicability")
        line["share_outside"] = share_outside(far, known["threshold"])
        print(
            f"{tile.name}: {line['share_outside']:.1%} of the pixels lie outside of the area "
            f"of applicability, unlike any training label: applicability.npy is above "
            f"{known['threshold']:.3g} there"
        )
    log.line(line)
    print(f"{output_dir}: {', '.join(sorted(path.name for path in output_dir.glob('*.*')))}")
    names = "classification_map", "confidence", "regression_map"
    pictures = [output_dir / f"{name}.png" for name in names]
    log.images({f"{path.stem}/{tile.name}": path for path in pictures if path.exists()})


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
