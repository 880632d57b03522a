import json

import numpy as np
import pytest

from muvit.cli import main
from muvit.data.pyramids.writer import PyramidWriter

LABELS = np.repeat(np.arange(3, dtype=np.uint8), 8)[None].repeat(16, axis=0)


def write(file, pixels=LABELS, **options):
    pixels = pixels[None] if pixels.ndim == 2 else pixels
    writer = PyramidWriter.create(
        file, shape=pixels.shape[1:], num_channels=len(pixels), dtype=pixels.dtype, levels=(1,), **options
    )
    writer.write((0, 0), pixels)
    writer.finish()


@pytest.mark.parametrize("is_road", [True, False])
def test_true_labels_say_whether_class_0_is_background(tmp_path, capsys, is_road):
    names = {0: "road", 1: "car", 2: "sky"}
    write(tmp_path / "truth" / "a.ome.zarr", kind="label", label_names=names, has_background=not is_road)
    # a prediction from elsewhere, which says nothing, beside outputs that are no labels
    write(tmp_path / "predictions" / "a.ome.zarr", np.where(LABELS == 2, 0, LABELS).astype(np.uint8), kind="label")
    write(tmp_path / "predictions" / "a.probabilities.ome.zarr", np.zeros((3, *LABELS.shape), np.uint8))
    write(tmp_path / "predictions" / "a.entropy.ome.zarr", np.zeros(LABELS.shape, np.float16))
    argv = ["evaluate", tmp_path / "predictions", tmp_path / "truth", "--output", tmp_path / "scores.json"]
    argv += ["--levels", "[8]"]  # the fields are 8 pixels wide
    assert main([str(argument) for argument in argv]) == 0
    result = json.loads((tmp_path / "scores.json").read_text())
    assert list(result["slides"]) == ["a"] and result["has_background"] is not is_road
    dice = {"road": 2 * 8 / (16 + 8), "car": 1.0, "sky": 0.0}
    assert result["pooled"]["dice"] == result["pooled"]["dice_level_8"] == pytest.approx(dice)
    assert "\nlevel  " in capsys.readouterr().out
    scored = list(dice.values())[0 if is_road else 1 :]
    assert result["pooled"]["mean_dice"] == pytest.approx(np.mean(scored))
