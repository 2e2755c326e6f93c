"""Whether the parts of a pipeline compute with the weights that they hold, or with copies of them somewhere else."""

from collections.abc import Mapping

from torch import nn

from ..errors import SwitchError
from ..weights.diffusers_modules import is_fused

__all__ = ["check_own_weights"]


def check_own_weights(parts: Mapping[str, nn.Module]) -> None:
    """Raise SwitchError if a part of a pipeline computes with copies of its weights, where what is written has no effect.

    parts: name of a component -> the component.
    """
    for part, component in parts.items():
        below = [
            component
        ]  # a plain walk: every switch of a pipeline waits for it, and Module.modules() takes four times as long
        for module in below:
            known = module.__dict__
            below += [each for each in known["_modules"].values() if each is not None]  # a compiled one has no truth value
            if "_hf_hook" in known and any(parameter.is_meta for parameter in module.parameters()):
                raise SwitchError(
                    f"accelerate keeps weights of pipe.{part} outside of it (enable_sequential_cpu_offload, cpu_offload); call "
                    "pipe.remove_all_hooks() first, or use enable_model_cpu_offload, which moves it as a whole"
                )
            if is_fused(module):
                raise SwitchError(
                    f"pipe.{part} computes with copies of its projections (fuse_qkv_projections); call "
                    f"pipe.{part}.unfuse_qkv_projections() first"
                )
            if "_diffusers_hook" in known and _is_on_disk(module):
                raise SwitchError(
                    f"Diffusers reads weights of pipe.{part} from disk at each call (offload_to_disk_path); offload to memory "
                    "instead: leave offload_to_disk_path out"
                )


def _is_on_disk(module: nn.Module) -> bool:
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", {}).values()
    return any(getattr(getattr(hook, "group", None), "offload_to_disk_path", None) is not None for hook in hooks)
