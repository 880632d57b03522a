"""``muvit study scaling``."""

from dataclasses import fields

from jsonargparse import ArgumentParser, Namespace

from muvit.cli.study.output import add_output
from muvit.cli.terminal import Progress
from muvit.evaluation.results import result_files, write_results


def add_arguments(parser: ArgumentParser) -> None:
    """Arguments of the study."""
    from muvit.evaluation.studies.scaling import ScalingConfig
    from muvit.models.segmenter import SegmenterConfig

    parser.add_class_arguments(ScalingConfig, as_group=False)
    parser.add_class_arguments(SegmenterConfig, "model", as_group=False)
    parser.set_defaults({"model.encoder.in_channels": 1, "model.encoder.levels": [1], "model.num_classes": 12})
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, mps (default: a GPU if there is one)"
    )
    add_output(parser, "scaling")


def run(arguments: Namespace) -> None:
    """Measure, and write a table and a picture."""
    from muvit.evaluation.studies.scaling import ScalingConfig, draw_scaling, measure_scaling, scaling_rows
    from muvit.models.segmenter import SegmenterConfig

    parser = ArgumentParser()
    parser.add_class_arguments(ScalingConfig, "config")
    parser.add_class_arguments(SegmenterConfig, "model")
    config = Namespace({field.name: arguments[field.name] for field in fields(ScalingConfig)})
    settings = parser.instantiate(Namespace(config=config, model=arguments.model))
    files = result_files(arguments.output, "scaling", overwrite=arguments.overwrite)
    with Progress("Measuring", "pass") as progress:
        measured = measure_scaling(settings.model, settings.config, device=arguments.device, progress=progress)
    rows = scaling_rows(measured)
    write_results(files, lambda: {"scaling": rows}, lambda: rows, lambda: draw_scaling(measured))
    for row in rows:
        print(
            f"[{row['levels']}] {row['size_px']} px  {row['pass']:<20}  {row['seconds']:.4f} s  "
            f"{row['peak_mib']:.0f} MiB"
        )
