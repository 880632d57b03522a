"""Data sets of nnU-Net v2 made from slides, and its predictions put together to slides again.

nnU-Net takes images, not slides: each slide is divided into crops of about equal size, without overlap, at one level.
The layout follows nnU-Net's documentation of its data set format.
"""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from muvit.data.slides.derived import with_levels
from muvit.data.slides.formats import slide_name
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.durable import whole_folder
from muvit.errors import InputError, ReadError
from muvit.levels import Level, level_factors, level_name
from muvit.progress import Progress

DATASET, SLIDES = "dataset.json", "slides.json"
"""Files of a data set: nnU-Net's, and ours with the place of every crop and the meaning of every label."""


class Crop(NamedTuple):
    """A part of a slide at the level of the data set: ``size`` pixels from ``start``."""

    case: str
    """Its name in nnU-Net."""
    start: tuple[int, ...]
    size: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NnunetConfig:
    """Contents of a data set of nnU-Net."""

    level: Level = 1
    """Downsampling factor of the crops."""
    crop_px: int = 1024
    """Most pixels of a crop along each axis."""
    ignore_labels: tuple[int, ...] = ()
    """Label values that are ignored in loss and metrics, beside those that the labels state."""

    def __post_init__(self) -> None:
        if self.crop_px < 1:
            raise InputError("crop_px", expected="a positive number", got=self.crop_px)


