"""The book of KV cells against a slow model of llama.cpp's cache: sets of holders for each cell."""

from __future__ import annotations

import random

import pytest

from runtimes.gguf.kv import Admission, KvBook

SALT, OTHER = b"account one", b"account two"


class Shadow:
    """What llama.cpp's unified cache does with the same calls: a cell is (tokens up to here) held by sequences."""

    def __init__(self, cells: int) -> None:
        self.cells = cells
        self.sequences: dict[int, list[int]] = {}  # sequence → identities of its cells
        self._next = 0

    def cut(self, sequence: int) -> None:
        self.sequences.pop(sequence, None)

    def admit(self, admission: Admission) -> None:
        for forgotten in admission.evicted:
            self.cut(forgotten.sequence)
        assert admission.sequence not in self.sequences
        source = self.sequences[admission.source][: admission.cached_tokens] if admission.cached_tokens else []
        self.sequences[admission.sequence] = list(source)

    def append(self, sequence: int, count: int) -> None:
        self.sequences[sequence] += range(self._next, self._next + count)
        self._next += count
        assert self.used <= self.cells, "llama.cpp would find no room"

    @property
    def used(self) -> int:
        return len({cell for cells in self.sequences.values() for cell in cells})


def finish(book: KvBook, shadow: Shadow, sequence: int) -> None:
    for forgotten in book.finish(sequence):
        shadow.cut(forgotten.sequence)


def fill(book: KvBook, shadow: Shadow, admission: Admission, tokens: list[int]) -> None:
    shadow.admit(admission)
    rest = tokens[admission.cached_tokens :]
    for forgotten in book.append(admission.sequence, rest):
        shadow.cut(forgotten.sequence)
    shadow.append(admission.sequence, len(rest))


@pytest.mark.parametrize("seed", range(12))
def test_a_running_job_always_finds_its_cells_and_no_other_salt_s(seed: int) -> None:
    chance = random.Random(seed)
    cells, slots = chance.choice([(64, 3), (200, 6), (31, 2)])
    book, shadow = KvBook(cells, slots, sequences=slots + chance.choice([1, 4])), Shadow(cells)
    running: dict[int, tuple[list[int], int]] = {}  # sequence → tokens so far, declared
    salts: dict[int, bytes] = {}
    reused = 0
    for _ in range(600):
        if running and chance.random() < 0.65:
            sequence = chance.choice(list(running))
            tokens, declared = running[sequence]
            if len(tokens) == declared or chance.random() < 0.2:
                finish(book, shadow, sequence)
                del running[sequence]
            else:
                more = [chance.randrange(2) for _ in range(chance.randint(1, declared - len(tokens)))]
                for forgotten in book.append(sequence, more):
                    assert forgotten.sequence not in running
                    shadow.cut(forgotten.sequence)
                shadow.append(sequence, len(more))
                running[sequence] = (tokens + more, declared)
        else:
            prompt = [chance.randrange(2) for _ in range(chance.randint(1, 12))]
            declared = len(prompt) + chance.randint(0, 20)
            salt = chance.choice([SALT, OTHER, b""])
            free = book.tokens_free
            admission = book.admit(prompt, declared, salt)
            if admission is None:
                assert declared > free or len(running) == slots
                continue
            assert len(running) < slots
            if admission.cached_tokens:
                assert salts[admission.source] == salt != b""
                reused += 1
            assert admission.cached_tokens < len(prompt), "the last token's logits are wanted"
            fill(book, shadow, admission, prompt)
            running[admission.sequence], salts[admission.sequence] = (prompt, declared), salt
        promised = len({c for s in running for c in shadow.sequences[s]}) + sum(d - len(t) for t, d in running.values())
        assert book.tokens_free == cells - promised >= 0
        assert book.slots_free == slots - len(running)
    assert reused > 20, "the walk must exercise the prefix cache"


def test_every_declared_token_can_be_used_by_all_running_jobs() -> None:
    book = KvBook(cells=100, slots=4, sequences=8)
    jobs = [book.admit([n], 25, SALT) for n in range(4)]
    assert all(jobs) and book.tokens_free == 0
    for n, job in enumerate(jobs):
        assert job is not None
        book.append(job.sequence, [n] * 25)
    with pytest.raises(ValueError, match="asks for more"):
        book.append(jobs[0].sequence, [1])  # type: ignore[union-attr]


