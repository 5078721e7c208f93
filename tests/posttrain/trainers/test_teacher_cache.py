"""What a teacher says, computed once: the same training as with the teacher at hand, and never another teacher's."""

import gc
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import load_preset
from models.functional import FunctionalModel
from posttrain.bundle import FrozenRole
from posttrain.losses.distillation import TeacherTopK
from posttrain.trainers import teacher_cache
from posttrain.trainers.sft import prepare_rows
from posttrain.trainers.teacher_cache import cache_name, make_cache, segments
from posttrain.trainers.teaching import TaughtBatch, check_teacher, teacher_vocabulary
from pretrain.data.batch import TokenBatch
from pretrain.session import TrainingSession
from recipes.schema import DistillSection, ModelSection
from tests.posttrain.trainers.runs import load, train
from tests.pretrain.runs import assert_same_bits, losses

SECTION = DistillSection(transfer="top_k", top_k=2, teacher_outputs="cached")
EXAMPLES = {1: ([5, 6, 7, 8], [0, 1, 1, 1]), 2: ([5, 6], [1, 1]), 3: ([9, 4, 9], [0, 0, 1])}
"""Inputs, and which positions are trained."""


def rows_of(*layout: list[int], width: int = 8) -> TokenBatch:
    """Rows that hold these examples one behind the other."""
    fields = np.zeros((6, len(layout), width), np.int32)
    for row, numbers in enumerate(layout):
        place = 0
        for segment, number in enumerate(numbers, 1):
            inputs, trained = EXAMPLES[number]
            cells = slice(place, place + len(inputs))
            fields[0, row, cells] = inputs
            fields[1, row, cells] = np.arange(len(inputs))
            fields[2, row, cells] = segment
            fields[5, row, cells] = np.array(trained) * segment
            place += len(inputs)
    inputs, position, segmentation, targets, targets_position, trained = fields
    return TokenBatch(inputs, position, segmentation, targets, targets_position, trained)


class Pass:
    """Some batches, as a RowIterator gives them."""

    def __init__(self, *batches: TokenBatch, data: str = "data") -> None:
        self.batches, self.fingerprint, self.closed = batches, {"sources": data, "host": [0, 1]}, False

    def __iter__(self) -> Any:
        return iter(self.batches)

    def close(self) -> None:
        self.closed = True


def says(rows: TokenBatch) -> TaughtBatch:
    """A teacher whose word on a token is a function of the token and its position: 10 t + p, and 10 t + p + 1."""
    base = jnp.asarray(rows.inputs) * 10 + jnp.asarray(rows.inputs_position)
    ids = jnp.stack([base, base + 1], -1)
    return TaughtBatch(rows, None, TeacherTopK(ids, -ids.astype(jnp.float32), -base.astype(jnp.float32)))


def teacher(checksum: int = 1) -> Any:
    """Of a role, what the folder's name reads."""
    return FrozenRole("teacher", FunctionalModel(load_preset("tiny-llama"), ModelSection(preset="x")), {}, checksum)


def made(root: Path, *batches: TokenBatch, calls: list[int] | None = None, **changes: Any) -> Any:
    """The cache of a pass over `batches`."""
    rows: Any = Pass(*batches, data=changes.pop("data", "data"))

    def teach(rows: TokenBatch) -> TaughtBatch:
        if calls is not None:
            calls.append(1)
        return says(rows)

    role = teacher(changes.pop("checksum", 1))
    section = SECTION.model_copy(update=changes)
    cache = make_cache(root, section, role, rows, teach=teach, place_fn=lambda rows: rows, mode="full")
    assert rows.closed
    return cache


def test_examples_are_found_by_their_tokens_whatever_row_they_stand_in(tmp_path: Path) -> None:
    cache = made(tmp_path, rows_of([1, 2], [2]), rows_of([3]))
    # Six trained tokens: three of the first example, two of the second, which occurs twice, and one of the third.
    assert [array.shape for array in cache.arrays] == [(6, 2), (6, 2), (6,)]
    batch = rows_of([3, 2, 2], [], [1], width=9)
    found, expected = cache.look_up(batch), says(batch).top
    mask = batch.targets_segmentation != 0
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one[mask], np.asarray(other)[mask])
        assert not one[~mask].any()


def test_a_mask_is_part_of_an_example_and_one_that_was_not_read_is_an_error(tmp_path: Path) -> None:
    cache = made(tmp_path, rows_of([1, 2]))
    keys = [key for key, *_ in segments(rows_of([1, 2]))]
    batch = rows_of([1, 2])
    batch.targets_segmentation[0, 0] = 1
    other = [key for key, *_ in segments(batch)]
    assert other[0] != keys[0] and other[1] == keys[1]
    with pytest.raises(ValueError, match=r"has not read the example in row 0, cells 2 to 5: the data is another"):
        cache.look_up(rows_of([2, 3]))


