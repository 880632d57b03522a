import copy
from dataclasses import replace

import pytest
import torch

from muvit.models.encoder import EncoderConfig
from muvit.models.layers.stage import Stage
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.segmenter import Segmenter, SegmenterConfig

ENCODER = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=32, num_layers=3, heads=2, dropout=0.1)
SPACE = (32, 32)


def mae():
    return MuViTMAE(MAEConfig(encoder=ENCODER, dim_decoder=16))


def segmenter():
    return Segmenter(SegmenterConfig(encoder=ENCODER, num_classes=2, decoder_widths=(8, 8, 8), stem_width=4))


def recompute(model):
    stages = [module for module in model.modules() if isinstance(module, Stage)]
    for stage in stages:
        stage.recomputes = True
    return len(stages)


def outputs(model, img, bbox):
    return model(img, bbox)["loss"] if isinstance(model, MuViTMAE) else model(img, bbox).square().mean()


def step(model):
    """Loss after the backward pass, and bytes that were kept for it beside parameters."""
    torch.manual_seed(1)
    img, lower = torch.rand(2, 2, 1, *SPACE), torch.zeros(2, 2, 1, 2)
    bbox = torch.cat([lower, lower + 32 * torch.tensor([1, 4])[:, None, None]], dim=2)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = outputs(model, img, bbox)
    loss.backward()
    return loss.item(), sum(storage.nbytes() for storage in kept.values())


def copying():
    encoder = replace(ENCODER, attention_mode="coarse_to_fine", coarse_copies="under")
    return Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(8, 8, 8), stem_width=4))


@pytest.mark.parametrize("build", [mae, segmenter, copying])
def test_recomputed_activations_give_the_same_step_and_are_not_kept(build):
    torch.manual_seed(0)
    plain = build().train()
    thrifty = copy.deepcopy(plain)
    assert recompute(thrifty) == (7 if build is mae else 4)
    loss, kept = step(plain)
    same_loss, kept_less = step(thrifty)
    assert same_loss == loss
    assert kept_less < 0.5 * kept
    for (name, ours), theirs in zip(thrifty.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad)
    # running means have counted the batch once
    for ours, theirs in zip(thrifty.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_is_recomputed_without_gradients():
    model = segmenter().eval()
    img, bbox = torch.rand(1, 2, 1, *SPACE), torch.tensor([[[[0.0, 0], [32, 32]], [[0, 0], [128, 128]]]])
    with torch.no_grad():
        expected = model(img, bbox)
        recompute(model)
        assert torch.equal(model(img, bbox), expected)


def test_no_activation_of_a_block_is_kept_twice():
    """Per token of width D: input, norm, q, k, v, attention, sum, norm (8 D), and the wide layer before and after."""
    model, tokens = mae().encoder.eval(), 2 * 64
    block, x = model.layers[0], torch.randn(1, tokens, 32, requires_grad=True)
    rotation = block.rotation(torch.rand(1, tokens, 2)).detach()
    own, kept = {p.untyped_storage().data_ptr() for p in block.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage()}) or t, lambda t: t
    ):
        block(x, rotation)
    large = [s.nbytes() for at, s in kept.items() if at not in own and s.nbytes() >= 4 * tokens * 32]
    assert sum(large) <= 4 * tokens * 32 * (8 + 2 + 2) + rotation.nbytes
