"""A part of a large predict request, sent by `predict`: what the version that it names says of each task."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import msgspec
from aws_lambda_powertools import Logger
from aws_lambda_powertools.utilities.typing import LambdaContext

from labelloop.artifacts import Bucket, Champions
from labelloop.model_config import ModelConfigs
from labelloop.predict import Part, PartPredictor, TaskPredictor
from labelloop.settings import Settings

logger = Logger()


def connect(settings: Settings) -> Any:
    from labelloop.label_studio.access import connect  # boto3: only for images that Label Studio itself holds

    return connect(settings)


@cache
def predictor() -> PartPredictor:
    settings = Settings()
    images, champions = Bucket(settings.images_bucket), Champions(Bucket(settings.artifacts_bucket))
    url = settings.label_studio_url
    tasks = TaskPredictor(ModelConfigs.find(), images, champions, partial(connect, settings), label_studio_url=url)
    return PartPredictor(tasks, log=logger.warning)


@logger.inject_lambda_context(clear_state=True)
def handler(event: dict[str, Any], context: LambdaContext) -> Any:
    part = msgspec.convert(event, Part)
    logger.append_keys(model=part.champion.model)
    results = predictor()(part)
    logger.info("predicted a part", tasks=len(results), late=results.count(None), version=part.champion.version)
    return {"results": msgspec.to_builtins(results)}
