"""Compare recipes of pretraining on small labelled tiles: one JSON line for each run.

A recipe is what it changes in BASE. A run trains an encoder by one recipe on one data set with one
seed, and scores logistic regression ("scores") and linear discriminant analysis ("discriminant") on
its frozen representations, with several numbers of labels.
Runs that results.jsonl has are not done again, and encoders that are kept are scored without being
trained again, so it can be stopped at any time. Several processes share the work:

    OMP_NUM_THREADS=1 python experiments/study.py part=0 parts=2 &
    OMP_NUM_THREADS=1 python experiments/study.py part=1 parts=2 &
    python experiments/study.py recipes=predict,sizes sets=arkansas_2021 seeds=0,1,2
    python experiments/study.py summary=true

The loop is train.py's in short, in memory and with knobs that train.py does not have, since they
lost or were not decided. Shapes: N pixels, T dates, V views, S drawn dates, B bands.
"""

import hashlib
import json
import sys
import time
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones import TransformerEncoder, attention_pool, build_backbone
from barlow_twins import HarmonicDecoder, barlow_twins_loss
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from evaluation.classifiers import fit_classifier
from evaluation.scores import macro_f1
from running.device import start_runtime
from running.distributed import BatchNorm
from running.errors import InputError
from running.files import atomic_write
from running.script import run_script
from transforms import (
    blend,
    clear_dates,
    encode_days,
    gap_fill,
    harmonic_coefficients,
    split_dates,
    standardise,
)
from utils import encode_series, learning_rate, rankme, retrieval

run_config = {
    "recipes": "",  # names in RECIPES and CLASSICAL, divided by commas; empty: all
    "sets": "arkansas_2021,california_2021,caatinga_2025,flanders_2018",
    "seeds": "0",  # of pretraining, divided by commas
    "base_path": "../shared",  # folder above data/
    "results": str(Path(__file__).with_name("results.jsonl")),
    "weights": "outputs/study",  # folder that keeps the encoders
    "part": 0,  # of the runs, every parts-th from this one on
    "parts": 1,
    "summary": False,  # print the table of what results.jsonl has, and train nothing
    "head": "scores",  # whose scores the table has: scores (logistic regression) or discriminant
    "over": "predict",  # the recipe that the table's gains are over
}

COUNTS = {50: 6, 100: 6, 500: 3, 2000: 2}  # labels (of fewer, all): how many draws of them

