"""Pictures of samples as the model sees them: the views side by side, with frames, and their labels."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from muvit.data.crops.placement import PlacedViews, place_views
from muvit.data.slides.slide import Slide
from muvit.labels import IGNORE
from muvit.levels import Level, level_factors
from muvit.pictures import IGNORED_COLOR, Color, Picture, colorize, panel, with_legend
from muvit.training.datamodules import ClassificationData, PretrainData, SegmentationData
from muvit.training.recipes import Recipe
from muvit.training.slides import all_axes
from muvit.view_pictures import middle_slice, view_row, with_one_contrast

Sample = Mapping[str, Tensor]
AnyData = SegmentationData | PretrainData | ClassificationData


def draw_samples(data: AnyData, count: int = 3, *, size: int = 256) -> Image.Image:
    """The first samples of training, each before and after augmentation, with a legend of the classes.

    Views stand side by side, finest first, each outlined in a colour of its own; frames of the same colours show, in
    every coarser view, where the model is told that the finer ones lie. Titles state how much a view shows, by its box.
    All views of a sample have one contrast. Of volumes, the middle slice is shown.

    Args:
        data: training crops of a recipe.
        count: number of samples.
        size: side of each picture, in pixels.
    """
    crops, legend = data.train_crops, data.preprocessing
    rows: list[list[Picture]] = []
    captions: list[str] = []
    for index in range(count):
        slide, before = crops.read_plain(index)
        image, after = crops.images[slide], crops[index]
        name = f"{image.name} ({legend.class_names[int(after['class'])]})" if "class" in after else image.name
        both = sample_rows([before, after], crops.levels, image, legend.class_colors, size=size)
        captions += [f"sample {index}: {name}, as it is read", f"sample {index}: augmented, as the model sees it"]
        rows += both
    sheet = panel(rows, size=size, captions=captions)
    entries = list(zip(legend.class_names, legend.class_colors, strict=True))
    shows_labels = not isinstance(data, ClassificationData) and bool(entries)
    return with_legend(sheet, [*entries, ("ignored", IGNORED_COLOR)]) if shows_labels else sheet


def sample_rows(
    samples: Sequence[Sample],
    levels: Sequence[Level],
    image: Slide,
    colors: Sequence[Color] = (),
    *,
    size: int = 256,
) -> list[list[Picture]]:
    """Pictures of samples of one slide for `muvit.pictures.panel`, a row for each; all views have one contrast.

    Args:
        samples: dicts with ``img`` ``(L, C, *space)``, ``bbox`` ``(L, 2, ndim)``, and perhaps ``label`` ``(*space)``.
        levels: of the views.
        image: the slide, for its pixel size.
        colors: of the classes.
        size: side of the pictures, in pixels.
    """
    views = torch.cat([sample["img"] for sample in samples]).numpy()
    pictures = with_one_contrast(middle_slice(views, image.ndim))
    pixel_size = None if image.pixel_size_um is None else image.pixel_size_um[-1]
    rows = []
    for number, sample in enumerate(samples):
        own = pictures[number * len(levels) : (number + 1) * len(levels)]
        row = view_row(own, sample["bbox"], levels, pixel_size, size=size)
        if "label" in sample:
            label = middle_slice(sample["label"].numpy(), image.ndim)
            row.append(Picture("labels", colorize(label, colors, ignore=(IGNORE,)), True))
        rows.append(row)
    return rows


def place_crops(
    slide: Slide, recipe: Recipe, points: NDArray[np.float64], *, count: int = 2, seed: int = 0
) -> list[PlacedViews]:
    """Crops of a slide as training places them, each with one of some points in its finest view.

    Args:
        slide: the image, with the levels of the recipe.
        recipe: levels, size and placement of the crops.
        points: ``(n, ndim)`` world pixels, such as tissue; of none, crops lie anywhere.
        count: number of crops.
        seed: of the places.
    """
    levels, data = recipe.model.levels, recipe.data
    shapes = [slide.level_shape(level) for level in levels]
    factors, last = level_factors(levels[0], slide.ndim), np.array(shapes[0]) - 1
    placed = []
    for index in range(count):
        rng = np.random.default_rng((seed, index))
        point = points[rng.integers(len(points))] if len(points) else None
        pixel = None if point is None else tuple(np.minimum(point // factors, last).astype(int).tolist())
        placed.append(
            place_views(
                data.placement,
                shapes,
                levels,
                all_axes(data.crop_size, slide.ndim),
                rng=rng,
                contains=pixel,
                free_views=data.free_views,
            )
        )
    return placed


def draw_crops(slide: Slide, recipe: Recipe, placed: Sequence[PlacedViews], *, size: int = 384) -> Image.Image:
    """Crops of a slide, a row for each, as `draw_samples` shows the views.

    Args:
        slide: the image, with the levels of the recipe.
        recipe: levels and padding of the crops.
        placed: the crops.
        size: side of each picture, in pixels.
    """
    levels = recipe.model.levels
    rows, captions = [], []
    for number, views in enumerate(placed, start=1):
        windows = zip(levels, views.windows, strict=True)
        pixels = [slide.read(level, w.start, w.size, padding=recipe.data.padding) for level, w in windows]
        sample = {"img": torch.from_numpy(np.stack(pixels).astype(np.float32)), "bbox": views.boxes}
        rows += sample_rows([sample], levels, slide, size=size)
        y, x = views.boxes[0].mean(0)[-2:].tolist()
        captions.append(f"crop {number}, centred at row {y:.0f}, column {x:.0f}")
    return panel(rows, size=size, captions=captions)
