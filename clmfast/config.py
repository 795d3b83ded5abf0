"""Every setting of a run, as frozen dataclasses: the command line, config files and run headers are made from them.

Imports no torch, so that `--help` and a mistyped flag are answered at once. `check(config)` says what must hold.
A run is a pure function of its RunConfig (on one machine, with one number of threads).
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from clmfast.untrusted import Damaged, one_line, read_json, read_toml, shown

READOUTS = ("instruction_end", "prompt_end", "mean")
LABEL_KINDS = ("task", "grammar", "instruction", "input", "output", "task_output")
RESTARTS_PER_START = 10  # of plain k-means, for a start with moves, where a device has no moves
SEARCH_END_ITERATIONS = 1  # of Lloyd's algorithm in all dimensions; what it leaves, a window's next step goes on with
UNSEEN_SPLITS = ("unseen_pair", "unseen_instruction", "unseen_grammar")


@dataclass(frozen=True)
class TaskConfig:
    """The synthetic instruction-following task."""

    n_tasks: int = 20
    """Tasks; each is a function from inputs to outputs."""
    n_grammars: int = 4
    """Grammars (regular expressions) per task that training sees."""
    n_unseen_grammars: int = 1
    """Further grammars per task, kept for the split unseen_grammar."""
    n_instructions: int = 40
    """Distinct training instructions per grammar."""
    n_unseen_instructions: int = 10
    """Further instructions per grammar, kept for the splits unseen_instruction and unseen_grammar."""
    n_inputs: int = 16
    """Inputs, shared by all tasks: the instruction alone tells the tasks apart."""
    n_outputs: int = 64
    """Output symbols in the pool that every task maps into."""
    unseen_pair_share: float = 0.05
    """Share of the (training instruction, input) pairs kept for the split unseen_pair."""
    alphabet: str = "abcdefghijklmnopqrstuvwxyz"
    """Letters that generated grammars and inputs are made of."""
    input_length: int = 1
    """Letters per input."""
    min_instruction_length: int = 4
    """Shortest instruction of a generated grammar, in letters."""
    max_instruction_length: int = 10
    """Longest instruction, in letters; own grammars are cut off there too."""
    sampling: Literal["uniform", "branch", "enumerate"] = "uniform"
    """How instructions are drawn: every string, or every branch of the expression, equally likely; or in order."""
    grammars: tuple[tuple[str, ...], ...] = ()
    """Own regular expressions, one row per task; the last n_unseen_grammars of a row are the unseen ones."""
    allow_overlap: bool = False
    """Accept grammars that share strings; their labels are then ambiguous."""


@dataclass(frozen=True)
class ModelConfig:
    """The causal Transformer: decoder only, pre-norm, learned positions, GELU."""

    n_layers: int = 6
    """Blocks; layer 0 of every measure is the embedding."""
    width: int = 128
    """Size of the hidden state."""
    n_heads: int = 4
    """Attention heads; must divide width."""
    mlp_ratio: int = 4
    """MLP width over model width."""
    init_std: float = 0.08
    """Standard deviation of the initial weights, about 1 / sqrt(width); output projections of a block get it over
    sqrt(2 n_layers). GPT-2's 0.02 is meant for its greater width: here it learns a third as fast."""
    embedding_std: float = 0.9
    """Standard deviation of the initial token and position embeddings. The larger, the more layers clustering takes,
    and the more often a run ends before all grammars have merged."""
    tie_head: bool = False
    """Use the token embedding as output matrix."""


