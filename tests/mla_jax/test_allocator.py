"""The page allocator against a naive model that writes and reads real tokens."""

import copy
import itertools
import re

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mla_jax.allocator import OutOfPagesError, PageAllocator

counts = st.integers(0, 12)
picks = st.integers(0, 7)
some_sequence = precondition(lambda machine: machine.tokens)


class AllocatorMachine(RuleBasedStateMachine):
    """Each sequence is the list of its tokens; the device is a pool [num_pages, page_size].

    The pools are small, so that sharing, full pools and full block tables come up all the time.
    """

    @initialize(
        num_pages=st.integers(1, 12),
        page_size=st.integers(1, 4),
        max_pages=st.none() | st.integers(1, 6),
    )
    def create(self, num_pages, page_size, max_pages):
        self.allocator = PageAllocator(num_pages, page_size=page_size, max_pages=max_pages)
        self.pool = np.full((num_pages, page_size), -1)
        self.tokens: dict[int, list[int]] = {}
        self.ids = set()
        self.fresh_token = itertools.count()

    @rule(count=counts)
    def allocate(self, count):
        pages = self.free_pages()
        sequence = self.attempt(lambda: self.allocator.allocate(count), [], count, copies=False)
        if sequence is not None:
            self.add(sequence, [])
            assert self.allocator.pages(sequence) == pages[: self.ceil(count)]
            self.write(sequence, count)

    @some_sequence
    @rule(pick=picks, count=counts)
    def extend(self, pick, count):
        sequence = self.choose(pick)
        copies = self.extend_without_writing(sequence, count)
        if copies is not None:
            self.perform(copies)
            self.write(sequence, count)

    @some_sequence
    @rule(requests=st.lists(st.tuples(picks, counts), max_size=4, unique_by=lambda r: r[0]))
    def extend_batch(self, requests):
        """As a decode step does: all the extends, all the copies at once, all the writes."""
        requests = {self.choose(pick): count for pick, count in requests}
        granted = {s: self.extend_without_writing(s, count) for s, count in requests.items()}
        self.perform([pair for copies in granted.values() for pair in copies or ()])
        for sequence in reversed(requests):
            if granted[sequence] is not None:
                self.write(sequence, requests[sequence])

    @some_sequence
    @rule(pick=picks)
    def fork(self, pick):
        parent = self.choose(pick)
        self.add(self.allocator.fork(parent), self.tokens[parent])

    @some_sequence
    @rule(pick=picks, data=st.data())
    def fork_prefix(self, pick, data):
        parent = self.choose(pick)
        count = data.draw(st.integers(0, len(self.tokens[parent])))
        self.add(self.allocator.fork(parent, count), self.tokens[parent][:count])

    @some_sequence
    @rule(pick=picks, data=st.data())
    def truncate(self, pick, data):
        sequence = self.choose(pick)
        count = data.draw(st.integers(0, len(self.tokens[sequence])))
        self.allocator.truncate(sequence, count)
        del self.tokens[sequence][count:]

    @some_sequence
    @rule(pick=picks, excess=st.integers(1, 5))
    def beyond_the_end(self, pick, excess):
        sequence = self.choose(pick)
        count = len(self.tokens[sequence]) + excess
        self.fails(ValueError, lambda: self.allocator.fork(sequence, count))
        self.fails(ValueError, lambda: self.allocator.truncate(sequence, count))

    @some_sequence
    @rule(pick=picks)
    def free(self, pick):
        sequence = self.choose(pick)
        self.allocator.free(sequence)
        del self.tokens[sequence]
        self.fails(ValueError, lambda: self.allocator.free(sequence))

    @some_sequence
    @rule()
    def free_all(self):
        for sequence in list(self.tokens):
            self.free(0)
            assert sequence not in self.tokens
        assert self.allocator.num_free == self.allocator.num_pages
        assert self.allocator.num_used == 0

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence, tokens in self.tokens.items():
            pages = self.allocator.pages(sequence)
            assert self.allocator.length(sequence) == len(tokens)
            assert len(pages) == len(set(pages)) == self.ceil(len(tokens))
            assert self.pool[pages].reshape(-1)[: len(tokens)].tolist() == tokens

    @invariant()
    def a_page_is_used_exactly_while_a_sequence_holds_it(self):
        free = len(self.free_pages())
        assert self.allocator.num_free == free
        assert self.allocator.num_used == self.allocator.num_pages - free

    @invariant()
    def the_table_lists_the_pages(self):
        table = self.allocator.table([*self.tokens, None])
        rows = [[page for page in row if page >= 0] for row in table.tolist()]
        assert rows == [self.allocator.pages(sequence) for sequence in self.tokens] + [[]]

    def extend_without_writing(self, sequence, count):
        """The copies of an extend, checked against the sharing that the page lists show."""
        tokens, old, free = self.tokens[sequence], self.allocator.pages(sequence), self.free_pages()
        partly_filled = len(tokens) % self.allocator.page_size != 0
        shared = sum(old[-1] in self.allocator.pages(s) for s in self.tokens) > 1 if old else False
        expects_copy = partly_filled and shared and count > 0
        copies = self.attempt(
            lambda: self.allocator.extend(sequence, count), tokens, count, copies=expects_copy
        )
        if copies is not None:
            kept = old[:-1] if expects_copy else old
            assert copies == ([(old[-1], free[0])] if expects_copy else [])
            new = free[: self.ceil(len(tokens) + count) - len(kept)]
            assert self.allocator.pages(sequence) == kept + new
        return copies

    def attempt(self, call, tokens, count, *, copies):
        """What call() returns; None when it must fail, once it has failed without a trace."""
        allocator, pages = self.allocator, self.ceil(len(tokens) + count)
        if allocator.max_pages is not None and pages > allocator.max_pages:
            return self.fails(ValueError, call)
        if pages - self.ceil(len(tokens)) + copies > allocator.num_free:
            return self.fails(OutOfPagesError, call)
        return call()

    def fails(self, error, call):
        before = copy.deepcopy(vars(self.allocator))
        with pytest.raises(error):
            call()
        assert vars(self.allocator) == before

    def perform(self, copies):
        """Every copy at once, as one gather and one scatter."""
        sources, destinations = [s for s, _ in copies], [d for _, d in copies]
        assert len({*destinations}) == len(destinations)
        self.pool[destinations] = self.pool[sources]

    def write(self, sequence, count):
        pages, tokens = self.allocator.pages(sequence), self.tokens[sequence]
        for token in itertools.islice(self.fresh_token, count):
            page, slot = divmod(len(tokens), self.allocator.page_size)
            self.pool[pages[page], slot] = token
            tokens.append(token)

    def add(self, sequence, tokens):
        assert sequence not in self.ids
        self.ids.add(sequence)
        self.tokens[sequence] = list(tokens)

    def choose(self, pick):
        return list(self.tokens)[pick % len(self.tokens)]

    def free_pages(self):
        """In ascending order, the order in which they must go."""
        held = {page for sequence in self.tokens for page in self.allocator.pages(sequence)}
        return sorted(set(range(self.allocator.num_pages)) - held)

    def ceil(self, count):
        return (count + self.allocator.page_size - 1) // self.allocator.page_size


AllocatorMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, derandomize=False
)
TestAllocatorMachine = AllocatorMachine.TestCase


def exactly(text):
    """The whole of an error's text, one line, for pytest.raises(match=...)."""
    return rf"\A{re.escape(text)}\Z"


def test_page_partly_filled_for_one_and_full_for_the_other():
    allocator = PageAllocator(8, page_size=4)
    full = allocator.allocate(8)
    partial = allocator.fork(full, 6)
    assert allocator.pages(partial) == allocator.pages(full) == [0, 1]
    assert allocator.extend(full, 1) == []  # its new token goes into a new page
    assert allocator.pages(full) == [0, 1, 2]
    assert allocator.extend(partial, 1) == [(1, 3)]
    assert allocator.pages(partial) == [0, 3]
    assert allocator.num_used == 4


def test_truncate_inside_a_shared_page_then_extend_copies():
    allocator = PageAllocator(8, page_size=4)
    first = allocator.allocate(8)
    second = allocator.fork(first)
    allocator.truncate(first, 2)
    assert allocator.extend(first, 0) == []
    assert allocator.extend(first, 4) == [(0, 2)]
    assert allocator.pages(first) == [2, 3]
    assert allocator.pages(second) == [0, 1]


def test_last_owner_of_a_page_writes_in_place():
    allocator = PageAllocator(8, page_size=4)
    first = allocator.allocate(3)
    second = allocator.fork(first)
    allocator.free(first)
    assert allocator.extend(second, 1) == []
    assert allocator.pages(second) == [0]


