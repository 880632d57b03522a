"""Slides of a few pixels, with labels and classes, for runs that are about the training and not about the data."""

import numpy as np

from muvit.data.pyramids.writer import PyramidWriter


def write_slides(folder, shape=(64, 64), num_train=2, num_val=1):
    """``<split>/images`` and ``<split>/labels`` of levels 1 and 4, one channel, two classes, and ``slides.csv``.

    The halves of a slide are its classes, dark and bright; there is no unlabelled pixel.
    """
    rng, lines = np.random.default_rng(0), ["name,group"]
    for split, count in (("train", num_train), ("val", num_val)):
        for i in range(count):
            labels = np.zeros(shape, np.uint8)
            labels[:, shape[1] // 2 :] = 1
            image = (60 + 100 * labels + rng.normal(0, 20, labels.shape)).clip(0, 255).astype(np.uint8)
            for kind, pixels in (("image", image), ("label", labels)):
                writer = PyramidWriter.create(
                    folder / split / f"{kind}s" / f"{split}{i}.ome.zarr",
                    shape=shape,
                    num_channels=1,
                    dtype=np.uint8,
                    levels=(1, 4),
                    kind=kind,
                )
                writer.write((0, 0), pixels[None])
                writer.finish()
            lines.append(f"{split}{i},{'ab'[i % 2]}")
    (folder / "slides.csv").write_text("\n".join(lines) + "\n")
    return folder
