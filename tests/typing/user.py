"""A script of a user, for mypy: types are seen, and each ignored error is one that mypy reports."""

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import muvit
from muvit import (
    CropConfig,
    EncoderConfig,
    Evaluation,
    Execution,
    MuViTEncoder2d,
    MuViTMAE3d,
    NestedCrops,
    Preprocessing,
    Recipe,
    SegmentationModel,
    Segmenter,
    SegmenterConfig,
    Slide,
    TrainedModel,
    Views,
    classify_slide,
    convert_image,
    evaluate_slides,
    extract_features,
    load_model,
    open_slide,
    predict_slide,
    read_settings,
    train_segmenter,
)
from muvit.data import GridCrops, place_views
from muvit.decoders import MuViTDecoder2d
from muvit.inference.loaded import LoadedModel
from muvit.models.folder import FolderModel


class Network(SegmentationModel):
    """A model of the user's own."""

    num_classes = 2

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, self.num_classes, 1)

    @property
    def views(self) -> Views:
        """The finest level alone."""
        return Views(levels=(1,), in_channels=1, ndim=2, multiple=(1, 1))

    def forward(self, img: Tensor, bbox: Tensor | None = None) -> Tensor:
        """Logits of the finest view."""
        logits: Tensor = self.layer(img[:, 0])
        return logits


def accepted(preprocessing: Preprocessing) -> None:
    """Calls as the documentation shows them, with the types that they return."""
    slide = open_slide("image.ome.zarr")
    assert_type(slide, Slide)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), dim=64)
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3))
    assert_type(model.config, SegmenterConfig)
    assert_type(load_model("run"), LoadedModel[FolderModel])
    assert_type(load_model("run", "cuda", kind=Segmenter).model, Segmenter)
    assert_type(load_model("run", kind=Network).model, Network)
    assert_type(predict_slide(load_model("run"), slide, "labels.ome.zarr"), Path)
    predict_slide(model, slide, Path("labels.ome.zarr"), preprocessing, batch_size=2, device=torch.device("cpu"))
    predict_slide(TrainedModel(model=Network(), preprocessing=preprocessing), slide, "labels.ome.zarr")
    assert_type(extract_features(load_model("run"), slide, "features.zarr", dtype="float32"), Path)
    assert_type(classify_slide(load_model("run"), slide).probabilities, NDArray[np.float64])
    assert_type(evaluate_slides([(slide, slide)], 3), Evaluation)
    assert_type(train_segmenter(read_settings("recipe.yaml", Recipe), Path("run")), Path)
    crops = NestedCrops([(slide, slide)], CropConfig(levels=(1, 4), size=(64, 64), num_classes=3))
    assert_type(crops[0], dict[str, Tensor])
    small = MuViTEncoder2d(in_channels=1, levels=[1, 4], dim=64, num_layers=2, heads=2)
    assert_type(small.extract_levels([1]), MuViTEncoder2d)
    assert_type(MuViTMAE3d.from_folder("run"), MuViTMAE3d)
    assert_type(muvit.__version__, str)


def refused(slide: Slide, model: Segmenter, preprocessing: Preprocessing) -> None:
    """Mistakes: mypy would report an error that is ignored in vain, or without its name."""
    MuViTEncoder2d(in_channels=1, levels=(1, 4), nonsense=3)  # type: ignore[call-arg]
    MuViTEncoder2d(in_channels="1", levels=(1, 4))  # type: ignore[arg-type]
    MuViTEncoder2d(in_channels=1, levels=(1, 4), attention_mode="some")  # type: ignore[arg-type]
    MuViTMAE3d(nonsense=3)  # type: ignore[call-arg]
    MuViTMAE3d(decoder_mode="many")  # type: ignore[arg-type]
    MuViTDecoder2d(8, nonsense=3)  # type: ignore[call-arg]
    EncoderConfig(in_channels=1, levels=(1, 4), level=3)  # type: ignore[call-arg]
    Segmenter(model.config, in_channels=1)  # type: ignore[call-arg]
    SegmenterConfig(encoder=model, num_classes=3)  # type: ignore[arg-type]
    CropConfig(levels=(1, 4), size=64)  # type: ignore[arg-type]
    GridCrops()  # type: ignore[call-arg]
    load_model()  # type: ignore[call-overload]
    load_model("run", kind="muvit")  # type: ignore[call-overload]
    TrainedModel(model=model)  # type: ignore[call-arg]
    open_slide(3)  # type: ignore[arg-type]
    open_slide("image.tif").with_levels_of("other")  # type: ignore[attr-defined]
    convert_image("image.tif")  # type: ignore[call-arg]
    predict_slide(nn.Conv2d(1, 2, 1), slide, "labels", preprocessing)  # type: ignore[arg-type]
    predict_slide(model, "image.tif", "labels", preprocessing)  # type: ignore[arg-type]
    predict_slide(model, slide, "labels", preprocessing, batch=2)  # type: ignore[call-arg]
    predict_slide(model, slide, "labels", options=Execution(batch_size=2))  # type: ignore[arg-type]
    extract_features(load_model("run"), slide, "features.zarr", dtype="int8")  # type: ignore[arg-type]
    classify_slide(model, slide)  # type: ignore[arg-type]
    evaluate_slides([slide], 3)  # type: ignore[list-item]
    place_views("around")  # type: ignore[call-arg, arg-type]
    train_segmenter("recipe.yaml", Path("run"))  # type: ignore[arg-type]
    muvit.nonsense  # type: ignore[attr-defined]  # noqa: B018
