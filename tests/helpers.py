"""What the test files share: tiles, small configs, runs of scripts, and readers of what they leave.

No test file imports from another one; what two of them need is here.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

from running.checkpoints import load_checkpoint, save_checkpoint
from running.script import run_script

import numpy as np
import torch
from torch.distributed import TCPStore
from tqdm import tqdm

import infer
import train
import train_classification

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("TILES_DIR", ROOT.parent / "shared"))
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # of processes that tests start
GEOREFERENCE = {"crs": "EPSG:32631", "transform": [10, 0, 500000, 0, -10, 5400000]}


# ---- tiles ---------------------------------------------------------------------------------------


def make_tile(folder, shape=(20, 16, 16, 10), clear=0.7, seed=0, labels=True, **info):
    """Write a tile whose pixels have one of two seasonal curves; returns its folder.

    Reflectance encodes the place: band 0 of a clear observation is 1000 + date, and the last band
    holds the flat index of the pixel plus 1, so that a test knows where a value came from.
    """
    folder = Path(folder)
    folder.mkdir(parents=True)
    dates, height, width, num_bands = shape
    rng = np.random.default_rng(seed)
    doys = np.sort(rng.choice(np.arange(1, 366), dates, replace=False)).astype(np.int16)
    kind = (np.add.outer(np.arange(height) // 4, np.arange(width) // 4) % 2).astype(np.uint8)
    season = np.cos(2 * np.pi * (doys[:, None, None] - 200 * kind) / 365)[..., None]
    bands = 3000 + 1500 * season + rng.normal(0, 100, shape)
    bands[..., 0] = 1000 + np.arange(dates)[:, None, None]
    bands[..., -1] = 1 + np.arange(height * width).reshape(height, width)
    masks = (rng.random(shape[:3]) < clear).astype(np.uint8)
    bands[masks == 0] = rng.choice([0, 60000], (masks == 0).sum())[:, None]  # clouds, nodata
    bands = bands.astype(np.uint16)
    observed = bands[masks == 1].astype(np.float64)
    save(folder, "bands", bands)
    save(folder, "masks", masks)
    save(folder, "doys", doys)
    save(folder, "band_mean", observed.mean(0).astype(np.float32))
    save(folder, "band_std", observed.std(0).astype(np.float32))
    if labels:
        save(folder, "labels", np.where(kind == 1, 95, 40).astype(np.uint8))
    content = {"bands": [f"X{i}" for i in range(num_bands)], **info}
    (folder / "tile.json").write_text(json.dumps(content))
    return folder


def make_dataset(base_path, name="toy", tiles=2, **keywords):
    """Write `tiles` tiles MGRS-0, MGRS-1, ..; returns base_path."""
    for number in range(tiles):
        make_tile(tile_of(base_path, number, name), seed=number, **keywords)
    return Path(base_path)


def tile_of(base_path, number=0, name="toy"):
    """The folder of a tile of `make_dataset`."""
    return Path(base_path) / "data" / name / "processed" / f"MGRS-{number}"


def save(tile, name, array):
    """Write one array of a tile."""
    np.save(tile / f"{name}.npy", array)


def pixel_ids(x):
    """The pixel that each value came from, by the marker that make_tile leaves."""
    return x[..., -1].reshape(len(x), -1)[:, 0].long() - 1


# ---- running scripts -----------------------------------------------------------------------------


TINY = {
    **train.run_config,
    "dataset_name": "toy",
    "sample_size": 6,
    "min_sample_size": 4,
    "min_valid": 5,
    "block_size": 4,
    "latent_dim": 16,
    "width": 16,
    "depth": 1,
    "day_cycles": 4,
    "projector_dim": 32,
    "mix_up": 1.0,  # beside prediction, so that all that a step can do takes part
    "mix_up_every": 1,
    "learning_rate": 1e-3,
    "batch_size": 64,
    "epochs": 4,
    "log_interval": 1,
    "val_interval": 20,
    "checkpoint_interval": 4,
    "device": "cpu",
    "precision": "float32",  # so that numbers can be compared closely
    "wandb_mode": "disabled",
}


def tiny(base_path, output_dir, **keywords):
    """A config of train.py that runs in a second on tiles of `make_dataset`."""
    return {**TINY, "base_path": str(base_path), "output_dir": str(output_dir), **keywords}


def run(script, **keywords):
    """What main of a script returns, with some keys of its run_config; on the CPU, no wandb."""
    quiet = {"device": "cpu", "precision": "float32", "wandb_mode": "disabled"}
    config = script.run_config | {k: v for k, v in quiet.items() if k in script.run_config}
    unknown = set(keywords) - set(config)
    assert not unknown, unknown
    paths_as_text = {k: str(v) if isinstance(v, os.PathLike) else v for k, v in keywords.items()}
    return script.main(config | paths_as_text)


def fine_tune(workplace, output_dir, **keywords):
    """Fine-tune the pretrained encoder of the fixture `workplace` on its tiles: test scores."""
    keywords = {
        "checkpoint_path": workplace / "pretrained/best.pt",
        "base_path": workplace,
        "dataset_name": "toy",
        **keywords,
    }
    return run(train_classification, output_dir=output_dir, **keywords)


def map_tile(workplace, output_dir, checkpoint="classifier", **keywords):
    """Map a tile with a checkpoint of the fixture `workplace`: the folders of the maps."""
    keywords = {"tile_path": tile_of(workplace), **keywords}
    path = workplace / checkpoint / "best.pt"
    return run(infer, checkpoint_path=path, output_dir=output_dir, **keywords)


def as_arguments(config, script=train):
    """The command-line arguments that make a config of a script."""
    return [f"{key}={value}" for key, value in config.items() if value != script.run_config[key]]


def start(*arguments, script=train, start_new_session=False, **environment):
    """A script in a process of its own; start_new_session: in a process group of its own, too."""
    return subprocess.Popen(
        [sys.executable, script.__file__, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=start_new_session,
    )


class Fork:
    """A script in a forked process, where `start` would import everything again (4 s of CPU time).

    It has what the tests need of subprocess.Popen. What a test has patched is patched in it, too.
    """

    def __init__(self, *arguments, script=train, start_new_session=False, **environment):
        self.files = [os.memfd_create(name) for name in ("stdout", "stderr")]
        self.returncode = None
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # the fork has a copy of what is not yet written
        self.pid = os.fork()
        if self.pid == 0:
            _end_as_script(script, arguments, self.files, start_new_session, environment)

    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout=600):
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < deadline, "a forked script does not end"
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout=600):
        """Texts of stdout and stderr, at the end of the process."""
        self.wait(timeout)
        texts = []
        for number in self.files:
            os.lseek(number, 0, os.SEEK_SET)
            with open(number) as file:
                texts.append(file.read())
        return texts

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def _end_as_script(script, arguments, files, start_new_session, environment):
    """In a forked process: run a script with arguments of the command line, and end."""
    status, message = 1, ""
    try:
        signal.alarm(600)  # a test that hangs ends all the same; a busy machine is slow
        tqdm.set_lock(threading.RLock())  # the one of before the fork may be held for ever
        if start_new_session:
            os.setsid()
        os.environ.update({"OMP_NUM_THREADS": "1"} | environment)
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        sys.argv = [script.__file__, *arguments]
        run_script(script.main, script.run_config, script.__doc__)
        status = 0
    except SystemExit as end:
        kept = end  # gloo may wait for ever where its group is freed in a forked process
        status, message = (kept.code, "") if isinstance(kept.code, int) else (1, kept.code)
    except BaseException:
        message = traceback.format_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.write(str(message))  # after what a progress bar writes when it is freed
            sys.stderr.flush()
        finally:
            os._exit(status)  # whatever fails: two processes must not go on with the tests


def fork_ranks(config, processes=2, script=train):
    """A script in several forked processes with the variables that torchrun gives them: Forks."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}  # rank 0 need not open a port
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    forks = []
    for rank in map(str, range(processes)):
        numbers = {"RANK": rank, "LOCAL_RANK": rank, **sizes}
        forks.append(Fork(*as_arguments(config, script), script=script, **numbers, **place))
        forks[-1].store = store  # which is there as long as a process is
    return forks


