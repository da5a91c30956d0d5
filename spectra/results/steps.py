"""At which step of training a checkpoint was saved: from `trainer_state.json`, or from its name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from spectra.errors import SelectionError
from spectra.files import hub
from spectra.files.choice import WEIGHT_SUFFIXES

_STATE = "trainer_state.json"
_WORD = r"(?P<word>checkpoint|ckpt|global_?step|steps?|iter(?:ation)?s?|epochs?|ep)"
# The number ends a name, behind a word for what is counted, or stands alone behind a separator.
_WORDED = re.compile(rf"(?:^|[-_.@ ]){_WORD}[-_=. ]?(?P<number>\d+)$", re.IGNORECASE)
_BARE = re.compile(r"(?:^|[-_.@ ])(?P<number>\d+)$")
_MLX = re.compile(r"^(?P<number>\d+)_adapters$")  # MLX puts the number first
_EPOCHS = ("epoch", "epochs", "ep")


@dataclass(frozen=True)
class Moment:
    """A checkpoint and when in training it was saved.

    Attributes:
        step: the number of optimizer steps, or of epochs where the names count those.
        path: the checkpoint as it was given.
        note: where its name and its `trainer_state.json` contradict each other, what counts.
    """

    step: int
    path: str
    note: str = ""


def in_order(paths: Sequence[str | Path], steps: Sequence[int] | None = None) -> list[Moment]:
    """The checkpoints of one run, the earliest first.

    `global_step` of a `trainer_state.json` beside the weights counts before the name. In a name it is the number at
    the end, behind a word (`checkpoint-500`, `step_500`, `epoch3`, `org/model@step500`) or a separator
    (`lora-000500.safetensors`); a folder's own name may say nothing (`checkpoint-500/adapter`) if the folder above
    has such a word and a number.

    Args:
        paths: folders, files or hub ids.
        steps: the step of each, instead of looking for it.

    Raises:
        SelectionError: a checkpoint says no step, some count epochs and others steps, or two are of one step.

    Example:
        >>> [moment.step for moment in in_order(["run/checkpoint-1000", "run/checkpoint-500"])]
        [500, 1000]
    """
    names = [str(path) for path in paths]
    if steps is not None and len(steps) != len(names):
        raise SelectionError(f"{len(steps)} steps for {len(names)} checkpoints: give steps= (--step) once for each")
    if steps is not None and any(isinstance(step, bool) or int(step) != step or step < 0 for step in steps):
        raise SelectionError(f"steps = {list(steps)} are not all whole numbers from 0: give each checkpoint's step")
    counted = [(int(step), "step", "") for step in steps] if steps is not None else [_said(name) for name in names]
    _refuse_two_units(names, [unit for _, unit, _ in counted])
    moments: dict[int, Moment] = {}
    for name, (step, _, note) in zip(names, counted, strict=True):
        if step in moments:
            raise SelectionError(
                f"{moments[step].path} and {name} are both of step {step}: leave one out, or give steps= (--step) for "
                "each" + "".join(f"; {said}" for said in (moments[step].note, note) if said)
            )
        moments[step] = Moment(step, name, note)
    return [moments[step] for step in sorted(moments)]


def _said(name: str) -> tuple[int, str, str]:
    """The step of a checkpoint, what is counted, and where its name contradicts its state."""
    in_state = _from_state(name)
    if in_state is not None:
        return in_state, "step", _contradiction(name, in_state)
    in_name = _from_name(name)
    if in_name is not None:
        return *in_name, ""
    if not os.path.exists(os.path.expanduser(name)):
        hub.resolve(name)  # which says what was looked for, where there is no such thing
    inside = _checkpoints_in(name)
    if inside:
        raise SelectionError(
            f"{name} is no checkpoint, but holds {len(inside)}, such as {inside[-1]}: give those ({Path(name) / '…'})"
        )
    raise SelectionError(
        f"{name}: neither its name nor a {_STATE} in it says at which step it was saved; "
        "give steps= (--step N, once for each checkpoint, in their order)"
    )


def _contradiction(name: str, step: int) -> str:
    """What is said where a name counts steps, in so many words, and not those of the state beside the weights."""
    number = _WORDED.search(_pieces(name)[0])
    if number is None or number["word"].lower() in _EPOCHS or int(number["number"]) == step:
        return ""
    return f"{name} is of step {step} by its {_STATE}, which counts, and of {number['number']} by its name"


def _from_name(name: str) -> tuple[int, str] | None:
    """The number in a checkpoint's name, and what is counted; None where it has none."""
    own, *above = _pieces(name)
    for number in (_WORDED.search(own), _MLX.search(own), _BARE.search(own), *map(_WORDED.search, above[:1])):
        if number:
            word = number.groupdict().get("word") or ""
            return int(number["number"]), "epoch" if word.lower() in _EPOCHS else "step"
    return None


def _checkpoints_in(name: str) -> list[str]:
    """The folders in a folder whose names count steps or epochs."""
    place = Path(os.path.expanduser(name))
    try:
        return sorted(folder.name for folder in place.iterdir() if folder.is_dir() and _WORDED.search(folder.name))
    except OSError:
        return []


def _from_state(name: str) -> int | None:
    """`global_step` of the trainer's state beside the weights; None where there is no such file."""
    place = Path(os.path.expanduser(name))
    path = (place if os.path.isdir(place) else place.parent) / _STATE
    if not os.path.exists(place) or not os.path.isfile(path):
        return None
    try:
        step = json.loads(path.read_text(encoding="utf-8"))["global_step"]
        return int(step)
    except (OSError, ValueError, KeyError, TypeError):
        raise SelectionError(f"{path} is damaged: it says no global_step; mend it or give steps= (--step)") from None


def _pieces(name: str) -> list[str]:
    """The folders of a path from the last one upwards, without a weights file's ending."""
    path = PurePosixPath(os.path.realpath(os.path.expanduser(name)) if os.path.exists(name) else name)
    last = path.name
    ending = next((suffix for suffix in WEIGHT_SUFFIXES if last.endswith(suffix)), "")
    return [last.removesuffix(ending), *(part.name for part in path.parents)]


def _refuse_two_units(names: Sequence[str], units: Sequence[str]) -> None:
    if len(set(units)) > 1:
        step, epoch = names[units.index("step")], names[units.index("epoch")]
        raise SelectionError(f"{epoch} counts epochs and {step} counts steps: give steps= (--step) for each")
