"""A part of a large predict request, sent by `predict`: what the version that it names says of each task."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import msgspec

from labelloop.artifacts import Bucket, Champions
from labelloop.log import Log
from labelloop.model_config import ModelConfigs
from labelloop.predict import Part, PartPredictor, TaskPredictor
from labelloop.settings import Settings

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

log = Log()


@cache
def predictor() -> PartPredictor:
    settings = Settings()
    champions = Champions(Bucket(settings.artifacts_bucket))
    return PartPredictor(TaskPredictor.of(settings, ModelConfigs.find(), champions), log=log.warning)


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> Any:
    part = msgspec.convert(event, Part)
    log.keep(model=part.champion.model)
    results = predictor()(part)
    log.info("predicted a part", tasks=len(results), late=results.count(None), version=part.champion.version)
    return {"results": msgspec.to_builtins(results)}
