"""The measurement tax: what measuring every layer at every step adds to a training step of the default run.

    tax = (step with everything measured - step without) / step without

Window estimator with its unseen examples, all layers, both readouts. Layers and readouts take turns in beginning a
partition anew: times are medians at each place of that cycle, averaged over it. The rival measures the same on the
plain model with forward hooks, `.cpu()` and scikit-learn. The probe is told per probe and per step; its forward pass
has a contest of its own. And the same where a core is to spare: one thread trains, another measures beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.bench_step import LOSS_TOLERANCE, RUN
from benchmarks.contest import TORCH, Contender, Process, Times, anchor
from benchmarks.worker import Call

if TYPE_CHECKING:
    from clmfast.train import Training

MEASURED, UNMEASURED, PROBED = "clmfast, measured", "clmfast, unmeasured", "clmfast, a probe"
BESIDE, UNMEASURED_ONE = "clmfast, measured on a second core", "clmfast, unmeasured, one thread"
PROBED_BESIDE = "clmfast, a probe, one thread and the second core"
HOOKS, PLAIN = "hooks + scikit-learn, measured", "torch eager, unmeasured"
HOOKS_PROCESS = Process("torch + scikit-learn")
ONE_THREAD = Process("clmfast run, one thread", threads=1, n_cores=2)
N_CYCLES = 3
N_PROBES = 8
PROBE_EVERY = 50  # steps
N_FULL = 8  # steps until the ring is full; the rival, being slow, measures from then on
N_CHECKS = N_FULL + 4
PURITY_TOLERANCE = 0.02  # rounding decides some neighbours, and which of them are tied
ACCURACY_TOLERANCE = 0.13  # two of 16 unseen states
STATE_TOLERANCE = 1e-3
CHUNK = 512  # sequences of one forward pass of the plain probe


def measured(case: dict[str, Any]) -> Call:
    """Training with the window; returns the loss, what neighbours said, by column, and the recorded milliseconds."""
    return _steps(_ours(case, measure_every=1))


def unmeasured(case: dict[str, Any]) -> Call:
    return _steps(_ours(case, measure_every=0))


def _ours(case: dict[str, Any], **measuring: int) -> Training:
    """The default run; if it is not to have all cores, another thread measures."""
    from benchmarks.training import our_training, run_config

    config, threads = run_config(**measuring), case.get("threads", 0)
    measure = dataclasses.replace(config.measure, threads=min(threads, 1))
    return our_training(dataclasses.replace(config, threads=threads, measure=measure))


def _steps(training: Training) -> Call:
    steps = iter(training)
    at = training.column_at("train/loss")

    def call(i: int) -> Any:
        step = next(steps)
        return {"loss": float(step.values[at]), "values": said(training, step.answers), "timing": step.timing}

    return call


def said(training: Any, answers: NDArray[np.float64] | None) -> dict[str, float]:
    """The answers of a step's neighbours over all tasks, by column."""
    from clmfast.measure.window import ANSWERS, MEASURES_OF_UNSEEN, SPLIT

    if answers is None:
        return {}
    sums, counts = answers.sum(-1).swapaxes(0, 1)
    return {
        f"window/{readout}/layer{layer}/{f'{SPLIT}/' * (name in MEASURES_OF_UNSEEN)}{name}": share[layer, r]
        for name, share in zip(ANSWERS, sums / counts, strict=True)
        for r, readout in enumerate(training.config.measure.readouts)
        for layer in range(share.shape[0])
    }


def probed(case: dict[str, Any]) -> Call:
    """A whole probe: forward pass and measures."""
    training = _ours(case, measure_every=1, probe_every=PROBE_EVERY)

    def call(i: int) -> Any:
        assert training.probe is not None
        with training.all_threads():
            training.probe.measure(training.model)
        return {"loss": None}

    return call


def plain(case: dict[str, Any]) -> Call:
    from benchmarks.training import PlainTraining, our_training, run_config

    training = PlainTraining(our_training(run_config()))
    return lambda i: {"loss": training.step()}


def hooks(case: dict[str, Any]) -> Call:
    """The plain training with forward hooks; see SklearnWindow."""
    from benchmarks.sklearn_window import SklearnWindow
    from benchmarks.training import PlainTraining, our_training, run_config

    training = PlainTraining(our_training(run_config()))
    window = SklearnWindow(training)

    def call(i: int) -> Any:
        loss = window.step()
        return {"loss": loss, "values": window.measure() if window.is_full else None}

    return call


