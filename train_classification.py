"""Fine-tune an encoder for land cover, or train the same network from scratch.

    python train_classification.py checkpoint_path=checkpoints/simulated/best.pt
    python train_classification.py checkpoint_path=checkpoints/arkansas/best.pt \\
        base_path=../shared dataset_name=arkansas_2021 freeze_backbone=true label_count=100
    python train_classification.py backbone=transformer   # from scratch, for comparison

Labels come from labels.npy, sides from splits.npy or from blocks; the test side is scored once, at
the end, by the model with the best validation macro-F1.
"""

import copy
import math
import time

import numpy as np
import torch
from tqdm import tqdm

import utils
from backbones import BACKBONES, HEADS, Classifier, build_backbone, load_backbone
from data import SentinelTimeSeriesDatasetForDownstreaming, check_bands, iterate_batches
from utils import InputError

run_config = {
    # input
    "checkpoint_path": "",  # of train.py; empty: train from scratch with the keys under "scratch"
    "base_path": ".",  # folder above data/
    "dataset_name": "simulated",  # labelled tiles
    "output_dir": "",  # receives all files; empty: checkpoints/<time>
    "overwrite": False,  # replace the best.pt of an earlier run in output_dir
    "label_count": 0,  # so many labelled pixels of the training side, at random; 0: all
    "sample_size": -1,  # steps drawn to train on; 0: all clear ones; -1: as pretrained, or all
    # clear ones where a frozen backbone can read them
    # model
    "head": "linear",  # linear, mlp (BatchNorm, dropout) or attention (neck over the steps)
    "dropout": 0.1,  # in the head
    "freeze_backbone": False,  # train the head alone
    # scratch: the checkpoint tells these where there is one
    "backbone": "transformer",  # transformer, cnn or mlp
    "latent_dim": 128,
    "width": 128,
    "depth": 2,
    "min_valid": 10,  # clear observations that a pixel needs to take part
    "block_size": 16,  # pixels along a block of one side where a tile has no splits.npy
    "split_seed": 0,
    # loss
    "loss": "cross_entropy",  # cross_entropy or focal
    "focal_gamma": 2.0,
    "class_weights": False,  # weigh classes by the inverse root of their frequency
    # optimiser: AdamW, warm-up and cosine over the run's length
    "batch_size": 32,
    "epochs": 40,
    "learning_rate": 1e-2,  # of the head
    "backbone_learning_rate": 3e-4,  # of the encoder where it is not frozen
    "weight_decay": 1e-3,
    "warmup_fraction": 0.05,
    "patience": 15,  # epochs without a better validation macro-F1 before it stops; 0: never
    "seed": 0,  # of the labels, weights and order
    # running
    "device": "auto",  # auto, cpu or cuda
    "num_workers": -1,  # loader processes; -1: none on the CPU, up to 8 for a GPU
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

INHERITED = ("backbone", "latent_dim", "width", "depth", "min_valid", "block_size", "split_seed")


def check_config(config):
    """Raise InputError for a value that cannot be trained with."""
    utils.check_choice(config, "head", tuple(HEADS))
    utils.check_choice(config, "backbone", tuple(BACKBONES))
    utils.check_choice(config, "loss", ("cross_entropy", "focal"))
    utils.check_least(
        config, 1, "epochs", "latent_dim", "width", "depth", "min_valid", "block_size"
    )
    utils.check_least(config, 2, "batch_size")
    utils.check_least(config, 0, "label_count", "learning_rate", "backbone_learning_rate", "seed")
    utils.check_least(config, 0, "weight_decay", "warmup_fraction", "patience", "focal_gamma")
    utils.check_least(config, -1, "sample_size", "num_workers")
    if config["label_count"] == 1:
        raise InputError("label_count=1: wanted 0 (all) or 2 or more")
    if config["freeze_backbone"] and not config["checkpoint_path"]:
        raise InputError("freeze_backbone=true: wanted a checkpoint_path, or it stays at random")


def inherit(config):
    """Config with what the checkpoint tells. Returns it and the checkpoint, or None for none."""
    if not config["checkpoint_path"]:
        sample_size = 16 if config["sample_size"] < 0 else config["sample_size"]
        return {**config, "sample_size": sample_size}, None
    checkpoint = utils.load_checkpoint(config["checkpoint_path"])
    told = {key: checkpoint["config"][key] for key in INHERITED}
    if config["sample_size"] < 0:
        reads_all = config["freeze_backbone"] and BACKBONES[told["backbone"]].any_length
        told["sample_size"] = 0 if reads_all else checkpoint["config"]["sample_size"]
    print(f"{config['checkpoint_path']}: " + ", ".join(f"{k}={v}" for k, v in told.items()))
    return {**config, **told}, checkpoint


def open_sides(config, checkpoint):
    """Training, validation and test pixels. Raises InputError where a side or the bands miss."""
    statistics = {key: checkpoint[key] for key in ("mean", "std")} if checkpoint else {}
    keywords = {key: config[key] for key in ("batch_size", "min_valid", "block_size", "split_seed")}

    def open_side(split, **more):
        return SentinelTimeSeriesDatasetForDownstreaming(
            config["base_path"], config["dataset_name"], split=split, **keywords, **more
        )

    train = open_side(
        "train",
        sample_size=config["sample_size"],
        label_count=config["label_count"],
        seed=config["seed"],
        **statistics,
    )
    if checkpoint:
        origin = config["checkpoint_path"]
        check_bands(train.tiles[0], checkpoint["bands"], len(checkpoint["mean"]), origin)
    fixed = {"mean": train.mean, "std": train.std}
    return train, open_side("validation", **fixed), open_side("test", **fixed)


def build_classifier(config, checkpoint, num_bands, num_classes):
    """The network, and what a checkpoint needs to build it again."""
    torch.manual_seed(config["seed"])
    if checkpoint:
        arguments, backbone = checkpoint["backbone"], load_backbone(checkpoint)
    else:
        arguments = {key: config[key] for key in ("latent_dim", "width", "depth")}
        arguments |= {"name": config["backbone"], "num_bands": num_bands}
        arguments["sample_size"] = config["sample_size"] or 16
        try:
            backbone = build_backbone(**arguments)
        except ValueError as error:
            raise InputError(str(error)) from None
    if not backbone.any_length and config["sample_size"] != backbone.sample_size:
        raise InputError(
            f"sample_size={config['sample_size']}: wanted {backbone.sample_size}, the steps that "
            f"this {arguments['name']} takes"
        )
    head = {key: config[key] for key in ("head", "dropout")} | {"num_classes": num_classes}
    try:
        classifier = Classifier(backbone, **head, freeze_backbone=config["freeze_backbone"])
    except ValueError as error:
        raise InputError(str(error)) from None
    return classifier, {"backbone": arguments, "head": head}


def learning_rate_factor(step, total_steps, warmup_fraction):
    """Linear warm-up, then cosine to 0, a pure function of the step (0-based)."""
    warmup = warmup_fraction * total_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1.0, total_steps - warmup)))


