"""Predictions with overlap, flips, probabilities, regions: what comes out is compared with what must come out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from array_slide import ArraySlide

from muvit.data.crops.normalize import Percentile, Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.slides.open import open_slide
from muvit.inference.predict import plan_prediction, predict_slide, run_prediction
from muvit.inference.run.blocks import Setup, ready
from muvit.inference.run.canvas import BlockCanvas
from muvit.inference.run.execution import Execution
from muvit.inference.run.label_blocks import predict_blocks, prediction_status
from muvit.inference.run.plan import PredictOptions
from muvit.inference.run.reading import SlideTiles
from muvit.inference.run.refinement import TileCounts
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


@pytest.mark.parametrize("options", [{}, {"flips": (-1,)}, {"flips": (-2, -1), "overlap": 0.5, "refine": 0.5}])
def test_shared_coarse_crops_give_what_each_tile_gives_by_itself(slide, options, monkeypatch):
    model, options = (
        Net(attention_mode="coarse_to_fine"),
        {"overlap": 0.25, "average": "logits", "block_px": 80} | options,
    )
    cached = final_scores(model, slide, **options)
    monkeypatch.setattr("muvit.inference.run.label_blocks.shares_contexts", lambda *_: False)
    plain = final_scores(model, slide, **options, placement="grid")
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


class Fading(Net):
    """Certain above row 46, undecided below."""

    def label_logits(self, img, bbox=None):
        y = bbox[:, 0, 0, 0, None] + torch.arange(16)
        return super().label_logits(img, bbox) * (100 * (y < 46))[:, None, :, None]


@pytest.mark.parametrize(("kind", "options"), [(Net, {"overlap": 0.25}), (Fading, {"overlap": 0.5, "refine": 0.6})])
def test_inside_a_region_all_is_as_in_a_whole_run_and_outside_nothing_is_written(tmp_path, slide, kind, options):
    """Also tiles that lie half outside are decided about as in the whole run."""
    options = {"probabilities": "uint8", **options}
    whole = predict(kind(), slide, tmp_path / "whole.ome.zarr", **options)
    region = "POLYGON ((8 20, 30 20, 30 44, 8 44, 8 20))"
    part = predict(kind(), slide, tmp_path / "part.ome.zarr", region=region, **options)
    inside = (slice(None), slice(20, 44), slice(8, 30))
    for name in ("labels", "probabilities"):
        assert (read(part, name)[inside] == read(whole, name)[inside]).all()
        assert (read(part, name)[:, 60:] == 0).all()
        assert (read(part, name)[:, :, 46:] == 0).all()
    assert prediction_status(part).seams.across_pairs < prediction_status(whole).seams.across_pairs


# -- refinement --------------------------------------------------------------------------------------------------------


def mean_entropies(plan, probabilities):
    """Of each tile between those of the first pass, by its place in the grid: the definition, pixel by pixel."""
    along = [{*range(0, n, 2), n - 1} for n in plan.grid]
    first = [number for number, tile in enumerate(plan) if all(i in a for i, a in zip(tile.place, along, strict=True))]
    decided = {}
    for tile in (tile for number, tile in enumerate(plan) if number not in first):
        own = np.outer(*(plan.weights_along(axis, i) for axis, i in enumerate(tile.place)))
        total = weight = 0.0
        for number in first:
            shift = np.subtract(plan.tile(number).windows[0].start, tile.windows[0].start)
            if abs(shift).max() >= 16:
                continue
            p = probabilities[number]
            entropy = -(p * np.log(p)).sum(0) / np.log(NUM_CLASSES)
            for y, x in np.ndindex(16, 16):
                at = (y + shift[0], x + shift[1])
                if min(at) >= 0 and max(at) < 16:
                    total, weight = total + own[at] * entropy[y, x], weight + own[at]
        decided[tile.place] = total / weight
    return decided


def test_refinement_computes_the_tiles_of_high_mean_entropy_whatever_the_blocks(slide):
    model = Net()
    job = plan_prediction(model, slide, "none.ome.zarr", PREPROCESSING, options=PredictOptions(block_px=80))
    plan, reader = job.store.plan.tiling, SlideTiles(job.slide, job.store.plan.tiling, PREPROCESSING)
    shown = [reader[number] for number in range(len(plan))]
    with torch.inference_mode(), ready(model, torch.device("cpu")):
        logits = model.label_logits(*(torch.stack([tile[name] for tile in shown]) for name in ("img", "bbox")))
        probabilities = logits.softmax(1).numpy()
    decided = mean_entropies(plan, probabilities)
    low, high = np.quantile([*decided.values()], [0.5, 0.6], method="lower")
    threshold = (low + high) / 2
    sums, weights = np.zeros((NUM_CLASSES, *SHAPE)), np.zeros(SHAPE)
    for tile, p in zip(plan, probabilities, strict=True):
        if decided.get(tile.place, 1) > threshold:
            box = tuple(slice(a, a + n) for a, n in zip(tile.start, tile.size, strict=True))
            weight = np.outer(*plan.weights(tile))
            sums[(slice(None), *box)] += weight * p[(slice(None), *tile.source)]
            weights[box] += weight
    for block_px, batch_size in ((80, 8), (40, 3), (24, 64)):
        scores = final_scores(model, slide, batch_size=batch_size, block_px=block_px, overlap=0.5, refine=threshold)
        assert np.abs(scores - sums / weights).max() < 1e-5


@pytest.mark.parametrize(("refine", "same"), [(0, {"overlap": 0.5}), (1, {"overlap": 0.0})])
def test_refinement_of_all_or_nothing_is_a_run_with_overlap_or_without(tmp_path, slide, refine, same):
    steps, model = [], Net()
    options = {"probabilities": "float16", "block_px": 80}
    one = predict(model, slide, tmp_path / "one.ome.zarr", **options, **same)
    two = predict_slide(
        model,
        slide,
        tmp_path / "two.ome.zarr",
        PREPROCESSING,
        options=PredictOptions(**options, refine=refine),
        progress=lambda *step: steps.append(step),
    )
    alone = (..., slice(59), slice(45))  # behind, the last tiles overlap those before them
    np.testing.assert_allclose(read(one, "probabilities")[alone], read(two, "probabilities")[alone], atol=2e-3)
    assert (read(one) == read(two))[alone].mean() > 0.999
    all_tiles, first = 9 * 7, 5 * 4
    assert steps[-1] == (all_tiles, all_tiles)
    done = prediction_status(two)
    assert done.tiles == TileCounts(computed=first if refine else all_tiles, planned=all_tiles)
    assert prediction_status(one).tiles is None
    if refine:
        assert str(done.tiles) == "20 of 63 tiles were computed, as labels are certain where the others lie"


def test_the_seam_metric_looks_where_tiles_of_the_first_pass_meet(tmp_path):
    slide = ArraySlide(np.zeros((1, 80, 64), np.uint8), levels=(1, 4))
    plain = predict(Tilted(), slide, tmp_path / "plain.ome.zarr", overlap=0, block_px=80)
    refined = predict(Tilted(), slide, tmp_path / "refined.ome.zarr", overlap=0.5, refine=1, block_px=80)
    assert prediction_status(refined).seams == prediction_status(plain).seams


def test_a_refined_run_resumes_and_does_not_believe_counts_of_another(tmp_path, slide):
    options = PredictOptions(refine=0.6, block_px=40)
    jobs = [plan_prediction(Net(), slide, tmp_path / f"{n}.ome.zarr", PREPROCESSING, options=options) for n in range(2)]
    run_prediction(jobs[0], Execution(batch_size=3))
    assert run_prediction(jobs[1], Execution(batch_size=3, part="2/2")) is None
    done = jobs[1].store.done()
    with jobs[1].store.ledger("read-last") as ledger:
        ledger.record("block 1", {**done["block 1"], "tiles": [3, 4]})  # of no run of this plan
        assert [*done, *jobs[1].store.done()] == ["block 1", "block 3", "block 3"]
        ledger.path.unlink()
    status = run_prediction(jobs[1], Execution(batch_size=3))
    first, second = (job.store.path for job in jobs)
    assert (read(first) == read(second)).all()
    assert status.tiles == prediction_status(first).tiles
    assert status.tiles.computed < status.tiles.planned


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
