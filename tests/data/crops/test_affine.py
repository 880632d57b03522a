import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory_slide import MemorySlide, label_slide, world_slide

from muvit.data.crops.affine import Similarity, SimilarView, request_similar
from muvit.data.crops.augment import Augmentation
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import Range
from muvit.data.crops.placement import FreeViews, place_views
from muvit.data.crops.preprocessing import CropConfig
from muvit.errors import InputError
from muvit.geometry import box_center, box_size, patch_centers
from muvit.labels import IGNORE
from muvit.levels import level_factors

AS_STORED = Range(0, 1)
LEVELS = (1, 4)
SIMILAR = Augmentation(
    flip_axes=(), gain=(1, 1), offset=(0, 0), box_scale=(1, 1), box_shift_px=0, scale=(0.5, 2), rotation_degrees=90
)


def random_slide(shape, dtype=np.uint8, channels=2):
    pixels = np.random.default_rng(1).integers(0, 200, (channels, *shape)).astype(dtype)
    pooled = pixels.reshape(channels, shape[0] // 4, 4, shape[1] // 4, 4).mean((2, 4))
    return MemorySlide({1: pixels, 4: pooled.astype(np.float32).astype(dtype)})


def views_of(center, size, similarity, levels=LEVELS):
    return [SimilarView(level, center, size, similarity) for level in levels]


def concentric_pixels(slide, start, size, levels=LEVELS):
    return [
        slide.read(w.level, w.start, w.size).astype(np.float32)
        for w in place_views("concentric", [size] * len(levels), levels, size, start=start).windows
    ]


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 1), (-90, -1), (180, 2)])
@pytest.mark.parametrize("size", [16, 17])
def test_quarter_turns_are_exact(degrees, turns, size):
    slide = random_slide((256, 256))
    start = 116 if size == 16 else 117  # whose centre lies on a corner, or in the middle, of a coarse pixel
    center = (start + size / 2,) * 2
    levels = LEVELS if size == 16 else (1,)
    pixels, valid = request_similar(slide, views_of(center, (size, size), Similarity(1, degrees), levels), "zero")()
    for view, expected in zip(pixels, concentric_pixels(slide, (start, start), (size, size), levels), strict=True):
        assert np.array_equal(view, np.rot90(expected, turns, axes=(1, 2)))
    assert valid.all()


def test_scale_2_shows_twice_as_much_and_averages_it():
    slide = random_slide((256, 256))
    pixels, _ = request_similar(slide, views_of((128, 128), (16, 16), Similarity(2)), "zero")()
    for view, expected in zip(pixels, concentric_pixels(slide, (112, 112), (32, 32)), strict=True):
        assert np.allclose(view, expected.reshape(2, 16, 2, 16, 2).mean((2, 4)), atol=1e-4)


def test_scale_half_interpolates_between_pixels():
    slide = world_slide((256, 256), LEVELS)
    views = views_of((128, 120), (16, 24), Similarity(0.5))
    for view, pixels in zip(views, request_similar(slide, views, "zero")()[0], strict=True):
        # what the slide holds is linear in place, which linear interpolation reads exactly
        centers = patch_centers(view.box, (16, 24)).reshape(16, 24, 2).permute(2, 0, 1)
        assert np.allclose(pixels, centers, atol=1e-4)


@given(
    st.tuples(st.floats(120, 250), st.floats(120, 250)),
    st.floats(0.5, 2),
    st.floats(-180, 180),
    st.sampled_from([(2, 1), (1, 1), (1, 3)]),
)
def test_every_pixel_shows_the_place_that_scale_and_turn_put_it_at(center, scale, degrees, anisotropy):
    levels = (1, tuple(2.0 * f for f in anisotropy))
    slide = world_slide((400, 400), levels)
    views = views_of(center, (8, 12), Similarity(scale, degrees), levels)
    pixels, valid = request_similar(slide, views, "zero")()
    angle = np.deg2rad(degrees)
    for view, shown, inside in zip(views, pixels, valid, strict=True):
        y, x = patch_centers(view.box, (8, 12)).reshape(8, 12, 2).permute(2, 0, 1).numpy()
        y, x = y - center[0], x - center[1]
        expected = np.stack(
            [center[0] + y * np.cos(angle) + x * np.sin(angle), center[1] - y * np.sin(angle) + x * np.cos(angle)]
        )
        assert np.allclose(shown, expected, atol=1e-3)
        assert inside.all()
        assert view.box.mean(0).tolist() == pytest.approx(center)
        factors = level_factors(view.level, 2)
        assert box_size(view.box).tolist() == pytest.approx([8 * factors[0] * scale, 12 * factors[1] * scale])