def predict(classifier, dataset, codes, runtime):
    """Labels and predicted class codes of a side, (N,) each, from all clear observations."""
    classifier.eval()
    labels, predicted = [], []
    for x, doys, label, _ in iterate_batches(dataset):
        _, logits = utils.encode_series(classifier, x, doys, runtime)
        labels.append(label.numpy())
        predicted.append(codes[logits.argmax(1).cpu().numpy()])
    classifier.train()
    return np.concatenate(labels), np.concatenate(predicted)


def build_optimiser(classifier, config):
    """AdamW with a peak rate of its own for the head and for an encoder that is not frozen."""
    return torch.optim.AdamW(
        [
            {"params": classifier.head.parameters(), "rate": config["learning_rate"]},
            {
                "params": [p for p in classifier.backbone.parameters() if p.requires_grad],
                "rate": config["backbone_learning_rate"],
            },
        ],
        weight_decay=config["weight_decay"],
    )


def fit(classifier, train, validation, legend, config, runtime, log, save):
    """The loop. Saves each best model and loads the last such; returns its score and epoch."""
    codes = np.array(list(legend))
    index = torch.full((256,), -1).index_copy(0, torch.from_numpy(codes), torch.arange(len(codes)))
    total_steps = config["epochs"] * train.steps_per_epoch
    train.set_steps(0, total_steps)
    optimiser = build_optimiser(classifier, config)
    weight = class_weights(train, index, len(codes), runtime) if config["class_weights"] else None
    gamma = config["focal_gamma"] if config["loss"] == "focal" else 0.0
    best, best_score, best_epoch, losses = None, -1.0, 0, []
    batches = iterate_batches(train, runtime.workers(config["num_workers"]), runtime.on_gpu)
    bar = tqdm(total=config["epochs"], unit="epoch", disable=not runtime.is_main)
    classifier.train()
    for step, (x, doys, label, _) in enumerate(batches, start=1):
        for group in optimiser.param_groups:
            factor = learning_rate_factor(step - 1, total_steps, config["warmup_fraction"])
            group["lr"] = group["rate"] * factor
        x, doys, target = runtime.to_device(x, doys, index[label.long()])
        with runtime.autocast():
            padding = (doys == 0,) if classifier.any_length and not config["sample_size"] else ()
            _, logits = classifier(x, doys, *padding)
        loss = utils.focal_loss(logits, target, gamma, weight)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
        if step % train.steps_per_epoch:
            continue

        epoch, loss = step // train.steps_per_epoch, float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss {loss} in epoch {epoch}; the best checkpoint stays")
        losses = []
        scores = utils.score_classes(*predict(classifier, validation, codes, runtime), legend)
        line = {"step": epoch, "loss": loss, "val_macro_f1": scores["macro_f1"]}
        line["val_overall_accuracy"] = scores["overall_accuracy"]
        log.line(line)
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, validation macro-F1 {scores['macro_f1']:.3f}")
        if scores["macro_f1"] > best_score:
            best_score, best_epoch = scores["macro_f1"], epoch
            best = copy.deepcopy(classifier.state_dict())
            save(best_score=best_score, epoch=epoch)
        if config["patience"] and epoch - best_epoch >= config["patience"]:
            break
    bar.close()
    classifier.load_state_dict(best)
    return best_score, best_epoch


