"""clmfast/data/grammar.py against re, sets of strings and interegular; its draws against their probabilities."""

import re
from collections import Counter
from itertools import pairwise, product

import interegular
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from clmfast.data.grammar import Grammar, GrammarError, common_string

PRINTABLE = "".join(map(chr, range(0x20, 0x7F)))
TYPICAL = "(ab|c[de]{1,3})f?[gh]{2}(xy|z)"


def brute_force(pattern: str, max_length: int, letters: str) -> list[str]:
    """All strings over `letters` that re matches in full, shortest first, then by code point."""
    matcher = re.compile(pattern, re.ASCII)
    texts = ("".join(text) for n in range(max_length + 1) for text in product(sorted(letters), repeat=n))
    return [text for text in texts if matcher.fullmatch(text)]


def decoded(codes: np.ndarray, offset: np.ndarray) -> list[str]:
    return ["".join(map(chr, codes[a:b])) for a, b in pairwise(offset)]


def draws(grammar: Grammar, n: int, seed: int, mode: str) -> Counter[str]:
    return Counter(decoded(*grammar.sample_codes(n, seed, mode)))


def assert_distribution(count: Counter, probability: dict) -> None:
    """Chi-square test at 1e-3; the seeds are fixed, so it passes always or never."""
    assert set(count) <= set(probability)
    n = sum(count.values())
    expected = np.array([probability[key] * n for key in probability])
    assert chisquare([count[key] for key in probability], expected).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------- the language


@pytest.mark.parametrize(
    ("pattern", "max_length", "expected"),
    [
        ("abc", 3, ["abc"]),
        ("", 3, [""]),
        ("^$", 0, [""]),
        ("a[cb]", 24, ["ab", "ac"]),
        ("a|bc||a", 24, ["", "a", "bc"]),
        ("(?:ab?)+", 3, ["a", "aa", "ab", "aaa", "aab", "aba"]),
        ("b{,2}a{1,}", 3, ["a", "aa", "ba", "aaa", "baa", "bba"]),
        ("(?P<x>[é-ì\U0001f600])", 1, ["é", "ê", "ë", "ì", "\U0001f600"]),
        ("((a*)*|(b|)*)*", 1, ["", "a", "b"]),
        ("(((){9999}){9999}){9999}a", 1, ["a"]),
    ],
)
def test_small_languages_by_hand(pattern: str, max_length: int, expected: list[str]) -> None:
    grammar = Grammar(pattern, max_length)
    assert list(grammar.strings()) == expected
    assert grammar.size == len(expected)
    assert grammar.sample(len(expected), 0, "enumerate") == expected
    assert grammar.alphabet == "".join(sorted(set("".join(expected))))


SYNTAX = r"""
    a{ { a{} {}a a{b a{1 a{, a{1,b} a{,2} a{,} a{2} a{0} (a|b){2,3}
    []a] [^]a] [a-] [-a] []-a] [a^] [a\-c] [a-b-c] [{}|] ] } - [.] [$] [\]a] [\b]
    . \d \w \s \D \W \S [\d-] [^\d] [^\W] [\s\w]
    \t \n \x61 \u0061 \U00000061 [\x61-c] \. \{2} \\ \^ a\$ \-
    ^a$ ^a|b$ a|$ ^ a*? a+?b a?? a{1,2}? a| |a (|a)b () (?:) (?P<n>a)b
    (a*)* (a|)*b ((a|b){,2}a)* (a?){3} (?:a+)+
"""


@pytest.mark.parametrize("pattern", [*SYNTAX.split(), "a{ 1}", "[ -,]"])
def test_reads_syntax_as_re_does(pattern: str) -> None:
    grammar = Grammar(pattern, 8)
    texts = {"".join(text) for n in range(4) for text in product("ab{}1, ", repeat=n)}
    texts |= {*PRINTABLE, *"\t\n\v\f\r\b\x1c", "a{1,b}", "a{ 1}", "{2}", "a$"}
    expected = {text for text in texts if re.fullmatch(pattern, text, re.ASCII)}
    if pattern in (".", "[^]a]", "[^\\d]", "\\D", "\\W", "\\S"):  # the documented difference: printable ASCII only
        expected -= {*"\t\n\v\f\r\b\x1c"}
    assert {text for text in texts if grammar.matches(text)} == expected
    assert expected


