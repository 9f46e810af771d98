"""How a stage does: one dashboard, and saved queries of the logs."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from itertools import count

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_logs as logs
from constructs import Construct

from infra_cdk.constructs.python_function import PythonFunction
from infra_cdk.constructs.queue_worker import QueueWorker
from infra_cdk.sources import ROOT
from infra_cdk.stage import Stage

_PRICES = ROOT / "cli" / "prices.toml"  # data of `labelloop cost`
_SPOT = 0.5  # of the price on demand, as `labelloop cost` takes it
_HOUR, _DAY = cdk.Duration.hours(1), cdk.Duration.days(1)
_METRIC_OF = {"classification": "accuracy", "multilabel": "f1", "detection": "map_50"}  # `records.Metric`


class Monitoring(Construct):
    """Predictions and cold starts are read from logs when somebody looks, so that predict counts nothing itself."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        api: apigateway.RestApi,
        functions: Mapping[str, PythonFunction],
        workers: Mapping[str, QueueWorker],
        trainings_failed: logs.MetricFilter,
    ) -> None:
        super().__init__(scope, id)
        self._stage, self._api, self._functions = stage, api, functions
        dashboard = cloudwatch.Dashboard(self, "Dashboard", dashboard_name=stage.prefix, default_interval=cdk.Duration.days(7))
        dashboard.add_widgets(
            self._from_log(
                "Predictions (tasks)", "predict", "filter message = 'predicted' | stats sum(tasks) as tasks by bin(1h)"
            ),
            self._graph(
                "The API's answers (ms)",
                api.metric_latency(statistic="p50", label="p50", period=_HOUR),
                api.metric_latency(statistic="p95", label="p95", period=_HOUR),
            ),
            self._graph(
                "Requests that failed",
                api.metric_server_error(label="API 5xx", statistic="Sum", period=_HOUR),
                api.metric_client_error(label="API 4xx", statistic="Sum", period=_HOUR),
                *(one.metric_errors(label=name, period=_HOUR) for name, one in functions.items()),
            ),
        )
        dashboard.add_widgets(
            self._from_log(
                "Cold starts of predict, and how long they load (ms)",
                "predict",
                "filter @type = 'REPORT' | stats count(@initDuration) as starts, pct(@initDuration, 50) as p50, "
                "pct(@initDuration, 95) as p95 by bin(1h)",
            ),
            self._graph(
                "Age of the oldest message (s)",
                *(
                    one.queue.metric_approximate_age_of_oldest_message(label=name, statistic="Maximum", period=_HOUR)
                    for name, one in workers.items()
                ),
            ),
            self._graph(
                "Messages that wait, and dead letters",
                *(
                    queue.metric_approximate_number_of_messages_visible(label=label, statistic="Maximum", period=_HOUR)
                    for name, one in workers.items()
                    for label, queue in ((name, one.queue), (f"{name}, dead", one.dead_letters))
                ),
            ),
        )
        dashboard.add_widgets(
            self._graph("Annotated tasks", *self._of_models("retrain", "Annotations", "Maximum")),
            self._graph(
                "Trainings",
                *self._of_models("retrain", "TrainingsStarted", "Sum", "started: "),
                trainings_failed.metric(label="failed", statistic="Sum", period=_HOUR),
            ),
            self._graph("Pre-annotations that annotators kept (%)", *self._acceptance()),
        )
        dashboard.add_widgets(
            self._graph("Metric on the holdout, by model", *self._scores()),
            cloudwatch.LogQueryWidget(
                title="Versions",
                width=8,
                log_group_names=[functions["promote"].log_group.log_group_name],
                query_string=(
                    "filter ispresent(version) and version > 0 and ispresent(value) "
                    "| display @timestamp, model, version, message, metric, value, n_annotations, reason | sort @timestamp desc"
                ),
            ),
            self._cost(),
        )
        if stage.saves_queries:
            self._save_queries()

    def _graph(self, title: str, *metrics: cloudwatch.IMetric) -> cloudwatch.GraphWidget:
        return cloudwatch.GraphWidget(
            title=title, width=8, left=list(metrics), left_y_axis=cloudwatch.YAxisProps(min=0, show_units=False)
        )

    def _from_log(self, title: str, function: str, query: str) -> cloudwatch.LogQueryWidget:
        return cloudwatch.LogQueryWidget(
            title=title,
            width=8,
            view=cloudwatch.LogQueryVisualizationType.LINE,
            log_group_names=[self._functions[function].log_group.log_group_name],
            query_string=query,
        )

    def _metric(
        self, function: str, name: str, statistic: str, *, label: str, model: str, period: cdk.Duration = _HOUR
    ) -> cloudwatch.Metric:
        """One that a function counts itself."""
        return cloudwatch.Metric(
            namespace=self._stage.prefix,
            metric_name=name,
            dimensions_map={"service": function, "model": model},
            statistic=statistic,
            label=label,
            period=period,
        )

    def _of_models(self, function: str, name: str, statistic: str, before: str = "") -> list[cloudwatch.Metric]:
        models = self._stage.models.names
        return [self._metric(function, name, statistic, label=f"{before}{model}", model=model) for model in models]

    def _acceptance(self) -> list[cloudwatch.IMetric]:
        found: list[cloudwatch.IMetric] = []
        for number, model in enumerate(self._stage.models.names):
            using = {
                f"{name.lower()}{number}": self._metric("retrain", name, "Sum", label=name, model=model, period=_DAY)
                for name in ("PredictionsKept", "PredictionsShown")
            }
            kept, shown = using
            found.append(
                cloudwatch.MathExpression(expression=f"100 * {kept} / {shown}", using_metrics=using, label=model, period=_DAY)
            )
        return found

    def _scores(self) -> list[cloudwatch.IMetric]:
        return [
            self._metric("promote", name, "Maximum", label=f"{config.name}: {name}", model=config.name)
            for config in self._stage.configs
            for name in [_METRIC_OF[config.problem_type]]
        ]

    def _cost(self) -> cloudwatch.GraphWidget:
        """US dollars a day for what ran; what stands there anyway is `labelloop cost`'s to tell."""
        table = tomllib.loads(_PRICES.read_text(encoding="utf-8"))

        def price(name: str) -> float:
            return float(table["prices"][name]["price"]) / float(table["prices"][name].get("per", 1))

        number = count()
        using: dict[str, cloudwatch.IMetric] = {}

        def named(metric: cloudwatch.IMetric) -> str:
            id = f"m{next(number)}"
            using[id] = metric
            return id

        lambdas, trainings = [], []
        for function in self._functions.values():
            ms = named(function.metric_duration(statistic="Sum", period=_DAY))
            calls = named(function.metric_invocations(period=_DAY))
            gb_seconds = price("lambda.gb_second") * function.memory_mb / 1024 / 1000
            lambdas.append(f"FILL({ms},0)*{_plain(gb_seconds)} + FILL({calls},0)*{_plain(price('lambda.request'))}")
        requests = named(self._api.metric_count(statistic="Sum", period=_DAY))
        serving = cloudwatch.MathExpression(
            expression=f"{' + '.join(lambdas)} + FILL({requests},0)*{_plain(price('api.request'))}",
            using_metrics=dict(using),
            label="Lambda and API",
            period=_DAY,
        )
        using.clear()
        for config in self._stage.configs:
            hour = table["instances"].get(config.training.instance_type)
            if hour is not None:
                metric = self._metric("promote", "TrainingSeconds", "Sum", label="", model=config.name, period=_DAY)
                share = _SPOT if config.training.spot else 1
                trainings.append(f"FILL({named(metric)},0)*{_plain(hour * share / 3600)}")
        expressions: list[cloudwatch.IMetric] = [serving]
        if trainings:
            expressions.append(
                cloudwatch.MathExpression(
                    expression=" + ".join(trainings), using_metrics=dict(using), label="trainings", period=_DAY
                )
            )
        return self._graph(f"Estimate of what ran ($ a day, {table['region']}'s prices of {table['checked']})", *expressions)

    def _save_queries(self) -> None:
        every = [function.log_group for function in self._functions.values()]
        for name, groups, lines in _queries(every, {name: one.log_group for name, one in self._functions.items()}):
            logs.QueryDefinition(
                self,
                f"Query{name.title().replace(' ', '')}",
                query_definition_name=f"{self._stage.prefix}/{name}",
                query_string=logs.QueryString(fields=lines[0], filter_statements=[lines[1]], sort=lines[2], limit=200),
                log_groups=groups,
            )