BASE = {
    "width": 64,
    "depth": 2,
    "latent_dim": 128,
    "queries": 1,  # of the attention pooling
    "day_cycles": 0,  # highest harmonic of the year in the encoding of days; 0: width / 2
    "projector_dim": 512,
    "projector_hidden": 2,  # layers
    "steps": 1200,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "hold_fraction": 0.3,
    "sample_size": 16,  # dates of a view
    "min_sample_size": 16,  # the fewest dates of a view that a step reads
    "barlow": 1.0,  # weight of the Barlow Twins loss
    "barlow_lambda": 0.005,
    "barlow_dims": 0,  # so many dimensions of the representation are projected; 0: all
    "mix_up": 1.0,
    "mix_by": "position",  # day: the other pixel is looked up at the days of this one
    "prediction": 0.0,  # weight of predicting observations
    "decoder": "harmonic",  # harmonic or mlp
    "harmonics": 8,
    "draws": "random",  # of the two views' dates; disjoint: of two halves of a pixel's dates
    "average": 0.0,  # decay of an average of the weights, which is scored
    "targets": "other",  # the other view's observations, or all clear ones of the pixel
    "blend": 0.0,  # share of the pixels that are blended with another one of the batch
    "blend_range": [-0.5, 0.5],  # by so much
    "jitter": 0.0,  # deviation of a shift of each band of a view
    "uneven": False,  # each pixel's jitter has a deviation between 0 and that
    "scale": 0.0,  # deviation of a factor of a view's brightness
    "noise": 0.0,  # deviation of noise on every value
    "band_dropout": 0.0,  # share of the bands of a view that are set to their mean
    "bf16": True,  # matrix products in bfloat16
}
PREDICT = {"prediction": 100.0, "mix_up": 0.0, "learning_rate": 3e-3}
SIZES = PREDICT | {"min_sample_size": 8}
RATE = SIZES | {"learning_rate": 6e-3}
BLEND = RATE | {"blend": 1.0, "bf16": False}  # run on a CPU that is slow in bfloat16
HALF = BLEND | {"blend": 0.5}
RECIPES = {
    "untrained": {"steps": 0},
    "base": {},
    "predict": PREDICT,
    "predict all": PREDICT | {"targets": "all"},
    "predict all + float32": PREDICT | {"targets": "all", "bf16": False},
    "predict all + mlp": PREDICT | {"targets": "all", "decoder": "mlp"},
    "sizes": SIZES,  # 8 to 16 dates
    "sizes 8 to 24": SIZES | {"sample_size": 24},
    "sizes + rate 6e-3": RATE,
    "sizes + rate 6e-3 + decay .1": SIZES | {"learning_rate": 6e-3, "weight_decay": 0.1},
    "sizes + 400 steps": SIZES | {"steps": 400},
    "sizes + 4 queries": SIZES | {"queries": 4},
    "sizes + jitter .1": SIZES | {"jitter": 0.1},
    "sizes + jitter .05": SIZES | {"jitter": 0.05},
    "sizes + mix-up": SIZES | {"mix_up": 1.0},
    "sizes + no prediction": SIZES | {"prediction": 0.0},
    "sizes + scale .1": SIZES | {"scale": 0.1},
    "sizes + noise .2": SIZES | {"noise": 0.2},
    # one change at a time from the best so far, "sizes + rate 6e-3"
    "rate + 4 queries": RATE | {"queries": 4},
    "rate + disjoint": RATE | {"draws": "disjoint"},
    "rate + average .995": RATE | {"average": 0.995},
    "rate + uneven jitter .1": RATE | {"jitter": 0.1, "uneven": True},
    "rate + projector 1024": RATE | {"projector_dim": 1024},
    "rate + projector 256": RATE | {"projector_dim": 256},
    "rate + projector 128": RATE | {"projector_dim": 128},
    "rate + projector 256 + uneven jitter .1": RATE
    | {"projector_dim": 256, "jitter": 0.1, "uneven": True},
    "rate + projector 256 + uneven jitter .1 + 4000 steps": RATE
    | {"projector_dim": 256, "jitter": 0.1, "uneven": True, "steps": 4000},
    "rate + prediction 300": RATE | {"prediction": 300.0},
    "rate + latent 256": RATE | {"latent_dim": 256},
    "rate + float32": RATE | {"bf16": False},
    "rate + blend": BLEND,
    "rate + blend half": HALF,
    "rate + blend 0 to 1": BLEND | {"blend_range": [0.0, 1.0]},
    "rate + blend -1 to .5": BLEND | {"blend_range": [-1.0, 0.5]},
    # one change at a time from "rate + blend half"
    "half + latent 256": HALF | {"latent_dim": 256},
    "half + latent 64": HALF | {"latent_dim": 64},
    "half + mlp": HALF | {"decoder": "mlp"},
    "half + harmonics 4": HALF | {"harmonics": 4},
    "half + prediction 30": HALF | {"prediction": 30.0},
    "half + prediction 300": HALF | {"prediction": 300.0},
    "half + prediction alone": HALF | {"barlow": 0.0},
    "half + lambda .02": HALF | {"barlow_lambda": 0.02},
    "half + lambda .001": HALF | {"barlow_lambda": 0.001},
    "half + batch 512": HALF | {"batch_size": 512, "steps": 600},  # as many samples
    "half + batch 128": HALF | {"batch_size": 128, "steps": 2400},
    "half + depth 1": HALF | {"depth": 1, "steps": 2000},  # about as long
    "half + depth 3": HALF | {"depth": 3, "steps": 850},
    "half + width 128": HALF | {"width": 128, "steps": 520},
    "half + sizes 12 to 16": HALF | {"min_sample_size": 12},
    "half + sizes 4 to 16": HALF | {"min_sample_size": 4},
    "half + band dropout .1": HALF | {"band_dropout": 0.1},
    "half + mix-up": HALF | {"mix_up": 1.0},
    "half + 1 hidden layer": HALF | {"projector_hidden": 1},
    "half + 3 hidden layers": HALF | {"projector_hidden": 3},
    "half + days to 8 cycles": HALF | {"day_cycles": 8},
    "half + days to 4 cycles": HALF | {"day_cycles": 4},
    "half + days to 2 cycles": HALF | {"day_cycles": 2},
    "half + rate 3e-3": HALF | {"learning_rate": 3e-3},
    "half + rate 12e-3": HALF | {"learning_rate": 12e-3},
    "half + projected 64 of 128": HALF | {"barlow_dims": 64},
    "half + 12000 steps": HALF | {"steps": 12_000},
    # with 4000 steps: train.py's defaults
    "8 cycles + mix-up by day": HALF | {"day_cycles": 8, "mix_up": 1.0, "mix_by": "day"},
}
CLASSICAL = {
    "series": ("series", "logistic regression"),
    "forest": ("series", "random forest"),
    "harmonic": ("harmonic", "logistic regression"),
}


