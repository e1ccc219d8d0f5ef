"""Measure the speed of training and mapping, as ratios against a per-pixel reference.

Every ratio is the median over rounds in which both sides run in turn, in one process; the GEMM
rate that shares are taken of is measured in between. Prints a table and one JSON object. Like the
tests, it imports the scripts that it measures.

    python benchmarks/bench.py                        # about 15 minutes on two CPU cores
    python benchmarks/bench.py sections=input,training
    python benchmarks/bench.py device=cuda            # what a GPU adds: training from disk, a tile
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from reference import PixelLoop, SequenceFirstEncoder  # noqa: E402

import train  # noqa: E402
from backbones import build_backbone  # noqa: E402
from barlow_twins import BarlowTwins, Projector  # noqa: E402
from data import SentinelTimeSeriesDataset, iterate_batches  # noqa: E402
from running.config import check  # noqa: E402
from running.device import Runtime, start_runtime, use_onednn  # noqa: E402
from running.errors import InputError  # noqa: E402
from running.files import make_output_dir, write_json  # noqa: E402
from running.log import start_log  # noqa: E402
from running.script import run_script  # noqa: E402
from tiles import Tile  # noqa: E402
from utils import encode_series  # noqa: E402

run_config = {
    # input, training, inference, encoder, mapping, profile, growth, processes, startup, gpu
    "sections": "all",
    "before_dir": "",  # folder of an earlier checkout, which maps in turn with this one
    "size": 256,  # pixels along the tile
    "largest": 1024,  # pixels along the largest tile of the growth table
    "num_dates": 73,
    "num_tiles": 300,  # whose clear observations are counted
    "rounds": 7,  # of each comparison
    "gemm_size": 2048,  # rows of the matrices whose product gives the GEMM rate
    "gpu_size": 1098,  # pixels along the tile that a GPU maps
    "device": "auto",  # auto, cpu or cuda
    "output_dir": "outputs/bench",  # receives bench.json
    "wandb_mode": "auto",  # auto (online where logged in), online, offline or disabled
}

BANDS, SAMPLE_SIZE = 11, 16
MODEL = {"width": 64, "depth": 3, "latent_dim": 64}  # ffn 4 x width
MAPPED = {key: train.run_config[key] for key in MODEL}  # the default encoder
STEP = {"loss": "barlow_twins", "barlow_lambda": 0.005, "augment": "none", "mix_up": 0.0}
STEP |= {"clip_norm": 1.0, "weight_decay": 1e-4, "seed": 0, "prediction": 0.0}
STEP |= {"min_sample_size": SAMPLE_SIZE, "blend": 0.0}
STEP |= {"backbone": "transformer", "sample_size": SAMPLE_SIZE, "projector_dim": 512, **MODEL}


# ---- tiles ---------------------------------------------------------------------------------------


def write_tile(base_path, name, size, num_dates, tile="MGRS-0"):
    """A tile of noise, half of it clear in stripes of its own for each pixel; returns its folder.

    One small block is drawn and laid side by side, so that a large tile is written quickly.
    """
    folder = Path(base_path) / "data" / name / "processed" / tile
    folder.mkdir(parents=True)
    rng = np.random.default_rng(size)
    block, shape = 128, (num_dates, size, size)
    repeats = -(-size // block)
    bands = np.lib.format.open_memmap(folder / "bands.npy", "w+", np.uint16, (*shape, BANDS))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.uint8, shape)
    for index in range(num_dates):
        values = rng.integers(1, 10_000, (block, block, BANDS), dtype=np.uint16)
        bands[index] = np.tile(values, (repeats, repeats, 1))[:size, :size]
        clear = (rng.random((block, block)) < 0.5).astype(np.uint8)
        masks[index] = np.tile(clear, (repeats, repeats))[:size, :size]
    np.save(folder / "doys.npy", np.linspace(1, 365, num_dates).astype(np.int16))
    np.save(folder / "band_mean.npy", np.full(BANDS, 5000, np.float32))
    np.save(folder / "band_std.npy", np.full(BANDS, 2887, np.float32))
    return folder


# ---- measuring -----------------------------------------------------------------------------------


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def in_turn(rounds, **functions):
    """Median seconds of functions that run in turn, after a first time that does not count."""
    times = [{name: seconds(f) for name, f in functions.items()} for _ in range(rounds + 1)]
    return {name: float(np.median([t[name] for t in times[1:]])) for name in functions}


def gemm_rate(size, device="cpu", dtype=torch.float32):
    """FLOP/s of a product of two (size, size) matrices, the best of several."""
    a, b = torch.rand(2, size, size, device=device).to(dtype)
    best = min(seconds(lambda: (a @ b, synchronise())) for _ in range(8))
    return 2 * size**3 / best


def synchronise():
    """Wait until a GPU, where there is one, has done all that it was told."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def encoder_flops(steps, *, width, depth, latent_dim):
    """FLOP of the encoder for series of so many steps: two for each multiply-and-add."""
    layer = 24 * width**2 + 4 * steps * width  # projections and feed-forward; attention
    return steps * (2 * (BANDS * width + width**2) + depth * layer) + 2 * width * latent_dim


