"""Encoders of pixel series, classification heads and their loss.

Every backbone takes x (N, S, B), standardised bands, and doys (N, S), days of year, and gives
representations (N, D). All read the day of year itself, never the position of a date in the series.
Shapes: N pixels, S dates, B bands, W width of the network, D = latent_dim, C classes.
"""

import math
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

from running.device import is_fused_inference, use_onednn
from running.distributed import gather
from running.errors import InputError

import torch
import torch.nn.functional as F
from torch import nn

from transforms import encode_days


class SimpleMLP(nn.Module):
    """Dense layers on all dates of a series and their days, side by side.

    Takes exactly `sample_size` dates. num_bands: B; width: of the hidden layers; depth: how many;
    day_cycles: highest harmonic of the days, 0 for 4.
    """

    any_length = False

    def __init__(self, *, num_bands, sample_size, latent_dim, width, depth, day_cycles=0):
        super().__init__()
        self.latent_dim, self.sample_size = latent_dim, sample_size
        self.day_features = 2 * (day_cycles or 4)
        sizes = [sample_size * (num_bands + self.day_features), *[4 * width] * depth]
        layers = []
        for size_in, size_out in pairwise(sizes):
            layers += [nn.Linear(size_in, size_out), nn.LayerNorm(size_out), nn.GELU()]
        # no bias at the end: the projector's BatchNorm would remove it
        self.layers = nn.Sequential(*layers, nn.Linear(sizes[-1], latent_dim, bias=False))

    @property
    def head(self):
        return self.layers[-1]

    def forward(self, x, doys):
        x = torch.cat([x, encode_days(doys, self.day_features)], dim=-1)
        return self.layers(x.flatten(1))


class SimpleCNN(nn.Module):
    """Convolutions along time over bands and days, then the mean and the maximum over time.

    Built for series of `sample_size` dates, whose spacing its kernels learn. width: channels;
    depth: number of convolutions; day_cycles: highest harmonic of the days, 0 for 4.
    """

    any_length = False

    def __init__(self, *, num_bands, sample_size, latent_dim, width, depth, day_cycles=0):
        super().__init__()
        self.latent_dim, self.sample_size = latent_dim, sample_size
        self.day_features = 2 * (day_cycles or 4)
        channels = [num_bands + self.day_features, *[2 * width] * depth]
        self.date_dim = channels[-1]
        self.convolutions = nn.ModuleList(
            nn.Conv1d(size_in, size_out, kernel_size=5, padding=2)
            for size_in, size_out in pairwise(channels)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(size) for size in channels[1:])
        self.head = nn.Linear(2 * channels[-1], latent_dim, bias=False)

    def date_features(self, x, doys):
        """Features of each date, (N, S, date_dim)."""
        x = torch.cat([x, encode_days(doys, self.day_features)], dim=-1)
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = F.gelu(norm(convolution(x.transpose(1, 2)).transpose(1, 2)))
        return x

    def pool(self, x, padding_mask=None):
        """Representations (N, D) of the features of dates, (N, S, date_dim)."""
        return self.head(torch.cat([x.mean(1), x.amax(1)], dim=-1))

    def forward(self, x, doys):
        return self.pool(self.date_features(x, doys))


