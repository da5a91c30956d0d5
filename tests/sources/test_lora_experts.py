"""PEFT's `target_parameters` on experts: against PEFT's merge, in every layout of the base that is found on disk."""

from __future__ import annotations

import json
import pickle

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.checkpoints import write_adapter, write_checkpoint
from support.peft_oracle import make_oracle

import spectra

SMALL = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 6, "moe_intermediate_size": 6, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3, "num_experts": 3,
    "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
MODELS = {
    "mixtral": (transformers.MixtralConfig, transformers.MixtralForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM),
}


def tiny(kind, **options):
    config_class, model_class = MODELS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**SMALL | options)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


def oracle_of(folder, kind, parameters=BOTH, modules=(), **options):
    """An oracle whose expert deltas are apart, (out, in) each: "name[e]" → matrix."""
    config = peft.LoraConfig(
        r=2, lora_alpha=3, target_modules=list(modules), target_parameters=list(parameters), lora_dropout=0.0,
        rank_pattern={"experts.down_proj": 3},
    )  # fmt: skip
    oracle = make_oracle(folder, tiny(kind, **options), config)
    base = load_file(oracle.base / "model.safetensors")
    apart = {}
    for name, delta in oracle.deltas.items():
        if base[name].ndim < 3:
            apart[name] = delta
            continue
        for index, expert in enumerate(delta.reshape(base[name].shape)):
            apart[f"{name}[{index}]"] = expert.T if kind == "gpt_oss" else expert
    return oracle, apart


def check(source, expected):
    got = {delta.name: delta for delta in source}
    assert set(got) == set(expected)
    for name, delta in got.items():
        actual = delta.read().to_dense()
        assert tuple(actual.shape) == delta.shape == tuple(expected[name].shape)
        assert torch.allclose(actual, expected[name], rtol=0, atol=1e-13), name


@pytest.mark.parametrize("kind", MODELS)
def test_equals_pefts_merge_minus_base(kind, tmp_path):
    oracle, expected = oracle_of(tmp_path, kind, modules=["q_proj"])
    source = spectra.open_source(oracle.adapter, oracle.base, split=False)
    check(source, expected)
    base = load_file(oracle.base / "model.safetensors")
    for delta in source:
        assert delta.factored
        assert torch.equal(pickle.loads(pickle.dumps(delta)).read().to_dense(), delta.read().to_dense())
        weight = base[delta.name.partition("[")[0]]
        weight = weight[int(delta.name.rpartition("[")[2][:-1])] if weight.ndim == 3 else weight
        assert delta.read().base_norm == pytest.approx(float(weight.norm()), rel=1e-12)
    assert {delta.max_rank for delta in source} == {2, 3}


@pytest.mark.parametrize(("kind", "step"), [("mixtral", 1), ("gpt_oss", 2)])
def test_gate_and_up_come_apart_as_the_architecture_stacks_them(kind, step, tmp_path):
    oracle, expected = oracle_of(tmp_path, kind)
    halves = {}
    for name, delta in expected.items():
        if "gate_up" not in name:
            halves[name] = delta
        else:
            gate, up = (delta[0::2], delta[1::2]) if step == 2 else delta.chunk(2)
            halves |= {f"{name}[gate]": gate, f"{name}[up]": up}
    check(spectra.open_source(oracle.adapter, oracle.base), halves)


@pytest.mark.parametrize(
    ("kind", "module", "parts"),
    [
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ],
)
def test_a_base_that_keeps_its_experts_apart(kind, module, parts, tmp_path):
    oracle, expected = oracle_of(tmp_path, kind)
    base = load_file(oracle.base / "model.safetensors")
    gate, up, down = parts
    path = f"model.layers.0.{module}.experts"
    apart = {name: tensor for name, tensor in base.items() if ".experts." not in name}
    wanted = {}
    for index in range(3):
        halves = base["model.layers.0.mlp.experts.gate_up_proj"][index].chunk(2)
        last = base["model.layers.0.mlp.experts.down_proj"][index]
        for part, tensor in ((gate, halves[0]), (up, halves[1]), (down, last)):
            apart[f"{path}.{index}.{part}.weight"] = tensor.clone()
        first, second = expected[f"model.layers.0.mlp.experts.gate_up_proj[{index}]"].chunk(2)
        last = expected[f"model.layers.0.mlp.experts.down_proj[{index}]"]
        for part, tensor in ((gate, first), (up, second), (down, last)):
            wanted[f"{path}.{index}.{part}.weight"] = tensor
    save_file(apart, oracle.base / "model.safetensors")
    source = spectra.open_source(oracle.adapter, oracle.base)
    check(source, wanted)
    name = f"{path}.1.{up}.weight"
    assert source[name].read().base_norm == pytest.approx(float(apart[name].norm()))


def test_without_a_base_shapes_tell_the_two_parameters_apart(tmp_path):
    oracle, expected = oracle_of(tmp_path, "mixtral")
    check(spectra.open_source(oracle.adapter), expected)


