"""`cost`: what a stage costs on AWS, from its synthesized templates and the dated table in prices.toml.

Nothing here was measured on AWS: quantities follow from the templates, the work asked about, and the assumptions below, which are
chosen on the high side. Pure functions: resources and work to charges, charges and prices to a bill.
"""

from __future__ import annotations

import datetime
import json
import re
import shutil
import tempfile
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from infra_cdk.stage_facts import LOCAL, StageFacts
from labelloop.errors import ConfigError
from labelloop.messages import RANGE
from labelloop.model_config import ModelConfig, ModelConfigs
from labelloop.policy import due_at
from labelloop.wording import counted

PRICES = Path(__file__).with_name("prices.toml")

HOURS = 730  # of a month, as AWS reckons
_POLLERS, _POLL_SECONDS = 5, 20  # what Lambda keeps open at an idle queue, and how long one lasts
_HEALTH, _SETUP = 2, 2  # requests of Label Studio before it asks for a prediction, when a browser opens a task
_REQUESTS_OF_A_LABEL = 3  # the next task's health and setup, the annotation's webhook
_REQUESTS_A_SIGN_IN = 50  # the authorizer's answer is kept for an hour
_SQS_CALLS = 3  # send, receive, delete
_SETUP_SECONDS, _SIGN_IN_SECONDS, _INGEST_SECONDS, _LOOK_SECONDS, _PROMOTE_SECONDS, _REFRESH_SECONDS = 0.05, 0.5, 0.3, 2, 10, 5
_METRICS_OF_A_MODEL = 6  # annotations, trainings, predictions shown and kept, the holdout's metric, seconds of trainings
_GB = 1e6  # kB
_LOG_KB, _ACCESS_LOG_KB, _TRAINING_LOG_KB = 2, 0.5, 500  # of an invocation, a request, a training
_ARTIFACTS_GB = 0.5  # of a model: snapshots, versions, MLflow's files
_LEDGER_KB = 1  # of an image
_LOOK_READS, _LABEL_READS, _LABEL_WRITES, _TRAINING_WRITES = 9, 3, 3, 10  # units of the ledger
_PREDICTION_GETS, _LABEL_GETS = 3, 4  # image, pointer, model; the browser's too
_RESTORES = 0.1  # of a prediction: starts from a snapshot; annotators who keep at it find predict running
_TRAINING_PUTS = 50  # manifest, checkpoints, model, MLflow's files
# Label Studio's own stack. A database that paused is kept awake by each question until its pause comes again.
_AWAKE_ACU = 0.5  # the least that Aurora runs with
_WAKING_SECONDS = 30
_DATABASE_GB, _DATABASE_CALLS_A_LOOK = 2, 200
_LABEL_STUDIO_STACK = "-label-studio"
_HEALTH_LOG_KB = 0.7
_HEALTH_CHECKS = 2 * 2  # a minute: two zones, every 30 s

Resource = Mapping[str, Any]


