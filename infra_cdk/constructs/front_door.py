"""The front door: one REST API, `/{model}/…`, behind one authorizer."""

from __future__ import annotations

import json

import aws_cdk as cdk
from aws_cdk import aws_apigateway as apigateway
from aws_cdk import aws_iam as iam
from aws_cdk import aws_lambda as lambda_
from aws_cdk import aws_logs as logs
from aws_cdk import aws_sqs as sqs
from constructs import Construct

from infra_cdk.constructs.grants import allow
from infra_cdk.nag import acknowledge, acknowledge_finding
from infra_cdk.stage import Stage

STAGE_NAME = "v1"
_JSON = "application/json"
_REQUESTS_PER_SECOND, _BURST = 500, 1000  # far above what annotators cause; a bound on what a runaway client can cost

# `{"model":"…","action":"…"}`, form-encoded for SQS. The values are encoded once more, which changes no real one and keeps
# quotes out of the JSON: the request model refuses such an event, but the emulator does not look at request models.
_MESSAGE = (
    "%7B%22model%22%3A%22$util.urlEncode($util.urlEncode($input.params('model')))%22"
    "%2C%22action%22%3A%22$util.urlEncode($util.urlEncode($input.path('$.action')))%22%7D"
)


class FrontDoor(Construct):
    """The API. `url` has no slash at its end; a model's backend is `{url}/{model}`."""

    def __init__(
        self,
        scope: Construct,
        id: str,
        *,
        stage: Stage,
        authorizer: lambda_.IFunction,
        predict: lambda_.IFunction,
        retrain_queue: sqs.IQueue,
    ) -> None:
        super().__init__(scope, id)
        access_log = logs.LogGroup(self, "AccessLog", retention=stage.log_retention, removal_policy=cdk.RemovalPolicy.DESTROY)
        self.api = apigateway.RestApi(
            self,
            "Api",
            rest_api_name=stage.prefix,
            description="ML backends of labelloop, one per model, as Label Studio calls them",
            endpoint_types=[apigateway.EndpointType.REGIONAL],
            cloud_watch_role=True,
            cloud_watch_role_removal_policy=cdk.RemovalPolicy.RETAIN,  # it serves all APIs of the account
            deploy_options=apigateway.StageOptions(
                stage_name=STAGE_NAME,
                access_log_destination=apigateway.LogGroupLogDestination(access_log),
                access_log_format=apigateway.AccessLogFormat.json_with_standard_fields(
                    caller=False,
                    http_method=True,
                    ip=True,
                    protocol=False,
                    request_time=True,
                    resource_path=True,
                    response_length=True,
                    status=True,
                    user=True,
                ),
                logging_level=apigateway.MethodLoggingLevel.ERROR,
                throttling_rate_limit=_REQUESTS_PER_SECOND,
                throttling_burst_limit=_BURST,
                tracing_enabled=True,
            ),
            default_method_options=apigateway.MethodOptions(
                authorization_type=apigateway.AuthorizationType.CUSTOM,
                authorizer=apigateway.RequestAuthorizer(
                    self,
                    "Authorizer",
                    handler=authorizer,
                    identity_sources=[apigateway.IdentitySource.header("Authorization")],
                    results_cache_ttl=cdk.Duration.hours(1),
                ),
            ),
        )
        self.api.node.try_remove_child("Endpoint")  # an output of CDK's own; the stack has one with a name
        host = f"{self.api.rest_api_id}.execute-api.{cdk.Aws.REGION}.{cdk.Aws.URL_SUFFIX}"
        self.url = f"https://{host}/{self.api.deployment_stage.stage_name}"

        model = self.api.root.add_resource("{model}")
        model.add_resource("health").add_method("GET", _health(), method_responses=[_answers("200")])
        for method, route in (("POST", "setup"), ("POST", "predict"), ("GET", "versions")):
            model.add_resource(route).add_method(method, apigateway.LambdaIntegration(predict, allow_test_invoke=False))
        self._add_webhook(model.add_resource("webhook"), retrain_queue)
        self._say_errors_in_json()

        acknowledge(
            self.api,
            APIG2="a request model checks the webhook's body; predict checks the other routes and answers for each task",
            APIG3="a web application firewall costs money while idle; every route asks for credentials and is throttled",
            COG4="Label Studio knows Basic credentials only; a Lambda authorizer checks them",
        )
        acknowledge_finding(
            self.api,
            "AwsSolutions-IAM4[Policy::arn:<AWS::Partition>:iam::aws:policy/service-role/AmazonAPIGatewayPushToCloudWatchLogs]",
            reason="the policy that API Gateway asks for to write logs",
        )

    def _add_webhook(self, resource: apigateway.Resource, queue: sqs.IQueue) -> None:
        """A webhook is a hint to look: it is queued without running a function, so that no annotator waits."""
        role = iam.Role(self, "WebhookRole", assumed_by=iam.ServicePrincipal("apigateway.amazonaws.com"))
        allow(role, "sqs:SendMessage", on=queue.queue_arn)
        hint = self.api.add_model(
            "Hint",
            content_type=_JSON,
            description="Any event of Label Studio; only its action counts",
            schema=apigateway.JsonSchema(
                schema=apigateway.JsonSchemaVersion.DRAFT4,
                type=apigateway.JsonSchemaType.OBJECT,
                required=["action"],
                properties={
                    "action": apigateway.JsonSchema(type=apigateway.JsonSchemaType.STRING, pattern="^[A-Z_]{1,64}$"),
                },
            ),
        )
        resource.add_method(
            "POST",
            apigateway.AwsIntegration(
                service="sqs",
                path=f"{cdk.Aws.ACCOUNT_ID}/{queue.queue_name}",
                integration_http_method="POST",
                options=apigateway.IntegrationOptions(
                    credentials_role=role,
                    passthrough_behavior=apigateway.PassthroughBehavior.NEVER,
                    request_parameters={"integration.request.header.Content-Type": "'application/x-www-form-urlencoded'"},
                    request_templates={_JSON: f"Action=SendMessage&MessageBody={_MESSAGE}"},
                    integration_responses=[
                        _integration_answer("201", {"status": "ok"}),
                        _integration_answer("503", {"error": "the event could not be queued"}, pattern=r"[45]\d{2}"),
                    ],
                ),
            ),
            method_responses=[_answers("201"), _answers("503")],
            request_models={_JSON: hint},
            request_validator=apigateway.RequestValidator(
                self, "WebhookValidator", rest_api=self.api, validate_request_body=True
            ),
        )

    def _say_errors_in_json(self) -> None:
        """What API Gateway itself answers, in the form of every other error."""
        kinds = apigateway.ResponseType
        for id, kind, status, text in (
            (
                "Unauthorized",
                kinds.UNAUTHORIZED,
                "401",
                json.dumps("credentials are missing"),
            ),
            ("AccessDenied", kinds.ACCESS_DENIED, "403", json.dumps("these credentials do not open this model")),
            (
                "BadBody",
                kinds.BAD_REQUEST_BODY,
                "400",
                json.dumps("the body is no event of Label Studio"),
            ),
            ("NoRoute", kinds.MISSING_AUTHENTICATION_TOKEN, "404", json.dumps("no such route")),
            ("ClientError", kinds.DEFAULT_4_XX, None, "$context.error.messageString"),
            ("ServerError", kinds.DEFAULT_5_XX, None, "$context.error.messageString"),
        ):
            self.api.add_gateway_response(
                id,
                type=kind,
                status_code=status,
                templates={_JSON: f'{{"error":{text}}}'},
                response_headers={"WWW-Authenticate": "'Basic realm=\"labelloop\"'"} if status == "401" else None,
            )


def _health() -> apigateway.MockIntegration:
    """Answered by API Gateway alone: Label Studio gives it a second and shows no error when that is not enough."""
    return apigateway.MockIntegration(
        passthrough_behavior=apigateway.PassthroughBehavior.NEVER,
        request_templates={_JSON: '{"statusCode":200}'},
        integration_responses=[_integration_answer("200", {"status": "UP"})],
    )


def _integration_answer(status: str, body: dict[str, str], *, pattern: str | None = None) -> apigateway.IntegrationResponse:
    template = json.dumps(body, separators=(",", ":"))
    return apigateway.IntegrationResponse(status_code=status, selection_pattern=pattern, response_templates={_JSON: template})


def _answers(status: str) -> apigateway.MethodResponse:
    return apigateway.MethodResponse(status_code=status, response_models={_JSON: apigateway.Model.EMPTY_MODEL})
