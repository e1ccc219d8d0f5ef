"""How a script is started, checked and stopped: overrides, process and device, signals."""

import functools
import math
import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist


class InputError(ValueError):
    """A user's mistake (file, value or argument), told in one line."""


class Stopped(BaseException):
    """A run that a signal ended, with all its work saved; as KeyboardInterrupt is, no Exception."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


# ---- command line ------------------------------------------------------------------------------


def override(run_config, arguments):
    """run_config with `key=value` arguments put in; the default's type is the schema.

    Raises InputError that names the key and shows the present value.
    """
    config = dict(run_config)
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in config:
            raise InputError(f"{argument}: wanted key=value with key one of {', '.join(config)}")
        config[key] = expand_home(key, _parse(key, text, run_config[key]))
    return config


def _parse(key, text, default):
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"{key}={text}: wanted true or false (now {str(default).lower()})")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError:
        name = {int: "a whole number", float: "a number"}[kind]
        raise InputError(f"{key}={text}: wanted {name} (now {default})") from None
    if value != value:
        raise InputError(f"{key}={text}: wanted a number (now {default})")
    return value


MOST_WHOLE = 2**63 - 1  # of a whole number that has no other bound: what numpy and torch hold
# Least and most value of every numeric key of the scripts; math.inf: any larger one. A script
# whose own range differs gives it to `check`.
RANGES = {
    # pixels and dates
    "sample_size": (1, 1000),
    "min_sample_size": (1, 1000),
    "min_valid": (1, 65535),
    "block_size": (1, MOST_WHOLE),
    "label_count": (0, MOST_WHOLE),
    "val_pixels": (2, MOST_WHOLE),
    "sample_pixels": (4, MOST_WHOLE),
    "draws": (0, 1000),
    "dates": (0, MOST_WHOLE),
    "date_share": (0, 1),
    "start_share": (-1, 1),
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
    "focal_gamma": (0, 100),
    # optimiser
    "batch_size": (2, MOST_WHOLE),
    "epochs": (1, MOST_WHOLE),
    "min_samples": (1, MOST_WHOLE),
    "max_samples": (1, MOST_WHOLE),
    "max_steps": (0, MOST_WHOLE),
    "learning_rate": (0, math.inf),
    "backbone_learning_rate": (0, math.inf),
    "weight_decay": (0, math.inf),
    "warmup_steps": (0, MOST_WHOLE),
    "warmup_fraction": (0, 1),
    "hold_fraction": (0, 1),
    "clip_norm": (1e-9, math.inf),
    "seed": (0, 2**31 - 1),
    "split_seed": (0, 2**31 - 1),
    "seeds": (1, 1000),
    "most_pixels": (2, MOST_WHOLE),
    # running and logging
    "num_workers": (-1, 64),
    "log_interval": (1, MOST_WHOLE),
    "val_interval": (1, MOST_WHOLE),
    "checkpoint_interval": (1, MOST_WHOLE),
    # simulated tiles
    "num_tiles": (1, 10_000),
    "size": (16, 10_980),
    "num_dates": (2, 73),
    "missed_clouds": (0, 1),
}
CHOICES = {
    "device": ("auto", "cpu", "cuda"),
    "precision": ("auto", "float32", "bfloat16"),
    "wandb_mode": ("auto", "online", "offline", "disabled"),
}


def check(config, **limits):
    """Check every value of a config; returns it frozen, so that nothing changes it later.

    limits: what this script takes for a key, in place of RANGES and CHOICES: a pair of numbers, or
    the words to choose from. Raises InputError that names the key, its value and what is wanted.
    """
    config = {key: expand_home(key, value) for key, value in config.items()}
    limits = RANGES | CHOICES | limits
    for key, value in config.items():
        if isinstance(value, bool) or (isinstance(value, str) and key not in limits):
            continue
        if isinstance(value, str):
            if value not in limits[key]:
                raise InputError(f"{key}={value}: wanted one of {', '.join(limits[key])}")
            continue
        least, most = limits[key]
        # compared before anything makes a float of it, which a whole number may be too large for
        if not (least <= value <= most and abs(value) < math.inf):
            any_larger = most == math.inf or (most == MOST_WHOLE and value < least)
            upto = "or more" if any_larger else f"to {most}"
            raise InputError(f"{key}={value}: wanted {least} {upto}")
    return MappingProxyType(config)


def expand_home(key, value):
    """A value of a config; in paths (one, or several divided by commas) ~ is the home folder."""
    if not key.endswith(("_path", "_dir")):
        return value
    return ",".join(os.path.expanduser(path) for path in value.split(","))


def refuse_torchrun():
    """Raise InputError under torchrun, where every process would do all of a script's work."""
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise InputError(f"WORLD_SIZE={processes}: wanted one process (python, not torchrun)")


