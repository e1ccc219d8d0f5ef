"""The config of a script: `key=value` overrides, ranges, checks."""

import difflib
import math
import os
from datetime import date
from types import MappingProxyType

from running.errors import InputError, what_is_there


def override(run_config, arguments):
    """run_config with `key=value` arguments applied; the default's type is the schema.

    Raises InputError that names the key and shows the present value.
    """
    config = dict(run_config)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if key not in config:
            like = difflib.get_close_matches(key.lstrip("-").lower(), config, 1)
            wanted = f"did you mean {like[0]}?" if like else "wanted key=value"
            raise InputError(f"{argument}: found no such key, {wanted} (--help lists all keys)")
        if not equals:
            raise InputError(f"{argument}: wanted {key}=value (now {run_config[key]})")
        config[key] = expand_home(key, _parse(key, text, run_config[key]))
    return config


def _parse(key, text, default):
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key}={text}: wanted true or false (now {str(default).lower()})")
        return text.lower() == "true"
    try:
        value = _whole(text) if kind is int else kind(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{key}={text}: wanted {name} (now {default})") from None
    if value != value:
        raise InputError(f"{key}={text}: wanted a number (now {default})")
    return value


def _whole(text):
    """A whole number, also written as 1e6. Raises ValueError."""
    try:
        return int(text)
    except ValueError:
        value = float(text)
        if not value.is_integer():
            raise ValueError from None
        return int(value)


# ---- a season: the first and last day of year whose observations are read ------------------------

ALL_YEAR = (1, 366)


def read_day(key, text):
    """The day of year, 1..366, of a key's text; 0 for "".

    text: a day of year, month and day (04-01, as in a year of 365 days) or a date (2024-04-01).
    Raises InputError that names the key.
    """
    try:
        if len(text) < 4:
            day = int(text or 0)
        else:
            day = date.fromisoformat(text if len(text) > 5 else f"2001-{text}").timetuple().tm_yday
    except ValueError:
        day = -1
    if text and not 1 <= day <= 366:
        wanted = "a day of year 1 to 366, a month and day like 04-01 or a date like 2024-04-01"
        raise InputError(f"{key}={text}: wanted {wanted}")
    return day


def find_season(config, before=None):
    """First and last day of year, (1, 366) for the whole year, of the keys start and end.

    before: the config that says what an empty key means; None: the first and the last day.
    """
    before = before or {}
    days = (read_day(key, config[key] or str(before.get(key, ""))) for key in ("start", "end"))
    return tuple(day or limit for day, limit in zip(days, ALL_YEAR, strict=True))


def name_season(season):
    """A season as infer.json has it, "305 to 90"."""
    return f"{season[0]} to {season[1]}"


def in_season(days, start, end):
    """Whether days of year (an array) lie in a season; where start > end it crosses New Year."""
    return (days - start) % 366 <= (end - start) % 366


# ---- values that keys may have ------------------------------------------------------------------

MAX_INT = 2**63 - 1  # limit of whole numbers without another bound, as in numpy and torch
# Smallest and largest value of every numeric key of the scripts; math.inf: no upper limit. A script
# whose range is narrower passes it to `check`; a wider one would be refused by `check_early`.
RANGES = {
    # pixels and dates
    "sample_size": (0, 1000),  # 0: all clear dates, or as many as suit the data
    "min_sample_size": (0, 1000),
    "min_valid": (0, 65535),
    "block_size": (1, MAX_INT),
    "label_count": (0, MAX_INT),
    "val_pixels": (2, MAX_INT),
    "sample_pixels": (4, MAX_INT),
    "most_pixels": (2, MAX_INT),
    "retrieval_pixels": (2, 100_000),
    "draws": (0, 1000),
    "dates": (0, MAX_INT),
    "dimensions": (0, 65536),  # of an embedding, 0: all; of the page
    "date_share": (0, 1),
    "false_alarms": (1e-6, 0.5),
    "min_confidence": (0, 1),
    "scale": (1e-9, 1e9),
    # a sample to label
    "count": (0, MAX_INT),
    "standard_error": (1e-6, 0.5),
    "min_count": (0, MAX_INT),
    "distance": (0, 1e7),
    # model
    "latent_dim": (3, 65536),
    "width": (1, 65536),
    "depth": (1, 1000),
    "day_cycles": (0, 182),
    "hidden": (1, 65536),
    "projector_dim": (2, 65536),
    "dropout": (0, 0.99),
    # loss
    "barlow_lambda": (0, math.inf),
    "prediction": (0, math.inf),
    "harmonics": (1, 182),
    "blend": (0, 1),
    "mix_up": (0, math.inf),
    "mix_up_every": (1, 1000),
    "focal_gamma": (0, 100),
    # optimiser
    "batch_size": (2, MAX_INT),
    "epochs": (0, MAX_INT),  # 0: as long as the data need
    "min_samples": (0, MAX_INT),
    "max_samples": (1, MAX_INT),
    "max_steps": (0, MAX_INT),
    "learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, MAX_INT),
    "hold_fraction": (0, 1),
    "clip_norm": (1e-9, math.inf),
    "seed": (0, 2**31 - 1),
    "split_seed": (0, 2**31 - 1),
    "seeds": (1, 1000),
    # running and logging
    "num_workers": (-1, 64),
    "log_interval": (1, MAX_INT),
    "val_interval": (1, MAX_INT),
    "checkpoint_interval": (1, MAX_INT),
    # simulated tiles
    "num_tiles": (1, 10_000),
    "size": (16, 10_980),
    "num_dates": (2, 73),
    "missed_clouds": (0, 1),
    # real tiles
    "max_cloud_cover": (0, 100),
    "resolution": (0, 10_000),
    "stride": (0, 10_980),
    "local_scale": (0, 1e9),
    "split_block": (1, 1e7),
    "threads": (1, 256),
    "retries": (0, 20),
    # the page
    "variance": (0.01, 1),
    "max_mb": (4, math.inf),  # the page itself takes 3
}
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
    "wandb_mode": ("auto", "online", "offline", "disabled"),
    "classify": ("auto", "true", "false"),
    "format": ("png", "pdf", "svg"),
    "representation_format": ("float32", "float16", "int8"),
    "local_mask": ("auto", "SCL", "MASK", "none"),
    "offset": ("auto", "applied", "raw"),
    "resampling": ("nearest", "bilinear", "cubic", "average"),
    "start": read_day,
    "end": read_day,
}


