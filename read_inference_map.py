"""Show a saved map of land cover or of a quantity: areas, agreement, a picture of map and errors.

    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy
    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy show=true \\
        labels_path=data/simulated/processed/MGRS-SIM1/labels.npy
    python read_inference_map.py map_path=outputs/MGRS-SIM1/regression_map.npy
    python read_inference_map.py map_path=outputs/MGRS-SIM1/classification_map.npy \\
        sample_path=outputs/MGRS-SIM1/sample/points.gpkg      # of sampling_design.py, labelled

Accuracy and areas have standard errors and 95 % intervals, from the labelled points of a sample or
from blocks of labelled pixels.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from running.config import check
from running.device import start_runtime
from running.errors import InputError, notice
from running.files import make_output_dir, write_json
from running.log import start_log
from running.script import refuse_torchrun, run_script
from running.tile_json import describe_target, match_classes, merge_classes, merge_targets

import numpy as np

from evaluation.quantities import (
    MAX_POINTS,
    plot_predicted,
    print_quantity_scores,
    sum_errors,
    summarise,
)
from evaluation.reference import (
    assess_pixels,
    assess_sample,
    count_blocks,
    find_blocks,
    find_test_pixels,
    log_areas,
    measure_maps,
    plot_areas,
    report_areas,
)
from evaluation.scores import plot_confusion, print_scores, score_classes
from maps.land_cover import class_areas, class_legend, count_classes, describe_size
from maps.pictures import (
    NO_VALUE,
    RIGHT_COLOR,
    WRONG_COLOR,
    color_classes,
    draw_maps,
    find_bar,
    find_frame,
    legend_entries,
    mark_errors,
    save_picture,
)
from maps.reader import (
    ClassMap,
    find_labels,
    open_class_maps,
    read_codes,
    read_map,
    read_provenance,
    row_blocks,
)
from preparation.points import match_labels, read_points

run_config = {
    "map_path": "outputs/MGRS-SIM1/classification_map.npy",  # or regression_map.npy, of infer.py
    "labels_path": "",  # empty: labels.npy (targets.npy) of the tile that infer.json names, if any
    "pixels": "auto",  # to compare: all, test, or auto: test where infer.json says which these are
    "sample_path": "",  # labelled points of sampling_design.py; then map_path may be a folder too
    "output_dir": "",  # empty: beside the map
    "format": "png",  # of the map's picture: png, pdf or svg
    "show": False,  # open a window
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


def count_pairs(class_map, labels):
    """Pixels of each pair of label and class code, (256, 256); row and column 0: without one."""
    pairs = np.zeros(256 * 256, np.int64)
    for first, block in row_blocks(class_map):
        place = labels[first : first + len(block)].astype(np.int64) * 256 + block
        pairs += np.bincount(place.ravel(), minlength=len(pairs))
    return pairs.reshape(256, 256)


class Labels(NamedTuple):
    """Labels beside a map, and which of them to compare.

    path: of their file; table (256,): the code in the legend of each of their codes; codes (H, W):
    those to compare, 0 elsewhere; which: words for these.
    """

    path: str
    table: np.ndarray
    codes: np.ndarray
    which: str


def choose_pixels(answers, nothing, path, info, pixels):
    """The labels or targets (H, W) to compare with a map, and words for them.

    nothing: 0 or NaN, where there is none; info: of the map; pixels: the key. Raises InputError for
    pixels=test where test pixels are not known, or none has a label.
    """
    is_test = None if pixels == "all" else find_test_pixels(path, info)
    if is_test is not None:
        tested = np.where(is_test, answers, np.asarray(nothing, answers.dtype))
        if np.nan_to_num(tested).any():
            return tested, "test pixels"
    if pixels == "test":
        raise InputError(
            f"{path}: found no labelled test pixel that infer.json knows of, wanted pixels=all, "
            "labels of the tile that was mapped, or a map by a newer infer.py"
        )
    return answers, "all labelled pixels, training pixels included"


def read_both(path, config):
    """A map and its labels, in bounded memory.

    Returns the map (H, W), the content of infer.json beside it, the legend of both, the Labels or
    None, and `count_pairs` by codes of the legend, of the labels to compare. Raises InputError for
    labels without a pixel of the map.
    """
    class_map = read_map(path)
    if class_map.dtype != np.uint8:
        raise InputError(f"{path}: found {class_map.dtype}, wanted uint8 class codes")
    info = read_provenance(path)
    labels_path, tile_info = find_labels(config["labels_path"], info)
    sources = [(path.with_name("infer.json"), info)]
    mapped, names = info.get("classes", {}), tile_info.get("classes", {})
    table = np.array(match_classes(mapped, names), np.uint8)
    labels = None
    if labels_path:
        given = read_codes(labels_path, class_map.shape)
        chosen, which = choose_pixels(given, 0, labels_path, info, config["pixels"])
        labels = Labels(labels_path, table, chosen, which)
        counted = count_pairs(class_map, chosen)
        if not counted[1:, 1:].any():
            raise InputError(f"{labels_path}: found no labelled pixel that the map covers")
        pairs = np.zeros_like(counted)
        np.add.at(pairs, table, counted)
        occurs = np.union1d(
            table[np.flatnonzero(count_classes(given).sum(0))], np.flatnonzero(pairs.sum(0))
        )
        names = {str(table[int(code)]): entry for code, entry in names.items()}
        sources.append((Path(labels_path).parent / "tile.json", {"classes": names}))
    else:
        pairs = np.diag(count_classes(class_map).sum(0))
        occurs = np.flatnonzero(pairs.sum(0))
    legend = class_legend(occurs, merge_classes(sources, refuse=False))
    notice_unknown(legend, mapped, pairs, labels_path)
    return class_map, info, legend, labels, pairs


def notice_unknown(legend, mapped, pairs, labels_path):
    """Say which labelled classes a map cannot have; mapped: its own, {} where they are not known.

    pairs: of `count_pairs`.
    """
    unknown = [code for code in legend if mapped and str(code) not in mapped]
    if unknown:
        both = np.delete(pairs, [0, *unknown], 0)[:, 1:]  # of the other classes
        right = np.diag(pairs)[1:].sum() / max(1, both.sum())
        names = ", ".join(legend[code]["name"] for code in unknown)
        notice(
            f"{labels_path}: found {names}, which the map cannot have (classes are matched by "
            f"name): counted as errors; of the pixels of other classes {right:.1%} are right"
        )


def print_areas(areas):
    for code, row in areas.items():
        print(f"{code:>4} {row['name']:28.28s} {row['share']:6.1%}  {describe_size(row)}")


def draw_inference(class_map, labels, legend, info, title, result, figure=None):
    """The class map with areas and, where there are labels, labels and errors beside it.

    labels: Labels or None. result: the areas and the agreement that `main` returns. figure: as for
    `draw_maps`.
    """
    frame = find_frame(class_map.shape)
    thin_map = frame.thin(class_map)
    panels = {"map": color_classes(thin_map, legend)}
    shown = thin_map
    if labels:
        shown = labels.table[frame.thin(read_codes(labels.path, class_map.shape))]
    has_gaps = not (thin_map.all() and shown.all())
    entries = legend_entries(legend, result["areas"], has_gaps)
    if labels:
        errors = {"errors of the map": mark_errors(shown, thin_map)}
        panels = {"labels": color_classes(shown, legend), **panels, **errors}
        right = result["agreement"]["overall_accuracy"]
        entries.append((RIGHT_COLOR, f"map as labelled: {right:.1%} of {labels.which}"))
        entries.append((WRONG_COLOR, f"another class than labelled: {1 - right:.1%}"))
    return draw_maps(panels, class_map.shape, info, title, entries, figure=figure)


def show_window(draw):
    """Open a window; one line where there is no display."""
    import matplotlib.pyplot as plt  # takes a while, and few open a window

    try:
        plt.switch_backend("TkAgg")
    except ImportError as error:
        print(f"show=true: no display to open a window on ({error}); the PNG has the picture")
        return
    figure = plt.figure(dpi=100)
    draw(figure=figure)
    plt.show()
    plt.close(figure)


# ---- a quantity ----------------------------------------------------------------------------------


def compare_values(values, targets):
    """Scores of a map of a quantity against targets (H, W), and some of the pairs, (2, n)."""
    sums, step, some = np.zeros(6), max(1, values.size // MAX_POINTS), []
    for first, predicted in row_blocks(values):
        actual = np.asarray(targets[first : first + len(predicted)])
        both = np.isfinite(actual) & np.isfinite(predicted)
        sums += sum_errors(actual[both], predicted[both]).sum(0)
        some.append(np.stack([actual[both], predicted[both]])[:, ::step])
    return summarise(sums), np.concatenate(some, 1)


def draw_values(values, targets, target, info, title, figure=None):
    """The map of a quantity and, where there are, the targets beside it. figure: as `draw_maps`."""
    frame, panels = find_frame(values.shape), {"map": values}
    if targets is not None:
        panels = {"targets": targets, **panels}
    panels = {name: frame.thin(panel) for name, panel in panels.items()}
    bar = find_bar(np.concatenate([*panels.values()]), describe_target(target))
    panels = {name: bar.color(panel) for name, panel in panels.items()}
    more = {"notes": NO_VALUE, "figure": figure, "bar": bar}
    return draw_maps(panels, values.shape, info, title, **more)


def show_values(path, config):
    """Show a map of a quantity. Returns a dict: values, and agreement where there are targets."""
    values, info = read_map(path, kind="f"), read_provenance(path)
    target, title = info["target"], info.get("tile", path.parent.name)
    labels_path, tile_info = find_labels(config["labels_path"], info, "targets.npy")
    if "target" in tile_info:  # of another quantity or unit?
        beside = Path(labels_path).parent / "tile.json", tile_info
        merge_targets([(path.with_name("infer.json"), info), beside])
    targets = read_map(labels_path, values.shape, kind="f") if labels_path else None
    if labels_path:
        compared, which = choose_pixels(targets, np.nan, labels_path, info, config["pixels"])
    output_dir = make_output_dir(config["output_dir"] or path.parent)
    log = start_log(config, "read_inference_map", output_dir, start_runtime("cpu"))
    pictures = {"inference_map": output_dir / f"inference_map.{config['format']}"}
    (output_dir / "agreement.png").unlink(missing_ok=True)  # of an earlier call, with other targets
    counts = sum(int(np.isfinite(block).sum()) for _, block in row_blocks(values))
    result = {"values": {**target, "pixels": counts, "no_value": values.size - counts}}
    print(f"{describe_target(target)}: {counts} of {values.size} pixels have a value")
    if labels_path:
        result["agreement"], pairs = compare_values(values, compared)
        if not result["agreement"]["pixels"]:
            raise InputError(f"{labels_path}: found no pixel with a target that the map covers")
        print(f"agreement with {labels_path}, of {which}:")
        print_quantity_scores(result["agreement"], target)
        pictures["agreement"] = output_dir / "agreement.png"
        about = f"{title}: map against targets"
        plot_predicted(*pairs, result["agreement"], target, pictures["agreement"], about)
    draw = partial(draw_values, values, targets, target, info, title)
    shows = "targets and map" if labels_path else "the map"
    return finish(result, draw, pictures, shows, config, log)


# ---- accuracy and areas --------------------------------------------------------------------------


def estimate_areas(one, labels, legend):
    """Accuracy and areas of a ClassMap from blocks of its Labels, as in areas.json."""
    blocks = find_blocks(labels.path, one.info, one.codes.shape)
    counts = count_blocks(one.codes, labels.codes, labels.table, list(legend), blocks)
    pixels, hectares = measure_maps([one])
    return assess_pixels(counts, legend, pixels[list(legend)], hectares, labels.which)


def show_sample(config):
    """Estimate accuracy and areas of maps from a labelled sample. Returns what areas.json has."""
    maps, path = open_class_maps(config["map_path"]), config["sample_path"]
    design, labels = read_points(path)
    labels = match_labels(path, labels, design["classes"])
    result = assess_sample(path, design, labels, maps)
    output_dir = make_output_dir(config["output_dir"] or Path(path).parent)
    log = start_log(config, "read_inference_map", output_dir, start_runtime("cpu"))
    report_areas(result, output_dir)
    plot_areas(result, output_dir / "areas.png")
    log.line({"step": 0, **log_areas(result)})
    log.images({"areas": output_dir / "areas.png"})
    log.finish()
    return result


# ---- classes -------------------------------------------------------------------------------------


def show_classes(path, config):
    """Show a map of classes. Returns a dict: areas, and agreement where there are labels."""
    class_map, info, legend, labels, pairs = read_both(path, config)
    output_dir = make_output_dir(config["output_dir"] or path.parent)
    runtime = start_runtime("cpu")
    log = start_log(config, "read_inference_map", output_dir, runtime)

    # areas
    result = {"areas": class_areas(class_map, legend, info)}
    title = info.get("tile", path.parent.name)
    pictures = {"inference_map": output_dir / f"inference_map.{config['format']}"}
    print_areas(result["areas"])
    print(f"no data: {pairs[:, 0].sum()} of {class_map.size} pixels")

    # agreement, on pixels that have both
    for name in ("agreement.png", "areas.json", "areas.csv"):  # of an earlier call, other labels
        (output_dir / name).unlink(missing_ok=True)
    if labels:
        pairs[0], pairs[:, 0] = 0, 0
        labelled, predicted = np.nonzero(pairs)
        counts = pairs[labelled, predicted]
        result["agreement"] = score_classes(labelled, predicted, legend, counts)
        print(f"agreement with {labels.path}, of {labels.which}:")
        print_scores(result["agreement"])
        result["estimates"] = estimate_areas(ClassMap(path, class_map, info), labels, legend)
        report_areas(result["estimates"], output_dir)
        log.line({"step": 0, **log_areas(result["estimates"])})
        pictures["agreement"] = output_dir / "agreement.png"
        matrix = np.array(result["agreement"]["confusion_matrix"])
        plot_confusion(matrix, legend, pictures["agreement"], f"{title}: map against labels")
    draw = partial(draw_inference, class_map, labels, legend, info, title, result)
    beside = "labels, map and errors" if labels else "the map"
    return finish(result, draw, pictures, f"{beside}, with the area of each class", config, log)


# ---- either --------------------------------------------------------------------------------------


def finish(result, draw, pictures, shows, config, log):
    """Write the picture and the numbers, and log them. shows: words for what is in the picture."""
    picture = pictures["inference_map"]
    save_picture(draw(), picture)
    write_json(picture.with_name("inference_map.json"), result)
    log.images(pictures)
    log.finish()
    print(f"{picture}: {shows}")
    if config["show"]:
        show_window(draw)
    return result


def main(config):
    """Show the map. Returns a dict: areas, or values, and agreement where there are labels.

    With sample_path, the estimates from the sample, as in areas.json.
    """
    refuse_torchrun()
    config = check(config, pixels=("auto", "test", "all"))
    path = Path(config["map_path"])
    if config["sample_path"]:
        return show_sample(config)
    if "target" in read_provenance(path) and read_map(path, kind="iuf").dtype.kind == "f":
        return show_values(path, config)
    return show_classes(path, config)


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
