"""Drawing a token for each of vLLM's requests on a CPU: one random number a request, from the request's own generator.

vLLM draws as many random numbers as the vocabulary has tokens, and on a CPU as many again that it throws away. For a
small model that was a third of the time of sampling. PyTorch is an argument, as the base install has none.
"""

from collections.abc import Mapping
from typing import Any


def draw(torch: Any, logprobs: Any, generators: Mapping[int, Any]) -> Any:
    """Draws by inversion of the cumulative distribution, in float64.

    A row's token depends on its own log-probabilities and generator alone, not on the other rows.

    Args:
        torch: PyTorch.
        logprobs: float32 [B, V], of the distribution to draw from; -inf is never drawn.
        generators: by row; rows without one take the global generator's number.

    Returns:
        int64 [B].
    """
    uniform = torch.rand((len(logprobs), 1), dtype=torch.float64)
    for row, generator in generators.items():
        uniform[row] = torch.rand((1,), dtype=torch.float64, generator=generator)
    cumulative = logprobs.to(torch.float64).exp().cumsum(-1)
    # The first token whose cumulative probability exceeds the number; rounding must not lead past the last one.
    total = cumulative[:, -1:]
    wanted = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, wanted, right=True)[:, 0]
