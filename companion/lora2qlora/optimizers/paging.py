"""Paging, simulated: which pages a full device gives up, and what each training step moves."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from lora2qlora.blockwise import check_size
from lora2qlora.optimizers.checks import check_sizes


@dataclass(frozen=True)
class PageTraffic:
    """[bytes] that one training step moved off the device and back onto it."""

    out_bytes: int
    in_bytes: int


class PagedMemory:
    """Pages that a driver may move off a device to make room, the least recently used first; a simulation.

    `reserve` says what the device holds that cannot be paged, such as weights and activations; `touch` uses
    a page, and brings it back if need be. `resident` lists pages, the least recently used first. A page is
    made on the device at its first touch. Least recently used, and 2 MiB pages, are assumptions.

    Raises ValueError: no size of at least 1, or a device too small. Chapter 12.
    """

    def __init__(self, capacity_bytes: int, page_bytes: int = 2**21):
        check_size("capacity_bytes", capacity_bytes)
        check_size("page_bytes", page_bytes)
        self.capacity_bytes, self.page_bytes, self.reserved_bytes = capacity_bytes, page_bytes, 0
        self.out_bytes = self.in_bytes = 0
        self._resident: OrderedDict[int, None] = OrderedDict()
        self._evicted: set[int] = set()

    @property
    def resident(self) -> list[int]:
        """The pages on the device, the least recently used first."""
        return list(self._resident)

    @property
    def room(self) -> int:
        """[pages] that fit beside what is reserved."""
        return (self.capacity_bytes - self.reserved_bytes) // self.page_bytes

    def reserve(self, size_bytes: int) -> None:
        """Hold `size_bytes` in all besides pages from now on; pages that no longer fit are evicted."""
        if not 0 <= size_bytes <= self.capacity_bytes:
            raise ValueError(
                f"out of memory: {size_bytes:,} bytes that cannot be paged, on a device of "
                f"{self.capacity_bytes:,}"
            )
        self.reserved_bytes = size_bytes
        self._evict_to(self.room)

    def touch(self, page: int) -> None:
        """Use a page: it is on the device afterwards, and the most recently used."""
        if self.room < 1:
            raise ValueError(
                f"no room for a page of {self.page_bytes:,} bytes beside {self.reserved_bytes:,}"
            )
        if page not in self._resident:
            self._evict_to(self.room - 1)
            self.in_bytes += self.page_bytes * (page in self._evicted)
            self._evicted.discard(page)
            self._resident[page] = None
        self._resident.move_to_end(page)

    def _evict_to(self, pages: int) -> None:
        while len(self._resident) > pages:
            page, _ = self._resident.popitem(last=False)
            self._evicted.add(page)
            self.out_bytes += self.page_bytes


def page_traffic(
    state_bytes: Sequence[int],
    capacity_bytes: int,
    peak_bytes: Sequence[int],
    rest_bytes: int,
    page_bytes: int = 2**21,
) -> list[PageTraffic]:
    """What each training step moves if optimizer states are paged: one `PageTraffic` for each peak.

    `state_bytes` are the states in the order of the optimizer's step, each on pages of its own. In step i the
    forward and backward pass hold `peak_bytes[i]` besides; then the optimizer touches every page once, in
    order, beside `rest_bytes` (weights, gradients). The rules are those of `PagedMemory`, and so are
    the errors. QLoRA, section 3, "Paged Optimizers". Chapter 12.
    """
    memory = PagedMemory(capacity_bytes, page_bytes)
    pages = sum(-(-size // page_bytes) for size in check_sizes("state_bytes", state_bytes))
    steps = []
    for peak in peak_bytes:
        before = memory.out_bytes, memory.in_bytes
        memory.reserve(peak)
        memory.reserve(rest_bytes)
        for page in range(pages):
            memory.touch(page)
        steps.append(PageTraffic(memory.out_bytes - before[0], memory.in_bytes - before[1]))
    return steps
