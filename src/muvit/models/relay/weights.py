"""Building timm's backbones, by name, with fresh or pre-trained weights."""

from difflib import get_close_matches
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from torch import Tensor, nn

from muvit.errors import CheckpointError, InputError, require_package
from muvit.models.relay.backbones import Backbone, SwinBackbone, ViTBackbone
from muvit.models.relay.config import RelayConfig

_VIT_MODULES = ("vision_transformer", "vision_transformer_hybrid", "deit", "eva")
_SWIN_MODULES = ("swin_transformer", "swin_transformer_v2")


def build_backbone(config: RelayConfig, num_relay: int, num_contexts: int) -> Backbone:
    """The backbone that the settings name.

    Args:
        config: the settings; channels and size must be known.
        num_relay: relay tokens that will pass through it.
        num_contexts: context branches with embeddings of their own.

    Raises:
        InputError: timm is not installed, knows no such model, or the model has no token blocks or refuses a setting.
        CheckpointError: the pre-trained weights cannot be read, or are not those of the backbone.
    """
    family = _family(config.backbone)
    model = _without_classifier(_create(config))
    if not config.class_token:
        _drop_class_token(model, config.backbone)
    if not config.final_norm:
        model.norm = nn.Identity()
    backbone = (
        ViTBackbone(model, num_relay, num_contexts) if family in _VIT_MODULES else SwinBackbone(model, num_contexts)
    )
    assert config.size is not None
    if any(n % s for n, s in zip(config.size, backbone.stride, strict=True)):
        raise InputError(
            "size", expected=f"multiples of {backbone.stride}, the stride of {config.backbone}", got=config.size
        )
    return backbone


def _family(name: str) -> str:
    """The module of timm that a model comes from."""
    require_package("timm", f"backbone {name}", package="timm", install="'muvit[relay]'")
    import timm

    architecture, _, tag = name.partition(".")
    known = timm.list_pretrained(f"{architecture}.*") if tag else timm.list_models()
    if name not in known:
        near = get_close_matches(name, known, n=3)
        raise InputError(
            "backbone",
            expected="the name of a model of timm",
            got=repr(name),
            hint=f"Did you mean {' or '.join(near)}?" if near else "",
        )
    family = timm.model_entrypoint(name).__module__.rpartition(".")[2]
    if family not in (*_VIT_MODULES, *_SWIN_MODULES):
        raise InputError(
            "backbone",
            expected="a Vision Transformer or Swin Transformer of timm, whose blocks take tokens",
            got=f"{name}, a model of timm's {family}",
        )
    return family


def _create(config: RelayConfig) -> Any:
    options: dict[str, Any] = {"in_chans": config.in_channels, "img_size": config.size, **config.timm_options}
    if config.drop_path is not None:
        options["drop_path_rate"] = config.drop_path
    if config.pretrained is False:
        return _timm_model(config.backbone, num_classes=0, **options)
    if config.pretrained is True:
        return _published(config.backbone, options)
    return _from_file(config.backbone, Path(config.pretrained), options)


def _timm_model(name: str, **options: Any) -> Any:
    import timm

    try:
        return timm.create_model(name, **options)
    except (AssertionError, AttributeError, TypeError, ValueError) as error:
        got = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"backbone {name}", expected="a size and options that timm's model takes", got=got) from error


def _published(name: str, options: dict[str, Any]) -> Any:
    # built with the classifier that it was published with, since timm then loads strictly
    try:
        return _timm_model(name, pretrained=True, **options)
    except (OSError, RuntimeError) as error:
        raise InputError(
            "pretrained",
            expected=f"weights that timm publishes for {name}, and a connection to them",
            got=_brief(error),
        ) from error


def _from_file(name: str, file: Path, options: dict[str, Any]) -> Any:
    import timm

    state = read_weights(file)
    published: Any = timm.get_pretrained_cfg(name)
    heads = [published.classifier] if isinstance(published.classifier, str) else [*(published.classifier or ())]
    # built with the classifier of the file, if there is one, so that all of it must fit
    classes = next((len(state[f"{key}.weight"]) for key in [*heads, "head"] if f"{key}.weight" in state), 0)
    first = state.get(f"{published.first_conv}.weight")
    channels = first.shape[1] if first is not None and first.ndim == 4 else published.input_size[0]
    source = {
        "state_dict": state,
        "num_classes": classes,
        "label_offset": 0,
        "input_size": (channels, *published.input_size[1:]),
        "custom_load": False,
    }
    try:
        model = _timm_model(name, pretrained=True, num_classes=classes, pretrained_cfg_overlay=source, **options)
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(file, expected=f"the weights of {name}", got=_brief(error)) from error
    del model.pretrained_cfg["state_dict"]  # a second copy of the weights
    return model


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, without unpickling anything but tensors.

    Raises:
        CheckpointError: there is no file, or it is damaged or holds something else.
    """
    from safetensors import SafetensorError
    from timm.models import load_state_dict

    if not file.is_file():
        raise CheckpointError(file, expected="a file with the backbone's weights, .safetensors or .pth", got="none")
    try:
        state = load_state_dict(str(file), weights_only=True)
    except (EOFError, LookupError, OSError, RuntimeError, SafetensorError, UnpicklingError, ValueError) as error:
        is_foreign = isinstance(error.__cause__ or error, UnpicklingError | LookupError)
        got = "a damaged file, or other objects, which are not unpickled" if is_foreign else _brief(error)
        raise CheckpointError(file, expected="tensors and nothing else", got=got) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()) or not state:
        raise CheckpointError(file, expected="tensors by name", got=type(state).__name__)
    return state


def _brief(error: Exception) -> str:
    """The first two lines of an error, in one."""
    text = " ".join(line.strip() for line in str(error).splitlines()[:2]) or type(error).__name__
    return (text if len(text) <= 200 else f"{text[:200]} ...").rstrip(".")


def _without_classifier(model: Any) -> Any:
    """Drop what only the classifier used, so that every parameter takes part in training."""
    model.reset_classifier(0)
    for name in ("fc_norm", "attn_pool"):
        if isinstance(getattr(model, name, None), nn.Module):
            setattr(model, name, nn.Identity() if name == "fc_norm" else None)
    return model


def _drop_class_token(model: Any, name: str) -> None:
    """Take the class token out of a Vision Transformer, with its row of the position table.

    Raises:
        InputError: it has none, or cannot do without it.
    """
    if getattr(model, "cls_token", None) is None or hasattr(model, "dist_token"):
        expected = "true, as only Vision Transformers with a class token and no distillation token can do without it"
        raise InputError("class_token", expected=expected, got=f"false for {name}")
    if model.pos_embed is not None and not model.no_embed_class:
        model.pos_embed = nn.Parameter(model.pos_embed.detach()[:, 1:])  # the class token stands first
    model.cls_token = None
    model.num_prefix_tokens -= 1
    for block in model.blocks:
        if hasattr(block.attn, "num_prefix_tokens"):  # rotary attention leaves that many tokens unrotated
            block.attn.num_prefix_tokens -= 1