@dataclass(frozen=True)
class TrainConfig:
    """AdamW on the output symbol."""

    batch: int = 128
    """Sequences per step."""
    lr: float = 4e-3
    """Peak learning rate."""
    lr_final_share: float = 0.1
    """Learning rate at the last step over the peak (cosine decay); 1 keeps it constant."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices (not of biases, norms and embeddings)."""
    beta1: float = 0.9
    """AdamW's first-moment decay."""
    beta2: float = 0.95
    """AdamW's second-moment decay."""
    clip_norm: float = 1.0
    """Largest gradient norm."""
    loss_on: Literal["output", "all"] = "output"
    """Predict the output symbol only, or every token."""
    validate_every: int = 20
    """Steps between validations."""
    n_validation: int = 256
    """Validation examples, from the split unseen_instruction."""
    patience: int = 5
    """Validations without a better accuracy after which early stopping picks the best step so far."""
    graph: Literal["auto", "on", "off"] = "auto"
    """Replay the step as one CUDA graph: auto does so on a GPU, where the step allows it."""
    stop_early: bool = False
    """End training there; by default the step is only marked and training goes on."""


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured, and how often."""

    readouts: tuple[str, ...] = ("instruction_end", "prompt_end")
    """Positions that stand for a sequence: instruction_end, prompt_end, mean."""
    window: int = 1024
    """Training states in the ring that the window estimator measures."""
    unseen_per_step: int = 16
    """Unseen examples that ride along with every step: their states are measured, nothing is learned from them."""
    unseen_window: int = 256
    """Unseen states whose answers are pooled."""
    probe_every: int = 50
    """Steps between probes; 0 measures without the probe."""
    probe_train: int = 2048
    """Training states of a probe, at most."""
    probe_unseen: int = 512
    """Unseen states of a probe, per split, at most."""
    probe_splits: tuple[str, ...] = ("unseen_instruction",)
    """Unseen splits that a probe classifies by their neighbours."""
    k: int = 10
    """Neighbours."""
    n_init: int = 4
    """k-means++ starts of a probe, each with moves."""
    moves: int = 6
    """Rounds in which k-means splits a cluster and merges two others, at most: what takes it out of a local optimum."""
    renewals: int = 3
    """Window k-means also starts from its best partition with a fifth of the clusters begun anew: once at every
    measured step, and again as long as that finds a better one, at most so many times."""
    population: int = 4
    """Partitions of each set that the window keeps from step to step, the best of which is reported."""
    max_iter: int = 100
    """Lloyd iterations of k-means++ starts, at most."""
    warm_iter: int = 3
    """Lloyd iterations of a step's k-means in the window on a GPU, at most; on a CPU its search ends with one."""
    cold_every: int = 14
    """Window k-means goes on from the partitions of the last step; every so many measured steps k-means++ competes with
    those of each layer and readout, which take turns."""
    n_snapshots: int = 8
    """Probes that also keep a 2-D projection of every layer."""
    n_shuffles: int = 20
    """Shuffles of the labels behind the null band."""
    threads: int = -1
    """CPU threads that measure the window while the backward pass runs. -1: as many cores as training leaves free (see
    --threads); 0: none, the step measures when it has been trained."""


@dataclass(frozen=True)
class RunConfig:
    """Train a small Transformer on an instruction-following task and measure its clusters, every layer, every step."""

    seed: int = 0
    """Seed of everything: tasks, weights, batches, k-means."""
    steps: int = 1000
    """Training steps."""
    measure_every: int = 1
    """Steps between window measurements; 0 turns all measuring off."""
    device: str = "cpu"
    """Where to train and measure: cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads; 0 takes all cores that this process may use."""
    out: str = ""
    """Run directory, must not exist yet; by default a new one under runs/."""
    resume_every: int = 100
    """Steps between the saved states that --resume starts from; 0 saves none."""
    task: TaskConfig = field(default_factory=TaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)


# `paper` is a reconstruction, as the full protocol is not public in a form we could read. Known from the paper: six
# layers, five mappings per task (n_inputs), several regular expressions per task. Assumed: everything else.
PRESETS: dict[str, RunConfig] = {
    "tiny": RunConfig(),
    "paper": RunConfig(
        steps=3000,
        task=TaskConfig(
            n_tasks=10, n_grammars=5, n_instructions=20, n_unseen_instructions=5, n_inputs=5, max_instruction_length=16
        ),
        model=ModelConfig(n_layers=6, width=256, n_heads=8, init_std=0.06),
        measure=MeasureConfig(probe_train=1000, probe_unseen=250),
    ),
}


class ConfigError(ValueError):
    """A setting that cannot be: one line that says what must hold and what came."""


def varying_shape(config: RunConfig) -> str:
    """Why the steps of this configuration differ in shape, so that no graph can be replayed; empty: they do not."""
    if config.train.loss_on == "all":
        return "the loss is on all tokens, whose number varies"
    if "mean" in config.measure.readouts:
        return "a readout averages over sequences of varying length"
    return ""


def replays_graph(config: RunConfig) -> tuple[bool, str]:
    """(is the training step one CUDA graph?, the reason)."""
    reason = "a CPU has no graphs" if config.device == "cpu" else varying_shape(config)
    if config.train.graph != "auto":
        return config.train.graph == "on", "asked for"
    return not reason, reason or "a GPU, and all steps have one shape"


def rides_inside(config: RunConfig) -> tuple[bool, str]:
    """(do unseen examples ride along in the training batch's forward pass?, the reason)."""
    if config.device == "cpu":
        return True, "our products compute every row by itself: who rides along changes no bit of training"
    return False, "on a GPU products are torch's, and more rows could change bits of training"