def class_weights(train, index, num_classes, runtime):
    """Inverse root of each class's share of the training labels, of mean 1 over the labels."""
    count = torch.zeros(num_classes)
    steps = train.first_step, train.last_step
    train.set_steps(0, train.steps_per_epoch)
    for _, _, label, _ in iterate_batches(train):
        count += torch.bincount(index[label.long()], minlength=num_classes)
    train.set_steps(*steps)
    weight = count.clamp(min=1).rsqrt()
    return (weight * count.sum() / (weight * count).sum()).to(runtime.device)


def main(config):
    """Fine-tune. Returns the test scores (`utils.score_classes`), as in metrics.json."""
    check_config(config)
    config, checkpoint = inherit(config)
    config = utils.freeze(config)

    # process
    runtime = utils.start_runtime(config["device"])

    # data and classes
    train, validation, test = open_sides(config, checkpoint)
    codes = np.unique(np.concatenate([np.unique(tile.labels) for tile in train.tiles]))
    classes = next((t.info["classes"] for t in train.tiles if t.info.get("classes")), {})
    legend = utils.class_legend(codes, classes)
    if len(legend) < 2:
        raise InputError(
            f"{train.tiles[0].path / 'labels.npy'}: found codes {list(legend)}, "
            "wanted two classes or more"
        )

    # folder, which a mistake above does not leave behind
    output_dir = utils.make_output_dir(
        config["output_dir"] or time.strftime("checkpoints/%Y-%m-%d_%H-%M-%S")
    )
    best_path = output_dir / "best.pt"
    if best_path.exists() and not config["overwrite"]:
        raise InputError(f"{best_path}: exists, wanted another output_dir or overwrite=true")
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)

    # model, loop, best checkpoint
    classifier, arguments = build_classifier(config, checkpoint, train.num_bands, len(legend))
    classifier.to(runtime.device)
    log = utils.start_log(config, "train_classification", output_dir, runtime)
    utils.write_json(output_dir / "config.json", dict(config))
    print(
        f"{config['dataset_name']}: {train.num_pixels} training, {validation.num_pixels} "
        f"validation, {test.num_pixels} test pixels of {len(legend)} classes"
    )

    def save(**progress):
        utils.save_checkpoint(
            best_path,
            "classifier",
            config=dict(config),
            **arguments,
            backbone_state=classifier.backbone.state_dict(),
            head_state=classifier.head.state_dict(),
            bands=train.band_names,
            mean=train.mean,
            std=train.std,
            classes={str(code): entry for code, entry in legend.items()},
            **progress,
        )

    score, epoch = fit(classifier, train, validation, legend, config, runtime, log, save)

    # the test side, once
    labels, predicted = predict(classifier, test, np.array(list(legend)), runtime)
    scores = utils.score_classes(labels, predicted, legend)
    scores |= {"split": "test", "validation_macro_f1": score, "best_epoch": epoch}
    summary = {
        f"test_{key}": scores[key] for key in ("overall_accuracy", "macro_f1", "weighted_f1")
    }
    log.line({"step": config["epochs"] + 1, **summary})
    utils.write_report(scores, legend, output_dir, f"{config['dataset_name']}, test", log)
    log.finish()
    print(f"{best_path}: of epoch {epoch}")
    return scores


if __name__ == "__main__":
    utils.run_script(main, run_config, __doc__)
