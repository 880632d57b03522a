import json
from dataclasses import replace
from math import isnan

import numpy as np
import pytest

from muvit.data.pyramids.reduction import majority
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.errors import InputError
from muvit.evaluation.score_picture import draw_scores
from muvit.evaluation.scores import boundaries
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.boundaries import BoundaryConfig
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.metrics import confusion_matrix, scores


@pytest.fixture
def write(tmp_path):
    def write(name, labels, **fields):
        labels = np.asarray(labels)
        options = {"kind": "label", "num_channels": 1, "chunk": 16, "shard": 32} | fields
        writer = PyramidWriter.create(
            tmp_path / f"{name}.ome.zarr", shape=labels.shape, dtype=labels.dtype, levels=(1,), **options
        )
        writer.write((0,) * labels.ndim, np.repeat(labels[None], options["num_channels"], 0))
        writer.finish()
        return OmeZarrSlide(tmp_path / f"{name}.ome.zarr")

    return write


def draw(seed, shape, high):
    return np.random.default_rng(seed).integers(0, high, shape).astype(np.uint8)


@pytest.mark.parametrize("shape", [(70, 45), (10, 33, 21)])
def test_blocks_change_nothing(write, monkeypatch, shape):
    true, guessed = draw(0, shape, 5), draw(1, shape, 4)
    monkeypatch.setattr(boundaries, "BLOCK_PIXELS", 1 << 9)
    result = evaluate_slides([(write("guess", guessed), write("truth", true))], 4, ignore=(4,))
    expected = confusion_matrix(true, guessed, 4, (4,))
    assert (result.confusion == expected).all()
    assert result.confusion.sum() == (true != 4).sum()
    assert result.pooled.mean_dice == scores(expected).mean_dice


def test_coarser_levels_are_scored_by_majority_of_both_sides(write, monkeypatch):
    true, guessed = draw(0, (64, 48), 4), draw(1, (64, 48), 3)
    true[:32, :24] = 3  # ignored, also in the majority
    monkeypatch.setattr(boundaries, "BLOCK_PIXELS", 1 << 6)
    pairs = [(write("guess", guessed), write("truth", true))]
    told = []
    result = evaluate_slides(
        pairs, 3, ignore=(3,), levels=(1, 2, 8), progress=lambda done, total: told.append((done, total))
    )
    assert result.levels == (2, 8) and told[-1][0] == told[-1][1] == len(told)
    values, table = result.summary(), result.level_table()
    for factor, row in zip((1, 2, 8), table, strict=True):
        coarse = [majority(labels[None], factor)[0] if factor > 1 else labels for labels in (true, guessed)]
        expected = scores(confusion_matrix(*coarse, 3, (3,)))
        assert row == {"level": str(factor), "1": expected.dice[1], "2": expected.dice[2], "mDSC": expected.mean_dice}
        if factor > 1:
            assert values[f"mean_dice_level_{factor}"] == expected.mean_dice
            assert values[f"dice_level_{factor}/2"] == expected.dice[2]
    low, high = evaluate_slides(three_slides(write), 3, levels=(2,)).intervals()["mean_dice_level_2"]
    assert low < high
    assert result.to_dict()["pooled"]["dice_level_8"]["1"] == table[2]["1"]
    with pytest.raises(InputError, match="ascending"):
        evaluate_slides(pairs, 4, levels=(8, 2))
    with pytest.raises(InputError, match=r"level 1\.5"):
        evaluate_slides(pairs, 4, levels=(1.5,))


def test_errors_along_outlines_vanish_at_coarse_levels(write):
    true = np.zeros((64, 64), np.uint8)
    true[:, 32:] = 1
    result = evaluate_slides([(write("guess", np.roll(true, 3, axis=1)), write("truth", true))], 2, levels=(8,))
    assert result.summary()["mean_dice"] < 0.95
    assert result.summary()["mean_dice_level_8"] == 1


def test_pooled_scores_count_pixels_and_slide_scores_count_slides(write):
    # large slide all right, small slide all wrong in class 1
    pairs = [
        (write("g1", np.ones((40, 40), np.uint8)), write("large", np.ones((40, 40), np.uint8))),
        (write("g2", np.zeros((4, 4), np.uint8)), write("small", np.ones((4, 4), np.uint8))),
        (write("g3", np.zeros((4, 4), np.uint8)), write("empty", np.zeros((4, 4), np.uint8))),
    ]
    result = evaluate_slides(pairs, 2, class_names=("background", "cell"))
    assert result.pooled.dice[1] == pytest.approx(2 * 1600 / (1600 + 1616))
    assert [alone.mean_dice for alone in result.slide_scores[:2]] == [1.0, 0.0]
    assert result.mean_slide_dice == 0.5
    assert isnan(result.slide_scores[2].mean_dice)
    assert [row["slide"] for row in result.table()] == ["large", "small", "empty", "all"]
    assert result.table()[-1]["cell"] == result.table()[-1]["mDSC"] == result.pooled.mean_dice


