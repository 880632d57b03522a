"""Every object of `muvit` that the golden tests touch is made here, and nowhere else in this folder.

A change of the library's interface is followed by an edit of this file alone. What the functions take and return is
plain: numbers, names, arrays, tensors, paths, and modules that are called.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from muvit.data.crops.augment import Augmentation
from muvit.data.crops.classified import ClassifiedCrops, ClassifiedTiles
from muvit.data.crops.crops import GridCrops, NestedCrops
from muvit.data.crops.normalize import normalization_from_dict
from muvit.data.crops.placement import Placement, Window
from muvit.data.crops.preprocessing import CropConfig, Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.data.slides.slide import Slide
from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
from muvit.inference.predict import predict_slide
from muvit.inference.run.context import ContextCaching
from muvit.inference.run.plan import PredictOptions
from muvit.losses import SegmentationLoss
from muvit.mae import MuViTMAE2d, MuViTMAE3d, MuViTMAE4d
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import FolderModel
from muvit.models.mae import MuViTMAE
from muvit.models.masking import TokenMask
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import load_model, load_network
from muvit.settings import read_settings
from muvit.training.fit import train_segmenter
from muvit.training.recipes import Recipe

RENAMED: dict[str, str] = {}
"""Beginnings of parameter names that have changed since the record, new to old."""


# numbers that follow from a name and a shape alone


def uniform(name: str, shape: Sequence[int]) -> np.ndarray:
    """Numbers of mean 0 and variance 1, float64: the raw stream of the bit generator, which numpy never changes."""
    raw = np.random.PCG64(zlib.crc32(f"{name} {tuple(shape)}".encode())).random_raw(prod(shape))
    return ((np.asarray(raw, dtype=np.uint64) >> np.uint64(11)) * 2.0**-53 - 0.5).reshape(shape) * 12**0.5


def tensor(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(uniform(name, shape)).float()


def filled(model: nn.Module) -> nn.Module:
    """The model with parameters and running statistics that follow from their names, whatever it was built with."""
    state = dict(model.named_parameters()) | {n: b for n, b in model.named_buffers() if "running_" in n}
    with torch.no_grad():
        for name, value in state.items():
            old = next((name.replace(new, was, 1) for new, was in RENAMED.items() if name.startswith(new)), name)
            draw, kind = torch.from_numpy(uniform(old, value.shape)).to(value.dtype), old.rpartition(".")[2]
            if kind in ("freq", "base"):  # start from numbers, not from draws
                value.mul_((0.1 * draw).exp())
            elif value.ndim >= 2:
                value.copy_(draw / value[0].numel() ** 0.5)
            else:
                value.copy_(0.1 * draw + (0 if kind in ("bias", "running_mean") else 1))
    return model


# models


def encoder(ndim: int, **settings: object) -> nn.Module:
    return filled({2: MuViTEncoder2d, 3: MuViTEncoder3d, 4: MuViTEncoder4d}[ndim](**settings))


def mae(ndim: int, **settings: object) -> nn.Module:
    return filled({2: MuViTMAE2d, 3: MuViTMAE3d, 4: MuViTMAE4d}[ndim](**settings))


def segmenter(encoder: Mapping[str, object], **settings: object) -> nn.Module:
    return filled(Segmenter(SegmenterConfig(encoder=EncoderConfig(**encoder), **settings)))


def classifier(encoder: Mapping[str, object], **settings: object) -> nn.Module:
    return filled(Classifier(ClassifierConfig(encoder=EncoderConfig(**encoder), **settings)))


def relay(**settings: object) -> nn.Module:
    return filled(RelaySegmenter(RelayConfig(**settings)))


def baseline(*, network: str, views: str = "finest", **settings: object) -> nn.Module:
    return filled(Baseline(BaselineConfig(kind=network, **settings)))


def mask(order: Tensor, num_visible: int) -> TokenMask:
    return TokenMask(order, num_visible)


def loss(**settings: object) -> nn.Module:
    return SegmentationLoss(**settings)


def cached_logits(model: nn.Module, img: Tensor, bbox: Tensor, windows: Sequence) -> Tensor:
    """Logits with coarse views encoded once; windows of each sample as (level, start, size)."""
    return ContextCaching(model).label_logits(img, bbox, [[Window(*w) for w in sample] for sample in windows])


def load(kind: str, folder: Path) -> nn.Module:
    """The model of a folder; kind is segmenter, mae, classifier, relay or baseline."""
    return load_network(folder, kind=MuViTMAE if kind == "mae" else FolderModel).eval()


def save(model: nn.Module, folder: Path, *, crop_size: Sequence[int]) -> None:
    """Write a model folder; with what prediction needs to know, if the model labels pixels."""
    preprocessing = Preprocessing(
        crop_size=tuple(crop_size),
        normalization=normalization_from_dict({"kind": "range", "low": 0, "high": 255}),
        class_names=("background", "disc", "ring"),
        class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0)),
    )
    model.save(folder, overwrite=True, extra_files={"preprocessing.yaml": preprocessing.to_yaml()})


# data


class OffsetEverywhere(Augmentation):
    """As it was at the record: the offset of intensities is added to padding too, which stays 0 today.

    With it, today's samples are the recorded ones, so nothing else about them has changed.
    """

    def draw(self, sample: Mapping[str, object], rng: np.random.Generator) -> dict[str, object]:
        sample = dict(sample)
        if "inside" in sample:  # what is not finite is 0 before gain and offset
            sample["img"] = sample["img"].float().masked_fill(~sample.pop("inside")[:, None], torch.nan)
        return super().draw(sample, rng)


def write_slide(path: Path, pixels: np.ndarray, *, labels: Mapping[int, str] | None = None) -> None:
    """An OME-Zarr image (C, y, x), or a label image with the names of its classes; levels 1 and 4."""
    writer = PyramidWriter.create(
        path,
        shape=pixels.shape[1:],
        num_channels=len(pixels),
        dtype=pixels.dtype,
        levels=(1, 4),
        kind="image" if labels is None else "label",
        pixel_size_um=(0.5, 0.5),
        chunk=32,
        shard=128,
        label_names=None if labels is None else dict(labels),
    )
    writer.write((0, 0), pixels)
    writer.finish()


def slide(path: Path) -> Slide:
    return open_slide(path)


def crops(
    kind: str,
    slides: Sequence[tuple[Slide, Slide | None]],
    *,
    levels: Sequence[float] = (1, 4),
    size: Sequence[int] = (24, 32),
    normalization: Mapping[str, object] = {"kind": "percentile"},
    place: Placement = "nested",
    augmentation: Mapping[str, object] | None = None,
    classes: Sequence[int] | None = None,
    all_labels: bool = False,
    **options: object,
) -> torch.utils.data.Dataset:
    """A data set: kind is random, grid, classified crops or classified tiles; place is nested, concentric or free."""
    config = CropConfig(
        levels=tuple(levels),
        size=tuple(size),
        normalization=normalization_from_dict(dict(normalization)),
        num_classes=3 if slides[0][1] is not None else None,
        label_levels="all" if all_labels else "finest",
        placement=place,
    )
    images = [image for image, _ in slides]
    if kind == "grid":
        return GridCrops(slides, config)
    if kind == "classified tiles":
        return ClassifiedTiles(images, classes, config)
    change = None if augmentation is None else OffsetEverywhere(**augmentation)
    if kind == "classified crops":
        return ClassifiedCrops(images, classes, config, num_samples=8, seed=3, augmentation=change, **options)
    return NestedCrops(slides, config, samples_per_epoch=8, seed=3, augmentation=change, **options)


# runs


def predict(folder: Path, image: Path, output: Path) -> Slide:
    """The labels of a slide by the model of a folder or run."""
    options = PredictOptions(overlap=0.25, blend="linear", block_px=40)
    trained = load_model(folder, kind=SegmentationModel)
    predict_slide(
        trained.model,
        open_slide(image),
        output,
        trained.preprocessing,
        options=options,
        device="cpu",
    )
    return open_slide(output)


def train(settings: Path, output: Path, *, resume: bool = False, epochs: int) -> None:
    """Train by a recipe file for so many epochs in all, on the CPU, without pictures."""
    recipe = read_settings(settings, Recipe)
    run = replace(recipe.run, epochs=epochs, accelerator="cpu", progress=False, pictures=0)
    train_segmenter(replace(recipe, run=run), output, resume=resume)
