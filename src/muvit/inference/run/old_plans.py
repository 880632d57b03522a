"""Plans of earlier versions in today's spelling."""

from collections.abc import Mapping
from typing import Any

from muvit.data.crops.placement import upgrade_placement


def upgrade_plan(content: Mapping[str, Any]) -> dict[str, Any]:
    """A plan as a JSON object, of a prediction or of features, in today's spelling.

    Earlier plans say ``context`` (centered, concentric or grid) for ``placement``, and have ``together``, whose
    results equal those of today only at 1.
    """
    upgraded = dict(content)
    for part in ("tiling", "options"):
        if upgraded.get(part, {}).get("together") == 1:
            upgraded[part] = {name: value for name, value in upgraded[part].items() if name != "together"}
    if "tiling" in upgraded:
        upgraded["tiling"] = _upgrade_tiling(upgraded["tiling"])
    if "options" in upgraded and "context" in upgraded["options"]:
        options = {name: value for name, value in upgraded["options"].items() if name != "context"}
        upgraded["options"] = options | {"placement": upgraded["tiling"]["placement"]}
    if "features" in upgraded:
        upgraded["features"] = {
            name: {**level, "tiling": _upgrade_tiling(level["tiling"])} for name, level in upgraded["features"].items()
        }
    if "preprocessing" in upgraded:
        upgraded["preprocessing"] = upgrade_placement(upgraded["preprocessing"])
    return upgraded


def _upgrade_tiling(tiling: Mapping[str, Any]) -> dict[str, Any]:
    upgraded = dict(tiling)
    if "context" in upgraded:
        placement = {"centered": "nested"}.get(upgraded["context"], upgraded["context"])
        upgraded["placement"] = "free" if upgraded.get("free_views") is not None else placement
        del upgraded["context"]
    return upgraded
