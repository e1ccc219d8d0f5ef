"""Compare recipes of pretraining on small labelled sets: one JSON line for each run.

A recipe is what it changes in BASE. A run trains one recipe on one data set with one seed and
scores logistic regression on the frozen representations of the test split, with several numbers of
labels. Runs that results.jsonl has are not done again, so it can be stopped at any time; several
processes share the work by `part=0 parts=2`, `part=1 parts=2`.

    OMP_NUM_THREADS=1 python experiments/study.py recipes=base,prediction sets=arkansas_2021
    python experiments/study.py summary=true
"""

import hashlib
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones import TransformerEncoder, attention_pool, build_backbone, encode_days
from barlow_twins import barlow_twins_loss
from data import (
    SentinelTimeSeriesDataset,
    SentinelTimeSeriesDatasetForDownstreaming,
    iterate_batches,
)
from runtime import InputError, override, start_runtime
from training import learning_rate
from transforms import gap_fill, mix_up
from utils import encode_series, rankme
from validation import find_folds

run_config = {
    "recipes": "",  # names in RECIPES, comma separated; empty: all
    "sets": "arkansas_2021,california_2021,caatinga_2025,flanders_2018",
    "seeds": "0",
    "base_path": "../shared",
    "results": str(Path(__file__).with_name("results.jsonl")),
    "part": 0,
    "parts": 1,
    "weights": "",  # folder that keeps the encoders; empty: none
    "summary": False,  # print the table of what results.jsonl has, and train nothing
}

# labels: draws of so many; the last is all where a set has fewer
COUNTS = {50: 8, 100: 6, 500: 3, 2000: 2}

BASE = {
    "width": 64,
    "depth": 2,
    "latent_dim": 128,
    "projector_dim": 512,
    "steps": 1200,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "weight_decay": 1e-4,
    "hold": 0.3,
    "sample_size": 16,  # dates of a view
    "smallest": 0,  # 0, or the fewest dates of a view, drawn anew for each step
    "disjoint": False,  # the two views share no date
    "barlow": 1.0,  # weight of the Barlow Twins loss
    "barlow_lambda": 0.005,
    "mix_up": 1.0,
    "prediction": 0.0,  # weight of predicting observations
    "decoder": "harmonic",  # harmonic or mlp
    "harmonics": 8,
    "targets": "other",  # other: the other view's observations; both: of both views; all: clear
    "jitter": 0.0,  # deviation of a shift of each band
    "scale": 0.0,  # deviation of a factor of all bands
    "noise": 0.0,  # deviation of noise on every value
    "day_shift": 0.0,  # days by which a view's calendar is shifted, uniform
    "bf16": True,  # matrix products in bfloat16
    "queries": 1,  # of the attention pooling
    "ema": 0.0,  # decay of the averaged weights
}

