"""LoRA for Flux as XLabs-AI trains it, inside attention processors: `double_blocks.0.processor.qkv_lora1.down.weight`.

ΔW = up·down; no α was ever applied, as neither the trainer nor the loader passes one. Of a double block `…1` adapts
the image's attention, `…2` the text's; of a single block `qkv_lora` adapts the first rows of linear1, those of q, k and
v, and `proj_lora` all of linear2. Settled by XLabs-AI/x-flux: `DoubleStreamBlockLoraProcessor` and
`SingleStreamBlockLoraProcessor` in src/flux/modules/layers.py, train_flux_lora_deepspeed.py, xflux_pipeline.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from spectra.deltas.recipes import Term
from spectra.models.architectures import stacked
from spectra.sources.adapter import Refusal, Slots, add_factored
from spectra.sources.formats import components
from spectra.sources.ledger import Ledger
from spectra.sources.parts import Part, add_parts
from spectra.sources.targets import Target, weight_targets

_MODULE = re.compile(
    r"(?P<before>.*?)(?P<kind>double|single)_blocks\.(?P<n>\d+)\.processor\.(?P<own>(?:qkv|proj)_lora[12]?)"
)
# In the names of Flux' authors, and in those of diffusers, which keeps q, k and v apart.
_FLUX = {
    ("double", "qkv_lora1"): "double_blocks.{}.img_attn.qkv",
    ("double", "proj_lora1"): "double_blocks.{}.img_attn.proj",
    ("double", "qkv_lora2"): "double_blocks.{}.txt_attn.qkv",
    ("double", "proj_lora2"): "double_blocks.{}.txt_attn.proj",
    ("single", "qkv_lora"): "single_blocks.{}.linear1",
    ("single", "proj_lora"): "single_blocks.{}.linear2",
}
_TO_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_DIFFUSERS = {
    ("double", "qkv_lora1"): tuple(f"transformer_blocks.{{}}.{part}" for part in _TO_QKV),
    ("double", "proj_lora1"): ("transformer_blocks.{}.attn.to_out.0",),
    ("double", "qkv_lora2"): tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
    ("double", "proj_lora2"): ("transformer_blocks.{}.attn.to_add_out",),
    ("single", "qkv_lora"): tuple(f"single_transformer_blocks.{{}}.{part}" for part in _TO_QKV),
    ("single", "proj_lora"): ("single_transformer_blocks.{}.proj_out",),
}


@dataclass(frozen=True)
class _Item:
    """One product, for a weight or for the first rows of one."""

    term: Term
    first_rows: bool = False


def read(ledger: Ledger) -> None:
    """Enter every processor's products under the base's names."""
    apart = ledger.base is not None and any(".attn.add_q_proj." in name for name in ledger.base.tensors)
    items: dict[str, _Item] = {}
    for module, slots in ledger.modules(r"(?P<slot>down|up)\.weight").items():
        match = _MODULE.fullmatch(module)
        with ledger.attempt(f"{module}.weight"):
            term = _term(module, slots)
            key = (match["kind"], match["own"]) if match else ("", "")
            if match is None or key not in _FLUX:
                raise Refusal(f"{module} is no processor of Flux that is known")
            items |= _placed(match["before"], key, match["n"], term, apart)
    shapes = {name: item.term.shape for name, item in items.items()}
    names = components.names_in_base(ledger, shapes)
    whole = {names[name]: None if items[name].first_rows else shape for name, shape in shapes.items()}
    own = {there: name for name, there in names.items()}
    for there, target in weight_targets(ledger, whole).items():
        item = items[own[there]]
        with ledger.attempt(target.name, item.term.shape):
            if item.first_rows:
                _add_first_rows(ledger, target, item.term)
            else:
                add_factored(ledger, target, [item.term])


def _term(module: str, slots: Slots) -> Term:
    down, up = slots.real("down", "up")
    if len(down.shape) != 2 or len(up.shape) != 2 or up.shape[1] != down.shape[0]:
        raise Refusal(f"down {list(down.shape)} and up {list(up.shape)} of {module} cannot be multiplied")
    return Term((up,), down)


def _placed(before: str, key: tuple[str, str], number: str, term: Term, apart: bool) -> dict[str, _Item]:
    """Weight's name → product, in thirds for a base that keeps q, k and v apart."""
    if not apart:
        return {f"{before}{_FLUX[key].format(number)}.weight": _Item(term, key == ("single", "qkv_lora"))}
    names = [f"{before}{name.format(number)}.weight" for name in _DIFFUSERS[key]]
    rows, left = term.shape[0], term.lefts[0]
    if rows % len(names):
        raise Refusal(f"the {rows} rows of up are not those of q, k and v")
    cuts = stacked({name: rows // len(names) for name in names})
    return {name: _Item(Term((cut(left),), term.right)) for name, cut in cuts.items()}


def _add_first_rows(ledger: Ledger, target: Target, term: Term) -> None:
    """Enter the update of q, k and v in linear1, which holds the MLP's rows after them."""
    if target.ref is None:
        add_parts(ledger, target, {"qkv": Part(term, None)}, None)
        return
    rows, there = term.shape[0], target.ref.shape
    if len(there) != 2 or there[0] < rows:
        raise Refusal(
            f"the update of its first rows is {list(term.shape)}, the base weight {list(there)}", "shape_mismatch"
        )
    add_parts(ledger, target, {"qkv": Part(term, stacked({"qkv": rows})["qkv"])}, there[0])