def test_the_dictionary_is_plain_json_with_null_for_what_does_not_exist(write):
    result = evaluate_slides([(write("g", np.zeros((4, 4), np.uint8)), write("t", np.zeros((4, 4), np.uint8)))], 2)
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["pooled"]["mean_dice"] is None
    assert content["mean_slide_dice"] is None
    assert content["slides"]["t"]["dice"] == {"0": 1.0, "1": None}
    assert content["pooled"]["accuracy"] == 1.0
    assert content["confusion"] == [[16, 0], [0, 0]]


def test_a_wrong_label_is_refused_with_its_file_unless_ignored(write):
    true, guessed = draw(0, (20, 20), 3), draw(1, (20, 20), 3)
    true[7, 7] = 14
    guess, truth = write("guess", guessed), write("truth", true)
    with pytest.raises(InputError, match=r"truth\.ome\.zarr, block at .*expected labels 0 to 2, got 14"):
        evaluate_slides([(guess, truth)], 3)
    assert evaluate_slides([(guess, truth)], 3, ignore=(14,)).confusion.sum() == 399
    with pytest.raises(InputError, match=r"guess\.ome\.zarr, block at .*got 2"):
        evaluate_slides([(guess, write("binary", np.minimum(true, 1)))], 2)


def test_what_cannot_be_compared_is_refused(write):
    truth, other = write("truth", draw(0, (20, 20), 3)), write("other", draw(0, (20, 21), 3))
    colours = write("colours", draw(0, (20, 20), 3), kind="image", num_channels=3)
    with pytest.raises(InputError, match=r"other\.ome\.zarr: expected shape \(20, 20\)"):
        evaluate_slides([(other, truth)], 3)
    with pytest.raises(InputError, match="one channel of integers"):
        evaluate_slides([(colours, truth)], 3)
    with pytest.raises(InputError, match="at least one prediction"):
        evaluate_slides([], 3)
    with pytest.raises(InputError, match="different names"):
        evaluate_slides([(truth, truth), (truth, truth)], 3)
    with pytest.raises(InputError, match="class_names: expected 3 different names"):
        evaluate_slides([(truth, truth)], 3, class_names=("a", "b"))


def three_slides(write):
    rng = np.random.default_rng(5)
    pairs = []
    for i, wrong in enumerate((0.1, 0.3, 0.5)):
        true = np.kron(rng.integers(0, 3, (4, 5)), np.ones((6, 6), int)).astype(np.uint8)
        guess = np.where(rng.random(true.shape) < wrong, rng.integers(0, 3, true.shape), true).astype(np.uint8)
        pairs.append((write(f"g{i}", guess), write(f"t{i}", true)))
    return pairs


def test_intervals_hold_the_scores_and_come_from_resampled_slides(write):
    pairs = three_slides(write)
    result = evaluate_slides(pairs, 3, class_names=("background", "a", "b"), boundary=BoundaryConfig(tolerance=1))
    values, intervals = result.summary(), result.intervals()
    assert set(values) == set(intervals) >= {"mean_dice", "dice/a", "iou/b", "boundary_f1/a", "mean_hd95"}
    for name, (low, high) in intervals.items():
        assert low <= values[name] <= high
    # with three slides, the extremes are those of one slide drawn three times
    alone = [slide.mean_dice for slide in result.slide_scores]
    low, high = result.intervals(BootstrapConfig(coverage=0.999))["mean_dice"]
    assert low == pytest.approx(min(alone)) and high == pytest.approx(max(alone))
    times = np.array([2, 0, 1])
    doubled = result.slides[0].confusion * 2 + result.slides[2].confusion
    assert result.summary(times)["mean_dice"] == pytest.approx(scores(doubled).mean_dice)
    assert result.summary(times)["mean_slide_dice"] == pytest.approx((2 * alone[0] + alone[2]) / 3)


def test_boundaries_are_pooled_over_slides_and_distances_averaged(write):
    result = evaluate_slides(three_slides(write), 3, boundary=BoundaryConfig(tolerance=1))
    found = sum(s.boundaries.found_predicted for s in result.slides) / sum(
        s.boundaries.num_predicted for s in result.slides
    )
    missed = sum(s.boundaries.found_true for s in result.slides) / sum(s.boundaries.num_true for s in result.slides)
    assert result.summary()["boundary_f1/1"] == pytest.approx((2 * found * missed / (found + missed))[1])
    assert result.summary()["hd95/2"] == pytest.approx(np.mean([s.hausdorff[2] for s in result.slides]))
    content = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert content["boundary"] == {"tolerance": 1, "unit": "px"}
    assert set(content["pooled"]["boundary_f1"]) == {"0", "1", "2"}
    assert len(content["intervals"]["mean_dice"]) == 2


