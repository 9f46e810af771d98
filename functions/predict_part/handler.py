"""A part of a large predict request, sent by `predict`: what the version that it names says of each task."""

from __future__ import annotations

from functools import cache, partial
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


def connect(settings: Settings) -> Any:
    from labelloop.label_studio.access import connect  # boto3: only for images that Label Studio itself holds

    return connect(settings)


@cache
def predictor() -> PartPredictor:
    settings = Settings()
    images, champions = Bucket(settings.images_bucket), Champions(Bucket(settings.artifacts_bucket))
    url = settings.label_studio_url
    tasks = TaskPredictor(ModelConfigs.find(), images, champions, partial(connect, settings), label_studio_url=url)
    return PartPredictor(tasks, log=log.warning)


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> Any:
    part = msgspec.convert(event, Part)
    log.keep(model=part.champion.model)
    results = predictor()(part)
    log.info("predicted a part", tasks=len(results), late=results.count(None), version=part.champion.version)
    return {"results": msgspec.to_builtins(results)}
