"""Plugin of napari: slides and labels as its layers, and a widget that predicts."""
