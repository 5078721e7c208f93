"""What holds in every test of the trainers: Tunix starts no W&B run, though wandb is installed."""

import pytest


@pytest.fixture(autouse=True)
def no_wandb(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes a start of W&B an error, and lists the starts."""
    starts: list[str] = []

    def init(*args: object, **kwargs: object) -> None:
        starts.append("wandb.init")
        raise AssertionError("a W&B run was started, which no recipe of these tests asks for")

    monkeypatch.setattr("wandb.init", init)
    return starts