def test_the_next_turn_reuses_the_whole_conversation_under_the_same_salt_only() -> None:
    book = KvBook(cells=100, slots=2, sequences=6)
    turn = [1, 2, 3, 4]
    first = book.admit(turn, 10, SALT)
    assert first is not None and first.cached_tokens == 0
    book.append(first.sequence, turn)
    book.append(first.sequence, [5, 6])
    book.finish(first.sequence)
    assert book.tokens_free == 100, "a remembered prefix takes no room from jobs"
    second = book.admit([*turn, 5, 6, 7, 8], 20, SALT)
    stranger = book.admit([*turn, 5, 6, 7, 8], 20, OTHER)
    assert second is not None and second.cached_tokens == 6 and second.source == first.sequence
    assert stranger is not None and stranger.cached_tokens == 0


def test_a_running_prompt_is_shared_and_counted_once() -> None:
    book = KvBook(cells=30, slots=2, sequences=4)
    prompt = list(range(20))
    first = book.admit(prompt, 22, SALT)
    assert first is not None
    book.append(first.sequence, prompt)
    assert book.tokens_free == 8
    second = book.admit(prompt, 22, SALT)
    assert second is not None and second.cached_tokens == 19 and second.source == first.sequence
    assert book.tokens_free == 5
    book.finish(first.sequence)
    assert book.tokens_free == 30 - 22


def test_the_least_recently_used_prefix_is_forgotten_first() -> None:
    book = KvBook(cells=30, slots=2, sequences=8)
    sequences = []
    for salt in (b"a", b"b", b"c"):
        job = book.admit([1] * 8, 8, salt)
        assert job is not None
        book.append(job.sequence, [1] * 8)
        book.finish(job.sequence)
        sequences.append(job.sequence)
    again = book.admit([1] * 8 + [2], 9, b"a")  # "a" is used, so "b" is the oldest now
    assert again is not None and again.cached_tokens == 8
    book.append(again.sequence, [2])
    large = book.admit([9] * 13, 13, b"d")
    assert large is not None
    (forgotten,) = book.append(large.sequence, [9] * 13)
    assert (forgotten.sequence, forgotten.salt, forgotten.tokens.tolist()) == (sequences[1], b"b", [1] * 8)


def test_a_model_whose_state_cannot_be_cut_remembers_nothing() -> None:
    book = KvBook(cells=30, slots=1, sequences=2, remembers=False)
    job = book.admit([1, 2, 3], 6, SALT)
    assert job is not None
    book.append(job.sequence, [1, 2, 3])
    (forgotten,) = book.finish(job.sequence)
    assert forgotten.sequence == job.sequence and len(forgotten.tokens) == 0
    again = book.admit([1, 2, 3, 4], 6, SALT)
    assert again is not None and again.cached_tokens == 0


def run(book: KvBook, tokens: list[int], salt: bytes = SALT) -> int:
    job = book.admit(tokens, len(tokens), salt)
    assert job is not None
    book.append(job.sequence, tokens[job.cached_tokens :])
    return job.sequence


def test_only_so_many_cells_linger_beside_running_sequences() -> None:
    book = KvBook(cells=100, slots=4, sequences=8, linger_cells=20)
    first, second, third = (run(book, [n] * 9) for n in range(3))
    assert book.finish(first) == () and book.finish(second) == ()
    (forgotten,) = book.finish(third)
    assert forgotten.sequence == first and forgotten.tokens.tolist() == [0] * 9
    assert book.shareable([0] * 9, SALT) == 0 and book.shareable([2] * 9, SALT) == 8


def test_idle_time_empties_the_cells() -> None:
    book = KvBook(cells=100, slots=4, sequences=8)
    sequences = [run(book, [n] * 9) for n in range(3)]
    for sequence in sequences:
        book.finish(sequence)
    assert [forgotten.sequence for forgotten in book.tidy()] == sequences
    assert book.tidy() == ()


def test_a_longer_answer_makes_its_beginning_worthless_but_leaves_no_hole() -> None:
    book = KvBook(cells=100, slots=4, sequences=8)
    other, first, second = run(book, [2] * 9), run(book, [1] * 9), run(book, [1] * 12)
    for sequence in (other, first, second):
        assert book.finish(sequence) == ()
    forgotten = book.tidy()
    assert [(one.sequence, len(one.tokens)) for one in forgotten] == [(first, 0), (other, 9), (second, 12)]


def test_room_is_made_of_lingering_sequences_only() -> None:
    book = KvBook(cells=30, slots=4, sequences=8)
    old, busy = run(book, [1] * 10), run(book, [2] * 15)
    book.finish(old)
    assert book.make_room(16) is None
    assert book.make_room(5) == ()
    room = book.make_room(15)
    assert room is not None and [forgotten.sequence for forgotten in room] == [old]
    assert book.length(busy) == 15


def test_a_job_may_be_admitted_without_sharing() -> None:
    book = KvBook(cells=30, slots=4, sequences=8)
    book.finish(run(book, [1] * 10))
    job = book.admit([1] * 10, 10, SALT, shares=False)
    assert job is not None and job.cached_tokens == 0
