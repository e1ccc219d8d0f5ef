"""One batch over several processes, as far as one process shows it; test_processes.py has more."""

from running.distributed import BatchGenerator, BatchNorm, gather, share

import pytest
import torch


@pytest.mark.parametrize("method", ["uniform", "normal"])
def test_a_pixel_gets_the_same_numbers_however_the_batch_is_divided(method):
    """What a process draws depends on the rows that it holds, not on the number of processes."""

    def draw(rows):
        generator = BatchGenerator(rows, 12, 5, torch.device("cpu"))
        return [getattr(generator, method)(*shape) for shape in [(), (2, 1, 3)]]

    whole = draw(slice(0, 12))
    assert [numbers.shape for numbers in whole] == [(12,), (12, 2, 1, 3)]
    for edge in (1, 6, 12):
        parts = zip(draw(slice(0, edge)), draw(slice(edge, 12)), strict=True)
        assert all(torch.cat(part).equal(one) for part, one in zip(parts, whole, strict=True))
    assert len(whole[1].unique()) == whole[1].numel(), "rows or calls share numbers"


def test_numbers_are_uniform_or_normal():
    generator = BatchGenerator(slice(0, 5000), 5000, 0, torch.device("cpu"))
    uniform, normal = generator.uniform(3), generator.normal(3)
    assert 0 <= uniform.min() < 0.01 < 0.99 < uniform.max() < 1
    assert float(normal.mean()) == pytest.approx(0, abs=0.03)
    assert float(normal.std()) == pytest.approx(1, abs=0.03)


def test_one_process_holds_the_whole_batch():
    z = torch.rand(7, 3)
    assert share(7) == (slice(0, 7), 7)
    assert gather(z) is z
    x, reference = torch.rand(9, 3), torch.nn.BatchNorm1d(3)
    torch.testing.assert_close(BatchNorm(3)(x), reference(x))