CONTENDERS = (
    Contender(MEASURED, measured, RUN),
    Contender(UNMEASURED, unmeasured, RUN),
    Contender(PROBED, probed, RUN),
    Contender(BESIDE, measured, ONE_THREAD, options={"threads": 1}),
    Contender(UNMEASURED_ONE, unmeasured, ONE_THREAD, options={"threads": 1}),
    Contender(PROBED_BESIDE, probed, ONE_THREAD, options={"threads": 1}),
    Contender(PLAIN, plain, HOOKS_PROCESS, ("sklearn",)),
    Contender(HOOKS, hooks, HOOKS_PROCESS, ("sklearn",)),
)


def gate(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    """Measuring must change no bit of our losses; others' losses and the rival's measures must agree with ours. Layer 0
    is left out: at one token, states differ by their position only, and ties decide."""
    wrong = {}
    losses = {
        name: np.array([answer["loss"] for answer in result])
        for name, result in results.items()
        if name not in (PROBED, PROBED_BESIDE)
    }
    same = {MEASURED: UNMEASURED, BESIDE: UNMEASURED_ONE}
    for name, loss in losses.items():
        right = np.array([answer["loss"] for answer in anchor(results, same.get(name, UNMEASURED))])
        off = np.abs(loss - right)[:5].max()
        if not off <= (0.0 if name in same else LOSS_TOLERANCE):
            wrong[name] = f"a loss is off by {off:.2g}"
    for i, answer in enumerate(results.get(HOOKS, ())):
        if answer.get("values") is None:
            continue
        ours = results[MEASURED][i]["values"]
        for name, value in answer["values"].items():
            tolerance = PURITY_TOLERANCE if name.endswith("purity") else ACCURACY_TOLERANCE
            if "/layer0/" not in name and not abs(ours[name] - value) <= tolerance:
                wrong[HOOKS] = f"{name} is {value:.3f} at step {i}, ours {ours[name]:.3f}"
    return wrong


def cycle_mean_s(times: Times, length: int) -> float:
    """Median at each place of the cycle, averaged over it."""
    return float(np.median(np.reshape(times.seconds, (-1, length)), axis=0).mean())


def test_tax(compete: Any, claim: Any) -> None:
    from benchmarks.training import run_config
    from clmfast.config import to_dict

    config = run_config(measure_every=1)
    cycle = config.measure.cold_every
    n_steps = N_CYCLES * cycle
    outcome = compete(
        "step of the default run, measured and unmeasured",
        {"config": to_dict(config)},
        CONTENDERS,
        gate,
        n_checks=N_CHECKS,
        rounds={
            **dict.fromkeys((MEASURED, UNMEASURED, BESIDE, UNMEASURED_ONE), n_steps),
            **dict.fromkeys((PROBED, PROBED_BESIDE), N_PROBES),
        },
    )
    times = outcome.times
    with_s, without_s, beside_s, one_thread_s = (
        cycle_mean_s(times[name], cycle) for name in (MEASURED, UNMEASURED, BESIDE, UNMEASURED_ONE)
    )
    of_medians = times[MEASURED].median_s / times[UNMEASURED].median_s - 1
    recorded = np.median([_recorded_tax(answer["timing"]) for answer in outcome.checked[MEASURED][N_FULL:]])
    detail = f"of medians {of_medians:.1%}, as recorded, without riders, {recorded:.1%}; step {1e3 * without_s:.0f} ms"
    claim("tax of the default run, window", with_s / without_s - 1, 0.18, 0.08, unit="%", at_most=True, detail=detail)
    probe_s = times[PROBED].median_s
    detail = f"a probe takes {1e3 * probe_s:.0f} ms"
    what = f"tax of the probe every {PROBE_EVERY} steps"
    claim(what, probe_s / PROBE_EVERY / without_s, 0.09, 0.05, unit="%", at_most=True, detail=detail)
    whole = (with_s + probe_s / PROBE_EVERY) / without_s
    claim("default run over an unmeasured one", whole, 1.3, 1.15, at_most=True, detail="calculated from the two taxes")
    beside = beside_s / one_thread_s - 1
    of_probe = times[PROBED_BESIDE].median_s / PROBE_EVERY / one_thread_s
    detail = f"window {beside:.1%}, probe {of_probe:.1%}; step of one thread {1e3 * one_thread_s:.0f} ms"
    what = "tax of both, one thread trains and a second core measures"
    claim(what, beside + of_probe, 0.10, 0.05, unit="%", at_most=True, detail=detail)
    what = "tax of hooks + .cpu() + scikit-learn"
    if HOOKS not in times or PLAIN not in times:
        claim(what, None, unit="%", detail=str({**outcome.skipped, **outcome.dropped}))
        return
    added_s = times[HOOKS].median_s - times[PLAIN].median_s
    detail = f"adds {1e3 * added_s:.0f} ms to a plain step; ours adds {1e3 * (with_s - without_s):.0f} ms"
    claim(what, added_s / times[PLAIN].median_s, unit="%", detail=detail)


def _recorded_tax(timing: Mapping[str, float]) -> float:
    """Without the unseen examples, which ride along in the training step."""
    return (timing["capture_ms"] + timing["window_ms"]) / timing["step_ms"]


def our_probe(case: dict[str, Any]) -> Call:
    """The states of both probe sets: for each readout [L, N + Q, D]."""
    import torch

    from benchmarks.training import our_training, run_config

    training = our_training(run_config(measure_every=1, probe_every=50))

    def call(i: int) -> Any:
        assert training.probe is not None
        found = training.probe.states(training.model)
        return [torch.cat([train, *unseen.values()], 1) for train, unseen in found]

    return call


def plain_probe(case: dict[str, Any]) -> Call:
    """The same states by a forward pass of the plain model over padded batches, with forward hooks."""
    import torch
    from torch import nn

    from benchmarks.training import OneDnnLinear, our_training, padded, plain_model, run_config

    training = our_training(run_config(measure_every=1, probe_every=50))
    torch.use_deterministic_algorithms(False)
    assert training.probe is not None
    model = plain_model(training, OneDnnLinear if case["linear"] == "onednn" else nn.Linear)
    n_layers, width, tasks = training.model.n_taps, training.config.model.width, training.tasks
    sets = [(s.readout, np.concatenate([s.train, *s.unseen.values()])) for s in training.probe.sets]
    banks = [torch.empty(n_layers, len(examples), width) for _, examples in sets]
    now: dict[str, Any] = {}
    model.on_states(lambda layer, x: now["bank"][layer].copy_(x[torch.arange(len(x)), now["position"]]))

    @torch.no_grad()
    def call(i: int) -> Any:
        for (readout, examples), bank in zip(sets, banks, strict=True):
            for first in range(0, len(examples), CHUNK):
                batch = padded(tasks.pack(examples[first : first + CHUNK], readout))
                now["bank"] = bank[:, first : first + CHUNK]
                now["position"] = torch.from_numpy(getattr(batch, readout))
                model(torch.from_numpy(batch.tokens), now["position"])
        return banks

    return call


PROBE_CONTENDERS = (
    Contender("clmfast", our_probe, RUN),
    Contender("torch eager", plain_probe, TORCH, options={"linear": "torch"}),
    Contender("torch eager, oneDNN linear", plain_probe, TORCH, options={"linear": "onednn"}),
)


def probe_gate(results: Mapping[str, Sequence[Any]]) -> dict[str, str]:
    wrong, (plain,) = {}, anchor(results, "torch eager")
    for name, (states,) in results.items():
        off = max(_largest_difference(a, b) for a, b in zip(states, plain, strict=True))
        if not off <= STATE_TOLERANCE:
            wrong[name] = f"a state is off by {off:.2g}"
    return wrong


def _largest_difference(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(np.abs(a - b).max()) if a.shape == b.shape else np.inf


def test_probe(compete: Any, claim: Any) -> None:
    what = "probe of 2048 + 512 sequences, default task, both readouts: forward pass"
    outcome = compete(what, {"probe_train": 2048, "probe_unseen": 512}, PROBE_CONTENDERS, probe_gate, n_checks=1)
    claim(what, outcome.ratio(["torch eager"]), 4.0, 8.0, detail=f"plain torch eager; {outcome.best_text()}")
