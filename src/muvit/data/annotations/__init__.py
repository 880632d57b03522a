"""Annotations of other software, drawn as polygons and read as labels."""
