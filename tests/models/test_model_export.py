"""Models leave Python whole: as one graph of ``torch.compile``, as programs of ``torch.export`` and as ONNX files."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from muvit.encoders import MuViTEncoder2d
from muvit.errors import InputError
from muvit.geometry import naive_boxes
from muvit.mae import MuViTMAE2d
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.masking import TokenMask
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter
from muvit.models.segmenter import Segmenter, SegmenterConfig

ENCODER = {"in_channels": 1, "levels": (1, 4), "patch_size": 2, "num_layers": 1, "dim": 16, "heads": 2}
PERIODS = {"rotary_base": (4.0, 128.0)}
SEGMENTER = {"encoder": EncoderConfig(**ENCODER), "num_classes": 2, "decoder_widths": (8, 4), "stem_width": 4}
QUERIES = {"decoder": "mask2former", "num_queries": 2, "query_heads": 1, "query_layers": 1}
RELAY = {"in_channels": 1, "num_classes": 2, "levels": (1, 4), "size": (16, 16)}
VIT = {"patch_size": 4, "depth": 1, "embed_dim": 16, "num_heads": 2}
SWIN = {"depths": (1, 1), "embed_dim": 8, "num_heads": (1, 2), "window_size": 2}
SIZE = (16, 16)


class Reconstruction(nn.Module):
    """A masked autoencoder whose mask is an input."""

    def __init__(self):
        super().__init__()
        self.model = MuViTMAE2d(**ENCODER, dim_decoder=16, num_layers_decoder=1)

    def forward(self, img, bbox):
        # an order of the tokens that follows from the pixels
        order = img.flatten(1)[:, ::4].argsort(dim=1)
        return self.model(img, bbox, mask=TokenMask(order, order.shape[1] // 4))["output"]


class Tokens(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.model = MuViTEncoder2d(**ENCODER | settings)

    def forward(self, img, bbox):
        return self.model(img, bbox)[0]


MODELS = {
    "encoder": Tokens,
    "encoder of cached contexts": lambda: Tokens(attention_mode="coarse_to_fine", coarse_copies="under", **PERIODS),
    "mae": Reconstruction,
    "unetr": lambda: Segmenter(SegmenterConfig(**SEGMENTER)),
    "mask2former": lambda: Segmenter(SegmenterConfig(**SEGMENTER | QUERIES)),
    "classifier": lambda: Classifier(
        ClassifierConfig(encoder=EncoderConfig(**ENCODER), num_classes=2, pooling="attention")
    ),
    "relay vit": lambda: RelaySegmenter(RelayConfig(backbone="vit_tiny_patch16_224", timm_options=VIT, **RELAY)),
    "relay swin": lambda: RelaySegmenter(
        RelayConfig(backbone="swinv2_tiny_window8_256", timm_options=SWIN, exchange="world", exchange_cells=2, **RELAY)
    ),
}
SLOW_TO_EXPORT = ("encoder", "mae", "mask2former", "relay swin", "relay vit")


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def views(batch):
    generator = torch.Generator().manual_seed(batch)
    boxes = naive_boxes((1, 4), SIZE) + 1000 + torch.arange(batch)[:, None, None, None]
    return torch.rand(batch, 2, 1, *SIZE, generator=generator), boxes


@pytest.mark.parametrize("name", MODELS)
def test_compilation_makes_one_graph(name):
    model, inputs = build(name), views(2)
    with torch.no_grad():
        # no code is generated: what matters is that Python is followed from end to end
        compiled = torch.compile(model, backend="eager", fullgraph=True)(*inputs)
        torch.testing.assert_close(compiled, model(*inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in SLOW_TO_EXPORT)) for name in MODELS]
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")  # of the exporter's own making
def test_a_program_and_its_onnx_file_take_batches_of_any_size(name, tmp_path):
    model, batch = build(name), torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, views(2), dynamic_shapes={"img": {0: batch}, "bbox": {0: batch}})
    torch.onnx.export(program, f=tmp_path / "model.onnx", input_names=["img", "bbox"], verbose=False, optimize=False)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for count in (1, 3):
        img, bbox = views(count)
        with torch.no_grad():
            logits = model(img, bbox)
            torch.testing.assert_close(program.module()(img, bbox), logits, rtol=0, atol=1e-5)
        found = session.run(None, {"img": img.numpy(), "bbox": bbox.numpy()})[0]
        np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["unetr", "relay vit"])
def test_outside_of_graphs_wrong_boxes_are_still_refused(name):
    img, bbox = views(1)
    with pytest.raises(InputError, match="finite coordinates"):
        build(name)(img, bbox * float("nan"))
