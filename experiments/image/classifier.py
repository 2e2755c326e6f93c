"""A small network that names what pictures show, trained on real pictures with changes, to judge generated ones."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, avg_pool2d, cross_entropy, grid_sample, interpolate

from shira.files.paths import temporary_file


def network(classes: int) -> nn.Sequential:
    """Four convolutions, whose positions are kept, since faces differ by where their parts are."""

    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    body = [*block(3, 32, 1), *block(32, 64, 2), *block(64, 96, 2), *block(96, 128, 2)]
    return nn.Sequential(*body, nn.Flatten(), nn.Dropout(0.2), nn.Linear(128 * 16, 256), nn.ReLU(), nn.Linear(256, classes))


def changed(pictures: Tensor, generator: torch.Generator, ground: str = "zeros") -> Tensor:
    """Pictures [n, 3, side, side] from -1 to 1: turned, moved, scaled, blurred, in other colours, with noise.

    ground: what comes in at the sides, as grid_sample's padding_mode: "zeros" is white here, "border" what is at the side.
    """
    n = len(pictures)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    angle, scale = between(-0.15, 0.15), between(0.9, 1.2)
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    moves = torch.stack([cosine, -sine, between(-0.1, 0.1), sine, cosine, between(-0.1, 0.1)], 1).view(n, 2, 3)
    ink = 1 - pictures  # 0 on white, as the padding of grid_sample
    ink = grid_sample(ink, affine_grid(moves, list(ink.shape), align_corners=False), padding_mode=ground, align_corners=False)
    soft = interpolate(avg_pool2d(ink, 2), scale_factor=2, mode="bilinear")
    share = between(0, 0.7, 1, 1, 1)
    ink = ink * (1 - share) + soft * share
    ink = ink * between(0.8, 1.2, 3, 1, 1)
    return (1 - ink + between(0, 0.15, 1, 1, 1) * torch.randn(ink.shape, generator=generator)).clamp(-1, 1)


def trained(
    pictures: Tensor,
    steps: int,
    seed: int = 0,
    batch: int = 128,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    labels: Tensor | None = None,
    ground: str = "zeros",
) -> nn.Sequential:
    """A network trained on changed pictures. labels: the class of each, int64 [n]; by default each is one of its own."""
    labels = torch.arange(len(pictures)) if labels is None else labels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(int(labels.max()) + 1).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        for step in range(steps):
            which = torch.randint(len(pictures), (batch,), generator=generator)
            loss = cross_entropy(model(changed(pictures[which], generator, ground)), labels[which], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            on_step(step + 1, float(loss.detach()))
    return model.eval()


@torch.no_grad()
def recognised(model: nn.Module, pictures: Tensor, concepts: Sequence[int]) -> list[bool]:
    """Whether the network's first answer is the concept, for each picture."""
    answers = torch.cat([model(part).argmax(1) for part in pictures.split(256)])
    return [int(answer) == concept for answer, concept in zip(answers, concepts, strict=True)]


def kept(path: Path, classes: int, train: Callable[[], nn.Sequential]) -> nn.Sequential:
    """The network at a path. The first time, train() makes it."""
    if path.exists():
        model = network(classes)
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval()
    model = train()
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary_file(path.parent) as (temporary, file):
        torch.save(model.state_dict(), file)
        file.flush()
        temporary.replace(path)
    return model
