"""The picture of one completion: well-formed whatever the tokens say, and marked where credit goes."""

import xml.etree.ElementTree as ElementTree

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from krontune.rl.credit import TokenCredit
from krontune.rl.errors import RlError
from krontune.rl.plots import draw_completion, rhythm_svg

SVG = "{http://www.w3.org/2000/svg}"


def drawn(tokens, **options):
    n = len(tokens)
    return ElementTree.fromstring(rhythm_svg(tokens, [1.0] * n, [0.5] * n, **options))


def test_hostile_tokens_stay_text():
    tokens = ["</svg>", "<script>alert(1)</script>", '"&amp;', "\n", "\x00\x1b", " ", "", "é", "\ud800"]
    picture = drawn(tokens, title="<b>&")
    expected = {SVG + tag for tag in ("svg", "rect", "g", "text", "tspan", "title")}
    assert {element.tag for element in picture.iter()} == expected
    shown = [text.text for text in picture.iter(SVG + "text")]
    assert "<script>alert(1)</script>" in shown and "⏎" in shown and "<b>&" in shown


def test_marks_and_bars_stand_under_their_tokens():
    marked = {"anchors": [0, 1, 0], "preplan": [0, 0, 1], "gamma": [1, 1.5, 1]}
    svg = rhythm_svg(["a", "b", "c"], [0, 5, 10], [0.1, 0.4, 0], **marked)
    groups = [g for g in ElementTree.fromstring(svg).iter(SVG + "g") if g.find(SVG + "title") is not None]
    assert [[e.get("class") for e in g if e.get("class")] for g in groups] == [[], ["anchor"], ["preplan"]]
    heights = [[float(e.get("height")) for e in g.findall(SVG + "rect") if not e.get("class")] for g in groups]
    assert heights == [[0, 4], [8, 16], [16, 0]]
    assert groups[1].find(SVG + "title").text == "b: waad 5, fai 0.4, gamma 1.5"


def test_long_completions_wrap_within_the_width():
    picture = drawn(["token"] * 100, width=300)
    right = [float(r.get("x")) + float(r.get("width")) for r in picture.iter(SVG + "rect") if r.get("x")]
    assert max(right) <= 300 and float(picture.get("height")) > 500


def test_lengths_that_differ_are_refused():
    with pytest.raises(RlError, match="fai has 1 values for 2 tokens"):
        rhythm_svg(["a", "b"], [1, 2], [1])
    with pytest.raises(RlError, match="needs a token"):
        rhythm_svg([], [], [])


class Letters:
    """A tokenizer of one token a character."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(c) % 100 for c in text]}

    def decode(self, ids):
        return chr(ids[0] + (0 if ids[0] >= 32 else 100))


def tiny():
    torch.manual_seed(0)
    options = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=128, **options)).train()


def test_a_completion_is_drawn_from_the_models_own_attention():
    model = tiny()
    svg = draw_completion(model, Letters(), "what?", "x" * 10 + "y" * 30, TokenCredit(horizon=(2, 9)), title="one")
    marks = [e.get("class") for e in ElementTree.fromstring(svg).iter() if e.get("class")]
    assert marks.count("anchor") == marks.count("preplan") == 16  # 0.4 of 40
    assert "gamma 1.5" in svg and model.training


def test_excluded_tokens_are_not_marked():
    credit = TokenCredit(horizon=(2, 9), exclude_ids=(ord("y") % 100,))
    groups = ElementTree.fromstring(draw_completion(tiny(), Letters(), "what?", "xyzy" * 10, credit)).iter(SVG + "g")
    marked, gammas = {}, {}
    for group in groups:
        if (told := group.find(SVG + "title")) is not None:
            letter = told.text[0]
            marked[letter] = marked.get(letter, 0) + sum(e.get("class") is not None for e in group)
            gammas.setdefault(letter, set()).add(told.text.split()[-1])
    assert marked["y"] == 0 and gammas["y"] == {"1"}
    assert marked["x"] + marked["z"] == 32 and len(gammas["x"] | gammas["z"]) > 1
