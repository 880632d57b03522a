"""Models that share a budget: a recipe's own, its controls, and others that follow from it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

from muvit.errors import InputError
from muvit.levels import level_name
from muvit.models.baselines import BaselineConfig
from muvit.models.relay import RelayConfig
from muvit.training.recipes import Recipe


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One of the models to compare."""

    name: str
    """Name in the report."""
    description: str
    """How it differs from the others, one sentence."""
    recipe: Recipe
    """How to train it."""

    @property
    def slug(self) -> str:
        """The name as a folder name."""
        return re.sub(r"[^a-z0-9]+", "_", self.name.lower()).strip("_")


Preset = tuple[str, str, Callable[[Recipe], Recipe]]


def _with_model(**changes: Any) -> Callable[[Recipe], Recipe]:
    return lambda recipe: replace(recipe, model=replace(recipe.model, **changes), baseline=None, relay=None)


def _finest_only(recipe: Recipe) -> Recipe:
    encoder = recipe.model.encoder
    return _with_model(encoder=replace(encoder, levels=encoder.levels[:1]))(recipe)


def _with_baseline(network: str, **settings: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        config = BaselineConfig(network=network, **settings)  # type: ignore[arg-type]
        return replace(recipe, baseline=config, relay=None, init=None)

    return change


def _with_relay(backbone: str, **settings: Any) -> Callable[[Recipe], Recipe]:
    def change(recipe: Recipe) -> Recipe:
        # numbers, not one per axis: a backbone is two-dimensional, and RelayConfig refuses the others
        finest = cast("tuple[float, ...]", recipe.model.encoder.levels[:1])
        levels = finest if settings.get("relay_tokens") == 0 else None
        config = RelayConfig(backbone=backbone, levels=levels, **settings)
        # no coordinates tell a context branch where the local view lies, so it lies in the middle, as in the paper
        is_free = levels is not None or recipe.data.placement == "free"
        data = recipe.data if is_free else replace(recipe.data, placement="concentric")
        return replace(recipe, data=data, relay=config, baseline=None, init=None)

    return change


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
    "segformer": ("SegFormer", _ONE, _with_baseline("segformer")),
    "swinunetr": ("SwinUNETR-V2", _ONE, _with_baseline("swinunetr")),
    "unetr": ("UNETR", _ONE, _with_baseline("unetr")),
    "early_fusion": ("U-Net early fusion", f"{_ALL}, stacked as channels", _with_baseline("unet", views="stacked")),
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
    levels = recipe.model.encoder.levels
    if len(levels) < 2 or recipe.model.boxes != "true":
        raise InputError("model", expected="several levels and true boxes, to be compared with less", got=recipe.model)
    title, description, change = PRESETS[name]
    shown = [level_name(level) for level in levels]
    return Variant(
        name=title.format(all=",".join(shown), finest=shown[0]), description=description, recipe=change(recipe)
    )


def with_controls(recipe: Recipe) -> list[Variant]:
    """The recipe's model and the paper's two controls: its finest level alone, and naive boxes."""
    return [preset(recipe, name) for name in CONTROLS]