def run_script(main, run_config, docstring):
    """Call main with the overridden config; a user's mistake ends in one line and status 1."""
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(docstring.strip(), "\n\nKeys and their defaults:")
        print("\n".join(f"  {key}={value}" for key, value in run_config.items()))
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        main(override(run_config, sys.argv[1:]))
    except (InputError, FloatingPointError, OSError) as error:
        # an error of a loader worker carries its traceback; the last line is the message
        lines = str(error).strip().splitlines() or [type(error).__name__]
        line = lines[-1].removeprefix("runtime.InputError: ")
        raise SystemExit(f"error: {line}") from None
    except Stopped as stop:
        print(stop)
        raise SystemExit(stop.status) from None
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(number, _):
    """End a script as Ctrl-C does: what is half written is removed, and its processes end."""
    raise Stopped("stopped", 128 + number)


class StopSignal:
    """Whether Ctrl-C or SIGTERM came: then `status` is 130 or 143, the exit status, else 0."""

    def __init__(self):
        self.status, self.before = 0, {}

    def is_set(self):
        return self.status > 0

    def release(self):
        """From now on the signals do what they did before: all that can be lost is saved."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


def stop_on_signals():
    """From now on Ctrl-C and SIGTERM set what is returned, so that a run ends between two steps."""
    stop = StopSignal()

    def note(number, _):
        stop.status = 128 + number

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            stop.before[number] = signal.signal(number, note)
    return stop


@functools.cache
def notice(text):
    """Print a line once: not in every process, and not again in this one."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def read_ahead(items):
    """Yield what an iterator yields; a thread makes the next one while this one is worked on."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


# ---- process and device --------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Where a script runs. The only place that decides on CUDA, precision and process groups."""

    device: torch.device
    rank: int
    world_size: int
    trains_in_bf16: bool = False

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def autocast(self, training=False):
        """Matrix products in bf16: in training as `start_runtime` was told, else on a GPU alone."""
        in_bf16 = self.trains_in_bf16 if training else self.on_gpu
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_bf16)

    def inference(self):
        """No gradients; on the CPU inference mode, where backbones.py takes fused kernels."""
        return torch.no_grad() if self.on_gpu else torch.inference_mode()

    def compile(self, module):
        """Compile the module in place on a GPU: its keys and its type stay what they are."""
        if self.on_gpu:
            module.compile()

    def mark_sizes(self, *tensors):
        """Tell the compiler that numbers of pixels (N, ..) and dates (N, V, S, ..) change.

        Batches differ by a pixel and views in length; it would compile anew at the second size.
        """
        for tensor in tensors if self.on_gpu else ():
            torch._dynamo.maybe_mark_dynamic(tensor, (0, 2))

    def distribute(self, module):
        """The module with gradients averaged over the processes."""
        if self.world_size == 1:
            return module
        return torch.nn.parallel.DistributedDataParallel(module)

    def to_device(self, *tensors):
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def workers(self, num_workers):
        """Loader processes; -1: none on the CPU, whose cores train, and up to 8 for a GPU."""
        if num_workers >= 0:
            return num_workers
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this node
        return min(8, (os.cpu_count() or 1) // processes_here) if self.on_gpu else 0

    def read_ahead(self, items):
        """What an iterator yields, with `read_ahead` for a GPU.

        On the CPU a second thread costs more than it hides: mapping took 1.4 times as long.
        """
        return read_ahead(items) if self.on_gpu else items

    def copy_ahead(self, batches):
        """Copy bands and days, the first two tensors of each batch, to a GPU while it computes.

        In a thread and on a stream of their own. On the CPU the batches stay as they are.
        """
        if not self.on_gpu:
            yield from batches
            return
        stream = torch.cuda.Stream(self.device)

        def copy(batch):
            bands, doys, *rest = batch
            with torch.cuda.stream(stream):
                # from pinned memory alone can a GPU copy while it computes
                copies = self.to_device(bands.pin_memory(), doys.pin_memory())
            return copies, rest, stream.record_event()

        for copies, rest, copied in read_ahead(map(copy, batches)):
            compute = torch.cuda.current_stream(self.device)
            compute.wait_event(copied)
            for part in copies:  # its memory goes to no other batch before it was used
                part.record_stream(compute)
            yield *copies, *rest

    @property
    def block_pixels(self):
        """Pixels that are read at once to be mapped: so many that few batches are not full."""
        return 1 << 16 if self.on_gpu else 1 << 15

    @property
    def batch_dates(self):
        """Dates, over all series, that are encoded at once: enough for a GPU, or for a cache."""
        return 1 << 20 if self.on_gpu else 1 << 12

    @property
    def pad_dates(self):
        """Series are padded to a multiple of it: few shapes for a GPU, no padding on the CPU."""
        return 8 if self.on_gpu else 1

    def barrier(self):
        """Wait until all processes are here."""
        if self.world_size > 1:
            dist.barrier()

    def broadcast(self, value):
        """The first process's value, in all of them."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def largest(self, value, now=True):
        """The largest of all processes' values; where not `now`, several processes get 0."""
        if self.world_size == 1 or not now:
            return value if self.world_size == 1 else 0
        answer = torch.tensor(float(value))
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return int(answer)


def start_runtime(device="auto", precision="float32"):
    """Device, precision and, under torchrun, the process group.

    device: "auto" (a GPU where there is one), "cpu" or "cuda". precision: of the matrix products in
    training, "float32", "bfloat16" or "auto" (bfloat16 where the processor is faster with it).
    Raises InputError for a GPU that is not there.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise InputError("device=cuda: found no CUDA device, wanted one (or device=cpu)")
    use_gpu = has_gpu and device != "cpu"
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    # oneDNN keeps a kernel for every number of rows, 0.6 MB each: 1024 of them unless told so
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "512")
    if use_gpu:
        if local_rank >= torch.cuda.device_count():
            raise InputError(
                f"device={device}: found {torch.cuda.device_count()} GPUs, wanted one for each "
                "process of torchrun (or device=cpu)"
            )
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")  # TF32
        torch.backends.cudnn.allow_tf32 = True
    if world_size > 1 and not dist.is_initialized():
        # numbers of pixels go by gloo, from CPU to CPU, also where gradients go by nccl
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo")
    fast_in_bf16 = use_gpu or _cpu_is_fast_in_bf16()
    return Runtime(
        torch.device("cuda", local_rank) if use_gpu else torch.device("cpu"),
        rank,
        world_size,
        trains_in_bf16=precision == "bfloat16" or (precision == "auto" and fast_in_bf16),
    )


def _cpu_is_fast_in_bf16():
    """Whether this processor trains faster with products in bf16.

    AMD's avx512_bf16 takes 0.6 of the time of float32 (Zen 5); Intel's, where a virtual machine
    hides AMX, takes 1.6 of it (Emerald Rapids).
    """
    cpu = torch.cpu.get_capabilities()
    is_amd = cpu.get("cpu_name", "").startswith("AMD")
    return bool(cpu.get("amx_bf16") or (is_amd and cpu.get("avx512_bf16")))
