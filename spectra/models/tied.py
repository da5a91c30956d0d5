"""Output heads that are the embedding: which names they have, and when a model ties them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_HEAD = re.compile(
    r"(?:^|\.)(?:lm_head|embed_out|output_layer|lm_head\.decoder|cls\.predictions\.decoder|vocab_projector"
    r"|generator_lm_head|pred_layer\.proj)\.weight$"
)
# Heads of single architectures, by their whole names: in other models such a name is of something else. Taken from the
# _tied_weights_keys of transformers 5.23: Whisper, BioGPT, TrOCR, FSMT, ALBERT, ModernBERT, XLNet, ViLT, T5Gemma.
_OWN_HEAD = re.compile(
    r"(?:proj_out|(?:decoder\.)?output_projection|predictions\.decoder|(?:head\.|mlm_score\.)?decoder|lm_loss"
    r"|lm_head\.out_proj)\.weight"
)
_EMBEDDING = re.compile(
    r"(?:^|\.)(?:shared|embed_tokens|wte|word_embeddings|tok_embeddings|tokens_embed|embed_in|word_embedding"
    r"|(?:backbone|transformer|rwkv)\.embeddings)\.weight$"
)
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration", "WithLMHead")


def is_head(name: str) -> bool:
    """Whether the name is that of an output head over the vocabulary.

    >>> is_head("model.lm_head.weight"), is_head("model.layers.0.mlp.up_proj.weight")
    (True, False)
    """
    return _HEAD.search(name) is not None or _OWN_HEAD.fullmatch(name) is not None


def may_be(head: str, shape: Sequence[int], embedding: Sequence[int]) -> bool:
    """Whether a head is an embedding by its shape: of a name that others use, too, only if it has as many rows.

    >>> may_be("decoder.weight", (3, 16), (40, 16)), may_be("lm_head.weight", (42, 16), (40, 16))
    (False, True)
    """
    return is_vocabulary(head) or tuple(shape) == tuple(embedding)


def is_embedding(name: str) -> bool:
    """Whether the name is that of the embedding of tokens."""
    return _EMBEDDING.search(name) is not None


def is_vocabulary(name: str) -> bool:
    """Whether the rows are tokens for certain, so that a resized vocabulary changes their number."""
    return _HEAD.search(name) is not None or is_embedding(name)


def ties(config: Mapping[str, Any]) -> bool | None:
    """Whether the config says that the head is the embedding, where the file holds no head; None if it does not say.

    transformers before 5 left the flag out where it is true; then a model class with a head and no
    stored head can only be tied.
    """
    flag = _flag(config)
    if flag is not None:
        return flag
    classes = config.get("architectures")
    return True if isinstance(classes, list) and any(str(name).endswith(_WITH_HEAD) for name in classes) else None


def _flag(config: Mapping[str, Any]) -> bool | None:
    flag = config.get("tie_word_embeddings")
    if flag is None and isinstance(config.get("text_config"), Mapping):
        flag = config["text_config"].get("tie_word_embeddings")
    return flag if isinstance(flag, bool) else None


def stored_as(name: str, names: Collection[str], same: Mapping[str, str], config: Mapping[str, Any]) -> str | None:
    """The stored weight that a weight of the model is, where that has another name: a tied head is the embedding.

    A head that is adapted exists; where the file holds none it is the embedding unless the config says that it is
    not. Where the file holds both, the config must say that they are one: it then has two copies of it.

    Args:
        name: the weight.
        names: the names in the base's file.
        same: those of them that share their storage: second name → first.
        config: the base's.

    Returns:
        The other name, or None.

    >>> stored_as("lm_head.weight", ["model.embed_tokens.weight"], {}, {"tie_word_embeddings": True})
    'model.embed_tokens.weight'
    """
    if name in same:
        return same[name]
    if not is_head(name) or ties(config) is False or (name in names and not _flag(config)):
        return None
    return embedding_in({other: same.get(other, "") for other in names})


def embedding_in(names: Mapping[str, str]) -> str | None:
    """The one token embedding among the names (name → the name that it is stored as, or ""), or None.

    Encoder–decoders store theirs as `shared` and list the copies as the same tensor.
    """
    embeddings = [name for name, same_as in names.items() if is_embedding(name) and not same_as]
    shared = [name for name in embeddings if name.endswith("shared.weight")]
    embeddings = shared or embeddings
    return embeddings[0] if len(embeddings) == 1 else None
