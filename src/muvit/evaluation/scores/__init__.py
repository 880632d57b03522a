"""From pixels to numbers with intervals."""
