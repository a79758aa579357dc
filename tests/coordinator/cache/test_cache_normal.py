"""The exact key's text, the core of a question, and the words by which candidates are found."""

from __future__ import annotations

import random
import time
import unicodedata

import pytest

from coordinator.cache.guards import veto
from coordinator.cache.normal import QUESTION_CHARS_MAX, content_words, core, in_digits, language, normalise, parts

SAME_KEY = (
    ("Hello   World", "hello world"),
    ("  What is\tTHE   time? ", "what is THE time?"),
    ("HOW DO I COOK RICE", "how do i cook rice"),
    ("Cafe\u0301 hours", "café hours"),
    ("Paris in Winter", "paris in winter"),
    ("Polish shoes how", "polish shoes how"),  # at the beginning nobody can tell
    ("What is  Gravity?", "what is gravity?"),
    ("WHAT IS GRAVITY?", "what is gravity?"),
    ("What is the capital of France", "what is the capital of france"),
    ("How do I  reset my password?", "how do i reset my password?"),
    ("What happens at  10:30 In Rome", "what happens at 10:30 in rome"),
    ("Where is it?\n", "where is it?"),
)
OTHER_KEY = (
    ("tell us about it", "tell US about it"),
    ("is it fast", "is IT fast"),
    ("what is Polish food", "what is polish food"),
    ("how long is March", "how long is march"),
    ("what is a Turkey", "what is a turkey"),
    ("call getValue", "call getvalue"),
    ("what is G", "what is g"),
    ("translate 'Good  Day'", "translate 'good day'"),
    ('say "Yes"', 'say "yes"'),
    ("run `ls -L`", "run `ls -l`"),
    ("run `a  b`", "run `a b`"),
    ("Masse", "Maße"),
    ("you did it?", "you did it."),
    ("def f():\n    return 1", "def f():\nreturn 1"),
    ("print:\n- A\n- b", "print:\n- a\n- b"),
    ("```\nX = 1\n```", "```\nx = 1\n```"),
    ("Base64 encode Hello", "Base64 encode hello"),
    ("MD5 of Hello", "MD5 of hello"),
    ("sha-256 of Hello", "sha-256 of hello"),
    ("How many capital letters are in Hello World", "How many capital letters are in hello world"),
    ("Capitalise hello world", "Capitalise Hello World"),
    ("How many spaces are in a  b", "How many spaces are in a b"),
    ("How many words are in  Hello", "How many words are in hello"),
    ("Is Hello a good password?", "Is hello a good password?"),
    ("How many lines has this text?\na\nb\nc", "How many lines has this text? a b c"),
    ("Sort these names:\nMary Ann\nBob", "Sort these names:\nMary\nAnn Bob"),
    ("What is this?\nHello", "What is this?\nhello"),
    ("Shorten: Hello  World", "Shorten: hello world"),
    ('sum "Up Hello: World"', 'sum "up Hello: World"'),
    ("    a\n    b", "a\n    b"),
    ("What is Steam?", "What is steam?"),
    ("How long does a Beetle live", "How long does a beetle live"),
    ("who are the Jaguars", "who are the jaguars"),
    ("what is Apple's colour", "what is apple's colour"),
    ("WHAT IS AIDS?", "what is aids?"),
    ("WHAT IS A RAM?", "what is a ram?"),
    ("WHAT IS STEAM?", "what is steam?"),
    ("what is Hello123", "what is hello123"),
    ("call foo.Bar", "call foo.bar"),
    ("open /home/Ann", "open /home/ann"),
)