@pytest.mark.parametrize(("pattern", "size"), [(".", 95), ("[^a-z]", 69), ("\\D", 85), ("\\W", 32), ("\\S", 94)])
def test_open_sets_are_printable_ascii(pattern: str, size: int) -> None:
    grammar = Grammar(pattern, 1)
    assert grammar.size == size
    assert grammar.alphabet == "".join(char for char in PRINTABLE if re.fullmatch(pattern, char))
    assert not grammar.matches("é")
    assert not grammar.matches("\n")


def test_space_is_the_space_of_re_ascii() -> None:
    assert Grammar("\\s", 1).alphabet == "\t\n\v\f\r "


@pytest.mark.parametrize(
    ("pattern", "max_length", "size", "is_truncated"),
    [
        ("a*", 3, 4, True),
        ("a{2}", 2, 1, False),
        ("a{0,3}", 3, 4, False),
        ("a{0,3}", 2, 3, True),
        ("b|a{3}", 2, 1, True),
        ("(ab{9})*", 5, 1, True),  # the next string is 5 characters too long, not one
        ("(ab{9})*", 12, 2, True),
        ("(a|b)*", 0, 1, True),
        ("[a-z]{1,40}", 40, sum(26**n for n in range(1, 41)), False),
        ("[a-z]{1,41}", 40, sum(26**n for n in range(1, 41)), True),
        (TYPICAL, 24, (1 + 2 + 4 + 8) * 2 * 4 * 2, False),
        (".*a.{3}", 4, 95**3, True),
    ],
)
def test_size_and_truncation(pattern: str, max_length: int, size: int, is_truncated: bool) -> None:
    grammar = Grammar(pattern, max_length)
    assert type(grammar.size) is int
    assert (grammar.size, grammar.is_truncated) == (size, is_truncated)


def test_max_length_bounds_everything() -> None:
    grammar = Grammar("ab|cdefg|h*", 3)
    assert grammar.alphabet == "abh"
    assert not grammar.matches("cdefg")
    assert not grammar.matches("hhhh")
    assert list(grammar.strings()) == ["", "h", "ab", "hh", "hhh"]


LONGEST = 4
Language = frozenset[str]  # a language's strings of at most LONGEST characters
REPEATS = {"": (1, 1), "?": (0, 1), "{2}": (2, 2), "{,2}": (0, 2), "{1,3}": (1, 3), "{,2}?": (0, 2)}
REPEATS |= {"*": (0, LONGEST), "+": (1, LONGEST), "{2,}": (2, LONGEST), "*?": (0, LONGEST)}  # more copies add nothing
LEAVES = {"a": "a", "b": "b", "c": "c", "[ab]": "ab", "[a-c]": "abc"}


def joined(parts: list[tuple[str, Language]]) -> tuple[str, Language]:
    language: Language = frozenset([""])
    for _, part in parts:
        language = frozenset(x + y for x in language for y in part if len(x + y) <= LONGEST)
    return "".join(pattern for pattern, _ in parts), language


def repeated(parts: list[tuple[str, Language]], repeat: str) -> tuple[str, Language]:
    either = frozenset[str]().union(*(part for _, part in parts))
    least, most = REPEATS[repeat]
    return f"({'|'.join(pattern for pattern, _ in parts)}){repeat}", frozenset().union(
        *(joined([("", either)] * n)[1] for n in range(least, most + 1))
    )


def extended(inner: st.SearchStrategy) -> st.SearchStrategy:
    choices = st.lists(inner | st.just(("", frozenset([""]))), min_size=1, max_size=3)
    sequences = st.lists(inner, min_size=1, max_size=3).map(joined)
    return st.one_of(sequences, st.builds(repeated, choices, st.sampled_from(sorted(REPEATS))))


PATTERNS = st.recursive(
    st.sampled_from([(pattern, frozenset(chars)) for pattern, chars in LEAVES.items()]), extended, max_leaves=8
)
# `re` backtracks: repetitions inside repetitions cost it hours. It judges those without, the sets above all others.
WORDS = st.lists(st.sampled_from(sorted(LEAVES)), min_size=1, max_size=3).map("".join)
GROUPS = st.builds(
    "({}){}".format, st.lists(WORDS, min_size=1, max_size=3).map("|".join), st.sampled_from(sorted(REPEATS))
)
FLAT_PATTERNS = st.lists(st.lists(WORDS | GROUPS, max_size=3).map("".join), min_size=1, max_size=2).map("|".join)


