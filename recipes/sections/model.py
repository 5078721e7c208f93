"""The sections that say what is trained and where its arrays lie: model, tokenizer, mesh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import FrozenDict, FrozenMap, OnlyWhen, Problem, Section

Dtype = Literal["float32", "bfloat16", "float16"]
MESH_AXES = ("data", "fsdp", "tensor", "expert", "context", "stage")


class ModelSection(Section):
    """The architecture, how it is laid out and computed, and where its first weights come from."""

    preset: str | None = None
    """A name in models/presets, such as `tiny-llama`. Exactly one of preset and hf_path is set."""
    hf_path: str | None = None
    """A Hugging Face folder or hub id: its config gives the architecture and its weights the start."""
    overrides: FrozenDict = FrozenMap()
    """Fields of TransformerConfig that replace the preset's, such as {num_layers: 2}."""
    framework: Literal["nnx", "linen"] = "nnx"
    """Which Flax module system holds the parameters; the mathematics is the same."""
    scan_layers: bool = True
    """Stack all layers' parameters and run them with a scan: compile time then does not grow with depth."""
    param_scan_axis: Annotated[int, Field(ge=0, le=1), OnlyWhen("scan_layers", True)] = 1
    """The axis of a stacked parameter that counts layers: 0, or 1 as MaxText has it."""
    remat: Literal["none", "full", "minimal", "save_qkv", "offload"] = "none"
    """Which activations the backward pass recomputes: full saves the most memory, none is the fastest."""
    attention: Literal["auto", "dot_product", "blocked", "flash"] = "auto"
    """The attention kernel; auto picks by device and sequence length."""
    param_dtype: Dtype = "float32"
    """Stored parameters."""
    compute_dtype: Dtype = "float32"
    """Matrix products and activations."""
    logits_dtype: Dtype = "float32"
    """The vocabulary head's output; softmax and loss sums are float32 in any case."""
    dropout_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """The probability that an activation is zeroed in training; 0 turns dropout off."""
    quantization: Literal["none", "int8", "fp8"] = "none"
    """The number format of the projections' matrix products in training."""
    load_parameters_path: str | None = None
    """A checkpoint folder whose parameters start the run; step and optimizer start fresh."""
    load_full_state_path: str | None = None
    """A checkpoint folder whose whole state (parameters, optimizer, step) starts the run."""

    def problems(self) -> Iterator[Problem]:
        """Yields contradictions between the sources of the architecture and of the weights."""
        if self.preset is not None and self.hf_path is not None:
            yield Problem(
                "preset",
                self.preset,
                f"the architecture has one source, and model.hf_path={self.hf_path} names another",
                "set one of model.preset and model.hf_path to null",
            )
        if self.load_parameters_path is not None and self.load_full_state_path is not None:
            yield Problem(
                "load_full_state_path",
                self.load_full_state_path,
                "the first weights have one source, and model.load_parameters_path names another",
                "set one of the two to null",
            )


class TokenizerSection(Section):
    """How text becomes token ids."""

    path: str | None = None
    """A local folder, a hub id, a sentencepiece .model file, or the word `bytes`."""
    kind: Literal["auto", "huggingface", "sentencepiece", "bytes"] = "auto"
    """The tokenizer library; auto decides by what `path` names."""
    add_bos: bool = True
    """Put the beginning-of-sequence id before every document."""
    add_eos: bool = True
    """Put the end-of-sequence id after every document."""
    chat_template: str | None = None
    """A jinja file that replaces the tokenizer's own chat template."""

    def problems(self) -> Iterator[Problem]:
        """Yields contradictions between path and kind."""
        if self.kind == "bytes" and self.path not in (None, "bytes"):
            yield Problem(
                "path",
                self.path,
                "tokenizer.kind=bytes reads no file",
                "set tokenizer.path to bytes, or tokenizer.kind to auto",
            )
        if self.path == "bytes" and self.kind not in ("auto", "bytes"):
            yield Problem(
                "kind",
                self.kind,
                "tokenizer.path=bytes names the built-in byte tokenizer",
                "set tokenizer.kind to auto or bytes",
            )


