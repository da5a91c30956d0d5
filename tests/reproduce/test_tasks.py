"""The mix: balanced, seeded, with right answers, and nothing held out that is trained on."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from reproduce.tiny import WORDNET

from spectra.errors import SelectionError
from spectra.reproduce.tasks import FAMILIES, FAMILY_OF, TASKS, draw, mix
from spectra.reproduce.wordnet import read_wordnet


@pytest.fixture(scope="module")
def wordnet():
    return read_wordnet(WORDNET)


@pytest.fixture(scope="module")
def mixed(wordnet):
    return mix(30, 10, wordnet)


def test_four_families_and_at_least_twelve_tasks():
    assert len(FAMILIES) == 4
    assert len(TASKS) >= 12
    assert len({len(tasks) for tasks in FAMILIES.values()}) == 1
    assert set(FAMILY_OF) == set(TASKS)


def test_every_task_has_the_same_number(mixed):
    train, test = mixed
    assert Counter(e.task for e in train) == dict.fromkeys(TASKS, 30)
    assert Counter(e.task for e in test) == dict.fromkeys(TASKS, 10)


def test_no_question_is_trained_on_and_held_out(mixed):
    train, test = ({e.question for e in part} for part in mixed)
    assert not train & test
    assert len(train) == len(mixed[0])


def test_the_same_seed_gives_the_same_examples(wordnet, mixed):
    assert mix(30, 10, wordnet) == mixed
    assert draw("definition", 5, 1, wordnet) != draw("definition", 5, 2, wordnet)


def test_more_training_keeps_what_is_held_out(wordnet, mixed):
    assert mix(12, 10, wordnet)[1] == mixed[1]


def test_arithmetic_answers_are_right(mixed):
    sums = [e for e in mixed[0] if e.task == "chain_sum"]
    for example in sums:
        expression = re.search(r"[\d\s+-]+(?==)", example.question).group()
        assert eval(expression) == int(example.answer), example  # digits, + and - only


def test_reversed_words_are_right(mixed):
    for example in (e for e in mixed[0] if e.task == "spell_backward"):
        assert example.question.endswith(example.answer[::-1])


def test_words_in_context_are_balanced_and_two_sided(wordnet):
    answers = Counter(e.answer for e in draw("word_in_context", 400, 3, wordnet))
    assert set(answers) == {"Yes", "No"}
    assert 150 < answers["Yes"] < 250


def test_a_generator_that_runs_out_says_so(wordnet, monkeypatch):
    monkeypatch.setitem(TASKS, "one", lambda seed, database: iter([("the only question", "yes")] * 50))
    with pytest.raises(SelectionError, match="one has only 1 different questions for 2: ask for fewer steps"):
        draw("one", 2, 0, wordnet)
