"""What a run says about each claim of the paper: the number, the bar that it is held to, and whether it holds.

Claims are those of Wu & Varshney, arXiv 2402.12151. Bars are read from the probe at the last step, on unseen
instructions, at the readout `instruction_end` (the state that has read the instruction and nothing else).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import uniform_filter1d
from scipy.stats import rankdata, spearmanr

from clmfast.record import Run

HEADLINE_READOUT = "instruction_end"
HEADLINE_SPLIT = "unseen_instruction"
SMOOTHING_STEPS = 25
PLATEAU_SHARE = 0.95
CLOSE_SHARE_OF_RUN = 0.2
AMBIGUOUS = 0.05  # width of the band from which on a number is not certain


@dataclass(frozen=True)
class Finding:
    """`holds` is None where the run cannot speak to the claim."""

    claim: str
    number: str
    bar: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        return "not measured" if self.holds is None else "holds" if self.holds else "does not hold here"

    @property
    def kind(self) -> str:
        """One word for style sheets: holds, fails, unmeasured."""
        return "unmeasured" if self.holds is None else "holds" if self.holds else "fails"


def final_by_layer(run: Run, measure: str, split: str = "", readout: str = HEADLINE_READOUT) -> NDArray[np.float64]:
    """[layers] of the last probe."""
    values = run.by_layer("probe", readout, measure, split)
    probed = np.isfinite(values).any(1)
    return values[probed][-1] if probed.any() else np.full(len(run.layers), np.nan)


def first_by_layer(run: Run, measure: str, split: str = "", readout: str = HEADLINE_READOUT) -> NDArray[np.float64]:
    """[layers] of the probe before the first update: the untrained model."""
    return run.by_layer("probe", readout, measure, split)[0]


def best_layer(run: Run, readout: str = HEADLINE_READOUT) -> int:
    """The layer whose states cluster most by task at the end."""
    return int(np.nanargmax(np.nan_to_num(final_by_layer(run, "ari_task", "", readout), nan=-1.0)))


def smooth_curve(step: NDArray[np.int64], curve: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(steps, centred mean over 25 steps) where the curve was measured."""
    is_measured = np.isfinite(curve)
    step, curve = step[is_measured], curve[is_measured]
    if len(step) < 2:
        return step, curve
    spacing = max(1.0, float(np.median(np.diff(step))))
    return step, uniform_filter1d(curve, max(1, round(SMOOTHING_STEPS / spacing)), mode="nearest")