class Price(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """US dollars for `per` units, after `free` units a month."""

    price: float
    unit: str
    page: str
    per: float = 1
    free: float = 0


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A part of the always-on alternative: `hours` of it in each hour of the month, or a `quantity` a month."""

    resource: str
    price: str
    why: str
    hours: float = 0
    quantity: float = 0


class PriceTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """prices.toml."""

    checked: datetime.date
    region: str
    prices: dict[str, Price]
    instances: dict[str, float]
    free: dict[str, str]
    alternative: list[Machine]

    @classmethod
    def read(cls, region: str) -> PriceTable:
        """Raises `ConfigError` for a region without prices."""
        table = msgspec.convert(tomllib.loads(PRICES.read_text(encoding="utf-8")), cls)
        if region != table.region:
            raise ConfigError(PRICES, f"has no prices of {region!r}; it knows {table.region} only", "region")
        return table

    def of(self, name: str) -> Price:
        """Of `training.ml.…`, too. Raises `ConfigError` for an instance without a price."""
        instance = name.removeprefix("training.")
        if instance.startswith("ml."):
            if instance not in self.instances:
                raise ConfigError(PRICES, f"{instance} has no price; add what an hour of it costs", "instances")
            return Price(self.instances[instance], "instance hours", "Amazon SageMaker AI Pricing, training")
        return self.prices[name]


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Work of each model. `months` 0 is the work alone, without what merely being there costs.

    `trainings`: None for those that `labels`, the first of a model, cause by the config's policy. `images`: of each model, which
    a training reads and a promotion has predicted again. `minutes`: of a training; None for the longest that the config allows.
    `predict_ms`: of Lambda, for a task. `spot_share`: what spare capacity costs of the price on demand.
    """

    months: float = 1
    predictions: int = 0
    trainings: int | None = None
    labels: int = 0
    images: int = 2000
    image_kb: float = 150
    minutes: float | None = None
    predict_ms: float = 300
    spot_share: float = 0.5

    @property
    def works(self) -> bool:
        return bool(self.predictions or self.trainings or self.labels)


@dataclass(frozen=True)
class Charge:
    """A quantity of what is charged for. No `price`: nothing is. `share`: of the price."""

    resource: str
    ids: tuple[str, ...]
    price: str | None
    quantity: float
    why: str
    share: float = 1


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a bill. `free`: what of `quantity` is covered by an allowance that never ends; `cost` in US dollars."""

    resource: str
    count: int
    ids: tuple[str, ...]
    charged_by: str
    quantity: float
    free: float
    cost: float
    why: str
    page: str


class Bill(msgspec.Struct, frozen=True):
    total: float
    lines: list[Line]


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """US dollars. `idle` and `month` after allowances; `units`, of more work, and `label_studio` before them.

    `label_studio`: a month of the stage's own server, where it has one; in none of the others. `region`: whose prices these are;
    `stage_region`: where the stage lies by stages.yaml, whose prices may differ; None where that of the credentials counts.
    """

    stage: str
    models: list[str]
    region: str
    stage_region: str | None
    checked: datetime.date
    usage: Usage
    idle: Bill
    month: Bill
    units: dict[str, Bill]
    alternative: Bill
    ratio: float
    label_studio: Bill | None = None


def trainings(config: ModelConfig, labels: int) -> int:
    """How many trainings the first `labels` annotations of a model cause."""
    done, count = 0, due_at(config.retrain, None)
    while count <= labels:
        done, count = done + 1, due_at(config.retrain, count)
    return done


@dataclass(frozen=True)
class Work:
    """What the stage does when its models are used so."""

    resources: Mapping[str, Resource]
    models: Sequence[ModelConfig]
    usage: Usage

    @cached_property
    def trained(self) -> dict[str, int]:
        """Trainings of each model."""
        given = self.usage.trainings
        return {config.name: trainings(config, self.usage.labels) if given is None else given for config in self.models}

    @property
    def trainings(self) -> int:
        return sum(self.trained.values())

    @property
    def predictions(self) -> int:
        return self.usage.predictions * len(self.models)

    @property
    def labels(self) -> int:
        return self.usage.labels * len(self.models)

    @cached_property
    def looks(self) -> float:
        """Times that the schedule has annotations counted."""
        expressions = [r.get("Properties", {}).get("ScheduleExpression") for r in self.resources.values()]
        ticks = 0.0
        for text in filter(None, expressions):
            rate = re.fullmatch(r"rate\((\d+) (minute|hour)s?\)", text)
            if rate is None:
                raise ConfigError(
                    PRICES, f"how often is {text}? cli/cost.py understands rate(N minutes) and rate(N hours)", "AWS::Events::Rule"
                )
            ticks += self.usage.months * HOURS * 60 / (int(rate[1]) * (60 if rate[2] == "hour" else 1))
        return ticks

    @property
    def requests(self) -> float:
        """Of the API."""
        return self.predictions * (_HEALTH + _SETUP + 1) + self.labels * _REQUESTS_OF_A_LABEL

    @property
    def predicted_anew(self) -> float:
        """Tasks that prelabel predicts: new ones, and all after a promotion."""
        return self.labels + self.trainings * self.usage.images

    @cached_property
    def invocations(self) -> dict[str, tuple[float, float]]:
        """By function: how many, and seconds of all together."""
        seconds, signals = self.usage.predict_ms / 1000, self.labels + 2 * self.trainings
        setups = self.predictions * _SETUP + self.labels
        sign_ins, looks = self.requests / _REQUESTS_A_SIGN_IN, self.looks if self.models else 0
        return {
            "authorize": (sign_ins, sign_ins * _SIGN_IN_SECONDS),
            "predict": (self.predictions + setups, self.predictions * seconds + setups * _SETUP_SECONDS),
            "predict_part": (0, 0),  # a task of Retrieve Predictions costs there what it costs predict
            "ingest": (self.labels, self.labels * _INGEST_SECONDS),
            "retrain": (looks + signals, (looks * len(self.models) + signals) * _LOOK_SECONDS),
            "promote": (self.trainings, self.trainings * _PROMOTE_SECONDS),
            "refresh": (self.trainings, self.trainings * _REFRESH_SECONDS),
            "prelabel": (self.labels + self.trainings * self.usage.images / RANGE, self.predicted_anew * seconds),
        }

    @property
    def queued(self) -> float:
        """Messages, as if each came alone; batches cost less."""
        return sum(self.invocations[name][0] for name in ("ingest", "retrain", "promote", "refresh", "prelabel"))

    def function(self, named_by: Resource) -> Resource:
        """The function that a version or an alias is of."""
        return self.named(named_by["Properties"]["FunctionName"]["Ref"])

    def named(self, logical_id: str) -> Resource:
        return next(resource for id, resource in self.resources.items() if id.rpartition("/")[2] == logical_id)


Part = tuple[str, float, str]  # price, quantity, why
Rule = Callable[[Work, Sequence[Resource]], Iterator[Part]]


def _functions(work: Work, functions: Sequence[Resource]) -> Iterator[Part]:
    calls = gb_seconds = 0.0
    for function in functions:
        name = function["Properties"]["Environment"]["Variables"]["POWERTOOLS_SERVICE_NAME"]
        if name not in work.invocations:
            raise ConfigError(PRICES, f"the function {name} has no price; say in cli/cost.py how often it runs")
        count, seconds = work.invocations[name]
        calls += count
        gb_seconds += seconds * function["Properties"]["MemorySize"] / 1024
    yield "lambda.request", calls, "retrain looks at every tick of the schedule; the others when there is work"
    yield "lambda.gb_second", gb_seconds, "seconds assumed (none measured on AWS) × the function's memory"
    yield "xray.trace", work.queued, "active tracing: every invocation from a queue counted, though few are sampled"


def _versions(work: Work, versions: Sequence[Resource]) -> Iterator[Part]:
    """Of predict alone."""
    functions = [work.function(version)["Properties"] for version in versions]
    gb = sum(function["MemorySize"] / 1024 for function in functions if "SnapStart" in function)
    yield (
        "lambda.snapshot",
        work.usage.months * HOURS * 3600 * gb,
        "SnapStart's copy of predict's memory, where predict_start asks for one",
    )
    yield "lambda.restore", work.predictions * _RESTORES * gb, f"{_RESTORES:.0%} of predictions start from the snapshot, assumed"


def _aliases(work: Work, aliases: Sequence[Resource]) -> Iterator[Part]:
    ready = sum(
        work.function(alias)["Properties"]["MemorySize"]
        / 1024
        * alias["Properties"].get("ProvisionedConcurrencyConfig", {}).get("ProvisionedConcurrentExecutions", 0)
        for alias in aliases
    )
    yield "lambda.ready", work.usage.months * HOURS * 3600 * ready, "provisioned concurrency: what predict_start keeps ready"


def _polling(work: Work, mappings: Sequence[Resource]) -> Iterator[Part]:
    polls = _POLLERS * HOURS * 3600 / _POLL_SECONDS
    yield (
        "sqs.request",
        work.usage.months * len(mappings) * polls,
        f"an idle queue too: Lambda keeps {_POLLERS} receives of {_POLL_SECONDS} s open at each, {polls:,.0f} a month",
    )


def _queues(work: Work, _: Sequence[Resource]) -> Iterator[Part]:
    yield "sqs.request", work.queued * _SQS_CALLS, "send, receive, delete; idle, the schedule's messages alone"


def _rules(work: Work, _: Sequence[Resource]) -> Iterator[Part]:
    yield "events.custom", work.labels, "an upload's event of S3; schedule and SageMaker's events are free"


def _bus(work: Work, _: Sequence[Resource]) -> Iterator[Part]:
    yield "events.custom", work.trainings, "one verdict of the gate a training; a bus costs nothing"


def _api(work: Work, _: Sequence[Resource]) -> Iterator[Part]:
    yield (
        "api.request",
        work.requests,
        f"a prediction: {_HEALTH} × health, {_SETUP} × setup, predict; a label: health, setup, webhook",
    )


def _api_stage(work: Work, stages: Sequence[Resource]) -> Iterator[Part]:
    traced = any(stage["Properties"].get("TracingEnabled") for stage in stages)
    yield "xray.trace", work.requests * traced, "every request counted, though few are sampled"


def _logs(work: Work, groups: Sequence[Resource]) -> Iterator[Part]:
    calls = sum(count for count, _ in work.invocations.values())
    gb = (calls * _LOG_KB + work.requests * _ACCESS_LOG_KB + work.trainings * _TRAINING_LOG_KB) / _GB
    kept = max((group["Properties"].get("RetentionInDays", 3650) for group in groups), default=0) / (HOURS / 24)
    yield "logs.ingested", gb, f"{_LOG_KB} kB an invocation, {_ACCESS_LOG_KB} kB a request, {_TRAINING_LOG_KB} kB a training"
    yield "logs.stored", gb * kept, "until retention ends; its share of the 5 free GB is not counted"


def _alarms(work: Work, alarms: Sequence[Resource]) -> Iterator[Part]:
    metrics = sum(max(1, sum("MetricStat" in m for m in alarm["Properties"].get("Metrics", ()))) for alarm in alarms)
    yield "cloudwatch.alarm", work.usage.months * metrics, "standard resolution, for each metric that an alarm watches"
    own = {
        (alarm["Properties"]["Namespace"], alarm["Properties"]["MetricName"])
        for alarm in alarms
        if not alarm["Properties"].get("Namespace", "AWS/").startswith("AWS/")
    }
    yield (
        "cloudwatch.metric",
        work.usage.months * len(own),
        "what alarms watch that functions count themselves; those of AWS are free",
    )


def _dashboards(work: Work, dashboards: Sequence[Resource]) -> Iterator[Part]:
    yield "cloudwatch.dashboard", work.usage.months * len(dashboards), "three of an account are free; opening one reads some logs"
    counted = work.usage.months * len(work.models) * _METRICS_OF_A_MODEL if work.labels or work.trainings else 0
    yield (
        "cloudwatch.metric",
        counted,
        f"{_METRICS_OF_A_MODEL} that functions count of a model, charged in the hours in which they do; as if in all",
    )


def _secrets(work: Work, secrets: Sequence[Resource]) -> Iterator[Part]:
    calls = work.queued + work.requests / _REQUESTS_A_SIGN_IN
    yield "secrets.secret", work.usage.months * len(secrets), "tokens, passwords, keys: one a model, and the stage's own"
    yield "secrets.call", calls, "functions keep a secret for 5 minutes; counted as if each invocation read it anew"


def _balancers(work: Work, balancers: Sequence[Resource]) -> Iterator[Part]:
    hours = work.usage.months * HOURS
    zones = sum(len(balancer["Properties"]["Subnets"]) for balancer in balancers)
    yield "balancer", hours * len(balancers), "TLS, and an address that stays"
    yield "address", hours * zones, "a public address of the load balancer in each zone"
    yield "balancer.capacity", hours * len(balancers), "one capacity unit at each hour, more than a small team uses"


def _services(work: Work, services: Sequence[Resource]) -> Iterator[Part]:
    cores = memory = tasks = 0.0
    for service in services:
        task = work.named(service["Properties"]["TaskDefinition"]["Ref"])["Properties"]
        count = service["Properties"]["DesiredCount"]
        tasks += count
        cores += count * int(task["Cpu"]) / 1024
        memory += count * int(task["Memory"]) / 1024
    hours = work.usage.months * HOURS
    yield "fargate.vcpu", hours * cores, "Label Studio runs all the time: it cannot start when somebody comes"
    yield "fargate.memory", hours * memory, "the same"
    yield "address", hours * tasks, "the task's own, in place of a NAT gateway"
    yield "logs.ingested", hours * 60 * _HEALTH_CHECKS * tasks * _HEALTH_LOG_KB / _GB, "a line for each health check"


def _endpoints(work: Work, endpoints: Sequence[Resource]) -> Iterator[Part]:
    """Gateways are free; the others cost by the hour and zone, and none is there."""
    if any(endpoint["Properties"].get("VpcEndpointType") != "Gateway" for endpoint in endpoints):
        raise ConfigError(PRICES, "an interface endpoint has no price; add it", "AWS::EC2::VPCEndpoint")
    yield "endpoint.gateway", work.usage.months * len(endpoints), "the way to S3"


def _clusters(work: Work, clusters: Sequence[Resource]) -> Iterator[Part]:
    awake = 0.0
    for cluster in clusters:
        scaling = cluster["Properties"]["ServerlessV2ScalingConfiguration"]
        if scaling["MinCapacity"]:
            raise ConfigError(PRICES, "a database that never pauses has no price; add it", "AWS::RDS::DBCluster")
        seconds = scaling["SecondsUntilAutoPause"] + _WAKING_SECONDS
        awake += min(work.usage.months * HOURS, work.looks * seconds / 3600)
    gb = work.usage.months * len(clusters) * _DATABASE_GB
    yield (
        "aurora.capacity",
        awake * _AWAKE_ACU,
        f"{awake:,.0f} h awake: each look of the schedule, until the pause comes; {_AWAKE_ACU} ACU. People add their hours",
    )
    yield "aurora.stored", gb, f"{_DATABASE_GB} GB assumed; backups of as much are free"
    yield "aurora.call", work.looks * _DATABASE_CALLS_A_LOOK, f"{_DATABASE_CALLS_A_LOOK} reads and writes a look, assumed"


def _tables(work: Work, tables: Sequence[Resource]) -> Iterator[Part]:
    gb = work.usage.months * len(work.models) * work.usage.images * _LEDGER_KB / _GB
    recoverable = any(
        table["Properties"].get("PointInTimeRecoverySpecification", {}).get("PointInTimeRecoveryEnabled") for table in tables
    )
    if any(table["Properties"].get("BillingMode") != "PAY_PER_REQUEST" for table in tables):
        raise ConfigError(PRICES, "a table with provisioned capacity has no price; add it", "AWS::DynamoDB::Table")
    reads = work.looks * len(work.models) * _LOOK_READS + work.labels * _LABEL_READS + work.trainings * work.usage.images / 4
    yield "dynamodb.read", reads, f"{_LOOK_READS} a look and model, {_LABEL_READS} a label, the images' groups in each training"
    yield "dynamodb.write", work.labels * _LABEL_WRITES + work.trainings * _TRAINING_WRITES, "records of images and trainings"
    yield "dynamodb.stored", gb, f"{_LEDGER_KB} kB an image"
    yield "dynamodb.recovery", gb * recoverable, "point-in-time recovery: the same bytes once more"


def _buckets(work: Work, _: Sequence[Resource]) -> Iterator[Part]:
    usage = work.usage
    gb = usage.images * usage.image_kb / _GB + _ARTIFACTS_GB
    yield (
        "s3.stored",
        usage.months * len(work.models) * gb,
        f"of a model {counted(usage.images, 'image')} of {usage.image_kb:g} kB, {_ARTIFACTS_GB} GB of versions and runs",
    )
    yield "s3.write", work.labels + work.trainings * _TRAINING_PUTS, "uploads; what a training writes"
    reads = work.predictions * _PREDICTION_GETS + work.labels * _LABEL_GETS + work.trainings * 2 * usage.images
    yield "s3.read", reads, "images by functions, browser and training; a promotion predicts all again"
    yield "transfer.out", (work.predictions + work.labels) * usage.image_kb / _GB, "images to annotators' browsers"


RULES: dict[str, Rule] = {
    "AWS::ApiGateway::RestApi": _api,
    "AWS::ApiGateway::Stage": _api_stage,
    "AWS::CloudWatch::Alarm": _alarms,
    "AWS::CloudWatch::Dashboard": _dashboards,
    "AWS::DynamoDB::Table": _tables,
    "AWS::EC2::VPCEndpoint": _endpoints,
    "AWS::ECS::Service": _services,
    "AWS::ElasticLoadBalancingV2::LoadBalancer": _balancers,
    "AWS::Events::EventBus": _bus,
    "AWS::Events::Rule": _rules,
    "AWS::Lambda::Alias": _aliases,
    "AWS::Lambda::EventSourceMapping": _polling,
    "AWS::Lambda::Function": _functions,
    "AWS::Lambda::Version": _versions,
    "AWS::Logs::LogGroup": _logs,
    "AWS::RDS::DBCluster": _clusters,
    "AWS::S3::Bucket": _buckets,
    "AWS::SQS::Queue": _queues,
    "AWS::SecretsManager::Secret": _secrets,
}


def charges(work: Work, ids: Iterable[str], free: Mapping[str, str]) -> list[Charge]:
    """What is charged for these of the stage's resources, and for its models' training jobs, which no template names.

    `free`: reasons by type. Raises `ConfigError` for a type that is in neither `free` nor `RULES`.
    """
    by_type: dict[str, list[str]] = defaultdict(list)
    for id in ids:
        by_type[work.resources[id]["Type"]].append(id)
    unknown = {kind: ids for kind, ids in by_type.items() if kind not in RULES and kind not in free}
    if unknown:
        names = "; ".join(f"{kind} ({', '.join(ids)})" for kind, ids in unknown.items())
        raise ConfigError(PRICES, f"no price for {names}; add a rule to cli/cost.py, or a reason to [free]")
    found: list[Charge] = []
    for kind, ids in sorted(by_type.items()):
        name = kind.removeprefix("AWS::")
        if kind in free:
            found.append(Charge(name, tuple(ids), None, 0, free[kind]))
        else:
            found += [Charge(name, tuple(ids), *part) for part in RULES[kind](work, [work.resources[id] for id in ids])]
    return sorted([*found, *_training_jobs(work)], key=lambda charge: charge.price is None)


def _training_jobs(work: Work) -> Iterator[Charge]:
    for config in work.models:
        training, number, usage = config.training, work.trained[config.name], work.usage
        minutes = training.max_runtime_minutes if usage.minutes is None else usage.minutes
        hours = number * minutes / 60
        capacity = f"spot, taken as {usage.spot_share:.0%} of the price" if training.spot else "on demand"
        name = f"training jobs of {config.name}"
        longest = ", as long as the config allows" if usage.minutes is None else ""
        yield Charge(
            name,
            (),
            f"training.{training.instance_type}",
            hours,
            f"{number} × {minutes:g} minutes{longest}, {training.instance_type}, {capacity}",
            usage.spot_share if training.spot else 1,
        )
        yield Charge(name, (), "training.stored", hours / HOURS * training.volume_gb, f"{training.volume_gb} GB disk meanwhile")


def bill(charges: Iterable[Charge], prices: PriceTable, *, allowances: bool = True) -> Bill:
    """Prices times quantities. What is free of a kind is used up once, by the lines in their order."""
    used: dict[str, float] = defaultdict(float)
    lines = []
    for charge in charges:
        price = prices.of(charge.price) if charge.price else None
        free = cost = 0.0
        if price and charge.price:
            free = min(charge.quantity, price.free - used[charge.price]) if allowances else 0.0
            used[charge.price] += free
            cost = (charge.quantity - free) / price.per * price.price * charge.share
        lines.append(
            Line(
                resource=charge.resource,
                count=len(charge.ids),
                ids=charge.ids,
                charged_by=price.unit if price else "",
                quantity=charge.quantity,
                free=free,
                cost=cost,
                why=charge.why,
                page=price.page if price else "",
            )
        )
    return Bill(sum(line.cost for line in lines), lines)


def alternative(prices: PriceTable) -> Bill:
    """A month of the machines that would do the same."""
    return bill(
        (Charge(m.resource, (), m.price, m.hours * HOURS or m.quantity, m.why) for m in prices.alternative),
        prices,
        allowances=False,
    )


def report(
    models: Sequence[ModelConfig],
    resources: Mapping[str, Resource],
    usage: Usage,
    prices: PriceTable,
    stage: str,
    stage_region: str | None,
) -> Report:
    """All that the command says of a stage with these models. Raises `ConfigError` where something has no price."""

    servers = {id for id in resources if id.partition("/")[0].endswith(_LABEL_STUDIO_STACK)}
    ours = [id for id in resources if id not in servers]
    unused = msgspec.structs.replace(usage, predictions=0, labels=0, trainings=0)

    def month(usage: Usage) -> Bill:
        return bill(charges(Work(resources, models, usage), ours, prices.free), prices)

    def more(config: ModelConfig, **work: int) -> Bill:
        alone = msgspec.structs.replace(unused, months=0, **work)
        return bill(charges(Work(resources, [config], alone), ours, prices.free), prices, allowances=False)

    units = {"1,000 predictions": more(models[0], predictions=1000)}
    for config in models:
        units[f"a training of {config.name}"] = more(config, trainings=1)
        number = trainings(config, 1000)
        units[f"the first 1,000 labels of {config.name} and their {counted(number, 'training')}"] = more(
            config, labels=1000, trainings=number
        )
    idle, used, machines = month(unused), month(usage), alternative(prices)
    server = bill(charges(Work(resources, [], unused), sorted(servers), prices.free), prices, allowances=False)
    return Report(
        stage=stage,
        models=[config.name for config in models],
        region=prices.region,
        stage_region=stage_region,
        checked=prices.checked,
        usage=usage,
        idle=idle,
        month=used,
        units=units,
        alternative=machines,
        ratio=machines.total / used.total,
        label_studio=server if servers else None,
    )


def synthesize(models: ModelConfigs, names: Sequence[str], stage: str, facts: StageFacts) -> dict[str, Resource]:
    """Every resource of the stage's stacks with these models, by `stack/logical id`. Layers are not built.

    Raises `ConfigError`, for the laptop's stage too.
    """
    import aws_cdk as cdk  # starts Node

    import infra_cdk.app
    from infra_cdk.sources import ROOT
    from infra_cdk.stage import Stage

    if stage == LOCAL:
        raise ConfigError("cost", "the laptop's stack costs nothing; name a stage of AWS, such as prod", "stage")
    if not facts.label_studio and not facts.label_studio_url:  # it costs nothing here, and the stacks would warn of it
        facts = msgspec.structs.replace(facts, label_studio_url="https://label-studio.invalid")
    context = json.loads((ROOT / "cdk.json").read_text(encoding="utf-8"))["context"]
    with tempfile.TemporaryDirectory(prefix="labelloop-") as folder:
        for name in names:
            shutil.copytree(str(models[name].folder), Path(folder) / "models" / name)
        app = cdk.App(
            context={**context, "aws:cdk:bundling-stacks": []},
            outdir=f"{folder}/out",
            analytics_reporting=False,
        )
        infra_cdk.app.build(app, Stage(name=stage, models=ModelConfigs(Path(folder) / "models"), facts=facts))
        stacks = [(stack.stack_name, stack.template) for stack in app.synth().stacks]
    return {f"{name}/{id}": resource for name, template in stacks for id, resource in template["Resources"].items()}


def show(report: Report, console: Console) -> None:
    """For a person: each bill as a table, the comparison, and what to make of it."""
    head = f"stage {report.stage}, prices of {report.region}, models: {', '.join(report.models)}"
    console.print(head, highlight=False, soft_wrap=True)
    works = report.usage.works
    title = "a month with this work" if works else "an idle month"
    console.print(_table(title, report.month.lines, report.month.total))
    for name, unit in report.units.items():
        lines = [line for line in unit.lines if line.cost]
        console.print(_table(f"{name}, with no allowance left", lines, unit.total))
    if report.label_studio:
        lines = [line for line in report.label_studio.lines if line.cost]
        console.print(_table("Label Studio's own stack, an idle month, in no other sum", lines, report.label_studio.total))
    console.print(_table("instead: machines that always run", report.alternative.lines, report.alternative.total))
    idle = f" (idle: {dollars(report.idle.total)})" if works else ""
    server = "" if report.label_studio else "Label Studio, "
    console.print(
        f"{title}: {dollars(report.month.total)}{idle}; machines that always run: {dollars(report.alternative.total)},"
        f" {report.ratio:,.0f} times as much",
        f"Prices as known on {report.checked}, not compared with AWS since: check cli/prices.toml against AWS's price list.",
        f"Nothing was measured on AWS; {server}taxes and the account's other use of allowances are not in it.",
        sep="\n",
        highlight=False,
        soft_wrap=True,
    )
    if elsewhere := of_another_region(report.region, report.stage_region):
        console.print(f"[yellow]{elsewhere}[/yellow]", highlight=False, soft_wrap=True)


def of_another_region(priced: str, stage_region: str | None) -> str:
    """What is to be said where a stage may not cost what was reckoned; nothing where it lies in the priced region."""
    if stage_region == priced:
        return ""
    where = f"the stage lies in {stage_region}" if stage_region else "stages.yaml does not say where the stage lies"
    return f"These are prices of {priced}, the only ones known, and {where}: other regions' differ."


def _table(title: str, lines: Sequence[Line], total: float) -> Table:
    table = Table(title=escape(title), title_justify="left", show_footer=True, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("resource", "total", overflow="fold")
    for name in ("count", "quantity"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("charged by", overflow="fold")
    allowances = any(line.free for line in lines)
    if allowances:
        table.add_column("always free", justify="right", no_wrap=True)
    table.add_column("cost", dollars(total), justify="right", no_wrap=True)
    table.add_column("why", overflow="fold")
    for line in lines:
        quantity, free = (f"{number:,.4g}" if number < 1000 else f"{number:,.0f}" for number in (line.quantity, line.free))
        table.add_row(
            escape(line.resource),
            str(line.count or ""),
            quantity if line.charged_by else "",
            line.charged_by or "nothing",
            *([free if line.free else ""] if allowances else []),
            dollars(line.cost),
            escape(line.why),
        )
    return table


def dollars(amount: float) -> str:
    if 0 < amount < 0.0001:
        return "<$0.0001"
    return f"${amount:,.2f}" if amount >= 1 or not amount else f"${amount:.4f}"
