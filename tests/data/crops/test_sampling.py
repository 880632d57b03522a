import pytest
from hypothesis import given
from hypothesis import strategies as st

from muvit.data.crops.balance import EpochSampler
from muvit.errors import InputError


@given(st.integers(1, 200), st.integers(1, 5), st.integers(0, 10), st.data())
def test_processes_share_an_epoch_without_overlap(num_samples, num_replicas, epoch, data):
    start = data.draw(st.integers(0, num_samples))
    samplers = [
        EpochSampler(num_samples, epoch=epoch, start=start, rank=rank, num_replicas=num_replicas)
        for rank in range(num_replicas)
    ]
    seen = [list(sampler) for sampler in samplers]
    assert len({len(numbers) for numbers in seen}) == 1
    assert {len(sampler) for sampler in samplers} == {num_samples // num_replicas}
    together = [number for turn in zip(*seen, strict=True) for number in turn]
    first = epoch * num_samples + start
    assert together == list(range(first, first + len(together)))
    assert num_samples - start - len(together) < num_replicas


def test_epochs_do_not_repeat_and_resuming_goes_on():
    sampler = EpochSampler(10)
    first = list(sampler)
    sampler.set_epoch(1)
    assert first + list(sampler) == list(range(20))
    resumed = EpochSampler(10, epoch=1, start=7)
    resumed.set_epoch(1)  # a trainer says so at the start of every epoch
    assert list(resumed) == [17, 18, 19]
    resumed.set_epoch(2)
    assert list(resumed) == list(range(20, 30))


@pytest.mark.parametrize(
    "arguments", [{"rank": 2, "num_replicas": 2}, {"rank": -1}, {"start": 11}, {"start": -1}, {"epoch": -1}]
)
def test_sampler_out_of_range_is_refused(arguments):
    with pytest.raises(InputError, match="expected"):
        EpochSampler(10, **arguments)