def run_ranks(config, processes=2, script=train):
    """What `torchrun` gives, by `fork_ranks`: returncode, stdout and stderr of all processes."""
    forks = fork_ranks(config, processes, script)
    while None in (ended := [fork.poll() for fork in forks]):
        if any(ended):  # the others wait for the one that failed
            for fork in forks:
                fork.terminate()
        time.sleep(0.01)
    out, err = ("".join(texts) for texts in zip(*(f.communicate() for f in forks), strict=True))
    return SimpleNamespace(returncode=max(map(abs, ended)), stdout=out, stderr=err)


def in_child(function, wait=None):
    """Call a function in a forked process, which has everything imported; returns its exit status.

    wait: called beside it; when it returns, the process and all its children get SIGKILL. The
    status of a killed process is -9.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setpgid(0, 0)
            signal.alarm(600)  # a test that hangs ends all the same; a busy machine is slow
            tqdm.set_lock(threading.RLock())  # the one of before the fork may be held for ever
            function()
            status = 0
        finally:
            os._exit(status)
    if wait:
        wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_in_child(function, method, calls, seconds):
    """Call a function in a forked process and kill it; returns its exit status.

    method: (class, name) of a method that is called during the work. The kill comes some
    seconds after some calls of it (0: after the start). Two calls later the process stops and
    waits for the kill, so that how far it comes does not depend on the speed of the machine.
    """
    reader, writer = os.pipe()
    original, numbers = getattr(*method), itertools.count(1)

    def counted(*arguments, **keywords):
        number = next(numbers)
        if number == calls + 3:
            signal.pause()
        result = original(*arguments, **keywords)
        if number == calls:
            os.write(writer, b".")
        return result

    def watched():
        setattr(*method, counted)
        if calls == 0:
            os.write(writer, b".")
        function()

    def wait():
        os.close(writer)  # then a process that ends before its kill closes the pipe
        with open(reader, "rb") as pipe:
            pipe.read(1)
        time.sleep(seconds)

    return in_child(watched, wait)


def kill_again_and_again(function, method, most_calls, tempo, is_done, seed=0):
    """Kill a function at random moments, call it again, 20 times, and let it end then.

    Each kill has to find it not done. It comes after 1 to most_calls calls of a method, as in
    `kill_in_child`, and every fourth time during the start. tempo: seconds between two calls,
    roughly.
    """
    rng, kills = random.Random(seed), 20
    for number in range(kills):
        calls = rng.randint(1, most_calls) if number % 4 else 0
        # most kills come soon after the call, where checkpoints are written
        seconds = tempo * (2 * rng.random() ** 2 if calls else 10 * rng.random())
        assert kill_in_child(function, method, calls, seconds) == -9, "ended before it was killed"
        assert not is_done(), "killed when it was done"
    assert in_child(function) == 0
    assert is_done()
    print(f"\n{kills} kills")  # counted by benchmarks/promises.py


def torchrun_command(config, processes=2, script=train):
    """The real launcher; tests of what processes make of a batch use `run_ranks`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", script.__file__]
    return [*command, *as_arguments(config, script)]