def assert_language(pattern: str, expected: list[str]) -> None:
    """`expected`: all strings over a, b, c of at most LONGEST characters, in the order of strings()."""
    if not expected:
        with pytest.raises(GrammarError, match=f"must have a string of at most {LONGEST} characters"):
            Grammar(pattern, LONGEST)
        return
    grammar = Grammar(pattern, LONGEST)
    assert list(grammar.strings()) == expected
    assert grammar.size == len(expected)
    assert grammar.alphabet == "".join(sorted(set("".join(expected))))
    assert grammar.is_truncated == (Grammar(pattern, 100).size > grammar.size)
    assert [
        text for n in range(LONGEST + 1) for text in map("".join, product("abc", repeat=n)) if grammar.matches(text)
    ] == expected


@settings(max_examples=100, deadline=None)
@given(PATTERNS)
def test_random_pattern_agrees_with_sets(pattern: tuple[str, Language]) -> None:
    assert_language(pattern[0], sorted(pattern[1], key=lambda text: (len(text), text)))


@settings(max_examples=100, deadline=None)
@given(FLAT_PATTERNS)
def test_random_pattern_agrees_with_re(pattern: str) -> None:
    assert_language(pattern, brute_force(pattern, LONGEST, "abc"))


@settings(max_examples=60, deadline=None)
@given(FLAT_PATTERNS, st.integers(0, 2**32), st.data())
def test_random_pattern_samples_are_distinct_strings_of_it(pattern: str, seed: int, data: st.DataObject) -> None:
    grammar = Grammar(pattern, 18)
    without = grammar.sample(min(3, grammar.size - 1), seed)
    n = data.draw(st.integers(0, min(30, grammar.size - len(without))))
    for mode in ("uniform", "branch", "enumerate"):
        texts = grammar.sample(n, seed, mode, without)
        assert len(texts) == len(set(texts)) == n
        assert not set(texts) & set(without)
        assert all(len(text) <= 18 and re.fullmatch(pattern, text) for text in texts)
        assert texts == Grammar(pattern, 18).sample(n, seed, mode, without)


# ------------------------------------------------------------------------------------------- languages in common


@settings(max_examples=100, deadline=None)
@given(PATTERNS, PATTERNS)
def test_common_string_is_the_first_one(a: tuple[str, Language], b: tuple[str, Language]) -> None:
    short_a = {text for text in a[1] if len(text) < LONGEST}
    if short_a and b[1]:
        expected = min(short_a & b[1], key=lambda text: (len(text), text), default=None)
        assert common_string(Grammar(a[0], LONGEST - 1), Grammar(b[0], LONGEST)) == expected


@settings(max_examples=60, deadline=None)
@given(PATTERNS, PATTERNS)
def test_disjoint_as_interegular_says(a: tuple[str, Language], b: tuple[str, Language]) -> None:
    fsm_a, fsm_b = (
        interegular.parse_pattern(pattern.replace("}?", "}").replace("*?", "*")).to_fsm() for pattern, _ in (a, b)
    )
    common = common_string(Grammar(a[0], 300), Grammar(b[0], 300))
    assert (common is None) == fsm_a.isdisjoint(fsm_b)
    assert common is None or (fsm_a.accepts(common) and fsm_b.accepts(common))


@pytest.mark.parametrize(
    ("pattern_a", "pattern_b", "expected"),
    [
        ("[a-m]x", "[k-z]x", "kx"),
        ("a[b-d]e", "a[f-h]e", None),
        ("[a-z]{5}", "[a-z]{6}", None),
        ("[a-cx-z]", "[d-wy]", "y"),
        (TYPICAL, "[a-c].{3}", None),
        (".*", "\\w+", "0"),
        ("a*", "(aaa)*(aaaaa)", "aaaaa"),
        ("(aa)+", "(aaa)+", "aaaaaa"),
    ],
)
def test_common_string_by_hand(pattern_a: str, pattern_b: str, expected: str | None) -> None:
    assert common_string(Grammar(pattern_a, 24), Grammar(pattern_b, 24)) == expected
    assert common_string(Grammar(pattern_b, 24), Grammar(pattern_a, 24)) == expected


def test_common_string_keeps_to_both_lengths() -> None:
    assert common_string(Grammar("a+", 24), Grammar("a{5}|b", 24)) == "aaaaa"
    assert common_string(Grammar("a+", 4), Grammar("a{5}|b", 24)) is None
    assert common_string(Grammar("a{5}|b", 24), Grammar("a+", 4)) is None


