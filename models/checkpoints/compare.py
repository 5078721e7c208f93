"""Two checkpoints of any layout, compared name by name, and value by value if asked to.

What is read of each is `models.checkpoints.views`: names and layers brought together, numbers as stored. Values are
read one weight at a time (one stored array of each side, or as many as hold the same layers), so memory is bounded by
the largest weight, not by the checkpoints.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from models.checkpoints.views import PARAMS, RNGS, Name, Slot, View, open_view, weight_text

Only = Literal["params", "all"]
Kind = Literal["only in A", "only in B", "shape", "dtype", "value"]

# Values are converted to float64 in blocks of this many elements.
_BLOCK = 1 << 20
# Small arrays are read together, up to this many bytes, because each reading has a cost of its own.
_ROOM = 16 * 2**20
# Enough to tell two layers apart before both are read whole.
_SAMPLE = 4096


@dataclass(frozen=True)
class Options:
    """What is compared.

    Attributes:
        values: whether numbers are read at all.
        atol, rtol: floating-point values agree if |a - b| <= atol + rtol * |b|; integers only if they are equal.
        ignore_rngs: leave out the states of random streams.
        only: "params" leaves out all but the parameters.
    """

    values: bool
    atol: float
    rtol: float
    ignore_rngs: bool
    only: Only


@dataclass(frozen=True)
class Gap:
    """How two arrays of one shape differ: the largest |a - b|, its place, and how many values are out of tolerance."""

    largest: float
    where: tuple[int, ...]
    a: float
    b: float
    count: int
    size: int

    def __str__(self) -> str:
        at = f"[{', '.join(map(str, self.where))}]" if self.where else ""
        return (
            f"{self.count} of {self.size} values; largest |difference| {self.largest:.6g} at {at or 'the scalar'}: "
            f"A {self.a:.9g}, B {self.b:.9g}"
        )


@dataclass(frozen=True)
class Difference:
    """One array that differs."""

    kind: Kind
    name: Name
    detail: str
    gap: Gap | None = None


@dataclass
class Comparison:
    """What was found."""

    a: str
    b: str
    num_compared: int
    notes: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)
    moves: list[str] = field(default_factory=list)
    """Layers of A that are other layers of B, in words."""
    moved: list[Difference] = field(default_factory=list)
    """Differences of values that `moves` explain."""
    largest: tuple[Gap, Name] | None = None
    """The largest difference of values, within tolerance or not."""

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.differences or self.moved)


def compare_checkpoints(a: Path, b: Path, options: Options) -> Comparison:
    """Compares two checkpoints.

    Args:
        a: as `views.open_view` takes it.
        b: likewise.
        options: what is compared.

    Raises:
        ValueError: one of them is no checkpoint or damaged, or nothing of them is left to compare.
    """
    with open_view(a) as left, open_view(b) as right:
        slots_a, slots_b = _chosen(left, options), _chosen(right, options)
        common = [name for name in slots_a if name in slots_b]
        result = Comparison(_title(left), _title(right), len(common))
        if left.is_foreign != right.is_foreign:
            side = "A" if left.is_foreign else "B"
            result.notes.append(
                f"note: {side} has no format marker of ours: its numbers are compared as they are stored, MaxText's "
                "with its own factors; `posttrain convert` brings them to ours"
            )
        result.differences += [Difference("only in A", n, _kind_of(slots_a[n])) for n in slots_a if n not in slots_b]
        result.differences += [Difference("only in B", n, _kind_of(slots_b[n])) for n in slots_b if n not in slots_a]
        comparable = []
        for name in common:
            one, other = slots_a[name], slots_b[name]
            if one.shape != other.shape:
                result.differences.append(Difference("shape", name, f"A {list(one.shape)}, B {list(other.shape)}"))
                continue
            if one.dtype != other.dtype:
                result.differences.append(Difference("dtype", name, f"A {one.dtype}, B {other.dtype}"))
            comparable.append(name)
        if options.values:
            _compare_values(_Pair(left, right, slots_a, slots_b), comparable, options, result)
    return result


def _title(view: View) -> str:
    return f"{view.path} ({view.layout}{', not ours' if view.is_foreign else ''})"


def _chosen(view: View, options: Options) -> dict[Name, Slot]:
    chosen = {
        name: slot
        for name, slot in sorted(view.slots.items(), key=lambda item: _order(item[0]))
        if not (options.only == "params" and name.weight[0] != PARAMS)
        and not (options.ignore_rngs and name.weight[0] == RNGS)
    }
    if not chosen:
        raise ValueError(
            f"{view.path}: holds no array under --only {options.only}: there is nothing to compare; name another "
            "checkpoint, or use --only all"
        )
    return chosen


def _order(name: Name) -> tuple[bool, tuple[str, ...], int]:
    # Parameters first: they are what people look for.
    return name.weight[0] != PARAMS, name.weight, -1 if name.layer is None else name.layer


def _kind_of(slot: Slot) -> str:
    return f"{slot.dtype}{list(slot.shape)}"


@dataclass
class _Pair:
    """Both sides, and the stored arrays of the weight at hand."""

    a: View
    b: View
    slots_a: Mapping[Name, Slot]
    slots_b: Mapping[Name, Slot]

    def values(self, names: list[Name]) -> Iterator[tuple[Name, np.ndarray, np.ndarray]]:
        """The arrays of both sides under these names, which are read together."""
        stored_a = self.a.read({self.slots_a[name].source for name in names})
        stored_b = self.b.read({self.slots_b[name].source for name in names})
        for name in names:
            one, other = self.slots_a[name], self.slots_b[name]
            yield name, one.taken_from(stored_a[one.source]), other.taken_from(stored_b[other.source])

    def batches(self, names: list[Name]) -> list[list[Name]]:
        """Divides names into what is read at once: whole stacks, and small arrays up to a few MiB."""
        batches: list[list[Name]] = []
        weight_sources: set[tuple[str, tuple[str, ...]]] = set()
        size = 0
        for name in names:
            sources = {("a", self.slots_a[name].source), ("b", self.slots_b[name].source)}
            new = sum(
                (self.a if side == "a" else self.b).stored[source].num_bytes
                for side, source in sources - weight_sources
            )
            if not batches or (new and size + new > _ROOM and not self._same_stack(batches[-1][-1], name)):
                batches.append([])
                weight_sources, size = set(), 0
                new = sum((self.a if side == "a" else self.b).stored[source].num_bytes for side, source in sources)
            batches[-1].append(name)
            weight_sources |= sources
            size += new
        return batches

    def _same_stack(self, one: Name, other: Name) -> bool:
        """Whether either side holds both in one stored array, which then is read once."""
        return (
            self.slots_a[one].source == self.slots_a[other].source
            or self.slots_b[one].source == self.slots_b[other].source
        )


def _compare_values(pair: _Pair, names: list[Name], options: Options, result: Comparison) -> None:
    samples: dict[Name, tuple[np.ndarray, np.ndarray]] = {}
    found: dict[Name, Difference] = {}
    for batch in pair.batches(names):
        for name, one, other in pair.values(batch):
            gap = measure_gap(one, other, atol=options.atol, rtol=options.rtol)
            if gap is None:
                continue
            if result.largest is None or gap.largest > result.largest[0].largest:
                result.largest = gap, name
            if gap.count:
                found[name] = Difference("value", name, str(gap), gap)
                if name.layer is not None:
                    samples[name] = _sample(one), _sample(other)
    moves = _find_moves(pair, samples, options)
    result.moves, explained = _tell_moves(moves, found)
    result.moved += [difference for name, difference in found.items() if name in explained]
    result.differences += [difference for name, difference in found.items() if name not in explained]


def measure_gap(a: np.ndarray, b: np.ndarray, *, atol: float, rtol: float) -> Gap | None:
    """Compares two arrays of one shape, block by block; None if all values are the same.

    Equal values and NaN in both places are the same. Floating-point values are compared in float64.
    """
    exact = not (jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating))
    flat_a, flat_b = a.reshape(-1), b.reshape(-1)
    largest, at, count = 0.0, None, 0
    for start in range(0, flat_a.size, _BLOCK):
        x, y = flat_a[start : start + _BLOCK], flat_b[start : start + _BLOCK]
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            continue
        same = x == y
        x, y = x.astype(np.float64), y.astype(np.float64)
        same |= np.isnan(x) & np.isnan(y)
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(x - y))
            tolerance = atol + rtol * np.abs(y)
        # A NaN or an infinity against a number is the largest difference there is.
        difference = np.where(np.isnan(difference), np.inf, difference)
        within = same if exact else same | (np.isfinite(difference) & (difference <= tolerance))
        count += int((~within).sum())
        index = int(difference.argmax())
        if difference[index] > largest:
            largest, at = float(difference[index]), start + index
    if at is None:
        return None
    where = tuple(int(i) for i in np.unravel_index(at, a.shape))
    return Gap(largest, where, float(flat_a[at]), float(flat_b[at]), count, flat_a.size)


def _sample(array: np.ndarray) -> np.ndarray:
    flat = array.reshape(-1)
    return flat[:: max(1, flat.size // _SAMPLE)].copy()


Moves = dict[tuple[int, int], set[tuple[str, ...]]]


def _find_moves(pair: _Pair, samples: Mapping[Name, tuple[np.ndarray, np.ndarray]], options: Options) -> Moves:
    """Which layers' arrays of A are, under the same weight, another layer's of B: {(layer in A, in B): weights}."""
    layers: dict[tuple[str, ...], list[Name]] = {}
    for name in samples:
        layers.setdefault(name.weight, []).append(name)
    moves: Moves = {}

    def agree(one: np.ndarray, other: np.ndarray) -> bool:
        if one.shape != other.shape:
            return False
        gap = measure_gap(one, other, atol=options.atol, rtol=options.rtol)
        return gap is None or gap.count == 0

    for weight, names in layers.items():
        held: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
        pairs = [(one, other) for one in names for other in names if one != other]
        for one, other in pairs:
            if agree(samples[one][0], samples[other][1]):
                whole_a = _whole(pair.a, pair.slots_a[one], held, "A")
                whole_b = _whole(pair.b, pair.slots_b[other], held, "B")
                if one.layer is not None and other.layer is not None and agree(whole_a, whole_b):
                    moves.setdefault((one.layer, other.layer), set()).add(weight)
    return moves


def _whole(view: View, slot: Slot, held: dict[tuple[str, tuple[str, ...]], np.ndarray], side: str) -> np.ndarray:
    """One layer's array; a stored array that holds several is kept in `held`, where the next one is found."""
    key = (side, slot.source)
    stored = held[key] if key in held else view.read([slot.source])[slot.source]
    if slot.cut is not None:
        held[key] = stored
    return slot.taken_from(stored)


