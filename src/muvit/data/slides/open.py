"""Opening of an image of any supported format as a `Slide`."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import cast

from muvit.data.pyramids.remote import as_remote
from muvit.data.slides.formats import (
    CZI_SUFFIX,
    DICOM_SUFFIX,
    RASTER_SUFFIXES,
    SLIDE_SUFFIXES,
    TIFF_SUFFIXES,
    WHOLE_SLIDE_SUFFIXES,
    is_dicom_folder,
)
from muvit.data.slides.selection import select
from muvit.data.slides.slide import Palette, Slide
from muvit.errors import ReadError


def open_slide(
    path: str | Path,
    *,
    palette: Palette = "rgb",
    pixel_size_um: float | Sequence[float] | None = None,
    series: int | None = None,
    z: int | None = None,
    t: int | None = None,
    channels: Sequence[str | int] | None = None,
) -> Slide:
    """Open an image for windowed reading.

    Formats: OME-Zarr folders (NGFF 0.4 to 0.6), TIFF and its pyramids (OME-TIFF, SubIFDs, ImageJ), PNG, JPEG, what
    OpenSlide reads (SVS, NDPI, MRXS, SCN, BIF, SVSLIDE, VMS, VMU, TIFF of Philips, Ventana and Leica, DICOM as a file
    or a folder), and with the extra ``muvit[czi]`` CZI.

    Args:
        path: file, or folder of an OME-Zarr image or of DICOM files; of OME-Zarr also an address, ``https://...`` or
            ``s3://bucket/...``.
        palette: pixels of a PNG or TIFF with a colour table: its ``rgb`` colours, or the ``index`` of each pixel, as
            label images need.
        pixel_size_um: micrometers per pixel of the finest level, in place of what the file states: one number for all
            axes, or one for each.
        series: number of the image in a file or folder that holds several, from 0 on; by default the largest of a TIFF
            file, and the only one of others.
        z: number of the plane of a stack, from 0 on; unset, all, as an axis.
        t: number of the time point, likewise.
        channels: names or numbers of the channels; unset, all.

    Raises:
        ReadError: nothing is there, or it cannot be read; names the file.
        InputError: the pixel size is not positive, or has another number of axes; or there is no such series, plane,
            time point or channel.
    """
    remote = as_remote(path)
    if remote is not None:
        from muvit.data.slides.ome_zarr import OmeZarrSlide

        opened: Slide = OmeZarrSlide(cast(Path, remote), series=series)
    else:
        opened = _open(Path(path), palette, series)
    slide = select(opened, z=z, t=t, channels=channels)
    if pixel_size_um is not None:
        slide.state_pixel_size(pixel_size_um)
    return slide


def _open(path: Path, palette: Palette, series: int | None) -> Slide:
    if not path.exists():
        raise ReadError(path, expected="an image file or an OME-Zarr folder", got="nothing there")
    # each reader imports its own decoder packages: import only the one that is needed
    suffix = path.suffix.lower()
    if path.is_dir() and not is_dicom_folder(path):
        from muvit.data.slides.ome_zarr import OmeZarrSlide

        return OmeZarrSlide(path, series=series)
    if suffix == DICOM_SUFFIX or path.is_dir():
        return _open_dicom(path, series)
    if suffix in WHOLE_SLIDE_SUFFIXES or (suffix in TIFF_SUFFIXES and _is_scanner_tiff(path)):
        from muvit.data.slides.whole_slide import WholeSlide

        return WholeSlide(path, series=series)
    if suffix in TIFF_SUFFIXES:
        from muvit.data.slides.tiff import TiffSlide

        return TiffSlide(path, palette=palette, series=series)
    if suffix in RASTER_SUFFIXES:
        from muvit.data.slides.raster import RasterSlide

        return RasterSlide(path, palette=palette)
    if suffix == CZI_SUFFIX:
        from muvit.data.slides.czi import CziSlide

        return CziSlide(path, series=series)
    raise ReadError(
        path,
        expected=f"a folder of OME-Zarr or DICOM, or a file ending in {', '.join(SLIDE_SUFFIXES[2:])}",
        got=f"a file ending in {suffix or 'nothing'}",
    )


def _open_dicom(path: Path, series: int | None) -> Slide:
    """By OpenSlide if it can, which is faster, or else by wsidicom, if that is installed."""
    from muvit.data.slides.whole_slide import WholeSlide

    try:
        return WholeSlide(path, series=series)
    except ReadError as error:
        if find_spec("wsidicom") is None:
            error.add_note("Other DICOM files are read by wsidicom: pip install 'muvit[dicom]'.")
            raise
    from muvit.data.slides.dicom import DicomSlide

    return DicomSlide(path, series=series)


def _is_scanner_tiff(path: Path) -> bool:
    from muvit.data.slides.whole_slide import is_scanner_tiff

    return is_scanner_tiff(path)
