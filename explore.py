"""Make one HTML page in which to explore representation maps: no server, nothing fetched.

    python explore.py representation_path=outputs/MGRS-SIM1/representation_map.npy
    python explore.py output_dir=outputs max_mb=100 \\
        representation_path=outputs/MGRS-SIM1/representation_map.npy,outputs/MGRS-SIM2/representation_map.npy

Copy explore.html wherever you like and open it in a browser: click a pixel to see its year and the
pixels like it, label a few pixels, and a classifier maps all others at once. The page also holds
what infer.py wrote beside a map (classes, confidence, clear observations) and, where the tile is
found, its labels, median colour and series.

Shapes: H x W pixels of the page's grid, T dates, B bands, D dimensions of a representation, K of
them kept by the PCA.
"""

from contextlib import ExitStack
from pathlib import Path

from running.config import check
from running.device import start_runtime
from running.errors import InputError, notice
from running.files import make_output_dir
from running.log import refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script
from running.tile_json import merge_classes

import numpy as np
from sklearn.decomposition import PCA

from explorer.page import Blobs, write_page
from explorer.scene import (
    Scene,
    describe_place,
    distinguish_titles,
    embed,
    legends_of,
    map_layers,
    median_layer,
    read_series,
    same_grid,
)
from maps.false_color import find_basis, sample_representations
from maps.reader import check_together

run_config = {
    # input
    "representation_path": "",  # representation_map.npy of infer.py; several divided by commas
    "tile_path": "",  # the tiles of the maps, divided by commas; empty: where infer.py found them
    "basis_path": "",  # .npz: used where it exists, else fitted and saved there; empty: fitted
    # page
    "title": "",  # empty: the names of the tiles
    "dimensions": 32,  # principal components that the page keeps, at most ..
    "variance": 0.999,  # .. and fewer where they hold this share of the variance
    "bands": "",  # of the series, divided by commas; empty: B02 B03 B04 B08 B11 B12, if there
    "max_mb": 200.0,  # megabytes (10^6 bytes) of the page, at most; series take what maps leave
    "stride": 0,  # N: every N-th row and column of a map; 0: the smallest that max_mb allows
    # output
    "output_dir": "",  # receives explore.html; empty: beside the first map
    # running
    "sample_pixels": 50_000,  # valid pixels that PCA and false colour are fitted to
    "seed": 0,  # of the sample
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}

LAYER_BYTES = 16  # a pixel has at most, beside its representation: colours, classes, counts, scale


# ---- maps and tiles ------------------------------------------------------------------------------


def open_scenes(config):
    """The maps of the config and their tiles. Raises InputError for none or unequal ones."""
    paths = [Path(path) for path in config["representation_path"].split(",") if path]
    if not paths:
        raise InputError("representation_path: found none, wanted a map of infer.py")
    tiles = config["tile_path"].split(",") if config["tile_path"] else [""] * len(paths)
    if len(tiles) != len(paths):
        raise InputError(f"tile_path: found {len(tiles)} tiles, wanted {len(paths)}, one a map")
    scenes = [Scene(path, tile) for path, tile in zip(paths, tiles, strict=True)]
    check_together(scenes)
    notice_other_names(scenes)
    distinguish_titles(scenes)
    return scenes


def notice_other_names(scenes):
    """Print where one code has different names in the files of the maps and their tiles."""
    sources = [(scene.path.with_name("infer.json"), scene.info) for scene in scenes]
    sources += [(scene.tile.path / "tile.json", scene.tile.info) for scene in scenes if scene.tile]
    names = [
        (path, {"classes": {code: {"name": one["name"]} for code, one in classes.items()}})
        for path, classes in ((path, info.get("classes", {})) for path, info in sources)
    ]
    try:
        merge_classes(names)
    except InputError as error:
        notice(f"{error}; the page shows each map with its own names, and joins labels by name")


def choose_stride(scenes, config):
    """Set the scenes' stride. Returns the bytes of the page that the maps leave for the series.

    Raises InputError where the page would be larger than `max_mb` with `stride` of the config.
    """
    allowed = config["max_mb"] * 1e6 * 3 / 4 - 2e6  # base64; page, numbers and names
    depth = min(config["dimensions"], scenes[0].shape[2]) + LAYER_BYTES

    def needed(stride):
        for scene in scenes:
            scene.stride = stride
        return sum(int(np.prod(scene.grid)) for scene in scenes) * depth

    fits, largest = 1, max(max(scene.shape[:2]) for scene in scenes)
    while needed(fits) > allowed and fits < largest:
        fits += 1
    stride = config["stride"] or fits
    if needed(stride) > allowed:
        larger = f", or stride={fits}" if needed(fits) <= allowed else ""
        raise InputError(
            f"max_mb={config['max_mb']:g}: found maps that need {needed(stride) / 0.75e6 + 3:.0f} "
            f"MB at stride={stride}, wanted that much{larger}"
        )
    if stride > 1:
        print(f"thinned to one of {stride} rows and columns (max_mb={config['max_mb']:g})")
    return allowed - needed(stride)


