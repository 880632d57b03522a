import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation
from scipy.spatial import KDTree

from muvit.data.slides.open import open_slide
from muvit.data.synthetic.folders import GREY_LEVELS_PER_UNIT
from muvit.data.synthetic.images import (
    STORE,
    SyntheticConfig,
    build_scene,
    draw,
    generate,
    write_synthetic,
)
from muvit.errors import ExistsError, InputError

SMALL = SyntheticConfig.small()
NUM_IMAGES = 60


def pixel_centers(size: int) -> np.ndarray:
    return np.stack(np.meshgrid(np.arange(size) + 0.5, np.arange(size) + 0.5, indexing="ij"), -1)


def test_size_divides_exactly_the_lengths():
    full = SyntheticConfig()
    for field in (field for field in fields(SyntheticConfig) if field.name != "layout"):
        factor = 4 if field.name.endswith("_px") else 1
        np.testing.assert_allclose(
            np.multiply(getattr(SMALL, field.name), factor), getattr(full, field.name), err_msg=field.name
        )
    assert isinstance(SMALL.size_px, int)


def test_full_image_is_the_small_scene_magnified():
    small, full = build_scene(3, SMALL), build_scene(3, SyntheticConfig())
    np.testing.assert_allclose(full.centers, 4 * small.centers)
    np.testing.assert_allclose(full.radii, 4 * small.radii)
    # the centre of a coarse pixel is the shared corner of the middle four of its sixteen fine ones
    around = full.offset.reshape(512, 4, 512, 4)[:, 1:3, :, 1:3].mean((1, 3))
    is_smooth = np.abs(small.offset) < SMALL.half_width_px
    np.testing.assert_allclose(around[is_smooth], 4 * small.offset[is_smooth], atol=0.2)


def test_image_and_label_depend_on_seed_and_index_alone():
    image, label = generate(5, SMALL)
    generate(6, SMALL)
    again, label_again = generate(5, SMALL)
    assert image.dtype == np.float32
    assert label.dtype == np.uint8
    assert image.shape == label.shape == (512, 512)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    for other in (generate(6, SMALL), generate(5, replace(SMALL, seed=1))):
        assert (other[1] != label).any()
        assert (other[0] != image).mean() > 0.9


def test_without_warp_offset_is_the_distance_from_the_nearest_ring():
    for index in range(4):
        scene = build_scene(index, replace(SMALL, warp_amplitude_px=0))
        radius = np.linalg.norm(pixel_centers(512) - scene.centers[0], axis=-1)
        gaps = radius[..., None] - scene.radii
        expected = np.take_along_axis(gaps, np.abs(gaps).argmin(-1)[..., None], -1)[..., 0]
        np.testing.assert_allclose(np.abs(scene.offset), np.abs(expected), atol=1e-3)
        in_band = np.abs(expected) < SMALL.half_width_px
        np.testing.assert_allclose(scene.offset[in_band], expected[in_band], atol=1e-3)


def test_warp_moves_a_ring_by_at_most_its_amplitude_and_in_proportion():
    single = replace(SMALL, max_rings=1)
    still, once, twice = (
        build_scene(0, replace(single, warp_amplitude_px=a)).offset
        for a in (0, SMALL.warp_amplitude_px, 2 * SMALL.warp_amplitude_px)
    )
    assert 0.4 * SMALL.warp_amplitude_px < np.abs(once - still).max() <= SMALL.warp_amplitude_px
    np.testing.assert_allclose(twice - still, 2 * (once - still), atol=1e-3)


def test_rings_keep_their_range_and_distance():
    radii = [build_scene(index, SMALL).radii for index in range(NUM_IMAGES)]
    pairs = np.array([r for r in radii if len(r) == 2])
    assert {len(r) for r in radii} == {1, 2}
    assert 0.3 < len(pairs) / len(radii) < 0.7
    assert (np.diff(pairs) > 2 * SMALL.half_width_px + SMALL.clearance_px).all()
    assert min(map(min, radii)) >= SMALL.radius_px[0]
    assert max(map(max, radii)) <= SMALL.radius_px[1]


