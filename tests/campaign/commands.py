"""The commands that leave something on a disk, on small models, and what each leaves when nothing disturbs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from support.checkpoints import llama_tensors, nudged, write_checkpoint
from support.command_line import lora_folder

from campaign import children, disk
from campaign.case import Area, HarmError

OUT = "out"
TIME = 100  # seconds for one command on a busy machine; most take two


@dataclass(frozen=True)
class Command:
    """A command and what has to lie in its folder.

    Attributes:
        words: its arguments; `{base}` and the like stand for models.
        before: the name of a command whose results it starts from, in the same folder.
    """

    words: str
    before: str = ""


COMMANDS = {
    "svd": Command("svd {a} --base {base} --top 3 --out out --no-figures"),
    "svd-figures": Command("svd {a} --base {base} --out out"),
    "svd-workers": Command("svd {a} --base {base} --top 2 --out out --no-figures --workers 2"),
    "svd-many": Command("svd {many} --base {experts} --out out --no-figures"),
    "svd-lora": Command("svd {lora} --top 3 --out out --no-figures"),
    "similarity": Command("similarity {a} {b} --base {base} --top 4 --side both --out out --no-figures"),
    "similarity-figures": Command("similarity {lora} {other} --top 4 --out out"),
    "similarity-many": Command("similarity {a} {b} {c} --base {base} --top 3 --layer v_proj --out out --no-figures"),
    "plot": Command("plot out", before="svd"),
    "plot-similarity": Command("plot out --side left", before="similarity"),
    "extract": Command("extract {a} --base {base} --rank 2 --out out"),
    "extract-modules": Command("extract {a} --base {base} --energy 0.9 --save-modules --out out"),
    "extract-kohya": Command("extract {lora} --rank 2 --format kohya --out out"),
    "interference": Command("interference {lora} {other} --out out --no-figures"),
    "interference-figures": Command("interference {a} {b} {c} --base {base} --layer q_proj --out out"),
    "series": Command(
        "series {a} {b} {c} --step 1 --step 2 --step 3 --base {base} --layer attn --out out --no-figures"
    ),
    "series-figures": Command("series {a} {b} --step 1 --step 2 --base {base} --layer q_proj --out out"),
    "alignment": Command("alignment {a} --base {base} --k 3 --layer attn --out out --no-figures --cache out/cache"),
    "report": Command("report out --out out/page.html", before="svd"),
}


@dataclass
class Bench:
    """Models, and the undisturbed results of every command on them, made when they are first asked for."""

    shelf: Path

    def __post_init__(self) -> None:
        base = llama_tensors()
        models = {"base": base} | {name: nudged(base, seed=seed) for seed, name in enumerate("abc", 1)}
        experts = {f"layers.0.experts.{i}.v_proj.weight": torch.full((4, 3), float(i)) for i in range(300)}
        models |= {"experts": experts, "many": nudged(experts, seed=4)}
        self.inputs = {name: self.shelf / "models" / name for name in (*models, "lora", "other")}
        for name, tensors in models.items():
            if not self.inputs[name].exists():
                write_checkpoint(self.inputs[name], tensors, shards=2 if name == "base" else 1)
        for seed, name in enumerate(("lora", "other")):
            if not self.inputs[name].exists():
                lora_folder(self.inputs[name], seed)

    def words(self, name: str) -> list[str]:
        """The command line of a command."""
        return [word.format(**self.inputs) for word in COMMANDS[name].words.split()]

    def set_up(self, name: str, home: Path) -> None:
        """Put what a command starts from into its folder."""
        before = COMMANDS[name].before
        if before:
            shutil.copytree(self.undisturbed(before) / OUT, home / OUT)

    def undisturbed(self, name: str) -> Path:
        """The folder in which a command ran once and nothing disturbed it."""
        done = self.shelf / "undisturbed" / name
        if not done.exists():
            making = self.shelf / f"making-{name}"
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
            self.set_up(name, making)
            with (self.shelf / f"{name}.changes").open("wb", buffering=0) as made:  # a byte for each
                count = partial(disk.watch, partial(made.write, b"."))
                ended = children.call(spectra_command(self.words(name), count), making, seconds=TIME)
            if ended.status:
                raise HarmError(f"undisturbed, spectra {COMMANDS[name].words} ends with {ended.status}:\n{ended.err}")
            done.parent.mkdir(exist_ok=True)
            self._clock(name).write_text(str(ended.seconds))
            making.rename(done)
        return done

    def time_of(self, name: str) -> float:
        """How many seconds it took undisturbed."""
        self.undisturbed(name)
        return float(self._clock(name).read_text())

    def changes_of(self, name: str) -> int:
        """How many changes of the disk it made undisturbed."""
        self.undisturbed(name)
        return (self.shelf / f"{name}.changes").stat().st_size

    def _clock(self, name: str) -> Path:
        return self.shelf / "undisturbed" / f"{name}.seconds"


def spectra_command(words: list[str], first: Callable[[], object] = lambda: None) -> children.Work:
    """What a child does that is this command, after something else."""

    def work() -> int | None:
        from spectra.cli import main

        first()
        return main.main(words, prog_name="spectra")

    return work


class OfCommands(Area):
    """Harm to commands at work, all of them or those that `kinds` names."""

    def kinds(self) -> Sequence[str]:
        return list(COMMANDS)

    def prepare(self, shelf: Path) -> None:
        self.bench = Bench(shelf)
