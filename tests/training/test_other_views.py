"""From a drawn data set to scores: volumes with levels per axis, and views that are not nested."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from muvit.data.crops.placement import FreeViews
from muvit.data.folders import open_labelled_folder
from muvit.data.slides.open import open_slide
from muvit.data.synthetic.free import LegendConfig, write_legend
from muvit.data.synthetic.volumes import VolumeConfig, write_volumes
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.inference.predict import predict_slide
from muvit.models.trained import load_model
from muvit.settings import read_settings
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe

RECIPES = Path(__file__).parents[2] / "recipes"


def tiny(name, data):
    """A recipe with a small model on small data, two steps long."""
    recipe = read_settings(RECIPES / name, Recipe)
    encoder = replace(recipe.model.encoder, num_layers=2, dim=24)
    return replace(
        recipe,
        data=replace(recipe.data, train=str(data / "train"), val=str(data / "val"), samples_per_epoch=4, batch_size=2),
        model=replace(recipe.model, encoder=encoder, decoder_widths=(8, 8, 8), stem_width=4),
        run=replace(recipe.run, epochs=1, accelerator="cpu", progress=False, pictures=1),
    )


def assert_predicts(model_folder, data, output):
    trained = load_model(model_folder)
    model, preprocessing = trained.model, trained.preprocessing
    ((image, label),) = open_labelled_folder(data / "val")
    prediction = open_slide(predict_slide(model, image, output, preprocessing))
    assert prediction.shape == image.shape
    assert prediction.pixel_size_um == image.pixel_size_um
    evaluation = evaluate_slides([(prediction, label)], model.num_classes)
    assert evaluation.confusion.sum() == np.prod(image.shape)
    return model, preprocessing


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    config = VolumeConfig(size_px=(16, 40, 64), territory_lattices_px=(32.0, 16.0))
    return write_volumes(tmp_path_factory.mktemp("volumes") / "data", num_train=1, num_val=1, num_test=0, config=config)


@pytest.mark.parametrize(
    "settings", [{}, {"decoder": "mask2former", "num_queries": 4, "query_heads": 1}, {"decode": "all"}]
)
def test_volumes_are_trained_on_labelled_and_scored(settings, volumes, tmp_path):
    recipe = tiny("synthetic_volumes.yaml", volumes)
    labels = "all" if settings.get("decode") == "all" else "finest"
    recipe = replace(recipe, model=replace(recipe.model, **settings), data=replace(recipe.data, label_levels=labels))
    model, preprocessing = assert_predicts(train_segmenter(recipe, tmp_path / "run"), volumes, tmp_path / "p.ome.zarr")
    assert model.views.levels == (1, (2.0, 4.0, 4.0))
    assert preprocessing.crop_size == (8, 32, 32)
    assert list((tmp_path / "run" / "pictures").iterdir())


def test_free_views_are_trained_on_labelled_and_scored(tmp_path):
    config = LegendConfig(size_px=(240, 300), margin_px=80)
    data = write_legend(tmp_path / "data", num_train=1, num_val=1, num_test=0, config=config)
    recipe = tiny("synthetic_free.yaml", data)
    _, preprocessing = assert_predicts(train_segmenter(recipe, tmp_path / "run"), data, tmp_path / "p.ome.zarr")
    assert preprocessing.free_views == FreeViews(offset_px=((-448, -448), (-48, 48)))
