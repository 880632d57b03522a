from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_encoders import LEVELS, nested_boxes, scene, tiny
from torch.nn.functional import gelu, layer_norm
from torch.utils.flop_counter import FlopCounterMode

from muvit.errors import CheckpointError, InputError, MuViTError, ShapeError
from muvit.geometry import naive_boxes, shift_boxes
from muvit.models.classifier import Classifier
from muvit.models.encoder import EncoderConfig, MuViTEncoder


@pytest.fixture(scope="module")
def sample():
    torch.manual_seed(1)
    return torch.randn(2, 2, 2, 16, 16), nested_boxes()


def count(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "channels, levels, expected", [(1, (1,), 25_244_032), (1, (1, 8, 32), 25_313_664), (3, (1, 8), 25_409_920)]
)
def test_the_paper_encoder_has_its_number_of_parameters(channels, levels, expected):
    assert count(MuViTEncoder(EncoderConfig(in_channels=channels, levels=levels))) == expected


def test_the_defaults_are_the_papers():
    config = EncoderConfig(in_channels=1, levels=(1,))
    assert (config.patch, config.dim, config.num_layers, config.heads) == ((8, 8), 512, 12, 8)
    assert (config.attention_mode, config.rotary_mode, config.rotary_param) == ("all", "per_layer", "freq")
    assert (config.rotary_base, config.patch_spacing, config.dropout) == (10000, "center", 0)


