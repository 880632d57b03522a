import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from muvit.data.crops.normalize import Percentile, Range, Standardize
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.ome_zarr import OmeZarrSlide
from muvit.data.slides.open import open_slide
from muvit.errors import ExistsError, InputError, ReadError
from muvit.inference.predict import predict_slide
from muvit.inference.run.execution import resolve_device
from muvit.inference.run.label_blocks import prediction_status
from muvit.inference.run.plan import AS_PUBLISHED, PredictOptions
from muvit.models.encoder import EncoderConfig
from muvit.models.segmenter import Segmenter, SegmenterConfig

NUM_CLASSES = 4
PREPROCESSING = Preprocessing(
    crop_size=(16, 24),
    normalization=Range(high=255),
    class_names=("background", "one", "two", "three"),
    class_colors=((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)),
)


class Toy(Segmenter):
    """A segmenter whose answer is a known function of pixels and boxes."""

    def __init__(self, *, levels=(1, 4), num_classes=NUM_CLASSES, decode="finest", channels=1):
        torch.manual_seed(0)
        encoder = EncoderConfig(**{"in_channels": channels, "levels": levels, "num_layers": 4, "dim": 16, "heads": 1})
        super().__init__(
            SegmenterConfig(
                encoder=encoder, num_classes=num_classes, decoder_widths=(8, 8, 8, 8), stem_width=4, decode=decode
            )
        )


class Quantizer(Toy):
    def label_logits(self, img, bbox=None):
        classes = (img[:, 0, 0] * 255).round().long() // 64
        return torch.nn.functional.one_hot(classes, NUM_CLASSES).movedim(-1, 1).float()


class Surveyor(Toy):
    """Labels every pixel by its world coordinates, which it knows from the box of the finest view alone."""

    def label_logits(self, img, bbox=None):
        _, _, _, h, w = img.shape
        lower, upper = bbox[:, 0].unbind(1)
        step = (upper - lower) / torch.tensor([h, w])
        assert (step == 1).all()
        y = lower[:, 0, None] + torch.arange(h)
        x = lower[:, 1, None] + torch.arange(w)
        classes = (y[:, :, None] // 5 + x[:, None, :] // 3).long() % NUM_CLASSES
        return torch.nn.functional.one_hot(classes, NUM_CLASSES).movedim(-1, 1).float()


def write_image(path, pixels, levels=(1, 4), pixel_size_um=None):
    writer = PyramidWriter.create(
        path,
        shape=pixels.shape[1:],
        num_channels=len(pixels),
        dtype=pixels.dtype,
        levels=levels,
        pixel_size_um=pixel_size_um,
        chunk=16,
        shard=64,
    )
    writer.write((0,) * (pixels.ndim - 1), pixels)
    writer.finish()
    return OmeZarrSlide(path)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (1, 75, 101), dtype=np.uint8)


@pytest.fixture
def slide(tmp_path, pixels):
    return write_image(tmp_path / "image.ome.zarr", pixels, pixel_size_um=(0.5, 0.25))


SMALL = PredictOptions(block_px=40, overlap=0.0)
"""Outputs of several shards, whose edges the tiles do not divide."""


def read(path):
    labels = open_slide(path)
    return labels.read(1, (0,) * labels.ndim, labels.shape)[0]