MOST_STEPS = 10**7 - 1  # a table of that many rows is read (schema.py); at 3 ms each, they take eight hours
NEVER = 10**9  # steps between what is not to happen in any run
MOST_POINTS = 2**20  # states in a ring or a probe, sequences in a batch
MOST_GRAMMARS = 2000  # each is compared with each other one: ten seconds
LARGEST_FLOAT = 1e30  # float32 ends at 3e38

# Far above what anyone needs, and low enough that what stands in the way of a run is its memory or its time, which
# needs.py foretells. Lengths: the number of strings of a grammar is counted in integers of that many digits.
AT_MOST: dict[str, int] = {
    "seed": 2**63 - 1, "steps": MOST_STEPS, "measure_every": NEVER, "threads": 1024, "resume_every": NEVER,
    "task.n_tasks": 1000, "task.n_grammars": 1000, "task.n_unseen_grammars": 1000, "task.n_instructions": 10**6,
    "task.n_unseen_instructions": 10**6, "task.n_inputs": 10**6, "task.n_outputs": 10**5, "task.input_length": 1000,
    "task.min_instruction_length": 1000, "task.max_instruction_length": 1000,
    "model.n_layers": 1000, "model.width": 2**16, "model.n_heads": 2**16, "model.mlp_ratio": 256,
    "train.batch": MOST_POINTS, "train.warmup_steps": NEVER, "train.validate_every": NEVER,
    "train.n_validation": MOST_POINTS, "train.patience": NEVER,
    "measure.window": MOST_POINTS, "measure.unseen_per_step": MOST_POINTS, "measure.unseen_window": MOST_POINTS,
    "measure.probe_every": NEVER, "measure.probe_train": MOST_POINTS, "measure.probe_unseen": MOST_POINTS,
    "measure.k": 10_000, "measure.n_init": 10_000, "measure.max_iter": 10**6, "measure.warm_iter": 10**6,
    "measure.cold_every": NEVER, "measure.moves": 1000, "measure.renewals": 1000, "measure.population": 100,
    "measure.n_snapshots": 1000, "measure.n_shuffles": 10**5, "measure.threads": 1024,
}  # fmt: skip
MOST_LETTERS = 1000  # of the alphabet


def _check_kinds(name: str, section: Any) -> None:
    """Each setting is of the type of its field, finite and not larger than AT_MOST; ConfigError otherwise."""
    for field_name, kind in get_type_hints(type(section)).items():
        value, full = getattr(section, field_name), name + field_name
        if kind is float:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"{full} must be a number, got {value!r}")
            # an integer of any size is finite, but may be no float
            if not (isinstance(value, int) or math.isfinite(value)):
                raise ConfigError(f"{full} must be a finite number, got {value}")
            if abs(value) > LARGEST_FLOAT:
                raise ConfigError(f"{full} must be at most {LARGEST_FLOAT:g}, got {one_line(value, 80)}")
        elif kind is int:
            if isinstance(value, bool) or not isinstance(value, int):
                raise ConfigError(f"{full} must be a whole number, got {value!r}")
            if value > AT_MOST[full]:
                raise ConfigError(f"{full} must be at most {AT_MOST[full]}, got {one_line(value, 80)}")
        elif kind in (str, bool):
            if not isinstance(value, kind):
                raise ConfigError(f"{full} must be {'a text' if kind is str else 'true or false'}, got {value!r}")
        elif (words := get_args(kind)) and all(isinstance(word, str) for word in words):
            if value not in words:
                raise ConfigError(f"{full} must be one of {', '.join(words)}, got {value!r}")
        elif isinstance(kind, type) and dataclasses.is_dataclass(kind):
            if not isinstance(value, kind):
                raise ConfigError(f"{full} must be a {kind.__name__}, got {value!r}")
            _check_kinds(f"{full}.", value)
        elif not _is_nested(value, depth=2 if field_name == "grammars" else 1):
            raise ConfigError(f"{full} must be a tuple of {'rows of ' * (field_name == 'grammars')}texts")


def _is_nested(value: object, depth: int) -> bool:
    """Tuples of tuples ... of strings, so deep."""
    if not depth:
        return isinstance(value, str)
    return isinstance(value, tuple) and all(_is_nested(one, depth - 1) for one in value)


def power(base: int, exponent: int, most: int) -> int:
    """min(base ** exponent, most), without ever computing more digits than that; base >= 2."""
    value = 1
    for _ in range(min(exponent, most.bit_length())):
        value = min(value * base, most)
    return value


