"""The table and the figures of label_efficiency.py: scores against labels, and against the day."""

import math
from datetime import date, timedelta

from running.files import atomic_write, write_json
from running.tile_json import describe_target

import numpy as np

from evaluation.differences import independent_scores
from evaluation.rows import FEATURES, OWN
from utils import new_figure, save_figure

FOUND_AGAIN = (
    "Found again: share of {pixels} test pixels of which the features of one half of the dates are "
    "nearer to those of the other half than to those of any other pixel (1: always; by chance: "
    "{chance:.4f}). RankMe: how many dimensions an encoder uses, 1 to {dimensions}. One value for "
    "each checkpoint."
)
SIDE_BY_SIDE = {"label_count": 1.015, "until": 1.003}  # factor between the points of two models


# ---- tables --------------------------------------------------------------------------------------


def summarise(rows, result, key, by="label_count"):
    """{name: {column: (mean, standard deviation or nan) of a score}}, in the order of the rows.

    rows: dicts of scores; by: what their columns are, "label_count" or "until".
    """
    groups = {}
    for row in sorted(rows, key=lambda row: row[by]):
        groups.setdefault(row["model"], {}).setdefault(row[by], []).append(row)
    summary = {}
    for name in result["rows"]:
        for column, own in groups.get(name, {}).items():
            scores = independent_scores(own, result["all_labels"], key)
            deviation = np.std(scores, ddof=1) if len(scores) > 1 else math.nan
            summary.setdefault(name, {})[column] = (np.mean(scores), deviation)
    return summary


def write_table(result, task):
    """The whole result as Markdown."""
    seeds = result["config"]["seeds"]
    lines = _write_scores(result["scores"], result, task, "label_count")
    lines += [task.write_note(), *_write_folds(result, task)]
    lines += _write_tests(result["tests"], result, task, "label_count")
    if result["tests"]:
        lines += [
            f"p: paired t-test over the {seeds} draws (would other labels say the same?); with all "
            "labels, over the checkpoints. "
            f"Interval: bootstrap of {result['tests'][0]['blocks']} squares of block_size test "
            "pixels (would other places? It means little where a tile's pixels are scattered ones)."
        ]
        if seeds < 5:
            lines += [f"{seeds} draws are too few for p to mean much: wanted seeds=5 or more."]
    lines += ["", "| features | found again | RankMe |", "|---|---|---|"]
    for name, label in FEATURES.items():
        cells = [
            " ".join(f"{value:{form}}" for value in result[key].get(name, ()))
            for key, form in (("retrieval", ".3f"), ("rankme", ".1f"))
        ]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    pixels = result["retrieval"]["pixels"]
    about = {"pixels": pixels, "chance": 1 / max(1, pixels), "dimensions": result["dimensions"]}
    lines += ["", FOUND_AGAIN.format(**about)]
    return "\n".join(lines) + "\n"


def write_season(result, task):
    """What is known by each day of the cut, as Markdown."""
    season = result["season"]
    lines = [
        f"Only observations up to the day are read. The {season['test_pixels']} test pixels are "
        f"the same for every day: those with an observation up to day {season['days'][0]} "
        f"({season['left_out']} have none and are left out).",
        "",
    ]
    lines += _write_scores(season["scores"], result, task, "until")
    lines += [season["note"], *_write_tests(season["tests"], result, task, "until")]
    return "\n".join(lines).rstrip() + "\n"


