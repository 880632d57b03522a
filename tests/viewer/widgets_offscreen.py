"""Both widgets of napari without a screen: what they show is written as pictures to look at.

Needs the extra ``muvit[napari]``, which the tests do without:

    QT_QPA_PLATFORM=offscreen python tests/viewer/widgets_offscreen.py MODEL SLIDE OUTPUT
"""

import sys
import time
from pathlib import Path

import numpy as np
from napari.components import ViewerModel
from qtpy.QtWidgets import QApplication

from muvit.viewer.layers import read_layers
from muvit.viewer.widget import VISIBLE, NestedViewsWidget, PredictWidget

_LIMIT_S = 300


def main(model: str, slide: str, output: Path) -> None:
    """Move the cursor over the slide, label what is visible, and write ``views.png`` and ``predict.png``."""
    application, viewer = QApplication([]), ViewerModel()  # a canvas would need OpenGL
    for data, settings, kind in read_layers(slide):
        getattr(viewer, f"add_{kind}")(data, **settings)

    def wait(is_done) -> None:
        start = time.monotonic()
        while not is_done():
            assert time.monotonic() - start < _LIMIT_S, "it hangs"
            application.processEvents()
            time.sleep(0.02)

    views, predict = NestedViewsWidget(viewer), PredictWidget(viewer)
    views.show()
    predict.show()
    views.model.value = predict.model.value = model
    views.begin()
    wait(lambda: not views.is_reading)
    middle = np.array(views.picture.value)
    layer = viewer.layers[0]
    shape = layer.data[0].shape if layer.multiscale else layer.data.shape
    for step in range(30):  # faster than views are drawn: the last place counts
        viewer.cursor.position = tuple(np.array(layer.scale[-2:]) * (shape[0] // 4 + step, shape[1] // 3))
    wait(lambda: not views.is_reading)
    assert views.wanted == (shape[0] // 4 + 29.5, shape[1] // 3 + 0.5), views.wanted
    assert not np.array_equal(views.picture.value, middle), "the views do not follow the cursor"
    predict.part.value, predict.output.value = VISIBLE, str(output / "predictions")
    predict.begin()
    wait(lambda: predict.start.enabled)
    assert len(viewer.layers) == 2, predict.said.value
    output.mkdir(parents=True, exist_ok=True)
    for name, widget in (("views", views), ("predict", predict)):
        assert widget.native.grab().save(str(output / f"{name}.png"))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
