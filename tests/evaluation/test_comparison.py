import base64
import io
import json
import multiprocessing
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from muvit.data.folders import open_labelled_folder
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.data.tables import SlideFiles, write_slides
from muvit.errors import ExistsError, InputError, ReadError
from muvit.evaluation.comparison import _open_test, compare, paired_difference
from muvit.evaluation.report import examples as report_examples
from muvit.evaluation.scores.bootstrap import seed_interval
from muvit.evaluation.scores.segmentation import Evaluation, SlideCounts
from muvit.evaluation.variants import Variant, with_controls
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.recipes import DataConfig, Recipe
from muvit.training.run_config import RunConfig


@pytest.fixture
def recipe():
    encoder = EncoderConfig(in_channels=1, levels=(1, 4, 8), dim=32, num_layers=3, heads=2)
    return Recipe(data=DataConfig(train="nowhere"), model=SegmenterConfig(encoder=encoder, num_classes=3))


def test_an_earlier_comparison_is_kept(recipe, tmp_path):
    (tmp_path / "metrics.json").write_text("dear")
    with pytest.raises(ExistsError, match=r"metrics\.json"):
        compare(with_controls(recipe), tmp_path / "nowhere", tmp_path, title="", intro="")
    assert (tmp_path / "metrics.json").read_text() == "dear"


def test_test_slides_are_opened_before_any_training(recipe, tmp_path):
    with pytest.raises(ReadError, match="nowhere"):
        compare(with_controls(recipe), tmp_path / "nowhere", tmp_path / "out", title="", intro="")
    assert not (tmp_path / "out").exists()


def write_folder(folder, *, levels=(1, 4, 16), shape=(80, 105), channels=1, label=1):
    """A bright square on noise, with labels, as pyramids that leave out every other level."""
    pixels = np.random.default_rng(0).integers(0, 100, (channels, *shape), dtype=np.uint8)
    truth = np.zeros((1, *shape), np.uint8)
    pixels[:, 16:64, 32:80] += 100
    truth[:, 16:64, 32:80] = label
    for kind, values in (("image", pixels), ("label", truth)):
        names = {"label_names": {0: "background", 1: "square", 2: "nothing"}} if kind == "label" else {}
        writer = PyramidWriter.create(
            folder / f"{kind}s" / "one.ome.zarr",
            shape=shape,
            num_channels=len(values),
            dtype=np.uint8,
            levels=levels,
            kind=kind,
            **names,
        )
        writer.write((0, 0), values)
        writer.finish()
    return folder


