import csv
import json
from math import nan

import numpy as np
import pytest
from PIL import Image

from muvit.errors import ExistsError, InputError
from muvit.evaluation.charts import Line, draw_bars, draw_lines, draw_matrix, new_figure, to_image
from muvit.evaluation.results import result_files, write_results, write_rows


def write(files):
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    write_results(files, lambda: {"a": [1.5, nan]}, lambda: [{"x": 1, "y": nan}, {"x": 2, "y": 0.5}], lambda: picture)


def test_a_folder_receives_all_three_and_a_suffix_asks_for_one(tmp_path):
    write(result_files(tmp_path / "new" / "out", "noise", overwrite=False))
    assert sorted(f.name for f in (tmp_path / "new" / "out").iterdir()) == ["noise.csv", "noise.json", "noise.png"]
    assert json.loads((tmp_path / "new" / "out" / "noise.json").read_text()) == {"a": [1.5, None]}
    with (tmp_path / "new" / "out" / "noise.csv").open(newline="") as lines:
        assert list(csv.DictReader(lines)) == [{"x": "1", "y": ""}, {"x": "2", "y": "0.5"}]
    with Image.open(tmp_path / "new" / "out" / "noise.png") as picture:
        assert picture.size == (4, 3)
    write(result_files(tmp_path / "one.CSV", "noise", overwrite=False))
    assert (tmp_path / "one.CSV").read_text().splitlines() == ["x,y", "1,", "2,0.5"]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["new", "one.CSV"]


def test_only_what_is_asked_for_is_made(tmp_path):
    def never():
        raise AssertionError

    write_results(result_files(tmp_path / "a.json", "x", overwrite=False), lambda: {}, never, never)
    assert (tmp_path / "a.json").exists()


def test_results_are_not_overwritten_unless_asked(tmp_path):
    (tmp_path / "noise.png").write_text("dear")
    with pytest.raises(ExistsError, match=r"noise\.png"):
        result_files(tmp_path, "noise", overwrite=False)
    assert len(result_files(tmp_path, "noise", overwrite=True)) == 3
    (tmp_path / "notes.txt").write_text("dear")
    with pytest.raises(InputError, match=r"notes\.txt: expected a folder, or a file ending in \.json"):
        result_files(tmp_path / "notes.txt", "noise", overwrite=True)


def test_a_table_without_rows_is_an_empty_table(tmp_path):
    write_rows(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_text().strip() == ""


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
