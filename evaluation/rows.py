"""The rows of label_efficiency.py: which features meet which method, for classes and a quantity."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """A row of the table; features and method are "" for a network that is trained."""

    label: str
    color: str
    features: str = ""
    method: str = ""


OWN = (
    "embedding",
    "discriminant",
    "vectors",
    "neighbours",
    "finetuned",
    "both",
    "both_discriminant",
)
NETWORKS = ("finetuned", "scratch")  # rows that are not in OWN are baselines
FEATURES = {  # their names, as in the labels of rows
    "embedding": "embedding",
    "untrained": "untrained encoder",
    "series": "gap-filled series",
    "harmonic": "harmonic coefficients",
}
_NAMES = {**FEATURES, "embedding+harmonic": "embedding and harmonics"}
MAP_COLORS = ("#8c564b", "#b07aa1", "#7f9c1f", "#d4a017")


def _join(features, method, color):
    """The row of a method on features."""
    label = f"{_NAMES.get(features, features)} + {method.removeprefix('k ')}"
    return Model(label, color, features, method)


LOGISTIC, DISCRIMINANT, FOREST = "logistic regression", "discriminant analysis", "random forest"
RIDGE, NEIGHBOURS, VECTORS = "ridge regression", "k nearest neighbours", "support vector machine"
MODELS = {  # of classes
    "embedding": _join("embedding", LOGISTIC, "#08519c"),
    "discriminant": _join("embedding", DISCRIMINANT, "#2171b5"),
    "vectors": _join("embedding", VECTORS, "#54278f"),
    "neighbours": _join("embedding", NEIGHBOURS, "#3b8bc8"),
    "finetuned": Model("fine-tuned network", "#6a51a3"),
    "series": _join("series", LOGISTIC, "#e6820a"),
    "series_discriminant": _join("series", DISCRIMINANT, "#b8860b"),
    "series_vectors": _join("series", VECTORS, "#a6761d"),
    "forest": _join("series", FOREST, "#31a354"),
    "harmonic": _join("harmonic", LOGISTIC, "#c51b1b"),
    "harmonic_discriminant": _join("harmonic", DISCRIMINANT, "#e7298a"),
    "harmonic_vectors": _join("harmonic", VECTORS, "#f781bf"),
    "untrained": _join("untrained", LOGISTIC, "#969696"),
    "untrained_discriminant": _join("untrained", DISCRIMINANT, "#bdbdbd"),
    "scratch": Model("network from scratch", "#252525"),
    "both": _join("embedding+harmonic", LOGISTIC, "#17a2a2"),
    "both_discriminant": _join("embedding+harmonic", DISCRIMINANT, "#0b7285"),
}
MAP_METHODS = {"": LOGISTIC, "_discriminant": DISCRIMINANT, "_vectors": VECTORS}
MAP_METHODS |= {"_neighbours": NEIGHBOURS}
QUANTITY_MODELS = {
    "embedding": _join("embedding", RIDGE, "#08519c"),
    "neighbours": _join("embedding", NEIGHBOURS, "#3b8bc8"),
    "finetuned": MODELS["finetuned"],
    "series": _join("series", RIDGE, "#e6820a"),
    "forest": _join("series", FOREST, "#31a354"),
    "harmonic": _join("harmonic", RIDGE, "#c51b1b"),
    "harmonic_forest": _join("harmonic", FOREST, "#e7298a"),
    "untrained": _join("untrained", RIDGE, "#969696"),
    "scratch": MODELS["scratch"],
    "both": _join("embedding+harmonic", RIDGE, "#17a2a2"),
}
QUANTITY_MAP_METHODS = {"": RIDGE, "_neighbours": NEIGHBOURS}


def add_maps(models, methods, maps):
    """{name: Model} of models, and of each embedding map of others with each of the methods.

    maps: their names; methods: {what follows the name: method}.
    """
    models = dict(models)
    for number, name in enumerate(maps):
        for suffix, method in methods.items():
            models[name + suffix] = _join(name, method, MAP_COLORS[number % len(MAP_COLORS)])
    return models
