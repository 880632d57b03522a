"""Crops of slides: placement, reading, normalisation, augmentation, balancing."""