def test_every_pixel_of_an_odd_slide_gets_its_own_answer(tmp_path, slide, pixels):
    output = predict_slide(Quantizer(), slide, tmp_path / "labels.ome.zarr", PREPROCESSING, options=SMALL, batch_size=3)
    assert output == tmp_path / "labels.ome.zarr"
    assert (read(output) == pixels[0] // 64).all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 60), (60, 1), (15, 23), (17, 25)])
@pytest.mark.parametrize("options", [{}, {"overlap": 15, "blend": "cosine", "block_px": 5}, {"overlap": 0.5}])
def test_slides_smaller_than_a_tile_and_blocks_smaller_still(tmp_path, shape, options):
    pixels = np.random.default_rng(0).integers(0, 256, (1, *shape), dtype=np.uint8)
    slide = write_image(tmp_path / "image.ome.zarr", pixels, levels=(1,))  # the coarse level is computed
    output = tmp_path / "labels.ome.zarr"
    predict_slide(Quantizer(), slide, output, PREPROCESSING, options=PredictOptions(**options))
    assert (read(output) == pixels[0] // 64).all()


def test_levels_that_are_not_stored_give_what_stored_ones_give(tmp_path, pixels):
    class Summing(Toy):
        def label_logits(self, img, bbox=None):
            classes = (img[:, :, 0] * 255).round().long().sum(1) % NUM_CLASSES
            return torch.nn.functional.one_hot(classes, NUM_CLASSES).movedim(-1, 1).float()

    labels = []
    for levels in ((1, 2, 8), (1, 2), (1,)):
        slide = write_image(tmp_path / f"{len(levels)}.ome.zarr", pixels, levels=levels)
        output = tmp_path / f"{len(levels)}.labels.ome.zarr"
        labels.append(read(predict_slide(Summing(levels=(2, 8)), slide, output, PREPROCESSING)))
    assert labels[0].shape == (38, 51)
    assert len(np.unique(labels[0])) > 1
    assert all((other == labels[0]).all() for other in labels[1:])


def test_the_model_is_told_where_each_tile_lies(tmp_path, slide):
    output = predict_slide(Surveyor(), slide, tmp_path / "labels.ome.zarr", PREPROCESSING, options=SMALL)
    y, x = np.indices(slide.shape)
    assert (read(output) == (y // 5 + x // 3) % NUM_CLASSES).all()


@pytest.mark.parametrize("shape", [(256, 320), (7, 200)])
def test_every_view_shows_what_its_box_says(tmp_path, shape):
    world = np.stack(np.indices(shape)).astype(np.float32) + 0.5
    levels = (1, 2, 4)
    slide = write_image(tmp_path / "image.ome.zarr", world, levels=levels)
    seen = []

    class Checker(Toy):
        def label_logits(self, img, bbox=None):
            sizes = bbox[:, :, 1] - bbox[:, :, 0]
            assert (sizes == torch.tensor([[16.0, 24.0]]) * torch.tensor(levels)[:, None]).all()
            for axis, extent in enumerate(shape):
                n = img.shape[3 + axis]
                center = bbox[:, :, 0, axis, None] + (torch.arange(n) + 0.5) * sizes[:, :, axis, None] / n
                view = img[:, :, axis]
                truth = center[:, :, :, None] if axis == 0 else center[:, :, None, :]
                # a coarse pixel at the border is the mean of the pixels that exist
                inside = (view != 0) & (truth + 2 < extent)
                assert torch.allclose(view[inside], truth.expand_as(view)[inside])
                seen.append(inside.float().mean().item())
            return torch.zeros(len(img), NUM_CLASSES, *img.shape[3:])

    settings = replace(PREPROCESSING, normalization=Range(high=1))
    predict_slide(Checker(levels=levels, channels=2), slide, tmp_path / "labels.ome.zarr", settings)
    assert np.mean(seen) > 0.2


def test_labels_do_not_depend_on_batches_blocks_or_workers(tmp_path, slide):
    model, settings = Toy(), replace(PREPROCESSING, normalization=Percentile())
    refined = PredictOptions(refine=0.9)
    runs = {
        "one": {"batch_size": 1},
        "many": {"batch_size": 64},
        "workers": {"batch_size": 5, "num_workers": 1},
        "blocks": {"options": replace(refined, block_px=40)},
    }
    labels = [
        read(predict_slide(model, slide, tmp_path / f"{k}.ome.zarr", settings, **{"options": refined} | v))
        for k, v in runs.items()
    ]
    assert len(np.unique(labels[0])) > 1
    assert all((other == labels[0]).all() for other in labels[1:])


def test_the_logits_of_the_finest_level_count(tmp_path, slide):
    one = predict_slide(Toy(), slide, tmp_path / "finest.ome.zarr", PREPROCESSING)
    all_levels = Toy(decode="all")
    all_levels.load_state_dict(Toy().state_dict())
    two = predict_slide(all_levels, slide, tmp_path / "all.ome.zarr", PREPROCESSING)
    assert (read(one) == read(two)).all()


def test_the_output_says_what_it_shows(tmp_path, slide):
    steps = []
    output = predict_slide(
        Quantizer(),
        slide,
        tmp_path / "labels.ome.zarr",
        PREPROCESSING,
        options=AS_PUBLISHED,
        batch_size=10,
        progress=lambda *step: steps.append(step),
    )
    labels = open_slide(output)
    assert labels.pixel_size_um == slide.pixel_size_um == (0.5, 0.25)
    assert (labels.shape, labels.dtype, labels.num_channels) == (slide.shape, np.uint8, 1)
    assert labels.label_names == dict(enumerate(PREPROCESSING.class_names))
    assert labels.label_colors[2] == (0, 255, 0, 255)
    assert (labels.has_background, labels.label_colors[0][3]) == (True, 0)
    assert steps == [(10, 25), (20, 25), (25, 25)]


def test_labels_without_a_background_say_so(tmp_path, slide):
    settings = replace(PREPROCESSING, has_background=False)
    labels = open_slide(predict_slide(Quantizer(), slide, tmp_path / "labels.ome.zarr", settings))
    assert (labels.has_background, labels.label_colors[0][3]) == (False, 255)


def test_many_classes_take_two_bytes_and_a_coarse_model_gives_coarse_labels(tmp_path, slide):
    class Constant(Toy):
        def label_logits(self, img, bbox=None):
            return torch.nn.functional.one_hot(torch.full((len(img), 16, 24), 299), 300).movedim(-1, 1)

    names = tuple(f"class {i}" for i in range(300))
    settings = replace(PREPROCESSING, class_names=names, class_colors=((0, 0, 0),) * 300)
    labels = open_slide(
        predict_slide(Constant(levels=(4,), num_classes=300), slide, tmp_path / "labels.ome.zarr", settings)
    )
    assert labels.dtype == np.uint16
    assert labels.shape == slide.level_shape(4)
    assert labels.pixel_size_um == (2.0, 1.0)
    assert (labels.read(1, (0, 0), labels.shape) == 299).all()


def test_labels_inside_the_image_are_listed_there(tmp_path, slide, pixels):
    predict_slide(Quantizer(), slide, slide.path / "labels" / "guess", PREPROCESSING)
    inside = OmeZarrSlide(slide.path).label("guess")
    assert (inside.read(1, (0, 0), inside.shape)[0] == pixels[0] // 64).all()


def test_the_model_comes_back_as_it_was(tmp_path, slide):
    model = Toy().train()
    model.encoder.eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    predict_slide(model, slide, tmp_path / "labels.ome.zarr", PREPROCESSING)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_existing_output_is_replaced_only_if_asked(tmp_path, slide):
    output = predict_slide(Quantizer(), slide, tmp_path / "labels.ome.zarr", PREPROCESSING)
    first = read(output)
    with pytest.raises(ExistsError, match=r"labels\.ome\.zarr"):
        predict_slide(Surveyor(), slide, output, PREPROCESSING)
    predict_slide(Quantizer(), slide, output, PREPROCESSING)  # there is nothing to do
    assert (read(output) == first).all()
    predict_slide(Surveyor(), slide, output, PREPROCESSING, overwrite=True)
    assert (read(output) != first).any()
    with pytest.raises(InputError, match="does not hold the image"):
        predict_slide(Quantizer(), slide, slide.path, PREPROCESSING, overwrite=True)
    assert OmeZarrSlide(slide.path).levels == slide.levels


@pytest.mark.parametrize("left", [(), ("plan.json",), ("plan.json", "all.ledger")])
def test_a_run_that_was_killed_just_before_its_end_is_tidied_up(tmp_path, slide, left):
    output = predict_slide(Quantizer(), slide, tmp_path / "labels.ome.zarr", PREPROCESSING)
    whole, done = contents(output), (output / "zarr.json").stat().st_mtime_ns
    (output / ".muvit").mkdir()
    plan = json.loads((output / "zarr.json").read_text())["attributes"]["muvit"]["plan"]
    for name in left:
        (output / ".muvit" / name).write_text(json.dumps(plan) if name == "plan.json" else "")
    assert prediction_status(output).state == "complete"
    predict_slide(Quantizer(), slide, output, PREPROCESSING)
    assert not (output / ".muvit").exists()
    assert contents(output) == whole
    assert (output / "zarr.json").stat().st_mtime_ns == done


class Crashing(Toy):
    is_lucky = False

    def label_logits(self, img, bbox=None):
        if not self.is_lucky and bbox[0, 0, 0, 0] > 40:
            raise RuntimeError("out of luck")
        return super().label_logits(img, bbox)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_run_is_kept_and_resumes(tmp_path, slide):
    model, output = Crashing().train(), tmp_path / "labels.ome.zarr"
    with pytest.raises(RuntimeError, match="out of luck") as caught:
        predict_slide(model, slide, output, PREPROCESSING, options=SMALL, batch_size=2)
    assert "run the same command again to resume" in caught.value.__notes__[0]
    assert model.training
    with pytest.raises(ReadError, match="unfinished"):
        open_slide(output)
    status = prediction_status(output)
    assert status.state == "unfinished"
    assert 0 < status.blocks < status.num_blocks
    model.is_lucky = True
    steps = []
    predict_slide(
        model, slide, output, PREPROCESSING, options=SMALL, batch_size=2, progress=lambda *step: steps.append(step)
    )
    assert steps[0][0] > 2  # what was done is not done again
    whole = predict_slide(model, slide, tmp_path / "other" / output.name, PREPROCESSING, options=SMALL, batch_size=2)
    assert contents(output) == contents(whole)
    assert prediction_status(output).state == "complete"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_pixels_are_named_and_once_restored_the_run_goes_on(tmp_path, slide, pixels, num_workers):
    shard, output = slide.path / "0" / "c" / "0" / "1" / "1", tmp_path / "labels.ome.zarr"
    whole = shard.read_bytes()

    class Spoiling(Quantizer):
        def label_logits(self, img, bbox=None):
            shard.write_bytes(whole[:20])
            return super().label_logits(img, bbox)

    call = {"options": SMALL, "batch_size": 2, "num_workers": num_workers}
    with pytest.raises(
        ReadError, match=r"image\.ome\.zarr, level 1, window .*c/0/1/1 (has 2?0 bytes|is truncated)"
    ) as caught:
        predict_slide(Spoiling(), slide, output, PREPROCESSING, **call)
    assert "Traceback" not in str(caught.value)
    assert prediction_status(output).state == "unfinished"
    shard.write_bytes(whole)
    Spoiling.label_logits = Quantizer.label_logits
    predict_slide(Spoiling(), slide, output, PREPROCESSING, **call)
    assert (read(output) == pixels[0] // 64).all()


def test_pixels_that_are_corrupt_from_the_start_are_named_before_anything_is_written(tmp_path, slide):
    shard = slide.path / "0" / "c" / "0" / "1" / "1"
    content = bytearray(shard.read_bytes())
    content[30] ^= 1
    shard.write_bytes(content)
    with pytest.raises(
        ReadError, match=r"image\.ome\.zarr, level 1, window .*chunk \(0, 0, 0\) of .*c/0/1/1 is corrupt"
    ):
        predict_slide(Quantizer(), slide, tmp_path / "labels.ome.zarr", PREPROCESSING)
    assert not (tmp_path / "labels.ome.zarr").exists()


def broken_model():
    model = Toy()
    with torch.no_grad():
        model.head.weight[0] = float("nan")
    return model


@pytest.mark.parametrize(
    ("model", "changes", "options", "message"),
    [
        (lambda: Toy(channels=3), {}, {}, r"channels of .*image\.ome\.zarr: expected 3"),
        (lambda: Toy(levels=(1, 2.5)), {}, {}, r"image\.ome\.zarr, level 2.5: expected one of its stored levels 1, 4"),
        (Toy, {"crop_size": (16, 20)}, {}, r"crop_size: expected multiples of \(8, 8\)"),
        (Toy, {"crop_size": (16,)}, {}, "crop_size"),
        (lambda: Toy(num_classes=3), {}, {}, "class_names: expected one for each of the model's 3 classes"),
        (broken_model, {}, {}, r"weights of the model, head\.weight: expected finite"),
        (Toy, {"pixel_size_um": (0.5,), "is_resampled": True}, {}, "pixel_size_um: expected a positive number, or one"),
        (Toy, {"normalization": Standardize(mean=(0.0, 0.0), std=(1.0, 1.0))}, {}, "mean and std: expected 1 channels"),
        (Toy, {}, {"batch_size": 0}, "batch_size: expected a whole number >= 1"),
        (Toy, {}, {"num_workers": -1}, "num_workers: expected a whole number >= 0"),
        (Toy, {}, {"device": "abacus"}, "device: expected a device of this machine"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, slide, model, changes, options, message):
    with pytest.raises(InputError, match=message):
        predict_slide(model(), slide, tmp_path / "labels.ome.zarr", replace(PREPROCESSING, **changes), **options)
    assert not (tmp_path / "labels.ome.zarr").exists()


def test_a_slide_of_another_dimension_is_refused(tmp_path):
    stack = write_image(tmp_path / "stack.ome.zarr", np.zeros((1, 20, 30, 30), np.uint8))
    with pytest.raises(InputError, match="expected 2 spatial axes"):
        predict_slide(Toy(), stack, tmp_path / "labels.ome.zarr", PREPROCESSING)


def test_nearly_equal_pixel_sizes_are_accepted(tmp_path, slide):
    settings = replace(PREPROCESSING, pixel_size_um=(0.51, 0.245))
    assert predict_slide(Quantizer(), slide, tmp_path / "labels.ome.zarr", settings).exists()


def test_volumes_are_labelled_too(tmp_path):
    pixels = np.random.default_rng(1).integers(0, 256, (1, 9, 21, 33), dtype=np.uint8)
    stack = write_image(tmp_path / "stack.ome.zarr", pixels, levels=(1, 2))
    encoder = EncoderConfig(**{"in_channels": 1, "levels": (1, 2), "num_layers": 4, "dim": 32, "heads": 1, "ndim": 3})

    class Volume(Quantizer):
        def __init__(self):
            widths = (4, 4, 4, 4)
            config = SegmenterConfig(encoder=encoder, num_classes=NUM_CLASSES, decoder_widths=widths, stem_width=4)
            Segmenter.__init__(self, config)

    settings = replace(PREPROCESSING, crop_size=(8, 16, 16))
    output = predict_slide(Volume(), stack, tmp_path / "labels.ome.zarr", settings)
    assert (read(output) == pixels[0] // 64).all()


def test_the_default_device_is_cuda_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device(None) == torch.device("cuda")


def test_the_store_is_valid_only_when_complete(tmp_path, slide):
    output = tmp_path / "labels.ome.zarr"

    class Peeking(Quantizer):
        def label_logits(self, img, bbox=None):
            with pytest.raises(ReadError):
                open_slide(output)
            return super().label_logits(img, bbox)

    predict_slide(Peeking(), slide, output, PREPROCESSING)
    assert json.loads((output / "zarr.json").read_text())["node_type"] == "group"