@pytest.mark.parametrize("change", [{"checksum": 2}, {"data": "other"}, {"temperature": 2.0}, {"top_k": 1}])
def test_another_teacher_other_data_or_another_loss_has_a_folder_of_its_own(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    calls: list[int] = []
    first = made(tmp_path, rows_of([1]), calls=calls).folder
    assert made(tmp_path, rows_of([1]), calls=calls).folder == first and len(calls) == 1
    fields = dict(change)
    role = teacher(fields.pop("checksum", 1))
    fingerprint = {"sources": fields.pop("data", "data")}
    assert cache_name(SECTION.model_copy(update=fields), role, fingerprint) != first.name
    # How rows are laid out and batched makes no difference.
    assert cache_name(SECTION, teacher(), {"sources": "data", "rows_per_batch": 3, "packing": False}) == first.name


@pytest.mark.parametrize("name", ["ids.bin", "index.npz", "manifest.json"])
def test_a_damaged_folder_is_computed_anew(tmp_path: Path, name: str) -> None:
    calls: list[int] = []
    cache = made(tmp_path, rows_of([1]), calls=calls)
    expected = cache.look_up(rows_of([1]))
    path = cache.folder / name
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_same_bits(made(tmp_path, rows_of([1]), calls=calls).look_up(rows_of([1])), expected)
    assert len(calls) == 2
    assert [file.name for file in tmp_path.iterdir()] == [cache.folder.name]


# --- training ---

TOP = ("distill.transfer=top_k", "distill.top_k=8", "distill.temperature=2.0", "checkpoint.enabled=false")
WIDE = ("teacher.overrides.num_layers=3", "teacher.overrides.mlp_dim=84")
"""A width that no other array of the process has."""


def wide_arrays() -> int:
    return sum(84 in array.shape and not array.is_deleted() for array in jax.live_arrays())


def test_training_from_the_cache_is_training_with_the_teacher_which_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses to 1e-6 over six steps of packed, shuffled rows; another packing reads the same folder."""
    online = train("distill", tmp_path, "online", *TOP, *WIDE)
    step, held = TrainingSession.step, []

    def watched(self: TrainingSession, batch: Any) -> Any:
        held.append(wide_arrays())
        return step(self, batch)

    monkeypatch.setattr(TrainingSession, "step", watched)
    cached = ("distill.teacher_outputs=cached", f"distill.cache_path={tmp_path / 'kept'}")
    gc.collect()
    before = wide_arrays()
    offline = train("distill", tmp_path, "offline", *TOP, *WIDE, *cached)
    assert len(held) == 6 and max(held) <= before
    np.testing.assert_allclose(list(losses(offline.run_dir).values()), list(losses(online.run_dir).values()), rtol=1e-6)

    def never(*args: Any) -> None:
        raise AssertionError("the teacher read the examples a second time")

    monkeypatch.setattr(teacher_cache, "_fill", never)
    train("distill", tmp_path, "padded", *TOP, *WIDE, *cached, "data.packing=false", "train.steps=1")
    assert len(list((tmp_path / "kept").iterdir())) == 1


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (
            ("distill.teacher_outputs=cached",),
            r"distill\.teacher_outputs=cached: has no effect while distill\.transfer",
        ),
        ((*TOP, "distill.teacher_outputs=cached", "distill.feature_loss=l2"), r"while distill\.feature_loss=l2"),
        ((*TOP, "distill.cache_path=kept"), r"distill\.cache_path=kept: has no effect"),
        (
            (*TOP, "distill.teacher_outputs=cached", "teacher.memory=pinned_host"),
            r"teacher\.memory=pinned_host: has no",
        ),
        (("teacher.memory=pinned_host",), r"teacher\.memory=pinned_host: has no effect on a CPU"),
    ],
)
def test_a_cache_or_a_place_without_effect_is_refused_before_training(
    tmp_path: Path, overrides: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        train("distill", tmp_path, "refused", *overrides)
    assert not (tmp_path / "refused").exists()


def test_a_teacher_of_another_vocabulary_of_the_same_size_is_refused(tmp_path: Path) -> None:
    """A checkpoint of ours says which tokenizer its data was read with."""
    taught = train("sft", tmp_path, "teacher", "train.steps=1").run_dir
    named = f"teacher.load_parameters_path={taught}"
    info = taught / "checkpoints" / "1" / "run.json"
    recipe: Any = load("distill", tmp_path, "unused", named).recipe
    setup = prepare_rows(recipe)
    setup.close()
    assert check_teacher(recipe, setup).vocab_size == 259
    known = teacher_vocabulary(recipe)
    assert known is not None
    info.write_text(info.read_text().replace(known[1], "f" * 64))
    with pytest.raises(ValueError, match=r"its vocabulary has the fingerprint f{16}, that of tokenizer\.path=bytes is"):
        train("distill", tmp_path, "other", named)
    assert not (tmp_path / "other").exists()
