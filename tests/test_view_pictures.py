import numpy as np
import torch

from muvit.view_pictures import frame, heat, view_row, with_one_contrast


def test_coarse_views_are_drawn_with_the_place_of_the_finest():
    coarse, fine = torch.tensor([[100.0, 200.0], [356.0, 456.0]]), torch.tensor([[164.0, 200.0], [228.0, 264.0]])
    assert frame(fine, coarse, (64, 64)).tolist() == [[[16, 0], [32, 16]]]
    volume = [torch.cat([torch.tensor([[3.0], [9.0]]), box], dim=1) for box in (fine, coarse)]
    assert frame(*volume, (32, 64)).tolist() == [[[8, 0], [16, 16]]]


def test_views_have_one_contrast_and_say_how_wide_they_are():
    views = np.stack([np.full((1, 4, 4), 10.0), np.linspace(0, 100, 16).reshape(1, 4, 4)])
    dim, bright = with_one_contrast(views)
    assert dim.max() < 30 and bright.max() == 255
    bbox = np.array([[[8, 8], [24, 24]], [[0, 0], [64, 64]]])
    fine, coarse = view_row([dim, bright], bbox, (1, 4), 0.5, size=64)
    assert (fine.title, coarse.title) == ("level 1: 8 µm wide", "level 4: 32 µm wide")
    assert (coarse.pixels[8, 9:23] == fine.pixels[0, 0]).all()  # the frame of the finer view, in its own colour
    assert (coarse.pixels[0, 0] != fine.pixels[0, 0]).any()


def test_heat_covers_what_it_stands_for():
    hot = heat(np.full((6, 8, 3), 90, np.uint8), [[0, 0.5], [0, 2]]).astype(int)
    assert (hot[:, :4] == 90).all()
    (red, green, blue), half = hot[4, 6], hot[0, 4]
    assert (hot[3:, 4:] == (red, green, blue)).all() and (hot[:3, 4:] == half).all()
    assert red > half[0] > 90 and green > half[1]
