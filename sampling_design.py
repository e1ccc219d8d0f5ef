"""Draw the points to label, from which read_inference_map.py estimates accuracy and areas.

    python sampling_design.py map_path=outputs/MGRS-SIM1/classification_map.npy
    python sampling_design.py map_path=outputs count=300 distance=50 output_dir=outputs/sample
    python sampling_design.py map_path=outputs/MGRS-SIM1 design=doubtful

The map may be a .npy of infer.py, a GeoTIFF of classes, or a folder of tiles that were mapped. The
points go to points.gpkg (points.csv where the map has no CRS), whose column "reference" is to be
filled with class names or codes by someone who does not see the map. points.json keeps the design:
leave it beside the file. design=doubtful lists the labels of the tiles that are probably wrong
instead, from representation_map.npy, best of an encoder that was not trained on these labels.
"""

from pathlib import Path

from running.config import check
from running.device import start_runtime
from running.errors import InputError
from running.files import make_output_dir, write_json
from running.log import refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script
from running.tile_json import fold_name, is_georeferenced, merge_classes

import numpy as np

from evaluation.doubtful import (
    cross_validate,
    find_patches,
    outline,
    print_patches,
    read_labelled,
)
from evaluation.sampling import allocate, draw_points, find_sample_size
from maps.land_cover import class_legend, count_classes
from maps.reader import RepresentationMap, find_maps, open_class_maps
from preparation.points import LABEL, describe_maps, refuse_earlier, write_table

