"""What a GPU needs of a training step, as far as it can be shown without one."""

from running import device
from running.device import Runtime, read_ahead, start_runtime

import pytest
import torch
from helpers import TINY, make_dataset, tile_of, tiny
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import infer
import train
import utils
from data import SentinelTimeSeriesDataset, iterate_batches
from evaluation.validation import Validation

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CONFIG = {**TINY, "augment": "jitter_bands", "min_sample_size": 3}


def open_views(tmp_path, **keywords):
    make_dataset(tmp_path, tiles=1, clear=0.9)
    return SentinelTimeSeriesDataset(tmp_path, "toy", sample_size=6, **keywords)


def make_parts(dataset, runtime):
    model = train.build_model(CONFIG, dataset.num_bands).to(runtime.device)
    return model, train.build_optimiser(model, CONFIG)


def make_steps(batches, model, optimiser, runtime, recent, first=0):
    """Steps of train.py, between two lines of its log."""
    for step, (x, doys) in enumerate(batches, first):
        parts, _ = train.train_step(model, optimiser, x, doys, CONFIG, runtime, step, rate=1e-3)
        recent.add(step, 1e-3, parts, x)


class Waits(TorchDispatchMode):
    """Collects what makes a host wait for its GPU: a number read, a size that depends on values."""

    NAMES = {"local_scalar_dense", "nonzero", "masked_select", "unique", "unique2", "equal"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0].lstrip("_")
        if name in self.NAMES:
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_no_step_reads_a_number_back(tmp_path, monkeypatch):
    """Guards against .item(), float(), .cpu() and their like between two lines of the log."""
    runtime, recent = start_runtime("cpu"), train.RecentSteps()
    dataset = open_views(tmp_path, batch_size=50)
    parts, batches = make_parts(dataset, runtime), list(iterate_batches(dataset))
    make_steps(batches[:1], *parts, runtime, recent)  # the optimiser's first step makes its state
    read = []
    for method in ("cpu", "tolist", "numpy"):
        original = getattr(torch.Tensor, method)
        monkeypatch.setattr(
            torch.Tensor, method, lambda *a, m=method, o=original: (read.append(m), o(*a))[1]
        )
    with Waits() as waits:
        make_steps(batches, *parts, runtime, recent)
        assert waits.found == read == []
        recent.summary(1)  # which reads them all, at once
        assert waits.found
        assert read == ["tolist"]


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_no_step_compiles_again(tmp_path, monkeypatch, every):
    """Batches differ by a pixel and views in length: guards against minutes for each new size.

    Steps without mix-up have a view less, and a graph of their own.
    """
    monkeypatch.setitem(CONFIG, "mix_up_every", every)
    monkeypatch.setattr(Runtime, "on_gpu", True)
    runtime, recent = start_runtime("cpu"), train.RecentSteps()
    dataset = open_views(tmp_path, batch_size=50)
    model, optimiser = make_parts(dataset, runtime)
    counter = CompileCounter()
    model.compile(backend=counter)
    compiled = []
    dataset.set_steps(0, 3 * dataset.steps_per_epoch)
    batches = list(iterate_batches(dataset))
    assert len({len(x) for x, _ in batches}) == 2
    for step, batch in enumerate(batches):
        make_steps([batch], model, optimiser, runtime, recent, step)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert compiled == [compiled[0]] + [every * compiled[0]] * (len(compiled) - 1)
    validate = Validation(dataset, None, {**CONFIG, "val_pixels": 4096, "batch_size": 50}, runtime)
    assert len({len(x) for x, _ in validate.batches}) == 2
    validate(model)
    again = compiled[-1] + compiled[0]
    assert counter.frame_count == again, "once more without gradients, not for each size"


def test_read_ahead_keeps_the_order_and_hands_errors_on():
    def items():
        yield from range(5)
        raise OSError("disk gone")

    seen = []
    with pytest.raises(OSError, match="disk gone"):
        seen.extend(read_ahead(items()))
    assert list(read_ahead([])) == []
    closed = read_ahead(iter(range(100)))
    assert [next(closed), next(closed)] == [0, 1]
    closed.close()


@pytest.mark.parametrize("precision", ["float32", "auto"])
def test_a_map_is_the_same_where_threads_read_compute_and_write(tmp_path, monkeypatch, precision):
    """Guards against blocks and batches that are mixed up or lost."""
    make_dataset(tmp_path, tiles=1)
    train.main(tiny(tmp_path, tmp_path / "run", max_steps=1))
    maps, before = [], torch.get_num_threads()
    monkeypatch.setattr(Runtime, "block_pixels", 32)
    monkeypatch.setattr(Runtime, "batch_dates", 64)
    try:
        for threads in (1, 3, 9):  # 9: beyond MAX_WORKERS
            torch.set_num_threads(threads)
            monkeypatch.setattr(device, "usable_cores", lambda threads=threads: threads)
            with monkeypatch.context() as patch:
                if threads == 1:
                    patch.setattr(infer, "read_ahead", iter)
                    patch.setattr(utils, "read_ahead", iter)
                keys = {"checkpoint_path": str(tmp_path / "run/last.pt"), "precision": precision}
                keys |= {"tile_path": str(tile_of(tmp_path)), "wandb_mode": "disabled"}
                keys |= {"output_dir": str(tmp_path / f"{threads}"), "device": "cpu"}
                (folder,) = infer.main({**infer.run_config, **keys})
            assert torch.get_num_threads() == threads
            maps.append((folder / "representation_map.npy").read_bytes())
    finally:
        torch.set_num_threads(before)
    assert maps[0] == maps[1] == maps[2]


def test_batches_in_threads_keep_their_order_and_hand_errors_on():
    runtime, before = start_runtime("cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert runtime.map_batches(lambda n: n * n, list(range(50))) == [n * n for n in range(50)]
        with pytest.raises(ZeroDivisionError):
            runtime.map_batches(lambda n: 1 // n, [2, 1, 0, 1])
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@NEEDS_GPU
def test_a_gpu_is_not_waited_for(tmp_path):
    runtime, recent = start_runtime("cuda", "bfloat16"), train.RecentSteps()
    dataset = open_views(tmp_path, batch_size=50)
    parts = make_parts(dataset, runtime)
    batches = list(iterate_batches(dataset, runtime=runtime))
    make_steps(batches[:1], *parts, runtime, recent)
    torch.cuda.set_sync_debug_mode("error")
    try:
        make_steps(batches, *parts, runtime, recent)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@NEEDS_GPU
def test_batches_on_a_gpu_are_those_of_the_cpu(tmp_path):
    dataset = open_views(tmp_path, batch_size=50)
    pairs = zip(
        iterate_batches(dataset), iterate_batches(dataset, 2, start_runtime("cuda")), strict=True
    )
    for ours, theirs in pairs:
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b.cpu(), rtol=1e-6, atol=1e-6)
