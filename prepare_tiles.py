"""Make tiles from real Sentinel-2: bands, masks, days, statistics, labels or a quantity, splits.

    python prepare_tiles.py mgrs_tile=33UUP year=2021 bbox=12.3,48.6,12.5,48.7 \\
        dataset_name=bavaria_2021 labels=worldcover splits=blocks
    python prepare_tiles.py local_path=scenes/33UUP year=2021 offset=applied dataset_name=mine
    python prepare_tiles.py statistics_only=true dataset_name=theirs labels=fields.gpkg \\
        class_column=crop splits=polygons

The second reads GeoTIFFs (or .SAFE folders); offset=applied is for values that are reflectance x
10000 already: nothing is subtracted. docs/prepare.md has more about one's own files.
Needs `pip install -r requirements-prepare.txt`. A stopped run resumes where it ended; a finished
tile is not made again.
"""

from running.config import check
from running.errors import InputError
from running.files import make_output_dir
from running.script import run_script
from running.tile_json import read_tile_json

import numpy as np

from preparation.band_statistics import check_reflectance, complete_tiles
from preparation.builder import build_tile, remove_begun
from preparation.items import find_items
from preparation.labels import forget_labels, open_labels, write_labels
from preparation.pixels import set_up_reading
from preparation.place import parse_tile
from preparation.plan import check_same, choose_items, make_plans, parse_request
from preparation.quick_look import plot_quick_look
from preparation.targets import open_targets, write_targets
from tiles import tiles_folder

run_config = {
    # where Sentinel-2 is: a STAC API, unless one of the two paths is given
    "stac_url": "https://earth-search.aws.element84.com/v1",  # or another catalogue's
    "collection": "sentinel-2-l2a",  # of level 2A, in that catalogue
    "items_path": "",  # a saved ItemCollection (JSON) in place of a search
    "local_path": "",  # a folder of GeoTIFFs (one a date, or one a date and band), or of .SAFE
    "local_bands": "",  # names of a GeoTIFF's bands (B02,..,SCL or MASK); empty: as it declares
    "local_scale": 0.0,  # of the GeoTIFFs, 10000 for reflectance of 0 to 1; 0: as their tags say
    "local_mask": "auto",  # SCL, MASK; auto: one of them; none: every pixel with data is clear
    # which part of it
    "mgrs_tile": "",  # like 33UUP; empty: the tiles that cover bbox
    "bbox": "",  # west,south,east,north in degrees; empty: the whole of mgrs_tile
    "year": "2021",  # or the first of any 12 months: 2020-10
    "start": "",  # day of year or date (90, 04-01) of the first scene within them, and ..
    "end": "",  # .. of the last; before start: across New Year; empty: all 12 months
    "max_cloud_cover": 80.0,  # per cent of a scene, as the catalogue reports it
    "skip_items": "",  # ids to leave out, with commas between
    # what to make of it
    "bands": "tessera",  # tessera (10), ancestor (11, with B09), or a list: B02,B03,B04
    "resolution": 0.0,  # metres of a pixel; 0: as the 10 m bands
    "stride": 1,  # N keeps every N-th row and column
    "resampling": "nearest",  # of bands with other pixels: nearest, bilinear, cubic, average
    "clear_scl": "4,5,6,7,10,11",  # scene classes that count as clear
    "offset": "auto",  # to subtract: as each item declares; applied: nothing; raw: the 1000 of ESA
    # labels and splits, also of finished tiles
    "labels": "",  # worldcover, a raster, a file of polygons or points, or a table with lon and lat
    "labels_layer": "",  # of a file with several layers; empty: the only one
    "worldcover_url": "https://esa-worldcover.s3.eu-central-1.amazonaws.com/v200/2021/map/"
    "ESA_WorldCover_10m_2021_v200_{place}_Map.tif",  # {place}: N48E012; 2020: v100/2020, 2020_v100
    "class_column": "",  # of a vector file: names or codes 1 to 255
    "classes_path": "",  # JSON {"10": {"name": .., "color": ..}}; empty: made from the labels
    "targets": "",  # a quantity: a raster, or a file or table as above; means within a pixel
    "targets_layer": "",  # of a file with several layers; empty: the only one
    "target_column": "",  # of a file that is no raster: numbers
    "target_name": "",  # like biomass; empty: the column, or the name of the raster
    "target_unit": "",  # like t/ha
    "splits": "",  # polygons, blocks, or a column of train, validation, test; empty: none
    "split_block": 1600.0,  # metres: width of the square blocks of one split, in EPSG:6933
    "seed": 0,  # of the random splits
    # where to
    "base_path": ".",  # tiles are written to <base_path>/data/<dataset_name>/processed/MGRS-*
    "dataset_name": "sentinel2",  # of a place and year, say
    "overwrite": False,  # make tiles again that are finished or begun
    # running
    "threads": 4,  # dates that are fetched at a time; each takes about 0.3 GB of memory
    "retries": 5,  # of a read or a search after an error, 1, 2, 4 .. seconds apart
    "skip_bad_items": False,  # leave out an item that cannot be used; else the run ends there
    "statistics_only": False,  # fetch nothing: add what the tiles of dataset_name lack
}

