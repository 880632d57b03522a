import pytest
import torch

from muvit.errors import InputError
from muvit.models.encoder import EncoderConfig
from muvit.models.mae import MAEConfig
from muvit.training.recipes import PretrainDataConfig, PretrainRecipe
from muvit.training.run_config import RunConfig
from muvit.training.runs import check_devices, precision_for


def test_a_gpu_computes_in_bfloat16_and_a_cpu_in_full_precision(monkeypatch):
    for has_gpu, can, expected in ((1, 1, "bf16-mixed"), (1, 0, "32-true"), (0, 0, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=has_gpu: bool(answer))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, answer=can: bool(answer))
        assert precision_for("auto") == precision_for("gpu") == precision_for("cuda") == expected
        assert precision_for("cpu") == precision_for("mps") == "32-true"


@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "auto"])
def test_no_more_devices_are_used_than_there_are(monkeypatch, accelerator):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    check_devices(RunConfig(accelerator=accelerator, devices=2))
    with pytest.raises(InputError, match=f"at most the 2 of kind '{accelerator}' that this machine has, got 3"):
        check_devices(RunConfig(accelerator=accelerator, devices=3))


def test_without_a_gpu_asking_for_one_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for accelerator in ("gpu", "cuda", "mps"):
        with pytest.raises(InputError, match="at most the 0"):
            check_devices(RunConfig(accelerator=accelerator))
    for accelerator in ("auto", "cpu"):
        check_devices(RunConfig(accelerator=accelerator, devices=4))


def test_every_device_gets_a_batch_in_each_epoch():
    data = PretrainDataConfig(train="images", samples_per_epoch=16, batch_size=8)
    model = MAEConfig(encoder=EncoderConfig(in_channels=1, levels=(1, 4)))
    PretrainRecipe(data=data, model=model, run=RunConfig(devices=2))
    with pytest.raises(InputError, match="samples_per_epoch: expected at least 32: a batch for each of 4 devices"):
        PretrainRecipe(data=data, model=model, run=RunConfig(devices=2, num_nodes=2))
