"""Diffusers: adapters of a whole pipeline, by the calls that users of its LoRAs know.

A `Switcher` sees the pipeline's denoiser and text encoders as one model, whose names begin with the component:
"unet.conv_in.weight". Nothing is added to the pipeline, so its calls, hooks and compiled parts stay. The VAE is not written to.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

from torch import nn

from ..adapter import Adapter, load, opened, prefixed
from ..errors import AdapterError, BaseMismatch, ShiraError, SwitchError, did_you_mean
from ..files.paths import path_of
from ..fusion.strengths import Strength
from ..sparse.tensor import SparseTensor
from ..switching.left_behind import no_copy
from ..switching.sources import AdapterSource
from ..switching.switcher import Switcher
from ..texts import described, shown
from ..training.foreign_names import PIPELINE_CALLS, knows_foreign_names
from ..weights.belonging import weight_of
from ..weights.model_tensors import named_tensors
from .block_strengths import by_block, copied, paired
from .diffusers_components import COMPONENTS, check_component, check_parts, fitting, prefix_of, present_in, tensors_of
from .diffusers_copies import check_own_weights
from .diffusers_steps import ByStep, InTurn

__all__ = ["PipelineAdapters"]

File = Adapter | str | os.PathLike[str]
Method = tuple[str, Mapping[str, float]]  # that combines adapters, with its options
Call = TypeVar("Call", bound=Callable[..., Any])
SUM: Method = ("sum", MappingProxyType({}))


class _Set(NamedTuple):
    """What the user has set: name -> (strength as it was given, the same as numbers or patterns)."""

    chosen: dict[str, tuple[Any, Strength]]
    fused: dict[str, tuple[Any, Strength]]  # stays in the weights until `unfuse`
    enabled: bool = True
    method: Method = SUM  # that combines all of them
    fused_by: Method = SUM  # that combines what is fused, if nothing else is in the weights

    def in_use(self) -> tuple[dict[str, Strength], Method]:
        """Name -> strength of all that is meant to be in the weights, and the method."""
        chosen = self.chosen if self.enabled else {}
        meant = {name: strength for name, (_, strength) in (self.fused | chosen).items()}
        return meant, self.method if self.enabled else self.fused_by


def _one_at_a_time(call: Call) -> Call:
    """Calls from several threads take turns. What a `Switcher` advises is said in the words of a `PipelineAdapters`."""

    @functools.wraps(call)
    def waiting(self: "PipelineAdapters", *args: Any, **options: Any) -> Any:
        with self._turn:
            try:
                return call(self, *args, **options)
            except SwitchError as error:
                if (own := str(error).replace("call use(None) first", f"call {self._switcher.called[1]} first")) == str(error):
                    raise
                raise SwitchError(own) from error

    return cast(Call, waiting)


class PipelineAdapters:
    """Loads adapters for a Diffusers pipeline, and sets which of them are active, at which strengths, in place.

    Adapters change the components "unet", "transformer", "text_encoder", "text_encoder_2" and "text_encoder_3", where the
    pipeline has them. Without an adapter the pipeline is the base, bit for bit. docs/diffusers.md compares the calls with
    Diffusers' own. ready, host: as for `shira.Switcher`.

    Making one, and every call that writes to weights, raises SwitchError if somebody else owns them, or if a component computes
    with copies of them: offloaded by accelerate or to disk, or `fuse_qkv_projections`. Calls from several threads take turns.

        adapters = PipelineAdapters(pipe)
        adapters.load("bluefire.safetensors")
        adapters.set("bluefire", 0.8)
        adapters.set(["bluefire", "paintings"], [1.0, 0.5])
        adapters.set("bluefire", {"unet": {"down": 0.9, "up": {"block_1": [0.4, 0.8, 1.0]}}, "text_encoder": 0.5})
        adapters.disable()
    """

    def __init__(self, pipe: Any, *, ready: int = 8, host: int = 0) -> None:
        self._pipe = pipe
        self._absent = nn.Module()  # stands for a component that the pipeline does not have
        self._model = nn.Module()
        self._tensors: dict[str, list[str]] = {}  # name of an adapter -> names of its tensors
        self._sources: dict[str, AdapterSource] = {}
        self._turn = threading.RLock()
        self._set = self._tried = _Set({}, {})  # tried: what an interrupted call wanted
        if not present_in(self._pipe):
            raise SwitchError(
                f"a pipeline must have one of the components {', '.join(COMPONENTS)} as a torch.nn.Module, found "
                f"{described(pipe)} without any; load it first: StableDiffusionPipeline.from_pretrained(…)"
            )
        self._hold(present_in(self._pipe))
        self._switcher = Switcher(self._model, ready=ready, host=host)
        self._switcher.called = ("a PipelineAdapters", "disable()")

    def __reduce__(self) -> NoReturn:
        """It is neither copied nor pickled, since it keeps the base of its own pipeline. Raises SwitchError."""
        raise no_copy("a PipelineAdapters", "PipelineAdapters(copy)")

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> NoReturn:
            """Raise AttributeError. For the name of a call of Diffusers it says what is written here in its place."""
            said = f"; here it is {PIPELINE_CALLS[name]} (docs/diffusers.md)" if name in PIPELINE_CALLS else ""
            raise AttributeError(f"a PipelineAdapters has no {name!r}{said}", name=name, obj=self)

    @property
    def names(self) -> list[str]:
        """The names of the adapters that are loaded."""
        return self._switcher.names

    @property
    def active(self) -> dict[str, Any]:
        """Name -> strength of each active adapter, as it was given to `set`; without those that are fused."""
        return self._in_the_weights("chosen")

    @property
    def fused(self) -> dict[str, Any]:
        """Name -> strength of each adapter that stays in the weights until `unfuse`."""
        return self._in_the_weights("fused")

    @_one_at_a_time
    def _in_the_weights(self, which: str) -> dict[str, Any]:
        known, now = getattr(self._current(), which), self._switcher.active
        return {name: copied(given) for name, (given, _) in known.items() if name in now}

    @_one_at_a_time
    def _current(self) -> _Set:
        """What is set. It is what an interrupted call wanted, if the interrupt came after the weights were written."""
        if self._tried is not self._set:
            meant, (method, _) = self._tried.in_use()
            written = {name: strength for name, strength in meant.items() if strength != 0}
            if self._switcher.active == written and self._switcher.method["method"] == method:
                self._set = self._tried
            self._tried = self._set
        return self._set

    @_one_at_a_time
    @knows_foreign_names("docs/diffusers.md")
    def load(self, adapter: File, name: str | None = None, *, component: str | None = None) -> str:
        """Load an adapter, or a file of one, after checking that it belongs to this pipeline. Nothing is activated.

        Names of tensors begin with a component ("unet.…", "text_encoder.…"), as `save` writes them. Otherwise all belong to
        `component`, by default to the denoiser: so it is with what `shira.attach(pipe.unet, …)` has trained.
        name: by default the adapter's own name, or that of its file. A file is read again when it is needed again, so it must
            stay where it is; an `Adapter` stays in memory.

        Returns the name. Raises SwitchError if it is taken; BaseMismatch for an adapter of another pipeline; FormatError or
        OSError for the file.
        """
        if isinstance(adapter, Adapter):
            tensors, own = list(adapter.tensors), adapter.name
        else:
            adapter = path_of(adapter, "adapters.load('bluefire.safetensors')", AdapterError)
            with opened(adapter, model=lambda: tensors_of(component, present_in(self._pipe))) as found:
                tensors, own = list(found.tensors), found.name or adapter.stem
        name = own if name is None else name
        if not isinstance(name, str) or not name:
            raise SwitchError(f'a name must be a string that is not empty, found {name!r}: load(adapter, "bluefire")')
        if name in self.names:
            raise SwitchError(f"there is an adapter {name!r} already; delete it first, or choose another name")
        self._follow()
        label = repr(name) if isinstance(adapter, Adapter) else str(adapter)
        prefix = prefix_of(label, tensors, component, present_in(self._pipe))
        source = AdapterSource(adapter, prefix)
        try:
            self._switcher.add(name, source)
        except BaseMismatch as error:
            present = {} if component is not None or not prefix else present_in(self._pipe)
            if (fits := fitting(tensors, present)) is None or prefix == f"{fits}.":
                raise
            raise BaseMismatch(f'{error}; pipe.{fits} has all its names: say component="{fits}"') from error
        self._tensors[name] = [prefix + tensor for tensor in tensors]
        self._sources[name] = source
        return name

    @_one_at_a_time
    def adapter(self, name: str) -> Adapter:
        """An adapter as it was loaded, from its file if it was one; each name of a tensor has its component in front.

        Raises SwitchError if it is unknown; FormatError or OSError for the file.
        """
        if not isinstance(name, str) or name not in self._sources:
            raise SwitchError(f"no adapter {shown(name)}; {did_you_mean(str(name), self.names)}")
        return self._sources[name].read(named_tensors(self._model))[0]

    @_one_at_a_time
    @knows_foreign_names("docs/diffusers.md")
    def set(
        self,
        names: str | list[str] | Mapping[str, Any],
        strengths: Any = None,
        *,
        method: str | None = None,
        **options: float,
    ) -> None:
        """Activate these adapters, and no others but those that are fused. [] activates none.

        names: one, several, or name -> strength. strengths: one for all, or a list of as many; 1.0 by default.
        A strength is a number, or says what each component gets: {"unet": 0.8, "text_encoder": 0.5}. A component is a number,
        or says what its modules get, by their names and as deep as you like; "*" is for all that is not named, 1.0 by default.
        In a UNet "down", "mid", "up" and "block_0" are names, too, and a list has a number for each layer of a block, its
        convolutions included; a list of one number is for all layers.
        method, options: how changes that meet are combined, as in `Switcher.use`; those that are fused take part. The default
        is the method by which they were fused, or "sum".

        Raises SwitchError for an unknown or a fused name; AdapterError for a strength that is not possible; and what `load`
        raises if a file or the pipeline has changed. Then what was active stays active; if that does not fit the changed
        pipeline either, the base is active.
        """
        given = copied(paired(names, strengths))
        for name in given:
            self._check(name)
        present, now = present_in(self._pipe), self._current()
        chosen = {name: (strength, by_block(name, strength, present, self._tensors[name])) for name, strength in given.items()}
        how = now.fused_by if method is None and not options else ("sum" if method is None else method, options)
        self._apply(_Set(chosen, now.fused, method=how, fused_by=now.fused_by))

    @_one_at_a_time
    def disable(self) -> None:
        """Take out what is active. `enable` brings it back. What is fused stays."""
        self._apply(self._current()._replace(enabled=False))

    @_one_at_a_time
    def enable(self) -> None:
        """Activate again what was set when `disable` was called."""
        self._apply(self._current()._replace(enabled=True))

    @_one_at_a_time
    def delete(self, names: str | list[str]) -> None:
        """Take adapters out of the weights, and forget them. Raises SwitchError if one is unknown or fused; then all stay."""
        several = [names] if isinstance(names, str) else names
        if not isinstance(several, list | tuple) or not several:
            raise SwitchError(f"no adapter {shown(names)}; {did_you_mean('', self.names)}")
        for name in several:
            self._check(name)
        now = self._current()
        chosen = {name: given for name, given in now.chosen.items() if name not in several}
        if len(chosen) < len(now.chosen):
            self._apply(now._replace(chosen=chosen, method=now.method if chosen else now.fused_by))
        for name in dict.fromkeys(several):
            self._switcher.remove(name)
            self._tensors.pop(name, None)
            self._sources.pop(name, None)

    @_one_at_a_time
    @knows_foreign_names("docs/diffusers.md")
    def fuse(self) -> None:
        """Let what is active stay in the weights, under whatever is set later, until `unfuse`. Nothing is written.

        Raises SwitchError if nothing is active.
        """
        active, now = self.active, self._current()
        if not active:
            raise SwitchError("nothing is active that could be fused; call set(…) first")
        fused = now.fused | {name: now.chosen[name] for name in active}
        self._apply(now._replace(chosen={}, fused=fused, fused_by=now.method))

    @_one_at_a_time
    def unfuse(self) -> None:
        """Take out all that was fused. What was set since stays active; without that, the base is back, bit for bit."""
        self._apply(self._current()._replace(fused={}, fused_by=SUM))

    @_one_at_a_time
    def release(self) -> None:
        """Keep what is in the weights for good: from now on it is the base.

        Nothing is written, unless a component was replaced since the last call: then what is active becomes active in the new
        one before, if it fits.
        """
        with contextlib.suppress(ShiraError):
            self._follow()
        self._hold(present_in(self._pipe))
        self._switcher.release()
        self._set = self._tried = _Set({}, {})

    def save(self, path: str | os.PathLike[str], **adapters: File) -> None:
        """Write the adapters of several components to one file, each name with its component in front.

        The file says of its training and licence what all of them say. Names and shapes are compared with the pipeline's, and
        BaseMismatch is raised; whether the base has other values, `load` finds out.

            adapters.save("bluefire.safetensors", unet=tuner.adapter("bluefire"), text_encoder="encoder.safetensors")
        """
        present = present_in(self._pipe)
        tensors: dict[str, SparseTensor] = {}
        prints: dict[str, str] = {}
        said: list[dict[str, Any]] = []
        if not adapters:
            raise AdapterError("nothing to save: save('bluefire.safetensors', unet=adapter)")
        for component, given in adapters.items():
            check_component(component, present)
            adapter = given if isinstance(given, Adapter) else load(given)
            adapter.check()
            weights = named_tensors(present[component])
            for name, tensor in adapter.tensors.items():
                weight_of(f"the adapter for {component}", name, tensor, weights)
            adapter = prefixed(adapter, f"{component}.")
            tensors |= adapter.tensors
            prints |= adapter.fingerprints
            said.append(adapter.metadata)
        same = {key: value for key, value in said[0].items() if all(other.get(key) == value for other in said)}
        Adapter(tensors, same | {"fingerprints": prints}).save(path)

    def by_step(
        self, strengths: Callable[[int, int], Mapping[str, Any]], *, method: str | None = None, **options: float
    ) -> ByStep[_Set]:
        """A function for `callback_on_step_end` of a pipeline's call: strengths that change from step to step.

        strengths(step, steps): what `set` takes, name -> strength, for step 1, 2, … steps − 1. The first step, and the text
            encoders before it, run with what is set when the pipeline is called. After the last step that is set again.
        method, options: as in `set`, for these steps.
        As a `with` block it sets again what was set in any case: after an exception, an interrupt, and in pipelines that run
        fewer steps than they say (SDXL's ControlNets with `denoising_end`). It warns if the pipeline has never called back.

            with adapters.by_step(lambda step, steps: {"bluefire": step / steps}) as at_step_end:
                pipe(prompt, callback_on_step_end=at_step_end)
        """
        if not callable(strengths):
            call = 'by_step(lambda step, steps: {"bluefire": step / steps})'
            raise AdapterError(f"expected a function of a step and of their number, {call}; found {described(strengths)}")
        return ByStep(
            lambda step, steps: self.set(strengths(step, steps), method=method, **options), self._current, self._again
        )

    def in_turn(self, names: list[str] | Mapping[str, Any], strengths: Any = None, *, averaged: int = 1) -> InTurn[_Set]:
        """A `with` block for several styles in one picture, whose shapes stay: each step has another of these adapters.

        names, strengths: as in `set`. averaged: in so many last steps the denoiser runs once with each of them, and the mean
        of what it predicts counts. The text encoders run with the first. Source: LoRA Switch and Composite, arXiv 2402.16843.

            with adapters.in_turn(["bluefire", "paintings"]) as at_step_end:
                pipe(prompt, callback_on_step_end=at_step_end)
        """
        given = copied(paired(names, strengths))
        for name, strength in given.items():
            self._check(name)
            by_block(name, strength, present_in(self._pipe), self._tensors[name])
        each = [functools.partial(self.set, {name: strength}) for name, strength in given.items()]
        return InTurn(self._pipe, each, averaged, self._current, self._again)

    @_one_at_a_time
    def _again(self, before: _Set) -> None:
        """Set what was set before, without adapters that were deleted since."""
        chosen, fused = ({name: each[name] for name in each if name in self._tensors} for each in (before.chosen, before.fused))
        self._apply(before._replace(chosen=chosen, fused=fused))

    def _check(self, name: str) -> None:
        if name not in self.names:
            raise SwitchError(f"no adapter {shown(name)}; {did_you_mean(str(name), self.names)}")
        if name in self._current().fused:
            raise SwitchError(f"adapter {name!r} is fused; call unfuse() first, or release() to keep it for good")

    @_one_at_a_time
    def _apply(self, wanted: _Set) -> None:
        self._follow()
        meant, (method, options) = wanted.in_use()
        for name in meant:
            check_parts(name, self._tensors[name], present_in(self._pipe))
        self._current()  # before it is forgotten what was tried the last time
        self._tried = wanted
        self._switcher.use(meant, method, **options)
        self._set = wanted
        self._switcher.called = ("a PipelineAdapters", "disable() and unfuse()" if wanted.fused else "disable()")

    def _hold(self, present: Mapping[str, nn.Module]) -> None:
        """Make these the parts of the switcher's model. It always has all parts, so that a switcher sees each that changes."""
        self._model._modules.update({name: present.get(name, self._absent) for name in COMPONENTS})

    def _follow(self) -> None:
        """Find components that were replaced since the last call. What is active becomes active in the new ones, if it fits."""
        present = present_in(self._pipe)
        check_own_weights(present)
        before: dict[str, Any] = dict(self._model._modules)
        if all(before[name] is present.get(name, self._absent) for name in COMPONENTS):
            return
        active, method = self._switcher.active, self._switcher.method
        self._hold(present)
        if active:
            try:
                self._switcher.use(active, **method)  # a copy, or the base loaded again: the base is found under the adapter
            except SwitchError:  # something else: the old component gets its base, and the new one is taken as it is
                self._hold(before)
                self._switcher.use(None)
                self._hold(present)
            except (ShiraError, OSError):  # it does not fit any more, or its file is gone: the base is in the weights
                pass
