"""
How right an answer is, from 0 to 1, given the answers that people gave: VQA accuracy, exact match and F1 of words.

VQA accuracy follows the evaluation of the VQA challenge (https://visualqa.org/evaluation.html) and its script,
vqaEval.py of https://github.com/GT-Vision-Lab/VQA, and where the two differ the script: numbers are then those of
published tables. What is surprising in it:

* If all references are one string, nothing is normalised: the answer must be that string ("Yes" is not "yes").
* Punctuation becomes a space, but nothing at all if it stands beside a space somewhere in the answer, or if the answer
  has a comma between digits. The apostrophe and the colon stay.
* Periods go unless a digit follows, the first 32 of them: the script passes a flag (`re.UNICODE`, 32) as the count.
* The list of contractions has slips, which are kept.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence


_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0", "zero": "0"} | {
    word: str(number)
    for number, word in enumerate("one two three four five six seven eight nine ten".split(), start=1)
}

# The script corrects a contraction that lacks one apostrophe: dont, couldn'tve, couldnt've. The last three entries are
# as it has them. Those of "I" are there too but match nothing, since answers are in lower case by then.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in """
        ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
        he'd've he's how'd how'll how's I'd've I'm I've isn't it'd it'd've it'll ma'am mightn't mightn't've might've
        mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
        somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
        something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
        we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
        who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've
        you'll you're you've
    """.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd"}


def normalize_vqa_answer(text: str) -> str:
    """
    An answer as the VQA challenge compares it: punctuation, number words, articles and contractions normalised.

    Args:
        text (`str`):
            Answer of a model or of a person.

    Returns:
        `str`: words in lower case; it may be empty.

    Example:
    ```python
    >>> from lever_grpo.metrics import normalize_vqa_answer
    >>> normalize_vqa_answer("The two dogs, isnt it?"), normalize_vqa_answer("1,000 km."), normalize_vqa_answer("3.5")
    ("2 dogs isn't it", '1000 km', '3.5')

    ```
    """
    text = _one_line(text)
    marks_go = re.search(r"\d,\d", text) is not None
    spaced = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        spaced = spaced.replace(mark, "" if marks_go or mark + " " in text or " " + mark in text else " ")
    words = [_NUMBERS.get(word, word) for word in re.sub(r"\.(?!\d)", "", spaced, count=32).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, references: Sequence[str]) -> float:
    """
    VQA accuracy: an answer that three of the other annotators gave is right, fewer give a part.

    Each annotator is left out in turn, and min(1, matches among the others / 3) is averaged: of ten references 1, 2, 3
    and 4 matches are worth 0.3, 0.6, 0.9 and 1. Antol et al., *VQA: Visual Question Answering*, ICCV 2015; the module
    says how answers are compared.

    For fewer than ten references, where the challenge has no rule, 3 becomes min(3, references − 1). A single one is
    compared after normalisation: 1 if it is equal, else 0.

    Args:
        prediction (`str`):
            Answer of a model.
        references (`Sequence[str]`):
            What people answered, at least one answer; order does not matter.

    Returns:
        `float`: in [0, 1].

    Raises:
        ValueError: If `references` is empty, or one string.

    Example:
    ```python
    >>> from lever_grpo.metrics import vqa_accuracy
    >>> vqa_accuracy("Two", ["2"] * 3 + ["3"] * 7), vqa_accuracy("Two", ["2"] * 4 + ["3"] * 6)
    (0.9, 1.0)
    >>> vqa_accuracy("Yes", ["yes"] * 10), vqa_accuracy("a cat", ["cat", "dog", "cow"])
    (0.0, 0.3333333333333333)

    ```
    """
    _check(references)
    answer, given = _one_line(prediction), [_one_line(reference) for reference in references]
    if len(given) == 1 or len(set(given)) > 1:
        answer, given = normalize_vqa_answer(answer), [normalize_vqa_answer(reference) for reference in given]
    matches, others = given.count(answer), len(given) - 1
    if others == 0:
        return float(matches)
    enough = min(3, others)
    # the annotators that are left out without a match, and those with one, who leave a match fewer
    points = (len(given) - matches) * min(matches, enough) + matches * min(matches - 1, enough)
    return points / (len(given) * enough)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """
    Whether an answer is one of the references, upper case, punctuation, symbols and articles aside.

    Accents and vowel signs count, however they are encoded; a sign, a currency or a point in front of a number counts,
    and so does any mark between a letter or digit and a digit, but for the comma of thousands.

    Args:
        prediction (`str`):
            Answer of a model.
        references (`Sequence[str]`):
            Right answers, at least one.

    Returns:
        `float`: 1 or 0.

    Raises:
        ValueError: If `references` is empty, or one string.

    Example:
    ```python
    >>> from lever_grpo.metrics import exact_match
    >>> exact_match("The Cat.", ["dog", "cat"]), exact_match("black cat", ["cat"]), exact_match("3.5", ["35"])
    (1.0, 0.0, 0.0)
    >>> exact_match('"3"', ["3"]), exact_match("-3", ["3"]), exact_match("दिन", ["दान"])
    (1.0, 0.0, 0.0)

    ```
    """
    _check(references)
    return float(_plain_words(prediction) in map(_plain_words, references))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """
    F1 of the words that answer and reference share, the best over the references; words as in [`exact_match`].

    Rajpurkar et al., *SQuAD: 100,000+ Questions for Machine Comprehension of Text*, EMNLP 2016, section 6.1.

    Args:
        prediction, references:
            As in [`exact_match`].

    Returns:
        `float`: in [0, 1].

    Raises:
        ValueError: If `references` is empty, or one string.

    Example:
    ```python
    >>> from lever_grpo.metrics import token_f1
    >>> round(token_f1("A black cat", ["cat", "the cat on a bed"]), 3)  # 1 of 2 words, and the 1 of the first
    0.667

    ```
    """
    _check(references)
    words = _plain_words(prediction)
    return max(_f1(words, _plain_words(reference)) for reference in references)


def _f1(a: list[str], b: list[str]) -> float:
    shared = (Counter(a) & Counter(b)).total()
    return 2 * shared / (len(a) + len(b)) if a or b else 1.0


def is_letter_part(mark: str) -> bool:
    """Whether a character makes another letter of the one before it, which Python's `\\w` does not say: an accent, a
    vowel sign. A variation selector only changes its looks."""
    return unicodedata.category(mark) in ("Mn", "Mc") and "VARIATION SELECTOR" not in unicodedata.name(mark, "")


def _plain_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, but never nothing of what has some: "+", "the"."""
    text = unicodedata.normalize("NFC", text.lower())
    padded = " " + re.sub(r",(?=\d{3})", "", text) + " "  # without the comma of 1,000
    around = zip(padded, padded[1:-1], padded[2:], strict=False)
    words = "".join(mark for before, mark, after in around if _counts(before, mark, after)).split() or text.split()
    return [word for word in words if word not in _ARTICLES] or words


def _counts(before: str, mark: str, after: str) -> bool:
    """Whether a character between two others is more than punctuation."""
    if mark.isalnum() or mark.isspace() or is_letter_part(mark):
        return True
    # before a digit: whatever stands inside of a word, as in 1:30 and x^2; else -5, $5 and .5, but no quote or bracket
    is_sign = mark == "." or unicodedata.category(mark) in ("Pd", "Sc", "Sm")
    return after.isdecimal() and (before.isalnum() or is_sign)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _check(references: Sequence[str]) -> None:
    if isinstance(references, str) or len(references) == 0:
        raise ValueError(f"references={references!r} must be a list of answers, at least one.")
