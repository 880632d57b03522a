"""Models for software without muvit: ONNX files, and programs of ``torch.export``, checked against the model."""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from muvit.durable import whole_file
from muvit.errors import ExistsError, InputError, require_package
from muvit.geometry import naive_boxes
from muvit.models.classifier import Classifier
from muvit.models.folder import FolderModel
from muvit.models.segmentation_model import SegmentationModel, Views, encoder_views
from muvit.models.trained import TrainedModel

ONNX, PROGRAM = ".onnx", ".pt2"
PREPROCESSING = "preprocessing.yaml"
"""Name of the settings inside an exported model."""
MAX_BATCH = 64
"""Largest batch that an exported model takes."""
TOLERANCE = 1e-4
"""Largest difference of outputs, relative to the largest output."""

_INPUTS = ("img", "bbox")
_CHECKED_BATCHES = (1, 3)
_MAX_ONNX_BYTES = 2**31

Outputs = Callable[..., np.ndarray]
"""Output of an exported model for its inputs."""


def export_model(trained: TrainedModel[FolderModel], file: Path | str, *, overwrite: bool = False) -> float:
    """Write a model as an ONNX file (``.onnx``) or as a program of ``torch.export`` (``.pt2``).

    The exported model takes ``img`` ``(B, L, C, *space)``, normalised as in training, and ``bbox`` ``(B, L, 2, ndim)``
    float32, world pixels, both for batches of 1 to 64, and gives logits. Its preprocessing is inside, as the text of
    ``preprocessing.yaml``: metadata of the ONNX file, or an extra file of the program. The file is run, and
    written only if its outputs are those of the model.

    Args:
        trained: the model, and its preprocessing, whose crops are the views that the exported model takes.
        file: to write.
        overwrite: replace the file.

    Returns:
        Largest difference between outputs of the file and of the model, for views of random pixels.

    Raises:
        ExistsError: the file exists, and ``overwrite`` is false.
        InputError: the suffix is another, the model gives no logits, a package is missing, the model is too large for
            an ONNX file, or outputs differ by more than 1e-4 of the largest.
    """
    file = Path(file)
    if file.suffix not in (ONNX, PROGRAM):
        raise InputError(file, expected=f"a file ending in {ONNX} or {PROGRAM}", got=f"one ending in {file.suffix!r}")
    if file.exists() and not overwrite:
        raise ExistsError(file)
    if file.suffix == ONNX:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            require_package(package, file.name, package=package, install="muvit[onnx]")
    if not isinstance(trained.model, SegmentationModel | Classifier):
        got = f"a {type(trained.model).__name__}"
        raise InputError("model", expected="a model of pixels or a classifier of slides", got=got)
    model, size, text = trained.model, trained.preprocessing.crop_size, trained.preprocessing.to_yaml()
    views = model.views if isinstance(model, SegmentationModel) else encoder_views(model.encoder.config)
    whole = _Logits(copy.deepcopy(model)).cpu().eval()
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    dynamic = {name: {0: batch} for name in _INPUTS}
    with quiet(), torch.no_grad():
        program = torch.export.export(whole, _views(views, size, 2), dynamic_shapes=dynamic)
        content, run = write_onnx(program, _INPUTS, "logits", text) if file.suffix == ONNX else _program(program, text)
        difference = compare_outputs(file, whole, run, [_views(views, size, n) for n in _CHECKED_BATCHES])
    with whole_file(file) as stream:
        stream.write(content)
    return difference


class _Logits(nn.Module):
    """The logits of a model, whatever else it does."""

    def __init__(self, model: SegmentationModel | Classifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, img: Tensor, bbox: Tensor) -> Tensor:
        logits = self.model.label_logits if isinstance(self.model, SegmentationModel) else self.model
        result: Tensor = logits(img, bbox)
        return result


def _views(views: Views, size: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    """Views of random pixels, each sample at another place."""
    generator = torch.Generator().manual_seed(count)
    boxes = naive_boxes(views.levels, tuple(size)) + 1000 * torch.arange(1.0, count + 1)[:, None, None, None]
    return torch.rand(count, len(views.levels), views.in_channels, *size, generator=generator), boxes


def _program(program: torch.export.ExportedProgram, preprocessing: str) -> tuple[bytes, Outputs]:
    """Content of the file, and the outputs of what it holds."""
    stream = io.BytesIO()
    torch.export.save(program, stream, extra_files={PREPROCESSING: preprocessing})
    module = torch.export.load(io.BytesIO(stream.getvalue())).module()
    return stream.getvalue(), lambda img, bbox: module(img, bbox).numpy()


def write_onnx(
    program: torch.export.ExportedProgram, inputs: Sequence[str], output: str, preprocessing: str
) -> tuple[bytes, Outputs]:
    """Content of an ONNX file, and the outputs of what it holds.

    Args:
        program: the model.
        inputs: names of its inputs.
        output: name of its output.
        preprocessing: text to keep in the metadata.

    Raises:
        InputError: the weights are too large for such a file.
    """
    import onnx
    import onnxruntime

    size = sum(weights.numel() * weights.element_size() for weights in program.state_dict.values())
    if size >= _MAX_ONNX_BYTES:
        expected = f"a model of less than 2 GiB, which an {ONNX} file can hold"
        raise InputError("model", expected=expected, got=f"{size / 2**30:.1f} GiB", hint=f"Write a {PROGRAM} file.")
    exported = torch.onnx.export(program, input_names=inputs, output_names=[output], verbose=False, optimize=False)
    assert exported is not None
    proto = exported.model_proto
    onnx.helper.set_model_props(proto, {PREPROCESSING: preprocessing})
    content: bytes = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    taken = {one.name for one in session.get_inputs()}

    def run(*tensors: Tensor) -> np.ndarray:
        given = zip(inputs, tensors, strict=True)
        found: np.ndarray = session.run(None, {name: value.numpy() for name, value in given if name in taken})[0]
        return found

    return content, run


def compare_outputs(file: Path, model: nn.Module, run: Outputs, batches: Sequence[tuple[Tensor, ...]]) -> float:
    """Largest difference between the outputs of an exported model and of the model itself.

    Raises:
        InputError: it is more than 1e-4 of the largest output; names the file.
    """
    logits = [model(*views).numpy() for views in batches]
    errors = [np.abs(run(*views) - expected).max() for views, expected in zip(batches, logits, strict=True)]
    difference, largest = float(np.max(errors)), max(float(np.abs(one).max()) for one in logits)
    if not difference <= TOLERANCE * largest:
        expected = f"outputs within {TOLERANCE:g} of the model's, relative to the largest"
        raise InputError(
            file, expected=expected, got=f"a difference of {difference:.2g} where the largest is {largest:.2g}"
        )
    return difference


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings and messages of the exporter on its own making."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)