PREDICT = {"prediction": 100.0, "mix_up": 0.0, "learning_rate": 3e-3}
RECIPES = {
    "base": {},
    "predict": PREDICT,
    "predict_mlp": PREDICT | {"decoder": "mlp"},
    "all": PREDICT | {"targets": "all"},
    "all_float32": PREDICT | {"targets": "all", "bf16": False},
    "all_mlp": PREDICT | {"targets": "all", "decoder": "mlp"},
    "s8": PREDICT | {"sample_size": 8},
    "s8to16": PREDICT | {"smallest": 8},
    "s8to24": PREDICT | {"smallest": 8, "sample_size": 24},
    "s24": PREDICT | {"sample_size": 24},
    "s4to16": PREDICT | {"smallest": 4},
    "s8to32": PREDICT | {"smallest": 8, "sample_size": 32},
    "8to16_rate6e-3": PREDICT | {"smallest": 8, "learning_rate": 6e-3},
    "8to16_jitter": PREDICT | {"smallest": 8, "jitter": 0.1},
    "8to16_jitter.05": PREDICT | {"smallest": 8, "jitter": 0.05},
    "8to16_queries4": PREDICT | {"smallest": 8, "queries": 4},
    "8to16_steps400": PREDICT | {"smallest": 8, "steps": 400},
    "8to16_barlow0": PREDICT | {"smallest": 8, "barlow": 0.0},
    "8to16_predict0": PREDICT | {"smallest": 8, "prediction": 0.0},
    "8to16_latent32": PREDICT | {"smallest": 8, "latent_dim": 32},
    "8to16_mix_jitter": PREDICT | {"smallest": 8, "mix_up": 1.0, "jitter": 0.05},
    "8to16_mix": PREDICT | {"smallest": 8, "mix_up": 1.0},
    "8to16_steps3600": PREDICT | {"smallest": 8, "steps": 3600},
    "8to16_width128": PREDICT | {"smallest": 8, "width": 128, "steps": 520},
    "8to16_lambda.02": PREDICT | {"smallest": 8, "barlow_lambda": 0.02},
    "8to16_predict400": PREDICT | {"smallest": 8, "prediction": 400.0},
    "8to16_batch128": PREDICT | {"smallest": 8, "batch_size": 128, "steps": 2400},
    "8to16_both": PREDICT | {"smallest": 8, "targets": "both"},
    "8to16_noise": PREDICT | {"smallest": 8, "noise": 0.2},
    "8to16_scale": PREDICT | {"smallest": 8, "scale": 0.1},
    "8to16_dayshift": PREDICT | {"smallest": 8, "day_shift": 5.0},
    "queries4": PREDICT | {"queries": 4},
    "jitter": PREDICT | {"jitter": 0.1},
    "scale": PREDICT | {"scale": 0.1},
    "mix": PREDICT | {"mix_up": 1.0},
    "steps3600": PREDICT | {"steps": 3600},
    "rate6e-3": PREDICT | {"learning_rate": 6e-3},
    "width128": PREDICT | {"width": 128, "steps": 520},
    "disjoint": PREDICT | {"disjoint": True},
    "day_shift": PREDICT | {"day_shift": 5.0},
}


# ---- data ----------------------------------------------------------------------------------------


class Pixels:
    """All series of a set in memory: x (N, T, B) standardised, doys (N, T), labels (N,)."""

    def __init__(self, base_path, name):
        unlabelled = SentinelTimeSeriesDataset(base_path, name, split="train")
        self.mean, self.std, self.num_bands = unlabelled.mean, unlabelled.std, unlabelled.num_bands
        keywords = {"mean": self.mean, "std": self.std}
        self.splits = {}
        for split in ("train", "test"):
            dataset = SentinelTimeSeriesDatasetForDownstreaming(
                base_path, name, split=split, batch_size=1 << 20, **keywords
            )
            self.splits[split] = next(iter(iterate_batches(dataset)))
        # the pixels that are pretrained on: of the training split, with or without a label
        every = SentinelTimeSeriesDataset(
            base_path, name, split="train", batch_size=1 << 20, sample_size=1, **keywords
        )
        self.x, self.doys = read_all(every)
        self.days = self.doys.unique()[1:] if (self.doys == 0).any() else self.doys.unique()


def read_all(dataset):
    """All clear observations of a data set's pixels: x (N, T, B) and doys (N, T), padded."""
    from transforms import clear_dates, standardise

    xs, days = [], []
    for index, tile in enumerate(dataset.tiles):
        pixels = np.flatnonzero(dataset.pixel_mask(index))
        dates = clear_dates(tile.read_clear(pixels))
        bands, doys = tile.read_dates(pixels, F.pad(dates, (0, 0)))
        xs.append(standardise(bands, dataset.mean, dataset.std))
        days.append(doys)
    longest = max(doys.shape[1] for doys in days)
    x = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in xs])
    return x, torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in days])


