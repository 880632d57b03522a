"""Prediction on whole slides: the plan of tiles, and the model's way through it."""
