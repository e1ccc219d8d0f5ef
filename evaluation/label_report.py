"""The models that label_efficiency.py compares, and its table and figure."""

import math
from dataclasses import dataclass

from running.files import atomic_write, write_json

import numpy as np

from evaluation.differences import independent_f1
from evaluation.scores import MIN_TEST_PIXELS
from utils import new_figure, save_figure


@dataclass(frozen=True)
class Model:
    """A row of the table; features and classifier are "" for a network that is trained."""

    label: str
    color: str
    features: str = ""
    classifier: str = ""


MODELS = {
    "embedding": Model(
        "embedding + logistic regression", "#08519c", "embedding", "logistic regression"
    ),
    "discriminant": Model(
        "embedding + discriminant analysis", "#2171b5", "embedding", "discriminant analysis"
    ),
    "neighbours": Model(
        "embedding + nearest neighbours", "#3b8bc8", "embedding", "k nearest neighbours"
    ),
    "finetuned": Model("fine-tuned network", "#6a51a3"),
    "series": Model(
        "gap-filled series + logistic regression", "#e6820a", "series", "logistic regression"
    ),
    "series_discriminant": Model(
        "gap-filled series + discriminant analysis", "#b8860b", "series", "discriminant analysis"
    ),
    "forest": Model("gap-filled series + random forest", "#31a354", "series", "random forest"),
    "harmonic": Model(
        "harmonic coefficients + logistic regression", "#c51b1b", "harmonic", "logistic regression"
    ),
    "harmonic_discriminant": Model(
        "harmonic coefficients + discriminant analysis",
        "#e7298a",
        "harmonic",
        "discriminant analysis",
    ),
    "untrained": Model(
        "untrained encoder + logistic regression", "#969696", "untrained", "logistic regression"
    ),
    "untrained_discriminant": Model(
        "untrained encoder + discriminant analysis", "#bdbdbd", "untrained", "discriminant analysis"
    ),
    "scratch": Model("network from scratch", "#252525"),
    "both": Model(
        "embedding and harmonics + logistic regression",
        "#17a2a2",
        "embedding+harmonic",
        "logistic regression",
    ),
    "both_discriminant": Model(
        "embedding and harmonics + discriminant analysis",
        "#0b7285",
        "embedding+harmonic",
        "discriminant analysis",
    ),
}
# the others are baselines
OWN = ("embedding", "discriminant", "neighbours", "finetuned", "both", "both_discriminant")
NETWORKS = ("finetuned", "scratch")
FEATURES = {  # their names, as in the labels of MODELS
    "embedding": "embedding",
    "untrained": "untrained encoder",
    "series": "gap-filled series",
    "harmonic": "harmonic coefficients",
}
MAP_HEADS = {  # a row each of an embedding map of others
    "": ("logistic regression", "logistic regression"),
    "_discriminant": ("discriminant analysis", "discriminant analysis"),
    "_neighbours": ("nearest neighbours", "k nearest neighbours"),
}
MAP_COLORS = ("#8c564b", "#b07aa1", "#7f9c1f", "#d4a017")
FOUND_AGAIN = (
    "Found again: share of {pixels} test pixels of which the features of one half of the dates are "
    "nearer to those of the other half than to those of any other pixel (1: always; by chance: "
    "{chance:.4f}). RankMe: how many dimensions an encoder uses, 1 to {dimensions}. One value for "
    "each checkpoint."
)


def list_models(maps=()):
    """{name: Model} of every row: MODELS, and one of each map name and each of MAP_HEADS."""
    models = dict(MODELS)
    for number, name in enumerate(maps):
        color = MAP_COLORS[number % len(MAP_COLORS)]
        for suffix, (label, classifier) in MAP_HEADS.items():
            models[name + suffix] = Model(f"{name} + {label}", color, name, classifier)
    return models


# ---- table and figure ----------------------------------------------------------------------------


def summarise(result):
    """{name: {label count: (mean, standard deviation or nan) of macro-F1}}, in order."""
    groups = {}
    for row in sorted(result["scores"], key=lambda row: row["label_count"]):
        groups.setdefault(row["model"], {}).setdefault(row["label_count"], []).append(row)
    summary = {}
    for name in result["rows"]:
        for count, rows in groups.get(name, {}).items():
            f1 = independent_f1(rows, result["all_labels"])
            deviation = np.std(f1, ddof=1) if len(f1) > 1 else math.nan
            summary.setdefault(name, {})[count] = (np.mean(f1), deviation)
    return summary


