"""What benchmarks/serving.py reckons; the servers themselves are not started here."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import serving, serving_front
from benchmarks.serving import EMULATED, OURS, Contestant, Figures, Round, Scenario
from labelloop.records import Region


def contestant(name: str) -> Contestant:
    return Contestant(name, 1, 0, "s3://images/", ours=name == OURS)


def test_ratios_are_reckoned_round_by_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a machine that is slow for a while changes none of them."""
    monkeypatch.setattr(serving, "peak_mb", lambda _: 100.0)
    scenario = Scenario("classification", "small", 32, 1, 25, 1)
    ours, peer = contestant(OURS), contestant("peer")
    ours.rounds[scenario] = [Round([100.0], 320.0, 12.0), Round([1_000.0], 32.0, 13.0), Round([110.0], 300.0, 12.5)]
    peer.rounds[scenario] = [Round([1_000.0], 32.0, 24.0), Round([10_000.0], 3.2, 26.0), Round([1_100.0], 30.0, 25.0)]
    for one in (ours, peer):
        one.same, one.differences = [True, False], [1e-4, 2e-4]
    figures = Figures(limits={scenario.title: [10.0, 10.5, 9.6]})
    serving.summarise([ours, peer], [scenario], figures)
    row = next(row for row in figures.rows if row["contestant"] == "peer")
    assert (row["ahead"], row["cpu_of_limit"]) == ({OURS: {"faster": 10, "sooner": 10, "cheaper": 2}}, 2.48)
    assert "| peer, classification | 100 | 50% | 2.0e-04 |" in serving.table(figures)


def test_the_emulator_is_asked_where_no_latency_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """And compared there; its store is its own, whose latency cannot be set."""
    monkeypatch.setattr(serving, "peak_mb", lambda _: None)
    monkeypatch.setattr(serving, "measure", lambda *_: Round([10.0], 100.0, 5.0))
    monkeypatch.setattr(serving, "limit_ms", lambda *_: 4.0)
    monkeypatch.setattr("urllib.request.urlopen", lambda _: io.BytesIO())
    wanted = [Scenario("classification", "small", 1, 1, latency, 1) for latency in (25, 0)]
    figures, both = Figures(), [contestant(OURS), contestant(EMULATED)]
    serving.play(both, wanted, figures, Path(), Path(), 1, 1.4, "round 1 of 1")
    for one in both:
        one.same = [True]
    serving.summarise(both, wanted, figures)
    assert [(row["contestant"], row["latency_ms"]) for row in figures.rows] == [(OURS, 25), (OURS, 0), (EMULATED, 0)]
    assert f"| {EMULATED} | 10 |" in serving.table(figures)


def test_each_contestant_and_the_limit_have_a_turn_in_each_scenario(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def took[T](who: str, figure: T) -> T:
        turns.append(who)
        return figure

    monkeypatch.setattr(serving, "measure", lambda one, *_: took(one.name, Round([10.0], 100.0, 5.0)))
    monkeypatch.setattr(serving, "limit_ms", lambda *_: took("limit", 4.0))
    monkeypatch.setattr("urllib.request.urlopen", lambda _: io.BytesIO())
    wanted = [Scenario("classification", size, 1, 1, 0, 1) for size in ("small", "large")]
    figures, both = Figures(), [contestant(OURS), contestant("peer")]
    for _ in range(2):
        serving.play(both, wanted, figures, Path(), Path(), 1, 1.4, "")
    assert Counter(turns) == {"limit": 4, OURS: 6, "peer": 6}, "a contestant warms up once in each"
    assert figures.limits == {scenario.title: [4.0, 4.0] for scenario in wanted}
    assert [len(one.rounds[scenario]) for one in both for scenario in wanted] == [2, 2, 2, 2]


def test_a_prediction_is_compared_box_by_box(monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"x": 10, "y": 20, "width": 30, "height": 40, "rectanglelabels": ["1"]}
    results = [{"result": [{"value": value, "score": 0.5}]}, {"result": []}]
    monkeypatch.setattr(serving.Client, "ask", lambda *_: (1.0, json.dumps({"results": results}).encode()))
    one = contestant("peer")
    said = [[Region(label="1", box=(0.1, 0.2, 0.41, 0.6), score=0.5)], [Region(label="2", box=(0, 0, 1, 1), score=0.9)]]
    serving.compare(one, Scenario("detection", "small", 1, 1, 0, 1), said)
    assert one.same == [True, False]
    assert one.differences == [pytest.approx(0.01)]


def test_the_store_answers_every_new_address_of_an_image(tmp_path: Path) -> None:
    (tmp_path / "small3.jpg").write_bytes(b"jpeg")
    (tmp_path / "champions").mkdir()
    (tmp_path / "champions" / "m.json").write_bytes(b"{}")
    for path, body in {"/images/images/m/small3-abc.jpg": b"jpeg", "/artifacts/champions/m.json": b"{}"}.items():
        head, content = serving_front.answer_to(tmp_path, path)
        assert content == body
        assert head.startswith(b"HTTP/1.1 200")
    assert serving_front.answer_to(tmp_path, "/images/images/m/none-abc.jpg")[0].startswith(b"HTTP/1.1 404")
