import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import yaml

from muvit.cli import main
from muvit.data.crops.normalize import Range
from muvit.data.crops.preprocessing import Preprocessing
from muvit.errors import ExistsError, InputError
from muvit.geometry import naive_boxes
from muvit.models import portable
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.portable import export_model
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import TrainedModel

ENCODER = EncoderConfig(in_channels=1, levels=(1, 4), patch_size=2, num_layers=1, dim=16, heads=2)
PREPROCESSING = Preprocessing(
    crop_size=(16, 16), normalization=Range(high=255), class_names=("glass", "cell"), class_colors=((0, 0, 0),) * 2
)


def trained(kind="segmenter"):
    torch.manual_seed(0)
    if kind == "classifier":
        model = Classifier(ClassifierConfig(encoder=ENCODER, num_classes=2))
    else:
        model = Segmenter(SegmenterConfig(encoder=ENCODER, num_classes=2, decoder_widths=(8, 4), stem_width=4))
    return TrainedModel(model=model, preprocessing=PREPROCESSING)


def inputs(count):
    boxes = naive_boxes((1, 4), (16, 16)) + torch.arange(float(count))[:, None, None, None]
    return torch.rand(count, 2, 1, 16, 16, generator=torch.Generator().manual_seed(5)), boxes


@pytest.mark.parametrize(("kind", "suffix"), [("segmenter", ".onnx"), ("classifier", ".pt2")])
def test_an_exported_model_stands_alone(kind, suffix, tmp_path, capfd):
    own, file = trained(kind), tmp_path / f"model{suffix}"
    own.save(tmp_path / "model")
    assert main(["export-model", str(tmp_path / "model"), "--output", str(file)]) == 0
    assert capfd.readouterr().out.startswith(f"{file}: outputs differ by at most ")
    img, bbox = inputs(5)
    if suffix == ".onnx":
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        logits = session.run(["logits"], {"img": img.numpy(), "bbox": bbox.numpy()})[0]
        text = {prop.key: prop.value for prop in onnx.load(file).metadata_props}["preprocessing.yaml"]
    else:
        extra = {"preprocessing.yaml": ""}
        logits = torch.export.load(file, extra_files=extra).module()(img, bbox).detach().numpy()
        text = extra["preprocessing.yaml"]
    with torch.no_grad():
        np.testing.assert_allclose(logits, own.model.eval()(img, bbox), rtol=0, atol=1e-4)
    assert Preprocessing.from_plain(yaml.safe_load(text)) == PREPROCESSING
    with pytest.raises(ExistsError):
        export_model(own, file)


def test_a_file_whose_outputs_differ_is_refused(tmp_path):
    model, batches = torch.nn.Bilinear(1, 1, 1), [(torch.ones(1, 1), torch.ones(1, 1))]
    with torch.no_grad():
        right = portable.compare_outputs(tmp_path, model, lambda img, bbox: model(img, bbox).numpy(), batches)
        assert right == 0
        for wrong in (1e-3, float("nan")):
            with pytest.raises(InputError, match=r"expected outputs within 0\.0001 of the model's"):
                portable.compare_outputs(tmp_path, model, lambda *given, e=wrong: model(*given).numpy() + e, batches)


def test_what_cannot_be_exported_is_refused(tmp_path, capfd):
    with pytest.raises(InputError, match=r"expected a file ending in \.onnx or \.pt2"):
        export_model(trained(), tmp_path / "model.pt")
    encoder = tmp_path / "encoder"
    trained().model.encoder.save(encoder, extra_files={"preprocessing.yaml": PREPROCESSING.to_yaml()})
    assert main(["export-model", str(encoder), "--output", str(tmp_path / "b.pt2")]) == 1
    assert "expected a model of pixels or a classifier of slides" in capfd.readouterr().err
