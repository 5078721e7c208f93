"""The comparator finds and names what differs between two checkpoints, whatever their layouts; planted by hand."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from models.checkpoints import compare as module
from models.checkpoints.compare import Comparison, Options, compare_checkpoints, measure_gap, report_lines
from models.checkpoints.huggingface import ModelCard, export_hf
from models.checkpoints.views import open_view
from tests.models.checkpoints.stored_models import CONFIG, LAYOUTS, Layout, weights, write_step

EXACT = Options(values=True, atol=0.0, rtol=0.0, ignore_rngs=False, only="all")
NAMES_ONLY = Options(values=False, atol=0.0, rtol=0.0, ignore_rngs=False, only="all")
PARAMS_ONLY = Options(values=True, atol=0.0, rtol=0.0, ignore_rngs=False, only="params")
# 9 weights a layer in 3 layers, and 3 outside; as parameters, mu and nu; the optimizer's count, and the step.
NUM_ARRAYS = 3 * (9 * 3 + 3) + 2


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[Layout, Path]:
    """The same state in each layout."""
    folder = tmp_path_factory.mktemp("compare")
    return {layout: write_step(folder / str(index), layout, weights()) for index, layout in enumerate(LAYOUTS)}


def compare(a: Path, b: Path, options: Options = EXACT) -> Comparison:
    return compare_checkpoints(a, b, options)


def found(result: Comparison) -> list[tuple[str, str]]:
    return [(difference.kind, str(difference.name)) for difference in result.differences]


def said(result: Comparison, options: Options = EXACT, *, verbose: bool = False) -> str:
    return "\n".join(report_lines(result, options, verbose=verbose))


def edited(tmp_path: Path, layout: Layout, edit: Callable[[dict[str, Any]], None], **kwargs: Any) -> Path:
    params = weights()
    edit(params)
    return write_step(tmp_path / "edited", layout, params, **kwargs)


@pytest.mark.parametrize("b", LAYOUTS, ids=str)
@pytest.mark.parametrize("a", LAYOUTS[:2], ids=str)
def test_the_same_state_is_the_same_in_every_layout(stored: dict[Layout, Path], a: Layout, b: Layout) -> None:
    result = compare(stored[a], stored[b])
    assert result.same and result.largest is None
    assert result.num_compared == NUM_ARRAYS
    assert said(result).splitlines()[-1] == f"the same: {NUM_ARRAYS} arrays in common, by values"


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3]], ids=str)
def test_one_perturbed_weight_is_named_with_its_place_and_size(
    stored: dict[Layout, Path], tmp_path: Path, layout: Layout
) -> None:
    def perturb(params: dict[str, Any]) -> None:
        params["decoder"]["layers_1"]["mlp"]["wo"]["kernel"][3, 7] = 2.5

    was = weights()["decoder"]["layers_1"]["mlp"]["wo"]["kernel"][3, 7]
    result = compare(stored[LAYOUTS[0]], edited(tmp_path, layout, perturb, moments=False), PARAMS_ONLY)
    assert found(result) == [("value", "params/decoder/layers_1/mlp/wo/kernel")]
    gap = result.differences[0].gap
    assert gap is not None and gap.where == (3, 7) and gap.count == 1 and gap.size == 24 * 16
    assert gap.b == 2.5 and gap.a == was and gap.largest == pytest.approx(2.5 - was, rel=1e-12)
    assert f"largest |difference| {2.5 - float(was):.6g} at [3, 7]" in said(result)
    # Names and shapes are the same, and the report says that no number was looked at.
    blind = compare(stored[LAYOUTS[0]], tmp_path / "edited", Options(False, 0.0, 0.0, False, "params"))
    assert blind.same and "values were not read: --values" in said(blind, NAMES_ONLY)


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[3]], ids=str)
def test_one_missing_key_is_named_on_the_side_that_has_it(
    stored: dict[Layout, Path], tmp_path: Path, layout: Layout
) -> None:
    def remove(params: dict[str, Any]) -> None:
        del params["decoder"]["layers_2"]["self_attention"]["query"]

    shorter = edited(tmp_path, layout, remove, moments=False)
    name = "params/decoder/layers_2/self_attention/query/kernel"
    result = compare(stored[LAYOUTS[0]], shorter, PARAMS_ONLY)
    assert found(result) == [("only in A", name)]
    assert result.differences[0].detail == "float32[16, 4, 8]"
    assert found(compare(shorter, stored[LAYOUTS[0]], PARAMS_ONLY)) == [("only in B", name)]


def test_one_changed_dtype_is_named_and_what_it_does_to_the_values(stored: dict[Layout, Path], tmp_path: Path) -> None:
    def narrow(params: dict[str, Any]) -> None:
        norm = params["decoder"]["decoder_norm"]
        norm["scale"] = norm["scale"].astype(jnp.bfloat16)

    other = edited(tmp_path, LAYOUTS[3], narrow, moments=False)
    name = "params/decoder/decoder_norm/scale"
    result = compare(stored[LAYOUTS[0]], other, PARAMS_ONLY)
    assert found(result) == [("dtype", name), ("value", name)]
    assert result.differences[0].detail == "A float32, B bfloat16"
    # bfloat16 keeps 8 bits: a relative rounding of at most 2^-9.
    loose = compare(stored[LAYOUTS[0]], other, Options(True, 0.0, 2.0**-8, False, "params"))
    assert found(loose) == [("dtype", name)] and loose.largest is not None


def test_another_shape_is_named_and_its_values_are_left_alone(stored: dict[Layout, Path], tmp_path: Path) -> None:
    def transpose(params: dict[str, Any]) -> None:
        params["decoder"]["logits_dense"]["kernel"] = params["decoder"]["logits_dense"]["kernel"].T

    result = compare(stored[LAYOUTS[0]], edited(tmp_path, LAYOUTS[3], transpose, moments=False), PARAMS_ONLY)
    assert found(result) == [("shape", "params/decoder/logits_dense/kernel")]
    assert result.differences[0].detail == "A [16, 32], B [32, 16]"


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[3], LAYOUTS[4]], ids=str)
def test_two_swapped_layers_are_called_so(stored: dict[Layout, Path], tmp_path: Path, layout: Layout) -> None:
    def swap(params: dict[str, Any]) -> None:
        decoder = params["decoder"]
        decoder["layers_1"], decoder["layers_2"] = decoder["layers_2"], decoder["layers_1"]

    result = compare(stored[LAYOUTS[1]], edited(tmp_path, layout, swap))
    assert result.moves == ["layers 1 and 2 are swapped"]
    # All of both layers, with moments, and nothing else.
    assert result.differences == [] and len(result.moved) == 2 * 9 * 3 and not result.same
    assert "layers 1 and 2 are swapped\n  (54 arrays differ for that reason alone" in said(result)
    assert said(result, verbose=True).count("values; largest |difference| ") == 54


def test_a_rotation_of_layers_a_part_that_is_swapped_and_what_differs_beside_are_told_apart(
    stored: dict[Layout, Path], tmp_path: Path
) -> None:
    def rotate(params: dict[str, Any]) -> None:
        decoder = params["decoder"]
        layers = [decoder[f"layers_{i}"] for i in (2, 0, 1)]
        decoder.update({f"layers_{i}": layer for i, layer in enumerate(layers)})

    rotated = compare(stored[LAYOUTS[0]], edited(tmp_path / "rotated", LAYOUTS[3], rotate))
    assert rotated.moves == [
        "layer 0 of A is layer 1 of B",
        "layer 1 of A is layer 2 of B",
        "layer 2 of A is layer 0 of B",
    ]
    assert rotated.differences == []

    def swap_one_weight(params: dict[str, Any]) -> None:
        first, second = params["decoder"]["layers_0"]["mlp"], params["decoder"]["layers_2"]["mlp"]
        first["wo"], second["wo"] = second["wo"], first["wo"]
        first["wi_0"]["kernel"][0, 0] += 1.0

    partly = compare(stored[LAYOUTS[0]], edited(tmp_path / "partly", LAYOUTS[3], swap_one_weight), PARAMS_ONLY)
    assert partly.moves == ["layers 0 and 2 are swapped in params/decoder/layers_*/mlp/wo/kernel"]
    assert found(partly) == [("value", "params/decoder/layers_0/mlp/wi_0/kernel")]


def test_tolerances_are_absolute_plus_relative_to_b_and_integers_are_exact() -> None:
    a, b = np.array([1.0, 100.0, 0.0]), np.array([1.1, 101.0, 0.05])
    # |a-b| = 0.1, 1, 0.05 against 0.05 + 0.01 * |b| = 0.061, 1.06, 0.0505.
    gap = measure_gap(a, b, atol=0.05, rtol=0.01)
    assert gap is not None and gap.count == 1 and gap.where == (1,) and gap.largest == 1.0
    steps = measure_gap(np.int32([7, 5]), np.int32([7, 6]), atol=10.0, rtol=10.0)
    assert steps is not None and steps.count == 1 and steps.where == (1,)
    # Neighbours that float64 can't tell apart.
    large = np.uint64([2**63, 2**63 + 1])
    assert measure_gap(large, large, atol=0.0, rtol=0.0) is None


def test_nan_equals_nan_only_and_is_further_off_than_any_number() -> None:
    a, b = np.float32([np.nan, 1.0, np.inf, 2.0]), np.float32([np.nan, np.nan, np.inf, 900.0])
    gap = measure_gap(a, b, atol=1e9, rtol=0.0)
    assert gap is not None and gap.count == 1 and gap.where == (1,) and gap.largest == np.inf
    assert measure_gap(a, a.copy(), atol=0.0, rtol=0.0) is None
    # A relative tolerance of infinity is infinite, and still no number is near it.
    gap = measure_gap(np.float32([1.0]), np.float32([np.inf]), atol=0.0, rtol=1.0)
    assert gap is not None and gap.count == 1


def test_the_largest_difference_is_found_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 10)
    a = np.zeros((5, 7), np.float32)
    b = a.copy()
    b[0, 1], b[4, 2], b[2, 2] = 1.0, -3.0, 2.0
    gap = measure_gap(a, b, atol=0.0, rtol=0.0)
    assert gap is not None and (gap.count, gap.where, gap.largest, gap.b) == (3, (4, 2), 3.0, -3.0)


def test_states_of_random_streams_count_unless_they_are_left_out(stored: dict[Layout, Path], tmp_path: Path) -> None:
    keys = {"decoder": {"rngs": {"dropout": {"key": jnp.arange(2, dtype=jnp.uint32)}}}}
    other = write_step(tmp_path, LAYOUTS[3], weights(), nnx_aux={"model": keys})
    assert found(compare(stored[LAYOUTS[0]], other)) == [("only in B", "rngs/decoder/rngs/dropout/key")]
    ignoring = Options(True, 0.0, 0.0, ignore_rngs=True, only="all")
    assert compare(stored[LAYOUTS[0]], other, ignoring).same


def test_moments_and_step_count_unless_only_parameters_are_compared(stored: dict[Layout, Path], tmp_path: Path) -> None:
    later = write_step(tmp_path, LAYOUTS[0], weights(), step=6)
    assert found(compare(stored[LAYOUTS[0]], later)) == [("value", "opt_state/0/count"), ("value", "step")]
    assert compare(stored[LAYOUTS[0]], later, PARAMS_ONLY).same
    alone = write_step(tmp_path / "alone", LAYOUTS[3], weights(), moments=False)
    assert {kind for kind, _ in found(compare(stored[LAYOUTS[0]], alone))} == {"only in A"}
    grouped = said(compare(stored[LAYOUTS[0]], alone))
    assert "  opt_state/0/nu/decoder/layers_[0-2]/mlp/wo/kernel: float32[24, 16]" in grouped
    assert "(61):" in grouped


def test_a_maxtext_tree_is_compared_in_the_same_names_and_noted(stored: dict[Layout, Path], shared_dir: Path) -> None:
    folder = shared_dir / "fixtures/maxtext/llama-tiny"
    assert compare(folder, folder / "items").same
    result = compare(stored[LAYOUTS[0]], folder, Options(False, 0.0, 0.0, ignore_rngs=True, only="all"))
    # The sizes are others, the names are the same but for the schedule's count.
    assert {kind for kind, _ in found(result)} == {"shape", "only in B"}
    assert [name for kind, name in found(result) if kind == "only in B"] == ["opt_state/2/count"]
    assert "note: B has no format marker of ours" in said(result)


def test_a_hugging_face_folder_is_compared_in_the_same_names(stored: dict[Layout, Path], tmp_path: Path) -> None:
    params = weights()
    folder = tmp_path / "hf"
    card = ModelCard("x", None, "")
    where = {"tokenizer_source": None, "generation": {}, "card": card, "max_shard_bytes": 20_000}
    export_hf(folder, CONFIG, params, param_scan_axis=1, dtype="float32", **where)
    result = compare(stored[LAYOUTS[0]], folder, PARAMS_ONLY)
    assert result.same and result.num_compared == 30
    params["decoder"]["layers_2"]["self_attention"]["out"]["kernel"][1, 2, 3] += 0.5
    export_hf(tmp_path / "other", CONFIG, params, param_scan_axis=1, dtype="float32", **where)
    result = compare(folder, tmp_path / "other", PARAMS_ONLY)
    assert found(result) == [("value", "params/decoder/layers_2/self_attention/out/kernel")]
    assert result.differences[0].gap is not None and result.differences[0].gap.where == (1, 2, 3)


def test_a_damaged_checkpoint_and_a_folder_without_one_are_refused(stored: dict[Layout, Path], tmp_path: Path) -> None:
    step = write_step(tmp_path, LAYOUTS[0], weights(), moments=False)
    (step / "items" / "manifest.ocdbt").unlink()
    with pytest.raises(
        ValueError, match=r"is damaged and was not opened; use another step:\n  items/manifest\.ocdbt: missing"
    ):
        compare(stored[LAYOUTS[0]], step)
    with pytest.raises(ValueError, match="nowhere: does not exist"):
        compare(tmp_path / "nowhere", stored[LAYOUTS[0]])


def test_no_more_than_one_weight_of_each_side_is_read_at_once(
    stored: dict[Layout, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ROOM", 1)
    reads: list[set[str]] = []

    def watched(view: Any) -> Any:
        def read(sources: Any) -> Any:
            reads.append({"/".join(source) for source in sources})
            return view.read(sources)

        return read

    with open_view(stored[LAYOUTS[0]]) as a, open_view(stored[LAYOUTS[3]]) as b:
        pair = module._Pair(
            dataclasses.replace(a, read=watched(a)), dataclasses.replace(b, read=watched(b)), a.slots, b.slots
        )
        names = sorted(a.slots, key=module._order)
        seen = [
            name for batch in pair.batches(names) for name, one, other in pair.values(batch) if one.shape == other.shape
        ]
    assert seen == names
    # A stack on one side and its three layers on the other; never two weights.
    assert {len(read) for read in reads} == {1, 3}
