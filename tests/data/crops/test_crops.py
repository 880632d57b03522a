import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_slide import MemorySlide, label_slide, world_slide
from torch.utils.data import DataLoader

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.balance import EpochSampler
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.preprocessing import CropConfig
from muvit.errors import InputError
from muvit.geometry import check_boxes, is_inside, patch_centers
from muvit.labels import IGNORE

LEVELS = (1, 4, 8)
AS_STORED = Range(0, 1)
CONFIG = CropConfig(levels=LEVELS, size=(16, 24), normalization=AS_STORED, num_classes=251)


def place_label(y, x):
    """A label that changes from pixel to pixel, so that only the true place gives it."""
    return (31 * y + 17 * x) % 251


def place_labels(shape, name="label"):
    return label_slide(place_label(*np.indices(shape)).astype(np.uint8), name=name)


def world_slides(*shapes):
    return [
        (world_slide(shape, LEVELS, f"image {i}"), place_labels(shape, f"label {i}")) for i, shape in enumerate(shapes)
    ]


def pixel_centers(sample):
    """World coordinates of all pixels by their boxes, ``(L, ndim, *space)``."""
    space = sample["img"].shape[2:]
    return patch_centers(sample["bbox"], space).reshape(-1, *space, len(space)).movedim(-1, 1)


def assert_boxes_tell_the_pixels(sample, shape, padding="zero"):
    """The world slide holds coordinates, so the boxes must foretell every pixel and label of the sample."""
    centers = pixel_centers(sample)
    for view, place, level in zip(sample["img"], centers, LEVELS, strict=True):
        ends = torch.tensor([-(-n // level) * level for n in shape]).view(-1, *(1,) * len(shape))
        inside = ((place > 0) & (place < ends)).all(0)
        nearest = torch.minimum(place.clamp(min=level / 2), ends - level / 2)
        assert torch.equal(view, place * inside if padding == "zero" else nearest)
    pixel = centers[0].floor().long()
    inside = ((pixel >= 0) & (pixel < torch.tensor(shape).view(-1, 1, 1))).all(0)
    assert torch.equal(sample["label"], torch.where(inside, place_label(*pixel), IGNORE))


@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 400), st.integers(1, 400)),
    index=st.integers(0, 10**9),
    padding=st.sampled_from(["zero", "edge"]),
)
def test_boxes_tell_every_pixel_at_every_level_and_in_the_padding(shape, index, padding):
    dataset = NestedCrops(world_slides(shape), replace(CONFIG, padding=padding))
    sample = dataset[index]
    assert_boxes_tell_the_pixels(sample, shape, padding)
    assert is_inside(sample["bbox"][:-1], sample["bbox"][1:]).all()
    assert {key: value.dtype for key, value in sample.items()} == {
        "img": torch.float32,
        "bbox": torch.float32,
        "label": torch.int64,
    }


