"""A generator of faces that this project did not train: a DCGAN (arXiv 1511.06434), from a package fetched on demand."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shira.data.packages import Package, fetch

from .grids import Picture

FACES = Package(
    "gan-face-generate",
    "1.1.1",
    "24102f4be41d164e44251168ede0458a45e498a888c81493e2aea48529640569",
    ("gan_face_generate/weights.tar",),
    "MIT (the package); trained on DigiFace-1M, whose terms were not checked",
)
LATENT = 100  # numbers that a face is drawn from


class Generator(nn.Module):
    """Transposed convolutions from one place to 4 by 4, then each to twice the side; the last one gives red, green and blue."""

    def __init__(self, widths: Sequence[int] = (512, 256, 128, 64), latent: int = LATENT) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in zip([latent, *widths], widths, strict=False):
            stride, padding = (2, 1) if layers else (1, 0)
            layers += [nn.ConvTranspose2d(inputs, outputs, 4, stride, padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        last = nn.ConvTranspose2d(widths[-1], 3, 4, 2, 1, bias=False)
        self.main = nn.Sequential(*layers, last, nn.Tanh())

    def forward(self, latents: Tensor) -> Tensor:
        """latents: [n, latent]. Returns pictures [n, 3, side, side] from -1 to 1."""
        pictures: Tensor = self.main(latents[..., None, None])
        return pictures


def load() -> Generator:
    """The face generator: 3,574,784 weights in five transposed convolutions, 64 by 64 pixels. Its statistics are fixed."""
    state = torch.load(fetch(FACES) / FACES.members[0], map_location="cpu", weights_only=True)["netG_state_dict"]
    model = Generator()
    model.load_state_dict(state)
    return model.eval()


def convolutions(model: nn.Module) -> list[str]:
    """The names of the transposed convolutions."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.ConvTranspose2d)]


def latents(count: int, seed: int) -> Tensor:
    """[count, 100]: what so many faces are drawn from."""
    return torch.randn(count, LATENT, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def drawn(model: nn.Module, latents: Tensor) -> list[Picture]:
    """The pictures of latents."""
    made = torch.cat([model(part) for part in latents.split(16)])
    return list(((made + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
