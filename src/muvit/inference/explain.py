"""Explanation of the label of one point: where attention goes at every level, and what happens without it."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from muvit.data.crops.placement import PlacedViews, place_at
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.crops.slide_crops import read_views
from muvit.data.slides.slide import Slide
from muvit.errors import InputError
from muvit.inference.inputs import prepare_slide
from muvit.inference.run.execution import resolve_device
from muvit.levels import Level, level_factors, level_name
from muvit.models.attention_maps import attention_maps, gradient_rollout, hidden_tokens, onto_originals, rollout
from muvit.models.layers.patch import patch_grid, patchify, unpatchify
from muvit.models.segmenter import Segmenter
from muvit.models.trained import TrainedModel, as_trained

MAPS = {
    "attention": "attention: last block, mean of its heads",
    "rollout": "rollout: content that reaches the point",
    "relevance": "relevance: what raises the class",
}
"""Kinds of maps by name."""

DELETED_SHARE = 0.1
"""Share of the coarse tokens that is deleted to see whether a map tells what matters."""


class Ablation(NamedTuple):
    """The label of the point after something was taken from the model."""

    case: str
    """The part that was taken, in words."""
    probability: float
    """Probability of the explained class."""
    change: float
    """The same minus that with everything in place."""
    label: str
    """Most likely class, of several draws the most frequent."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Attention behind the label of a point, and the label without parts of what the model sees."""

    slide: str
    """Name of the slide."""
    point: tuple[float, ...]
    """The point in world pixels, (t)(z)yx."""
    levels: tuple[Level, ...]
    """Downsampling factor of each view, finest first."""
    img: NDArray[np.float32]
    """The views as the model sees them, ``(L, C, *space)``."""
    bbox: NDArray[np.float64]
    """Their boxes ``(L, 2, ndim)`` in world pixels."""
    pixel_size_um: tuple[float, ...] | None
    """Micrometers per world pixel, (t)(z)yx."""
    explained: str
    """The class that is explained."""
    probabilities: dict[str, float]
    """Probability of each class at the point."""
    token: tuple[int, ...]
    """Place of the point's token in the grid of the finest view."""
    maps: dict[str, NDArray[np.float64]]
    """Share of every token ``(L, *grid)`` in what reaches the point, of sum 1, for each of `MAPS`."""
    ablations: tuple[Ablation, ...]
    """The point's label without parts of what the model sees."""

    @property
    def level_shares(self) -> dict[str, tuple[float, ...]]:
        """Share of each level in each map."""
        return {name: tuple(shares.reshape(len(shares), -1).sum(1).tolist()) for name, shares in self.maps.items()}

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the pixels."""
        return {
            "slide": self.slide,
            "point": list(self.point),
            "explained": self.explained,
            "probabilities": self.probabilities,
            "levels": [level_name(level) for level in self.levels],
            "boxes": self.bbox.tolist(),
            "token": list(self.token),
            "level_shares": {name: list(shares) for name, shares in self.level_shares.items()},
            "ablations": [ablation._asdict() for ablation in self.ablations],
            "maps": {name: shares.round(8).tolist() for name, shares in self.maps.items()},
        }


def explain_point(
    model: Segmenter | TrainedModel[Any],
    slide: Slide,
    point: Sequence[float],
    preprocessing: Preprocessing | None = None,
    *,
    label: str | None = None,
    draws: int = 8,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Explanation:
    """Explain the label that a model gives to one point of a slide.

    The finest view is centred on the point, as far as the image allows, and the coarser ones lie as in prediction.
    Attention of all blocks and its gradients are held at once, 8 bytes for each block, head and pair of tokens.

    Args:
        model: a multi-resolution segmenter; it is moved to ``device``. A `TrainedModel`, as `muvit.load_model` returns,
            brings its preprocessing.
        slide: the image; levels of the model that it does not store are computed.
        point: (t)(z)yx in pixels of the slide as stored.
        preprocessing: as in training; by default that of a `TrainedModel`.
        label: name of the class to explain; unset, the most likely one at the point.
        draws: repetitions of what is random, of which means are taken.
        seed: of the random draws.
        device: where to compute; by default CUDA if there is any, else the CPU.

    Raises:
        InputError: the model is of another kind, slide and model do not fit each other, the point lies outside, or the
            model knows no class of this name.
    """
    trained = as_trained(model, preprocessing, Segmenter)
    network, preprocessing = trained.model, trained.preprocessing
    slide = prepare_slide(network.views, slide, preprocessing)
    at = _in_world(slide, point)
    names = preprocessing.class_names
    if label is not None and label not in names:
        raise InputError("label", expected=f"a class of the model: {', '.join(names)}", got=label)
    levels, config = network.views.levels, preprocessing.crops(network.views.levels)
    shapes = [slide.level_shape(level) for level in levels]
    placed = place_at(preprocessing.placement, shapes, levels, config.size, at, free_views=preprocessing.free_views)
    sample = read_views(slide, placed.windows, config)
    network.to(resolve_device(device)).eval()
    looked = _LabelledPoint(network, sample["img"], placed, at, names, label)
    maps = looked.maps()
    return Explanation(
        slide=slide.name,
        point=at,
        levels=levels,
        img=sample["img"].numpy(),
        bbox=placed.boxes.numpy(),
        pixel_size_um=slide.pixel_size_um,
        explained=names[looked.explained],
        probabilities=dict(zip(names, looked.before.tolist(), strict=True)),
        token=tuple(int(i) for i in np.unravel_index(looked.token, looked.grid)),
        maps={name: shares.reshape(len(levels), *looked.grid).numpy() for name, shares in maps.items()},
        ablations=tuple(looked.ablations(maps, draws, torch.Generator().manual_seed(seed))),
    )


def _in_world(slide: Slide, point: Sequence[float]) -> tuple[float, ...]:
    """A point in stored pixels as world coordinates.

    Raises:
        InputError: it has other axes, or lies outside of the slide.
    """
    extent = tuple(n * scale for n, scale in zip(slide.shape, slide.pixel_scale, strict=True))
    if len(point) != slide.ndim or not all(0 <= a < n for a, n in zip(point, extent, strict=True)):
        axes = ",".join(slide.axes)
        expected = f"{axes} inside of the image, {' x '.join(f'{n:g}' for n in extent)} pixels"
        raise InputError("at", expected=expected, got=",".join(f"{a:g}" for a in point))
    return tuple(a / scale for a, scale in zip(point, slide.pixel_scale, strict=True))


class _LabelledPoint:
    """One pixel of the finest of some views, and its class under a model that sees more or less of them."""

    def __init__(
        self,
        model: Segmenter,
        img: Tensor,
        placed: PlacedViews,
        point: Sequence[float],
        names: Sequence[str],
        label: str | None,
    ) -> None:
        device = next(model.parameters()).device
        self.model, self.names = model, names
        self.img, self.bbox = img[None].to(device), placed.boxes[None].float().to(device)
        self.levels, patch = model.views.levels, model.config.encoder.patch
        self.grid = patch_grid(img.shape[2:], patch)
        window = placed.windows[0]
        factors = level_factors(self.levels[0], len(window.size))
        # a last pixel that does not fill one of the level belongs to the one before
        self.pixel = tuple(
            min(int(a // f) - start, n - 1)
            for a, f, start, n in zip(point, factors, window.start, window.size, strict=True)
        )
        self.token = int(np.ravel_multi_index([a // p for a, p in zip(self.pixel, patch, strict=True)], self.grid))
        self.before = self.probabilities()[0]
        self.explained = int(self.before.argmax()) if label is None else names.index(label)

    @property
    def num_tokens(self) -> int:
        """Tokens of each level."""
        return prod(self.grid)

    @torch.no_grad()
    def probabilities(self, img: Tensor | None = None, *, hidden: Tensor | None = None, boxes: bool = True) -> Tensor:
        """Probability of each class at the point, ``(B, K)``.

        Args:
            img: other views ``(B, L, C, *space)``.
            hidden: tokens that are hidden, bool ``(B, N)``.
            boxes: false shows naive boxes.
        """
        img = self.img if img is None else img
        if hidden is not None:
            img = img.expand(len(hidden), *img.shape[1:])
        bbox = self.bbox.expand(len(img), *self.bbox.shape[1:]) if boxes else None
        if hidden is None:
            return self._logits(img, bbox).softmax(1).cpu()
        with hidden_tokens(self.model, hidden.to(img.device)):
            return self._logits(img, bbox).softmax(1).cpu()

    def _logits(self, img: Tensor, bbox: Tensor | None) -> Tensor:
        pixel: tuple[Any, ...] = (..., *self.pixel)
        return self.model.label_logits(img, bbox)[pixel].float()

    def maps(self) -> dict[str, Tensor]:
        """Share of every token, ``(N,)`` of sum 1 on the CPU, for each of `MAPS`."""
        with torch.no_grad(), attention_maps(self.model.encoder, average_heads=True) as averaged:
            self._logits(self.img, self.bbox)
        with torch.enable_grad(), attention_maps(self.model.encoder, differentiable=True) as maps:
            log_probability = self._logits(self.img, self.bbox).log_softmax(1)[0, self.explained]
        found = {
            "attention": averaged[-1][:, self.token],
            "rollout": rollout(averaged)[:, self.token],
            "relevance": gradient_rollout(maps, log_probability),
        }
        encoder = self.model.encoder
        if encoder.copies is not None:
            bbox = self.bbox if self.model.config.boxes == "true" else None
            copied = encoder.copied_tokens(self.img, encoder.boxes(self.img, bbox))
            found = {name: onto_originals(shares, copied) for name, shares in found.items()}
        # where no attention raises the class at all, the relevance is 0 everywhere
        return {name: (row[0] / row[0].sum().clamp(min=1e-30)).double().cpu() for name, row in found.items()}

    def ablations(self, maps: dict[str, Tensor], draws: int, generator: torch.Generator) -> list[Ablation]:
        """The label without positions, without each level, and without the tokens that a map calls important."""
        found = [self._ablation("all views at their true places", self.before[None])]
        if self.model.config.boxes == "true":
            found.append(self._ablation("naive boxes: places unknown", self.probabilities(boxes=False)))
        num_all = len(self.levels) * self.num_tokens
        level_of = torch.arange(num_all) // self.num_tokens
        for index, level in enumerate(self.levels):
            name = f"level {level_name(level)}"
            found.append(self._ablation(f"{name}: tokens hidden", self.probabilities(hidden=(level_of == index)[None])))
            shuffled = torch.cat([self._shuffled(index, generator) for _ in range(draws)])
            found.append(self._ablation(f"{name}: patches shuffled", self.probabilities(shuffled)))
        # without coarse levels, those of the only one
        deletable = torch.arange(self.num_tokens if len(self.levels) > 1 else 0, num_all)
        count = max(1, round(DELETED_SHARE * len(deletable)))
        what = f"{count} of {len(deletable)} {'coarse ' if len(self.levels) > 1 else ''}tokens hidden"
        for name, shares in maps.items():
            top = _only(deletable[shares[deletable].topk(count).indices][None], num_all)
            found.append(self._ablation(f"{what}: highest {name}", self.probabilities(hidden=top)))
        drawn = torch.stack([torch.randperm(len(deletable), generator=generator)[:count] for _ in range(draws)])
        random = self.probabilities(hidden=_only(deletable[drawn], num_all))
        return [*found, self._ablation(f"{what}: random", random)]

    def _ablation(self, case: str, probabilities: Tensor) -> Ablation:
        after = float(probabilities[:, self.explained].mean())
        label = self.names[int(probabilities.argmax(1).mode().values)]
        return Ablation(case, after, after - float(self.before[self.explained]), label)

    def _shuffled(self, level: int, generator: torch.Generator) -> Tensor:
        """The views with the patches of one in random order."""
        patch = self.model.config.encoder.patch
        order = torch.randperm(self.num_tokens, generator=generator).to(self.img.device)
        views = self.img.clone()
        view = self.img[:, level : level + 1]
        views[:, level : level + 1] = unpatchify(patchify(view, patch)[:, :, order], self.grid, patch)
        return views


def _only(indices: Tensor, count: int) -> Tensor:
    """Mask ``(B, count)`` that is true at ``indices`` ``(B, n)``."""
    return torch.zeros(len(indices), count, dtype=torch.bool).scatter_(1, indices, True)
