"""Rewards that a user writes: a Python file named on the command line, read in the pool's processes and nowhere else.

The convention: every function of the file's top level whose name begins with `reward_` is a reward, under the rest of
its name. It takes any of `prompt`, `completion`, `answer` and the data's other columns, by name, and returns a number:

    RANGES = {"short": (0.0, 1.0)}     # optional: smallest and largest value; a value outside is a failure
    WEIGHTS = {"short": 0.5}           # optional: its weight in the total, 1 unless named

    def reward_short(completion, **columns):
        return 1.0 if len(completion) < 200 else 0.0
"""

import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from rewards.base import LARGEST, RewardInput

PREFIX = "reward_"


@dataclass(frozen=True)
class FileReward:
    """A function of a user's file as a reward."""

    name: str
    weight: float
    low: float
    """Smallest value; minus infinity where the file states no range."""
    high: float
    function: Callable[..., float]
    parameters: tuple[str, ...]
    """The columns that it asks for by name."""
    takes_all: bool
    """Whether it takes every column, as `**columns`."""

    def __call__(self, item: RewardInput) -> float:
        """Judges one completion; raises what the function raises, TypeError where the data lacks a column."""
        given = {**item.columns, "prompt": item.prompt, "completion": item.completion, "answer": item.answer}
        wanted = given if self.takes_all else {name: given[name] for name in self.parameters if name in given}
        return self.function(**wanted)


def load_reward_file(path: str | Path) -> tuple[FileReward, ...]:
    """Runs a reward file and finds its rewards. Call it where a stranger's code may run: in a worker.

    Args:
        path: the Python file.

    Returns:
        Its rewards, in the file's order.

    Raises:
        ValueError: no such file; it cannot be run; it holds no reward; or its RANGES or WEIGHTS are not right.
    """
    path = Path(path)
    where = f"reward file {path}"
    if not path.is_file():
        raise ValueError(f"{where}: there is no such file; correct the path")
    module = _run(path, where)
    functions = {
        name.removeprefix(PREFIX): value
        for name, value in vars(module).items()
        if name.startswith(PREFIX) and len(name) > len(PREFIX) and inspect.isfunction(value)
    }
    # A function that the file imports is another file's reward, unless the file gives it the prefix itself.
    functions = {name: value for name, value in functions.items() if value.__module__ == module.__name__}
    if not functions:
        raise ValueError(
            f"{where}: no function whose name begins with {PREFIX}: each reward is one; define "
            f"{PREFIX}<name>(completion, answer, **columns)"
        )
    ranges = _table(module, "RANGES", functions, where)
    weights = _table(module, "WEIGHTS", functions, where)
    return tuple(
        _as_reward(name, function, ranges.get(name, (-math.inf, math.inf)), weights.get(name, 1.0), where)
        for name, function in functions.items()
    )


def _run(path: Path, where: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("user_reward_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{where}: not a Python file; give it the suffix .py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles of the file look their module up by name.
    sys.modules[spec.name] = module
    # The file may import modules that lie beside it.
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: it cannot be run ({type(error).__name__}: {error}); correct it") from error
    return module


def _table(module: ModuleType, name: str, functions: Mapping[str, object], where: str) -> Mapping:
    table = vars(module).get(name, {})
    if not isinstance(table, dict):
        raise ValueError(f"{where}: {name}={table!r}: it is keyed by reward; make it a dict")
    for unknown in table.keys() - functions.keys():
        raise ValueError(
            f"{where}: {name}[{unknown!r}]: the file defines no {PREFIX}{unknown}; "
            f"its rewards are {', '.join(functions)}"
        )
    return table


def _as_reward(name: str, function: Callable, limits: object, weight: object, where: str) -> FileReward:
    if (
        not isinstance(limits, tuple | list)
        or len(limits) != 2
        or not all(isinstance(limit, int | float) for limit in limits)
        or not limits[0] < limits[1]
    ):
        raise ValueError(f"{where}: RANGES[{name!r}]={limits!r}: a range is (low, high) with low < high; correct it")
    if not isinstance(weight, int | float) or not abs(weight) <= LARGEST:
        raise ValueError(
            f"{where}: WEIGHTS[{name!r}]={weight!r}: a weight is a finite number, at most {LARGEST:g}; correct it"
        )
    parameters = inspect.signature(function).parameters.values()
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise ValueError(
                f"{where}: {PREFIX}{name}: {parameter}: columns are passed by name; name each, or **columns"
            )
    return FileReward(
        name=name,
        weight=float(weight),
        low=float(limits[0]),
        high=float(limits[1]),
        function=function,
        parameters=tuple(one.name for one in parameters if one.kind != one.VAR_KEYWORD),
        takes_all=any(one.kind == one.VAR_KEYWORD for one in parameters),
    )
