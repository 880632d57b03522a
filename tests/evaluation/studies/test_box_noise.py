import numpy as np
import pytest
import torch
from torch import nn

from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.data.folders import open_labelled_folder
from muvit.data.pyramids.writer import PyramidWriter
from muvit.data.slides.open import open_slide
from muvit.errors import InputError
from muvit.evaluation.scores.segmentation import evaluate_slides
from muvit.evaluation.studies.box_noise import draw_noise, study_noise
from muvit.inference.predict import predict_slide
from muvit.inference.run.plan import AS_PUBLISHED
from muvit.models.encoder import EncoderConfig
from muvit.models.segmentation_model import SegmentationModel, Views
from muvit.models.segmenter import Segmenter, SegmenterConfig

PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Range(high=255),
    class_names=("even", "odd"),
    class_colors=((0, 0, 0), (255, 0, 0)),
)


class Stripes(SegmentationModel):
    """Knows that columns of 16 world pixels take turns, and nothing else than where it looks."""

    def __init__(self):
        super().__init__()
        self.home = nn.Parameter(torch.zeros(()))
        self.batches = []

    @property
    def views(self):
        return Views(levels=(1, 4), in_channels=1, ndim=2, multiple=(1, 1))

    @property
    def num_classes(self):
        return 2

    def forward(self, img, bbox=None):
        self.batches.append(bbox)
        if bbox is None:
            bbox = torch.tensor([[-8.0, -8.0], [8.0, 8.0]]).expand(len(img), 2, 2, 2)
        assert (bbox[:, :, 1] > bbox[:, :, 0]).all()
        lower, upper = bbox[:, 0, 0, 1, None], bbox[:, 0, 1, 1, None]
        x = lower + (torch.arange(16) + 0.5) / 16 * (upper - lower)
        odd = (x.div(16, rounding_mode="floor") % 2)[:, None].expand(-1, 16, -1)
        return torch.stack([1 - odd, odd], dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        odd = np.broadcast_to(np.arange(64, dtype=np.uint8) // 16 % 2, (1, 48, 64))
        for kind, pixels in (("images", rng.integers(0, 255, (1, 48, 64), dtype=np.uint8)), ("labels", odd)):
            writer = PyramidWriter.create(
                folder / kind / f"{name}.ome.zarr",
                shape=(48, 64),
                num_channels=1,
                dtype=np.uint8,
                levels=(1, 4),
                kind=kind[:-1],
            )
            writer.write((0, 0), np.ascontiguousarray(pixels))
            writer.finish()
    return folder


def study(model, folder, **options):
    return study_noise("model", model, PREPROCESSING, folder, device="cpu", **options)


def test_noise_costs_what_depends_on_places(folder):
    result = study(Stripes(), folder, sigmas=(0, 2, 8, 1000))
    scores = [scored.pooled.mean_dice for scored in result.noisy]
    assert scores[0] == 1
    assert scores[0] > scores[1] > scores[2] > scores[3]
    assert 0.2 < scores[3] < 0.8
    # naive boxes show half of each stripe: every tile is wrong by the same half
    assert result.naive.pooled.accuracy == pytest.approx(0.5)
    assert [slide.name for slide in result.noisy[0].slides] == ["a", "b"]
    assert result.noisy[0].confusion.sum() == 2 * 48 * 64


def test_noise_has_the_asked_deviation_and_every_number_its_own(folder):
    model = Stripes()
    study(model, folder, sigmas=(0, 3), batch_size=50)
    true, noisy = (torch.cat([b for b in model.batches if b is not None][i::2]) for i in (0, 1))
    difference = (noisy - true).flatten(1).double().numpy()
    assert difference.std() == pytest.approx(3, rel=0.15)
    assert abs(np.corrcoef(difference.T) - np.eye(8)).max() < 0.75  # 24 tiles
    assert len(np.unique(difference.round(3))) > 0.95 * difference.size


def test_the_noise_follows_from_the_seed_alone(folder):
    one, other_batches, other_seed = (
        [scored.confusion.tolist() for scored in study(Stripes(), folder, sigmas=(4, 16), **options).noisy]
        for options in ({"batch_size": 1}, {"batch_size": 7}, {"seed": 1})
    )
    assert one == other_batches != other_seed


def segmenter(boxes):
    torch.manual_seed(0)
    encoder = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2)
    return Segmenter(
        SegmenterConfig(encoder=encoder, num_classes=2, boxes=boxes, decoder_widths=(4, 4, 4), stem_width=2)
    )


def test_without_noise_a_model_scores_what_its_prediction_scores(folder, tmp_path):
    model = segmenter("true")
    pairs = []
    for image, truth in open_labelled_folder(folder):
        target = predict_slide(
            model, image, tmp_path / f"{image.name}.ome.zarr", PREPROCESSING, options=AS_PUBLISHED, device="cpu"
        )
        pairs.append((open_slide(target), truth))
    result = study(model, folder, sigmas=(0, 1e6))
    assert (result.noisy[0].confusion == evaluate_slides(pairs, 2).confusion).all()
    assert (result.noisy[1].confusion != result.noisy[0].confusion).any()


def test_a_model_with_naive_boxes_does_not_notice(folder):
    result = study(segmenter("naive"), folder, sigmas=(0, 64))
    assert (result.noisy[0].confusion == result.noisy[1].confusion).all()
    assert (result.noisy[0].confusion == result.naive.confusion).all()


def test_rows_and_picture_hold_all_cases(folder):
    seen = []
    result = study(Stripes(), folder, sigmas=(0, 4), batch_size=5, progress=lambda *n: seen.append(n))
    assert seen[-1] == (24, 24)
    rows = result.rows()
    assert [(row["boxes"], row["sigma_px"]) for row in rows] == [("noisy", 0), ("noisy", 4), ("naive", None)]
    assert all(row["low"] <= row["mean_dice"] <= row["high"] for row in rows)
    assert np.asarray(draw_noise([result])).std() > 0


def test_negative_noise_is_refused(folder):
    with pytest.raises(InputError, match="sigmas: expected standard deviations >= 0"):
        study(Stripes(), folder, sigmas=(1, -1))
