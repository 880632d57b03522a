"""Meaning of label values in losses, metrics and samplers."""

BACKGROUND = 0
"""The class that is background, in data that have one (``data.has_background``)."""

IGNORE = -100
"""Label of pixels that are ignored in loss and metrics: unlabelled, or outside the image (PyTorch's convention)."""

IGNORED = 255
"""Stored for pixels that are ignored in loss and metrics; recipes for such stored labels say
``data.ignore_labels: [255]``."""

WIDE_IGNORED = 65535
"""The same among labels of 16 bits."""


def foreground(has_background: bool) -> slice:
    """Indices of the foreground classes."""
    return slice(BACKGROUND + 1 if has_background else 0, None)
