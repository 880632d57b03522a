import multiprocessing
from dataclasses import replace

import pytest

from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.errors import ExistsError, InputError, ReadError
from muvit.evaluation.comparison import compare
from muvit.evaluation.variants import Variant, with_controls
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import SegmenterConfig
from muvit.training.recipes import DataConfig, Recipe, RunConfig


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


def test_what_is_trained_is_not_trained_again(recipe, tmp_path):
    data = write_synthetic(
        tmp_path / "data", num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1
    )
    short = replace(
        recipe,
        data=DataConfig(train=str(data / "train"), crop_size=16, samples_per_epoch=4, batch_size=2),
        model=replace(recipe.model, decoder_widths=(8, 8, 8, 8), stem_width=4),
        run=RunConfig(epochs=2, accelerator="cpu", progress=False),
    )
    variant = Variant(name="short", description="is soon done", recipe=short)

    def made(**options):
        told = []
        (result,) = compare(
            [variant],
            data / "test",
            tmp_path / "out",
            title="",
            intro="",
            progress=lambda *steps: told.append(steps),
            **options,
        )
        assert told == sorted(told)
        assert told[-1] == (4, 4)
        return result, (tmp_path / "out" / "runs" / "short" / "last" / "model.safetensors").read_bytes()

    first, weights = made()
    (tmp_path / "out" / "metrics.json").unlink()  # as if it had been stopped before the scores
    (tmp_path / "out" / "index.html").unlink()
    second, same = made(resume=True)
    assert same == weights
    assert (second.dice, second.mean_dice, second.curves) == (first.dice, first.mean_dice, first.curves)


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
