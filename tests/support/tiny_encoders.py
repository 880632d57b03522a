"""Small encoders, and views of a few levels with their boxes."""

import torch

from muvit.models.encoder import EncoderConfig, MuViTEncoder

TINY = {"in_channels": 2, "levels": (1, 4), "patch_size": 4, "dim": 32, "num_layers": 3, "heads": 2}
LEVELS = (1, 2, 4)


def tiny(**changes):
    torch.manual_seed(0)
    return MuViTEncoder(EncoderConfig(**TINY | changes)).eval()


def nested_boxes(levels=(1, 4), side=16, batch=2, ndim=2):
    """Crops of ``side`` pixels, each sample's at another place, coarse ones off centre."""
    lower = torch.tensor([[[100.0 * b - 8 * i] * ndim for i in range(len(levels))] for b in range(batch)])
    extent = torch.tensor([float(level * side) for level in levels])[None, :, None]
    return torch.stack([lower, lower + extent], dim=-2)


def scene(ndim=2, batch=2, offset=0.0, side=16, **changes):
    """An encoder that attends sharply from coarse to fine, views of three levels and their boxes, off centre."""
    encoder = tiny(ndim=ndim, **{"levels": LEVELS, "attention_mode": "coarse_to_fine"} | changes)
    with torch.no_grad():
        for block in encoder.layers:
            block.attn.qkv.weight[:64] *= 3
        if encoder.copies is not None:
            encoder.copies.vector.normal_()
    img = torch.randn(batch, 3, 2, *(side,) * ndim)
    return encoder, img, nested_boxes(LEVELS, side=side, batch=batch, ndim=ndim) + offset
