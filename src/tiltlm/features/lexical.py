"""Lexical features: contains, word lists, regex, length, pronouns."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path

from tiltlm.errors import FeatureError, UsageError, nearest
from tiltlm.features.automaton import Automaton, Phrases, WordCount
from tiltlm.features.batch import Batch, Span
from tiltlm.features.feature import Feature
from tiltlm.features.kinds import feature_kind

FEMALE = ("she", "her", "herself")
MALE = ("he", "him", "himself")
POSSESSIVES = {"female": "hers", "male": "his"}
GROUPS = ("female", "male", "neither")
UNITS = ("words", "characters", "tokens")
# Larger differences are rare and count as this one.
MAX_PRONOUNS = 3
APOSTROPHES = "['\u2019]"


@dataclass(frozen=True, kw_only=True)
class Pattern(Feature):
    """1 where a regular expression matches in the text, else 0."""

    pattern: re.Pattern[str]
    whole_words: bool
    phrases: tuple[str, ...] = ()

    def automaton(self) -> Automaton | None:
        """Whether a phrase has occurred, and the prefix of one; None for a regular expression."""
        if not self.whole_words:
            return None
        ignore_case = bool(self.pattern.flags & re.IGNORECASE)
        return Phrases(tuple((phrase, 1) for phrase in self.phrases), ignore_case)

    def compute(self, batch: Batch) -> list[float]:
        if not self.whole_words:
            return [float(self.pattern.search(text) is not None) for text in batch.texts]
        return [float(next(_whole_words(self.pattern, text), None) is not None) for text in batch.texts]

    def evidence(self, text: str) -> list[Span]:
        """The matches of at least one character."""
        spans = (
            _whole_words(self.pattern, text) if self.whole_words else (m.span() for m in self.pattern.finditer(text))
        )
        return [(start, end) for start, end in spans if end > start]


@dataclass(frozen=True, kw_only=True)
class Pronouns(Feature):
    """1 where a text has more pronouns of its group than of the other; ``neither``: where it has equally many."""

    group: str
    possessives: bool
    female: re.Pattern[str]
    male: re.Pattern[str]

    def automaton(self) -> Automaton:
        """The number of female pronouns minus that of male ones; the same automaton for all groups."""
        words = {1: _pronouns("female", self.possessives), -1: _pronouns("male", self.possessives)}
        pairs = tuple((word, weight) for weight, group in words.items() for word in group)
        return Phrases(pairs, ignore_case=True, max_count=MAX_PRONOUNS)

    def compute(self, batch: Batch) -> list[float]:
        return [float(self._majority(text) == self.group) for text in batch.texts]

    def evidence(self, text: str) -> list[Span]:
        """The pronouns of the group, if they are in the majority; none for ``neither``."""
        if self.group == "neither" or self._majority(text) != self.group:
            return []
        return list(_whole_words(self.female if self.group == "female" else self.male, text))

    def _majority(self, text: str) -> str:
        female = sum(1 for _ in _whole_words(self.female, text))
        male = sum(1 for _ in _whole_words(self.male, text))
        return "neither" if female == male else "female" if female > male else "male"


@dataclass(frozen=True, kw_only=True)
class Length(Feature):
    """The number of words, characters or tokens of a text."""

    unit: str

    def compute(self, batch: Batch) -> list[float]:
        if self.unit == "words":
            return [float(len(text.split())) for text in batch.texts]
        if self.unit == "characters":
            return [float(len(text)) for text in batch.texts]
        if batch.completion_ids is None:
            raise FeatureError(f"feature '{self.name}' counts token ids; pass completion_ids with the texts")
        return [float(len(ids)) for ids in batch.completion_ids]

    def automaton(self) -> Automaton | None:
        """The number of words so far; None for characters and tokens, which a guide knows from the position."""
        return WordCount() if self.unit == "words" else None


@feature_kind("contains")
def contains(phrase: str, ignore_case: bool = True) -> Pattern:
    """1 where the text contains this word or phrase as whole words, else 0.

    White space in the phrase matches any white space. Raises UsageError for an empty phrase.
    """
    phrase = _text("contains.phrase", phrase)
    name = f"contains '{_shortened(phrase)}'"
    return _whole_phrases(name, [phrase], _flag("contains.ignore_case", ignore_case))


@feature_kind("wordlist")
def wordlist(source: str | Path | Sequence[str], ignore_case: bool = True) -> Pattern:
    """1 where the text contains at least one word or phrase of a list as whole words, else 0.

    ``source`` is the name of a built-in list (see ``builtin_wordlists``), a UTF-8 file (one entry a line; blank lines
    and lines that start with ``#`` are skipped), or the entries themselves. Raises UsageError for an unknown name, a
    file that cannot be read, and an empty list.
    """
    name, entries = _read_wordlist(source)
    return _whole_phrases(name, entries, _flag("wordlist.ignore_case", ignore_case))


def _whole_phrases(name: str, phrases: Sequence[str], ignore_case: bool) -> Pattern:
    pattern = phrase_pattern(phrases, ignore_case)
    return Pattern(name=name, binary=True, pattern=pattern, whole_words=True, phrases=tuple(phrases))


def builtin_wordlists() -> list[str]:
    """The names of the word lists that ship with tiltlm."""
    folder = resources.files("tiltlm.features") / "wordlists"
    return sorted(file.name.removesuffix(".txt") for file in folder.iterdir() if file.name.endswith(".txt"))


@feature_kind("regex")
def regex(pattern: str, ignore_case: bool = False, multiline: bool = False, dot_all: bool = False) -> Pattern:
    """1 where this Python regular expression matches anywhere in the text, else 0.

    The options set ``re.IGNORECASE``, ``re.MULTILINE`` and ``re.DOTALL``. Raises UsageError, with the position, for a
    pattern that does not compile.
    """
    if not isinstance(pattern, str) or not pattern:
        raise UsageError(f"regex.pattern: expected a regular expression in quotes, got {pattern!r}")
    flags = re.IGNORECASE if _flag("regex.ignore_case", ignore_case) else re.NOFLAG
    flags |= re.MULTILINE if _flag("regex.multiline", multiline) else re.NOFLAG
    flags |= re.DOTALL if _flag("regex.dot_all", dot_all) else re.NOFLAG
    try:
        compiled = re.compile(pattern, flags)
    except re.error as error:
        at = "" if error.pos is None else f" at position {error.pos}, before {pattern[error.pos :][:20]!r}"
        raise UsageError(f"regex.pattern: {pattern!r} does not compile: {error.msg}{at}") from error
    except (OverflowError, RecursionError) as error:
        raise UsageError(f"regex.pattern: {pattern[:60]!r} does not compile: {error}") from error
    return Pattern(name=f"matches '{_shortened(pattern)}'", binary=True, pattern=compiled, whole_words=False)


@feature_kind("length")
def length(unit: str = "words") -> Length:
    """The length of the text in ``words`` (split at white space), ``characters`` (code points) or ``tokens``.

    Tokens are the sampled ``completion_ids``, the end-of-sequence token included. Raises UsageError for another unit.
    """
    if unit not in UNITS:
        raise UsageError(f"length: unknown unit {unit!r}; {nearest(str(unit), UNITS)}")
    return Length(name=f"length in {unit}", binary=False, unit=unit)


@feature_kind("pronouns")
def pronouns(group: str, possessives: bool = False) -> Pronouns:
    """1 where pronouns of the group ``female`` or ``male`` are in the majority; ``neither``: equal numbers.

    Female pronouns are {she, her, herself}, male ones {he, him, himself} (Korbak et al. 2022, arXiv 2206.00761, after
    Khalifa et al. 2021, arXiv 2012.11635). The possessive "her" counts and "his" does not; ``possessives=True`` adds
    "hers" and "his". Raises UsageError for another group.
    """
    if group not in GROUPS:
        raise UsageError(f"pronouns: unknown group {group!r}; {nearest(str(group), GROUPS)}")
    more = _flag("pronouns.possessives", possessives)
    return Pronouns(
        name="neither gender" if group == "neither" else group,
        binary=True,
        group=group,
        possessives=more,
        female=phrase_pattern(_pronouns("female", more), ignore_case=True),
        male=phrase_pattern(_pronouns("male", more), ignore_case=True),
    )


def _pronouns(group: str, possessives: bool) -> tuple[str, ...]:
    return (FEMALE if group == "female" else MALE) + ((POSSESSIVES[group],) if possessives else ())


def phrase_pattern(phrases: Iterable[str], ignore_case: bool) -> re.Pattern[str]:
    """One compiled pattern that matches any of these words or phrases, the longest first, between non-word characters.

    Common prefixes are shared, so the search time hardly grows with the number of phrases.
    """
    # A model may write é as one character or as e and an accent; a list needs only one form.
    forms = {unicodedata.normalize(form, phrase.strip()) for phrase in phrases for form in ("NFC", "NFD")}
    units = sorted(
        [r"\s+" if c.isspace() else APOSTROPHES if c in "'\u2019" else re.escape(c) for c in re.sub(r"\s+", " ", form)]
        for form in forms
    )
    return re.compile(rf"(?<!\w){_alternatives(units)}(?!\w)", re.IGNORECASE if ignore_case else re.NOFLAG)


def _alternatives(phrases: list[list[str]]) -> str:
    """A pattern for any of these sorted sequences of pattern units, as a tree of their common prefixes."""
    ends = zip(phrases[0], phrases[-1], strict=False)
    shared = [first for first, _ in takewhile(lambda pair: pair[0] == pair[1], ends)]
    branches: dict[str, list[list[str]]] = {}
    for phrase in phrases:
        rest = phrase[len(shared) :]
        if rest:
            branches.setdefault(rest[0], []).append(rest)
    if not branches:
        return "".join(shared)
    ends_here = any(len(phrase) == len(shared) for phrase in phrases)
    return "".join(shared) + f"(?:{'|'.join(map(_alternatives, branches.values()))})" + ("?" if ends_here else "")


def _whole_words(pattern: re.Pattern[str], text: str) -> Iterator[Span]:
    """Spans of the matches without a combining mark at either end, because ``\\w`` does not match such a mark."""
    for match in pattern.finditer(text):
        start, end = match.span()
        before, after = text[start - 1 : start], text[end : end + 1]
        if not any(c and unicodedata.category(c).startswith("M") for c in (before, after)):
            yield start, end


def _read_wordlist(source: str | Path | Sequence[str]) -> tuple[str, list[str]]:
    """The name and the entries of a word list."""
    builtin = builtin_wordlists()
    if isinstance(source, str) and source in builtin:
        file = resources.files("tiltlm.features") / "wordlists" / f"{source}.txt"
        return source, _entries(source, file.read_text(encoding="utf-8").splitlines())
    if isinstance(source, str | Path):
        source = _text("wordlist", str(source))
        path = Path(source).expanduser()
        if not path.exists() and path.suffix == "" and len(path.parts) == 1:
            raise UsageError(f"wordlist: no list or file named '{source}'; {nearest(source, builtin)}; or give a file")
        try:
            return path.stem, _entries(source, path.read_text(encoding="utf-8-sig").splitlines())
        except UnicodeDecodeError as error:
            raise UsageError(
                f"wordlist: '{source}' is not UTF-8 text (byte {error.start}); save it as UTF-8"
            ) from error
        except OSError as error:
            raise UsageError(f"wordlist: cannot read '{source}': {error.strerror}") from error
    if not isinstance(source, Sequence) or not all(isinstance(entry, str) for entry in source):
        raise UsageError(f"wordlist: expected a list's name, a file, or a list of words in quotes, got {source!r}")
    entries = _entries("the list given", source)
    shown = ", ".join(f"'{entry}'" for entry in entries[:2]) + (", …" if len(entries) > 2 else "")
    return f"any of {shown}", entries


def _entries(source: str, lines: Iterable[str]) -> list[str]:
    entries = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not entries:
        raise UsageError(f"wordlist: {source} holds no words; write one a line (lines with '#' are comments)")
    return entries


def _shortened(text: str) -> str:
    return text if len(text) <= 40 else text[:39] + "…"


def _text(where: str, value: object) -> str:
    """The stripped text. Raises UsageError for another type and for an empty text."""
    if not isinstance(value, str):
        raise UsageError(f"{where}: expected text, got {value!r} ({type(value).__name__}); put it in quotes")
    if not value.strip():
        raise UsageError(f"{where}: is empty; give a word or a phrase")
    return value.strip()


def _flag(where: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"{where}: expected true or false, got {value!r}")
    return value
