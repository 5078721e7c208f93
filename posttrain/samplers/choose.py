"""Which engine a recipe gets."""

import logging
from pathlib import Path

import jax

from models.functional import FunctionalModel
from models.tokenizer import Tokenizer
from posttrain.samplers.base import Sampler
from posttrain.samplers.native import NativeSampler
from posttrain.samplers.proof import proof_settings
from posttrain.samplers.vllm_settings import EngineSettings, check_model, installed_build
from recipes.schema import SamplerSection

logger = logging.getLogger(__name__)

STEPS_PER_CALL = 32
"""Tokens that the native engine samples between two looks from the host."""
START_SECONDS = 600.0
"""For vLLM's first start of an architecture, which inspects the model."""


def make_sampler(
    section: SamplerSection, model: FunctionalModel, tokenizer: Tokenizer, *, folder: Path, max_length: int
) -> Sampler:
    """Starts the engine that a recipe asks for; the caller closes it.

    Args:
        section: the recipe's.
        model: the policy.
        tokenizer: of its prompts.
        folder: where vLLM's model directory is written.
        max_length: bound on prompt and completion together, in tokens.

    Raises:
        ValueError: vllm is asked for and is not installed or does not serve the model.
        SamplerError: it does not start.
    """
    engine: str = section.engine
    if engine == "auto":
        engine, why = best_engine(model)
        logger.info("sampler: %s (%s)", engine, why)
    if engine == "native":
        return make_native(section, model, tokenizer, max_length=max_length)
    from posttrain.samplers.vllm import VLLMSampler

    settings = engine_settings(section, folder=folder, max_length=max_length, holds_weights=False)
    proofs = proof_settings(model.options.compute_dtype, every=section.probe_interval)
    return VLLMSampler(model, tokenizer, settings=settings, proof_settings=proofs)


def make_native(
    section: SamplerSection, model: FunctionalModel, tokenizer: Tokenizer, *, max_length: int
) -> NativeSampler:
    """The engine in JAX, which every model has; arguments as for `make_sampler`."""
    return NativeSampler(
        model,
        num_slots=section.num_slots,
        max_length=max_length,
        steps_per_call=STEPS_PER_CALL,
        tokenizer=tokenizer,
        on_progress=None,
        proof_settings=proof_settings(model.options.compute_dtype, every=section.probe_interval),
    )


def engine_settings(section: SamplerSection, *, folder: Path, max_length: int, holds_weights: bool) -> EngineSettings:
    """How vLLM is started for a recipe; arguments as for `make_sampler`, and as `EngineSettings.holds_weights`."""
    on_cpu = jax.default_backend() == "cpu"
    return EngineSettings(
        folder=folder,
        max_length=max_length,
        max_sequences=section.num_slots,
        cache_gib=section.memory_gib if on_cpu else None,
        memory_share=None if on_cpu else section.memory_share,
        eager=section.eager,
        start_seconds=START_SECONDS,
        answer_seconds=section.timeout_seconds,
        threads=None,
        holds_weights=holds_weights,
    )


def best_engine(model: FunctionalModel) -> tuple[str, str]:
    """The engine that `auto` takes, and why."""
    try:
        build = installed_build()
        check_model(model.config, build)
    except ValueError as error:
        return "native", str(error).partition(":")[2].strip() or str(error)
    return "vllm", f"{build} is installed and serves the model"