# -------------------------------------------------------------------------------------------------------- draws


def test_uniform_counts_strings_and_branch_counts_branches() -> None:
    grammar = Grammar("(a|b[c-z]{3})x", 24)
    assert grammar.size == 24**3 + 1 == 13825
    n = 13825 * 40
    n_ax = {mode: (np.diff(grammar.sample_codes(n, 1, mode)[1]) == 2).sum() for mode in ("uniform", "branch")}
    assert abs(n_ax["uniform"] - 40) < 5 * 40**0.5
    assert abs(n_ax["branch"] - n / 2) < 5 * (n / 4) ** 0.5


@pytest.mark.parametrize("pattern", [TYPICAL, "[a-cx]{0,3}", "(a|b)*", "(a|aa|aaa)(b|ab)"])
def test_uniform_is_uniform(pattern: str) -> None:
    grammar = Grammar(pattern, 8)
    count = draws(grammar, grammar.size * 100, 3, "uniform")
    assert_distribution(count, dict.fromkeys(grammar.strings(), 1 / grammar.size))


def test_uniform_beyond_64_bits() -> None:
    grammar = Grammar("[a-z]{1,40}", 40)
    codes, offset = grammar.sample_codes(20_000, 5)
    lengths = Counter(np.diff(offset).tolist())
    share = {n: 26**n / grammar.size for n in range(37, 41)}
    assert_distribution(Counter({n: lengths[n] for n in share}), {n: p / sum(share.values()) for n, p in share.items()})
    letters = Counter(codes.tolist())
    assert_distribution(letters, dict.fromkeys(range(ord("a"), ord("z") + 1), 1 / 26))
    assert len(set(grammar.sample(1000, 5))) == 1000


@pytest.mark.parametrize(
    ("pattern", "max_length", "probability"),
    [
        ("a{2,6}", 24, {"a" * n: 1 / 5 for n in range(2, 7)}),
        ("a|[bcd]|", 24, {"": 1 / 3, "a": 1 / 3, "b": 1 / 9, "c": 1 / 9, "d": 1 / 9}),
        ("[ad-f]", 24, dict.fromkeys("adef", 1 / 4)),
        ("ab?", 24, {"a": 1 / 2, "ab": 1 / 2}),
        ("(a|b?)", 24, {"a": 1 / 2, "b": 1 / 4, "": 1 / 4}),
        ("a+", 5, {"a" * n: 2.0 ** (5 - n) / 31 for n in range(1, 6)}),  # longer ones are drawn again
        ("a{2,}", 4, {"aa": 4 / 7, "aaa": 2 / 7, "aaaa": 1 / 7}),
        ("(a|b{3}){0,1}", 2, {"": 2 / 3, "a": 1 / 3}),
    ],
)
def test_branch_probabilities(pattern: str, max_length: int, probability: dict[str, float]) -> None:
    assert_distribution(draws(Grammar(pattern, max_length), 20_000, 7, "branch"), probability)


@pytest.mark.parametrize("n", [2, 3])  # of 5: 2 are drawn until they differ, 3 are picked from the list
def test_distinct_uniform_sample_is_a_uniform_subset(n: int) -> None:
    grammar = Grammar("[a-e]|zz", 24)
    count = Counter(tuple(grammar.sample(n, seed, "uniform", ["zz"])) for seed in range(3000))
    orders = [order for order in product("abcde", repeat=n) if len(set(order)) == n]
    assert_distribution(count, {order: 1 / len(orders) for order in orders})


def test_branch_sample_starts_with_the_likely() -> None:
    grammar = Grammar("a|b[c-z]{3}", 24)
    first = Counter(grammar.sample(2, seed, "branch")[0] == "a" for seed in range(2000))
    assert_distribution(first, {True: 1 / 2, False: 1 / 2})


@pytest.mark.parametrize("mode", ["uniform", "branch", "enumerate"])
def test_whole_language_can_be_asked_for(mode: str) -> None:
    grammar = Grammar(TYPICAL, 24)
    assert sorted(grammar.sample(grammar.size, 3, mode)) == sorted(grammar.strings())
    without = [*grammar.sample(200, 4), "no such string"]
    rest = grammar.sample(grammar.size - 200, 3, mode, without)
    assert sorted([*rest, *without[:-1]]) == sorted(grammar.strings())


