"""Accuracy and areas of class maps from reference labels: of a sample, or of all test pixels.

Shapes: H x W pixels of a map, S strata, C classes, G blocks.
"""

import csv
from pathlib import Path

from running.errors import InputError, notice
from running.files import atomic_write, file_hash, write_json
from running.tile_json import match_classes, merge_classes

import numpy as np

from evaluation.areas import (
    assess_blocks,
    assess_classes,
    assess_strata,
    describe_assessment,
    explain_gaps,
    explain_no_width,
    join_classes,
    print_assessment,
)
from evaluation.seen_pixels import hash_split
from maps.land_cover import class_legend, count_classes, row_hectares
from maps.reader import row_blocks
from tiles import TEST, Tile
from utils import new_figure, save_figure

BLOCK_SIZE = 16  # pixels along a block, where the map's training had none
MAX_CELLS = 20_000_000  # of blocks x classes x classes in memory; of more blocks, some are joined


def measure_maps(maps):
    """Pixels of each code of ClassMaps, (256,), and hectares of all with data, None if unknown."""
    counts = [count_classes(one.codes) for one in maps]
    rows = [row_hectares(one.info, *one.codes.shape) for one in maps]
    hectares = None
    if not any(row is None for row in rows):
        pairs = zip(counts, rows, strict=True)
        hectares = float(sum(count[:, 1:].sum(1) @ row for count, row in pairs))
    return sum(count.sum(0) for count in counts), hectares


# ---- a sample ------------------------------------------------------------------------------------


def assess_sample(path, design, labels, maps):
    """Accuracy and areas of maps from the labelled points of a design, as plain numbers for JSON.

    path: of the points, for messages; design: of `read_points`; labels: {id: class code} of its
    classes; maps: ClassMaps. Points without a label are left out, as if at random within their
    stratum. Raises InputError for maps of another place, and where no point is left.
    """
    changed = _compare_maps(path, design["maps"], maps)
    classes = merge_classes([(one.path, one.info) for one in maps], refuse=False)
    table = match_classes(classes, design["classes"])
    names = {str(table[int(code)]): entry for code, entry in design["classes"].items()} | classes
    rows, notes = [], []
    for point in design["points"]:
        if str(point["id"]) in labels:
            code = int(maps[point["map"]].codes[point["row"], point["column"]])
            rows.append((point["stratum"], code, table[labels[str(point["id"])]]))
    if lost := len(design["points"]) - len(rows):
        notes.append(
            f"{path}: found {lost} of {len(design['points'])} points without a label, which are "
            "left out: right if those of a stratum are like its others"
        )
    stratum, mapped, labelled = np.array(rows, int).reshape(-1, 3).T
    if no_data := int((mapped == 0).sum()):
        notes.append(f"{path}: found {no_data} points where the map has no data; left out")
    if not mapped.any():
        raise InputError(f"{path}: found no labelled point on the map, wanted labels in reference")
    pixels, hectares = measure_maps(maps)
    codes = np.union1d(np.flatnonzero(pixels[1:]) + 1, labelled[mapped > 0])
    counts = np.zeros((len(design["strata"]), len(codes), len(codes)))
    places = (np.searchsorted(codes, part)[mapped > 0] for part in (mapped, labelled))
    np.add.at(counts, (stratum[mapped > 0], *places), 1)
    legend = class_legend(codes, names)
    result = _assess(design, counts, legend, pixels[codes], hectares, changed)
    return result | {"points": int(counts.sum()), "notes": notes + result["notes"]}


