"""Weight files of an adapter's folder, whatever container they are in: their tensors, and other ones in their place."""

from __future__ import annotations

import shutil
from pathlib import Path

import gguf
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

_SUFFIXES = (".safetensors", ".gguf", ".lora", ".pth", ".pt")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a folder."""
    return sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's weight files."""
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        if file.suffix == ".safetensors":
            found |= load_file(file)
        elif file.suffix == ".gguf":
            found |= {entry.name: torch.from_numpy(entry.data.copy()) for entry in gguf.GGUFReader(file).tensors}
        else:
            content = torch.load(file, weights_only=True)
            found |= content.get("model", content)
    return found


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Put other tensors into a weight file; what else its header says stays."""
    whole = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            header = opened.metadata()
        save_file(whole, file, header)
    elif file.suffix == ".gguf":
        fields = gguf.GGUFReader(file).fields.values()
        said = {field.name: (field.contents(), field.types[0]) for field in fields if field.types}
        write_gguf(file, whole, said)
    else:
        torch.save(whole, file)


def write_gguf(
    file: Path, tensors: dict[str, torch.Tensor], said: dict[str, tuple[object, gguf.GGUFValueType]]
) -> Path:
    """A GGUF file with these key-values."""
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, str(said["general.architecture"][0]))
    for key, (value, kind) in said.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            writer.add_key_value(key, value, kind)
    for name, tensor in tensors.items():
        if tensor.dtype is torch.bfloat16:
            writer.add_tensor(name, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def rewritten(folder: Path, into: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A copy of an adapter's folder with other tensors in its weight file."""
    shutil.copytree(folder, into)
    (file,) = weight_files(into)
    write_tensors(file, tensors)
    return into
