"""model_card.md: what a trained checkpoint is, for those who get it without its folder.

All of it comes from the checkpoint, the tiles and the scores of the run. The first lines are the
YAML that Hugging Face reads.
"""

import platform
import shlex

from running.checkpoints import FORMAT_VERSION, KINDS, load_checkpoint
from running.config import ALL_YEAR, find_season, name_season
from running.files import atomic_write, file_hash
from running.tile_json import describe_target, is_georeferenced

import torch
from rasterio import Affine
from rasterio._err import CPLE_BaseError  # GDAL's, without a public name
from rasterio.errors import RasterioError
from rasterio.transform import array_bounds
from rasterio.warp import transform_bounds

from backbones import load_backbone, load_classifier

CARD = "model_card.md"
LICENCE = "MIT"  # of the code
TAGS = {"pretrained": "self-supervised", "classifier": "land-cover", "regressor": "regression"}
SETTINGS = ("loss", "augment", "head", "freeze_backbone", "label_count", "batch_size")
SETTINGS += ("learning_rate", "weight_decay", "sample_size", "min_sample_size", "seed")
SETTINGS += ("val_dataset_name",)
NAMED = 12  # tiles that are named
SCORES = {  # that are shown, of pretraining and of the test split
    "probe_macro_f1": "macro-F1 of a linear probe, validation pixels",
    "rankme": "RankMe, effective dimensions, validation pixels",
    "val_loss": "validation loss",
    "overall_accuracy": "overall accuracy, test pixels",
    "macro_f1": "macro-F1, test pixels",
    "weighted_f1": "weighted F1, test pixels",
    "expected_calibration_error": "expected calibration error, test pixels",
    "rmse": "RMSE, test pixels",
    "mae": "mean absolute error, test pixels",
    "r2": "R2, test pixels",
    "bias": "bias (predicted - actual), test pixels",
}


def write_card(run, defaults, splits, scores=None):
    """Write model_card.md beside the best.pt of a finished `Run`.

    defaults: the run_config of its script; splits: data sets of training, validation and, if there
    is one, test pixels, or None; scores: of the test split, as in metrics.json, if there are any.
    """
    path = run.output_dir / "best.pt"
    best, tiles = load_checkpoint(path), splits[0].tiles
    parts = {
        "Data": describe_data(best, splits),
        "Training": describe_training(run, best, defaults),
        "Scores": describe_scores(best, scores or best["line"]),
        "Limits": describe_limits(best, tiles, scores),
        "Licence": describe_licence(tiles),
    }
    text = f"{front_matter(best)}\n# {describe_model(best)}\n\n"
    text += f"`best.pt`, SHA-256 `{file_hash(path)}`\n"
    text += "".join(f"\n## {title}\n\n{content}\n" for title, content in parts.items())
    with atomic_write(run.output_dir / CARD) as part:
        part.write_text(text, encoding="utf-8")


def front_matter(best):
    tags = ["sentinel-2", "time-series", "earth-observation", "barlow-twins", TAGS[best["kind"]]]
    return "\n".join(["---", "library_name: pytorch", "tags:", *(f"- {t}" for t in tags), "---"])


def table(rows, head=("", "")):
    """A table of Markdown; rows: tuples of cells, or a dict of two columns."""
    rows = rows.items() if isinstance(rows, dict) else rows
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def describe_model(best):
    """The title, and a sentence."""
    kind, backbone = best["kind"], best["backbone"]
    network = load_backbone(best) if kind == "pretrained" else load_classifier(best)
    parameters = sum(part.numel() for part in network.parameters())
    gives = head = ""
    if kind != "pretrained":
        head = f" with a {best['head']['head']} head"
        is_class = kind == "classifier"
        gives = f"{len(best['classes'])} classes" if is_class else describe_target(best["target"])
        gives = f" and {gives}"
    return (
        f"{best['config']['dataset_name']}: {backbone['latent_dim']} dimensions{gives} from a "
        f"pixel's year of Sentinel-2\n\nA {backbone['name']}{head} of {parameters} parameters that "
        f"reads the series of single pixels, written by `{KINDS[kind]}.py`."
    )


# ---- data ----------------------------------------------------------------------------------------


def describe_data(best, splits):
    train, tiles = splits[0], splits[0].tiles
    names = ", ".join(tile.name for tile in tiles[:NAMED])
    more = f" and {len(tiles) - NAMED} more" if len(tiles) > NAMED else ""
    observations = sum(
        int(tile.clear_counts()[train.pixel_mask(index)].sum()) for index, tile in enumerate(tiles)
    )
    names_of_splits = ("training", "validation", "test")[: len(splits)]
    pixels = zip(names_of_splits, splits, strict=True)
    rows = {
        "tiles": f"{len(tiles)}: {names}{more}",
        "region": describe_region(tiles),
        "dates": describe_dates(tiles),
        "bands": f"{', '.join(best['bands']) or len(best['mean'])}; reflectance x 10000",
        "pixels": ", ".join(f"{split.num_pixels} {name}" for name, split in pixels if split),
        "clear observations": f"{observations} of the training pixels",
        "splits": describe_splits(tiles, best["config"]),
    }
    return table(rows)