def plateau(smooth: NDArray[np.float64]) -> float:
    """Mean of the last tenth of a smoothed curve."""
    return float(smooth[-max(1, len(smooth) // 10) :].mean())


def lasting_step(step: NDArray[np.int64], smooth: NDArray[np.float64], level: float) -> int | None:
    """First step from which a smoothed curve stays at or above the level; None if it ends below."""
    below = np.flatnonzero(smooth < level)
    first = below[-1] + 1 if len(below) else 0
    return int(step[first]) if first < len(step) else None


def saturation_step(step: NDArray[np.int64], curve: NDArray[np.float64]) -> int | None:
    """First step from which the smoothed curve stays at or above 95 % of its plateau; the last one if it ends below
    that, None without a curve."""
    step, smooth = smooth_curve(step, curve)
    if len(step) < 2:
        return None
    found = lasting_step(step, smooth, PLATEAU_SHARE * plateau(smooth))
    return int(step[-1]) if found is None else found


def early_stopping_step(run: Run) -> int | None:
    """The step that early stopping picked, or the best one so far if its patience never ran out."""
    picked = [e["picked_step"] for e in run.events if e["event"] == "early_stop"]
    if picked:
        return int(picked[-1])
    accuracy = run.column(f"validation/{HEADLINE_SPLIT}/accuracy")
    return int(run.step[np.nanargmax(accuracy)]) if np.isfinite(accuracy).any() else None


def task_curve(run: Run, layer: int, readout: str = HEADLINE_READOUT) -> NDArray[np.float64]:
    """ARI(task) of one layer against the rows: the window's, at every step."""
    return run.column(f"window/{readout}/layer{layer}/ari_task")


def findings(run: Run) -> list[Finding]:
    """Every claim that a run can speak to; those it cannot are said to be not measured."""
    accuracy = run.column(f"validation/{HEADLINE_SPLIT}/accuracy")
    measured = accuracy[np.isfinite(accuracy)]
    last_accuracy = float(measured[-1]) if len(measured) else np.nan
    found = [
        Finding(
            "The model follows unseen instructions",
            f"accuracy {last_accuracy:.3f}",
            "≥ 0.95",
            bool(last_accuracy >= 0.95) if len(measured) else None,
        )
    ]
    if HEADLINE_READOUT not in run.readouts or not run.has("probe"):
        why = "not measured: needs the probe at instruction_end"
        return [*found, Finding("Clusters by task form, layer by layer", why, "", None)]

    ari = final_by_layer(run, "ari_task")
    top = best_layer(run)
    found.append(
        Finding(
            "Hidden states cluster by task (1)",
            f"ARI {ari[top]:.2f} in layer {top}" + _band_text(run, top) + _control_text(run, "ari_task", ""),
            "≥ 0.80",
            bool(ari[top] >= 0.8),
        )
    )
    found.append(
        Finding("The embedding layer stays flat (2)", f"ARI {ari[0]:.2f} in layer 0", "≤ 0.10", bool(ari[0] <= 0.1))
    )
    # Of layers that tie, spearmanr takes the mean rank; a constant curve has no rank correlation at all.
    rho = float(spearmanr(np.arange(len(ari)), ari).statistic) if len(set(rankdata(ari))) > 1 else 0.0
    found.append(Finding("Higher layers cluster more (2)", f"rank correlation {rho:.2f}", "≥ 0.90", bool(rho >= 0.9)))

    saturated = saturation_step(run.step, task_curve(run, top))
    stopped = early_stopping_step(run)
    if saturated is None or stopped is None:
        found.append(Finding("Early stopping lies near saturation (3)", "not measured", "", None))
    else:
        n_close = CLOSE_SHARE_OF_RUN * run.config.steps
        found.append(
            Finding(
                "Early stopping lies near saturation (3)",
                f"early stopping {stopped}, saturation {saturated}",
                f"≤ {n_close:.0f} steps apart",
                bool(abs(stopped - saturated) <= n_close),
            )
        )
    if HEADLINE_SPLIT not in run.config.measure.probe_splits:
        return [*found, Finding("Unseen instructions fall near their task (4)", "not measured", "", None)]
    knn = final_by_layer(run, "knn_accuracy", HEADLINE_SPLIT)
    n_top = min(2, len(knn) - 1)
    found.append(
        Finding(
            "Unseen instructions fall near their task (4)",
            f"kNN accuracy {knn[-n_top:].min():.3f} in the top layers, {knn[0]:.2f} in layer 0",
            "≥ 0.95, ≤ 0.20",
            bool(knn[-n_top:].min() >= 0.95 and knn[0] <= 0.2),
        )
    )
    across = final_by_layer(run, "cross_grammar_knn_accuracy", HEADLINE_SPLIT)
    untrained = first_by_layer(run, "cross_grammar_knn_accuracy", HEADLINE_SPLIT)
    i_best = int(np.nanargmax(across)) if np.isfinite(across).any() else 0
    found.append(
        Finding(
            "Grammars of a task merge by function (5)",
            f"cross-grammar kNN {across[i_best]:.2f} in layer {i_best}; {across[0]:.2f} in layer 0, "
            f"at most {np.nanmax(untrained):.2f} untrained",
            "≥ 0.80; ≤ 0.15, ≤ 0.15",
            bool(across[i_best] >= 0.8 and across[0] <= 0.15 and np.nanmax(untrained) <= 0.15),
        )
    )
    return found


def control(run: Run, kind: str, readout: str, measure: str, split: str = "", layer: int = -1) -> dict | None:
    """One control of the run: {'mean', 'low', 'high'}, or None. `layer` -1 is a control that has no layers."""
    for entry in run.controls:
        if (entry["control"], entry["readout"], entry["measure"], entry["split"]) == (
            kind,
            readout,
            measure,
            split,
        ) and (entry["layer"] == layer):
            return entry
    return None


def _band_text(run: Run, layer: int) -> str:
    """Says where the number is read from a step at which no single partition is the best; a run of version 1 does not
    tell."""
    if run.measurement_version == 1:
        return ""
    low, high = (final_by_layer(run, f"ari_task_{end}")[layer] for end in ("low", "high"))
    is_ambiguous = high - low > AMBIGUOUS
    return f", ambiguous: {low:.2f} to {high:.2f} among partitions that fit equally well" if is_ambiguous else ""


def _control_text(run: Run, measure: str, split: str) -> str:
    raw = control(run, "raw_strings", HEADLINE_READOUT, measure, split)
    return f" (letters alone {raw['mean']:.2f})" if raw else ""
