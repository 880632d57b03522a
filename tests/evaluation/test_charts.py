from math import nan

import numpy as np
import pytest
from PIL import Image

from muvit.errors import ShapeError
from muvit.evaluation.charts import Line, draw_bars, draw_lines, draw_matrix, new_figure, plot_curves, to_image


def colors(picture):
    return {tuple(c) for c in np.asarray(picture).reshape(-1, 3).tolist()}


def test_bars_show_each_series_and_leave_out_what_does_not_exist():
    figure, axes = new_figure(4, 3)
    series = {"one": [0.5, nan], "two": [0.2, 0.4]}
    bounds = {"one": [(0.4, 0.6), (nan, nan)], "two": [(0.1, 0.3), (0.3, 0.5)]}
    draw_bars(axes[0, 0], ["a", "b"], series, intervals=bounds, label="score")
    assert [bar.get_width() for bar in axes[0, 0].patches] == [0.5, 0, 0.2, 0.4]
    assert {(0, 114, 178), (213, 94, 0)} <= colors(to_image(figure))


def test_matrices_show_their_numbers_if_there_is_room():
    texts = []
    for size in (3, 40):
        figure, axes = new_figure(4, 4)
        names = list(map(str, range(size)))
        draw_matrix(axes[0, 0], np.eye(size), names, names, xlabel="x", ylabel="y", title="t")
        texts.append([text.get_text() for text in axes[0, 0].texts])
        to_image(figure)
    assert texts[0].count("1.00") == 3 and texts[0].count("0.00") == 6
    assert texts[1] == []


def test_lines_on_a_logarithmic_axis_have_a_place_for_zero():
    figure, axes = new_figure(4, 3)
    line = Line([0, 1, 64], [0.9, 0.8, 0.1], [0.8, 0.7, 0.0], [1.0, 0.9, 0.2])
    draw_lines(axes[0, 0], {"a": line}, xlabel="x", ylabel="y", xscale="zero_log2")
    places = [axes[0, 0].transData.transform((x, 0))[0] for x in line.x]
    assert places[0] < places[1] < places[2]
    assert [t.get_text() for t in axes[0, 0].get_xticklabels()] == ["0", "1", "64"]
    assert (0, 114, 178) in colors(to_image(figure))


class TestPlotCurves:
    def test_size_ground_and_colored_lines(self):
        curves = {"loss": (range(300), np.linspace(1, 0, 300)), "score": ([0, 150, 299], [0.1, np.nan, 0.8])}
        light = plot_curves(curves, xlabel="step", ylabel="value", size=(640, 400))
        dark = plot_curves(curves, xlabel="step", ylabel="value", size=(640, 400), is_dark=True)
        for picture, ground, line in ((light, (255, 255, 255), (0, 114, 178)), (dark, (21, 24, 29), (86, 180, 233))):
            assert isinstance(picture, Image.Image)
            assert picture.size == (640, 400)
            assert picture.getpixel((0, 0)) == ground
            assert (np.abs(np.array(picture).astype(int) - line).max(-1) <= 2).sum() > 50

    def test_leaves_the_global_state_of_matplotlib_alone(self):
        import matplotlib

        def settings():
            return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

        before = settings()
        plot_curves({"a": ([1, 2], [3, 4])}, xlabel="x", ylabel="y")
        plot_curves({}, xlabel="x", ylabel="y")
        assert settings() == before

    def test_refuses_unequal_lengths(self):
        with pytest.raises(ShapeError, match="curve 'a': expected 2 values"):
            plot_curves({"a": ([1, 2], [3])}, xlabel="x", ylabel="y")
