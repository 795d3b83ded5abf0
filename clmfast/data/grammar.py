r"""Grammars: a regular expression read as the finite set of its strings, counted exactly and drawn from fairly.

    pattern -> pieces (_Parser) -> weighted NFA (_add_nodes) -> DFA (_determinise) -> counts (_count) -> walk (_walk)

A `Grammar` holds the strings of at most `max_length` characters that `re.fullmatch(pattern, text)` accepts, where
`.`, `[^...]`, `\D`, `\W` and `\S` stand for printable ASCII (0x20-0x7e) only, so that they are finite, and
`\d`, `\w` and `\s` are the sets of `re.ASCII`. Taken are: any other literal, escapes (`\t`, `\x41`, `\u00e9`), classes,
groups (plain, `(?:`, `(?P<n>`), `|`, `? * + {m} {m,} {,n} {m,n}` and their lazy forms (`a*?` has the language of `a*`),
`^` and `$` at the very ends of the pattern. Everything else is refused: a GrammarError names it and its position.

Draws are a pure function of the pattern, max_length and the arguments, on every machine: the only random numbers are
the float64 uniforms of numpy's PCG64, and probabilities are ratios of exact integers, rounded once.
"""

import re
from collections.abc import Collection, Iterator, Set
from functools import cached_property
from itertools import islice, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from clmfast.data.compiled import compiled
from clmfast.untrusted import shown

MAX_STATES = 10_000  # nodes of the NFA, states of the DFA, and the largest count in {m,n}
MAX_EDGES = 500_000  # of the NFA: a range of characters each, or a choice; 60 MB
MAX_MOVES = 3_000_000  # (NFA node, character range) pairs looked at to build one DFA: half a second to a second
MAX_LENGTH = 1_000  # largest max_length: the count table holds integers of that many digits
MAX_COUNTS = 500_000  # entries of the count table, states x (longest length + 1)
MAX_PATTERN = 20_000  # characters of a pattern
MAX_CODES = 3_000_000  # characters of all classes of a pattern together: about a second
MAX_PAIRS = 1_000_000  # pairs of DFA states that common_string looks at: two or three seconds
MAX_DEPTH = 100  # groups inside each other: stays clear of Python's recursion limit
BRANCH_BATCHES = 20  # batches of `branch` draws before sample() fills up uniformly
MIN_FIT = 100  # `branch` gives up when fewer than about 1 in MIN_FIT draws keep to max_length

Edge = tuple[int, int, int, int]  # (weight, low, width, target): one of `width` characters from `low` on; width 0: none
Move = tuple[int, int, int]  # (low, width, target) in a DFA, sorted by low, not overlapping


class GrammarError(ValueError):
    """The pattern is not a grammar we can draw from, or more was asked of it than its language holds."""


# ---------------------------------------------------------------------------------------------------- parsing


class _Chars(NamedTuple):
    spans: list[tuple[int, int]]  # (low, width): `width` characters from code point `low` on; sorted, with gaps between


class _Sequence(NamedTuple):
    parts: "list[_Piece]"


class _Choice(NamedTuple):
    parts: "list[_Piece]"


class _Repeat(NamedTuple):
    part: "_Piece"
    least: int
    most: int | None  # None: no limit


_Piece = _Chars | _Sequence | _Choice | _Repeat

_SIMPLE_BOUNDS: dict[str, tuple[int, int | None]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}
_BRACES = re.compile(r"\{([0-9]*)(,?)([0-9]*)\}")
_GROUP = re.compile(r"\((?:\?:|\?P<([^>]*)>|(?!\?))")
_REFUSED_GROUPS = {
    "lookaround": ("(?=", "(?!", "(?<=", "(?<!"),
    "backreference": ("(?P=",),
    "conditional group": ("(?(",),
    "atomic group": ("(?>",),
    "comment": ("(?#",),
    "inline flag or unknown group": ("(?",),
}
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([^0-9A-Za-z]))", re.DOTALL)
_CONTROL = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "a": 7}

