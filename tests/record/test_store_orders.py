"""The store keeps the right records after writes in random orders."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.record.schema import RecordState
from orchestrator.record.store import Store

STATES: Sequence[RecordState] = ("finished", "diverged", "stopped", "failed")
FINAL = ("finished", "diverged")
_writes = st.lists(st.tuples(st.integers(0, 2), st.sampled_from(STATES)), max_size=12)


@given(writes=_writes, reopen=st.booleans())
def test_a_final_record_is_never_lost_or_overwritten(make_record, writes, reopen):
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        model: dict[str, tuple[RecordState, int]] = {}
        failures: dict[str, int] = {}
        for number, (seed, state) in enumerate(writes):
            record = make_record(seed=seed, state=state, steps=20 + number)
            fingerprint = record.fingerprint
            before = model.get(fingerprint)
            has_final = before is not None and before[0] in FINAL
            assert store.put(record) is not has_final
            if not has_final:
                model[fingerprint] = (state, record.steps)
                failures[fingerprint] = failures.get(fingerprint, 0) + 1 if state == "failed" else 0
            if reopen:
                store = Store(folder)
            assert store.states() == {f: s for f, (s, _) in model.items()}
            kept = store.get(fingerprint)
            assert (kept.state, kept.steps) == model[fingerprint]
            reusable = store.get_reusable(fingerprint)
            assert (reusable is not None) == (model[fingerprint][0] in FINAL)
            assert store.count_failures(fingerprint) == failures[fingerprint]
        assert {r.fingerprint: (r.state, r.steps) for r in store.records()} == model