# ---- data ----------------------------------------------------------------------------------------


class Pixels:
    """All series of a data set in memory.

    x (N, T, B) standardised and doys (N, T), padded: of the training split, with or without labels.
    splits: {"train", "test"} of labelled pixels, x, doys, labels, groups each.
    """

    def __init__(self, base_path, name):
        every = SentinelTimeSeriesDataset(base_path, name, split="train")
        self.num_bands = every.num_bands
        self.x, self.doys = _read_all(every)
        keywords = {"mean": every.mean, "std": every.std, "batch_size": 1 << 20}
        self.splits = {}
        for split in ("train", "test"):
            labelled = SentinelTimeSeriesDatasetForDownstreaming(
                base_path, name, split=split, **keywords
            )
            self.splits[split] = next(iter(iterate_batches(labelled)))
        self.days = torch.from_numpy(np.unique(np.concatenate([t.doys for t in every.tiles])))


def _read_all(dataset):
    """All clear observations of a data set's pixels: x (N, T, B) and doys (N, T), padded."""
    parts = []
    for index, tile in enumerate(dataset.tiles):
        pixels = np.flatnonzero(dataset.pixel_mask(index))
        bands, doys = tile.read_dates(pixels, clear_dates(tile.read_clear(pixels)))
        parts.append((standardise(bands, dataset.mean, dataset.std), doys))
    longest = max(doys.shape[1] for _, doys in parts)
    x = torch.cat([F.pad(x, (0, 0, 0, longest - x.shape[1])) for x, _ in parts])
    return x, torch.cat([F.pad(doys, (0, longest - doys.shape[1])) for _, doys in parts])


def draw_views(doys, size, generator, draws):
    """Two random subsets of the clear dates of series (N, T): places (N, 2, S), ascending.

    Dates are repeated where there are fewer. Disjoint draws are of two random halves of the dates.
    """
    count, place = (doys > 0).sum(1, keepdim=True), torch.arange(size)

    def shuffle():
        noise = torch.rand(doys.shape, generator=generator)
        return noise.masked_fill(doys == 0, 2.0).argsort(1)

    if draws == "disjoint":
        order, half = shuffle(), count // 2
        views = [order.gather(1, place % half), order.gather(1, half + place % (count - half))]
    else:
        views = [shuffle().gather(1, place % count) for _ in range(2)]
    return torch.stack(views, 1).sort(2).values


def blend_pixels(x, doys, recipe, generator):
    """Views x (N, 2, S, B) with a share of the pixels blended with another one of the batch."""
    order = torch.randperm(len(x), generator=generator)
    number = torch.rand(2, len(x), generator=generator)
    low, high = recipe["blend_range"]
    weight = (low + (high - low) * number[0]) * (number[1] < recipe["blend"])
    return blend(x, doys, x[order], doys[order], weight)


