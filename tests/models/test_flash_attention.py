"""In bfloat16 every model attends by kernels that never hold the matrix of scores, with nothing that a GPU's refuse."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from muvit.data.crops.placement import Window
from muvit.geometry import naive_boxes
from muvit.inference.run.context import ContextCaching
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig, MuViTEncoder
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter
from muvit.models.segmenter import Segmenter, SegmenterConfig

SETTINGS = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "num_layers": 3, "dim": 32, "heads": 2}
COPIES = {"attention_mode": "coarse_to_fine", "coarse_copies": "under"}
ENCODER = EncoderConfig(**SETTINGS)
SEGMENTER = {"num_classes": 2, "decoder_widths": (8, 8, 8), "stem_width": 4}
VIT = {"patch_size": 4, "depth": 2, "embed_dim": 16, "num_heads": 2}


class Calls(TorchFunctionMode):
    """Attention that is asked for: types, masks and memory of its arguments."""

    def __init__(self):
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is scaled_dot_product_attention:
            self.seen.append((args[:3], (kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None)))
        return function(*args, **kwargs or {})


def segmenter(**changes):
    return Segmenter(SegmenterConfig(encoder=ENCODER, **SEGMENTER | changes))


def relay():
    config = RelayConfig(
        backbone="vit_tiny_patch16_224", timm_options=VIT, in_channels=1, num_classes=2, levels=(1, 4), size=(16, 16)
    )
    return RelaySegmenter(config)


MODELS = {
    **{
        mode: lambda mode=mode: MuViTEncoder(EncoderConfig(**SETTINGS, attention_mode=mode))
        for mode in ("all", "causal", "same", "coarse_to_fine")
    },
    "copies": lambda: MuViTEncoder(EncoderConfig(**SETTINGS, **COPIES)),
    "without rotation": lambda: MuViTEncoder(EncoderConfig(**SETTINGS, rotary_mode="none")),
    "mae": lambda: MuViTMAE(MAEConfig(encoder=ENCODER, dim_decoder=16)),
    "unetr": segmenter,
    "mask2former": lambda: segmenter(decoder="mask2former", num_queries=2, query_heads=1),
    "classifier": lambda: Classifier(ClassifierConfig(encoder=ENCODER, num_classes=2, pooling="attention")),
    "relay": relay,
}


def check(calls):
    """Flash attention takes bfloat16 alone, without masks, and heads whose features lie side by side."""
    assert calls.seen
    for parts, mask in calls.seen:
        assert mask is None
        assert {part.dtype for part in parts} == {torch.bfloat16}
        assert all(part.stride(-1) == 1 for part in parts)


@pytest.mark.parametrize("name", MODELS)
def test_models_attend_by_flash_kernels(name):
    torch.manual_seed(0)
    model, img, bbox = MODELS[name](), torch.rand(2, 2, 1, 16, 16), naive_boxes((1, 4), (16, 16)).expand(2, -1, -1, -1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cpu", torch.bfloat16), Calls() as calls:
        out = model(img, bbox)
    loss = out["loss"] if isinstance(out, dict) else (out[0] if isinstance(out, tuple) else out).float().square().mean()
    loss.backward()
    check(calls)


def test_cached_contexts_attend_by_flash_kernels():
    encoder = EncoderConfig(**SETTINGS, **COPIES)
    model = Segmenter(SegmenterConfig(encoder=encoder, **SEGMENTER)).eval()
    windows = [[Window(1, (0, 0), (16, 16)), Window(4, (0, 0), (16, 16))]]
    boxes = torch.tensor([[[[0.0, 0], [16, 16]], [[0, 0], [64, 64]]]])
    caching = ContextCaching(model)
    forbidding = (sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.autocast("cpu", torch.bfloat16), torch.no_grad())
    with forbidding[0], forbidding[1], forbidding[2], Calls() as calls:
        caching.label_logits(torch.rand(1, 2, 1, 16, 16), boxes, windows)
    check(calls)


def test_what_flash_kernels_cannot_do_is_refused():
    part = torch.rand(1, 1, 4, 8, dtype=torch.float64)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(RuntimeError, match="No available kernel"):
        scaled_dot_product_attention(part, part, part, dropout_p=0.5)
