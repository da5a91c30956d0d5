"""A test double of a CUDA card: tensors that say they live on one, and a card that hides no mistake.

Every call of torch that touches a `CardTensor` is answered by the CPU, after what a card would refuse has been refused:
operands in two memories, numbers read without a copy, more bytes than there are. It also tells what a card would do
silently: use a tensor on a stream that has not waited for it. Such a mistake is a `CardError`, which the engine does
not catch; a card's own `RuntimeError` would only send the matrix down the ladder.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = torch.device("cuda:0")
_MAIN = "main"
_HERE = threading.local()

_ANY_MEMORY = {"copy_", "__setitem__", "__getitem__", "to", "type_as"}  # a card takes operands of both memories here
_READS = {"item", "__float__", "__int__", "__bool__", "__index__", "__contains__", "is_nonzero", "tolist", "equal",
          "allclose", "nonzero", "flatnonzero", "unique", "masked_select", "argwhere", "linalg_cholesky", "linalg_eigh",
          "linalg_eigvalsh", "linalg_svd", "linalg_svdvals"}  # fmt: skip
_NEVER = {"numpy", "__array__", "data_ptr"}  # TypeError on a card
_BRINGS = {"to", "cuda", "as_tensor", "tensor"}
_TOLD = {"device", "is_cuda", "is_cpu"}
_SOLVERS = {"linalg_svd", "linalg_svdvals", "linalg_eigh", "linalg_eigvalsh", "linalg_qr", "geqrf", "ormqr",
            "linalg_cholesky", "linalg_cholesky_ex", "linalg_solve_triangular", "linalg_inv"}  # fmt: skip


class CardError(AssertionError):
    """A mistake that a card would answer with an error, or with a wrong number."""


class CardTensor(Tensor):
    """A tensor whose numbers lie on the card; all it holds is where they really are."""

    @staticmethod
    def __new__(cls, inner: Tensor, card: Card) -> CardTensor:
        with torch._C.DisableTorchFunction():
            return Tensor._make_subclass(cls, torch.empty(inner.shape, dtype=inner.dtype, device="meta"))

    def __init__(self, inner: Tensor, card: Card) -> None:
        self.inner, self.card = inner, card
        self.storage_on_card = card.hold(inner, self)

    def record_stream(self, stream: Stream) -> None:
        """The memory is not to be given to another before this stream is through with it."""
        self.card.held[self.storage_on_card].allowed.add(stream.name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CardTensor))
        with torch._C.DisableTorchFunctionSubclass():
            return found.card.call(func, args, kwargs or {})


@dataclass
class Held:
    """A piece of the card's memory: where it was last written, who may use it, and how many tensors share it."""

    size: int
    stream: str
    written: tuple[str, int]
    allowed: set[str]
    used_on: set[str] = field(default_factory=set)
    tensors: int = 0


@dataclass(frozen=True)
class Stream:
    """A queue of work on the card."""

    name: str
    card: Any

    def synchronize(self) -> None:
        """Wait for it."""
        self.card.wait_for(self.name)