AxisSize = Annotated[int, Field(ge=-1)]


class MeshSection(Section):
    """How many ways each kind of parallelism splits the devices; the sizes multiply to the device count."""

    data: AxisSize = 1
    """Copies of the parameters, each fed its own rows. One axis of the six may be -1: what is left."""
    fsdp: AxisSize = -1
    """Shards of the parameters, each fed its own rows."""
    tensor: AxisSize = 1
    """Shards of each projection's heads and feed-forward columns."""
    expert: AxisSize = 1
    """Shards of the experts of a mixture-of-experts layer."""
    context: AxisSize = 1
    """Shards of the sequence axis."""
    stage: AxisSize = 1
    """Pipeline stages: shards of the layers."""
    rules: FrozenDict = FrozenMap()
    """Logical axis to mesh axes, such as {embed: [fsdp]}; replaces single entries of models/sharding's table."""
    dcn_data: Annotated[int, Field(ge=1)] = 1
    """Slices joined by the data-centre network; each holds a full copy and only gradients cross it."""
    num_devices: Annotated[int | None, Field(ge=1)] = None
    """Use the first so many devices; null uses all."""
    coordinator_address: str | None = None
    """host:port of process 0 for jax.distributed; null on one host, or where the cluster is detected."""
    num_processes: Annotated[int | None, Field(ge=1)] = None
    """Processes in the run; set together with coordinator_address and process_id."""
    process_id: Annotated[int | None, Field(ge=0)] = None
    """This process's number, from 0."""

    def problems(self) -> Iterator[Problem]:
        """Yields mesh sizes that cannot be filled, unknown mesh axes, and half-named process groups."""
        yield from self._size_problems()
        yield from self._rule_problems()
        group = {name: getattr(self, name) for name in ("coordinator_address", "num_processes", "process_id")}
        missing = [name for name, value in group.items() if value is None]
        if missing and len(missing) < len(group):
            given = next(name for name, value in group.items() if value is not None)
            yield Problem(
                given,
                group[given],
                "a process group is named by coordinator_address, num_processes and process_id together",
                f"set mesh.{' and mesh.'.join(missing)} too",
            )
        if self.num_processes is not None and self.process_id is not None and self.process_id >= self.num_processes:
            yield Problem(
                "process_id",
                self.process_id,
                f"processes are numbered from 0 to num_processes - 1 = {self.num_processes - 1}",
                "set mesh.process_id below mesh.num_processes",
            )

    def _size_problems(self) -> Iterator[Problem]:
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        filling = [axis for axis, size in sizes.items() if size == -1]
        for axis, size in sizes.items():
            if size == 0:
                yield Problem(
                    axis, size, "an axis has at least one shard", f"set mesh.{axis} to 1 or more, or to -1 to fill"
                )
        if len(filling) > 1:
            yield Problem(
                filling[-1],
                -1,
                f"only one axis can take what is left, and mesh.{filling[0]} is -1 too",
                f"set mesh.{filling[0]} or mesh.{filling[-1]} to a size",
            )

    def _rule_problems(self) -> Iterator[Problem]:
        for logical, axes in self.rules.items():
            listed = isinstance(axes, tuple) and all(isinstance(axis, str) for axis in axes)
            if not listed:
                yield Problem(
                    f"rules.{logical}",
                    axes,
                    "a rule is a list of mesh axes",
                    f"write [{', '.join(MESH_AXES[:2])}], or [] for none",
                )
                continue
            for axis in axes:
                if axis not in MESH_AXES:
                    yield Problem(
                        f"rules.{logical}", axes, f"{axis} is no mesh axis", f"choose from {', '.join(MESH_AXES)}"
                    )
