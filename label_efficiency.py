"""How good are the embeddings: test scores against the number of labels, beside honest baselines.

Of classes, or of a quantity: where the tiles have targets.npy and no labels, or with task=quantity.

For each number of labels, labelled pixels are chosen at random several times (label draws). The
same pixels train every model, and all are scored on the same pixels of the test split. Settings
(C, k, leaf size) are chosen by cross-validation on the training labels alone. Also: whether the
difference to the best baseline is more than chance, and how steady the embeddings are when other
dates of a pixel are read.

    python label_efficiency.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021
    python label_efficiency.py checkpoint_path=checkpoints/a/best.pt,checkpoints/b/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 models=all
    python label_efficiency.py checkpoint_path=checkpoints/flanders/best.pt base_path=../shared \\
        dataset_name=flanders_2018 test_dataset_name=flanders_2019
    python label_efficiency.py checkpoint_path=checkpoints/fuel/best.pt base_path=../shared \\
        dataset_name=fuel_moisture
    python label_efficiency.py checkpoint_path=checkpoints/flanders/best.pt base_path=../shared \\
        dataset_name=flanders_2018 label_counts=500 until=120,150,180,240,366
    python label_efficiency.py checkpoint_path=checkpoints/austria/best.pt dataset_name=austria \\
        maps=tessera=maps/tessera,aef=alphaearth:maps/aef_2021

Stopped and started again with the same output_dir, it resumes after the last model it has scored.
"""

import math
import shutil
import tempfile
from pathlib import Path

from running.checkpoints import load_checkpoint
from running.config import MAX_INT, check, find_season, read_day
from running.device import start_runtime
from running.errors import InputError
from running.files import lock_folder, make_output_dir
from running.log import ProgressBar, refuse_training_folder, start_log
from running.script import refuse_torchrun, run_script

from evaluation.comparison import (
    INHERITED,
    Comparison,
    find_season_models,
    open_kept,
    open_split,
    score_season,
)
from evaluation.features import (
    build_extractors,
    measure_ranks,
    measure_steadiness,
    read_split,
)
from evaluation.label_report import find_means, save_result, write_season, write_table
from evaluation.rows import FEATURES, MODELS, NETWORKS, QUANTITY_MODELS, add_maps
from evaluation.seen_pixels import notice_seen_pixels
from evaluation.shared_labels import notice_same_ground, share_labels
from evaluation.tasks import find_task
from maps.embeddings import parse_sources
from tiles import notice_splits

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; several (seeds) divided by commas: draw s uses s mod N
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "task": "auto",  # classes (labels.npy), quantity (targets.npy) or auto, which prefers classes
    "test_dataset_name": "",  # another year or region: all its labels test, all of the first train
    "maps": "",  # embeddings of others, NAME=PATH,.. or (AlphaEarth's int8) NAME=alphaearth:PATH
    "output_dir": "",  # empty: beside the checkpoint, <its folder>/label_efficiency
    # models
    "models": "fast",  # all; fast: without networks, which take minutes; or some: series,forest
    # labels
    "label_counts": "50,100,500,2000",  # chosen at random from the training split; 0: all of it
    "most_pixels": 100_000,  # at most: of a split, chosen at random, that are held in memory
    "seeds": 5,  # label draws for each count; mean and standard deviation are reported
    "draws": 0,  # representations from 0: all clear dates; else the mean of N even draws of dates
    # season
    "start": "",  # day of year or date (90, 04-01) of the first observation that is read, and ..
    "end": "",  # .. of the last; before start: across New Year; empty: the whole year
    "min_valid": 0,  # clear observations that a pixel needs; 0: as in pretraining
    "until": "",  # 120,150,..: also, with the most labels, scores of what is seen up to these days
    # steadiness
    "retrieval_pixels": 10_000,  # at most: of the test split; more: a harder task, more memory
    # running
    "device": "auto",  # auto, cpu or cuda
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
    "wandb_dir": "",  # its folder wandb/ gets all runs; empty: WANDB_DIR, or where you are
}


# ---- config --------------------------------------------------------------------------------------


def read_counts(config):
    """The numbers of labels, ascending, 0 (all) last."""
    text = config["label_counts"]
    try:
        counts = {int(count) for count in text.split(",")}
    except ValueError:
        raise InputError(f"label_counts={text}: wanted 50,100,..") from None
    if min(counts) < 0 or 1 in counts:
        raise InputError(f"label_counts={text}: wanted 0 (all) or 2 or more each")
    if max(counts) > config["most_pixels"]:
        raise InputError(
            f"label_counts={text}: found {max(counts)}, wanted most_pixels="
            f"{config['most_pixels']} or fewer (or a larger most_pixels)"
        )
    return sorted(counts, key=lambda count: count or math.inf)


def read_days(config):
    """The days of year up to which observations are read, ascending; none for ""."""
    text, (start, end) = config["until"], find_season(config)
    days = sorted({read_day("until", day) for day in text.split(",")}) if text else []
    if days and start > end:
        raise InputError(f"until={text}: found start={start} after end={end}, wanted one year")
    return days


def read_models(config, task, sources):
    """{name: Model} of the chosen rows of a task, in their order, and of all maps."""
    text = config["models"]
    fast = [name for name in task.models if name not in NETWORKS]
    chosen = {"all": list(task.models), "fast": fast}.get(text, text.split(","))
    if unknown := [name for name in chosen if name not in task.models]:
        wanted = f"wanted all, fast or some of {','.join(task.models)}"
        raise InputError(f"models={text}: found {unknown[0]!r}, {wanted}")
    if config["test_dataset_name"] and (networks := [n for n in NETWORKS if n in chosen]):
        raise InputError(
            f"models={text}: found {','.join(networks)} with test_dataset_name, wanted fast or "
            "others (a network is chosen on validation labels, and there all labels train)"
        )
    models = {name: task.models[name] for name in task.models if name in chosen}
    if config["until"] and not find_season_models(models):
        raise InputError(f"until with models={text}: wanted a row of features, as embedding")
    return add_maps(models, task.map_methods, sources)