@dataclass
class Card:
    """The card: what is on it, what it did, and what it is told to do wrong.

    Attributes:
        capacity: bytes it has.
        capability: its CUDA compute capability.
        faults: name of a function ↦ what it does instead, given the right one and its arguments (on the CPU).
        dead: what it answers to everything; "" for a card that works.
        used: bytes in use now; `peak`, at most.
        uploaded: bytes that came from the CPU.
        counts: calls by name; uploads, downloads, and waits of the host for what is not done yet.
        solved: every call of a solver, with type and shape of what it was given.
        misuses: what a card would have answered with a wrong number or an error of its own.
    """

    capacity: int = 2**30
    capability: tuple[int, int] = (9, 0)
    faults: dict[str, Callable[..., Any]] = field(default_factory=dict)
    dead: str = ""
    used: int = 0
    peak: int = 0
    uploaded: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    solved: list[tuple[str, torch.dtype, tuple[int, ...]]] = field(default_factory=list)
    misuses: list[str] = field(default_factory=list)
    held: dict[int, Held] = field(default_factory=dict)
    clock: int = 0
    waited: dict[str, int] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)

    def call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One call of torch: refused, or answered by the CPU and put back on the card."""
        name = _name_of(func)
        if name in _TOLD:
            return {"device": NAME, "is_cuda": True, "is_cpu": False}[name]
        if name in _NEVER:
            self._refuse(f"{name}() of a tensor on the card")
        mine = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CardTensor)]
        self._check_memories(name, args, kwargs)
        if name in ("__get__", "size", "dim", "stride", "__len__", "numel", "is_contiguous", "__repr__", "__format__"):
            return func(*tree_map(_inner, args), **kwargs)
        with self.lock:
            self._check_alive()
            self._check_streams(name, mine)
            self.counts[name] += 1
            found = self._answer(name, func, args, kwargs)
            return self._placed(name, found, args, kwargs)

    def _check_alive(self) -> None:
        if self.dead:
            raise torch.AcceleratorError(self.dead)

    def _check_memories(self, name: str, args: Any, kwargs: Any) -> None:
        elsewhere = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is Tensor and leaf.dim() > 0]
        if elsewhere and name not in _ANY_MEMORY:
            self._refuse(f"{name}() of tensors on the card and of shape {list(elsewhere[0].shape)} on the CPU")
        for tensor in elsewhere:  # a card's copy converts on the CPU, to the type of where it goes
            self._uploaded(tensor, args[0].dtype if name in ("copy_", "__setitem__") else tensor.dtype)

    def _check_streams(self, name: str, mine: list[CardTensor]) -> None:
        here = self.stream_here()
        for tensor in mine:
            there = self.held[tensor.storage_on_card]
            stream, tick = there.written
            if stream != here and tick > self.waited.get(stream, 0):
                self._refuse(f"{name}() on stream {here!r} of a tensor that stream {stream!r} may still be writing")
            there.used_on.add(here)

    def _answer(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        inner_args, inner_kwargs = tree_map(_inner, args), {key: tree_map(_inner, kwargs[key]) for key in kwargs}
        if name in _SOLVERS:
            self._note_solver(name, inner_args)
        inner_args, inner_kwargs = tree_map(_on_cpu, inner_args), {k: _on_cpu(v) for k, v in inner_kwargs.items()}
        fault = self.faults.get(name)
        return fault(func, *inner_args, **inner_kwargs) if fault else func(*inner_args, **inner_kwargs)

    def _note_solver(self, name: str, args: Any) -> None:
        """Solvers take a copy of what they are given, and work space for one matrix of the batch."""
        operands = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        self.solved.append((name, operands[0].dtype, tuple(operands[0].shape)))
        copy = max(operand.nbytes for operand in operands)
        one = copy // max(1, operands[0].shape[:-2].numel())
        self._need(copy + (2 * one if name.endswith(("eigh", "svd")) else 0))

    def _placed(self, name: str, found: Any, args: Any, kwargs: Any) -> Any:
        """What a call gave, on the card unless it was asked for elsewhere."""
        if name in _READS:
            self.synchronize_here()
        device = _device_asked(name, args, kwargs)
        if name == "cpu" or (device is not None and device.type == "cpu"):
            self.counts["downloads"] += 1
            self.synchronize_here()
            return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, found)
        same = {id(leaf.inner): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, CardTensor)}
        if name == "copy_" and not isinstance(args[0], CardTensor):
            self.counts["downloads"] += 1
            return found
        for tensor in (args[0] if name.endswith("_") or name == "__setitem__" else None, kwargs.get("out")):
            if isinstance(tensor, CardTensor):
                self.clock += 1
                self.held[tensor.storage_on_card].written = (self.stream_here(), self.clock)
        return tree_map(lambda leaf: self._wrapped(leaf, same), found)

    def _wrapped(self, leaf: Any, same: dict[int, CardTensor]) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return same[id(leaf)] if id(leaf) in same else CardTensor(leaf, self)

    def _uploaded(self, tensor: Tensor, dtype: torch.dtype) -> None:
        self.counts["uploads"] += 1
        self.uploaded += tensor.numel() * dtype.itemsize

    def made(self, name: str, tensor: Tensor) -> CardTensor:
        """A copy of a tensor on the card: brought there, or made there."""
        with self.lock:
            self._check_alive()
            if name in _BRINGS:
                self._uploaded(tensor, tensor.dtype)
            return CardTensor(tensor.detach().clone(), self)

    def hold(self, inner: Tensor, tensor: CardTensor) -> int:
        """Take what a tensor needs, unless it shares it with another, until the last of them is gone."""
        with self.lock:
            place = inner.untyped_storage().data_ptr() or -id(inner.untyped_storage())
            if place not in self.held:
                size = inner.untyped_storage().nbytes()
                self._need(size)
                here = self.stream_here()
                self.clock += 1
                self.held[place] = Held(size, here, (here, self.clock), {here})
                self.used += size
            self.held[place].tensors += 1
            weakref.finalize(tensor, self._drop, place)
            return place

    def _drop(self, place: int) -> None:
        with self.lock:
            there = self.held[place]
            there.tensors -= 1
            if there.tensors == 0:
                del self.held[place]
                self.used -= there.size
                if there.used_on - there.allowed:
                    unknown = there.used_on - there.allowed
                    self.misuses.append(f"memory of stream {there.stream!r} freed while {unknown} may still use it")

    def _need(self, size: int) -> None:
        if self.used + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.peak = max(self.peak, self.used + size)

    def _refuse(self, what: str) -> None:
        self.misuses.append(what)
        raise CardError(what)

    def stream_here(self) -> str:
        """The stream of this thread."""
        return getattr(_HERE, "stream", _MAIN)

    def synchronize_here(self) -> None:
        """The host waits for this thread's stream."""
        self.counts["waits"] += 1
        self.wait_for(self.stream_here())

    def wait_for(self, *streams: str) -> None:
        """All that these streams were given so far is done."""
        with self.lock:
            self._check_alive()
            for stream in streams:
                self.waited[stream] = self.clock