def test_class_of_a_cell_says_on_which_side_of_the_ring_it_lies():
    scene = build_scene(2, SMALL)
    offset = scene.offset[tuple(scene.cells.astype(int).T)]
    np.testing.assert_array_equal(scene.classes, np.where(offset > 0, 1, 2))
    assert (np.abs(offset) > SMALL.gap_px).all()
    assert (np.abs(offset) < SMALL.half_width_px).all()

    # outer cells lie farther out than the mid radius, seen from the centre; the warp blurs single cells, not their mean
    still = build_scene(2, replace(SMALL, warp_amplitude_px=0, max_rings=1))
    radius = np.linalg.norm(still.cells - still.centers[0], axis=1)
    # the offset is that of the cell's pixel, whose centre is up to 0.71 px away
    assert (radius[still.classes == 1] > still.radii[0] + SMALL.gap_px - 0.72).all()
    assert (radius[still.classes == 2] < still.radii[0] - SMALL.gap_px + 0.72).all()


@pytest.mark.parametrize("index", range(4))
def test_label_holds_whole_cells_of_one_class(index):
    scene = build_scene(index, SMALL)
    _, label = generate(index, SMALL)
    points = pixel_centers(512)
    nearest = {k: KDTree(scene.cells[scene.classes == k]).query(points)[0] for k in (1, 2)}
    longest, shortest = SMALL.semi_axis_px[1], SMALL.semi_axis_px[0] * SMALL.axis_ratio[0]
    for own, other in ((1, 2), (2, 1)):
        assert (nearest[own][label == own] <= longest).all()
        # inside a cell and beyond the reach of the other class
        assert (label[(nearest[own] < shortest) & (nearest[other] > longest)] == own).all()
    assert (label[np.minimum(nearest[1], nearest[2]) < shortest] > 0).all()
    assert label[tuple(scene.cells.astype(int).T)].all()


@pytest.mark.parametrize("config", [SMALL, replace(SyntheticConfig(), size_px=1024)], ids=["small", "full"])
def test_cells_are_brighter_than_their_surroundings(config):
    image, label = generate(1, config)
    is_cell = label > 0
    is_around = binary_dilation(is_cell, iterations=4) & ~binary_dilation(
        is_cell, iterations=2 if config.blur_px == 1 else 1
    )
    assert is_around.any()
    assert image[is_cell].mean() > image[is_around].mean() + 0.3
    assert (image[is_cell] > image[is_around].mean() + 0.15).mean() > 0.98
    assert image[is_around].mean() == pytest.approx(config.background, abs=0.06)
    assert image.min() >= 0
    assert image.max() < 255 / GREY_LEVELS_PER_UNIT


def test_overlap_goes_to_the_brighter_cell():
    crowded = replace(SMALL, noise=0, background=0, blur_px=0, drop_rate=0, gap_px=0, falloff=0, peak=(0.5, 1))
    image, label = generate(0, crowded)
    assert set(np.unique(label)) == {0, 1, 2}
    np.testing.assert_array_equal(label > 0, image > 0)
    # without fall-off a pixel carries the peak of its owner, which two of some 4000 float32 draws share only by chance
    assert len(set(image[label == 1]) & set(image[label == 2])) <= 5
    assert image[label > 0].min() >= 0.5


@pytest.fixture(scope="module")
def statistics():
    """Over 60 images and for either class: band area, cells, cell pixels, sum of intensity and of its square."""
    table = np.zeros((2, 5))
    for index in range(NUM_IMAGES):
        scene = build_scene(index, SMALL)
        image, label = generate(index, SMALL)
        is_band = np.abs(scene.offset) < SMALL.half_width_px
        for k, is_side in enumerate((scene.offset > 0, scene.offset < 0)):
            pixels = image[label == k + 1].astype(np.float64)
            row = (
                (is_band & is_side).sum(),
                (scene.classes == k + 1).sum(),
                pixels.size,
                pixels.sum(),
                (pixels**2).sum(),
            )
            table[k] += row
    return table


def test_outer_half_holds_a_little_more_of_the_band(statistics):
    band = statistics[:, 0]
    assert band[0] / band.sum() == pytest.approx(0.52, abs=0.015)
    cells = statistics[:, 2]
    assert cells[0] / cells.sum() == pytest.approx(0.52, abs=0.015)
    assert cells.sum() / (NUM_IMAGES * 512**2) == pytest.approx(0.095, abs=0.02)


