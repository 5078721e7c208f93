"""The sections of a pipeline's stages that train nothing: generated stories, and the export."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recipes.sections.base import Section


class StoriesSection(Section):
    """A small world of arithmetic stories, as `posttrain stories` writes it."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of all choices."""
    documents: Annotated[int, Field(ge=1)] = 20000
    """Documents to pretrain on."""
    examples: Annotated[int, Field(ge=1)] = 768
    """Solved stories for fine-tuning, and pairs for DPO."""
    held_out: Annotated[int, Field(ge=1)] = 400
    """Stories of each held-out file."""


class ExportSection(Section):
    """A Hugging Face folder, and the problems that an engine answers from it."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the parameters in the folder."""
    num_problems: Annotated[int, Field(ge=1)] = 3
    """Problems that the engine answers from the folder."""
    max_completion_length: Annotated[int, Field(ge=1)] = 256
    """Tokens; an answer that reaches it is cut."""