def write_nnunet(
    train: Sequence[tuple[Slide, Slide]],
    test: Sequence[Slide],
    folder: Path,
    config: NnunetConfig | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Write a data set of nnU-Net v2: ``imagesTr``, ``labelsTr``, ``imagesTs`` and ``dataset.json``.

    Classes are numbered as nnU-Net wants them: background 0, the others from 1 on, ignored pixels last.

    Args:
        train: images with their labels.
        test: images that nnU-Net is to label.
        folder: the data set, named ``Dataset<three digits>_<name>``, in nnU-Net's folder ``nnUNet_raw``.
        config: level and crops.
        overwrite: replace a folder that is there.
        progress: called after each crop.

    Returns:
        The folder.

    Raises:
        InputError: the name is none for nnU-Net, slides differ in channels or axes or share a name, a level cannot be
            computed, or a label value has no name while others have.
        ExistsError: the folder exists and ``overwrite`` is false.
        ReadError: pixels cannot be read.
    """
    config = config or NnunetConfig()
    if not re.fullmatch(r"Dataset\d{3}_\w+", folder.name):
        raise InputError("output", expected="a folder named as Dataset001_Name, as nnU-Net wants", got=folder.name)
    train = [(with_levels(i, (config.level,)), with_levels(m, (config.level,), "label")) for i, m in train]
    test = [with_levels(image, (config.level,)) for image in test]
    images = [*(image for image, _ in train), *test]
    _check_images(images)
    crops = {image.name: list(divide(image, config)) for image in images}
    codes = _codes([label for _, label in train], crops, config)
    total = sum(map(len, crops.values()))
    done = 0
    with whole_folder(folder, overwrite=overwrite) as fresh:
        for name in ("imagesTr", "labelsTr", "imagesTs"):
            (fresh / name).mkdir()
        form = _Form.of(images)
        pairs: list[tuple[Slide, Slide | None]] = [*train, *((image, None) for image in test)]
        for image, label in pairs:
            part = "Ts" if label is None else "Tr"
            for crop in crops[image.name]:
                form.write_image(fresh / f"images{part}", crop, image.read(config.level, crop.start, crop.size))
                if label is not None:
                    values = label.read(config.level, crop.start, crop.size)[0]
                    form.write_label(fresh / "labelsTr", crop, codes.encode(values, label.path))
                done += 1
                if progress is not None:
                    progress(done, total)
            if image.ndim == 3:
                _write_spacings(fresh, part, crops[image.name], _sizes_um(image, config.level))
        (fresh / DATASET).write_text(json.dumps(_dataset(images[0], codes, form, train, crops), indent=2) + "\n")
        (fresh / SLIDES).write_text(json.dumps(_places(train, test, crops, codes, config), indent=2) + "\n")
    return folder


def divide(slide: Slide, config: NnunetConfig) -> Iterator[Crop]:
    """The crops of a slide, row by row: as few as may be, and of equal size to a pixel along each axis."""
    edges = []
    for extent in slide.level_shape(config.level):
        count = -(-extent // config.crop_px)
        edges.append([index * extent // count for index in range(count + 1)])
    counts = [len(along) - 1 for along in edges]
    digits = max(5, len(str(math.prod(counts))))
    for number, index in enumerate(product(*map(range, counts))):
        start = tuple(along[i] for along, i in zip(edges, index, strict=True))
        stop = tuple(along[i + 1] for along, i in zip(edges, index, strict=True))
        size = tuple(b - a for a, b in zip(start, stop, strict=True))
        yield Crop(f"{slide.name}_{number:0{digits}}", start, size)


def open_predictions(predictions: Path, dataset: Path) -> list[Slide]:
    """The test slides of a data set with the labels that nnU-Net predicted for their crops.

    Args:
        predictions: folder with ``<case>.png`` or ``<case>.tif`` of every test crop, as ``nnUNetv2_predict`` fills it.
        dataset: the data set, as `write_nnunet` writes it.

    Raises:
        ReadError: the data set or a prediction is missing or damaged, or a prediction has another size.
    """
    try:
        places = json.loads((dataset / SLIDES).read_text())
        ending = json.loads((dataset / DATASET).read_text())["file_ending"]
        values = {int(code): int(value) for code, value in places["values"].items()}
        slides = [
            _Mosaic(predictions, name, entry, ending, values, places)
            for name, entry in places["slides"].items()
            if entry["split"] == "test"
        ]
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        expected = f"a data set of `muvit convert --format nnunet`, with {DATASET} and {SLIDES}"
        raise ReadError(dataset, expected=expected, got=f"{type(error).__name__}: {error}") from error
    if not slides:
        raise ReadError(dataset, expected="test slides", got="none", hint="Write it with --test.")
    for slide in slides:
        slide.check()
    return list(slides)


@dataclass(frozen=True)
class _Codes:
    """Numbers of the classes in nnU-Net."""

    of_value: Mapping[int, int]
    names: Mapping[int, str]
    ignored: int | None

    def encode(self, values: NDArray[Any], source: Path) -> NDArray[np.uint8]:
        found, inverse = np.unique(values, return_inverse=True)
        unknown = [int(value) for value in found if int(value) not in self.of_value]
        if unknown:
            raise InputError(source, expected=f"labels {', '.join(map(str, self.of_value))}", got=unknown[0])
        return np.array([self.of_value[int(value)] for value in found], np.uint8)[inverse].reshape(values.shape)


def _codes(labels: Sequence[Slide], crops: Mapping[str, Sequence[Crop]], config: NnunetConfig) -> _Codes:
    """Classes by their stated names, or by the values that occur where no labels state any."""
    if not labels:
        raise InputError("train", expected="at least one slide with labels", got="none")
    names = {value: name for label in labels for value, name in label.label_names.items()}
    found = set(names) or {
        int(value)
        for label in labels
        for crop in crops[label.name]
        for value in np.unique(label.read(config.level, crop.start, crop.size))
    }
    ignored = {*config.ignore_labels, *(value for label in labels for value in label.ignored_labels)}
    has_background = all(label.has_background for label in labels)
    classes = sorted((found | ({0} if has_background else set())) - ignored)
    codes = {value: code for code, value in enumerate(classes, start=0 if has_background else 1)}
    last = len(classes) + (0 if has_background else 1)
    if last > np.iinfo(np.uint8).max or len(classes) < 2:
        raise InputError("labels", expected="2 to 254 classes", got=f"{len(classes)}")
    named = {codes[value]: names.get(value, f"class {value}") for value in classes}
    named[0] = "background"  # by this name, whether it occurs or not
    return _Codes(codes | dict.fromkeys(ignored, last), named, last if ignored else None)


@dataclass(frozen=True)
class _Form:
    """File format of a data set: PNG for 8 bits in 2D, else TIFF, neither compressed with loss."""

    ending: str
    reader: str
    is_rgb: bool

    @classmethod
    def of(cls, images: Sequence[Slide]) -> "_Form":
        is_8_bit = all(image.dtype == np.uint8 for image in images)
        is_flat = images[0].ndim == 2
        return cls(
            ending=".png" if is_flat and is_8_bit else ".tif",
            reader="NaturalImage2DIO" if is_flat else "Tiff3DIO",
            is_rgb=is_flat and is_8_bit and images[0].num_channels == 3,
        )

    def write_image(self, folder: Path, crop: Crop, pixels: NDArray[Any]) -> None:
        """One file for each channel ``(C, *space)``, or for the three colours."""
        for number, channel in enumerate([np.moveaxis(pixels, 0, -1)] if self.is_rgb else pixels):
            self._write(folder / f"{crop.case}_{number:04}{self.ending}", channel)

    def write_label(self, folder: Path, crop: Crop, codes: NDArray[np.uint8]) -> None:
        self._write(folder / f"{crop.case}{self.ending}", codes)

    def _write(self, file: Path, pixels: NDArray[Any]) -> None:
        if self.ending == ".png":
            Image.fromarray(np.ascontiguousarray(pixels)).save(file)
        else:
            tifffile.imwrite(file, pixels, photometric="minisblack")


def _check_images(images: Sequence[Slide]) -> None:
    seen: dict[str, Slide] = {}
    for image in images:
        first = images[0]
        if image.name in seen:
            got = f"{seen[image.name].path} and {image.path}"
            raise InputError("slides", expected="different names, in training and test alike", got=got)
        seen[image.name] = image
        if image.ndim not in (2, 3):
            raise InputError(image.path, expected="2 or 3 axes, as nnU-Net takes", got=image.ndim)
        if (image.ndim, image.num_channels) != (first.ndim, first.num_channels):
            expected = f"{first.num_channels} channels and {first.ndim} axes, as {first.path} has"
            got = f"{image.num_channels} channels and {image.ndim} axes"
            raise InputError(image.path, expected=expected, got=got)


def _dataset(
    image: Slide, codes: _Codes, form: _Form, train: Sequence[tuple[Slide, Slide]], crops: Mapping[str, Sequence[Crop]]
) -> dict[str, Any]:
    channels = ("R", "G", "B") if form.is_rgb else image.channel_names
    labels = {name: code for code, name in sorted(codes.names.items())}
    if len(labels) < len(codes.names) or "ignore" in labels:
        raise InputError("labels", expected="classes of different names, none named ignore", got=list(labels))
    return {
        "channel_names": {str(number): name for number, name in enumerate(channels)},
        "labels": labels | ({} if codes.ignored is None else {"ignore": codes.ignored}),
        "numTraining": sum(len(crops[image.name]) for image, _ in train),
        "file_ending": form.ending,
        "overwrite_image_reader_writer": form.reader,
    }


def _places(
    train: Sequence[tuple[Slide, Slide]],
    test: Sequence[Slide],
    crops: Mapping[str, Sequence[Crop]],
    codes: _Codes,
    config: NnunetConfig,
) -> dict[str, Any]:
    labels = [label for _, label in train]
    splits = [(image, "train") for image, _ in train] + [(image, "test") for image in test]
    return {
        "level": level_name(config.level),
        "values": {code: value for value, code in codes.of_value.items() if code != codes.ignored},
        "names": {value: name for label in labels for value, name in label.label_names.items()},
        "colors": {value: color for label in labels for value, color in label.label_colors.items()},
        "has_background": all(label.has_background for label in labels),
        "slides": {
            image.name: {
                "split": split,
                "axes": image.axes,
                "shape": image.level_shape(config.level),
                "pixel_size_um": _sizes_um(image, config.level),
                "crops": [crop._asdict() for crop in crops[image.name]],
            }
            for image, split in splits
        },
    }


def _sizes_um(image: Slide, level: Level) -> tuple[float, ...] | None:
    if image.pixel_size_um is None:
        return None
    return tuple(s * f for s, f in zip(image.pixel_size_um, level_factors(level, image.ndim), strict=True))


def _write_spacings(folder: Path, part: str, crops: Sequence[Crop], spacing: tuple[float, ...] | None) -> None:
    """Micrometers of a voxel, beside the files of each case, where nnU-Net's reader of TIFF volumes finds them."""
    if spacing is not None:
        for crop, name in product(crops, [f"images{part}", *(["labelsTr"] if part == "Tr" else [])]):
            (folder / name / f"{crop.case}.json").write_text(json.dumps({"spacing": spacing}) + "\n")


class _Mosaic(Slide):
    """The label image of a slide, put together from those of its crops."""

    def __init__(
        self,
        folder: Path,
        name: str,
        entry: Mapping[str, Any],
        ending: str,
        values: Mapping[int, int],
        places: Mapping[str, Any],
    ) -> None:
        if slide_name(Path(name)) != name or Path(name).name != name:
            raise ValueError(f"the name {name!r}")
        size_um = entry["pixel_size_um"]
        super().__init__(
            folder / name,
            level_shapes={1.0: tuple(map(int, entry["shape"]))},
            num_channels=1,
            dtype=np.dtype(np.uint8 if max(values.values()) < 256 else np.uint16),
            pixel_size_um=None if size_um is None else tuple(map(float, size_um)),
            channel_names=("label",),
            axes=str(entry["axes"]),
        )
        self.label_names = {int(value): str(text) for value, text in places["names"].items()}
        self.label_colors = {int(value): tuple(map(int, color)) for value, color in places["colors"].items()}
        self.has_background = bool(places["has_background"])
        self._values, self._ending, self._folder = dict(values), str(ending), folder
        self._crops = [Crop(c["case"], tuple(map(int, c["start"])), tuple(map(int, c["size"]))) for c in entry["crops"]]

    def check(self) -> None:
        """See that there is a prediction of every crop.

        Raises:
            ReadError: there is not.
        """
        missing = [crop.case for crop in self._crops if not self._file(crop).is_file()]
        if missing:
            got = f"none of {missing[0]!r}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            raise ReadError(self._folder, expected=f"predictions of the crops of {self.name}", got=got)

    def _file(self, crop: Crop) -> Path:
        return self._folder / f"{crop.case}{self._ending}"

    def _read_window(self, level: Level, start: tuple[int, ...], stop: tuple[int, ...]) -> np.ndarray[Any, Any]:
        pixels = np.zeros((1, *(b - a for a, b in zip(start, stop, strict=True))), self.dtype)
        for crop in self._crops:
            low = tuple(max(a, s) for a, s in zip(start, crop.start, strict=True))
            high = tuple(min(b, s + n) for b, s, n in zip(stop, crop.start, crop.size, strict=True))
            if all(a < b for a, b in zip(low, high, strict=True)):
                values = _decode(self._file(crop), crop.size, self._values)
                target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
                source = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, crop.start, strict=True))
                pixels[0][target] = values[source]
        return pixels


def _decode(file: Path, size: tuple[int, ...], values: Mapping[int, int]) -> NDArray[np.uint16]:
    """The label values of a crop from nnU-Net's numbers."""
    slide = open_slide(file, palette="index")
    if slide.shape != size or slide.num_channels != 1 or slide.dtype.kind not in "iu":
        expected, got = f"whole numbers in one channel of {size} pixels", f"{slide.num_channels} of {slide.shape}"
        raise ReadError(file, expected=expected, got=f"{got}, {slide.dtype}")
    found, inverse = np.unique(slide.read(1, (0,) * len(size), size)[0], return_inverse=True)
    unknown = [int(code) for code in found if int(code) not in values]
    if unknown:
        raise ReadError(file, expected=f"labels {', '.join(map(str, values))}", got=unknown[0])
    return np.array([values[int(code)] for code in found], np.uint16)[inverse].reshape(size)