@pytest.mark.parametrize("shape", [(100, 130), (16, 24), (5, 300), (7, 9)])
def test_grid_shows_every_pixel_once_with_true_boxes(shape):
    dataset = GridCrops(world_slides(shape, (50, 60)), CONFIG)
    num_tiles = -(-shape[0] // 16) * -(-shape[1] // 24)
    assert len(dataset) == num_tiles + 4 * 3
    shown = np.zeros(shape, dtype=int)
    for sample in (dataset[i] for i in range(num_tiles)):
        seen = sample["label"] != IGNORE
        pixel = pixel_centers(sample)[0, :, seen].floor().long()
        assert torch.equal(sample["label"][seen], place_label(*pixel))
        np.add.at(shown, tuple(pixel.numpy()), 1)
        check_boxes(sample["bbox"], num_levels=3, ndim=2)
        assert is_inside(sample["bbox"][:-1], sample["bbox"][1:]).all()
    assert (shown == 1).all()
    with pytest.raises(IndexError):
        dataset[len(dataset)]


@pytest.mark.parametrize("kind", [NestedCrops, GridCrops])
def test_every_view_may_have_its_labels_at_its_own_level(kind):
    shape = (70, 90)
    places = place_label(*np.indices(shape)).astype(np.uint8)
    slides = [(world_slide(shape, LEVELS), label_slide(places, LEVELS))]
    finest, every = kind(slides, CONFIG), kind(slides, replace(CONFIG, label_levels="all"))
    for index in range(8):
        sample = every[index]
        assert sample["labels"].shape == (3, 16, 24)
        assert sample["labels"].dtype == torch.int64
        assert torch.equal(sample["labels"][0], sample["label"])
        assert torch.equal(sample["label"], finest[index]["label"])
        for labels, place, level in zip(sample["labels"][1:], pixel_centers(sample)[1:], LEVELS[1:], strict=True):
            corner = (place - level / 2).long()  # the nearest-neighbour pyramid keeps each block's first pixel
            inside = ((corner >= 0) & (corner < torch.tensor(shape).view(2, 1, 1))).all(0)
            assert torch.equal(labels, torch.where(inside, place_label(*corner), IGNORE))


def test_labels_of_a_level_that_is_not_stored_are_refused():
    slides = [(world_slide((64, 64), LEVELS), label_slide(np.zeros((64, 64), np.uint8), (1, 4), "flat.png"))]
    for kind in (NestedCrops, GridCrops):
        kind(slides, CONFIG)
        with pytest.raises(InputError, match=r"flat.png, level 8: expected one of its stored levels 1, 4, got 8"):
            kind(slides, replace(CONFIG, label_levels="all"))


def test_only_the_windows_of_a_sample_are_read():
    slides = world_slides((400, 400))
    dataset = NestedCrops(slides, replace(CONFIG, cache_mib=0))
    slides[0][0].windows.clear()
    slides[0][1].windows.clear()
    dataset[3]
    assert [level for level, _ in slides[0][0].windows] == [1, 4, 8]
    assert all(size[0] <= 16 and size[1] <= 24 for _, size in slides[0][0].windows + slides[0][1].windows)


@pytest.mark.parametrize(("cache_mib", "direct"), [(0, (1, 4, 8)), (1.5, (1, 4)), (100, ())])
def test_the_coarsest_levels_that_fit_are_decoded_once(cache_mib, direct):
    # blocks of half a MiB, one for each slide at levels 8 and 4
    slides = world_slides((1000, 1000), (700, 900))
    crops = NestedCrops(slides, replace(CONFIG, cache_mib=cache_mib), seed=3)
    uncached = NestedCrops(world_slides((1000, 1000), (700, 900)), replace(CONFIG, cache_mib=0), seed=3)
    for image, _ in slides:
        image.windows.clear()
    for index in range(40):
        assert all(torch.equal(value, uncached[index][key]) for key, value in crops[index].items())
    read = [level for image, _ in slides for level, _ in image.windows]
    assert all(read.count(level) == 40 for level in direct)
    kept = {level: sum(image.num_blocks(level) for image, _ in slides) for level in LEVELS if level not in direct}
    assert all(read.count(level) <= number for level, number in kept.items())


def test_a_data_set_takes_no_decoded_pixels_to_another_process():
    small, large = (world_slides((300, 300)) for _ in range(2))
    crops = NestedCrops(small, CONFIG)
    size = len(pickle.dumps(crops))
    for index in range(30):
        crops[index]
    assert len(pickle.dumps(crops)) - size < 30 * 100  # what the slide in memory notes of its windows
    sent = pickle.loads(pickle.dumps(crops))
    assert torch.equal(sent[7]["img"], NestedCrops(large, replace(CONFIG, cache_mib=0))[7]["img"])


def test_samples_depend_on_seed_and_number_alone():
    first, second, other = (
        NestedCrops(world_slides((300, 300), (99, 200)), CONFIG, seed=seed, augmentation=Augmentation())
        for seed in (1, 1, 2)
    )
    for index in (0, 5, 4096, 10**12):
        assert all(torch.equal(first[index][key], second[index][key]) for key in ("img", "bbox", "label"))
        assert not torch.equal(first[index]["bbox"], other[index]["bbox"])
    assert not torch.equal(first[0]["bbox"], first[4096]["bbox"])
    with pytest.raises(IndexError):
        first[-1]


def test_iteration_ends_with_the_first_epoch():
    dataset = NestedCrops(world_slides((99, 99)), CONFIG, samples_per_epoch=3)
    boxes = [sample["bbox"] for sample in dataset]
    assert len(boxes) == len(dataset) == 3
    assert torch.equal(boxes[2], dataset[2]["bbox"])


def test_number_of_workers_changes_nothing():
    dataset = NestedCrops(world_slides((200, 300)), CONFIG, samples_per_epoch=6, augmentation=Augmentation())

    def epochs(num_workers):
        sampler = EpochSampler(len(dataset), start=2)
        loader = DataLoader(
            dataset, batch_size=2, sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0
        )
        for epoch in range(2):
            sampler.set_epoch(epoch)
            yield from loader

    alone, shared = list(epochs(0)), list(epochs(2))
    assert len(alone) == len(shared) == 2 + 3
    for a, b in zip(alone, shared, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert torch.equal(alone[0]["bbox"][0], dataset[2]["bbox"])
    assert torch.equal(alone[2]["bbox"][0], dataset[6]["bbox"])


def test_data_sets_travel_to_other_processes():
    for dataset in (
        NestedCrops(world_slides((200, 300)), CONFIG, balance="classes"),
        GridCrops(world_slides((40, 40)), CONFIG),
    ):
        copy = pickle.loads(pickle.dumps(dataset))
        assert all(torch.equal(copy[1][key], dataset[1][key]) for key in ("img", "bbox", "label"))


def test_slides_are_chosen_by_area():
    dataset = NestedCrops(world_slides((100, 100), (100, 300)), replace(CONFIG, levels=(1,)))
    from_second = sum((dataset[i]["bbox"][0, 1, 1] > 100).item() for i in range(1500))
    # of the second slide's 277 columns to start in, those from 77 on reach where the first slide has nothing
    assert from_second / 1500 == pytest.approx(3 / 4 * 200 / 277, abs=0.04)


@pytest.mark.parametrize("balance", ["none", "foreground", "classes"])
def test_slides_are_chosen_by_area_times_weight(balance):
    shapes = [(100, 300), (100, 100)]
    slides = [(world_slide(s, LEVELS), label_slide(np.ones(s, np.uint8), name=f"l{i}")) for i, s in enumerate(shapes)]
    config = replace(CONFIG, levels=(1,), num_classes=2)
    dataset = NestedCrops(slides, config, weights=(1, 9), balance=balance, foreground_fraction=1)
    drawn = [dataset._draw(i, np.random.default_rng((0, i)))[0] for i in range(2000)]
    assert np.mean(drawn) == pytest.approx(9 / (3 + 9), abs=0.04)
    for wrong in ((1,), (1, 0), (1, float("nan"))):
        with pytest.raises(InputError, match="weights: expected 2 numbers above 0, one for each slide"):
            NestedCrops(slides, config, weights=wrong)


def spotted(seed, values, shape=(320, 320)):
    """Few small squares of each value, and their image."""
    rng = np.random.default_rng(seed)
    labels = np.zeros(shape, dtype=np.uint8)
    for value, count in values.items():
        for y, x in rng.integers(0, 310, (count, 2)):
            labels[y : y + 6, x : x + 6] = value
    return world_slide(shape, LEVELS), label_slide(labels, (1, 4))


def test_foreground_fraction_of_the_samples_holds_foreground():
    slides = [spotted(0, {1: 3}), spotted(1, {})]
    config = CropConfig(levels=LEVELS, size=(16, 16), num_classes=2)

    def positives(**options):
        dataset = NestedCrops(slides, config, **options)
        return sum((dataset[i]["label"] == 1).any().item() for i in range(400)) / 400

    by_chance = positives()
    assert by_chance < 0.05
    assert positives(balance="foreground", foreground_fraction=1) == 1
    assert positives(balance="foreground", foreground_fraction=0.5) == pytest.approx(0.5 + by_chance / 2, abs=0.07)


def test_balanced_classes_come_alike():
    slides = [spotted(0, {1: 40, 2: 2, 3: 5})]
    config = CropConfig(levels=LEVELS, size=(4, 4), num_classes=3, ignore_labels=(3,))
    dataset = NestedCrops(slides, config, balance="classes", foreground_fraction=1)
    labels = [dataset[i]["label"] for i in range(400)]
    assert all((label > 0).any() for label in labels)
    assert sum((label == 2).any().item() for label in labels) / 400 == pytest.approx(0.5, abs=0.08)


def test_ignored_labels_and_percentiles_at_the_border():
    image = MemorySlide({1: np.arange(30, dtype=np.uint16).reshape(1, 5, 6) + 1000})
    labels = np.zeros((5, 6), dtype=np.uint8)
    labels[0], labels[1] = 14, 1
    config = CropConfig(levels=(1,), size=(8, 8), num_classes=2, ignore_labels=(14,), normalization=Percentile(0, 100))
    sample = GridCrops([(image, label_slide(labels))], config)[0]
    expected = torch.full((8, 8), IGNORE)
    expected[1, :6], expected[2:5, :6] = 1, 0
    assert torch.equal(sample["label"], expected)
    padded = torch.zeros(8, 8)
    padded[:5, :6] = torch.arange(30).reshape(5, 6) / 29  # padding takes no part in the percentiles, and shows 0
    torch.testing.assert_close(sample["img"][0, 0], padded)
    assert sample["bbox"].tolist() == [[[0, 0], [8, 8]]]


def test_levels_may_begin_coarse_and_labels_follow():
    image = world_slide((200, 200), (1, 4, 8))
    labels = label_slide(place_label(*np.indices((200, 200))).astype(np.uint8), (1, 4))
    config = CropConfig(levels=(4, 8), size=(16, 16), normalization=AS_STORED, num_classes=251)
    sample = NestedCrops([(image, labels)], config)[0]
    corner = (sample["img"][0] - 2).long()  # the nearest-neighbour pyramid keeps each block's first pixel
    assert torch.equal(sample["label"], place_label(*corner))


def test_three_axes_work_alike():
    shape = (20, 60, 50)
    config = CropConfig(levels=LEVELS, size=(8, 16, 16), normalization=AS_STORED)
    dataset = NestedCrops([(world_slide(shape, LEVELS), None)], config)
    assert dataset.ndim == dataset.n_channels == 3
    for index in range(20):
        sample = dataset[index]
        assert "label" not in sample
        centers = pixel_centers(sample)
        shown = (sample["img"] != 0).all(1, keepdim=True).expand_as(centers)
        assert torch.equal(sample["img"][shown], centers[shown])


def image(shape=(64, 64), channels=1, dtype=np.uint8, name="some.tif", levels=(1, 4)):
    return MemorySlide({level: np.zeros((channels, *(-(-n // level) for n in shape)), dtype) for level in levels}, name)


@pytest.mark.parametrize(
    ("slides", "message"),
    [
        ([], "slides: expected at least one"),
        ([(image(), None), (image(name="bare.tif", levels=(1, 2)), None)], r"bare.tif, level 4.*1, 2.*muvit convert"),
        ([(image(), None), (image(name="rgb.tif", channels=3), None)], "rgb.tif: expected 1 channels.*some.tif, got 3"),
        ([(image(), None), (image(name="f.tif", dtype=np.float32), None)], "f.tif: .*uint8.*got 1 channels of float32"),
        ([(image(), None), (image(name="l.tif"), image())], "l.tif: expected labels for all slides or for none"),
        ([(image((4, 64, 64)), None)], r"some.tif: expected 2 spatial axes"),
        ([(image(), image((64, 65), name="l.png"))], r"l.png: expected shape \(64, 64\).*some.tif.*\(64, 65\)"),
        ([(image(), image(channels=3, name="l.png"))], "l.png: expected labels: one channel.*got 3"),
        ([(image(), image(dtype=np.float32, name="l.png"))], "l.png: .*integer.*float32"),
    ],
)
def test_slides_that_do_not_fit_are_refused(slides, message):
    config = CropConfig(levels=(1, 4), size=(16, 16), num_classes=2)
    for kind in (NestedCrops, GridCrops):
        with pytest.raises(InputError, match=message):
            kind(slides, config)


def test_labels_need_the_number_of_classes():
    with pytest.raises(InputError, match="num_classes"):
        NestedCrops([(image(), image())], CropConfig(levels=(1, 4), size=(16, 16)))


@pytest.mark.parametrize("has_background", [True, False])
def test_class_0_is_balanced_like_the_others_where_there_is_no_background(has_background):
    labels = np.ones((64, 64), np.uint8)
    labels[:4, :4] = 0
    config = CropConfig(levels=(1,), size=(8, 8), num_classes=2, has_background=has_background)
    crops = NestedCrops([(image(), label_slide(labels))], config, balance="classes", foreground_fraction=1)
    shown = np.mean([bool((crops[i]["label"] == 0).any()) for i in range(100)])
    assert shown > 0.4 if not has_background else shown < 0.1


def test_labels_that_are_no_class_are_refused_before_any_work():
    labels = np.zeros((64, 64), dtype=np.uint8)
    labels[10, 10] = 7
    slides = [(image(), label_slide(labels, name="bad.png"))]
    config = CropConfig(levels=(1, 4), size=(16, 16), num_classes=7)
    for kind in (NestedCrops, GridCrops):
        with pytest.raises(InputError, match=r"bad.png: expected label values from 0 to 6, got 7.*ignore_labels"):
            kind(slides, config)
    NestedCrops(slides, replace(config, num_classes=8))
    NestedCrops(slides, replace(config, ignore_labels=(7,)))


def test_labels_that_the_first_look_missed_are_refused_when_read():
    fine = np.zeros((1, 2048, 1024), dtype=np.int16)
    fine[0, 1:, 1:] = -3
    slide = MemorySlide({1: fine, 8: np.zeros((1, 256, 128), np.int16)}, "sly.png")
    with pytest.raises(InputError, match=r"sly.png: .*got -3"):
        NestedCrops([(image((2048, 1024)), slide)], CropConfig(levels=(1, 4), size=(16, 16), num_classes=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": (4, 1)}, "levels: expected different levels in ascending order"),
        ({"levels": (1, 1)}, "levels"),
        ({"levels": ()}, "levels"),
        ({"levels": (0, 1)}, "level: expected a positive number"),
        ({"size": (16, 0)}, "size"),
        ({"size": ()}, "size: expected a number of pixels for each axis"),
        ({"padding": "wrap"}, "padding: expected zero or edge or reflect"),
        ({"label_levels": "coarse"}, "label_levels: expected finest or all"),
    ],
)
def test_wrong_configs_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        CropConfig(**({"levels": (1, 4), "size": (16, 16)} | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance": "rare"}, "balance: expected one of none, foreground, classes"),
        ({"balance": "foreground"}, "balance 'foreground': expected slides with labels"),
        ({"foreground_fraction": 1.5}, "foreground_fraction"),
        ({"samples_per_epoch": 0}, "samples_per_epoch"),
        ({"seed": -1}, "seed"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        NestedCrops([(image(), None)], CropConfig(levels=(1, 4), size=(16, 16)), **options)


@pytest.mark.parametrize("padding, beyond", [("zero", {0.0}), ("edge", set()), ("reflect", set())])
@pytest.mark.parametrize(
    "placement, turns",
    [("nested", {}), ("concentric", {}), ("concentric", {"scale": (0.5, 2), "rotation_degrees": 90})],
)
def test_augmentation_leaves_zero_padding_as_prediction_has_it(padding, beyond, placement, turns):
    """A bright image of 40 pixels in views of up to 128: what is not the image is 0, in training too."""
    slide = MemorySlide({level: np.full((1, 40 // level, 40 // level), 5, np.float32) for level in (1, 8)})
    config = CropConfig(levels=(1, 8), size=(16, 16), normalization=Range(0, 1), padding=padding, placement=placement)
    jitter = Augmentation(gain=(2, 2), offset=(7, 7), quarter_turns=True, **turns)
    plain, dataset = (NestedCrops([(slide, None)], config, augmentation=aug) for aug in (None, jitter))
    for index in range(8):
        sample = dataset[index]
        assert sample.keys() == plain[index].keys() == {"img", "bbox"}
        assert set(sample["img"].unique().tolist()) == {17.0} | beyond
        if not turns:
            shown = plain[index]["img"] != 0
            assert ((sample["img"] != 0).sum((1, 2, 3)) == shown.sum((1, 2, 3))).all()


def test_a_plain_sample_is_the_augmented_one_before_its_augmentation():
    slides = world_slides((200, 240), (300, 100))
    plain = NestedCrops(slides, CONFIG, seed=3)
    augmented = NestedCrops(slides, CONFIG, seed=3, augmentation=Augmentation())
    for i in range(6):
        slide, sample = augmented.read_plain(i)
        assert all(torch.equal(sample[key], plain[i][key]) for key in ("img", "bbox", "label"))
        height, width = augmented.images[slide].shape
        assert (sample["bbox"][0, 0] < torch.tensor([height, width])).all()
    turned = replace(Augmentation.geometric(), flip_axes=(), scale=(0.5, 2), rotation_degrees=90)
    similar = NestedCrops(slides, replace(CONFIG, placement="concentric"), seed=3, augmentation=turned)
    for i in range(6):
        _, before = similar.read_plain(i)
        torch.testing.assert_close(before["bbox"].mean(1), similar[i]["bbox"].mean(1), rtol=0, atol=1e-3)
        sides = (before["bbox"][:, 1] - before["bbox"][:, 0]).tolist()
        assert sides == [[level * n for n in CONFIG.size] for level in LEVELS]