def test_no_statistic_of_the_cells_tells_their_class(statistics):
    band, cells, pixels, total, squares = statistics.T
    mean = total / pixels
    spread = np.sqrt(squares / pixels - mean**2)
    assert mean[0] == pytest.approx(mean[1], rel=0.005)
    assert spread[0] == pytest.approx(spread[1], rel=0.01)
    assert (pixels / cells)[0] == pytest.approx((pixels / cells)[1], rel=0.01)
    assert (cells / band)[0] == pytest.approx((cells / band)[1], rel=0.01)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("noise", -0.1),
        ("size_px", 0),
        ("pitch_px", 0.0),
        ("semi_axis_px", (0.0, 2.0)),
        ("warp_lattices_px", ()),
        ("background_lattices_px", (64.0, 0.0)),
        ("warp_amplitude_px", float("nan")),
        ("radius_px", (430.0, 500.0)),
        ("peak", (1.0, 0.5)),
        ("drop_rate", 1.5),
        ("axis_ratio", (0.75, 1.2)),
        ("seed", -1),
    ],
)
def test_config_refuses_what_cannot_be_drawn(name, value):
    with pytest.raises(InputError, match=rf"config\.{name}: expected .* got "):
        replace(SyntheticConfig(), **{name: value})


SCATTERED = SyntheticConfig.scattered().at_size(512)


def around(distance):
    """Distances on an image that continues at its opposite edges."""
    return (distance + 256) % 512 - 256


def test_scattered_rings_are_disjoint_and_continue_at_the_opposite_edges():
    shares = []
    for index in range(20):
        scene = build_scene(index, replace(SCATTERED, warp_amplitude_px=0))
        apart = np.linalg.norm(around(scene.centers[:, None] - scene.centers), axis=-1)
        between = apart - scene.radii[:, None] - scene.radii
        assert (between[~np.eye(len(between), dtype=bool)] > SCATTERED.ring_distance_px).all()
        assert SCATTERED.radius_px[0] <= scene.radii.min() <= scene.radii.max() <= SCATTERED.radius_px[1]
        gaps = np.linalg.norm(around(pixel_centers(512)[:, :, None] - scene.centers), axis=-1) - scene.radii
        nearest = np.take_along_axis(gaps, np.abs(gaps).argmin(-1)[..., None], -1)[..., 0]
        np.testing.assert_allclose(scene.offset, nearest, atol=1e-3)
        shares.append((np.abs(scene.offset) < SCATTERED.half_width_px).mean())
    assert np.mean(shares) == pytest.approx(0.255, abs=0.03)


def test_a_band_of_any_direction_has_its_inside_on_either_side_as_often():
    # what a model sees that does not know its place: pixels of each direction out of a ring, and of the opposite one
    for index in range(4):
        scene = build_scene(index, replace(SCATTERED, warp_amplitude_px=0))
        towards = around(pixel_centers(512)[:, :, None] - scene.centers)
        distance = np.linalg.norm(towards, axis=-1)
        ring = np.abs(distance - scene.radii).argmin(-1)[..., None, None]
        y, x = np.moveaxis(np.take_along_axis(towards, ring, 2)[:, :, 0], -1, 0)
        direction = np.floor(np.arctan2(y, x) / (2 * np.pi) * 24).astype(int) % 24
        counts = np.bincount(direction[np.abs(scene.offset) < SCATTERED.half_width_px], minlength=24)
        np.testing.assert_allclose(counts[:12], counts[12:], rtol=0.05)