def write_table(result):
    """The whole result as Markdown."""
    summary, seeds, rows = summarise(result), result["config"]["seeds"], result["rows"]
    counts = list(next(iter(summary.values())))
    lines = [
        f"Macro-F1 on {_name_test(result['config'])}, mean and standard deviation of {seeds} draws "
        "of labels:",
        "",
        "| labels | " + " | ".join(str(count) for count in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
    ]
    for name, by_count in summary.items():
        cells = [f"{mean:.3f} ± {std:.3f}" for mean, std in by_count.values()]
        lines.append(f"| {rows[name]} | {' | '.join(cells).replace(' ± nan', '')} |")
    lines += ["", *_write_notes(result)]
    if result["tests"]:
        lines += ["", "| labels | model | best baseline | difference | p | 95 % interval |"]
        lines += ["|---" * 6 + "|", *(_write_test(test, rows) for test in result["tests"]), ""]
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


def _name_test(config):
    if config["test_dataset_name"]:
        return f"all labels of {config['test_dataset_name']}, trained on {config['dataset_name']}"
    return f"the test split of {config['dataset_name']}"


def _write_notes(result):
    """Lines that say which classes macro-F1 is over, and by which folds settings were chosen."""
    classes = result["test_classes"].values()
    out = [f"{entry['name']} ({entry['pixels']})" for entry in classes if not entry["scored"]]
    scored = f"Macro-F1 is over {len(classes) - len(out)} classes"
    if out:
        scored += f"; left out, with fewer than {MIN_TEST_PIXELS} test pixels: {', '.join(out)}"
    units = [row["folds"] for row in result["scores"] if row["folds"]]
    folds = f"C, k and leaf size: chosen over folds of blocks in {units.count('blocks')} fits"
    return [f"{scored}.", *([f"{folds}, of pixels in {units.count('pixels')}."] if units else [])]


def _write_test(test, rows):
    p, interval = test["p_seeds"], test["interval_blocks"]
    cells = [str(test["label_count"]), rows[test["model"]], rows[test["baseline"]]]
    cells += [f"{test['difference']:+.3f}", "" if p is None else f"{p:.3f}"]
    cells += ["" if interval is None else "{:+.3f} .. {:+.3f}".format(*interval)]
    return f"| {' | '.join(cells)} |"


def plot(result, path):
    """Macro-F1 against the number of labels, a line for each model, named at its end."""
    summary, models = summarise(result), list_models(result["maps"])
    figure = new_figure(figsize=(9, 5))
    axes = figure.subplots()
    for place, (name, by_count) in enumerate(summary.items()):
        # side by side, so that the bars of one count do not cover each other
        counts = np.array(list(by_count)) * 1.015 ** (place - (len(summary) - 1) / 2)
        mean, std = np.array(list(by_count.values())).T
        style = {"color": models[name].color, "linestyle": "-" if name in OWN else "--"}
        axes.errorbar(counts, mean, np.nan_to_num(std), marker="o", ms=4, capsize=2, **style)
    counts = list(next(iter(summary.values())))
    axes.set(xscale="log", xlabel="labels", ylabel="test macro-F1")
    figure.suptitle(f"{_name_test(result['config'])}: mean and deviation over draws of labels")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    ends = {name: by_count[counts[-1]][0] for name, by_count in summary.items()}
    name_lines(axes, ends, models)
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


def find_means(rows, labels):
    """{row of the table/score: mean over the label draws} of one count, for the log.

    labels: {name: row of the table}.
    """
    scores = {}
    for name, label in labels.items():
        own = [row for row in rows if row["model"] == name]
        for key in ("macro_f1", "overall_accuracy"):
            scores[f"{label}/{key}"] = float(np.mean([row[key] for row in own]))
    return scores


def save_result(result, output_dir):
    """Write JSON, table and picture of the counts that are done."""
    write_json(output_dir / "label_efficiency.json", result)
    with atomic_write(output_dir / "label_efficiency.md") as part:
        part.write_text(write_table(result))
    plot(result, output_dir / "label_efficiency.png")
