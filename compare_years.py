"""Compare the maps of two years: which pixels changed, and which classes became which.

    python compare_years.py before_path=outputs/MGRS-SIM1 after_path=outputs/2025/MGRS-SIM1
    python compare_years.py before_path=outputs/MGRS-SIM1 after_path=outputs/2025/MGRS-SIM1 \\
        false_alarms=0.001 output_dir=outputs/change

Both maps are infer.py's, of one place and one checkpoint. A pixel has changed where its two
representations differ more than those of unchanged pixels do: of these, a share of about
false_alarms is called changed, too. Reads and writes blocks of rows, so memory does not grow with
the maps.
"""

import math

from running.config import check
from running.device import start_runtime
from running.files import lock_folder, make_output_dir, remove_parts, write_json
from running.log import ProgressBar, refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script
from running.tile_json import is_georeferenced

import numpy as np
from scipy.stats import norm

from maps.change import (
    CHANGE_LEGEND,
    Years,
    describe_areas,
    find_change,
    find_truth,
    fit_change,
    measure_areas,
    score_change,
)
from maps.false_color import apply_basis, fit_basis, sample_representations
from maps.geotiff import write_geotiff
from maps.pictures import color_classes, draw_maps, find_frame, list_classes, save_picture
from maps.writer import MapWriter

run_config = {
    # input
    "before_path": "",  # folder of infer.py's maps of the first year, or representation_map.npy
    "after_path": "",  # of the other year: same place, same checkpoint
    "truth_path": "",  # (H, W) .npy, 1: changed; empty: changed.npy or labels of the tiles, if any
    "output_dir": "",  # empty: the folder change beside the map of after_path
    # change
    "false_alarms": 0.01,  # share of the unchanged pixels that is called changed, about
    "min_confidence": 0.8,  # of both years' classes, for a change that is called certain
    "sample_pixels": 50_000,  # pixels that show how unchanged ones differ; for the colours, too
    "seed": 0,  # of this sample, and of the intervals
    # running
    "format": "png",  # of the picture: png, pdf or svg
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}
SAMPLE_SHARE = 20  # pixels that are read for each one of the sample, about
SHOWN = 8  # transitions that are printed
SCORE = {"name": "change", "unit": "deviations of unchanged pixels"}
NO_AREAS = (
    "These count pixels of a map, its errors included: they are no area estimates, which need "
    "reference labels at random places (Olofsson et al. 2014, 10.1016/j.rse.2014.02.015)."
)


def write_maps(years, no_change, config, output_dir):
    """Write change.npy and changed.npy block by block; a run that was killed resumes.

    Returns the MapWriter, whose maps have no names yet.
    """
    made_from = {key: config[key] for key in ("false_alarms", "min_confidence", "sample_pixels")}
    made_from |= {"seed": config["seed"], **years.describe()}
    height, width = shape = years.shape[:2]
    arrays = {"change": ("float32", shape), "changed": ("uint8", shape)}
    writer = MapWriter(output_dir, arrays, made_from, room=8 * height * width)
    threshold = norm.isf(config["false_alarms"])
    with ProgressBar(total=height, initial=writer.rows, desc="change", unit="row") as bar:
        for first, pair in years.blocks(start=writer.rows):
            rows, known = slice(first, first + len(pair)), {}
            scores = no_change.scores(pair)
            if years.legend:
                known = {"classes": years.read_classes(rows)}
                known |= {"confidence": years.read("confidence.npy", "f", rows)}
            codes = find_change(scores, threshold, **known, least=config["min_confidence"])
            writer.write((rows.start, rows.stop), {"change": scores, "changed": codes})
            bar.update(len(pair))
    return writer


def write_files(writer, years, basis, result, kind):
    """Picture (kind: png, ..), GeoTIFFs and change.json, which names what they are made from.

    So change.json is removed first and written last.
    """
    folder, codes = writer.folder, writer.read("changed")
    (folder / "change.json").unlink(missing_ok=True)
    writer.free_room()
    save_picture(draw_change(years, codes, basis), folder / f"change.{kind}")
    if is_georeferenced(years.info):
        change = writer.read("change")
        write_geotiff(folder / "change.tif", change, years.info, np.nan, about=SCORE)
        write_geotiff(folder / "changed.tif", codes, years.info, 0, CHANGE_LEGEND)
    writer.publish()
    write_json(folder / "change.json", result | writer.made_from)
    remove_parts(folder)


