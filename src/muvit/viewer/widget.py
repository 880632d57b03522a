"""Widgets of napari: one that labels a slide, or what is visible of it; one that shows nested views at the cursor."""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import shapely
from magicgui.widgets import ComboBox, Container, Image, Label, LineEdit, ProgressBar, PushButton
from napari.layers import Layer
from napari.qt.threading import create_worker
from qtpy.QtCore import QTimer

from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.errors import MuViTError
from muvit.inference.loaded import load_model
from muvit.inference.run.plan import PredictOptions
from muvit.viewer.layers import SLIDE, labels_layer
from muvit.viewer.nested import NestedViews, open_views

if TYPE_CHECKING:
    from napari.viewer import Viewer

WHOLE, VISIBLE = "whole slide", "what is visible"
_POLL_MS = 100
_VIEW_PX = 220


class StoppedError(MuViTError):
    """The user has stopped a prediction."""


class PredictWidget(Container):
    """Labels the slide of a layer in the background, and shows the labels when they are complete.

    A prediction that was stopped goes on when it is started again with the same choices.

    Args:
        viewer: the window; napari gives it by this name.
    """

    def __init__(self, viewer: "Viewer") -> None:
        self.viewer = viewer
        self.model = LineEdit(label="model", tooltip="model folder, or org/name on huggingface.co")
        self.layer = _slide_choice(viewer)
        self.part = ComboBox(label="label", choices=[WHOLE, VISIBLE])
        self.output = LineEdit(label="output", value="predictions", tooltip="folder that receives the labels")
        self.progress, self.said = ProgressBar(label="progress", value=0, max=1), Label(value="")
        self.start, self.stop = PushButton(text="label"), PushButton(text="stop", enabled=False)
        chosen = [self.model, self.layer, self.part, self.output]
        super().__init__(widgets=[*chosen, self.start, self.stop, self.progress, self.said])
        self.is_stopped, self.steps = False, (0, 1)
        self.timer = QTimer()
        self.timer.timeout.connect(self._show_progress)
        self.start.clicked.connect(self.begin)
        self.stop.clicked.connect(self.end)

    def begin(self) -> None:
        """Start the prediction that is chosen."""
        layer = self.layer.value
        if layer is None or not self.model.value:
            self.said.value = "Choose a model and a slide."
            return
        region = visible_region(layer) if self.part.value == VISIBLE else None
        self.is_stopped, self.steps, self.said.value = False, (0, 1), ""
        self.start.enabled, self.stop.enabled = False, True
        self.timer.start(_POLL_MS)
        worker = create_worker(self._predict, open_slide(layer.metadata[SLIDE]), region, _start_thread=False)
        worker.returned.connect(self._show_result)
        worker.finished.connect(self._finish)
        worker.start()

    def end(self) -> None:
        """Stop the prediction after the batch that is being computed."""
        self.is_stopped = True

    def _predict(self, slide: Slide, region: str | None) -> Slide | str:
        """The work of the background thread: the labels, or the sentence of an error."""
        part = "" if region is None else f"_{hashlib.sha256(region.encode()).hexdigest()[:8]}"
        target = Path(self.output.value) / f"{slide.name}{part}.ome.zarr"
        options = PredictOptions(region=region)
        try:
            return load_model(self.model.value).predict(slide, target, options=options, progress=self._count)
        except MuViTError as error:
            return str(error)

    def _count(self, done: int, total: int) -> None:
        """Note the progress; the thread must not touch the window."""
        if self.is_stopped:
            raise StoppedError("Stopped; starting it again goes on.")
        self.steps = (done, total)

    def _show_progress(self) -> None:
        done, total = self.steps
        self.progress.max, self.progress.value = max(total, 1), done

    def _show_result(self, result: Slide | str) -> None:
        if isinstance(result, str):
            self.said.value = result
            return
        data, settings, _ = labels_layer(result)
        self.viewer.add_labels(data, **settings)
        self.said.value = str(result.path)

    def _finish(self) -> None:
        self.timer.stop()
        self._show_progress()
        self.start.enabled, self.stop.enabled = True, False