def run_child(arguments, threads, work, launcher=(), root=ROOT):
    """Run a script of the project, or of another checkout; returns the seconds that it took."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "XDG_CACHE_HOME": str(work)}
    command = [sys.executable, *launcher, *arguments]
    start = time.perf_counter()
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False)
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{child.stderr.decode()}")
    return time.perf_counter() - start


# ---- sections ------------------------------------------------------------------------------------


def measure_input(config, work):
    """Samples a second on one core, page cache warm: two views of a pixel are a sample."""
    folder = write_tile(work, "input", config["size"], config["num_dates"])
    rng, number = np.random.default_rng(0), min(4096, config["size"] ** 2)
    pixels = rng.integers(0, config["size"], (number, 2))
    loop = PixelLoop(Tile(folder), SAMPLE_SIZE, num_views=2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    result = {}
    for batch_size in (256, 1024):
        dataset = SentinelTimeSeriesDataset(
            work, "input", sample_size=SAMPLE_SIZE, min_valid=SAMPLE_SIZE, batch_size=batch_size
        )
        taken = in_turn(
            config["rounds"],
            ours=lambda dataset=dataset: [None for _ in iterate_batches(dataset)],
            loop=lambda batch_size=batch_size: [None for _ in loop.batches(pixels, batch_size)],
        )
        ours, reference = taken["ours"] / dataset.num_pixels, taken["loop"] / number
        result[f"batch {batch_size}"] = {
            "samples_per_second": 1 / ours,
            "reference_samples_per_second": 1 / reference,
            "ratio": reference / ours,
        }
    torch.set_num_threads(threads)
    return result


def make_step(model, settings=STEP, runtime=None):
    """A training step on a batch, as train.py makes it, as a function of x and doys."""
    runtime = runtime or Runtime(torch.device("cpu"), 0, 1)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)

    def step(x, doys):
        train.train_step(model, optimiser, x, doys, settings, runtime, step=0, rate=1e-3)

    return step


class TwoCalls(BarlowTwins):
    """The reference's model: the encoder is called once for each view."""

    def forward(self, x, doys, days):
        views = zip(x.unbind(1), doys.unbind(1), strict=True)
        return None, [self.projector(self.backbone(*view)) for view in views], None


def measure_training(config, work):
    """A step of the encoder of 64 dimensions and 3 layers, projector 512, two views."""
    write_tile(work, "training", config["size"], config["num_dates"])
    sizes = {"latent_dim": MODEL["latent_dim"], "width": 512, "projection_dim": 512}
    reference = {"num_bands": BANDS, **MODEL}
    result = {}
    for batch_size in (256, 1024):
        dataset = SentinelTimeSeriesDataset(
            work, "training", sample_size=SAMPLE_SIZE, batch_size=batch_size
        )
        batch = next(iterate_batches(dataset))
        backbone = build_backbone("transformer", num_bands=BANDS, sample_size=SAMPLE_SIZE, **MODEL)
        eager, no_dropout = (SequenceFirstEncoder(**reference, dropout=p) for p in (0.1, 0.0))
        steps = {
            "ours": make_step(BarlowTwins(backbone, Projector(**sizes))),
            "eager": make_step(TwoCalls(eager, Projector(**sizes))),
            "no_dropout": make_step(TwoCalls(no_dropout, Projector(**sizes))),
        }
        bound = {name: partial(step, *batch) for name, step in steps.items()}
        taken, number = in_turn(config["rounds"], **bound), len(batch[0])
        flops = 3 * 2 * number * encoder_flops(SAMPLE_SIZE, **MODEL)
        flops += 3 * 2 * number * 2 * (MODEL["latent_dim"] * 512 + 2 * 512**2)
        flops += 3 * 2 * number * 512**2  # cross-correlation
        result[f"batch {batch_size}"] = {
            "milliseconds": 1000 * taken["ours"],
            "ratio": taken["eager"] / taken["ours"],
            "ratio_without_dropout": taken["no_dropout"] / taken["ours"],
            "share_of_gemm_rate": flops / taken["ours"] / gemm_rate(config["gemm_size"]),
            "loader_share": loader_share(dataset, steps["ours"], 10 * config["rounds"]),
        }
    return result


