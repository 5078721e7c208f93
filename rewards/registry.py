"""The rewards that recipes can name."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from rewards.base import LARGEST, Reward, RewardSpec, Tags
from rewards.format_approximate import FormatApproximate
from rewards.format_exact import FormatExact
from rewards.gsm8k_exact import Gsm8kExact
from rewards.length import Length
from rewards.numbers import Numbers

REWARDS: dict[str, Callable[..., Reward]] = {
    "gsm8k_exact": Gsm8kExact,
    "format_exact": FormatExact,
    "format_approximate": FormatApproximate,
    "numbers": Numbers,
    "length": Length,
}
"""Reward by name. Each is a frozen dataclass whose fields are its options."""


def make_reward(spec: RewardSpec, tags: Tags) -> Reward:
    """Makes a reward of the registry.

    Args:
        spec: its name and options.
        tags: the marks that the prompt asks for; rewards that read no tags do without.

    Returns:
        The reward.

    Raises:
        ValueError: an unknown name or option, an option's value of another type or that the reward refuses, or a weight
            that is not finite.
    """
    where = f"rewards: {spec.name}"
    if spec.name not in REWARDS:
        near = get_close_matches(spec.name, REWARDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"name one of {', '.join(REWARDS)}"
        raise ValueError(f"{where}: there is no reward of this name; {hint}")
    if not abs(spec.weight) <= LARGEST:
        raise ValueError(
            f"{where}: weight={spec.weight}: a total of rewards is finite; set a finite weight of at most {LARGEST:g}"
        )
    make = REWARDS[spec.name]
    fields = {field.name: field for field in dataclasses.fields(make) if field.init}  # type: ignore[arg-type]
    options = {name for name in fields if name != "tags"}
    for unknown in sorted(spec.options.keys() - options):
        raise ValueError(f"{where}: option {unknown!r}: it has {', '.join(sorted(options)) or 'none'}; remove this one")
    needed = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    for name in sorted(needed - spec.options.keys()):
        raise ValueError(f"{where}: option {name!r}: this reward cannot do without; set it")
    types = get_type_hints(make)
    for name, value in spec.options.items():
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            rule = error.errors()[0]["msg"]
            raise ValueError(f"{where}: option {name}={value!r}: {rule[0].lower()}{rule[1:]}; correct it") from error
        if types[name] is float and not abs(value) <= LARGEST:
            raise ValueError(
                f"{where}: option {name}={value}: a reward is finite; set a finite value of at most {LARGEST:g}"
            )
    return make(**spec.options, **({"tags": tags} if "tags" in fields else {}))


def check_specs(specs: Sequence[RewardSpec], tags: Tags) -> None:
    """Checks a recipe's rewards before anything starts.

    Args:
        specs: the rewards.
        tags: as for `make_reward`.

    Raises:
        ValueError: as `make_reward` does; or a name occurs twice.
    """
    for index, spec in enumerate(specs):
        make_reward(spec, tags)
        if spec.name in [earlier.name for earlier in specs[:index]]:
            raise ValueError(f"rewards: {spec.name}: it is named twice; add the weights up and name it once")


def specs_of(weights: Mapping[str, float], options: Mapping[str, Mapping[str, Any]]) -> tuple[RewardSpec, ...]:
    """The rewards that a recipe names.

    Args:
        weights: weight by name, as `rewards.functions`.
        options: settings by name, as `rewards.options`.

    Returns:
        The rewards, in the weights' order; `check_specs` judges them.

    Raises:
        ValueError: a weight is not a number, or there are options of a reward that is not named.
    """
    for name, weight in weights.items():
        if not isinstance(weight, int | float) or isinstance(weight, bool):
            raise ValueError(f"rewards.functions.{name}={weight!r}: a weight is a number; write one")
    for name, settings in options.items():
        if name not in weights:
            raise ValueError(
                f"rewards.options.{name}: rewards.functions names {', '.join(weights) or 'nothing'}, so these settings "
                f"have no effect; remove them, or add {name} there"
            )
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"rewards.options.{name}={settings!r}: the settings of a reward go by name; write a mapping"
            )
    return tuple(RewardSpec(name, float(weight), dict(options.get(name, {}))) for name, weight in weights.items())
