"""Where α comes from in files without a config of PEFT's: every place that a trainer writes it to, or nowhere."""

from __future__ import annotations

import json

import pytest
import torch
from support.pipeline import FLAT, IN, OUT, PATH, K, R, close, file, lora, only, pipeline, product, randn

import spectra
from spectra.errors import SourceError

DOTTED = f"unet.{PATH}"
BLOCK = "transformer_blocks.0.attn.to_q"


def dotted(path=DOTTED, words=("lora_A.weight", "lora_B.weight"), alpha=None):
    tensors = dict(zip((f"{path}.{word}" for word in words), lora(alpha=None).values(), strict=True))
    return tensors | ({} if alpha is None else {f"{path}.alpha": alpha})


def header(component="", **options):
    config = {"r": R, "lora_alpha": 3, **options}
    return {"lora_adapter_metadata": json.dumps({f"{component}{key}": value for key, value in config.items()})}


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.float64, torch.float16, torch.bfloat16],
)
def test_alpha_is_a_number_of_any_type(dtype, shape, tmp_path):
    alpha = torch.full(shape, 3).to(dtype)
    for tensors, name in ((lora() | {f"{FLAT}.alpha": alpha}, FLAT), (dotted(alpha=alpha), DOTTED)):
        close(only(spectra.open_source(file(tmp_path, tensors)), f"{name}.weight"), product(lora()))


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.tensor(True), torch.empty(0)])
def test_an_alpha_that_is_no_number_is_refused(alpha, tmp_path):
    (delta,) = spectra.open_source(file(tmp_path, dotted(alpha=alpha)))
    assert "not one real number" in delta.reason


@pytest.mark.parametrize(
    ("tensors", "notes"),
    [
        (dotted(), header("unet.")),
        (dotted(), header()),  # model.save_lora_adapter names no component, and there is one only
        (dotted(BLOCK), header()),
        (dotted(BLOCK, ("lora_down.weight", "lora_up.weight")), header()),
        (dotted(), {"lora_adapter_metadata": json.dumps({"unet": {"r": R, "lora_alpha": 3}})}),
        (dotted(), {"ss_network_alpha": "3", "ss_network_dim": str(R)}),
        (lora(alpha=None), header()),
        (lora(alpha=None), {"ss_network_alpha": "3.0", "ss_network_args": "{}"}),
    ],
)
def test_alpha_in_the_header(tensors, notes, tmp_path):
    source = spectra.open_source(file(tmp_path, tensors, notes))
    close(only(source), product(lora()))
    ignored = spectra.open_source(file(tmp_path, tensors, notes), scale=9.0)
    close(only(ignored), product(lora()))
    assert any("scale was ignored for" in warning for warning in ignored.coverage.warnings)


@pytest.mark.parametrize(
    "config",
    [
        {"r": R, "lora_alpha": 3},
        {"peft_type": "LORA", "r": 9, "lora_alpha": 3, "rank_pattern": {"to_q": R}},
        {"network": {"rank": R, "alpha": 3}},
        {"unet": {"r": R, "lora_alpha": 3}, "text_encoder": {"r": R, "lora_alpha": 7}},
        {"network_alpha": 3},
    ],
)
@pytest.mark.parametrize("name", ["adapter_config.json", "config.json"])
def test_alpha_in_a_config_beside_the_file(config, name, tmp_path):
    (tmp_path / name).write_text(json.dumps(config))
    words = ("lora_down.weight", "lora_up.weight")
    close(only(spectra.open_source(file(tmp_path, dotted(words=words)))), product(lora()))


@pytest.mark.parametrize(
    ("notes", "said"),
    [
        ({"ss_network_alpha": "None"}, "no α is stored"),
        ({"ss_network_dim": "2"}, "no α is stored"),
        ({"ss_network_alpha": "Dynamic", "ss_network_dim": "Dynamic"}, "no α is stored"),
        ({"lora_adapter_metadata": json.dumps({"unet.r": R})}, "no α is stored"),
        (header("transformer."), "the config in the header is for transformer, not for unet"),
    ],
)
def test_an_alpha_that_is_nowhere_is_asked_for_and_never_assumed(notes, said, tmp_path):
    path = file(tmp_path, dotted() | dotted("unet.other"), notes)
    with pytest.raises(SourceError, match=r"2 modules, such as .*pass scale= \(--scale\)") as caught:
        spectra.open_source(path)
    assert said in str(caught.value)
    source = spectra.open_source(path, scale=0.5)
    close(source[f"{DOTTED}.weight"], product(lora(), s=0.5))
    assert any("s = 0.5 as given for 2 modules" in warning for warning in source.coverage.warnings)


def test_a_path_without_a_component_and_a_flat_name_need_their_alpha(tmp_path):
    gpt = dotted("transformer.h.0.attn.c_attn", ("lora_down.weight", "lora_up.weight"))
    for place, tensors in enumerate((dotted(BLOCK), lora(alpha=None), gpt)):
        (tmp_path / str(place)).mkdir()
        with pytest.raises(SourceError, match=r"pass scale= \(--scale\)"):
            spectra.open_source(file(tmp_path / str(place), tensors))


