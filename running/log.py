"""The log of a run: metrics.jsonl, wandb and progress bars."""

import json
import os
import secrets
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from running.errors import InputError
from running.files import write_error

import torch
from tqdm import tqdm

# uploads a resumed run, of several offline files, as one; else its last part replaces the others
SYNC = "WANDB_RESUME=allow wandb sync"
LINE_SECONDS = 30  # between two lines of a bar that is written to a file


class RunLog:
    """metrics.jsonl and the wandb run of a script; silent on all processes but the first.

    run_id: of the wandb run; start: begins it, and returns it and what to print. It is called in a
    thread, since it takes a second that no script needs to wait for before its first line.
    """

    def __init__(self, file=None, run_id="", start=None):
        self.file, self.run_id, self.run, self._starting = file, run_id, None, None
        if start:
            pool = ThreadPoolExecutor(1)
            self._starting = pool.submit(start)
            pool.shutdown(wait=False)

    def wait(self):
        """Wait until the wandb run has begun; say where it is, or once that there is none."""
        starting, self._starting = self._starting, None
        if starting:
            try:
                self.run, message = starting.result()
            except Exception as error:  # pydantic's of a WANDB_ variable, the service's, ..
                message = _lost(error, self.file)
            if message:
                print(message)

    def line(self, metrics):
        """Log numbers; metrics["step"] counts up."""
        if self.file:
            try:
                with open(self.file, "a") as lines:
                    lines.write(json.dumps(metrics) + "\n")
            except OSError as error:
                raise write_error(self.file, error) from None
        self._to_wandb(metrics, metrics["step"])

    def images(self, files, step=None):
        """Log pictures, {name: path}; wandb shows PNGs only."""
        files = {name: path for name, path in files.items() if str(path).endswith(".png")}
        self._to_wandb(files, step, as_images=True)

    def _to_wandb(self, content, step, as_images=False):
        """Log to wandb; where it fails, say so once and continue without it."""
        self.wait()
        if self.run:
            try:
                if as_images:
                    from wandb import Image

                    content = {name: Image(str(file)) for name, file in content.items()}
                self.run.log(content, step=step)
            except Exception as error:  # training never stops for an error of wandb
                self._drop_wandb(error)

    def _drop_wandb(self, error):
        print(_lost(error, self.file))
        self.run = None

    def finish(self):
        self.wait()
        if self.run:
            try:
                if not self.run.offline:
                    print("wandb: uploading the rest of the run")
                self.run.finish()
            except Exception as error:  # as in _to_wandb
                self._drop_wandb(error)


def start_log(config, job_type, output_dir, runtime, run_id=""):
    """Begin the log of a script in output_dir.

    config["wandb_mode"]: auto (online where the user is logged in, else offline), online, offline,
    disabled. Where the server cannot be reached the run is logged offline. config["wandb_dir"]: the
    folder of all runs of wandb. run_id: of a wandb run to continue.
    """
    if not runtime.is_main:
        return RunLog()
    file, mode = output_dir / "metrics.jsonl", config["wandb_mode"]
    if mode == "auto" and os.environ.get("WANDB_MODE") in ("online", "offline", "disabled"):
        mode = os.environ["WANDB_MODE"]
    if mode == "disabled":
        return RunLog(file, run_id)
    is_resumed, run_id = bool(run_id), run_id or secrets.token_hex(4)
    return RunLog(file, run_id, lambda: _start_wandb(config, job_type, mode, run_id, is_resumed))


