"""Model folders as release 0.1.0 wrote them."""

import re

import torch
import yaml

from muvit.encoders import MuViTEncoder2d, MuViTEncoder3d, MuViTEncoder4d
from muvit.mae import MuViTMAE2d, MuViTMAE3d, MuViTMAE4d

MAES = {2: MuViTMAE2d, 3: MuViTMAE3d, 4: MuViTMAE4d}
ENCODERS = {2: MuViTEncoder2d, 3: MuViTEncoder3d, 4: MuViTEncoder4d}
TINY = {"in_channels": 1, "levels": (1, 4), "patch_size": 4, "dim": 32, "num_layers": 2, "heads": 2}
BEHAVIOUR = {
    "patch_spacing": "corner",
    "decoder_context": "all",
    "loss_average": "token",
    "share_masking_draw": True,
}
NEW = {"level_embed_std", "rotary_param", "fixed_positions", "masking_alpha", *BEHAVIOUR}


def axis_sizes(head_dim, ndim):
    others = 2 * (head_dim // ndim // 2)
    return [(head_dim - others * (ndim - 1)) // 2, *[others // 2] * (ndim - 1)]


def old_names(state, ndim, head_dims, single=False):
    """The tensors of a model under the names, and in the pieces, in which release 0.1.0 kept them."""
    old = {}
    for name, tensor in state.items():
        name = name.replace(".attn.out.", ".attn.to_out.")
        name = re.sub(r"\.ff\.0\.", ".ff.ff.0.0.", name)
        name = re.sub(r"\.ff\.3\.", ".ff.ff.2.", name)
        if single:
            name = re.sub(r"^decoder\.0\.", "decoder.", name)
        if name.endswith("attn.qkv.weight"):
            old |= {name.replace("qkv", f"to_{part}"): t for part, t in zip("qkv", tensor.chunk(3), strict=True)}
        elif name.endswith("rotary_pos_embs.freq"):
            head_dim = head_dims["decoder" if name.startswith("decoder") else "encoder"]
            for axis, t in enumerate(tensor.split(axis_sizes(head_dim, ndim))):
                old[name.replace("freq", f"{axis}.inv_freq")] = t
        elif name.endswith("level_embed"):
            old[name] = tensor[:, None, None]
        else:
            old[name] = tensor
    return {name: t.clone() for name, t in old.items()}


def write_old(folder, model, head_dims, **changes):
    """Write a model as release 0.1.0 did: Python tuples in the YAML, the weights pickled."""
    folder.mkdir()
    config = {k: v for k, v in model._config.items() if k not in NEW} | changes
    (folder / "config.yaml").write_text(yaml.dump(config))
    single = config.get("decoder_mode") == "single"
    torch.save(old_names(model.state_dict(), model.ndim, head_dims, single), folder / "model.pth")
    return folder


def old_mae(folder, ndim=2, **changes):
    """A model that behaves as release 0.1.0 did, and its folder."""
    torch.manual_seed(0)
    model = MAES[ndim](**TINY | {"dim_decoder": 16} | BEHAVIOUR | changes).eval()
    return model, write_old(folder, model, {"encoder": 16, "decoder": 8})
