"""Modules that Diffusers does not compute with as they are.

`fuse_qkv_projections` lets attention compute with copies of its projections, and no longer read the projections.
`enable_layerwise_casting` casts the weights of a module before its forward pass, and back after it.
"""

from collections.abc import Iterator

from torch import nn

__all__ = ["UNREAD", "is_fused", "unread_projections", "untrainable"]

UNREAD = "projection of which attention reads a copy (fuse_qkv_projections); call unfuse_qkv_projections() first"
CAST = (
    "layer whose weights are cast in each forward pass (enable_layerwise_casting), so that no backward pass fits them; load "
    "the model anew without that"
)
COPIES = {  # name of a fused projection -> those of which it is a copy
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def is_fused(attention: nn.Module) -> bool:
    """Whether attention computes with fused copies now.

    Diffusers' older attention keeps its mark for good: there the processor says whether the copies are used.
    """
    if not attention.__dict__.get("fused_projections"):
        return False
    processor = type(getattr(attention, "processor", None)).__name__
    return hasattr(attention, "unfuse_projections") or processor.startswith("Fused")


def unread_projections(model: nn.Module) -> Iterator[nn.Module]:
    """The projections of which fused copies are used in their place."""
    for attention in filter(is_fused, model.modules()):
        for copied in (name for fused, names in COPIES.items() if fused in attention._modules for name in names):
            if (projection := attention._modules.get(copied)) is not None:
                yield projection


def untrainable(model: nn.Module) -> dict[int, str]:
    """The id of each module that cannot train -> what it is."""
    hooks = ((module, getattr(module.__dict__.get("_diffusers_hook"), "hooks", ())) for module in model.modules())
    found = {id(module): CAST for module, names in hooks if "layerwise_casting" in names}
    return found | {id(module): UNREAD for module in unread_projections(model)}