def draw_views(doys, size, disjoint, generator):
    """Two random subsets of the clear dates of series (N, T): ranks (N, 2, S), ascending."""
    count = (doys > 0).sum(1)
    views = []
    first_order = None
    for view in range(2):
        if disjoint and view:
            ranks = first_order[:, size:]  # what the first view left, in random order
            short = count - size
            use = torch.where((short >= 1)[:, None], short[:, None], count[:, None])
            position = torch.arange(size) % use
            pick = torch.where((short >= 1)[:, None], position + size, position)
            views.append(first_order.gather(1, pick.clamp(max=doys.shape[1] - 1)))
            continue
        noise = torch.rand(doys.shape, generator=generator).masked_fill(doys == 0, 2.0)
        order = noise.argsort(1)
        take = size
        if disjoint:
            first_order = order
            half = (count + 1) // 2
            position = torch.arange(size) % torch.minimum(half, torch.tensor(size))[:, None]
            views.append(order.gather(1, position))
            # the second view begins where the first ends
            first_order = torch.cat([order, order], 1)
            start = torch.minimum(half, torch.tensor(size))
            rest = (count - start).clamp(min=1)
            position = start[:, None] + torch.arange(size) % rest[:, None]
            views.append(first_order.gather(1, position))
            return torch.stack(views, 1).sort(2).values
        position = torch.arange(take) % count[:, None]
        views.append(order.gather(1, position))
    return torch.stack(views, 1).sort(2).values


# ---- model ---------------------------------------------------------------------------------------


class HarmonicDecoder(nn.Module):
    """Harmonic coefficients of each band, linear in the representation: (N, S, B) at any days."""

    def __init__(self, latent_dim, num_bands, harmonics):
        super().__init__()
        self.shape = (2 * harmonics + 1, num_bands)
        self.linear = nn.Linear(latent_dim, self.shape[0] * num_bands)

    def forward(self, y, doys):
        waves = F.pad(encode_days(doys, self.shape[0] - 1), (1, 0), value=1.0)
        return waves @ self.linear(y).unflatten(-1, self.shape)


class MLPDecoder(nn.Module):
    """The representation, modulated by the encoding of a day, through an MLP to bands."""

    def __init__(self, latent_dim, num_bands, harmonics, width=128):
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


def make_projector(recipe):
    from barlow_twins import Projector

    size = recipe["projector_dim"]
    return Projector(latent_dim=recipe["latent_dim"], width=size, projection_dim=size)


def augment(x, doys, recipe, generator):
    """x (N, V, S, B), doys (N, V, S): jitter of bands, scale, noise, shifted calendar."""
    n, v, s, b = x.shape
    if recipe["scale"]:
        x = x + recipe["scale"] * torch.randn(n, v, 1, 1, generator=generator) * (x + 1)
    if recipe["jitter"]:
        x = x + recipe["jitter"] * torch.randn(n, v, 1, b, generator=generator)
    if recipe["noise"]:
        x = x + recipe["noise"] * torch.randn(x.shape, generator=generator)
    if recipe["day_shift"]:
        shift = recipe["day_shift"] * (2 * torch.rand(n, v, 1, generator=generator) - 1)
        doys = doys + shift
    return x, doys


def build(pixels, recipe):
    """The untrained encoder of a recipe."""
    names = ("sample_size", "latent_dim", "width", "depth")
    sizes = {"num_bands": pixels.num_bands, **{name: recipe[name] for name in names}}
    if recipe["queries"] > 1:
        return ManyQueries(queries=recipe["queries"], **sizes)
    return build_backbone("transformer", **sizes)


