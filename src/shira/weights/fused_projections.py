"""Diffusers' `fuse_qkv_projections`: attention computes with copies of its projections, and no longer reads the projections."""

from collections.abc import Iterator

from torch import nn

__all__ = ["UNREAD", "is_fused", "unread_projections"]

UNREAD = "projection of which attention reads a copy (fuse_qkv_projections); call unfuse_qkv_projections() first"
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
