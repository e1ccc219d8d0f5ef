"""Show a saved land-cover map: picture with legend, class areas, agreement with labels.

    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy
    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy show=true \\
        labels_path=data/simulated/processed/MGRS-SIM1/labels.npy
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import utils
from utils import InputError

run_config = {
    "map_path": "outputs/MGRS-SIM1/classification_map.npy",  # of infer.py
    "labels_path": "",  # empty: labels.npy of the tile that infer.json names, where it has one
    "output_dir": "",  # empty: beside the map
    "show": False,  # open a window
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}


def read_labels(config, info, shape):
    """Labels (H, W) and where they come from, or None and ""."""
    path = config["labels_path"]
    if not path and info.get("tile_path"):
        beside = Path(info["tile_path"]) / "labels.npy"
        path = str(beside) if beside.exists() else ""
    return (np.asarray(utils.read_map(path, shape)), path) if path else (None, "")


def class_areas(class_map, legend, info):
    """{code: {"pixels", "share" of the pixels with data, "hectares" or None}}."""
    transform = info.get("transform")
    hectares = (
        abs(transform[0] * transform[4] - transform[1] * transform[3]) / 1e4 if transform else None
    )
    with_data = max(1, int((class_map > 0).sum()))
    areas = {}
    for code in legend:
        pixels = int((class_map == code).sum())
        areas[str(code)] = {
            "name": legend[code]["name"],
            "pixels": pixels,
            "share": pixels / with_data,
            "hectares": pixels * hectares if hectares else None,
        }
    return areas


def print_areas(areas):
    for code, row in areas.items():
        size = f"{row['pixels']} pixels" if row["hectares"] is None else f"{row['hectares']:.2f} ha"
        print(f"{code:>4} {row['name']:28.28s} {row['share']:6.1%}  {size}")


def show_window(class_map, legend, title):
    """Open a window; one line where there is no display."""
    try:
        plt.switch_backend("TkAgg")
    except ImportError as error:
        print(f"show=true: no display to open a window on ({error}); the PNG has the picture")
        return
    figure = utils.plot_class_map(class_map, legend, None, title)
    plt.show()
    plt.close(figure)


def main(config):
    """Show the map. Returns a dict: areas, and agreement where there are labels."""
    config = utils.freeze(config)
    path = Path(config["map_path"])
    class_map = np.asarray(utils.read_map(path))
    if class_map.dtype != np.uint8:
        raise InputError(f"{path}: found {class_map.dtype}, wanted uint8 class codes")
    made_by = path.parent / "infer.json"
    info = json.loads(made_by.read_text()) if made_by.exists() else {}
    labels, labels_path = read_labels(config, info, class_map.shape)
    codes = np.unique(class_map if labels is None else np.concatenate([class_map, labels]))
    legend = utils.class_legend(codes, info.get("classes", {}))
    output_dir = utils.make_output_dir(config["output_dir"] or path.parent)
    runtime = utils.start_runtime("cpu")
    log = utils.start_log(config, "read_inference_map", output_dir, runtime)

    # areas
    result = {"areas": class_areas(class_map, legend, info)}
    picture = output_dir / "inference_map.png"
    title = info.get("tile", path.parent.name)
    utils.plot_class_map(class_map, legend, picture, title)
    pictures = {"inference_map": picture}
    print_areas(result["areas"])
    print(f"no data: {int((class_map == 0).sum())} of {class_map.size} pixels")

    # agreement, on pixels that have both
    if labels is not None:
        both = (labels > 0) & (class_map > 0)
        if not both.any():
            raise InputError(f"{labels_path}: found no labelled pixel that the map covers")
        result["agreement"] = utils.score_classes(labels[both], class_map[both], legend)
        print(f"agreement with {labels_path}, training pixels included:")
        utils.print_scores(result["agreement"])
        pictures["agreement"] = output_dir / "agreement.png"
        matrix = np.array(result["agreement"]["confusion_matrix"])
        utils.plot_confusion(matrix, legend, pictures["agreement"], f"{title}: map against labels")
    utils.write_json(output_dir / "inference_map.json", result)
    log.images(pictures)
    log.finish()
    print(f"{picture}: the map with its legend")
    if config["show"]:
        show_window(class_map, legend, title)
    return result


if __name__ == "__main__":
    utils.run_script(main, run_config, __doc__)
