"""Options of a run that change what a step costs, and not what it computes."""

import copy
from dataclasses import replace

import pytest
import torch
from lightning import Callback
from torch.utils.data import DataLoader, Dataset

from muvit.errors import InputError
from muvit.models.baselines import BaselineConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.trained import build_model
from muvit.training.optim import PretrainOptimConfig
from muvit.training.recipes import PretrainDataConfig, PretrainRecipe
from muvit.training.run_config import RunConfig
from muvit.training.runs import build_trainer, prepare_model, shares_batch_statistics
from muvit.training.tasks import PretrainTask

ENCODER = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2)
CONFIG = MAEConfig(encoder=ENCODER, dim_decoder=16, loss_average="token")
RUN = RunConfig(epochs=1, accelerator="cpu", progress=False)


def mae(**changes):
    torch.manual_seed(0)
    return MuViTMAE(replace(CONFIG, **changes))


class Scenes(Dataset):
    """As many scenes as asked for."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        lower = torch.full((2, 1, 2), float(index))
        img = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(index))
        return {"img": img, "bbox": torch.cat([lower, lower + torch.tensor([[[16.0]], [[64.0]]])], dim=1)}


class Watch(Callback):
    """Gradients after each batch, orders of the masks, and the averaged weights that are due."""

    def on_train_start(self, trainer, task):
        self.gradients, self.average = [], [p.detach().clone() for p in task.model.parameters()]
        self.masks, draw = [], task._mask
        task._mask = lambda *arguments: self.masks.append(draw(*arguments)) or self.masks[-1]

    def on_after_backward(self, trainer, task):
        self.gradients.append({name: p.grad.clone() for name, p in task.model.named_parameters()})

    def on_before_zero_grad(self, trainer, task, optimizer):
        self.before = copy.deepcopy(task.model)


def fit(run, count, **optim):
    watch, task = Watch(), PretrainTask(mae(), PretrainOptimConfig(lr=1e-2, gradient_clip=None, **optim), batch_size=2)
    trainer = build_trainer(run, None, [watch])
    trainer.fit(task, DataLoader(Scenes(count), batch_size=2))
    return watch, task, trainer


def test_accumulated_gradients_are_the_mean_of_those_of_the_batches():
    watch, _, trainer = fit(replace(RUN, accumulate=2), 4)
    assert trainer.global_step == 1
    assert not torch.equal(watch.masks[0].order, watch.masks[1].order)  # each batch has its own
    scenes, model, losses = list(map(Scenes(4).__getitem__, range(4))), mae(), []
    for i, mask in enumerate(watch.masks):
        batch = {key: torch.stack([scene[key] for scene in scenes[2 * i : 2 * i + 2]]) for key in ("img", "bbox")}
        losses.append(model(batch["img"], batch["bbox"], mask=mask)["loss"])
    torch.stack(losses).mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(watch.gradients[-1][name], parameter.grad, msg=name)


def test_weights_are_averaged_once_a_step():
    watch, task, trainer = fit(replace(RUN, accumulate=3), 8, ema_decay=0.9)  # three batches, and the last one alone
    assert trainer.global_step == 2
    expected = [
        0.9 * old + 0.1 * new.detach() for old, new in zip(watch.average, watch.before.parameters(), strict=True)
    ]
    expected = [0.9 * old + 0.1 * new.detach() for old, new in zip(expected, task.model.parameters(), strict=True)]
    for ours, due in zip(task.average.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, due)


def test_the_learning_rate_is_that_of_all_samples_of_a_step():
    _, _, one = fit(RUN, 4, warmup_epochs=0)
    _, _, two = fit(replace(RUN, accumulate=2), 4, warmup_epochs=0)
    assert (one.global_step, two.global_step) == (2, 1)
    rates = [PretrainOptimConfig(lr=None).peak_lr(2 * n) for n in (1, 2)]
    for n, rate in enumerate(rates, start=1):
        task = PretrainTask(mae(), PretrainOptimConfig(lr=None, warmup_epochs=0), batch_size=2)
        trainer = build_trainer(replace(RUN, accumulate=n), None, [])
        trainer.fit(task, DataLoader(Scenes(4), batch_size=2))
        assert trainer.optimizers[0].param_groups[0]["initial_lr"] == rate


def test_an_epoch_has_a_whole_step():
    data = PretrainDataConfig(train="images", samples_per_epoch=16, batch_size=4)
    PretrainRecipe(data=data, model=CONFIG, run=RunConfig(accumulate=4))
    with pytest.raises(InputError, match="samples_per_epoch: expected at least 20: 5 batches for each of 1 devices"):
        PretrainRecipe(data=data, model=CONFIG, run=RunConfig(accumulate=5))


def step(model):
    scenes = [Scenes(2)[i] for i in range(2)]
    batch = {key: torch.stack([scene[key] for scene in scenes]) for key in ("img", "bbox")}
    mask = model.draw_mask(2, (16, 16), torch.Generator().manual_seed(0))
    loss = model(batch["img"], batch["bbox"], mask=mask)["loss"]
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


OF_THE_COMPILER = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@OF_THE_COMPILER
@pytest.mark.parametrize("recomputes", [pytest.param(False, marks=pytest.mark.long), True])
def test_compiled_blocks_take_the_same_step(monkeypatch, recomputes):
    """With everything of ``torch.compile`` but the generated code."""
    compiled, original = [], torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self: compiled.append(self) or original(self, backend="aot_eager")
    )
    model = mae(num_layers_decoder=1)
    names = list(model.state_dict())
    prepare_model(model, replace(RUN, compile=True, checkpoint_activations=recomputes))
    assert len(compiled) == 2 + 2
    assert list(model.state_dict()) == names
    (loss, gradients), (expected, theirs) = step(model), step(mae(num_layers_decoder=1))
    torch.testing.assert_close(loss, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@OF_THE_COMPILER
@pytest.mark.long
def test_generated_code_takes_the_same_step():
    model = mae()
    prepare_model(model, replace(RUN, compile=True))
    (loss, gradients), (expected, theirs) = step(model), step(mae())
    torch.testing.assert_close(loss, expected)
    for name, gradient in theirs.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("option", ["compile", "checkpoint_activations"])
def test_models_without_blocks_refuse(option):
    model = build_model(BaselineConfig(kind="residual_unet", width=2, in_channels=1, num_classes=2, levels=(1,)))
    with pytest.raises(InputError, match=f"run.{option}: expected false"):
        prepare_model(model, RunConfig(**{option: True}))


def test_batch_statistics_are_shared_by_several_cuda_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert shares_batch_statistics(RunConfig(devices=2))
    assert shares_batch_statistics(RunConfig(num_nodes=2, accelerator="cuda"))
    assert not shares_batch_statistics(RunConfig())
    assert not shares_batch_statistics(RunConfig(devices=2, accelerator="cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not shares_batch_statistics(RunConfig(devices=2))
