"""Opening of an image of any supported format as a `Slide`."""

from collections.abc import Sequence
from pathlib import Path

from muvit.data.slides.formats import RASTER_SUFFIXES, SLIDE_SUFFIXES, TIFF_SUFFIXES, WHOLE_SLIDE_SUFFIXES
from muvit.data.slides.slide import Palette, Slide
from muvit.errors import ReadError


def open_slide(
    path: str | Path, *, palette: Palette = "rgb", pixel_size_um: float | Sequence[float] | None = None
) -> Slide:
    """Open an image for windowed reading.

    Formats: OME-Zarr folders (NGFF 0.5 and 0.4), TIFF and its pyramids (OME-TIFF, SubIFDs, ImageJ), PNG, JPEG, and
    SVS, NDPI, MRXS and SCN through OpenSlide.

    Args:
        path: file, or folder of an OME-Zarr image.
        palette: pixels of a PNG or TIFF with a colour table: its ``rgb`` colours, or the ``index`` of each pixel, as
            label images need.
        pixel_size_um: micrometers per pixel of the finest level, in place of what the file states: one number for all
            axes, or one for each.

    Raises:
        ReadError: nothing is there, or it cannot be read; names the file.
        InputError: the pixel size is not positive, or has another number of axes.
    """
    slide = _open(Path(path), palette)
    if pixel_size_um is not None:
        slide.state_pixel_size(pixel_size_um)
    return slide


def _open(path: Path, palette: Palette) -> Slide:
    if not path.exists():
        raise ReadError(path, expected="an image file or an OME-Zarr folder", got="nothing there")
    # each reader imports its own decoder packages: import only the one that is needed
    suffix = path.suffix.lower()
    if path.is_dir():
        from muvit.data.slides.ome_zarr import OmeZarrSlide

        return OmeZarrSlide(path)
    if suffix in TIFF_SUFFIXES:
        from muvit.data.slides.tiff import TiffSlide

        return TiffSlide(path, palette=palette)
    if suffix in RASTER_SUFFIXES:
        from muvit.data.slides.raster import RasterSlide

        return RasterSlide(path, palette=palette)
    if suffix in WHOLE_SLIDE_SUFFIXES:
        from muvit.data.slides.whole_slide import WholeSlide

        return WholeSlide(path)
    raise ReadError(
        path,
        expected=f"a folder of OME-Zarr or a file ending in {', '.join(SLIDE_SUFFIXES[2:])}",
        got=f"a file ending in {suffix or 'nothing'}",
    )