@pytest.mark.long
def test_a_resumed_comparison_trains_nothing_again_and_writes_its_results_anew(recipe, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(report_examples, "PICTURE_PX", 100)  # so that the whole slide is larger
    train, test = (write_folder(tmp_path / name) for name in ("train", "test"))
    encoder = replace(recipe.model.encoder, levels=(1, 4))
    short = replace(
        recipe,
        data=DataConfig(train=str(train), crop_size=16, samples_per_epoch=4, batch_size=2, ignore_labels=(2,)),
        model=replace(recipe.model, encoder=encoder, decoder_widths=(8, 8, 8, 8), stem_width=4),
        run=RunConfig(epochs=2, accelerator="cpu", progress=False),
    )
    variant = Variant(name="short", description="is soon done", recipe=short)
    output = tmp_path / "out"

    def made(**options):
        told = []
        (result,) = compare(
            [variant], test, output, title="", intro="", progress=lambda *steps: told.append(steps), **options
        )
        assert told == sorted(told)
        assert told[-1] == (4, 4)
        return result, (output / "runs" / "short" / "last" / "model.safetensors").read_bytes()

    first, weights = made()
    assert list(first.dice) == ["square"]  # and not the ignored class
    assert "nan" not in (output / "metrics.csv").read_text()
    assert "mDSC level 4" in (output / "metrics.csv").read_text()
    assert json.loads((output / "metrics.json").read_text())["short"]["pooled"]["mean_dice_level_4"] is not None
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', (output / "index.html").read_text())
    with Image.open(io.BytesIO(base64.b64decode(pictures[2]))) as picture:
        assert picture.size == (52, 40)  # of level 1, which alone image, truth and prediction all store
    results = (output / "metrics.json").read_text()
    (output / "index.html").unlink()  # as if the report had failed
    second, same = made(resume=True)
    assert same == weights
    assert (second.dice, second.mean_dice, second.curves) == (first.dice, first.mean_dice, first.curves)
    assert (
        json.loads((output / "metrics.json").read_text())["short"]["pooled"] == json.loads(results)["short"]["pooled"]
    )
    assert (output / "index.html").exists()
    assert caplog.records == []
    with pytest.raises(ExistsError, match=r"metrics\.json: exists already .* --resume"):
        compare([variant], test, output, title="", intro="")


@pytest.mark.long
def test_every_seed_is_trained_and_scores_are_means(recipe, tmp_path):
    train, test = (write_folder(tmp_path / name) for name in ("train", "test"))
    short = replace(
        recipe,
        data=DataConfig(train=str(train), crop_size=16, samples_per_epoch=8, batch_size=4),
        model=replace(
            recipe.model, encoder=replace(recipe.model.encoder, levels=(1, 4)), decoder_widths=(8,) * 4, stem_width=4
        ),
        run=RunConfig(epochs=1, accelerator="cpu", progress=False),
    )
    variants = [Variant(name=name, description="", recipe=short) for name in ("one", "same")]
    output = tmp_path / "out"
    one, same = compare(variants, test, output, title="", intro="", seeds=(3, 5))
    folders = ["one_seed_3", "one_seed_5", "same_seed_3", "same_seed_5"]
    assert sorted(run.name for run in (output / "runs").iterdir()) == folders
    metrics = json.loads((output / "metrics.json").read_text())
    by_seed = [metrics["one"]["seeds"][seed]["pooled"]["mean_dice"] for seed in ("3", "5")]
    assert one.by_seed == pytest.approx(by_seed)
    assert by_seed[0] != by_seed[1]
    assert one.mean_dice == pytest.approx(np.mean(by_seed)) == metrics["one"]["mean_dice"]
    assert one.behind_by_seed is None
    assert same.behind_by_seed == (0, 0)  # the same seeds, the same weights
    assert metrics["one"]["mean_dice_interval"] == pytest.approx(seed_interval(by_seed))
    page = (output / "index.html").read_text()
    assert "Means over 2 seeds" in page
    assert "±" in page
    with pytest.raises(InputError, match=r"seeds: expected different numbers from 0, got \[1, 1\]"):
        compare(variants, test, tmp_path / "twice", title="", intro="", seeds=(1, 1))


def test_test_slides_may_be_those_of_a_table(tmp_path):
    folders = {split: write_folder(tmp_path / split) for split in ("train", "test")}
    files = {split: folder / "images" / "one.ome.zarr" for split, folder in folders.items()}
    slides = [
        SlideFiles(image=file, labels=folders[split] / "labels" / file.name, split=split)
        for split, file in files.items()
    ]
    write_slides(tmp_path / "slides.csv", slides)
    ((image, labels),) = _open_test(DataConfig(train=str(tmp_path / "slides.csv")), tmp_path / "slides.csv")
    assert image.path.resolve() == files["test"].resolve()
    assert labels.path.resolve().parent == folders["test"].resolve() / "labels"


def test_results_of_something_else_are_not_resumed(recipe, tmp_path):
    (tmp_path / "metrics.json").write_text("dear")
    with pytest.raises(ExistsError, match=r"metrics\.json"):
        compare(with_controls(recipe), tmp_path / "nowhere", tmp_path, title="", intro="", resume=True)


@pytest.mark.parametrize(
    ("slides", "run", "devices", "message"),
    [
        (
            {"channels": 2},
            {},
            None,
            r"one\.ome\.zarr: expected 1 channels and 2 axes, as the model takes, got 2 channels",
        ),
        ({"label": 7}, {}, None, r"one\.ome\.zarr, block at \(0, 0\): expected labels 0 to 2, got 7"),
        ({}, {"devices": 2}, None, r"run\.devices and run\.num_nodes: expected 1"),
        ({}, {}, "nonsense", r"device: expected a device of this machine, got 'nonsense'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_training(recipe, tmp_path, slides, run, devices, message):
    test = write_folder(tmp_path / "test", **slides)
    recipe = replace(recipe, run=RunConfig(**run))
    with pytest.raises(InputError, match=message):
        compare(with_controls(recipe), test, tmp_path / "out", title="", intro="", devices=devices)
    assert not (tmp_path / "out").exists()


def test_pictures_show_the_same_pixels_of_every_pyramid(tmp_path, monkeypatch):
    stored = [(1, 4, 16), (1, 2, 4), (1,)]
    slides = [
        open_labelled_folder(write_folder(tmp_path / str(i), levels=levels))[0][1] for i, levels in enumerate(stored)
    ]
    whole = slides[0].read(1, (0, 0), (80, 105))
    for longest, shown in ((2000, whole), (60, whole[:, 1::2, 1::2]), (30, whole[:, 2::4, 2::4])):
        monkeypatch.setattr(report_examples, "PICTURE_PX", longest)
        for pixels in report_examples.read_aligned(slides):  # level 1 is all that they have in common
            np.testing.assert_array_equal(pixels, shown)
    monkeypatch.setattr(report_examples, "PICTURE_PX", 104)
    assert [pixels.shape for pixels in report_examples.read_aligned(slides[:2])] == [(1, 20, 27)] * 2


def test_the_difference_of_two_models_is_drawn_over_slides_in_pairs():
    def scored(shares):
        """A model that finds this share of the pixels of the only class of each slide."""
        tables = [np.array([[1000, 0], [1000 - n, n]]) for n in np.asarray(shares) * 10]
        return Evaluation(
            class_names=("background", "one"),
            slides=tuple(SlideCounts(name=str(i), confusion=table) for i, table in enumerate(tables)),
        )

    hard = np.array([10, 30, 50, 70, 80, 90])  # slides differ much more than the models
    low, high = paired_difference([scored(hard + 5)], [scored(hard)])
    assert 0 < low < high < 0.1
    low, high = paired_difference([scored(hard + np.array([5, -5, 5, -5, 5, -5]))], [scored(hard)])
    assert low < 0 < high
    assert paired_difference([scored(hard[:4] + 5)], [scored(hard[:4])]) is None
    # with several seeds the mean counts: one seed ahead, one behind by as much
    both = [scored(hard + 5), scored(hard - 5)]
    low, high = paired_difference(both, [scored(hard), scored(hard)])
    assert low == pytest.approx(0, abs=0.01)
    assert high == pytest.approx(0, abs=0.01)


@pytest.mark.long
def test_what_fails_in_a_process_is_told_here_and_ends_the_others(recipe, tmp_path):
    data = write_synthetic(
        tmp_path / "data", num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1
    )
    wrong = replace(recipe, data=DataConfig(train=str(data / "train"), crop_size=60))
    variant = Variant(name="wrong", description="has a crop that its patches do not fill", recipe=wrong)
    patient = replace(
        recipe,
        data=DataConfig(train=str(data / "train"), crop_size=16, samples_per_epoch=100_000),
        model=replace(recipe.model, decoder_widths=(8, 8, 8, 8), stem_width=4),
        run=RunConfig(epochs=1, accelerator="cpu", progress=False),
    )
    long = Variant(name="long", description="takes its time", recipe=patient)
    with pytest.raises(
        InputError, match=r"data.crop_size: expected multiples of \(8, 8\), as the model takes, got \(60, 60\)"
    ):
        compare([variant, long], data / "test", tmp_path / "out", title="", intro="")
    assert not (tmp_path / "out" / "runs" / "wrong").exists()
    assert multiprocessing.active_children() == []
    assert not list(tmp_path.rglob("last"))
    assert not (tmp_path / "out" / "metrics.json").exists()
