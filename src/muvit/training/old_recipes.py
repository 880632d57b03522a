"""Recipes of earlier versions, read as if they were of today's."""

from collections.abc import Mapping
from typing import Any

from muvit.data.crops.placement import upgrade_placement
from muvit.models.upgrade import drop_input_space, nest_encoder


def upgrade_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recipe, or of a part of one, with every setting under its present name.

    The placement of views was called ``context``. Masked autoencoders had the settings of their encoder among their
    own. Encoders had an ``input_space``.
    """
    upgraded, data, model = dict(values), values.get("data"), values.get("model")
    if isinstance(data, Mapping):
        upgraded["data"] = upgrade_placement(data)
    if isinstance(model, Mapping):
        upgraded["model"] = nest_encoder(drop_input_space(model))
    return upgraded
