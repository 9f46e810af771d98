"""The ML backend behind API Gateway: `POST /{model}/setup`, `POST /{model}/predict`, `GET /{model}/versions`."""

from __future__ import annotations

import gc

gc.set_threshold(100_000)  # what is loaded is no garbage, and looking for some took a tenth of a cold start

import base64
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import msgspec

from labelloop.artifacts import Bucket, Champions
from labelloop.errors import LabelloopError, RequestError, UnknownModelError, http_status
from labelloop.log import Log
from labelloop.model_config import ModelConfigs
from labelloop.predict import Elsewhere, Predictor, TaskPredictor
from labelloop.settings import Settings

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.typing import LambdaContext

log = Log()
if Settings().starts_ahead:
    import labelloop.inference  # noqa: F401 - otherwise the first prediction's, so that setup is answered sooner


def elsewhere(settings: Settings) -> Elsewhere:
    from labelloop.fan_out import FanOut  # boto3: only for large requests, and for what is late

    return FanOut.connect(settings.predict_part_function, settings.prelabel_queue, log=log.warning)


@cache
def predictor() -> Predictor:
    settings, configs = Settings(), ModelConfigs.find()
    champions = Champions(Bucket(settings.artifacts_bucket))
    tasks = TaskPredictor.of(settings, configs, champions)
    return Predictor(configs, champions, tasks, cache(partial(elsewhere, settings)), log=log.warning)


@log.of_invocations
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    model = event["pathParameters"]["model"]
    log.keep(model=model)
    try:
        match event["resource"].rpartition("/")[2]:
            case "setup":
                return _answer(200, predictor().setup(model, _body(event)))
            case "predict":
                response = predictor().predict(model, _body(event), seconds=context.get_remaining_time_in_millis() / 1000)
                log.info("predicted", tasks=len(response.results), version=response.model_version)
                return _answer(200, response)
            case "versions":
                return _answer(200, predictor().versions(model))
            case route:
                raise UnknownModelError(f"there is no route {route!r}")
    except LabelloopError as error:
        log.warning("refused", reason=str(error), error=type(error).__name__)
        return _answer(http_status(error), {"error": str(error)})
    except Exception:
        log.exception("failed")
        return _answer(500, {"error": "labelloop failed; its log knows why", "request_id": context.aws_request_id})


def _body(event: dict[str, Any]) -> bytes:
    """The request's body; half a character in it stays one, and is no JSON."""
    body = (event.get("body") or "").encode(errors="surrogatepass")
    try:
        return base64.b64decode(body) if event.get("isBase64Encoded") else body
    except ValueError as error:
        raise RequestError(f"the body is no base64: {error}") from error


def _answer(status: int, body: Any) -> dict[str, Any]:
    return {"statusCode": status, "headers": {"Content-Type": "application/json"}, "body": msgspec.json.encode(body).decode()}
