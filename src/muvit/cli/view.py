"""``muvit view``."""

from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from muvit.errors import require_package


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the verb."""
    parser.add_argument("image", type=Path, help="image to show")
    parser.add_argument("labels", nargs="*", type=Path, help="labels, or further images, to show over it")


def run(arguments: Namespace) -> None:
    """Open napari with the image and its labels, and wait until it is closed."""
    require_package("napari", "muvit view", package="napari", install="muvit[napari]")
    import napari

    from muvit.viewer.layers import read_layers

    layers = read_layers([str(path) for path in (arguments.image, *arguments.labels)])
    viewer = napari.Viewer(title=f"{arguments.image.name} (muvit)")
    for data, settings, kind in layers:
        getattr(viewer, f"add_{kind}")(data, **settings)
    viewer.scale_bar.visible = True
    napari.run()
