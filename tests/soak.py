"""A long random life of one model: switching, training, casts, moves, replaced and shared weights, interrupts, faults.

Beside the model lives a twin of its base, to which all that the user does is done, too. Whenever nothing is active the two must
be the same to the bit. What is refused must be refused with a ShiraError, and leave the weights as they are. tests/test_soak.py
runs it for seconds; by hand: `make soak`.
"""

import argparse
import collections
import copy
import random
import sys
import time

import torch
from torch import nn

import shira
from conftest import all_bits, bits, random_adapter, same_bits
from interrupting import interrupted
from shira import ShiraError, Switcher, SwitchError, kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Tied(nn.Module):
    """Linear layers of several shapes, a convolution, an embedding whose weight is the output's, and normalization."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(23, 12)
        self.conv = nn.Conv1d(12, 12, 3, padding=1)
        self.norm = nn.BatchNorm1d(12)
        self.inner = nn.Sequential(nn.Linear(12, 17), nn.ReLU(), nn.Linear(17, 12))
        self.out = nn.Linear(12, 23, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        hidden = self.norm(self.conv(self.embed(tokens).transpose(1, 2))).transpose(1, 2)
        return self.out(self.inner(hidden))


def cast(dtype):
    return lambda model: model.to(dtype)


def assign(model):
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def new_parameter(model):
    model.inner[0].weight = nn.Parameter(model.inner[0].weight.detach().clone())


def new_layer(model):
    model.inner[2] = copy.deepcopy(model.inner[2])


def new_data(model):
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def one_layer(model):
    model.inner[0].half().to(model.conv.weight.dtype)


def double_round(model):
    dtype = model.conv.weight.dtype
    model.half().bfloat16().to(dtype)


def tie(model):
    model.out.weight = model.embed.weight


ACTS = {  # what is done to both, and what a switcher can follow
    **{f"to {dtype}": cast(dtype) for dtype in DTYPES},
    "assign": assign,
    "a new parameter": new_parameter,
    "a new layer": new_layer,
    "new data": new_data,
    "one layer there and back": one_layer,
    "two casts": double_round,
    "tie": tie,
}


def other_weights(model, generator):
    """Another base, in the ways in which one is loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)