def loader_share(dataset, step, number):
    """Share of a loop of so many steps that goes into fetching batches, the first included."""
    loading, start = 0.0, time.perf_counter()
    dataset.set_steps(0, number)
    batches = iterate_batches(dataset)
    for _ in range(number):
        batch = []
        loading += seconds(lambda batch=batch: batch.extend(next(batches)))
        step(*batch)
    return loading / (time.perf_counter() - start)


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
    sides = {"all dates": {"dates": 0}, "24 dates": {"dates": 24}, "16 dates": {"dates": 16}}
    if config["before_dir"]:
        sides["before, all dates"] = {"root": config["before_dir"]}
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


def measure_profile(config, work):
    """Shares of the CPU time that operations have in a training step and in encoding series."""
    backbone = build_backbone("transformer", num_bands=BANDS, sample_size=SAMPLE_SIZE, **MODEL)
    projector = Projector(latent_dim=MODEL["latent_dim"], width=512, projection_dim=512)
    doys = torch.randint(1, 366, (256, 2, SAMPLE_SIZE))
    batch = torch.randn(256, 2, SAMPLE_SIZE, BANDS), doys
    runtime = Runtime(torch.device("cpu"), 0, 1)
    series = torch.randn(8192, 36, BANDS), torch.randint(1, 366, (8192, 36))
    cases = {
        "training step, batch 256": partial(make_step(BarlowTwins(backbone, projector)), *batch),
        "encoding series of 36": lambda: encode_series(backbone, *series, runtime),
    }
    result = {}
    for name, function in cases.items():
        function()
        with torch.profiler.profile() as profile:
            function()
        times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
        total, most = sum(times.values()), sorted(times, key=times.get, reverse=True)[:10]
        result[name] = {key.removeprefix("aten::"): times[key] / total for key in most}
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


