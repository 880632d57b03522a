"""Draw nested crops and the place of each in the world: the figure of the guide's page on coordinates.

python examples/coordinates.py --output figure
"""

import argparse
from pathlib import Path

import numpy as np

from muvit.data import CropConfig, NestedCrops, PyramidWriter, open_slide
from muvit.data.synthetic.images import SyntheticConfig, generate
from muvit.geometry import patch_centers
from muvit.pictures import Picture, outline_boxes, panel, to_rgb

LEVELS, CROP, PATCH = (1, 2, 4), 64, 16
SEED = 2
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115))
ENLARGED = 4


def main() -> None:
    """Make an image, write it as a pyramid, cut one sample and draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pyramid and the picture")
    output = parser.parse_args().output
    image, _ = generate(3, SyntheticConfig.small())  # float32 (y, x)
    pixels = (image * 160).round().clip(0, 255).astype(np.uint8)[None]
    writer = PyramidWriter.create(
        output / "image.ome.zarr", shape=pixels.shape[1:], num_channels=1, dtype=np.uint8, levels=LEVELS
    )
    writer.write((0, 0), pixels)
    writer.finish()

    slide = open_slide(output / "image.ome.zarr")
    sample = NestedCrops([(slide, None)], CropConfig(levels=LEVELS, size=(CROP, CROP)), seed=SEED)[0]
    views, boxes = sample["img"].numpy(), sample["bbox"]
    centers = patch_centers(boxes, (CROP // PATCH,) * 2)  # (level, patch, yx)

    world = np.repeat(np.repeat(to_rgb(pixels), ENLARGED, 0), ENLARGED, 1)
    for points, color in zip(centers.flip(0).numpy(), COLORS[::-1], strict=True):
        for y, x in (points * ENLARGED).astype(int):
            world[y - 12 : y + 12, x - 12 : x + 12] = color
    world = outline_boxes(world, boxes.numpy() * ENLARGED, colors=COLORS)
    frame = np.array([[[0, 0], [CROP * ENLARGED] * 2]])
    crops = [
        Picture(
            f"level {level}",
            outline_boxes(np.kron(to_rgb(view), np.ones((ENLARGED, ENLARGED, 1), np.uint8)), frame, colors=[color]),
        )
        for level, view, color in zip(LEVELS, views, COLORS, strict=True)
    ]
    titled = Picture("the world: boxes and patch centres", world)
    panel([[titled, *crops]], size=300).save(output / "coordinates.png", optimize=True)
    for level, box in zip(LEVELS, boxes.tolist(), strict=True):
        print(f"level {level}: {box[0]} to {box[1]}")


if __name__ == "__main__":
    main()
