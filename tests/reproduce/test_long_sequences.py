"""The long experiment's tasks: right answers, nothing held out that is trained on, and a seed that decides alone."""

from __future__ import annotations

import torch

from spectra.reproduce.long import sequences
from spectra.reproduce.long.sequences import (
    ANSWER_AT,
    DIGITS,
    EQUALS,
    KNOWN,
    LENGTH,
    OPERATIONS,
    TASKS,
    base_pairs,
    held_out,
    training_batch,
    write_out,
)

SLOWLY = {
    "reverse": lambda x: x[::-1],
    "rotate": lambda x: x[1:] + x[:1],
    "swap": lambda x: [x[i + 1 - 2 * (i % 2)] for i in range(len(x))],
    "sort": sorted,
    "increment": lambda x: [(digit + 1) % 10 for digit in x],
    "complement": lambda x: [9 - digit for digit in x],
    "maxima": lambda x: [max(x[: i + 1]) for i in range(len(x))],
    "sums": lambda x: [sum(x[: i + 1]) % 10 for i in range(len(x))],
}


def test_answers_are_what_the_operations_give_one_after_the_other():
    names = list(OPERATIONS)
    assert names == list(SLOWLY)
    questions = torch.randint(10, (20, DIGITS), generator=torch.Generator().manual_seed(3))
    for pair in TASKS + KNOWN:
        for row in write_out(pair, questions).tolist():
            f, g, *rest = row
            assert (names[f - 10], names[g - 10]) == pair
            assert rest[DIGITS] == EQUALS
            assert rest[DIGITS + 1 :] == SLOWLY[pair[0]](SLOWLY[pair[1]](rest[:DIGITS]))


def test_the_tasks_use_every_operation_in_both_places_and_the_base_has_seen_none_of_them():
    assert {f for f, _ in TASKS} == {g for _, g in TASKS} == set(OPERATIONS)
    assert not set(TASKS) & set(KNOWN)
    assert len(TASKS) == 8
    assert len(KNOWN) == 56
    assert {pair for step in range(200) for pair in base_pairs(16, 5, step)} == set(KNOWN)


def number(row):
    return int("".join(str(digit) for digit in row[2 : 2 + DIGITS].tolist()))


def test_no_held_out_question_is_ever_trained_on():
    kept = {number(row) for row in held_out(64)}
    assert len(kept) > 60
    assert all(value % 16 == 0 for value in kept)
    trained = {number(row) for step in range(300) for row in training_batch(TASKS, 0, step)}
    assert all(value % 16 for value in trained)
    assert {value % 16 for value in trained} == set(range(1, 16))


def test_a_batch_depends_on_its_seed_and_step_alone():
    first = training_batch(TASKS, 0, 7)
    torch.manual_seed(1)
    training_batch(TASKS, 0, 6)
    assert torch.equal(training_batch(TASKS, 0, 7), first)
    assert not torch.equal(training_batch(TASKS, 1, 7), first)
    assert not torch.equal(training_batch(TASKS, 0, 8), first)
    assert first.shape == (len(TASKS), LENGTH)
    assert int(first.max()) < sequences.VOCABULARY
    assert ANSWER_AT + DIGITS == LENGTH
