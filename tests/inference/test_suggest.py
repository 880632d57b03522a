import json

import numpy as np
import pytest
import shapely
import torch
from PIL import Image

from muvit.cli import main
from muvit.data.annotations.open import open_annotations
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.open import open_slide
from muvit.errors import InputError
from muvit.inference.suggest import suggest_regions
from muvit.inference.tiling.suggestions import SuggestConfig, write_suggestions
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel

FLAT, STRIPED, BRIGHT = np.s_[32:128, 32:128], np.s_[192:288, 192:288], np.s_[32:128, 192:288]
OPTIONS = {"region_px": 32, "spacing": 0}


class Grey(Segmenter):
    """Uncertain of what is half bright, and certain of what is dark or bright; its encoder is an ordinary one."""

    def label_logits(self, img, bbox=None):
        brightness = 40 * (img[:, 0, 0] - 0.5)
        return torch.stack([-brightness, brightness], dim=1)


def box_of(zone):
    rows, columns = zone
    return shapely.box(columns.start, rows.start, columns.stop, rows.stop)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=8, num_layers=3, dim=16, heads=1)
    preprocessing = Preprocessing(
        crop_size=(16, 16),
        normalization=Range(high=255),
        class_names=("dark", "bright"),
        class_colors=((0, 0, 0), (9, 9, 9)),
    )
    config = SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4, 4, 4), stem_width=4)
    return TrainedModel(model=Grey(config), preprocessing=preprocessing)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """Glass with an area of which the model knows nothing, one of which it knows little, and one that it knows."""
    pixels = np.zeros((320, 320), np.uint8)
    pixels[FLAT], pixels[STRIPED], pixels[BRIGHT] = 127, 127, 255
    pixels[192:288:8, 192:288] = 129
    pixels[192:288, 192:288:16] = 135
    file = tmp_path_factory.mktemp("slide") / "grey.png"
    Image.fromarray(pixels).save(file)
    return open_slide(file)


@pytest.fixture(scope="module")
def suggested(trained, slide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")

    def suggest(annotated=None, **changes):
        known = None if annotated is None else {slide.name: annotated}
        return suggest_regions(trained, [slide], folder, SuggestConfig(**OPTIONS | changes), annotated=known)

    return suggest


def test_regions_lie_where_the_model_is_uncertain_and_do_not_overlap(suggested):
    found = suggested(n=12)
    assert [one.rank for one in found] == list(range(1, 13))
    uncertain = shapely.union(box_of(FLAT), box_of(STRIPED))
    assert all(one.polygon.intersection(uncertain).area >= 0.5 * one.polygon.area for one in found)
    assert all(one.uncertainty > 0.4 for one in found) and found[0].uncertainty > 0.99
    overlap = [a.polygon.intersection(b.polygon).area for a in found for b in found if a is not b]
    assert max(overlap) == 0
    assert {one.polygon.area for one in found} == {32 * 32}


def test_regions_keep_their_distance_from_each_other_and_from_what_is_annotated(suggested):
    apart = suggested(n=20, spacing=1.0)
    assert len(apart) > 4  # as many as there are
    assert min(a.polygon.distance(b.polygon) for a in apart for b in apart if a is not b) >= 32
    known = box_of(FLAT)
    assert all(one.polygon.intersection(known).area == 0 for one in suggested(known, n=6))
    assert min(one.polygon.distance(known) for one in suggested(known, n=6, spacing=0.5)) >= 16
    assert max(one.uncertainty for one in suggested(known, n=6)) < 0.99


def test_diverse_regions_are_unlike_each_other(suggested):
    flat, striped = box_of(FLAT), box_of(STRIPED)
    alike = suggested(n=4, diversity=0)
    assert all(flat.contains(one.polygon) for one in alike)  # all nine of that area are the most uncertain ones
    diverse = suggested(n=4)
    assert flat.contains(diverse[0].polygon) and any(striped.intersects(one.polygon) for one in diverse)
    assert diverse[0].distance is None and diverse[1].distance > 0


def test_regions_hold_tissue(suggested, trained, slide, tmp_path):
    tissue = shapely.union_all([box_of(zone) for zone in (FLAT, STRIPED, BRIGHT)])
    found = suggested(n=100)
    assert 27 <= len(found) < 60
    assert all(one.polygon.intersection(tissue).area >= 0.1 * one.polygon.area for one in found)
    everywhere = suggest_regions(trained, [slide], tmp_path, SuggestConfig(**OPTIONS, n=100, tissue="all"))
    assert len(everywhere) > 60 and not all(one.polygon.intersects(tissue) for one in everywhere)
    volume = open_slide(slide.path)
    volume.axes = "zy"
    with pytest.raises(InputError, match="two-dimensional"):
        suggest_regions(trained, [volume], tmp_path)


def test_qupath_and_training_read_the_regions(suggested, slide, tmp_path):
    found = suggested(n=3)
    file = tmp_path / "grey.geojson"
    write_suggestions(found, slide, file)
    features = json.loads(file.read_text())["features"]
    assert [feature["properties"]["classification"]["name"] for feature in features] == ["Region*"] * 3
    measured = [feature["properties"]["measurements"] for feature in features]
    assert measured == [{"Rank": one.rank, "Uncertainty": round(one.uncertainty, 6)} for one in found]
    # an annotator draws into the first region; what lies outside of all three is ignored
    y0, x0, y1, x1 = found[0].box
    drawn = {"classification": {"name": "cell"}, "objectType": "annotation"}
    ring = [[x0, y0], [x0 + 8, y0], [x0 + 8, y0 + 8], [x0, y0 + 8], [x0, y0]]
    features.append({"type": "Feature", "properties": drawn, "geometry": {"type": "Polygon", "coordinates": [ring]}})
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    labels = open_annotations(file, slide).read(1, (0, 0), slide.shape)[0]
    assert (labels != 255).sum() == 3 * 32 * 32 and (labels == 1).sum() == 64
    assert (labels[int(y0) : int(y1), int(x0) : int(x1)] != 255).all()


def test_the_command_uses_predictions_that_are_there(trained, slide, tmp_path, capfd):
    encoder = trained.model.config.encoder
    plain = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4, 4, 4), stem_width=4))
    TrainedModel(model=plain, preprocessing=trained.preprocessing).save(tmp_path / "model")
    target = tmp_path / "regions.geojson"
    command = ["suggest", str(tmp_path / "model"), str(slide.path), "--n", "2", "--region_px", "64", "--device", "cpu"]
    assert main([*command, "--output", str(target)]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:2] == ["1", "grey"] and lines[2] == str(target)
    before = target.read_bytes()
    assert main([*command, "--output", str(target)]) == 1 and "exists" in capfd.readouterr().err
    (tmp_path / "predictions").rename(tmp_path / "kept")
    (tmp_path / "known").mkdir()
    folder, kept = ["--output", str(tmp_path / "next")], ["--predictions", str(tmp_path / "kept")]
    assert main([*command, *folder, *kept, "--annotated", str(tmp_path / "known")]) == 0
    assert (tmp_path / "next" / "grey.geojson").read_bytes() == before and not (tmp_path / "predictions").exists()
    target.rename(tmp_path / "known" / "grey.geojson")
    assert main([*command, *folder, *kept, "--annotated", str(tmp_path / "known"), "--overwrite"]) == 0
    assert (tmp_path / "next" / "grey.geojson").read_bytes() != before
