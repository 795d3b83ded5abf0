"""What every recorded number is: its unit, range, chance level and formula, in one place.

A column of the step table is one measure of one estimator at one readout and layer (and, for the numbers that compare
unseen with training states, one split). Records, tables, reports and the docs take names and texts from here.
MEASUREMENT_VERSION changes whenever a number's meaning does.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from clmfast.config import LABEL_KINDS

MEASUREMENT_VERSION = 2
READABLE_VERSIONS = (1, MEASUREMENT_VERSION)  # never mixed in one comparison
BAND_SHARE = 0.005  # partitions whose inertia is at most so much above the lowest are as good as that
BAND_STEPS = 14  # measured steps whose good partitions make the window's band
RIVAL_ARI = 0.05  # a partition whose ARI differs by more is one of another kind


@dataclass(frozen=True)
class Measure:
    """`low` and `high` bound the values (None: unbounded); `chance` is what states without task information give."""

    unit: str
    low: float
    high: float | None
    chance: str
    text: str


MEASURES: dict[str, Measure] = {
    "loss": Measure("nats", 0, None, "ln n_outputs", "cross-entropy of the training batch"),
    "accuracy": Measure("1", 0, 1, "1 / n_outputs", "share of right outputs"),
    "lr": Measure("1", 0, None, "", "learning rate of the step"),
    "grad_norm": Measure("1", 0, None, "", "norm of the gradient before clipping"),
    **{
        f"ari_{kind}": Measure(
            "1", -0.5, 1, "0", f"adjusted Rand index of k-means (K = tasks) against {kind.replace('_', ' x ')} labels"
        )
        for kind in LABEL_KINDS
    },
    "ari_task_low": Measure(
        "1",
        -0.5,
        1,
        "0",
        f"lowest ari_task of the partitions found whose inertia is within {BAND_SHARE:.1%} of the lowest; in a window, "
        f"of those of {BAND_STEPS} measured steps",
    ),
    "ari_task_high": Measure("1", -0.5, 1, "0", "highest ari_task of those"),
    "rival_inertia_gap": Measure(
        "1",
        0,
        None,
        "",
        f"(inertia - lowest) / lowest of the best partition found whose ari_task differs by more than {RIVAL_ARI}",
    ),
    "ari_task_assigned": Measure(
        "1", -0.5, 1, "0", "ari_task of the unseen states, assigned to the centroids fitted to training states"
    ),
    "ari_task_refit": Measure("1", -0.5, 1, "0", "ari_task of k-means fitted to the unseen states alone"),
    "nmi_task": Measure("1", 0, 1, "small, > 0", "normalised mutual information (arithmetic) with the task"),
    "homogeneity_task": Measure("1", 0, 1, "small, > 0", "1 - H(task | cluster) / H(task)"),
    "completeness_task": Measure("1", 0, 1, "small, > 0", "1 - H(cluster | task) / H(cluster)"),
    "v_measure_task": Measure("1", 0, 1, "small, > 0", "harmonic mean of homogeneity and completeness"),
    "purity_task": Measure("1", 0, 1, "> 1 / n_tasks", "share of points in the commonest task of their cluster"),
    "inertia_share": Measure("1", 0, 1, "", "k-means inertia over the total scatter about the mean"),
    "kmeans_iterations": Measure("iterations", 0, None, "", "Lloyd iterations that k-means took"),
    "kmeans_is_cold": Measure("0/1", 0, 1, "", "1: from k-means++; 0: warm, continued from the last step's centroids"),
    "silhouette_task": Measure("1", -1, 1, "<= 0", "centroid silhouette of the task labels"),
    "scatter_ratio_task": Measure("1", 0, None, "n_tasks / N", "between-task over within-task scatter"),
    "neighbour_purity": Measure(
        "1", 0, 1, "1 / n_tasks", "share of the k nearest training states that carry a training state's task"
    ),
    "knn_accuracy": Measure(
        "1", 0, 1, "1 / n_tasks", "unseen states whose k nearest training states vote for their task"
    ),
    "knn_macro_f1": Measure("1", 0, 1, "1 / n_tasks", "the same vote, F1 averaged over tasks"),
    "cross_grammar_knn_accuracy": Measure(
        "1", 0, 1, "(M - 1) / (n_tasks M - 1)", "knn_accuracy with states of the query's own grammar barred; M grammars"
    ),
    "n_points": Measure("points", 0, None, "", "training states measured"),
    "n_queries": Measure("points", 0, None, "", "unseen states measured"),
}


@dataclass(frozen=True)
class Column:
    """Where a number of the step table comes from. Empty strings and layer -1: does not apply."""

    estimator: str  # train, validation, window or probe
    measure: str
    readout: str = ""
    layer: int = -1
    split: str = ""

    @property
    def name(self) -> str:
        """estimator/readout/layerN/split/measure, without the parts that do not apply."""
        layer = f"layer{self.layer}" if self.layer >= 0 else ""
        return "/".join(part for part in (self.estimator, self.readout, layer, self.split, self.measure) if part)

    def describe(self) -> dict[str, Any]:
        """For the run's header."""
        return {"name": self.name, **asdict(self), "unit": MEASURES[self.measure].unit}


def layer_columns(
    estimator: str, readout: str, n_layers: int, measures: tuple[str, ...], split: str = ""
) -> list[Column]:
    """Columns of [measures, layers] values, measure by measure."""
    return [Column(estimator, measure, readout, layer, split) for measure in measures for layer in range(n_layers)]
