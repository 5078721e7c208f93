"""Losses over pairs of a chosen and a rejected response: DPO, cDPO, IPO, ORPO and SimPO.

A response enters as the sum of its completion tokens' log-probabilities, log pi(y), and its number of tokens |y|; its
own length masks it, whatever the other's is. With h = log(pi(y_w) / ref(y_w)) - log(pi(y_l) / ref(y_l)), and bars for
divisions by the response's own length, the loss of a pair is

| name    | loss                                                                      | source                        |
|---------|---------------------------------------------------------------------------|-------------------------------|
| `dpo`   | -(1 - e) log sigma(beta h) - e log sigma(-beta h)                         | arXiv:2305.18290, eq. 7       |
| `cdpo`  | the same with e > 0, the probability that a label is wrong                | Mitchell, "A note on DPO"     |
| `ipo`   | (h_bar - 1 / (2 beta))^2                                                  | arXiv:2310.12036, eq. 17      |
| `orpo`  | -log pi(y_w) / |y_w| - lambda log sigma(logit p_w - logit p_l)            | arXiv:2403.07691, eq. 3-7     |
| `simpo` | -log sigma(beta (log pi_bar(y_w) - log pi_bar(y_l)) - gamma)              | arXiv:2405.14734, eq. 6       |

IPO's h_bar averages over a response's tokens, as TRL does: with the paper's sums the target 1 / (2 beta) would mean
another thing for each length. ORPO's p is the geometric mean of a response's token probabilities, as its equation 3 has
it. With sums in their place, as in Tunix, p is 0 to rounding for all but the shortest responses, and its odds are p.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from posttrain.losses.base import LossOutput, masked_mean
from recipes.complaints import nearest

# A probability of 1 has infinite odds. Averages of float32 log-probabilities are no more exact than this.
_LOG_PROBABILITY_CEILING = -1e-7


class Preference(NamedTuple):
    """What a named loss reads.

    Attributes:
        needs_reference: whether it compares with a reference model.
        settings: the keywords of `preference_loss` that have an effect on it.
    """

    needs_reference: bool
    settings: frozenset[str]


PREFERENCES: dict[str, Preference] = {
    "dpo": Preference(True, frozenset({"beta", "label_smoothing"})),
    "cdpo": Preference(True, frozenset({"beta", "label_smoothing"})),
    "ipo": Preference(True, frozenset({"beta"})),
    "orpo": Preference(False, frozenset({"orpo_lambda"})),
    "simpo": Preference(False, frozenset({"beta", "gamma"})),
}


def preference_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    *,
    ref_chosen: Float[Array, " B"] | None,
    ref_rejected: Float[Array, " B"] | None,
    chosen_lengths: Int[Array, " B"] | Float[Array, " B"],
    rejected_lengths: Int[Array, " B"] | Float[Array, " B"],
    weights: Float[Array, " B"],
    name: str,
    beta: float | None,
    label_smoothing: float | None,
    gamma: float | None,
    orpo_lambda: float | None,
) -> LossOutput:
    """The loss of the module's docstring, summed over pairs; differentiable in `chosen` and `rejected` alone.

    A pair of weight 0 contributes exactly zero to value and gradient, whatever the arrays hold there. At equal policy
    and reference DPO is ln 2 for every beta and smoothing, with accuracy 0. Metrics are means over pairs:
    `dpo/accuracy` (chosen reward strictly above the rejected), `dpo/margin` (their difference), `dpo/chosen_reward`,
    `dpo/rejected_reward`, `dpo/chosen_logp`, `dpo/rejected_logp` (sums over a response), and ORPO's two parts.

    Args:
        chosen, rejected: log pi of each response under the policy: sums over its completion tokens, in nats.
        ref_chosen, ref_rejected: the same under the reference; None for losses without one.
        chosen_lengths, rejected_lengths: completion tokens of each response.
        weights: of each pair; 0 is a padding pair.
        name: one of PREFERENCES.
        beta: positive scale of the rewards; like the following, None for losses that don't read it.
        label_smoothing: e, in [0, 0.5); more than 0 for cdpo.
        gamma: SimPO's target margin, at least 0.
        orpo_lambda: factor of ORPO's odds term, at least 0.

    Raises:
        ValueError: the name is unknown, or a setting or the reference is missing, of no effect, or out of range.
    """
    settings = {"beta": beta, "label_smoothing": label_smoothing, "gamma": gamma, "orpo_lambda": orpo_lambda}
    assert (ref_chosen is None) == (ref_rejected is None)
    check_preference(name, has_reference=ref_chosen is not None, **settings)
    live = weights != 0
    pairs = _Pairs(
        _clean(live, chosen),
        _clean(live, rejected),
        lax.stop_gradient(_clean(live, ref_chosen)),
        lax.stop_gradient(_clean(live, ref_rejected)),
        jnp.maximum(_clean(live, chosen_lengths), 1),
        jnp.maximum(_clean(live, rejected_lengths), 1),
    )
    result = _LOSSES[name](pairs, settings)
    weights = lax.stop_gradient(weights.astype(result.loss.dtype))
    accuracy = (result.chosen_reward > result.rejected_reward).astype(weights.dtype)
    metrics = {
        "accuracy": accuracy,
        "margin": result.chosen_reward - result.rejected_reward,
        "chosen_reward": result.chosen_reward,
        "rejected_reward": result.rejected_reward,
        "chosen_logp": pairs.chosen,
        "rejected_logp": pairs.rejected,
        **result.parts,
    }
    means = {f"dpo/{metric}": masked_mean(values, weights) for metric, values in metrics.items()}
    return LossOutput((result.loss * weights).sum(), weights.sum(), means)


def check_preference(
    name: str,
    *,
    has_reference: bool,
    beta: float | None,
    label_smoothing: float | None,
    gamma: float | None,
    orpo_lambda: float | None,
) -> None:
    """Checks that a loss has what it reads and nothing that it doesn't.

    Raises:
        ValueError: in the house form.
    """
    if name not in PREFERENCES:
        guess = nearest(name, PREFERENCES)
        raise ValueError(
            f"dpo.loss: {name!r}: no such loss over pairs; "
            + (f"did you mean {guess}? " if guess else "")
            + f"use {', '.join(PREFERENCES)}"
        )
    read = PREFERENCES[name]
    if read.needs_reference != has_reference:
        rule = "needs the reference's log-probabilities" if read.needs_reference else "has no reference"
        remedy = "give both responses'" if read.needs_reference else "leave them out"
        raise ValueError(f"dpo.loss={name}: it {rule}; {remedy}, or use another of {', '.join(PREFERENCES)}")
    given = {"beta": beta, "label_smoothing": label_smoothing, "gamma": gamma, "orpo_lambda": orpo_lambda}
    for setting, value in given.items():
        if setting not in read.settings and value is not None:
            raise ValueError(f"dpo.{setting}={value}: has no effect with dpo.loss={name}; leave it unset")
        rule, holds = _RULES[setting]
        if setting in read.settings and (value is None or not holds(value)):
            raise ValueError(f"dpo.{setting}={value}: dpo.loss={name} needs one {rule}; set dpo.{setting}")
    if name == "cdpo" and label_smoothing == 0:
        raise ValueError("dpo.label_smoothing=0: without smoothing cdpo is dpo; set it above 0, or set dpo.loss=dpo")


_RULES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": ("above 0", lambda x: x > 0),
    "label_smoothing": ("in [0, 0.5)", lambda x: 0 <= x < 0.5),
    "gamma": ("that is 0 or more", lambda x: x >= 0),
    "orpo_lambda": ("that is 0 or more", lambda x: x >= 0),
}


class _Pairs(NamedTuple):
    chosen: jax.Array
    rejected: jax.Array
    ref_chosen: jax.Array | None
    ref_rejected: jax.Array | None
    chosen_lengths: jax.Array
    rejected_lengths: jax.Array

    def averages(self):
        """Log-probabilities per token of both responses."""
        return self.chosen / self.chosen_lengths, self.rejected / self.rejected_lengths


class _PairLosses(NamedTuple):
    loss: jax.Array
    chosen_reward: jax.Array
    rejected_reward: jax.Array
    parts: dict[str, jax.Array]


def _dpo(pairs, settings):
    beta, smoothing = settings["beta"], settings["label_smoothing"]
    chosen, rejected = beta * (pairs.chosen - pairs.ref_chosen), beta * (pairs.rejected - pairs.ref_rejected)
    margin = chosen - rejected
    loss = -(1 - smoothing) * jax.nn.log_sigmoid(margin) - smoothing * jax.nn.log_sigmoid(-margin)
    return _PairLosses(loss, chosen, rejected, {})


def _ipo(pairs, settings):
    beta = settings["beta"]
    chosen = (pairs.chosen - pairs.ref_chosen) / pairs.chosen_lengths
    rejected = (pairs.rejected - pairs.ref_rejected) / pairs.rejected_lengths
    return _PairLosses(jnp.square(chosen - rejected - 1 / (2 * beta)), beta * chosen, beta * rejected, {})


def _orpo(pairs, settings):
    chosen, rejected = pairs.averages()
    odds_loss = -jax.nn.log_sigmoid(_log_odds(chosen) - _log_odds(rejected))
    scale = settings["orpo_lambda"]
    parts = {"sft_loss": -chosen, "odds_loss": odds_loss}
    return _PairLosses(-chosen + scale * odds_loss, scale * chosen, scale * rejected, parts)


def _simpo(pairs, settings):
    chosen, rejected = (settings["beta"] * average for average in pairs.averages())
    return _PairLosses(-jax.nn.log_sigmoid(chosen - rejected - settings["gamma"]), chosen, rejected, {})


_LOSSES: dict[str, Callable[[_Pairs, dict], _PairLosses]] = {
    "dpo": _dpo,
    "cdpo": _dpo,
    "ipo": _ipo,
    "orpo": _orpo,
    "simpo": _simpo,
}


def _log_odds(logp):
    """log(p / (1 - p)) of log p <= 0; log(1 - p) in whichever of two forms keeps its digits (Maechler, 2012)."""
    logp = jnp.minimum(logp, _LOG_PROBABILITY_CEILING)
    near_one = logp > -jnp.log(2.0)
    # Each branch sees only arguments that it is finite at, or its infinite slope would reach the other's gradient.
    log_expm1 = jnp.log(-jnp.expm1(jnp.where(near_one, logp, -1.0)))
    log1p_exp = jnp.log1p(-jnp.exp(jnp.where(near_one, -1.0, logp)))
    return logp - jnp.where(near_one, log_expm1, log1p_exp)


def _clean(live, values):
    # Before any arithmetic, since NaN * 0 is NaN in values and in gradients.
    if values is None:
        return None
    return jnp.where(live, values.astype(jnp.promote_types(jnp.float32, values.dtype)), 0.0)
