"""Recipes of earlier versions, read as if they were of today's."""

from collections.abc import Mapping
from typing import Any

from muvit.data.crops.placement import upgrade_placement


def upgrade_recipe(values: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a recipe, or of a part of one, with every setting under its present name.

    The placement of views was called ``context``.
    """
    data = values.get("data")
    return dict(values) | ({"data": upgrade_placement(data)} if isinstance(data, Mapping) else {})
