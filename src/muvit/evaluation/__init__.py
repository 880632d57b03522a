"""How good predictions are: scores of label slides against the truth."""