def load_checkpoints(config):
    """{path: content} of every checkpoint; InputError where they are not of one data set.

    Of train.py alone: the encoder of a classifier has learned from labels that are chosen anew.
    """
    paths = config["checkpoint_path"].split(",")
    checkpoints = {path: load_checkpoint(path, ("pretrained",)) for path in paths}
    first = checkpoints[paths[0]]
    for path, other in checkpoints.items():
        differ = [key for key in INHERITED if other["config"][key] != first["config"][key]]
        differ += [key for key in ("mean", "std") if not other[key].equal(first[key])]
        if differ:
            raise InputError(
                f"{path}: found another {', '.join(differ)} than in {paths[0]}, wanted checkpoints "
                "of one data set and one split"
            )
    return checkpoints


# ---- report --------------------------------------------------------------------------------------


def main(config):
    """Compare models. Returns what `score_models` does."""
    refuse_torchrun()
    config = check(config)
    sources = parse_sources(config["maps"], reserved={*MODELS, *QUANTITY_MODELS, *FEATURES})
    counts, days, task = read_counts(config), read_days(config), find_task(config)
    models = read_models(config, task, sources)
    folder = config["output_dir"] or (
        Path(config["checkpoint_path"].split(",")[0]).parent / "label_efficiency"
    )
    refuse_training_folder(folder)
    runtime = start_runtime(config["device"])
    checkpoints = load_checkpoints(config)
    first = next(iter(checkpoints.values()))
    with tempfile.TemporaryDirectory(prefix="label_efficiency-") as base_path:
        data, maps = config, {"train": {}, "test": {}}
        if sources or config["test_dataset_name"]:
            data = config | {"base_path": base_path}
            maps = share_labels(config, sources, first, base_path, task.answers)
        for count in counts:  # too few labels for one of them are found before hours of work
            open_split("train", first, data, count)
        test_set = open_split("test", first, data)
        if days:  # a day without observations, too
            read_split(test_set, {}, known_by=days[0])
        if config["test_dataset_name"]:
            whole = open_split("train", first, data | {"most_pixels": MAX_INT})
            notice_same_ground(whole, test_set)
        else:
            notice_splits(test_set.tiles)
            for path, checkpoint in checkpoints.items():
                notice_seen_pixels(test_set, checkpoint, path)
        output_dir = make_output_dir(folder)
        with lock_folder(output_dir):
            return score_models(
                config, data, models, checkpoints, maps, test_set, output_dir, runtime
            )


def score_models(config, data, models, checkpoints, maps, test_set, output_dir, runtime):
    """Score, test and plot. Returns a dict of scores, tests, retrieval, rankme, ..

    data: the config with the base_path of the tiles that are read; maps: of `share_labels`.
    scores: a dict for each count, seed and model (label_count, until, seed, model, checkpoint, the
    scores of the task, chosen, folds).
    """
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)
    log = start_log(config, "label_efficiency", output_dir, runtime)

    # features of the test split, and how steady they are
    contents = list(checkpoints.values())
    first = contents[0]
    train_set = open_split("train", first, data | {"most_pixels": MAX_INT})
    extractors = build_extractors(contents, train_set.tiles, config["draws"], runtime)
    some = min(test_set.num_pixels, config["retrieval_pixels"])
    steadiness = measure_steadiness(open_split("test", first, data, some), extractors)
    test = read_split(test_set, extractors, maps["test"])
    task = find_task(config)(test[1], test_set)
    all_labels = train_set.num_pixels
    result = {"scores": [], "tests": [], "retrieval": steadiness, "all_labels": all_labels}
    result |= {"rankme": measure_ranks(test[0], some), "config": dict(config), **task.about}
    result["dimensions"] = first["backbone"]["latent_dim"]
    result["rows"] = {name: models[name].label for name in models}  # as in table, figure and wandb

    # each count is written when it is done; what is done of one is kept until the end
    kept = open_kept(output_dir / ".kept", config, checkpoints, train_set, test_set, maps)
    pairs, counts, days = list(checkpoints.items()), read_counts(config), read_days(config)
    comparison = Comparison(
        data, runtime, task, models, pairs, extractors, maps["train"], test, output_dir, kept
    )
    bar = ProgressBar(total=len(counts) * config["seeds"] * len(models), unit="model")
    for count in counts:
        rows, tests = comparison.score_count(count, all_labels, bar)
        result["scores"] += rows
        result["tests"] += tests
        save_result(result, task, models, output_dir)
        step = rows[0]["label_count"]
        log.line({"step": step, **find_means(rows, result["rows"], task.logged)})
    bar.close()
    if days:
        result["season"] = score_season(comparison, days, counts[-1], train_set, test_set)
        save_result(result, task, models, output_dir)
    shutil.rmtree(kept)
    report(result, task, output_dir, log)
    return result


def report(result, task, output_dir, log):
    """Print the tables and where the pictures are, and log these."""
    columns = {"label_efficiency": "the number of labels"}
    print(f"\n{write_table(result, task)}")
    if "season" in result:
        columns["season"] = "the day up to which observations are read"
        print(write_season(result, task))
    log.images({name: output_dir / f"{name}.png" for name in columns})
    log.finish()
    for name, column in columns.items():
        print(f"{output_dir / name}.png: {next(iter(task.scores.values())).name} against {column}")


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