def test_failed_allocate_uses_up_no_id():
    allocator = PageAllocator(1, page_size=4)
    with pytest.raises(OutOfPagesError):
        allocator.allocate(5)
    assert allocator.allocate() == PageAllocator(1, page_size=4).allocate()


def test_pages_returns_a_copy():
    allocator = PageAllocator(2, page_size=4)
    sequence = allocator.allocate(4)
    allocator.pages(sequence).append(1)
    assert allocator.pages(sequence) == [0]


def test_page_size_is_64_by_default():
    allocator = PageAllocator(4)
    assert len(allocator.pages(allocator.allocate(64))) == 1
    assert len(allocator.pages(allocator.allocate(65))) == 2


def test_numpy_integers_are_integers():
    allocator = PageAllocator(np.int64(4), page_size=np.int32(4), max_pages=np.int64(2))
    sequence = np.int64(allocator.allocate(np.int32(5)))
    allocator.extend(sequence, np.uint8(1))
    assert allocator.pages(sequence) == [0, 1]
    assert type(allocator.length(sequence)) is int
    allocator.free(sequence)
    assert allocator.num_free == 4


@pytest.mark.parametrize(
    ("own", "asked", "width"), [(None, None, 2), (3, None, 3), (3, 5, 5), (None, 4, 4)]
)
def test_table_width(own, asked, width):
    allocator = PageAllocator(8, page_size=4, max_pages=own)
    table = allocator.table([None, allocator.allocate(5), allocator.allocate()], max_pages=asked)
    assert table.dtype == np.int32
    expected = np.full((3, width), -1)
    expected[1, :2] = 0, 1
    np.testing.assert_array_equal(table, expected)


def test_table_of_no_sequences():
    assert PageAllocator(8, max_pages=3).table([]).shape == (0, 3)
    assert PageAllocator(8).table([None]).shape == (1, 0)


def test_table_too_narrow():
    allocator = PageAllocator(8, page_size=4)
    sequence = allocator.allocate(9)
    text = "max_pages=2, expected at least 3, the pages of the longest sequence"
    with pytest.raises(ValueError, match=exactly(text)):
        allocator.table([sequence], max_pages=2)


def test_out_of_pages_text_counts_the_copy():
    allocator = PageAllocator(3, page_size=4)
    sequence = allocator.allocate(6)
    allocator.fork(sequence)
    assert issubclass(OutOfPagesError, RuntimeError)
    text = "out of pages: needed 2, free 1, total 3"
    with pytest.raises(OutOfPagesError, match=exactly(text)):
        allocator.extend(sequence, 3)


def test_too_long_text():
    allocator = PageAllocator(8, page_size=4, max_pages=2)
    sequence = allocator.allocate(6)
    text = "num_tokens=3 makes a sequence of 9 tokens, expected at most 8 (2 pages of 4)"
    with pytest.raises(ValueError, match=exactly(text)):
        allocator.extend(sequence, 3)


def test_too_long_comes_before_out_of_pages():
    """No freeing helps a sequence that is too long, so that is what the caller must hear."""
    allocator = PageAllocator(1, page_size=4, max_pages=2)
    with pytest.raises(ValueError, match="num_tokens=9 makes a sequence of 9 tokens"):
        allocator.allocate(9)