_PRINTABLE = frozenset(range(0x20, 0x7F))
_SETS = {"d": frozenset(b"0123456789"), "s": frozenset(b" \t\n\v\f\r")}
_SETS["w"] = frozenset(code for code in _PRINTABLE if chr(code).isalnum() or chr(code) == "_")
_SETS |= {name.upper(): _PRINTABLE - codes for name, codes in _SETS.items()}


def _chars(codes: Set[int]) -> _Chars:
    """The piece that matches one character out of `codes`."""
    spans: list[tuple[int, int]] = []
    for code in sorted(codes):
        if spans and sum(spans[-1]) == code:
            spans[-1] = (spans[-1][0], spans[-1][1] + 1)
        else:
            spans.append((code, 1))
    return _Chars(spans)


class _Parser:
    """Recursive descent over a pattern, which it reads as Python's `re` does. Each method starts at position `at`."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0
        self.depth = 0  # open groups
        self.n_codes = 0  # characters of the classes so far
        self.names: set[str] = set()

    def refuse(self, start: int, end: int, why: str) -> GrammarError:
        return GrammarError(f"{shown(self.pattern[start:end])} at position {start}: {why}")

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def parse(self) -> _Piece:
        self.at = int(self.peek() == "^")
        piece = self.alternatives()
        if self.peek():
            raise self.refuse(self.at, self.at + 1, "closes a group that was never opened")
        return piece

    def alternatives(self) -> _Piece:
        parts = [self.sequence()]
        while self.peek() == "|":
            self.at += 1
            parts.append(self.sequence())
        return _Choice(parts) if len(parts) > 1 else parts[0]

    def sequence(self) -> _Piece:
        parts: list[_Piece] = []
        while self.peek() not in ("", "|", ")"):
            if self.peek() == "$" and self.at == len(self.pattern) - 1:
                self.at += 1
                break
            start = self.at
            if self.bounds():
                raise self.refuse(start, self.at, "a repetition needs something before it to repeat")
            piece = self.atom()
            if bounds := self.bounds():
                piece = _Repeat(piece, *bounds)
                self.at += self.peek() == "?"  # lazy: tried in another order, the same language
                start = self.at
                if self.bounds():
                    raise self.refuse(start, self.at, "a repetition cannot follow a repetition, possessive or not")
            parts.append(piece)
        return parts[0] if len(parts) == 1 else _Sequence(parts)

    def bounds(self) -> tuple[int, int | None] | None:
        """Reads a repetition: (least, most). Where there is none, reads nothing: None."""
        start = self.at
        if self.peek() in _SIMPLE_BOUNDS:
            self.at += 1
            return _SIMPLE_BOUNDS[self.pattern[start]]
        braces = _BRACES.match(self.pattern, start)
        if braces is None or braces[0] == "{}":
            return None
        self.at = braces.end()
        if any(len(count) > 9 or int(count or 0) > MAX_STATES for count in (braces[1], braces[3])):
            raise self.refuse(start, self.at, f"a repetition count must be at most {MAX_STATES}")
        least = int(braces[1] or 0)
        most = least if not braces[2] else int(braces[3]) if braces[3] else None
        if most is not None and most < least:
            raise self.refuse(start, self.at, "a repetition {m,n} must have m <= n")
        return least, most

    def atom(self) -> _Piece:
        start, char = self.at, self.peek()
        if char == "(":
            return self.group()
        if char == "[":
            return self.char_class()
        if char == "\\":
            return _chars(self.escape())
        if char in "^$":
            raise self.refuse(start, start + 1, "an anchor must be at the very start or end of the pattern")
        self.at += 1
        return _chars(_PRINTABLE if char == "." else {ord(char)})

    def group(self) -> _Piece:
        start = self.at
        head = _GROUP.match(self.pattern, start)
        if head is None:
            what = next(what for what, heads in _REFUSED_GROUPS.items() if self.pattern.startswith(heads, start))
            raise self.refuse(start, start + 4, f"{what} is not supported")
        self.at = head.end()
        if head[1] is not None:
            if not head[1].isidentifier() or head[1] in self.names:
                raise self.refuse(start, self.at, "a group name must be an identifier that is used once")
            self.names.add(head[1])
        if self.depth == MAX_DEPTH:
            raise self.refuse(start, self.at, f"groups must be at most {MAX_DEPTH} deep")
        self.depth += 1
        piece = self.alternatives()
        self.depth -= 1
        if self.peek() != ")":
            raise self.refuse(start, start + 1, "this group is never closed")
        self.at += 1
        return piece

    def char_class(self) -> _Piece:
        start = self.at
        negated = self.pattern.startswith("[^", start)
        first = self.at = start + 1 + negated
        codes: Set[int] = frozenset()
        while self.peek() != "]" or self.at == first:  # a `]` in first place is a member
            i_member = self.at
            member = self.member(start)
            if self.peek() == "-" and self.pattern[self.at + 1 : self.at + 2] not in ("", "]"):
                self.at += 1
                last = self.member(start)
                if len(member) > 1 or len(last) > 1 or min(member) > min(last):
                    raise self.refuse(i_member, self.at, "a range must go from one character up to another")
                member = frozenset(range(min(member), min(last) + 1))
            self.n_codes += len(member)
            if self.n_codes > MAX_CODES:
                raise self.refuse(start, self.at, f"classes must have at most {MAX_CODES} characters in all")
            codes |= member
        self.at += 1
        if negated:
            codes = _PRINTABLE - codes
        if not codes:
            raise self.refuse(start, self.at, "a negated class must leave a printable ASCII character")
        return _chars(codes)

    def member(self, start: int) -> Set[int]:
        """Reads one character or escape of the class that opened at `start`."""
        char = self.peek()
        if not char:
            raise self.refuse(start, start + 1, "this class is never closed")
        if char == "\\":
            return self.escape(in_class=True)
        self.at += 1
        return {ord(char)}

    def escape(self, in_class: bool = False) -> Set[int]:
        start, char = self.at, self.pattern[self.at + 1 : self.at + 2]
        self.at += 2
        if char in _SETS:
            return _SETS[char]
        if char in _CONTROL:
            code = _CONTROL[char]
        elif char == "b" and in_class:
            code = 8  # as in re: backspace inside a class, a boundary outside
        elif char and char in "bBAZ":
            raise self.refuse(start, self.at, "boundaries are not supported")
        elif char and char in "0123456789":
            raise self.refuse(start, self.at, "backreferences and octal escapes are not supported")
        elif found := _ESCAPE.match(self.pattern, start):
            self.at = found.end()
            code = ord(found[4]) if found[4] else int(found[1] or found[2] or found[3], 16)
        else:
            code = -1
        if not 0 <= code <= 0x10FFFF:
            raise self.refuse(start, self.at, "not an escape that stands for a character")
        return {code}


# ---------------------------------------------------------------------------------------------------- automata


def _add_nodes(nodes: list[list[Edge]], piece: _Piece, then: int, budget: list[int]) -> int:
    """Appends the NFA nodes of `piece`, whose matches go on at node `then`; returns the node it starts at.

    A node either spells one character (all its edges have width > 0) or chooses (all have width 0). The weights make a
    walk along them a draw in `branch` mode. `budget` holds how many edges there may still be. Node 0 is the end; every
    node leads there, since no class is empty.
    """

    def add(edges: list[Edge]) -> int:
        budget[0] -= len(edges)
        if len(nodes) >= MAX_STATES or budget[0] < 0:
            raise GrammarError(f"must have at most {MAX_STATES} states and {MAX_EDGES} edges: shorten its repetitions")
        nodes.append(edges)
        return len(nodes) - 1

    if isinstance(piece, _Chars):
        return add([(width, low, width, then) for low, width in piece.spans])
    if isinstance(piece, _Sequence):
        for part in reversed(piece.parts):
            then = _add_nodes(nodes, part, then, budget)
        return then
    if isinstance(piece, _Choice):
        return add([(1, 0, 0, _add_nodes(nodes, part, then, budget)) for part in piece.parts])
    if piece.most is None:
        loop = add([(1, 0, 0, then)])
        nodes[loop].append((1, 0, 0, _add_nodes(nodes, piece.part, loop, budget)))
        then = loop
    else:
        stop = then
        for n_left in range(1, piece.most - piece.least + 1):  # counts 0..n_left are still possible: stop with 1 share
            then = add([(1, 0, 0, stop), (n_left, 0, 0, _add_nodes(nodes, piece.part, then, budget))])
    for _ in range(piece.least):
        start = _add_nodes(nodes, piece.part, then, budget)
        if start == then:  # the part is empty, and so are all its copies
            break
        then = start
    return then


def _reach(nodes: list[list[Edge]]) -> list[int]:
    """Per node: the spelling nodes, and the end, that can be next when a walk stands there, as the bits of an int."""
    reach = [1 << i if not edges or edges[0][2] else 0 for i, edges in enumerate(nodes)]
    choices = [i for i, mask in enumerate(reach) if not mask]
    grows = True
    while grows:  # few rounds: edges lead to earlier nodes, save from a loop into its body
        grows = False
        for i in choices:
            mask = reach[i]
            for edge in nodes[i]:
                mask |= reach[edge[3]]
            grows |= mask != reach[i]
            reach[i] = mask
    return reach


def _determinise(nodes: list[list[Edge]], start: int, max_length: int) -> tuple[list[list[Move]], list[bool], bool]:
    """Subset construction: (moves of each DFA state, whether a string may end there, whether states were left out).

    States are found breadth-first from state 0; those more than max_length characters away are left out.
    """
    reach = _reach(nodes)
    # Cut the code points wherever some class starts or ends: between two cuts all classes agree.
    cuts = sorted({cut for edges in nodes for _, low, width, _ in edges if width for cut in (low, low + width)})
    i_cut = {cut: i for i, cut in enumerate(cuts)}
    spans = [[i for _, low, w, _ in edges if w for i in range(i_cut[low], i_cut[low + w])] for edges in nodes]

    states, number, moves = [reach[start]], {reach[start]: 0}, list[list[Move]]()
    is_cut, n_moves = False, 0
    for depth in range(max_length + 1):
        for state in states[len(moves) :]:
            goal: dict[int, int] = {}  # where each stretch between two cuts leads
            rest = state & ~1
            while rest:
                node = (rest & -rest).bit_length() - 1
                rest &= rest - 1
                n_moves += len(spans[node])
                for i in spans[node]:
                    goal[i] = goal.get(i, 0) | reach[nodes[node][0][3]]
            out: list[Move] = []
            for i, mask in sorted(goal.items()):
                if mask not in number:
                    if depth == max_length:
                        is_cut = True
                        continue
                    number[mask] = len(states)
                    states.append(mask)
                low, end, target = cuts[i], cuts[i + 1], number[mask]
                if out and out[-1][2] == target and out[-1][0] + out[-1][1] == low:
                    low = out.pop()[0]
                out.append((low, end - low, target))
            moves.append(out)
            if len(states) > MAX_STATES or n_moves > MAX_MOVES:
                raise GrammarError(f"must have a DFA of at most {MAX_STATES} states, built in {MAX_MOVES} steps")
    return moves, [bool(state & 1) for state in states], is_cut


def _has_walk(moves: list[list[Move]], n: int) -> bool:
    """Whether the DFA has a path of n moves from state 0."""
    layer = {0}
    for _ in range(n):
        layer = {target for state in layer for _, _, target in moves[state]}
        if not layer:
            break
    return bool(layer)


def _count(moves: list[list[Move]], ends: list[bool], max_length: int) -> list[list[int]]:
    """counts[length][state] = exact number of strings of `length` characters from `state` to an end.

    Rows stop at max_length, or before when all later ones are zero.
    """
    counts = [[int(end) for end in ends]]
    while len(counts) <= max_length:
        last = counts[-1]
        row = [sum([width * last[target] for _, width, target in out]) for out in moves]
        if not any(row):
            break
        counts.append(row)
        if len(counts) * len(row) > MAX_COUNTS:
            raise GrammarError(f"{len(row)} states times lengths up to {max_length} must be at most {MAX_COUNTS}")
    return counts


# ---------------------------------------------------------------------------------------------------- drawing


class _Table(NamedTuple):
    """Weighted nodes, flat. Edges of node i are [first[i], first[i + 1]), likeliest first; node 0 is the end."""

    start: int
    first: NDArray[np.int64]  # [nodes + 1]
    cumulative: NDArray[np.float64]  # [edges]: probability of this edge or one before it at the same node; ends in 1.0
    low: NDArray[np.uint32]  # [edges]
    width: NDArray[np.int64]  # [edges]
    target: NDArray[np.int64]  # [edges]


def _table(nodes: list[list[Edge]], start: int) -> _Table:
    first, cumulative, flat = [0], list[float](), list[Edge]()
    for edges in nodes:
        edges = sorted(edges, key=lambda edge: -edge[0])
        total, below = sum(edge[0] for edge in edges), 0
        for edge in edges:
            below += edge[0]
            cumulative.append(below / total)  # a ratio of Python ints is rounded once, however large they are
        flat += edges
        first.append(len(flat))
    _, low, width, target = zip(*flat, strict=True) if flat else ((), (), (), ())
    return _Table(
        start,
        np.array(first, np.int64),
        np.array(cumulative, np.float64),
        np.array(low, np.uint32),
        np.array(width, np.int64),
        np.array(target, np.int64),
    )


@compiled
def _walk(
    table: _Table, n: int, max_length: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint32], NDArray[np.int64], int]:
    """n walks from start to end: (code points [total], offset [n + 1], walks done).

    A walk over max_length is thrown away and done again; walks done < n: too many were.
    """
    codes = np.empty(min(16, max_length) * n + max_length, np.uint32)
    offset = np.zeros(n + 1, np.int64)
    total = 0
    n_thrown = 0
    i = 0
    while i < n:
        if total + max_length > codes.size:
            grown = np.empty(2 * codes.size, np.uint32)
            grown[:total] = codes[:total]
            codes = grown
        total = offset[i]
        node = table.start
        while node != 0:
            edge = table.first[node]
            if table.first[node + 1] - edge > 1:
                u = rng.random()
                while u >= table.cumulative[edge]:
                    edge += 1
            node = table.target[edge]
            width = table.width[edge]
            if width > 0:
                if total - offset[i] == max_length:
                    total = -1
                    break
                step = int(rng.random() * width) if width > 1 else 0
                codes[total] = table.low[edge] + step
                total += 1
        if total < 0:
            total = offset[i]
            n_thrown += 1
            if n_thrown > MIN_FIT * (i + 100):
                break
        else:
            i += 1
            offset[i] = total
    return codes[: offset[i]], offset, i


class Grammar:
    """The strings of at most `max_length` characters that the regular expression `pattern` matches in full.

    pattern, max_length   as given
    size                  exact number of strings, a Python int
    is_truncated          True if the expression also matches longer strings
    Raises GrammarError for a pattern it does not take (see the head of this file) and when no string is short enough.
    """

    def __init__(self, pattern: str, max_length: int) -> None:
        self.pattern, self.max_length = pattern, max_length
        try:
            if not 0 <= max_length <= MAX_LENGTH:
                raise GrammarError(f"max_length must be in [0, {MAX_LENGTH}], got {max_length}")
            if len(pattern) > MAX_PATTERN:
                raise GrammarError(f"must have at most {MAX_PATTERN} characters, got {len(pattern)}")
            self._nodes: list[list[Edge]] = [[]]
            self._start = _add_nodes(self._nodes, _Parser(pattern).parse(), 0, [MAX_EDGES])
            self._moves, self._ends, is_cut = _determinise(self._nodes, self._start, max_length)
            self._counts = _count(self._moves, self._ends, max_length)
            self.is_truncated = is_cut or _has_walk(self._moves, max_length + 1)  # every state leads to an end
            self.size = sum(row[0] for row in self._counts)
            if not self.size:
                raise GrammarError(f"the language must have a string of at most {max_length} characters, it has none")
        except GrammarError as error:
            raise GrammarError(f"grammar {shown(pattern)}: {error}") from None

    @property
    def table_size(self) -> int:
        """Entries of the count table: what the grammar takes in memory, and its time, go with it."""
        return len(self._counts) * (len(self._moves) + sum(map(len, self._moves)))

    @cached_property
    def alphabet(self) -> str:
        """Sorted characters that occur in at least one string."""
        table = self._uniform_table  # has an edge exactly where a string of the language goes
        spans = set(zip(table.low.tolist(), table.width.tolist(), strict=True))
        return "".join(map(chr, sorted({code for low, width in spans for code in range(low, low + width)})))

    def matches(self, text: str) -> bool:
        """Whether `text` is one of the strings."""
        if len(text) > self.max_length:
            return False
        state = 0
        for code in map(ord, text):
            for low, width, target in self._moves[state]:
                if low <= code < low + width:
                    state = target
                    break
            else:
                return False
        return self._ends[state]

    def strings(self) -> Iterator[str]:
        """All strings, shortest first, those of one length in the order of their code points."""
        for length, row in enumerate(self._counts):
            todo = [(0, "")] if row[0] else []
            while todo:
                state, text = todo.pop()
                if len(text) == length:
                    yield text
                    continue
                fits = self._counts[length - len(text) - 1]
                for low, width, target in reversed(self._moves[state]):
                    if fits[target]:
                        todo += [(target, text + chr(code)) for code in range(low + width - 1, low - 1, -1)]

    def sample(self, n: int, seed: int, mode: str = "uniform", without: Collection[str] = ()) -> list[str]:
        """n distinct strings, none of them in `without`, in the order in which they were drawn.

        uniform     every set of n strings is equally likely.
        branch      strings are drawn one after the other, each branch of the expression equally likely at its place:
                    alternatives, the members of a class, every count in {m,n}; after m copies of {m,} stop or go on.
                    Strings drawn before or too long are drawn again. If BRANCH_BATCHES batches do not bring n, only
                    rare strings are missing: they are drawn uniformly from those not yet drawn.
        enumerate   the first n in the order of strings(); seed is not used.
        Raises GrammarError when there are fewer than n such strings, or when nearly no `branch` draw is short enough.
        """
        if mode not in ("uniform", "branch", "enumerate"):
            raise GrammarError(f"mode must be uniform, branch or enumerate, got {shown(mode)}")
        seen = {text for text in without if self.matches(text)}
        if not 0 <= n <= self.size - len(seen):
            ruled_out = f", {len(seen)} of them ruled out by `without`" if seen else ""
            raise GrammarError(
                f"grammar {shown(self.pattern)}: {n} distinct instructions asked for, "
                f"the language has {_count_text(self.size)} of at most {self.max_length} characters{ruled_out}"
            )
        if mode == "enumerate":
            return list(islice((text for text in self.strings() if text not in seen), n))
        rng, chosen = np.random.Generator(np.random.PCG64(seed)), list[str]()

        def draw_batch(mode: str) -> None:
            n_missing = n - len(chosen)
            for text in _texts(*self._draw(n_missing + n_missing // 4 + 16, rng, mode)):
                if text not in seen and len(chosen) < n:
                    seen.add(text)
                    chosen.append(text)

        n_batches = 0
        while mode == "branch" and len(chosen) < n and n_batches < BRANCH_BATCHES:
            draw_batch("branch")
            n_batches += 1
        if 2 * (len(seen) + n - len(chosen)) > self.size:  # drawing again would go on for long, listing all will not
            rest = [text for text in self.strings() if text not in seen]
            order = np.argsort(rng.random(len(rest)), kind="stable")[: n - len(chosen)]
            chosen += [rest[i] for i in order]
        while len(chosen) < n:  # at least every second draw is new
            draw_batch("uniform")
        return chosen

    def sample_codes(self, n: int, seed: int, mode: str = "uniform") -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """n independent strings (the same one may come twice), as in sample() but for mode `enumerate`.

        Returns code points [total] uint32 and offset [n + 1] int64: string i is codes[offset[i] : offset[i + 1]].
        """
        if mode not in ("uniform", "branch"):
            raise GrammarError(f"mode must be uniform or branch, got {shown(mode)}")
        return self._draw(n, np.random.Generator(np.random.PCG64(seed)), mode)

    def _draw(self, n: int, rng: np.random.Generator, mode: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        table = self._branch_table if mode == "branch" else self._uniform_table
        codes, offset, n_done = _walk(table, n, len(self._counts) - 1, rng)  # no string is longer than the count table
        if n_done < n:
            raise GrammarError(
                f"grammar {shown(self.pattern)}: at least 1 in {MIN_FIT} branch draws must have at most "
                f"{self.max_length} characters, fewer do: raise max_length or bound the repetitions"
            )
        return codes, offset

    @cached_property
    def _branch_table(self) -> _Table:
        return _table(self._nodes, self._start)

    @cached_property
    def _uniform_table(self) -> _Table:
        """First the length, then a walk along the DFA whose steps weigh as many strings as they lead to."""
        counts, cells, number = self._counts, list[tuple[int, int]](), dict[tuple[int, int], int]()

        def node(state: int, n_left: int) -> int:
            """The node for `state` with n_left characters still to come; 0 is the end, 1 the choice of the length."""
            if n_left == 0:
                return 0
            if (state, n_left) not in number:
                number[state, n_left] = len(cells) + 2
                cells.append((state, n_left))
            return number[state, n_left]

        nodes: list[list[Edge]] = [[], [(row[0], 0, 0, node(0, length)) for length, row in enumerate(counts) if row[0]]]
        for state, n_left in cells:  # grows while it is walked
            row = counts[n_left - 1]
            nodes.append([(w * row[t], low, w, node(t, n_left - 1)) for low, w, t in self._moves[state] if row[t]])
        return _table(nodes, 1)


def _count_text(count: int) -> str:
    """A count for a message; Python refuses to write integers of thousands of digits."""
    return str(count) if count.bit_length() <= 128 else f"more than 2**{count.bit_length() - 1}"


def _texts(codes: NDArray[np.uint32], offset: NDArray[np.int64]) -> list[str]:
    """The strings that `codes` [total] and `offset` [n + 1] stand for."""
    joined = codes.astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
    return [joined[a:b] for a, b in pairwise(offset.tolist())]


def common_string(a: Grammar, b: Grammar) -> str | None:
    """The first string, in the order of Grammar.strings(), that both languages hold; None: they are disjoint.

    Breadth-first over pairs of DFA states, so the cost is the number of pairs that a common prefix reaches. Where they
    are more than MAX_PAIRS: GrammarError.
    """
    layer, seen = {(0, 0): ""}, {(0, 0)}
    for _ in range(min(a.max_length, b.max_length) + 1):
        for (i, j), text in layer.items():
            if a._ends[i] and b._ends[j]:
                return text
        ahead: dict[tuple[int, int], str] = {}
        for (i, j), text in layer.items():
            for low, pair in _common_moves(a._moves[i], b._moves[j]):
                if pair not in seen:
                    seen.add(pair)
                    ahead[pair] = text + chr(low)
            if len(seen) > MAX_PAIRS:
                raise GrammarError(
                    f"grammars {shown(a.pattern)} and {shown(b.pattern)}: to compare them must take at most "
                    f"{MAX_PAIRS} pairs of states, it takes more"
                )
        if not ahead:
            break
        layer = ahead
    return None


def _common_moves(a: list[Move], b: list[Move]) -> Iterator[tuple[int, tuple[int, int]]]:
    """(first character, (target in a, target in b)) for every overlap of a move of a with one of b, in order."""
    i = j = 0
    while i < len(a) and j < len(b):
        low, end_a, end_b = max(a[i][0], b[j][0]), a[i][0] + a[i][1], b[j][0] + b[j][1]
        if low < min(end_a, end_b):
            yield low, (a[i][2], b[j][2])
        i, j = i + (end_a <= end_b), j + (end_b <= end_a)
