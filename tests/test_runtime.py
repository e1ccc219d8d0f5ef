"""Overrides of a config, and configs that cannot change."""

import os
import subprocess
import sys

from running.config import check, override
from running.device import start_runtime, usable_cores
from running.errors import InputError, Stopped
from running.script import run_script, start_script

import pytest
import torch
from helpers import ROOT


def test_override_keeps_the_type_of_the_default():
    default = {"a": 1, "b": 0.5, "c": "x", "d": False}
    config = override(default, ["a=3", "b=2", "c=y=z", "d=TRUE"])
    assert config == {"a": 3, "b": 2.0, "c": "y=z", "d": True}
    assert type(config["b"]) is float
    assert default == {"a": 1, "b": 0.5, "c": "x", "d": False}
    for wrong in ("a=1.5", "b=x", "d=1", "e=1", "a", "=1", "a=1e-1"):
        with pytest.raises(InputError, match="wanted"):
            override(default, [wrong])


def test_a_frozen_config_cannot_change():
    with pytest.raises(TypeError):
        check({"seed": 1})["seed"] = 2


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "kept"), [(None, "512"), ("64", "64")])
def test_kernels_that_onednn_keeps(asked, kept):
    """Guards against maps that take 0.6 GB more by and by; whoever asks for less gets it."""
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= dict.fromkeys(names, asked) if asked else {}
    code = (
        "import os; from running.device import start_runtime; start_runtime('cpu'); "
        f"print(*map(os.environ.get, {names}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == [kept, kept], done.stderr


def test_more_processes_than_gpus_end_in_one_line(monkeypatch):
    """Regression: CUDA's own error came as a traceback from each of them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="device=auto: found 1 GPUs, wanted one for each process"):
        start_runtime()


# ---- threads -------------------------------------------------------------------------------------

QUOTAS = {  # files of cgroups: cores that they allow
    "no container": ({}, 64),
    "no limit": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, 64),
    "version 2": ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
    "of a parent": (
        {
            "proc/self/cgroup": "0::/a/b\n",
            "sys/fs/cgroup/a/cpu.max": "300000 100000\n",
            "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
        },
        3,
    ),
    "of another group": (
        {"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/b/cpu.max": "100000 100000\n"},
        64,
    ),
    "version 1": (
        {
            "proc/self/cgroup": "3:memory:/m\n2:cpu,cpuacct:/x\n0::/\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000\n",  # of a container, which sees no /x
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
        },
        1,
    ),
    "version 1, no limit": (
        {
            "proc/self/cgroup": "2:cpu,cpuacct:/x\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "100000\n",
        },
        64,
    ),
}


@pytest.mark.parametrize("case", QUOTAS)
def test_cores_are_those_of_the_quota(case, tmp_path, monkeypatch):
    """Regression: in a container with two of 64 cores torch started 64 threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    files, cores = QUOTAS[case]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert usable_cores(tmp_path) == cores
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # four processes of torchrun share them
    assert usable_cores(tmp_path) == max(1, cores // 4)


def test_threads_follow_the_cores_that_a_process_is_bound_to():
    """In a process that is bound to one core, as by taskset or Slurm."""
    code = (
        "import os\n"
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from running.device import start_runtime, usable_cores\n"
        "import torch\n"
        "start_runtime('cpu')\n"
        "print(usable_cores(), torch.get_num_threads())"
    )
    environment = {key: value for key, value in os.environ.items() if "NUM_THREADS" not in key}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split() == ["1", "1"], done.stderr


def test_threads_are_what_the_user_says(monkeypatch):
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("running.device.usable_cores", lambda: 2)
    for asked, threads in [("", 2), ("OMP_NUM_THREADS", 3), ("MKL_NUM_THREADS", 3)]:
        torch.set_num_threads(3)
        with monkeypatch.context() as patch:
            if asked:
                patch.setenv(asked, "3")
            start_runtime("cpu")
        assert torch.get_num_threads() == threads
    torch.set_num_threads(1)
    start_runtime("cpu")
    assert torch.get_num_threads() == 1  # never more than there were


@pytest.mark.parametrize(
    ("cpu_name", "instructions", "is_fast"),
    [
        ("AMD EPYC", ["avx512_bf16"], True),
        ("AMD EPYC", [], False),
        ("Intel Xeon", ["avx512_bf16"], False),
        ("Intel Xeon", ["avx512_bf16", "amx_bf16"], True),
    ],
)
def test_bf16_where_it_is_faster(monkeypatch, cpu_name, instructions, is_fast):
    """Regression: Intel's avx512_bf16 without AMX trained 1.6 times as long as float32."""
    cpu = {"cpu_name": cpu_name, **dict.fromkeys(instructions, True)}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: cpu)
    assert start_runtime("cpu", "auto").in_bf16 == is_fast
    assert start_runtime("cpu", "bfloat16").in_bf16
    assert not start_runtime("cpu", "float32").in_bf16


def test_an_error_without_text_is_told_by_its_kind(monkeypatch):
    def fail(config):
        raise TimeoutError

    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # this process keeps its own
    with pytest.raises(SystemExit, match="error: TimeoutError"):
        run_script(fail, {}, "")


@pytest.mark.parametrize(
    ("ending", "status"),
    [
        ("sys.exit(130)", 130),
        ("sys.exit(143)", 143),
        ("os.kill(os.getpid(), 15)", 143),  # before the script could notice it
        ("sys.exit(1)", None),
        ("os.kill(os.getpid(), 9)", None),
    ],
)
def test_a_script_that_a_signal_stops_stops_the_one_that_started_it(
    ending, status, tmp_path, monkeypatch
):
    (tmp_path / "child.py").write_text(f"import os, sys\n{ending}")
    monkeypatch.setattr("running.script.ROOT", tmp_path)
    if not status:
        assert start_script("child.py", {}).returncode
        return
    with pytest.raises(Stopped, match="stopped in child.py") as stop:
        start_script("child.py", {})
    assert stop.value.status == status
