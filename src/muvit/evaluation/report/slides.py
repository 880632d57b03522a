"""Slides in small for a report: an image, its true labels and predictions, pixel on pixel."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from muvit.data.slides.slide import Slide
from muvit.evaluation.report.content import Example
from muvit.evaluation.report.failures import warn_if_it_fails
from muvit.pictures import to_rgb

PICTURE_PX = 1024
"""Longest side of a slide as shown in the report."""

LabelledSlide = tuple[Slide, Slide]
"""An image and its true labels."""


def spread(pairs: Sequence[LabelledSlide], count: int) -> list[LabelledSlide]:
    """At most ``count`` of the slides, evenly spaced."""
    chosen = (
        np.linspace(0, len(pairs) - 1, min(count, len(pairs)) + 2)[1:-1] if len(pairs) > count else range(len(pairs))
    )
    return [pairs[int(i)] for i in chosen]


def read_examples(pairs: Sequence[LabelledSlide], labels: Mapping[str, Mapping[str, Slide]]) -> list[Example]:
    """Read slides with their true and predicted labels, small enough for a report.

    Args:
        pairs: images with their true labels.
        labels: predicted labels by name of the model, and by name of the slide.
    """
    examples = []
    for image, truth in pairs:
        with warn_if_it_fails(f"{image.name} in the report"):
            predictions = {name: found[truth.name] for name, found in labels.items()}
            shown, true, *predicted = read_aligned([image, truth, *predictions.values()])
            examples.append(
                Example(
                    title=image.name,
                    image=to_rgb(shown),
                    truth=true[0],
                    predictions={name: own[0] for name, own in zip(predictions, predicted, strict=True)},
                )
            )
    return examples


def read_aligned(slides: Sequence[Slide]) -> list[NDArray[np.generic]]:
    """The same pixels of slides of one shape, each ``(C, H, W)``; of volumes the middle slice.

    They are those of a level that all store, every n-th along each axis if even the coarsest is larger than
    `PICTURE_PX`; nothing larger than a row is read then.
    """
    common = [level for level in slides[0].levels if all(level in slide.levels for slide in slides)]
    fitting = [level for level in common if max(slides[0].level_shape(level)) <= PICTURE_PX]
    level = fitting[0] if fitting else common[-1]
    # pyramids of other make may round the extent of a level up or down
    *slices, height, width = np.min([slide.level_shape(level) for slide in slides], axis=0).tolist()
    step = -(-max(height, width) // PICTURE_PX)
    rows = [(0, height)] if step == 1 else [(row, 1) for row in range(step // 2, height, step)]

    def read(slide: Slide, row: int, count: int) -> NDArray[np.generic]:
        pixels = slide.read(level, (*(n // 2 for n in slices), row, 0), (*(1 for _ in slices), count, width))
        return pixels.reshape(-1, count, width)[..., step // 2 :: step]

    return [np.concatenate([read(slide, *band) for band in rows], axis=1) for slide in slides]
