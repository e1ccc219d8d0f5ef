"""The end of a fine-tuning: what best.pt gets beside its weights, and the scores of the test split.

best.pt gets the temperature of its confidence, and the representations of its labels, by which
infer.py finds where the map can be trusted.
"""

from running.checkpoints import load_checkpoint, save_checkpoint
from running.files import write_json

from evaluation.applicability import MAX_LABELS, describe_labels
from evaluation.calibration import plot_reliability, print_calibration
from evaluation.networks import read_representations


def save_best(run, last, validation):
    """Save best.pt, unless a validation or an earlier start that ended the run has saved it.

    Then its bytes stay, by which `infer.py` knows the maps of it. last: what the run resumed from.
    """
    if run.runtime.is_main:
        print("saving best.pt")
        if validation or (last and last["step"] == run.progress.step):
            run.keep_a_best()
        else:
            run.save("best.pt")
    run.runtime.barrier()  # best.pt is written


def complete_best(run, validation, open_labels, task):
    """Add to best.pt what its maps are trusted by, and give its weights to the model.

    A best.pt that has it stays as it is, byte for byte. validation: its pixels, or None;
    open_labels: gives the training pixels. Returns the content of best.pt.
    """
    path, runtime = run.output_dir / "best.pt", run.runtime
    best = load_checkpoint(path, (task.kind,))
    for name, module in run.model.named_children():
        module.load_state_dict(best[f"{name}_state"], strict=True)
    if "applicability" in best:
        return best
    predicted = task.predict(run.model, validation, runtime) if validation else None
    if runtime.is_main:
        backbone = run.model.eval().backbone
        found = read_representations(backbone, open_labels(), runtime, MAX_LABELS)
        best["applicability"] = describe_labels(found[0], found[2])
        best |= task.calibrate(predicted, *found)
        save_checkpoint(path, **best)
    runtime.barrier()
    return load_checkpoint(path, (task.kind,))


def report_test(run, best, test, task):
    """Score the best model, whose weights `run` has, on the test split, once. Returns the scores.

    best: content of best.pt.
    """
    if run.runtime.is_main:
        print(f"test split: best.pt on {test.num_pixels} pixels, scored once")
    predicted = task.predict(run.model, test, run.runtime)
    scores = task.score(*predicted) | task.score_test(predicted, best)
    scores |= {"split": "test", "best_epoch": best["line"]["step"]}
    if f"val_{task.criterion}" in best["line"]:
        scores[f"validation_{task.criterion}"] = task.sign * best["best_score"]
    line = {f"test_{key}": scores[key] for key in task.reported}
    run.log.line({"step": run.progress.line["step"] + 1, **line})
    if run.runtime.is_main:
        title = f"test split of {run.config['dataset_name']}, {test.num_pixels} pixels"
        write_report(scores, predicted, task, run.output_dir, title, run.log)
        print(f"{run.output_dir / 'best.pt'}: of epoch {scores['best_epoch']}")
    return scores


def write_report(scores, predicted, task, output_dir, title, log):
    """metrics.json and the pictures of the test split, to the folder, wandb and screen."""
    write_json(output_dir / "metrics.json", scores)
    picture = output_dir / f"{task.picture}.png"
    task.plot(scores, predicted, picture, title)
    log.images({task.picture: picture})
    print(f"{title}:")
    task.print_scores(scores)
    print(f"{picture}: {task.shows}")
    if "calibration" in scores:
        picture = output_dir / "reliability.png"
        plot_reliability(scores["calibration"], picture, title)
        log.images({"reliability": picture})
        print_calibration(scores)
        print(f"{picture}: confidence against accuracy")
