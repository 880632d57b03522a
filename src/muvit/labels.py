"""What label values mean to losses, metrics and samplers."""

IGNORE = -100
"""Label of pixels that count nowhere: unlabelled, or outside the image (torch's own convention)."""