# ---- the representation --------------------------------------------------------------------------


def fit_components(sample, config):
    """Principal components that hold `variance`, but no more than `dimensions` of them.

    sample: (N, D). Returns mean (D,), components (K, D) float32, and facts, from which the page
    computes cosines of the representations themselves: offset (K,), the mean along the components;
    rest, the squared length of the part of the mean that is orthogonal to them; deviation, the root
    mean square of all D dimensions, by which the classifier divides.
    """
    pca = PCA(random_state=0).fit(sample.astype(np.float64))
    held = np.nan_to_num(np.cumsum(pca.explained_variance_ratio_), nan=1.0)  # all pixels equal
    kept = min(config["dimensions"], 1 + int(np.searchsorted(held, config["variance"])), len(held))
    components = pca.components_[:kept]
    offset = components @ pca.mean_
    facts = {
        "dimensions": kept,
        "of": sample.shape[1],
        "variance": float(held[kept - 1]),
        "offset": offset.tolist(),
        "rest": max(0.0, float(pca.mean_ @ pca.mean_ - offset @ offset)),
        "deviation": float(np.sqrt(pca.explained_variance_.sum() / sample.shape[1])) or 1.0,
    }
    return pca.mean_.astype(np.float32), components.astype(np.float32), facts


# ---- the page ------------------------------------------------------------------------------------


def pack_scene(scene, projection, basis, config, blobs, allowed):
    """Add the arrays of a scene to the blobs. Returns its facts for the page."""
    values, scales, color = embed(scene, *projection, basis)
    layers, quantity = map_layers(scene)
    facts = {
        "name": scene.name,
        "title": scene.title,
        "height": scene.grid[0],
        "width": scene.grid[1],
        "fullHeight": scene.shape[0],
        "fullWidth": scene.shape[1],
        "stride": scene.stride,
        "place": describe_place(scene.tile.info if scene.tile else scene.info, scene.shape[:2]),
        **legends_of(scene, layers),
        **({"quantity": quantity} if quantity else {}),
        "tileInfo": scene.tile.info if scene.tile else {},
        "embedding": blobs.add(values),
        "scales": blobs.add(scales),
    }
    layers = {"falseColor": color} | layers
    if scene.tile and (median := median_layer(scene)) is not None:
        layers["median"] = median
    facts["layers"] = {name: blobs.add(array) for name, array in layers.items()}
    if scene.tile and (series := read_series(scene, config, allowed)):
        about, values, clear = series
        facts["series"] = about | {"values": blobs.add(values), "clear": blobs.add(clear)}
    return facts


def main(config):
    """Write the page. Returns its path."""
    config = check(config, dimensions=(1, 65536))
    refuse_torchrun()

    # maps
    scenes = open_scenes(config)
    folder = config["output_dir"] or scenes[0].path.parent
    refuse_training_folder(folder)
    allowed = choose_stride(scenes, config)
    blobs, each = Blobs(), allowed / len(scenes)
    with ExitStack() as stack:  # nothing of what is packed may change meanwhile
        for watch in (watch for scene in scenes for watch in scene.watches):
            stack.enter_context(watch)
        sample = sample_representations(scenes, config, scenes[0].stride)
        basis = find_basis(scenes, config, sample)
        *projection, embedding = fit_components(sample, config)
        output_dir = make_output_dir(folder)
        pixels = [pack_scene(s, projection, basis, config, blobs, each) for s in scenes]

    for about, scene in zip(pixels, scenes, strict=True):  # number of the first of the same grid
        about["grid"] = [same_grid(scene, one) or one is scene for one in scenes].index(True)

    # page
    log = start_log(config, "explore", output_dir, start_runtime("cpu"))
    title = config["title"] or ", ".join(scene.title for scene in scenes)
    facts = {"format": 1, "title": title, "embedding": embedding, "scenes": pixels}
    facts["hash"] = blobs.digest.hexdigest()[:32]
    path = output_dir / "explore.html"
    write_page(path, facts, blobs)

    # wrap up
    megabytes = path.stat().st_size / 1e6
    log.line({"step": 0, "megabytes": megabytes, "variance": embedding["variance"]})
    log.finish()
    print(
        f"{path}: {megabytes:.1f} MB, {embedding['dimensions']} of {embedding['of']} dimensions "
        f"with {100 * embedding['variance']:.1f} % of the variance; open it in a browser"
    )
    return path


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
