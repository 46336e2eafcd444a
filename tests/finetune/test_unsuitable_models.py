"""A base model that cannot read the data of a user is refused in one line, also by a plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from data_rows import CHATS, MAILS, write
from image_data import picture
from in_process import SWEEP, Run, restored, run
from tiny_images import vit

__all__ = ["restored", "run"]

SMALL = "it is a small model for task"
CASES = {
    "the words of letters": ("chats.jsonl", "letters-base", [f"{SMALL} 'letters'", "take another --model"]),
    "the words of reviews": ("chats.jsonl", "reviews-base", [f"{SMALL} 'reviews'", "example smollm2-135m"]),
    "images of another size": ("colors", "digits-base", [f"{SMALL} 'digits'", "the model takes 8 x 8"]),
    "images for a text model": ("colors", "minilm-l6", ["is a text model", "take an image model"]),
    "images for a text base": ("colors", "reviews-base", ["is a text model", "take an image model"]),
    "texts for an image model": ("mails.jsonl", "vit", ["is an image model", "has texts; take a text model"]),
    "texts for an image base": ("mails.jsonl", "digits-base", ["is an image model", "take a text model"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_model_that_cannot_read_the_data_is_refused_by_a_plan(case: str, tmp_path: Path, run: Run) -> None:
    data, model, expected = CASES[case]
    write(tmp_path / "chats.jsonl", CHATS)
    write(tmp_path / "mails.jsonl", MAILS)
    for number in range(30):
        place = tmp_path / "colors" / ("red", "green", "blue")[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number, number % 3))
    vit(tmp_path / "vit")
    run(SWEEP, "--plan", "--data", data, "--model", model).assert_refused(f"--model {model}", *expected)
