"""The multi-task mix: four families of tasks, three tasks each, seeded and offline."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from spectra.errors import MissingExtraError, SelectionError
from spectra.reproduce.wordnet import Synset, WordNet

_LONGEST_ANSWER = 60  # characters
_LONGEST_QUESTION = 420
_TRIES = 60  # questions drawn per question kept, before a generator counts as exhausted


@dataclass(frozen=True)
class Example:
    """A question with the one answer that counts as right."""

    task: str
    question: str
    answer: str


Questions = Iterator[tuple[str, str]]
Generator = Callable[[int, WordNet], Questions]  # seed, database → endless (question, answer)


def _reasoning_gym(name: str, seed: int, _wordnet: WordNet, **settings: Any) -> Questions:
    try:
        import reasoning_gym
    except ImportError:
        raise MissingExtraError("spectra reproduce", "reproduce") from None
    for item in reasoning_gym.create_dataset(name, seed=seed, size=10**6, **settings):
        yield item["question"].strip(), item["answer"]


def _known(wordnet: WordNet, rng: random.Random, part: str) -> Iterator[tuple[str, Synset]]:
    """Endless pairs of a single word that one knows, and its most frequent meaning."""
    names = sorted(name for name in wordnet.tagged if name.startswith(part) and name[2:].isalpha())
    while True:
        name = rng.choice(names)
        yield name[2:], wordnet.synsets[wordnet.senses[name][0]]


def _definition(seed: int, wordnet: WordNet) -> Questions:
    for word, synset in _known(wordnet, random.Random(seed), "n"):
        if word not in synset.definition:
            yield f"Which word means: {synset.definition}?", word


def _kind(seed: int, wordnet: WordNet) -> Questions:
    for word, synset in _known(wordnet, random.Random(seed), "n"):
        if synset.kinds:
            yield f"What kind of thing is this: {word}?", wordnet.synsets[synset.kinds[0]].words[0]


def _instance(seed: int, wordnet: WordNet) -> Questions:
    rng = random.Random(seed)
    named = sorted((s for s in wordnet.synsets.values() if s.classes), key=lambda s: s.key)
    while True:
        synset = rng.choice(named)
        yield f"Who or what is {synset.words[0]}?", wordnet.synsets[synset.classes[0]].words[0]


def _word_in_context(seed: int, wordnet: WordNet) -> Questions:
    """Does a word of a sentence have this meaning? Wrong meanings are others of the same word."""
    rng = random.Random(seed)
    names = sorted(name for name in wordnet.tagged if len(wordnet.senses[name]) > 1 and name[2:].isalpha())
    while True:
        name = rng.choice(names)
        word, senses = name[2:], wordnet.senses[name]
        key = rng.choice(senses)
        used = [text for text in wordnet.synsets[key].examples if re.search(rf"\b{word}\b", text)]
        if used:
            right = rng.random() < 0.5
            shown = wordnet.synsets[key if right else rng.choice([other for other in senses if other != key])]
            question = f'In "{used[0]}", does {word} mean "{shown.definition}"? Answer Yes or No.'
            yield question, "Yes" if right else "No"


# Family → task → endless questions. The families are those that Wang et al. 2023 mix.
FAMILIES: dict[str, dict[str, Generator]] = {
    "instruction following": {
        "spell_backward": partial(_reasoning_gym, "spell_backward", max_word_len=8),
        "reverse_words": partial(_reasoning_gym, "word_sequence_reversal", max_words=5),
        "reorder_sentence": partial(_reasoning_gym, "sentence_reordering", max_words_in_sentence=7),
    },
    "language understanding": {
        "syllogism": partial(_reasoning_gym, "syllogism"),
        "family": partial(_reasoning_gym, "family_relationships", max_family_size=5),
        "word_in_context": _word_in_context,
    },
    "world knowledge": {"definition": _definition, "kind_of": _kind, "instance_of": _instance},
    "arithmetic reasoning": {
        "chain_sum": partial(_reasoning_gym, "chain_sum", max_digits=2, max_terms=3),
        "equation": partial(_reasoning_gym, "simple_equations", max_value=20),
        "word_problem": partial(_reasoning_gym, "gsm_symbolic"),
    },
}
TASKS: dict[str, Generator] = {name: task for tasks in FAMILIES.values() for name, task in tasks.items()}
FAMILY_OF = {name: family for family, tasks in FAMILIES.items() for name in tasks}


def draw(task: str, count: int, seed: int, wordnet: WordNet, *, avoid: frozenset[str] = frozenset()) -> list[Example]:
    """The first `count` different questions of a task's stream that are short enough and not to be avoided.

    Raises:
        SelectionError: the generator has fewer.
        MissingExtraError: reasoning-gym is not installed.
    """
    kept: dict[str, str] = {}
    for question, answer in islice(TASKS[task](seed, wordnet), _TRIES * count):
        fits = len(question) <= _LONGEST_QUESTION and 0 < len(answer) <= _LONGEST_ANSWER
        if fits and question not in avoid:
            kept.setdefault(question, answer)
        if len(kept) == count:
            return [Example(task, question, answer) for question, answer in kept.items()]
    raise SelectionError(f"{task} has only {len(kept)} different questions for {count}: ask for fewer steps")


def mix(per_task: int, held_out: int, wordnet: WordNet) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples, as many of every task, with no question in both."""
    train: list[Example] = []
    test: list[Example] = []
    for task in TASKS:
        test += (kept := draw(task, held_out, 1, wordnet))
        train += draw(task, per_task, 2, wordnet, avoid=frozenset(example.question for example in kept))
    return train, test
