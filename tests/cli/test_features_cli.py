import csv

import numpy as np
import pytest

from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.encoders import MuViTEncoder2d
from muvit.mae import MuViTMAE2d
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

SIZES = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "dim": 16, "num_layers": 2, "heads": 2}
SETTINGS = Preprocessing(crop_size=(16, 16), normalization=Range(high=255), class_names=(), class_colors=())


@pytest.fixture
def image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (1, 40, 50), dtype=np.uint8)
    writer = PyramidWriter.create(
        tmp_path / "image.ome.zarr", shape=(40, 50), num_channels=1, dtype=np.uint8, levels=(1,), chunk=32, shard=64
    )
    writer.write((0, 0), pixels)
    writer.finish()
    return tmp_path / "image.ome.zarr"


def segmenter(**changes):
    return Segmenter(
        SegmenterConfig(
            encoder=EncoderConfig(**SIZES), num_classes=3, decoder_widths=(8, 8, 4), stem_width=4, **changes
        )
    )


MODELS = {
    "encoder": lambda: MuViTEncoder2d(**SIZES),
    "autoencoder": lambda: MuViTMAE2d(**SIZES, dim_decoder=16, num_layers_decoder=1),
    "segmenter": segmenter,
}


@pytest.mark.parametrize("kind", MODELS)
def test_features_of_any_model_with_an_encoder(tmp_path, image, kind, capsys):
    MODELS[kind]().save(tmp_path / "model", extra_files={FILE: SETTINGS.to_yaml()})
    output = tmp_path / "features.zarr"
    command = ["features", str(tmp_path / "model"), str(image), "--output", str(output), "--levels", "[4]"]
    assert main(command) == 0  # level 4 is not stored, but computed
    assert capsys.readouterr().out.strip() == str(output)
    assert OmeZarrSlide(output / "level_4").shape == (3, 4)
    with (output / "pooled.csv").open() as file:
        assert len(list(csv.reader(file))) == 2
    assert main([*command, "--dtype", "float32"]) == 1
    assert "exists" in capsys.readouterr().err
    assert main([*command, "--dtype", "float32", "--overwrite"]) == 0


def test_a_model_without_settings_borrows_those_of_another(tmp_path, image, capsys):
    MODELS["encoder"]().save(tmp_path / "model")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / FILE).write_text(SETTINGS.to_yaml())
    command = ["features", str(tmp_path / "model"), str(image), "--output", str(tmp_path / "features.zarr")]
    assert main(command) == 1
    assert FILE in capsys.readouterr().err
    assert main([*command, "--preprocessing", str(tmp_path / "other")]) == 0


def test_a_model_that_never_knew_where_its_views_lie_is_refused(tmp_path, image, capsys):
    segmenter(boxes="naive").save(tmp_path / "model", extra_files={FILE: SETTINGS.to_yaml()})
    assert main(["features", str(tmp_path / "model"), str(image), "--output", str(tmp_path / "features.zarr")]) == 1
    assert "naive boxes" in capsys.readouterr().err


def test_all_slides_of_a_folder_are_encoded(tmp_path, image, capsys):
    MODELS["encoder"]().save(tmp_path / "model", extra_files={FILE: SETTINGS.to_yaml()})
    (tmp_path / "images").mkdir()
    for name in "ab":
        (tmp_path / "images" / f"{name}.ome.zarr").symlink_to(image)
    command = ["features", str(tmp_path / "model"), str(tmp_path / "images"), "--output"]
    assert main([*command, str(tmp_path / "all.zarr")]) == 1
    assert "--output: expected a folder, for several images" in capsys.readouterr().err
    assert main([*command, str(tmp_path / "all")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "all" / f"{name}.zarr") for name in "ab"]
    assert OmeZarrSlide(tmp_path / "all" / "b.zarr" / "level_4").shape == (3, 4)


def test_slides_that_do_not_fit_are_named_before_any_is_encoded(tmp_path, image, capsys):
    MODELS["encoder"]().save(tmp_path / "model", extra_files={FILE: SETTINGS.to_yaml()})
    (tmp_path / "empty.ome.zarr").mkdir()
    slides = [str(image), str(tmp_path / "empty.ome.zarr")]
    assert main(["features", str(tmp_path / "model"), *slides, "--output", str(tmp_path / "all")]) == 1
    error = capsys.readouterr().err
    assert "slides: expected 2 that can be encoded, got 1 that failed: empty." in error
    assert not (tmp_path / "all").exists()
