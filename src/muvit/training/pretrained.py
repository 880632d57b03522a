"""Pre-trained encoders in segmenters and classifiers: trained in full, frozen, or with low-rank additions."""

import copy
from typing import TypeVar

from torch import nn

from muvit.errors import InputError, require_package
from muvit.models.classifier import Classifier
from muvit.models.segmenter import Segmenter
from muvit.models.trained import load_encoder
from muvit.training.recipes import InitConfig

_MUST_AGREE = (
    "ndim",
    "in_channels",
    "patch",
    "dim",
    "num_layers",
    "heads",
    "use_level_embed",
    "rotary_mode",
    "rotary_param",
    "patch_spacing",
    "fixed_positions",
)
"""Settings in which the recipe's encoder must equal the pre-trained one; the others may differ."""

_LORA_TARGETS = r"layers\.\d+\.(attn\.(qkv|out)|ff\.(0|3))"

Model = TypeVar("Model", bound=nn.Module)


def load_pretrained_encoder(model: Segmenter | Classifier, init: InitConfig) -> None:
    """Copy a pre-trained encoder's weights into a model, and freeze them or add low-rank matrices, as ``init`` says.

    Raises:
        CheckpointError: the folder holds no encoder.
        InputError: the encoder lacks a level, or its sizes differ from the model's.
    """
    wanted = model.config.encoder
    encoder = load_encoder(init.encoder)
    for name in _MUST_AGREE:
        has, wants = (getattr(config, name) for config in (encoder.config, wanted))
        if has != wants:
            setting = "patch_size" if name == "patch" else name
            raise InputError(
                f"model.encoder.{setting}", expected=f"{has!r}, as the encoder in {init.encoder} has", got=repr(wants)
            )
    found = encoder.extract_levels(wanted.levels, copy=False).state_dict()
    own = model.encoder.state_dict()
    if "copies.vector" in own:  # an encoder without copies leaves the vector at zero
        found = {"copies.vector": own["copies.vector"]} | found
    else:
        found.pop("copies.vector", None)
    model.encoder.load_state_dict(found)
    if init.mode == "frozen":
        model.encoder.requires_grad_(False)
    elif init.mode == "lora":
        add_lora(model.encoder, init.lora_rank, init.lora_alpha)


def add_lora(encoder: nn.Module, rank: int, alpha: int) -> None:
    """Freeze an encoder and add trainable matrices of low rank to all matrices of its blocks.

    Raises:
        InputError: the package for it is not installed.
    """
    require_package("peft", "init.mode lora", package="peft", install="'muvit[lora]'")
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=_LORA_TARGETS), encoder)


def merge_lora(model: Model) -> Model:
    """The model itself, or, if it has low-rank additions, a copy with plain weights that gives the same outputs."""
    if not any(hasattr(module, "lora_A") for module in model.modules()):
        return model
    plain = copy.deepcopy(model)
    for name, module in list(plain.named_modules()):
        if hasattr(module, "lora_A"):
            module.merge()
            plain.set_submodule(name, module.get_base_layer())
    return plain.requires_grad_(True)
