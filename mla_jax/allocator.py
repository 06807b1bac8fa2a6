"""Which pages of a paged KV cache belong to which sequence: host-side bookkeeping, no arrays.

The allocator hands out page ids; the pools that they index live on the device, and the caller
writes to them. Sequences may share pages (a common prompt, the beams of a search): a page carries
a reference count, and the first of its owners that wants to write into it gets a copy.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int32


class OutOfPagesError(RuntimeError):
    """The pool has too few free pages for a request; the allocator is as it was before it.

    Freeing or truncating another sequence can make room, and the request can then be repeated.

    >>> try:
    ...     PageAllocator(4, page_size=16).allocate(100)
    ... except OutOfPagesError as error:
    ...     print(error)
    out of pages: needed 7, free 4, total 4
    """


@dataclass(kw_only=True, slots=True)
class _Held:
    """The pages of one sequence, in order, and how many tokens of them it counts as its own."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class PageAllocator:
    """Page ids for the sequences of a paged KV cache, shared by reference count.

    num_pages   pages of the pool
    page_size   tokens a page holds
    max_pages   most pages one sequence may hold (the block table's width); None: no limit

    A sequence of n tokens holds ceil(n / page_size) pages; token t lies in slot t % page_size of
    page pages(sequence)[t // page_size]. The free page of the lowest id goes first (a heap,
    O(log num_pages) a page), so what a call returns depends only on which pages are free. Sequence
    ids are never used again. Every call either succeeds or raises and changes nothing. Not safe to
    call from several threads at once.

    Raises ValueError for a count that is not an integer, is a bool, or is below 1 here or below 0
    in the methods, and for a sequence that is unknown or was freed.

    Source: block tables with copy-on-write, Kwon et al. 2023 (PagedAttention, arXiv:2309.06180).

    >>> allocator = PageAllocator(8, page_size=4, max_pages=3)
    >>> prompt = allocator.allocate(6)
    >>> answer = allocator.fork(prompt)
    >>> allocator.extend(answer, 1)  # page 1 is half full and shared: copy it to page 2
    [(1, 2)]
    >>> allocator.table([prompt, None, answer])
    array([[ 0,  1, -1],
           [-1, -1, -1],
           [ 0,  2, -1]], dtype=int32)
    >>> allocator.free(prompt)
    >>> allocator.num_used, allocator.num_free
    (2, 6)
    """

    def __init__(
        self,
        num_pages: int | np.integer,
        *,
        page_size: int | np.integer = 64,
        max_pages: int | np.integer | None = None,
    ) -> None:
        self.num_pages = _integer("num_pages", num_pages, minimum=1)
        self.page_size = _integer("page_size", page_size, minimum=1)
        self.max_pages = None if max_pages is None else _integer("max_pages", max_pages, minimum=1)
        self._free = list(range(self.num_pages))  # ascending, hence already a heap
        self._references = [0] * self.num_pages
        self._held: dict[int, _Held] = {}
        self._next_sequence = 0

    @property
    def num_free(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that at least one sequence holds; a shared page counts once."""
        return self.num_pages - len(self._free)

    def allocate(self, num_tokens: int | np.integer = 0) -> int:
        """A new sequence with room for num_tokens tokens; its id.

        Raises OutOfPagesError when too few pages are free, ValueError when num_tokens exceeds
        max_pages * page_size.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> allocator.pages(allocator.allocate(9))
        [0, 1, 2]
        """
        held = _Held()
        self._grow(held, num_tokens)
        return self._add(held)

    def extend(
        self, sequence: int | np.integer, num_tokens: int | np.integer
    ) -> list[tuple[int, int]]:
        """Make room for num_tokens more tokens; the page copies (source, destination) it takes.

        The caller copies whole pages on the device, in every layer, before it writes the tokens.
        There is one copy when the last page is partly filled and another sequence holds it too,
        and none otherwise. The copies of several extends with no other call between them have
        distinct destinations, none of which is a source: one gather and one scatter perform them.
        They remain due when a later extend of the same batch raises.

        Raises OutOfPagesError when too few pages are free, ValueError when the sequence would
        exceed max_pages * page_size tokens.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> first = allocator.allocate(6)
        >>> second = allocator.fork(first)
        >>> allocator.extend(first, 1), allocator.extend(second, 1)  # the second is alone by then
        ([(1, 2)], [])
        """
        return self._grow(self._get(sequence), num_tokens)

    def fork(self, sequence: int | np.integer, num_tokens: int | np.integer | None = None) -> int:
        """A new sequence that shares the first num_tokens tokens, None for all; its id.

        It takes no page: the full pages and a partly filled last one are shared, and whichever
        sequence first extends into a shared page gets the copy. Raises ValueError when num_tokens
        exceeds the sequence's length.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> allocator.pages(allocator.fork(allocator.allocate(12), 5))
        [0, 1]
        """
        held = self._get(sequence)
        length = held.length if num_tokens is None else _prefix(num_tokens, sequence, held.length)
        pages = held.pages[: self._pages_for(length)]
        for page in pages:
            self._references[page] += 1
        return self._add(_Held(pages=pages, length=length))

    def truncate(self, sequence: int | np.integer, num_tokens: int | np.integer) -> None:
        """Keep the first num_tokens tokens and give back the pages beyond them.

        Raises ValueError when num_tokens exceeds the sequence's length.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> sequence = allocator.allocate(12)
        >>> allocator.truncate(sequence, 5)
        >>> allocator.pages(sequence), allocator.length(sequence)
        ([0, 1], 5)
        """
        held = self._get(sequence)
        length = _prefix(num_tokens, sequence, held.length)
        keep = self._pages_for(length)
        self._release(held.pages[keep:])
        del held.pages[keep:]
        held.length = length

    def free(self, sequence: int | np.integer) -> None:
        """Give back every page of a sequence and forget it; its id is invalid from here on.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> allocator.free(allocator.allocate(12))
        >>> allocator.num_free
        8
        """
        self._release(self._get(sequence).pages)
        del self._held[int(sequence)]

    def pages(self, sequence: int | np.integer) -> list[int]:
        """The page ids of a sequence, in the order of its tokens (a copy).

        >>> allocator = PageAllocator(8, page_size=4)
        >>> allocator.pages(allocator.allocate(5))
        [0, 1]
        """
        return self._get(sequence).pages.copy()

    def length(self, sequence: int | np.integer) -> int:
        """The tokens that a sequence has room for.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> allocator.length(allocator.allocate(5))
        5
        """
        return self._get(sequence).length

    def table(
        self,
        sequences: Sequence[int | np.integer | None],
        max_pages: int | np.integer | None = None,
    ) -> Int32[np.ndarray, "batch max_pages"]:
        """The block table of a batch: row b holds the pages of sequences[b], then -1.

        A None in sequences stands for an empty place in the batch, a row of -1. max_pages None
        takes the allocator's own, and the longest sequence's page count where that is None too.
        Raises ValueError when a sequence has more than max_pages pages.

        >>> allocator = PageAllocator(8, page_size=4)
        >>> allocator.table([allocator.allocate(5), None], max_pages=3)
        array([[ 0,  1, -1],
               [-1, -1, -1]], dtype=int32)
        """
        rows = [[] if sequence is None else self._get(sequence).pages for sequence in sequences]
        longest = max(map(len, rows), default=0)
        if max_pages is None:
            width = longest if self.max_pages is None else self.max_pages
        else:
            width = _integer("max_pages", max_pages, minimum=0)
        if longest > width:
            raise ValueError(
                f"max_pages={width}, expected at least {longest}, the pages of the longest sequence"
            )
        table = np.full((len(rows), width), -1, dtype=np.int32)
        for row, pages in zip(table, rows, strict=True):
            row[: len(pages)] = pages
        return table

    def _grow(self, held: _Held, num_tokens: int | np.integer) -> list[tuple[int, int]]:
        """Check everything, then take the pages: nothing has changed when this raises."""
        added = _integer("num_tokens", num_tokens, minimum=0)
        length = held.length + added
        total = self._pages_for(length)
        if self.max_pages is not None and total > self.max_pages:
            raise ValueError(
                f"num_tokens={added} makes a sequence of {length} tokens, expected at most "
                f"{self.max_pages * self.page_size} ({self.max_pages} pages of {self.page_size})"
            )
        # Partly filled as this sequence sees it: another one may have filled the rest of the page.
        writes_last = added > 0 and held.length % self.page_size > 0
        copies_last = writes_last and self._references[held.pages[-1]] > 1
        needed = total - len(held.pages) + copies_last
        if needed > self.num_free:
            raise OutOfPagesError(
                f"out of pages: needed {needed}, free {self.num_free}, total {self.num_pages}"
            )

        copies = []
        if copies_last:
            source = held.pages.pop()
            self._references[source] -= 1  # shared, so another sequence still holds it
            held.pages.append(self._take())
            copies.append((source, held.pages[-1]))
        held.pages.extend(self._take() for _ in range(total - len(held.pages)))
        held.length = length
        return copies

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self._references[page] = 1
        return page

    def _release(self, pages: list[int]) -> None:
        for page in pages:
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)

    def _add(self, held: _Held) -> int:
        sequence = self._next_sequence
        self._next_sequence += 1
        self._held[sequence] = held
        return sequence

    def _get(self, sequence: int | np.integer) -> _Held:
        key = _integer("sequence", sequence, minimum=0)
        if key not in self._held:
            state = "was freed" if key < self._next_sequence else "was never allocated"
            raise ValueError(f"sequence={key} {state}, expected the id of a live sequence")
        return self._held[key]

    def _pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)


def _prefix(num_tokens: int | np.integer, sequence: int | np.integer, length: int) -> int:
    count = _integer("num_tokens", num_tokens, minimum=0)
    if count > length:
        raise ValueError(
            f"num_tokens={count}, expected at most {length}, the length of sequence {sequence}"
        )
    return count


def _integer(name: str, value: int | np.integer, *, minimum: int) -> int:
    # A bool is an int to Python, and True for a count or an id is always a mistake.
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ValueError(f"{name} is a {type(value).__name__}, expected an int >= {minimum}")
    if value < minimum:
        raise ValueError(f"{name}={value}, expected an int >= {minimum}")
    return int(value)