FEW_DATES = 10  # clear observations; embeddings get much worse below 10 to 20 (arXiv 2506.20380)


def check_config(config):
    """(config, checked and frozen; Request). InputError for what is wrong, before any work."""
    config = check(config | {"mgrs_tile": parse_tile(config["mgrs_tile"])}, stride=(1, 1000))
    request = parse_request(config)
    if config["local_path"] and config["items_path"]:
        raise InputError("local_path and items_path: found both, wanted one of them")
    for key in ("local_bands", "local_scale", "local_mask"):
        if config[key] != run_config[key] and not config["local_path"]:
            raise InputError(f"{key}={config[key]}: is of local files, wanted local_path=.. too")
    place = config["mgrs_tile"] or config["bbox"] or config["local_path"] or config["items_path"]
    if not place and not config["statistics_only"]:
        raise InputError("mgrs_tile: found none, wanted a tile like 33UUP, or bbox=..")
    return config, request


def fetch_tiles(processed, request):
    """Make the tiles that are not finished. Returns the folders of all of them."""
    set_up_reading()
    plans = make_plans(choose_items(find_items(request), request), request)
    for plan in plans:
        folder = processed / plan.name
        if request.overwrite:
            remove_begun(folder)
        if folder.exists() and not request.overwrite:
            before = read_tile_json(folder / "tile.json").get("made_with", {})
            check_same(folder, before, request.made_with)
            (folder / "progress.json").unlink(missing_ok=True)  # of a run that was killed
            print(f"{folder}: done already (overwrite=true makes it again)")
        else:
            build_tile(plan, folder)
            shape = " x ".join(map(str, plan.shape))
            print(f"{folder}: {shape} (dates, rows, columns, bands)")
    return [processed / plan.name for plan in plans]


def warn(folder):
    """Print what looks strange about a tile. Returns the warnings."""
    info = read_tile_json(folder / "tile.json")
    warnings = check_reflectance(info.get("counts", {}))
    masks = np.load(folder / "masks.npy", mmap_mode="r", allow_pickle=False)
    step = max(1, max(masks.shape[1:]) // 512)  # of a large tile, every step-th row and column
    clear = np.sum([mask[::step, ::step] for mask in masks], axis=0)
    if np.median(clear) < FEW_DATES:
        warnings.append(
            f"half of the pixels have {np.median(clear):.0f} clear dates or fewer, wanted "
            f"{FEW_DATES} to 20 or more: look at max_cloud_cover and the year"
        )
    for text in warnings:
        print(f"warning: {folder.name}: {text}")
    return warnings


def main(config):
    """Make the tiles, or add to those there are. Returns their folders."""
    config, request = check_config(config)
    labels, targets = open_labels(config), open_targets(config)

    # bands, masks, days and statistics
    processed = tiles_folder(config["base_path"], config["dataset_name"])
    if config["statistics_only"]:
        folders = complete_tiles(processed, config)
    else:
        make_output_dir(processed)
        folders = fetch_tiles(processed, request)

    # labels, splits and a look
    if labels:
        written = [write_labels(folder, labels, config) for folder in folders]
        if not any(written):
            raise InputError(f"labels={config['labels']}: found no label inside any tile")
        for folder, has_labels in zip(folders, written, strict=True):
            if not has_labels:
                forget_labels(folder)
    if targets and not any([write_targets(folder, targets, config) for folder in folders]):
        raise InputError(f"targets={config['targets']}: found no target inside any tile")
    for folder in folders:
        plot_quick_look(folder)
        warn(folder)
    return folders


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