def _tell_moves(moves: Moves, found: Mapping[Name, Difference]) -> tuple[list[str], set[Name]]:
    """The moves in words, and the names whose differences they explain."""
    told: list[str] = []
    explained: set[Name] = set()
    for (i, j), weights in sorted(moves.items()):
        back = moves.get((j, i), set())
        if back and j < i:
            continue
        both = weights & back if back else weights
        affected = {
            name.weight for name in found if name.layer in ((i, j) if back else (i,)) and name.weight[0] == PARAMS
        }
        share = "" if affected and affected <= both else " in " + ", ".join(weight_text(w, "*") for w in sorted(both))
        told.append(f"layers {i} and {j} are swapped{share}" if back else f"layer {i} of A is layer {j} of B{share}")
        for weight in both:
            explained |= {Name(weight, i), Name(weight, j)} if back else {Name(weight, i)}
    return told, explained & found.keys()


def report_lines(result: Comparison, options: Options, *, verbose: bool) -> Iterator[str]:
    """What a person reads of a comparison.

    Args:
        result: the comparison.
        options: what it was asked for.
        verbose: a line for each array; otherwise layers that differ in the same way share one.
    """
    yield f"A: {result.a}"
    yield f"B: {result.b}"
    yield from result.notes
    yield from result.moves
    if result.moved and not verbose:
        yield f"  ({len(result.moved)} arrays differ for that reason alone; --verbose lists them)"
    listed = [*result.differences, *(result.moved if verbose else [])]
    kinds: tuple[Kind, ...] = ("only in A", "only in B", "shape", "dtype", "value")
    for kind in kinds:
        of_kind = [difference for difference in listed if difference.kind == kind]
        if of_kind:
            yield f"{kind} ({len(of_kind)}):"
            yield from (f"  {line}" for line in (_each(of_kind) if verbose else _grouped(of_kind)))
    if result.largest is not None:
        gap, name = result.largest
        yield f"largest |difference| of all: {gap.largest:.6g} in {name}"
    what = "values" if options.values else "names, shapes and dtypes (values were not read: --values)"
    ending = "the same" if result.same else f"different in {len(result.differences) + len(result.moved)} places"
    yield f"{ending}: {result.num_compared} arrays in common, by {what}"


def _each(differences: list[Difference]) -> Iterator[str]:
    yield from (f"{difference.name}: {difference.detail}" for difference in differences)


def _grouped(differences: list[Difference]) -> Iterator[str]:
    """One line for all layers of a weight that differ alike; for values, the layer where they differ most."""
    groups: dict[tuple[tuple[str, ...], str], list[Difference]] = {}
    for difference in differences:
        detail = "" if difference.gap is not None else difference.detail
        groups.setdefault((difference.name.weight, detail), []).append(difference)
    for (weight, _), group in groups.items():
        worst = max(group, key=lambda difference: difference.gap.largest if difference.gap else 0.0)
        layers = [difference.name.layer for difference in group if difference.name.layer is not None]
        if len(group) == 1:
            yield f"{worst.name}: {worst.detail}"
        elif worst.gap is None:
            yield f"{weight_text(weight, _ranges(layers))}: {worst.detail}"
        else:
            yield f"{weight_text(weight, _ranges(layers))}: most in layer {worst.name.layer}: {worst.detail}"


def _ranges(numbers: list[int]) -> str:
    """Numbers in brackets, runs joined: [0-3,7]."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return "[" + ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) + "]"
