"""The page of a comparison: written whole, with its pictures, once all of it is there."""

import shlex
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote

from muvit.durable import write_whole
from muvit.errors import ExistsError
from muvit.evaluation.report import parts
from muvit.evaluation.report.content import Example, ModelResult, check_results, join_lines
from muvit.evaluation.report.examples import curves_section, examples_section
from muvit.evaluation.report.parts import inline_files, render_page
from muvit.evaluation.report.scores import classes_table, levels_table
from muvit.evaluation.report.tables import conclusion, results_section
from muvit.evaluation.scores.bootstrap import BootstrapConfig
from muvit.evaluation.scores.segmentation import Evaluation
from muvit.models.hub import CARD
from muvit.pictures import Color


def write_report(
    folder: str | Path,
    *,
    title: str,
    intro: str,
    models: Sequence[ModelResult],
    class_names: Sequence[str],
    class_colors: Sequence[Color],
    examples: Sequence[Example] = (),
    settings: Mapping[str, object] | None = None,
    evaluations: Mapping[str, Evaluation] | None = None,
    places: str = "",
    runs: Mapping[str, str] | None = None,
    outputs: Mapping[str, str] | None = None,
    ignore: Sequence[int] = (),
    overwrite: bool = False,
) -> Path:
    """Write ``index.html`` into a folder; it holds its pictures, and needs no network, no server and no JavaScript.

    The page appears as a whole or not at all. A picture that cannot be drawn is left out, with a warning in the log.

    Args:
        folder: where to write; made if it is missing, other files in it are left alone.
        title: headline.
        intro: one paragraph: the task, and why the models differ.
        models: the model in question first, then its controls; all scored on the same images.
        class_names: of all classes, from class 0, the background.
        class_colors: of all classes, from class 0.
        examples: test images to show.
        settings: facts needed to repeat the comparison, value by name.
        evaluations: scores of each model by its name, for the tables of its classes.
        places: section of `muvit.evaluation.report.places.places_section`, of the first model.
        runs: folder of each training relative to ``folder``, by the name of the model; its report and card are linked.
        outputs: OME-Zarr images and labels to open, path relative to ``folder`` by name, the image first.
        ignore: label values that are no classes, shown grey.
        overwrite: replace a report that is there already.

    Returns:
        Path of ``index.html``.

    Raises:
        ExistsError: there is a report and ``overwrite`` was not asked for.
        InputError: there are no models, two of one name, or names, classes and curves do not fit together; found before
            anything is written.
    """
    check_results(models, class_names, class_colors)
    folder = Path(folder)
    page = folder / "index.html"
    if page.exists() and not overwrite:
        raise ExistsError(page)
    with TemporaryDirectory() as scratch:
        pictures = Path(scratch)
        sections = [
            results_section(models),
            _classes(evaluations or {}),
            examples_section(examples, models, class_names, class_colors, ignore, pictures),
            places,
            curves_section(models, pictures),
            parts.section("settings", "Settings", parts.facts_list(settings or {})),
            _runs(folder, runs or {}),
            _outputs(outputs or {}),
            parts.section("environment", "Environment", parts.facts_list(parts.environment())),
        ]
        text = inline_files(render_page(title, intro, conclusion(models), sections), pictures)
    write_whole(page, text.encode())
    return page


def _classes(evaluations: Mapping[str, Evaluation]) -> str:
    """Scores of each class and confusion of each model, shown on request."""
    folded = [
        parts.fold(
            name,
            classes_table(result, BootstrapConfig())
            + (levels_table(result) if result.levels else "")
            + parts.confusion_table(result.confusion, result.class_names),
        )
        for name, result in evaluations.items()
    ]
    return parts.section("classes", "Classes", join_lines(folded))


def _runs(folder: Path, runs: Mapping[str, str]) -> str:
    """Links to the report and the card of each training, and its recipe."""
    items = []
    for name, run in runs.items():
        recipe = folder / run / "recipe.yaml"
        text = parts.details(f"recipe of {name}", recipe.read_text()) if recipe.is_file() else ""
        links = ", ".join(
            f'<a href="{quote(f"{run}/{file}")}">{title}</a>'
            for title, file in (("report", "index.html"), ("model card", f"best/{CARD}"))
            if (folder / run / file).is_file()
        )
        items.append(f"<p>{escape(name)}: {links or escape(run)}</p>\n{text}")
    return parts.section("runs", "Trainings", join_lines(items))


def _outputs(outputs: Mapping[str, str]) -> str:
    if not outputs:
        return ""
    paths = list(outputs.values())
    napari = "napari --plugin napari-ome-zarr " + " ".join(map(shlex.quote, paths))
    python = f"""from muvit.data.slides.open import open_slide

slide = open_slide({paths[0]!r})
print(slide.shape, slide.levels, slide.channel_names)
pixels = slide.read(1, (0, 0), (256, 256))  # level, start, size -> (channels, y, x)"""
    items = join_lines(f"<li>{escape(name)}: <code>{escape(path)}</code></li>" for name, path in outputs.items())
    return f"""<section aria-labelledby="open">
<h2 id="open">Open the images and labels</h2>
<p>They are OME-Zarr 0.5 pyramids; the paths start from the folder of this page:</p>
<ul>
{items}
</ul>
<p>In napari, started in that folder (<code>pip install "napari[all]" napari-ome-zarr</code>):</p>
<pre tabindex="0"><code>{escape(napari)}</code></pre>
<p>In Python:</p>
<pre tabindex="0"><code>{escape(python)}</code></pre>
</section>"""