@pytest.mark.parametrize("method", ["fork", "truncate"])
def test_prefix_beyond_the_end_text(method):
    allocator = PageAllocator(8, page_size=4)
    sequence = allocator.allocate(6)
    text = f"num_tokens=7, expected at most 6, the length of sequence {sequence}"
    with pytest.raises(ValueError, match=exactly(text)):
        getattr(allocator, method)(sequence, 7)


CALLS_WITH_A_SEQUENCE = {
    "extend": lambda allocator, sequence: allocator.extend(sequence, 1),
    "fork": lambda allocator, sequence: allocator.fork(sequence),
    "truncate": lambda allocator, sequence: allocator.truncate(sequence, 0),
    "free": lambda allocator, sequence: allocator.free(sequence),
    "pages": lambda allocator, sequence: allocator.pages(sequence),
    "length": lambda allocator, sequence: allocator.length(sequence),
    "table": lambda allocator, sequence: allocator.table([sequence]),
}


@pytest.mark.parametrize("call", CALLS_WITH_A_SEQUENCE.values(), ids=CALLS_WITH_A_SEQUENCE)
def test_bad_sequence_text(call):
    allocator = PageAllocator(8, page_size=4)
    freed, live = allocator.allocate(2), allocator.allocate(2)
    allocator.free(freed)
    unknown = live + 1
    live_id = "expected the id of a live sequence"
    expected = [
        (freed, f"sequence={freed} was freed, {live_id}"),
        (unknown, f"sequence={unknown} was never allocated, {live_id}"),
        (-1, "sequence=-1, expected an int >= 0"),
        (True, "sequence is a bool, expected an int >= 0"),
        (float(live), "sequence is a float, expected an int >= 0"),
        ([live], "sequence is a list, expected an int >= 0"),
    ]
    before = copy.deepcopy(vars(allocator))
    for sequence, text in expected:
        with pytest.raises(ValueError, match=exactly(text)):
            call(allocator, sequence)
    assert vars(allocator) == before


CALLS_WITH_A_COUNT = {
    "PageAllocator": ("num_pages", 1, lambda a, s, n: PageAllocator(n)),
    "page_size": ("page_size", 1, lambda a, s, n: PageAllocator(8, page_size=n)),
    "max_pages": ("max_pages", 1, lambda a, s, n: PageAllocator(8, max_pages=n)),
    "allocate": ("num_tokens", 0, lambda a, s, n: a.allocate(n)),
    "extend": ("num_tokens", 0, lambda a, s, n: a.extend(s, n)),
    "fork": ("num_tokens", 0, lambda a, s, n: a.fork(s, n)),
    "truncate": ("num_tokens", 0, lambda a, s, n: a.truncate(s, n)),
    "table": ("max_pages", 0, lambda a, s, n: a.table([s], n)),
}


@pytest.mark.parametrize(
    ("name", "minimum", "call"), CALLS_WITH_A_COUNT.values(), ids=CALLS_WITH_A_COUNT
)
def test_bad_count_text(name, minimum, call):
    allocator = PageAllocator(8, page_size=4)
    sequence = allocator.allocate(2)
    expected = [
        (minimum - 1, f"{name}={minimum - 1}, expected an int >= {minimum}"),
        (np.int32(-3), f"{name}=-3, expected an int >= {minimum}"),
        (True, f"{name} is a bool, expected an int >= {minimum}"),
        (np.True_, f"{name} is a {type(np.True_).__name__}, expected an int >= {minimum}"),
        (1.0, f"{name} is a float, expected an int >= {minimum}"),
        ("1", f"{name} is a str, expected an int >= {minimum}"),
    ]
    before = copy.deepcopy(vars(allocator))
    for count, text in expected:
        with pytest.raises(ValueError, match=exactly(text)):
            call(allocator, sequence, count)
    assert vars(allocator) == before
