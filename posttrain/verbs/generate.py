"""The verb that completes prompts with a trained model: one of our checkpoints, or a Hugging Face folder.

Text goes to stdout, and is written while it is sampled where one completion is asked for on a terminal. Everything that
is known of a completion (token ids, log-probabilities) goes to --out as JSON lines.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from models.functional import FunctionalModel, Params
    from models.tokenizer import Tokenizer
    from posttrain.samplers.base import Completion, Prompt, Sampler, Sampling
    from recipes.schema import TokenizerSection

ENGINES = ("auto", "vllm", "native")
DTYPES = ("float32", "bfloat16", "float16")
SLOTS = 64
PARTIAL = "\N{REPLACEMENT CHARACTER}"

Turn = dict[str, Any]


@dataclass(frozen=True)
class Request:
    """What is to be completed: a text, or a conversation."""

    text: str | None
    messages: tuple[Turn, ...] | None
    where: str
    """For errors."""


@dataclass(frozen=True)
class OpenModel:
    """A model that is ready to be sampled from."""

    model: FunctionalModel
    params: Params
    tokenizer: Tokenizer
    add_bos: bool
    is_chat: bool
    """Whether a text is a user's message to it, and not the beginning of its own."""


def register(app: typer.Typer) -> None:
    """Adds `generate`."""
    app.command()(generate)


def generate(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A run, step or Hugging Face folder, or a hub id.", show_default=False),
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A text; may be given again.")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="Prompts: a line each, or JSON lines with `prompt` or `messages`."),
    ] = None,
    engine: Annotated[str, typer.Option(metavar="NAME", help="vllm, native, or auto.")] = "auto",
    max_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Bound on a completion's length.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="X", min=0.0, help="0 for the likeliest token.")] = 1.0,
    top_p: Annotated[float, typer.Option(metavar="X", help="Sample among the tokens that have this share.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Sample among so many tokens.")] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the samples.")] = 0,
    samples: Annotated[int, typer.Option(metavar="N", min=1, help="Completions of each prompt.")] = 1,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="A text that ends a completion.")] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Prompts are a user's messages; default: by what trained the model."),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="PATH", help="In place of the model's own.")] = None,
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16 or float16.")] = "float32",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON lines, one a completion; - for stdout.")] = None,
) -> None:
    """Complete prompts with a model.

    Exit codes: 0 done, 1 the engine failed, 2 a mistake.
    """
    for name, value, known in (("engine", engine, ENGINES), ("dtype", dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"--{name}={value}: no such {name}; use one of {', '.join(known)}")
    requests = read_requests(prompt or [], file)
    from posttrain.process import start_process
    from posttrain.samplers.base import SamplerError, Sampling

    start_process()
    logging.getLogger("models").setLevel(logging.WARNING)
    opened = open_model(model, tokenizer_path=tokenizer, dtype=dtype)
    prompts = encode_requests(requests, opened, is_chat=opened.is_chat if chat is None else chat)
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        stop_ids=tuple(stop_id for stop_id in opened.tokenizer.stop_ids if stop_id < opened.model.config.vocab_size),
        stop_strings=tuple(stop or ()),
        num_samples=samples,
        seed=seed,
    )
    with contextlib.ExitStack() as stack:
        rows = _open_out(out, stack)
        try:
            sampler = stack.enter_context(start_sampler(engine, opened, prompts, sampling))
            write_completions(sampler, opened.tokenizer, requests, prompts, sampling, rows)
        except SamplerError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(1) from None


