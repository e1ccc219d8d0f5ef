"""Speed of the encoder in inference, and of mapping a tile; sections of bench.py."""

import json
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from running.device import start_runtime, use_onednn  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from measures import (  # noqa: E402
    BANDS,
    MAPPED,
    MODEL,
    SAMPLE_SIZE,
    encoder_flops,
    gemm_rate,
    in_turn,
    run_child,
    seconds,
    write_tile,
)
from reference import PixelLoop, SequenceFirstEncoder  # noqa: E402

from backbones import build_backbone  # noqa: E402
from data import SentinelTimeSeriesDataset, iterate_batches  # noqa: E402
from tiles import Tile  # noqa: E402
from utils import encode_series  # noqa: E402


def make_checkpoint(work, name, **keys):
    """A checkpoint of train.py after one step on a data set."""
    folder = Path(work) / "checkpoints" / name
    keys = {**MODEL, "max_steps": 1, "epochs": 1, "val_pixels": 64, **keys}
    keys |= {"base_path": str(work), "dataset_name": name, "output_dir": str(folder)}
    keys |= {"wandb_mode": "disabled", "device": "cpu"}
    run_child(["train.py", *(f"{key}={value}" for key, value in keys.items())], 2, work)
    return folder / "last.pt"


def map_tile(checkpoint, tile_path, work, root=ROOT, **keys):
    """What infer.main of a checkout takes in a process of its own: seconds, of CPU too, and GB."""
    output_dir = Path(work) / "maps" / f"{time.time_ns()}"
    keys = {"checkpoint_path": str(checkpoint), "tile_path": str(tile_path), **keys}
    keys |= {"output_dir": str(output_dir), "wandb_mode": "disabled"}
    report = Path(work) / "report.json"
    code = (
        "import infer, json, pathlib, re, time\n"
        f"config = {{**infer.run_config, **{keys!r}}}\n"
        "start = time.perf_counter(), time.process_time()\n"
        "infer.main(config)\n"
        "taken = time.perf_counter() - start[0], time.process_time() - start[1]\n"
        "status = pathlib.Path('/proc/self/status').read_text()\n"  # of this process alone
        "memory = int(re.search(r'VmHWM:\\s*(\\d+)', status)[1]) / 2**20\n"
        f"pathlib.Path({str(report)!r}).write_text(json.dumps([*taken, memory]))\n"
    )
    run_child(["-c", code], torch.get_num_threads(), work, root=root)
    return json.loads(report.read_text())