def test_forward_follows_the_equations(sample):
    encoder, (img, bbox) = tiny(), sample
    tokens, places = [], []
    for level in range(2):
        proj, norm = encoder.proj[level]
        lower, upper = bbox[:, level, 0], bbox[:, level, 1]
        for i in range(4):
            for j in range(4):
                block = img[:, level, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4]
                flat = block.permute(0, 2, 3, 1).flatten(1)  # row, column, channel
                embedded = layer_norm(flat @ proj.weight.T + proj.bias, (32,), norm.weight, norm.bias)
                tokens.append(embedded + encoder.level_embed[level])
                places.append(lower + torch.tensor([(i + 0.5) / 4, (j + 0.5) / 4]) * (upper - lower))
    z, p = torch.stack(tokens, 1), torch.stack(places, 1)
    seen = []
    for block in encoder.layers:
        y = layer_norm(z, (32,), block.norm1.weight, block.norm1.bias)
        heads = []
        for head in range(2):
            q, k, v = (y @ w[16 * head : 16 * head + 16].T for w in block.attn.qkv.weight.chunk(3))
            theta = torch.cat(
                [p[..., :1] * block.rotary_pos_embs.freq[:4], p[..., 1:] * block.rotary_pos_embs.freq[4:]], -1
            )
            q, k = (
                torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (8, 2))) * torch.exp(1j * theta)).flatten(-2)
                for t in (q, k)
            )
            heads.append((q @ k.mT / 4).softmax(-1) @ v)
        h = z + torch.cat(heads, -1) @ block.attn.out.weight.T
        ff = block.ff
        y = layer_norm(h, (32,), block.norm2.weight, block.norm2.bias)
        z = h + gelu(y @ ff[0].weight.T + ff[0].bias) @ ff[3].weight.T + ff[3].bias
        seen.append(z)
    out, coords, level_index, kept = encoder(img, bbox, return_intermediate_idxs=(0, 2))
    torch.testing.assert_close(coords, p)
    torch.testing.assert_close(out, z, rtol=0, atol=1e-4)
    assert level_index.tolist() == [[0] * 16 + [1] * 16] * 2
    for got, expected in zip(kept, (seen[0], seen[2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    assert torch.equal(kept[-1], out)


def test_intermediate_outputs_come_only_when_asked_for(sample):
    encoder = tiny()
    assert len(encoder(*sample)) == 3
    assert encoder(*sample, return_intermediate_idxs=())[3] == ()


@settings(max_examples=20)
@given(st.tuples(*[st.integers(-1_000_000, 1_000_000)] * 2))
def test_shifting_all_boxes_alike_changes_nothing(offset):
    encoder, boxes = tiny(rotary_base=100), nested_boxes()
    img = torch.randn(2, 2, 2, 16, 16)
    with torch.no_grad():
        here = encoder(img, boxes)[0]
        there = encoder(img, shift_boxes(boxes, torch.tensor(offset).float()))[0]
    torch.testing.assert_close(there, here, rtol=0, atol=1e-4)


def test_far_from_the_origin_attention_is_exactly_that_at_the_origin(sample):
    encoder, (img, bbox) = tiny(), sample
    assert bbox.dtype == torch.float32
    far = shift_boxes(bbox, torch.tensor([1_000_000.0, 999_999.0]))
    assert torch.equal(encoder.place(img, far)[1], encoder.place(img, bbox)[1])
    assert torch.equal(encoder(img, far)[0], encoder(img, bbox)[0])
    assert torch.equal(encoder(img, far)[1], encoder(img, bbox)[1] + torch.tensor([1_000_000.0, 999_999.0]))


@pytest.mark.parametrize("level", [0, 1])
def test_shifting_one_level_changes_the_tokens_of_all(sample, level):
    encoder, (img, bbox) = tiny(), sample
    moved = bbox.clone()
    moved[:, level] += 10
    change = (encoder(img, moved)[0] - encoder(img, bbox)[0]).abs().amax(-1)
    assert (change > 1e-3).all()


def test_without_boxes_the_naive_ones_hold(sample):
    encoder, img = tiny(), sample[0]
    boxes = naive_boxes((1, 4), (16, 16)).expand(2, -1, -1, -1)
    assert boxes[0].tolist() == [[[-8, -8], [8, 8]], [[-32, -32], [32, 32]]]
    torch.testing.assert_close(encoder(img)[0], encoder(img, boxes)[0], rtol=0, atol=1e-5)
    assert torch.equal(encoder(img)[1], encoder(img, boxes)[1])
    assert not torch.allclose(encoder(img)[0], encoder(img, sample[1])[0], atol=1e-2)


def test_fixed_positions_know_places_in_a_view_and_pixel_sizes_but_not_the_world(sample):
    img, bbox = sample
    moved = bbox.clone()
    moved[:, 1] += torch.tensor([10.0, -7.0])
    wide = bbox.clone()
    wide[:, 0, 1] += 8  # pixels of 1.5 world pixels instead of 1
    for kind, sees_size in (("grid", False), ("scaled", True)):
        encoder = tiny(fixed_positions=kind, rotary_mode="none")
        here = encoder(img, bbox)[0]
        assert torch.equal(encoder(img, moved)[0], here)
        assert torch.allclose(encoder(img, wide)[0], here, atol=1e-4) != sees_size
        torch.testing.assert_close(encoder(img)[0], here)
        corner = torch.tensor([2.0, 2.0])
        fine, coarse = encoder.offsets(img, bbox).unflatten(1, (2, 16)).unbind(1)
        assert torch.equal(fine[0, 0], corner) and torch.equal(coarse, (4 if sees_size else 1) * fine)
        # the tokens without, plus cos and sin of places, in patches of 4 px
        omega = 10000 ** (-2 * torch.arange(8) / 16)
        theta = torch.cat([fine[0, :, axis, None] / 4 * omega for axis in (0, 1)], dim=1)
        expected = torch.stack([theta.cos(), theta.sin()], dim=2).flatten(1)
        patches = encoder.patches(img)
        gain = encoder.embed(patches, encoder.offsets(img, bbox))[:, :16] - encoder.embed_level(0, patches[:, 0])
        torch.testing.assert_close(gain, expected.expand(2, -1, -1), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="fixed_positions: expected none, got grid with attention_mode coarse_to_fine"):
        tiny(fixed_positions="grid", attention_mode="coarse_to_fine")


def test_permuting_the_samples_permutes_the_output(sample):
    encoder, (img, bbox) = tiny(), sample
    straight, swapped = encoder(img, bbox)[0], encoder(img.flip(0), bbox.flip(0))[0]
    torch.testing.assert_close(swapped, straight.flip(0))
    assert not torch.allclose(straight, straight.flip(0), atol=0.1)


def test_features_are_the_tokens_laid_out_as_maps(sample):
    encoder, (img, bbox) = tiny(patch_size=(4, 8)), sample
    tokens, maps = encoder(img, bbox)[0], encoder.compute_features(img, bbox)
    assert maps.shape == (2, 2, 32, 4, 2)
    for n in range(16):
        level, row, column = n // 8, n % 8 // 2, n % 2
        assert torch.equal(maps[:, level, :, row, column], tokens[:, n])


@pytest.mark.parametrize("mode", ["all", "causal", "same", "random", "coarse_to_fine", "copies"])
def test_the_finest_tokens_alone_are_those_of_the_whole(mode):
    encoder, img, bbox = scene(**{"coarse_copies": "under"} if mode == "copies" else {"attention_mode": mode})
    torch.manual_seed(2)
    expected = encoder(img, bbox, return_intermediate_idxs=(0, 2))[3]
    torch.manual_seed(2)
    finest = encoder.encode(img, bbox, (0, 2), only_finest=True)
    assert torch.equal(finest.tokens, finest.kept[-1])
    assert torch.equal(finest.positions, encoder.place(img, bbox)[1])
    for got, whole in zip(finest.kept, expected, strict=True):
        assert got.shape == (2, 16, 32)
        torch.testing.assert_close(got, whole[:, :16], rtol=0, atol=1e-5)


def test_the_last_block_computes_only_the_finest_tokens():
    encoder, img, bbox = scene(num_layers=1, attention_mode="all")

    def flops(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    batch, tokens, finest, dim = 2, 48, 16, 32
    embed = 2 * batch * tokens * 4 * 4 * 2 * dim
    # queries, keys, values, output and the two-fold feed-forward network; products with keys and values
    own, keys = 2 * batch * (1 + 1 + 4) * dim**2, 2 * batch * 2 * dim**2
    assert flops(lambda: encoder(img, bbox)) == embed + tokens * (own + keys + 4 * batch * tokens * dim)
    assert flops(lambda: encoder.encode(img, bbox, only_finest=True)) == (
        embed + tokens * keys + finest * (own + 4 * batch * tokens * dim)
    )


@pytest.mark.parametrize("ndim", [2, 3, 4])
def test_one_implementation_serves_every_dimensionality(ndim):
    encoder = tiny(rotary_base=100, ndim=ndim)
    img, boxes = torch.randn(1, 2, 2, *(8,) * ndim), nested_boxes(side=8, batch=1, ndim=ndim)
    tokens, coords, _ = encoder(img, boxes)
    assert tokens.shape == (1, 2 * 2**ndim, 32)
    # patches of 4 pixels: centres 2 and 6 pixels from the lower corner, at levels 1 and 4
    assert coords[0, 0].tolist() == [2.0] * ndim
    assert coords[0, -1].tolist() == [-8 + 6 * 4.0] * ndim
    assert encoder.compute_features(img, boxes).shape == (1, 2, 32, *(2,) * ndim)
    for axis in range(ndim):
        moved = boxes.clone()
        moved[:, 1, :, axis] += 5
        assert not torch.allclose(encoder(img, moved)[0], tokens, atol=1e-3)


def test_a_volume_may_have_another_patch_along_z():
    encoder = tiny(patch_size=(2, 4, 4), ndim=3)
    assert encoder.compute_features(torch.randn(1, 2, 2, 4, 8, 8)).shape == (1, 2, 32, 2, 2, 2)


def test_corner_spacing_reaches_from_corner_to_corner(sample):
    img, bbox = sample
    coords = tiny(patch_spacing="corner").place(img, bbox)[0]
    assert coords[1, 0].tolist() == bbox[1, 0, 0].tolist()
    assert coords[1, 15].tolist() == bbox[1, 0, 1].tolist()
    assert coords[1, -1].tolist() == bbox[1, 1, 1].tolist()
    single = tiny(patch_spacing="corner", patch_size=16).place(img, bbox)[0]
    assert torch.equal(single, bbox[..., 0, :])
    # without boxes, it reaches from the first to the last pixel centre
    naive = tiny(patch_spacing="corner").place(img)[0]
    assert naive[0, [0, 15, 16, 31]].tolist() == [[-7.5, -7.5], [7.5, 7.5], [-30, -30], [30, 30]]


def test_extracting_all_levels_gives_the_same_model(sample):
    encoder = tiny()
    assert encoder.extract_levels((1, 4), copy=False) is encoder
    other = encoder.extract_levels((1, 4))
    assert other is not encoder
    assert torch.equal(other(*sample)[0], encoder(*sample)[0])


def test_an_extracted_encoder_keeps_its_levels_embeddings_and_all_blocks(sample):
    img, bbox = sample
    encoder = tiny(levels=(1, 2, 4))
    one = encoder.extract_levels([4])
    assert one.levels == one.config.levels == (4,)
    assert torch.equal(one.level_embed[0], encoder.level_embed[2])
    assert torch.equal(one.proj[0][0].weight, encoder.proj[2][0].weight)
    assert torch.equal(one.proj[0][1].weight, encoder.proj[2][1].weight)
    assert one.layers.state_dict().keys() == encoder.layers.state_dict().keys()
    assert torch.equal(one.embed(one.patches(img[:, :1])), encoder.embed(encoder.patches(img[:, [0, 1, 0]]))[:, 32:])
    swapped = encoder.extract_levels([4, 1])
    torch.testing.assert_close(
        swapped(img, bbox.flip(1))[0][:, 16:],
        encoder.extract_levels([1, 4])(img.flip(1), bbox)[0][:, :16],
        rtol=0,
        atol=1e-4,
    )
    with torch.no_grad():
        one.level_embed.zero_()
    assert encoder.level_embed[2].abs().sum() > 0


def test_a_level_that_is_not_there_cannot_be_extracted():
    with pytest.raises(InputError, match=r"Level 8 not found: expected levels out of \(1, 4\), got \(1, 8\)"):
        tiny().extract_levels([1, 8])


@pytest.mark.parametrize(
    "mode, reached", [("all", [0, 1, 2]), ("causal", [1, 2]), ("same", [1]), ("coarse_to_fine", [0, 1])]
)
def test_attention_modes_say_which_levels_a_level_reaches(mode, reached):
    encoder, boxes = tiny(levels=(1, 2, 4), attention_mode=mode), nested_boxes((1, 2, 4), batch=1)
    img = torch.randn(1, 3, 2, 16, 16)
    other = img.clone()
    other[:, 1] += 1
    change = (encoder(other, boxes)[0] - encoder(img, boxes)[0]).abs().reshape(3, -1).amax(-1)
    assert [level for level in range(3) if change[level] > 1e-4] == reached
    assert all(change[level] == 0 for level in range(3) if level not in reached)


@torch.no_grad()
def test_copies_learn_the_detail_that_their_originals_must_not():
    encoder, img, bbox = scene(coarse_copies="under")
    without = scene()[0]
    without.load_state_dict(encoder.state_dict(), strict=False)
    before, other = encoder(img, bbox)[0], img.clone()
    other[:, 0] += 1
    assert torch.equal(encoder(other, bbox)[0][:, 16:], before[:, 16:])
    change = (before - without(img, bbox)[0]).abs()
    assert change[:, 16:].max() < 1e-5 and change[:, :16].max() > 1e-2
    # copied are the patches that the finest view meets, and few others
    copied = torch.zeros(2, 48, dtype=torch.bool).scatter(1, encoder.copied_tokens(img, bbox), True)
    assert 0 < copied.sum() < 2 * 32 and not copied[:, :16].any()
    centers, (lower, upper) = encoder.place(img, bbox)[0], bbox[:, 0, :, None].unbind(1)
    half = 2 * torch.tensor(LEVELS).repeat_interleave(16)[:, None]
    meets = ((centers + half > lower) & (centers - half < upper)).all(-1)
    assert copied[:, 16:][meets[:, 16:]].all()


def test_copies_lie_at_their_places_under_naive_boxes_too(sample):
    encoder = tiny(attention_mode="coarse_to_fine", coarse_copies="under")
    copied = encoder.copied_tokens(sample[0], encoder.boxes(sample[0], None))
    assert copied.tolist() == 2 * [[16 + 4 * y + x for y in (1, 2) for x in (1, 2)]]


def test_copies_stay_with_coarse_levels():
    encoder = scene(coarse_copies="ring")[0]
    two, one = encoder.extract_levels((1, 4)), encoder.extract_levels((4,))
    assert torch.equal(two.copies.vector, encoder.copies.vector)
    assert one.copies is None and "copies.vector" not in MuViTEncoder(one.config).state_dict()


def test_the_random_mode_draws_anew(sample):
    encoder = tiny(attention_mode="random")
    first, second = encoder(*sample)[0], encoder(*sample)[0]
    assert not torch.allclose(first, second, atol=1e-2)
    torch.manual_seed(3)
    third = encoder(*sample)[0]
    torch.manual_seed(3)
    assert torch.equal(encoder(*sample)[0], third)


def test_rotary_modes_own_the_frequencies_that_they_name(sample):
    free = {
        name: count(tiny(rotary_mode=name)) - count(tiny(rotary_mode="none"))
        for name in ("fixed", "shared", "per_layer")
    }
    assert free == {"fixed": 0, "shared": 8, "per_layer": 3 * 8}
    assert count(tiny(rotary_param="base")) - count(tiny(rotary_mode="none")) == 3 * 2
    # at first they all rotate alike
    reference = tiny()
    for changes in ({"rotary_mode": "fixed"}, {"rotary_mode": "shared"}, {"rotary_param": "base"}):
        other = tiny(**changes)
        torch.testing.assert_close(other(*sample)[0], reference(*sample)[0], rtol=0, atol=1e-4)
    shared = tiny(rotary_mode="shared")
    assert len({id(block.rotary_pos_embs) for block in shared.layers}) == 1


def test_without_rotation_positions_do_not_matter(sample):
    encoder, (img, bbox) = tiny(rotary_mode="none"), sample
    assert torch.equal(encoder(img, bbox)[0], encoder(img)[0])


def test_every_parameter_learns(sample):
    encoder = tiny()
    encoder(*sample)[0].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_level_vectors_have_the_spread_that_was_asked_for():
    wide, narrow = (tiny(dim=512, level_embed_std=s).level_embed.std().item() for s in (1.0, 0.02))
    assert wide == pytest.approx(1, rel=0.1)
    assert narrow == pytest.approx(0.02, rel=0.1)
    assert tiny(use_level_embed=False).level_embed is None


def test_autocast_keeps_the_positions_exact(sample):
    img, bbox = sample
    with torch.autocast("cpu", torch.bfloat16):
        rotation = tiny().layers[0].rotation(tiny().place(img, shift_boxes(bbox, torch.tensor([65_537.0, 3.0])))[1])
    exact = tiny().layers[0].rotation(tiny().place(img, bbox)[1])
    assert rotation.dtype == torch.float32
    assert torch.equal(rotation, exact)


@pytest.mark.parametrize(
    "img_shape, bbox_shape, message",
    [
        ((2, 2, 3, 16, 16), None, r"img: expected shape \(B, L=2, C=2, y, x\), got \(2, 2, 3, 16, 16\)"),
        ((2, 3, 2, 16, 16), None, "L=2, C=2"),
        ((2, 2, 2, 4, 16, 16), None, "L=2, C=2"),
        ((2, 2, 2, 16, 18), None, r"multiples of the patch \(4, 4\), got \(16, 18\)"),
        (
            (2, 2, 2, 16, 16),
            (2, 1, 2, 2),
            r"bbox: expected shape \(B, L, 2, ndim\) = \(2, 2, 2, 2\), got \(2, 1, 2, 2\)",
        ),
        ((2, 2, 2, 16, 16), (1, 2, 2, 2), "got .1, 2, 2, 2."),
        ((2, 2, 2, 16, 16), (2, 2, 2, 3), "got .2, 2, 2, 3."),
    ],
)
def test_shapes_that_do_not_fit_are_refused(img_shape, bbox_shape, message):
    with pytest.raises(ShapeError, match=message):
        tiny()(torch.zeros(img_shape), None if bbox_shape is None else torch.zeros(bbox_shape))


@pytest.mark.parametrize(
    "field, value",
    [
        ("in_channels", 0),
        ("num_layers", 0),
        ("dim", 0),
        ("dim", 33),
        ("heads", 0),
        ("heads", 16),
        ("levels", ()),
        ("levels", (1, 1)),
        ("levels", (0, 4)),
        ("patch_size", 0),
        ("patch_size", (4, 4, 4)),
        ("rotary_mode", "sometimes"),
        ("rotary_param", "phase"),
        ("rotary_base", 0),
        ("patch_spacing", "middle"),
        ("attention_mode", "backwards"),
        ("coarse_copies", "over"),
        ("coarse_copies", "under"),  # of full attention
        ("ndim", 5),
        ("rotary_base", float("inf")),
        ("rotary_base", (64.0, 8.0)),
        ("rotary_base", (0.0, 8.0)),
        ("level_embed_std", -1.0),
        ("dropout", 1.5),
    ],
)
def test_settings_that_do_not_fit_are_refused(field, value):
    with pytest.raises(MuViTError):
        tiny(**{field: value})


def test_a_saved_encoder_comes_back_equal(sample, tmp_path):
    encoder = tiny(rotary_mode="shared", rotary_base=(8.0, 128.0))
    encoder.save(tmp_path / "model")
    back = MuViTEncoder.from_folder(tmp_path / "model")
    assert asdict(back.config) == asdict(encoder.config)
    assert torch.equal(back(*sample)[0], encoder(*sample)[0])
    with pytest.raises(CheckpointError, match="expected a model of kind classifier, got one of kind encoder"):
        Classifier.from_folder(tmp_path / "model")
