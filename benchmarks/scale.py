"""Memory by size and number of tiles, and a rehearsal on many tiles, for scale.md.

    python benchmarks/scale.py                    # about 20 minutes on two CPU cores
    python benchmarks/scale.py sections=memory

Memory is what the kernel counts while train.py and infer.py run: own memory (RssAnon and RssShmem),
which a machine must have, apart from pages of mapped files (RssFile), which it can take back. The
rehearsal's tiles are hard links to one, so that they cost no disk; a tile each would read colder.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from running.config import check  # noqa: E402
from running.device import usable_cores  # noqa: E402
from running.errors import InputError  # noqa: E402
from running.script import run_script  # noqa: E402

from measures import write_tile  # noqa: E402

run_config = {
    "sections": "all",  # memory, trial
    "largest": 1024,  # pixels along the largest tile of the memory table
    "num_dates": 36,
    "num_tiles": 300,  # of the rehearsal
    "size": 64,  # pixels along each of them
    "processes": 2,  # that torchrun starts
    "steps": 400,  # of the rehearsal's training
}
SMALL = {"width": 16, "depth": 1, "latent_dim": 16, "projector_dim": 32}  # memory is the data's


def link_tiles(first, number):
    """Hard links of a tile, MGRS-1 to MGRS-<number - 1>."""
    for index in range(1, number):
        folder = first.with_name(f"MGRS-{index}")
        folder.mkdir()
        for file in first.iterdir():
            os.link(file, folder / file.name)


def watch(arguments, processes=1):
    """Run a script. Returns its seconds and the most GB that its processes had at one time.

    Own memory and mapped files of all processes that it started, looked at 50 times a second.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), *arguments]
    threads = str(max(1, usable_cores() // processes))
    start, most = time.perf_counter(), {"own": 0, "files": 0}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        while child.poll() is None:
            for name, size in memory_of_family(child.pid).items():
                most[name] = max(most[name], size)
            time.sleep(0.02)
        output.seek(0)
        if child.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{output.read().decode()}")
    gigabytes = {f"{name}_gb": round(size / 2**20, 2) for name, size in most.items()}
    return {"seconds": round(time.perf_counter() - start, 1), **gigabytes}


def memory_of_family(ancestor):
    """kB of own memory and of mapped files of a process and all that it started."""
    family, sizes = {ancestor}, {"own": 0, "files": 0}
    paths = sorted(Path("/proc").glob("[0-9]*/status"), key=lambda path: int(path.parent.name))
    for path in paths:  # parents before their children
        try:
            lines = dict(re.findall(r"^(PPid|Rss\w+):\s*(\d+)", path.read_text(), re.M))
        except OSError:  # it has ended meanwhile
            continue
        process = int(path.parent.name)
        if process in family or int(lines["PPid"]) in family:
            family.add(process)
            sizes["own"] += int(lines.get("RssAnon", 0)) + int(lines.get("RssShmem", 0))
            sizes["files"] += int(lines.get("RssFile", 0))
    return sizes


def training(work, name, **keys):
    """Arguments of a training on CPU, and the folder of its checkpoints."""
    folder = Path(work) / "checkpoints" / f"{name}-{time.time_ns()}"
    keys = {"base_path": work, "dataset_name": name, "output_dir": folder, **keys}
    keys |= {"wandb_mode": "disabled", "device": "cpu", "val_pixels": 1024}
    return ["train.py", *(f"{key}={value}" for key, value in keys.items())], folder


def mapping(work, name, checkpoint, **keys):
    """Arguments that map all tiles of a data set."""
    keys = {"tile_path": f"{work}/data/{name}/processed", "checkpoint_path": checkpoint, **keys}
    keys |= {"output_dir": f"{work}/maps/{time.time_ns()}", "wandb_mode": "disabled"}
    return ["infer.py", *(f"{key}={value}" for key, value in keys.items()), "device=cpu"]


def measure_memory(config, work):
    """Peak memory of training and mapping for four sizes and three numbers of tiles."""
    sizes = [config["largest"] // 2**power for power in (3, 2, 1, 0)]
    result, checkpoint = {}, None
    for size in sizes:
        for number in (1, 2, 4):
            name = f"{size}-{number}"
            tile = write_tile(work, name, size, config["num_dates"])
            link_tiles(tile, number)
            arguments, folder = training(work, name, max_steps=100, epochs=100, **SMALL)
            trained = watch(arguments)
            checkpoint = checkpoint or folder / "last.pt"
            mapped = watch(mapping(work, name, checkpoint, min_valid=1))
            result[f"{size} x {size}, {number} tiles"] = {"train": trained, "infer": mapped}
            print(f"{size} x {size}, {number} tiles: train {trained}, infer {mapped}", flush=True)
            for file in tile.parent.glob("*/*.npy"):
                file.unlink()
    name = f"{sizes[0]}-epochs"
    write_tile(work, name, sizes[0], config["num_dates"])
    for epochs in (2, 8, 32):
        trained = watch(training(work, name, epochs=epochs, **SMALL)[0])
        result[f"{sizes[0]} x {sizes[0]}, {epochs} epochs"] = {"train": trained}
        print(f"{sizes[0]} x {sizes[0]}, {epochs} epochs: train {trained}", flush=True)
    return result


def measure_trial(config, work):
    """Train and map many tiles with torchrun, with the default encoder."""
    tile = write_tile(work, "trial", config["size"], config["num_dates"])
    link_tiles(tile, config["num_tiles"])
    arguments, folder = training(work, "trial", max_steps=config["steps"], log_interval=10)
    trained = watch(arguments, config["processes"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    trained["samples_per_second"] = round(float(np.median(rates)))
    mapped = watch(mapping(work, "trial", folder / "last.pt", min_valid=1), config["processes"])
    pixels = config["num_tiles"] * config["size"] ** 2
    mapped["pixels_per_second"] = round(pixels / mapped["seconds"])
    maps = len(list(Path(work).glob("maps/*/*/infer.json")))
    return {"tiles": config["num_tiles"], "maps": maps, "train": trained, "infer": mapped}


SECTIONS = {"memory": measure_memory, "trial": measure_trial}


def main(config):
    """Run the sections and print what they found as JSON."""
    sizes = {"largest": (256, 10_980), "size": (32, 10_980), "num_dates": (10, 366)}
    config = check(config, **sizes, processes=(1, 64), steps=(1, 10**9))
    names = list(SECTIONS) if config["sections"] == "all" else config["sections"].split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise InputError(f"sections={unknown[0]}: wanted one of {', '.join(SECTIONS)}")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="scale-") as work:
            print(json.dumps({name: SECTIONS[name](config, work)}, indent=1), flush=True)


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
