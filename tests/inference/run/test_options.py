"""Predictions with overlap, flips, probabilities, regions: what comes out is compared with what must come out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from array_slide import ArraySlide

from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.open import open_slide
from muvit.inference.predict import plan_prediction, predict_slide
from muvit.inference.run.blocks import Setup, ready
from muvit.inference.run.canvas import BlockCanvas
from muvit.inference.run.label_blocks import predict_blocks, prediction_status
from muvit.inference.run.plan import PredictOptions
from muvit.inference.tiling.seams import Seams
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

NUM_CLASSES = 3
PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Percentile(),
    class_names=("background", "one", "two"),
    class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
)
SHAPE = (75, 61)


class Net(Segmenter):
    def __init__(self, channels=1, **changes):
        torch.manual_seed(0)
        encoder = {"in_channels": channels, "levels": (1, 4), "num_layers": 4, "dim": 16, "heads": 1} | changes
        encoder = EncoderConfig(**encoder)
        super().__init__(
            SegmenterConfig(encoder=encoder, num_classes=NUM_CLASSES, decoder_widths=(4, 4, 4, 4), stem_width=4)
        )
        with torch.no_grad():
            self.head.weight.mul_(20)  # classes shall differ from pixel to pixel


class Local(Net):
    """Scores that depend on the pixel alone."""

    def label_logits(self, img, bbox=None):
        return img[:, 0, :1] * torch.arange(NUM_CLASSES).reshape(-1, 1, 1) * 3


class Edgy(Net):
    """Says class 2 near the edges of its view, class 1 inside."""

    edge = 3

    def label_logits(self, img, bbox=None):
        logits = torch.zeros(len(img), NUM_CLASSES, *img.shape[3:])
        logits[:, 2] = 5
        logits[:, 1, self.edge : -self.edge, self.edge : -self.edge] = 10
        return logits


class Tilted(Net):
    """Tiles of two halves, left and right, and a last row."""

    def label_logits(self, img, bbox=None):
        classes = torch.ones(img.shape[3:], dtype=torch.long)
        classes[:, 8:] = 2
        classes[-1, :8], classes[-1, 8:] = 0, 0
        return torch.nn.functional.one_hot(classes, NUM_CLASSES).movedim(-1, 0).expand(len(img), -1, -1, -1).float()


@pytest.fixture
def slide():
    pixels = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    return ArraySlide(pixels, levels=(1, 4))


def predict(model, slide, output, **options):
    settings = options.pop("settings", PREPROCESSING)
    return predict_slide(
        model, slide, output, settings, options=PredictOptions(**{"block_px": 40, "overlap": 0.0} | options)
    )


def read(path, name="labels"):
    stored = open_slide(path if name == "labels" else path.with_name(f"{path.name[:-9]}.{name}.ome.zarr"))
    return stored.read(1, (0, 0), stored.shape)


def final_scores(model, slide, batch_size=8, **options):
    """Scores ``(K, *space)`` before anything is decided on them."""
    job = plan_prediction(model, slide, "none.ome.zarr", PREPROCESSING, options=PredictOptions(**options))
    plan = job.store.plan
    scores = np.full((NUM_CLASSES, *SHAPE), np.nan)

    def keep(canvas, values):
        block = plan.tiling.block(canvas.number)
        box = tuple(slice(a, a + n) for a, n in zip(*block, strict=True))
        scores[(slice(None), *box)] = values.numpy()
        return {"labels": values.argmax(0, keepdim=True).to(torch.uint8)}

    with pytest.MonkeyPatch.context() as patch, ready(model, torch.device("cpu")):
        patch.setattr(BlockCanvas, "_outputs_of", keep)
        blocks = list(reversed(range(plan.tiling.num_blocks)))
        setup = Setup(device=torch.device("cpu"), batch_size=batch_size, num_workers=0, count=lambda _: None)
        made = predict_blocks(model, job.slide, plan, blocks, setup)
        assert len(list(made)) == plan.tiling.num_blocks
    return scores


@pytest.mark.parametrize(
    "options",
    [
        {"overlap": 0.25, "average": "logits"},
        {"overlap": 9, "blend": "cosine", "average": "logits"},
        {"overlap": 0.5, "flips": (-1,), "average": "probabilities"},
        {"overlap": 0.25, "average": "logits", "placement": "grid"},
        {"overlap": 0.25, "average": "logits", "placement": "grid", "flips": (-2, -1)},
    ],
)
def test_scores_do_not_depend_on_blocks_or_batches(slide, options):
    model = Net(attention_mode="coarse_to_fine" if options.get("placement") == "grid" else "all")
    whole = final_scores(model, slide, block_px=80, **options)
    assert whole.std() > 0.1
    for block_px, batch_size in ((40, 3), (24, 64)):
        other = final_scores(model, slide, batch_size=batch_size, block_px=block_px, **options)
        assert np.abs(other - whole).max() < 1e-5


@pytest.mark.parametrize("flips", [(), (-1,), (-2, -1)])
def test_shared_coarse_crops_give_what_each_tile_gives_by_itself(slide, flips, monkeypatch):
    model = Net(attention_mode="coarse_to_fine")
    cached = final_scores(model, slide, overlap=0.25, average="logits", flips=flips, block_px=80)
    monkeypatch.setattr("muvit.inference.run.label_blocks.shares_contexts", lambda *_: False)
    plain = final_scores(model, slide, overlap=0.25, average="logits", flips=flips, block_px=80, placement="grid")
    assert np.abs(cached - plain).max() < 1e-5 * np.abs(plain).max()
    assert plain.std() > 0.1


@pytest.mark.parametrize("options", [{}, {"overlap": 0.25}, {"overlap": 5, "blend": "uniform"}, {"flips": (-2, -1)}])
def test_what_depends_on_the_pixel_alone_comes_out_however_tiles_lie(tmp_path, slide, options):
    settings = replace(PREPROCESSING, normalization=Range(high=255))
    output = predict(
        Local(), slide, tmp_path / "a.ome.zarr", probabilities="float16", entropy=True, settings=settings, **options
    )
    value = slide.read(1, (0, 0), SHAPE)[0] / 255
    logits = np.arange(NUM_CLASSES)[:, None, None] * 3 * value
    expected = np.exp(logits) / np.exp(logits).sum(0)
    assert (read(output)[0][value > 0] == 2).all()
    np.testing.assert_allclose(read(output, "probabilities"), expected, atol=1e-3)
    entropy = -(expected * np.log(expected)).sum(0) / np.log(NUM_CLASSES)
    np.testing.assert_allclose(read(output, "entropy")[0], entropy, atol=2e-3)


def test_probabilities_are_named_and_sum_to_one(tmp_path, slide):
    output = predict(Net(), slide, tmp_path / "a.ome.zarr", overlap=0.25, probabilities="uint8")
    stored = open_slide(tmp_path / "a.probabilities.ome.zarr")
    assert stored.channel_names == PREPROCESSING.class_names
    assert stored.dtype == np.uint8
    shares = read(output, "probabilities").astype(int)
    assert np.abs(shares.sum(0) - 255).max() <= NUM_CLASSES // 2 + 1
    clear = np.sort(shares, axis=0)
    clear = clear[-1] > clear[-2]
    assert (shares.argmax(0) == read(output)[0])[clear].all()


def test_only_the_central_parts_of_tiles_are_written(tmp_path, slide):
    def share_of_edges(**options):
        name = "-".join(map(str, options.values()))
        return read(predict(Edgy(), slide, tmp_path / f"{name}.ome.zarr", **options))[0] == 2

    border = np.ones(SHAPE, bool)
    border[3:-3, 3:-3] = False
    assert share_of_edges(overlap=0)[16, 16]
    assert (share_of_edges(overlap=6, blend="center") == border).all()


def test_by_default_the_edges_of_tiles_do_not_show(tmp_path, slide):
    """Nor where the last tiles were moved back into the image."""
    model = Edgy()
    model.edge = 2
    labels = read(predict_slide(model, slide, tmp_path / "a.ome.zarr", PREPROCESSING))[0]
    assert (labels[2:-2, 2:-2] == 1).all()


def test_the_seam_metric_shows_seams(tmp_path):
    slide = ArraySlide(np.random.default_rng(0).integers(0, 256, (1, 80, 64), dtype=np.uint8), levels=(1, 4))
    tiled = predict(Tilted(), slide, tmp_path / "tiled.ome.zarr", block_px=80)
    seams = prediction_status(tiled).seams
    # the last row of a tile is of class 0 throughout: nothing changes along it
    assert (seams.across, seams.across_pairs) == (3 * (80 - 5) + 4 * 64, 3 * 80 + 4 * 64)
    assert (seams.inside, seams.inside_pairs) == (4 * (80 - 5), 4 * 80 + 5 * 64)
    assert seams.ratio == pytest.approx((481 / 496) / (300 / 640))
    told = "labels change 2.07 times as often across the seams of tiles as inside tiles"
    assert str(seams) == f"{told}; a larger --overlap makes them smoother"
    assert "--overlap" not in str(Seams(across=1, across_pairs=10, inside=1, inside_pairs=10))
    assert str(Seams(across=1, across_pairs=10)) == ""


class Watching(Net):
    """Keeps what it is shown."""

    def __init__(self, **changes):
        super().__init__(**changes)
        self.seen = []

    def label_logits(self, img, bbox=None):
        self.seen += list(zip(img.numpy().copy(), bbox.numpy().copy(), strict=True))
        return torch.zeros(len(img), NUM_CLASSES, *img.shape[3:])


def test_flipped_views_show_the_mirrored_scene_at_true_places(tmp_path):
    """Channels are world coordinates: a mirrored pixel shows its mirror image's coordinate at its own place."""
    from muvit.data.pyramids.reduction import area_mean

    world = np.stack(np.indices((96, 96))).astype(np.float32) + 0.5

    class World(ArraySlide):
        def __init__(self):
            super().__init__(world, levels=(1, 4))
            self.pyramid[4.0] = area_mean(world, 4)

    model = Watching(channels=2)
    predict(
        model,
        World(),
        tmp_path / "a.ome.zarr",
        flips=(-2, -1),
        block_px=96,
        settings=replace(PREPROCESSING, normalization=Range(high=1)),
    )
    kinds = set()
    for img, bbox in model.seen:
        centre = bbox[-1].mean(0)
        kind = tuple(bool(img[0, axis].take(0, axis).mean() > img[0, axis].take(-1, axis).mean()) for axis in (0, 1))
        kinds.add(kind)
        for view, (lower, upper) in zip(img, bbox, strict=True):
            for axis in (0, 1):
                place = lower[axis] + (np.arange(16) + 0.5) * (upper[axis] - lower[axis]) / 16
                truth = 2 * centre[axis] - place if kind[axis] else place
                shown = view[axis].max(1 - axis)
                np.testing.assert_allclose(shown[shown > 0], truth[shown > 0])
    assert len(kinds) == 4
    assert len(model.seen) == 4 * 36


