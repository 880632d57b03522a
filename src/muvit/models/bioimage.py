"""Packages of the bioimage.io model zoo: one image in, class probabilities out, run by software without muvit."""

import copy
import hashlib
import io
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from muvit.data.crops.normalize import Normalization, Range, Standardize
from muvit.data.slides.derived import with_levels
from muvit.data.slides.slide import Slide
from muvit.durable import whole_file
from muvit.errors import ExistsError, InputError, require_package
from muvit.geometry import naive_boxes
from muvit.levels import level_factors
from muvit.models.card import card_text, read_card
from muvit.models.folder import model_folder
from muvit.models.portable import MAX_BATCH, compare_outputs, quiet, write_onnx
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.trained import TrainedModel, load_model
from muvit.pictures import colorize, fit, to_rgb
from muvit.version import __version__

SUFFIX = ".zip"
_FORMAT = "0.5.4"
_AXES = "zyx"
_COVER_PX = 512
# cards hold identifiers in lower case, as huggingface.co wants them; bioimage.io wants those of SPDX
_LICENSES = (
    *("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-ND-4.0", "CC-BY-NC-ND-4.0"),
    *("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "MPL-2.0", "GPL-2.0", "GPL-3.0", "LGPL-3.0", "AGPL-3.0"),
)
_CITE = "Dominguez Mantes et al., MuViT: Multi-Resolution Vision Transformers for Learning Across Scales in Microscopy"
_DOI = "10.48550/arXiv.2602.24222"


class OneImage(nn.Module):
    """A model that makes its views from one image, at the places of placement ``concentric``.

    The image has the pixels of the finest level, and covers the coarsest view. Its middle is the finest view; coarser
    ones are area means of larger middles. World boxes are constants. The output has the size of the image: class
    probabilities of the finest view, 0 around it.

    Args:
        model: the model.
        size: pixels of every view, (z)yx.
    """

    def __init__(self, model: SegmentationModel, size: Sequence[int]) -> None:
        super().__init__()
        views = model.views
        factors = [level_factors(level, views.ndim) for level in views.levels]
        self.model, self.size = model, tuple(size)
        self.ratios = [
            tuple(round(own / finest) for own, finest in zip(level, factors[0], strict=True)) for level in factors
        ]
        exact = [tuple(own / finest for own, finest in zip(level, factors[0], strict=True)) for level in factors]
        self.extent = tuple(n * ratio for n, ratio in zip(self.size, self.ratios[-1], strict=True))
        self.halo = tuple((whole - n) // 2 for whole, n in zip(self.extent, self.size, strict=True))
        middles = [
            (whole - n * r) % 2 for rs in self.ratios for whole, n, r in zip(self.extent, self.size, rs, strict=True)
        ]
        if self.ratios != exact or any(middles):
            expected = "levels that are whole multiples of the finest, and crops of an even size"
            raise InputError("model", expected=expected, got=f"levels {views.levels}, crops of {self.size}")
        centre = torch.tensor([n * f / 2 for n, f in zip(self.extent, factors[0], strict=True)])
        self.register_buffer("boxes", naive_boxes(views.levels, self.size) + centre, persistent=False)

    def views(self, image: Tensor) -> Tensor:
        """Views ``(B, L, C, *space)`` of an image ``(B, C, *extent)``."""
        views = []
        pool = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[len(self.size) - 1]
        for ratio in self.ratios:
            middle = image
            for axis, (n, r, whole) in enumerate(zip(self.size, ratio, self.extent, strict=True), start=2):
                middle = middle.narrow(axis, (whole - n * r) // 2, n * r)
            views.append(pool(middle, ratio) if max(ratio) > 1 else middle)
        return torch.stack(views, dim=1)

    def forward(self, image: Tensor) -> Tensor:
        """Probabilities ``(B, K, *extent)`` of normalised pixels ``(B, C, *extent)``."""
        boxes = self.get_buffer("boxes").expand(image.shape[0], -1, -1, -1)
        probabilities = self.model.label_logits(self.views(image), boxes).float().softmax(1)
        around = [n for side in reversed(self.halo) for n in (side, side)]
        return functional.pad(probabilities, around)


def export_package(
    folder: Path | str,
    file: Path | str,
    *,
    license: str | None = None,
    authors: Sequence[str] = (),
    slide: Slide | None = None,
    overwrite: bool = False,
) -> float:
    """Write a model folder as a package of bioimage.io (model description 0.5): a zip with weights as ONNX.

    Its one input is an image with the pixels of the finest level, as large as the coarsest view; see `OneImage`. The
    output states a halo, so that software for such packages labels images of any size tile by tile. Test tensors,
    cover and documentation (the card of the model) are in the package.

    Args:
        folder: model folder, or the folder of the run that made it.
        file: to write, ending in .zip.
        license: SPDX identifier of the licence; unset, that of the card.
        authors: names, at least one.
        slide: whose middle becomes test input and cover; unset, random pixels.
        overwrite: replace the file.

    Returns:
        Largest difference between the probabilities by the ONNX file and by the model.

    Raises:
        ExistsError: the file exists, and ``overwrite`` is false.
        InputError: a package is missing, there is no licence or author, or the model cannot be written: it has time,
            levels that are no multiples of the finest, placement free, or a normalisation that depends on the image.
    """
    file, folder = Path(file), model_folder(folder)
    if file.suffix != SUFFIX:
        raise InputError(file, expected=f"a file ending in {SUFFIX}", got=f"one ending in {file.suffix!r}")
    if file.exists() and not overwrite:
        raise ExistsError(file)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        require_package(package, file.name, package=package, install="muvit[onnx]")
    trained = load_model(folder, kind=SegmentationModel)
    license = license or read_card(folder).license
    if license is None:
        raise InputError("license", expected="an SPDX identifier, such as CC-BY-4.0", got="none, nor one in the card")
    if not authors:
        raise InputError("authors", expected="at least one name, as bioimage.io requires", got="none")
    _check(trained)
    pixels = _test_pixels(trained, slide)
    whole = OneImage(copy.deepcopy(trained.model), trained.preprocessing.crop_size).cpu().eval()
    normalized = _normalized(trained.preprocessing.normalization, pixels)
    inputs = (torch.from_numpy(normalized)[None],)
    with quiet(), torch.no_grad():
        twice = tuple(one.repeat(2, *[1] * (one.ndim - 1)) for one in inputs)
        dynamic = ({0: torch.export.Dim("batch", min=1, max=MAX_BATCH)},)
        program = torch.export.export(whole, twice, dynamic_shapes=dynamic)
        weights, run = write_onnx(program, ("image",), "probabilities", trained.preprocessing.to_yaml())
        difference = compare_outputs(file, whole, run, [inputs, twice])
    output = run(*inputs)
    files = {
        "weights.onnx": weights,
        "README.md": card_text(folder).encode(),
        "cover.png": _cover(trained, pixels, output[0]),
        "test_input.npy": _npy(pixels[None]),
        "test_output.npy": _npy(output),
    }
    content = _package(files, _describe(files, read_card(folder).title, trained, whole, license, authors))
    with whole_file(file) as stream:
        stream.write(content)
    return difference


def _check(trained: TrainedModel[SegmentationModel]) -> None:
    ndim, preprocessing = trained.model.views.ndim, trained.preprocessing
    if ndim not in (2, 3) or preprocessing.placement == "free":
        got = f"{ndim} axes, placement {preprocessing.placement}"
        raise InputError("model", expected="a model of images or volumes with views about one place", got=got)
    _linear(preprocessing.normalization)


def _linear(normalization: Normalization) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and standard deviation, of each channel or of all, that the normalisation subtracts and divides by.

    Raises:
        InputError: it depends on the image.
    """
    if isinstance(normalization, Range):
        return np.array([normalization.low]), np.array([normalization.high - normalization.low])
    if isinstance(normalization, Standardize) and not normalization.local_mean:
        return np.array(normalization.mean), np.array(normalization.std)
    raise InputError(
        "normalization",
        expected="range, or standardize with fixed means, which a package can state",
        got=normalization.kind,
        hint="Train with one of these.",
    )


def _normalized(normalization: Normalization, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    mean, std = (values.reshape(-1, *[1] * (pixels.ndim - 1)) for values in _linear(normalization))
    return ((pixels - mean) / std).astype(np.float32)


def _test_pixels(trained: TrainedModel[SegmentationModel], slide: Slide | None) -> NDArray[np.float32]:
    """Raw pixels ``(C, *extent)``: the middle of a slide, or random ones around the mean."""
    views = trained.model.views
    extent = OneImage(trained.model, trained.preprocessing.crop_size).extent
    if slide is None:
        mean, std = (np.max(values) for values in _linear(trained.preprocessing.normalization))
        return np.random.default_rng(0).normal(mean + std / 2, std / 4, (views.in_channels, *extent)).astype(np.float32)
    if (slide.ndim, slide.num_channels) != (views.ndim, views.in_channels):
        expected = f"{views.in_channels} channels and {views.ndim} axes, as the model takes"
        raise InputError(slide.path, expected=expected, got=f"{slide.num_channels} channels and {slide.ndim} axes")
    slide = with_levels(slide, views.levels)
    start = [(n - size) // 2 for n, size in zip(slide.level_shape(views.levels[0]), extent, strict=True)]
    return slide.read(views.levels[0], start, extent).astype(np.float32)


def _cover(
    trained: TrainedModel[SegmentationModel], pixels: NDArray[np.float32], probabilities: NDArray[np.float32]
) -> bytes:
    """PNG of the image beside the labels, of volumes the middle slices."""
    middle = tuple(n // 2 for n in pixels.shape[1:-2])
    shown = to_rgb(pixels[(slice(None), *middle)])
    labels = colorize(probabilities.argmax(0)[middle], trained.preprocessing.class_colors)
    pair = [fit(shown, _COVER_PX), fit(labels, _COVER_PX, is_labels=True)]
    stream = io.BytesIO()
    Image.fromarray(np.concatenate(pair, axis=1)).save(stream, format="png")
    return stream.getvalue()


def _package(files: Mapping[str, bytes], description: Mapping[str, Any]) -> bytes:
    """Content of the zip."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        text = yaml.safe_dump(dict(description), sort_keys=False, allow_unicode=True)
        for name, content in {"rdf.yaml": text.encode(), **files}.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)  # always with the same date
    return stream.getvalue()


def _describe(
    files: Mapping[str, bytes],
    title: str,
    trained: TrainedModel[SegmentationModel],
    whole: OneImage,
    license: str,
    authors: Sequence[str],
) -> dict[str, Any]:
    """Content of ``rdf.yaml`` (model description 0.5).

    Args:
        files: of the package, by name.
        title: of the card.
        trained: the model.
        whole: the same with one input.
        license: SPDX identifier.
        authors: names.
    """
    preprocessing = trained.preprocessing
    classes = list(preprocessing.class_names)
    mean, std = (values.tolist() for values in _linear(preprocessing.normalization))
    fixed = {"mean": mean[0], "std": std[0]} if len(mean) == 1 else {"mean": mean, "std": std, "axis": "channel"}
    channels = [f"channel {i}" for i in range(trained.model.views.in_channels)]

    def file(name: str) -> dict[str, str]:
        return {"source": name, "sha256": hashlib.sha256(files[name]).hexdigest()}

    return {
        "type": "model",
        "format_version": _FORMAT,
        "name": re.sub(r"[^\w+\- ()]", "", title, flags=re.ASCII),  # what the specification allows
        "description": f"Labels {', '.join(classes)} by views of several resolutions, made from one image.",
        "version": "1.0",
        "license": next((name for name in _LICENSES if name.lower() == license.lower()), license),
        "authors": [{"name": name} for name in authors],
        "cite": [{"text": _CITE, "doi": _DOI}],
        "tags": ["segmentation", "multi-resolution", "vision-transformer"],
        "documentation": file("README.md"),
        "covers": [file("cover.png")],
        "inputs": [
            {
                "id": "image",
                "description": "pixels of the finest level, as many as the coarsest view covers",
                "axes": _axes(trained, whole, channels),
                "data": {"type": "float32"},
                "preprocessing": [{"id": "fixed_zero_mean_unit_variance", "kwargs": fixed}],
                "test_tensor": file("test_input.npy"),
            }
        ],
        "outputs": [
            {
                "id": "probabilities",
                "description": "probability of each class in the middle, 0 in the halo",
                "axes": _axes(trained, whole, classes, source="image"),
                "data": {"type": "float32", "range": [0.0, 1.0]},
                "test_tensor": file("test_output.npy"),
            }
        ],
        "weights": {"onnx": {**file("weights.onnx"), "opset_version": _opset(files["weights.onnx"])}},
        "config": {"muvit": {"version": __version__, "class_colors": [*map(list, preprocessing.class_colors)]}},
    }


def _axes(
    trained: TrainedModel[SegmentationModel], whole: OneImage, names: list[str], source: str | None = None
) -> list[dict[str, Any]]:
    """Axes of the input, or of the output, whose size is that of the input ``source``."""
    axes: list[dict[str, Any]] = [{"type": "batch"}, {"type": "channel", "channel_names": names}]
    sizes_um, factors = (
        trained.preprocessing.pixel_size_um,
        level_factors(trained.model.views.levels[0], len(whole.size)),
    )
    for i, name in enumerate(_AXES[-len(whole.size) :]):
        axis: dict[str, Any] = {"type": "space", "id": name}
        axis |= {} if sizes_um is None else {"unit": "micrometer", "scale": sizes_um[i] * factors[i]}
        if source is None:
            axis |= {"size": whole.extent[i], "concatenable": True}
        else:
            axis |= {"size": {"tensor_id": source, "axis_id": name}}
            axis |= {"halo": whole.halo[i]} if whole.halo[i] else {}
        axes.append(axis)
    return axes


def _opset(weights: bytes) -> int:
    import onnx

    imports = onnx.load_from_string(weights).opset_import
    return int(next(one.version for one in imports if one.domain in ("", "ai.onnx")))


def _npy(values: NDArray[np.float32]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, values)
    return stream.getvalue()
