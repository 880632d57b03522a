from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from muvit.cli.compare import _variants as variants_of
from muvit.data.crops.placement import FreeViews
from muvit.data.sources.synthetic import prepare_synthetic
from muvit.data.synthetic.images import SyntheticConfig
from muvit.errors import InputError
from muvit.evaluation.comparison import compare
from muvit.evaluation.variants import PRESETS, preset, with_controls
from muvit.models.baselines import BaselineConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import kinds_of, plain
from muvit.models.segmenter import SegmenterConfig
from muvit.settings import make_settings
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.run_config import RunConfig

ROOT = Path(__file__).parents[2]


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
    with pytest.raises(InputError, match="model: expected kind muvit with several levels and true boxes"):
        with_controls(replace(recipe, model=model))


def test_every_preset_is_a_model_of_its_own_on_the_same_data(recipe):
    variants = {name: preset(recipe, name) for name in PRESETS}
    assert len({variant.slug for variant in variants.values()}) == len(PRESETS)
    networks = [str(variant.recipe.model) for variant in variants.values()]
    assert len(set(networks)) == len(networks)
    for variant in variants.values():
        is_coupled = variant.name.endswith("relay[1,4,8]")
        assert variant.recipe.data == replace(recipe.data, placement="concentric" if is_coupled else "nested")
        assert (variant.recipe.optim, variant.recipe.loss, variant.recipe.run) == (
            recipe.optim,
            recipe.loss,
            recipe.run,
        )
        network = variant.recipe.model
        assert network.num_classes == 3
        sees_all = "every level" in variant.description
        assert network.levels == ((1, 4, 8) if sees_all else (1,))


def test_views_that_are_free_stay_free_with_relay_tokens(recipe):
    data = replace(recipe.data, placement="free", free_views=FreeViews())
    assert preset(replace(recipe, data=data), "relay_swin").recipe.data == data


def test_no_preset_follows_from_another_network(recipe):
    with pytest.raises(InputError, match="model: expected kind muvit"):
        preset(preset(recipe, "unet").recipe, "muvit")


VARIANTS = sorted((ROOT / "benchmarks" / "models").glob("*.yaml"))


@pytest.mark.parametrize("file", VARIANTS, ids=lambda file: file.stem)
def test_the_variants_of_the_benchmarks_are_read(recipe, file):
    variants = variants_of(file, recipe)
    assert len({variant.slug for variant in variants}) == len(variants)
    for variant in variants:
        assert ("every level" in variant.description) == (len(variant.recipe.model.levels) > 1)
    if file.stem == "all":
        kinds = {variant.recipe.model.kind for variant in variants}
        assert kinds == {"relay", *kinds_of(BaselineConfig)}


@pytest.mark.long
def test_every_kind_of_model_trains_and_labels_side_by_side(tmp_path):
    """The variants of benchmarks/models/all.yaml on a replica of the Synthetic images, one step of each."""
    data = prepare_synthetic(
        tmp_path / "data", num_train=2, num_val=1, num_test=1, config=SyntheticConfig().at_size(512), workers=1
    )
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=8, dim=16, num_layers=3, heads=2)
    recipe = Recipe(
        data=DataConfig(
            train=str(data / "train"),
            crop_size=64,
            normalization={"kind": "range", "low": 0, "high": 160},
            samples_per_epoch=2,
            val_samples=2,
            batch_size=2,
            num_workers=0,
        ),
        model=SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(8, 8, 4, 4), stem_width=4),
        run=RunConfig(epochs=1, accelerator="cpu", progress=False, pictures=0),
    )
    variants = [preset(recipe, "muvit"), *variants_of(ROOT / "benchmarks" / "models" / "all.yaml", recipe)]
    results = compare(variants, data / "test", tmp_path / "out", title="", intro="", devices="cpu")
    assert [result.name for result in results] == [variant.name for variant in variants]
    assert all(0 <= result.mean_dice < 0.9 for result in results)
    assert (tmp_path / "out" / "index.html").is_file()


def test_an_unknown_preset_is_refused_with_the_known_ones(recipe):
    with pytest.raises(InputError, match=r"models: expected names out of muvit, finest, .*, got 'unett'"):
        preset(recipe, "unett")


def test_a_recipe_with_its_controls_survives_yaml(recipe):
    for name in PRESETS:
        variant = preset(recipe, name)
        again = yaml.safe_load(yaml.safe_dump(plain(asdict(variant.recipe))))
        assert make_settings(again, Recipe, subject=name) == variant.recipe
