"""Samples as they are stored: their numbers, batches of them, and what `finish` makes of both."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from memory_slide import MemorySlide, label_slide
from torch.utils.data import DataLoader, default_collate

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.classified import ClassifiedTiles
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.defects import Defects
from muvit.data.crops.normalize import Percentile, Range, Standardize
from muvit.data.crops.preprocessing import CropConfig
from muvit.data.crops.stored import DTYPES, Look, collate, finish
from muvit.errors import ReadError

LEVELS, SIZE = (1, 4), (16, 16)
CONFIG = CropConfig(levels=LEVELS, size=SIZE, num_classes=3, placement="concentric", label_levels="all")
DEFECTS = {"gamma": (0.5, 2), "blur_px": 1.0, "noise": 0.1, "channel_drop": 0.4}


class RequestedSlide(MemorySlide):
    """Notes when windows are asked for, and when they are waited for."""

    events = ()

    def _request_window(self, level, start, stop):
        self.events.append("request")

        def read():
            self.events.append("wait")
            return self._read_window(level, start, stop)

        return read


def slides(*dtypes, shape=(40, 52), top=200):
    """A slide of each type, with labels, all of which note their requests in one list."""
    events, found = [], []
    for number, dtype in enumerate(dtypes):
        rng = np.random.default_rng(number)
        shapes = {level: tuple(-(-n // level) for n in shape) for level in LEVELS}
        pixels = {level: rng.integers(0, top, (2, *size)).astype(dtype) for level, size in shapes.items()}
        image = RequestedSlide(pixels, f"image {number}")
        label = RequestedSlide(
            label_slide(rng.integers(0, 3, shape).astype(np.uint8), LEVELS).pyramid, f"label {number}"
        )
        image.events = label.events = events
        found.append((image, label))
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_pixels_are_finished_as_the_formula_says(dtype):
    rng = torch.Generator().manual_seed(0)
    img = torch.randint(0, 250, (3, 2, 4, 5), generator=rng).to(dtype)
    low, spread = torch.rand(3, 2, generator=rng) * 99, torch.rand(3, 2, generator=rng) * 99 + 1
    spread[1, 1] = torch.inf
    gain, offset = torch.rand(3, generator=rng), torch.rand(3, generator=rng)
    inside = torch.rand(3, 4, 5, generator=rng) > 0.3
    if dtype.is_floating_point:
        img[0, 0, 0, 0], img[2, 1, 1, 1] = torch.nan, torch.inf
        inside[0, 0, 0] = inside[2, 1, 1] = True
    stored = {"img": img, "look": Look(low, spread, gain, offset), "inside": inside, "slide": torch.tensor(3)}
    before = img.clone()
    found = finish(stored)
    pixels = img.numpy().astype(np.float32)
    normalised = (pixels - low[..., None, None].numpy()) / spread[..., None, None].numpy()
    normalised[~np.isfinite(normalised)] = 0
    expected = normalised * gain[:, None, None, None].numpy() + offset[:, None, None, None].numpy()
    np.testing.assert_array_equal(found["img"], expected * inside[:, None].numpy())
    assert (found["img"][1, 1][inside[1]] == offset[1]).all()  # without contrast
    assert found.keys() == {"img", "slide"} and found["img"].dtype == torch.float32
    assert finish(found) == found
    assert torch.equal(img.float().nan_to_num(), before.float().nan_to_num()) and img.dtype == dtype


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("normalization", [Percentile(), Range(3, 190), Standardize((9, 80), (70, 40), (1,))])
@pytest.mark.parametrize("augmentation", [None, Augmentation(), Augmentation(**DEFECTS, appearance="independent")])
def test_a_finished_batch_holds_the_samples_to_the_last_bit(normalization, augmentation, workers):
    config = replace(CONFIG, normalization=normalization)
    crops = NestedCrops(slides(np.uint8, np.uint16), config, augmentation=augmentation, samples_per_epoch=6)
    loader = DataLoader(crops.as_stored(), batch_size=3, collate_fn=collate, num_workers=workers)
    types = set()
    for number, batch in enumerate(loader):
        types.add(batch["img"].dtype)
        samples = [crops[3 * number + i] for i in range(3)]
        assert_equal(finish(batch), default_collate(samples))
        for stored, sample in zip(
            crops.as_stored().__getitems__(range(3 * number, 3 * number + 3)), samples, strict=True
        ):
            assert_equal(finish(stored), sample)
    assert types <= set(DTYPES[:2]) and torch.uint16 in types  # bytes, and what holds those of both slides


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.uint32, np.float64])
def test_pixels_travel_in_the_type_of_the_slide_and_without_a_mask_they_do_not_need(dtype):
    crops = GridCrops(slides(dtype, shape=(128, 128)), replace(CONFIG, placement="nested"))
    batch = collate(crops.as_stored().__getitems__([0, 1, 9]))
    assert batch["img"].numpy().dtype == (dtype if np.dtype(dtype) in (np.uint8, np.uint16) else np.float32)
    assert "inside" not in batch
    beside = collate(GridCrops(slides(dtype), CONFIG).as_stored().__getitems__([0, 1, 4]))
    assert beside["inside"].shape == (3, 2, *SIZE) and not beside["inside"].all()


@pytest.mark.parametrize("augmentation", [None, Augmentation(scale=(0.5, 2), rotation_degrees=90)])
def test_a_batch_is_asked_for_as_a_whole_before_the_first_wait(augmentation):
    pairs = slides(np.uint8, np.uint8)
    events = pairs[0][0].events
    plain = replace(CONFIG, cache_mib=0)
    for crops in (NestedCrops(pairs, plain, augmentation=augmentation), GridCrops(pairs, plain)):
        for data in (crops, crops.as_stored()):
            expected = [crops[i] for i in (5, 1, 2)]
            events.clear()
            for found, sample in zip(map(finish, data.__getitems__([5, 1, 2])), expected, strict=True):
                assert_equal(found, sample)
            assert events == ["request"] * 12 + ["wait"] * 12  # two levels of pixels and labels
    kept = GridCrops(pairs, CONFIG)
    events.clear()
    kept.__getitems__([12, 13])
    assert events.index("wait") == events.count("request") == 4 + 2  # labels, and a block of each level
    tiles = ClassifiedTiles([image for image, _ in pairs], [1, 0], replace(plain, num_classes=None))
    assert [int(sample["class"]) for sample in tiles.__getitems__([0, 12])] == [1, 0]


def test_a_subclass_with_samples_of_its_own_is_asked_for_each():
    class Numbered(NestedCrops):
        def __getitem__(self, index):
            return super().__getitem__(index) | {"number": torch.tensor(index)}

    crops = Numbered(slides(np.uint8), CONFIG, samples_per_epoch=4)
    assert [batch["number"].tolist() for batch in DataLoader(crops, batch_size=2)] == [[0, 1], [2, 3]]


def test_a_block_that_could_not_be_read_is_asked_for_again():
    pairs = slides(np.uint8, np.uint8)
    crops = GridCrops(pairs, CONFIG)
    image, read = pairs[1][0], RequestedSlide._read_window
    failing = [OSError("lost")]

    def once(self, *window):
        if failing and self.path == image.path:
            raise failing.pop()
        return read(self, *window)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestedSlide, "_read_window", once)
        with pytest.raises(ReadError, match=r"image 1, level 1, window .*got OSError: lost"):
            crops[12]
        image.events.clear()
        assert crops[12]["img"].any()
        assert image.events.count("request") == 3  # the labels of two levels, and the block


def test_looks_of_a_batch_are_stacked_with_what_they_lack():
    looks = [
        Look(torch.ones(2, 3) * i, torch.ones(2, 3), defects=Defects(kept=torch.ones(2, 3, dtype=torch.bool)))
        for i in range(2)
    ]
    batch = collate([{"img": torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "look": look} for look in looks])["look"]
    assert batch.low.shape == (2, 2, 3) and batch.low[1].eq(1).all() and batch.gain is None
    assert batch.defects.kept.shape == (2, 2, 3) and batch.defects.gamma is None


def test_a_batch_stacks_each_entry_as_torch_does():
    rng = torch.Generator().manual_seed(0)
    samples = [
        {
            "img": torch.rand(2, 3, 4, 5, generator=rng),
            "bbox": torch.rand(2, 2, 2, generator=rng).double(),
            "label": torch.randint(0, 9, (4, 5), generator=rng),
            "labels": torch.rand(2, 4, 5, generator=rng) > 0.5,
            "class": torch.tensor(number),
        }
        for number in range(3)
    ]
    batch, expected = collate(samples), default_collate(samples)
    assert batch.keys() == expected.keys()
    for name, values in expected.items():
        assert batch[name].dtype == values.dtype and torch.equal(batch[name], values)
    batch["img"].mul_(2)  # memory of its own, which can be written
    assert torch.equal(samples[0]["img"], expected["img"][0])
