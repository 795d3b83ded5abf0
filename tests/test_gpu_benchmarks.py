"""Sections of benchmarks.gpu_check on the CPU with tiny shapes: they pass with our ops, and fail with wrong ones."""

from __future__ import annotations

import dataclasses
import time

import pytest
import torch

import clmfast.model
from benchmarks import gpu_attention, gpu_ops, gpu_run, gpu_smoke, gpu_step
from benchmarks.gpu_attention import Gate, Shape
from benchmarks.gpu_contest import Report, in_turns
from benchmarks.gpu_ops import Search
from benchmarks.training import PlainTraining
from clmfast import ops
from clmfast.config import PRESETS, check, replays_graph, to_dict
from clmfast.files import write_json
from clmfast.train import Training

SEARCHES = [
    Search("clustered", 2, 60, 16, 3, n_reference=5, aim_us=1),
    Search("7 rows", 2, 60, 8, 3, n_reference=5),
    Search("gaussian", 2, 60, 16, 3, Q=9, n_groups=4, n_reference=5),
]
SHAPES = [Shape(5, 9, 2, 16, True, 1, 2, torch.float32), Shape(3, 8, 2, 16, False, 1, 2)]


KNN, KMEANS, SCORES, ATTENTION = ops.knn, ops.kmeans, ops.partition_scores, ops.attention
CAPTURE, VOTE, SEPARATION = ops.capture_rows, ops.majority_vote, ops.separation


def capture_of_twice_the_rows(x, start, stop, slot, bank, norm2):
    CAPTURE(2 * x, start, stop, slot, bank, norm2)


def knn_of_the_farthest(*arguments, **more):
    found = KNN(*arguments, **more)
    return found._replace(index=found.index.flip(2))


def kmeans_of_other_labels(*arguments, **more):
    found = KMEANS(*arguments, **more)
    return found._replace(label=(found.label + 1) % 5)


