"""tests/faults: planted faults are found, and every op is in the table."""

from __future__ import annotations

import ctypes
import time
from random import Random

import pytest
import torch

from tests.faults import fuzz, leaks, readers, table
from tests.faults.arguments import Maker, Spec, leaves
from tests.faults.guard import Guard
from tests.faults.worker import Limits, run_cases


class Planted:
    """Cases of which some do what they must not."""

    name = "planted"
    command = "case {i}"

    def __init__(self, do) -> None:
        self.do = do

    def start(self) -> None:
        pass

    def run(self, i: int) -> str | None:
        return self.do(i)

    def describe(self, i: int) -> str:
        return f"planted {i}"


def found(do, n_cases=8, case_s=20.0):
    return {fault.i: fault.text for fault in run_cases(Planted(do), n_cases, Limits(case_s=case_s))}


def test_a_crash_and_a_hang_are_recorded_and_the_rest_goes_on():
    def do(i):
        if i == 2:
            ctypes.string_at(0)
        if i == 3:
            time.sleep(60)
        return "wrong" if i in (0, 7) else None

    faults = found(do, case_s=1.0)
    assert faults == {0: "wrong", 2: "dies of SIGSEGV: planted 2", 3: "hangs: more than 1 s: planted 3", 7: "wrong"}


@pytest.mark.parametrize("at_end", [True, False])
def test_a_read_astray_is_caught_by_the_guard_page(at_end):
    def do(i):
        x = Guard().place((3, 5), (5, 1), torch.float32, at_end).tensor
        beyond = x.data_ptr() + (x.nbytes if at_end else -4)
        ctypes.string_at(beyond if i == 1 else x.data_ptr(), 4)

    assert found(do, n_cases=3) == {1: "dies of SIGSEGV: planted 1"}


def test_memory_is_limited_in_a_child():
    def do(i):
        return "too much" if len(bytearray((3 if i else 1) << 30)) > 2 << 30 else None

    assert list(found(do, n_cases=2)) == [1]  # a MemoryError ends the child: it is no exception of a case


def planted_op(call):
    return table.Op("planted", lambda rng: {"x": Spec((4,))}, call)


def wrong_of(call, n_cases=20):
    cases = fuzz.OpCases("raw", [planted_op(call)], 0)
    cases.start()
    return " ".join(filter(None, (cases.run(i) for i in range(n_cases))))


def test_the_oracle():
    def fresh(x):
        return torch.empty(4)  # left as it is: full of NaN the second time

    def changes(x):
        return x.add_(1)

    def fails(x):
        raise RuntimeError("new_empty API call failed at ops.h")

    def refuses(x):
        if x is None or x.shape != (4,) or x.dtype != torch.float32:
            raise ValueError("planted: x must be [4] float32")
        return x * 2

    assert "another result the second time" in wrong_of(fresh)
    assert "an input, or memory beside it, changed" in wrong_of(changes)
    assert "a good call is refused: RuntimeError" in wrong_of(fails)
    assert "a text of the machinery" in wrong_of(fails)
    assert "a good call is refused" not in wrong_of(refuses)


def test_a_case_is_a_function_of_its_number():
    for cases, *_ in fuzz.sources(3).values():
        assert [cases.describe(i) for i in range(30)] == [cases.describe(i) for i in range(30)]


def test_every_op_has_a_generator_of_good_calls():
    assert not table.missing()
    maker = Maker()
    for op in (*table.PUBLIC, *table.RAW):
        for i in range(5):
            rng = Random(i)
            op.call(**maker.make(op.draw(rng), rng).arguments)


def test_layouts_stay_within_their_memory():
    maker = Maker()
    for layout in (("permuted", [1, 0]), ("sliced", 3), ("padded", 2), ("expanded", 0), ("overlapping",)):
        spec = Spec((3, 4), torch.int64, ("labels", 5, 9), layout)
        x = maker.make({"x": spec}, Random(0)).arguments["x"]
        assert x.shape == (3, 4) and x.stride() == spec.strides()
        assert ((x >= 5) & (x < 9)).all()


def test_leaves_are_found_within_lists():
    assert [key for _, key, _ in leaves({"a": 1, "b": [[2], 3]})] == ["a", 0, 1]


def test_readers_accept_their_good_files_and_a_planted_fault_is_found(tmp_path):
    def read(folder):
        if (folder / "f.json").read_bytes() != b'{"a": 1}':
            raise KeyError("a")

    planted = readers.Reader(
        "planted", lambda folder: (folder / "f.json").write_bytes(b'{"a": 1}'), read, (ValueError,)
    )
    cases = readers.ReaderCases(0, [planted])
    cases.start()
    told = [cases.run(i) for i in range(40)]
    assert any(text and "an exception of another kind: KeyError" in text for text in told)
    cases.folder.rmdir()
    for reader in readers.READERS:
        folder = tmp_path / reader.name
        folder.mkdir()
        reader.make(folder)
        reader.read(folder)


def test_a_leak_is_found_and_its_absence_too():
    lost = []
    losing_c, losing_python, keeping = (
        leaks.LeakCases([planted_op(call)], 500, 0)
        for call in (lambda x: lost.append(ctypes.CDLL(None).malloc(64)), lambda x: lost.append([x]), lambda x: x * 2)
    )
    for cases in (losing_c, losing_python, keeping):
        cases.start()
    assert "bytes of C's memory per call: planted" in losing_c.run(0)
    assert "per call: planted" in losing_python.run(0)
    assert keeping.run(0) is None
