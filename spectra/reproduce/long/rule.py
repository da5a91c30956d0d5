"""The decision, as it was written down before the first run was started: see `docs/long-training.md`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spectra.reproduce.long.plan import LORA, MULTILORA, SECOND

if TYPE_CHECKING:
    import pandas as pd

DRIFT = 1.0  # ‖A − A₀‖/‖A₀‖ from which A has left its start
LOSSES = 0.1  # nats per token within which losses are equal
TRANSIENT = 1.25  # times LoRA's rank_90, at most
GENUINE = 2.0  # times LoRA's rank_90, at least

Word = Literal["transient", "genuine", "between", "not to be judged"]


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one MultiLoRA run at one step.

    Attributes:
        run: which.
        step: when.
        word: "transient", "genuine", "between", or "not to be judged" where the rule cannot be applied.
        reason: the numbers that decide, in a sentence.
    """

    run: str
    step: int
    word: Word
    reason: str

    def __str__(self) -> str:
        return f"{self.run}, step {self.step}: {self.word}. {self.reason}"


def judge(summary: pd.DataFrame, run: str, step: int) -> Verdict:
    """Is the run's flat spectrum a leftover of its random start, or what training makes?

    The rule: A has left its start (drift ≥ 1), and the held-out loss is within .1 of LoRA's. Then rank_90 within
    1.25 times LoRA's is "transient"; twice LoRA's or more, with ΔW − start as flat (its rank_90 is twice LoRA's or
    more, too), is "genuine"; anything else lies between. LoRA's numbers are means over its runs that are there.

    Args:
        summary: a row per run and step with `run`, `step`, `loss`, `drift_A`, `rank_90`, `learned_rank_90`, means
            over the matrices.
        run: of MultiLoRA.
        step: at which to look.
    """
    rows = summary[summary["step"] == step].set_index("run")
    loras = [name for name in (LORA, LORA + SECOND) if name in rows.index]
    if run not in rows.index or not loras:
        missing = run if run not in rows.index else LORA
        return Verdict(run, step, "not to be judged", f"{missing} has not come to this step.")
    own, lora = rows.loc[run], rows.loc[loras].mean(numeric_only=True)
    apart = abs(own["loss"] - lora["loss"])
    where = f"Drift {own['drift_A']:.3f}, losses {own['loss']:.3f} and {lora['loss']:.3f} (LoRA)"
    if own["drift_A"] < DRIFT or apart > LOSSES:
        why = "A has not left its start" if own["drift_A"] < DRIFT else "the losses are not equal"
        return Verdict(run, step, "not to be judged", f"{where}: {why}.")
    ratio, learned = own["rank_90"] / lora["rank_90"], own["learned_rank_90"] / lora["rank_90"]
    word: Word = "between"
    if ratio <= TRANSIENT:
        word = "transient"
    elif ratio >= GENUINE and learned >= GENUINE:
        word = "genuine"
    return Verdict(
        run, step, word,
        f"{where}; rank_90 {own['rank_90']:.1f} against {lora['rank_90']:.1f}, {ratio:.2f} times; "
        f"of ΔW − start {own['learned_rank_90']:.1f}, {learned:.2f} times.",
    )  # fmt: skip


def overall(verdicts: list[Verdict], last: int) -> Word:
    """One word for the repetitions of MultiLoRA at the common rate: theirs if they agree, else "between".

    Args:
        verdicts: of any runs at any step.
        last: the step that decides; what was judged before it says how things stood, and counts for nothing here.
    """
    names = (MULTILORA, MULTILORA + SECOND)
    words = {verdict.word for verdict in verdicts if verdict.run in names and verdict.step == last}
    judged = words - {"not to be judged"}
    if not judged:
        return "not to be judged"
    return judged.pop() if len(judged) == 1 else "between"