class _Making(TorchFunctionMode):
    """Sees what makes tensors on the card in this thread: factories and copies."""

    def __init__(self, card: Card) -> None:
        self.card = card

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(isinstance(leaf, CardTensor) for leaf in tree_leaves((args, kwargs))):
            return self.card.call(func, args, kwargs)
        name = _name_of(func)
        device = _device_asked(name, args, kwargs)
        if device is None or device.type != "cuda":
            return func(*args, **kwargs)
        if device != NAME and device.index is not None:
            raise CardError(f"{name}() on {device}, which is not there")
        found = func(*tree_map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})
        return self.card.made(name, found)


@contextmanager
def card_of(monkeypatch: Any, **settings: Any) -> Iterator[Card]:
    """A card in place of torch's CUDA, for this thread and for those that read on a stream of theirs."""
    card = Card(**settings)
    numbers = iter(range(1, 10**6))

    @contextmanager
    def on_stream(stream: Stream) -> Iterator[None]:
        before, _HERE.stream = card.stream_here(), stream.name
        try:
            with _Making(card):
                yield
        finally:
            _HERE.stream = before

    fakes = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_device_capability": lambda device=None: card.capability,
        "mem_get_info": lambda device=None: card._check_alive() or (card.capacity - card.used, card.capacity),
        "synchronize": lambda device=None: card.wait_for(*{held.stream for held in card.held.values()}, _MAIN),
        "Stream": lambda device=None: Stream(f"stream {next(numbers)}", card),
        "current_stream": lambda device=None: Stream(card.stream_here(), card),
        "stream": on_stream,
        "empty_cache": lambda: card.counts.update(["empty_cache"]),
    }
    with monkeypatch.context() as patch:
        for name, fake in fakes.items():
            patch.setattr(torch.cuda, name, fake)
        with _Making(card):
            yield card


def _name_of(func: Any) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":  # of a property, such as Tensor.device
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        return name if name in _TOLD or name in ("T", "mT", "H", "mH", "real", "imag", "data") else "__get__"
    return name


def _inner(leaf: Any) -> Any:
    return leaf.inner if isinstance(leaf, CardTensor) else leaf


def _on_cpu(leaf: Any) -> Any:
    """The CPU where the card is asked for."""
    if isinstance(leaf, torch.device) or (isinstance(leaf, str) and leaf.startswith("cuda")):
        return torch.device("cpu")
    return leaf


def _device_asked(name: str, args: Any, kwargs: Any) -> torch.device | None:
    """The device that a call names: as an argument, or by the tensor it is to be like."""
    asked = kwargs.get("device")
    if asked is None and name in ("to", "type_as") and len(args) > 1:
        other = args[1]
        if isinstance(other, Tensor):
            return NAME if isinstance(other, CardTensor) else torch.device("cpu")
        asked = other if isinstance(other, torch.device | str) else None
    if asked is None and name == "cuda":
        return NAME
    return torch.device(asked) if asked is not None else None
