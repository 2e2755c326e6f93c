"""Before an engine serves a model: does Transformers' continuous batching compute what a plain forward pass computes?

Models with layers that continuous batching does not know may run in it without an error, and write something else.
"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from .sampling import Sampling, Ticket

__all__ = ["check", "plain_logprobs"]

LENGTHS = (11, 5)  # tokens of two prompts that are in one step
LARGEST_DIFFERENCE = {torch.float32: 1e-2, torch.float64: 1e-2}  # of the most probable tokens' log-probabilities, in nats
COARSE_DIFFERENCE = 0.5  # the same in half precision
TOP = 3


def _prompts(vocabulary: int) -> list[list[int]]:
    return [[(3 + 7919 * (place + 31 * length)) % vocabulary for place in range(length)] for length in LENGTHS]


@torch.no_grad()
def plain_logprobs(model: nn.Module) -> list[tuple[list[int], list[Tensor]]]:
    """For each of two prompts: its tokens, and the log-probabilities of the next token and of the one after it.

    The token between is the most probable one, and is added to the tokens.
    """
    config: Any = model.config.get_text_config()  # type: ignore[operator, union-attr]
    device = next(model.parameters()).device
    found = []
    for prompt in _prompts(int(config.vocab_size)):
        logprobs = []
        for _ in range(2):
            scores = model(torch.tensor([prompt], device=device), use_cache=False).logits[0, -1].float()
            logprobs.append(scores.log_softmax(-1))
            prompt = [*prompt, int(scores.argmax())]
        found.append((prompt[:-1], logprobs))
    return found


def check(manager: Any, expected: list[tuple[list[int], list[Tensor]]]) -> None:
    """Run both prompts through a manager that is not started. Raises RuntimeError if the log-probabilities are others."""
    tickets = [Ticket("", time.monotonic(), Sampling(0, temperature=0, logprobs=TOP)) for _ in expected]
    for number, (ticket, (tokens, _)) in enumerate(zip(tickets, expected, strict=True)):
        manager.add_request(tokens[:-1], f"check {number}", max_new_tokens=2, ticket=ticket)
    manager.current_batch = 0
    for _ in range(2 * len(expected) + 2 * max(LENGTHS)):
        manager._generation_loop_body(manager.batch_processor, bootstrapping=False)
        if manager.last_error is not None:
            raise manager.last_error
        if not manager.batch_processor.has_pending_requests():
            break
    most = LARGEST_DIFFERENCE.get(manager.model.dtype, COARSE_DIFFERENCE)
    for ticket, (tokens, logprobs) in zip(tickets, expected, strict=True):
        comparable = 2 if ticket.logprobs[0].token == tokens[-1] else 1  # else two tokens were equally probable
        for found, plain in zip(ticket.logprobs[:comparable], logprobs, strict=False):
            difference = max(abs(logprob - float(plain[token])) for token, logprob in found.top)
            if not difference <= most:
                raise RuntimeError(f"its log-probabilities differ by {difference:.3g} from those of a plain forward pass")