SMALLEST_SUM = 1e-20  # of a row of exp(score): smaller ones lose digits to underflow


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward, each added to its input.

    Keys have no bias: the softmax over dates cancels it, so only rounding errors would move it.
    """

    HEAD_DIM = 16

    def __init__(self, width):
        super().__init__()
        self.heads = width // self.HEAD_DIM
        self.norm_attention = nn.LayerNorm(width)
        self.to_key = nn.Linear(width, width, bias=False)
        self.to_query_value = nn.Linear(width, 2 * width)
        self.from_heads = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x, attention_mask):  # (N, S, W), (N, 1, 1, S) True for dates to leave out
        y = self.norm_attention(x)
        query, value = self.to_query_value(y).chunk(2, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.heads, self.HEAD_DIM)).transpose(1, 2)  # (N, heads, S, 16)
            for part in (query, self.to_key(y), value)
        )
        y = self.attend(query, key, value, attention_mask)
        x = x + self.from_heads(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))

    def attend(self, query, key, value, attention_mask):  # (N, heads, S, 16), mask as in forward
        if is_fused_inference():
            return attend_fast(query, key, value, attention_mask)
        # written out: trains faster on the CPU than the fused kernel for series this short
        score = (query * self.HEAD_DIM**-0.5) @ key.transpose(-1, -2)  # (N, heads, S, S)
        if attention_mask is not None:
            score = score.masked_fill(attention_mask, -math.inf)
        return softmax_rows(score) @ value


def softmax_rows(score):
    """The softmax over the last dimension, (.., S), float32 on a CPU.

    There PyTorch takes ten times as long for rows of 14 numbers as for rows of 16, which fill its
    registers; so rows are filled up.
    """
    if score.device.type != "cpu" or torch.compiler.is_compiling():
        return score.softmax(-1)
    size = score.shape[-1]
    return F.pad(score.float(), (0, -size % 16), value=-math.inf).softmax(-1)[..., :size]


def attend_fast(query, key, value, attention_mask):
    """Attention for inference on a CPU, float32: about half the time of PyTorch's for short series.

    Its softmax reads rows of S numbers one by one. Here exp runs over all scores at once, without
    subtracting the largest of each row, and a product gives the sums of the rows. Where exp leaves
    the range of float32, which the sums show, PyTorch's is taken.
    query, key, value: (N, heads, S, D); attention_mask: (N, 1, 1, S), True to leave out, or None.
    """
    form = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
    query, key, value = (part.to(**form).contiguous() for part in (query, key, value))
    num_dates, scale = query.shape[2], query.shape[3] ** -0.5
    left, right = query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2)
    # with beta 0 the empty tensor is not read
    score = torch.baddbmm(left.new_empty(1, 1, 1), left, right, beta=0, alpha=scale)
    weight = score.view(*query.shape[:3], num_dates).exp_()
    if attention_mask is not None:
        weight.masked_fill_(attention_mask, 0)
    total = weight @ weight.new_ones(num_dates, 1)
    if total.numel() and (total.min() < SMALLEST_SUM or not total.max() < math.inf):
        is_read = None if attention_mask is None else ~attention_mask
        return F.scaled_dot_product_attention(query, key, value, is_read)
    return (weight @ value).div_(total)


class TransformerEncoder(nn.Module):
    """Band MLP plus day encoding, pre-norm layers, attention pooling (TESSERA, arXiv 2506.20380).

    Takes any number of dates. width: W, a multiple of 16 (heads have 16 dimensions); depth: layers;
    day_cycles: highest harmonic of the days, which are added to 2 x day_cycles of the W dimensions;
    0, or more than W / 2: W / 2.
    """

    any_length = True

    def __init__(self, *, num_bands, sample_size, latent_dim, width, depth, day_cycles=0):
        super().__init__()
        if width % TransformerLayer.HEAD_DIM:
            raise InputError(f"width={width}: wanted a multiple of {TransformerLayer.HEAD_DIM}")
        self.latent_dim, self.sample_size, self.date_dim = latent_dim, sample_size, width
        self.day_features = min(2 * day_cycles or width, width)
        self.embed = nn.Sequential(nn.Linear(num_bands, width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(TransformerLayer(width) for _ in range(depth))
        # no biases from here on: the projector's BatchNorm removes any constant shift, so that
        # their gradients would be rounding errors alone
        self.norm = nn.LayerNorm(width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.head = nn.Linear(width, latent_dim, bias=False)
        use_onednn(self.embed, self.layers)  # in inference on a CPU

    def date_features(self, x, doys, padding_mask=None):
        """Features of each date, (N, S, date_dim)."""
        days = encode_days(doys, self.day_features)
        x = self.embed(x) + F.pad(days, (0, self.date_dim - self.day_features))
        mask = None if padding_mask is None else padding_mask[:, None, None]
        for layer in self.layers:
            x = layer(x, mask)
        return self.norm(x)

    def pool(self, x, padding_mask=None):
        return self.head(attention_pool(self.score(x), x, padding_mask))

    def forward(self, x, doys, padding_mask=None):
        """padding_mask: (N, S) bool, True for dates to leave out; at least one date must stay."""
        return self.pool(self.date_features(x, doys, padding_mask), padding_mask)


def attention_pool(score, x, padding_mask=None):
    """Mean of dates x (N, S, W) weighted by the softmax over dates of score (N, S, 1): (N, W)."""
    score = score.float()
    if padding_mask is not None:
        score = score.masked_fill(padding_mask[..., None], -math.inf)
    return (score.softmax(1) * x).sum(1)


# The contract of a backbone. Its constructor takes `num_bands` and BACKBONE_KEYS by keyword. Its
# forward(x, doys) gets days as int16. It has
#   latent_dim    D of the representations that forward(x, doys) gives
#   sample_size   dates it was built for, which inference draws where any_length is False
#   any_length    whether it takes series of any length; then forward(x, doys, padding_mask) too
#   head          the nn.Linear that gives the representations; only if they should be ordered
# and, only if head=attention should work with it, features of each date and their pooling:
#   date_dim, date_features(x, doys[, padding_mask]) -> (N, S, date_dim)
#   pool(features[, padding_mask]) -> (N, D)
# Register it here. A new key is named in BACKBONE_KEYS, which every constructor then takes. It has
# a default in the run_config of train.py and of the scripts that fine-tune, a range in
# running/config.py and, in OLD_CHECKPOINT_DEFAULTS of running/checkpoints.py, the value of earlier
# checkpoints.
BACKBONES = {"mlp": SimpleMLP, "cnn": SimpleCNN, "transformer": TransformerEncoder}
BACKBONE_KEYS = ("sample_size", "latent_dim", "width", "depth", "day_cycles")


def backbone_arguments(config, num_bands):
    """What `build_backbone` needs, from a config: kept in checkpoints to build it again."""
    knobs = {key: config[key] for key in BACKBONE_KEYS}
    return {"name": config["backbone"], "num_bands": num_bands, **knobs}


def build_backbone(name, **keywords):
    """A backbone by its name in BACKBONES; keywords as its constructor takes them.

    Raises InputError for another name or a keyword value that does not fit.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone={name}: wanted one of {', '.join(BACKBONES)}")
    backbone = BACKBONES[name](**keywords)
    for attribute in ("latent_dim", "sample_size", "any_length"):
        if not hasattr(backbone, attribute):
            raise InputError(f"backbone={name}: wanted the attribute {attribute} (see BACKBONES)")
    return backbone