def test_a_file_of_components_without_any_alpha_is_read_as_its_loaders_read_it_and_says_so(tmp_path):
    path = file(tmp_path, dotted() | dotted("text_encoder.layers.0.q_proj"))
    source = spectra.open_source(path)
    close(source[f"{DOTTED}.weight"], product(lora(), s=1.0))
    (said,) = source.coverage.warnings
    assert said.startswith("no α for 2 modules")
    assert "pass scale= (--scale)" in said
    given = spectra.open_source(path, scale=0.5)
    close(given[f"{DOTTED}.weight"], product(lora(), s=0.5))


def test_one_module_without_an_alpha_is_refused_alone(tmp_path):
    tensors = dotted(alpha=torch.tensor(3.0)) | dotted("unet.other")
    source = spectra.open_source(file(tmp_path, tensors))
    close(source[f"{DOTTED}.weight"], product(lora()))
    assert "pass scale= (--scale)" in source["unet.other.weight"].reason
    both = spectra.open_source(file(tmp_path, tensors), scale=2.0)
    close(both[f"{DOTTED}.weight"], product(lora()))
    close(both["unet.other.weight"], product(lora(), s=2.0))
    assert [warning.split(" for ")[0] for warning in both.coverage.warnings] == ["s = 2 as given", "scale was ignored"]


def test_a_header_for_one_component_says_nothing_of_another(tmp_path):
    encoder = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    source = spectra.open_source(file(tmp_path, dotted() | dotted(encoder), header("unet.")))
    close(source[f"{DOTTED}.weight"], product(lora()))
    assert "is for unet, not for text_encoder" in source[f"{encoder}.weight"].reason
    with pytest.raises(SourceError, match="so α/r is unknown"):  # of which of the two is not said
        spectra.open_source(file(tmp_path, dotted() | dotted(encoder), header()))


def test_headers_that_do_not_fit_the_factors_are_refused(tmp_path):
    for notes, said in (
        (header("unet.", r=5), "the header says r = 5"),
        ({"ss_network_alpha": "3", "ss_network_dim": "5"}, "the header says r = 5"),
        ({"ss_network_alpha": "3", "ss_network_args": json.dumps({"block_alphas": "1,2"})}, "an α per block"),
    ):
        (delta,) = spectra.open_source(file(tmp_path, dotted(), notes))
        assert said in delta.reason


def test_a_convolution_has_an_alpha_of_its_own_in_kohyas_header(tmp_path):
    flat = "lora_unet_mid_block_conv"
    tensors = lora(flat, kernel=(K, K), alpha=None)
    for args, module, s in (
        ({"conv_dim": "2", "conv_alpha": "1"}, "networks.lora", 0.5),
        ({}, "lycoris.kohya", 2.0),
        ({"conv_dim": "2"}, "networks.lora", None),  # 1 for this trainer, and nothing says so
    ):
        notes = {"ss_network_alpha": "4", "ss_network_args": json.dumps(args), "ss_network_module": module}
        path = file(tmp_path, tensors, notes)
        if s is None:
            with pytest.raises(SourceError, match="so α/r is unknown"):
                spectra.open_source(path)
        else:
            close(only(spectra.open_source(path)), product(tensors, flat, s))


def fused(parts, name="lora_unet_double_blocks_0_img_attn_qkv"):
    """What `split_qkv` saves: the factors of each part joined, and the α of one."""
    downs, ups = [randn(R, IN) for _ in range(parts)], [randn(OUT, R) for _ in range(parts)]
    tensors = {f"{name}.lora_down.weight": torch.cat(downs), f"{name}.lora_up.weight": torch.block_diag(*ups)}
    product = torch.cat([up @ down for up, down in zip(ups, downs, strict=True)])
    return tensors | {f"{name}.alpha": torch.tensor(1.0)}, product


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", 3),
        ("lora_unet_single_blocks_0_linear1", 4),
        ("diffusion_model.double_blocks.0.img_attn.qkv", 3),
    ],
)
def test_split_qkv_is_what_the_header_decides(name, parts, tmp_path):
    tensors, whole = fused(parts, name)
    split = {"ss_network_dim": str(R), "ss_network_args": json.dumps({"split_qkv": "True"})}
    delta = only(spectra.open_source(file(tmp_path, tensors, split)))
    close(delta, whole / R)
    assert "as trained: the header says split_qkv" in delta.note
    literal = only(spectra.open_source(file(tmp_path, tensors, {"ss_network_dim": str(R)})))
    close(literal, whole / (parts * R))
    assert f"ΔW is {parts} times as large" in literal.note
    silent = only(spectra.open_source(file(tmp_path, tensors)))
    close(silent, whole / (parts * R))
    odd = split | {"ss_network_dim": "5"}
    (refused,) = spectra.open_source(file(tmp_path, tensors, odd))
    assert "split_qkv and r = 5" in refused.reason


def test_a_config_without_a_component_and_flat_names_with_patterns(tmp_path):
    notes = header(alpha_pattern={"attn.to_q": 5})
    (delta,) = spectra.open_source(file(tmp_path, lora(alpha=None), notes))
    assert "alpha_pattern of dotted names" in delta.reason


def test_a_scale_that_nothing_can_take_is_said(tmp_path):
    base, _ = pipeline(tmp_path / "base")
    source = spectra.open_source(file(tmp_path, {f"{FLAT}.diff": randn(OUT, IN)}), base, scale=2.0)
    assert "scale was ignored: nothing is left to scale" in source.coverage.warnings
