"""Which parameter of LeRobot's ACT is which of ours.

Both networks have the same parameters, weight matrices in the same layout: only names differ, and
the projection of image features, a 1x1 convolution there and a linear layer here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from act_lightning.nets.act import ACT

POSITIONS = "model.vae_encoder_pos_enc"
"""LeRobot keeps the CVAE encoder's fixed position table among its weights; ours is computed."""

# Longest first where one begins with the other.
PARTS = {
    "cvae_encoder.cls": "vae_encoder_cls_embed.weight",
    "cvae_encoder.qpos_proj.": "vae_encoder_robot_state_input_proj.",
    "cvae_encoder.action_proj.": "vae_encoder_action_input_proj.",
    "cvae_encoder.latent_head.": "vae_encoder_latent_output_proj.",
    "cvae_encoder.encoder.": "vae_encoder.",
    "obs_encoder.latent_proj.": "encoder_latent_input_proj.",
    "obs_encoder.qpos_proj.": "encoder_robot_state_input_proj.",
    "obs_encoder.env_state_proj.": "encoder_env_state_input_proj.",
    "obs_encoder.image_proj.": "encoder_img_feat_input_proj.",
    "obs_encoder.slot_positions": "encoder_1d_feature_pos_embed.weight",
    "obs_encoder.encoder.": "encoder.",
    "chunk_decoder.queries": "decoder_pos_embed.weight",
    "chunk_decoder.decoder.": "decoder.",
    "chunk_decoder.action_head.": "action_head.",
    "backbone.resnets.0.": "backbone.",
}
LAYER_PARTS = {
    "self_attention.in_proj.": "self_attn.in_proj_",
    "self_attention.": "self_attn.",
    "cross_attention.in_proj.": "multihead_attn.in_proj_",
    "cross_attention.": "multihead_attn.",
    "feed_forward.0.": "linear1.",
    "feed_forward.3.": "linear2.",
    "self_residual.norm.": "norm1.",
    "cross_residual.norm.": "norm2.",
}


def lerobot_name(name: str) -> str:
    """The name in LeRobot's `ACTPolicy` of the parameter or buffer `name` of our `ACT`.

    Raises:
        KeyError: LeRobot's ACT has no such parameter.
    """
    ours = next((part for part in PARTS if name.startswith(part)), None)
    if ours is None:
        raise KeyError(name)
    theirs = PARTS[ours] + name.removeprefix(ours)
    if ".layers." in theirs:
        # Encoder layers have two norms, decoder layers three.
        last_norm = "norm3." if theirs.startswith("decoder.") else "norm2."
        for ours, part in (LAYER_PARTS | {"feed_forward_residual.norm.": last_norm}).items():
            theirs = theirs.replace(ours, part)
    return f"model.{theirs}"


def network_names(net: ACT) -> dict[str, str]:
    """LeRobot's name of everything in the network's state_dict, normalisation apart.

    Raises:
        KeyError: LeRobot's ACT has no such parameter.
    """
    return {
        name: lerobot_name(name) for name in net.state_dict() if not name.startswith("normalizer.")
    }


def lerobot_shape(name: str, tensor: Tensor) -> tuple[int, ...]:
    """The shape that LeRobot gives to our tensor `name`."""
    is_convolution = name == "obs_encoder.image_proj.weight"
    return (*tensor.shape, 1, 1) if is_convolution else tuple(tensor.shape)


def to_lerobot(net: ACT) -> dict[str, Tensor]:
    """The network's weights as `model.safetensors` holds them, the position table apart."""
    state = net.state_dict()
    return {
        theirs: state[name].reshape(lerobot_shape(name, state[name])).contiguous()
        for name, theirs in network_names(net).items()
    }


def from_lerobot(net: ACT, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LeRobot's weights under our names and in our shapes, for `net.load_state_dict`.

    Args:
        net: of the sizes that LeRobot's config says.
        tensors: content of `model.safetensors`, normalisation and position table apart.

    Raises:
        ValueError: a tensor is missing, left over, or of another shape.
    """
    names = network_names(net)
    _refuse("lacks", sorted(set(names.values()) - set(tensors)))
    _refuse("holds, and this network has not,", sorted(set(tensors) - set(names.values())))
    state = net.state_dict()
    loaded = {}
    for name, theirs in names.items():
        found, expected = tuple(tensors[theirs].shape), lerobot_shape(name, state[name])
        if found != expected:
            raise ValueError(f"{theirs} has shape {found}, config.json says {expected}")
        loaded[name] = tensors[theirs].to(state[name].dtype).reshape(state[name].shape)
    return loaded


def _refuse(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise ValueError(f"it {what} {', '.join(names[:3])}{more}")
