from itertools import product

import pytest
import torch

from muvit.data.crops.placement import Window, place_views
from muvit.inference.run.context import ContextCaching
from muvit.models.context import encode_context
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

LEVELS, SIDE = (1, 2, 8), 8
COPIES = {"encoder": {"coarse_copies": "under"}}
QUERIES = {"decoder": "mask2former", "num_queries": 4, "query_heads": 2}


def model(encoder=(), **changes):
    torch.manual_seed(0)
    fields = {"in_channels": 1, "levels": LEVELS, "patch_size": 4, "dim": 16, "num_layers": 3, "heads": 2}
    fields |= {"attention_mode": "coarse_to_fine", "rotary_base": 100} | dict(encoder)
    config = EncoderConfig(**fields)
    segmenter = Segmenter(
        SegmenterConfig(encoder=config, num_classes=3, decoder_widths=(8, 8, 4), stem_width=4, **changes)
    ).eval()
    with torch.no_grad():  # scores far from zero, so that it matters who attends to whom
        for block in segmenter.encoder.layers:
            block.attn.qkv.weight[:32] *= 3
        if segmenter.encoder.copies is not None:
            segmenter.encoder.copies.vector.normal_()
    return segmenter


def nested_windows(tile):
    """Crops of all levels for the tile with this index: two by two tiles share the second, all of them the third."""
    starts = (
        tuple(100_000 + SIDE * i for i in tile),
        tuple(50_000 + SIDE * (i // 2) for i in tile),
        (12_498,) * len(tile),
    )
    return tuple(Window(level, start, (SIDE,) * len(tile)) for level, start in zip(LEVELS, starts, strict=True))


def tiles(ndim=2, side=4):
    """Views, boxes and windows of ``side`` ** ``ndim`` tiles; equal windows hold equal pixels."""
    windows = [nested_windows(tile) for tile in product(range(side), repeat=ndim)]
    pixels = {
        window: torch.randn(1, *(SIDE,) * ndim, generator=torch.Generator().manual_seed(seed))
        for seed, window in enumerate(dict.fromkeys(window for crops in windows for window in crops))
    }
    img = torch.stack([torch.stack([pixels[window] for window in crops]) for crops in windows])
    return img, torch.stack([torch.stack([window.box for window in crops]) for crops in windows]), windows


@pytest.fixture
def encoded(monkeypatch):
    """The number of levels beyond each coarse view that was encoded."""
    calls = []

    def counting(encoder, x, bbox, context=None):
        calls.append(0 if context is None else len(context.levels))
        return encode_context(encoder, x, bbox, context)

    monkeypatch.setattr("muvit.inference.run.context.encode_context", counting)
    return calls


@pytest.mark.parametrize(
    "changes",
    [{}, QUERIES, {"boxes": "naive"}, {"decode": "all"}, COPIES, COPIES | QUERIES, COPIES | {"boxes": "naive"}],
    ids=str,
)
@torch.no_grad()
def test_logits_are_those_without_a_memory_in_any_order_and_batch(changes):
    segmenter, (img, bbox, windows) = model(**changes), tiles()
    expected = segmenter.label_logits(img, bbox)
    for batch, seed in ((1, 0), (5, 1), (16, 2)):
        caching = ContextCaching(segmenter)
        for chosen in torch.randperm(16, generator=torch.Generator().manual_seed(seed)).split(batch):
            logits = caching.label_logits(img[chosen], bbox[chosen], [windows[i] for i in chosen])
            torch.testing.assert_close(logits, expected[chosen], rtol=0, atol=1e-5)
    assert expected.std() > 0.05


@torch.no_grad()
def test_volumes_are_cached_alike():
    segmenter, (img, bbox, windows) = model({"ndim": 3, "coarse_copies": "under"}), tiles(ndim=3, side=2)
    logits = ContextCaching(segmenter).label_logits(img, bbox, windows)
    torch.testing.assert_close(logits, segmenter.label_logits(img, bbox), rtol=0, atol=1e-5)


@torch.no_grad()
def test_each_coarse_view_is_encoded_once(encoded):
    segmenter, (img, bbox, windows) = model(), tiles()
    caching = ContextCaching(segmenter)
    for i in range(16):
        caching.label_logits(img[i : i + 1], bbox[i : i + 1], [windows[i]])
    assert sorted(encoded) == [0] + 4 * [1]


@torch.no_grad()
def test_what_is_forgotten_is_encoded_again(encoded):
    segmenter, (img, bbox, windows) = model(), tiles()
    caching = ContextCaching(segmenter, capacity=2)  # the coarsest view and one inside it
    for corner in (0, 2, 0, 0):
        logits = caching.label_logits(img[corner : corner + 1], bbox[corner : corner + 1], [windows[corner]])
    assert encoded == [0, 1, 1, 1]
    torch.testing.assert_close(logits, segmenter.label_logits(img[:1], bbox[:1]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("encoder", [{"attention_mode": "all"}, {"levels": (1,)}])
@torch.no_grad()
def test_other_models_go_their_ordinary_way(encoder, encoded):
    segmenter, (img, bbox, windows) = model(encoder), tiles()
    caching, count = ContextCaching(segmenter), len(segmenter.encoder.levels)
    assert not caching.is_caching
    logits = caching.label_logits(img[:, :count], bbox[:, :count], [crops[:count] for crops in windows])
    assert torch.equal(logits, segmenter.label_logits(img[:, :count], bbox[:, :count]))
    assert encoded == []


@pytest.mark.parametrize("changes", [{}, QUERIES, {"decode": "all"}], ids=str)
@torch.no_grad()
def test_leaving_out_what_the_decoder_does_not_read_changes_nothing(changes):
    segmenter, (img, bbox, _) = model({"attention_mode": "all"}, **changes), tiles()
    whole = segmenter.decode(segmenter.encode(img, bbox), img, 0)
    torch.testing.assert_close(segmenter.label_logits(img, bbox), whole, rtol=0, atol=1e-5)


def test_tiles_of_a_block_share_few_coarse_crops():
    levels, size, block = (1, 8, 32), (16, 16), 256  # 16 x 16 tiles
    shapes = [(4096 // level,) * 2 for level in levels]
    for corner in ((1024, 1024), (512, 2048)):  # away from the border
        starts = product(*(range(a, a + block, 16) for a in corner))
        windows = [place_views("grid", shapes, levels, size, start=start).windows for start in starts]
        assert [len({crops[level:] for crops in windows}) for level in range(3)] == [256, 16, 1]
