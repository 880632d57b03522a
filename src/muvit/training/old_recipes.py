"""Recipes of earlier versions, read as if they were of today's."""

from collections.abc import Mapping
from typing import Any

from muvit.models.upgrade import drop_input_space, nest_encoder


def upgrade_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recipe, or of a part of one, with every setting under its present name.

    Masked autoencoders had the settings of their encoder among their own. Encoders had an ``input_space``.
    """
    model = values.get("model")
    if not isinstance(model, Mapping):
        return dict(values)
    return dict(values) | {"model": nest_encoder(drop_input_space(model))}