def describe_region(tiles):
    """The box in degrees around the tiles that have a place."""
    boxes = [box for box in map(find_box, tiles) if box]
    if not boxes:
        return "not recorded: no tile has a crs and transform of the Earth"
    west, south, east, north = (
        choose(box[i] for box in boxes) for i, choose in enumerate((min, min, max, max))
    )
    of = "" if len(boxes) == len(tiles) else f", of {len(boxes)} tiles with a place"
    return f"longitude {west:.4f} to {east:.4f}, latitude {south:.4f} to {north:.4f}{of}"


def find_box(tile):
    """West, south, east and north of a tile in degrees; None where it has no place on the Earth."""
    if not is_georeferenced(tile.info):
        return None
    try:
        bounds = array_bounds(*tile.shape[1:3], Affine(*tile.info["transform"]))
        return transform_bounds(tile.info["crs"], "EPSG:4326", *bounds)
    except (RasterioError, CPLE_BaseError):  # of a drawing, or without a way to degrees
        return None


def describe_dates(tiles):
    dated = [tile for tile in tiles if tile.info.get("dates")]
    days = sorted({int(day) for tile in tiles for day in tile.doys})
    text = f"days of year {days[0]} to {days[-1]}, up to {max(t.shape[0] for t in tiles)} a tile"
    if not dated:
        return f"{text}; years not recorded"
    dates = sorted(tile.info["dates"][place] for tile in dated for place in tile.dates)
    return f"{dates[0][:10]} to {dates[-1][:10]}; {text}"


def describe_splits(tiles, config):
    files = sum(tile.splits is not None for tile in tiles)
    blocks = f"blocks of {config['block_size']} pixels, split_seed={config['split_seed']}"
    return {0: blocks, len(tiles): "splits.npy"}.get(
        files, f"splits.npy of {files} tiles, {blocks}"
    )


# ---- training and scores -------------------------------------------------------------------------


def describe_training(run, best, defaults):
    config = best["config"]
    rows = {key: config[key] for key in SETTINGS if config.get(key)}
    if sha256 := best.get("data", {}).get("checkpoint_sha256"):
        rows["starts from"] = f"encoder of SHA-256 `{sha256}`"
    rows["steps"] = f"{run.progress.step}; best.pt is of step {best['step']}"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    rows["versions"] = f"{versions}, checkpoint format {FORMAT_VERSION}"
    differ = {key: value for key, value in config.items() if value != defaults.get(key)}
    words = [shlex.quote(f"{key}={value}") for key, value in differ.items()]
    command = " \\\n    ".join([f"python {KINDS[best['kind']]}.py", *words])
    made_by = f"Made by (keys that differ from the defaults):\n\n```bash\n{command}\n```"
    return f"{table(rows)}\n\n{made_by}"


def describe_scores(best, scores):
    intervals, unit = scores.get("intervals") or {}, best.get("target", {}).get("unit", "")
    rows = []
    for key, words in SCORES.items():
        if scores.get(key) is not None:
            low, high = intervals.get(key) or (None, None)
            between = "not measured" if low is None else f"{low:.4g} to {high:.4g}"
            in_unit = f" {unit}" if unit and key in ("rmse", "mae", "bias") else ""
            rows.append((words, f"{scores[key]:.4g}{in_unit}", between))
    text = table(rows, ("score", "value", "95 % interval"))
    if "per_class" in scores:
        classes = [
            (code, row["name"], *(f"{row[k]:.3f}" for k in ("precision", "recall", "f1")))
            + (row["support"],)
            for code, row in scores["per_class"].items()
        ]
        head = ("code", "class", "precision", "recall", "F1", "test pixels")
        text += f"\n\n{table(classes, head)}"
    return text


def describe_limits(best, tiles, scores):
    season = find_season({"start": "", "end": ""}, best["config"])
    fewest = best["config"]["min_valid"]
    lines = [
        "Nothing was measured in other regions, years or sensors than those under Data.",
        f"A pixel with fewer than {fewest} clear observations has no embedding.",
    ]
    if season != ALL_YEAR:
        lines.append(f"It reads days of year {name_season(season)} alone.")
    if any(tile.info.get("simulated") for tile in tiles):
        lines.append("Tiles are simulated: it has learned nothing about real ground.")
    if scores:
        lines.append("Test pixels are of the tiles under Data; nothing else has looked at them.")
    else:
        lines.append("Its scores are of validation pixels, which also chose this checkpoint.")
    if outside := (scores or {}).get("outside_training_range"):
        between = f"{outside['low']:.4g} to {outside['high']:.4g} {best['target']['unit']}"
        lines.append(f"Training values were {between}; beyond them nothing has been learned from.")
    return "\n".join(f"- {line}" for line in lines)


def describe_licence(tiles):
    data = sorted({str(tile.info.get("license", "not recorded")) for tile in tiles})
    return f"Code: {LICENCE}. Data, as in `tile.json`: {', '.join(data)}. Weights: not stated."
