import pytest
import torch
from lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from muvit.evaluation.scores.segmentation import Evaluation, SlideCounts
from muvit.labels import IGNORE
from muvit.losses import SegmentationLoss
from muvit.metrics import confusion_matrix, scores
from muvit.models.encoder import EncoderConfig
from muvit.models.segmentation_model import SegmentationModel, Views
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.training.optim import OptimConfig
from muvit.training.tasks import SegmentationTask

SIDE, LEVEL = 8, 8


def quiet_trainer(**settings):
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )


class Samples(TensorDataset):
    def __getitem__(self, index):
        return dict(zip(("img", "bbox", "label"), super().__getitem__(index), strict=True))


def blob_beside_the_crop(count, seed):
    """Noise, and a bright column in the coarse view just left or right of the fine one: the side is the class.

    The fine view is one coarse pixel wide and lies anywhere, so that the class shows in neither view alone, and in both
    together only to whom their places are known.
    """
    generator = torch.Generator().manual_seed(seed)
    img = 0.1 * torch.randn(count, 2, 1, SIDE, SIDE, generator=generator)
    row = torch.randint(0, SIDE - 1, (count,), generator=generator)
    column = torch.randint(1, SIDE - 1, (count,), generator=generator)
    side = torch.randint(0, 2, (count,), generator=generator)
    for below in (0, 1):
        img[torch.arange(count), 1, 0, row + below, column + 2 * side - 1] += 4
    lower = torch.stack([LEVEL * torch.stack([row, column], -1), torch.zeros(count, 2, dtype=torch.int64)], 1).float()
    bbox = torch.stack([lower, lower + torch.tensor([SIDE, LEVEL * SIDE])[:, None]], 2)
    return Samples(img, bbox, side[:, None, None].expand(-1, SIDE, SIDE))


class OwnNetwork(SegmentationModel):
    """A user's own network: the sums of the halves of the coarse view around the column of the fine one."""

    views = Views(levels=(1, LEVEL), in_channels=1, ndim=2, multiple=(1, 1))
    num_classes = 2

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, img, bbox=None):
        column = bbox[:, 0, 0, 1, None] / LEVEL
        right = (img[:, 1, 0].sum(1) * (torch.arange(SIDE) - column).sign()).sum(1)
        return (self.scale * torch.stack([-right, right], 1))[:, :, None, None].expand(-1, -1, SIDE, SIDE)


def test_a_network_of_ones_own_is_trained():
    model = OwnNetwork()
    task = SegmentationTask(model, SegmentationLoss(), OptimConfig(lr=0.1), ("left", "right"))
    quiet_trainer(max_epochs=1).fit(task, DataLoader(blob_beside_the_crop(256, seed=1), batch_size=32))
    img, bbox, label = blob_beside_the_crop(128, seed=2).tensors
    assert model.scale > 0
    assert torch.equal(model(img, bbox).argmax(1), label)


def accuracy_after_training(boxes="true", num_levels=2, steps=120):
    torch.manual_seed(0)
    levels = (1, LEVEL)[:num_levels]
    encoder = EncoderConfig(
        in_channels=1, levels=levels, patch_size=2, dim=32, num_layers=2, heads=2, rotary_base=100, level_embed_std=0.02
    )
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, boxes=boxes, decoder_widths=(8, 4), stem_width=4))
    optim = OptimConfig(lr=3e-3, encoder_lr_factor=1.0)
    task = SegmentationTask(model, SegmentationLoss(), optim, ("left", "right"))

    def first_levels(data):
        img, bbox, label = data.tensors
        return Samples(img[:, :num_levels], bbox[:, :num_levels], label)

    trained = first_levels(blob_beside_the_crop(32 * steps, seed=1))
    quiet_trainer(max_epochs=1).fit(task, DataLoader(trained, batch_size=32))
    img, bbox, label = first_levels(blob_beside_the_crop(512, seed=2)).tensors
    with torch.inference_mode():
        return (model.eval()(img, bbox).argmax(1) == label).float().mean().item()


def test_places_join_two_views_into_what_neither_shows():
    assert accuracy_after_training() > 0.95


def test_without_true_boxes_the_same_model_guesses_much():
    assert accuracy_after_training(boxes="naive") < 0.8


def test_the_fine_view_alone_tells_nothing():
    assert accuracy_after_training(num_levels=1, steps=60) < 0.6


