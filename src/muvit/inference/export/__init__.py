"""Labels as polygons, tables and pictures."""
