"""Show a saved land-cover map: picture with legend, class areas, agreement with labels.

    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy
    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy show=true \\
        labels_path=data/simulated/processed/MGRS-SIM1/labels.npy
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from files import make_output_dir, write_json
from maps import (
    FIGURE_SIZE,
    class_areas,
    class_legend,
    draw_class_map,
    plot_class_map,
    read_map,
    read_provenance,
)
from reports import plot_confusion, print_scores, score_classes
from runlog import start_log
from runtime import InputError, check, run_script, start_runtime

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
    return (np.asarray(read_map(path, shape)), path) if path else (None, "")


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
    figure = plt.figure(figsize=FIGURE_SIZE, layout="constrained")
    draw_class_map(figure, class_map, legend, title)
    plt.show()
    plt.close(figure)


def main(config):
    """Show the map. Returns a dict: areas, and agreement where there are labels."""
    config = check(config)
    path = Path(config["map_path"])
    class_map = np.asarray(read_map(path))
    if class_map.dtype != np.uint8:
        raise InputError(f"{path}: found {class_map.dtype}, wanted uint8 class codes")
    info = read_provenance(path)
    labels, labels_path = read_labels(config, info, class_map.shape)
    codes = np.unique(class_map if labels is None else np.concatenate([class_map, labels]))
    legend = class_legend(codes, info.get("classes", {}))
    output_dir = make_output_dir(config["output_dir"] or path.parent)
    runtime = start_runtime("cpu")
    log = start_log(config, "read_inference_map", output_dir, runtime)

    # areas
    result = {"areas": class_areas(class_map, legend, info)}
    picture = output_dir / "inference_map.png"
    title = info.get("tile", path.parent.name)
    plot_class_map(class_map, legend, picture, title)
    pictures = {"inference_map": picture}
    print_areas(result["areas"])
    print(f"no data: {int((class_map == 0).sum())} of {class_map.size} pixels")

    # agreement, on pixels that have both
    if labels is not None:
        both = (labels > 0) & (class_map > 0)
        if not both.any():
            raise InputError(f"{labels_path}: found no labelled pixel that the map covers")
        result["agreement"] = score_classes(labels[both], class_map[both], legend)
        print(f"agreement with {labels_path}, training pixels included:")
        print_scores(result["agreement"])
        pictures["agreement"] = output_dir / "agreement.png"
        matrix = np.array(result["agreement"]["confusion_matrix"])
        plot_confusion(matrix, legend, pictures["agreement"], f"{title}: map against labels")
    write_json(output_dir / "inference_map.json", result)
    log.images(pictures)
    log.finish()
    print(f"{picture}: the map with its legend")
    if config["show"]:
        show_window(class_map, legend, title)
    return result


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
