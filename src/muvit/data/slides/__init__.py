"""Opened images: one class for all formats, one module for each."""
