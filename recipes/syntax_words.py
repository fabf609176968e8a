"""PyYAML's syntax errors in words on which a person can act."""

import re

import yaml

_SYNTAX = {  # what PyYAML says -> what a person can act on; {0} is a group, {line} where the construct begins
    r"found character '\\t'": "a tab cannot indent; use spaces",
    r"found character (.+) that cannot start": "a value cannot begin with {0}; put it in quotes",
    r"mapping values are not allowed": "a ': ' cannot stand here; put the value in quotes or indent it",
    r"sequence entries are not allowed": "a list item '- ' cannot stand here; begin a new line for it",
    r"mapping keys are not allowed": "a '? ' cannot stand here; put the value in quotes",
    r"expected <block end>": "this does not fit the block of line {line}; check indentation and quotes",
    r"expected ',' or '(.)'": "a ',' or '{0}' is missing; the bracket was opened in line {line}",
    r"undefined alias '(.*)'": "there is no anchor &{0} above; put the value in quotes if it is text",
    r"second occurrence": "this anchor was already given in line {line}; choose another name",
    r"found another document": "a file holds one recipe; remove this second document",
    r"expected '<document start>'": "this does not fit what stands above; check brackets and indentation",
    r"expected the node content": "a value is missing here",
    r"incompatible YAML document": "only YAML 1 is read; remove the line %YAML",
    r"undefined tag handle": "tags (!name) are not allowed; put the value in quotes if it is text",
    r"unknown escape character (.+)": "{0} after a backslash is not an escape; use single quotes",
    r"expected escape sequence": "this escape needs more digits; use single quotes if none is meant",
}


_UNFINISHED = {  # reported where the construct begins, not where PyYAML gives up
    r"could not find expected ':'": "a key must stand here, and no ': ' follows this text",
    r"unexpected (end of stream|document sep)": "the quoted text that begins here is never closed",
}
_CONSTRUCTS = {
    "directive": "a line that begins with '%' is not allowed here; put the text in quotes",
    "block scalar": "after '|' or '>' only '+', '-', a digit from 1 to 9 or a comment may stand in the line",
    "alias": "'*' begins an alias, and no name of one follows; put the value in quotes",
    "anchor": "'&' begins an anchor, and no name of one follows; put the value in quotes",
    "tag": "'!' begins a tag, and tags are not allowed; put the value in quotes",
}


def plain_words(error: yaml.MarkedYAMLError, last: yaml.Mark) -> tuple[yaml.Mark, str]:
    """Where the mistake stands, and what it is; `last` is how far PyYAML came, for errors that do not say."""
    mark = error.problem_mark or last
    begin = error.context_mark or mark
    problem, context = str(error.problem), error.context or ""
    for pattern, words in _UNFINISHED.items():
        if re.search(pattern, problem):
            return begin, words
    for pattern, words in _SYNTAX.items():
        match = re.search(pattern, problem)
        if match:
            return mark, words.format(*match.groups(), line=begin.line + 1)
    for construct, words in _CONSTRUCTS.items():
        if context.endswith(construct):
            return mark, words
    return mark, re.sub(r"'?<(.+?)>'?", r"\1", problem).replace("'\\x00'", "the end of the file")
