"""Model cards: the facts of a trained model as ``README.md`` of its folder, for people and for model hubs."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from muvit.errors import ReadError
from muvit.levels import Level, level_name
from muvit.models.hub import CARD
from muvit.plain_yaml import check_yaml, yaml_problem

_FENCE = "---\n"
_TASKS = {
    "classifier": "image-classification",
    "mae": "image-feature-extraction",
    "encoder": "image-feature-extraction",
}


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Facts of a trained model."""

    title: str
    """Name of the model, for people."""
    kind: str
    """Kind of model, as its ``config.yaml`` says it."""
    levels: tuple[Level, ...]
    """Downsampling factors of its views, finest first."""
    channels: int
    """Channels of the images."""
    parameters: int
    """Number of weights."""
    crop_size: tuple[int, ...] | None = None
    """Side of every view in pixels of its level, (z)yx."""
    pixel_size_um: tuple[float, ...] | None = None
    """Micrometers per pixel of level 1 in the training images, (z)yx; None if unknown."""
    classes: tuple[str, ...] = ()
    """Name of each class, from class 0."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """Facts about the training and validation data, by name."""
    scores: Mapping[str, float] = field(default_factory=dict)
    """Validation scores of these weights, by name."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Versions, epoch and seed, by name."""
    license: str | None = None
    """Licence of the weights, as an SPDX identifier in lower case; None if none was given."""
    recipe: str | None = None
    """The recipe in YAML."""

    def to_markdown(self) -> str:
        """Text of ``README.md``, with the facts as YAML before it, which `read_card` reads."""
        facts = {k: _plain(v) for k, v in asdict(self).items() if k not in ("license", "recipe")}
        head = {
            "library_name": "muvit",
            "pipeline_tag": _TASKS.get(self.kind, "image-segmentation"),
            "tags": ["microscopy", "multi-resolution", "vision-transformer", self.kind],
            **({} if self.license is None else {"license": self.license}),
            "muvit": facts,
        }
        return f"{_FENCE}{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}{_FENCE}\n{self._text()}"

    def _text(self) -> str:
        size = "unknown" if self.pixel_size_um is None else f"{_times(self.pixel_size_um)} um"
        facts = {
            "kind": self.kind,
            "levels": ", ".join(map(level_name, self.levels)),
            "crops": "" if self.crop_size is None else f"{_times(self.crop_size)} pixels of each level",
            "channels": self.channels,
            "pixel size of level 1": size,
            "weights": f"{self.parameters:,}",
        }
        parts = [
            f"# {self.title}\n",
            "A model of [muvit](https://arxiv.org/abs/2602.24222), which sees a place at several resolutions, each "
            "patch at its true position in the image.\n",
            _table("", facts),
            _table("Classes", dict(enumerate(self.classes))),
            _table("Validation scores", {name: f"{value:.4f}" for name, value in self.scores.items()}),
            _table("Training data", self.data),
            "The licence is the one named `license` in the first lines of this file; without one, none was given.\n",
            _table("Provenance", self.provenance),
            "## Use\n\n```python\nfrom muvit import load_model\n\n"
            'load_model("this/folder").predict("slide.svs", "labels.ome.zarr")\n```\n',
        ]
        if self.recipe is not None:
            parts.append(f"## Recipe\n\n```yaml\n{self.recipe.rstrip()}\n```\n")
        return "\n".join(filter(None, parts))


def read_card(folder: Path) -> ModelCard:
    """The facts in the card of a model folder; its recipe, which is text for people, is left out.

    Raises:
        ReadError: there is no card, or its first lines do not hold these facts.
    """
    head, _ = _split(folder)
    try:
        facts = {name: _tuples(value) for name, value in head["muvit"].items()}
        return ModelCard(**facts, license=head.get("license"))
    except (AttributeError, KeyError, TypeError) as error:
        raise ReadError(folder / CARD, expected="the facts of a model", got=f"others ({error})") from error


def card_text(folder: Path) -> str:
    """The text of a card, without the YAML in its first lines.

    Raises:
        ReadError: there is no card.
    """
    return _split(folder)[1].lstrip()


def with_license(folder: Path, license: str) -> str:
    """The text of a card with this licence in its first lines, everything else as it is.

    Raises:
        ReadError: there is no card.
    """
    head, text = _split(folder)
    head = {name: value for name, value in head.items() if name != "license"}
    return f"{_FENCE}{yaml.safe_dump({'license': license} | head, sort_keys=False, allow_unicode=True)}{_FENCE}{text}"


def _split(folder: Path) -> tuple[dict[str, Any], str]:
    """The YAML before the text of a card, and the text."""
    file = folder / CARD
    expected = "a model card: YAML between lines of ---, then text"
    try:
        content = file.read_text()
        empty, head, text = content.split(_FENCE, 2)
        check_yaml(head)
        values = yaml.safe_load(head)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ReadError(file, expected=expected, got=yaml_problem(error)) from error
    if empty or not isinstance(values, dict):
        raise ReadError(file, expected=expected, got="other text")
    return values, text


def _table(title: str, rows: Mapping[Any, Any]) -> str:
    rows = {name: value for name, value in rows.items() if value != ""}
    if not rows:
        return ""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join([*([f"## {title}\n"] if title else []), "| | |", "|---|---|", *lines, ""])


def _times(sizes: Sequence[float]) -> str:
    return " x ".join(f"{size:g}" for size in sizes)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, tuple | list) else value


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
