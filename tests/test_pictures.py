import numpy as np
import pytest

from muvit.errors import InputError, ShapeError
from muvit.pictures import (
    IGNORED_COLOR,
    MAX_COLORS,
    Picture,
    class_colors,
    colorize,
    fit,
    outline_boxes,
    overlay,
    panel,
    to_rgb,
)


class TestClassColors:
    def test_background_is_black_and_okabe_ito_follows(self):
        assert class_colors(4) == ((0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115))

    def test_colors_do_not_depend_on_how_many_are_asked_for(self):
        assert class_colors(40) == class_colors(MAX_COLORS)[:40]

    def test_all_are_distinct_bytes_and_none_is_the_ignored_grey(self):
        colors = class_colors(MAX_COLORS)
        assert len(set(colors)) == MAX_COLORS
        assert IGNORED_COLOR not in colors
        assert all(isinstance(part, int) and 0 <= part <= 255 for color in colors for part in color)

    def test_twenty_classes_stay_apart(self):
        colors = np.array(class_colors(20), dtype=float)
        distances = np.linalg.norm(colors[:, None] - colors[None], axis=-1) + np.eye(20) * 1e3
        assert distances.min() > 40

    @pytest.mark.parametrize("number", [0, -1, MAX_COLORS + 1])
    def test_refuses_impossible_numbers(self, number):
        with pytest.raises(InputError, match="num_classes: expected 1 to 256"):
            class_colors(number)


class TestToRgb:
    def test_one_channel_is_grey_stretched_between_the_percentiles(self):
        ramp = np.arange(256, dtype=np.uint16).reshape(1, 1, 256) * 100
        picture = to_rgb(ramp, low=0, high=100)
        np.testing.assert_array_equal(picture[0, :, 0], np.arange(256))
        assert (picture == picture[..., :1]).all()
        clipped = to_rgb(ramp, low=20, high=80)[0, :, 0]
        assert clipped[51] == 0 and clipped[52] > 0 and clipped[203] < 255 and clipped[204] == 255

    def test_three_channels_keep_their_hue(self):
        color = np.array([200, 100, 0], dtype=np.float64)
        image = np.moveaxis(np.linspace(0, 1, 8)[:, None, None] * color, -1, 0)
        picture = to_rgb(image, low=0, high=100).astype(float)
        np.testing.assert_allclose(picture[..., 1], picture[..., 0] / 2, atol=0.51)
        assert picture[..., 2].max() == 0

    def test_two_and_four_channels_are_composited(self):
        two = np.zeros((2, 1, 4))
        two[0, 0, 1], two[1, 0, 2] = 5, 7
        assert to_rgb(two, low=0, high=100)[0].tolist() == [[0, 0, 0], [0, 255, 0], [255, 0, 255], [0, 0, 0]]
        four = np.zeros((4, 1, 2))
        four[:, 0, 1] = 9
        assert to_rgb(four, low=0, high=100)[0].tolist() == [[0, 0, 0], [255, 255, 255]]
        fourth_only = np.zeros((4, 1, 2))
        fourth_only[3, 0, 1] = 9
        assert not to_rgb(fourth_only).any()

    @pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.uint32, np.int64, np.float16, np.float32, float])
    def test_takes_any_real_dtype(self, dtype):
        image = np.array([[[0, 1], [1, 0]]], dtype=dtype)
        assert to_rgb(image, low=0, high=100)[..., 0].tolist() == [[0, 255], [255, 0]]

    def test_flat_is_black_rare_content_shows_and_values_not_finite_are_black(self):
        assert not to_rgb(np.full((1, 4, 4), 7.0)).any()
        assert not to_rgb(np.full((1, 4, 4), np.nan)).any()
        rare = np.zeros((1, 100, 100))
        rare[0, 3, 4] = 1
        assert to_rgb(rare)[3, 4].tolist() == [255, 255, 255]
        assert to_rgb(np.array([[[np.nan, 0, 1, np.inf]]]), low=0, high=100)[0, :, 0].tolist() == [0, 0, 255, 0]

    def test_refuses_what_is_no_image(self):
        with pytest.raises(ShapeError, match=r"image: expected shape \(C, H, W\), got \(4, 4\)"):
            to_rgb(np.zeros((4, 4)))
        with pytest.raises(InputError, match="real numbers"):
            to_rgb(np.zeros((1, 2, 2), dtype=complex))
        with pytest.raises(InputError, match="percentiles"):
            to_rgb(np.zeros((1, 2, 2)), low=50, high=50)


