"""Names, help texts and documents use plain English and the words of the field."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    path for pattern in ("*.md", "docs/**/*.md", "benchmarks/**/*.md") for path in sorted(ROOT.glob(pattern))
]
SOURCES = [
    path for folder in ("src", "examples", "tests", "benchmarks") for path in sorted((ROOT / folder).rglob("*.py"))
]
# Turns of phrase that a reader whose English is a second language must guess at.
RIDDLES = (
    "as a coin falls",
    "its own will back",
    "leaves word",
    "leave word",
    "goes behind their back",
    "head start",
    "as much as luck can do",
    "have the last word",
    "has the last word",
)
# In documents: what the field calls it.
FIELD = {
    r"\banswers?\b": "predictions",
    r"\bheld back\b": "regularised, or held-out",
    r"\bsettled?\b": "converged",
    r"\bFLOPs?\b": "MACs",
    r"\bcut out\b": "removed",
}
# Not the imperatives of a docstring; the usual one is "Return".
FIRST_WORDS = ("Give", "Gives", "Returns", "Gets")


def text_of(path: Path) -> str:
    """Return a text in one line, so that a phrase is found across line ends."""
    return re.sub(r"[\s#]+", " ", path.read_text())


@pytest.mark.parametrize("phrase", RIDDLES)
def test_no_riddles(phrase: str) -> None:
    texts = (path for path in (*DOCUMENTS, *SOURCES) if path != Path(__file__))
    assert not [path for path in texts if phrase in text_of(path).lower()], phrase


@pytest.mark.parametrize("word", FIELD)
def test_documents_use_the_words_of_the_field(word: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {match[0]!r}; write {FIELD[word]}"
        for path in DOCUMENTS
        for match in re.finditer(word, re.sub(r"`[^`\n]*`", "", path.read_text()), re.IGNORECASE)
    ]
    assert not found


@pytest.mark.parametrize("folder", ["src", "examples", "tests", "benchmarks"])
def test_docstrings_begin_with_an_imperative(folder: str) -> None:
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node) or ""
                if docstring.split(maxsplit=1)[:1] and docstring.split()[0].rstrip(",.:") in FIRST_WORDS:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {docstring.splitlines()[0]}")
    assert not found
