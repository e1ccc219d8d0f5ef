"""Where a script computes: the only place that decides on CUDA, precision and process groups."""

import contextlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from running.errors import InputError

import torch
import torch.distributed as dist

MAX_WORKERS = 8  # threads that encode batches on a CPU


@dataclass(frozen=True)
class Runtime:
    """Where a script runs. The only place that decides on CUDA, precision and process groups."""

    device: torch.device
    rank: int
    world_size: int
    in_bf16: bool = False

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def autocast(self, training=False):
        """Matrix products in bf16 where `start_runtime` chose it; without training on a GPU only.

        In inference a CPU takes `store_in_bf16`, where it is asked for.
        """
        in_bf16 = self.in_bf16 and (training or self.on_gpu)
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=in_bf16)

    def inference(self):
        """No gradients; on the CPU inference mode, where `use_onednn` takes effect."""
        return torch.no_grad() if self.on_gpu else torch.inference_mode()

    def compile(self, module):
        """Compile the module in place on a GPU: its keys and its type stay what they are."""
        if self.on_gpu:
            module.compile()

    def mark_dynamic(self, *tensors):
        """Mark pixels (N, ..) and dates (N, V, S, ..) as sizes that change, for the compiler.

        Batches differ by a pixel and views in length; it would compile again for each size.
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
        """Loader processes; -1: none on the CPU, whose cores train, up to 8 for a GPU."""
        if num_workers >= 0:
            return num_workers
        return min(8, usable_cores()) if self.on_gpu else 0

    def map_batches(self, function, batches):
        """What a function gives for each of a list of batches, in order.

        On a CPU several batches at once, each in a thread of its own: the operations of one are too
        small to be divided (two threads took longer than one in bf16). Beyond MAX_WORKERS, Python
        itself would be what they wait for, and each gets more threads in place of more of them.
        """
        threads = torch.get_num_threads()
        if self.on_gpu or min(threads, len(batches)) < 2:
            return [function(batch) for batch in batches]
        each = -(-threads // MAX_WORKERS)
        torch.set_num_threads(each)  # of each new thread
        try:
            with ThreadPoolExecutor(threads // each) as pool:
                return list(pool.map(function, batches))
        finally:
            torch.set_num_threads(threads)

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
                # a GPU copies while it computes only from pinned memory
                copies = self.to_device(bands.pin_memory(), doys.pin_memory())
            return copies, rest, stream.record_event()

        for copies, rest, copied in read_ahead(map(copy, batches)):
            compute = torch.cuda.current_stream(self.device)
            compute.wait_event(copied)
            for part in copies:  # its memory is not reused before this stream has used it
                part.record_stream(compute)
            yield *copies, *rest

    @property
    def block_pixels(self):
        """Pixels read at once in mapping: many, so that nearly all batches are full."""
        return 1 << 16 if self.on_gpu else 1 << 15

    @property
    def batch_dates(self):
        """Dates, over all series, encoded at once: they fill a GPU, or fit a CPU's cache."""
        return 1 << 20 if self.on_gpu else 1 << 13

    @property
    def pad_dates(self):
        """Series are padded to a multiple of this: few shapes for a GPU, no padding on the CPU."""
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

    def max_over_processes(self, value, now=True):
        """The largest of all processes' values; unless `now`, several processes get 0 unasked."""
        if self.world_size == 1 or not now:
            return value if self.world_size == 1 else 0
        answer = torch.tensor(float(value))
        dist.all_reduce(answer, dist.ReduceOp.MAX)
        return int(answer)


def start_runtime(device="auto", precision="auto"):
    """Device, precision and, under torchrun, the process group.

    device: "auto" (a GPU where there is one), "cpu" or "cuda". precision: of the matrix products,
    "float32", "bfloat16" or "auto" (bfloat16 where the processor is faster with it).
    Raises InputError for a GPU that is not there.
    """
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise InputError("device=cuda: found no CUDA device, wanted one (or device=cpu)")
    use_gpu = has_gpu and device != "cpu"
    if not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys():
        # torch counts the cores of the machine or of its affinity, and knows of no quota
        torch.set_num_threads(min(torch.get_num_threads(), usable_cores()))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = (int(os.environ.get(key, 0)) for key in ("RANK", "LOCAL_RANK"))
    # oneDNN keeps a kernel for each number of rows, 0.6 MB each: by default 1024 of them
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
        in_bf16=precision == "bfloat16" or (precision == "auto" and fast_in_bf16),
    )