def check(config: RunConfig) -> None:
    """Raise ConfigError unless every setting is possible by itself and beside the others, on whatever machine."""
    _check_kinds("", config)
    task, model, train, measure = config.task, config.model, config.train, config.measure

    def need(holds: bool, what: str, got: object) -> None:
        if not holds:
            raise ConfigError(f"{what}, got {one_line(got, 80)}")

    if train.graph == "on":
        need(config.device != "cpu", "train.graph must be auto or off where device is cpu", "on")
        need(not varying_shape(config), f"train.graph must be auto or off where {varying_shape(config)}", "on")
    for owner, section, names in (
        ("task.", task, "n_tasks n_grammars n_instructions n_inputs n_outputs input_length min_instruction_length"),
        ("model.", model, "n_layers width n_heads mlp_ratio"),
        ("train.", train, "batch n_validation validate_every patience"),
        ("measure.", measure, "window unseen_per_step unseen_window probe_train probe_unseen k n_init max_iter"),
        ("measure.", measure, "warm_iter cold_every population n_shuffles"),
        ("", config, "steps"),
    ):
        for name in names.split():
            need(getattr(section, name) >= 1, f"{owner}{name} must be at least 1", getattr(section, name))
    for owner, section, names in (
        ("task.", task, "n_unseen_grammars n_unseen_instructions"),
        ("train.", train, "warmup_steps weight_decay"),
        ("measure.", measure, "probe_every n_snapshots moves renewals"),
        ("", config, "seed measure_every threads resume_every"),
    ):
        for name in names.split():
            need(getattr(section, name) >= 0, f"{owner}{name} must be at least 0", getattr(section, name))
    need(task.n_tasks >= 2, "task.n_tasks must be at least 2", task.n_tasks)
    need(task.n_unseen_instructions >= 1, "task.n_unseen_instructions must be at least 1 (validation needs them)", 0)
    need(task.n_outputs >= 2, "task.n_outputs must be at least 2", task.n_outputs)
    need(0 <= task.unseen_pair_share < 1, "task.unseen_pair_share must be in [0, 1)", task.unseen_pair_share)
    need(
        len(set(task.alphabet)) == len(task.alphabet) >= 2,
        "task.alphabet must be two or more different letters",
        repr(task.alphabet),
    )
    need(len(task.alphabet) <= MOST_LETTERS, f"task.alphabet must have at most {MOST_LETTERS} letters",
         len(task.alphabet))  # fmt: skip
    need(task.alphabet.isprintable(), "task.alphabet must be letters that can be printed", ascii(task.alphabet))
    n_possible = power(len(task.alphabet), task.input_length, 10 * AT_MOST["task.n_inputs"])
    need(
        task.n_inputs <= n_possible,
        f"task.n_inputs must be at most alphabet ** input_length = {n_possible}",
        task.n_inputs,
    )
    need(
        task.n_tasks * (task.n_grammars + task.n_unseen_grammars) <= MOST_GRAMMARS,
        f"task.n_tasks x (n_grammars + n_unseen_grammars) must be at most {MOST_GRAMMARS}",
        task.n_tasks * (task.n_grammars + task.n_unseen_grammars),
    )
    need(
        task.min_instruction_length <= task.max_instruction_length,
        f"task.max_instruction_length must be at least min_instruction_length = {task.min_instruction_length}",
        task.max_instruction_length,
    )
    if task.grammars:
        need(
            len(task.grammars) == task.n_tasks,
            f"task.grammars must have one row per task, {task.n_tasks}",
            len(task.grammars),
        )
        for i, row in enumerate(task.grammars):
            n = task.n_grammars + task.n_unseen_grammars
            need(
                len(row) == n,
                f"row {i} of task.grammars must have n_grammars + n_unseen_grammars = {n} expressions",
                len(row),
            )
            for pattern in row:
                # A lone surrogate is in no UTF-8 file, so the run could not be recorded.
                need(not re.search("[\ud800-\udfff]", pattern), "task.grammars must be Unicode text", ascii(pattern))
    need(
        model.width % model.n_heads == 0,
        f"model.n_heads must divide model.width = {model.width}",
        model.n_heads,
    )
    for name in ("init_std", "embedding_std"):
        need(getattr(model, name) > 0, f"model.{name} must be positive", getattr(model, name))
    need(train.lr > 0, "train.lr must be positive", train.lr)
    need(train.clip_norm > 0, "train.clip_norm must be positive", train.clip_norm)
    need(0 <= train.lr_final_share <= 1, "train.lr_final_share must be in [0, 1]", train.lr_final_share)
    for name in ("beta1", "beta2"):
        need(0 <= getattr(train, name) < 1, f"train.{name} must be in [0, 1)", getattr(train, name))
    need(measure.threads >= -1, "measure.threads must be at least -1 (as many as are free)", measure.threads)
    need(len(measure.readouts) > 0, "measure.readouts must name at least one readout", "none")
    for name, allowed, got in (
        ("measure.readouts", READOUTS, measure.readouts),
        ("measure.probe_splits", UNSEEN_SPLITS, measure.probe_splits),
    ):
        for value in got:
            need(value in allowed, f"{name} must be from {', '.join(allowed)}", value)
        need(len(set(got)) == len(got), f"{name} must be different", ", ".join(got))
    if config.measure_every:
        for name in ("window", "probe_train"):
            n_points = getattr(measure, name)
            need(measure.k < n_points, f"measure.k must be less than measure.{name} = {n_points}", measure.k)
            need(
                task.n_tasks <= n_points,
                f"measure.{name} must be at least task.n_tasks = {task.n_tasks} (k-means looks for as many clusters)",
                n_points,
            )
        need(
            measure.window % train.batch == 0,
            f"measure.window must be a multiple of train.batch = {train.batch}",
            measure.window,
        )
        need(
            measure.unseen_window % measure.unseen_per_step == 0,
            f"measure.unseen_window must be a multiple of measure.unseen_per_step = {measure.unseen_per_step}",
            measure.unseen_window,
        )
        if "unseen_grammar" in measure.probe_splits:
            need(task.n_unseen_grammars >= 1, "task.n_unseen_grammars must be at least 1 to probe unseen_grammar", 0)
        if "unseen_pair" in measure.probe_splits:
            need(task.unseen_pair_share > 0, "task.unseen_pair_share must be positive to probe unseen_pair", 0)


