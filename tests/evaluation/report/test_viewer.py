"""Slides in a page: their tiles, and that they can be moved, zoomed and switched in a browser."""

import base64
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from array_slide import ArraySlide
from PIL import Image

from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.evaluation.report.runs import write_prediction_page
from muvit.evaluation.report.viewer import TILE_PX, color_index, render_viewer
from muvit.inference.export.labelled import LabelledImage
from muvit.pictures import MAX_COLORS

RED, BLUE = (255, 0, 0), (0, 0, 255)


def write_labels(path, labels, pixel_size_um):
    names, colors = {1: "left", 2: "</script>right"}, {1: RED, 2: BLUE}
    writer = PyramidWriter.create(
        path,
        shape=labels.shape,
        num_channels=1,
        dtype=np.uint8,
        kind="label",
        pixel_size_um=pixel_size_um,
        label_names=names,
        label_colors=colors,
    )
    writer.write((0, 0), labels[None])
    writer.finish()
    return open_slide(path)


def spec_of(html):
    return json.loads(re.search(r'<script type="application/json">(.*?)</script>', html, re.DOTALL)[1])


def pixels_of(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


@pytest.fixture
def slides(tmp_path):
    """An image of 1000 x 2000 pixels, and labels with pixels of twice the size: one class on either side."""
    labels = np.ones((500, 1000), np.uint8)
    labels[:, 500:] = 2
    pixels = np.broadcast_to(np.linspace(40, 200, 1000)[:, None], (1000, 2000)).astype(np.uint8)
    image = ArraySlide(pixels, levels=(1, 2, 4), name="a", pixel_size_um=(0.25, 0.25))
    return image, write_labels(tmp_path / "a.ome.zarr", labels, 0.5)


def test_tiles_hold_the_pixels_of_their_places(slides, tmp_path):
    image, labels = slides
    spec = spec_of(render_viewer(tmp_path, LabelledImage(labels=labels, image=image)))
    assert spec["size"] == [2000, 1000] and spec["um"] == 0.25 and spec["listed"][0] == 1
    shown, drawn = spec["layers"]
    assert [level["size"] for level in shown["levels"]] == [[500, 250], [1000, 500], [2000, 1000]]
    assert [level["pixel"] for level in drawn["levels"]] == [[4, 4], [2, 2]]
    assert list(shown["inside"]) == list(drawn["inside"]) == ["0/0_0"]  # the others are files
    first = pixels_of(drawn["inside"]["0/0_0"])
    assert (first[:, :250] == 1).all() and (first[:, 250:] == 2).all()
    tile = np.asarray(Image.open(tmp_path / drawn["path"] / "1/0_1.png"))
    assert tile.shape == (500, 1000 - TILE_PX) and (tile == 2).all()
    one = np.asarray(Image.open(tmp_path / shown["path"] / "2/1_3.jpg").convert("L"))
    assert one.shape == (1000 - TILE_PX, 2000 - 3 * TILE_PX)
    # one contrast for all tiles: 1st and 99.8th percentile of a ramp
    assert abs(int(one[0].mean()) - 255 * (TILE_PX / 1000 - 0.01) / 0.988) < 4
    assert len(list((tmp_path / "tiles").rglob("*.*g"))) == 2 + 8 + 2


def test_a_small_slide_is_inside_the_page_and_a_large_one_is_shown_as_finely_as_asked(slides, tmp_path):
    image, labels = slides
    spec = spec_of(render_viewer(tmp_path / "b", LabelledImage(labels=labels)))  # 500 x 1000
    assert list(spec["layers"][0]["inside"]) == ["0/0_0", "1/0_0", "1/0_1"] and not (tmp_path / "b").exists()
    spec = spec_of(render_viewer(tmp_path, LabelledImage(labels=labels, image=image), view_px=1000))
    assert [level["size"] for level in spec["layers"][0]["levels"]] == [[500, 250], [1000, 500]]


def test_values_beyond_the_colours_have_the_colour_of_their_place(slides):
    source = LabelledImage(labels=slides[1])
    values = np.array([0, 1, 255, 258, 513, 70000])
    assert [source.class_color(int(value)) for value in values] == [
        source.class_color(int(index)) for index in color_index(values)
    ]
    assert color_index(values).max() < MAX_COLORS


def open_in_browser(page, profile, *arguments):
    """Standard output of Chromium, which must have nothing to say about the page."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        pytest.fail(f"this test needs a browser in PATH, one of {', '.join(names)}; as in: apt-get install chromium")
    quiet = "quic first-run background-networking component-update sync gpu"
    flags = ["--no-first-run", *(f"--disable-{name}" for name in quiet.split() if name != "first-run")]
    run = subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", *flags, f"--user-data-dir={profile}", "--hide-scrollbars"),
            *("--window-size=1200,1000", "--virtual-time-budget=4000", "--enable-logging=stderr", "--v=0"),
            *(*arguments, page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    assert "CONSOLE" not in run.stderr, run.stderr
    return run.stdout


def read_stage(page, tmp_path, script):
    """Middle of the slide in slide pixels with the scale, text of the scale bar, and colours 50 px from its middle."""
    text = page.read_text().replace(
        "</body>",
        f"""<script>
const stage = document.querySelector(".stage"), box = stage.getBoundingClientRect();
{script}
document.body.dataset.box = [box.left, box.top, box.width, box.height].join(" ");
</script></body>""",
    )
    changed = page.with_name("changed.html")
    changed.write_text(text)
    dom = open_in_browser(changed, tmp_path / "profile", "--dump-dom")
    open_in_browser(changed, tmp_path / "profile", f"--screenshot={tmp_path / 'shot.png'}")
    left, top, width, height = map(float, re.search(r'data-box="([^"]+)"', dom)[1].split())
    pixels = np.asarray(Image.open(tmp_path / "shot.png").convert("RGB"))
    row = round(top + height / 2)
    colors = [pixels[row, round(left + width / 2 + dx)] for dx in (-50, 50)]
    view = [float(value) for value in re.search(r'data-view="([^"]+)"', dom)[1].split()]
    return view, re.search(r'class="scale"[^>]*>([^<]*)<', dom)[1], colors


@pytest.mark.long
def test_a_slide_can_be_moved_zoomed_and_its_classes_switched_in_a_browser(slides, tmp_path):
    image, labels = slides
    page = write_prediction_page(tmp_path, {labels.path: image}, {})
    (x, y, scale), bar, (left, right) = read_stage(page, tmp_path, "")
    assert (x, y) == (1000, 500)
    assert 0.4 < scale < 0.6  # the whole slide
    assert bar == "50 \u00b5m"
    assert left[0] > left[2] + 100 and right[2] > right[0] + 100  # red and blue, half transparent
    assert left[1] > 40 and abs(int(left[1]) - int(right[1])) < 4  # over the grey of the image
    script = """
stage.focus({preventScroll: true});
const options = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2, bubbles: true, cancelable: true};
for (let i = 0; i < 3; i++) stage.dispatchEvent(new WheelEvent("wheel", {...options, deltaY: -240}));
stage.dispatchEvent(new PointerEvent("pointerdown", {...options, pointerId: 1}));
stage.dispatchEvent(new PointerEvent("pointermove", {...options, pointerId: 1, clientX: options.clientX + 80}));
stage.dispatchEvent(new PointerEvent("pointerup", {...options, pointerId: 1}));
stage.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowDown", bubbles: true}));
const press = {key: "ArrowRight", bubbles: true, cancelable: true};
stage.dispatchEvent(new KeyboardEvent("keydown", press));
document.querySelector("input[type=checkbox]").click();
const range = document.querySelector("input[type=range]");
range.value = 1;
range.dispatchEvent(new Event("input"));
"""
    (x, y, zoomed), bar, (left, right) = read_stage(page, tmp_path, script)
    assert zoomed == pytest.approx(8 * scale, rel=1e-3) and bar == "5 \u00b5m"
    assert x == pytest.approx(1000, abs=2.5)  # the drag and the arrow undo each other
    # browsers round the places of pointers to pixels of the screen, which are larger before zooming
    assert y == pytest.approx(500 + 80 / zoomed, abs=2.5)
    assert len(set(left.tolist())) == 1 and 80 < left[0] < 180  # the first class is off
    assert right.tolist() == list(BLUE)
