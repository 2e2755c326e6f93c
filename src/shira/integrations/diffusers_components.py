"""Which modules of a Diffusers pipeline adapters may change, and which of them the tensors of an adapter belong to.

present: in all functions, name -> module of the components that the pipeline has now.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import AdapterError, BaseMismatch, did_you_mean
from ..texts import shown
from ..weights.model_tensors import named_tensors, unwrapped

__all__ = ["COMPONENTS", "DENOISERS", "check_component", "check_parts", "fitting", "prefix_of", "present_in", "tensors_of"]

DENOISERS = ("unet", "transformer")
COMPONENTS = (*DENOISERS, "text_encoder", "text_encoder_2", "text_encoder_3")


def present_in(pipe: Any) -> dict[str, nn.Module]:
    """The components that a pipeline has now, without wrappers of torch.compile."""
    found = {name: getattr(pipe, name, None) for name in COMPONENTS}
    return {name: unwrapped(module) for name, module in found.items() if isinstance(module, nn.Module)}


def tensors_of(component: str | None, present: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of a component, by default of the denoiser."""
    wanted = (present[each] for each in (component, *DENOISERS) if each is not None and each in present)
    return named_tensors(next(wanted, next(iter(present.values()))))


def prefix_of(label: str, tensors: Iterable[str], component: str | None, present: Mapping[str, nn.Module]) -> str:
    """What to put before the names of an adapter's tensors, so that each begins with a component; "" if they do.

    label: of the adapter, for messages. Raises AdapterError, or BaseMismatch if it changes a component that is not there.
    """
    if component is not None:
        check_component(component, present)
        return f"{component}."
    first = {name.partition(".")[0] for name in tensors}
    if first.isdisjoint(COMPONENTS):
        denoiser = next((each for each in DENOISERS if each in present), None)
        if denoiser is None:
            raise AdapterError(f"{label}: the pipeline has no {' or '.join(DENOISERS)}; say component={next(iter(present))!r}")
        return f"{denoiser}."
    for each in sorted(first - present.keys()):
        if each in COMPONENTS:
            raise BaseMismatch(f"{label} does not belong to this pipeline: it changes {each!r}; here are {_listed(present)}")
        raise AdapterError(f"{label}: {each!r} is not a component, and other names begin with one; expected {_listed(present)}")
    return ""


def fitting(tensors: Iterable[str], present: Mapping[str, nn.Module]) -> str | None:
    """The first component that has all tensors of these plain names, None if none has."""
    return next((name for name, part in present.items() if set(tensors) <= named_tensors(part).keys()), None)


def check_component(component: str, present: Mapping[str, nn.Module]) -> None:
    """Raise AdapterError if the pipeline has no such component."""
    if not isinstance(component, str) or component not in present:
        raise AdapterError(f"the pipeline has no component {shown(component)}; {did_you_mean(str(component), present)}")


def check_parts(name: str, tensors: Iterable[str], present: Mapping[str, nn.Module]) -> None:
    """Raise BaseMismatch if an adapter changes a component that the pipeline does not have any more."""
    gone = next((part for tensor in tensors if (part := tensor.partition(".")[0]) not in present), None)
    if gone is not None:
        raise BaseMismatch(f"{name!r} changes {gone!r}, which the pipeline does not have now; found {_listed(present)}")


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, names))