class Life:
    def __init__(self, seed, dtype):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = Tied().to(dtype).eval()
        self.base = copy.deepcopy(self.model)
        self.switcher = Switcher(self.model, ready=self.random.choice([1, 2, 8]))
        self.counts = collections.Counter()
        self.made = 0
        for _ in range(3):
            self.add()

    def add(self):
        plain = random_adapter(self.base, self.random.randrange(10**6), density=self.random.choice([0.0, 0.02, 0.3]))
        adapter = plain if self.random.random() < 0.3 else shira.Adapter(plain.tensors)
        self.made += 1
        self.switcher.add(f"a{self.made}", adapter)

    def remove(self):
        names = [name for name in self.switcher.names if name not in self.switcher.active]
        if len(names) > 3:
            self.switcher.remove(self.random.choice(names))

    def selection(self):
        names = self.random.sample(self.switcher.names, k=min(len(self.switcher.names), self.random.choice([1, 1, 2, 3])))
        if len(names) == 1 and self.random.random() < 0.6:
            return names[0]
        return {name: self.random.choice([1.0, 0.5, -1.0, 2.0]) for name in names}

    def use(self):
        self.switcher.use(self.random.choice([None, self.selection(), self.selection()]))

    def prefetch(self):
        self.switcher.prefetch(self.selection())

    def using(self):
        with self.switcher.using(self.selection()):
            self.act() if self.random.random() < 0.2 else None

    def act(self):
        name = self.random.choice(list(ACTS))
        self.counts[name] += 1
        ACTS[name](self.model)
        ACTS[name](self.base)

    def interrupt(self):
        later = self.random.choice([0, 0, self.random.randrange(1, 40)])
        with interrupted(self.random.randrange(1, 400), later):
            self.random.choice([self.use, self.use, self.prefetch, self.using])()

    def fault(self):
        """The kernel fails once, at one of its next calls."""
        real, left = kernels.native._native, [self.random.randrange(1, 6)]

        class Faulty:
            def __getattr__(self, name):
                left[0] -= 1
                if left[0] == 0:
                    raise RuntimeError("a fault")
                return getattr(real, name)

        kernels.native._native = Faulty()
        try:
            self.use()
        except RuntimeError as error:
            if isinstance(error, ShiraError) or str(error) != "a fault":
                raise
        finally:
            kernels.native._native = real

    def train(self):
        self.off()
        options = {"mask": self.random.choice(["wm", "rand", "struct"]), "density": 0.4, "seed": self.random.randrange(99)}
        options |= {"method": self.random.choice(["values", "values", "hook"]), "exclude": "norm"}
        options |= {"targets": self.random.choice(["all-linear", ["embed", "conv", "inner.0"]])}
        tokens = torch.randint(0, 23, (2, 5), generator=self.generator)
        self.model.train(self.random.random() < 0.5)
        tuner = None
        try:
            with interrupted(self.random.randrange(1, 4000), self.random.choice([0, self.random.randrange(1, 60)])):
                tuner = shira.attach(self.model, **options)
                optimizer = torch.optim.SGD(tuner.parameters(), 0.1)
                for _ in range(self.random.choice([0, 1, 2])):
                    if options["method"] == "values" and self.random.random() < 0.3:
                        self.act()
                    self.model(tokens).float().square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                tuner.adapter("trained")
                tuner.detach()
        except ShiraError as error:
            self.counts[type(error).__name__] += 1
        self.model.eval()
        self.leave(tuner or getattr(self.model, "shira_tuner", None))

    def leave(self, tuner):
        try:
            if tuner is not None:
                tuner.detach()
        except ShiraError as error:
            assert "release()" in str(error)
            self.counts["training refused"] += 1
            self.load_base()
            tuner.release()
        shira.attach(self.model, exclude="norm").detach()  # finishes what was interrupted in attach
        assert not [name for name, _ in self.model.named_parameters() if "shira" in name]
        assert "forward" not in vars(self.model.inner[0]) and not any(m._forward_pre_hooks for m in self.model.modules())
        self.check()

    def another_base(self):
        """While something is active: refused each time, until the base is loaded and the switcher let go."""
        self.switcher.use(self.selection())
        if sum(write.indices.numel() for write in self.switcher._state.plans[0].writes) < 8:
            return
        other_weights(self.model, self.generator)
        now = all_bits(self.model)
        for selection in (None, self.selection()):
            try:
                self.switcher.use(selection)
                raise AssertionError("another base was not noticed")
            except SwitchError:
                self.counts["refused"] += 1
            assert same_bits(now, all_bits(self.model))
        self.put_right()

    def put_right(self):
        """What the errors say: load the base, then call release()."""
        self.load_base()
        self.switcher.release()
        self.check()

    def load_base(self):
        self.model.load_state_dict(copy.deepcopy(self.base.state_dict()), assign=True)
        if self.base.out.weight is self.base.embed.weight:
            tie(self.model)

    def other(self):
        """Somebody else wants the model."""
        other = Switcher(self.model)
        adapter = shira.Adapter(random_adapter(self.base, 1).tensors)
        if not self.switcher.active:
            other.add("x", adapter)
            other.use("x")
            other.use(None)
            return
        for call in (lambda: other.add("x", adapter), lambda: shira.attach(self.model)):
            try:
                call()
                raise AssertionError("two owners")
            except ShiraError:
                self.counts["refused"] += 1

    def check(self):
        self.counts["checked"] += 1
        base, now = (
            all_bits(model) | {name: bits(buffer) for name, buffer in model.named_buffers()}
            for model in (self.base, self.model)
        )
        lost = [name for name in base if name not in now or not same_bits({name: base[name]}, {name: now[name]})]
        if lost:
            raise AssertionError(f"the base is lost: {lost}")

    def step(self):
        moves = [self.use] * 12 + [self.prefetch, self.using, self.add, self.remove, self.fault] * 2 + [self.act] * 3
        moves += [self.interrupt] * 3 + [self.other, self.another_base] + [self.train] * 2
        move = self.random.choice(moves)
        self.counts[move.__name__] += 1
        try:
            move()
        except ShiraError as error:
            self.counts[type(error).__name__] += 1
            if isinstance(error, SwitchError) and "release()" in str(error):
                self.put_right()
        if self.random.random() < 0.3:
            self.off()

    def off(self):
        try:
            self.switcher.use(None)
        except SwitchError:
            self.counts["not told"] += 1  # two casts that leave the same entries: refused, rightly
            self.put_right()
        self.check()
        for parameter in [*self.model.parameters(), *self.base.parameters()]:
            parameter.requires_grad_(True)


def live(seed, operations, dtype, report=0):
    """One life; returns what was done, how often. Raises what goes wrong."""
    life = Life(seed, dtype)
    began = time.monotonic()
    for number in range(operations):
        life.step()
        if number % 50 == 0 and any(
            not bool(p.isfinite().all()) or float(p.detach().abs().max()) > 100 for p in life.base.parameters()
        ):
            life.off()
            other_weights(life.base, life.generator)
            life.model.load_state_dict(life.base.state_dict())
        if report and number % report == 0:
            print(
                f"{dtype} seed {seed}: {number} of {operations}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True
            )
    life.off()
    return life.counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--operations", type=int, default=100_000, help="in all dtypes together")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    total = collections.Counter()
    lives = max(1, given.operations // 3000)
    for number in range(lives):
        for dtype in DTYPES:
            total += live(given.seed + number, given.operations // lives // 3, dtype, report=1000)
    print(dict(sorted(total.items())))
    print(f"{given.operations} operations, {total['checked']} times the base compared, 0 lost, 0 foreign errors")
