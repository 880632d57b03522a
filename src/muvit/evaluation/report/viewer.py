"""Whole slides in a page: an image and its labels as tiles, to be moved and zoomed without any network."""

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from muvit.data.pyramids.ngff import Kind
from muvit.data.slides.derived import with_levels
from muvit.data.slides.slide import Slide
from muvit.durable import whole_folder
from muvit.evaluation.report.content import join_lines
from muvit.inference.export.labelled import LabelledImage
from muvit.pictures import MAX_COLORS, measure_contrast, to_rgb

TILES = "tiles"
"""Folder beside the page, with a folder of tiles for each slide that is larger than `EMBEDDED_PX`."""
TILE_PX = 512
EMBEDDED_PX = 1024
"""Longest side of a slide whose tiles are all inside the page."""
VIEW_PX = 8192
"""Longest side of the finest pixels shown, by default."""

SCRIPT = Path(__file__).with_name("viewer.js").read_text(encoding="utf-8")
"""JavaScript for all viewers of a page, to stand below them."""

_LISTED = 24
_HELP = (
    "Drag to move; zoom by double-click, + and -, or, once clicked, by the wheel; "
    "arrow keys move, 0 shows the whole slide."
)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    """An image or its labels, at some levels of its own pixels."""

    slide: Slide
    kind: Kind
    levels: tuple[int, ...]
    """Coarsest first; it is one tile."""
    contrast: NDArray[np.floating] | None = None

    @property
    def suffix(self) -> str:
        return "jpg" if self.kind == "image" else "png"

    def tiles(self) -> Iterator[tuple[int, str, bytes]]:
        """Index of the level, ``level/y_x``, and content of each tile."""
        for index, level in enumerate(self.levels):
            height, width = self.slide.level_shape(level)
            for y in range(0, height, TILE_PX):
                for x in range(0, width, TILE_PX):
                    size = (min(TILE_PX, height - y), min(TILE_PX, width - x))
                    yield (
                        index,
                        f"{index}/{y // TILE_PX}_{x // TILE_PX}",
                        self._encode(self.slide.read(level, (y, x), size)),
                    )

    def _encode(self, pixels: NDArray[Any]) -> bytes:
        stream = io.BytesIO()
        if self.kind == "image":
            Image.fromarray(to_rgb(pixels, contrast=self.contrast)).save(stream, format="jpeg", quality=88)
        else:
            Image.fromarray(color_index(pixels[0])).save(stream, format="png", optimize=True)
        return stream.getvalue()


