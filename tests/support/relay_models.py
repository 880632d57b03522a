"""Small models of every family of backbone."""

import torch

from muvit.geometry import naive_boxes
from muvit.models.relay.config import RelayConfig
from muvit.models.relay.segmenter import RelaySegmenter

VIT = {"depth": 3, "embed_dim": 48, "num_heads": 3}
"""A width whose heads of 16 features rotary embeddings can split."""
SWIN = {"depths": (2, 2), "embed_dim": 16, "num_heads": (2, 4)}

FAMILIES = {
    "vit_tiny_patch16_224": ((64, 64), VIT),
    "deit3_small_patch16_224": ((64, 96), VIT),
    "deit_tiny_distilled_patch16_224": ((64, 64), VIT),
    "vit_small_patch14_dinov2": ((56, 56), VIT),
    "vit_small_patch14_reg4_dinov2": ((56, 70), VIT),
    "vit_giant_patch14_reg4_dinov2": ((56, 56), VIT),  # SwiGLU
    "vit_base_patch16_clip_224": ((64, 64), VIT),  # norm before the blocks
    "vit_base_patch16_siglip_224": ((64, 64), VIT),  # no class token, attention pooling
    "vit_small_patch16_dinov3": ((64, 96), VIT),
    "vit_small_plus_patch16_dinov3": ((64, 64), VIT),  # SwiGLU
    "vit_small_patch16_rope_mixed_224": ((64, 64), VIT),
    "eva02_tiny_patch14_224": ((56, 56), VIT),
    "swinv2_tiny_window8_256": ((64, 128), SWIN | {"window_size": 4}),
    "swin_tiny_patch4_window7_224": ((64, 96), SWIN),  # windows that do not divide the grid
}
"""Size of a view, and what makes the model small, by name."""


def build(name="vit_tiny_patch16_224", seed=0, *, shaken=False, **changes):
    """A model with 2 channels, 3 classes and levels 1 and 4.

    ``shaken`` moves all parameters away from where timm lets them start: layer scales near 0, norms of 0.
    """
    size, options = FAMILIES[name]
    torch.manual_seed(seed)
    fields = {"in_channels": 2, "num_classes": 3, "levels": (1, 4), "size": size, "timm_options": options}
    model = RelaySegmenter(RelayConfig(backbone=name, **fields | changes)).eval()
    if shaken:
        shake(model)
    return model


def shake(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))


def views(model, batch=2, seed=1):
    """Images ``(B, L, C, H, W)`` for a model."""
    v = model.views
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, len(v.levels), v.in_channels, *v.size, generator=generator)


def boxes(model, batch=2):
    """Boxes ``(B, L, 2, 2)`` of views around one centre."""
    v = model.views
    return naive_boxes(v.levels, v.size).expand(batch, -1, -1, -1)