class NestedViewsWidget(Container):
    """Shows what a model would see at the cursor: the views of all levels, coarse ones with frames of the finer ones.

    Views are read in the background; of the places that the cursor passes meanwhile, the last one is drawn next.

    Args:
        viewer: the window; napari gives it by this name.
    """

    def __init__(self, viewer: "Viewer") -> None:
        self.viewer = viewer
        self.model = LineEdit(label="model", tooltip="model folder, or recipe in YAML")
        self.layer = _slide_choice(viewer)
        self.start, self.said = PushButton(text="show views"), Label(value="")
        self.picture = Image(value=np.full((_VIEW_PX, _VIEW_PX, 3), 255, np.uint8))
        super().__init__(widgets=[self.model, self.layer, self.start, self.said, self.picture])
        self.views: NestedViews | None = None
        self.wanted: tuple[float, ...] | None = None
        self.is_reading = False
        self.start.clicked.connect(self.begin)
        viewer.cursor.events.position.connect(lambda _: self.look())

    def begin(self) -> None:
        """Open the views of the model for the slide; the first ones are those in the middle of the slide."""
        layer = self.layer.value
        if layer is None or not self.model.value:
            self.said.value = "Choose a model or recipe, and a slide."
            return
        try:
            self.views = open_views(self.model.value, open_slide(layer.metadata[SLIDE]))
        except MuViTError as error:
            self.said.value = str(error)
            return
        self.said.value = ""
        shape = self.views.slide.shape
        self.look_at(tuple(n * s / 2 for n, s in zip(shape, self.views.slide.pixel_scale, strict=True)))

    def look(self) -> None:
        """Draw the views at the cursor."""
        layer = self.layer.value
        if self.views is not None and layer is not None:
            # planes of data, and colours last: the axes of the slide are the last ones before
            place = layer.world_to_data(self.viewer.cursor.position)
            self.look_at(tuple(float(a) + 0.5 for a in place[-self.views.slide.ndim :]))

    def look_at(self, point: tuple[float, ...]) -> None:
        """Draw the views at a point, (t)(z)yx in pixels of the slide, as soon as those before are drawn."""
        self.wanted = point
        if not self.is_reading and self.views is not None:
            self.is_reading = True
            worker = create_worker(self.views.draw, point, size=_VIEW_PX, _start_thread=False)
            worker.returned.connect(self._show)
            worker.errored.connect(self._tell)
            worker.finished.connect(lambda: self._go_on(point))
            worker.start()

    def _show(self, picture: np.ndarray | None) -> None:
        if picture is not None:
            self.picture.value = picture
            self.picture.min_height, self.picture.min_width = picture.shape[:2]

    def _tell(self, error: Exception) -> None:
        self.said.value = str(error)

    def _go_on(self, drawn: tuple[float, ...]) -> None:
        self.is_reading = False
        if self.wanted is not None and self.wanted != drawn:
            self.look_at(self.wanted)


def _slide_choice(viewer: "Viewer") -> ComboBox:
    """A choice among the layers that show a slide, which follows the list of layers."""
    choice = ComboBox(label="slide", choices=lambda _: [one for one in viewer.layers if SLIDE in one.metadata])
    viewer.layers.events.inserted.connect(lambda _: choice.reset_choices())
    viewer.layers.events.removed.connect(lambda _: choice.reset_choices())
    return choice


def visible_region(layer: Layer) -> str:
    """The box of a layer that is on the screen, as well-known text in world pixels, x before y."""
    level = layer.data_level
    factor = layer.downsample_factors[level][-2:] if layer.multiscale else (1, 1)
    first, last = layer.corner_pixels[:, -2:]  # the last pixel is shown, too
    (top, left), (bottom, right) = first * factor, (last + 1) * factor
    return str(shapely.to_wkt(shapely.box(left, top, right, bottom), rounding_precision=3, trim=True))
