"""Tiles of a slide as plain data: plan, blending weights, tissue, region."""
