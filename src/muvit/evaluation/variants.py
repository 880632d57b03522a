"""Models that share a budget: a recipe's own, its controls, and others that follow from it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from muvit.errors import InputError
from muvit.levels import level_name
from muvit.models.baselines import BaselineConfig
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the models to compare."""

    name: str
    """Name in the report."""
    description: str
    """Difference from the others, one sentence."""
    recipe: Recipe
    """Settings of its training."""

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


Preset = tuple[str, str, Callable[[Recipe], Recipe]]


def _with_model(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, model=replace(_muvit(recipe), **changes))


def _finest_only(recipe: Recipe) -> Recipe:
    encoder = _muvit(recipe).encoder
    return _with_model(encoder=replace(encoder, levels=encoder.levels[:1]))(recipe)


def _with_baseline(kind: str, *, stacked: bool = False) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        model = recipe.model
        config = BaselineConfig(
            kind=kind,  # type: ignore[arg-type]
            levels=model.levels if stacked else model.levels[:1],
            ndim=model.ndim,
            in_channels=model.in_channels,
            num_classes=model.num_classes,
        )
        return replace(recipe, model=config, init=None)

    return change


def _with_relay(backbone: str, **settings: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        model, is_single = recipe.model, settings.get("relay_tokens") == 0
        config = RelayConfig(
            backbone=backbone,
            # numbers, not one per axis: a backbone is two-dimensional, and RelayConfig refuses the others
            levels=cast("tuple[float, ...]", model.levels[:1] if is_single else model.levels),
            in_channels=model.in_channels,
            num_classes=model.num_classes,
            **settings,
        )
        # without coordinates, a context branch finds the local view only in its centre, as in the paper
        is_free = is_single or recipe.data.placement == "free"
        data = recipe.data if is_free else replace(recipe.data, placement="concentric")
        return replace(recipe, data=data, model=config, init=None)

    return change


def _muvit(recipe: Recipe) -> SegmenterConfig:
    """The model of a recipe that presets follow from.

    Raises:
        InputError: it is of another kind, or has a single level or naive boxes itself.
    """
    model = recipe.model
    if not isinstance(model, SegmenterConfig) or len(model.levels) < 2 or model.boxes != "true":
        raise InputError("model", expected="kind muvit with several levels and true boxes, to compare it", got=model)
    return model


_ONE = "sees the finest level only"
_ALL = "sees every level"
PRESETS: dict[str, Preset] = {
    "muvit": ("MuViT[{all}]", f"{_ALL}, each patch at its true place", _with_model()),
    "finest": ("MuViT[{finest}]", _ONE, _finest_only),
    "naive": (
        "MuViT[{all}] naive boxes",
        f"{_ALL}, but not where the crops lie relative to each other",
        _with_model(boxes="naive"),
    ),
    "mask2former": ("MuViT[{all}] Mask2Former", f"{_ALL}, queries in the decoder", _with_model(decoder="mask2former")),
    "unet": ("U-Net", _ONE, _with_baseline("unet")),
    "deeplabv3": ("DeepLabV3", _ONE, _with_baseline("deeplabv3")),
    "deeplabv3plus": ("DeepLabV3-plus", _ONE, _with_baseline("deeplabv3plus")),
    "upernet": ("UPerNet ConvNeXt", _ONE, _with_baseline("upernet")),
    "fpn": ("PVT-v2 FPN", _ONE, _with_baseline("fpn")),
    "segformer": ("SegFormer", _ONE, _with_baseline("segformer")),
    "swin_mask2former": ("Mask2Former Swin", _ONE, _with_baseline("mask2former")),
    "swinunetr": ("SwinUNETR-V2", _ONE, _with_baseline("swinunetr")),
    "unetr": ("UNETR", _ONE, _with_baseline("unetr")),
    "early_fusion": ("U-Net early fusion", f"{_ALL}, stacked as channels", _with_baseline("unet", stacked=True)),
    "relay_vit": ("ViT-S relay[{all}]", f"{_ALL}, joined by relay tokens", _with_relay("vit_small_patch16_224")),
    "relay_swin": (
        "Swin-V2-S relay[{all}]",
        f"{_ALL}, joined by relay tokens",
        _with_relay("swinv2_small_window8_256"),
    ),
    "vit": ("ViT-S", _ONE, _with_relay("vit_small_patch16_224", relay_tokens=0)),
    "swin": ("Swin-V2-S", _ONE, _with_relay("swinv2_small_window8_256", relay_tokens=0)),
}
"""Models to compare by short name: title, description, and how its recipe follows from another."""

CONTROLS = ("muvit", "finest", "naive")
"""The recipe's model and the paper's two controls."""


def preset(recipe: Recipe, name: str) -> Variant:
    """The model of this short name, on the data and with the budget of a recipe.

    Raises:
        InputError: there is no such name, or the recipe has a single level or naive boxes itself, so that there is
            nothing to compare.
    """
    if name not in PRESETS:
        raise InputError("models", expected=f"names out of {', '.join(PRESETS)}", got=repr(name))
    title, description, change = PRESETS[name]
    shown = [level_name(level) for level in _muvit(recipe).levels]
    return Variant(
        name=title.format(all=",".join(shown), finest=shown[0]), description=description, recipe=change(recipe)
    )


def with_controls(recipe: Recipe) -> list[Variant]:
    """The recipe's model and the paper's two controls: its finest level alone, and naive boxes."""
    return [preset(recipe, name) for name in CONTROLS]