def _open_out(out: Path | None, stack: contextlib.ExitStack) -> IO[str] | None:
    if out is None or str(out) == "-":
        return None if out is None else sys.stdout
    try:
        return stack.enter_context(out.expanduser().open("w", encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--out={out}: cannot be written ({error.strerror}); name another file") from None


def read_requests(texts: Sequence[str], file: Path | None) -> list[Request]:
    """The prompts of the command line, then those of a file.

    Raises:
        ValueError: there are none, or a line of the file is none; it is named.
    """
    requests = [Request(text, None, f"--prompt {number}") for number, text in enumerate(texts, start=1)]
    if file is not None:
        try:
            lines = file.expanduser().read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--file={file}: cannot be read ({error}); name a text file or JSON lines") from None
        numbered = [(f"{file}:{number}", line) for number, line in enumerate(lines, start=1) if line.strip()]
        read = _json_request if file.suffix in (".jsonl", ".json") else lambda where, line: Request(line, None, where)
        requests += [read(where, line) for where, line in numbered]
    if not requests:
        what = "the file has no prompts" if file is not None else "there is nothing to complete"
        raise ValueError(f"generate: {what}; give --prompt TEXT, or --file with a prompt a line")
    for request in requests:
        if request.text == "":
            raise ValueError(f"{request.where}: is empty: a completion continues something; give it text")
    return requests


def _json_request(where: str, line: str) -> Request:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: this is no JSON ({error}); write one object a line") from None
    text, messages = (value.get("prompt"), value.get("messages")) if isinstance(value, dict) else (None, None)
    if isinstance(text, str) and messages is None:
        return Request(text, None, where)
    if text is None and isinstance(messages, list) and messages and all(isinstance(turn, dict) for turn in messages):
        return Request(None, tuple(messages), where)
    raise ValueError(
        f"{where}: {line[:60]}: a line is an object with either `prompt`, a text, or `messages`, a list of objects "
        "with role and content; correct it"
    )


def open_model(path: str, *, tokenizer_path: str | None, dtype: str) -> OpenModel:
    """Loads a model and its tokenizer.

    Args:
        path: a run, step, checkpoints or Hugging Face folder, or a hub id.
        tokenizer_path: in place of what the model was trained with, as in a recipe.
        dtype: of parameters and computation.

    Raises:
        ValueError: there is no such model, it is damaged, or its tokenizer is not known.
    """
    local = Path(path).expanduser()
    is_ours = local.exists() and not (local / "config.json").is_file()
    return _open_ours(local, tokenizer_path, dtype) if is_ours else _open_hugging_face(path, tokenizer_path, dtype)


def _open_hugging_face(path: str, tokenizer_path: str | None, dtype: str) -> OpenModel:
    from models.checkpoints.hf_hub import checkpoint_folder
    from models.checkpoints.huggingface import import_hf
    from models.functional import FunctionalModel
    from models.tokenizer import load_tokenizer
    from recipes.schema import ModelSection, TokenizerSection

    folder = checkpoint_folder(path)
    tokenizer = load_tokenizer(TokenizerSection(path=tokenizer_path or str(folder)))
    options = ModelSection(hf_path=path, **_dtypes(dtype))
    config, params = import_hf(folder, scan_layers=True, param_scan_axis=options.param_scan_axis, dtype=dtype)
    return OpenModel(
        FunctionalModel(config, options), _on_device(params), tokenizer, True, tokenizer.chat_template is not None
    )


def _open_ours(path: Path, tokenizer_path: str | None, dtype: str) -> OpenModel:
    from models.checkpoints.loader import Placement, find_step_dir, load_params
    from models.checkpoints.run_info import read_run_info
    from models.config import build_config
    from models.functional import FunctionalModel
    from models.mesh import make_mesh
    from models.sharding import DEFAULT_RULES
    from models.tokenizer import load_tokenizer
    from recipes.schema import MeshSection, ModelSection

    step_dir = find_step_dir(path, where="MODEL")
    info = read_run_info(step_dir)
    section, is_chat = tokenizer_of(step_dir, tokenizer_path)
    tokenizer = load_tokenizer(section)
    config = build_config(info.model, where=str(step_dir))
    options = ModelSection(
        preset="tiny-llama",  # Unread: the architecture is the checkpoint's.
        framework=info.framework,
        scan_layers=info.scan_layers,
        param_scan_axis=info.param_scan_axis if info.scan_layers else 1,
        **_dtypes(dtype),
    )
    model = FunctionalModel(config, options)
    placement = Placement(make_mesh(MeshSection(num_devices=1)), DEFAULT_RULES)
    params = load_params(step_dir, model, placement, verify="quick")
    return OpenModel(model, params, tokenizer, section.add_bos, is_chat and tokenizer.chat_template is not None)


def tokenizer_of(step_dir: Path, tokenizer_path: str | None) -> tuple[TokenizerSection, bool]:
    """Which tokenizer a checkpoint was trained with, and whether on chats: its run's recipe tells both.

    Raises:
        ValueError: the recipe is not there or names none, and no path replaces it.
    """
    from recipes.load import load_recipe
    from recipes.rundir import resolved_path
    from recipes.schema import TokenizerSection

    resolved = resolved_path(step_dir.parent.parent)
    recipe: Any = load_recipe(str(resolved), []).recipe if resolved.is_file() else None
    section = getattr(recipe, "tokenizer", None)
    if tokenizer_path is not None:
        section = TokenizerSection(path=tokenizer_path, add_bos=section.add_bos if section else True)
    if section is None or (section.path is None and section.kind != "bytes"):
        why = f"{resolved} names no tokenizer" if recipe is not None else f"there is no {resolved}"
        raise ValueError(f"{step_dir}: its tokenizer is not known ({why}); give --tokenizer PATH")
    return section, recipe is not None and recipe.kind != "pretrain"


def _dtypes(dtype: str) -> dict[str, Any]:
    return {"param_dtype": dtype, "compute_dtype": dtype}


def _on_device(params: Params) -> Params:
    import jax

    return jax.device_put(params, jax.local_devices()[0])


def encode_requests(requests: Sequence[Request], opened: OpenModel, *, is_chat: bool) -> list[Prompt]:
    """Token ids of the prompts, numbered from 0.

    Raises:
        ValueError: messages or --chat for a tokenizer without a chat template.
    """
    from models.chat import render_chat
    from posttrain.samplers.base import Prompt

    prompts = []
    for number, request in enumerate(requests):
        turns = request.messages
        if turns is None and is_chat:
            turns = ({"role": "user", "content": request.text},)
        if turns is None:
            assert request.text is not None
            ids = opened.tokenizer.encode(request.text, add_bos=opened.add_bos, add_eos=False)
        else:
            ids = render_chat(opened.tokenizer, turns, add_generation_prompt=True).ids.tolist()
        prompts.append(Prompt(tuple(ids), number))
    return prompts


@contextlib.contextmanager
def start_sampler(engine: str, opened: OpenModel, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Sampler]:
    """An engine with the model's weights, long enough for the prompts."""
    from posttrain.samplers.base import check_prompts
    from posttrain.samplers.choose import make_sampler
    from recipes.schema import SamplerSection

    config = opened.model.config
    # Before an engine starts, which takes its time.
    check_prompts(prompts, sampling, vocab_size=config.vocab_size, max_length=config.max_position)
    longest = max(len(prompt.token_ids) for prompt in prompts) + sampling.max_tokens
    section = SamplerSection.model_validate({"engine": engine, "num_slots": SLOTS})
    with tempfile.TemporaryDirectory(prefix="posttrain-") as folder:
        sampler = make_sampler(
            section, opened.model, opened.tokenizer, folder=Path(folder) / "engine", max_length=longest
        )
        try:
            sampler.sync(opened.params, 0)
            yield sampler
        finally:
            sampler.close()


def write_completions(
    sampler: Any,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    prompts: Sequence[Prompt],
    sampling: Sampling,
    rows: IO[str] | None,
) -> None:
    """Samples, and writes texts to stdout (unless the rows go there) and rows."""
    alone = len(prompts) * sampling.num_samples == 1
    if alone and rows is not sys.stdout and sys.stdout.isatty():
        stream = TextStream(tokenizer, sys.stdout.write)
        completions = sampler.generate(prompts, sampling, on_tokens=lambda prompt, sample, new: stream.push(new))
        stream.end()
    else:
        completions = sampler.generate(prompts, sampling)
        if rows is not sys.stdout:
            _print_texts(tokenizer, requests, completions, numbered=not alone)
    for completion in completions if rows is not None else ():
        request = requests[completion.prompt_id]
        print(json.dumps(row_of(completion, request, tokenizer), ensure_ascii=False), file=rows)


def _print_texts(
    tokenizer: Tokenizer, requests: Sequence[Request], completions: Sequence[Completion], *, numbered: bool
) -> None:
    for completion in completions:
        if numbered:
            print(f"== {requests[completion.prompt_id].where}, sample {completion.sample_index + 1}")
        print(tokenizer.decode(completion.token_ids, skip_special=True))


def row_of(completion: Completion, request: Request, tokenizer: Tokenizer) -> dict[str, Any]:
    """A completion as a JSON object."""
    given = {"prompt": request.text} if request.text is not None else {"messages": list(request.messages or ())}
    return {
        **given,
        "prompt_id": completion.prompt_id,
        "sample_index": completion.sample_index,
        "text": tokenizer.decode(completion.token_ids, skip_special=True),
        "finish_reason": completion.finish_reason,
        "token_ids": completion.token_ids.tolist(),
        "logprobs": [round(float(value), 6) for value in completion.logprobs],
    }


class TextStream:
    """Writes a completion's text while its tokens come; a character of several tokens waits for the last of them."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], Any]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written = 0

    def push(self, new: Sequence[int]) -> None:
        """Takes the next tokens."""
        self._ids.extend(new)
        text = self._text()
        if len(text) > self._written and not text.endswith(PARTIAL):
            self._put(text)

    def end(self) -> None:
        """Writes what is left, and ends the line."""
        self._put(self._text() + "\n")

    def _text(self) -> str:
        return self._tokenizer.decode(self._ids, skip_special=True)

    def _put(self, text: str) -> None:
        self._write(text[self._written :])
        self._written = len(text)
        sys.stdout.flush()
