import numpy as np
from array_slide import ArraySlide

from muvit.evaluation.report.places import find_places, places_section
from muvit.evaluation.scores.segmentation import evaluate_slides


def test_the_worst_place_is_where_labels_are_wrong_and_the_best_where_they_are_right():
    pairs, images = [], {}
    for number, wrong in enumerate((20, 4, 0)):
        truth = np.zeros((100, 150), np.uint8)
        truth[10:30, 10:30] = truth[60:90, 100:140] = 1
        predicted = truth.copy()
        predicted[60 : 60 + wrong, 100:140] = 0
        pairs.append(tuple(ArraySlide(pixels, name=f"s{number}") for pixels in (predicted, truth)))
        images[f"s{number}"] = ArraySlide(np.full((3, 100, 150), 90, np.uint8), name=f"s{number}")
    result = evaluate_slides(pairs, 2, class_names=["glass", "cell"])
    worst, second, best, _ = find_places(result, pairs, images)
    assert [place.title[:9] for place in (worst, second, best)] == ["worst: s0", "worst: s1", "best: s2,"]
    assert worst.score == 0 and best.score == 1
    (top, left), (bottom, right) = worst.window
    assert bottom - top == right - left == 20  # a fifth of the shorter side
    assert (worst.truth[top:bottom, left:right] == 1).any() and not worst.prediction[top:bottom, left:right].any()
    assert worst.image.shape == (3, 100, 150)
    assert places_section(result, pairs).count("<img") == 1  # of labels alone
    empty = [(ArraySlide(np.zeros((9, 9), np.uint8), name="e"),) * 2]
    assert places_section(evaluate_slides(empty, 2), empty) == ""