@pytest.mark.parametrize(("one", "other"), SAME_KEY)
def test_careless_writing_has_the_same_key(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(("one", "other"), OTHER_KEY)
def test_what_may_carry_meaning_stays_in_the_key(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


_SIGNS = [
    "a",
    "B",
    "US",
    "iPhone",
    " ",
    "  ",
    "\t",
    "'",
    '"',
    "`",
    "“",
    "”",
    "«",
    "»",
    "```",
    ".",
    "?",
    "Polish",
    "é",
    "e\u0301",
    "Ω",
    "İ",
    "ß",
    "- ",
]


def test_normalising_twice_changes_nothing_and_loses_no_letter() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choice(_SIGNS) for _ in range(rng.randrange(30)))
        once = normalise(text)
        assert normalise(once) == once
        assert unicodedata.normalize("NFC", once) == once
        assert "".join(once.split()).lower() == unicodedata.normalize("NFC", "".join(unicodedata.normalize("NFC", text).split()).lower())


CORES = (
    ("Could you please tell me how I can reset my password? Thanks in advance!", "how I can reset my password?"),
    ("Hi there, I was wondering if you could tell me what a monad is, thanks", "what a monad is"),
    ("um, what's the colour of the sky", "what is the color of the sky"),
    ("Hello! I hope you are well. List twenty-five rivers. Cheers!", "List 25 rivers."),
    ("Quick question: definately open on Monday?", "definitely open on Monday?"),
    ("can you write a poem about rain", "write a poem about rain"),
    ("hello world in python", "hello world in python"),
    ("how do you say thank you", "how do you say thank you"),
    ("Translate: hello, thanks", "Translate: hello, thanks"),
    ("just in time compilation", "just in time compilation"),
    ('Please explain `x  +  Y` and "The  Who"', 'explain `x  +  Y` and "The  Who"'),
    ("thanks", "thanks"),
    ("Wie ist das Wetter, bitte?", "Wie ist das Wetter, bitte?"),
)


@pytest.mark.parametrize(("text", "expected"), CORES)
def test_the_core_is_what_is_meant(text: str, expected: str) -> None:
    assert core(text) == expected


def test_a_core_of_something_is_something() -> None:
    rng = random.Random(2)
    words = "please thanks hi hello um so could you tell me , . ! ? : - just really what is it 'x' `y` sorry".split()
    for _ in range(2000):
        text = " ".join(rng.choice(words) for _ in range(1 + rng.randrange(8)))
        assert core(text).strip()


NUMBERS = (
    ("two hundred and one things", "201 things"),
    ("ninety nine", "99"),
    ("three million five hundred thousand", "3500000"),
    ("nineteen eighty four", "19 84"),
    ("two three", "2 3"),
    ("a dozen eggs", "a 12 eggs"),
    ("the third and the twelfth", "the 3rd and the 12th"),
    ("wait a second", "wait a second"),
    ("someone often", "someone often"),
    ("zero", "0"),
    ("twenty-five hundred", "2500"),
    ("one hundred thousand", "100000"),
    ("two dozen", "24"),
    ("one thousand and five", "1005"),
    ("one hundred and twenty and one hundred and fifty", "120 and 150"),
    ("primes between one thousand and four thousand", "primes between 1000 and 4000"),
    ("primes between two thousand and three thousand", "primes between 2000 and 3000"),
    ("one million and five million", "1000000 and 5000000"),
    ("one hundred and five hundred", "100 and 500"),
    ("twenty and five", "20 and 5"),
    ("twenty - five", "20 - 5"),
    ("two and three", "2 and 3"),
    ("between one hundred and fifty", "between one hundred and fifty"),  # 150, or two
    ("one thousand million", "one thousand million"),
)


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_number_words_become_digits(text: str, expected: str) -> None:
    assert in_digits(text) == expected


TWO_NUMBERS = (
    ("primes between one thousand and four thousand", "primes between two thousand and three thousand"),
    ("add one million and five million", "add two million and four million"),
    ("add twenty and five", "add twenty five"),
    ("add one hundred and five hundred", "add one hundred five hundred"),
)


@pytest.mark.parametrize(("one", "other"), TWO_NUMBERS)
def test_two_numbers_are_not_one(one: str, other: str) -> None:
    assert core(one) != core(other) and veto(one, other)


TONGUES = (
    ("How do I get to Los Angeles?", "en"),
    ("reset password", "en"),
    ("Um, is it open?", "en"),
    ("Wie ändere ich mein Passwort?", "de"),
    ("Comment est-ce que je change mon mot de passe ?", "fr"),
    ("¿Cómo cambio mi contraseña?", "es"),
    ("Как сменить пароль?", "cyrillic"),
    ("パスワードを変更する", "hiragana"),
    ("如何更改密码", "cjk"),
)


@pytest.mark.parametrize(("text", "expected"), TONGUES)
def test_languages_are_told(text: str, expected: str) -> None:
    assert language(text) == expected


def test_other_languages_and_texts_about_words_are_taken_literally() -> None:
    for text in ("Wie ist das Wetter?", "What is the difference between begin and start?", "Summarize: to be or not", "What does U mean?"):
        assert parts(text).is_literal
    assert not parts("How do I begin?").is_literal


def test_words_for_the_index_are_stems_without_stop_words() -> None:
    assert content_words("Where do I purchase the files?") == content_words("where to buy a file")
    assert content_words("running the tests") == ("run", "test")
    assert content_words("who are you") == ("who", "are", "you")  # nothing else is there
    assert content_words("") == ()


def test_a_long_text_is_left_alone_and_quickly() -> None:
    text = "word " * QUESTION_CHARS_MAX
    assert core(text) == text.strip() and content_words(text) == ()
    started_s = time.process_time()
    for sign in ("“", "```", "`a", "'a ", "a\n", "ABC ", '"a', " ", ";"):
        normalise(sign * 30_000)
    assert time.process_time() - started_s < 3  # linear: about 0.2 s


@pytest.mark.parametrize(("one", "other"), [("What is 1 Pa?", "What is 1 pa?"), ("How many Mb in a Gb?", "How many mb in a gb?")])
def test_units_are_read_as_they_are_written(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)
    assert normalise("What Is Gravity?") == normalise("what is gravity?")