def usable_cores(root="/"):
    """CPU cores that this process may use, at least 1: its share where torchrun starts several.

    Those that it is bound to (taskset, Slurm), and at most what the quota of its cgroups allows
    (containers). root: of the file system in which the quota is looked up.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:  # macOS
        cores = os.cpu_count() or 1
    processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of this node
    return max(1, math.ceil(min(cores, _cpu_quota(Path(root)))) // processes_here)


def _cpu_quota(root):
    """CPU time that the cgroups of this process and all above them allow, in cores, or infinity."""
    quota = math.inf
    for folder, names in _cpu_cgroups(root):
        with contextlib.suppress(OSError, ValueError):  # no file, or "max": no limit
            used, period = (int(n) for name in names for n in (folder / name).read_text().split())
            quota = min(quota, used / period if used > 0 else math.inf)
    return quota


def _cpu_cgroups(root):
    """(folder, files with quota and period) of cgroups, version 1 or 2; none outside of Linux."""
    file = root / "proc/self/cgroup"
    for line in file.read_text().splitlines() if file.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        folder = mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        yield mount, names  # in a container, the group itself
        for name in Path(path.strip("/")).parts:
            folder = folder / name
            yield folder, names


def _cpu_is_fast_in_bf16():
    """Whether this processor trains faster with products in bf16.

    AMD's avx512_bf16 takes 0.6 of the time of float32 (Zen 5); Intel's, where a virtual machine
    hides AMX, takes 1.6 of it (Emerald Rapids).
    """
    cpu = torch.cpu.get_capabilities()
    is_amd = cpu.get("cpu_name", "").startswith("AMD")
    return bool(cpu.get("amx_bf16") or (is_amd and cpu.get("avx512_bf16")))


def read_ahead(items):
    """Yield the items of an iterator; a thread makes the next one while this one is processed."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, iterator, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, iterator, end)
            yield item


# ---- fused kernels of a CPU ----------------------------------------------------------------------


def is_fused_inference():
    """Whether fused kernels are used now: in inference mode, see `Runtime.inference`."""
    if torch.compiler.is_compiling():  # which fuses by itself, and cannot trace the question
        return False
    return torch.is_inference_mode_enabled() and torch.backends.mkldnn.is_available()


def use_onednn(*modules):
    """Let the Linear layers of modules, each with a GELU after it, be one oneDNN product each.

    In inference mode on a CPU alone; training and weights stay as they are. On an AMD processor
    with AVX-512 it takes half the time of MKL, with which training computes; the last bits differ.
    """
    for part in torch.nn.ModuleList(modules).modules():  # a Sequential comes before its layers
        if isinstance(part, torch.nn.Sequential):
            for layer, after in pairwise(part):
                if type(layer) is torch.nn.Linear and type(after) is torch.nn.GELU:
                    layer.__class__, after.__class__ = _LinearWithGelu, _GeluOfLinear
        elif type(part) is torch.nn.Linear:
            part.__class__ = _Linear


class _Linear(torch.nn.Linear):
    activation = "none"

    def forward(self, x):
        if not is_fused_inference():
            return super().forward(x)
        product = torch.ops.mkldnn._linear_pointwise  # what torch.compile makes of a Linear
        x = x.to(self.weight.dtype)  # see `store_in_bf16`
        return product(x, self.weight, self.bias, self.activation, [], "none")


class _LinearWithGelu(_Linear):
    activation = "gelu"


class _GeluOfLinear(torch.nn.GELU):
    """GELU in training; in fused inference the layer before it has applied it."""

    def forward(self, x):
        return x if is_fused_inference() else super().forward(x)


def store_in_bf16(module):
    """Let the layers of `use_onednn` compute in bf16, in inference on a CPU; the others stay.

    Raises InputError for a CPU that cannot.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise InputError("precision=bfloat16: found a CPU without products in bf16, wanted float32")
    for part in module.modules():
        if isinstance(part, _Linear):
            part.bfloat16()
