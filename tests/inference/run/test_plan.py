import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from array_slide import ArraySlide

from muvit.data.crops.normalize import Percentile, Standardize
from muvit.data.crops.placement import FreeViews
from muvit.data.crops.preprocessing import Preprocessing
from muvit.errors import InputError
from muvit.inference.run.plan import LabelPlan, PredictOptions, differences, hash_model, upgrade_plan
from muvit.inference.run.planning import plan_labels
from muvit.inference.tiling.tiles import mask_runs
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Standardize(mean=(3.0,), std=(2.0,)),
    class_names=("background", "one"),
    class_colors=((0, 0, 0), (255, 0, 0)),
)


def model(seed=0, **changes):
    torch.manual_seed(seed)
    encoder = EncoderConfig(**{"in_channels": 1, "levels": (1, 4), "num_layers": 4, "dim": 16, "heads": 1} | changes)
    return Segmenter(SegmenterConfig(encoder=encoder, num_classes=2, decoder_widths=(4, 4, 4, 4), stem_width=4))


def slide(change=0, shape=(300, 500)):
    pixels = np.random.default_rng(0).integers(0, 200, (1, *shape), dtype=np.uint8)
    pixels[0, 152, 252] += change  # which the coarsest level shows
    return ArraySlide(pixels, levels=(1, 2, 4), pixel_size_um=(0.5, 0.5))


def plan(options=None, **changes):
    settings = replace(PREPROCESSING, **changes)
    return plan_labels(model(), slide(), settings, options or PredictOptions(), torch.device("cpu"))


def test_a_plan_is_plain_data_and_comes_back():
    options = PredictOptions(
        overlap=0.25,
        flips=(-1, -2),
        probabilities="uint8",
        entropy=True,
        tissue="bright",
        region="POLYGON ((0 0, 99 0, 0 99, 0 0))",
    )
    made = plan(options)
    content = json.loads(json.dumps(made.to_json()))
    back = LabelPlan.from_json(content)
    assert back == made
    assert back.to_json() == content
    assert differences(content, made.to_json()) == []
    assert set(made.stores) == {"labels", "probabilities", "entropy"}
    assert {spec.shard_shape(0) for spec in made.stores.values()} == {made.tiling.block_size}
    assert made.options.precision == "float32"
    assert made.tiling.overlap == (4, 4)


def test_differences_are_named():
    one, two = plan(PredictOptions(overlap=0.0)), plan(PredictOptions(overlap=4), padding="edge")
    lines = differences(one.to_json(), two.to_json())
    assert "options.overlap 0.0 then, 4 now" in lines
    assert "preprocessing.padding zero then, edge now" in lines
    assert not any(line.startswith(("image", "model", "stores")) for line in lines)


def test_where_the_image_lies_does_not_matter():
    content = plan().to_json()
    assert differences(content, content | {"image": content["image"] | {"path": "/elsewhere"}}) == []


def test_models_differ_by_weights_and_settings():
    first = hash_model(model())
    assert hash_model(model()) == first
    assert hash_model(model(seed=1))["sha256"] != first["sha256"]
    other = model(attention_mode="coarse_to_fine")
    other.load_state_dict(model().state_dict())
    assert hash_model(other)["sha256"] != first["sha256"]


def test_images_differ_by_pixels_and_sizes():
    first = slide().identify()
    assert slide().identify() == first
    assert slide(change=40).identify()["sha256"] != first["sha256"]
    assert slide(shape=(300, 501)).identify() != first


def test_tiles_without_tissue_or_outside_the_region_are_left_out():
    made = plan(PredictOptions(region="POLYGON ((0 0, 40 0, 40 20, 0 20, 0 0))", overlap=0.0))
    assert np.argwhere(made.tiling.computed).tolist() == [[y, x] for y in (0, 1) for x in (0, 1, 2)]
    assert made.tiling.runs == mask_runs(made.tiling.computed)
    assert sum(made.tiling.num_computed(i) for i in range(made.tiling.num_blocks)) == 6


@pytest.mark.parametrize("mask", [[[1, 1], [0, 1]], [[0, 0], [1, 0]], [[0, 0], [0, 0]], [[1, 1], [1, 1]]])
def test_runs_say_what_a_mask_says(mask):
    mask = np.array(mask, bool)
    runs = mask_runs(mask)
    assert (np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(2, 2) == mask).all()


