import csv
import json
from math import nan

import pytest
from PIL import Image

from muvit.errors import ExistsError, InputError
from muvit.evaluation.results import result_files, write_results, write_rows


def write(files):
    picture = Image.new("RGB", (4, 3), (1, 2, 3))
    write_results(files, lambda: {"a": [1.5, nan]}, lambda: [{"x": 1, "y": nan}, {"x": 2, "y": 0.5}], lambda: picture)


def test_a_folder_receives_each_format_and_a_suffix_asks_for_one(tmp_path):
    write(result_files(tmp_path / "new" / "out", "noise", overwrite=False))
    assert sorted(f.name for f in (tmp_path / "new" / "out").iterdir()) == [
        "noise.csv",
        "noise.html",
        "noise.json",
        "noise.png",
    ]
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
    assert len(result_files(tmp_path, "noise", overwrite=True)) == 4
    (tmp_path / "notes.txt").write_text("dear")
    with pytest.raises(InputError, match=r"notes\.txt: expected a folder, or a file ending in \.json"):
        result_files(tmp_path / "notes.txt", "noise", overwrite=True)


def test_a_table_without_rows_is_an_empty_table(tmp_path):
    write_rows(tmp_path / "a.csv", [])
    assert (tmp_path / "a.csv").read_text().strip() == ""
