"""Forward passes of transformers models that do not wait for the device to look for packed rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_packing_check() -> Iterator[None]:
    """Tell transformers that no row holds several sequences.

    A model that gets no attention mask reads its position ids to find out, for which the host waits for the
    device in every forward pass. Only some models take a mask that makes the search needless. Where a version
    of transformers has no such function, nothing is changed.
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
