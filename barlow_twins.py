"""Barlow Twins (Zbontar et al. 2021, arXiv 2103.03230): projector, cross-correlation, loss.

Shapes: N pixels of the whole batch, P = projection dimensions. With several processes each holds a
part of the batch; BatchNorm and the loss see the whole of it, so the gradients, summed up over the
processes, are those of one process with the whole batch.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce

EPSILON = 1e-5  # of the variances, as in the reference's BatchNorm


def _world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


class BatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over the batch of all processes (nn.SyncBatchNorm runs on CUDA only)."""

    def forward(self, x):
        if not self.training or _world_size() == 1:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            total = all_reduce(torch.cat([x.sum(0), x.new_tensor([len(x)])]))
            count, mean = total[-1], total[:-1] / total[-1]
            var = all_reduce((x - mean).square().sum(0)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(var * count / (count - 1), self.momentum)
                self.num_batches_tracked += 1
            return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class Projector(nn.Sequential):
    """Linear, BatchNorm, ReLU twice, then Linear; no biases, as in the reference."""

    def __init__(self, *, latent_dim, width, projection_dim):
        super().__init__(
            nn.Linear(latent_dim, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            BatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, projection_dim, bias=False),
        )


class BarlowTwins(nn.Module):
    """Backbone and projector; takes views, gives the projections of the whole batch.

    forward(x, doys): x (N, V, S, B), doys (N, V, S). All views go through the backbone in one call
    and through the projector one by one, since its BatchNorm belongs to a view.
    Returns a list of V projections, each (N, P) float32, gathered over the processes.
    """

    def __init__(self, backbone, projector):
        super().__init__()
        self.backbone, self.projector = backbone, projector

    def forward(self, x, doys):
        y = self.backbone(x.flatten(0, 1), doys.flatten(0, 1)).unflatten(0, x.shape[:2])
        return [gather(self.projector(view).float()) for view in y.unbind(1)]


def gather(z):
    """The rows of all processes in the order of rank, differentiable; counts may differ.

    Each process puts its rows into zeros and the sum over processes is taken, whose backward sums
    up the gradients: every process's loss is the whole loss, so with gradients averaged over
    processes (DistributedDataParallel) each sample counts once.
    """
    if _world_size() == 1:
        return z
    here, total = share(len(z), z.device)
    whole = z.new_zeros(total, *z.shape[1:])
    return all_reduce(whole.index_copy(0, torch.arange(here.start, here.stop, device=z.device), z))


def share(count, device):
    """Which rows of the whole batch this process holds, and how many rows there are.

    count: of this process's rows. Returns a slice and an int.
    """
    if _world_size() == 1:
        return slice(0, count), count
    counts = torch.zeros(_world_size(), device=device)
    counts[dist.get_rank()] = count
    dist.all_reduce(counts)
    start = int(counts[: dist.get_rank()].sum())
    return slice(start, start + count), int(counts.sum())


def normalise(z):
    """z (N, P) to mean 0 and population variance 1 in each dimension, in float32."""
    z = z.float()
    z = z - z.mean(0)
    return z * (z.square().mean(0) + EPSILON).rsqrt()


def cross_correlation(z_a, z_b):
    """C = A'B / N of two normalised batches (N, P): (P, P)."""
    return z_a.T @ z_b / len(z_a)


def barlow_twins_loss(c, barlow_lambda):
    """Equation 1 of the paper: sum_i (C_ii - 1)^2 + lambda sum_{i != j} C_ij^2.

    c: (P, P). Returns loss, on-diagonal part, off-diagonal part (without lambda).
    """
    on_diag = (c.diagonal() - 1).square().sum()
    off_diag = c.square().sum() - c.diagonal().square().sum()
    return on_diag + barlow_lambda * off_diag, on_diag, off_diag


def mix_up_loss(z_m, z_a, z_b_shuffled, z_b, weight):
    """Mixed Barlow Twins (arXiv 2312.02151): the mixed view's correlations against the mixture's.

    All (N, P), normalised; weight: (N,) share of a in each mixed sample.
    Returns |C_ma - C_ma'|^2 + |C_mb - C_mb'|^2 where ' takes the mixed embeddings for z_m.
    """
    mixture = weight[:, None] * z_a + (1 - weight[:, None]) * z_b_shuffled
    difference = z_m - mixture
    return sum(cross_correlation(difference, z).square().sum() for z in (z_a, z_b))
