import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from muvit.errors import InputError
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.training.optim import OptimConfig, build_optimizer, build_schedule


@pytest.fixture(scope="module")
def model():
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=2, dim=8, num_layers=1, heads=1)
    return Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4), stem_width=2))


def settings_by_parameter(model, config):
    groups = build_optimizer(model, model.encoder, config).param_groups
    return {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}, groups


def test_the_encoder_learns_slower_than_the_decoder(model):
    found, _ = settings_by_parameter(model, OptimConfig(lr=1e-3, encoder_lr_factor=0.1))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert found[id(parameter)][0] == pytest.approx(1e-4 if name.startswith("encoder.") else 1e-3)


def test_only_matrices_decay(model):
    found, _ = settings_by_parameter(model, OptimConfig(weight_decay=0.05))
    decayed = {name for name, p in model.named_parameters() if p.requires_grad and found[id(p)][1] == 0.05}
    spared = {name for name, p in model.named_parameters() if p.requires_grad and found[id(p)][1] == 0}
    assert decayed | spared == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {
        "encoder.layers.0.attn.qkv.weight",
        "encoder.proj.0.0.weight",
        "head.weight",
        "trunk.stem.2.weight",
    } <= decayed
    assert {
        "encoder.level_embed",
        "encoder.layers.0.rotary_pos_embs.freq",
        "encoder.layers.0.norm1.weight",
        "encoder.proj.1.1.bias",
        "head.bias",
        "trunk.stages.0.body.0.1.weight",
    } <= spared


def test_every_trainable_parameter_is_in_one_group_and_resting_ones_in_none(model):
    _, groups = settings_by_parameter(model, OptimConfig())
    chosen = [id(p) for group in groups for p in group["params"]]
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == {id(p) for p in model.parameters() if p.requires_grad}
    assert not set(chosen) & {id(p) for p in model.adapters[1].parameters()}


def test_an_encoder_without_level_vectors_is_fine():
    encoder = EncoderConfig(
        in_channels=1, levels=(1,), patch_size=2, dim=8, num_layers=1, heads=1, use_level_embed=False
    )
    bare = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4), stem_width=2))
    assert len(settings_by_parameter(bare, OptimConfig())[0]) == len([p for p in bare.parameters() if p.requires_grad])


def rates(num_steps, warmup_fraction):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, seen = build_schedule(optimizer, num_steps, warmup_fraction), []
    for _ in range(num_steps + 1):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return seen


def test_the_rate_rises_linearly_then_falls_as_half_a_cosine():
    seen = rates(110, 10 / 110)
    assert seen[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert seen[10:] == pytest.approx([1 + math.cos(math.pi * i / 100) for i in range(101)])
    assert max(seen) == seen[9] == seen[10] == 2.0
    assert seen[60] == pytest.approx(1.0)
    assert seen[110] == pytest.approx(0)


def test_without_warm_up_the_rate_begins_at_its_peak():
    seen = rates(50, 0.0)
    assert seen[0] == 2.0
    assert all(a >= b for a, b in pairwise(seen))


def test_a_run_of_one_step_takes_it_at_full_rate():
    assert rates(1, 0.5)[0] == 2.0


@pytest.mark.parametrize(
    "field, value",
    [
        ("lr", 0),
        ("lr", float("nan")),
        ("encoder_lr_factor", -0.1),
        ("weight_decay", -1),
        ("warmup_fraction", 1),
        ("warmup_fraction", -0.1),
        ("gradient_clip", 0),
    ],
)
def test_settings_that_do_not_fit_are_refused(field, value):
    with pytest.raises(InputError, match=f"{field}: expected"):
        OptimConfig(**{field: value})


def test_the_defaults_are_the_papers():
    config = OptimConfig()
    assert (config.lr, config.encoder_lr_factor, config.gradient_clip) == (1e-4, 0.1, 0.5)
