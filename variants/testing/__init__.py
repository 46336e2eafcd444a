"""The laws that every variant must satisfy, for use in tests of variants inside and outside this project.

    from variants.testing import check_laws

    def test_my_variant() -> None:
        check_laws(MyVariant())

The laws run on small models on the CPU. They need transformers, and the law about PEFT needs peft (the extra
`test` of this project installs it); they do not need pytest.
"""

from variants.testing.laws import LAWS, Law, applies, check_laws
from variants.testing.rig import CASES, Case, NotApplicableError

__all__ = ["CASES", "LAWS", "Case", "Law", "NotApplicableError", "applies", "check_laws"]
