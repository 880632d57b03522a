"""Scores of predicted slides, comparison of models, studies and reports."""
