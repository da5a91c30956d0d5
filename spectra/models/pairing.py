"""Which tuned weight belongs to which base weight: exact names, after one prefix rule for the whole set."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial

from spectra.errors import SourceError

Shape = tuple[int, ...]
# PEFT wraps a model, or one inside another: a language model beside a projector.
_INNER_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "base_model.model.")
_WRAPPERS = ("module.", "_forward_module.", *_INNER_WRAPPERS)
# Where a vision-language model keeps what is a model of its own elsewhere: prefixes that stand for each other.
_NESTED = (("model.", "model.language_model."),)
# Where single files of image models keep a text encoder: ComfyUI's, and Stability's.
_TEXT_ENCODER = re.compile(r"(?:text_encoders\.[^.]+|conditioner\.embedders\.\d+)\.transformer\.")


def align(tuned: Mapping[str, Shape | None], base: Mapping[str, Shape]) -> tuple[dict[str, str], str]:
    """The base's name for each tuned name, and what had to be done for it in words ("" for nothing).

    Wrapper prefixes that every name has are dropped. Then at most one leading path is added to or
    dropped from the tuned names, the one that pairs most weights of equal shape, so that a bare
    encoder meets a task model. A rule is for the whole set: no tensor is matched on its own.
    A shape of None, where the tuned file does not say it, fits any weight of that name.

    Raises:
        SourceError: no rule pairs anything, or two rules pair equally many.
    """
    bare, bare_base = unwrapped(tuned), unwrapped(base)
    canonical = {short: name for name, short in bare_base.items()}
    as_it_is = {name: canonical.get(short, short) for name, short in bare.items()}
    if bare and all(_fits(tuned[name], base.get(new)) for name, new in as_it_is.items()):
        return as_it_is, ""  # no rule can pair more
    rules: dict[str, Callable[[str], str]] = {"": lambda name: name}
    for prefix in sorted(_leading_paths(bare.values())):
        rules[f"dropped the prefix {prefix!r} from the tuned names"] = partial(_dropped, prefix)
    for prefix in sorted(_leading_paths(bare_base.values())):
        rules[f"added the prefix {prefix!r} to the tuned names"] = partial(_added, prefix, canonical)
    for short, long in _NESTED:
        rules[f"read the prefix {short!r} of the tuned names as {long!r}"] = partial(_exchanged, short, long)
        rules[f"read the prefix {long!r} of the tuned names as {short!r}"] = partial(_exchanged, long, short)
    scores: dict[str, int] = {}
    renamed: dict[str, dict[str, str]] = {}
    for words, rule in rules.items():
        names = {name: rule(short) for name, short in bare.items()}
        if len(set(names.values())) < len(names):
            continue
        renamed[words] = {name: canonical.get(new, new) for name, new in names.items()}
        scores[words] = sum(_fits(tuned[name], base.get(new)) for name, new in renamed[words].items())
    best = max(scores.values(), default=0)
    winners = [words for words, score in scores.items() if score == best]
    if best == 0 and not set(canonical) & set(bare.values()):
        raise SourceError(
            f"no weight of the tuned model is in the base: tuned has {_example(tuned)}, "
            f"base has {_example(base)}; is base= (--base) the model that was tuned?"
        )
    if "" not in winners and len(winners) > 1:
        raise SourceError(f"the tuned names fit the base in {len(winners)} ways: {'; '.join(winners)}; rename one side")
    chosen = "" if "" in winners else winners[0]
    return renamed[chosen], chosen


def _fits(tuned: Shape | None, base: Shape | None) -> bool:
    return base is not None if tuned is None else base == tuned


def _dropped(prefix: str, name: str) -> str:
    return name.removeprefix(prefix)


def _exchanged(old: str, new: str, name: str) -> str:
    return new + name.removeprefix(old) if name.startswith(old) else name


def _added(prefix: str, base: Collection[str], name: str) -> str:
    """With the prefix where the base has it so: a head beside a bare encoder keeps its name."""
    return prefix + name if prefix + name in base else name


def unwrap(name: str) -> str:
    """The name without what data parallelism, torch.compile, FSDP or PEFT wrap around a module.

    >>> unwrap("module._orig_mod.encoder.layer.0.weight")
    'encoder.layer.0.weight'
    >>> unwrap("llm.base_model.model.model.layers.0.weight")
    'llm.model.layers.0.weight'
    """
    for wrapper in _INNER_WRAPPERS:
        name = name.replace("." + wrapper, ".")
    while name.startswith(_WRAPPERS):
        for wrapper in _WRAPPERS:
            name = name.removeprefix(wrapper)
    return name


def unwrapped(names: Iterable[str]) -> dict[str, str]:
    """name → the name without wrappers; all as they are where two would become one."""
    names = list(names)
    every = "\n".join(names)
    if not any(wrapper in every for wrapper in _WRAPPERS):
        return {name: name for name in names}
    bare = {name: unwrap(name) for name in names}
    return bare if len(set(bare.values())) == len(names) else {name: name for name in names}


def _leading_paths(names: Iterable[str]) -> set[str]:
    """First one and two path components, as prefixes, that are words rather than indices; a text encoder's place."""
    paths = set()
    for name in names:
        words = name.split(".")
        for depth in (1, 2):
            if len(words) > depth + 1 and not any(word.isdigit() for word in words[:depth]):
                paths.add(".".join(words[:depth]) + ".")
        encoder = _TEXT_ENCODER.match(name)
        if encoder:
            paths.add(encoder[0])
    return paths


def _example(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"{len(listed)} names such as {listed[len(listed) // 2]!r}" if listed else "no weights"
