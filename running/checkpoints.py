"""Checkpoints, and trainings that stop anywhere and resume exactly."""

import io
import json
import math
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from running.device import Runtime
from running.errors import InputError, Stopped, notice, what_is_there
from running.files import (
    atomic_write,
    lock_folder,
    remove_parts,
    write_error,
    write_json,
)
from running.log import RunLog, start_log

import torch

# ---- files ---------------------------------------------------------------------------------------

FORMAT_VERSION = 1  # of checkpoints
KINDS = {"pretrained": "train", "classifier": "train_classification"}  # and who writes them
KINDS |= {"regressor": "train_regression"}
CONFIG_KEYS = {"sample_size", "min_valid", "block_size", "split_seed"}  # later scripts read them


def _is_config(value):
    keys = isinstance(value, dict) and set(value) >= CONFIG_KEYS
    return keys and all(type(value[key]) is int and value[key] >= 0 for key in CONFIG_KEYS)


def _is_statistic(value):
    return isinstance(value, torch.Tensor) and value.ndim == 1 and bool(value.isfinite().all())


CHECKPOINT_CONTENT = {  # what every checkpoint has, and the check of each
    "config": _is_config,
    "backbone": lambda value: isinstance(value, dict) and "name" in value,
    "backbone_state": lambda value: isinstance(value, dict),
    "bands": lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value),
    "mean": _is_statistic,
    "std": lambda value: _is_statistic(value) and bool((value > 0).all()),
}


def save_checkpoint(path, kind, **content):
    """Write a checkpoint atomically. kind: one of KINDS."""
    buffer = io.BytesIO()  # in memory first: its size is known when the disk is full
    torch.save({"format": FORMAT_VERSION, "kind": kind, **content}, buffer)
    with atomic_write(path) as part:
        try:
            part.write_bytes(buffer.getbuffer())
        except OSError as error:
            part.unlink(missing_ok=True)
            raise write_error(path, error, len(buffer.getbuffer())) from None