def draw_change(years, codes, basis):
    """False colour of both years, on one basis, and beside it what changed: a figure."""
    shape = years.shape[:2]
    frame = find_frame(shape)
    blocks = [
        [apply_basis(basis, part) for part in np.split(pair, 2, -1)]
        for _, pair in years.blocks(frame.step)
    ]
    colors = (np.concatenate(rgba) for rgba in zip(*blocks, strict=True))
    panels = dict(zip(years.names, colors, strict=True))
    panels["change"] = color_classes(frame.thin(codes), CHANGE_LEGEND)
    entries = list_classes(codes, CHANGE_LEGEND, years.info)
    title = f"{years.before.title}: {years.names[0]} and {years.names[1]}"
    notes = "similar colours: similar embeddings, in both years"
    return draw_maps(panels, shape, years.info, title, entries, notes)


def print_result(result, years, config):
    """Print what changed, and how well the truth was found where it is known."""
    unit, (low, high) = result["unit"], result["interval"]
    changed, compared = result["changed"], result["compared"]
    print(
        f"{years.before.title}, {years.names[0]} to {years.names[1]}: {changed:.2f} of "
        f"{compared:.2f} {unit} changed ({low:.2f} to {high:.2f}), {changed / compared:.1%}; about "
        f"{config['false_alarms']:.3g} of what is unchanged was called so by chance"
    )
    if years.legend:
        print_transitions(result)
    print(NO_AREAS)
    if scores := result.get("scores"):
        shares = (f"{k.replace('_', ' ')} {v:.1%}" for k, v in scores.items() if v is not None)
        print(f"{', '.join(shares)}: against {result['truth']}")


def print_transitions(result):
    """Print the largest changes from one class to another."""
    matrix = {name: np.array(values) for name, values in result["matrix"].items()}
    area, names = matrix["area"] * ~np.eye(len(result["classes"]), dtype=bool), result["classes"]
    names, order = list(names.values()), area.argsort(axis=None)[::-1]
    print(
        f"from class to class, in {result['unit']} (95 % interval), and the part that is certain:"
    )
    for i, j in zip(*np.unravel_index(order[:SHOWN], area.shape), strict=True):
        if area[i, j] > 0:
            low, high, certain = (matrix[name][i, j] for name in ("low", "high", "certain"))
            size = f"{area[i, j]:9.2f} ({low:.2f} to {high:.2f})"
            print(f"  {f'{names[i]} to {names[j]}':44.44s} {size:28s} {certain:9.2f}")
    print(
        f"  other classes {area.flat[order[SHOWN:]].sum():.2f}; within a class "
        f"{result['changed'] - area.sum():.2f}"
    )


def main(config):
    """Compare the maps. Returns the content of change.json."""
    refuse_torchrun()
    config = check(config)
    years = Years(config["before_path"], config["after_path"])
    truth_name, truth = find_truth(config["truth_path"], years)
    output_dir = make_output_dir(config["output_dir"] or years.path.parent / "change")
    refuse_training_folder(output_dir)

    # how unchanged pixels differ
    pixels = math.prod(years.shape[:2])
    stride = max(1, math.isqrt(pixels // (SAMPLE_SHARE * config["sample_pixels"])))
    sample = sample_representations([years], config, stride)
    no_change = fit_change(sample, years.path)
    basis = fit_basis(np.concatenate(np.split(sample, 2, -1)))

    # maps
    log = start_log(config, "compare_years", output_dir, start_runtime("cpu"))
    with lock_folder(output_dir):
        writer = write_maps(years, no_change, config, output_dir)
        codes = writer.read("changed")
        areas = measure_areas(codes, years)
        result = describe_areas(areas, years.legend, config["seed"])
        if truth:
            result |= {"truth": truth_name, "scores": score_change(codes, truth)}
        write_files(writer, years, basis, result, config["format"])

    # report
    picture = output_dir / f"change.{config['format']}"
    print_result(result, years, config)
    numbers = {"changed_share": result["changed"] / result["compared"]}
    log.line({"step": 0, **numbers, **result.get("scores", {})})
    log.images({"change": picture})
    log.finish()
    print(f"{picture}: both years as false colour, and what changed")
    return result


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