def test_one_parameter_and_a_router(tmp_path):
    oracle, expected = oracle_of(tmp_path, "mixtral", ["mlp.experts.down_proj", "mlp.gate.weight"])
    assert "model.layers.0.mlp.gate.weight" in expected
    check(spectra.open_source(oracle.adapter, oracle.base), expected)
    check(spectra.open_source(oracle.adapter), expected)


def by_hand(folder, out, inside, *, version, swapped, rank=2, experts=3):
    """One parameter's factors in either layout, and each expert's ΔW by the definition, entry by entry."""
    torch.manual_seed(1)
    a, b = (out, inside) if swapped else (inside, out)
    A, B = torch.randn(rank * experts, a).double(), torch.randn(b, rank * experts).double()
    expected = {}
    for e in range(experts):
        delta = torch.zeros(out, inside).double()
        for i in range(rank):
            row, column = A[e * rank + i], B[:, i * experts + e]
            delta += torch.outer(row, column) if swapped else torch.outer(column, row)
        expected[f"model.layers.0.mlp.experts.down_proj[{e}]"] = 1.5 * delta
    path = "base_model.model.model.layers.0.mlp.experts"
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 3, "target_parameters": ["experts.down_proj"]}
    config |= {"peft_version": version} if version else {}
    write_adapter(folder / "adapter", {f"{path}.lora_A.weight": A, f"{path}.lora_B.weight": B}, config)
    base = {"model.layers.0.mlp.experts.down_proj": torch.randn(experts, out, inside)}
    write_checkpoint(folder / "base", base, config={"model_type": "mixtral"})
    return folder / "adapter", folder / "base", expected


@pytest.mark.parametrize(
    ("version", "swapped", "inside"),
    [
        ("0.18.1", True, 7), ("0.17.0", True, 5), (None, True, 7), (None, True, 5),
        ("0.19.0", False, 7), ("0.20.1.dev0@abcdef", False, 5), ("0.18.2.dev0", True, 7), ("0.18.2.dev0", False, 7),
    ],
)  # fmt: skip
def test_both_layouts_by_shape_and_square_ones_by_version(version, swapped, inside, tmp_path):
    adapter, base, expected = by_hand(tmp_path, 5, inside, version=version, swapped=swapped)
    check(spectra.open_source(adapter, base), expected)


def test_the_oldest_peft_had_the_same_two_layouts(tmp_path):
    """Einsum of PEFT 0.18, `o r e, e r i -> e i o`, on its own reshapes, for a stack stored (E, out, in)."""
    adapter, base, expected = by_hand(tmp_path, 5, 7, version="0.18.0", swapped=True)
    A, B = load_file(adapter / "adapter_model.safetensors").values()
    A, B = (A, B) if A.shape[0] == 6 else (B, A)
    stored = 1.5 * torch.einsum("ore,eri->eio", B.reshape(7, 2, 3), A.reshape(3, 2, 5))
    assert torch.allclose(stored, torch.stack(list(expected.values())))
    check(spectra.open_source(adapter, base), expected)


def refused(source, *words):
    (delta,) = source
    assert delta.status == "unsupported"
    for word in words:
        assert word in delta.reason
    assert delta.name in source.coverage.unsupported


def test_a_square_expert_between_the_two_layouts_is_refused(tmp_path):
    adapter, base, _ = by_hand(tmp_path, 5, 5, version="0.18.2.dev0", swapped=True)
    refused(spectra.open_source(adapter, base), "between two layouts")


def test_an_old_adapter_without_a_base_is_refused(tmp_path):
    adapter, _, _ = by_hand(tmp_path, 5, 7, version="0.18.1", swapped=True)
    refused(spectra.open_source(adapter), "0.18.1", "pass base= (--base)")


def test_an_unknown_stack_of_the_base_is_refused(tmp_path):
    adapter, base, _ = by_hand(tmp_path, 5, 7, version="0.19.0", swapped=False)
    (base / "config.json").write_text(json.dumps({"model_type": "unheard_of"}))
    refused(spectra.open_source(adapter, base), "of which the base has []")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda A, B: (A[:4], B[:, :4]), "the config says r = 2"),
        (lambda A, B: (A, B[:, :4]), "cannot be multiplied"),
        (lambda A, B: (A[:, :3], B), "fit the parameters"),
        (lambda A, B: (A.to(torch.int8), B), "stored as I8"),
        (lambda A, B: (A[:0], B[:, :0]), "are empty"),
        (lambda A, B: (A, None), "lora_B is missing"),
    ],
)
def test_factors_that_do_not_fit_are_refused(change, word, tmp_path):
    adapter, base, _ = by_hand(tmp_path, 5, 7, version="0.19.0", swapped=False, experts=4)
    path = "base_model.model.model.layers.0.mlp.experts"
    stored = load_file(adapter / "adapter_model.safetensors")
    A, B = change(stored[f"{path}.lora_A.weight"], stored[f"{path}.lora_B.weight"])
    tensors = {f"{path}.lora_A.weight": A} | ({f"{path}.lora_B.weight": B} if B is not None else {})
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    refused(spectra.open_source(adapter, base), word)