class Fixed(SegmentationModel):
    """Says what it is told: the image holds the class."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, img, bbox):
        return nn.functional.one_hot(img[:, 0, 0].long(), 3).movedim(-1, 1).float() * self.scale


@pytest.mark.parametrize("has_background", [True, False])
def test_validation_scores_pool_the_pixels_of_all_batches(has_background):
    generator = torch.Generator().manual_seed(0)
    guess, truth = (torch.randint(0, 3, (10, 6, 6), generator=generator) for _ in range(2))
    truth[:, :2] = IGNORE
    data = Samples(guess[:, None, None].float(), torch.zeros(10, 1, 2, 2), truth)
    names = ("nothing", "one", "two")
    task = SegmentationTask(Fixed(), SegmentationLoss(), OptimConfig(), names, has_background=has_background)
    loader, trainer = DataLoader(data, batch_size=4), quiet_trainer()
    confusion = confusion_matrix(truth.numpy(), guess.numpy(), 3, ignore=(IGNORE,))
    expected = scores(confusion, has_background=has_background)
    flawless = Samples(*data.tensors[:2], guess)
    assert trainer.validate(task, DataLoader(flawless), verbose=False)[0]["val_mdsc"] == 1
    logged = trainer.validate(task, loader, verbose=False)[0]  # counts afresh
    # the same as `muvit evaluate` tells of the same pixels
    evaluated = Evaluation(
        class_names=names,
        slides=(SlideCounts(name="all", confusion=confusion),),
        has_background=has_background,
    ).summary()
    for score, name in {"mdsc": "mean_dice"}.items() | {
        (n, n) for n in ("mean_iou", "mean_foreground_iou", "accuracy")
    }:
        assert logged[f"val_{score}"] == pytest.approx(evaluated[name])
    for name, dice in zip(names, expected.dice, strict=True):
        assert logged[f"val_dice/{name}"] == pytest.approx(dice)
    losses = [task.loss(Fixed()(data.tensors[0][i : i + 4], None), truth[i : i + 4]).item() for i in (0, 4, 8)]
    assert logged["val_loss"] == pytest.approx((4 * losses[0] + 4 * losses[1] + 2 * losses[2]) / 10, rel=1e-4)


def test_a_class_that_does_not_occur_is_not_logged():
    guess = torch.zeros(2, 4, 4, dtype=torch.int64)
    guess[0] = 1
    data = Samples(guess[:, None, None].float(), torch.zeros(2, 1, 2, 2), guess)
    task = SegmentationTask(Fixed(), SegmentationLoss(), OptimConfig(), ("nothing", "one", "two"))
    logged = quiet_trainer().validate(task, DataLoader(data, batch_size=2), verbose=False)[0]
    assert "val_dice/two" not in logged
    assert logged["val_mdsc"] == 1


def test_an_ignored_class_has_no_score_though_it_is_predicted():
    truth = torch.ones(2, 4, 4, dtype=torch.int64)
    predicted = truth.clone()
    predicted[:, 0] = 2
    data = Samples(predicted[:, None, None].float(), torch.zeros(2, 1, 2, 2), truth)
    task = SegmentationTask(Fixed(), SegmentationLoss(), OptimConfig(), ("nothing", "one", "two"), ignore_labels=(2,))
    logged = quiet_trainer().validate(task, DataLoader(data, batch_size=2), verbose=False)[0]
    assert "val_dice/two" not in logged
    assert logged["val_mdsc"] == logged["val_dice/one"] == pytest.approx(2 * 12 / (12 + 16))


@pytest.mark.parametrize("val_every", [1, 2])
def test_a_plateau_schedule_warms_up_and_falls_when_the_score_stands_still(val_every):
    guess = torch.zeros(8, 4, 4, dtype=torch.int64)
    guess[0] = 1
    data = Samples(guess[:, None, None].float(), torch.zeros(8, 1, 2, 2), guess)
    optim = OptimConfig(lr=0.1, schedule="plateau", plateau_patience=1, plateau_factor=0.5, warmup_fraction=0.125)
    task = SegmentationTask(Fixed(), SegmentationLoss(), optim, ("nothing", "one", "two"))
    rates = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, *_):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    loader = DataLoader(data, batch_size=2)
    trainer = quiet_trainer(max_epochs=8, callbacks=[Watch()], check_val_every_n_epoch=val_every)
    trainer.fit(task, loader, DataLoader(data, batch_size=8))
    steps_of_warmup, per_epoch = 4, 4
    assert rates[0] == pytest.approx(0.001)
    assert rates[steps_of_warmup] == pytest.approx(0.1)
    assert rates[:steps_of_warmup] == sorted(rates[:steps_of_warmup])
    # the score is perfect from the first validation on: the second without a rise is one more than patience allows
    falls = [epoch for epoch in range(1, 8) if rates[epoch * per_epoch] < rates[epoch * per_epoch - 1]]
    assert falls[:1] == [3 * val_every]
    assert rates[3 * val_every * per_epoch] == pytest.approx(0.05)
