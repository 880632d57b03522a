"""Convert the mouse-brain sections to pyramids: every fifth section is held out for testing.

    python benchmarks/prepare_mouse_sections.py SOURCE data/mouse_sections

SOURCE holds ``images/*.png``, ``labels/*.png`` of the same names and ``classes.json`` (label value to name). The
sections and their labels come from the DeepSlice example brain (github.com/PolarBean/DeepSlice) and the Allen CCFv3
atlas.
"""

import argparse
import json
from pathlib import Path

from muvit.data.convert import convert_image
from muvit.pictures import class_colors

LEVELS = (1, 2, 4, 8, 16)
PIXEL_SIZE_UM = 15.0
HELD_OUT_EVERY = 5


def main() -> None:
    """Convert all sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--overwrite", action="store_true")
    arguments = parser.parse_args()
    names = {int(value): name for value, name in json.loads((arguments.source / "classes.json").read_text()).items()}
    colors = dict(enumerate(class_colors(max(names) + 1)))
    sections = sorted((arguments.source / "images").glob("*.png"))
    for number, section in enumerate(sections):
        split = arguments.output / ("test" if number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else "train")
        common = {"levels": LEVELS, "pixel_size_um": PIXEL_SIZE_UM, "overwrite": arguments.overwrite}
        convert_image(section, split / "images" / f"{section.stem}.ome.zarr", **common)
        convert_image(
            arguments.source / "labels" / section.name,
            split / "labels" / f"{section.stem}.ome.zarr",
            kind="label",
            label_names=names,
            label_colors=colors,
            **common,
        )
    print(f"{len(sections)} sections in {arguments.output}")


if __name__ == "__main__":
    main()
