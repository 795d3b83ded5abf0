"""The synthetic instruction-following task: a TaskSet and its splits, all from one config and one seed.

A task is a function from inputs to output symbols. Its instructions are drawn from several grammars (regular
expressions). A sequence is

    BOS instruction SEP input ARROW output EOS

in characters; the inputs are shared by all tasks, so the instruction alone tells which output is right. An *example*
is a pair of an instruction and an input, numbered `instruction * n_inputs + input`, so that every label of an example
follows from its number and no table of examples exists.

Splits, disjoint by construction:
    train               training instructions with inputs
    unseen_pair         instruction and input both in training, but never together
    unseen_instruction  a new string of a grammar that is in training, with every input
    unseen_grammar      a string of a grammar that is not in training, with every input
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from clmfast.config import ConfigError, TaskConfig, power
from clmfast.data.compiled import compiled
from clmfast.data.grammar import Grammar, GrammarError, common_string
from clmfast.untrusted import shown

Ids = NDArray[np.int64]

SPECIALS = ("PAD", "BOS", "SEP", "ARROW", "EOS")
PAD, BOS, SEP, ARROW, EOS = range(len(SPECIALS))

# One random stream per purpose: a change in how one of them draws leaves the others as they were.
STREAMS = {name: i for i, name in enumerate(("grammars", "instructions", "inputs", "functions", "pairs"))}
BATCH_STREAMS = {name: i for i, name in enumerate(("train", "unseen", "validation", "probe", "null"))}

SIGNS = frozenset("\\^$.|?*+()[]{}-&~")  # that mean something in a regular expression, in Python's or in a class there
MAX_TRIES = 4000  # random grammars in a row of which none is taken: half a second. As a rule every second one is.
MAX_COMPARED = 5_000_000  # pairs of random grammars that are compared: about 20 s; 2000 grammars need 2 million or more
MAX_TABLES = 2_000_000  # entries of the count tables of all own grammars together: seconds, and at most a gigabyte

End = Literal["instruction_end", "prompt_end", "sequence_end"]


@dataclass(frozen=True)
class Batch:
    """Sequences back to back, without padding; all int64.

    Sequence b is the tokens offset[b] <= row < offset[b + 1]. `instruction_end` and `prompt_end` are rows (of its SEP
    and of its ARROW), prompt_end -1 where the sequence was cut before it; `target` is the token of the right output.
    """

    tokens: Ids  # [n]
    position: Ids  # [n] place in its sequence, from 0
    offset: Ids  # [B + 1]
    instruction_end: Ids  # [B]
    prompt_end: Ids  # [B]
    target: Ids  # [B]

    @property
    def length(self) -> Ids:
        """Tokens of every sequence [B]."""
        return np.diff(self.offset)

    @property
    def ends(self) -> Ids:
        """The rows instruction_end and, where there are any, prompt_end of all sequences, ascending."""
        if len(self.prompt_end) and self.prompt_end[0] < 0:
            return self.instruction_end
        return np.stack([self.instruction_end, self.prompt_end], axis=1).reshape(-1)

    def followed_by(self, other: Batch) -> Batch:
        """The sequences of both, these first; both reach up to the prompt's end or beyond."""
        n = len(self.tokens)
        return Batch(
            np.concatenate([self.tokens, other.tokens]),
            np.concatenate([self.position, other.position]),
            np.concatenate([self.offset, n + other.offset[1:]]),
            np.concatenate([self.instruction_end, n + other.instruction_end]),
            np.concatenate([self.prompt_end, n + other.prompt_end]),
            np.concatenate([self.target, other.target]),
        )


@dataclass(frozen=True)
class PromptTree:
    """Instructions and, as their continuations, examples. All int64.

    The first sequences are the instructions, BOS to SEP; then comes one for each example: its input and ARROW, with the
    sequence of its instruction as `prefix`; or its whole prompt, without one.
    """

    tokens: Ids  # [n]
    position: Ids  # [n] place in the whole prompt
    offset: Ids  # [sequences + 1]
    prefix: Ids  # [sequences], -1 where there is none
    instruction_end: Ids  # [instructions] rows
    prompt_end: Ids  # [examples] rows


