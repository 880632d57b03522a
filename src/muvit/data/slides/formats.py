"""Conventions of image formats: suffixes of file names, length units, and the downsampling factors of pyramids."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

OME_ZARR_SUFFIXES = (".ome.zarr", ".zarr")
TIFF_SUFFIXES = (".tif", ".tiff", ".btf", ".tf8")
RASTER_SUFFIXES = (".png", ".jpg", ".jpeg")
DICOM_SUFFIX = ".dcm"
CZI_SUFFIX = ".czi"
WHOLE_SLIDE_SUFFIXES = (".svs", ".ndpi", ".mrxs", ".scn", ".bif", ".svslide", ".vms", ".vmu", DICOM_SUFFIX)
SLIDE_SUFFIXES = (*OME_ZARR_SUFFIXES, *TIFF_SUFFIXES, *RASTER_SUFFIXES, *WHOLE_SLIDE_SUFFIXES, CZI_SUFFIX)

LABELS_NAMESPACE = "muvit.labels"
"""Namespace of the map annotation by which OME-TIFF states names and colours of label values."""

MICROMETERS_PER_UNIT = {
    "angstrom": 1e-4, "Å": 1e-4,
    "nanometer": 1e-3, "nm": 1e-3,
    "micrometer": 1.0, "micron": 1.0, "µm": 1.0, "μm": 1.0, "um": 1.0,
    "millimeter": 1e3, "mm": 1e3,
    "centimeter": 1e4, "cm": 1e4,
    "meter": 1e6, "m": 1e6,
    "inch": 25400.0, "in": 25400.0,
}  # fmt: skip
"""Length units as OME-Zarr, OME-XML and ImageJ spell them."""


def is_dicom_folder(path: Path) -> bool:
    """Whether a folder holds DICOM files."""
    return path.is_dir() and any(file.suffix.lower() == DICOM_SUFFIX for file in path.iterdir())


def slide_name(path: Path) -> str:
    """File name without its image suffixes: ``a.ome.zarr``, ``a.ome.tif`` and ``a.png`` are all ``a``."""
    path = path.resolve() if path.name in ("", "..") else path  # a folder that is named by where it is
    stem = path.stem if path.suffix.lower() in SLIDE_SUFFIXES else path.name
    return stem[:-4] if stem.lower().endswith(".ome") else stem


def file_version(path: Path) -> str:
    """A hash of sizes and times that changes when a file, or one in a folder that is not hidden, is written."""
    files = [path]
    if path.is_dir():
        files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names if name[0] != ".")
    states = [(str(file.relative_to(path)), file.stat()) for file in files]
    facts = [(name, state.st_size, state.st_mtime_ns, state.st_ctime_ns) for name, state in states]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def pyramid_factor(finest: Sequence[int], coarse: Sequence[int]) -> float | None:
    """Downsampling factor between two level shapes, or None if they do not scale alike on every axis.

    A factor is taken as the whole number next to it if every axis has that many pixels, rounded down or up, or if it is
    within 1 %.
    """
    ratios = [n / max(m, 1) for n, m in zip(finest, coarse, strict=True)]
    # the longest axis gives the most accurate factor: its rounding matters least
    factor = ratios[int(np.argmax(finest))]
    whole = max(round(factor), 1)
    if all(n // whole <= m <= -(-n // whole) for n, m in zip(finest, coarse, strict=True)):
        return float(whole)
    if any(abs(m - n / factor) > max(1.0, 0.01 * m) for n, m in zip(finest, coarse, strict=True)):
        return None
    return whole_if_near(factor)


def whole_if_near(factor: float) -> float:
    """The factor as a whole number if it is one within 1 %."""
    whole = round(factor)
    return float(whole) if whole >= 1 and abs(factor - whole) <= 0.01 * factor else factor


def store_path(path: Path, name: str) -> Path:
    """Folder of a store of the prediction at ``path``: ``a.ome.zarr`` and ``a.probabilities.ome.zarr``."""
    return path if name == "labels" else path.with_name(f"{slide_name(path)}.{name}.ome.zarr")