def closest(word: str, known: list[str]) -> str:
    """' (did you mean X?)' for the known word nearest to `word`, or nothing."""
    import difflib

    near = difflib.get_close_matches(word[:80], known, n=1, cutoff=0.5)
    return f" (did you mean {near[0]}?)" if near else ""


def from_file(path: str | Path, base: RunConfig) -> RunConfig:
    """`base` with the settings of a TOML or JSON file on top: tables task, model, train, measure as in RunConfig.

    Unknown keys and wrong types raise ConfigError. A run's own config.json is such a file.
    """
    path = Path(path)
    name = f"config file {path}"
    try:
        given = read_json(path, name=name) if path.suffix == ".json" else read_toml(path, name)
    except Damaged as damage:
        raise ConfigError(str(damage)) from None
    return from_dict(given, base, name)


def from_dict(given: Any, base: RunConfig, where: str) -> RunConfig:
    """`base` with settings on top that are tables of plain values; ConfigError, beginning with `where`."""
    import dacite  # a twentieth of a second that `--help` need not wait for

    if not isinstance(given, dict):
        raise ConfigError(f"{where} must hold a table of settings, got {shown(given)}")
    merged = dataclasses.asdict(base)
    for key, value in given.items():
        if key not in merged:
            raise ConfigError(f"{where}: unknown setting {one_line(key, 80)}{closest(key, list(merged))}")
        if isinstance(merged[key], dict):
            if not isinstance(value, dict):
                raise ConfigError(f"{where}: {key} must be a table of settings, got {shown(value)}")
            for name in value:
                if name not in merged[key]:
                    near = closest(name, list(merged[key]))
                    raise ConfigError(f"{where}: unknown setting {key}.{one_line(name, 80)}{near}")
            merged[key].update(value)
        else:
            merged[key] = value

    def tuples(value: Any) -> Any:
        if isinstance(value, dict):
            raise ConfigError(f"{where}: a setting must be no table, got {shown(value)}")
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    for section in ("task", "model", "train", "measure"):
        merged[section] = {name: tuples(value) for name, value in merged[section].items()}
    try:
        return dacite.from_dict(RunConfig, merged, dacite.Config(strict=True, type_hooks={float: _number}))
    except (dacite.DaciteError, TypeError, ValueError, ArithmeticError) as error:  # it lets through what types raise
        raise ConfigError(f"{where}: {one_line(error)}") from None


def _number(value: Any) -> Any:
    """TOML writes 1 where 1.0 is meant."""
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain data for JSON; `from_file` reads it back."""
    return dataclasses.asdict(config)
