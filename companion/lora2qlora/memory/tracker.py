"""The measurement: bytes of storages, and the most that were held while functions ran."""

import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storage_bytes(*holders: nn.Module | torch.optim.Optimizer | Tensor) -> int:
    """[bytes] of the storages behind modules' parameters and buffers, optimizers' states and tensors.

    A storage counts once and whole, however many tensors look into it: tied weights once, a slice as much
    as what it was cut from. Gradients do not count. Raises TypeError: none of these. Chapter 11.
    """
    storages = {}
    for tensor in _tensors(holders):
        storage = own_part(tensor).untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that is divided among several (a DTensor)."""
    return getattr(tensor, "_local_tensor", tensor)


def _tensors(holders: Iterable) -> Iterator[Tensor]:
    for holder in holders:
        if isinstance(holder, Tensor):
            yield holder
        elif isinstance(holder, nn.Module):
            yield from holder.parameters()
            yield from holder.buffers()
        elif isinstance(holder, torch.optim.Optimizer):
            yield from (leaf for leaf in tree_leaves(dict(holder.state)) if isinstance(leaf, Tensor))
        else:
            raise TypeError(f"can weigh modules, optimizers and tensors, got {type(holder).__name__}")


@dataclass(frozen=True)
class PeakReport:
    """What `track_peak` saw. On CUDA the curve has the peak of each function alone."""

    peak_bytes: int
    start_bytes: int  # held at the start, of what the functions used
    end_bytes: int
    peaks: tuple[int, ...]  # [bytes] at most during each function
    curve: tuple[int, ...]  # [bytes] held after each allocation
    starts: tuple[int, ...]  # where in the curve each function begins


def track_peak(
    *functions: Callable[[], object], device: str | torch.device = "cpu", held: Iterable = ()
) -> PeakReport:
    """Call functions one after the other, and say how many bytes of tensors were held at most.

    On CUDA the allocator says it. Elsewhere every operation of torch is watched: a storage lives from the
    operation that returns it until it is freed. One that was there before counts from the start, if it is
    in `held` (modules, optimizers, tensors) or an operation reads it. Workspaces inside an operation are
    not seen. Under the watch autograd adds gradients out of place, which it otherwise does in place: one
    more tensor for a moment, where several meet.

    Raises ValueError: no function. Chapter 11. torch's own MemTracker does not take frozen parameters.
    """
    if not functions:
        raise ValueError("track_peak needs a function to call")
    if torch.device(device).type == "cuda":
        return _track_cuda(functions, device)
    watch = _LiveStorages()
    for tensor in _tensors(held):
        watch.see(tensor, is_new=False)
    for function in functions:
        watch.starts.append(len(watch.events))
        with watch:
            function()
    return watch.report()


class _LiveStorages(TorchDispatchMode):
    """Births and deaths of storages, in order: positive bytes for one, negative for the other."""

    def __init__(self):
        super().__init__()
        self.events, self.starts, self.before, self.alive = [], [], 0, {}

    def __enter__(self):
        resize = torch.UntypedStorage.resize_  # how FSDP frees what it gathered, and makes room for it again

        def watched(storage, size):
            result = resize(storage, size)
            self.count(storage, is_new=True)
            return result

        torch.UntypedStorage.resize_ = watched
        return super().__enter__()

    def __exit__(self, *error):
        del torch.UntypedStorage.resize_  # the inherited one comes back
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        from_numbers = function is torch.ops.aten.lift_fresh.default  # torch.tensor([...])
        for leaf in tree_leaves((arguments, options)):
            self.see(leaf, is_new=from_numbers)
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves(result):
            self.see(leaf, is_new=True)
        return result

    def see(self, leaf, is_new: bool) -> None:
        """Count a tensor's storage when it is first met."""
        if not isinstance(leaf, Tensor):
            return
        storage = own_part(leaf).untyped_storage()
        if storage.nbytes() and storage._cdata not in self.alive:
            self.count(storage, is_new)

    def count(self, storage: torch.UntypedStorage, is_new: bool) -> None:
        """Count a storage at the size that it has now, until it goes."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            weakref.finalize(storage, self.end, key).atexit = False
        change = size - self.alive.get(key, 0)
        self.alive[key] = size
        if is_new and change:
            self.events.append(change)
        elif not is_new:
            self.before += change

    def end(self, key: int) -> None:
        """A storage is gone."""
        if size := self.alive.pop(key, 0):
            self.events.append(-size)

    def report(self) -> PeakReport:
        """The running total, from what was there before."""
        total, curve, starts = self.before, [], []
        for i, change in enumerate([*self.events, 0]):
            for _ in range(self.starts.count(i)):
                starts.append(len(curve))
                curve.append(total)
            if change > 0:
                curve.append(total + change)
            total += change
        bounds = [*starts, len(curve)]
        peaks = tuple(max(curve[a:b]) for a, b in itertools.pairwise(bounds))
        return PeakReport(max(curve), self.before, total, peaks, tuple(curve), tuple(starts))


def _track_cuda(functions, device) -> PeakReport:
    """The same by the CUDA allocator: the high-water mark of each function."""
    start, peaks = torch.cuda.memory_allocated(device), []
    for function in functions:
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        peaks.append(torch.cuda.max_memory_allocated(device))
    end, peaks = torch.cuda.memory_allocated(device), tuple(peaks)
    return PeakReport(max(peaks), start, end, peaks, peaks, tuple(range(len(peaks))))


def track_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, watch: Callable = track_peak
) -> PeakReport:
    """Measure one training step on `ids` [batch, length] in its three phases, as PHASES names them.

    The model is one of transformers, or takes `input_ids` and `labels` and returns a `.loss` as those do.
    Gradients are gone before and after. Let a step go by before: the first one makes the optimizer's states.
    """
    losses = []

    def forward():
        losses.append(model(input_ids=ids, labels=ids).loss)

    def step():
        optimizer.step()
        optimizer.zero_grad()

    optimizer.zero_grad()
    return watch(forward, lambda: losses.pop().backward(), step, device=ids.device, held=(model, optimizer))