def load_checkpoint(path, kinds=tuple(KINDS)):
    """Read a checkpoint of one of the kinds onto the CPU; raises InputError for anything else."""
    if not path:
        raise InputError(f"checkpoint_path: wanted a {' or '.join(kinds)} checkpoint, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        found = "a folder" if isinstance(error, IsADirectoryError) else "no file"
        near = what_is_there(path)
        raise InputError(f"{path}: found {found}, wanted a checkpoint{near}") from None
    except Exception as error:  # torch.load raises many kinds for a file that is cut off or foreign
        raise InputError(
            f"{path}: found no whole checkpoint ({type(error).__name__}), wanted one of ours"
        ) from None
    if not isinstance(content, dict) or "format" not in content or "kind" not in content:
        raise InputError(f"{path}: found a file of another program, wanted a checkpoint of ours")
    if str(content["format"]) != str(FORMAT_VERSION):
        raise InputError(f"{path}: found format {content['format']!r}, wanted {FORMAT_VERSION}")
    if not isinstance(content["kind"], str) or content["kind"] not in kinds:
        raise InputError(
            f"{path}: found a {content['kind']} checkpoint, wanted a {' or '.join(kinds)} one"
        )
    for key, is_right in CHECKPOINT_CONTENT.items():
        if key not in content or not is_right(content[key]):
            raise InputError(f"{path}: found no usable {key} in the checkpoint, wanted one of ours")
    return content


# keys that older checkpoints lack, and the values that they were trained with
OLD_CHECKPOINT_DEFAULTS = {"blend": 0.0, "day_cycles": 0, "mix_up_every": 1}


def inherit(config, keys, kinds=tuple(KINDS)):
    """Config with the keys of its checkpoint_path. Returns it and the checkpoint, or None for none.

    kinds: of checkpoints that it may be. Raises InputError for any other.
    """
    path = config["checkpoint_path"]
    if not path:
        return config, None
    checkpoint = load_checkpoint(path, kinds)
    before = OLD_CHECKPOINT_DEFAULTS | checkpoint["config"]
    if missing := [key for key in keys if key not in before]:
        raise InputError(f"{path}: found no {missing[0]} in its config, wanted train.py's")
    inherited = {key: before[key] for key in keys}
    notice(f"{path}: " + ", ".join(f"{key}={value}" for key, value in inherited.items()))
    return {**config, **inherited}, checkpoint


# ---- runs ----------------------------------------------------------------------------------------


@dataclass
class Progress:
    """The progress of a training; part of each of its checkpoints."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = 0
    line: dict = field(default_factory=lambda: {"step": 0})  # the last line of metrics.jsonl
    losses: list = field(default_factory=list)  # since that line, if the trainer keeps them
    rotation: torch.Tensor | None = None  # of a pretrained backbone, see `load_backbone`


@dataclass
class Run:
    """A training: what its loop works on, and what a checkpoint holds.

    kind: of its checkpoints, one of KINDS. model: its children are saved, as
    <name>_state. header: what later scripts need beside the weights.
    """

    kind: str
    config: dict
    runtime: Runtime
    output_dir: Path
    model: torch.nn.Module
    optimiser: torch.optim.Optimizer
    header: dict
    progress: Progress = field(default_factory=Progress)
    log: RunLog = field(default_factory=RunLog)

    def start(self, last):
        """Start from `last`, the content of last.pt, or from scratch for None; open the log.

        Raises InputError where last.pt lacks a part of the model.
        """
        if last:
            self.restore(last)
        was_bf16, self.header["in_bf16"] = (last or {}).get("in_bf16"), self.runtime.in_bf16
        if was_bf16 not in (None, self.header["in_bf16"]):
            words = ("float32", "bfloat16") if self.header["in_bf16"] else ("bfloat16", "float32")
            notice(f"{self.output_dir}: begun in {words[0]}, resumes in {words[1]} (precision=)")
        wandb_id = last["wandb_id"] if last else ""
        self.log = start_log(self.config, KINDS[self.kind], self.output_dir, self.runtime, wandb_id)
        self.header["wandb_id"] = self.log.run_id
        if self.runtime.is_main:
            remove_parts(self.output_dir)
            last_line = self.progress.line["step"] if self.progress.step else -1
            cut_metrics(self.output_dir / "metrics.jsonl", last_line)
            write_json(self.output_dir / "config.json", dict(self.config))

    def restore(self, last):
        """Weights, optimiser and progress of last.pt."""
        for name, module in self.model.named_children():
            if f"{name}_state" not in last:
                raise InputError(
                    f"{self.output_dir / 'last.pt'}: found no {name} in it (of an older version?), "
                    "wanted another output_dir"
                )
            module.load_state_dict(last[f"{name}_state"], strict=True)
        self.optimiser.load_state_dict(last["optimiser_state"])
        names = [entry.name for entry in fields(Progress)]
        self.progress = Progress(**{name: last[name] for name in names if name in last})
        if self.progress.best_score > -math.inf and not self._has_best():
            notice(
                f"{self.output_dir / 'best.pt'}: found no whole checkpoint (removed, or last.pt "
                "was copied alone), so the best is chosen anew from here on"
            )
            self.progress.best_score, self.progress.best_step = -math.inf, 0

    def save(self, name):
        """Write last.pt or best.pt."""
        if not self.runtime.is_main:  # all processes hold the same weights
            return
        states = {f"{part}_state": m.state_dict() for part, m in self.model.named_children()}
        states["optimiser_state"] = self.optimiser.state_dict()
        path = self.output_dir / name
        save_checkpoint(path, self.kind, **self.header, **states, **asdict(self.progress))

    def keep_a_best(self):
        """Save best.pt at the end of a run that has lost it, and found no other since."""
        if not self._has_best():
            self.save("best.pt")

    def _has_best(self):
        return _kind_of(self.output_dir / "best.pt") == self.kind

    def stopped(self, status):
        """The Stopped to raise after a signal, once last.pt is saved; the log is closed."""
        self.log.finish()
        return Stopped(
            f"stopped at step {self.progress.step}; the same command with "
            f"output_dir={self.output_dir} resumes",
            status,
        )


def read_last(output_dir, kind, config, data, defaults, free_keys, mend="another output_dir"):
    """The content of last.pt in a folder, or None where a run has to start.

    Raises InputError where a checkpoint there is of another kind, or of a config or of data that
    would give another result. data: {what: description} of what is trained on. defaults: of keys
    that an older checkpoint lacks and OLD_CHECKPOINT_DEFAULTS does not have. free_keys: may
    differ, since the weights do not depend on them. mend: what a message advises to change.
    """
    found = None
    for name in ("last.pt", "best.pt"):
        path = output_dir / name
        if found or not path.exists():  # a best.pt alone is looked at, so that none is overwritten
            continue
        found = load_checkpoint(path, (kind,))
        before = {**defaults, **OLD_CHECKPOINT_DEFAULTS, **found["config"]}
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
            was = found.get("data", data).get(key, description)  # older runs lack some keys
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
    for name in (
        "model_card.md",
        "metrics.json",
        "metrics.jsonl",
        "confusion_matrix.png",
        "confusion_matrix_validation.png",
        "predicted_actual.png",
        "predicted_actual_validation.png",
        "reliability.png",
    ):
        (output_dir / name).unlink(missing_ok=True)
    for path in checkpoints:
        path.unlink(missing_ok=True)


def find_last(output_dir, kind, config, data, defaults, free_keys, runtime):
    """`read_last`; with overwrite=true a run that cannot be resumed is removed, which gives None.

    Raises InputError also where overwrite=true would remove the checkpoint to start from.
    """
    mend = "another output_dir or overwrite=true"
    try:
        return read_last(output_dir, kind, config, data, defaults, free_keys, mend)
    except InputError:
        if not config["overwrite"]:
            raise
    path = config["checkpoint_path"]
    if path and output_dir.samefile(Path(path).parent) and _kind_of(path) == kind:
        raise InputError(
            f"output_dir={output_dir}: holds checkpoint_path, which overwrite=true would remove; "
            "wanted another output_dir"
        )
    runtime.barrier()  # all processes have looked
    if runtime.is_main:
        remove_run(output_dir, kind)
    runtime.barrier()
    return None


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
