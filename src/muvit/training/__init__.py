"""Training with Lightning, as a thin shell around models that know nothing of it."""
