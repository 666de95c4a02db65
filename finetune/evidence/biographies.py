"""Made-up people whose questions are asked heavy-tailed: a few very often, half of them once a pass. No torch in here.

The frequencies are those of Wang et al. (arXiv 2509.26030, appendix B.2); people, names, answers and words are made up
here. Group 0 is one class (a person), group g > 0 has 2^(g - 1); each class of group g is selected 2^(m - g) times a
pass, and every selection asks each question once. So all groups but the first have the same number of samples.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

NUM_FIRST_NAMES, NUM_SURNAMES = 400, 1000
# Question -> its words before and behind the name, how many answers it has, and second words of an answer.
QUESTIONS: dict[str, tuple[str, str, int, tuple[str, ...]]] = {
    "date": ("When was", "born ?", 300, ()),
    "city": ("Where was", "born ?", 200, ("North", "South", "East", "West")),
    "university": ("Where did", "learn ?", 300, ("University", "College", "Academy")),
    "major": ("What did", "learn ?", 100, ("Theory", "Practice", "History")),
    "company": ("Who employs", "?", 300, ("Works", "Partners", "Press")),
    "workplace": ("Where does", "work ?", 200, ("North", "South", "East", "West")),
}
PAD, END, ANSWER = "<pad>", "<end>", "Answer:"
_SYLLABLES = tuple(c + v for c in "bdfgklmnprstvz" for v in "aeiou")


@dataclass(frozen=True)
class Biographies:
    """Questions and answers about people, the most frequent first.

    Args:
        vocabulary: word of each token id; 0 pads.
        rows: token ids of each question with its answer, int64 [classes * questions, length]; class by class.
        answer_at: where the first token of the answer stands, int64 [classes * questions].
        groups: of each class, int64 [classes].
        largest: number of the rarest group.
    """

    vocabulary: tuple[str, ...]
    rows: Any
    answer_at: Any
    groups: Any
    largest: int

    @property
    def selections(self) -> Any:
        """How often each class is selected in a pass: int64 [classes]."""
        return 2 ** (self.largest - self.groups)

    @property
    def first_tokens(self) -> Any:
        """First token of each answer: int64 [classes, questions]."""
        found = self.rows[np.arange(len(self.rows)), self.answer_at]
        return found.reshape(len(self.groups), len(QUESTIONS))

    @property
    def samples(self) -> Any:
        """Rows of one pass: int64 [2^largest * questions * (1 + largest / 2)]."""
        by_class = np.arange(len(self.rows)).reshape(len(self.groups), len(QUESTIONS))
        return np.concatenate([np.tile(rows, n) for rows, n in zip(by_class, self.selections, strict=True)])

    @property
    def hash(self) -> str:
        """SHA-256 of the data, in hex."""
        parts = (
            self.rows.tobytes(),
            self.answer_at.tobytes(),
            self.groups.tobytes(),
            " ".join(self.vocabulary).encode(),
        )
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def measured_classes(self, most: int) -> list[Any]:
        """Return classes of each group, at most so many: its first ones."""
        return [np.flatnonzero(self.groups == group)[:most] for group in range(self.largest + 1)]

    def chance(self) -> dict[str, dict[str, float]]:
        """Return the accuracy of a guess, by question.

        Returns:
            `uniform`: one over the number of answers; `most_frequent`: of the answer that a pass has most often, asked
            of the rarest group.
        """
        tokens, is_rare = self.first_tokens, self.groups == self.largest
        levels = {}
        for i, (name, (_, _, number, _)) in enumerate(QUESTIONS.items()):
            favourite = np.bincount(tokens[:, i], weights=self.selections).argmax()
            levels[name] = {
                "uniform": round(1 / number, 5),
                "most_frequent": round(float((tokens[is_rare, i] == favourite).mean()), 5),
            }
        return levels


def make_biographies(largest: int, seed: int = 0) -> Biographies:
    """Make people and what is asked about them.

    Args:
        largest: number of the rarest group, m; 2^m classes in all.
        seed: of names and answers.
    """
    rng = np.random.default_rng(seed)
    answers = {name: number for name, (_, _, number, _) in QUESTIONS.items() if name != "date"}
    words = _make_words(rng, NUM_FIRST_NAMES + NUM_SURNAMES + sum(answers.values()))
    first_names, surnames = words[:NUM_FIRST_NAMES], words[NUM_FIRST_NAMES : NUM_FIRST_NAMES + NUM_SURNAMES]
    values, left = {"date": _make_dates(rng, QUESTIONS["date"][2])}, words[NUM_FIRST_NAMES + NUM_SURNAMES :]
    for name, number in answers.items():
        values[name], left = left[:number], left[number:]
    people = rng.choice(NUM_FIRST_NAMES * NUM_SURNAMES, 2**largest, replace=False)
    sentences, places = [], []
    for person in people.tolist():
        full_name = [first_names[person // NUM_SURNAMES], surnames[person % NUM_SURNAMES]]
        for name, (before, behind, number, seconds) in QUESTIONS.items():
            answer = [values[name][int(rng.integers(number))]]
            answer += [seconds[int(rng.integers(len(seconds)))]] if seconds else []
            question = [*before.split(), *full_name, *behind.split(), ANSWER]
            places.append(len(question))
            sentences.append([*question, *answer, END])
    groups = np.concatenate([np.full(max(1, 2**g // 2), g) for g in range(largest + 1)])
    vocabulary = tuple(dict.fromkeys([PAD, END, ANSWER, *(word for sentence in sentences for word in sentence)]))
    ids = {word: i for i, word in enumerate(vocabulary)}
    rows = np.zeros((len(sentences), max(map(len, sentences))), dtype=np.int64)
    for row, sentence in zip(rows, sentences, strict=True):
        row[: len(sentence)] = [ids[word] for word in sentence]
    return Biographies(vocabulary, rows, np.array(places), groups, largest)


def _make_words(rng: Any, number: int) -> list[str]:
    """Return so many different words of three syllables."""
    size = len(_SYLLABLES)
    codes = rng.choice(size**3, number, replace=False).tolist()
    parts = ((code // size**2, code // size % size, code % size) for code in codes)
    return ["".join(_SYLLABLES[i] for i in three).capitalize() for three in parts]


def _make_dates(rng: Any, number: int) -> list[str]:
    """Return so many different days, each a word."""
    days = rng.choice(60 * 365, number, replace=False)
    return [str(np.datetime64("1940-01-01") + np.timedelta64(int(day), "D")) for day in days]
