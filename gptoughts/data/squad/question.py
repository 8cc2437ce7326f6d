"""Records of extractive question answering: `Question` and `Answer`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """A span of the context: `text` begins at character `start`."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question about a context. No answers: unanswerable. Several: from different annotators."""

    id: str
    text: str
    context: str
    answers: tuple[Answer, ...] = ()
    title: str = ""
    where: str = ""
    """File and position, for error messages."""
