"""Pages of runs, predictions and scores: whole, with the numbers, and without any other file."""

import csv
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from array_slide import ArraySlide
from PIL import Image

from muvit.data.pyramids.writer import PyramidWriter
from muvit.evaluation.report.parts import confusion_table, environment, line_chart, rows_table
from muvit.evaluation.report.runs import LiveComparison, LivePage, write_page, write_prediction_page, write_run_page
from muvit.evaluation.report.scores import results_page, scores_page
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.models.card import ModelCard
from muvit.models.hub import CARD

VOID = {"meta", "img", "line", "path", "input"}


class Checked(HTMLParser):
    """Elements that are closed in order, and the text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.links = [], [], [], []
        self.feed(text)
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += [] if self.open and self.open[-1] in ("style", "script") else [data]


def check(text, scripts=0):
    page = Checked(text)
    assert page.tags.count("script") == scripts and "link" not in page.tags
    assert all(link.startswith("data:image/png;base64,") or "://" not in link for link in page.links)
    assert page.tags.count("h1") == page.tags.count("main") == 1
    return page


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "first"
    (folder / "best").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("data: {train: <here>}\n")
    for version, steps in ((0, range(0, 20)), (1, range(20, 40))):
        log = folder / "logs" / f"version_{version}" / "metrics.csv"
        log.parent.mkdir(parents=True)
        with log.open("w", newline="") as lines:
            names = [
                "epoch",
                "step",
                "train_loss",
                "val_loss",
                "val_mdsc",
                "val_dice/cell",
                "val_loss/level_4",
                "lr-AdamW",
            ]
            writer = csv.DictWriter(lines, names)
            writer.writeheader()
            for step in steps:
                values = {"train_loss": 1 / (step + 1), "lr-AdamW": 1e-3}
                if step % 10 == 9:
                    values |= {
                        "val_loss": 0.5,
                        "val_mdsc": 0.9 - abs(step - 29) / 100,
                        "val_dice/cell": 0.7,
                        "val_loss/level_4": 0.3,
                    }
                writer.writerow({"epoch": step // 10, "step": step} | values)
    scores = {"val_mdsc": 0.9, "val_dice/cell": 0.7125}
    card = ModelCard(
        title="a", kind="muvit", levels=(1, 4), channels=1, parameters=1234, classes=("glass", "cell"), scores=scores
    )
    (folder / "best" / CARD).write_text(card.to_markdown())
    (folder / "pictures").mkdir()
    for name in ("epoch_0002.png", "epoch_0003.png", "worst_and_best.png"):
        Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "pictures" / name)
    slides = [{"name": "a", "confusion": [[6, 2], [0, 4]]}, {"name": "b", "confusion": [[4, 0], [0, 4]]}]
    known = {"class_names": ["glass", "cell"], "has_background": True, "ignore": [], "epoch": 2, "slides": slides}
    (folder / "validation.json").write_text(json.dumps(known))
    return folder


def test_the_page_of_a_run_shows_curves_scores_pictures_and_recipe(run):
    page = check(write_run_page(run, 75.0).read_text())
    assert page.text.count("Training run first") == 2  # title and headline
    assert "40 steps in 1 min 15 s. The best mDSC, 0.900, was reached after step 29." in page.text
    assert page.tags.count("svg") == 5 and "Learning rate" in page.text
    assert "cell 0.8889 0.800 to 1.000" in page.text and "glass 12 pixels 83.3% 16.7%" in page.text
    assert "Validation crops after epoch 3, whose weights were kept" in page.text and "1,234" in page.text
    assert "data: {train: <here>}" in page.text and environment()["torch"] in page.text
    assert page.tags.count("img") == 2 and "best/README.md" in page.links


def test_the_page_of_a_run_that_goes_on_is_loaded_again(run):
    live = LivePage(run)
    live.close()
    assert not (run / "index.html").exists()  # nothing was trained
    live.on_train_epoch_end(SimpleNamespace(is_global_zero=True, loggers=[]), None)
    text = (run / "index.html").read_text()
    assert '<meta http-equiv="refresh"' in text and "It goes on" in check(text).text
    live.close()
    text = (run / "index.html").read_text()
    assert "refresh" not in text and "It goes on" not in check(text).text


def test_the_page_of_models_side_by_side_shows_their_scores_so_far(run):
    write_run_page(run)
    live = LiveComparison(run.parent, "Two models", {"one": "first", "two": "later"})
    live.update([(40, 60), (0, 60)])
    page = run.parent / "index.html"
    nothing = LiveComparison(run.parent / "other", "Two models", {"one": "first"})
    nothing.update([(0, 60)])
    nothing.close()
    assert not (run.parent / "other").exists()  # which would not be one to go on with
    text = page.read_text()
    shown = check(text)
    assert '<meta http-equiv="refresh"' in text and "40 of 120 steps are done." in shown.text
    # the best of three validations was not the last
    assert "one 40 60 0.8 0.9" in shown.text and "two 0 60" in shown.text
    assert shown.links == ["first/index.html"] and shown.tags.count("svg") == 1
    live.update([(60, 60), (0, 60)])
    assert page.read_text() == text  # it is not written anew before browsers load it again
    live.close()
    text = page.read_text()
    assert "refresh" not in text and "60 of 120 steps are done." in check(text).text and "--resume" in text


def test_a_run_without_validation_or_pictures_has_a_page(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    page = check(write_run_page(tmp_path).read_text())
    assert "1 steps." in page.text and "img" not in page.tags and "svg" not in page.tags


def test_pages_of_others_are_kept(tmp_path, caplog):
    (tmp_path / "index.html").write_text("<p>mine</p>")
    (tmp_path / "recipe.yaml").write_text("")
    write_run_page(tmp_path)
    assert (tmp_path / "index.html").read_text() == "<p>mine</p>" and "is no report of muvit" not in caplog.text
    assert "no report of muvit, and kept as it is" in caplog.text
    write_page(tmp_path / "b.html", results_page("b", [], Image.new("L", (2, 2))))
    write_page(tmp_path / "b.html", results_page("c", [], Image.new("L", (2, 2))))
    assert check((tmp_path / "b.html").read_text()).text.startswith("c c")


def test_the_page_of_predictions_shows_each_slide_that_is_complete(tmp_path):
    labels = np.zeros((24, 40), np.uint8)
    labels[4:20, 4:20] = 1
    names, colors = {0: "glass", 1: "cell"}, {0: (0, 0, 0), 1: (200, 0, 0)}
    writer = PyramidWriter.create(
        tmp_path / "a.ome.zarr",
        shape=labels.shape,
        num_channels=1,
        dtype=np.uint8,
        kind="label",
        pixel_size_um=0.5,
        label_names=names,
        label_colors=colors,
    )
    writer.write((0, 0), labels[None])
    writer.finish()
    image = ArraySlide(np.full((3, 24, 40), 90, np.uint8), name="a")
    slides = {tmp_path / "a.ome.zarr": image, tmp_path / "unfinished.ome.zarr": image}
    page = check(write_prediction_page(tmp_path, slides, {"model": "runs/first"}).read_text(), scripts=2)
    assert "1 slide labelled." in page.text and "24 x 40 pixels, 0.5 x 0.5 um each" in page.text
    assert page.tags.count("img") == page.tags.count("article") == 1 and "runs/first" in page.text
    assert write_prediction_page(tmp_path / "none", {tmp_path / "none.ome.zarr": image}, {}) is None


def test_the_page_of_scores_has_classes_with_intervals_and_the_confusion():
    truth = np.zeros((8, 8), np.uint8)
    truth[:4] = 1
    pairs = []
    for number in range(3):
        predicted = truth.copy()
        predicted[0, : 2 * number] = 0
        pairs.append(tuple(ArraySlide(pixels, name=f"s{number}") for pixels in (predicted, truth)))
    result = evaluate_slides(pairs, 2, class_names=["glass", "cell"])
    bootstrap = BootstrapConfig(num_resamples=50)
    page = check(scores_page(result, bootstrap))
    low, high = result.intervals(bootstrap)["dice/cell"]
    assert f"cell {result.pooled.dice[1]:.4g} {low:.3f} to {high:.3f}" in page.text
    assert all(name in page.text for name in ("s0", "s1", "s2", "Confusion", "96 pixels"))
    alone = check(scores_page(evaluate_slides(pairs[:1], 2), bootstrap))
    assert "interval" not in alone.text.replace("Of the pixels", "")


def test_pages_tell_the_command_that_made_them(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/muvit", "study", "noise", "a b"])
    assert environment()["command"] == "muvit study noise 'a b'"
    monkeypatch.setattr("sys.argv", ["own_script.py"])
    assert "command" not in environment()


def test_shares_of_a_confusion_matrix_are_of_the_true_class():
    table = Checked(confusion_table(np.array([[3, 1], [0, 0]]), ["a", "b<"]))
    assert "a 4 pixels 75.0% 25.0% b< 0 pixels 0.0% 0.0%" in table.text


def test_curves_are_drawn_where_their_values_lie():
    chart = line_chart({"one": ([0, 10], [0, 1]), "two": ([0, 5, 10], [1, float("nan"), 1])}, xlabel="x", title="t")
    assert Checked(chart).tags.count("path") == 3  # the second is cut
    points = re.search(r'd="M([\d.]+) ([\d.]+) L([\d.]+) ([\d.]+)"', chart)
    x0, y0, x1, y1 = map(float, points.groups())
    assert (x0, y0, x1, y1) == (58, 280, 628, 12)
    assert line_chart({"none": ([1], [float("nan")])}, xlabel="x", title="t") == ""
    long = line_chart({"one": (list(range(5000)), [1.0] * 5000)}, xlabel="x", title="t")
    assert long.count(" L") <= 400 and "<text" in long


def test_long_tables_are_cut_and_numbers_that_do_not_exist_empty():
    table = Checked(rows_table([{"a<": "b", "n": float("nan"), "m": 0.123456}] * 600, "Said."))
    assert table.tags.count("tr") == 501 and "Said. 100 more rows are left out." in table.text
    assert "a< n m b 0.1235 b" in table.text
