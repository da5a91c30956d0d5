"""Every codec against the library whose format it is, on weights that the library wrote and decoded: see codecs/."""

from __future__ import annotations

import pytest
import torch
from support.stored_codes import CONFIGS, decoded_by_library, write_coded

from spectra.files.codecs import bitsandbytes, packing
from spectra.files.folder import open_folder


def decoded(folder, case):
    """The one weight of a case, as a reference."""
    opened = open_folder(write_coded(folder, case))
    assert not opened.unusable
    assert len(opened.tensors) == 1
    return next(iter(opened.tensors.values()))


@pytest.mark.parametrize("case", [case for case in CONFIGS if case not in ("mlx half", "mlx bfloat16")])
def test_the_weight_is_bit_for_bit_what_the_library_decodes(case, tmp_path):
    ref, expected = decoded(tmp_path, case), decoded_by_library(case)
    got = ref.read()
    assert ref.is_float
    assert ref.shape == tuple(expected.shape)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)


@pytest.mark.parametrize("case", CONFIGS)
def test_a_weight_is_decoded_a_block_at_a_time_as_at_once(case, tmp_path, monkeypatch):
    ref = decoded(tmp_path, case)
    whole = ref.read()
    monkeypatch.setattr(packing, "BLOCK_ENTRIES", 2 * ref.shape[-1])
    monkeypatch.setattr(bitsandbytes, "BLOCK_ENTRIES", 128)
    assert torch.equal(ref.read(), whole)


@pytest.mark.parametrize("case", CONFIGS)
def test_views_are_those_of_the_decoded_weight(case, tmp_path):
    ref = decoded(tmp_path, case)
    whole = ref.read()
    assert torch.equal(ref.rows(1, 2).read(), whole[1:2])
    assert torch.equal(ref.item(1).read(), whole[1])
    assert torch.equal(ref.reshape(ref.numel).read(), whole.flatten())
    if whole.ndim == 2:
        assert torch.equal(ref.T.read(), whole.T)
        assert torch.equal(ref.rows(1, 4).rows(1, 3).T.read(), whole[2:4].T)
    else:
        assert torch.equal(ref.item(1).rows(1, 3).T.read(), whole[1, 1:3].T)


@pytest.mark.parametrize("case", ["mlx half", "mlx bfloat16"])
def test_mlx_on_the_cpu_rounds_the_same_weight_twice(case, tmp_path):
    """Its product and its sum, each to the scales' type; there is no more between the two than that."""
    ref, expected = decoded(tmp_path, case), decoded_by_library(case)
    got = ref.read()
    assert got.dtype == torch.float32
    largest = got.abs() + ref.codec.biases.read().abs().max()
    assert ((got - expected.float()).abs() <= torch.finfo(expected.dtype).eps * largest).all()
    assert (got != expected.float()).any()
