"""Eight synthetic tasks that a base of the same alphabet has not seen: two known operations, one after the other.

An example is `f g x₁ … x_n = y₁ … y_n` with y = f(g(x)) and digits x. The base is trained on 56 of the 64 pairs
(f, g), fine-tuning on the other eight. So the base knows the digits, the operations and the layout, and what is
learned in fine-tuning is neither a format nor a new symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DIGITS = 6  # of one question
_BASE = 10
_HELD_OUT_SEED = 10**9
_HELD_OUT_EVERY = 16  # questions whose number this divides are never trained on

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse": lambda x: x.flip(1),
    "rotate": lambda x: x.roll(-1, 1),
    "swap": lambda x: x.reshape(len(x), -1, 2).flip(2).flatten(1),
    "sort": lambda x: x.sort(1).values,
    "increment": lambda x: (x + 1) % _BASE,
    "complement": lambda x: _BASE - 1 - x,
    "maxima": lambda x: x.cummax(1).values,
    "sums": lambda x: x.cumsum(1) % _BASE,
}
_NAMES = tuple(OPERATIONS)
EQUALS = _BASE + len(_NAMES)  # tokens: the digits, the operations, "="
VOCABULARY = EQUALS + 1
ANSWER_AT = 2 + DIGITS + 1  # where the answer begins
LENGTH = ANSWER_AT + DIGITS

Pair = tuple[str, str]
TASKS: tuple[Pair, ...] = tuple((name, _NAMES[(place + 3) % len(_NAMES)]) for place, name in enumerate(_NAMES))
KNOWN: tuple[Pair, ...] = tuple((f, g) for f in _NAMES for g in _NAMES if (f, g) not in TASKS)


def write_out(pair: Pair, questions: Tensor) -> Tensor:
    """(b, LENGTH): questions (b, DIGITS) of one task with their answers, as tokens.

    Example:
        >>> write_out(("reverse", "increment"), torch.tensor([[1, 2, 3, 4, 5, 9]]))[0, ANSWER_AT:].tolist()
        [0, 6, 5, 4, 3, 2]
    """
    f, g = pair
    answers = OPERATIONS[f](OPERATIONS[g](questions))
    words = torch.tensor([_BASE + _NAMES.index(f), _BASE + _NAMES.index(g)]).expand(len(questions), 2)
    return torch.cat([words, questions, torch.full((len(questions), 1), EQUALS), answers], 1)


def training_batch(pairs: Sequence[Pair], seed: int, step: int) -> Tensor:
    """One example of each pair; the same for the same seed and step, whatever came before."""
    generator = _generator(seed, step)
    numbers = torch.randint(_BASE**DIGITS // _HELD_OUT_EVERY, (len(pairs),), generator=generator)
    rests = torch.randint(1, _HELD_OUT_EVERY, (len(pairs),), generator=generator)
    questions = _digits(numbers * _HELD_OUT_EVERY + rests)
    return torch.cat([write_out(pair, questions[i : i + 1]) for i, pair in enumerate(pairs)])


def base_pairs(count: int, seed: int, step: int) -> list[Pair]:
    """Which of the known pairs one batch of the base's training holds."""
    chosen = torch.randint(len(KNOWN), (count,), generator=_generator(seed, -1 - step))
    return [KNOWN[place] for place in chosen.tolist()]


def held_out(per_task: int, pairs: Sequence[Pair] = TASKS) -> Tensor:
    """(len(pairs)·per_task, LENGTH), task by task: the same questions for every run, none of them ever trained on."""
    numbers = torch.randint(_BASE**DIGITS // _HELD_OUT_EVERY, (per_task,), generator=_generator(_HELD_OUT_SEED, 0))
    questions = _digits(numbers * _HELD_OUT_EVERY)
    return torch.cat([write_out(pair, questions) for pair in pairs])


def _digits(numbers: Tensor) -> Tensor:
    places = _BASE ** torch.arange(DIGITS - 1, -1, -1)
    return numbers[:, None] // places % _BASE


def _generator(seed: int, step: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