def augment(x, recipe, generator):
    """Views x (N, V, S, B) with brightness, bands and values disturbed."""
    n, v, s, b = x.shape
    for key, shape in (("scale", (n, v, 1, 1)), ("jitter", (n, v, 1, b)), ("noise", x.shape)):
        if recipe[key]:
            disturbance = recipe[key] * torch.randn(shape, generator=generator)
            if recipe["uneven"]:
                disturbance = disturbance * torch.rand(n, 1, 1, 1, generator=generator)
            x = x + disturbance * ((x + 1) if key == "scale" else 1)
    if recipe["band_dropout"]:
        x = x * (torch.rand(n, v, 1, b, generator=generator) >= recipe["band_dropout"])
    return x


# ---- model ---------------------------------------------------------------------------------------


class MLPDecoder(nn.Module):
    """The representation, modulated by the encoding of a day, through an MLP to bands."""

    def __init__(self, *, latent_dim, num_bands, harmonics, width=128):
        super().__init__()
        self.features = 2 * harmonics
        self.from_y = nn.Linear(latent_dim, width)
        self.scale = nn.Linear(self.features, width)
        self.shift = nn.Linear(self.features, width)
        self.mlp = nn.Sequential(
            nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, num_bands)
        )

    def forward(self, y, doys):
        waves = encode_days(doys, self.features)
        return self.mlp(self.from_y(y)[:, None] * self.scale(waves) + self.shift(waves))


class ManyQueries(TransformerEncoder):
    """The encoder with several learned queries in its attention pooling."""

    def __init__(self, *, queries, **keywords):
        super().__init__(**keywords)
        self.score = nn.Linear(self.date_dim, queries, bias=False)
        self.head = nn.Linear(queries * self.date_dim, self.latent_dim, bias=False)

    def pool(self, x, padding_mask=None):
        scores = self.score(x).split(1, -1)
        return self.head(torch.cat([attention_pool(s, x, padding_mask) for s in scores], -1))


def build_projector(size_in, size, hidden):
    """barlow_twins.Projector with another number of hidden layers."""
    widths = [size_in] + [size] * hidden
    layers = [
        (nn.Linear(before, after, bias=False), BatchNorm(after), nn.ReLU())
        for before, after in pairwise(widths)
    ]
    return nn.Sequential(*chain(*layers), nn.Linear(widths[-1], size, bias=False))


def build_encoder(pixels, recipe):
    names = ("sample_size", "latent_dim", "width", "depth", "day_cycles")
    sizes = {"num_bands": pixels.num_bands, **{name: recipe[name] for name in names}}
    if recipe["queries"] > 1:
        return ManyQueries(queries=recipe["queries"], **sizes)
    return build_backbone("transformer", **sizes)


# ---- training ------------------------------------------------------------------------------------


