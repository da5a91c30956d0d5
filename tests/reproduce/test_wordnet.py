"""WordNet's files, read against what anyone can look up."""

from __future__ import annotations

import pytest
from reproduce.tiny import WORDNET

from spectra.errors import NotFoundError
from spectra.reproduce.wordnet import parse_synset, read_wordnet


@pytest.fixture(scope="module")
def wordnet():
    return read_wordnet(WORDNET)


def first(wordnet, name):
    return wordnet.synsets[wordnet.senses[name][0]]


def test_the_database_is_whole(wordnet):
    # 82,115 noun and 13,767 verb synsets: WordNet 3.0's own statistics, wnstats(7)
    assert sum(key[0] == "n" for key in wordnet.synsets) == 82_115
    assert sum(key[0] == "v" for key in wordnet.synsets) == 13_767


def test_a_word_has_its_meaning_and_its_place(wordnet):
    dog = first(wordnet, "n:dog")
    assert dog.words[0] == "dog"
    assert "domestic dog" in dog.words
    assert dog.definition.startswith("a member of the genus Canis")
    assert dog.examples == ("the dog barked all night",)
    assert {wordnet.synsets[key].words[0] for key in dog.kinds} == {"canine", "domestic animal"}


def test_paris_is_an_instance(wordnet):
    assert [wordnet.synsets[key].words[0] for key in first(wordnet, "n:paris").classes] == ["national capital"]


def test_every_pointer_leads_somewhere(wordnet):
    for synset in wordnet.synsets.values():
        assert synset.words
        assert all(key in wordnet.synsets for key in synset.kinds + synset.classes)


def test_a_gloss_with_two_examples_and_a_word_count_in_hexadecimal():
    words = " ".join(f"w{i} 0" for i in range(16))
    synset = parse_synset(f'00000001 03 v 10 {words} 000 01 + 08 00 | to do; a second part; "one"; "two"', "v")
    assert len(synset.words) == 16
    assert (synset.definition, synset.examples) == ("to do", ("one", "two"))


def test_a_missing_database_says_how_to_get_it(tmp_path):
    with pytest.raises(NotFoundError, match=r"data\.noun is missing.*pip install"):
        read_wordnet(tmp_path)
