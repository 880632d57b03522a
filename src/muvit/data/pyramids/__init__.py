"""Pyramids as OME-Zarr: metadata, arrays, reduction, writing, conversion."""
