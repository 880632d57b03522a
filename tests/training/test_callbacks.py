import numpy as np
import pytest
import torch

from muvit.mae import MuViTMAE2d, MuViTMAE3d
from muvit.training.callbacks import SIDE_PX, reconstruction_rows

TINY = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "dim": 16, "num_layers": 1, "heads": 2, "dim_decoder": 16}


@pytest.fixture
def sample():
    torch.manual_seed(0)
    # the fine view covers the quarter of the coarse one that begins at row 8 and column 32 of its 64 world pixels
    bbox = torch.tensor([[[8.0, 32], [24, 48]], [[0, 0], [64, 64]]])
    return {"img": torch.rand(2, 1, 16, 16), "bbox": bbox}


def tiny(kind=MuViTMAE2d):
    torch.manual_seed(0)
    return kind(**TINY)


def test_each_level_has_a_row_of_four_pictures(sample):
    rows = reconstruction_rows(tiny(), [sample, sample])
    assert [row[0].title for row in rows] == ["level 1", "level 4"] * 2
    assert [[p.title for p in row[1:]] for row in rows] == [["masked", "reconstruction", "error"]] * 4


def test_masked_patches_are_grey_and_visible_ones_without_error(sample):
    model = tiny()
    result = model.eval()(
        sample["img"][None], sample["bbox"][None], return_all=True, rng_generator=torch.Generator().manual_seed(3)
    )
    rows = reconstruction_rows(model, [sample], seed=3)
    for level, (view, masked, restored, error) in enumerate(row for row in rows):
        hidden = result["mask"][0, level, 0].numpy()
        assert hidden.any()
        assert (error.pixels[~hidden] == 0).all()
        assert (error.pixels[hidden] > 0).any()
        if level == 0:  # nothing is drawn on the finest view
            enlarged = hidden.repeat(SIDE_PX // 16, 0).repeat(SIDE_PX // 16, 1)
            assert (masked.pixels[enlarged] == 127).all()
            assert np.unique(masked.pixels[~enlarged]).size > 2
        assert restored.pixels.shape == (16, 16, 3)
        assert view.pixels.shape == (SIDE_PX, SIDE_PX, 3)


def test_the_box_of_the_fine_view_is_drawn_where_it_lies(sample):
    row = reconstruction_rows(tiny(), [sample])[1]
    colored = np.ptp(row[0].pixels.astype(int), axis=-1) > 20
    ys, xs = np.nonzero(colored)
    scale = SIDE_PX / 64
    assert abs(ys.min() - 8 * scale) <= 2 and abs(ys.max() - 24 * scale) <= 2
    assert abs(xs.min() - 32 * scale) <= 2 and abs(xs.max() - 48 * scale) <= 2
    assert not (np.ptp(reconstruction_rows(tiny(), [sample])[0][0].pixels.astype(int), axis=-1) > 20).any()


def test_drawing_leaves_the_model_as_it_was(sample):
    model = tiny().train()
    state = torch.get_rng_state()
    first, again = (reconstruction_rows(model, [sample]) for _ in range(2))
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    for row, same in zip(first, again, strict=True):
        for a, b in zip(row, same, strict=True):
            assert np.array_equal(a.pixels, b.pixels)


def test_pixels_that_are_not_finite_are_drawn_as_zero(sample):
    bad = sample | {"img": sample["img"].clone()}
    bad["img"][0, 0, 0, 0] = torch.nan
    zero = sample | {"img": torch.nan_to_num(bad["img"])}
    for row, same in zip(*(reconstruction_rows(tiny(), [s]) for s in (bad, zero)), strict=True):
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(row, same, strict=True))


def test_of_a_volume_the_middle_slice_is_shown():
    torch.manual_seed(0)
    img = torch.rand(2, 1, 8, 16, 16)
    img[0, 0, 4] = 0.0
    img[0, 0, 4, :, 8:] = 1.0
    bbox = torch.tensor([[[0.0, 0, 0], [8, 16, 16]], [[0, 0, 0], [32, 64, 64]]])
    view = reconstruction_rows(tiny(MuViTMAE3d), [{"img": img, "bbox": bbox}])[0][0].pixels
    assert view[:, : SIDE_PX // 2 - 16].max() < 30
    assert view[:, SIDE_PX // 2 + 16 :].min() > 225