def _plain(number: float) -> str:
    """Without an exponent, which CloudWatch's expressions do not know."""
    return f"{number:.15f}".rstrip("0")


def _queries(
    every: Sequence[logs.ILogGroup], of: Mapping[str, logs.ILogGroup]
) -> list[tuple[str, list[logs.ILogGroup], tuple[list[str], str, str]]]:
    """Name, log groups, and the query: fields, filter, order."""
    newest = "@timestamp desc"
    return [
        (
            "errors",
            list(every),
            (["@timestamp", "service", "model", "message", "reason"], "level in ['ERROR', 'CRITICAL']", newest),
        ),
        (
            "died",
            list(every),
            (["@timestamp", "@log", "@message"], "@message like /Task timed out|Runtime exited|OutOfMemory/", newest),
        ),
        (
            "slow predictions",
            [of["predict"]],
            (["@timestamp", "@duration", "@initDuration"], "@type = 'REPORT'", "@duration desc"),
        ),
        ("looks", [of["retrain"]], (["@timestamp", "model", "started", "reason"], "message = 'reconciled'", newest)),
        ("verdicts", [of["promote"]], (["@timestamp", "model", "version", "message", "reason"], "ispresent(version)", newest)),
        ("refused images", [of["ingest"]], (["@timestamp", "key", "reason"], "message = 'refused'", newest)),
        ("sign-ins", [of["authorize"]], (["@timestamp", "message", "model", "effect", "reason"], "ispresent(message)", newest)),
    ]