def test_coarse_levels_of_scattered_rings_show_what_they_enclose_and_share_no_noise():
    (image, *coarse), label = draw(3, SCATTERED)
    still = build_scene(3, replace(SCATTERED, warp_amplitude_px=0)).offset
    np.testing.assert_array_equal(image, generate(3, SCATTERED)[0])
    np.testing.assert_array_equal(label, generate(3, SCATTERED)[1])
    for level, pixels in zip(STORE.levels[1:], coarse, strict=True):
        means, offset = (a.reshape(512 // level, level, -1, level).mean((1, 3)) for a in (image, still))
        inside, outside = pixels[offset < -level], pixels[offset > level]
        assert inside.mean() - outside.mean() == pytest.approx(SCATTERED.shade, abs=0.03)
        is_free = offset > SCATTERED.half_width_px + SCATTERED.warp_amplitude_px
        changes = [np.diff(a)[is_free[:, 1:]] for a in (means, pixels)]  # but for the smooth background, a few waves
        assert abs(np.corrcoef(*changes)[0, 1]) < 0.1


def test_negative_index_is_refused():
    with pytest.raises(InputError, match="index: expected 0 or more, got -1"):
        generate(-1, SMALL)


def read(path: Path, level: int = 1) -> np.ndarray:
    slide = open_slide(path)
    return slide.read(level, (0, 0), slide.level_shape(level))[0]


def test_data_set_is_the_same_for_any_number_of_workers(tmp_path):
    counts = {"num_train": 2, "num_val": 1, "num_test": 1}
    seen: list[tuple[int, int]] = []
    one = write_synthetic(tmp_path / "one", **counts, config=SMALL, workers=1, progress=lambda *done: seen.append(done))
    two = write_synthetic(tmp_path / "deep" / "two", **counts, config=SMALL, workers=2)
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "one"]
    for split, indices in {"train": (0, 1), "val": (2,), "test": (3,)}.items():
        for folder in (one, two):
            for kind in ("images", "labels"):
                names = sorted(path.name for path in (folder / split / kind).iterdir())
                assert names == [f"{index:05d}.ome.zarr" for index in indices]
        for index in indices:
            image, label = generate(index, SMALL)
            stored = one / split / "images" / f"{index:05d}.ome.zarr"
            stored_label = one / split / "labels" / f"{index:05d}.ome.zarr"
            assert open_slide(stored).levels == STORE.levels
            assert np.abs(read(stored) / GREY_LEVELS_PER_UNIT - image).max() <= 0.5 / GREY_LEVELS_PER_UNIT + 1e-6
            np.testing.assert_array_equal(read(stored_label), label)
            for path in (stored, stored_label):
                np.testing.assert_array_equal(read(path, 4), read(two / path.relative_to(one), 4))
                np.testing.assert_array_equal(read(path), read(two / path.relative_to(one)))
    record = json.loads((one / "synthetic.json").read_text())
    assert record["indices"] == {"train": [0, 2], "val": [2, 3], "test": [3, 4]}
    assert record["config"]["warp_amplitude_px"] == SMALL.warp_amplitude_px
    label_slide = open_slide(one / "train" / "labels" / "00000.ome.zarr")
    assert label_slide.label_names == {0: "background", 1: "outer cell", 2: "inner cell"}
    assert len(set(label_slide.label_colors.values())) == 3


TINY = {"num_train": 1, "num_val": 0, "num_test": 0, "config": replace(SMALL, size_px=256), "workers": 1}


def test_existing_folder_is_kept_unless_overwriting(tmp_path):
    write_synthetic(tmp_path / "set", **TINY)
    (tmp_path / "set" / "notes.txt").write_text("mine")
    before = read(tmp_path / "set" / "train" / "images" / "00000.ome.zarr")
    changed = TINY | {"config": replace(TINY["config"], seed=1)}
    with pytest.raises(ExistsError, match="set: exists already"):
        write_synthetic(tmp_path / "set", **changed)
    np.testing.assert_array_equal(read(tmp_path / "set" / "train" / "images" / "00000.ome.zarr"), before)

    write_synthetic(tmp_path / "set", **changed, overwrite=True)
    assert (read(tmp_path / "set" / "train" / "images" / "00000.ome.zarr") != before).any()
    assert (tmp_path / "set" / "notes.txt").read_text() == "mine"

    (tmp_path / "file").touch()
    with pytest.raises(ExistsError):
        write_synthetic(tmp_path / "file", **TINY, overwrite=True)


def test_interrupted_run_leaves_nothing_behind(tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_synthetic(tmp_path / "set", **TINY, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_val": -1}, "num_val: expected 0 or more, got -1"),
        ({"num_train": 0}, "at least one image"),
        ({"workers": 0}, "workers: expected 1 or more, got 0"),
    ],
)
def test_impossible_requests_are_refused_before_any_work(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        write_synthetic(tmp_path / "set", **TINY | change)
    assert list(tmp_path.iterdir()) == []
