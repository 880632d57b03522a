import pytest

from muvit.data.tables import is_table, read_column, read_slides, values_of
from muvit.errors import InputError, ReadError


def write(tmp_path, text, encoding="utf-8"):
    (tmp_path / "slides.csv").write_text(text, encoding=encoding)
    return tmp_path / "slides.csv"


def test_a_column_is_read_by_name_without_what_is_empty(tmp_path):
    file = write(tmp_path, "name,split,group\na,train, DN \nb,test,\nc,test,56Nx\na,val,DN\n", "utf-8-sig")
    assert read_column(file, "group") == {"a": "DN", "c": "56Nx"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("name,split\na,train\n", r"slides\.csv: expected a column 'group', got columns name, split"),
        ("slide,group\na,DN\n", "expected a column 'name', got columns slide, group"),
        ("", "expected a column 'name', got columns none"),
        ("name,group\na,DN\na,56Nx\n", "line 3: expected 'DN' for 'a' again, got '56Nx'"),
        ("name,group\n,DN\n", "line 2: expected a name, got none"),
        ("name,group\na\n", None),
    ],
)
def test_tables_that_do_not_fit_are_refused(tmp_path, text, message):
    if message is None:  # a short line has no value
        assert read_column(write(tmp_path, text), "group") == {}
        return
    with pytest.raises(InputError, match=message):
        read_column(write(tmp_path, text), "group")


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ReadError, match=r"none\.csv: expected a CSV file"):
        read_column(tmp_path / "none.csv", "group")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    with pytest.raises(ReadError, match=r"binary\.csv: expected a CSV file"):
        read_column(tmp_path / "binary.csv", "group")


def test_every_slide_needs_a_value():
    values = {"a": "DN", "b": "normal", "z": "DN"}
    assert values_of(["b", "a"], values, "slides.csv") == {"b": "normal", "a": "DN"}
    with pytest.raises(InputError, match=r"slides\.csv: expected a value for every slide, got none for 'c' and 1 more"):
        values_of(["a", "c", "d"], values, "slides.csv")


def test_parquet_says_what_csv_says(tmp_path):
    import pyarrow
    from pyarrow.parquet import write_table

    for name in ("a.png", "b.png"):
        (tmp_path / name).touch()
    columns = {"image": ["a.png", "b.png"], "group": [7, None], "weight": [2.0, 0.5], "fold": [0.0, float("nan")]}
    table, file = pyarrow.table(columns | {"__index_level_0__": [3, 4]}), tmp_path / "slides.parquet"
    write_table(table, file)
    rows = "image,group,weight,fold\na.png,7,2,0\nb.png,,0.5,\n"
    assert is_table(file) and read_slides(file) == read_slides(write(tmp_path, rows))
    write_table(pyarrow.table({"name": ["a", "b"], "group": ["DN", None]}), file)
    assert read_column(file, "group") == {"a": "DN"}
    write_table(table.drop_columns("fold").append_column("split", pyarrow.array(["train", "all"])), file)
    with pytest.raises(
        InputError, match=r"slides\.parquet, row 2: expected a split out of train, val, test, got 'all'"
    ):
        read_slides(file)
    file.write_bytes(b"image,labels")
    with pytest.raises(ReadError, match=r"slides\.parquet: expected a Parquet file, got ArrowInvalid"):
        read_slides(file)
