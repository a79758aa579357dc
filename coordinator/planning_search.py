"""The search behind planning: which Islands in which order, and where the layers are cut.

Theory of operation. An ``Option`` is one way to use an Island: a shard that it holds, whose layers are fixed, or one that it would load,
whose layers are free. A route is an ordered tuple of options of different Islands. ``Searcher.find`` is asked for 1, 2, 3, ... stages in
turn, so when it is asked for S there is no route of S - 1 stages. That makes greedy steps exact: let every stage that is free reach as far
as its memory allows; if one of them gets nothing, the route would do without it, with S - 1 stages, and there is none. What is left are
intervals: of each cut it is known how far right the stages before it reach and how far left the stages behind it, and every cut chosen
from left to right within these bounds leads to the end.

Routes grow by one stage at a time, all at once as columns of numbers. While a step makes at most ``ROUTES_EXACT`` of them the search is
complete. Beyond that only the best are grown: the ones with the shortest estimated time, for each number of shards to load, and the ones
with the most memory to spare, or tight cases would find no end. A route whose best possible continuation cannot hold the model dies early.

All times are whole nanoseconds: sums do not depend on their order, so the same ring begun elsewhere costs exactly the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

CELLS_STEP = 256  # llama.cpp pads the cache to this
ROUTES_EXACT = 20_000  # all of 5 Islands, 4 stages of 11 Islands, 3 of 27, 2 of 141
ROUTES_KEPT = 64
ROUTES_JUDGED = 512  # finished routes whose cuts are computed, where the search is not complete
LEVELS_MAX = 16  # numbers of cells that are tried at once
# Sums of 1,024 layers have to stay below 2**63. No Island has 2 PiB, so what is clipped here does not fit anywhere.
_ROOM_MAX = 2**51
_COST_MAX = 2**52

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Place:
    """An Island in numbers. ``first`` to ``whole``: bytes that a stage in this position takes before its first layer and cell."""

    memory: int
    first: int
    middle: int
    last: int
    whole: int
    layer_ns: int
    price: int


@dataclass(frozen=True, slots=True)
class Option:
    """``low`` to ``high`` of a shard that is held with ``cells`` to give and ``token_ns`` a token; ``high`` 0: one that would be loaded."""

    site: int
    low: int = 0
    high: int = 0
    cells: int = 0
    token_ns: int = 0

    @property
    def held(self) -> bool:
        return self.high > 0


@dataclass(frozen=True, slots=True)
class Problem:
    """``kept_bytes``: for each cell in every stage but the last. ``timed``: False where no Island knows its speed, then all count as equal.

    ``places`` are sorted by name, which settles ties. Cells go from ``cells_least`` to ``cells_most`` in steps of CELLS_STEP.
    """

    layer_bytes: tuple[int, ...]
    kv_bytes: tuple[int, ...]
    kept_bytes: int
    places: tuple[Place, ...]
    options: tuple[Option, ...]
    delays_ns: Ints
    timed: bool
    cells_least: int
    cells_most: int


@dataclass(frozen=True, slots=True)
class Found:
    """Stage i has the layers from ``cuts[i]`` up to ``cuts[i + 1]``."""

    options: tuple[Option, ...]
    cuts: tuple[int, ...]
    cells: int


@dataclass(frozen=True, slots=True)
class _Reach:
    """For each number of cells and each place: how far a stage that is loaded there goes.

    ``reach[c, p, low]``: furthest end of a middle stage; ``back[c, p, high]``: earliest begin; ``first``: furthest end of a first stage;
    ``last``: earliest begin of a last stage; ``typical``: how many layers of average size fit.
    """

    cells: Ints
    reach: Ints
    back: Ints
    first: Ints
    last: Ints
    typical: Ints


@dataclass(frozen=True, slots=True)
class _Partial:
    """Routes under way, one a row. The last cut can be anywhere from ``least`` (every stage has a layer) to ``front`` (memory is full)."""

    options: Ints
    used: Bools
    least: Ints
    front: Ints
    loads: Ints
    wire_ns: Ints
    pace: Floats  # sum of layers a nanosecond
    slack: Ints  # layers that the best continuation could hold beyond the model's

    def take(self, rows: Ints) -> _Partial:
        return _Partial(
            self.options[rows],
            self.used[rows],
            self.least[rows],
            self.front[rows],
            self.loads[rows],
            self.wire_ns[rows],
            self.pace[rows],
            self.slack[rows],
        )


@dataclass(frozen=True, slots=True)
class _Routes:
    """Finished routes, one a row, one column a stage."""

    options: Ints
    site: Ints
    held: Bools
    low: Ints
    high: Ints


class Searcher:
    """The columns of one problem. Nothing changes after it is made."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.total = len(problem.layer_bytes)
        options = problem.options
        self.site = _ints([option.site for option in options])
        self.low = _ints([option.low for option in options])
        self.high = _ints([option.high for option in options])
        self.held = self.high > 0
        self.layer_ns = _ints([place.layer_ns for place in problem.places])
        self.pace = 1.0 / np.maximum(self.layer_ns, 1)
        self.least = self._reaches(_ints([problem.cells_least]))
        # The most layers that an Island can add to a route, whatever the place in it.
        at_most = np.max(self.least.reach[0] - np.arange(self.total + 1), axis=1)
        at_most = np.maximum(at_most, np.maximum(self.least.first[0], self.total - self.least.last[0]))
        np.maximum.at(at_most, self.site, self.high - self.low)
        self.at_most = at_most

    def fewest(self) -> int:
        """No route has fewer stages than this; more than there are Islands where all together have not enough."""
        if self._alone():
            return 1
        sums = np.cumsum(np.sort(self.at_most)[::-1])
        return max(2, int(np.searchsorted(sums, self.total)) + 1)

    def find(self, stages: int) -> Found | None:
        """The best route of so many stages; there must be none of fewer."""
        if stages == 1:
            return self._alone()
        if not 2 <= stages <= min(self.total, len(self.problem.places)):
            return None
        partial, complete = self._start(), True
        for rest in range(stages - 1, -1, -1):
            if len(partial.options) * len(self.site) > ROUTES_EXACT:
                partial, complete = self._prune(partial), False
            partial = self._grow(partial, rest)
            if not len(partial.options):
                return None
        for loads in np.unique(partial.loads):
            rows = np.flatnonzero(partial.loads == loads)
            if not complete:
                rows = rows[_smallest(self._score(partial)[rows], ROUTES_JUDGED)]
            if found := self._best(partial.options[rows], partial.wire_ns[rows]):
                return found
        return None

    def _whole_cells(self, place: Place) -> int:
        """Cells that fit beside the whole model; 0 where it does not fit."""
        room = place.memory - place.whole - sum(self.problem.layer_bytes)
        per_cell = sum(self.problem.kv_bytes)
        if room < self.problem.cells_least * per_cell:
            return 0
        if room >= self.problem.cells_most * per_cell:
            return self.problem.cells_most
        return room // per_cell // CELLS_STEP * CELLS_STEP

    def _alone(self) -> Found | None:
        best: tuple[tuple[int, int, int, int, int], Found] | None = None
        for option in self.problem.options:
            place = self.problem.places[option.site]
            cells = min(option.cells, self.problem.cells_most) if option.held else self._whole_cells(place)
            if not cells or (option.held and option.high - option.low < self.total):
                continue
            token_ns = option.token_ns if option.held else self.total * place.layer_ns
            key = (not option.held, token_ns, place.price, option.site, -cells)
            if best is None or key < best[0]:
                best = key, Found((option,), (0, self.total), cells)
        return best and best[1]

    def _reaches(self, cells: Ints) -> _Reach:
        places, total = self.problem.places, self.total
        shape = (len(cells), len(places), total + 1)
        reach, back = np.empty(shape, np.int64), np.empty(shape, np.int64)
        first, last, typical = (np.empty(shape[:2], np.int64) for _ in range(3))
        numbers = np.arange(total + 1)
        for level, count in enumerate(cells.tolist()):
            costs = [
                min(weights + count * kv, _COST_MAX)
                for weights, kv in zip(self.problem.layer_bytes, self.problem.kv_bytes, strict=True)
            ]
            ends = _ints([0, *costs]).cumsum()
            kept = count * self.problem.kept_bytes
            middle = _rooms([place.memory - place.middle - kept for place in places])
            room = middle[:, None]
            reach[level] = np.maximum(np.searchsorted(ends, ends + room, "right") - 1, numbers)
            back[level] = np.minimum(np.searchsorted(ends, ends - room, "left"), numbers)
            room = _rooms([place.memory - place.first - kept for place in places])
            first[level] = np.maximum(np.searchsorted(ends, room, "right") - 1, 0)
            room = _rooms([place.memory - place.last for place in places])
            last[level] = np.minimum(np.searchsorted(ends, ends[-1] - room, "left"), total)
            average = max(1, int(ends[-1]) // total)
            typical[level] = np.clip(middle // average, 1, total)
        return _Reach(cells, reach, back, first, last, typical)

    def _start(self) -> _Partial:
        nothing = np.zeros(1, np.int64)
        used = np.zeros((1, len(self.problem.places)), np.bool_)
        return _Partial(
            np.empty((1, 0), np.int64), used, nothing, nothing, nothing, nothing, np.zeros(1), slack=nothing
        )

    def _grow(self, old: _Partial, rest: int) -> _Partial:
        """Every route with every option that can come next; ``rest`` stages will follow that one."""
        total, first = self.total, not old.options.shape[1]
        front, least = old.front[:, None], old.least[:, None]
        ends_well = self.high == total if not rest else self.high <= total - rest
        held = self.held & ends_well & (least <= self.low) & (self.low <= front)
        if rest:
            reach = self.least.first[0][self.site] if first else self.least.reach[0][self.site, front]
            reach = np.broadcast_to(np.minimum(reach, total - rest), held.shape)
            fresh = (reach > front) & (least < total - rest)
        else:
            reach = np.full(held.shape, total)
            fresh = (self.least.last[0][self.site] <= front) & (least < total)
        reach = np.where(self.held, self.high, reach)
        slack = reach + self._others(old.used, rest)[:, self.site] - total
        possible = np.where(self.held, held, fresh) & ~old.used[:, self.site] & (slack >= 0)
        row, option = np.nonzero(possible)
        site, loaded = self.site[option], ~self.held[option]
        wire_ns = old.wire_ns[row]
        if not first:
            wire_ns = wire_ns + self.problem.delays_ns[self.site[old.options[row, -1]], site]
            if not rest:
                wire_ns = wire_ns + self.problem.delays_ns[site, self.site[old.options[row, 0]]]
        used = old.used[row]
        used[np.arange(len(row)), site] = True
        return _Partial(
            np.concatenate([old.options[row], option[:, None]], axis=1),
            used,
            np.where(loaded, old.least[row] + 1, self.high[option]),
            reach[row, option],
            old.loads[row] + loaded,
            wire_ns,
            old.pace[row] + self.pace[site],
            slack[row, option],
        )

    def _others(self, used: Bools, rest: int) -> Ints:
        """For each route and each place as its next stage: layers that the ``rest`` largest unused Islands besides it can hold."""
        sizes = np.where(used, 0, self.at_most)
        ranked = -np.sort(-sizes, axis=1)[:, : rest + 1]
        spare = ranked[:, rest : rest + 1] if ranked.shape[1] > rest else np.zeros((len(used), 1), np.int64)
        largest: Ints = ranked.sum(axis=1, keepdims=True) - np.maximum(sizes, spare)
        return largest

    def _score(self, partial: _Partial) -> Floats:
        """Estimated nanoseconds a token: wire so far, and the layers at the average pace of the Islands so far."""
        compute = self.total * partial.options.shape[1] / partial.pace if self.problem.timed else 0.0
        score: Floats = partial.wire_ns + compute
        return score

    def _prune(self, partial: _Partial) -> _Partial:
        score = self._score(partial)
        kept = [_smallest(-partial.slack + score / (1.0 + score.max()), ROUTES_KEPT)]
        for loads in np.unique(partial.loads):
            rows = np.flatnonzero(partial.loads == loads)
            kept.append(rows[_smallest(score[rows], ROUTES_KEPT)])
        return partial.take(np.unique(np.concatenate(kept)))

    def _best(self, options: Ints, wire_ns: Ints) -> Found | None:
        """The fastest of these finished routes, then the cheapest, then the first by name; with as many cells as it has room for.

        A few numbers of cells are tried at once, first far apart and then, for the chosen route, in between.
        """
        fewest, most = self.problem.cells_least, self.problem.cells_most
        while True:
            reaches = self._reaches(_levels(fewest, most))
            routes = _Routes(options, self.site[options], self.held[options], self.low[options], self.high[options])
            level = self._levels_that_fit(routes, reaches)
            cuts, possible = self._cut(routes, reaches, level)
            if not possible.any():
                return None
            rows = np.flatnonzero(possible)
            rows = _least(rows, (self._compute_ns(routes, cuts) + wire_ns)[rows])
            prices = _ints([place.price for place in self.problem.places])
            rows = _least(rows, prices[routes.site].sum(axis=1)[rows])
            for column in routes.site.T:
                rows = _least(rows, column[rows])
            row = int(_least(rows, -level[rows])[0])
            chosen, cells = int(level[row]), reaches.cells
            if chosen + 1 == len(cells) or cells[chosen + 1] - cells[chosen] == CELLS_STEP:
                ways = tuple(self.problem.options[index] for index in options[row].tolist())
                return Found(ways, tuple(cuts[row].tolist()), int(cells[chosen]))
            fewest, most = int(cells[chosen]), int(cells[chosen + 1]) - CELLS_STEP
            options, wire_ns = options[row : row + 1], wire_ns[row : row + 1]

    def _levels_that_fit(self, routes: _Routes, reaches: _Reach) -> Ints:
        """For each route the index of the largest number of cells that fits in all its stages; the smallest one does."""
        given = _ints([option.cells if option.held else reaches.cells[-1] for option in self.problem.options])
        limit = np.searchsorted(reaches.cells, given, "right") - 1
        high = limit[routes.options].min(axis=1)
        low = np.where(self._fits(routes, reaches, high), high, 0)
        high = np.maximum(low, high - 1)
        while (low < high).any():
            middle = (low + high + 1) // 2
            fits = self._fits(routes, reaches, middle)
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
            high = np.maximum(low, high)
        return low

    def _fits(self, routes: _Routes, reaches: _Reach, level: Ints) -> Bools:
        stages = routes.site.shape[1]
        front = np.zeros(len(level), np.int64)
        fits = np.ones(len(level), np.bool_)
        for stage in range(stages):
            site, held, low = routes.site[:, stage], routes.held[:, stage], routes.low[:, stage]
            if stage == stages - 1:
                fits &= np.where(held, low, reaches.last[level, site]) <= front
                break
            end = reaches.reach[level, site, front] if stage else reaches.first[level, site]
            end = np.minimum(end, self.total - (stages - 1 - stage))
            fits &= np.where(held, low <= front, end > front)
            front = np.where(held, routes.high[:, stage], end)
        return fits

    def _cut(self, routes: _Routes, reaches: _Reach, level: Ints) -> tuple[Ints, Bools]:
        """Cuts near the balance of times, within what memory allows; and whether there are any."""
        rows, stages = routes.site.shape
        wanted = np.floor(self._balance(routes, reaches, level) + 0.5).astype(np.int64)
        low, high = np.empty((stages + 1, rows), np.int64), np.empty((stages + 1, rows), np.int64)
        low[stages] = high[stages] = self.total
        for stage in range(stages - 1, 0, -1):  # how far left and right the stages from this one on let it begin
            site, held = routes.site[:, stage], routes.held[:, stage]
            begin = reaches.last[level, site] if stage == stages - 1 else reaches.back[level, site, low[stage + 1]]
            low[stage] = np.where(held, routes.low[:, stage], begin)
            high[stage] = np.where(held, routes.low[:, stage], high[stage + 1] - 1)
        cuts = np.zeros((rows, stages + 1), np.int64)
        possible = np.ones(rows, np.bool_)
        for stage in range(stages - 1):
            site, held, begin = routes.site[:, stage], routes.held[:, stage], cuts[:, stage]
            end = reaches.reach[level, site, begin] if stage else reaches.first[level, site]
            at_least, at_most = np.maximum(low[stage + 1], begin + 1), np.minimum(high[stage + 1], end)
            possible &= held | (at_least <= at_most)
            free = np.maximum(at_least, np.minimum(wanted[:, stage], at_most))
            cuts[:, stage + 1] = np.minimum(np.where(held, routes.high[:, stage], free), self.total)
        cuts[:, stages] = self.total
        return cuts, possible

    def _balance(self, routes: _Routes, reaches: _Reach, level: Ints) -> Floats:
        """Ends of all stages if layers could be split: shares in proportion to pace, and who is full leaves the rest to the others."""
        stages, fresh = routes.site.shape[1], ~routes.held
        room = reaches.typical[level[:, None], routes.site]
        room[:, 0] = np.maximum(1, reaches.first[level, routes.site[:, 0]])
        room[:, -1] = np.maximum(1, self.total - reaches.last[level, routes.site[:, -1]])
        # Free stages between the same two held ones share what lies between these.
        gap = np.cumsum(routes.held, axis=1)
        together = ((gap[:, :, None] == gap[:, None, :]) & fresh[:, :, None] & fresh[:, None, :]).astype(np.float64)
        begin, end = np.zeros(routes.site.shape, np.int64), np.full(routes.site.shape, self.total)
        for stage in range(1, stages):
            before, behind = stage - 1, stages - stage
            begin[:, stage] = np.where(routes.held[:, before], routes.high[:, before], begin[:, before])
            end[:, behind - 1] = np.where(routes.held[:, behind], routes.low[:, behind], end[:, behind])
        pace = self.pace[routes.site]
        full = np.zeros(routes.site.shape, np.bool_)
        for _ in range(stages):
            sums = together @ np.stack([pace * ~full, room * full], axis=2)
            share = (end - begin - sums[:, :, 1]) * pace / np.maximum(sums[:, :, 0], 1e-300)
            more = fresh & ~full & (share >= room)
            if not more.any():
                break
            full |= more
        share = np.where(full, room, share)
        ends = np.empty(routes.site.shape, np.float64)
        position: Floats = np.zeros(len(level))
        for stage in range(stages):
            position = np.where(routes.held[:, stage], routes.high[:, stage], position + share[:, stage])
            ends[:, stage] = position
        return np.clip(ends, 0, self.total)

    def _compute_ns(self, routes: _Routes, cuts: Ints) -> Ints:
        token_ns = _ints([option.token_ns for option in self.problem.options])
        fresh = np.diff(cuts, axis=1) * self.layer_ns[routes.site]
        compute: Ints = np.where(routes.held, token_ns[routes.options], fresh).sum(axis=1)
        return compute


def _ints(values: list[int]) -> Ints:
    return np.array(values, np.int64)


def _rooms(values: list[int]) -> Ints:
    return _ints([max(-1, min(value, _ROOM_MAX)) for value in values])


def _levels(fewest: int, most: int) -> Ints:
    """Numbers of cells from ``fewest`` to ``most``, all of them or evenly spread."""
    steps = (most - fewest) // CELLS_STEP
    stride = max(1, -(-steps // (LEVELS_MAX - 1)))
    return _ints(sorted({*range(0, steps, stride), steps})) * CELLS_STEP + fewest


def _smallest(values: Floats, count: int) -> Ints:
    """Indices of the smallest values; of equals the earlier ones."""
    return np.argsort(values, kind="stable")[:count]


def _least(rows: Ints, values: Ints) -> Ints:
    chosen: Ints = rows[values == values.min()]
    return chosen