class TestLabels:
    COLORS = ((0, 0, 0), (10, 20, 30), (200, 100, 50))

    def test_colorize_is_a_table_lookup_with_grey_for_ignored(self):
        labels = np.array([[0, 1], [2, -100]])
        assert colorize(labels, self.COLORS, ignore=[-100]).tolist() == [
            [[0, 0, 0], [10, 20, 30]],
            [[200, 100, 50], list(IGNORED_COLOR)],
        ]

    @pytest.mark.parametrize("bad", [-1, 3])
    def test_colorize_refuses_labels_without_color(self, bad):
        with pytest.raises(InputError, match=r"labels: expected 0 to 2.*got "):
            colorize(np.array([[0, bad]]), self.COLORS)

    def test_colorize_refuses_floats_and_other_shapes(self):
        with pytest.raises(InputError, match="integers"):
            colorize(np.zeros((2, 2)), self.COLORS)
        with pytest.raises(ShapeError, match=r"\(H, W\)"):
            colorize(np.zeros((1, 2, 2), dtype=int), self.COLORS)

    def test_overlay_mixes_classes_and_leaves_background_and_ignored(self):
        image = np.full((1, 4, 3), 100, dtype=np.uint8)
        labels = np.array([[0, 1, 2, 255]], dtype=np.uint8)
        mixed = overlay(image, labels, self.COLORS, alpha=0.5, ignore=[255])
        assert mixed[0].tolist() == [[100] * 3, [55, 60, 65], [150, 100, 75], [100] * 3]
        assert overlay(image, labels, self.COLORS, alpha=1, ignore=[255])[0, 1].tolist() == [10, 20, 30]
        np.testing.assert_array_equal(overlay(image, labels, self.COLORS, alpha=0, ignore=[255]), image)

    def test_overlay_refuses_another_size(self):
        with pytest.raises(ShapeError, match="as the image"):
            overlay(np.zeros((2, 2, 3), dtype=np.uint8), np.zeros((2, 3), dtype=int), self.COLORS)
        with pytest.raises(InputError, match="alpha"):
            overlay(np.zeros((2, 2, 3), dtype=np.uint8), np.zeros((2, 2), dtype=int), self.COLORS, alpha=2)


class TestOutlineBoxes:
    def test_lines_lie_just_inside_the_box_and_nowhere_else(self):
        image = np.full((40, 60, 3), 90, dtype=np.uint8)
        red = (255, 0, 0)
        drawn = outline_boxes(image, [[[10, 20], [30, 50]]], colors=[red])
        is_red = (drawn == red).all(-1)
        expected = np.zeros((40, 60), dtype=bool)
        expected[10:30, 20:50] = True
        expected[11:29, 21:49] = False
        np.testing.assert_array_equal(is_red, expected)
        assert (drawn[12:28, 22:48] == 90).all() and (drawn[:10] == 90).all() and (drawn[:, 50:] == 90).all()
        assert (image == 90).all()

    def test_boxes_may_leave_the_picture_and_the_first_lies_on_top(self):
        image = np.zeros((20, 20, 3), dtype=np.uint8)
        box = [[-5, -5], [10, 10]]
        drawn = outline_boxes(image, [box, box], colors=[(1, 2, 3), (9, 9, 9)])
        assert drawn[9, 4].tolist() == [1, 2, 3]
        assert not (drawn == 9).all(-1).any()

    def test_refuses_what_is_no_box(self):
        image = np.zeros((20, 20, 3), dtype=np.uint8)
        with pytest.raises(ShapeError, match=r"\(N, 2, 2\)"):
            outline_boxes(image, [[0, 0], [5, 5]])
        for corner in (0, np.nan):
            with pytest.raises(InputError, match="upper corners above lower"):
                outline_boxes(image, [[[0, 0], [corner, 5]]])


class TestPanel:
    def test_geometry_and_aspect(self):
        wide = np.full((10, 20, 3), (255, 0, 0), dtype=np.uint8)
        tall = np.full((40, 10, 3), (0, 0, 255), dtype=np.uint8)
        sheet = panel([[("wide", wide), Picture("tall", tall)], [("again", wide)]], size=100, gap=10, font_size=16)
        header = 24
        assert sheet.size == (10 + 2 * 110, 10 + 2 * (header + 110))
        pixels = np.array(sheet)
        red, blue = ((pixels == color).all(-1) for color in [(255, 0, 0), (0, 0, 255)])
        expected_red, expected_blue = np.zeros((2, *red.shape), dtype=bool)
        for top in (10, 10 + header + 110):
            expected_red[top + header + 25 : top + header + 75, 10:110] = True
        expected_blue[10 + header : 110 + header, 120 + 37 : 120 + 62] = True
        np.testing.assert_array_equal(red, expected_red)
        np.testing.assert_array_equal(blue, expected_blue)
        assert (pixels[10 : 10 + header, 10:110] < 100).any(), "the title is written"
        assert (pixels[-100:, 120:] == 255).all(), "a shorter row leaves white"

    def test_labels_keep_their_colors_in_any_size(self):
        colors = class_colors(5)
        picture = colorize(np.random.default_rng(0).integers(0, 5, (30, 30)), colors)
        for size in (7, 100):
            assert set(map(tuple, fit(picture, size, is_labels=True).reshape(-1, 3).tolist())) <= set(colors)
        assert set(map(tuple, fit(picture, 7).reshape(-1, 3).tolist())) - set(colors)

    def test_long_titles_stay_within_their_square(self):
        black = np.zeros((8, 8, 3), dtype=np.uint8)
        sheet = panel([[("a very long title that fits no square " * 3, black)]], size=80, gap=10)
        assert (np.array(sheet)[:, :10] == 255).all() and (np.array(sheet)[:, 90:] == 255).all()

    def test_refuses_nothing(self):
        with pytest.raises(InputError, match="at least one picture"):
            panel([[]])
