import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, interpolate

from muvit.geometry import naive_boxes, patch_centers
from muvit.models.relay.placement import cells_of, pool, read_cells, spread


def drawn(size, channels=2, batch=2):
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(0))


def centered(level, size, batch=2):
    inner, outer = naive_boxes((1, level), size).expand(batch, -1, -1, -1).unbind(1)
    return outer, inner


@pytest.mark.parametrize("size, factor", [((16, 16), 4), ((12, 20), 2), ((32, 16), 4), ((9, 9), 3)])
def test_views_with_one_centre_give_the_central_crop_of_the_paper(size, factor):
    context, cells = drawn(size), cells_of(size, 1, factor)
    rows, cols = (n // factor for n in size)
    top, left = (size[0] - rows) // 2, (size[1] - cols) // 2
    crop = context[:, :, top : top + rows, left : left + cols]
    values, inside = read_cells(context, *centered(factor, size), cells)
    assert cells == (rows, cols)
    assert inside.all()
    torch.testing.assert_close(values, crop, rtol=0, atol=1e-5)
    if factor != 3:  # powers of two are exact
        assert torch.equal(values, crop)


@pytest.mark.parametrize("far", [0.0, 1e6])
def test_aligned_boxes_give_the_crop_where_the_local_view_lies(far):
    context = drawn((16, 16))
    outer = torch.tensor([[0.0, 0.0], [64.0, 64.0]]) + far
    inner = torch.tensor([[[8.0, 40.0], [24.0, 56.0]], [[48.0, 0.0], [64.0, 16.0]]]) + far
    values, inside = read_cells(context, outer.expand(2, -1, -1), inner, (4, 4))
    assert inside.all()
    assert torch.equal(values[0], context[0, :, 2:6, 10:14])
    assert torch.equal(values[1], context[1, :, 12:16, 0:4])


def test_a_cell_between_pixels_is_interpolated():
    context = drawn((8, 8), batch=1)
    outer, inner = torch.tensor([[[0.0, 0.0], [32.0, 32.0]]]), torch.tensor([[[10.0, 8.0], [18.0, 16.0]]])
    values, _ = read_cells(context, outer, inner, (2, 2))
    expected = (context[:, :, 2:4, 2:4] + context[:, :, 3:5, 2:4]) / 2
    torch.testing.assert_close(values, expected)


@given(
    level=st.sampled_from([1.5, 2, 3, 4, 7, 32]),
    rows=st.integers(1, 24),
    cols=st.integers(1, 24),
    shift=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_map_of_world_coordinates_reads_as_the_centres_of_the_cells(level, rows, cols, shift):
    size = (rows + 1, cols + 1)
    inner = torch.tensor([[0.0, 0.0], [*map(float, size)]])
    slack = (torch.tensor(size) * (level - 1)) * torch.tensor(shift)
    outer = torch.stack([-slack, torch.tensor(size) * level - slack])
    context = patch_centers(outer, size).mT.unflatten(-1, size)[None]
    cells = cells_of(size, 1, level)
    values, inside = read_cells(context, outer[None], inner[None], cells)
    wanted = patch_centers(inner, cells).mT.unflatten(-1, cells)[None]
    # nearer than half a pixel to the border there is nothing to interpolate with
    lowest, highest = outer[0] + level / 2, outer[1] - level / 2
    wanted = wanted.clamp(lowest[:, None, None], highest[:, None, None])
    assert inside.all()
    torch.testing.assert_close(values, wanted, rtol=0, atol=1e-3)


def test_cells_outside_the_context_view_are_told():
    context = drawn((4, 4), batch=1)
    outer, inner = torch.tensor([[[0.0, 0.0], [16.0, 16.0]]]), torch.tensor([[[-4.0, 4.0], [4.0, 12.0]]])
    values, inside = read_cells(context, outer, inner, (2, 2))
    assert inside.flatten().tolist() == [False, False, True, True]
    assert torch.equal(values[:, :, 0], context[:, :, 0, 1:3])


def test_pooling_is_average_pooling_and_keeps_the_mean_for_any_factor():
    x = drawn((12, 8))
    torch.testing.assert_close(pool(x, (3, 2)), avg_pool2d(x, 4))
    torch.testing.assert_close(pool(x, (5, 3)).mean((2, 3)), x.mean((2, 3)))
    # 3 pixels in 2 cells: the one in the middle counts half in each
    line = torch.tensor([3.0, 6.0, 9.0]).reshape(1, 1, 3, 1)
    torch.testing.assert_close(pool(line, (2, 1)).flatten(), torch.tensor([4.0, 8.0]))


def test_decision_fusion_up_samples_the_central_crop():
    context = drawn((16, 16))
    values, _ = read_cells(context, *centered(4, (16, 16)), (4, 4))
    expected = interpolate(context[:, :, 6:10, 6:10], scale_factor=4, mode="bilinear", align_corners=False)
    torch.testing.assert_close(spread(values, (16, 16)), expected)


def test_cells_follow_the_levels_of_each_axis():
    assert cells_of((64, 64), 1, 4) == (16, 16)
    assert cells_of((64, 64), 2, 8) == (16, 16)
    assert cells_of((64, 64), 1, (2, 8)) == (32, 8)
    assert cells_of((64, 64), 1, 1000) == (1, 1)