def _write_scores(rows, result, task, by):
    """Lines of a table for each score that the task puts into tables."""
    lines, titles = [], {"label_count": "labels", "until": "up to day"}
    labels = "" if by == "label_count" else f", {rows[0]['label_count']} labels"
    for key, score in task.scores.items():
        summary = summarise(rows, result, key, by)
        columns = [name_column(column, by) for column in next(iter(summary.values()))]
        unit = f" [{task.target['unit']}]" if key == "rmse" and task.target["unit"] else ""
        lines += [
            f"{score.name}{unit} on {_name_test(result['config'])}{labels}, mean "
            f"and standard deviation of {result['config']['seeds']} draws of labels:",
            "",
            f"| {titles[by]} | {' | '.join(columns)} |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for model, cells in summary.items():
            words = [
                f"{mean:{score.number}} ± {std:{score.spread}}" for mean, std in cells.values()
            ]
            lines.append(f"| {result['rows'][model]} | {' | '.join(words).replace(' ± nan', '')} |")
        lines.append("")
    return lines


def name_column(value, by, form="{} ({})"):
    """A number of labels, or a day of year as "120 (30 Apr)"."""
    if by == "label_count":
        return str(value)
    day = date(2023, 1, 1) + timedelta(min(value, 365) - 1)
    return form.format(value, f"{day.day} {day:%b}")


def _name_test(config):
    if config["test_dataset_name"]:
        return f"all labels of {config['test_dataset_name']}, trained on {config['dataset_name']}"
    return f"the test split of {config['dataset_name']}"


def _write_folds(result, task):
    """A line that says over which folds settings were chosen; none where none were."""
    units = [row["folds"] for row in result["scores"] if row["folds"]]
    folds = f"{task.settings}: chosen over folds of blocks in {units.count('blocks')} fits"
    return [f"{folds}, of pixels in {units.count('pixels')}."] if units else []


def _write_tests(tests, result, task, by):
    """Lines of the table of differences; none without tests."""
    if not tests:
        return []
    spread = next(iter(task.scores.values())).spread
    first = "labels" if by == "label_count" else "up to day"
    better = "" if task.sign > 0 else " (below 0: better)"
    lines = ["", f"| {first} | model | best baseline | difference{better} | p | 95 % interval |"]
    lines.append("|---" * 6 + "|")
    for test in tests:
        p, interval = test["p_seeds"], test["interval_blocks"]
        cells = [
            name_column(test[by], by),
            *(result["rows"][test[k]] for k in ("model", "baseline")),
        ]
        cells += [f"{test['difference']:+{spread}}", "" if p is None else f"{p:.3f}"]
        ends = [f"{end:+{spread}}" for end in interval or ()]
        lines.append(f"| {' | '.join([*cells, ' .. '.join(ends)])} |")
    return [*lines, ""]


# ---- figures -------------------------------------------------------------------------------------


def plot(rows, result, task, models, by, path):
    """The first score against a column (`summarise`), a line for each model, named at its end."""
    key, score = next(iter(task.scores.items()))
    summary = summarise(rows, result, key, by)
    columns = list(next(iter(summary.values())))
    figure = new_figure(figsize=(9, 5))
    axes = figure.subplots()
    for place, (model, cells) in enumerate(summary.items()):
        mean, std = np.array(list(cells.values())).T
        # side by side, so that the bars of one column do not cover each other
        across = np.array(columns) * (SIDE_BY_SIDE[by] ** (place - (len(summary) - 1) / 2))
        style = {"color": models[model].color, "linestyle": "-" if model in OWN else "--"}
        axes.errorbar(across, mean, np.nan_to_num(std), marker="o", ms=4, capsize=2, **style)
    if by == "label_count":
        axes.set(xscale="log", xlabel="labels")
        title = "mean and deviation over draws of labels"
    else:
        axes.set(xlabel="observations up to this day")
        title = f"how early is a map worth drawing? ({rows[0]['label_count']} labels)"
    quantity = f"{score.name} of {describe_target(task.target)}" if task.target else score.name
    axes.set(ylabel=f"{quantity}, test pixels")
    figure.suptitle(f"{_name_test(result['config'])}: {title}")
    axes.set_xticks(columns, [name_column(column, by, "{}\n{}") for column in columns])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    name_lines(axes, {model: cells[columns[-1]][0] for model, cells in summary.items()}, models)
    save_figure(figure, path)


def name_lines(axes, ends, models):
    """Write each model's name beside the end of its line, apart enough to be read."""
    bottom, top = axes.get_ylim()
    gap = (top - bottom) / 20
    order = sorted(ends, key=ends.get)
    heights = np.array([ends[name] for name in order])
    for _ in range(200):  # neighbours that are too close push each other away
        overlap = np.maximum(gap - np.diff(heights), 0) / 2
        heights[:-1] -= overlap
        heights[1:] += overlap
    end = min(axes.get_xticks()[-1] * 1.03, axes.get_xlim()[1])  # right of the last points
    for name, height in zip(order, heights, strict=True):
        axes.annotate(
            models[name].label,
            (end, ends[name]),
            (1.03, height),
            textcoords=axes.get_yaxis_transform(),  # across in shares of the axes, up in F1
            color=models[name].color,
            va="center",
            fontsize=9,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "relpos": (0, 0.5),  # from the left end of the text
                "color": models[name].color,
                "lw": 0.6,
            },
        )


def find_means(rows, labels, keys):
    """{row of the table/score: mean over the label draws} of one count, for the log.

    labels: {name: row of the table}; keys: of the scores.
    """
    scores = {}
    for name, label in labels.items():
        own = [row for row in rows if row["model"] == name]
        for key in keys:
            scores[f"{label}/{key}"] = float(np.mean(np.array([row[key] for row in own], float)))
    return scores


def save_result(result, task, models, output_dir):
    """Write JSON, table and picture of the counts that are done; season.md and .png of its days."""
    write_json(output_dir / "label_efficiency.json", result)
    parts = [("label_efficiency", result["scores"], write_table, "label_count")]
    if "season" in result:
        parts.append(("season", result["season"]["scores"], write_season, "until"))
    for name, rows, write, by in parts:
        with atomic_write(output_dir / f"{name}.md") as part:
            part.write_text(write(result, task))
        plot(rows, result, task, models, by, output_dir / f"{name}.png")
