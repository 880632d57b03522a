"""Images, labels and the samples made of them: slides, pyramids, conversion, nested crops."""
