"""What one client sends is never believed before it is checked; the others' round goes on as if it had not been asked."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_distopt.compressors import TopK
from lightning_distopt.federated import FedMom, InProcessGrid, Screening
from lightning_distopt.federated.conversation import sorted_by_name
from lightning_distopt.federated.records import array_of_payload, tensors_of, to_record
from tests.federated.toy import content, equal, start, towards, toy_app

BAD = 2


def lying_array() -> Array:
    """A header that promises a terabyte."""
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (1 << 38,)})
    return Array(dtype="float32", shape=(3, 4), stype="numpy.ndarray", data=stream.getvalue())


def header(text: str) -> bytes:
    """What a reader of arrays gets to parse."""
    return b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.encode().ljust(117) + b"\n"


def replaced(arrays, **changes) -> ArrayRecord:
    record = to_record(arrays)
    for name, array in changes.items():
        record[name.replace("__", ".")] = array
    return record


def with_value(arrays, value: float):
    arrays = dict(arrays)
    arrays["layer.weight"] = arrays["layer.weight"].clone()
    arrays["layer.weight"][1, 2] = value
    return arrays


CASES = {
    "error": lambda w, y, r: (_ for _ in ()).throw(RuntimeError("out of memory")),
    "malformed: no arrays": lambda w, y, r: RecordDict({"metrics": MetricRecord({"num-examples": 1, "base-round": r})}),
    "malformed: two metric records": lambda w, y, r: RecordDict(
        {"arrays": to_record(y), "metrics": MetricRecord({"num-examples": 1}), "more": MetricRecord({"a": 1})}
    ),
    "malformed: a name is missing": lambda w, y, r: content(to_record(dict(list(y.items())[1:])), 1, r),
    "malformed: a name more": lambda w, y, r: content(to_record({**y, "more": torch.zeros(1)}), 1, r),
    "malformed: shape": lambda w, y, r: content(replaced(y, layer__weight=Array(np.zeros((4, 3), np.float32))), 1, r),
    "malformed: dtype": lambda w, y, r: content(replaced(y, layer__weight=Array(np.zeros((3, 4), np.float64))), 1, r),
    "malformed: cut": lambda w, y, r: content(
        replaced(y, layer__weight=Array("float32", (3, 4), "numpy.ndarray", to_record(y)["layer.weight"].data[:-4])),
        1,
        r,
    ),
    "malformed: garbage": lambda w, y, r: content(
        replaced(y, layer__weight=Array("float32", (3, 4), "numpy.ndarray", bytes(range(176)))), 1, r
    ),
    "malformed: a pickle": lambda w, y, r: content(
        replaced(y, layer__weight=Array("object", (3, 4), "pickle", b"\x80\x04N.")), 1, r
    ),
    "malformed: a terabyte": lambda w, y, r: content(replaced(y, layer__weight=lying_array()), 1, r),
    "malformed: 1 MB too much": lambda w, y, r: content(
        replaced(y, layer__weight=Array(np.zeros(250_000, np.float32))), 1, r
    ),
    "malformed: a header without an end": lambda w, y, r: content(
        replaced(y, layer__weight=Array("float32", (3, 4), "numpy.ndarray", header("{'descr':'<f4','shape':(3,4)"))),
        1,
        r,
    ),
    "malformed: more examples than float32 bears": lambda w, y, r: content(to_record(y), 1e300, r),
    "malformed: examples": lambda w, y, r: content(to_record(y), -1, r),
    "malformed: many examples": lambda w, y, r: content(to_record(y), float("inf"), r),
    "no_examples": lambda w, y, r: content(to_record(y), 0, r),
    "stale": lambda w, y, r: content(to_record(y), 1, r - 1),
    "non_finite: NaN": lambda w, y, r: content(to_record(with_value(y, float("nan"))), 1, r),
    "non_finite: infinity": lambda w, y, r: content(to_record(with_value(y, float("inf"))), 1, r),
    "norm": lambda w, y, r: content(
        to_record({n: w[n] + 1000 * (y[n] - w[n]) if w[n].is_floating_point() else y[n] for n in w}), 1, r
    ),
}


@pytest.mark.parametrize("first", [False, True], ids=["later", "in the first round"])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_reply_is_refused_and_counted_and_changes_nothing(case: str, first: bool) -> None:
    bad_round = 1 if first else 2

    def turn(client, server_round, arrays):
        if client == BAD and server_round == bad_round:
            return CASES[case](arrays, towards(client, arrays), server_round)
        return None

    def absent(client, server_round, arrays):
        if client == BAD and server_round == bad_round:
            raise RuntimeError("not there")

    strategy = FedMom(screening=Screening(norm_factor=30.0), fraction_evaluate=0.0)
    grid = InProcessGrid(toy_app(turn), 5)
    arrays = tensors_of(strategy.start(grid, to_record(start()), bad_round).arrays)
    assert strategy.collected is not None
    assert dict(strategy.collected.refused) == {case.split(":")[0]: 1}
    reference = FedMom(screening=Screening(norm_factor=30.0), fraction_evaluate=0.0)
    expected = reference.start(InProcessGrid(toy_app(absent), 5), to_record(start()), bad_round)
    assert equal(arrays, tensors_of(expected.arrays))
    assert equal(strategy.v, reference.v)


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=300), compressed=st.booleans())
def test_no_bytes_whatever_stop_the_server(data: bytes, compressed: bool) -> None:
    def turn(client, server_round, arrays):
        good = to_record(towards(client, arrays))
        if compressed:
            good["layer.weight"] = array_of_payload(TopK(0.5), arrays["layer.weight"].clone(), 0)
        if client == BAD:
            good["layer.weight"] = Array("uint8" if compressed else "float32", (len(data),), "numpy.ndarray", data)
        return content(good, 1, server_round)

    strategy = FedMom(fraction_evaluate=0.0, compressor="topk:0.5" if compressed else None)
    strategy.start(InProcessGrid(toy_app(turn), 3), to_record(start()), 1)
    assert strategy.collected is not None
    assert dict(strategy.collected.refused) == {"malformed": 1}


def test_a_bound_on_examples_limits_what_a_liar_weighs() -> None:
    turn = lambda client, r, arrays: content(to_record(towards(client, arrays)), 1e9 if client == 1 else 10, r)  # noqa: E731
    bounded = FedMom(momentum=0.0, screening=Screening(max_examples=10), fraction_evaluate=0.0)
    arrays = tensors_of(bounded.start(InProcessGrid(toy_app(turn), 2), to_record(start()), 1).arrays)
    w = start()["layer.weight"]
    torch.testing.assert_close(arrays["layer.weight"], w + ((0 - w) / 2 + (1 - w) / 2) / 2)


def test_of_two_clients_the_thousand_fold_one_is_refused() -> None:
    turn = lambda client, r, w: {n: t - 1000.0**client for n, t in w.items()}  # noqa: E731
    strategy = FedMom(fraction_evaluate=0.0)
    strategy.start(InProcessGrid(toy_app(turn), 2), to_record({"w": torch.zeros(3)}), 1)
    assert strategy.collected is not None
    assert list(strategy.collected.weights) == [1]


def test_the_first_round_holds_few_updates_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_distopt.federated.collect import Collected

    held = []
    offer = Collected.offer
    monkeypatch.setattr(Collected, "offer", lambda self, update: (offer(self, update), held.append(len(self._held))))
    turn = lambda client, r, w: {n: t - (1000.0 if client in (0, 7) else 1.0) for n, t in w.items()}  # noqa: E731
    strategy = FedMom(fraction_evaluate=0.0, screening=Screening(hold=4))
    arrays = strategy.start(InProcessGrid(toy_app(turn), 9), to_record({"w": torch.zeros(3)}), 1).arrays
    assert held == [1, 2, 3, 0, 0, 0, 0, 0, 0]
    assert strategy.collected is not None
    assert sorted(strategy.collected.weights) == [2, 3, 4, 5, 6, 7, 9]
    torch.testing.assert_close(tensors_of(arrays)["w"], torch.full((3,), -1.9))


def test_an_absolute_bound_refuses_in_the_first_round() -> None:
    strategy = FedMom(screening=Screening(norm_bound=1e-6, norm_factor=None), fraction_evaluate=0.0)
    arrays = tensors_of(strategy.start(InProcessGrid(toy_app(), 3), to_record(start()), 1).arrays)
    assert equal(arrays, start())
    assert strategy.collected is not None
    assert strategy.collected.refused["norm"] == 3


def test_one_number_beyond_all_bounds_is_a_norm_that_is_refused() -> None:
    model = {"scale": torch.tensor(1.0, dtype=torch.float64)}
    turn = lambda client, r, w: {"scale": torch.tensor(1e200 if client == BAD else 2.0, dtype=torch.float64)}  # noqa: E731
    strategy = FedMom(fraction_evaluate=0.0)
    strategy.start(InProcessGrid(toy_app(turn), 3), to_record(model), 1)
    assert strategy.collected is not None
    assert dict(strategy.collected.refused) == {"norm": 1}


def test_metrics_beyond_all_bounds_are_left_out() -> None:
    turn = lambda client, r, w: content(to_record(w), 1, r, loss=1.7e308 if client else 1.0, big=1e200)  # noqa: E731
    result = FedMom(fraction_evaluate=0.0).start(InProcessGrid(toy_app(turn), 3), to_record(start()), 1)
    assert dict(result.train_metrics_clientapp[1]) == {"loss": 1.0}


def test_names_with_odd_digits_have_an_order() -> None:
    assert sorted_by_name([1, 2, 3], {1: "3²", 2: "10", 3: "٩"}) == [1, 3, 2]


def test_complex_arrays_are_refused_before_anybody_is_asked() -> None:
    with pytest.raises(TypeError, match=r"complex.*'c'"):
        FedMom().start(InProcessGrid(toy_app(), 2), to_record({"c": torch.ones(2, dtype=torch.complex64)}), 1)


def test_a_client_without_a_name_or_with_anothers_is_known_by_its_id() -> None:
    app = toy_app()

    @app.query()
    def query(message, context):
        from flwr.app import Message

        name = {0: "a", 1: "a", 2: "z", 3: "b"}[int(context.node_config["partition-id"])]
        return Message(RecordDict({"client": ConfigRecord({"name": name})}), reply_to=message)

    strategy = FedMom()
    strategy.start(InProcessGrid(app, 4), to_record(start()), 1)
    assert strategy.names == {3: "z", 4: "b"}
    assert strategy.asked == [4, 3, 1, 2]


@pytest.mark.parametrize("changes", [{"norm_bound": 0.0}, {"norm_factor": 1.0}, {"max_examples": -1.0}, {"hold": 1}])
def test_bad_bounds_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}.*{next(iter(changes.values()))}"):
        Screening(**changes)
