"""Gradients of convolutions at random, of whole numbers, whose sums are exact: the kernel in C gives the reference's bits."""

import torch

from shira import kernels

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
INDICES = {"int32": torch.int32, "int64": torch.int64}


def an_image(draw):
    """Sizes of images and of a kernel, and what is wrong with the positions or the gradient."""
    pair = lambda *sizes: [draw.choice(sizes), draw.choice(sizes)]  # noqa: E731
    return {
        "sizes": [draw.choice([0, 1, 2, 5]), draw.choice([1, 3, 40]), draw.choice([1, 2, 17]), *pair(1, 2, 5, 16, 33)],
        "sliding": [pair(1, 2, 3, 5), pair(1, 1, 2, 3), pair(0, 1, 2, 4), pair(1, 1, 2, 3)],
        "dtype": draw.choice(list(DTYPES)),
        "index": draw.choice(list(INDICES)),
        "density": draw.choice([0, 0.003, 0.05, 1]),
        "length": draw.choice([1, 40, 300, 2**11]),
        "columns": draw.choice([1, 500, 4000, 2**17]),
        "last": draw.choice([0] * 8 + [1, -1]),
        "more": draw.choice([0] * 8 + [1, -1]),
    }


def image_gradient(case):
    generator, dtype = torch.Generator().manual_seed(case["seed"]), DTYPES[case["dtype"]]
    (images, outs, ins, *sides), sliding = case["sizes"], kernels.Sliding(*map(tuple, case["sliding"]))
    places = sliding.places(sides)
    if min(places) < 1:
        return "no place"
    whole = lambda *sizes: torch.randint(-2, 3, sizes, generator=generator).to(dtype)  # noqa: E731
    input, grad_output = whole(images, ins, *sides), whole(images, outs, places[0], max(0, places[1] + case["more"]))
    numel = outs * ins * sliding.kernel[0] * sliding.kernel[1]
    where = (torch.rand(numel, generator=generator) < case["density"]).nonzero().view(-1).to(INDICES[case["index"]])
    if case["last"] and where.numel():
        where[-1 if case["last"] == 1 else 0] = numel if case["last"] == 1 else -1
    wrong = bool(case["more"] or (case["last"] and where.numel()))
    usual = kernels.images.LENGTH, kernels.images.COLUMNS
    kernels.images.LENGTH, kernels.images.COLUMNS = case["length"], case["columns"]
    try:
        with kernels.backend("native"):
            found = kernels.sampled_images(grad_output, input, where, sliding)
    except (ValueError, IndexError) as error:
        assert wrong, f"fits, and was refused: {error}"
        return "refused"
    finally:
        kernels.images.LENGTH, kernels.images.COLUMNS = usual
    assert not wrong, "does not fit, and was not refused"
    with kernels.backend("reference"):
        assert torch.equal(found, kernels.sampled_images(grad_output, input, where, sliding)), "another gradient"
    return "the same"
