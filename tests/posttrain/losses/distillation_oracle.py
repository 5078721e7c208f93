"""What the tests of distillation share: a student, a teacher of another make, and the loss in plain NumPy.

The oracle's gradient is the complex step, Im f(x + ih) / h, which is exact to rounding.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from posttrain.losses.distillation import TeacherHidden, distillation_loss, teacher_top_k

R, T, D, E, V, STEP = 2, 5, 3, 4, 7, 1e-30
TOLERANCE = {np.float64: 1e-10, np.float32: 1e-5}


def head(params, hidden):
    return hidden @ params["kernel"]


def capped_head(params, hidden):
    """A tied head with a scale before it and a soft cap after, as a teacher of another make."""
    return 4.0 * jnp.tanh((hidden * params["scale"]) @ params["embedding"].T / 4.0)


def numpy_capped(params, hidden):
    return 4.0 * np.tanh((hidden * params["scale"]) @ params["embedding"].T / 4.0)


def draw(seed=0, rows=R, length=T, vocab=V):
    rng = np.random.default_rng(seed)
    return {
        "kernel": rng.normal(size=(D, vocab)),
        "hidden": rng.normal(size=(rows, length, D)),
        "teacher_hidden": rng.normal(size=(rows, length, E)),
        "scale": 1 + 0.2 * rng.normal(size=E),
        "embedding": rng.normal(size=(vocab, E)),
        "labels": rng.integers(0, vocab, (rows, length)),
        "weights": np.where(rng.random((rows, length)) > 0.3, rng.uniform(0.5, 2.0, (rows, length)), 0.0),
    }


def teacher_params(data):
    return {name: data[name] for name in ("scale", "embedding")}


@functools.cache
def compiled(k, chunk_size, settings):
    """A function of the data for `sums_and_grads`, made once for the same settings."""
    settings = dict(settings)

    def run(given):
        params = teacher_params(given)
        teacher, teacher_head = TeacherHidden(given["teacher_hidden"], params), capped_head
        if k is not None:
            temperature = settings["temperature"]
            teacher = teacher_top_k(
                capped_head, params, given["teacher_hidden"], k=k, temperature=temperature, chunk_size=chunk_size
            )
            teacher_head = None

        def numerator(kernel, hidden):
            out = distillation_loss(
                head,
                {"kernel": kernel},
                hidden,
                teacher,
                given["labels"],
                given["weights"],
                teacher_head_fn=teacher_head,
                chunk_size=chunk_size,
                **settings,
            )
            return out.loss_sum, out

        (_, out), grads = jax.value_and_grad(numerator, argnums=(0, 1), has_aux=True)(given["kernel"], given["hidden"])
        return out, grads

    return jax.jit(run)


def sums_and_grads(data, dtype, *, k=None, chunk_size=4, **settings):
    """The output, and the gradients of its numerator with respect to the head's kernel and the hidden states."""
    given = {name: jnp.asarray(array, jnp.int32 if name == "labels" else dtype) for name, array in data.items()}
    settings = {"divergence": "forward_kl", "temperature": 1.0, "alpha": 0.5, **settings}
    return compiled(k, chunk_size, tuple(settings.items()))(given)


def log_softmax(logits):
    shifted = logits - logits.real.max()
    return shifted - np.log(np.exp(shifted).sum())


def oracle(data, *, divergence, temperature, alpha, k=None):
    """Loss, soft and hard sums, token by token and outcome by outcome."""
    loss = soft_sum = hard_sum = 0.0
    for r, t in np.ndindex(*data["labels"].shape):
        logits = data["hidden"][r, t] @ data["kernel"]
        logq = log_softmax(logits / temperature)
        logp = log_softmax(numpy_capped(data, data["teacher_hidden"][r, t]) / temperature)
        if k is not None and k < len(logp):
            top, rest = np.argsort(-logp)[:k], np.argsort(-logp)[k:]
            logp, logq = ([*x[top], np.log(np.exp(x[rest]).sum())] for x in (logp, logq))
        pairs = list(zip(logp, logq, strict=True))
        if divergence == "forward_kl":
            kl = sum(np.exp(p) * (p - q) for p, q in pairs)
        else:
            kl = sum(np.exp(q) * (q - p) for p, q in pairs)
        soft, hard = temperature**2 * kl, -log_softmax(logits)[data["labels"][r, t]]
        weight = data["weights"][r, t]
        loss, soft_sum, hard_sum = (
            loss + weight * (alpha * soft + (1 - alpha) * hard),
            soft_sum + weight * soft,
            hard_sum + weight * hard,
        )
    return loss, soft_sum, hard_sum


def oracle_grads(data, **settings):
    """Complex steps, exact to rounding: Im f(x + ih) / h."""
    grads = []
    for name in ("kernel", "hidden"):
        grad = np.zeros(data[name].shape)
        for index in np.ndindex(*grad.shape):
            moved = data[name].astype(complex)
            moved[index] += 1j * STEP
            grad[index] = np.imag(oracle({**data, name: moved}, **settings)[0]) / STEP
        grads.append(grad)
    return grads


def assert_near(found, expected, tolerance):
    expected = np.asarray(expected, np.float64)
    assert np.abs(np.asarray(found, np.float64) - expected).max() <= tolerance * np.abs(expected).max()