def _start_wandb(config, job_type, mode, run_id, is_resumed):
    """A wandb run and what to print of it, "" for nothing; offline where online fails.

    Raises whatever wandb does where both fail.
    """
    import wandb  # takes seconds, so only where a log starts

    reason = ""
    if mode == "auto":
        mode = "online" if wandb.api.api_key else "offline"
        reason = "not logged in, so " if mode == "offline" else ""
    options = {
        "project": "barlow-twins-sentinel-2",
        "job_type": job_type,
        "config": dict(config),
        "dir": config.get("wandb_dir") or None,
        "id": run_id,
        "reinit": "finish_previous",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    if mode == "online":
        try:
            return wandb.init(mode="online", resume="allow" if is_resumed else None, **options), ""
        except (wandb.errors.Error, OSError, TimeoutError) as error:
            reason = f"online logging failed ({_one_line(error)}), so "
            wandb.teardown()  # its service takes the run for begun, and its id for taken
    run = wandb.init(mode="offline", **options)
    folder = os.path.relpath(run.settings.wandb_dir)
    return run, f"wandb: {reason}the run is logged offline; to upload it: {SYNC} {folder}"


def _lost(error, file):
    reason = _one_line(error)
    return f"wandb: logging failed ({reason}); the run continues, and {file} has its numbers"


def _one_line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__


class ProgressBar(tqdm):
    """A progress bar; where stderr is no terminal, a line from time to time and at the end."""

    def __init__(self, *arguments, **keywords):
        self.is_bar, self.last_line = sys.stderr.isatty(), time.monotonic()
        if not self.is_bar:
            form = "{desc}{unit} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
            keywords |= {"file": _Lines(), "bar_format": form}
            if "desc" in keywords:
                keywords["desc"] += ": "
        super().__init__(*arguments, **keywords)

    @classmethod
    def get_lock(cls):
        return tqdm.get_lock()  # one for all bars

    def close(self):
        if not self.disable and self.n == self.total:
            self.last_line = -LINE_SECONDS  # so that what is done is written
        super().close()

    def display(self, *arguments, **keywords):
        if not self.is_bar:
            if time.monotonic() - self.last_line < LINE_SECONDS:
                return
            self.last_line = time.monotonic()
        super().display(*arguments, **keywords)


class _Lines:
    """What a bar writes to stderr, as lines without carriage returns."""

    def write(self, text):
        if text := text.replace("\x1b[A", "").strip():
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()


def refuse_training_folder(output_dir):
    """Raise InputError where a training lies, whose metrics would be replaced or mixed up."""
    for name in ("last.pt", "best.pt"):
        if (Path(output_dir) / name).exists():
            raise InputError(f"{output_dir}: found {name} of a training, wanted another output_dir")


class RecentSteps:
    """The steps since the last logged one, kept on the device: no step waits for a number."""

    def __init__(self):
        self.restart()

    def restart(self):
        self.steps, self.pixels, self.start = [], 0, time.perf_counter()

    def add(self, step, rate, parts, x):
        """A step's learning rate, parts of the loss (scalar tensors) and views x (N, 2, S, B)."""
        values = torch.stack([value.detach().float() for value in parts.values()])
        # with several processes, one of them may have no pixel of a small batch
        extremes = torch.stack(x.aminmax()) if len(x) else torch.zeros(2)
        self.steps.append((step, rate, list(parts), values, extremes))
        self.pixels += len(x)

    def seconds_per_step(self):
        return (time.perf_counter() - self.start) / len(self.steps)

    def summary(self, world_size):
        """Last rate, means over the steps, throughput; FloatingPointError for a loss not finite."""
        for step, rate, _, values, extremes in self.steps:
            if not values.isfinite().all():
                low, high = extremes.tolist()
                raise FloatingPointError(
                    f"loss {float(values[0])} at step {step}, learning rate {rate:.3g}, "
                    f"standardised input from {low:.3g} to {high:.3g}; "
                    "the last good checkpoint stays"
                )
        numbers = iter(torch.cat([values for *_, values, _ in self.steps]).tolist())
        parts = {}  # mix-up is not in every step
        for name in (name for _, _, names, *_ in self.steps for name in names):
            parts.setdefault(name, []).append(next(numbers))
        seconds = time.perf_counter() - self.start
        return {
            "learning_rate": self.steps[-1][1],
            **{name: sum(values) / len(values) for name, values in parts.items()},
            "samples_per_second": world_size * self.pixels / seconds,
        }
