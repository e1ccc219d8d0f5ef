"""Memory by size and number of tiles, and a rehearsal on many tiles, for scale.md.

    python benchmarks/scale.py                    # about 20 minutes on two CPU cores
    python benchmarks/scale.py sections=memory
    python benchmarks/scale.py sections=large     # 20 full tiles, 41 GB on the disk; not in "all"

Memory is what the kernel counts while train.py and infer.py run: own memory (RssAnon and RssShmem),
which a machine must have, apart from pages of mapped files (RssFile), which it can take back. The
rehearsal's tiles are hard links to one, so that they cost no disk; a tile each would read colder.
"""

import json
import os
import re
import resource
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
    "sections": "all",  # memory, trial; large only by its name
    "largest": 1024,  # pixels along the largest tile of the memory table
    "num_dates": 36,
    "num_tiles": 300,  # of the rehearsal
    "size": 64,  # pixels along each of them
    "processes": 2,  # that torchrun starts
    "steps": 400,  # of the rehearsal's training
    "large_tiles": 20,  # of the section large, 73 dates x 1098 x 1098 pixels each
    "work_dir": "",  # folder for the tiles; empty: the system's for temporary files
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


def forget(folder):
    """Let the kernel drop all pages of the files in a folder, so that they are read anew."""
    for file in folder.rglob("*.npy"):
        with open(file, "rb") as opened:
            os.fdatasync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch_steps(arguments, folder, first, number=100):
    """A training, stopped after `number` steps from step `first` on.

    Returns seconds to the log of step `first`, samples a second, own memory, GB from the disk.
    """
    start, found, most, read = time.perf_counter(), None, 0, blocks_read()
    command = [sys.executable, *arguments, "log_interval=1"]
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while child.poll() is None:
        lines = read_lines(folder)
        if not found and lines and lines[-1]["step"] >= first:
            found = time.perf_counter() - start
        if lines and lines[-1]["step"] >= first + number:
            child.terminate()  # it saves last.pt and stops
        most = max(most, memory_of_family(child.pid)["own"])
        time.sleep(0.05)
    rates = [line["samples_per_second"] for line in read_lines(folder) if line["step"] > first]
    return {
        "first_step_s": round(found, 1),
        "samples_per_second": round(float(np.median(rates))),
        "own_gb": round(most / 2**20, 2),
        "read_gb": round(blocks_read() - read, 2),
    }


def read_lines(folder):
    """The whole lines of a metrics.jsonl, those of steps."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [line for line in map(json.loads, lines) if "samples_per_second" in line]


def blocks_read():
    """GB that the children of this process have read from disks."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_inblock * 512 / 2**30


def measure_large(config, work):
    """Growth with the number of full tiles, until they are more than the memory holds."""
    result, written, last = {}, 0, config["large_tiles"]
    for number in sorted({1, last // 4, last // 2, last} - {0}):
        start = time.perf_counter()
        for index in range(written, number):
            write_tile(work, "large", 1098, 73, f"MGRS-{index}")
        write = (time.perf_counter() - start) / max(1, number - written)
        written, row = number, {"write_a_tile_s": round(write, 1)}
        tiles = Path(work) / "data" / "large"
        for name in ("new", "counted"):  # clear observations are counted once and kept
            forget(tiles)
            arguments, folder = training(work, "large")
            row[name] = watch_steps(arguments, folder, 1)
        forget(tiles)
        row["resumed"] = watch_steps(arguments, folder, read_lines(folder)[-1]["step"] + 1)
        result[f"{number} tiles"] = row
        print(f"{number} tiles: {json.dumps(row)}", flush=True)
    return result


SECTIONS = {"memory": measure_memory, "trial": measure_trial, "large": measure_large}


def main(config):
    """Run the sections and print what they found as JSON."""
    sizes = {"largest": (256, 10_980), "size": (32, 10_980), "num_dates": (10, 366)}
    sizes["large_tiles"] = (1, 10_000)
    config = check(config, **sizes, processes=(1, 64), steps=(1, 10**9))
    names = "memory,trial" if config["sections"] == "all" else config["sections"]
    names = names.split(",")
    if unknown := [name for name in names if name not in SECTIONS]:
        raise InputError(f"sections={unknown[0]}: wanted one of {', '.join(SECTIONS)}")
    for name in names:
        with tempfile.TemporaryDirectory(prefix="scale-", dir=config["work_dir"] or None) as work:
            print(json.dumps({name: SECTIONS[name](config, work)}, indent=1), flush=True)


if __name__ == "__main__":
    run_script(main, run_config, __doc__)
