"""What both trainers share: the schedule, and runs that stop anywhere and go on."""

import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from files import atomic_write, load_checkpoint, remove_parts, save_checkpoint, write_json
from runlog import RunLog, start_log
from runtime import InputError, Runtime, notice
from storage import lock_folder

ABSENT = {"blend": 0.0, "day_cycles": 0}  # what it means that an older checkpoint lacks a key


def learning_rate(peak, step, total_steps, warmup_steps, hold_fraction=0.0):
    """Linear warm-up, hold, and cosine decay to 0: a pure function of the step (from 0 on).

    hold_fraction: of all steps, at the end of which the decay begins; 0: right after the warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    decay_start = max(warmup_steps, hold_fraction * total_steps)
    progress = max(0.0, (step - decay_start) / max(1, total_steps - decay_start))
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def inherit(config, keys, kinds=("pretrained", "classifier")):
    """Config with the keys of its checkpoint_path. Returns it and the checkpoint, or None for none.

    kinds: of checkpoints that it may be. Raises InputError for any other.
    """
    path = config["checkpoint_path"]
    if not path:
        return config, None
    checkpoint = load_checkpoint(path, kinds)
    before = ABSENT | checkpoint["config"]
    if missing := [key for key in keys if key not in before]:
        raise InputError(f"{path}: found no {missing[0]} in its config, wanted train.py's")
    inherited = {key: before[key] for key in keys}
    notice(f"{path}: " + ", ".join(f"{key}={value}" for key, value in inherited.items()))
    return {**config, **inherited}, checkpoint


@dataclass
class Progress:
    """How far a training has come; part of each of its checkpoints."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    line: dict = field(default_factory=lambda: {"step": 0})  # the last of metrics.jsonl
    losses: list = field(default_factory=list)  # since that line, where the trainer keeps them


@dataclass
class Run:
    """A training: what its loop works on, and what a checkpoint holds.

    kind: of its checkpoints, "pretrained" or "classifier". modules: {name: module} that are saved,
    as <name>_state. header: what later scripts need beside the weights.
    """

    config: dict
    runtime: Runtime
    output_dir: Path
    kind: str
    model: torch.nn.Module
    modules: dict
    optimiser: torch.optim.Optimizer
    header: dict
    progress: Progress
    log: RunLog

    def save(self, name):
        """Write last.pt or best.pt."""
        if not self.runtime.is_main:  # all processes hold the same weights
            return
        states = {f"{part}_state": module.state_dict() for part, module in self.modules.items()}
        states["optimiser_state"] = self.optimiser.state_dict()
        path = self.output_dir / name
        save_checkpoint(path, self.kind, **self.header, **states, **asdict(self.progress))

    def describe_stop(self):
        """One line for the user after a signal."""
        return (
            f"stopped at step {self.progress.step}; the same command with "
            f"output_dir={self.output_dir} goes on"
        )


def resume(last, modules, optimiser):
    """Put the weights of last.pt back. Returns its Progress, or that of a start for None."""
    if last is None:
        return Progress()
    for name, module in modules.items():
        if f"{name}_state" not in last:
            raise InputError(
                f"last.pt: found no {name} in it (of an older version?), wanted another output_dir"
            )
        module.load_state_dict(last[f"{name}_state"], strict=True)
    optimiser.load_state_dict(last["optimiser_state"])
    names = [entry.name for entry in fields(Progress)]
    return Progress(**{name: last[name] for name in names if name in last})


def start_run(kind, config, header, model, modules, optimiser, last, output_dir, runtime):
    """A Run from the start, or from where last.pt says that it stopped, its folder and log ready.

    last: the content of last.pt, or None. The other arguments are Run's.
    """
    progress = resume(last, modules, optimiser)
    header["in_bf16"] = runtime.trains_in_bf16
    if last and last.get("in_bf16", header["in_bf16"]) != header["in_bf16"]:
        words = ("float32", "bfloat16") if header["in_bf16"] else ("bfloat16", "float32")
        notice(f"{output_dir}: begun in {words[0]}, goes on in {words[1]} (precision=)")
    script = {"pretrained": "train", "classifier": "train_classification"}[kind]
    header["wandb_id"] = last["wandb_id"] if last else ""
    log = start_log(config, script, output_dir, runtime, header["wandb_id"])
    header["wandb_id"] = log.run_id or header["wandb_id"]
    if runtime.is_main:
        remove_parts(output_dir)
        cut_metrics(output_dir / "metrics.jsonl", progress.line["step"] if progress.step else -1)
        write_json(output_dir / "config.json", dict(config))
    return Run(
        config=config,
        runtime=runtime,
        output_dir=output_dir,
        kind=kind,
        model=model,
        modules=modules,
        optimiser=optimiser,
        header=header,
        progress=progress,
        log=log,
    )


def read_last(output_dir, kind, config, data, defaults, free_keys, mend="another output_dir"):
    """The content of last.pt in a folder, or None where a run has to start.

    Raises InputError where a checkpoint there is of another kind, or of a config or of data that
    would give another result. data: {what: description} of what is trained on. defaults: of keys
    that an older checkpoint does not have, but for those in ABSENT. free_keys: those that may
    differ, since the weights do not depend on them. mend: what a message tells to change.
    """
    found = None
    for name in ("last.pt", "best.pt"):
        path = output_dir / name
        if found or not path.exists():  # a best.pt alone is looked at, so that none is overwritten
            continue
        found = load_checkpoint(path, (kind,))
        before = {**defaults, **ABSENT, **found["config"]}
        differ = [
            f"{key}={config[key]} (was {before[key]})"
            for key in config
            if key not in free_keys and config[key] != before[key]
        ]
        if differ:
            raise InputError(
                f"{path}: found a run with another {', '.join(differ)}; wanted the same, or {mend}"
            )
        for key, description in data.items():
            was = found.get("data", data).get(key)
            if was != description:
                raise InputError(
                    f"{path}: found a run on other data ({key} {_shorten(was)}, now "
                    f"{_shorten(description)}); wanted the same, or {mend}"
                )
    return found if (output_dir / "last.pt").exists() else None


def _shorten(description):
    text = str(description)
    return text if len(text) <= 300 else f"{text[:300]}.."


@contextmanager
def one_run_at_a_time(output_dir, runtime):
    """Hold a folder for this training; InputError where another one writes there."""
    with lock_folder(output_dir, seconds=10) if runtime.is_main else nullcontext():
        yield


def remove_run(output_dir, kind):
    """Remove an earlier run from a folder; InputError where its checkpoints are of another kind."""
    checkpoints = [output_dir / name for name in ("best.pt", "last.pt")]
    for path in checkpoints:
        if (found := _kind_of(path)) not in (kind, None):
            raise InputError(f"{path}: found a {found} checkpoint, wanted another output_dir")
    for name in ("metrics.json", "metrics.jsonl", "confusion_matrix.png"):
        (output_dir / name).unlink(missing_ok=True)
    for path in checkpoints:
        path.unlink(missing_ok=True)


def _kind_of(path):
    """The kind of a checkpoint; None where there is none, or none that can be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)["kind"]
    except Exception:  # as in load_checkpoint: a damaged file raises many kinds
        return None


def cut_metrics(path, step):
    """Drop the lines of metrics.jsonl after a step, which the continued run will write again."""
    if path.exists():
        with atomic_write(path) as part, open(part, "w") as kept:
            for line in path.read_text(errors="replace").splitlines():
                if _step_of(line) <= step:
                    kept.write(line + "\n")


def _step_of(line):
    """The step of a line of metrics.jsonl; infinite for one that a crash or a full disk cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
