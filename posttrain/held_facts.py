"""What a run found out when it began and its recipe does not say, and holds to when it goes on.

A recipe names a run whose newest step is what it starts from, and that run may train on; it leaves the engine to what
is installed. Both decide numbers, so an attempt's record notes them, and a later one takes the same or says why it
cannot.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from models.checkpoints.loader import find_step_dir
from models.checkpoints.store import gather_text
from models.functional import FunctionalModel
from posttrain.bundle import FrozenRole
from posttrain.samplers.choose import best_engine
from recipes.rundir import Run, read_attempts, record_fact
from recipes.schema import ModelSection, SamplerSection

logger = logging.getLogger(__name__)

ENGINE = "sampler_engine"
"""The entry of an attempt's record: the engine's name."""
WEIGHTS = "weights"
"""The entry of an attempt's record: the step of the checkpoint that the policy started from."""
BASE = "base"
"""What is left of those weights where adapters are trained, as errors call it."""


AnyRole = TypeVar("AnyRole")


def held_weights(attempt: Run, section: ModelSection, model: FunctionalModel) -> ModelSection:
    """The section with one step in place of a run's folder, so that all who read these weights read the same.

    The step is found out once, and by the main process for all of them: policy, base and reference are read one after
    the other, and the run that gives them may save in between. An attempt that goes on reads the base under its
    adapters anew, and takes the step that the run began with, whatever was saved since; of other policies it reads no
    more than the run's own checkpoint.

    Args:
        attempt: the attempt, whose record notes the step.
        section: the recipe's, which names the policy's first weights.
        model: the policy.

    Raises:
        ValueError: the run has adapters, and the step that it began with is gone.
    """
    if section.load_parameters_path is None:
        return section
    key, step = "model.load_parameters_path", None
    if attempt.resume_step is not None:
        before = _earlier(attempt, WEIGHTS)
        if before is None or model.adapters is None:
            return section
        step = before["step"]
    newest = find_step_dir(Path(section.load_parameters_path).expanduser(), where=key)
    step = gather_text(newest.name)[0] if step is None else step
    section = _with_step(attempt, BASE if model.adapters is not None else WEIGHTS, section, newest, step, key)
    record_fact(attempt, WEIGHTS, {"step": step})
    return section


def held_role(
    attempt: Run, name: str, section: ModelSection, load: Callable[[ModelSection], AnyRole], *, where: str
) -> AnyRole:
    """Loads a frozen role; where the run goes on, the very one that it began with, whatever was saved since.

    The attempt's record notes under the role's name the step of the checkpoint and the checksum of the parameters. A
    role that holds no arrays of its own is left alone: the checkpoints of a run with adapters hold it to its base.

    Args:
        attempt: the attempt.
        name: the role's, and the entry's.
        section: what names its weights.
        load: loads them, given the section that names the step.
        where: the section's key, for the error.

    Raises:
        ValueError: the step that the run began with is gone, or the weights are others now.
    """
    before = _earlier(attempt, name)
    step = None
    if section.load_parameters_path is not None:
        key = f"{where}.load_parameters_path"
        newest = find_step_dir(Path(section.load_parameters_path).expanduser(), where=key)
        step = newest.name
        if before is not None and before["step"] != step:
            step = before["step"]
            section = _with_step(attempt, name, section, newest, step, key)
    role = load(section)
    if not isinstance(role, FrozenRole):
        return role
    fact = {"step": step, "checksum": f"{role.checksum:08x}"}
    if before is not None and before["checksum"] != fact["checksum"]:
        raise ValueError(
            f"run.dir={attempt.dir}: the {name}'s weights have the checksum {fact['checksum']}, and those that the run "
            f"began with {before['checksum']}: a run keeps its {name}; put back what {where} names, or choose another "
            "run.dir"
        )
    record_fact(attempt, name, fact)
    return role


def _with_step(attempt: Run, name: str, section: ModelSection, newest: Path, step: str, key: str) -> ModelSection:
    """The section with the step that the run began with, which may be the newest, in place of what it names."""
    chosen = newest.parent / step
    if not chosen.is_dir():
        raise ValueError(
            f"{key}={section.load_parameters_path}: the run {attempt.dir} began with its step {step} as its {name}, "
            f"which is gone, and the newest is {newest.name}: the {name} would be another; put {chosen} back, or "
            "choose another run.dir"
        )
    if step != newest.name:
        said = "the %s is step %s of %s, as when the run began, though there is step %s"
        logger.info(said, name, step, key, newest.name)
    return section.model_copy(update={"load_parameters_path": str(chosen)})


def held_engine(attempt: Run, section: SamplerSection, model: FunctionalModel) -> SamplerSection:
    """The section with the engine that the run samples with in place of `auto`.

    A run goes on with another engine only where its recipe names that.

    Args:
        attempt: the attempt, whose record notes the engine.
        section: the recipe's.
        model: the policy.

    Raises:
        ValueError: `auto` takes another engine than the run has sampled with so far.
    """
    engine, why = (section.engine, "as the recipe says") if section.engine != "auto" else best_engine(model)
    before = _earlier(attempt, ENGINE)
    if before is not None and before != engine:
        if section.engine == "auto":
            raise ValueError(
                f"sampler.engine=auto: would take {engine} ({why}), and the run {attempt.dir} has sampled with "
                f"{before} so far: the two round differently, and so draw other completions; make {before} available "
                f"again, or set sampler.engine={engine} to go on with it"
            )
        logger.warning("sampler.engine=%s: the run has sampled with %s so far; completions differ", engine, before)
    logger.info("sampler: %s (%s)", engine, why)
    record_fact(attempt, ENGINE, engine)
    return section.model_copy(update={"engine": engine})


def _earlier(attempt: Run, name: str) -> Any:
    """What the newest attempt that found it noted; None where the run starts anew, or nobody noted it."""
    if attempt.resume_step is None:
        return None
    known = [one[name] for one in read_attempts(attempt.dir) if name in one]
    return known[-1] if known else None