run_config = {
    # input
    "map_path": "outputs/MGRS-SIM1/classification_map.npy",  # or a GeoTIFF, or a folder of maps
    "labels_path": "",  # of design=doubtful; empty: labels.npy of the tile that infer.json names
    "output_dir": "",  # empty: the folder sample beside the map
    # design
    "design": "stratified",  # by class of the map; simple: at random; doubtful: labels to check
    "count": 0,  # points; 0: as many as standard_error needs; of doubtful: at most, 0: all
    "standard_error": 0.02,  # that is wanted of overall accuracy, 0.02: 4 % to either side
    "users_accuracy": "0.8",  # that is expected of each class; of some: Cropland=0.9,80=0.95,0.7
    "min_count": 50,  # points of each class of the map, at least, or all of its pixels
    "distance": 0.0,  # between two points at least, in metres; of a map without CRS in pixels
    "show_class": False,  # write the class of the map beside each point; better not
    "seed": 0,  # of the points: the same map and keys give the same points
    # running
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def read_accuracies(text, legend):
    """The expected user's accuracy of each class of the legend, (C,), from the key's text."""
    known = {fold_name(entry): code for code, entry in legend.items()}
    known |= {str(code): code for code in legend}
    given = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        code = known.get(fold_name({"name": name}))
        try:
            value = float(number)
        except ValueError:
            value = -1
        if not 0 < value < 1 or (name and code is None):
            raise InputError(
                f"users_accuracy={text}: found {part}, wanted a number between 0 and 1, or "
                f"CLASS=number of {', '.join(entry['name'] for entry in legend.values())}"
            )
        given[code] = value
    return np.array([given.get(code, given.get(None, 0.8)) for code in legend])


def plan_sample(config, legend, sizes):
    """Strata of the design, a list of dicts, from the legend and sizes (C,) of its classes."""
    users, weights = read_accuracies(config["users_accuracy"], legend), sizes / sizes.sum()
    names, codes = [entry["name"] for entry in legend.values()], [[code] for code in legend]
    if config["design"] == "simple":
        users, sizes = np.array([weights @ users]), np.array([sizes.sum()])
        names, codes = ["the whole map"], [list(legend)]
    count = config["count"] or find_sample_size(sizes, users, config["standard_error"])
    points = allocate(min(count, sizes.sum()), sizes, min(config["min_count"], count))
    columns = sizes, sizes / sizes.sum(), users, points
    rows = zip(names, codes, *(column.tolist() for column in columns), strict=True)
    keys = ("name", "codes", "pixels", "weight", "users_accuracy", "points")
    return [dict(zip(keys, row, strict=True)) for row in rows]


def print_plan(strata):
    """Print the sample of each stratum, and what it gives if the expected accuracies are right."""
    errors = []
    for one in strata:
        spread = one["users_accuracy"] * (1 - one["users_accuracy"])
        errors.append(np.sqrt(spread / max(1, one["points"] - 1)))
        print(
            f"{one['name']:28.28s} {one['weight']:6.1%} of the map, {one['points']:5d} points: "
            f"user's accuracy ± {196 * errors[-1]:.1f}%"
        )
    weights = np.array([one["weight"] for one in strata])
    error = np.sqrt(np.sum((weights * errors) ** 2))
    print(
        f"{sum(one['points'] for one in strata)} points: overall accuracy ± {196 * error:.1f}% "
        f"(standard error {error:.4f}), if user's accuracies are as expected"
    )


def write_sample(config, maps, legend, strata, drawn, output_dir):
    """Write the points and the JSON of their design. Returns the path of the points."""
    columns = {"id": np.arange(1, len(drawn) + 1), LABEL: np.full(len(drawn), "")}
    if config["show_class"]:
        codes = [maps[number].codes[row, column] for _, number, row, column in drawn]
        columns["map_class"] = np.array([legend[int(code)]["name"] for code in codes])
    keys = ("stratum", "map", "row", "column")
    points = [
        {"id": number} | dict(zip(keys, row, strict=True))
        for number, row in enumerate(drawn.tolist(), 1)
    ]
    kept = ("design", "seed", "distance", "standard_error", "users_accuracy")
    design = {key: config[key] for key in kept} | {"strata": strata}
    design["classes"] = {str(code): entry for code, entry in legend.items()}
    write_json(output_dir / "points.json", design | {"maps": describe_maps(maps), "points": points})
    return write_table(output_dir / "points", columns, maps, drawn[:, 1:])


def list_doubtful(folder, config, output_dir):
    """Write the labels that are probably wrong, as polygons of patches.

    Returns the path; None where no label is doubtful.
    """
    maps = [RepresentationMap(one) for one in find_maps(folder, "representation_map.npy")]
    pixels = read_labelled(maps, config["labels_path"], config["seed"])
    patches = find_patches(pixels, cross_validate(pixels, config["seed"]))
    if not len(patches.label):
        print(f"none of {len(pixels.labels)} labelled pixels is doubtful")
        return None
    count = min(config["count"] or len(patches.label), len(patches.label))
    names = {code: entry["name"] for code, entry in patches.legend.items()}
    columns = {
        "rank": np.arange(1, count + 1),
        "label": np.array([names[int(code)] for code in patches.label[:count]], str),
        "probably": np.array([names[int(code)] for code in patches.other[:count]], str),
        "pixels": patches.pixels[:count],
        "label_probability": patches.own[:count],
        "probability": patches.probable[:count],
    }
    shapes = None
    if all(is_georeferenced(one.info) for one in maps):
        shapes = outline(patches, pixels, maps, count)
    make_output_dir(output_dir)
    path = write_table(output_dir / "doubtful", columns, maps, patches.places[:count], shapes)
    log = start_log(config, "sampling_design", output_dir, start_runtime("cpu"))
    print_patches(patches, pixels, maps)
    log.line({"step": 0, "doubtful_pixels": int((patches.of >= 0).sum())})
    log.finish()
    print(f"{path}: doubtful labels, the most doubtful first")
    return path


def main(config):
    """Draw the sample, or list doubtful labels. Returns the path of the file, or None for none."""
    refuse_torchrun()
    config = check(config, design=("stratified", "simple", "doubtful"))

    path = Path(config["map_path"])
    folder = path if path.is_dir() else path.parent
    output_dir = Path(config["output_dir"] or folder / "sample")
    refuse_training_folder(output_dir)
    if config["design"] == "doubtful":
        return list_doubtful(folder, config, output_dir)

    # sample
    refuse_earlier(output_dir)
    maps = open_class_maps(path)
    classes = merge_classes([(one.path, one.info) for one in maps])
    sizes = sum(count_classes(one.codes).sum(0) for one in maps)
    sizes[0] = 0
    legend = class_legend(np.flatnonzero(sizes), classes)
    strata = plan_sample(config, legend, sizes[list(legend)])
    codes, points = ([one[key] for one in strata] for key in ("codes", "points"))
    drawn = draw_points(maps, codes, points, config["distance"], config["seed"])
    for number, one in enumerate(strata):
        one["points"] = int((drawn[:, 0] == number).sum())

    # files
    make_output_dir(output_dir)
    more = class_legend({*legend, *map(int, classes)}, classes)  # also classes that are not mapped
    path = write_sample(config, maps, more, strata, drawn, output_dir)
    log = start_log(config, "sampling_design", output_dir, start_runtime("cpu"))
    print_plan(strata)
    log.line({"step": 0, "points": len(drawn), "strata": len(strata)})
    log.finish()
    print(
        f"{path}: fill the column {LABEL} with class names or codes, then: python "
        f"read_inference_map.py map_path={config['map_path']} sample_path={path}"
    )
    return path


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