def test_inside_a_region_all_is_as_in_a_whole_run_and_outside_nothing_is_computed(tmp_path, slide):
    options = {"overlap": 0.25, "probabilities": "uint8"}
    whole = predict(Net(), slide, tmp_path / "whole.ome.zarr", **options)
    region = "POLYGON ((8 20, 30 20, 30 44, 8 44, 8 20))"
    model = Net()
    part = predict(model, slide, tmp_path / "part.ome.zarr", region=region, **options)
    inside = (slice(None), slice(20, 44), slice(8, 30))
    for name in ("labels", "probabilities"):
        assert (read(part, name)[inside] == read(whole, name)[inside]).all()
        assert (read(part, name)[:, 60:] == 0).all()
        assert (read(part, name)[:, :, 46:] == 0).all()
    assert prediction_status(part).seams.across_pairs < prediction_status(whole).seams.across_pairs


def test_empty_glass_is_background_and_costs_nothing(tmp_path):
    pixels = np.zeros((1, *SHAPE), np.uint8)
    pixels[:, 8:30, 4:40] = 200
    model = Watching()
    steps = []
    settings = replace(PREPROCESSING, normalization=Range(high=255))
    predict_slide(
        model,
        ArraySlide(pixels, levels=(1, 4)),
        tmp_path / "a.ome.zarr",
        settings,
        options=PredictOptions(tissue="bright", block_px=80, overlap=0.0),
        progress=lambda *step: steps.append(step),
    )
    assert len(model.seen) == 2 * 3
    assert steps[-1] == (6, 6)


def test_missing_levels_are_computed(tmp_path):
    from muvit.data.pyramids.reduction import area_mean

    pixels = np.random.default_rng(0).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
    stored = ArraySlide(pixels, levels=(1, 4))
    stored.pyramid[4.0] = area_mean(pixels, 4)
    one = predict(Net(), stored, tmp_path / "one.ome.zarr")
    two = predict(Net(), ArraySlide(pixels), tmp_path / "two.ome.zarr")
    assert (read(one) == read(two)).all()