def test_volumes_turn_in_the_plane_of_y_and_x():
    pixels = np.random.default_rng(2).integers(0, 99, (1, 12, 32, 32)).astype(np.uint8)
    view = SimilarView(1, (6, 16, 16), (4, 8, 8), Similarity(1, 90))
    turned, _ = request_similar(MemorySlide({1: pixels}), [view], "zero")()
    assert np.array_equal(turned[0], np.rot90(pixels[:, 4:8, 12:20, 12:20], axes=(2, 3)))


def labelled(shape=(160, 200), levels=LEVELS):
    """Images whose first channel holds the label of each pixel, in flat patches that interpolation leaves alone."""
    patches = np.random.default_rng(3).integers(0, 9, (-(-shape[0] // 8), -(-shape[1] // 8)))
    labels = np.kron(patches, np.ones((8, 8), int))[: shape[0], : shape[1]].astype(np.uint8)
    slide = label_slide(labels, levels)
    image = MemorySlide({level: pixels.astype(np.float32) for level, pixels in slide.pyramid.items()}, "image")
    return image, slide


CENTERED = CropConfig(levels=LEVELS, size=(32, 32), normalization=AS_STORED, num_classes=9, placement="concentric")


@pytest.mark.parametrize("label_levels", ["finest", "all"])
def test_labels_move_with_the_image(label_levels):
    config = CropConfig(
        levels=LEVELS,
        size=(32, 32),
        normalization=AS_STORED,
        num_classes=9,
        placement="concentric",
        label_levels=label_levels,
    )
    crops = NestedCrops([labelled()], config, augmentation=SIMILAR)
    scales = []
    for i in range(12):
        sample = crops[i]
        img, label = sample["img"][0, 0], sample["label"]
        # between patches the image is interpolated, labels are not
        flat = (img - img.round()).abs() < 1e-4
        seen = flat & (label != IGNORE)
        assert seen.float().mean() > 0.25
        assert (label[seen] == img[seen].round()).float().mean() > 0.97
        if label_levels == "all":
            assert torch.equal(sample["labels"][0], label)
            coarse = sample["labels"][1]
            assert torch.equal(coarse == IGNORE, outside(sample, 1))
        # unscaled views lie on whole pixels of their levels
        assert (box_center(sample["bbox"][0]) - box_center(sample["bbox"][1])).abs().max() <= 2
        scales.append(float(box_size(sample["bbox"])[0, 0]) / 32)
        assert torch.allclose(box_size(sample["bbox"][1]), 4 * box_size(sample["bbox"][0]))
    assert min(scales) < 0.9
    assert max(scales) > 1.2
    assert 1 in scales


def outside(sample, level):
    """Where a view shows nothing: normalised pixels are 0 there, and the label's image has 0 only at class 0."""
    img, labels = sample["img"][level, 0], sample["labels"][level]
    assert (img[labels == IGNORE] == 0).all()
    return labels == IGNORE


def test_samples_depend_on_their_number_alone():
    first, second = (NestedCrops([labelled()], CENTERED, augmentation=SIMILAR, seed=5) for _ in range(2))
    for index in (7, 0, 10**9):
        assert all(torch.equal(first[index][key], second[index][key]) for key in ("img", "bbox", "label"))
    assert not torch.equal(first[0]["img"], first[1]["img"])


def test_half_of_the_samples_are_scaled_and_half_are_turned():
    rng = np.random.default_rng(0)
    drawn = [SIMILAR.draw_similarity(rng) for _ in range(2000)]
    scales = np.array([one.scale for one in drawn if one.scale != 1])
    angles = np.array([one.degrees for one in drawn if one.degrees != 0])
    assert 900 < len(scales) < 1100
    assert 900 < len(angles) < 1100
    assert 0.5 <= scales.min() < 0.55
    assert 1.95 < scales.max() <= 2
    assert -90 <= angles.min() < -85
    assert 85 < angles.max() <= 90
    assert 400 < sum(one.is_identity for one in drawn) < 600


def test_balanced_samples_hold_foreground_however_they_are_turned():
    labels = np.zeros((300, 300), np.uint8)
    labels[200:203, 40:43] = 1  # which no scale leaves out
    image = MemorySlide({1: labels[None], 4: labels[None, ::4, ::4]})
    config = CropConfig(levels=LEVELS, size=(32, 32), normalization=AS_STORED, num_classes=2, placement="concentric")
    crops = NestedCrops(
        [(image, label_slide(labels))], config, augmentation=SIMILAR, balance="foreground", foreground_fraction=1.0
    )
    samples = [crops[i] for i in range(150)]
    missed = [box_size(sample["bbox"][0])[0] / 32 for sample in samples if not (sample["label"] == 1).any()]
    # at less detail, a pixel at the edge of the view may be left out
    assert len(missed) < 0.05 * len(samples)
    assert all(scale > 1 for scale in missed)


def test_views_without_one_centre_are_not_scaled_or_turned():
    nested = CropConfig(levels=LEVELS, size=(32, 32), normalization=AS_STORED, num_classes=9)
    free = CropConfig(levels=LEVELS, size=(32, 32), normalization=AS_STORED, num_classes=9, placement="free")
    for config in (nested, free):
        with pytest.raises(
            InputError, match=f"expected views with one centre, placement concentric, got placement {config.placement}"
        ):
            NestedCrops([labelled()], config, augmentation=SIMILAR)
    with pytest.raises(InputError, match="placement: expected free, since free_views are given, got concentric"):
        CropConfig(levels=LEVELS, size=(32, 32), placement="concentric", free_views=FreeViews())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": (0, 2)}, "scale: expected a finite range low <= high above 0"),
        ({"scale_probability": 1.5}, "scale_probability: expected a number >= 0 and <= 1, got 1.5"),
        ({"rotation_degrees": -5}, "rotation_degrees: expected a number >= 0 and <= 180, got -5"),
        ({"rotation_probability": -0.1}, "rotation_probability: expected a number >= 0 and <= 1"),
    ],
)
def test_magnitudes_out_of_range_are_refused(changes, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**changes)


def test_the_local_view_is_the_centre_of_its_context():
    """As in Relay Tokens: the central quarter of the context view, pixel by pixel, also at the border of the image."""
    slide = world_slide((128, 192), LEVELS)
    crops = GridCrops(
        [(slide, None)], CropConfig(levels=LEVELS, size=(32, 32), normalization=AS_STORED, placement="concentric")
    )
    assert len(crops) == 4 * 6
    for sample in crops:
        local, context = sample["img"]
        assert torch.equal(context[:, 12:20, 12:20], local.reshape(2, 8, 4, 8, 4).mean((2, 4)))
        assert torch.equal(box_center(sample["bbox"][0]), box_center(sample["bbox"][1]))
        assert torch.equal(box_size(sample["bbox"][1]), torch.tensor([128.0, 128.0]))
        centers = patch_centers(sample["bbox"][1], (32, 32)).reshape(32, 32, 2).permute(2, 0, 1)
        inside = ((centers > 0) & (centers < torch.tensor([128, 192]).view(2, 1, 1))).all(0)
        assert not inside.all()
        assert torch.equal(context, centers * inside)


@given(st.tuples(st.integers(0, 900), st.integers(0, 900)), st.sampled_from([(1, 4), (1, 3, 7), (2, 5)]))
def test_concentric_crops_miss_the_centre_by_half_a_pixel_at_most(start, levels):
    windows = place_views("concentric", [(16, 15)] * len(levels), levels, (16, 15), start=start).windows
    assert windows[0].start == start
    for window, level in zip(windows, levels, strict=True):
        gap = (box_center(window.box) - box_center(windows[0].box)).abs()
        assert (gap <= level / 2 + 1e-9).all()
        assert window.size == (16, 15)


@pytest.mark.parametrize("augmentation", [None, SIMILAR])
def test_context_beyond_the_image_is_blank_after_normalisation(augmentation):
    slide = MemorySlide({1: np.full((1, 64, 64), 200, np.uint8), 4: np.full((1, 16, 16), 200, np.uint8)})
    config = CropConfig(levels=LEVELS, size=(32, 32), normalization=Range(100, 200), placement="concentric")
    crops = NestedCrops([(slide, None)], config, augmentation=augmentation)
    for i in range(8):
        sample = crops[i]
        # no pixel mixes the image with what lies beyond it
        assert set(sample["img"][1].round(decimals=4).unique().tolist()) == {0.0, 1.0}
        if augmentation is None:
            centers = patch_centers(sample["bbox"][1], (32, 32)).reshape(32, 32, 2)
            assert torch.equal(sample["img"][1, 0] > 0, ((centers > 0) & (centers < 64)).all(-1))
