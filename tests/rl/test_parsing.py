import random
import re
import time

import pytest

from krontune.rl.tasks.parsing import parse_answer

GOOD = r"\ids{1,4,5} \answer{3}"


@pytest.mark.parametrize(
    ("text", "ids", "answer"),
    [
        (GOOD, (1, 4, 5), 3),
        ("values 3 < 9 < 12\n" + GOOD, (1, 4, 5), 3),
        (r"\answer{ 3 } then \ids{ 1, 4 ,5 }", (1, 4, 5), 3),
        (r"\ids{5,1,4} \answer{3}", (5, 1, 4), 3),
        (r"\ids{} \answer{0}", (), 0),
        (r"<think>\ids{2} \answer{1}</think>" + GOOD, (1, 4, 5), 3),
        (r"</think>\ids{2} \answer{1}</think>" + GOOD, (1, 4, 5), 3),
        (GOOD + " I repeat: " + GOOD, (1, 4, 5), 3),
        ("\x00\ud800" + GOOD, (1, 4, 5), 3),
        (r"\boxed{\ids{1,4,5}} \answer{3}", (1, 4, 5), 3),
        ("x" * 100_000 + GOOD, (1, 4, 5), 3),
        (r"\ids{1,999999999} \answer{2}", (1, 999999999), 2),
    ],
)
def test_well_formed_completions_are_read(text, ids, answer):
    parsed = parse_answer(text)
    assert parsed.ok and parsed.failure == ""
    assert (parsed.ids, parsed.answer) == (ids, answer)


@pytest.mark.parametrize(
    ("text", "ids", "answer"),
    [
        ("", None, None),
        ("the answer is 3", None, None),
        (r"\answer{3}", None, 3),
        (r"\ids{1,4,5}", (1, 4, 5), None),
        (GOOD + "</think> I give up", None, None),
        (r"\ids{1,4,5} \ids{1,4} \answer{3}", None, 3),
        (r"\ids{12} \ids{1 2} \answer{1}", None, 1),
        (GOOD + r" \answer{4}", (1, 4, 5), None),
        (GOOD + r" \ids{1,x}", None, 3),
        (GOOD + r" \ids{1,4,5", None, 3),
        (r"\ids{1,4,5,} \answer{3}", None, 3),
        (r"\ids{1,,5} \answer{3}", None, 3),
        (r"\ids{1 4 5} \answer{3}", None, 3),
        (r"\ids{1,4,4} \answer{3}", None, 3),
        (r"\ids{-1,4} \answer{2}", None, 2),
        (r"\ids{[1,4,5]} \answer{3}", None, 3),
        (r"\ids{{1,4,5}} \answer{3}", None, 3),
        (r"\ids{1;4;5} \answer{3}", None, 3),
        ("\\ids{1,\n4} \\answer{2}", None, 2),
        (r"\ids{١,٤} \answer{2}", None, 2),
        (r"\ids{1,4,5} \answer{３}", (1, 4, 5), None),
        (r"\ids{1,4,5} \answer{3.0}", (1, 4, 5), None),
        (r"\ids{1,4,5} \answer{-3}", (1, 4, 5), None),
        (r"\ids{1,4,5} \answer{three}", (1, 4, 5), None),
        (r"\ids{1,4,5} \answer{}", (1, 4, 5), None),
        (r"\ids{1,4,5} \answer{9999999999}", (1, 4, 5), None),
        (r"\ids{1,9999999999} \answer{2}", None, 2),
        (r"\ids {1,4,5} \answer{3}", None, 3),
        (r"\IDS{1,4,5} \answer{3}", None, 3),
        (r"\ids{" + "1," * 2000 + r"1} \answer{3}", None, 3),
        (GOOD + "x" * 100_000, None, None),
    ],
)
def test_everything_else_is_a_failure_with_a_reason(text, ids, answer):
    parsed = parse_answer(text)
    assert not parsed.ok and parsed.failure
    assert (parsed.ids, parsed.answer) == (ids, answer)


def naive_parse(text):
    """(ids, answer) by collecting every block in the last segment, in no hurry."""
    tail = text.split("</think>")[-1][-20_000:]

    def only(opener, block):
        contents = [content.strip() for content in re.findall(block, tail)]
        return contents[0] if len(set(contents)) == 1 and len(contents) == tail.count(opener) else None

    listed = only("\\ids{", r"\\ids\{([0-9, ]{0,2000})\}")
    number = only("\\answer{", r"\\answer\{ *([0-9]{1,9}) *\}")
    items = [] if not listed else [item.strip() for item in listed.split(",")]
    ids = None
    if listed is not None and all(re.fullmatch(r"[0-9]{1,9}", item) for item in items):
        ids = tuple(map(int, items)) if len(set(map(int, items))) == len(items) else None
    return ids, None if number is None else int(number)


def test_reading_from_the_end_finds_what_collecting_every_block_finds():
    rng = random.Random(3)
    blocks = [r"\ids{1,2}", r"\ids{1, 2 }", r"\ids{2,1}", r"\ids{}", r"\ids{1 2}", r"\ids{1,1}", r"\ids{x}", r"\ids{3"]
    numbers = [r"\answer{2}", r"\answer{ 2 }", r"\answer{3}", r"\answer{}", r"\answer{2", r"\answer{12345678901}"]
    others = ["</think>", "prose", " ", "\n", r"\frac{1}{2}", "}", "\\", ""]
    read = 0
    for _ in range(20_000):
        text = "".join(rng.choice(rng.choice((blocks, numbers, others))) for _ in range(rng.randint(1, 5)))
        parsed = parse_answer(text)
        assert (parsed.ids, parsed.answer) == naive_parse(text), text
        assert parsed.ok == (None not in naive_parse(text)), text
        read += parsed.ok
    assert read > 500


def test_no_text_raises_and_none_is_slow():
    rng = random.Random(0)
    pieces = ["\\ids{", "\\answer{", "}", "1", ",", " ", "</think>", "٣", "\x00", "\\", "{", "9" * 50, "\n"]
    for _ in range(3000):
        parse_answer("".join(rng.choices(pieces, k=rng.randint(0, 40))))
    start = time.perf_counter()
    for piece in (*pieces, "\\ids{1,", "\\answer{1 ", "\\ids{1}"):
        for tail in ("", "}", GOOD):
            parse_answer(piece * (400_000 // len(piece)) + tail)
    assert time.perf_counter() - start < 5