# ---- classification ------------------------------------------------------------------------------


class LinearHead(nn.Sequential):
    """Linear on representations scaled by BatchNorm without affine, as linear probes are."""

    def __init__(self, *, backbone, num_classes, dropout):
        super().__init__(
            nn.BatchNorm1d(backbone.latent_dim, affine=False),
            nn.Dropout(dropout),
            nn.Linear(backbone.latent_dim, num_classes),
        )

    @torch.no_grad()
    def start_from(self, mean, var, weight, bias):
        """Take the weights (C, D) and biases (C,) of a model of (y - mean) / sqrt(var + 1e-5)."""
        norm, _, linear = self
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


class MLPHead(nn.Sequential):
    """One hidden layer with BatchNorm and dropout."""

    def __init__(self, *, backbone, num_classes, dropout, width=256):
        super().__init__(
            nn.BatchNorm1d(backbone.latent_dim, affine=False),
            nn.Linear(backbone.latent_dim, width, bias=False),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width, num_classes),
        )


class AttentionHead(nn.Module):
    """Attention pooling of its own over the backbone's dates, beside the representation."""

    def __init__(self, *, backbone, num_classes, dropout):
        super().__init__()
        if not hasattr(backbone, "date_features"):
            kind = type(backbone).__name__
            raise InputError(f"head=attention: wanted a backbone with date_features, not {kind}")
        self.score = nn.Linear(backbone.date_dim, 1, bias=False)
        size = backbone.date_dim + backbone.latent_dim
        both = SimpleNamespace(latent_dim=size)
        self.classify = LinearHead(backbone=both, num_classes=num_classes, dropout=dropout)

    def start_from(self, mean, var, weight, bias):
        """As LinearHead's; the pooled dates, which the model has not seen, get weights of 0."""
        mean, weight = (F.pad(part, (self.score.in_features, 0)) for part in (mean, weight))
        var = F.pad(var, (self.score.in_features, 0), value=1.0)
        self.classify.start_from(mean, var, weight, bias)

    def pool(self, features, representation, padding_mask=None):
        """What forward takes: the pooled dates beside the representation, of each pixel."""
        pooled = attention_pool(self.score(features), features, padding_mask)
        return torch.cat([pooled, representation], dim=-1)

    def forward(self, x):
        return self.classify(x)


# A head takes backbone, num_classes and dropout by keyword, and representations (N, D); it gives
# logits (N, C). One that can start from a linear model has start_from. Register it here.
HEADS = {"linear": LinearHead, "mlp": MLPHead, "attention": AttentionHead}


