import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from muvit.data.folders import list_slides, open_pairs
from muvit.data.splits import SplitConfig, choose_folds, choose_slides, class_areas, divide
from muvit.data.tables import SlideFiles, read_slides, write_slides
from muvit.errors import InputError, ReadError


def paint(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Ten slides of 8 x 8 pixels: two thirds of the first five are class 1, of the others class 2."""
    for i in range(10):
        labels = np.zeros((8, 9))
        labels[:, 3:] = 1 + i // 5
        paint(tmp_path / "images" / f"s{i}.png", labels * 50)
        paint(tmp_path / "labels" / f"s{i}.png", labels)
    return tmp_path


def write(folder, lines, columns="image,labels,split,group,weight"):
    (folder / "slides.csv").write_text("\n".join([columns, *lines]) + "\n")
    return folder / "slides.csv"


def row(i, split="", group="", weight="", labels=None):
    return f"images/s{i}.png,labels/s{i if labels is None else labels}.png,{split},{group},{weight}"


def names(slides):
    return [slide.name for slide in slides]


def areas(slides):
    return class_areas(slides, 1, None, ())


def test_a_table_names_the_files_beside_it_and_is_written_as_it_is_read(folder, tmp_path_factory):
    file = write(folder, [row(0, "train", "p1", "2.5"), row(1, "val", "p2"), "images/s2.png,,test,,"])
    slides = read_slides(file)
    assert slides[0] == SlideFiles(
        image=folder / "images/s0.png", labels=folder / "labels/s0.png", split="train", group="p1", weight=2.5
    )
    assert (slides[1].weight, slides[2].labels) == (1.0, None)
    elsewhere = tmp_path_factory.mktemp("runs") / "run" / "slides.csv"
    write_slides(elsewhere, slides)
    again = read_slides(elsewhere)
    assert [(s.image.resolve(), s.split, s.group, s.weight) for s in again] == [
        (s.image.resolve(), s.split, s.group, s.weight) for s in slides
    ]


@pytest.mark.parametrize(
    "lines, columns, message",
    [
        ([], "image,patient", "expected a column image, and any of labels, .*, got columns image, patient"),
        ([], "labels", "expected a column image, and any of .*, got columns labels"),
        ([], "image", "expected at least one slide, got no line"),
        ([",labels/s0.png,,,"], None, r"line 2: expected an image, got none for the labels labels/s0\.png"),
        ([row(0), row(99)], None, r"line 3: expected a file .*images/s99\.png, got nothing there"),
        ([row(0, labels=99)], None, r"line 2: expected a file .*labels/s99\.png, got nothing there"),
        ([row(0, "training")], None, "line 2: expected a split out of train, val, test, got 'training'"),
        ([row(0, weight="0")], None, "line 2: expected a weight above 0, got '0'"),
        ([row(0, weight="much")], None, "line 2: expected a weight above 0, got 'much'"),
        ([row(0) + ",7"], None, "line 2: expected as many values as there are columns, got more"),
        (["images/s0.png,-1"], "image,fold", "line 2: expected a fold, 0, 1 and so on, got '-1'"),
    ],
)
def test_tables_that_do_not_fit_are_refused(folder, lines, columns, message):
    file = write(folder, lines, columns or "image,labels,split,group,weight")
    with pytest.raises(InputError, match=rf"slides\.csv.*{message}"):
        read_slides(file)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([row(0), "images/s0.jpg,labels/s1.png,,,"], r"s0\.jpg: expected one image of each name, got also .*s0\.png"),
        ([row(0, "train", "p"), row(1, "val", "p")], "the slides of 'p': expected one split, got train and val"),
        ([row(0, "train"), row(0, "val")], r"the image .*s0\.png: expected one split, got train and val"),
        ([row(0, "train"), row(1)], "expected a split of every slide, or of none, got none for 's1'"),
        ([row(0, "val")], "data.train: expected slides to train on, got none"),
    ],
)
def test_slides_that_contradict_each_other_are_refused(folder, lines, message):
    paint(folder / "images" / "s0.jpg", np.zeros((8, 9)))
    with pytest.raises(InputError, match=message):
        choose_slides(write(folder, lines))


def test_labels_belong_to_one_image_and_every_image_has_labels(folder):
    table = write(folder, [row(0), row(1, labels=0)])
    with pytest.raises(InputError, match=r"s0\.png: expected labels of one image, got .*s0\.png and .*s1\.png"):
        open_pairs(list_slides(table))
    with pytest.raises(InputError, match=r"s0\.png: expected labels of every image, got none"):
        open_pairs(list_slides(write(folder, ["images/s0.png,,,,"])))


def test_labels_of_another_file_name_get_the_name_of_their_image(folder):
    ((image, label),) = open_pairs(list_slides(write(folder, [row(3, labels=7)])))
    assert (image.name, label.name, label.path.name) == ("s3", "s3", "s7.png")


def test_a_table_states_the_splits_unless_a_folder_validates(folder, tmp_path_factory):
    table = write(folder, [row(0, "train"), row(1, "val"), row(2, "test"), row(3, "train")])
    sets = choose_slides(table)
    assert {split: names(slides) for split, slides in sets.items()} == {
        "train": ["s0", "s3"],
        "val": ["s1"],
        "test": ["s2"],
    }
    assert names(list_slides(table, "test")) == ["s2"]
    other = tmp_path_factory.mktemp("other")
    for kind in ("images", "labels"):
        paint(other / kind / "s0.png", np.ones((8, 9)))  # another image of this name, in another set
    assert names(choose_slides(table, other)["val"]) == ["s0"]


def test_slides_of_a_folder_are_divided_with_their_classes(folder):
    sets = choose_slides(folder, split=SplitConfig(val=0.2, test=0.2, seed=1), amounts=areas)
    assert [len(sets[split]) for split in ("train", "val", "test")] == [6, 2, 2]
    for split in ("val", "test"):
        assert sorted(int(name[1]) // 5 for name in names(sets[split])) == [0, 1]  # one slide of each class
    assert sets == choose_slides(folder, split=SplitConfig(val=0.2, test=0.2, seed=1), amounts=areas)
    others = [choose_slides(folder, split=SplitConfig(val=0.2, seed=s), amounts=areas)["val"] for s in range(5)]
    assert len({tuple(names(val)) for val in others}) > 1


def test_slides_of_a_group_stay_together_unless_slides_are_divided(folder):
    table = write(folder, [row(i, group=f"p{i % 3}") for i in range(10)])
    sets = choose_slides(table, split=SplitConfig(val=0.3))
    groups = [{slide.group for slide in sets[split]} for split in ("train", "val")]
    assert not groups[0] & groups[1]
    assert all(groups)
    apart = choose_slides(table, split=SplitConfig(val=0.5, by="slide"))
    assert len(apart["val"]) == 5


def test_each_slide_validates_in_one_fold_and_tests_in_none(folder):
    table = write(folder, [row(i, "test" if i == 0 else "train", f"p{i // 2}") for i in range(10) if i != 1])
    runs = choose_folds(table, 4, amounts=areas)
    assert sorted(name for run in runs for name in names(run["val"])) == [f"s{i}" for i in range(2, 10)]
    for run in runs:
        assert names(run["test"]) == ["s0"]
        assert not {s.group for s in run["train"]} & {s.group for s in run["val"]}
        assert len(run["train"]) + len(run["val"]) == 8


def test_folds_of_a_table_are_followed(folder):
    lines = [f"images/s{i}.png,labels/s{i}.png,{i % 2}" for i in range(4)]
    runs = choose_folds(write(folder, lines, "image,labels,fold"), 2)
    assert [names(run["val"]) for run in runs] == [["s0", "s2"], ["s1", "s3"]]
    with pytest.raises(InputError, match=r"expected folds 0 to 2 as run\.folds says, got 0, 1"):
        choose_folds(folder / "slides.csv", 3)


def test_what_cannot_be_divided_is_refused(folder):
    with pytest.raises(InputError, match="slides: expected at least 11 groups, one for each part, got 10"):
        choose_folds(folder, 11)
    with pytest.raises(InputError, match=r"data\.split: expected slides that are not divided yet, got splits in"):
        choose_slides(write(folder, [row(0, "train")]), split=SplitConfig())
    with pytest.raises(InputError, match=r"data\.split: expected val and test of less than 1 in all, got 1\.2"):
        SplitConfig(val=0.6, test=0.6)
    with pytest.raises(ReadError, match=r"none\.csv: expected a CSV file"):
        choose_slides(folder / "none.csv")


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 100), st.integers(0, 100)), min_size=3, max_size=40),
    st.sampled_from([(0.8, 0.2), (0.5, 0.5), (0.6, 0.2, 0.2)]),
    st.integers(0, 3),
)
def test_a_division_keeps_groups_whole_and_leaves_no_part_empty(slides, shares, seed):
    groups = [f"g{group}" for group, *_ in slides]
    parts, num_groups = divide(np.array([amounts for _, *amounts in slides]), groups, shares, seed)
    assert num_groups == len(set(groups))
    assert all(len({part for part, g in zip(parts, groups, strict=True) if g == one}) == 1 for one in groups)
    assert len(set(parts)) == min(len(shares), num_groups)


def test_equal_parts_of_many_equal_slides_are_exact():
    amounts = np.eye(4)[np.arange(80) % 4]  # one class on each slide
    parts, _ = divide(amounts, [str(i) for i in range(80)], (0.2,) * 5)
    for part in range(5):
        np.testing.assert_array_equal(amounts[parts == part].sum(0), [4, 4, 4, 4])
