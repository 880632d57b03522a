import base64
import io
import json
import os
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml
from PIL import Image

from muvit.cli import main
from muvit.cli.demo import recipe
from muvit.data.folders import open_folder, open_labelled_folder
from muvit.evaluation.report.content import ModelResult
from muvit.metrics import confusion_matrix, scores

MODELS = {"MuViT[1,8]": "muvit_1_8", "MuViT[1]": "muvit_1", "MuViT[1,8] naive boxes": "muvit_1_8_naive_boxes"}


class Sources(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "demo"
    # the processes that it starts have one thread each
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        assert main(["demo", "--quick", "--output", str(output)]) == 0
    finally:
        os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)
    return output


@pytest.mark.long
def test_the_quick_demo_goes_the_whole_way(demo):
    metrics = json.loads((demo / "metrics.json").read_text())
    assert list(metrics) == list(MODELS)
    pairs = open_labelled_folder(demo / "data" / "test")
    assert len(pairs) == 2
    for name, slug in MODELS.items():
        labels = open_folder(demo / "predictions" / slug)
        assert list(labels) == [image.name for image, _ in pairs]
        confusion = np.zeros((3, 3), np.int64)
        for image, truth in pairs:
            guess = labels[image.name]
            assert guess.shape == image.shape
            assert guess.label_names == {0: "background", 1: "outer cell", 2: "inner cell"}
            pixels = [slide.read(1, (0, 0), slide.shape)[0] for slide in (truth, guess)]
            confusion += confusion_matrix(*pixels, 3)
        assert metrics[name]["confusion"] == confusion.tolist()
        assert metrics[name]["pooled"]["mean_dice"] == pytest.approx(scores(confusion).mean_dice)
        assert metrics[name]["pooled"]["mean_dice"] > 0.1  # it finds cells, so that its pictures have colours
    sizes = [metrics[name]["parameters"] for name in MODELS]
    assert sizes[0] == sizes[2] > sizes[1]

    page = Sources((demo / "index.html").read_text())
    pictures = [source.partition(",")[2] for source in page.found]
    assert all(source.startswith("data:image/png;base64,") for source in page.found)
    assert len(pictures) >= 2 * 5  # input, truth and three models of two slides
    with Image.open(io.BytesIO(base64.b64decode(pictures[0]))) as picture:
        assert np.asarray(picture).std() > 0
    text = " ".join(" ".join(page.words).split())
    for name in MODELS:
        assert name in text
        assert f"{metrics[name]['pooled']['mean_dice']:.3f}" in text
    for slug in MODELS.values():
        assert f"predictions/{slug}/{pairs[0][0].name}.ome.zarr" in text

    controls = {slug: yaml.safe_load((demo / "runs" / slug / "recipe.yaml").read_text()) for slug in MODELS.values()}
    assert controls["muvit_1"]["model"]["encoder"]["levels"] == [1]
    assert controls["muvit_1_8_naive_boxes"]["model"]["boxes"] == "naive"
    for slug, settings in controls.items():
        assert settings["optim"] == controls["muvit_1_8"]["optim"]
        assert settings["data"] == controls["muvit_1_8"]["data"]
        assert {"best", "last", "pictures", "logs"} <= {f.name for f in (demo / "runs" / slug).iterdir()}


@pytest.mark.long
def test_a_demo_is_not_overwritten(demo, capfd):
    before = (demo / "index.html").read_bytes()
    assert main(["demo", "--quick", "--output", str(demo)]) == 1
    assert "exists already and is not overwritten" in capfd.readouterr().err
    assert (demo / "index.html").read_bytes() == before


@pytest.mark.long
def test_a_demo_that_was_stopped_goes_on_with_its_images(demo, monkeypatch, capfd):
    record, passed = demo / "data" / "synthetic.json", {}
    before = record.stat().st_mtime_ns
    result = ModelResult(name="one", description="", dice={"cell": 0.5}, mean_dice=0.5, seconds=1, parameters=1)
    monkeypatch.setattr("muvit.evaluation.comparison.compare", lambda *_, **options: passed.update(options) or [result])
    assert main(["demo", "--quick", "--resume", "--devices", "cpu", "--output", str(demo)]) == 0
    assert (passed["resume"], passed["overwrite"], passed["devices"]) == (True, False, "cpu")
    assert record.stat().st_mtime_ns == before
    assert "one reaches an mDSC of 0.500. There is no control" in capfd.readouterr().out


def test_the_whole_demo_trains_the_same_models_for_longer(tmp_path):
    whole, quick = recipe(tmp_path), recipe(tmp_path, quick=True)
    assert whole.model == quick.model
    assert (whole.optim, whole.loss) == (quick.optim, quick.loss)
    steps = [r.run.epochs * (r.data.samples_per_epoch // r.data.batch_size) for r in (whole, quick)]
    assert steps[0] > 8 * steps[1]
