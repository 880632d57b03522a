"""The nested views of a model or recipe about a point of a slide, as a picture; napari is not needed."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muvit.data.crops.placement import place_at
from muvit.data.crops.preprocessing import Cropping
from muvit.data.slides.derived import complete_slide
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.levels import Level
from muvit.pictures import RGB, panel
from muvit.view_pictures import middle_slice, view_row, with_one_contrast


@dataclass(frozen=True, kw_only=True)
class NestedViews:
    """Views of every level about a point of a slide, placed as in prediction."""

    slide: Slide
    """The image, with all levels."""
    levels: tuple[Level, ...]
    """Downsampling factor of each view, finest first."""
    size: tuple[int, ...]
    """Pixels of every view, (t)(z)yx."""
    cropping: Cropping
    """Padding, and placement of the coarse views."""

    def draw(self, point: tuple[float, ...], *, size: int = 256) -> RGB | None:
        """The views side by side, with frames of the finer ones in the coarser ones; None outside of the slide.

        Of volumes, the middle slice of each view is shown.

        Args:
            point: (t)(z)yx in pixels of the slide as stored.
            size: side of each picture, in pixels.
        """
        at = tuple(a / scale for a, scale in zip(point, self.slide.pixel_scale, strict=True))
        if not all(0 <= a < n for a, n in zip(at, self.slide.shape, strict=True)):
            return None
        shapes = [self.slide.level_shape(level) for level in self.levels]
        rules = self.cropping
        placed = place_at(rules.placement, shapes, self.levels, self.size, at, free_views=rules.free_views)
        windows = zip(self.levels, placed.windows, strict=True)
        pixels = [self.slide.read(level, w.start, w.size, padding=rules.padding) for level, w in windows]
        pictures = with_one_contrast(middle_slice(np.stack(pixels), self.slide.ndim))
        size_um = None if self.slide.pixel_size_um is None else self.slide.pixel_size_um[-1]
        return np.asarray(panel([view_row(pictures, placed.boxes, self.levels, size_um, size=size)], size=size))


def open_views(source: Path | str, slide: Slide) -> NestedViews:
    """The views that a model or a recipe shows of a slide.

    Args:
        source: a recipe in YAML, or the folder of a trained model or of its run.
        slide: the image as it was opened.

    Raises:
        InputError: slide and model do not fit each other.
        ReadError, CheckpointError: the recipe or model cannot be read.
    """
    if Path(source).suffix.lower() in (".yaml", ".yml"):
        return _views_of_recipe(Path(source), slide)
    from muvit.inference.inputs import prepare_slide
    from muvit.models.segmentation_model import SegmentationModel
    from muvit.models.trained import load_model

    trained = load_model(source, kind=SegmentationModel)
    views, preprocessing = trained.model.views, trained.preprocessing
    ready = prepare_slide(views, slide, preprocessing)
    return NestedViews(slide=ready, levels=views.levels, size=preprocessing.crop_size, cropping=preprocessing)


def _views_of_recipe(file: Path, slide: Slide) -> NestedViews:
    from muvit.settings import read_settings
    from muvit.training.recipes import Recipe
    from muvit.training.slides import all_axes

    recipe = read_settings(file, Recipe)
    levels, data = recipe.model.levels, recipe.data
    size = all_axes(data.crop_size, slide.ndim)
    if len(size) != slide.ndim:
        raise InputError("data.crop_size", expected=f"{slide.ndim} numbers, as the slide has axes", got=size)
    ready = complete_slide(slide, levels, pixel_size_um=data.pixel_size_um)
    return NestedViews(slide=ready, levels=levels, size=size, cropping=data)