def pretrain(pixels, recipe, seed):
    """Train an encoder by a recipe. Returns it and the last losses."""
    torch.manual_seed(seed)
    projector = make_projector(recipe)
    backbone = build(pixels, recipe)
    decoders = {"harmonic": HarmonicDecoder, "mlp": MLPDecoder}
    decoder = decoders[recipe["decoder"]](
        recipe["latent_dim"], pixels.num_bands, recipe["harmonics"]
    )
    modules = nn.ModuleList([backbone, projector, decoder])
    matrices = [p for p in modules.parameters() if p.ndim > 1]
    vectors = [p for p in modules.parameters() if p.ndim == 1]
    optimiser = torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        weight_decay=recipe["weight_decay"],
        fused=True,
    )
    average = None
    if recipe["ema"]:
        decay = recipe["ema"]
        average = torch.optim.swa_utils.AveragedModel(
            backbone, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay)
        )
    generator = torch.Generator().manual_seed(seed)
    count, steps, last = len(pixels.x), recipe["steps"], {}
    order = torch.empty(0, dtype=torch.long)
    size = min(recipe["batch_size"], count)
    for step in range(steps):
        rate = learning_rate(
            recipe["learning_rate"], step, steps, min(100, steps // 10), recipe["hold"]
        )
        for group in optimiser.param_groups:
            group["lr"] = rate
        if len(order) < size:
            order = torch.randperm(count, generator=generator)
        rows, order = order[:size], order[size:]
        loss, last = step_loss(pixels, rows, backbone, projector, decoder, recipe, generator)
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if average:
            average.update_parameters(backbone)
    backbone = average.module if average else backbone
    return backbone.eval(), {name: round(float(value.detach()), 4) for name, value in last.items()}


def step_loss(pixels, rows, backbone, projector, decoder, recipe, generator):
    all_x, all_doys = pixels.x[rows], pixels.doys[rows]
    ranks = draw_views(all_doys, recipe["sample_size"], recipe["disjoint"], generator)
    pixel = torch.arange(len(rows))[:, None, None]
    x, doys = all_x[pixel, ranks], all_doys[pixel, ranks]
    target_x, target_doys = x, doys
    x, doys = augment(x, doys, recipe, generator)
    if recipe["smallest"]:
        fewest, most = recipe["smallest"], recipe["sample_size"]
        size = int(torch.randint(fewest, most + 1, (), generator=generator))
        keep = torch.randperm(most, generator=generator)[:size].sort().values
        x, doys = x[:, :, keep], doys[:, :, keep]
    mixture, inputs, days = None, [x[:, 0], x[:, 1]], [doys[:, 0], doys[:, 1]]
    if recipe["mix_up"]:
        weight = torch.rand(len(rows), generator=generator)
        partner = torch.randperm(len(rows), generator=generator)
        x_m, doys_m = mix_up(
            x[:, 0], doys[:, 0].float(), x[partner, 1], doys[partner, 1].float(), weight
        )
        inputs.append(x_m)
        days = [*[d.float() for d in days], doys_m]
        mixture = (weight, partner)
    with torch.autocast("cpu", torch.bfloat16, enabled=recipe["bf16"]):
        series = zip(torch.cat(inputs).split(256), torch.cat(days).split(256), strict=True)
        y = torch.cat([backbone(*part) for part in series])
        y = y.unflatten(0, (len(inputs), len(rows)))
        z = [projector(view).float() for view in y] if recipe["barlow"] else None
    y = y.float()
    loss, parts = 0.0, {}
    if recipe["barlow"]:
        barlow, parts = barlow_twins_loss(z, recipe, mixture)
        parts["barlow"] = barlow
        loss = recipe["barlow"] * barlow
    if recipe["prediction"]:
        if recipe["targets"] == "all":
            predicted = torch.stack([decoder(y[view], all_doys) for view in (0, 1)], 1)
            target = all_x[:, None].expand_as(predicted)
            error = F.smooth_l1_loss(predicted, target, reduction="none").mean(-1)
            clear = (all_doys > 0)[:, None].expand_as(error)
            parts["prediction"] = error[clear].mean()
        else:
            views = {"other": [(0, 1), (1, 0)], "both": [(0, 1), (1, 0), (0, 0), (1, 1)]}
            parts["prediction"] = torch.stack(
                [
                    F.smooth_l1_loss(decoder(y[a], target_doys[:, b]), target_x[:, b])
                    for a, b in views[recipe["targets"]]
                ]
            ).mean()
        loss = loss + recipe["prediction"] * parts["prediction"]
    return loss, parts


# ---- scores --------------------------------------------------------------------------------------


def log_likelihood(model, x, labels):
    """Mean log probability of the labels; a class that the folds left out has a small one."""
    probability = np.full(len(labels), 1e-3)
    for column, code in enumerate(model.classes_):
        here = labels == code
        probability[here] = model.predict_proba(x[here])[:, column] if here.any() else 0
    return float(np.log(probability.clip(1e-3)).mean())


def search(model, grid, labels, groups):
    """Model whose hyperparameter cross-validation over blocks of the training labels chooses."""
    warnings.simplefilter("ignore")  # classes with few labels
    folds = find_folds(labels, groups, 5) or StratifiedKFold(2).split(labels, labels)
    return GridSearchCV(model, grid, scoring=log_likelihood, cv=list(folds))


def classifier(labels, groups, forest=False, seed=0):
    if forest:
        grid = {"min_samples_leaf": [1, 3]}
        return search(RandomForestClassifier(200, random_state=seed), grid, labels, groups)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    grid = {"logisticregression__C": [0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]}
    return search(model, grid, labels, groups)


def score(train, test, forest=False):
    """Test scores for each number of labels: means over draws of the labels.

    train, test: (features, labels, groups). Returns macro-F1 over the classes of the test split,
    and overall accuracy: {number of labels: score} each.
    """
    macro_f1, accuracy = {}, {}
    for count, draws in COUNTS.items():
        results = []
        for draw in range(draws):
            total = len(train[1])
            chosen = np.random.default_rng(draw).choice(total, min(count, total), replace=False)
            model = classifier(train[1][chosen], train[2][chosen], forest, draw)
            with warnings.catch_warnings(), threadpool_limits(1):
                warnings.simplefilter("ignore")
                predicted = model.fit(train[0][chosen], train[1][chosen]).predict(test[0])
            classes = np.unique(test[1])
            results.append(
                (
                    f1_score(test[1], predicted, average="macro", labels=classes, zero_division=0),
                    accuracy_score(test[1], predicted),
                )
            )
            if count >= total:
                break
        means = np.mean(results, 0)
        macro_f1[str(count)], accuracy[str(count)] = (round(float(mean), 4) for mean in means)
    return macro_f1, accuracy


def retrieval(backbone, x, doys, runtime, most=4000):
    """Share of pixels whose two disjoint halves of dates are each other's nearest neighbour."""
    x, doys = x[:most], doys[:most]
    halves = []
    noise = torch.rand(doys.shape, generator=torch.Generator().manual_seed(0))
    rank = noise.masked_fill(doys == 0, 2.0).argsort(1).argsort(1)
    count = (doys > 0).sum(1, keepdim=True)
    for mask in (rank < count // 2, (rank >= count // 2) & (rank < count)):
        order = (~mask).int().sort(dim=1, stable=True).indices
        size = int(mask.sum(1).max())
        order = order[:, :size]
        kept = mask.gather(1, order)
        xs = x.gather(1, order[..., None].expand(-1, -1, x.shape[2]))
        halves.append(
            encode_series(backbone, xs * kept[..., None], doys.gather(1, order) * kept, runtime)[0]
        )
    a, b = (F.normalize(half - half.mean(0), dim=1) for half in halves)
    return float(((a @ b.T).argmax(1) == torch.arange(len(a))).float().mean())


def classical(pixels, name):
    features = {}
    for split, (x, doys, labels, groups) in pixels.splits.items():
        if name == "harmonic_lr":
            days = doys.float()
            waves = F.pad(encode_days(days, 6), (1, 0), value=1.0) * (doys > 0)[..., None]
            ridge = torch.eye(7) * 0.1
            ridge[0, 0] = 1e-6
            gram = waves.transpose(1, 2) @ waves + ridge
            features[split] = (
                torch.linalg.solve(gram, waves.transpose(1, 2) @ x).flatten(1).numpy(),
                labels.numpy(),
                groups.numpy(),
            )
        else:
            filled = gap_fill(x, doys, pixels.days).flatten(1).numpy()
            features[split] = (filled, labels.numpy(), groups.numpy())
    return score(features["train"], features["test"], forest=name == "gapfill_rf")


CLASSICAL = ("gapfill_lr", "gapfill_rf", "harmonic_lr")


def run_one(pixels, name, recipe, seed, runtime, weights):
    start = time.process_time()
    if name in CLASSICAL:
        scores, accuracy = classical(pixels, name)
        return {"scores": scores, "accuracy": accuracy}
    if name == "untrained":
        recipe = recipe | {"steps": 0}
    if weights and weights.exists():  # only the scores are made anew
        backbone, losses = build(pixels, recipe), {}
        backbone.load_state_dict(torch.load(weights, weights_only=True))
        backbone.eval()
    else:
        backbone, losses = pretrain(pixels, recipe, seed)
    seconds = time.process_time() - start
    if weights:
        torch.save(backbone.state_dict(), weights)
    embedded = {
        split: (encode_series(backbone, x, doys, runtime)[0].numpy(), y.numpy(), groups.numpy())
        for split, (x, doys, y, groups) in pixels.splits.items()
    }
    x, doys, *_ = pixels.splits["test"]
    scores, accuracy = score(embedded["train"], embedded["test"])
    return {
        "scores": scores,
        "accuracy": accuracy,
        "retrieval": round(retrieval(backbone, x, doys, runtime), 4),
        "rankme": round(rankme(torch.from_numpy(embedded["test"][0]))[0], 1),
        "losses": losses,
        "train_seconds": round(seconds, 1),
        "seconds": round(time.process_time() - start, 1),
    }


# ---- the table -----------------------------------------------------------------------------------


def read_results(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(name, recipe, data, seed):
    text = json.dumps([RECIPES.get(name, {}), data, seed], sort_keys=True)
    return name + "/" + hashlib.sha256(text.encode()).hexdigest()[:12]


def summarise(results):
    """Print macro-F1 of each recipe: by set the counts' scores, and its mean gain over base."""
    names = list(dict.fromkeys(row["recipe"] for row in results))
    sets = sorted({row["set"] for row in results})
    table = {}
    for row in results:
        table.setdefault((row["recipe"], row["set"]), []).append(row)
    for name in names:
        cells, gains = [], []
        for data in sets:
            rows = table.get((name, data))
            if not rows:
                cells.append(" " * 23)
                continue
            mean = [np.mean([row["scores"][str(c)] for row in rows]) for c in COUNTS]
            base = table.get(("predict", data))
            if base:
                base = [np.mean([row["scores"][str(c)] for row in base]) for c in COUNTS]
                gains.append(np.array(mean) - base)
            r = np.mean([row.get("retrieval", np.nan) for row in rows])
            cells.append(
                " ".join(f"{m:.3f}"[1:] for m in mean) + f" r{r:.2f}"[0:6] + f"x{len(rows)}"
            )
        gain = f"{np.mean(gains):+.4f}" if gains else ""
        print(f"{name:24s} {gain:8s} " + " | ".join(cells))
    print(" " * 34 + " | ".join(f"{data:23s}" for data in sets))


def main(config):
    if config["summary"]:
        return summarise(read_results(config["results"]))
    unknown = set(filter(None, config["recipes"].split(","))) - set(RECIPES) - set(CLASSICAL)
    if unknown - {"untrained"}:
        raise InputError(f"recipes={config['recipes']}: wanted some of {', '.join(RECIPES)}")
    names = [name for name in config["recipes"].split(",") if name] or list(RECIPES)
    runs = [
        (name, data, int(seed))
        for seed in config["seeds"].split(",")
        for name in names
        for data in config["sets"].split(",")
    ]
    runtime, loaded = start_runtime("cpu"), {}
    for name, data, seed in runs[config["part"] :: config["parts"]]:
        recipe = BASE | RECIPES.get(name, {})
        key = key_of(name, recipe, data, seed)
        if key in {row["key"] for row in read_results(config["results"])}:
            continue
        if data not in loaded:
            loaded[data] = Pixels(config["base_path"], data)
        line = {"key": key, "recipe": name, "set": data, "seed": seed}
        line |= run_one(
            loaded[data],
            name,
            recipe,
            seed,
            runtime,
            config["weights"]
            and Path(config["weights"]) / (key.replace("/", "_") + "_" + data + ".pt"),
        )
        line["changes"] = RECIPES.get(name, {})
        with open(config["results"], "a") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


if __name__ == "__main__":
    main(override(run_config, sys.argv[1:]))
