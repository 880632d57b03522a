import pytest
import torch
from lightning import Callback
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muvit.errors import InputError
from muvit.models.segmentation_model import SegmentationModel
from muvit.training.optim import OptimConfig, build_optimizer
from muvit.training.run_config import RunConfig
from muvit.training.runs import build_trainer
from muvit.training.tasks import SegmentationTask

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")


class Slope(SegmentationModel):
    """Two parameters that are factors of the pixels; their gradients follow from the loss."""

    backbone = None

    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.zeros(2))

    def forward(self, img, bbox):
        return img[:, :1, 0] * self.slope[:, None, None]


class Samples(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("img", "bbox", "label"), super().__getitem__(index), strict=True))


class Gradients(Callback):
    """What each step is made with."""

    def __init__(self):
        self.seen, self.logged = [], []

    def on_train_batch_end(self, trainer, task, *_):
        self.seen.append(task.model.slope.grad.clone())
        self.logged.append(float(trainer.callback_metrics["grad_norm"]))


class Sloping:
    """A criterion of a known gradient, whose value is finite."""

    def __init__(self, gradient):
        self.gradient = torch.tensor(gradient)

    def __call__(self, logits, label):
        means = logits.float().mean((0, 2, 3))
        if means.requires_grad:
            means.register_hook(lambda gradient: gradient * self.gradient)
        return means.sum()


def train(gradient, precision="32-true", watch=None, **optim):
    """One step whose gradient is known."""
    watch = watch or Gradients()
    task = SegmentationTask(
        Slope(),
        Sloping(gradient),
        OptimConfig(lr=1e-2, **optim),
        ("a", "b"),
    )
    data = Samples(torch.ones(4, 1, 1, 4, 4), torch.zeros(4, 1, 2, 2), torch.zeros(4, 4, 4, dtype=torch.int64))
    run = RunConfig(epochs=1, accelerator="cpu", precision=precision, progress=False)
    trainer = build_trainer(run, None, [watch], log_every_n_steps=1)
    trainer.fit(task, DataLoader(data, batch_size=4))
    return watch, task, trainer


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "clip, expected", [(0.5, [0.3, 0.4]), (50.0, [3.0, 4.0]), (None, [3.0, 4.0])], ids=("clipped", "below", "never")
)
def test_the_norm_is_logged_and_the_gradient_clipped_in_every_precision(precision, clip, expected):
    watch, task, trainer = train([3.0, 4.0], precision, gradient_clip=clip)
    assert trainer.precision == precision
    assert trainer.optimizers[0].defaults["fused"]
    assert watch.logged == [pytest.approx(5.0)]
    torch.testing.assert_close(watch.seen[0], torch.tensor(expected), rtol=1e-5, atol=0)
    torch.testing.assert_close(task.model.slope.detach(), torch.tensor([-0.01, -0.01]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_is_not_finite_is_cleared_before_clipping(precision, bad):
    watch, task, _ = train([bad, 3.0], precision, zero_nonfinite_gradients=True, gradient_clip=1.5)
    assert watch.logged == [3.0]
    assert watch.seen[0].tolist() == pytest.approx([0.0, 1.5])
    assert task.model.slope.tolist() == pytest.approx([0.0, -0.01])


def test_without_clearing_what_is_not_finite_is_seen_in_the_norm():
    watch = Gradients()
    with pytest.raises(InputError, match="expected weights that are finite numbers"):
        train([float("inf"), 3.0], watch=watch, gradient_clip=None)
    assert watch.logged == [float("inf")]


@pytest.mark.parametrize("clear", [False, True])
def test_a_step_whose_scaled_gradient_overflows_is_left_out(clear):
    _, task, trainer = train([float("inf"), 3.0], "16-mixed", zero_nonfinite_gradients=clear)
    assert task.model.slope.tolist() == [0.0, 0.0]
    assert isinstance(trainer.precision_plugin, MixedPrecision)
    assert trainer.precision_plugin.scaler.get_scale() == 2.0**15  # half of what it begins with


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_fused_steps_are_taken_in_every_floating_type(dtype):
    model = nn.Linear(2, 2).to(dtype)
    before = model.weight.detach().clone()
    optimizer = build_optimizer(model, None, OptimConfig(lr=0.1, weight_decay=0))
    assert optimizer.defaults["fused"]
    model(torch.ones(1, 2, dtype=dtype)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before - 0.1, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("device, dtype", [("meta", torch.float32), ("cpu", torch.complex64)])
def test_what_has_no_fused_kernel_is_stepped_without_it(device, dtype):
    model = nn.Linear(2, 2, device=device, dtype=dtype)
    assert not build_optimizer(model, None, OptimConfig()).defaults["fused"]
