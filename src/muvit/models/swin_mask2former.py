"""Mask2Former with a Swin Transformer, as Hugging Face transformers builds it (Cheng et al., CVPR 2022).

Other than the decoder `muvit.models.mask2former`, whose queries are mixed into logits, each query here predicts a class
and a mask, and learns from the one mask of the labels that it is matched with.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.functional import interpolate

from muvit.errors import CheckpointError
from muvit.labels import IGNORE

_NANO = {"embed_dim": 48, "depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), "window_size": 4, "drop_path_rate": 0.0}
SIZES: dict[str, dict[str, Any]] = {
    "swin_nano": _NANO,
    "swin_tiny": {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24), "window_size": 7},
    "swin_small": {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24), "window_size": 7},
    "swin_base": {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32), "window_size": 12},
    "swin_large": {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48), "window_size": 12},
}
"""Backbones: those of the published models, and one for a CPU (nano)."""

_POINTS = 12544
"""Points of a mask that matching and loss look at (Mask2Former, section 3.3)."""
_OF_THE_TASK = ("class_predictor.", "criterion.")
"""Parameters that depend on the classes: new ones where published weights are for other classes."""
_PATCHES = "model.pixel_level_module.encoder.swin.embeddings.patch_embeddings."


class SwinMask2Former(nn.Module):
    """Pixel decoder, queries and matching loss of Mask2Former over a Swin Transformer.

    Args:
        size: key of `SIZES`.
        width: channels of the pixel decoder and the queries, a multiple of 32.
        in_channels: channels of an image.
        num_classes: classes, background included.
        weights: folder of a Mask2Former of transformers, or the name of one on huggingface.co, to start from. What
            depends on classes or, if there are other than 3, on channels, starts at random.

    Raises:
        CheckpointError: there are no such weights, or they are of another size.
    """

    def __init__(self, size: str, width: int, in_channels: int, num_classes: int, weights: str | None) -> None:
        super().__init__()
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

        stages = [f"stage{number}" for number in range(1, 5)]
        swin = SwinConfig(num_channels=in_channels, out_features=stages, **{"drop_path_rate": 0.3} | SIZES[size])
        config = Mask2FormerConfig(
            backbone_config=swin,
            num_labels=num_classes,
            feature_size=width,
            mask_feature_size=width,
            hidden_dim=width,
            encoder_feedforward_dim=4 * width,
            dim_feedforward=8 * width,
        )
        self.network: Any = Mask2FormerForUniversalSegmentation(config) if weights is None else _load(weights, config)
        # the norm of the encoder's output, of which nothing is made: each map has a norm of its own
        self.encoder.get_submodule("swin.layernorm").requires_grad_(False)

    @property
    def encoder(self) -> nn.Module:
        """The Swin Transformer."""
        encoder: nn.Module = self.network.model.pixel_level_module.encoder
        return encoder

    def forward(self, img: Tensor) -> Tensor:
        """Logits ``(B, K, y, x)`` of an image ``(B, C, y, x)``."""
        return _logits(self.network(pixel_values=img), img.shape[2:])

    def loss(self, img: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Matching loss of all layers of the decoder (Mask2Former, section 3.2), and logits ``(B, K, y, x)``.

        Pixels of `IGNORE` are in no mask, as in the published semantic models.

        Args:
            img: ``(B, C, y, x)``.
            label: ``(B, y, x)`` int64.
        """
        output = self.network(pixel_values=img, output_auxiliary_logits=True)
        classes = [one[one != IGNORE].unique() for one in label]
        masks = [(one == values[:, None, None]).float() for one, values in zip(label, classes, strict=True)]
        criterion = self.network.criterion
        criterion.num_points = criterion.matcher.num_points = min(_POINTS, label[0].numel())
        with torch.autocast(img.device.type, enabled=False):
            parts = self.network.get_loss_dict(
                output.masks_queries_logits.float(),
                output.class_queries_logits.float(),
                masks,
                classes,
                [{name: value.float() for name, value in layer.items()} for layer in output.auxiliary_logits],
            )
            return self.network.get_loss(parts), _logits(output, img.shape[2:])


def _logits(output: Any, size: torch.Size) -> Tensor:
    """Logarithm of a class's share at each pixel: over the queries, the sum of class probability times mask.

    A softmax of these logits divides the sums by their total.
    """
    with torch.autocast(output.masks_queries_logits.device.type, enabled=False):
        classes = output.class_queries_logits.float().softmax(-1)[..., :-1]  # the last one is no class
        masks = interpolate(output.masks_queries_logits.float(), tuple(size), mode="bilinear", align_corners=False)
        scores = torch.einsum("bqk,bqyx->bkyx", classes, masks.sigmoid())
    return scores.clamp(min=torch.finfo(scores.dtype).tiny).log()


def _load(weights: str, config: Any) -> Any:
    from transformers import Mask2FormerForUniversalSegmentation

    source = Path(weights) if Path(weights).is_dir() else weights
    expected = "a Mask2Former of transformers with weights as safetensors: a folder, or a name on huggingface.co"
    try:
        network, found = Mask2FormerForUniversalSegmentation.from_pretrained(
            weights,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            use_safetensors=True,
        )
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise CheckpointError(source, expected=expected, got=str(error).splitlines()[0].rstrip(".")) from error
    is_rgb = config.backbone_config.num_channels == 3
    new = _OF_THE_TASK if is_rgb else (*_OF_THE_TASK, _PATCHES)
    other = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]} | set(found["missing_keys"])
    unfit = sorted(key for key in other if not key.startswith(new))
    if unfit:
        expected = "weights of this encoder_name and width"
        raise CheckpointError(source, expected=expected, got=f"{len(unfit)} others, such as {unfit[0]}")
    return network
