"""What label values mean to losses, metrics and samplers."""

BACKGROUND = 0
"""The class that is background, in data that have one (``data.has_background``)."""

IGNORE = -100
"""Label of pixels that count nowhere: unlabelled, or outside the image (torch's own convention)."""

IGNORED = 255
"""Stored for pixels that are ignored in loss and metrics; recipes for such stored labels say
``data.ignore_labels: [255]``."""

WIDE_IGNORED = 65535
"""The same among labels of 16 bits."""


def foreground(has_background: bool) -> slice:
    """The classes that are no background."""
    return slice(BACKGROUND + 1 if has_background else 0, None)
