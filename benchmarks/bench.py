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

from running.config import check  # noqa: E402
from running.device import Runtime, start_runtime  # noqa: E402
from running.errors import InputError  # noqa: E402
from running.files import make_output_dir, write_json  # noqa: E402
from running.log import start_log  # noqa: E402
from running.script import run_script  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from mapping import (  # noqa: E402
    make_checkpoint,
    map_tile,
    measure_encoder,
    measure_growth,
    measure_inference,
    measure_mapping,
)
from measures import (  # noqa: E402
    BANDS,
    MAPPED,
    MODEL,
    SAMPLE_SIZE,
    STEP,
    encoder_flops,
    gemm_rate,
    in_turn,
    memory_of,
    run_child,
    seconds,
    synchronise,
    write_tile,
)
from reference import PixelLoop, SequenceFirstEncoder  # noqa: E402

import train  # noqa: E402
from backbones import build_backbone  # noqa: E402
from barlow_twins import BarlowTwins, Projector  # noqa: E402
from data import SentinelTimeSeriesDataset, iterate_batches  # noqa: E402
from tiles import Tile  # noqa: E402
from transforms import standardise  # noqa: E402
from utils import encode_series  # noqa: E402

run_config = {
    # input, training, family, inference, encoder, mapping, profile, growth, processes, startup, gpu
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


# ---- tiles ---------------------------------------------------------------------------------------


# ---- measuring -----------------------------------------------------------------------------------


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


def measure_family(config, work):
    """Input beside that of TESSERA's public trainer: views drawn ahead, two for all of an epoch.

    There they lie on the disk as two arrays (N, 40, 11), whose rows a loader reads in any order.
    One core, page cache warm, views of 40 dates on both sides. Bytes are those of a pixel.
    """
    folder, dates = write_tile(work, "family", config["size"], config["num_dates"]), 40
    dataset = SentinelTimeSeriesDataset(work, "family", sample_size=dates, batch_size=256)
    mean, std = dataset.mean, dataset.std
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def draw_ahead():
        bands, doys = zip(*dataset, strict=True)
        for view in (0, 1):
            np.save(Path(work) / f"bands{view}.npy", torch.cat(bands)[:, view].numpy())
            np.save(Path(work) / f"doys{view}.npy", torch.cat(doys)[:, view].numpy())

    def read_drawn():
        names = ("bands0", "bands1", "doys0", "doys1")
        arrays = [np.load(Path(work) / f"{name}.npy", mmap_mode="r") for name in names]
        order = np.random.default_rng(0).permutation(len(arrays[0]))
        for start in range(0, len(order), 256):
            rows = np.sort(order[start : start + 256])
            bands = torch.from_numpy(np.stack([array[rows] for array in arrays[:2]], 1))
            yield standardise(bands, mean, std), [array[rows] for array in arrays[2:]]

    memory = memory_of(iterate_batches(dataset))  # before its arrays are there
    ahead = seconds(draw_ahead)
    memory_drawn = memory_of(read_drawn())
    taken = in_turn(
        config["rounds"],
        ours=lambda: [None for _ in iterate_batches(dataset)],
        drawn=lambda: [None for _ in read_drawn()],
    )
    torch.set_num_threads(threads)
    number = dataset.num_pixels
    tile = sum((folder / f"{name}.npy").stat().st_size for name in ("bands", "masks"))
    return {
        "samples_per_second": number / taken["ours"],
        "samples_per_second_drawn_ahead": number / taken["drawn"],
        "samples_per_second_of_drawing_and_writing": number / ahead,
        "memory_gb": memory,
        "memory_gb_drawn_ahead": memory_drawn,
        "bytes_of_the_tile": tile / config["size"] ** 2,
        "more_bytes_drawn_ahead": 2 * dates * (2 * BANDS + 2),
    }


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
    """Share of the time of N steps that goes into fetching batches, the first included."""
    loading, start = 0.0, time.perf_counter()
    dataset.set_steps(0, number)
    batches = iterate_batches(dataset)
    for _ in range(number):
        batch = []
        loading += seconds(lambda batch=batch: batch.extend(next(batches)))
        step(*batch)
    return loading / (time.perf_counter() - start)


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
    command += ["log_interval=1", "wandb_mode=offline", f"wandb_dir={work}", "device=cpu"]
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
    """Samples a second of training from disk with N loader workers, compiled and in bf16."""
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
    views = 2 + (settings["mix_up"] > 0) / settings["mix_up_every"]
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


SECTIONS = {
    "input": measure_input,
    "training": measure_training,
    "family": measure_family,
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