def color_index(values: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Place of label values among 256 colours, as `LabelledImage.class_color` repeats them."""
    wide = values.astype(np.int64)
    return np.where(wide < MAX_COLORS, wide, 1 + (wide - 1) % (MAX_COLORS - 1)).astype(np.uint8)


def render_viewer(folder: Path, source: LabelledImage, *, view_px: int = VIEW_PX) -> str:
    """HTML of a slide with its labels; writes the tiles of a large one to ``tiles/<slide>`` in the folder of the page.

    Image and labels are shown at the same places whatever their pixels. Tiles of labels hold class numbers, which the
    page paints, so that classes can be switched on and off. The coarsest tile of each is always inside the page.

    Args:
        folder: of the page.
        source: the labels, and their image if there is one.
        view_px: longest side of the finest pixels shown.
    """
    name, (sy, sx) = source.labels.name, source.scale
    height, width = source.labels.shape if source.image is None else source.image.shape
    layers = [] if source.image is None else [_layer(source.image, "image", view_px)]
    layers.append(_layer(source.labels, "label", view_px))
    inside = [dict[str, str]() for _ in layers]
    is_small = max(height, width) <= EMBEDDED_PX
    if is_small:
        for layer, embedded in zip(layers, inside, strict=True):
            embedded |= {key: _data_url(layer.suffix, content) for _, key, content in layer.tiles()}
    else:
        (folder / TILES).mkdir(parents=True, exist_ok=True)
        with whole_folder(folder / TILES / name, overwrite=True) as fresh:
            for layer, embedded in zip(layers, inside, strict=True):
                for index, key, content in layer.tiles():
                    if index == 0:
                        embedded[key] = _data_url(layer.suffix, content)
                    else:
                        file = fresh / layer.kind / f"{key}.{layer.suffix}"
                        file.parent.mkdir(parents=True, exist_ok=True)
                        file.write_bytes(content)
    um = source.pixel_um
    values = _listed(source, layers[-1])
    spec = {
        "size": [width, height],
        "um": None if um is None else um[1] / sx,
        "tile": TILE_PX,
        "layers": [
            {
                "path": f"{TILES}/{quote(name)}/{layer.kind}/",
                "suffix": layer.suffix,
                "levels": [
                    {"pixel": [level * own[1], level * own[0]], "size": [*reversed(layer.slide.level_shape(level))]}
                    for level in layer.levels
                ],
                "inside": embedded,
            }
            for layer, embedded in zip(layers, inside, strict=True)
            for own in [(1.0, 1.0) if layer.kind == "image" else (sy, sx)]
        ],
        "colors": [source.class_color(value) for value in range(MAX_COLORS)],
        "listed": [*range(source.lowest_value, MAX_COLORS)],
    }
    return _markup(name, spec, [(value, source.class_name(value), source.class_color(value)) for value in values])


def _layer(slide: Slide, kind: Kind, view_px: int) -> _Layer:
    levels = [1]
    while max(slide.shape) > view_px * levels[0]:
        levels[0] *= 2
    while -(-max(slide.shape) // levels[-1]) > TILE_PX:
        levels.append(levels[-1] * 2)
    complete = with_levels(slide, levels, kind)
    contrast = None
    if kind == "image":
        contrast = measure_contrast(complete.read(levels[-1], (0, 0), complete.level_shape(levels[-1])))
    return _Layer(slide=complete, kind=kind, levels=tuple(reversed(levels)), contrast=contrast)


def _listed(source: LabelledImage, labels: _Layer) -> list[int]:
    """Values of the legend: the classes with names, or else those that can be seen from afar."""
    level = labels.levels[0]
    seen = labels.slide.read(level, (0, 0), labels.slide.level_shape(level))
    values = source.class_names or np.unique(color_index(seen)).tolist()
    return [value for value in sorted(values) if source.lowest_value <= value < MAX_COLORS][:_LISTED]


def _data_url(suffix: str, content: bytes) -> str:
    kind = "jpeg" if suffix == "jpg" else suffix
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _markup(name: str, spec: dict[str, Any], classes: list[tuple[int, str, tuple[int, int, int]]]) -> str:
    boxes = join_lines(
        f'<li><label><input type="checkbox" checked value="{value}"><span class="swatch" '
        f'style="background:rgb({r} {g} {b})"></span>{escape(title)}</label></li>'
        for value, title, (r, g, b) in classes
    )
    buttons = join_lines(
        f'<button type="button" data-zoom="{zoom}" aria-label="{title}" title="{title}">{sign}</button>'
        for sign, zoom, title in (("+", 2, "zoom in"), ("&minus;", 0.5, "zoom out"), ("&#9633;", 0, "whole slide"))
    )
    data = json.dumps(spec, separators=(",", ":")).replace("<", "\\u003c")
    title = escape(f"{name} with its labels. {_HELP}", quote=True)
    return f"""<div class="viewer" hidden>
<div class="stage" tabindex="0" role="application" aria-label="{title}">
<div class="buttons">{buttons}</div>
<div class="scale" aria-hidden="true"></div>
</div>
<ul class="legend">
{boxes}
<li><label>opacity <input type="range" min="0" max="1" step="0.05" value="0.5"></label></li>
</ul>
<p class="note">{escape(_HELP)} <output></output></p>
<script type="application/json">{data}</script>
</div>"""
