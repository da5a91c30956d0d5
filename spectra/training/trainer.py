"""`WatchSpectra`: a `Watch` as a callback of transformers' Trainer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from spectra.errors import MissingExtraError, SpectraError
from spectra.training.watch import Watch, check_options

try:
    from transformers import TrainerCallback
except ImportError:
    raise MissingExtraError("WatchSpectra", "training") from None


class WatchSpectra(TrainerCallback):  # type: ignore[misc]
    """Watches the spectra of a training run in transformers' Trainer, and in what is built on it.

    `WatchSpectra(every=50).attach(trainer)` logs through the trainer, so that its progress, TensorBoard, W&B and
    whatever else is reported to show the numbers. Given in `callbacks=[…]` alone, a callback does not get to know the
    trainer: the numbers go into `log_history`, `trainer_state.json` and `out`, and no further.

    A measurement comes after a step of the optimizer, not after each of its accumulated gradients, in the first process
    only. A fault while training goes on is a warning, after which nothing more is measured: it stops no training.

    Args:
        every: see `Watch`, as for the other arguments.
        matrices: () for every adapted weight; needed where there is no adapter.
        top: how many singular vectors are kept and compared.
        out: where to keep everything; None for the folder `spectra` in the trainer's `output_dir`.
        max_share: the most of the run's time that measuring may take; 1 for no bound.
        values: all singular values, or the top ones alone.
        heads: which ΔW of routed heads.

    Raises:
        AdapterError: `every`, `top` or `max_share` is out of its range.
    """

    def __init__(
        self,
        *,
        every: int = 100,
        matrices: str | Sequence[str] = (),
        top: int = 10,
        out: str | Path | None = None,
        max_share: float = 0.05,
        values: bool = True,
        heads: str | int | None = None,
    ) -> None:
        check_options(every=every, top=top, max_share=max_share)
        self.options: dict[str, Any] = {
            "every": every, "matrices": matrices, "top": top, "max_share": max_share, "values": values, "heads": heads,
        }  # fmt: skip
        self.out = out
        self.trainer: Any = None
        self.watch: Watch | None = None

    def attach(self, trainer: Any) -> WatchSpectra:
        """Become a callback of the trainer, and log through it."""
        self.trainer = trainer
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Look at the start."""
        del control, kwargs
        if not state.is_world_process_zero:
            return
        out = Path(args.output_dir, "spectra") if self.out is None else self.out
        self.watch = Watch(model, out=out, step=state.global_step, **self.options)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure if it is due."""
        del args, kwargs
        if self.watch is not None:
            self._log(state, control, self._measured(self.watch, state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the end, and write the table."""
        del args, kwargs
        if self.watch is not None:
            self._log(state, control, self._measured(self.watch, state.global_step, close=True))
            self.watch = None

    def _measured(self, watch: Watch, step: int, *, close: bool = False) -> dict[str, float]:
        try:
            return watch.close(step) if close else watch(step)
        except SpectraError as problem:
            warnings.warn(f"the spectra are no longer watched from step {step} on: {problem}", stacklevel=2)
            self.watch = None
            return {}

    def _log(self, state: Any, control: Any, numbers: dict[str, float]) -> None:
        if not numbers:
            return
        if self.trainer is None:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})
            return
        asked = control.should_log  # which a log of the trainer takes as done, with the loss of this step unsaid
        self.trainer.log(dict(numbers))
        control.should_log = asked
