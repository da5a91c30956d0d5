"""What a file may ask of its reader: no header costs more than these, whatever it claims. Checked before allocating.

Each is several times what the largest public models have: DeepSeek-V3 lists 91,991 tensors in all of its shards.
"""

from __future__ import annotations

HEADER = 100_000_000  # bytes of a safetensors header: the format's own limit
TENSORS = 250_000  # in one file
METADATA = 250_000  # keys beside the tensors
AXES = 64  # as many as torch has
NAME = 4_000  # characters of a tensor's name; Python's int() stops at 4,300 digits
TEXT = 64 * 2**20  # bytes of one string in GGUF's metadata: a whole tokenizer
ITEMS = 2_000_000  # strings and lists inside the arrays of a GGUF header: several vocabularies
JSON = 64 * 2**20  # bytes of a config or an index
PICKLE = 512 * 2**20  # bytes of a pickle without the tensors
FOLDERS = 3  # folders within folders that are opened as one model
RECORDS = 1_000_000  # files in a zip archive


def too_many(count: int, limit: int, what: str) -> str:
    """What to say of a count over its limit.

    >>> too_many(300_000, TENSORS, "tensors")
    'claims 300,000 tensors, more than the 250,000 that are read'
    """
    return f"claims {count:,} {what}, more than the {limit:,} that are read"
