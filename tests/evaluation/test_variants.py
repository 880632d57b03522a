from dataclasses import asdict, replace

import pytest
import yaml

from muvit.data.crops.placement import FreeViews
from muvit.errors import InputError
from muvit.evaluation.variants import PRESETS, preset, with_controls
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import plain
from muvit.models.segmenter import SegmenterConfig
from muvit.settings import make_settings
from muvit.training.recipes import DataConfig, Recipe


@pytest.fixture
def recipe():
    encoder = EncoderConfig(in_channels=1, levels=(1, 4, 8), dim=32, num_layers=3, heads=2)
    return Recipe(data=DataConfig(train="nowhere"), model=SegmenterConfig(encoder=encoder, num_classes=3))


def test_controls_differ_from_the_model_in_one_thing_each(recipe):
    ours, single, naive = with_controls(recipe)
    assert [v.name for v in (ours, single, naive)] == ["MuViT[1,4,8]", "MuViT[1]", "MuViT[1,4,8] naive boxes"]
    assert ours.recipe == recipe
    one_level = replace(recipe.model.encoder, levels=(1,))
    assert single.recipe == replace(recipe, model=replace(recipe.model, encoder=one_level))
    assert naive.recipe == replace(recipe, model=replace(recipe.model, boxes="naive"))


def test_names_become_distinct_folder_names(recipe):
    assert [v.slug for v in with_controls(recipe)] == ["muvit_1_4_8", "muvit_1", "muvit_1_4_8_naive_boxes"]


@pytest.mark.parametrize("spoil", ["levels", "boxes"])
def test_a_model_that_is_a_control_itself_is_refused(recipe, spoil):
    one_level = replace(recipe.model.encoder, levels=(1,))
    model = replace(recipe.model, **({"encoder": one_level} if spoil == "levels" else {"boxes": "naive"}))
    with pytest.raises(InputError, match="model: expected several levels and true boxes"):
        with_controls(replace(recipe, model=model))


def test_every_preset_is_a_model_of_its_own_on_the_same_data(recipe):
    variants = {name: preset(recipe, name) for name in PRESETS}
    assert len({variant.slug for variant in variants.values()}) == len(PRESETS)
    networks = [str(variant.recipe.network) for variant in variants.values()]
    assert len(set(networks)) == len(networks)
    for variant in variants.values():
        is_coupled = variant.name.endswith("relay[1,4,8]")
        assert variant.recipe.data == replace(recipe.data, placement="concentric" if is_coupled else "nested")
        assert (variant.recipe.optim, variant.recipe.loss, variant.recipe.run) == (
            recipe.optim,
            recipe.loss,
            recipe.run,
        )
        network = variant.recipe.network
        assert network.num_classes == 3
        sees_all = "every level" in variant.description
        levels = network.encoder.levels if isinstance(network, SegmenterConfig) else network.levels
        assert levels == ((1, 4, 8) if sees_all else (1,))


def test_views_that_are_free_stay_free_with_relay_tokens(recipe):
    data = replace(recipe.data, placement="free", free_views=FreeViews())
    assert preset(replace(recipe, data=data), "relay_swin").recipe.data == data


def test_a_preset_takes_the_place_of_another_network(recipe):
    unet = preset(recipe, "unet").recipe
    assert preset(unet, "muvit").recipe == recipe
    assert preset(unet, "relay_vit").recipe.baseline is None


def test_an_unknown_preset_is_refused_with_the_known_ones(recipe):
    with pytest.raises(InputError, match=r"models: expected names out of muvit, finest, .*, got 'unett'"):
        preset(recipe, "unett")


def test_a_recipe_with_its_controls_survives_yaml(recipe):
    for variant in with_controls(recipe):
        again = yaml.safe_load(yaml.safe_dump(plain(asdict(variant.recipe))))
        assert make_settings(again, Recipe, subject="recipe") == variant.recipe
