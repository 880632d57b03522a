"""Least size of a model, from its settings alone: what no machine could hold is refused before memory is touched."""

from itertools import pairwise
from math import prod

from muvit.errors import InputError
from muvit.models.baselines import BaselineConfig
from muvit.models.classifier import ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.hierarchy import RegionConfig
from muvit.models.mae import MAEConfig
from muvit.models.relay.config import RelayConfig
from muvit.models.segmenter import SegmenterConfig

MAX_PARAMETERS = 50_000_000_000
"""About 100 times the largest model of the field."""

ModelConfig = (
    EncoderConfig | MAEConfig | SegmenterConfig | ClassifierConfig | BaselineConfig | RelayConfig | RegionConfig
)


def count_parameters(config: ModelConfig) -> int:
    """Lower bound of the number of parameters: the matrices, without biases, norms and what a library adds."""
    match config:
        case EncoderConfig():
            embedding = (config.in_channels or 1) * prod(config.patch) + len(config.levels)
            return _blocks(config.num_layers, config.dim) + config.dim * embedding
        case MAEConfig():
            encoder = config.encoder
            decoders = 1 if config.decoder_mode == "single" else len(encoder.levels)
            width = config.dim_decoder or encoder.dim
            pixels = (encoder.in_channels or 1) * prod(encoder.patch)
            decoder = _blocks(config.num_layers_decoder, width) + width * pixels
            return count_parameters(encoder) + decoders * decoder
        case SegmenterConfig():
            widths = config.widths
            stages = sum(a * b for a, b in pairwise(widths)) + widths[-1] * (config.num_classes or 0)
            queries = config.num_queries * widths[0] + _blocks(config.query_layers, widths[0])
            is_query = config.decoder == "mask2former"
            return count_parameters(config.encoder) + stages + (queries if is_query else 0) + (config.stem_width or 0)
        case ClassifierConfig():
            return count_parameters(config.encoder) + config.encoder.dim * (config.num_classes or 0)
        case BaselineConfig():
            return 9 * (config.width or 0) ** 2 + (config.num_classes or 0)
        case RelayConfig():
            widths = config.decoder_widths if isinstance(config.decoder_widths, tuple) else ()
            stages = sum(a * b for a, b in pairwise(widths))
            return stages + config.relay_tokens + config.num_queries + (config.num_classes or 0)
        case RegionConfig():
            tokens = config.dim * (config.patch_size // config.token_size) ** 2
            patch = _blocks(config.num_layers, config.dim) + config.dim * config.token_size**2 * config.in_channels
            region = _blocks(config.region_layers, config.region_dim) + config.region_dim * config.grid**2
            return tokens + patch + region


def check_size(config: ModelConfig, subject: str = "model") -> None:
    """Refuse settings of a model that no machine can hold.

    Raises:
        InputError: it has more than `MAX_PARAMETERS` parameters.
    """
    count = count_parameters(config)
    if count > MAX_PARAMETERS:
        expected = f"a model of at most {MAX_PARAMETERS / 1e9:g} billion parameters"
        raise InputError(subject, expected=expected, got=f"settings of about {count:.1e}")


def _blocks(num_layers: int, dim: int) -> int:
    """Parameters of transformer blocks: four square matrices of attention, two of the feed-forward network."""
    return 8 * num_layers * dim**2
