"""Flat files of the image-generation trainers, against formulas written out entry by entry."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file
from support.pipeline import FLAT, IN, OUT, PATH, K, R, close, file, lora, only, pipeline, product, randn

import spectra
from spectra.errors import BaseRequiredError, SourceError, UnsupportedFormatError


def test_a_linear_layer_with_its_alpha(tmp_path):
    base, weights = pipeline(tmp_path / "base")
    tensors = lora()
    source = spectra.open_source(file(tmp_path, tensors), base)
    assert source.kind == "kohya"
    delta = only(source, f"unet.{PATH}.weight")
    assert delta.factored
    assert delta.max_rank == R
    close(delta, product(tensors))
    assert delta.read().base_norm == pytest.approx(float(weights[delta.name].norm()))


def test_listing_reads_no_tensor(tmp_path, monkeypatch):
    path = file(tmp_path, lora() | lora(FLAT + "_conv", kernel=(K, K)))
    monkeypatch.setattr("spectra.files.tensors.TensorRef.read", lambda *_: pytest.fail("a tensor was read"))
    assert len(spectra.open_source(path)) == 2


def test_without_a_base_names_are_flat_and_a_warning_says_so(tmp_path):
    tensors = lora()
    source = spectra.open_source(file(tmp_path, tensors))
    close(only(source, f"{FLAT}.weight"), product(tensors))
    assert any("underscores for dots: pass base= (--base)" in warning for warning in source.coverage.warnings)


def test_a_convolution_is_out_by_inputs_and_kernel(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    flat = "lora_unet_mid_block_conv"
    tensors = lora(flat, kernel=(K, K))
    close(
        only(spectra.open_source(file(tmp_path, tensors), base), "unet.mid_block.conv.weight"), product(tensors, flat)
    )


def test_a_cp_decomposed_convolution(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    flat = "lora_unet_mid_block_conv"
    up, mid, down = randn(OUT, R, 1, 1), randn(R, R, K, K), randn(R, IN, 1, 1)
    tensors = {f"{flat}.lora_{n}.weight": t for n, t in (("up", up), ("mid", mid), ("down", down))}
    tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    expected = torch.zeros(OUT, IN, K, K, dtype=torch.float64)
    for o, i, p, q in itertools.product(range(OUT), range(IN), range(R), range(R)):
        expected[o, i] += 1.5 * up[o, p, 0, 0] * mid[p, q] * down[q, i, 0, 0]
    delta = only(spectra.open_source(file(tmp_path, tensors), base))
    assert delta.factored
    assert delta.max_rank == R
    close(delta, expected.flatten(1))


@pytest.mark.parametrize(
    ("flat", "name", "size"),
    [
        ("lora_te_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", 8),
        ("lora_te1_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder", 8),
        ("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", "text_encoder_2", 4),
    ],
)
def test_text_encoders(flat, name, size, tmp_path):
    base, _ = pipeline(tmp_path / "base")
    tensors = lora(flat, size, size)
    delta = only(spectra.open_source(file(tmp_path, tensors), base))
    assert delta.name == f"{name}.text_model.encoder.layers.0.self_attn.q_proj.weight"
    assert delta.role == "q_proj"
    close(delta, product(tensors, flat))


def test_a_single_component_as_base(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    tensors = lora()
    source = spectra.open_source(file(tmp_path, tensors | lora("lora_te_text_model_x", 8, 8)), base / "unet")
    close(source[f"{PATH}.weight"], product(tensors))
    assert [delta.status for delta in source] == ["unsupported", "ok"]  # it is asked for, and cannot be done
    assert source.coverage.tuned_only == {"lora_te_text_model_x.weight": "not in the base"}


@pytest.mark.parametrize(
    ("shapes", "status"), [(((OUT, IN), (IN, OUT)), "ok"), (((OUT, IN), (OUT, IN)), "unsupported")]
)
def test_an_ambiguous_flat_name_is_settled_by_the_shape_or_refused(shapes, status, tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    save_file(
        {n: torch.randn(s) for n, s in zip(("a.b_c.weight", "a_b.c.weight"), shapes, strict=True)},
        base / "model.safetensors",
    )
    (delta,) = spectra.open_source(file(tmp_path, lora("lora_unet_a_b_c")), base)
    assert delta.status == status
    if status == "ok":
        assert delta.name == "a.b_c.weight"
    else:
        assert "a.b_c.weight or a_b.c.weight" in delta.reason


def test_the_adapter_of_another_model_is_refused(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    with pytest.raises(SourceError, match=r"is base= \(--base\) the model that was tuned"):
        spectra.open_source(file(tmp_path, lora("lora_unet_input_blocks_1")), base)


SCALES = {
    "given": ({}, 0.25, 0.25, f"s = 0.25 as given for {FLAT}"),
    "in the header": ({"ss_network_alpha": "5.0", "ss_network_dim": "2"}, None, 2.5, ""),
    "in the header, given too": ({"ss_network_alpha": "5.0"}, 9.0, 2.5, "scale was ignored"),
}


@pytest.mark.parametrize("case", SCALES)
def test_the_scale_of_a_file_without_alpha_tensors(case, tmp_path):
    metadata, given, s, warning = SCALES[case]
    tensors = lora(alpha=None)
    source = spectra.open_source(file(tmp_path, tensors, metadata), scale=given)
    close(only(source), product(tensors, s=s))
    assert warning in " ".join(source.coverage.warnings)
    assert len(source.coverage.warnings) == (2 if warning else 1)  # the other one is about flat names


def test_convolutions_may_have_an_alpha_of_their_own_in_the_header(tmp_path):
    flat = "lora_unet_mid_block_conv"
    tensors = lora(alpha=None) | lora(flat, kernel=(K, K), alpha=None)
    metadata = {"ss_network_alpha": "4", "ss_network_args": json.dumps({"conv_dim": "2", "conv_alpha": "1"})}
    source = spectra.open_source(file(tmp_path, tensors, metadata))
    close(source[f"{FLAT}.weight"], product(tensors, s=2.0))
    close(source[f"{flat}.weight"], product(tensors, flat, s=0.5))


@pytest.mark.parametrize("alpha", ["nan", "inf", "many"])
def test_an_alpha_in_the_header_that_is_no_number(alpha, tmp_path):
    with pytest.raises(SourceError, match="α of the header is"):
        spectra.open_source(file(tmp_path, lora(alpha=None), {"ss_network_alpha": alpha}))


def test_a_stored_alpha_that_is_no_number_costs_its_matrix_only(tmp_path):
    bad = "lora_unet_bad"
    found = {
        s.name: s
        for s in spectra.decompose(spectra.open_source(file(tmp_path, lora() | lora(bad, alpha=float("nan")))))
    }
    assert found[f"{bad}.weight"].status == "unreadable"
    assert "not a finite number" in found[f"{bad}.weight"].reason
    assert found[f"{FLAT}.weight"].status == "ok"


def hada(kernel=()):
    columns = IN * K ** len(kernel)
    return {"w1_a": randn(OUT, R), "w1_b": randn(R, columns), "w2_a": randn(OUT, R), "w2_b": randn(R, columns)}


@pytest.mark.parametrize("kernel", [(), (K, K)])
def test_loha(kernel, tmp_path):
    base, _ = pipeline(tmp_path / "base")
    flat = "lora_unet_mid_block_conv" if kernel else FLAT
    f = hada(kernel)
    tensors = {f"{flat}.hada_{name}": tensor for name, tensor in f.items()} | {f"{flat}.alpha": torch.tensor(3.0)}
    source = spectra.open_source(file(tmp_path, tensors), base)
    close(only(source), 1.5 * (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"]))


def test_loha_with_cores(tmp_path):
    flat, f = "lora_unet_mid_block_conv", {}
    for i in "12":
        f |= {f"w{i}_a": randn(R, OUT), f"w{i}_b": randn(R, IN), f"t{i}": randn(R, R, K, K)}
    sides = []
    for i in "12":
        side = torch.zeros(OUT, IN, K, K, dtype=torch.float64)
        for o, j, p, q in itertools.product(range(OUT), range(IN), range(R), range(R)):
            side[o, j] += f[f"t{i}"][p, q] * f[f"w{i}_a"][p, o] * f[f"w{i}_b"][q, j]
        sides.append(side.flatten(1))
    tensors = {f"{flat}.hada_{name}": tensor for name, tensor in f.items()} | {f"{flat}.alpha": torch.tensor(4.0)}
    close(only(spectra.open_source(file(tmp_path, tensors))), 2.0 * sides[0] * sides[1])


def kron(first, second):
    """(f ⊗ s)[(l, k), (m, n, …)] = f[l, m] · s[k, n, …]."""
    out = torch.zeros(first.shape[0], second.shape[0], first.shape[1], *second.shape[1:], dtype=torch.float64)
    for left, m in itertools.product(range(first.shape[0]), range(first.shape[1])):
        out[left, :, m] = first[left, m] * second
    return out.reshape(first.shape[0] * second.shape[0], -1)


LOKR = {
    "both whole: α means nothing": ({"w1": (2, 1), "w2": (3, 5)}, 1.0),
    "second in factors": ({"w1": (2, 1), "w2_a": (3, R), "w2_b": (R, 5)}, 1.5),
    "both in factors": ({"w1_a": (2, R), "w1_b": (R, 1), "w2_a": (3, R), "w2_b": (R, 5)}, 1.5),
    "whole kernel": ({"w1": (2, 1), "w2": (3, 5, K, K)}, 1.0),
    "kernel in factors": ({"w1": (2, 1), "w2_a": (3, R), "w2_b": (R, 5 * K * K)}, 1.5),
}


@pytest.mark.parametrize("case", LOKR)
def test_lokr(case, tmp_path):
    base, _ = pipeline(tmp_path / "base")
    shapes, s = LOKR[case]
    f = {name: randn(*shape) for name, shape in shapes.items()}
    flat = "lora_unet_mid_block_conv" if "kernel" in case else FLAT
    tensors = {f"{flat}.lokr_{name}": tensor for name, tensor in f.items()} | {f"{flat}.alpha": torch.tensor(3.0)}
    first, second = (f.get(f"w{i}", f[f"w{i}_a"] @ f[f"w{i}_b"] if f"w{i}_a" in f else None) for i in "12")
    close(only(spectra.open_source(file(tmp_path, tensors), base)), s * kron(first, second))


def test_lokr_with_a_core(tmp_path):
    flat = "lora_unet_mid_block_conv"
    w1, a, b, t = randn(2, 1), randn(R, 3), randn(R, 5), randn(R, R, K, K)
    second = torch.einsum("pqkl,po,qi->oikl", t, a, b)
    tensors = {f"{flat}.lokr_w1": w1, f"{flat}.lokr_w2_a": a, f"{flat}.lokr_w2_b": b, f"{flat}.lokr_t2": t}
    tensors[f"{flat}.alpha"] = torch.tensor(3.0)
    close(only(spectra.open_source(file(tmp_path, tensors))), 1.5 * kron(w1, second))


def test_a_full_difference_and_vectors(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    flat, diff = "lora_unet_mid_block_conv", randn(OUT, IN, K, K)
    tensors = {f"{flat}.diff": diff, f"{flat}.diff_b": randn(OUT), "lora_unet_norm.w_norm": randn(4)}
    source = spectra.open_source(file(tmp_path, tensors), base)
    close(only(source, "unet.mid_block.conv.weight"), diff.flatten(1))
    assert set(source.coverage.skipped) == {f"{flat}.diff_b", "lora_unet_norm.w_norm"}


DORA = {"per output": ((OUT, 1), (OUT, 1, 1, 1)), "per input": ((1, IN), (1, IN, 1, 1))}


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("case", DORA)
def test_dora_scale(case, conv, tmp_path):
    base, weights = pipeline(tmp_path / "base")
    flat, name = ("lora_unet_mid_block_conv", "unet.mid_block.conv.weight") if conv else (FLAT, f"unet.{PATH}.weight")
    tensors = lora(flat, kernel=(K, K) if conv else ())
    magnitude = torch.rand(DORA[case][conv], dtype=torch.float64)
    tensors[f"{flat}.dora_scale"] = magnitude
    weight = weights[name]
    merged = weight + product(tensors, flat).reshape(weight.shape)
    dims = [axis for axis in range(weight.ndim) if axis != (0 if case == "per output" else 1)]
    norm = merged.square().sum(dim=dims, keepdim=True).sqrt()
    path = file(tmp_path, tensors)
    delta = only(spectra.open_source(path, base), name)
    close(delta, (magnitude / norm * merged - weight).flatten(1))
    with pytest.raises(BaseRequiredError, match="DoRA"):
        spectra.open_source(path)


def test_dora_scale_on_loha(tmp_path):
    base, weights = pipeline(tmp_path / "base")
    f = hada()
    tensors = {f"{FLAT}.hada_{name}": tensor for name, tensor in f.items()} | {f"{FLAT}.alpha": torch.tensor(2.0)}
    tensors[f"{FLAT}.dora_scale"] = torch.rand(OUT, 1, dtype=torch.float64)
    weight = weights[f"unet.{PATH}.weight"]
    merged = weight + (f["w1_a"] @ f["w1_b"]) * (f["w2_a"] @ f["w2_b"])
    expected = tensors[f"{FLAT}.dora_scale"] * merged / merged.norm(dim=1, keepdim=True) - weight
    close(only(spectra.open_source(file(tmp_path, tensors), base)), expected)


def change(**changes):
    tensors = lora()
    for slot, tensor in changes.items():
        name = f"{FLAT}.{slot.replace('__', '.')}"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    return tensors


@pytest.mark.parametrize(
    ("tensors", "word"),
    [
        (change(lora_up__weight=None), "lora_up is missing"),
        (change(lora_down__weight=None), "lora_down is missing"),
        (change(lora_up__weight=randn(OUT, 3)), "cannot be multiplied"),
        (change(lora_up__weight=torch.ones(OUT, R, dtype=torch.int8)), "stored as I8"),
        (change(alpha=torch.ones(2)), "not one real number"),
        (change(alpha=torch.tensor(True)), "not one real number"),
        (change(lora_mid__weight=randn(R, R, K, K), lora_down__weight=randn(R, IN, K, K)), "do not fit lora_mid"),
        (change(hada_w1_a=randn(2, 2)), "no module that is known"),
        (change(lora_up__weight=None, lora_down__weight=None), "without the factors"),
        (change(dora_scale=torch.rand(OUT - 1, 1)), "is neither"),
        (change(dora_scale=torch.ones(OUT, 1, dtype=torch.int32)), "stored as I32"),
        ({f"{FLAT}.oft_blocks": randn(2, 3, 3), f"{FLAT}.alpha": torch.tensor(1.0)}, "OFT"),
        ({f"{FLAT}.lokr_w1": randn(2, 1), f"{FLAT}.lokr_w2_a": randn(3, 2)}, "neither whole nor two factors"),
        ({f"{FLAT}.hada_w1_a": randn(OUT, R)}, "is missing"),
    ],
)
def test_a_module_that_cannot_be_read_is_refused_and_the_others_are_done(tensors, word, tmp_path):
    base, _ = pipeline(tmp_path / "base")
    good = "lora_unet_down_blocks_0_attentions_0_to_out_0"
    source = spectra.open_source(file(tmp_path, tensors | lora(good, IN, OUT)), base)
    assert source["unet.down_blocks.0.attentions.0.to_out.0.weight"].status == "ok"
    (bad,) = (delta for delta in source if delta.status != "ok")
    assert bad.name == f"unet.{PATH}.weight"
    assert bad.status == "unsupported"
    assert word in bad.reason


def test_two_flat_names_of_one_weight_leave_it_without_a_number(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    ends = "text_model_encoder_layers_0_self_attn_q_proj"
    both = lora(f"lora_te_{ends}", 8, 8) | lora(f"lora_te1_{ends}", 8, 8)
    gone, delta = spectra.open_source(file(tmp_path, both | lora("lora_unet_gone")), base)
    assert (gone.name, gone.reason) == ("lora_unet_gone.weight", "not in the base")
    assert delta.status == "unsupported"
    assert f"lora_te1_{ends} and lora_te_{ends} all stand for" in delta.reason  # in the order of the file


@pytest.mark.parametrize("ending", [".lora_xs", ".lora_down_extra.weight", ".lora_up.bias", "_gate.weight"])
def test_a_tensor_of_a_module_that_no_rule_knows_costs_it_its_number(ending, tmp_path):
    (delta,) = spectra.open_source(file(tmp_path, lora() | {f"{FLAT}{ending}": randn(R, R)}))
    assert delta.status == "unsupported"
    assert ending.strip("._").removesuffix(".weight") in delta.reason


def test_an_alpha_beside_a_full_difference_means_nothing(tmp_path):
    diff = randn(OUT, IN)
    source = spectra.open_source(file(tmp_path, {f"{FLAT}.diff": diff, f"{FLAT}.alpha": torch.tensor(3.0)}))
    close(only(source), diff)


def test_factors_of_another_shape_than_the_weight(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    (delta,) = spectra.open_source(file(tmp_path, lora(inside=IN + 1)), base)
    assert delta.status == "shape_mismatch"


def test_factors_under_other_names_are_no_checkpoint(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    path = file(tmp_path, {"model.layers.0.hada_w1_a": randn(3, 2), "model.layers.0.hada_w1_b": randn(2, 3)})
    with pytest.raises(UnsupportedFormatError, match="adapter of an unknown format"):
        spectra.open_source(path, base)