SECTIONS = {
    "knn": (lambda report: gpu_ops.knn(report, SEARCHES), knn_of_the_farthest),
    "kmeans": (lambda report: gpu_ops.kmeans(report, 2, 200, 8, 5, 6), kmeans_of_other_labels),
    "partition_scores": (
        lambda report: gpu_ops.scores(report, 2, 50, 4),
        lambda *arguments, **more: ops.PartitionScores(*(x + 1e-9 for x in SCORES(*arguments, **more))),
    ),
    "capture_rows": (lambda report: gpu_ops.capture(report, 2, 5, 6, 8, 16), capture_of_twice_the_rows),
    "majority_vote": (lambda report: gpu_ops.votes(report, 2, 50, 3, 4), lambda *arguments: VOTE(*arguments) + 1),
    "separation": (lambda report: gpu_ops.separation(report, 2, 60, 8, 4), lambda *x: 1.01 * SEPARATION(*x)),
    "attention": (
        lambda report: gpu_attention.short(report, SHAPES),
        lambda qkv, lengths=None: ATTENTION(qkv.flip(1), lengths).flip(1),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_other_library(monkeypatch):
    """Importing them takes seconds, and their times are of no use here."""
    for module in (gpu_ops, gpu_attention):
        monkeypatch.setattr(module, "is_installed", lambda name: False)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_reports_an_op_that_is_wrong(name, monkeypatch):
    section, wrong = SECTIONS[name]
    report = Report("cpu")
    monkeypatch.setattr(ops, name, wrong)
    section(report)
    assert report.outcome(True).startswith("failed") and "WrongResult" in report.outcome(True)
    assert not any(entry["contender"] == "clmfast" for entry in report.found["times"])


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_passes_with_ours(name):
    section, _ = SECTIONS[name]
    report = Report("cpu")
    section(report)
    assert report.outcome(True) == "ok"
    assert any(entry["contender"] == "clmfast" for entry in report.found["times"])
    assert report.found["profiles"] and all(entry["kernels"] for entry in report.found["profiles"])


def test_a_shape_that_fails_leaves_out_itself(monkeypatch):
    def fails_for_narrow_points(points, *arguments, **more):
        if points.shape[2] == 8:
            raise RuntimeError("too narrow")
        return KNN(points, *arguments, **more)

    monkeypatch.setattr(ops, "knn", fails_for_narrow_points)
    report = Report("cpu")
    gpu_ops.knn(report, SEARCHES)
    assert [entry["what"] for entry in report.found["failures"]] == [str(SEARCHES[1])]
    assert {entry["what"] for entry in report.found["times"]} == {str(SEARCHES[0]), str(SEARCHES[2])}
    assert "too narrow" in report.outcome(True)


def test_a_rival_that_is_wrong_gets_no_time(monkeypatch):
    monkeypatch.setattr(
        gpu_ops, "search_rivals", lambda search, sets: {"none": ("graph", lambda i: [torch.zeros(2, 60, 3).long()])}
    )
    report = Report("cpu")
    gpu_ops.knn(report, SEARCHES[:1])
    assert report.outcome(True) == "ok" and any("none left out" in entry["text"] for entry in report.found["notes"])
    assert {entry["contender"] for entry in report.found["times"]} == {"clmfast", "clmfast, known bound"}


# ---- attention


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gate_of_attention(shape):
    gate = Gate(shape, "cpu")
    assert gate.wrong(ops.attention) == "" and gate.wrong(gpu_attention.rivals()["SDPA math"]) == ""
    assert "wrong by" in gate.wrong(lambda qkv, lengths: ops.attention(qkv, lengths) / 2)
    assert "wrong by" in gate.wrong(lambda qkv, lengths: ops.attention(qkv, lengths).roll(1, 0))


def test_the_searches_and_shapes_that_are_claimed():
    shapes = [*gpu_attention.SHORT, *gpu_attention.LONG]
    assert len({str(shape) for shape in shapes}) == len(shapes) and len(gpu_attention.WITH_FLEX) <= 3
    assert {shape.T for shape in gpu_attention.SHORT} == {16, 32, 64} and all(s.T > 64 for s in gpu_attention.LONG)
    searches = [*gpu_ops.SEARCHES, *gpu_ops.SEARCHES_OF_MANY]
    assert len({str(search) for search in searches}) == len(searches)
    assert {s.kind for s in gpu_ops.SEARCHES if (s.S, s.N, s.D) == (7, 2048, 256)} == {
        "clustered",
        "gaussian",
        "112 rows",
    }
    assert len(gpu_ops.points("112 rows", 1, 2048, 4, 0, "cpu")[0].unique(dim=0)) == 112


# ---- the training step


@pytest.fixture
def tiny_steps(small):
    return dataclasses.replace(small, measure=dataclasses.replace(small.measure, cold_every=3))


def of_other_rows(*arguments, **more):
    *states, y = TRANSFORMER_BLOCKS(*arguments, **more)
    return [*states, y.roll(1, 0)]


TRANSFORMER_BLOCKS = ops.transformer_blocks


def test_the_step_is_measured(tiny_steps, small_tasks):
    report = Report("cpu")
    gpu_step.measure(report, "small", tiny_steps, small_tasks, n_warm=4, n_timed=1)
    assert report.outcome(True) == "ok"
    counters = {key for entry in report.found["counters"] for key in entry}
    assert {"host_ms_before_replay", "copies_to_device", "copies_to_host", "kernel_launches"} <= counters
    claims = [entry["what"].partition(": ")[2] for entry in report.found["claims"]]
    assert claims == ["tax of the window", "times as fast as compiled rival"]
    assert len(report.found["profiles"]) == 3  # unmeasured, measured, and with a cold start


def test_a_step_that_is_wrong_is_reported(tiny_steps, small_tasks, monkeypatch):
    monkeypatch.setattr(clmfast.model.ops, "transformer_blocks", of_other_rows)
    report = Report("cpu")
    gpu_step.measure(report, "small", tiny_steps, small_tasks, n_warm=2, n_timed=1)
    assert "the loss of step 0 is" in report.outcome(True) and not report.found["times"]


def test_a_compiled_rival_that_is_wrong_gets_no_time(tiny_steps, small_tasks):
    report = Report("cpu")
    gpu_step.race(report, "step", tiny_steps, small_tasks, 1, 1, 1.0, [0.1, 0.1])
    assert not report.found["times"] and not report.found["claims"]
    assert "the compiled rival left out: the loss of step 0 is" in report.found["notes"][-1]["text"]


def test_what_is_compared_of_a_step():
    losses = [3.0, 2.0, 2.0, 1.0, 1.0, 1.0]
    assert gpu_step.losses_differ([losses, [1.0001 * x for x in losses]], losses) == ""
    assert "step 1" in gpu_step.losses_differ([losses, [3.0, 2.1, *losses[2:]]], losses)
    assert "on average" in gpu_step.losses_differ([[*losses[:5], 1.1]], losses)
    assert "step 0" in gpu_step.losses_differ([[torch.nan, *losses[1:]]], losses)


def test_the_rival_of_the_step_computes_the_same(small, small_tasks):
    config = dataclasses.replace(small, steps=10, measure_every=0)
    ours, rival = Training(config, small_tasks), PlainTraining(Training(config, small_tasks))
    rival.n_longest = ours.model.max_length  # as for torch.compile(mode=...)
    assert sum(p.numel() for p in rival.model.parameters()) == ours.model.n_parameters
    losses = gpu_smoke.rows_of(ours, 5)["train/loss"].tolist()
    expected = [rival.step() for _ in range(5)]
    assert gpu_step.losses_differ([losses], expected) == ""
    other = PlainTraining(Training(dataclasses.replace(config, seed=1), small_tasks))
    assert gpu_step.losses_differ([losses], [other.step() for _ in range(5)]) != ""


def test_calls_take_turns():
    order = []
    found = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 1, 2)
    assert order == ["a", "b"] * 3 and set(found) == {"a", "b"}


@pytest.mark.parametrize("preset", ["tiny", "paper"])
def test_presets_run_on_a_gpu_as_a_graph(preset):
    config = gpu_step.config_of(PRESETS[preset], "cuda", 1)
    check(config)
    assert replays_graph(config)[0]


# ---- smoke, and the whole run


def test_smoke_calls_every_op():
    report = Report("cpu")
    gpu_smoke.small_calls(report)
    gpu_smoke.attention(report)
    assert report.outcome(True) == "ok"
    called = {entry["what"].split()[0] for entry in report.found["checked"]}
    of_a_cpu = {"transformer_blocks", "attention_block", "mlp_block", "kmeans_search"}
    # in the step, on a CPU alone, and what is no op
    functions = {name for name in ops.__all__ if name.islower()} - of_a_cpu - {"composed", "search_memory"}
    assert functions - called == {"packed_attention"} and "packed" in called


def test_smoke_trains_with_and_without_measuring(tiny_steps, small_tasks):
    report = Report("cpu")
    gpu_smoke.small_step(report, tiny_steps, small_tasks, n_steps=6)
    assert report.outcome(True) == "ok" and len(report.found["checked"]) == 2


def test_smoke_reports_a_step_that_is_wrong(tiny_steps, small_tasks, monkeypatch):
    from clmfast.static_step import StaticBatch

    fill = StaticBatch.fill
    seen = []

    def fill_once(self, host, batch):  # as a graph that reads old memory
        if self not in seen:
            fill(self, host, batch)
            seen.append(self)

    monkeypatch.setattr(StaticBatch, "fill", fill_once)
    report = Report("cpu")
    gpu_smoke.small_step(report, tiny_steps, small_tasks, n_steps=6)
    assert "train/loss of step 1 is" in report.outcome(True)


def test_the_small_step_is_a_possible_one_and_is_captured():
    config = gpu_smoke.small_config()
    check(gpu_step.config_of(config, "cuda", 1))
    measure = config.measure
    n_full = max(measure.window // config.train.batch, measure.unseen_window // measure.unseen_per_step)
    n_cold = [step for step in range(n_full, gpu_smoke.N_STEPS) if step % measure.cold_every == 0]
    assert len(n_cold) > 3  # WARM_STEPS, then one that is captured


def test_the_default_run(small, monkeypatch, tmp_path):
    import clmfast.run

    def run_a_small_one(arguments):
        asked = clmfast.run.parse(arguments).run
        assert (asked.seed, asked.steps) == (0, PRESETS["tiny"].steps)
        config = tmp_path / "small.json"
        write_json(config, to_dict(dataclasses.replace(small, measure_every=asked.measure_every)))
        begun_s = time.perf_counter()
        assert clmfast.run.main(["--config", str(config), "--out", asked.out]) == 0
        return time.perf_counter() - begun_s

    monkeypatch.setattr(gpu_run, "run", run_a_small_one)
    report = Report("cpu")
    gpu_run.default_run(report)
    assert report.outcome(True) == "ok"
    assert len(report.found["findings"]) > 3 and {"number", "bar", "holds"} <= {*report.found["findings"][0]}
    assert report.found["counters"][0]["wall_s"] > report.found["counters"][0]["step_s"] > 0
    assert report.found["claims"][0]["what"] == "default run: tax in wall time, probe included"
    assert report.found["claims"][0]["value"] is not None


def test_a_run_that_fails_is_told():
    with pytest.raises(RuntimeError, match="exit status 2"):
        gpu_run.run(["--steps", "0"])


def test_the_default_run_names_what_is_missing(monkeypatch):
    monkeypatch.setattr(gpu_run, "is_installed", lambda module: module != "tyro")
    with pytest.raises(gpu_run.Skipped, match="tyro not installed"):
        gpu_run.default_run(Report("cpu"))
