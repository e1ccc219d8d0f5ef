"""One batch, spread over several processes.

Each process holds some rows of the batch; BatchNorm, the loss and every random number see the whole
of it. So the gradients, averaged over the processes, are those of one process with the whole batch.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._functional_collectives import all_reduce, wait_tensor


def _world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _sum(x):
    """The sum of a tensor over all processes; its backward sums the gradients over them."""
    return wait_tensor(all_reduce(x, "sum", dist.group.WORLD))


def share(count):
    """Which rows of the whole batch this process holds, and the number of all rows.

    count: rows of this process. The counts are exchanged between CPUs, which never synchronises
    with a GPU. Returns a slice and an int.
    """
    if _world_size() == 1:
        return slice(0, count), count
    counts = torch.zeros(_world_size())
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    start = int(counts[: dist.get_rank()].sum())
    return slice(start, start + count), int(counts.sum())


def gather(z):
    """The rows of all processes in the order of rank, differentiable; their numbers may differ.

    An all-gather written as the all_reduce of zero-padded rows, whose backward sums the gradients
    over the processes. Every process computes the whole loss, so with gradients averaged over
    processes (DistributedDataParallel) each pixel counts once.
    """
    if _world_size() == 1:
        return z
    rows, total = share(len(z))
    index = torch.arange(rows.start, rows.stop, device=z.device)
    return _sum(z.new_zeros(total, *z.shape[1:]).index_copy(0, index, z))


class BatchGenerator:
    """Random numbers for each pixel of the whole batch, of which a process keeps its own rows.

    rows, total: as `share` gives them. The same seed gives a pixel the same numbers, whatever the
    number of processes.
    """

    def __init__(self, rows, total, seed, device):
        self.rows, self.total, self.device = rows, total, device
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape):
        """(N, *shape) float32 in [0, 1), N rows of this process."""
        numbers = torch.rand(self.total, *shape, generator=self.generator)
        return numbers[self.rows].to(self.device, non_blocking=True)

    def normal(self, *shape):
        """(N, *shape) float32 of mean 0 and deviation 1, N rows of this process."""
        numbers = torch.randn(self.total, *shape, generator=self.generator)
        return numbers[self.rows].to(self.device, non_blocking=True)


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the batch of all processes (nn.SyncBatchNorm runs on CUDA only)."""

    def forward(self, x):
        if not self.training or _world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            total = _sum(torch.cat([x.sum(0), x.new_full((1,), len(x))]))
            count, mean = total[-1], total[:-1] / total[-1]
            var = _sum((x - mean).square().sum(0)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
                self.num_batches_tracked += 1
            return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias
