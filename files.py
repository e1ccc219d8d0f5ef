"""Files that are written whole or not at all, and checkpoints."""

import errno
import io
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from runtime import InputError

FORMAT_VERSION = 1  # of checkpoints


def make_output_dir(path):
    """Make the folder and see that files can be written there; else InputError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".writable-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"output_dir={path}: not writable ({error.strerror})") from None
    return path


@contextmanager
def atomic_write(path):
    """Yield a temporary path to write to; on success it replaces `path`, which is never half."""
    path = Path(path)
    part = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        yield part
        with open(part, "rb") as file:  # else a crash of the machine could leave it empty
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise write_error(path, error) from None
    finally:
        part.unlink(missing_ok=True)


def remove_parts(folder, kept=()):
    """Remove what writes that were killed have left in a folder, but for the names in `kept`."""
    for pattern in (".*.part.*", ".writable-*"):
        for file in Path(folder).glob(pattern):
            if file.name not in kept:
                file.unlink(missing_ok=True)


def write_error(path, error, size=0):
    """What to tell of a file that could not be written; size: bytes that it was to have."""
    if error.errno != errno.ENOSPC:
        reason = error.strerror or error.__cause__ or error  # GDAL tells in the cause
        return InputError(f"{path}: could not be written ({reason})")
    free = shutil.disk_usage(Path(path).parent).free
    missing = f", {max(1, size - free)} bytes are missing" if size else ""
    return InputError(f"{path}: could not be written: disk full ({free} bytes free{missing})")


def write_json(path, content):
    with atomic_write(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


# ---- checkpoints ---------------------------------------------------------------------------------


def _is_statistic(value):
    return isinstance(value, torch.Tensor) and value.ndim == 1 and bool(value.isfinite().all())


CONFIG_KEYS = {"sample_size", "min_valid", "block_size", "split_seed"}  # that later scripts read
CHECKPOINT_CONTENT = {  # what every checkpoint has, and how it is told from damage
    "config": lambda value: isinstance(value, dict) and set(value) >= CONFIG_KEYS,
    "backbone": lambda value: isinstance(value, dict) and "name" in value,
    "backbone_state": lambda value: isinstance(value, dict),
    "bands": lambda value: isinstance(value, list) and all(isinstance(n, str) for n in value),
    "mean": _is_statistic,
    "std": lambda value: _is_statistic(value) and bool((value > 0).all()),
}


def save_checkpoint(path, kind, **content):
    """Write a checkpoint atomically. kind: "pretrained" or "classifier"."""
    buffer = io.BytesIO()  # its size is known before the disk is asked for space
    torch.save({"format": FORMAT_VERSION, "kind": kind, **content}, buffer)
    with atomic_write(path) as part:
        try:
            part.write_bytes(buffer.getbuffer())
        except OSError as error:
            part.unlink(missing_ok=True)
            raise write_error(path, error, len(buffer.getbuffer())) from None


def load_checkpoint(path, kinds=("pretrained", "classifier")):
    """Read a checkpoint of one of the kinds onto the CPU; raises InputError for anything else."""
    if not path:
        raise InputError(f"checkpoint_path: wanted a {' or '.join(kinds)} checkpoint, found none")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{path}: found no file, wanted a checkpoint") from None
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
