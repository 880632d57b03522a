from types import SimpleNamespace

import pytest
import torch
from transformers import Mask2FormerForUniversalSegmentation

from muvit.errors import CheckpointError
from muvit.labels import IGNORE
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.swin_mask2former import SwinMask2Former, _logits
from muvit.models.trained import load_network

SIZE = (32, 64)


def small(in_channels=3, num_classes=3, width=32, weights=None):
    torch.manual_seed(0)
    return SwinMask2Former("swin_nano", width, in_channels, num_classes, weights)


def draw(batch=2, channels=3):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *SIZE, generator=generator)


def halves(batch=2):
    """Class 2 in the left half of each image, class 0 in the right one."""
    label = torch.zeros(batch, *SIZE, dtype=torch.int64)
    label[..., :32] = 2
    return label


def test_logits_are_the_shares_of_classes_that_the_queries_vote_for():
    big = 50.0
    classes = torch.tensor([[[big, 0, 0], [0, big, 0], [0, 0, big]]])  # class 0, class 1, no class
    masks = torch.tensor([[[[big, -big]], [[-big, big]], [[big, big]]]]).reshape(1, 3, 1, 2)
    sure = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=masks)
    shares = _logits(sure, torch.Size((1, 2))).softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]]))
    half = SimpleNamespace(class_queries_logits=classes, masks_queries_logits=torch.zeros(1, 3, 1, 2))
    torch.testing.assert_close(_logits(half, torch.Size((4, 8))).softmax(1), torch.full((1, 2, 4, 8), 0.5))


def test_the_loss_is_that_of_transformers():
    model, img, label = small().train(), draw(), halves()
    torch.manual_seed(3)
    loss, logits = model.loss(img, label)
    masks = [torch.stack([one == 0, one == 2]).float() for one in label]
    torch.manual_seed(3)
    output = model.network(pixel_values=img, mask_labels=masks, class_labels=[torch.tensor([0, 2])] * 2)
    torch.testing.assert_close(loss, output.loss.squeeze())
    torch.testing.assert_close(logits, _logits(output, img.shape[2:]))


def test_what_is_unlabelled_is_in_no_mask():
    model, img, label = small().train(), draw(), halves()
    label[0] = IGNORE
    loss, _ = model.loss(img, label)
    assert loss.isfinite()
    label[1] = IGNORE  # only that no query sees a class is left to learn
    loss, _ = model.loss(img, label)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.long
def test_a_few_steps_teach_it_two_halves():
    model = Baseline(
        BaselineConfig(kind="mask2former", encoder_name="swin_nano", width=32, in_channels=1, num_classes=3)
    )
    label = halves()
    batch = {"img": (label == 2).float()[:, None, None] + 0.1 * draw(channels=1)[:, None], "label": label}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(40):
        optimizer.zero_grad()
        loss, logits = model.train().training_loss(batch, lambda *_: pytest.fail("it has a loss of its own"))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert (logits.argmax(1) == label).float().mean() > 0.9


def test_published_weights_are_read_once_and_for_other_classes(tmp_path):
    source = small(num_classes=5).network
    source.save_pretrained(tmp_path / "published")
    task = {"kind": "mask2former", "encoder_name": "swin_nano", "width": 32}
    config = BaselineConfig(**task, encoder_weights=str(tmp_path / "published"), in_channels=3, num_classes=3)
    model = Baseline(config)
    found, published = model.network.network.state_dict(), source.state_dict()
    equal = {name for name in found if found[name].shape == published[name].shape}
    assert {name.split(".")[0] for name in set(found) - equal} == {"class_predictor", "criterion"}
    assert all(torch.equal(found[name], published[name]) for name in equal)
    assert found["criterion.empty_weight"].tolist() == pytest.approx([1, 1, 1, 0.1])
    assert model.backbone is model.network.encoder
    model.save(tmp_path / "model")
    for file in (tmp_path / "published").iterdir():
        file.unlink()
    back = load_network(tmp_path / "model")
    assert torch.equal(back.eval()(draw()[:, None]), model.eval()(draw()[:, None]))


def test_weights_for_other_channels_leave_the_patch_embedding_new(tmp_path):
    small().network.save_pretrained(tmp_path)
    assert small(in_channels=2, weights=str(tmp_path))(draw(channels=2)).shape == (2, 3, *SIZE)


def test_weights_of_another_kind_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a Mask2Former of transformers with weights as safetensors"):
        small(weights=str(tmp_path))
    small(width=64).network.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"expected weights of this encoder_name and width, got \d+ others"):
        small(weights=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"expected a Mask2Former of transformers"):
        small(weights=str(tmp_path))
    assert isinstance(small(width=64).network, Mask2FormerForUniversalSegmentation)
