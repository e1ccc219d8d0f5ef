"""What both trainers share: the schedule, and runs that stop anywhere and go on."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from runtime import InputError, RunLog, Runtime, atomic_write, load_checkpoint, save_checkpoint


def learning_rate(peak, step, total_steps, warmup_steps, hold_fraction=0.0):
    """Linear warm-up, hold, and cosine decay to 0: a pure function of the step (from 0 on).

    hold_fraction: of all steps, at the end of which the decay begins; 0: right after the warm-up.
    """
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    decay_start = max(warmup_steps, hold_fraction * total_steps)
    progress = max(0.0, (step - decay_start) / max(1, total_steps - decay_start))
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


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
        states = {f"{name}_state": module.state_dict() for name, module in self.modules.items()}
        states["optimiser_state"] = self.optimiser.state_dict()
        path = self.output_dir / name
        save_checkpoint(path, self.kind, **self.header, **states, **asdict(self.progress))


def resume(last, modules, optimiser):
    """Put the weights of last.pt back. Returns its Progress, or that of a start for None."""
    if last is None:
        return Progress()
    for name, module in modules.items():
        module.load_state_dict(last[f"{name}_state"], strict=True)
    optimiser.load_state_dict(last["optimiser_state"])
    names = [entry.name for entry in fields(Progress)]
    return Progress(**{name: last[name] for name in names if name in last})


def read_last(output_dir, kind, config, run_config, free_keys, mend="another output_dir"):
    """The content of last.pt in a folder, or None where a run has to start.

    Raises InputError where a checkpoint there is of another kind, or of a config that would give
    another result. run_config: defaults, which stand for keys that an older checkpoint does not
    have. free_keys: those that may differ, since the weights do not depend on them. mend: what a
    message tells to change.
    """
    last = None
    for name in ("best.pt", "last.pt"):
        path = output_dir / name
        if not path.exists():
            continue
        last = load_checkpoint(path, (kind,))
        before = {**run_config, **last["config"]}
        differ = [
            f"{key}={config[key]} (was {before[key]})"
            for key in config
            if key not in free_keys and config[key] != before[key]
        ]
        if differ:
            raise InputError(
                f"{path}: found a run with another {', '.join(differ)}; "
                f"wanted the same, or {mend}"
            )
    return last if (output_dir / "last.pt").exists() else None


def cut_metrics(path, step):
    """Drop the lines of metrics.jsonl after a step, which the continued run will write again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        with atomic_write(path) as part:
            part.write_text("".join(f"{line}\n" for line in lines))
