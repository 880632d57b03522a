"""Recipes of earlier versions, read as if they were of today's, and models changed to another kind."""

from collections.abc import Mapping
from typing import Any

from muvit.data.crops.placement import upgrade_placement
from muvit.models.upgrade import drop_input_space, name_network, nest_encoder


def upgrade_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recipe, or of a part of one, with every setting under its present name.

    The placement of views was called ``context``. Masked autoencoders had the settings of their encoder among their
    own. Encoders had an ``input_space``. Settings of a model of another kind stood in sections of their own,
    ``baseline`` and ``relay``, beside those of a MuViT, from which they took channels, classes and levels.
    """
    upgraded, data, model = dict(values), values.get("data"), values.get("model")
    if isinstance(data, Mapping):
        upgraded["data"] = upgrade_placement(data)
    if isinstance(model, Mapping):
        model = drop_input_space(model)
        upgraded["model"] = model if "kind" in model else nest_encoder(model)
    return _upgrade_kind(upgraded)


def kind_of(values: Mapping[str, Any]) -> str:
    """The kind of the model of a recipe: muvit unless given."""
    model = values.get("model")
    named = model.get("kind") if isinstance(model, Mapping) else None
    return str(values.get("model.kind", named) or "muvit")


def with_kind(values: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """The content of a recipe, or of a part of one, with a model of this kind for the same views and classes."""
    model = values.get("model")
    if not isinstance(model, Mapping) or kind_of(values) == kind:
        return dict(values)
    return {name: value for name, value in values.items() if not name.startswith("model.")} | {
        "model": change_kind(model, kind)
    }


def change_kind(model: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Settings of a model of another kind for the same views and classes: of the others none is kept.

    A network of another library gets the finest level alone.

    Args:
        model: settings of a model, those of a MuViT with its ``encoder`` in them.
        kind: the other kind.
    """
    views = {name: value for name, value in {**model, **model.get("encoder", {})}.items() if name in _VIEWS}
    if kind == "muvit":
        encoder = {name: value for name, value in views.items() if name != "num_classes"}
        return {"kind": kind, "encoder": encoder} | {k: v for k, v in views.items() if k == "num_classes"}
    if kind == "relay":
        views.pop("ndim", None)
    elif isinstance(views.get("levels"), list | tuple):
        views["levels"] = views["levels"][:1]
    return {"kind": kind} | views


_VIEWS = ("in_channels", "levels", "ndim", "num_classes")
"""Settings that describe the views and classes of a model of any kind."""


def _upgrade_kind(values: dict[str, Any]) -> dict[str, Any]:
    """A recipe with the one model that is trained."""
    others = {name: values.pop(name, None) for name in ("baseline", "relay")}
    for name, settings in others.items():
        if isinstance(settings, Mapping):
            named = name_network(settings) if name == "baseline" else {"kind": name, **settings}
            before = values.get("model") or {}
            model = change_kind(before, named["kind"])
            if settings.get("views") == "stacked":
                model |= {key: value for key, value in before.get("encoder", {}).items() if key == "levels"}
            values["model"] = model | {key: value for key, value in named.items() if value is not None}
    return values
