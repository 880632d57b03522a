import numpy as np
import pytest
import torch
from array_slide import ArraySlide

from muvit.data.crops.normalize import Percentile, Range, Standardize
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.crops.slide_crops import read_views
from muvit.errors import ReadError
from muvit.inference.run.reading import SlideTiles, read_tiles
from muvit.inference.tiling.tiles import TilePlan

LEVELS, CROP = (1, 4, 8), (16, 24)
CPU = torch.device("cpu")


class CountedSlide(ArraySlide):
    """Keeps what was read, as level and start."""

    def __init__(self, pixels):
        super().__init__(pixels, levels=LEVELS)
        self.reads = []

    def request(self, level, start, size, **options):
        self.reads.append((level, tuple(start)))
        return super().request(level, start, size, **options)


@pytest.fixture
def slide():
    return CountedSlide(np.random.default_rng(0).integers(0, 256, (2, 130, 170), dtype=np.uint8))


def tiling(slide, placement):
    shapes = tuple(slide.level_shape(level) for level in LEVELS)
    return TilePlan(shapes=shapes, levels=LEVELS, crop_size=CROP, block_size=(64, 96), placement=placement)


def preprocessing(normalization):
    return Preprocessing(
        crop_size=CROP, normalization=normalization, class_names=("a", "b"), class_colors=((0, 0, 0), (1, 1, 1))
    )


@pytest.mark.parametrize("placement", ["nested", "grid", "concentric", "free"])
@pytest.mark.parametrize(
    "normalization",
    [Percentile(), Percentile(scope="sample"), Range(high=255), Standardize((9.0, 99.0), (8.0, 70.0), local_mean=(1,))],
    ids=["view", "sample", "range", "standardize"],
)
def test_a_tile_is_what_its_windows_show(slide, placement, normalization):
    plan, settings = tiling(slide, placement), preprocessing(normalization)
    tiles = SlideTiles(slide, plan, settings)
    assert len(tiles) == len(plan)
    for number in range(len(plan)):
        whole = read_views(slide, plan.tile(number).windows, settings.crops(LEVELS))
        assert tiles[number]["tile"] == number
        assert torch.equal(tiles[number]["img"], whole["img"])
        assert torch.equal(tiles[number]["bbox"], whole["bbox"])


def test_a_coarse_crop_that_the_next_tile_shares_is_not_read_again(slide):
    plan = tiling(slide, "grid")
    tiles = SlideTiles(slide, plan, preprocessing(Range(high=255)))
    for number in range(len(plan)):
        tiles[number]
    for index, level in enumerate(LEVELS):
        starts = [plan.tile(number).windows[index].start for number in range(len(plan))]
        changes = [start for before, start in zip([None, *starts], starts, strict=False) if start != before]
        assert [start for read, start in slide.reads if read == level] == changes
    assert len([level for level, _ in slide.reads if level == 8]) < len(plan) / 2


def test_what_a_tile_shows_can_be_changed_without_harm_to_the_next(slide):
    tiles = SlideTiles(slide, tiling(slide, "grid"), preprocessing(Range(high=255)))
    before = tiles[0]["img"].clone()
    tiles[0]["img"].zero_()
    assert torch.equal(tiles[0]["img"], before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_come_in_order(slide, num_workers):
    tiles = SlideTiles(slide, tiling(slide, "grid"), preprocessing(Percentile()))
    batches = list(read_tiles(tiles, [[3, 1], [0]], device=CPU, num_workers=num_workers))
    assert [batch["tile"].tolist() for batch in batches] == [[3, 1], [0]]
    assert torch.equal(batches[0]["img"], torch.stack([tiles[3]["img"], tiles[1]["img"]]))


def test_what_cannot_be_read_is_told_by_its_own_error(slide, monkeypatch):
    def broken(*_, **__):
        raise ReadError("slide.tif", expected="pixels", got="a hole")

    tiles = SlideTiles(slide, tiling(slide, "grid"), preprocessing(Range(high=255)))
    monkeypatch.setattr(CountedSlide, "request", broken)
    with pytest.raises(ReadError, match=r"slide.tif: expected pixels, got a hole"):
        tiles.check()
    with pytest.raises(ReadError, match=r"slide.tif: expected pixels, got a hole"):
        next(read_tiles(tiles, [[0]], device=CPU, num_workers=0))