def test_large_share_is_listed_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar("[a-j]{4}", 24)
    monkeypatch.setattr(Grammar, "_draw", None)  # the last string of 10 000 would take as many draws
    assert set(grammar.sample(10_000, 0)) == set(grammar.strings())


def test_branch_finds_strings_it_would_never_draw() -> None:
    depth = 90
    grammar = Grammar("(a|b" * depth + "c" + ")" * depth, 100)  # the longest has probability 2**-90
    texts = grammar.sample(depth + 1, 0, "branch")
    assert sorted(texts, key=len) == [*("b" * n + "a" for n in range(depth)), "b" * depth + "c"]


def test_enumerate_is_the_start_of_strings() -> None:
    assert Grammar("[a-z]{1,40}", 40).sample(4, 0, "enumerate", {"b", "zz"}) == ["a", "c", "d", "e"]


def test_sample_codes_layout() -> None:
    grammar = Grammar("[é-ì]\U0001f600?|", 24)
    codes, offset = grammar.sample_codes(500, 2)
    assert (codes.dtype, offset.dtype) == (np.uint32, np.int64)
    assert (offset[0], offset[-1], offset.shape) == (0, codes.size, (501,))
    assert set(decoded(codes, offset)) == set(grammar.strings())
    codes, offset = grammar.sample_codes(0, 2)
    assert (codes.size, offset.tolist()) == (0, [0])


def test_long_strings_outgrow_the_first_buffer() -> None:
    codes, offset = Grammar("[ab]{300}", 300).sample_codes(50, 0)
    assert offset.tolist() == list(range(0, 50 * 300 + 1, 300))
    assert 0.45 < (codes == ord("a")).mean() < 0.55
    assert set(codes.tolist()) == {ord("a"), ord("b")}


def test_draws_never_change() -> None:
    """Runs are compared by seed, so these strings are part of the interface: a change of them is a new version."""
    grammar = Grammar(TYPICAL, 24)
    assert grammar.sample(4, 0) == ["cdehhxy", "ceeeghz", "cddfhhz", "abfhhxy"]
    assert grammar.sample(4, 0, "branch") == ["cddefhhz", "cdhgz", "cddfhhxy", "cefhgxy"]
    assert grammar.sample(120, 0)[:4] != grammar.sample(120, 1)[:4]


# ----------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("a(?=b)", r"'\(\?=b' at position 1: lookaround"),
        ("a(?!b)", r"'\(\?!b' at position 1: lookaround"),
        ("(?<=b)a", r"'\(\?<=' at position 0: lookaround"),
        ("(?<!b)a", r"'\(\?<!' at position 0: lookaround"),
        ("(a)\\1", r"'\\\\1' at position 3: backreferences"),
        ("(?P<n>a)(?P=n)", r"'\(\?P=' at position 8: backreference"),
        ("\\01", r"'\\\\0' at position 0: .*octal"),
        ("[\\1]", r"'\\\\1' at position 1: .*octal"),
        ("(?i)a", r"'\(\?i\)' at position 0: inline flag"),
        ("(?i:a)", r"'\(\?i:' at position 0: inline flag"),
        ("(a)(?(1)b|c)", r"at position 3: conditional group"),
        ("(?>a)", r"at position 0: atomic group"),
        ("a(?#b)", r"at position 1: comment"),
        ("a\\b", r"'\\\\b' at position 1: boundaries"),
        ("a\\B", r"'\\\\B' at position 1: boundaries"),
        ("\\Aa", r"'\\\\A' at position 0: boundaries"),
        ("a\\Z", r"'\\\\Z' at position 1: boundaries"),
        ("a**", r"'\*' at position 2: a repetition cannot follow"),
        ("a{2}{3}", r"'\{3\}' at position 4: a repetition cannot follow"),
        ("a*??", r"'\?' at position 3: a repetition cannot follow"),
        ("a++", r"'\+' at position 2: .*possessive"),
        ("*a", r"'\*' at position 0: .*something before it"),
        ("^*", r"'\*' at position 1: .*something before it"),
        ("(|?)", r"'\?' at position 2: .*something before it"),
        ("{2}", r"'\{2\}' at position 0: .*something before it"),
        ("a{3,2}", r"'\{3,2\}' at position 1: .*m <= n"),
        ("a{20000}", r"'\{20000\}' at position 1: a repetition count must be at most 10000"),
        ("a{,99999999999999999999}", r"at position 1: a repetition count must be at most 10000"),
        ("a^b", r"'\^' at position 1: an anchor"),
        ("a$b", r"'\$' at position 1: an anchor"),
        ("(a$)", r"'\$' at position 2: an anchor"),
        ("(a", r"'\(' at position 0: .*never closed"),
        ("a)b", r"'\)' at position 1: closes a group"),
        ("[a", r"'\[' at position 0: .*never closed"),
        ("[]", r"'\[' at position 0: .*never closed"),
        ("x[b-a]", r"'b-a' at position 2: a range"),
        ("[a-\\d]", r"'a-\\\\d' at position 1: a range"),
        ("[\\w-z]", r"'\\\\w-z' at position 1: a range"),
        ("x[^ -~]", r"'\[\^ -~\]' at position 1: a negated class"),
        ("\\q", r"'\\\\q' at position 0: not an escape"),
        ("a\\", r"'\\\\' at position 1: not an escape"),
        ("\\x6", r"at position 0: not an escape"),
        ("\\U00110000", r"at position 0: not an escape"),
        ("(?P<1>a)", r"'\(\?P<1>' at position 0: a group name"),
        ("(?P<n>a)(?P<n>b)", r"'\(\?P<n>' at position 8: a group name"),
        ("(" * 101 + ")" * 101, r"'\(' at position 100: groups must be at most 100 deep"),
        ("a{25}", r"must have a string of at most 24 characters, it has none"),
        ("(a{1000}){1000}", r"must have at most 10000 states"),
        ("((|){99}){9999}", r"must have at most 10000 states"),
        ("(a|b)*a(a|b){18}", r"must have a DFA of at most 10000 states"),
    ],
)
def test_refused_patterns(pattern: str, said: str) -> None:
    with pytest.raises(GrammarError, match=rf"^grammar .*: .*{said}") as caught:
        Grammar(pattern, 24)
    assert "\n" not in str(caught.value)


