import pytest

from muvit.errors import InputError
from muvit.models.classifier import Classifier, ClassifierConfig
from muvit.models.encoder import EncoderConfig
from muvit.models.hierarchy import RegionConfig, RegionEncoder
from muvit.models.mae import MAEConfig, MuViTMAE
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.size import check_size, count_parameters

ENCODER = EncoderConfig(in_channels=2, levels=(1, 4), dim=64, num_layers=3, heads=4)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (SegmenterConfig(encoder=ENCODER, num_classes=3, decoder_widths=(32, 16, 16, 8)), Segmenter),
        (SegmenterConfig(encoder=ENCODER, num_classes=3, decoder="mask2former", decoder_widths="slim"), Segmenter),
        (ClassifierConfig(encoder=ENCODER, num_classes=5), Classifier),
        (MAEConfig(encoder=ENCODER, dim_decoder=32), MuViTMAE),
        (RegionConfig(dim=60, num_layers=3, region_dim=24, region_layers=2), RegionEncoder),
    ],
)
def test_the_count_is_a_lower_bound_that_is_near_for_encoders(config, kind):
    real = sum(parameter.numel() for parameter in kind(config).parameters())
    assert count_parameters(config) <= real
    if not isinstance(config, SegmenterConfig | RegionConfig):  # whose convolutions, or wider blocks, are not counted
        assert count_parameters(config) > 0.9 * real


def test_a_model_beyond_all_machines_is_refused():
    check_size(ENCODER)
    with pytest.raises(InputError, match=r"model: expected a model of at most 50 billion parameters, got settings of"):
        check_size(EncoderConfig(in_channels=1, levels=(1,), dim=10**7))
