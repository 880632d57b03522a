import pytest
import torch
from torch.nn.functional import batch_norm, conv2d, interpolate

from muvit.errors import InputError
from muvit.models.unetr import LevelAdapter, PixelDecoder, skip_layers, stage_widths, upsampling_steps


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_adapter_of_the_paper_has_its_number_of_parameters():
    adapter = LevelAdapter(2, 512, (256, 256, 256))
    assert count(adapter) == 1_640_960
    assert count(adapter.skips) == 3 * 131_328
    assert count(adapter.neck) == 2 * 590_592 + 65_792


def test_the_trunk_of_the_paper_has_its_number_of_parameters():
    trunk = PixelDecoder(2, 1, (8, 8), (256,) * 4, 64)
    assert count(trunk.stem) == 768 + 37_056 + 16_640
    assert count(trunk.stages) == 4 * 1_181_184
    assert count(trunk) == 4_782_284 - 3_084  # the head belongs to the segmenter


def test_concatenation_widens_the_first_convolution_of_three_stages():
    trunk = PixelDecoder(2, 1, (8, 8), (256,) * 4, 64, "concatenate")
    assert count(trunk) == 4_782_284 - 3_084 + 3 * 256 * 256 * 9


@pytest.mark.parametrize("fusion", ["add", "concatenate"])
def test_stages_follow_the_papers_forward_line_by_line(fusion):
    torch.manual_seed(0)
    adapter, trunk = LevelAdapter(2, 16, (8, 8, 8)).train(), PixelDecoder(2, 3, (8, 8), (8,) * 4, 4, fusion).train()
    s0, s5, s11 = torch.randn(3, 2, 16, 4, 3).unbind()
    image = torch.randn(2, 3, 32, 24)

    def cb(x, block):
        x = conv2d(x, block[0].weight, block[0].bias, padding=1)
        return batch_norm(x, None, None, block[1].weight, block[1].bias, training=True).relu()

    def res(x, residual):
        return cb(cb(x, residual.body[0]), residual.body[1]) + x

    def fused(x, skip, residual):
        if fusion == "add":
            return res(x + skip, residual)
        return cb(cb(torch.cat([x, skip], 1), residual.body[0]), residual.body[1]) + x

    def up(x, factor):
        return interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    p11, p5, p0 = (conv2d(s, skip.weight, skip.bias) for s, skip in zip((s11, s5, s0), adapter.skips, strict=True))
    neck, (res0, res1, res2, res3), stem = adapter.neck, trunk.stages, trunk.stem
    x = cb(cb(p11, neck.body[0]), neck.body[1]) + conv2d(p11, neck.shortcut.weight, neck.shortcut.bias)
    x = res(x, res0)
    x = fused(up(x, 2), up(p5, 2), res1)
    x = fused(up(x, 2), up(p0, 4), res2)
    stem_out = conv2d(cb(cb(image, stem[0]), stem[1]), stem[2].weight, stem[2].bias)
    x = fused(up(x, 2), stem_out, res3)
    torch.testing.assert_close(trunk(adapter([s11, s5, s0]), image), x, rtol=1e-4, atol=1e-4)


def test_falling_widths_narrow_before_the_upsampling():
    torch.manual_seed(0)
    trunk = PixelDecoder(2, 1, (4, 4), (12, 8, 4), 4).eval()
    coarse, skip, image = torch.randn(1, 12, 3, 3), torch.randn(1, 8, 3, 3), torch.randn(1, 1, 12, 12)

    def up(x, factor):
        return interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)

    x = trunk.stages[0](coarse)
    # up-sampled first, then narrowed: the same, at four times the cost
    x = trunk.stages[1](trunk.narrow[0](up(x, 2)) + up(skip, 2))
    x = trunk.stages[2](trunk.narrow[1](up(x, 2)) + trunk.stem(image))
    torch.testing.assert_close(trunk([coarse, skip], image), x, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "patch, steps",
    [
        ((8, 8), [(2, 2)] * 3),
        ((1, 1), []),
        ((2, 8, 8), [(1, 2, 2), (1, 2, 2), (2, 2, 2)]),
        ((4, 1), [(2, 1), (2, 1)]),
    ],
)
def test_steps_double_every_axis_as_often_as_its_patch_needs(patch, steps):
    assert upsampling_steps(patch) == steps


def test_slim_widths_halve_towards_the_pixels():
    assert [stage_widths("slim", n) for n in (0, 2, 3, 4)] == [
        (64,),
        (256, 128, 64),
        (256, 256, 128, 64),
        (256, 256, 256, 128, 64),
    ]
    assert stage_widths("paper", 3) == (256,) * 4


@pytest.mark.parametrize("patch", [(6, 6), (8, 12), (0, 8)])
def test_a_patch_that_is_no_power_of_two_is_refused(patch):
    with pytest.raises(InputError, match="powers of two for a convolutional decoder"):
        upsampling_steps(patch)


@pytest.mark.parametrize(
    "layers, count, skips", [(12, 3, (0, 5, 11)), (4, 3, (0, 1, 3)), (3, 3, (0, 1, 2)), (5, 1, (4,))]
)
def test_skips_are_spread_over_the_blocks_and_end_with_the_last(layers, count, skips):
    assert skip_layers(layers, count) == skips


def test_more_skips_than_blocks_are_refused():
    with pytest.raises(InputError, match="at least 3 blocks, one for each up-sampling stage, got 2"):
        skip_layers(2, 3)


@pytest.mark.parametrize("widths", [(8, 8, 8), (8,) * 5, (8, 8, 0, 8)])
def test_widths_must_be_one_for_each_stage(widths):
    with pytest.raises(InputError, match=r"decoder_widths: expected 4 positive widths for patch \(8, 8\)"):
        PixelDecoder(2, 1, (8, 8), widths, 4)
