"""The Label Studio stack: the server itself on AWS, for a stage that brings none of its own. Made only where it is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass

import aws_cdk as cdk
from aws_cdk import aws_certificatemanager as acm
from aws_cdk import aws_cloudwatch as cloudwatch
from aws_cdk import aws_ec2 as ec2
from aws_cdk import aws_ecs as ecs
from aws_cdk import aws_elasticloadbalancingv2 as elb
from aws_cdk import aws_iam as iam
from aws_cdk import aws_logs as logs
from aws_cdk import aws_rds as rds
from aws_cdk import aws_route53 as route53
from aws_cdk import aws_route53_targets as route53_targets
from aws_cdk import aws_secretsmanager as secretsmanager
from constructs import Construct

from infra_cdk.constructs.alarms import OperatorAlarm
from infra_cdk.constructs.bucket import PrivateBucket
from infra_cdk.constructs.grants import allow, allow_reading_objects, allow_writing_objects
from infra_cdk.nag import acknowledge
from infra_cdk.stacks.state import StateStack, label_studio_cors
from infra_cdk.stage import Stage, output
from infra_cdk.stage_facts import LabelStudioServer

IMAGE = "heartexlabs/label-studio:1.23.2"  # the version that every test of this project runs against
_POSTGRES = rds.AuroraPostgresEngineVersion.VER_17_9  # pauses at 0 ACU; docs/label-studio.md says how to go on from it
_PAUSE = cdk.Duration.minutes(5)  # without a connection; AWS's shortest
_BACKUPS = cdk.Duration.days(14)
_DATABASE = _USER = "labelstudio"
_MEDIA = "media/"
_APP_PORT, _NGINX_PORT = 8000, 8085  # of the image's two commands
_LONGEST_REQUEST = cdk.Duration.seconds(120)  # where the image's uWSGI ends a request; predictions and exports take long
_DOWN = cdk.Duration.minutes(15)  # without an answering task, until somebody is told
_FIRST_START = cdk.Duration.minutes(15)  # migrations of an empty database on half a core


@dataclass(frozen=True)
class _Size:
    """Of the task: CPU in 1/1024 of a core, memory in MB, processes; and of the database: ACU at most (2 GB each)."""

    cpu: int
    memory_mb: int
    processes: int
    capacity: int


_SIZES = {"small": _Size(512, 2048, 2, 2), "medium": _Size(1024, 4096, 4, 4), "large": _Size(4096, 8192, 8, 16)}


class LabelStudioStack(cdk.Stack):
    """One task behind a load balancer with a domain name of its own, its database, its media.

    The task's network has no NAT gateway ($33 a month and zone): tasks lie in public subnets, with an address to call AWS and
    the backends from, behind a security group that lets in the load balancer alone; S3 is reached by a gateway, which is free.
    """

    def __init__(self, scope: Construct, id: str, *, stage: Stage, server: LabelStudioServer, state: StateStack) -> None:
        super().__init__(
            scope, id, env=stage.env, description=f"labelloop {stage.name}: Label Studio", termination_protection=True
        )
        self._stage, self._server, self._state, self._size = stage, server, state, _SIZES[server.size]
        self._vpc = self._network()
        self._database_secret = rds.DatabaseSecret(self, "DatabaseSecret", username=_USER)
        self._admin = self._generated(
            "Admin", "who administers Label Studio", "password", 32, template={"username": server.admin_email}
        )
        self._signing_key = self._generated("SigningKey", "what Label Studio signs sessions and tokens with", "key", 64)
        for secret in (self._database_secret, self._admin, self._signing_key):
            secret.apply_removal_policy(cdk.RemovalPolicy.RETAIN_ON_UPDATE_OR_DELETE)
        acknowledge(self._database_secret, SMG4="a task knows the password from its start on; docs/label-studio.md changes it")
        self._media = PrivateBucket(self, "Media", stage=stage, cors=label_studio_cors(stage))

        self._database = self._make_database()
        balancer, listener = self._make_balancer()
        service = self._make_service()
        self._database.connections.allow_default_port_from(service, "Label Studio")
        targets = elb.ApplicationTargetGroup(
            self,
            "Targets",
            vpc=self._vpc,
            protocol=elb.ApplicationProtocol.HTTP,
            port=_NGINX_PORT,
            targets=[service.load_balancer_target(container_name="nginx", container_port=_NGINX_PORT)],
            deregistration_delay=cdk.Duration.seconds(30),
            # Label Studio's own /health asks the database, for its organization: it would never pause.
            health_check=elb.HealthCheck(path="/nginx_health", interval=cdk.Duration.seconds(30)),
        )
        # Scanners that try the address alone do not get through to the database either.
        listener.add_action(
            "Domain",
            priority=1,
            conditions=[elb.ListenerCondition.host_headers([server.domain])],
            action=elb.ListenerAction.forward([targets]),
        )
        healthy = targets.metrics.healthy_host_count(period=_DOWN, statistic="Maximum")
        OperatorAlarm(
            self,
            "Down",
            stage=stage,
            says="no task of Label Studio answers the load balancer",
            runbook="label-studio-down",
            metric=cloudwatch.MathExpression(
                expression="IF(FILL(healthy, 0) < 1, 1, 0)", using_metrics={"healthy": healthy}, period=_DOWN, label="down"
            ),
            threshold=1,
        )
        output(self, "LabelStudioBalancer", balancer.load_balancer_dns_name)
        output(self, "LabelStudioAdminSecret", self._admin.secret_name)
        output(self, "LabelStudioService", f"{service.cluster.cluster_name}/{service.service_name}")

    def _network(self) -> ec2.Vpc:
        if not cdk.Token.is_unresolved(self.account) and not cdk.Token.is_unresolved(self.region):
            # Else the CDK would ask the account for its zones, which a pull request's role may not.
            zones = [cdk.Fn.select(number, cdk.Fn.get_azs()) for number in range(2)]
            self.node.set_context(f"availability-zones:account={self.account}:region={self.region}", zones)
        vpc = ec2.Vpc(
            self,
            "Vpc",
            max_azs=2,
            nat_gateways=0,
            subnet_configuration=[
                ec2.SubnetConfiguration(name="Public", subnet_type=ec2.SubnetType.PUBLIC, cidr_mask=24),
                ec2.SubnetConfiguration(name="Database", subnet_type=ec2.SubnetType.PRIVATE_ISOLATED, cidr_mask=24),
            ],
            gateway_endpoints={"S3": ec2.GatewayVpcEndpointOptions(service=ec2.GatewayVpcEndpointAwsService.S3)},
        )
        acknowledge(vpc, VPC7="flow logs cost by the GB; nothing but the load balancer can be reached from outside")
        return vpc

    def _generated(
        self, id: str, purpose: str, key: str, length: int, *, template: dict[str, str] | None = None
    ) -> secretsmanager.Secret:
        secret = secretsmanager.Secret(
            self,
            id,
            description=f"{self._stage.prefix}: {purpose}",
            generate_secret_string=secretsmanager.SecretStringGenerator(
                secret_string_template=json.dumps(template or {}),
                generate_string_key=key,
                password_length=length,
                exclude_punctuation=True,
            ),
        )
        acknowledge(secret, SMG4="Label Studio takes it at its start; docs/label-studio.md says how it is changed")
        return secret

    def _make_database(self) -> rds.DatabaseCluster:
        cluster = rds.DatabaseCluster(
            self,
            "Database",
            engine=rds.DatabaseClusterEngine.aurora_postgres(version=_POSTGRES),
            writer=rds.ClusterInstance.serverless_v2("Writer", publicly_accessible=False),
            serverless_v2_min_capacity=0,
            serverless_v2_max_capacity=self._size.capacity,
            serverless_v2_auto_pause_duration=_PAUSE,
            vpc=self._vpc,
            vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PRIVATE_ISOLATED),
            credentials=rds.Credentials.from_secret(self._database_secret),
            default_database_name=_DATABASE,
            storage_encrypted=True,
            deletion_protection=True,
            backup=rds.BackupProps(retention=_BACKUPS),
            copy_tags_to_snapshot=True,
            removal_policy=cdk.RemovalPolicy.SNAPSHOT,
        )
        if self._server.restored_from:
            resource = cluster.node.default_child
            assert isinstance(resource, rds.CfnDBCluster)  # noqa: S101
            resource.snapshot_identifier = self._server.restored_from
            # The snapshot has them, and CloudFormation refuses both.
            resource.master_username = resource.master_user_password = resource.database_name = None
        acknowledge(cluster, RDS6="Label Studio signs in with a password, and knows no other way")
        return cluster

    def _make_balancer(self) -> tuple[elb.ApplicationLoadBalancer, elb.ApplicationListener]:
        server = self._server
        zone = (
            route53.HostedZone.from_hosted_zone_attributes(
                self, "Zone", hosted_zone_id=server.hosted_zone.id, zone_name=server.hosted_zone.name
            )
            if server.hosted_zone
            else None
        )
        certificate: acm.ICertificate
        if server.certificate:
            certificate = acm.Certificate.from_certificate_arn(self, "Certificate", server.certificate)
        else:
            certificate = acm.Certificate(
                self, "Certificate", domain_name=server.domain, validation=acm.CertificateValidation.from_dns(zone)
            )
        balancer = elb.ApplicationLoadBalancer(
            self,
            "Balancer",
            vpc=self._vpc,
            internet_facing=True,
            drop_invalid_header_fields=True,
            idle_timeout=_LONGEST_REQUEST,
        )
        balancer.add_redirect(source_port=80, target_port=443, target_protocol=elb.ApplicationProtocol.HTTPS)
        listener = balancer.add_listener(
            "Https",
            port=443,
            certificates=[certificate],
            ssl_policy=elb.SslPolicy.RECOMMENDED_TLS,
            default_action=elb.ListenerAction.fixed_response(404),
        )
        if zone:
            route53.ARecord(
                self,
                "Address",
                zone=zone,
                record_name=server.domain,
                target=route53.RecordTarget.from_alias(route53_targets.LoadBalancerTarget(balancer)),
            )
        acknowledge(
            balancer,
            ELB2="nginx logs every request that reaches Label Studio, with the caller's address",
            EC23="annotators' browsers and the stage's functions come from anywhere; Label Studio asks for a sign-in",
        )
        return balancer, listener

    def _make_service(self) -> ecs.FargateService:
        """nginx, which answers the balancer and serves files, and uWSGI: the image's two commands, as its makers run it."""
        cluster = ecs.Cluster(self, "Cluster", vpc=self._vpc)
        acknowledge(cluster, ECS4="Container Insights costs by the metric; ECS's own of CPU and memory are free")
        log = logs.LogGroup(self, "Log", retention=self._stage.log_retention, removal_policy=cdk.RemovalPolicy.DESTROY)
        task = ecs.FargateTaskDefinition(
            self,
            "Task",
            cpu=self._size.cpu,
            memory_limit_mib=self._size.memory_mb,
            runtime_platform=ecs.RuntimePlatform(
                cpu_architecture=ecs.CpuArchitecture.X86_64, operating_system_family=ecs.OperatingSystemFamily.LINUX
            ),
            task_role=self._task_role(),
        )
        image = ecs.ContainerImage.from_registry(IMAGE)
        app = task.add_container(
            "app",
            image=image,
            command=["label-studio-uwsgi"],
            environment=self._environment(),
            secrets=self._secrets(),
            logging=ecs.LogDrivers.aws_logs(log_group=log, stream_prefix="app"),
            # A connection, no request: whatever Label Studio answers, it asks the database first.
            health_check=ecs.HealthCheck(
                command=[
                    "CMD-SHELL",
                    f"python3 -c \"import socket; socket.create_connection(('127.0.0.1', {_APP_PORT}), 3).close()\"",
                ],
                interval=cdk.Duration.seconds(30),
                timeout=cdk.Duration.seconds(5),
                retries=10,
                start_period=cdk.Duration.minutes(5),
            ),
        )
        nginx = task.add_container(
            "nginx",
            image=image,
            command=["nginx"],
            environment={"APP_HOST": "localhost", "LABEL_STUDIO_HOST": self._url},
            logging=ecs.LogDrivers.aws_logs(log_group=log, stream_prefix="nginx"),
            port_mappings=[ecs.PortMapping(container_port=_NGINX_PORT)],
        )
        nginx.add_container_dependencies(
            ecs.ContainerDependency(container=app, condition=ecs.ContainerDependencyCondition.HEALTHY)
        )
        acknowledge(task, ECS2="what is secret comes from Secrets Manager; the rest are settings")
        return ecs.FargateService(
            self,
            "Service",
            cluster=cluster,
            task_definition=task,
            desired_count=1,
            min_healthy_percent=100,  # the new task takes over before the old one goes
            max_healthy_percent=200,
            assign_public_ip=True,
            vpc_subnets=ec2.SubnetSelection(subnet_type=ec2.SubnetType.PUBLIC),
            circuit_breaker=ecs.DeploymentCircuitBreaker(enable=True, rollback=True),
            health_check_grace_period=_FIRST_START,
        )

    def _task_role(self) -> iam.Role:
        """Media, and the images whose addresses it signs for browsers."""
        role = iam.Role(self, "TaskRole", assumed_by=iam.ServicePrincipal("ecs-tasks.amazonaws.com"))
        allow_reading_objects(role, self._media, _MEDIA)
        allow_writing_objects(role, self._media, _MEDIA)
        allow(role, "s3:DeleteObject", on=self._media.arn_for_objects(f"{_MEDIA}*"))
        allow_reading_objects(role, self._state.images, "images/")
        return role

    @property
    def _url(self) -> str:
        return f"https://{self._server.domain}"

    def _environment(self) -> dict[str, str]:
        """Label Studio's settings; each with another value than its own has the reason."""
        return {
            "DJANGO_DB": "default",  # PostgreSQL
            "POSTGRE_HOST": self._database.cluster_endpoint.hostname,
            "POSTGRE_PORT": "5432",
            "POSTGRE_NAME": _DATABASE,
            "POSTGRE_USER": _USER,
            "PGSSLMODE": "require",  # read by PostgreSQL's own client library
            "LABEL_STUDIO_HOST": self._url,
            "CSRF_TRUSTED_ORIGINS": self._url,  # the load balancer ends TLS: Label Studio itself sees http
            "SESSION_COOKIE_SECURE": "1",
            "CSRF_COOKIE_SECURE": "1",
            "LABEL_STUDIO_DISABLE_SIGNUP_WITHOUT_LINK": "true",  # or whoever finds the address makes an account
            "LABEL_STUDIO_USERNAME": self._server.admin_email,
            "LABEL_STUDIO_ENABLE_LEGACY_API_TOKEN": "true",  # the token that the stage's functions sign in with
            "ML_TIMEOUT_HEALTH": "10",  # s; 1 by default, which a cold authorizer misses: tasks open without prediction then
            "ML_TIMEOUT_SETUP": "15",
            "WEBHOOK_TIMEOUT": "5",
            "STORAGE_TYPE": "s3",  # uploads, exports, avatars; a task has no disk that stays
            "STORAGE_AWS_BUCKET_NAME": self._media.bucket_name,
            "STORAGE_AWS_REGION_NAME": self.region,
            "STORAGE_AWS_FOLDER": _MEDIA.rstrip("/"),
            "UWSGI_PROCESSES": str(self._size.processes),
            "UWSGI_NUMBER_OF_THREADS": "8",  # requests wait for backends; one thread each would make others wait
            "JSON_LOG": "1",
            "COLLECT_ANALYTICS": "false",  # and nothing else is told to anybody
            "SENTRY_DSN": "",
            "FRONTEND_SENTRY_DSN": "",
            "LATEST_VERSION_CHECK": "false",
        }

    def _secrets(self) -> dict[str, ecs.Secret]:
        secret = ecs.Secret.from_secrets_manager
        return {
            "POSTGRE_PASSWORD": secret(self._database_secret, "password"),
            "LABEL_STUDIO_PASSWORD": secret(self._admin, "password"),
            "LABEL_STUDIO_USER_TOKEN": secret(self._state.secrets.label_studio, "token"),
            "SECRET_KEY": secret(self._signing_key, "key"),
        }