def check(config, **limits):
    """Check every value of a config; returns it frozen, so that nothing changes it later.

    limits: of keys of this script, in place of RANGES and CHOICES: a pair of numbers, the words to
    choose from, or a function of key and value that raises InputError. Raises InputError that
    names the key, its value and what is wanted.
    """
    config = {key: expand_home(key, value) for key, value in config.items()}
    limits = RANGES | CHOICES | limits
    for key, value in config.items():
        if not (isinstance(value, bool) or (isinstance(value, str) and key not in limits)):
            _check_value(key, value, limits[key])
    return MappingProxyType(config)


def _check_value(key, value, limits):
    if callable(limits):
        limits(key, value)
        return
    if isinstance(value, str):
        if value not in limits:
            raise InputError(f"{key}={value}: wanted one of {', '.join(limits)}")
        return
    low, high = limits
    # compared as it is: a whole number may be too large for a float
    if not (low <= value <= high and abs(value) < math.inf):
        is_open = high == math.inf or (high == MAX_INT and value < low)
        raise InputError(f"{key}={value}: wanted {low} {'or more' if is_open else f'to {high}'}")


def check_early(config):
    """What `check` refuses in any script, known before a script's modules are imported."""
    check({key: value for key, value in config.items() if key in RANGES | CHOICES})


NEW_PATHS = ("base_path", "basis_path", "output_path")  # what a script may make


def check_paths(config):
    """Raise InputError for a key of a file or folder (one, or several by commas) that is not there.

    What lies there is checked where it is opened.
    """
    for key, value in config.items():
        if not key.endswith("_path") or key in NEW_PATHS or os.path.exists(value):
            continue
        for path in value.split(","):
            if path and not os.path.exists(path):
                raise InputError(f"{key}={path}: found no such file or folder{what_is_there(path)}")


def expand_home(key, value):
    """A value of a config; in paths (one, or several with commas between) ~ is the home folder."""
    if not key.endswith(("_path", "_dir")):
        return value
    return ",".join(os.path.expanduser(path) for path in value.split(","))