def _assess(design, counts, legend, pixels, hectares, changed):
    """As `assess_sample`, of counts (S, C, C) and pixels (C,) of the classes of the maps."""
    classes = [entry["name"] for entry in legend.values()]
    if design["design"] == "simple":
        pairs, words = counts.sum(0), "a simple random sample, in strata after the fact by class"
        stratum = join_classes(pairs.sum(1), pixels)
        assessment = assess_classes(pairs, pixels, stratum)
        gaps = explain_gaps(pairs[None], pixels.sum(keepdims=True), (["the map"], classes))
    else:
        sizes = np.array([one["pixels"] for one in design["strata"]])
        strata, holds = [one["name"] for one in design["strata"]], None
        words = "a random sample stratified by another map than this one (Stehman 2014)"
        if not changed:
            words = "a random sample stratified by class of the map (Olofsson et al. 2014)"
            holds = np.array([np.isin(list(legend), one["codes"]) for one in design["strata"]])
        assessment = assess_strata(counts, sizes, holds)
        gaps = explain_gaps(counts, sizes, (strata, classes))
    result = describe_assessment(assessment, legend, pixels, hectares, counts.sum(0))
    gaps += explain_no_width(counts.sum(0), classes)
    return {"method": words, **result, "notes": gaps}


def _compare_maps(path, drawn, maps):
    """Whether maps are others than a sample was drawn from; InputError for another place."""
    if len(drawn) != len(maps):
        raise InputError(
            f"{path}: found points of {len(drawn)} maps, wanted map_path= of as many, found "
            f"{len(maps)}"
        )
    changed = []
    for before, one in zip(drawn, maps, strict=True):
        is_same = all(before.get(key) == one.info.get(key) for key in ("crs", "transform"))
        if not is_same or before["shape"] != list(one.codes.shape):
            raise InputError(
                f"{one.path}: found another place or size than {path} was drawn from, wanted a map "
                f"of the pixels of {before['path']}"
            )
        if before["sha256"] != file_hash(one.path):
            changed.append(one.path)
    if changed:
        notice(
            f"{changed[0]}: found another map than the one that {path} was drawn from; its strata "
            "stay those of the sample (Stehman 2014)"
        )
    return bool(changed)


# ---- test pixels ---------------------------------------------------------------------------------


