"""Forward passes of transformers models that do not wait for the device to look for packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_packing_check() -> Iterator[None]:
    """Tell transformers that no row holds several sequences.

    Without an attention mask, transformers searches the position ids for packed sequences, and the host waits
    for the device in every forward pass. A mask would avoid the search, but only some models accept one. A
    version of transformers without the searching function is left unchanged.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    if original is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if original is not None:
            setattr(masking_utils, name, original)