def test_newline_in_a_refused_pattern_stays_on_one_line() -> None:
    with pytest.raises(GrammarError, match=r"^grammar '\\n\(': '\(' at position 1: this group is never closed$"):
        Grammar("\n(", 24)


def test_ambiguous_pattern_is_refused_before_it_takes_long() -> None:
    with pytest.raises(GrammarError, match="built in 3000000 steps"):
        Grammar("(.?){1000}x", 1000)


def test_count_table_has_a_limit() -> None:
    with pytest.raises(GrammarError, match="1001 states times lengths up to 1000 must be at most 500000"):
        Grammar("a{0,1000}", 1000)


@pytest.mark.parametrize("max_length", [-1, 1001])
def test_refused_max_length(max_length: int) -> None:
    with pytest.raises(GrammarError, match=rf"max_length must be in \[0, 1000\], got {max_length}"):
        Grammar("a*", max_length)


def test_more_than_the_language_has() -> None:
    grammar = Grammar("a[bc]", 24)
    said = r"^grammar 'a\[bc\]': 40 distinct instructions asked for, the language has 2 of at most 24 characters$"
    for mode in ("uniform", "branch", "enumerate"):
        with pytest.raises(GrammarError, match=said):
            grammar.sample(40, 0, mode)
    with pytest.raises(GrammarError, match=r"2 distinct .* has 2 of at most 24 characters, 1 of them ruled out"):
        grammar.sample(2, 0, without=["ab", "xy"])
    with pytest.raises(GrammarError, match="-1 distinct"):
        grammar.sample(-1, 0)


def test_unknown_mode() -> None:
    with pytest.raises(GrammarError, match="mode must be uniform, branch or enumerate, got 'fair'"):
        Grammar("a", 1).sample(1, 0, "fair")
    with pytest.raises(GrammarError, match="mode must be uniform or branch, got 'enumerate'"):
        Grammar("a", 1).sample_codes(1, 0, "enumerate")


def test_branch_draws_that_hardly_ever_fit() -> None:
    grammar = Grammar("a{0,2000}", 3)  # a branch draw fits with probability 4 / 2001
    with pytest.raises(GrammarError, match="at least 1 in 100 branch draws must have at most 3 characters"):
        grammar.sample_codes(1000, 0, "branch")
    assert sorted(grammar.sample(4, 0)) == ["", "a", "aa", "aaa"]