def test_rows_hold_every_score_of_every_slide(write):
    result = evaluate_slides(three_slides(write), 3)
    rows = result.rows()
    assert {row["slide"] for row in rows} == {"t0", "t1", "t2", "all"}
    (total,) = (row for row in rows if row["slide"] == "all" and row["score"] == "mean_dice")
    assert total["value"] == result.pooled.mean_dice
    assert total["low"] < total["value"] < total["high"]
    assert sum(row["score"] == "dice" for row in rows) == 4 * 3
    assert all(isnan(row["low"]) for row in rows if row["slide"] != "all")


@pytest.mark.parametrize("has_background", [True, False])
def test_the_table_of_classes_and_the_means_follow_the_background(write, has_background):
    names, boundary = ("road", "a", "b"), BoundaryConfig(tolerance=1)
    result = evaluate_slides(
        three_slides(write), 3, class_names=names, has_background=has_background, boundary=boundary
    )
    values, first = result.summary(), int(has_background)
    *classes, mean = result.class_table()
    if has_background:
        *classes, foreground = classes
        assert foreground["class"] == "mean of foreground"
        assert foreground["IoU"] == values["mean_foreground_iou"]
        assert foreground["Dice"] == values["mean_dice"]
        assert (foreground["boundary F1"], foreground["HD95"]) == (values["mean_boundary_f1"], values["mean_hd95"])
    assert [row["class"] for row in classes] == list(names)
    assert [row["Dice"] for row in classes] == [values[f"dice/{name}"] for name in names]
    assert mean["class"] == "mean"
    assert mean["IoU"] == values["mean_iou"] == np.mean([values[f"iou/{name}"] for name in names])
    assert values["mean_foreground_iou"] == np.mean([values[f"iou/{name}"] for name in names[first:]])
    assert values["mean_dice"] == np.mean([values[f"dice/{name}"] for name in names[first:]])
    alone = [scores(slide.confusion).dice[first:].mean() for slide in result.slides]
    assert result.mean_slide_dice == pytest.approx(np.mean(alone))
    assert list(result.table()[0]) == ["slide", *names[first:], "mDSC"]
    assert result.to_dict()["has_background"] is has_background
    assert np.asarray(draw_scores(result)).std() > 0


def test_an_ignored_class_has_no_score_though_it_is_predicted(write):
    true = np.repeat([[0, 1, 2, 3]], 8, axis=0).astype(np.uint8).repeat(4, axis=1)
    predicted = true.copy()
    predicted[:2, 4:8] = 3  # a quarter of class 1
    predicted[true == 3] = 2  # and nothing that is ignored is right
    names, boundary = ("background", "a", "b", "other"), BoundaryConfig(tolerance=1)
    pair = (write("prediction", predicted), write("truth", true))
    result = evaluate_slides([pair], 4, ignore=(3,), class_names=names, boundary=boundary)
    values = result.summary()
    assert values["dice/a"] == pytest.approx(2 * 24 / (24 + 32))
    assert values["mean_dice"] == result.mean_slide_dice == pytest.approx((values["dice/a"] + 1) / 2)
    assert values["mean_iou"] == pytest.approx((1 + 24 / 32 + 1) / 3)
    assert values["mean_foreground_iou"] == pytest.approx((24 / 32 + 1) / 2)
    assert values["accuracy"] == (3 * 32 - 8) / (3 * 32)
    assert values["mean_boundary_f1"] == np.mean([values["boundary_f1/a"], values["boundary_f1/b"]]) > 0
    assert not any(name.endswith("/other") for name in values)
    assert list(result.table()[0]) == ["slide", "a", "b", "mDSC"]
    assert [row["class"] for row in result.class_table()] == ["background", "a", "b", "mean of foreground", "mean"]
    content = result.to_dict()
    assert content["ignore"] == [3] and "other" not in content["pooled"]["dice"]
    assert np.asarray(draw_scores(result)).std() > 0


def test_a_result_names_the_slides_that_it_lacks(write):
    result = replace(evaluate_slides(three_slides(write), 3), missing=("t3", "t4"))
    assert result.to_dict()["missing"] == ["t3", "t4"]
    assert [row["slide"] for row in result.rows() if row["score"] == "missing"] == ["t3", "t4"]
    assert result.select(["t0"]).missing == ()


def test_progress_counts_the_blocks_of_all_slides(write, monkeypatch):
    monkeypatch.setattr(boundaries, "BLOCK_PIXELS", 1 << 8)
    seen = []
    evaluate_slides(three_slides(write), 3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, 12) for i in range(12)]


def test_the_picture_shows_classes_and_confusions(write):
    pairs = three_slides(write)
    for boundary in (None, BoundaryConfig()):
        picture = draw_scores(evaluate_slides(pairs, 3, boundary=boundary))
        assert np.asarray(picture).std() > 0
        has_orange = (np.asarray(picture) == (213, 94, 0)).all(-1).any()
        assert has_orange == (boundary is not None)