@dataclass(frozen=True)
class TaskSet:
    """All instructions, inputs and outputs, as tokens and as labels; see the head of this file.

    Instructions are stored back to back: instruction i is `letters[offset[i]:offset[i + 1]]`.
    """

    vocabulary: tuple[str, ...]  # token -> text
    patterns: tuple[str, ...]  # grammar -> regular expression
    language_size: tuple[int, ...]  # grammar -> strings in its language, up to the longest allowed instruction
    grammar_task: Ids  # [n_grammars_total]
    letters: Ids  # [sum of instruction lengths] tokens
    offset: Ids  # [n_instructions_total + 1]
    instruction_grammar: Ids  # [n_instructions_total]
    input_tokens: Ids  # [n_inputs, input_length]
    output: Ids  # [n_tasks, n_inputs] output symbol, 0 <= symbol < n_outputs
    splits: Mapping[str, Ids]  # name -> example numbers, ascending

    @property
    def n_tasks(self) -> int:
        return len(self.output)

    @property
    def n_inputs(self) -> int:
        return len(self.input_tokens)

    @property
    def first_output(self) -> int:
        """Token of output symbol 0."""
        return len(self.vocabulary) - self.n_outputs

    @property
    def n_outputs(self) -> int:
        return sum(token.startswith("output") for token in self.vocabulary)

    @property
    def max_length(self) -> int:
        """Tokens of the longest whole sequence: BOS instruction SEP input ARROW output EOS."""
        return int(np.diff(self.offset).max()) + self.input_tokens.shape[1] + 5

    def labels(self, examples: Ids) -> dict[str, Ids]:
        """Every label of the examples [N]: task, grammar, instruction, input, output, and the pair of task and output;
        each [N] int64."""
        instruction, i_input = np.divmod(examples, self.n_inputs)
        grammar = self.instruction_grammar[instruction]
        task = self.grammar_task[grammar]
        output = self.output[task, i_input]
        return {
            "task": task,
            "grammar": grammar,
            "instruction": instruction,
            "input": i_input,
            "output": output,
            "task_output": task * self.n_outputs + output,
        }

    def label_counts(self) -> dict[str, int]:
        """Number of values that each label can take."""
        return {
            "task": self.n_tasks,
            "grammar": len(self.patterns),
            "instruction": len(self.instruction_grammar),
            "input": self.n_inputs,
            "output": self.n_outputs,
            "task_output": self.n_tasks * self.n_outputs,
        }

    def instruction_text(self, instruction: int) -> str:
        """The instruction as the string that its grammar made."""
        return "".join(
            self.vocabulary[t] for t in self.letters[self.offset[instruction] : self.offset[instruction + 1]]
        )

    def instructions(self, split: str) -> Ids:
        """Distinct instructions of a split, ascending."""
        return np.unique(self.splits[split] // self.n_inputs)

    def pack(self, examples: Ids, end: End = "prompt_end") -> Batch:
        """The examples' sequences up to and including `end`."""
        labels = self.labels(examples)
        stage = ("instruction_end", "prompt_end", "sequence_end").index(end)
        n_more = (2, 3 + self.input_tokens.shape[1], 5 + self.input_tokens.shape[1])[stage]
        offset = np.zeros(len(examples) + 1, np.int64)
        np.cumsum(np.diff(self.offset)[labels["instruction"]] + n_more, out=offset[1:])
        tokens, position = np.empty(offset[-1], np.int64), np.empty(offset[-1], np.int64)
        instruction_end, prompt_end = np.empty(len(examples), np.int64), np.empty(len(examples), np.int64)
        target = self.first_output + labels["output"]
        _pack(
            labels["instruction"], labels["input"], target, self.letters, self.offset, self.input_tokens, stage,
            offset, tokens, position, instruction_end, prompt_end,
        )  # fmt: skip
        return Batch(tokens, position, offset, instruction_end, prompt_end, target)

    def pack_tree(self, instructions: Ids, examples: Ids, is_tree: bool = True) -> PromptTree:
        """Prompts of the examples, whose instructions have to be among the (ascending) instructions; whole ones, unless
        it is a tree."""
        stems = self.pack(instructions * self.n_inputs, "instruction_end")
        instruction, i_input = np.divmod(examples, self.n_inputs)
        stem = np.searchsorted(instructions, instruction)
        if is_tree:
            leaf = np.column_stack([self.input_tokens[i_input], np.full(len(examples), ARROW)])
            tokens, offset = leaf.ravel(), leaf.shape[1] * np.arange(1, len(examples) + 1)
            position = (stems.length[stem, None] + np.arange(leaf.shape[1])).ravel()
        else:
            whole = self.pack(examples)
            tokens, offset, position = whole.tokens, whole.offset[1:], whole.position
        offset = stems.offset[-1] + offset
        return PromptTree(
            tokens=np.concatenate([stems.tokens, tokens]),
            position=np.concatenate([stems.position, position]),
            offset=np.concatenate([stems.offset, offset]),
            prefix=np.concatenate([np.full(len(instructions), -1), stem if is_tree else np.full(len(examples), -1)]),
            instruction_end=stems.instruction_end,
            prompt_end=offset - 1,
        )


@compiled
def _pack(
    instruction: Ids,
    i_input: Ids,
    target: Ids,
    letters: Ids,
    letters_offset: Ids,
    input_tokens: Ids,
    stage: int,
    offset: Ids,
    tokens: Ids,
    position: Ids,
    instruction_end: Ids,
    prompt_end: Ids,
) -> None:
    """Fill the last four; stage 0 ends at SEP, 1 at ARROW, 2 at EOS."""
    for b in range(len(instruction)):
        row = offset[b]
        tokens[row] = BOS
        row += 1
        for i in range(letters_offset[instruction[b]], letters_offset[instruction[b] + 1]):
            tokens[row] = letters[i]
            row += 1
        tokens[row] = SEP
        instruction_end[b] = row
        prompt_end[b] = -1
        if stage >= 1:
            for i in range(input_tokens.shape[1]):
                row += 1
                tokens[row] = input_tokens[i_input[b], i]
            row += 1
            tokens[row] = ARROW
            prompt_end[b] = row
        if stage == 2:
            tokens[row + 1] = target[b]
            tokens[row + 2] = EOS
        for r in range(offset[b], offset[b + 1]):
            position[r] = r - offset[b]


def draw(examples: Ids, n: int, seed: int, step: int, stream: str) -> Ids:
    """n of the examples, drawn with replacement: a pure function of (seed, step, stream), so a resumed run needs no
    state to draw the batches that it would have drawn."""
    key = np.array([seed, (step << 8) | BATCH_STREAMS[stream]], np.uint64)
    return examples[np.random.Generator(np.random.Philox(key=key)).integers(len(examples), size=n)]


def choose(examples: Ids, n: int, seed: int, stream: str) -> Ids:
    """min(n, all) different ones of the examples, ascending: a pure function of (seed, stream)."""
    key = np.array([seed, BATCH_STREAMS[stream]], np.uint64)
    pick = np.random.Generator(np.random.Philox(key=key)).permutation(len(examples))[:n]
    return examples[np.sort(pick)]


def make_tasks(config: TaskConfig, seed: int) -> TaskSet:
    """The TaskSet of a config and a seed.

    ConfigError if a grammar has too few strings, grammars overlap without `allow_overlap`, or there are fewer
    different functions than tasks.
    """
    rng = {name: np.random.default_rng([seed, stream]) for name, stream in STREAMS.items()}
    if (n_functions := power(config.n_outputs, config.n_inputs, config.n_tasks)) < config.n_tasks:
        raise ConfigError(
            f"task.n_tasks must be at most n_outputs ** n_inputs = {n_functions} different functions, "
            f"got {config.n_tasks}"
        )
    grammars = _own_grammars(config) if config.grammars else _random_grammars(config, rng["grammars"])
    per_task = config.n_grammars + config.n_unseen_grammars
    grammar_task = np.repeat(np.arange(config.n_tasks), per_task)
    is_unseen_grammar = np.arange(len(grammars)) % per_task >= config.n_grammars

    # All training strings are drawn first, and the unseen ones without them: no string is both, even where languages
    # overlap. The order of the instructions is that of their grammars, training strings before unseen ones.
    def sample(i_grammar: int, n: int, without: set[str]) -> list[str]:
        try:
            sample_seed = int(rng["instructions"].integers(2**62))
            return grammars[i_grammar].sample(n, sample_seed, config.sampling, without)
        except GrammarError as error:
            raise ConfigError(f"task.grammars: {error}") from None

    known = {g: sample(g, config.n_instructions, set()) for g in np.flatnonzero(~is_unseen_grammar).tolist()}
    in_training = {text for texts in known.values() for text in texts}
    new = {g: sample(g, config.n_unseen_instructions, in_training) for g in range(len(grammars))}
    texts: list[str] = []
    instruction_grammar: list[int] = []
    split_of: list[str] = []
    for g in range(len(grammars)):
        for split, strings in (
            ("train", known.get(g, [])),
            ("unseen_grammar" if is_unseen_grammar[g] else "unseen_instruction", new[g]),
        ):
            texts += strings
            instruction_grammar += [g] * len(strings)
            split_of += [split] * len(strings)

    letters_used = sorted({letter for text in texts for letter in text} | set(config.alphabet))
    outputs = tuple(f"output{i}" for i in range(config.n_outputs))
    vocabulary = (*SPECIALS, *letters_used, *outputs)
    token = {letter: len(SPECIALS) + i for i, letter in enumerate(letters_used)}
    alphabet_tokens = np.array([token[letter] for letter in config.alphabet])
    return TaskSet(
        vocabulary=vocabulary,
        patterns=tuple(g.pattern for g in grammars),
        language_size=tuple(g.size for g in grammars),
        grammar_task=grammar_task.astype(np.int64),
        letters=np.array([token[letter] for text in texts for letter in text], np.int64),
        offset=np.concatenate([[0], np.cumsum([len(text) for text in texts])]).astype(np.int64),
        instruction_grammar=np.array(instruction_grammar, np.int64),
        input_tokens=alphabet_tokens[_different_inputs(config, rng["inputs"])].astype(np.int64),
        output=_different_functions(config, rng["functions"]),
        splits=_splits(config, np.array(split_of), rng["pairs"]),
    )


def _different_inputs(config: TaskConfig, rng: np.random.Generator) -> Ids:
    """[n_inputs, input_length] places in the alphabet; no two rows equal."""
    n_letters, length, n = len(config.alphabet), config.input_length, config.n_inputs
    if n_letters**length < 2**63:
        ranks = rng.choice(n_letters**length, size=n, replace=False)
        return ranks[:, None] // n_letters ** np.arange(length)[::-1] % n_letters
    rows: dict[bytes, Ids] = {}
    while len(rows) < n:  # of so many inputs two are hardly ever the same
        for row in rng.integers(n_letters, size=(n - len(rows), length)):
            rows[row.tobytes()] = row
    return np.array(list(rows.values()))


def _different_functions(config: TaskConfig, rng: np.random.Generator) -> Ids:
    """[n_tasks, n_inputs] output symbols; no two rows equal, or two tasks would be one."""
    rows: dict[tuple[int, ...], None] = {}
    while len(rows) < config.n_tasks:
        rows[tuple(rng.integers(config.n_outputs, size=config.n_inputs).tolist())] = None
    return np.array(list(rows), np.int64)


def _splits(config: TaskConfig, split_of: NDArray[np.str_], rng: np.random.Generator) -> dict[str, Ids]:
    def examples(split: str) -> Ids:
        instruction = np.flatnonzero(split_of == split)
        return (instruction[:, None] * config.n_inputs + np.arange(config.n_inputs)).ravel().astype(np.int64)

    known = examples("train")
    # Every instruction and every input must stay in training: example 0 of instruction i keeps input i mod n_inputs.
    i_instruction = np.arange(len(known)) // config.n_inputs
    may_leave = np.flatnonzero(known % config.n_inputs != i_instruction % config.n_inputs)
    n_pairs = round(config.unseen_pair_share * len(known))
    if n_pairs > len(may_leave):
        raise ConfigError(
            f"task.unseen_pair_share must leave every instruction one input: at most "
            f"{len(may_leave) / len(known):.3f} with {config.n_inputs} inputs, got {config.unseen_pair_share}"
        )
    is_pair = np.zeros(len(known), bool)
    is_pair[rng.permutation(may_leave)[:n_pairs]] = True
    return {
        "train": known[~is_pair],
        "unseen_pair": known[is_pair],
        "unseen_instruction": examples("unseen_instruction"),
        "unseen_grammar": examples("unseen_grammar"),
    }


def _own_grammars(config: TaskConfig) -> list[Grammar]:
    grammars: list[Grammar] = []
    table_size = 0
    for row in config.grammars:
        for pattern in row:
            try:
                grammar = Grammar(pattern, config.max_instruction_length)
                table_size += grammar.table_size
                if table_size > MAX_TABLES:
                    raise GrammarError(
                        f"states times lengths of all must be at most {MAX_TABLES}, {shown(pattern)} makes it "
                        f"{table_size}: lower max_instruction_length or shorten repetitions"
                    )
                other, witness = _overlap(grammar, grammars) if not config.allow_overlap else (None, None)
            except GrammarError as error:
                raise ConfigError(f"task.grammars: {error}") from None
            if other is not None:
                raise ConfigError(
                    f"task.grammars must not share strings (allow_overlap accepts it): "
                    f"{shown(other.pattern)} and {shown(pattern)} both have {witness!r}"
                )
            grammars.append(grammar)
    return grammars


def _overlap(grammar: Grammar, others: list[Grammar]) -> tuple[Grammar | None, str | None]:
    """The first of the others that shares a string with the grammar, and that string."""
    for other in others:
        if (witness := common_string(grammar, other)) is not None:
            return other, witness
    return None, None


def _random_grammars(config: TaskConfig, rng: np.random.Generator) -> list[Grammar]:
    """Grammars whose languages are pairwise disjoint and large enough, at random."""
    n = config.n_tasks * (config.n_grammars + config.n_unseen_grammars)
    # Twice what is needed, so that unseen strings are not simply "the rest".
    min_size = 2 * (config.n_instructions + config.n_unseen_instructions)
    grammars: list[Grammar] = []
    n_tries = n_compared = 0  # tries: since a grammar was last taken
    while len(grammars) < n:
        n_tries += 1
        if n_tries > MAX_TRIES or n_compared > MAX_COMPARED:
            raise ConfigError(
                f"task: no {n} disjoint grammars of {min_size} or more strings, {config.min_instruction_length} to "
                f"{config.max_instruction_length} letters long, were found over the alphabet {shown(config.alphabet)}: "
                f"allow longer instructions or more letters, or ask for fewer, got {len(grammars)}"
            )
        pieces = [random_piece(config.alphabet, rng) for _ in range(rng.integers(3, 7))]
        low, high = (sum(lengths) for lengths in zip(*(lengths for _, lengths in pieces), strict=True))
        if low < config.min_instruction_length or high > config.max_instruction_length:
            continue
        grammar = Grammar("".join(text for text, _ in pieces), config.max_instruction_length)
        if grammar.size < min_size:
            continue
        is_apart = True
        for other in [] if config.allow_overlap else grammars:
            n_compared += 1
            if common_string(grammar, other) is not None:
                is_apart = False
                break
        if is_apart:
            grammars.append(grammar)
            n_tries = 0
    return grammars


def literal(letter: str) -> str:
    """The letter as a regular expression and as a member of a class: signs of the language are escaped."""
    return f"\\{letter}" if letter in SIGNS else letter


def random_piece(alphabet: str, rng: np.random.Generator) -> tuple[str, tuple[int, int]]:
    """A random piece of a regular expression, and the fewest and most letters that it stands for."""

    def word(n: int) -> str:
        return "".join(literal(letter) for letter in rng.choice(list(alphabet), size=n))

    def letters(n: int) -> str:
        chosen = sorted(rng.choice(list(alphabet), size=min(n, len(alphabet)), replace=False))
        return "".join(literal(letter) for letter in chosen)

    match int(rng.integers(5)):
        case 0:
            n = int(rng.integers(1, 4))
            return word(n), (n, n)
        case 1:
            return f"[{letters(int(rng.integers(2, 5)))}]", (1, 1)
        case 2:
            low = int(rng.integers(1, 3))
            high = low + int(rng.integers(1, 3))
            return f"[{letters(int(rng.integers(2, 4)))}]{{{low},{high}}}", (low, high)
        case 3:
            lengths = rng.integers(1, 4, size=int(rng.integers(2, 4))).tolist()
            return f"({'|'.join(word(n) for n in lengths)})", (min(lengths), max(lengths))
        case _:
            n = int(rng.integers(1, 3))
            return f"({word(n)})?", (0, n)