def measure_inference(config, work):
    """Disk to representation map, two threads, against the per-pixel way with one draw a pixel."""
    folder = write_tile(work, "inference", config["size"], config["num_dates"])
    checkpoint = make_checkpoint(work, "inference")
    tile, number = Tile(folder), config["size"] ** 2
    counts = tile.clear_counts().astype(np.float64)
    loop = PixelLoop(tile, SAMPLE_SIZE, num_views=1)
    encoder = SequenceFirstEncoder(num_bands=BANDS, **MODEL).eval()
    pixels = np.random.default_rng(0).integers(0, config["size"], (min(2048, number), 2))

    @torch.no_grad()
    def reference():
        for x, doys in loop.batches(pixels, 512):
            encoder(x[:, 0], doys[:, 0])

    shares, ratios, same, limits = [], [], [], []
    for _ in range(max(1, config["rounds"] // 2)):
        per_pixel = seconds(reference) / len(pixels)
        rate = gemm_rate(config["gemm_size"])
        taken, *_ = map_tile(checkpoint, folder, work, dates=0)
        rate = max(rate, gemm_rate(config["gemm_size"]))
        once, *_ = map_tile(checkpoint, folder, work, draws=1)
        shares.append(encoder_flops(counts, **MODEL).sum() / taken / rate)
        ratios.append(per_pixel / (taken / number))
        same.append(per_pixel / (once / number))
        limits.append(per_pixel / (encoder_flops(SAMPLE_SIZE, **MODEL) / rate))
    return {
        "pixels_per_second": number / taken,
        "ratio": float(np.median(ratios)),
        "ratio_with_one_draw_each": float(np.median(same)),
        "that_ratio_if_all_were_gemm": float(np.median(limits)),
        "share_of_gemm_rate": float(np.median(shares)),
    }


def onednn_rate(size):
    """FLOP/s of oneDNN's product, which the encoder takes in inference, the best of several."""
    layer, x = torch.nn.Linear(size, size), torch.rand(size, size)
    use_onednn(layer)
    with torch.inference_mode():
        return 2 * size**3 / min(seconds(lambda: layer(x)) for _ in range(8))


def measure_encoder(config, work):
    """Series a second of the encoder alone, and of the layers of nn.TransformerEncoder alone."""
    result, number = {}, min(8192, config["size"] ** 2)
    for sizes in ({"width": 64, "depth": 3}, {"width": 64, "depth": 2}, {"width": 128, "depth": 2}):
        sizes["latent_dim"] = MAPPED["latent_dim"]
        encoder = build_backbone("transformer", num_bands=BANDS, sample_size=SAMPLE_SIZE, **sizes)
        width, keys = sizes["width"], {"activation": "gelu", "norm_first": True}
        layer = torch.nn.TransformerEncoderLayer(
            width, width // 16, 4 * width, batch_first=True, **keys
        )
        fused = torch.nn.TransformerEncoder(layer, sizes["depth"], enable_nested_tensor=False)
        fused.eval()
        for dates in (16, 24, 36):
            doys = torch.arange(1, 1 + dates).expand(number, -1)
            x, runtime = torch.randn(number, dates, BANDS), start_runtime("cpu")
            wide = torch.randn(number, dates, width)
            batches = wide.split(runtime.batch_dates // dates)

            @torch.inference_mode()
            def layers(fused=fused, batches=batches):
                for batch in batches:
                    fused(batch)

            taken = in_turn(
                config["rounds"],
                ours=partial(encode_series, encoder.eval(), x, doys, runtime),
                layers=layers,
            )
            flops = number * encoder_flops(dates, **sizes) / taken["ours"]
            result[f"{width}-d x {sizes['depth']}, {dates} dates"] = {
                "series_per_second": number / taken["ours"],
                "series_per_second_of_layers": number / taken["layers"],
                "share_of_gemm_rate": flops / gemm_rate(config["gemm_size"]),
                "share_of_onednn_rate": flops / onednn_rate(config["gemm_size"]),
            }
    return result


def measure_mapping(config, work):
    """Disk to file with the default encoder, by the dates that are read, and an earlier checkout.

    Pixels a second of CPU time, of all threads, which a shared machine disturbs less.
    """
    folder, settings = write_tile(work, "mapping", config["size"], config["num_dates"]), MAPPED
    checkpoint = make_checkpoint(work, "mapping", **settings)
    counts = Tile(folder).clear_counts().astype(np.float64)
    exact, sides = {"precision": "float32"}, {}
    for name, dates in (("all dates", 0), ("24 dates", 24), ("16 dates", 16)):
        sides[name] = {"dates": dates, **exact}
    sides["24 dates in bf16"] = {"dates": 24, "precision": "bfloat16"}
    if config["before_dir"]:
        sides["before, 24 dates"] = {"dates": 24, "root": config["before_dir"]}
    rounds, pixels = [], counts.size
    for _ in range(max(1, config["rounds"] // 2)):
        rates = {"gemm": gemm_rate(config["gemm_size"]), "onednn": onednn_rate(config["gemm_size"])}
        taken = {name: map_tile(checkpoint, folder, work, **keys) for name, keys in sides.items()}
        rounds.append(taken | {name: [rate] for name, rate in rates.items()})
    middle = {name: np.median([taken[name] for taken in rounds], 0) for name in rounds[0]}
    result = {}
    for name, keys in sides.items():
        wall, busy, memory = middle[name]
        flops = encoder_flops(np.minimum(counts, keys.get("dates") or np.inf), **settings).sum()
        result[name] = {
            "pixels_per_second": pixels / wall,
            "pixels_per_cpu_second": pixels / busy,
            "share_of_gemm_rate": flops / wall / middle["gemm"][0],
            "share_of_onednn_rate": flops / wall / middle["onednn"][0],
            "peak_memory_gb": memory,
        }
    return result


def measure_growth(config, work):
    """Cost a pixel and peak memory of mapping, by size, by number of dates and by tiles."""
    sizes = [min(128, config["largest"])]
    while sizes[-1] < config["largest"]:
        sizes.append(2 * sizes[-1])
    middle, dates = min(256, config["largest"]), config["num_dates"]
    cases = [(size, dates, 1) for size in sizes]
    cases += [(middle, dates // 2, 1), (middle, 2 * dates, 1), (sizes[0], dates, 4)]
    result, checkpoint = {}, None
    for size, num_dates, num_tiles in cases:
        name = f"{size} x {size}, {num_dates} dates, {num_tiles} tile{'s' * (num_tiles > 1)}"
        dataset = f"growth-{size}-{num_dates}-{num_tiles}"
        for number in range(num_tiles):
            write_tile(work, dataset, size, num_dates, f"MGRS-{number}")
        checkpoint = checkpoint or make_checkpoint(work, dataset)
        folder = Path(work) / "data" / dataset / "processed"
        taken, _, memory = map_tile(checkpoint, folder, work, min_valid=1, dates=0)
        views = SentinelTimeSeriesDataset(work, dataset, min_valid=1)
        pixels = num_tiles * size**2
        loading = in_turn(1, ours=lambda views=views: [None for _ in iterate_batches(views)])[
            "ours"
        ]
        result[name] = {
            "microseconds_a_pixel": 1e6 * taken / pixels,
            "microseconds_a_pixel_and_date": 1e6 * taken / pixels / num_dates,
            "input_microseconds_a_pixel": 1e6 * loading / pixels,
            "peak_memory_gb": memory,
        }
        for file in folder.glob("*/*.npy"):
            file.unlink()
    return result
