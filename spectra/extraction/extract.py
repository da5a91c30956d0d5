"""`extract`: an update written as a LoRA, with ranks that follow from its spectra and an error that is known before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from spectra.deltas.relatedness import unrelated_note
from spectra.errors import SelectionError
from spectra.extraction.factors import balanced, one_thread
from spectra.extraction.gather import Weight
from spectra.extraction.inputs import Given, Inputs, inputs_of
from spectra.extraction.kohya import Kohya
from spectra.extraction.left_out import LeftOut, why_not_whole
from spectra.extraction.options import DType, Format, Options
from spectra.extraction.output import TensorFile, check_free, new_folder
from spectra.extraction.peft import Peft, component_of
from spectra.extraction.ranks import Choice, Rule, choose
from spectra.extraction.stacks import together
from spectra.extraction.triplets import Stored
from spectra.spectrum import DONE, Spectrum

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor


@dataclass(frozen=True)
class Row(Choice):
    """A matrix of the table.

    Attributes:
        dtype_error: what storing the factors in their dtype adds, ‖B·A as stored − ΔW_r‖_F / ‖ΔW‖_F; NaN where the
            vectors were not computed.
        note: what the update stands for where that is not simply tuned − base, and what to know of its LoRA.
    """

    dtype_error: float = math.nan
    note: str = ""


@dataclass
class Extraction:
    """What an extraction did.

    Attributes:
        rows: one for each matrix, in the source's order.
        not_carried: name → why no LoRA holds it.
        undone: the names among them of matrices that should have been done.
        whole: paths of modules that are kept whole.
    """

    rows: list[Row] = field(default_factory=list)
    not_carried: dict[str, str] = field(default_factory=dict)
    undone: list[str] = field(default_factory=list)
    whole: list[str] = field(default_factory=list)

    def table(self) -> pd.DataFrame:
        """The rows as a DataFrame; `attrs["not_carried"]` holds what was left out."""
        import pandas as pd

        table = pd.DataFrame([asdict(row) for row in self.rows], columns=[item.name for item in fields(Row)])
        table.attrs = {"not_carried": self.not_carried, "modules_to_save": self.whole}
        return table


def run(
    inputs: Inputs,
    directory: str | Path | None,
    rule: Rule,
    options: Options,
    done: Callable[[], None] = lambda: None,
) -> Extraction:
    """Choose the ranks and write the adapter, matrix by matrix.

    Args:
        inputs: what to extract.
        directory: where to write; None to write nothing.
        rule: how ranks are chosen.
        options: how to write.
        done: called after each matrix.

    Raises:
        SelectionError: nothing would be written, or a budget is too small.
        StoreError: the folder holds something, or cannot be written.
    """
    if directory is not None:
        check_free(directory)
    work = _Work.begin(inputs, rule, options)
    if directory is None:
        for _ in work.matrices(dry=True):
            done()
        return work.finished()
    with new_folder(directory) as folder:
        file = TensorFile(folder / work.writer.file)
        for tensors in work.matrices():
            file.add(tensors)
            done()
        if not file.entries:
            raise SelectionError(f"nothing to write: {work.why_nothing()}")
        for tensors in work.whole_modules():
            file.add(tensors)
        work.writer.finish(file, work.found.whole)
    return work.finished()


@dataclass
class _Work:
    """One extraction on its way.

    Attributes:
        inputs: what to extract.
        rule: how ranks are chosen.
        options: how to write.
        writer: the format's.
        weights: name → what the format can hold.
        found: the result so far.
        unrelated: weights that have nothing to do with the base's → what to say of them.
        edgeless: weights of which all is kept since nothing is known of their rounding → what to say of that.
    """

    inputs: Inputs
    rule: Rule
    options: Options
    writer: Peft | Kohya
    weights: dict[str, Weight]
    found: Extraction
    unrelated: dict[str, str] = field(default_factory=dict)
    edgeless: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begin(cls, inputs: Inputs, rule: Rule, options: Options) -> _Work:
        """Sort out what the format cannot hold.

        Raises:
            SelectionError: modules of a sum would have to be kept whole.
        """
        if options.save_modules and not inputs.as_is:
            raise SelectionError(
                "--save-modules keeps the modules of one update as they are, and this is a weighted sum: leave it out "
                "(what is not carried is listed), or extract each update on its own"
            )
        gathered = inputs.gathered
        components = inputs.base.components if inputs.base else ()
        writer: Peft | Kohya = Kohya(components)
        if options.format == "peft":
            component = component_of((weight.module.path for weight in gathered.weights), components)
            writer = Peft(inputs.base_model, inputs.all_modules, component, inputs.replication)
        not_carried = dict(gathered.not_carried)
        for left in inputs.left:
            not_carried |= {name: why for name, why in left.reasons.items() if name not in not_carried}
        weights: dict[str, Weight] = {}
        for weight in gathered.weights:
            why = writer.why_not(weight.module)
            if why:
                not_carried[weight.name] = why
            else:
                weights[weight.name] = weight
        return cls(inputs, rule, options, writer, weights, Extraction([], not_carried, list(gathered.undone)))

    def matrices(self, *, dry: bool = False) -> Iterator[dict[str, Tensor]]:
        """The tensors of each matrix as soon as they are there; its row is entered."""
        rank = self.rule.rank
        triplets = self.inputs.triplets.planned(rank, values=rank is None, vectors=rank is not None or not dry)
        self.inputs = replace(self.inputs, triplets=triplets)
        planned = self._planned() if self.rule.rank is None else {}
        if dry and self.rule.rank is None:
            self.found.rows += [self._row(choice) for _, choice in planned.values()]
            return
        wanted = {name: choice.rank for name, (_, choice) in planned.items()}
        ranks = {
            block.delta.name: wanted.get(weight.name, 0) if self.rule.rank is None else self.rule.rank
            for weight in self.weights.values()
            for block in weight.blocks
        }
        for name, blocks in self._by_weight(self.inputs.triplets.vectors(ranks)):
            whole, plan = together(name, blocks), planned.pop(name, None)
            if whole.status not in DONE:
                self._undone(whole)
                continue
            choice = self._final(whole, plan)
            with one_thread():
                factors = [balanced(block, choice.rank, self.options.dtype) for block in blocks] if choice.rank else []
            rounding = math.hypot(*(each.rounding for each in factors)) / (whole.norm or 1.0)
            self.found.rows.append(self._row(choice, rounding))
            yield self.writer.tensors(self.weights[name].module, factors) if factors else {}
        self.found.rows += [self._row(choice) for _, choice in planned.values()]

    def _planned(self) -> dict[str, tuple[Spectrum, Choice]]:
        """The rank of every matrix that has numbers, from all of its values."""
        spectra = []
        for name, blocks in self._by_weight(self.inputs.triplets.values()):
            whole = together(name, blocks)
            if whole.status in DONE:
                spectra.append(whole)
                self._note_edge(whole)
            else:
                self._undone(whole)
        choices = choose(self.rule, spectra, stored=isinstance(self.inputs.triplets, Stored))
        return {spectrum.name: (spectrum, choice) for spectrum, choice in zip(spectra, choices, strict=True)}

    def _note_edge(self, spectrum: Spectrum) -> None:
        """Where values above the storage rounding are asked for and no edge is known, all of them count: say so."""
        if self.rule.above_noise and spectrum.status == "ok" and spectrum.noise_edge is None:
            why = f" ({spectrum.rounding})" if spectrum.rounding else ""
            self.edgeless[spectrum.name] = f"no edge of storage rounding is known{why}: all values are kept"

    def _by_weight(self, stream: Iterator[Spectrum]) -> Iterator[tuple[str, list[Spectrum]]]:
        """Blocks put together: a weight's name and its spectra, once all of them have come."""
        owners = {block.delta.name: weight for weight in self.weights.values() for block in weight.blocks}
        waiting: dict[str, dict[str, Spectrum]] = {}
        for spectrum in stream:
            weight = owners.get(spectrum.name)
            if weight is None:
                continue  # the format cannot hold it
            there = waiting.setdefault(weight.name, {})
            there[spectrum.name] = spectrum
            said = unrelated_note(spectrum.base_cosine, spectrum.unmoved_share)
            if said:
                self.unrelated[weight.name] = said
            if len(there) == len(weight.blocks):
                del waiting[weight.name]
                yield weight.name, [there[block.delta.name] for block in weight.blocks]

    def _final(self, spectrum: Spectrum, plan: tuple[Spectrum, Choice] | None) -> Choice:
        """The row's numbers: as planned, or from what was computed with the vectors."""
        if plan is None:
            return choose(self.rule, [spectrum], stored=True)[0]
        values, choice = plan
        if choice.rank <= min(spectrum.rank, spectrum.k):
            return choice
        return choose(Rule(rank=choice.rank), [replace(values, k=min(spectrum.rank, spectrum.k))], stored=True)[0]

    def _row(self, choice: Choice, rounding: float = math.nan) -> Row:
        name = choice.name
        notes = (self.weights[name].note, self.unrelated.get(name), self.edgeless.get(name))
        return Row(**asdict(choice), dtype_error=rounding, note="; ".join(filter(None, notes)))

    def _undone(self, spectrum: Spectrum) -> None:
        self.found.not_carried[spectrum.name] = f"{spectrum.status}: {spectrum.reason}"
        self.found.undone.append(spectrum.name)

    def whole_modules(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of each module that is kept whole, and the biases that are all that others lose."""
        if not self.options.save_modules or not isinstance(self.writer, Peft):
            return
        for left in self.inputs.left:
            yield from self._biases(left, self.writer)
            yield from self._whole(left, self.writer)

    def _biases(self, left: LeftOut, writer: Peft) -> Iterator[dict[str, Tensor]]:
        for module, (name, ref) in left.biases.items():
            tensors = writer.bias(module, ref.read())
            if tensors:
                del self.found.not_carried[name]
                yield tensors

    def _whole(self, left: LeftOut, writer: Peft) -> Iterator[dict[str, Tensor]]:
        adapted = {weight.module.path for weight in self.weights.values()}
        for module, tensors in left.kept.items():
            why = why_not_whole(module, adapted, self.inputs.all_modules)
            for name in left.names[module]:
                if why:
                    self.found.not_carried[name] += f"; not kept whole: {why}"
                else:
                    del self.found.not_carried[name]
            if not why:
                self.found.whole.append(module)
                yield writer.whole(module, {own: ref.read() for own, ref in tensors.items()})

    def why_nothing(self) -> str:
        """What to say where there is no tensor to write."""
        if self.found.rows:
            return f"no matrix keeps a rank, for example {self.found.rows[0].name}: {self.found.rows[0].clamped}"
        name, why = next(iter(self.found.not_carried.items()), ("", "there is no matrix"))
        return f"{name}: {why}" if name else why

    def finished(self) -> Extraction:
        """The result, its rows in the source's order; a matrix that changed and got no rank is listed as left out."""
        place = {name: place for place, name in enumerate(self.weights)}
        self.found.rows.sort(key=lambda row: place[row.name])
        for row in self.found.rows:
            if not row.rank and row.relative_error:
                self.found.not_carried.setdefault(row.name, row.clamped)
        return self.found


def extract(
    source: Given,
    directory: str | Path | None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    parameters: int | None = None,
    above_noise: bool = False,
    format: Format = "peft",
    dtype: DType = "float32",
    weights: Sequence[float] | None = None,
    save_modules: bool = False,
    dry_run: bool = False,
    device: str = "auto",
    executor: Executor | None = None,
    memory_budget: int | str | None = None,
) -> pd.DataFrame:
    r"""Write an update as a LoRA of the base: the truncated SVD ΔW ≈ B·A of every matrix.

    Full fine-tunes, any adapter, several updates at once (their weighted sum, exact), and runs that were stored with
    vectors, of which nothing is computed again. Give the ranks by exactly one of `rank`, `energy`, `parameters` and
    `above_noise`. Factors have the base's own layout: fused projections in one piece, convolutions, embeddings and
    stacked experts as PEFT adapts them.

    Args:
        source: what `open_source` gives, several of those, deltas, or a results directory with vectors.
        directory: the adapter's folder, which must not hold anything; it appears whole or not at all.
        rank: one rank for all matrices.
        energy: the share of Σσ² that each matrix keeps at least.
        parameters: how many entries all factors may have; the sum of squared errors is what is minimised.
        above_noise: keep the values above storage rounding.
        format: "peft", or "kohya" for image tools.
        dtype: what the factors are stored in: float64, float32, bfloat16 or float16.
        weights: what each of several updates is multiplied by; None for 1.
        save_modules: keep modules whole whose vectors changed, such as norms (PEFT's `modules_to_save`), and the
            changed biases of linear layers and convolutions (PEFT's `bias`).
        dry_run: write nothing; `directory` may be None.
        device: as for `decompose`.
        executor: as for `decompose`.
        memory_budget: as for `decompose`.

    Returns:
        Columns name, rank, relative_error = √(Σ_{i>r}σ²/Σσ²), parameters, clamped (why the rank is less than asked
        for), norm = ‖ΔW‖_F, dtype_error (what storing the factors adds) and note, a row per matrix.
        `attrs["not_carried"]` says what no LoRA holds, name → reason.

    Raises:
        SelectionError: none or several rules for the ranks, a budget that is too small, modules of a weighted sum to
            keep whole, or nothing to write.
        StoreError: the directory holds something, or cannot be written to.
        SourceError: a file cannot be read.

    Example:
        >>> import spectra, torch
        >>> delta = spectra.WeightDelta.from_tensor("a.weight", torch.diag(torch.tensor([4.0, 3.0])))
        >>> table = extract([delta], None, rank=1, dry_run=True)
        >>> print(table[["name", "rank", "relative_error", "parameters"]].to_string(index=False))
            name  rank  relative_error  parameters
        a.weight     1             0.6           4

    Reference: Eckart & Young 1936.
    """
    rule, options = Rule(rank, energy, parameters, above_noise), Options(format, dtype, save_modules)
    if directory is None and not dry_run:
        raise SelectionError("directory = None writes nothing: name a folder, or pass dry_run=True")
    if directory is not None and not dry_run:
        check_free(directory)  # before anything is read
    inputs = inputs_of(source, weights, device=device, executor=executor, memory_budget=memory_budget)
    return run(inputs, None if dry_run else directory, rule, options).table()
