from dataclasses import replace

import pytest
import torch

from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import FILE, Preprocessing
from muvit.errors import CheckpointError, ExistsError
from muvit.models.baselines import Baseline, BaselineConfig
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.mae import DecoderConfig, MAEConfig, MuViTDecoder, MuViTMAE
from muvit.models.segmentation_model import SegmentationModel
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel, build_model, load_encoder, load_model, load_network

ENCODER = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=2, heads=2)
PREPROCESSING = Preprocessing(
    crop_size=(16, 16),
    normalization=Range(high=255),
    class_names=("background", "bright"),
    class_colors=((0, 0, 0), (255, 0, 0)),
)
SEGMENTER = SegmenterConfig(encoder=ENCODER, num_classes=2, decoder_widths=(4, 4, 4), stem_width=2)
BASELINE = BaselineConfig(kind="residual_unet", width=1, in_channels=1, num_classes=2, levels=(1,))
MODELS = {
    "encoder": lambda: MuViTEncoder(ENCODER),
    "decoder": lambda: MuViTDecoder(DecoderConfig(in_channels=16, dim=16, heads=2)),
    "mae": lambda: MuViTMAE(MAEConfig(encoder=ENCODER, dim_decoder=16)),
    "muvit": lambda: Segmenter(SEGMENTER),
    "classifier": lambda: Classifier(ClassifierConfig(encoder=ENCODER, num_classes=2)),
    "residual_unet": lambda: Baseline(BASELINE),
}


def trained(name="muvit"):
    torch.manual_seed(0)
    return TrainedModel(model=MODELS[name](), preprocessing=PREPROCESSING)


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_comes_back_with_its_preprocessing(tmp_path, kind):
    made = trained(kind)
    made.save(tmp_path / "run" / "best")
    for folder in (tmp_path / "run", tmp_path / "run" / "best"):  # a run stands for its best model
        loaded = load_model(folder)
        assert type(loaded.model) is type(made.model)
        assert loaded.model.config == made.model.config
        assert loaded.model.config.kind == kind
        assert loaded.preprocessing == PREPROCESSING
        assert loaded.fingerprint == made.fingerprint
    state = load_network(tmp_path / "run").state_dict()
    assert all(torch.equal(state[name], value) for name, value in made.model.state_dict().items())


def test_the_kind_may_be_asked_for(tmp_path):
    trained("muvit").save(tmp_path / "segmenter")
    trained("residual_unet").save(tmp_path / "baseline")
    trained("classifier").save(tmp_path / "classifier")
    assert isinstance(load_model(tmp_path / "segmenter", kind=SegmentationModel).model, Segmenter)
    assert isinstance(load_model(tmp_path / "baseline", kind=SegmentationModel).model, Baseline)
    with pytest.raises(
        CheckpointError, match=r"classifier: expected a model of kind muvit or relay or unet or .*, got"
    ):
        load_model(tmp_path / "classifier", kind=SegmentationModel)
    with pytest.raises(
        CheckpointError, match="baseline: expected a model of kind muvit, got one of kind residual_unet"
    ):
        load_network(tmp_path / "baseline", kind=Segmenter)


def test_a_model_without_its_preprocessing_is_not_taken_for_trained(tmp_path):
    trained().model.save(tmp_path / "bare")
    assert isinstance(load_network(tmp_path / "bare"), Segmenter)
    with pytest.raises(CheckpointError, match=r"bare: expected a trained model, with preprocessing\.yaml, got none"):
        load_model(tmp_path / "bare")


def test_unknown_kinds_are_refused(tmp_path):
    trained().save(tmp_path / "model")
    file = tmp_path / "model" / "config.yaml"
    file.write_text(file.read_text().replace("kind: muvit", "kind: oracle"))
    with pytest.raises(CheckpointError, match=r"expected a model of kind muvit, relay.*, got one of kind oracle"):
        load_model(tmp_path / "model")


def test_nothing_is_overwritten_unasked(tmp_path):
    trained().save(tmp_path / "model")
    with pytest.raises(ExistsError):
        trained().save(tmp_path / "model")
    trained("residual_unet").save(tmp_path / "model", overwrite=True)
    assert isinstance(load_model(tmp_path / "model").model, Baseline)
    assert (tmp_path / "model" / FILE).is_file()


def test_the_fingerprint_tells_weights_and_preprocessing_apart():
    first = trained()
    assert first.fingerprint == trained().fingerprint
    assert replace(first, preprocessing=replace(PREPROCESSING, padding="edge")).fingerprint != first.fingerprint
    other = trained()
    with torch.no_grad():
        other.model.head.bias += 1
    assert other.fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", ["encoder", "mae", "muvit", "classifier"])
def test_encoders_come_from_any_model_that_has_one(tmp_path, kind):
    made = trained(kind)
    made.save(tmp_path / "model")
    expected = made.model if kind == "encoder" else made.model.encoder
    encoder = load_encoder(tmp_path / "model")
    assert encoder.config == ENCODER
    assert all(torch.equal(encoder.state_dict()[name], value) for name, value in expected.state_dict().items())


def test_a_model_without_an_encoder_has_none_to_give(tmp_path):
    trained("residual_unet").save(tmp_path / "model")
    with pytest.raises(
        CheckpointError, match="model: expected a model with a multi-resolution encoder, got a Baseline"
    ):
        load_encoder(tmp_path / "model")


def test_settings_build_their_model():
    assert isinstance(build_model(SEGMENTER), Segmenter)
    assert build_model(BASELINE).config == BASELINE