def pretrain(pixels, recipe, seed):
    """Train an encoder by a recipe. Returns it, and the last step's losses."""
    torch.manual_seed(seed)
    latent_dim = recipe["latent_dim"]
    projected = recipe["barlow_dims"] or latent_dim
    projector = build_projector(projected, recipe["projector_dim"], recipe["projector_hidden"])
    backbone = build_encoder(pixels, recipe)
    kind = {"harmonic": HarmonicDecoder, "mlp": MLPDecoder}[recipe["decoder"]]
    decoder = kind(latent_dim=latent_dim, num_bands=pixels.num_bands, harmonics=recipe["harmonics"])
    modules = nn.ModuleList([backbone, projector, decoder])
    groups = [
        {"params": [p for p in modules.parameters() if p.ndim > 1]},
        {"params": [p for p in modules.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, weight_decay=recipe["weight_decay"], fused=True)
    generator, order, losses = torch.Generator().manual_seed(seed), [], {}
    steps, batch_size = recipe["steps"], min(recipe["batch_size"], len(pixels.x))
    schedule = (steps, min(100, steps // 10), recipe["hold_fraction"])
    decay = get_ema_multi_avg_fn(recipe["average"])
    average = AveragedModel(backbone, multi_avg_fn=decay) if recipe["average"] else None
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(recipe["learning_rate"], step, *schedule)
        if len(order) < batch_size:
            order = torch.randperm(len(pixels.x), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        loss, losses = step_loss(pixels, rows, modules, recipe, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if average:
            average.update_parameters(backbone)
    backbone = average.module if average else backbone
    return backbone.eval(), {name: round(float(value), 4) for name, value in losses.items()}


def mix_up(x, doys, weight, order, mix_by):
    """View a mixed with another pixel: at a's days, or with the i-th dates of its view b."""
    if mix_by == "day":
        mixed = blend(x[:, :1], doys[:, :1], x[order], doys[order], 1 - weight)
        return mixed[:, 0], doys[:, 0]
    mixed = x[:, 0].lerp(x[order, 1], 1 - weight[:, None, None])
    return mixed, doys[:, 0].lerp(doys[order, 1], 1 - weight[:, None])


def step_loss(pixels, rows, modules, recipe, generator):
    """The loss of a step on some pixels, and a dict of its parts."""
    backbone, projector, decoder = modules
    all_x, all_doys = pixels.x[rows], pixels.doys[rows]
    places = draw_views(all_doys, recipe["sample_size"], generator, recipe["draws"])
    pixel = torch.arange(len(rows))[:, None, None]
    observed, days = all_x[pixel, places], all_doys[pixel, places]
    if recipe["blend"]:
        observed = blend_pixels(observed, days, recipe, generator)
    sizes = (recipe["min_sample_size"], recipe["sample_size"] + 1)
    number = int(torch.randint(*sizes, (), generator=generator))
    keep = torch.randperm(recipe["sample_size"], generator=generator)[:number].sort().values
    x, doys = augment(observed, recipe, generator)[:, :, keep], days[:, :, keep].float()
    views, mixture = list(zip(x.unbind(1), doys.unbind(1), strict=True)), None
    if recipe["mix_up"]:
        mixture = torch.rand(len(rows), generator=generator), torch.randperm(len(rows))
        views.append(mix_up(x, doys, *mixture, recipe["mix_by"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe["bf16"]):
        y = [backbone(*view) for view in views]
        z = [projector(view[:, : recipe["barlow_dims"] or None]) for view in y]
    loss, parts = barlow_twins_loss([view.float() for view in z], recipe, mixture)
    parts["barlow"], loss = loss.detach(), recipe["barlow"] * loss
    if recipe["prediction"]:
        errors = []
        for view in (0, 1):
            target, at = (observed[:, view], days[:, view])
            if recipe["targets"] == "all":
                target, at = all_x, all_doys
            predicted = decoder(y[1 - view].float(), at)
            errors.append(F.smooth_l1_loss(predicted[at > 0], target[at > 0]))
        parts["prediction"] = torch.stack(errors).mean()
        loss = loss + recipe["prediction"] * parts["prediction"]
    return loss, {name: value.detach() for name, value in parts.items()}


# ---- scores --------------------------------------------------------------------------------------


def score(features, splits, classifier):
    """Test macro-F1 for each number of labels, as in label_efficiency.py, the mean over draws.

    features: function of x, doys that gives (N, F).
    """
    (x, labels), (test_x, test_labels) = (
        (features(x, doys).numpy(), labels.numpy())
        for x, doys, labels, _ in (splits["train"], splits["test"])
    )
    scores = {}
    for count, draws in COUNTS.items():
        results, count = [], min(count, len(labels))
        for draw in range(draws if count < len(labels) else 1):
            chosen = np.random.default_rng(draw).choice(len(labels), count, replace=False)
            model, _ = fit_classifier(classifier, x[chosen], labels[chosen], draw)
            results.append(macro_f1(test_labels, model.predict(test_x)))
        scores[count] = round(float(np.mean(results)), 4)
    return scores


def run_classical(pixels, name):
    kind, classifier = CLASSICAL[name]
    features = {
        "series": lambda x, doys: gap_fill(x, doys, pixels.days).flatten(1),
        "harmonic": harmonic_coefficients,
    }
    names = {"scores": classifier, "discriminant": "discriminant analysis"}
    return {key: score(features[kind], pixels.splits, names[key]) for key in names}


def run_recipe(pixels, recipe, seed, weights, runtime):
    """Train (or load) and score: what a line of results.jsonl has."""
    start, result = time.process_time(), {}
    if weights.exists():
        backbone = build_encoder(pixels, recipe).eval()
        backbone.load_state_dict(torch.load(weights, weights_only=True))
    else:
        backbone, losses = pretrain(pixels, recipe, seed)
        with atomic_write(weights) as part:
            torch.save(backbone.state_dict(), part)
        result = {"losses": losses, "train_seconds": round(time.process_time() - start, 1)}

    def encode(x, doys):
        return encode_series(backbone, x, doys, runtime)[0]

    x, doys, *_ = pixels.splits["test"]
    halves = split_dates(x[:4000], doys[:4000], torch.Generator().manual_seed(0))
    return result | {
        "scores": score(encode, pixels.splits, "logistic regression"),
        "discriminant": score(encode, pixels.splits, "discriminant analysis"),
        "retrieval": round(retrieval(*(encode(*half) for half in halves)), 4),
        "rankme": round(rankme(encode(x, doys))[0], 1),
    }


# ---- the table -----------------------------------------------------------------------------------


def read_results(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def summarise(results, head, over):
    """Print test macro-F1 by data set and number of labels, and the mean gain over a recipe."""
    results = [row for row in results if head in row]
    sets = sorted({row["set"] for row in results})
    table = {}
    for row in results:
        scores = list(row[head].values())
        table.setdefault(row["recipe"], {}).setdefault(row["set"], []).append(scores)
    means = {
        name: {data: np.mean(rows, 0) for data, rows in by_set.items()}
        for name, by_set in table.items()
    }
    print("| recipe | gain | " + " | ".join(sets) + " |\n" + "|---" * (len(sets) + 2) + "|")
    for name, by_set in means.items():
        gains = [by_set[data] - means[over][data] for data in by_set if data in means[over]]
        cells = [
            " ".join(f"{value:.3f}"[1:] for value in by_set[data]) if data in by_set else ""
            for data in sets
        ]
        seeds = min(len(rows) for rows in table[name].values())
        gain = f"{np.mean(gains):+.3f} ({len(gains)} sets, {seeds} seed)"
        print(f"| {name} | {gain} | " + " | ".join(cells) + " |")


def main(config):
    if config["head"] not in ("scores", "discriminant"):
        raise InputError(f"head={config['head']}: wanted scores or discriminant")
    known = [*CLASSICAL, *RECIPES]
    names = config["recipes"].split(",") if config["recipes"] else known
    for key, given in (("recipes", names), ("over", [config["over"]])):
        if unknown := [name for name in given if name not in known]:
            raise InputError(f"{key}: found {unknown[0]!r}, wanted some of {', '.join(known)}")
    if config["summary"]:
        shown = {*names, config["over"]}
        results = [row for row in read_results(config["results"]) if row["recipe"] in shown]
        return summarise(results, config["head"], config["over"])
    runs = [
        (name, data, int(seed))
        for seed in config["seeds"].split(",")
        for name in names
        for data in config["sets"].split(",")
    ]
    folder, runtime, loaded = Path(config["weights"]), start_runtime("cpu"), {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, data, seed in runs[config["part"] :: config["parts"]]:
        line = {"recipe": name, "set": data, "seed": seed, "changes": RECIPES.get(name, {})}
        if any(row.items() >= line.items() for row in read_results(config["results"])):
            continue
        if data not in loaded:
            loaded[data] = Pixels(config["base_path"], data)
        if name in CLASSICAL:
            line |= run_classical(loaded[data], name)
        else:
            recipe = BASE | RECIPES[name]
            # a recipe that was changed is another one
            digest = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
            weights = folder / f"{name.replace(' ', '_')}-{digest}-{data}-{seed}.pt"
            line |= run_recipe(loaded[data], recipe, seed, weights, runtime)
        with open(config["results"], "a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    return None


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
