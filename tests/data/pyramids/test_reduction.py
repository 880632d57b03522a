from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from memory_slide import MemorySlide

from muvit.data.pyramids.reduction import majority
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.derived import DerivedLevels
from muvit.data.slides.ome_zarr import OmeZarrSlide


def naive(labels, factors):
    """The majority vote of ``(*space)``, block by block, by counting."""
    voted = np.empty([-(-n // f) for n, f in zip(labels.shape, factors, strict=True)], labels.dtype)
    for index in np.ndindex(voted.shape):
        block = labels[tuple(slice(i * f, (i + 1) * f) for i, f in zip(index, factors, strict=True))]
        counts = Counter(block.ravel().tolist())
        voted[index] = min(value for value, count in counts.items() if count == max(counts.values()))
    return voted


@st.composite
def labels_and_factors(draw):
    shape = draw(array_shapes(min_dims=2, max_dims=4, max_side=9))
    dtype = draw(st.sampled_from([np.uint8, np.int16, np.uint64]))
    values = st.sampled_from([0, 1, 2, 100, np.iinfo(dtype).max])
    return draw(arrays(dtype, shape, elements=values)), tuple(draw(st.integers(1, 4)) for _ in shape)


@given(labels_and_factors())
def test_majority_is_the_most_frequent_label_of_every_block_and_the_lowest_of_equals(case):
    labels, factors = case
    channels = np.stack([labels, labels[::-1]])
    expected = np.stack([naive(channel, factors) for channel in channels])
    np.testing.assert_array_equal(majority(channels, factors), expected)


@given(labels_and_factors())
def test_votes_of_whole_blocks_do_not_depend_on_the_direction_of_the_axes(case):
    labels, factors = case
    whole = labels[tuple(slice(n // f * f) for n, f in zip(labels.shape, factors, strict=True))]
    if whole.size:
        turned = majority(np.flip(whole)[None], factors)[0]
        np.testing.assert_array_equal(np.flip(turned), majority(whole[None], factors)[0])


def disc(shape, center, radius):
    y, x = (np.arange(n) + 0.5 for n in shape)
    return ((y[:, None] - center[0]) ** 2 + (x - center[1]) ** 2 < radius**2).astype(np.uint8)


def centroid(slide, level):
    """Centre of the foreground and its area, in world pixels."""
    places = np.argwhere(slide.read(level, (0, 0), slide.level_shape(level))[0]) + 0.5
    return places.mean(0) * level, len(places) * level**2


@pytest.mark.parametrize("levels", [(1, 2, 4, 8, 16, 32), (1, 8, 32), (1, 3, 9, 27)])
def test_a_disc_lies_at_the_same_place_and_is_as_large_at_every_level(tmp_path, levels):
    labels = disc((640, 610), (301.3, 287.9), 171.0)
    path = tmp_path / "a.ome.zarr"
    writer = PyramidWriter.create(
        path, shape=labels.shape, num_channels=1, dtype=np.uint8, levels=levels, kind="label", chunk=64, shard=128
    )
    writer.write((0, 0), labels[None])
    writer.finish()
    stored = OmeZarrSlide(path)
    derived = DerivedLevels(MemorySlide({1: labels[None]}), levels, "label")
    finest, area = centroid(stored, 1)
    for slide, level in product((stored, derived), levels):
        center, extent = centroid(slide, level)
        # if blocks showed their first pixel, it would lie (level - 1) / 2 pixels off
        np.testing.assert_allclose(center, finest, atol=0.2 * level)
        assert extent == pytest.approx(area, rel=0.1)
