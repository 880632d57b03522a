"""The commands in the scripts for QuPath, run as it would run them, on files as it would write them."""

import re
import uuid
from pathlib import Path

import numpy as np
import orjson
import pytest
import torch
from PIL import Image

from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel

SCRIPTS = Path(__file__).parents[2] / "examples" / "qupath"


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qupath")
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=2, num_layers=1, dim=16, heads=2)
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(8, 4), stem_width=4))
    colors = ((0, 0, 0), (200, 0, 0))
    preprocessing = Preprocessing(
        crop_size=(16, 16), normalization=Range(high=255), class_names=("background", "cell"), class_colors=colors
    )
    TrainedModel(model=model, preprocessing=preprocessing).save(folder / "model")
    noise = np.random.default_rng(0).integers(0, 256, (64, 80), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "slide.tif")
    return folder


def as_list(text, names):
    """A list of a script, with variables replaced."""
    words = re.findall(r"'([^']*)'|(\w+)", text)
    return [literal or str(names[variable]) for literal, variable in words]


def test_the_commands_of_predict_label_the_selection(work, capfd):
    script = (SCRIPTS / "predict.groovy").read_text()
    names = {
        "muvit": "muvit",
        "model": work / "model",
        "slide": work / "slide.tif",
        "predictions": work / "predictions",
        "labels": work / "predictions" / "slide.ome.zarr",
        "exported": work / "export",
        "region": work / "region.geojson",
    }
    ring = [[8, 8], [40, 8], [40, 40], [8, 40], [8, 8]]
    feature = {
        "type": "Feature",
        "id": str(uuid.uuid4()),
        "geometry": {"type": "Polygon", "coordinates": [ring]},
        "properties": {"objectType": "annotation", "classification": {"name": "Tumor", "color": [200, 0, 0]}},
    }
    (work / "region.geojson").write_bytes(orjson.dumps({"type": "FeatureCollection", "features": [feature]}))
    options = {name: as_list(text, names) for name, text in re.findall(r"def (\w+Options) = \[(.*)\]", script)}
    options["predictOptions"] += as_list(re.search(r"predictOptions \+= \[(.*)\]", script)[1], names)
    commands = re.findall(r"^call\(\[(.*)\] \+ (\w+)\)$", script, re.M)
    assert [as_list(text, names)[1] for text, _ in commands] == ["predict", "export"]
    for text, more in commands:
        program, *arguments = as_list(text, names) + options[more]
        assert program == "muvit"
        if arguments[0] == "export":  # the slide states no pixel size
            arguments += ["--pixel_size_um", "0.5"]
        assert main(arguments) == 0, capfd.readouterr().err
    assert "'export', " in script and "name + '.geojson'" in script
    found = orjson.loads((work / "export" / "slide.geojson").read_bytes())["features"]
    assert all({"Area µm^2", "Perimeter µm", "Circularity"} <= set(f["properties"]["measurements"]) for f in found)
    assert all("Probability cell" in f["properties"]["measurements"] for f in found)


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.groovy")), ids=lambda file: file.stem)
def test_scripts_name_files_as_the_commands_do(script):
    from muvit.data.slides.formats import slide_name

    text = script.read_text()
    assert all(text.count(a) == text.count(b) for a, b in ("()", "[]", "{}"))
    pattern = re.search(r"replaceFirst\(/(.+?)/, ''\)", text)[1]
    for name in ("a.svs", "b.c.ndpi", "d.ome.tif", "E.OME.TIFF", "f.ome.zarr"):
        assert re.sub(pattern, "", name, count=1) == slide_name(Path(name))
