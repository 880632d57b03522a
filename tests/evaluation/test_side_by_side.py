import os

import pytest
import torch

from muvit.errors import InputError
from muvit.evaluation.side_by_side import _claim, _num_cores, _places, _threads, choose_devices
from muvit.training.run_config import RunConfig


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_models_are_trained_on_every_gpu_unless_told_otherwise(two_gpus):
    gpus = [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert choose_devices(RunConfig()) == gpus
    assert choose_devices(RunConfig(accelerator="cuda")) == gpus
    assert choose_devices(RunConfig(accelerator="cpu")) == [torch.device("cpu")]
    assert choose_devices(RunConfig(), "cuda:1") == gpus[1:]
    assert choose_devices(RunConfig(), "cuda:1,cuda:0") == gpus[::-1]
    assert choose_devices(RunConfig(), "cpu") == [torch.device("cpu")]


@pytest.mark.parametrize(
    ("run", "names", "message"),
    [
        (RunConfig(devices=2), None, r"run\.devices and run\.num_nodes: expected 1, .* got 2 and 1\. .*--devices"),
        (RunConfig(num_nodes=2), "cpu", r"got 1 and 2"),
        (RunConfig(), "cpu,cuda:7", r"device: expected a device of this machine, got 'cuda:7'"),
        (RunConfig(), "meta", r"devices: expected devices of kind cpu, cuda or mps, got meta"),
    ],
)
def test_refuses_what_is_not_one_device_for_each_model(run, names, message):
    with pytest.raises(InputError, match=message):
        choose_devices(run, names)


def test_each_device_has_one_process_and_a_cpu_alone_one_for_each_core():
    cpu, gpus = torch.device("cpu"), [torch.device("cuda", 0), torch.device("cuda", 1)]
    assert _places(gpus, 5) == gpus
    assert _places(gpus, 1) == gpus[:1]
    assert _places([cpu], 1) == [cpu]
    assert _places([cpu], 1000) == [cpu] * _num_cores()
    assert _places([cpu, cpu], 1000) == [cpu, cpu]


def test_a_last_round_of_fewer_models_shares_all_cores(monkeypatch):
    monkeypatch.setattr("muvit.evaluation.side_by_side._num_cores", lambda: 2)
    assert _threads(3, 2) == [1, 1, 2]
    monkeypatch.setattr("muvit.evaluation.side_by_side._num_cores", lambda: 8)
    assert _threads(9, 8) == [1] * 8 + [8]
    assert _threads(10, 8) == [1] * 8 + [4, 4]
    assert _threads(16, 8) == [1] * 16


@pytest.mark.parametrize(("visible", "shown"), [(None, "1"), ("3,5", "5"), ("GPU-aa, GPU-bb", "GPU-bb")])
def test_a_process_sees_its_own_gpu_only(monkeypatch, visible, shown):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert _claim(torch.device("cuda", 1)) == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == shown
    assert _claim(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that it is restored
