import sys
from dataclasses import replace
from math import isnan

import numpy as np
import pytest
import torch

from muvit.errors import InputError
from muvit.evaluation.studies import scaling
from muvit.evaluation.studies.scaling import ScalingConfig, draw_scaling, measure_scaling, scaling_rows
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

MODEL = SegmenterConfig(
    encoder=EncoderConfig(in_channels=1, levels=(1,), patch_size=4, dim=16, num_layers=2, heads=2),
    num_classes=2,
    decoder_widths=(4, 4, 4),
    stem_width=2,
)
CONFIG = ScalingConfig(level_sets=((1,), (1, 4)), sizes=(16, 32), repeats=2)


def test_every_model_is_measured_at_every_size_in_both_ways():
    seen = []
    measured = measure_scaling(MODEL, CONFIG, device="cpu", progress=lambda *n: seen.append(n))
    assert seen == [(i + 1, 8) for i in range(8)]
    cases = [(m.levels, m.size_px, m.is_training, m.num_tokens) for m in measured]
    assert cases == [
        (levels, size, training, len(levels) * (size // 4) ** 2)
        for levels in ((1,), (1, 4))
        for size in (16, 32)
        for training in (False, True)
    ]
    assert all(m.seconds > 0 for m in measured)
    rows = scaling_rows(measured)
    assert (rows[-1]["levels"], rows[-1]["pass"]) == ("1,4", "forward and backward")
    assert np.asarray(draw_scaling(measured)).std() > 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells the memory of a process")
def test_peak_memory_is_that_of_the_step(monkeypatch):
    def step(model, img, bbox, is_training):
        np.ones(2**23 * (3 if is_training else 1))  # 64 or 192 MiB, gone at once

    monkeypatch.setattr(scaling, "_step", step)
    config = replace(CONFIG, level_sets=((1,),), sizes=(16,))
    forward, training = measure_scaling(MODEL, config, device="cpu")
    assert forward.peak_mib == pytest.approx(64, abs=8)
    assert training.peak_mib == pytest.approx(192, abs=8)


def test_a_size_for_which_memory_does_not_suffice_has_no_numbers(monkeypatch):
    def step(model, img, bbox, is_training):
        if img.shape[-1] > 16:
            raise torch.OutOfMemoryError

    monkeypatch.setattr(scaling, "_step", step)
    measured = measure_scaling(MODEL, CONFIG, device="cpu")
    assert [isnan(m.seconds) for m in measured] == [m.size_px > 16 for m in measured]
    assert np.asarray(draw_scaling(measured)).std() > 0


def test_models_are_trained_only_when_asked(monkeypatch):
    seen = []

    def step(model, img, bbox, is_training):
        assert isinstance(model, Segmenter)
        seen.append((model.config.encoder.levels, model.training, tuple(img.shape), tuple(bbox.shape)))

    monkeypatch.setattr(scaling, "_step", step)
    measure_scaling(MODEL, replace(CONFIG, sizes=(16,), batch_size=3, level_sets=((1, 4),)), device="cpu")
    assert seen == [((1, 4), t, (3, 2, 1, 16, 16), (3, 2, 2, 2)) for t in [False] * 3 + [True] * 3]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"level_sets": ()}, "level_sets: expected at least one"),
        ({"sizes": ()}, "sizes: expected positive"),
        ({"repeats": 0}, "repeats: expected a positive"),
        ({"sizes": (18,)}, r"sizes: expected multiples of the patch \(4, 4\), got 18"),
    ],
)
def test_what_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        measure_scaling(MODEL, replace(CONFIG, **fields), device="cpu")
