"""What paged decode and paged prefill share: the problem, the tiles, the kernels, the oracle."""

from pallas_kernels.paged_attention.reference import attend_pages_reference
from pallas_kernels.paged_attention.tiles import PagedProblem, PagedTiles, choose_tiles
from pallas_kernels.paged_attention.triton import attend_pages, unsupported
from pallas_kernels.paged_attention.units import Units, Work, most_slots, pack

__all__ = [
    "PagedProblem",
    "PagedTiles",
    "Units",
    "Work",
    "attend_pages",
    "attend_pages_reference",
    "choose_tiles",
    "most_slots",
    "pack",
    "unsupported",
]
