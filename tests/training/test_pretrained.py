from dataclasses import replace

import pytest
import torch
from torch import nn

from muvit.data.synthetic.images import SyntheticConfig, write_synthetic
from muvit.errors import CheckpointError, InputError
from muvit.geometry import naive_boxes
from muvit.mae import MuViTMAE2d, MuViTMAE3d
from muvit.models.encoder import EncoderConfig
from muvit.models.folder import load_weights
from muvit.models.segmenter import Segmenter, SegmenterConfig
from muvit.models.trained import load_encoder
from muvit.training.fit import train_segmenter
from muvit.training.pretrained import add_lora, load_pretrained_encoder, merge_lora
from muvit.training.recipes import DataConfig, InitConfig, Recipe
from muvit.training.run_config import RunConfig

SIZES = {"in_channels": 1, "patch_size": 4, "dim": 16, "num_layers": 2, "heads": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A model of three levels, in the folder of a run."""
    torch.manual_seed(0)
    model = MuViTMAE2d(**SIZES, levels=(1, 4, 16), dim_decoder=16)
    run = tmp_path_factory.mktemp("pretrained")
    model.save(run / "best")
    return model, run


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, pretrained):
    folder = tmp_path_factory.mktemp("slides") / "set"
    write_synthetic(folder, num_train=1, num_val=1, num_test=1, config=SyntheticConfig.small(), workers=1)
    return Recipe(
        data=DataConfig(train=str(folder / "train"), crop_size=32, samples_per_epoch=8, batch_size=4, val=None),
        model=config(),
        run=RunConfig(epochs=1, accelerator="cpu", progress=False, save_every=1),
        init=InitConfig(encoder=str(pretrained[1])),
    )


def config(levels=(1, 4), **changes):
    encoder = EncoderConfig(**SIZES | {"levels": levels} | changes)
    return SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=(8, 8, 4), stem_width=4)


def segmenter(levels=(1, 4), **changes):
    torch.manual_seed(1)
    return Segmenter(config(levels, **changes)).eval()


def inputs(side=32, levels=(1, 4)):
    torch.manual_seed(2)
    return torch.rand(2, len(levels), 1, side, side), naive_boxes(levels, (side, side)).expand(2, -1, -1, -1) + 50


@pytest.mark.parametrize("levels", [(1, 4, 16), (1, 16), (4,)])
def test_a_segmenter_starts_from_the_levels_it_has(pretrained, levels):
    model = segmenter(levels)
    load_pretrained_encoder(model, InitConfig(encoder=str(pretrained[1])))
    img, bbox = inputs(levels=levels)
    expected = pretrained[0].encoder.extract_levels(levels).eval()(img, bbox)[0]
    assert torch.equal(model.encoder(img, bbox)[0], expected)
    assert all(p.requires_grad for p in model.encoder.parameters())


def test_encoders_come_from_any_kind_of_model(pretrained, tmp_path):
    mae, run = pretrained
    mae.encoder.save(tmp_path / "encoder")
    model = segmenter((1, 4, 16))
    load_pretrained_encoder(model, InitConfig(encoder=str(run)))
    model.save(tmp_path / "segmenter")
    for folder in (run, run / "best", tmp_path / "encoder", tmp_path / "segmenter"):
        encoder = load_encoder(folder)
        assert encoder.config == mae.config.encoder
        for name, tensor in mae.encoder.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], tensor)
    flat = segmenter((1, 4, 16))
    volumes = MuViTMAE3d(**SIZES | {"levels": (1, 4, 16), "dim": 48}, dim_decoder=48)
    volumes.save(tmp_path / "volumes")
    with pytest.raises(InputError, match=r"model\.encoder\.ndim: expected 3, as the encoder in .* has, got 2"):
        load_pretrained_encoder(flat, InitConfig(encoder=str(tmp_path / "volumes")))


def test_a_frozen_encoder_neither_learns_nor_drops_out(recipe, pretrained, tmp_path):
    frozen = replace(recipe, init=replace(recipe.init, mode="frozen"), model=config(dropout=0.5))
    model = Segmenter.from_folder(train_segmenter(frozen, tmp_path / "run"))
    for name, tensor in pretrained[0].encoder.extract_levels((1, 4)).state_dict().items():
        assert torch.equal(model.encoder.state_dict()[name], tensor)
    fresh = segmenter(dropout=0.5)
    assert not torch.equal(model.head.weight, fresh.head.weight)


def test_a_whole_encoder_learns(recipe, pretrained, tmp_path):
    model = Segmenter.from_folder(train_segmenter(recipe, tmp_path / "run"))
    before = pretrained[0].encoder.extract_levels((1, 4)).state_dict()
    moved = {name for name, tensor in model.encoder.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(before)


def test_low_rank_additions_learn_and_are_merged_into_plain_weights(recipe, pretrained, tmp_path):
    lora = replace(recipe, init=replace(recipe.init, mode="lora", lora_rank=2))
    folder = train_segmenter(lora, tmp_path / "run")
    assert set(load_weights(folder)) == set(segmenter().state_dict())
    before = pretrained[0].encoder.extract_levels((1, 4)).state_dict()
    after = Segmenter.from_folder(folder).encoder.state_dict()
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    matrices = ("attn.qkv.weight", "attn.out.weight", "ff.0.weight", "ff.3.weight")
    assert moved == {f"layers.{i}.{name}" for i in range(2) for name in matrices}
    for name in moved:
        assert torch.linalg.matrix_rank(after[name] - before[name], rtol=1e-3) <= 2


def test_merging_changes_no_output(pretrained):
    model = segmenter()
    load_pretrained_encoder(model, InitConfig(encoder=str(pretrained[1]), mode="lora", lora_rank=4))
    trainable = {name for name, p in model.encoder.named_parameters() if p.requires_grad}
    assert len(trainable) == 2 * 4 * 2 and all("lora_" in name for name in trainable)
    assert all(p.requires_grad for p in model.trunk.parameters())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    img, bbox = inputs()
    plain = merge_lora(model).eval()
    torch.testing.assert_close(plain(img, bbox), model.eval()(img, bbox), atol=1e-4, rtol=1e-4)
    assert not any("lora" in name for name in plain.state_dict())
    assert any("lora" in name for name in model.state_dict())
    assert merge_lora(plain) is plain


def test_a_resumed_run_with_additions_ends_in_the_same_bits(recipe, tmp_path):
    from lightning import Callback

    class PowerFailure(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                raise RuntimeError("power failure")

    lora = replace(recipe, init=replace(recipe.init, mode="lora"), run=replace(recipe.run, epochs=2))
    train_segmenter(lora, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="power failure"):
        train_segmenter(lora, tmp_path / "parts", callbacks=[PowerFailure()])
    train_segmenter(lora, tmp_path / "parts", resume=True)
    for file in (tmp_path / "whole" / "last").iterdir():
        assert (tmp_path / "parts" / "last" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dim": 32}, "model.encoder.dim: expected 16, as the encoder in .* has, got 32"),
        ({"num_layers": 3}, "model.encoder.num_layers"),
        ({"heads": 4}, "model.encoder.heads"),
        ({"patch_size": 2}, "model.encoder.patch_size"),
        ({"in_channels": 3}, "model.encoder.in_channels"),
        ({"rotary_mode": "none"}, "model.encoder.rotary_mode"),
        ({"use_level_embed": False}, "model.encoder.use_level_embed"),
        ({"patch_spacing": "corner"}, "model.encoder.patch_spacing"),
        ({"levels": (1, 8)}, "Level 8 not found"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_sentence(pretrained, changes, message):
    encoder = EncoderConfig(**SIZES | {"levels": (1, 4)} | changes)
    widths = (8,) * (2 if "patch_size" in changes else 3)
    model = Segmenter(SegmenterConfig(encoder=encoder, num_classes=3, decoder_widths=widths, stem_width=4))
    with pytest.raises(InputError, match=message):
        load_pretrained_encoder(model, InitConfig(encoder=str(pretrained[1])))


def test_attention_copies_and_dropout_may_differ_from_pretraining(pretrained, tmp_path):
    model = segmenter(attention_mode="coarse_to_fine", coarse_copies="under", dropout=0.2)
    load_pretrained_encoder(model, InitConfig(encoder=str(pretrained[1])))
    assert model.encoder.config.attention_mode == "coarse_to_fine"
    assert torch.equal(model.encoder.copies.vector, torch.zeros(16))
    with torch.no_grad():
        model.encoder.copies.vector.fill_(3)
    model.save(tmp_path / "copies")
    plain, other = segmenter(), segmenter(attention_mode="coarse_to_fine", coarse_copies="ring")
    for start in (plain, other):
        load_pretrained_encoder(start, InitConfig(encoder=str(tmp_path / "copies")))
    assert torch.equal(plain.encoder.proj[0][0].weight, model.encoder.proj[0][0].weight)
    assert torch.equal(other.encoder.copies.vector, model.encoder.copies.vector)


def test_a_missing_encoder_is_refused_before_anything_is_written(recipe, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        train_segmenter(replace(recipe, init=InitConfig(encoder="nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_its_package_lora_is_refused(monkeypatch):
    monkeypatch.setattr("muvit.errors.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'muvit\[lora\]'"):
        add_lora(nn.Linear(2, 2), 2, 4)


@pytest.mark.parametrize("wrong", [{"mode": "half"}, {"lora_rank": 0}, {"lora_alpha": -1}])
def test_settings_that_do_not_fit_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        InitConfig(encoder="somewhere", **wrong)


def test_volumes_have_their_own_encoder(tmp_path):
    MuViTMAE3d(in_channels=1, levels=(1, 4), patch_size=4, dim=16, num_layers=1, heads=2, dim_decoder=16).save(
        tmp_path / "mae"
    )
    assert load_encoder(tmp_path / "mae").config.ndim == 3
