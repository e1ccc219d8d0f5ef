"""A trained encoder for other software: an ONNX graph that takes raw series, and its description.

Shapes: N pixels, S dates, B bands, D dimensions of an embedding, C classes.
"""

import json
import logging
import warnings

from running.config import in_season

import numpy as np
import torch
import torch.nn.functional as F

from transforms import even_dates, even_draws, standardise
from utils import DRAWS

# largest differences to `Encoder.encode`, see `measure_differences`; rounding gives 1e-6 to 7e-6,
# and more in the softmax of a sure classifier
TOLERANCE = {"embedding": 1e-5, "value": 1e-5, "probability": 1e-4}


def describe_encoder(encoder, max_dates):
    """What is needed to rebuild and to use an encoder, beside its weights, for JSON."""
    checkpoint = encoder.checkpoint
    return {
        "format": checkpoint["format"],
        "kind": checkpoint["kind"],
        "checkpoint_sha256": encoder.sha256,
        "backbone": checkpoint["backbone"],
        "head": checkpoint.get("head"),
        "bands": encoder.bands,
        "mean": checkpoint["mean"].tolist(),
        "std": checkpoint["std"].tolist(),
        "min_valid": encoder.min_valid,
        "season": list(encoder.season),
        "dates": max_dates,
        "draws": 0 if encoder.module.any_length else DRAWS,
        "classes": encoder.classes,
        "target": encoder.target,
    }


class Graph(torch.nn.Module):
    """`Encoder.encode` of series, from raw reflectance on, in operations that ONNX has.

    max_dates: as of `Encoder.encode`.
    """

    def __init__(self, encoder, max_dates):
        super().__init__()
        self.encoder, self.max_dates, self.network = encoder, max_dates, encoder.module
        for name in ("mean", "std"):
            self.register_buffer(name, encoder.checkpoint[name])

    def forward(self, reflectance, days, clear):
        """Embeddings (N, D), and probabilities (N, C) or values (N,) where the encoder gives any.

        reflectance: (N, S, B) float32, x 10000; days: (N, S) int64, days of year, 0 for padding;
        clear: (N, S) bool. NaN for pixels with too few clear observations.
        """
        clear = clear & (days > 0) & in_season(days, *self.encoder.season)
        clear = clear & reflectance.isfinite().all(-1) & (reflectance != 0).any(-1)
        dates = self.choose(days, clear)
        padding, place = dates < 0, dates.clamp(min=0)
        doys = days.gather(1, place).masked_fill(padding, 0)
        place = place[..., None].expand(-1, -1, reflectance.shape[2])
        bands = reflectance.gather(1, place).masked_fill(padding[..., None], 0)
        outputs = self.encode(standardise(bands, self.mean, self.std), doys, padding)
        if len(outputs) > 1:
            outputs = outputs[0], self.encoder.decode(outputs[1])
        few = clear.sum(1) < max(1, self.encoder.min_valid)
        return tuple(
            part.masked_fill(few.view(-1, *[1] * (part.ndim - 1)), torch.nan) for part in outputs
        )

    def choose(self, days, clear):
        """Indices of the clear dates that are read, in order; shorter rows are padded with -1."""
        number = torch.arange(days.shape[1])
        # ONNX has no stable sort, so dates of one day get different keys
        order = (days.masked_fill(~clear, 400) * days.shape[1] + number).argsort(1)
        order = order.masked_fill(number >= clear.sum(1, keepdim=True), -1)
        return even_dates(F.pad(order, (0, self.max_dates + 1), value=-1), self.max_dates)

    def encode(self, x, doys, padding):
        """Representations and, of a network with a head, its outputs: a tuple."""
        if self.network.any_length:
            outputs = self.network(x, doys, padding)
            return outputs if isinstance(outputs, tuple) else (outputs,)
        x, doys = even_draws(x, doys, self.network.sample_size, DRAWS)
        outputs = self.network(x.flatten(0, 1), doys.flatten(0, 1))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return tuple(part.unflatten(0, (-1, DRAWS)).mean(1) for part in outputs)


def write_onnx(encoder, path, max_dates):
    """Write the Graph of an encoder; its description is in the file's metadata, under "config".

    Inputs and outputs are those of `Graph.forward`: N and S may be of any size. Needs onnxscript.
    """
    answer = ["value"] if encoder.target else ["probability"] if encoder.classes else []
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it says what it does not need
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch's, of its own parts
        program = torch.onnx.export(
            Graph(encoder, max_dates).eval(),
            tuple(map(torch.from_numpy, random_series(encoder, 5, 7))),
            input_names=["reflectance", "days", "clear"],
            output_names=["embedding", *answer],
            dynamic_shapes=({0: "N", 1: "S"},) * 3,
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props["config"] = json.dumps(describe_encoder(encoder, max_dates))
    program.save(path)


def random_series(encoder, count, num_dates):
    """Series that look like those of training: the inputs of `Graph.forward`, as arrays."""
    rng, shape = np.random.default_rng(count), (count, num_dates)
    mean, std = (encoder.checkpoint[name].numpy() for name in ("mean", "std"))
    reflectance = rng.normal(mean, std, (*shape, len(mean))).clip(1).astype(np.float32)
    days = [0, *(day for day in range(1, 367) if in_season(day, *encoder.season))]
    return reflectance, rng.choice(days, shape), rng.random(shape) < 0.7


def measure_differences(encoder, path, max_dates):
    """{output: largest difference} of an ONNX file to `Encoder.encode`, of random series.

    Of embeddings and values relative to their root mean square, of probabilities as it is; infinite
    where one of both is NaN.
    """
    import onnxruntime  # of requirements-export.txt, as onnxscript

    session = onnxruntime.InferenceSession(path)
    names = [part.name for part in session.get_inputs()], [p.name for p in session.get_outputs()]
    worst = dict.fromkeys(names[1], 0.0)
    # of the few dates, half of the pixels have too few clear ones; of the many, more than are read
    for num_dates in (3 * encoder.min_valid // 2, 2 * encoder.min_valid + 60):
        series = random_series(encoder, 200, num_dates)
        wanted = [p for p in encoder.encode(*series, max_dates=max_dates) if p is not None]
        found = session.run(None, dict(zip(names[0], series, strict=True)))
        for name, one, other in zip(names[1], found, wanted, strict=True):
            known = np.isfinite(other)
            scale = 1 if name == "probability" else np.sqrt(np.mean(other[known] ** 2))
            same = np.array_equal(np.isfinite(one), known)
            difference = np.abs(one - other)[known].max(initial=0) / scale if same else np.inf
            worst[name] = max(worst[name], float(difference))
    return worst