def test_blocks_shrink_where_scores_of_many_classes_are_kept():
    def block(options, **changes):
        big = ArraySlide(np.broadcast_to(np.uint8(0), (1, 9000, 9000)), levels=(1, 4))
        return plan_labels(model(), big, PREPROCESSING, options, torch.device("cpu")).tiling.block_size

    assert block(PredictOptions()) == (4096, 4096)
    assert block(PredictOptions(overlap=0.5)) == (4096, 4096)
    assert block(PredictOptions(block_px=512)) == (512, 512)
    assert block(PredictOptions(block_px=100)) == (100, 100)
    with pytest.raises(InputError, match="block_px: expected a multiple of 256, or less, got 300"):
        block(PredictOptions(block_px=300))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap": -0.1}, "overlap: expected a number >= 0"),
        ({"overlap": 1.5}, "overlap: expected a fraction"),
        ({"overlap": 16}, "overlap: expected from 0 px to less than the crop"),
        ({"blend": "smooth"}, "blend: expected linear or cosine or uniform or center"),
        ({"flips": (1,)}, "flips: expected negative numbers"),
        ({"flips": (-3,)}, "flips: expected axes from -2 to -1"),
        ({"average": "labels"}, "average: expected"),
        ({"probabilities": "float64"}, "probabilities: expected uint8 or float16"),
        ({"tissue": "some"}, "tissue: expected"),
        ({"placement": "anywhere"}, "placement: expected auto or nested or concentric or grid or free"),
        ({"precision": "float16"}, "precision: expected"),
        ({"block_px": 0}, "block_px: expected a whole number >= 1"),
        ({"region": "somewhere"}, "region: expected well-known text"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        plan(PredictOptions(**options))


def test_plans_of_earlier_versions_are_read():
    made = plan()
    content = made.to_json()
    content["tiling"]["together"] = content["options"]["together"] = 2
    assert LabelPlan.from_json(content) == made


def test_options_are_all_recorded():
    assert set(plan().to_json()["options"]) == set(asdict(PredictOptions()))


@pytest.mark.parametrize(
    ("trained", "asked"),
    [("nested", "concentric"), ("concentric", "nested"), ("concentric", "grid"), ("free", "nested"), ("grid", "free")],
)
def test_a_placement_that_the_model_does_not_know_is_refused(trained, asked):
    with pytest.raises(InputError, match=rf"placement: expected auto or {trained}.*, as in training, got {asked}"):
        plan(PredictOptions(placement=asked), placement=trained)


@pytest.mark.parametrize("trained", ["nested", "concentric", "grid", "free"])
def test_tiles_are_placed_as_in_training(trained):
    made = plan(placement=trained)
    assert made.tiling.placement == made.options.placement == trained


@pytest.mark.parametrize(
    ("mode", "settings", "place"),
    [
        ("coarse_to_fine", {}, "grid"),
        ("all", {}, "nested"),
        ("coarse_to_fine", {"normalization": Percentile(scope="view")}, "grid"),
        ("coarse_to_fine", {"normalization": Percentile(scope="sample")}, "nested"),
        ("coarse_to_fine", {"placement": "free"}, "free"),
        ("coarse_to_fine", {"placement": "concentric"}, "concentric"),
    ],
)
def test_coarse_crops_are_shared_where_that_saves_work(mode, settings, place):
    made = plan_labels(
        model(attention_mode=mode), slide(), replace(PREPROCESSING, **settings), PredictOptions(), torch.device("cpu")
    )
    assert made.tiling.placement == made.options.placement == place


@pytest.mark.parametrize(("trained", "context"), [("nested", "centered"), ("grid", "grid"), ("free", "centered")])
def test_plans_in_an_older_spelling_are_read(trained, context):
    now = plan(placement=trained, free_views=FreeViews() if trained == "free" else None)
    older = now.to_json()
    for part in ("tiling", "options"):
        del older[part]["placement"]
        older[part]["context"] = context
    del older["preprocessing"]["placement"]
    older["preprocessing"]["context"] = "random"
    assert LabelPlan.from_json(older).tiling == now.tiling
    assert LabelPlan.from_json(older).options == now.options
    assert trained == "grid" or not differences(upgrade_plan(older), now.to_json())