def find_blocks(labels_path, info, shape):
    """The row (H,) and the column (W,) of blocks that labelled pixels lie in.

    Those of the tile of the labels, of the block_size of the map's training where infer.json has
    it; from the corner where the labels belong to no tile. info: of the map; shape: (H, W).
    """
    size, folder = info.get("split", {}).get("block_size", BLOCK_SIZE), Path(labels_path).parent
    if (folder / "bands.npy").exists():
        return Tile(folder, statistics=False).block_numbers(size)
    return tuple(np.arange(number) // size for number in shape)


def find_test_pixels(labels_path, info):
    """Where the tile of the labels tests, (H, W) bool; None where that is not known.

    Known where infer.json says how the training of the map's checkpoint divided the tile's pixels.
    """
    split, folder = info.get("split"), Path(labels_path).parent
    if not split or not (folder / "bands.npy").exists():
        return None
    splits = Tile(folder, statistics=False).split_map(split["block_size"], split["seed"])
    if set(split.get("seen", [])) - {hash_split(splits)}:
        notice(
            f"{folder}: found another split of its pixels than when the map's encoder was trained "
            "(a new splits.npy?), so it may have seen test pixels"
        )
    return splits == TEST


def count_blocks(class_map, labels, table, codes, blocks):
    """Labelled pixels by block, class of the map and of the label, (G, C, C).

    class_map (H, W); labels (H, W), 0 for those that do not count; table: (256,) the code in the
    legend of each code of the labels; codes: (C,) of the legend; blocks: the row (H,) and column
    (W,) of blocks that pixels lie in.
    """
    rows, columns = (numbers - numbers.min() for numbers in blocks)
    across, size = int(columns.max()) + 1, len(codes)
    number = min((int(rows.max()) + 1) * across, max(2, MAX_CELLS // size**2))
    counts = np.zeros(number * size * size, np.int64)
    place = np.zeros(256, np.int64)
    place[codes] = np.arange(size)
    for first, mapped in row_blocks(class_map):
        part = slice(first, first + len(mapped))
        labelled = table[np.asarray(labels[part])]
        known = (mapped > 0) & (labelled > 0)
        block = (rows[part, None] * across + columns) % number
        cells = (block[known] * size + place[mapped[known]]) * size + place[labelled[known]]
        counts += np.bincount(cells, minlength=len(counts))
    return counts.reshape(number, size, size)


def assess_pixels(counts, legend, pixels, hectares, which):
    """Accuracy and areas from blocks of labelled pixels (G, C, C), as plain numbers for JSON.

    pixels: (C,) of each class of the map; hectares: of the map or None; which: words for the
    labelled pixels.
    """
    number = int(counts.any((1, 2)).sum())
    result = describe_assessment(
        assess_blocks(counts, pixels), legend, pixels, hectares, counts.sum(0)
    )
    words = (
        f"{which} in {number} blocks; intervals from the variance between blocks (jackknife), "
        "as right as these blocks are a random sample of the map"
    )
    total, names = np.sum(pixels, keepdims=True), [entry["name"] for entry in legend.values()]
    notes = explain_gaps(counts.sum(0)[None], total, (["the map"], names), "such pixel")
    for name, entry in zip(names, result["classes"].values(), strict=True):
        kinds = [entry[key] for key in ("users_accuracy", "producers_accuracy")]
        if any(kind["standard_error"] is None is not kind["estimate"] for kind in kinds):
            notes.append(f"{name}: found in one block only, so not all of its intervals")
    return {"method": words, **result, "notes": notes}


# ---- report --------------------------------------------------------------------------------------

COLUMNS = ("estimate", "standard_error", "low", "high")
ESTIMATES = ("area_share", "area_pixels", "area_hectares", "users_accuracy", "producers_accuracy")


def report_areas(result, output_dir):
    """Print an assessment, and write areas.json and areas.csv."""
    print(f"accuracy and areas of the whole map, with 95 % intervals, from {result['method']}:")
    print_assessment(result)
    for line in result["notes"]:
        print(line)
    write_json(output_dir / "areas.json", result)
    with (
        atomic_write(output_dir / "areas.csv") as part,
        open(part, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["class", "name", "what", *COLUMNS])
        overall = result["overall_accuracy"]
        writer.writerow(["", "all", "overall_accuracy", *(overall[key] for key in COLUMNS)])
        for code, row in result["classes"].items():
            for name in (name for name in ESTIMATES if row[name]):
                numbers = (row[name][key] for key in COLUMNS)
                writer.writerow([code, row["name"], name, *numbers])
    print(f"{output_dir / 'areas.csv'}: all estimates with standard errors and intervals")


def plot_areas(result, path):
    """Plot the area of each class, mapped and estimated with its 95 % interval, to a PNG."""
    unit = "pixels" if result["hectares"] is None else "ha"
    scale = 1 if result["hectares"] is None else result["hectares"] / result["pixels"]
    rows = list(result["classes"].values())
    figure = new_figure(figsize=(7, 1.5 + 0.4 * len(rows)))
    axes, places = figure.subplots(), np.arange(len(rows))
    mapped = [row["mapped_pixels"] * scale for row in rows]
    axes.barh(places, mapped, color="#dcdcdc", label="mapped pixels")
    areas = [row["area_hectares"] or row["area_pixels"] for row in rows]
    values, halves = (
        [np.nan if area[key] is None else area[key] for area in areas]
        for key in ("estimate", "half_width")
    )
    label = "estimated, with 95 % interval"
    axes.errorbar(values, places, xerr=halves, fmt="o", color="#0072b2", capsize=4, label=label)
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set(xlabel=f"area [{unit}]", xlim=(0, None), title="areas of the classes")
    axes.legend(loc="best")
    save_figure(figure, path)


def log_areas(result):
    """The numbers of an assessment for metrics.jsonl and wandb; without those that are missing."""
    line = {"overall_accuracy": result["overall_accuracy"]["estimate"]}
    for row in result["classes"].values():
        for name in ("area_share", "users_accuracy", "producers_accuracy"):
            line[f"{name}/{row['name']}"] = row[name]["estimate"]
    return {key: value for key, value in line.items() if value is not None}
