import numpy as np
import pytest
import yaml
from array_slide import ArraySlide
from tiny_prediction import PREPROCESSING, make_model_and_image

from muvit.data.slides.open import open_slide
from muvit.errors import InputError
from muvit.inference.explain import explain_point
from muvit.models.segmenter import Segmenter
from muvit.models.trained import load_model
from muvit.pictures import OKABE_ITO
from muvit.viewer.nested import NestedViews, open_views


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("work")
    make_model_and_image(folder)
    return folder


def views_of(slide):
    return NestedViews(slide=slide, levels=(1, 4), size=(16, 16), cropping=PREPROCESSING)


def test_the_finest_view_is_centred_on_the_point_and_framed_in_the_coarse_one():
    pixels = np.zeros((1, 128, 128), np.uint8)
    pixels[:, 60:64, 80:84] = 255
    slide = ArraySlide(pixels, levels=(1, 4), pixel_size_um=(0.5, 0.5))
    drawn = views_of(slide).draw((62, 82), size=64)
    top = drawn.shape[0] - 64 - 12  # below the titles
    fine, coarse = (drawn[top : top + 64, x : x + 64] for x in (12, 12 + 64 + 12))
    middle = fine.astype(int).sum(-1)
    rows, columns = np.nonzero(middle[8:-8, 8:-8] > 600)
    assert abs(rows.mean() + 8 - 31.5) < 1 and abs(columns.mean() + 8 - 31.5) < 1
    assert (coarse == OKABE_ITO[0]).all(-1).sum() >= 50  # the frame of the finest view
    assert {level for level, _ in slide.windows} == {1, 4}


def test_outside_of_the_slide_nothing_is_shown():
    slide = ArraySlide(np.random.default_rng(0).integers(0, 256, (1, 90, 70), dtype=np.uint8), levels=(1, 4))
    views = views_of(slide)
    assert views.draw((90, 3)) is None and views.draw((-0.1, 3)) is None and not slide.windows
    assert views.draw((89.9, 0), size=32) is not None


def test_a_model_and_its_recipe_show_what_an_explanation_is_about(work, tmp_path):
    slide = open_slide(work / "image.ome.zarr")
    of_model = open_views(work / "model", slide)
    recipe = {
        "data": {"train": "train", "crop_size": 16, "batch_size": 2, "samples_per_epoch": 2},
        "model": {"kind": "muvit", "encoder": {"in_channels": 1, "levels": [1, 4]}, "num_classes": 3},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    of_recipe = open_views(tmp_path / "recipe.yaml", slide)
    np.testing.assert_array_equal(of_model.draw((40, 30), size=64), of_recipe.draw((40, 30), size=64))
    assert of_model.levels == of_recipe.levels == (1, 4)
    trained = load_model(work / "model", kind=Segmenter)
    bbox = explain_point(trained, slide, (40, 30), draws=1, device="cpu").bbox
    assert bbox[0].tolist() == [[32, 22], [48, 38]]
    volume = ArraySlide(np.zeros((1, 4, 90, 70), np.uint8), levels=(1, 4))
    with pytest.raises(InputError, match="spatial axes"):
        open_views(work / "model", volume)
