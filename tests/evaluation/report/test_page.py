import base64
import dataclasses
import io
import math
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from muvit.errors import ExistsError, InputError, ShapeError
from muvit.evaluation.report import examples
from muvit.evaluation.report.content import Example, ModelResult
from muvit.evaluation.report.examples import inset_window
from muvit.evaluation.report.page import write_report
from muvit.evaluation.report.tables import conclusion
from muvit.pictures import IGNORED_COLOR, class_colors

VOID = {"meta", "img", "source", "br", "link"}
CURVES = {"train_loss": (range(150), np.linspace(1, 0, 150)), "val_mdsc": ([0, 149], [0.1, 0.8])}
CLASSES = ("background", "outer", "inner <&>")


class Page(HTMLParser):
    """Elements with attributes in order, texts by tag, tables as rows of (text, is bold); refuses unclosed tags."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements, self.texts, self.tables, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append(["", False])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((tuple(self.open), data))
        if {"td", "th"} & set(self.open):
            cell = self.tables[-1][-1][-1]
            cell[0] += data
            cell[1] |= "strong" in self.open

    def find(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    def text(self, tag):
        return [data for path, data in self.texts if path[-1:] == (tag,)]


def model(name="ours", dice=(0.8, 0.9), **changes):
    values = dict(zip(CLASSES[1:], dice, strict=True))
    fields = {
        "name": name,
        "description": f"What {name} is.",
        "dice": values,
        "mean_dice": float(np.mean(dice)),
        "seconds": 61.2,
        "parameters": 1_384_451,
    }
    return ModelResult(**(fields | changes))


def example(names, title="Image 3", size=(48, 64)):
    rng = np.random.default_rng(0)
    truth = np.zeros(size, dtype=np.int64)
    truth[20:40, 30:50] = 1
    truth[30:40, 30:50] = 2
    return Example(
        title=title,
        image=rng.integers(0, 255, (*size, 3), dtype=np.uint8),
        truth=truth,
        predictions={name: rng.integers(0, 3, size) for name in names},
    )


def opened(uri):
    """The picture that a page holds."""
    assert uri.startswith("data:image/png;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def write(folder, models=None, **changes):
    models = [model(), model("single", (0.5, 0.9)), model("naive", (0.6, 0.4))] if models is None else models
    options = {
        "title": "A <title> & more",
        "intro": "Why.",
        "models": models,
        "class_names": CLASSES,
        "class_colors": class_colors(3),
        "examples": [example([m.name for m in models])],
        "settings": {"crop": "64 px", "seed": 0},
        "outputs": {"image": "test/my image.ome.zarr", "truth": "test/truth.ome.zarr"},
    }
    return write_report(folder, **(options | changes))


class TestPage:
    def test_every_picture_exists_and_is_described_and_nothing_else_is_written(self, tmp_path):
        folder = tmp_path / "report"
        path = write(folder, [model(curves=CURVES), model("naive", curves=CURVES)])
        page = Page(path)
        assert page.text("h2")[2] == "Training" and "Validation mDSC" in page.text("figcaption")
        assert path == folder / "index.html"
        assert list(tmp_path.iterdir()) == [folder] and list(folder.iterdir()) == [path]
        assert all(opened(attrs["srcset"]).format == "PNG" for attrs in page.find("source"))
        alts = [attrs["alt"] for attrs in page.find("img")]
        assert all(alts) and len(set(alts)) == len(alts)
        for attrs in page.find("img"):
            assert opened(attrs["src"]).size == (int(attrs["width"]), int(attrs["height"]))

    def test_needs_no_script_no_network_and_has_landmarks(self, tmp_path):
        path = write(tmp_path)
        page = Page(path)
        tags = [tag for tag, _ in page.elements]
        assert "script" not in tags and "link" not in tags
        assert "://" not in path.read_text() and "@import" not in path.read_text()
        for landmark in ("header", "main", "footer", "h1", "title", "caption"):
            assert tags.count(landmark) == 1, landmark
        assert page.find("html") == [{"lang": "en"}]
        ids = {attrs["id"] for _, attrs in page.elements if "id" in attrs}
        assert {attrs["aria-labelledby"] for attrs in page.find("section")} == ids
        assert all(attrs["scope"] in ("row", "col") for attrs in page.find("th"))

    def test_texts_are_escaped(self, tmp_path):
        evil = "<script>alert(\"1\")</script> & 'more'"
        models = [model(evil, description=evil), model("b")]
        path = write(
            tmp_path,
            models,
            title=evil,
            intro=evil,
            examples=[example([evil, "b"], title=evil)],
            settings={evil: evil},
            outputs={evil: evil},
        )
        page = Page(path)
        assert not page.find("script")
        assert page.text("h1") == page.text("h3") == page.text("dt")[:1] == page.text("dd")[:1] == [evil]
        assert evil in page.text("figcaption")
        assert any(evil in attrs["alt"] for attrs in page.find("img"))
        assert {p.name for p in tmp_path.iterdir()} == {"index.html"}

    def test_table_holds_the_numbers_and_bold_is_the_best_of_each_column(self, tmp_path):
        (table,) = Page(write(tmp_path)).tables
        assert [text for text, _ in table[0]] == ["Model", "mDSC", "outer", "inner <&>", "Parameters", "Training"]
        body = [[(text, bold) for text, bold in row[1:]] for row in table[1:]]
        rest = [("1.38 M", False), ("1 min 01 s", False)]
        assert body == [
            [("0.850", True), ("0.800", True), ("0.900", True), *rest],
            [("0.700", False), ("0.500", False), ("0.900", True), *rest],
            [("0.500", False), ("0.600", False), ("0.400", False), *rest],
        ]
        assert [row[0][0] for row in table[1:]] == ["oursWhat ours is.", "singleWhat single is.", "naiveWhat naive is."]

    def test_one_model_has_nothing_to_be_best_of(self, tmp_path):
        (table,) = Page(write(tmp_path, [model(dice=(0.5, 0.5))])).tables
        assert table[1][1:4] == [["0.500", False]] * 3

    def test_a_class_without_any_score_stands_in_a_sentence_not_in_the_table(self, tmp_path):
        page = Page(write(tmp_path, [model(dice=(0.5, math.nan), mean_dice=0.5)]))
        (table,) = page.tables
        assert [text for text, _ in table[0]] == ["Model", "mDSC", "outer", "Parameters", "Training"]
        assert "Neither in the test images nor predicted: inner <&>." in page.text("p")
        one = [model(dice=(0.5, math.nan), mean_dice=0.5), model("b", dice=(0.5, 0.1))]
        assert Page(write(tmp_path, one, overwrite=True)).tables[0][1][3] == ["n/a", False]

    def test_many_classes_get_their_own_table(self, tmp_path):
        names = [f"region {i}" for i in range(13)]
        rng = np.random.default_rng(0)
        models = [model(name, dice=(0, 0)) for name in "ab"]
        models = [dataclasses.replace(m, dice=dict(zip(names, rng.random(13), strict=True))) for m in models]
        summary, classes = Page(write(tmp_path, models)).tables
        assert [text for text, _ in summary[0]] == ["Model", "mDSC", "Parameters", "Training"]
        assert [text for text, _ in classes[0]] == ["Class", "a", "b"]
        for name, row in zip(names, classes[1:], strict=True):
            a, b = (m.dice[name] for m in models)
            assert row == [[name, False], [f"{a:.3f}", a > b], [f"{b:.3f}", b > a]]

    def test_examples_show_input_truth_and_each_model_with_a_legend(self, tmp_path):
        shown = example(["ours", "naive"])
        shown.truth[0, 0] = -100
        page = Page(write(tmp_path, [model(), model("naive")], examples=[shown], ignore=[-100]))
        captions = page.text("figcaption")
        assert captions[:4] == ["Input", "Truth", "ours", "naive"]
        assert [text for path, text in page.texts if path[-2:] == ("ul", "li")][:4] == [*CLASSES, "not scored"]
        whole, inset = (np.array(opened(attrs["src"])) for attrs in page.find("img")[2:4])  # of the truth
        assert whole.shape == (48, 64, 3)
        assert tuple(whole[0, 0]) == IGNORED_COLOR and tuple(whole[25, 46]) == class_colors(3)[1]
        assert {tuple(color) for color in inset.reshape(-1, 3).tolist()} <= set(class_colors(3))

    def test_settings_and_commands(self, tmp_path):
        page = Page(write(tmp_path))
        assert page.text("dt")[:2] == ["crop", "seed"] and page.text("dd")[:2] == ["64 px", "0"]
        napari, python = [text for path, text in page.texts if path[-2:] == ("pre", "code")]
        assert napari == "napari --plugin napari-ome-zarr 'test/my image.ome.zarr' test/truth.ome.zarr"
        compile(python, "snippet", "exec")
        assert "open_slide('test/my image.ome.zarr')" in python

    def test_parts_without_content_are_left_out(self, tmp_path):
        page = Page(write(tmp_path, [model()], examples=[], settings={}, outputs={}))
        assert page.text("h2") == ["Results", "Environment"]
        assert not page.find("img")


class TestWriting:
    def test_refuses_an_existing_report_and_replaces_it_when_asked(self, tmp_path):
        path = write(tmp_path)
        (tmp_path / "mine.txt").write_text("kept")
        before = path.read_bytes()
        with pytest.raises(ExistsError, match=r"index\.html"):
            write(tmp_path, title="other")
        assert path.read_bytes() == before
        write(tmp_path, title="other", overwrite=True)
        assert Page(path).text("h1") == ["other"]
        assert (tmp_path / "mine.txt").read_text() == "kept"

    def test_a_failure_on_the_way_leaves_the_earlier_page(self, tmp_path, monkeypatch):
        path = write(tmp_path)
        before = path.read_bytes()

        def full(handle):
            raise OSError("no room")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no room"):
            write(tmp_path, title="other", overwrite=True)
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before

    def test_a_picture_that_fails_is_one_warning(self, tmp_path, caplog, monkeypatch):
        drawn = examples.plot_curves

        def broken(series, *, ylabel, **options):
            if ylabel == "training loss":
                raise OSError("no pen")
            return drawn(series, ylabel=ylabel, **options)

        monkeypatch.setattr(examples, "plot_curves", broken)
        models, good = [model(curves=CURVES)], example(["ours"], title="good")
        bad = {
            "cut": dataclasses.replace(good, title="cut", truth=good.truth[:-1]),
            "strange": dataclasses.replace(good, title="strange", truth=good.truth + 1),
            "incomplete": dataclasses.replace(good, title="incomplete", predictions={}),
        }
        page = Page(write(tmp_path, models, examples=[*bad.values(), good]))
        assert page.text("h3") == ["good"]
        assert "Validation mDSC" in page.text("figcaption") and "Training loss" not in page.text("figcaption")
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == len(bad) + 1
        for what in (*bad, "the curve of the training loss"):
            assert any(line.startswith(f"{what} could not be drawn and is left out: ") for line in said)

    @pytest.mark.parametrize(
        ("changes", "error", "message"),
        [
            ({"models": []}, InputError, "models: expected at least one"),
            ({"models": [model(), model()]}, InputError, "of different names"),
            ({"models": [model(), model("b", curves={"loss": ([1, 2], [1])})]}, ShapeError, "loss of 'b'"),
            ({"models": [model(), dataclasses.replace(model("b"), dice={"x": 1.0})]}, InputError, "dice of 'b'"),
            ({"class_colors": class_colors(2)}, InputError, "3 colours"),
        ],
    )
    def test_refuses_what_does_not_fit_before_writing(self, tmp_path, changes, error, message):
        with pytest.raises(error, match=message):
            write(tmp_path / "new", **changes)
        assert not (tmp_path / "new").exists()


class TestConclusion:
    def test_says_who_is_better_by_how_much_and_how_sure_that_is(self):
        controls = [model("single", (0.5, 0.5), behind=(0.3, 0.4)), model("naive", (0.6, 0.4), behind=(-1, 1))]
        better = " ".join(conclusion([model(), *controls]))
        assert "ours reaches an mDSC of 0.850, 0.350 above the best control, single (0.500)." in better
        assert "the difference would be 0.300 to 0.400." in better
        assert "the task needs what the control lacks" in better
        assert "A control has" not in better

    def test_admits_that_a_control_is_better(self):
        text = " ".join(conclusion([model(dice=(0.5, 0.5)), model("naive", (0.7, 0.7), behind=(-0.3, -0.1))]))
        assert "0.200 below the control, naive (0.700)" in text
        assert "no reason to prefer ours" in text

    @pytest.mark.parametrize(
        ("behind", "sentence"),
        [
            ((-0.01, 0.5), "would be -0.010 to 0.500: this run does not tell which is better."),
            (None, "There are too few test slides to tell"),
        ],
    )
    @pytest.mark.parametrize("sign", [1, -1])
    def test_draws_no_conclusion_that_the_slides_do_not_support(self, behind, sentence, sign):
        text = " ".join(conclusion([model(dice=(0.5,) * 2), model("b", (0.5 - sign * 0.2,) * 2, behind=behind)]))
        assert sentence in text
        assert "lacks" not in text and "no reason" not in text

    def test_too_little_training_is_told_even_if_every_slide_agrees(self):
        names = [f"region {i}" for i in range(13)]
        first, control = (
            dataclasses.replace(model(name, behind=(0.01, 0.03)), dice=dict(zip(names, dice, strict=True)), mean_dice=m)
            for name, dice, m in (("ours", [0.25] * 5 + [0.0] * 8, 0.096), ("one", [0.2] * 5 + [0.0] * 8, 0.075))
        )
        text = " ".join(conclusion([first, control]))
        assert "too little training to tell" in text and "neither finds 8 of the 13 classes" in text
        assert "lacks" not in text

    def test_calls_small_differences_equal_and_names_lost_classes(self):
        text = " ".join(conclusion([model(dice=(0.5, 0.6)), model("naive", (0.4, 0.69), behind=(0.001, 0.01))]))
        assert "as good within 0.02" in text and "does not tell which is better" in text
        assert "A control has the higher Dice on inner <&>." in text

    def test_without_control_or_score(self):
        assert "no control" in " ".join(conclusion([model()]))
        assert "no score" in " ".join(conclusion([model(dice=(math.nan, math.nan)), model("b")]))
        assert "no control" in " ".join(conclusion([model(), model("b", dice=(math.nan, math.nan))]))


class TestInsetWindow:
    def test_finds_where_the_classes_meet(self):
        truth = np.zeros((400, 600), dtype=np.uint8)
        truth[:100, :300] = 1
        truth[300:, 500:550] = 1
        truth[300:, 550:] = 2
        assert inset_window(truth).tolist() == [[300, 500], [400, 600]]

    def test_ignored_and_empty_images(self):
        truth = np.full((40, 40), -100)
        truth[5, 30] = 1
        (top, left), (bottom, right) = inset_window(truth, ignore=[-100])
        assert top <= 5 < bottom and left <= 30 < right and (bottom - top, right - left) == (10, 10)
        assert inset_window(np.zeros((3, 2), dtype=int)).tolist() == [[0, 0], [1, 1]]