def measure_processes(config, work):
    """Training samples a second and seconds to map two tiles, by processes and threads."""
    for number in range(2):
        write_tile(work, "processes", config["size"] // 2, config["num_dates"], f"MGRS-{number}")
    checkpoint = make_checkpoint(work, "processes")
    result = {}
    for processes, threads in ((1, 1), (1, 2), (2, 1)):
        name = f"{processes} x {threads} thread{'s' * (threads > 1)}"
        launcher = ["-m", "torch.distributed.run", "--standalone"]
        launcher = [*launcher, f"--nproc-per-node={processes}"] if processes > 1 else []
        folder = Path(work) / "checkpoints" / name.replace(" ", "")
        keys = {**MODEL, "base_path": work, "dataset_name": "processes", "output_dir": folder}
        keys |= {"max_steps": 40, "mix_up": 0.0, "val_pixels": 64, "wandb_mode": "disabled"}
        keys |= {"epochs": 100, "device": "cpu"}
        run_child(["train.py", *(f"{k}={v}" for k, v in keys.items())], threads, work, launcher)
        lines = (folder / "metrics.jsonl").read_text().splitlines()[2:]  # without the first steps
        rate = np.median([json.loads(line)["samples_per_second"] for line in lines])
        keys = {"checkpoint_path": checkpoint, "tile_path": f"{work}/data/processes/processed"}
        keys |= {"output_dir": f"{folder}-maps", "wandb_mode": "disabled", "device": "cpu"}
        arguments = ["infer.py", *(f"{k}={v}" for k, v in keys.items())]
        taken = run_child(arguments, threads, work, launcher)
        result[name] = {"samples_per_second": float(rate), "infer_seconds": taken}
    return result


def seconds_to_first_step(work, name):
    """Seconds from `python train.py` on the simulated tiles to the log of its first step."""
    folder, start = Path(work) / "checkpoints" / name, time.perf_counter()
    command = [sys.executable, "train.py", f"base_path={work}", f"output_dir={folder}"]
    command += ["log_interval=1", "wandb_mode=offline", "device=cpu"]
    child = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = folder / "metrics.jsonl"
    while not (metrics.exists() and '"step": 1,' in metrics.read_text()):
        if child.poll() is not None:
            raise RuntimeError(f"{' '.join(command)} ended before its first step")
        time.sleep(0.02)
    taken = time.perf_counter() - start
    child.terminate()
    child.wait()
    return taken


def measure_startup(config, work):
    """Seconds to the first step on new tiles and again, and to count clear observations."""
    run_child(["make_demo_data.py", f"base_path={work}"], 2, work)
    first_step, again = (seconds_to_first_step(work, name) for name in ("first", "again"))

    source = write_tile(work, "count", config["size"], config["num_dates"])
    for number in range(1, config["num_tiles"]):
        folder = source.with_name(f"MGRS-{number}")
        folder.mkdir()
        for file in source.iterdir():
            os.link(file, folder / file.name)
    tiles = [Tile(folder) for folder in sorted(source.parent.iterdir())]
    counting = [seconds(lambda: [tile.clear_counts() for tile in tiles]) for _ in range(2)]
    return {
        "seconds_to_first_step": first_step,
        "seconds_to_first_step_again": again,
        "tiles_counted": len(tiles),
        "seconds_to_count": counting[0],
        "seconds_to_count_again": counting[1],
    }


def gpu_training_rate(work, workers, settings, runtime, number=200):
    """Samples a second of training from disk with so many loader workers, compiled and in bf16."""
    dataset = SentinelTimeSeriesDataset(work, "gpu", batch_size=settings["batch_size"])
    model = train.build_model(settings, dataset.num_bands).to(runtime.device)
    runtime.compile(model)
    step, warm_up = make_step(model, settings, runtime), 20
    dataset.set_steps(0, warm_up + number)
    for index, batch in enumerate(iterate_batches(dataset, workers, runtime)):
        step(*batch)
        if index + 1 == warm_up:
            synchronise()
            start = time.perf_counter()
    synchronise()
    return number * settings["batch_size"] / (time.perf_counter() - start)


def measure_gpu(config, work):
    """The default model fed from disk, and a whole tile from disk to representation map."""
    runtime = start_runtime("cuda", "bfloat16")
    folder = write_tile(work, "gpu", config["gpu_size"], config["num_dates"])
    settings, result = {**train.run_config, "batch_size": 4096}, {}
    sizes = np.linspace(settings["min_sample_size"], SAMPLE_SIZE, 4).round()  # of the views read
    views = 3 if settings["mix_up"] else 2
    flops = 3 * views * np.mean([encoder_flops(size, **MAPPED) for size in sizes])  # and back
    flops += 6 * views * (settings["latent_dim"] * 512 + 2 * 512**2)
    peak = gemm_rate(8192, "cuda", torch.bfloat16)
    for workers in (1, 2, runtime.workers(-1)):
        rate = gpu_training_rate(work, workers, settings, runtime)
        result[f"training, {workers} loader workers"] = {
            "samples_per_second": rate,
            "share_of_bf16_gemm_rate": rate * flops / peak,
        }
    checkpoint = make_checkpoint(work, "gpu", **MAPPED)
    for dates in (0, 24):
        taken, _, memory = map_tile(checkpoint, folder, work, device="cuda", dates=dates)
        name = f"a tile, {dates or 'all'} dates"
        result[name] = {"seconds": taken, "peak_memory_gb": memory}
    return result


SECTIONS = {
    "input": measure_input,
    "training": measure_training,
    "inference": measure_inference,
    "encoder": measure_encoder,
    "mapping": measure_mapping,
    "profile": measure_profile,
    "growth": measure_growth,
    "processes": measure_processes,
    "startup": measure_startup,
    "gpu": measure_gpu,
}


def print_table(result, indent=0):
    for name, value in result.items():
        if isinstance(value, dict):
            print(f"{'  ' * indent}{name}")
            print_table(value, indent + 1)
        else:
            text = f"{value:.4g}" if isinstance(value, float) else value
            print(f"{'  ' * indent}{name:{44 - 2 * indent}} {text}")


def main(config):
    """Run the sections. Returns the figures, as bench.json has them."""
    sizes = dict.fromkeys(("size", "largest", "gpu_size"), (32, 10_980))
    config = check(config, **sizes, num_dates=(2, 366), rounds=(1, 1000), gemm_size=(1, 20_000))
    names = config["sections"].split(",")
    if names == ["all"]:
        names = [n for n in SECTIONS if n != "gpu" or config["device"] == "cuda"]
    for name in names:
        if name not in SECTIONS:
            raise InputError(f"sections={name}: wanted one of {', '.join(SECTIONS)}")
    runtime = start_runtime("cpu" if config["device"] == "auto" else config["device"])
    output_dir = make_output_dir(config["output_dir"])
    log = start_log(config, "bench", output_dir, runtime)
    result = {
        "date": str(date.today()),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    for name in names:
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            result[name] = SECTIONS[name](config, work)
        print_table({name: result[name]})
    write_json(output_dir / "bench.json", result)
    log.finish()
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
