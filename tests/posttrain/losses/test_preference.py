"""Losses over pairs against NumPy in float64, arithmetic by hand, and optax's sigmoid cross entropy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from posttrain.losses.preference import PREFERENCES, preference_loss

NONE = {"beta": None, "label_smoothing": None, "gamma": None, "orpo_lambda": None}
VALUES = {"beta": 0.7, "label_smoothing": 0.1, "gamma": 0.6, "orpo_lambda": 0.4}
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}
B, STEP = 6, 1e-30


def settings_of(name, **changed):
    return {"name": name, **NONE, **{key: VALUES[key] for key in PREFERENCES[name].settings}, **changed}


def draw(seed=0, count=B):
    """Pairs whose responses have probabilities per token from near 0 to near 1."""
    rng = np.random.default_rng(seed)
    lengths = {side: rng.integers(1, 9, count) for side in ("chosen", "rejected")}
    logps = {side: -lengths[side] * rng.choice([0.01, 0.3, 1.0, 4.0], count) for side in lengths}
    return {
        **logps,
        **{f"ref_{side}": logps[side] + rng.normal(size=count) for side in lengths},
        **{f"{side}_lengths": lengths[side] for side in lengths},
        "weights": rng.uniform(0.5, 2.0, count),
    }


def sums_and_grads(arrays, dtype, **settings):
    given = {n: jnp.asarray(a, dtype if "lengths" not in n else jnp.int32) for n, a in arrays.items()}
    if not PREFERENCES[settings["name"]].needs_reference:
        given |= {"ref_chosen": None, "ref_rejected": None}
    chosen, rejected = given.pop("chosen"), given.pop("rejected")

    def numerator(chosen, rejected):
        out = preference_loss(chosen, rejected, **given, **settings)
        return out.loss_sum, out

    (_, out), grads = jax.jit(jax.value_and_grad(numerator, argnums=(0, 1), has_aux=True))(chosen, rejected)
    return out, np.asarray(grads)


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def oracle(arrays, *, name, beta, label_smoothing, gamma, orpo_lambda):
    """The sum over pairs, one at a time, of the equations as they stand."""
    total = 0.0
    for i in range(len(arrays["chosen"])):
        w, r, ref_w, ref_r, n_w, n_l, weight = (
            arrays[n][i]
            for n in (
                "chosen",
                "rejected",
                "ref_chosen",
                "ref_rejected",
                "chosen_lengths",
                "rejected_lengths",
                "weights",
            )
        )
        if name in ("dpo", "cdpo"):
            h = beta * ((w - ref_w) - (r - ref_r))
            loss = -(1 - label_smoothing) * log_sigmoid(h) - label_smoothing * log_sigmoid(-h)
        elif name == "ipo":
            loss = ((w - ref_w) / n_w - (r - ref_r) / n_l - 1 / (2 * beta)) ** 2
        elif name == "orpo":
            p_w, p_l = np.exp(w / n_w), np.exp(r / n_l)
            loss = -w / n_w - orpo_lambda * log_sigmoid(np.log(p_w / (1 - p_w)) - np.log(p_l / (1 - p_l)))
        else:
            loss = -log_sigmoid(beta * w / n_w - beta * r / n_l - gamma)
        total = total + weight * loss
    return total


def oracle_grads(arrays, **settings):
    """Complex steps, exact to rounding: Im f(x + ih) / h."""
    grads = np.zeros((2, len(arrays["chosen"])))
    for row, side in enumerate(("chosen", "rejected")):
        for i in range(grads.shape[1]):
            moved = arrays[side].astype(complex)
            moved[i] += 1j * STEP
            grads[row, i] = np.imag(oracle({**arrays, side: moved}, **settings)) / STEP
    return grads


def assert_near(found, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", PREFERENCES)
def test_loss_and_gradient_equal_numpy(name, seed, dtype):
    arrays, settings = draw(seed), settings_of(name)
    with jax.enable_x64(dtype == np.float64):
        out, grads = sums_and_grads(arrays, dtype, **settings)
    assert_near(out.loss_sum, oracle(arrays, **settings), TOLERANCE[dtype])
    assert_near(grads, oracle_grads(arrays, **settings), TOLERANCE[dtype])
    assert float(out.weight_sum) == pytest.approx(arrays["weights"].sum(), rel=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 50.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_dpo_loss_is_log2_when_policy_equals_reference_and_its_accuracy_0(beta, smoothing):
    arrays = draw()
    arrays |= {"ref_chosen": arrays["chosen"], "ref_rejected": arrays["rejected"], "weights": np.ones(B)}
    out, grads = sums_and_grads(arrays, np.float32, **settings_of("dpo", beta=beta, label_smoothing=smoothing))
    assert float(out.loss_sum) / B == pytest.approx(math.log(2), rel=1e-6)
    assert float(out.metrics["dpo/accuracy"].sum) == 0.0
    assert float(out.metrics["dpo/margin"].sum) == 0.0
    # d loss / d chosen is -beta (1/2 - smoothing), and the opposite for the rejected: beta enters once.
    np.testing.assert_allclose(grads[0], -beta * (0.5 - smoothing), rtol=1e-5)
    np.testing.assert_allclose(grads[1], beta * (0.5 - smoothing), rtol=1e-5)


def one_pair(name, chosen, rejected, ref=(-1.0, -1.0), lengths=(2, 4), **changed):
    arrays = {"chosen": chosen, "rejected": rejected, "ref_chosen": ref[0], "ref_rejected": ref[1]}
    arrays |= {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "weights": 1.0}
    arrays = {key: np.array([value]) for key, value in arrays.items()}
    return sums_and_grads(arrays, np.float32, **settings_of(name, **changed))


@pytest.mark.parametrize(
    ("name", "changed", "loss"),
    [
        # chosen -2 of 2 tokens, rejected -8 of 4, reference -1 each: h = -1 + 7 = 6; -log sigma(3) = ln(1 + e^-3).
        ("dpo", {"beta": 0.5, "label_smoothing": 0.0}, math.log(1 + math.exp(-3))),
        # ln(1 + e^3) = 3 + ln(1 + e^-3), so a quarter of it more adds 3 / 4.
        ("cdpo", {"beta": 0.5, "label_smoothing": 0.25}, math.log(1 + math.exp(-3)) + 0.75),
        # h_bar = -1/2 + 7/4 = 5/4; 1 / (2 beta) = 1.
        ("ipo", {"beta": 0.5}, 1 / 16),
        # Averages -1 and -2: odds p / (1 - p) = 1 / (e - 1) and 1 / (e^2 - 1), whose quotient is e + 1.
        ("orpo", {"orpo_lambda": 0.5}, 1 + 0.5 * math.log(1 + 1 / (math.e + 1))),
        # 2 * (-1 + 2) - 1.5 = 1/2.
        ("simpo", {"beta": 2.0, "gamma": 1.5}, math.log(1 + math.exp(-0.5))),
    ],
)
def test_loss_of_one_pair_is_the_hand_computed_one(name, changed, loss):
    out, _ = one_pair(name, -2.0, -8.0, **changed)
    assert float(out.loss_sum) == pytest.approx(loss, rel=1e-6)


def test_dpo_is_the_sigmoid_cross_entropy_of_the_smoothed_label():
    arrays = draw(4)
    out, _ = sums_and_grads(arrays, np.float32, **settings_of("cdpo"))
    ratio = {side: arrays[side] - arrays[f"ref_{side}"] for side in ("chosen", "rejected")}
    logits = jnp.asarray(VALUES["beta"] * (ratio["chosen"] - ratio["rejected"]), jnp.float32)
    expected = optax.sigmoid_binary_cross_entropy(logits, jnp.full(B, 1 - VALUES["label_smoothing"]))
    assert_near(out.loss_sum, (expected * arrays["weights"]).sum(), 1e-6)


def test_accuracy_is_strict_and_metrics_are_weighted_means():
    arrays = {
        "chosen": [-1.0, -2.0, -3.0, -9.0],
        "rejected": [-2.0, -2.0, -1.0, -1.0],
        "ref_chosen": [-1.5, -1.0, -2.0, 0.0],
        "ref_rejected": [-1.5, -1.0, -2.0, 0.0],
        "chosen_lengths": [1, 1, 1, 1],
        "rejected_lengths": [1, 1, 1, 1],
        "weights": [1.0, 1.0, 2.0, 0.0],
    }
    arrays = {name: np.array(values) for name, values in arrays.items()}
    out, _ = sums_and_grads(arrays, np.float32, **settings_of("dpo", beta=0.5, label_smoothing=0.0))
    # Rewards chosen 0.25, -0.5, -0.5; rejected -0.25, -0.5, 0.5; weights 1, 1, 2.
    expected = {"accuracy": 1, "margin": 0.5 + 0 - 2, "chosen_reward": -1.25, "rejected_reward": 0.25}
    expected |= {"chosen_logp": -9.0, "rejected_logp": -6.0}
    for name, value in expected.items():
        assert float(out.metrics[f"dpo/{name}"].sum) == pytest.approx(value, rel=1e-6), name
        assert float(out.metrics[f"dpo/{name}"].weight) == 4.0
    assert float(out.weight_sum) == 4.0


@pytest.mark.parametrize("name", PREFERENCES)
def test_padding_pairs_give_exactly_zero_whatever_they_hold(name):
    arrays = draw(5)
    padded = {key: np.concatenate([values, values[:2]]) for key, values in arrays.items()}
    for key, values in padded.items():
        values[-2:] = 0 if "lengths" in key or key == "weights" else [np.nan, np.inf]
    clean, clean_grads = sums_and_grads(arrays, np.float32, **settings_of(name))
    out, grads = sums_and_grads(padded, np.float32, **settings_of(name))
    for found, expected in zip(jax.tree.leaves(out), jax.tree.leaves(clean), strict=True):
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_array_equal(grads[:, :-2], clean_grads)
    assert not grads[:, -2:].any()


@pytest.mark.parametrize("name", PREFERENCES)
def test_micro_batches_add_up_to_the_whole_batch(name):
    arrays = draw(6)
    whole, grads = sums_and_grads(arrays, np.float32, **settings_of(name))
    halves = [
        sums_and_grads({key: values[part] for key, values in arrays.items()}, np.float32, **settings_of(name))
        for part in (slice(2), slice(2, B))
    ]
    for found, expected in zip(
        jax.tree.leaves(jax.tree.map(jnp.add, halves[0][0], halves[1][0])), jax.tree.leaves(whole), strict=True
    ):
        assert float(found) == pytest.approx(float(expected), rel=1e-6)
    np.testing.assert_allclose(np.concatenate([half[1] for half in halves], 1), grads, rtol=1e-6)


@pytest.mark.parametrize(("chosen", "rejected"), [(0.0, -5.0), (-5.0, 0.0), (0.0, 0.0), (-1e-9, -1e4), (-1e4, -1e-9)])
def test_orpo_is_finite_at_certain_and_at_hopeless_responses(chosen, rejected):
    out, grads = one_pair("orpo", chosen, rejected)
    assert np.isfinite(out.loss_sum)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("name", ["dpo", "simpo"])
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_margins_leave_loss_and_gradient_finite(name, gap):
    out, grads = one_pair(name, -2e4 + gap, -2e4)
    assert np.isfinite(out.loss_sum)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("dop", {}, "did you mean dpo"),
        ("dpo", {"beta": 0.0}, r"dpo\.beta=0\.0: dpo\.loss=dpo needs one above 0"),
        ("dpo", {"beta": None}, "needs one above 0"),
        ("dpo", {"label_smoothing": 0.5}, r"in \[0, 0\.5\)"),
        ("cdpo", {"label_smoothing": 0.0}, r"dpo\.loss=dpo"),
        ("dpo", {"gamma": 0.5}, r"dpo\.gamma=0\.5: has no effect"),
        ("orpo", {"beta": 0.1}, r"dpo\.beta=0\.1: has no effect"),
        ("simpo", {"gamma": -1.0}, "0 or more"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(name, changed, message):
    known = name if name in PREFERENCES else "dpo"
    arrays = {key: jnp.asarray(values, jnp.float32) for key, values in draw().items()}
    if not PREFERENCES[known].needs_reference:
        arrays |= {"ref_chosen": None, "ref_rejected": None}
    with pytest.raises(ValueError, match=message):
        preference_loss(**arrays, **{**settings_of(known, **changed), "name": name})


def test_a_reference_is_asked_for_exactly_where_it_is_read():
    arrays = {key: jnp.asarray(values, jnp.float32) for key, values in draw().items()}
    with pytest.raises(ValueError, match=r"dpo\.loss=simpo: it has no reference"):
        preference_loss(**arrays, **settings_of("simpo"))
    with pytest.raises(ValueError, match=r"dpo\.loss=ipo: it needs the reference"):
        preference_loss(**{**arrays, "ref_chosen": None, "ref_rejected": None}, **settings_of("ipo"))