def torchrun(config, processes=2, script=train, cwd=ROOT):
    """Run a script in several processes until it ends."""
    return subprocess.run(
        torchrun_command(config, processes, script),
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )


def wait_for_lines(output_dir, count, process):
    """Wait until a running script has logged this number of lines of metrics."""
    metrics = output_dir / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= count):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


# ---- what a run leaves ---------------------------------------------------------------------------


def lines(output_dir):
    """The lines of metrics.jsonl, a dict each."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def weights(output_dir, name="last.pt"):
    """All weights of a checkpoint of train.py."""
    content = load_checkpoint(output_dir / name)
    return {**content["backbone_state"], **content["projector_state"]}


def save_small_checkpoint(path, kind="pretrained", **content):
    """A checkpoint with all that is checked of one, and no network in it."""
    keys = ("sample_size", "min_valid", "block_size", "split_seed")
    config = {key: TINY[key] for key in keys} | content.pop("config", {})
    standard = {"config": config, "backbone": {"name": "mlp"}, "backbone_state": {}, "bands": []}
    standard |= {"mean": torch.zeros(3), "std": torch.ones(3)}
    save_checkpoint(path, kind, **standard | content)


def assert_same_weights(one, other, **tolerance):
    """Equal bit for bit, or within a tolerance (atol=, rtol=)."""
    assert one.keys() == other.keys()
    for key, value in one.items():
        if tolerance:
            torch.testing.assert_close(value, other[key], **tolerance)
        else:
            assert value.equal(other[key]), key


def read_wandb(output_dir):
    """History rows and logged files of the one offline run in a folder, by wandb's own reader.

    wandb's background process may write the end of the file after the run is finished, so wait.
    """
    (file,) = (output_dir / "wandb").glob("offline-run-*/*.wandb")
    deadline = time.monotonic() + 30
    while "exit" not in (records := read_records(file)) and time.monotonic() < deadline:
        time.sleep(0.05)
    history = [
        {item.key or item.nested_key[0]: item.value_json for item in record.item}
        for record in records.get("history", [])
    ]
    files = [item.path for record in records.get("files", []) for item in record.files]
    return history, [file.parent / "files" / name for name in files]


def read_records(file):
    """{kind: its records} of an offline run, as far as they are written."""
    from wandb.proto import wandb_internal_pb2
    from wandb.sdk.internal.datastore import DataStore

    records, store = {}, DataStore()
    with contextlib.suppress(AssertionError):  # what the reader raises for half a record
        store.open_for_scan(str(file))
        while (content := store.scan_data()) is not None:
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            kind = record.WhichOneof("record_type")
            records.setdefault(kind, []).append(getattr(record, kind))
    return records


def assert_pictures_logged(output_dir):
    """The offline wandb run of a folder holds pictures, and their files are there."""
    _, files = read_wandb(output_dir)
    pictures = [file for file in files if file.suffix == ".png"]
    assert pictures
    assert all(file.exists() for file in pictures)
