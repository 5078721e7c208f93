"""Drawing with one number a request: its frequencies, its seeds, and what it never draws."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from posttrain.samplers.seeded_draw import draw  # noqa: E402 (after the check that PyTorch is there)

pytestmark = pytest.mark.parity


def generators(*seeds: int):
    return {row: torch.Generator().manual_seed(seed) for row, seed in enumerate(seeds)}


def test_tokens_come_as_often_as_their_probabilities_say() -> None:
    """Of 20,000 draws a share deviates by 4 standard errors at most: 4 * sqrt(p (1 - p) / n)."""
    shares, count = np.array([0.5, 0.3, 0.15, 0.05]), 20_000
    logprobs = torch.tensor(np.log(shares), dtype=torch.float32).expand(count, -1)
    found = np.bincount(draw(torch, logprobs, generators(*range(count))).numpy(), minlength=4) / count
    assert (np.abs(found - shares) < 4 * np.sqrt(shares * (1 - shares) / count)).all()


def test_a_request_draws_the_same_in_any_batch() -> None:
    logprobs = torch.randn(6, 1000, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    together = draw(torch, logprobs, generators(*range(6)))
    reversed_rows = draw(torch, logprobs.flip(0), generators(*reversed(range(6))))
    alone = [draw(torch, logprobs[row : row + 1], generators(row)) for row in range(6)]
    assert together.tolist() == reversed_rows.flip(0).tolist() == torch.cat(alone).tolist()
    # Rows without a seed take nothing from those that have one.
    assert draw(torch, logprobs, {3: generators(3)[0]})[3] == together[3]


def test_the_next_draw_of_a_request_is_another() -> None:
    logprobs, given = torch.zeros(1, 4096).log_softmax(-1), generators(5)
    assert len({int(draw(torch, logprobs, given)) for _ in range(20)}) > 15


def test_what_has_no_probability_is_never_drawn() -> None:
    """Truncation leaves -inf, at both ends here; a certain token is drawn however small the number is."""
    logprobs = torch.full((64, 9), -torch.inf)
    logprobs[:, 4] = 0.0
    assert set(draw(torch, logprobs, generators(*range(64))).tolist()) == {4}