class Classifier(nn.Module):
    """A backbone and a head. forward gives representations (N, D) and logits (N, C).

    In training the logits are those of the whole batch, over all processes.
    freeze_backbone: it stays in eval mode and no gradient reaches it. freeze_norm: the head's
    BatchNorm keeps its statistics, on which the weights that it starts from rely.
    """

    def __init__(
        self, backbone, *, head, num_classes, dropout, freeze_backbone=False, freeze_norm=False
    ):
        super().__init__()
        if head not in HEADS:
            raise InputError(f"head={head}: wanted one of {', '.join(HEADS)}")
        self.backbone, self.freeze_backbone = backbone, freeze_backbone
        self.freeze_norm = freeze_norm
        self.head = HEADS[head](backbone=backbone, num_classes=num_classes, dropout=dropout)
        self.any_length, self.sample_size = backbone.any_length, backbone.sample_size
        backbone.requires_grad_(not freeze_backbone)

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        for module in self.head.modules() if self.freeze_norm else ():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
        return self

    def forward(self, x, doys, *padding_mask):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_backbone):
            if isinstance(self.head, AttentionHead):
                features = self.backbone.date_features(x, doys, *padding_mask)
                y = self.backbone.pool(features, *padding_mask)
            else:
                y = self.backbone(x, doys, *padding_mask)
        is_attention = isinstance(self.head, AttentionHead)
        head_input = self.head.pool(features, y, *padding_mask) if is_attention else y
        # BatchNorm and dropout of the head see the whole batch, in every process
        return y, self.head(gather(head_input) if self.training else head_input)


def focal_loss(logits, target, gamma, weight=None):
    """Focal Loss (Lin et al. 2017), in float32: cross-entropy times (1 - p)^gamma; gamma 0: plain.

    logits: (N, C); target: (N,) class numbers; weight: (C,) of the classes, or None. Gradients are
    finite for every gamma, 0 for a pixel whose p is 1.
    """
    loss = F.cross_entropy(logits.float(), target, weight=weight, reduction="none")
    if gamma:
        probability = logits.float().softmax(1).gather(1, target[:, None])[:, 0]
        # a power below 1 has an infinite slope at 0, which times the loss of 0 would be NaN
        loss = (1 - probability).clamp(min=torch.finfo(torch.float32).tiny) ** gamma * loss
    return loss.mean() if weight is None else loss.sum() / weight[target].sum()


def decode_classes(outputs, temperature):
    """Probabilities (N, C) of a classifier's outputs, its logits (N, C)."""
    return (outputs / temperature).softmax(1)


def decode_quantity(outputs, target):
    """Values (N,) float64 of a regressor's outputs (N, 1), deviations from the target's mean.

    target: of its checkpoint.
    """
    return outputs[:, 0].double() * target["std"] + target["mean"]


def load_backbone(checkpoint):
    """The backbone of a checkpoint (`load_checkpoint`), all keys matched, in eval mode.

    Its dimensions are ordered: the rotation of the checkpoint, if it has one, becomes part of the
    last layer. Distances and angles between representations stay what they were in training.
    Raises InputError for weights that are not finite, or do not fit the backbone that it names.
    """
    with _one_line("backbone"):
        backbone = build_backbone(**checkpoint["backbone"])
        _load_weights(backbone, checkpoint["backbone_state"])
        if checkpoint.get("rotation") is not None and hasattr(backbone, "head"):
            _rotate(backbone.head, checkpoint["rotation"])
    return backbone.eval()


@torch.no_grad()
def _rotate(linear, rotation):
    """Make a layer give y @ rotation in place of y; rotation: (D, D), of `find_rotation`."""
    if not rotation.isfinite().all():
        raise ValueError("its rotation is not finite")
    for parameter in linear.parameters():  # weight (D, W), and bias (D,) if there is one
        parameter.copy_(rotation.double().T @ parameter.double())


@contextmanager
def _one_line(part):
    """InputError of one line for a part of a checkpoint that cannot be built."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        line = " ".join(str(error).split())[:300]
        raise InputError(f"checkpoint: found a {part} that cannot be built: {line}") from None


def load_classifier(checkpoint):
    """The classifier of a fine-tuned checkpoint, all keys matched, in eval mode."""
    backbone = load_backbone(checkpoint)
    with _one_line("classifier"):
        classifier = Classifier(backbone, **checkpoint["head"])
        _load_weights(classifier.head, checkpoint["head_state"])
    return classifier.eval()


def _load_weights(module, state):
    """Put weights into a module; ValueError for weights with which all outputs would be NaN."""
    module.load_state_dict(state, strict=True)
    if not all(weight.isfinite().all() for weight in module.state_dict().values()):
        raise ValueError("its weights are not finite")
