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
        engine, why = _best_engine(model)
        logger.info("sampler: %s (%s)", engine, why)
    proofs = proof_settings(model.options.compute_dtype, every=section.probe_interval)
    if engine == "native":
        return NativeSampler(
            model,
            num_slots=section.num_slots,
            max_length=max_length,
            steps_per_call=STEPS_PER_CALL,
            tokenizer=tokenizer,
            on_progress=None,
            proof_settings=proofs,
        )
    from posttrain.samplers.vllm import VLLMSampler

    on_cpu = jax.default_backend() == "cpu"
    settings = EngineSettings(
        folder=folder,
        max_length=max_length,
        max_sequences=section.num_slots,
        cache_gib=section.memory_gib if on_cpu else None,
        memory_share=None if on_cpu else section.memory_share,
        eager=section.eager,
        start_seconds=START_SECONDS,
        answer_seconds=section.timeout_seconds,
        threads=None,
    )
    return VLLMSampler(model, tokenizer, settings=settings, proof_settings=proofs)


def _best_engine(model: FunctionalModel) -> tuple[str, str]:
    try:
        build = installed_build()
        check_model(model.config, build)
    except ValueError as error:
        return "native", str(error).partition(":")[2].strip() or str(error)
    return "vllm", f"{build} is installed and serves the model"
