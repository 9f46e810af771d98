"""What a month costs by the templates: every resource priced, idle under two dollars, work in proportion."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from cli import cost
from cli.cost import Bill, Price, PriceTable, Report, Usage
from cli.main import app
from infra_cdk.sources import ROOT
from infra_cdk.stage_facts import StageFacts, read_facts
from labelloop.errors import ConfigError
from labelloop.model_config import ModelConfigs
from tests.infra.templates import Templates

MODELS = ModelConfigs(ROOT / "model_configs")
DIGITS, DETECTOR = MODELS["digits"].config, MODELS["digit_detector"].config
FACTS = StageFacts()
PRICES = PriceTable.read("us-east-1")
Resources = dict[str, cost.Resource]


@pytest.fixture(scope="module")
def digits() -> Resources:
    """Of a stage with one model."""
    return cost.synthesize(MODELS, ["digits"], "prod", FACTS)


def report(resources: Resources, **usage: Any) -> Report:
    return cost.report([DIGITS], resources, Usage(**usage), PRICES, "prod", "us-east-1")


def quantity(bill: Bill, resource: str, unit: str) -> float:
    return sum(line.quantity for line in bill.lines if line.resource == resource and line.charged_by == unit)


def of_type(resources: Resources, kind: str) -> list[str]:
    return [id for id, resource in resources.items() if resource["Type"] == kind]


def test_an_idle_month_of_one_model_costs_less_than_two_dollars_and_every_line_says_why(digits: Resources) -> None:
    idle = report(digits).idle
    assert 0 < idle.total < 2
    assert idle.total == pytest.approx(sum(line.cost for line in idle.lines))
    for line in idle.lines:
        assert line.why
        assert bool(line.charged_by) == bool(line.page)
        assert line.charged_by or line.cost == 0


def test_an_idle_month_costs_the_same_with_a_canary_and_without(digits: Resources) -> None:
    at_once = cost.synthesize(MODELS, ["digits"], "prod", msgspec.structs.replace(FACTS, deployment="at once"))
    assert digits.keys() - at_once.keys(), "a canary is made of something"
    assert report(at_once).idle.total == report(digits).idle.total


def test_every_resource_of_a_stage_is_listed(prod: Templates) -> None:
    resources = {f"{number}/{id}": found for number, stack in enumerate(prod) for id, found in stack.resources.items()}
    lines = cost.report([DIGITS, DETECTOR], resources, Usage(), PRICES, "prod", "us-east-1").idle.lines
    assert {id for line in lines for id in line.ids} == resources.keys()


def test_the_alarms_secrets_and_queues_of_the_template_are_what_is_counted(digits: Resources) -> None:
    idle = report(digits).idle
    assert quantity(idle, "CloudWatch::Alarm", "alarm metrics") == len(of_type(digits, "AWS::CloudWatch::Alarm")) > 0
    assert quantity(idle, "SecretsManager::Secret", "secrets") == 2, "Label Studio's and the model's"
    mappings = of_type(digits, "AWS::Lambda::EventSourceMapping")
    polls = quantity(idle, "Lambda::EventSourceMapping", "requests")
    assert polls == len(mappings) * 5 * 3 * 60 * 730, "five receives, each of 20 seconds, at every queue"
    alarm = digits[of_type(digits, "AWS::CloudWatch::Alarm")[0]]
    many = {**digits, **{f"more/{number}": alarm for number in range(20)}}
    before, after = (max(len(of_type(those, "AWS::CloudWatch::Alarm")) - 10, 0) for those in (digits, many))
    assert report(many).idle.total - idle.total == pytest.approx(0.10 * (after - before))


def test_a_metric_that_a_function_counts_itself_is_charged_once(digits: Resources) -> None:
    alarm = digits[of_type(digits, "AWS::CloudWatch::Alarm")[0]]
    own = {**alarm, "Properties": {**alarm["Properties"], "Namespace": "labelloop-prod", "MetricName": "Refused"}}
    before = quantity(report(digits).idle, "CloudWatch::Alarm", "custom metrics")
    two = report({**digits, "more/1": own, "more/2": own}).idle
    assert quantity(two, "CloudWatch::Alarm", "custom metrics") == before + 1


def test_a_resource_of_a_new_type_is_named(digits: Resources) -> None:
    new = {**digits, "serving/Nat": {"Type": "AWS::EC2::NatGateway", "Properties": {}}}
    with pytest.raises(ConfigError, match=r"AWS::EC2::NatGateway \(serving/Nat\)"):
        report(new)


def test_a_new_function_a_schedule_by_the_clock_and_provisioned_tables_are_not_taken_for_free(digits: Resources) -> None:
    def changed(kind: str, **properties: Any) -> Resources:
        id = of_type(digits, kind)[0]
        return {**digits, id: {"Type": kind, "Properties": {**digits[id]["Properties"], **properties}}}

    with pytest.raises(ConfigError, match="function hourly"):
        report(changed("AWS::Lambda::Function", Environment={"Variables": {"POWERTOOLS_SERVICE_NAME": "hourly"}}))
    with pytest.raises(ConfigError, match=r"cron\(0 \* \* \* \? \*\)"):
        report(changed("AWS::Events::Rule", ScheduleExpression="cron(0 * * * ? *)"))
    with pytest.raises(ConfigError, match="provisioned"):
        report(changed("AWS::DynamoDB::Table", BillingMode="PROVISIONED"))


def test_an_allowance_is_used_up_once(digits: Resources) -> None:
    idle = report(digits).idle
    requests = [line for line in idle.lines if line.page == "Amazon SQS Pricing"]
    assert len(requests) == 2, "queues, and what polls them"
    assert sum(line.free for line in requests) == 1_000_000
    total = sum(line.quantity for line in requests)
    assert sum(line.cost for line in requests) == pytest.approx((total - 1_000_000) * 0.40 / 1e6)


def test_more_predictions_cost_more_in_proportion_once_allowances_are_gone(digits: Resources) -> None:
    few, many, most = (report(digits, predictions=count).month.total for count in (1_000_000, 2_000_000, 3_000_000))
    assert most - many == pytest.approx(many - few)
    thousand = report(digits).units["1,000 predictions"].total
    assert most - many == pytest.approx(1000 * thousand)
    small = report(digits, predictions=1000).month.total - report(digits).idle.total
    assert 0 < small < thousand, "allowances pay for most of the first"


def test_a_prediction_asks_for_health_and_setup_twice(digits: Resources) -> None:
    unit = report(digits).units["1,000 predictions"]
    assert quantity(unit, "ApiGateway::RestApi", "REST requests") == 5000
    assert quantity(unit, "SecretsManager::Secret", "secrets") == 0, "what stands there anyway is no part of it"


def test_memory_is_that_of_the_model_that_wants_most(tmp_path: Path, digits: Resources) -> None:
    for name in MODELS.names:
        shutil.copytree(str(MODELS[name].folder), tmp_path / name)
    file = tmp_path / "digit_detector" / "config.yaml"
    file.write_text(file.read_text().replace("memory_mb: 1769", "memory_mb: 3538"))
    models = ModelConfigs(tmp_path)

    def gb_seconds(names: list[str]) -> float:
        resources = cost.synthesize(models, names, "prod", FACTS)
        found = cost.report([models[name].config for name in names], resources, Usage(), PRICES, "prod", "us-east-1")
        return quantity(found.units["1,000 predictions"], "Lambda::Function", "GB-s (x86)")

    sign_ins = 5000 / 50 * 0.5 * 1769 / 1024
    alone = gb_seconds(["digits"]) - sign_ins
    assert alone == pytest.approx(
        quantity(report(digits).units["1,000 predictions"], "Lambda::Function", "GB-s (x86)") - sign_ins
    )
    assert gb_seconds(["digit_detector"]) - sign_ins == pytest.approx(2 * alone)
    assert gb_seconds(["digits", "digit_detector"]) - sign_ins == pytest.approx(2 * alone)


def test_a_training_costs_its_instance_for_as_long_as_it_may_take(digits: Resources) -> None:
    def hours(config: Any, **usage: Any) -> tuple[float, float]:
        unit = cost.report([config], digits, Usage(**usage), PRICES, "prod", "us-east-1").units[f"a training of {config.name}"]
        lines = [line for line in unit.lines if line.charged_by == "instance hours"]
        return sum(line.quantity for line in lines), sum(line.cost for line in lines)

    assert hours(DIGITS) == pytest.approx((0.5, 0.5 * 1.408 * 0.5)), "30 minutes, spot at half the price"
    assert hours(DIGITS, minutes=6) == pytest.approx((0.1, 0.1 * 1.408 * 0.5))
    on_demand = msgspec.structs.replace(DIGITS, training=msgspec.structs.replace(DIGITS.training, spot=False))
    assert hours(on_demand) == pytest.approx((0.5, 0.5 * 1.408))
    other = msgspec.structs.replace(DIGITS, training=msgspec.structs.replace(DIGITS.training, instance_type="ml.x9.huge"))
    with pytest.raises(ConfigError, match=r"ml\.x9\.huge"):
        hours(other)


def test_labels_cause_the_trainings_of_the_policy(digits: Resources) -> None:
    assert [cost.trainings(DIGITS, labels) for labels in (0, 99, 100, 999, 1000, 1999, 2000)] == [0, 0, 1, 2, 3, 3, 4]
    caused, given = report(digits, labels=1000).month, report(digits, labels=1000, trainings=3).month
    assert caused == given
    assert report(digits, labels=1000, trainings=0).month.total < caused.total


def test_machines_that_always_run_cost_what_the_ratio_says(digits: Resources) -> None:
    found = report(digits, predictions=5000)
    assert found.ratio == pytest.approx(found.alternative.total / found.month.total)
    parts = {line.resource.partition(":")[0] for line in found.alternative.lines}
    assert parts == {"ML backend", "MLflow server", "GPU runner"}
    assert all(line.cost > 0 and line.free == 0 for line in found.alternative.lines)


def test_every_price_is_used_and_has_the_page_it_is_on() -> None:
    source = (ROOT / "cli" / "cost.py").read_text()
    machines = {machine.price for machine in PRICES.alternative}
    for name, price in PRICES.prices.items():
        assert name in machines or f'"{name}"' in source, name
        assert isinstance(price, Price)
        assert price.page


def test_the_command_prints_a_table_and_json(monkeypatch: pytest.MonkeyPatch, digits: Resources) -> None:
    asked: list[Any] = []

    def synthesized(models: ModelConfigs, names: list[str], stage: str, facts: StageFacts) -> Resources:
        asked.append((names, stage, facts))
        return digits

    monkeypatch.setattr(cost, "synthesize", synthesized)
    told = CliRunner().invoke(app, ["cost", "digits", "--predictions", "1000"], env={"COLUMNS": "150"})
    assert told.exit_code == 0, told.output
    assert "a month with this work" in told.output
    assert "Nothing was measured on AWS" in told.output
    given = CliRunner().invoke(app, ["cost", "digits", "--stage", "dev", "--json"])
    assert given.exit_code == 0, given.output
    found = msgspec.convert(json.loads(given.stdout), Report)
    assert found.month == found.idle == report(digits).idle
    assert found.checked == PRICES.checked
    assert asked == [(["digits"], stage, read_facts(stage)) for stage in ("prod", "dev")]


def test_at_eighty_columns_nothing_is_lost(digits: Resources) -> None:
    used = report(digits, predictions=50_000_000, labels=3_000_000)
    file = io.StringIO()
    cost.show(used, Console(file=file, width=80))
    text = file.getvalue()
    assert "…" not in text
    large = {f"{line.quantity:,.0f}" for line in used.month.lines if line.charged_by and line.quantity >= 1e6}
    assert large
    assert large <= set(text.split())


def test_a_pipe_is_wide_unless_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch, digits: Resources) -> None:
    monkeypatch.setattr(cost, "synthesize", lambda *_: digits)
    monkeypatch.delenv("COLUMNS", raising=False)
    for env, width in (({}, 130), ({"COLUMNS": "90"}, 90), ({"COLUMNS": "90", "TERM": "dumb"}, 90), ({"TERM": "dumb"}, 130)):
        told = CliRunner().invoke(app, ["cost", "digits"], env=env)
        assert told.exit_code == 0, told.output
        assert max(map(len, told.output.partition("Prices as known")[0].splitlines()[1:-1])) == width


@pytest.mark.parametrize(
    ("predict_start", "unit", "copies", "a_month", "restored"),
    [("snapshot", "GB-s cached", 1, 6.83, 100), (2, "GB-s ready (x86)", 2, 37.83, 0)],
)
def test_starting_predict_ahead_is_on_the_bill(
    digits: Resources, predict_start: Any, unit: str, copies: int, a_month: float, restored: int
) -> None:
    facts = msgspec.structs.replace(FACTS, predict_start=predict_start)
    ahead, cold = report(cost.synthesize(MODELS, ["digits"], "prod", facts)), report(digits)
    gb = 1769 / 1024
    (line,) = (line for line in ahead.idle.lines if line.charged_by == unit)
    assert line.quantity == pytest.approx(copies * gb * 730 * 3600)
    assert ahead.idle.total - cold.idle.total == pytest.approx(a_month, abs=0.01)
    thousand = [bill.units["1,000 predictions"].total for bill in (ahead, cold)]
    assert thousand[0] - thousand[1] == pytest.approx(restored * gb * 0.0001397998)


@pytest.mark.parametrize(
    ("region", "said"),
    [("eu-central-1", "the stage lies in eu-central-1"), (None, "stages.yaml does not say where"), ("us-east-1", None)],
)
def test_a_stage_elsewhere_is_not_priced_as_if_it_were_here(
    region: str | None, said: str | None, monkeypatch: pytest.MonkeyPatch, digits: Resources
) -> None:
    monkeypatch.setattr("infra_cdk.stage_facts.read_facts", lambda _: StageFacts(region=region))
    monkeypatch.setattr(cost, "synthesize", lambda *_: digits)
    told = CliRunner().invoke(app, ["cost", "digits"])
    assert told.output.startswith("stage prod, prices of us-east-1")
    assert ("These are prices of us-east-1, the only ones known" in told.output) is (said is not None)
    assert (said or "") in told.output
    found = json.loads(CliRunner().invoke(app, ["cost", "digits", "--json"]).stdout)
    assert (found["region"], found["stage_region"]) == ("us-east-1", region)


def test_a_region_without_prices_and_the_laptop_are_refused() -> None:
    with pytest.raises(ConfigError, match="eu-central-1"):
        PriceTable.read("eu-central-1")
    with pytest.raises(ConfigError, match="laptop"):
        cost.synthesize(MODELS, ["digits"], "local", FACTS)
