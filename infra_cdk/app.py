"""The CDK app: `python -m infra_cdk.app`, as cdk.json has it. stages.yaml has the stages."""

from __future__ import annotations

import sys

import aws_cdk as cdk
import cdk_nag

from infra_cdk.stacks.label_studio import LabelStudioStack
from infra_cdk.stacks.serving import ServingStack
from infra_cdk.stacks.state import StateStack
from infra_cdk.stacks.training import TrainingStack
from infra_cdk.stacks.workflows import WorkflowsStack
from infra_cdk.stage import Stage
from labelloop.errors import LabelloopError, exit_code


def build(app: cdk.App, stage: Stage | None = None) -> Stage:
    """Add the stacks of a stage, by default of the one that the app's context names. Raises `ConfigError`."""
    stage = stage or Stage.from_context(app.node)
    state = StateStack(app, f"{stage.prefix}-state", stage=stage)
    training = TrainingStack(app, f"{stage.prefix}-training", stage=stage, state=state)
    ServingStack(app, f"{stage.prefix}-serving", stage=stage, state=state, training=training)
    if stage.facts.label_studio:
        LabelStudioStack(app, f"{stage.prefix}-label-studio", stage=stage, server=stage.facts.label_studio, state=state)
    if stage.facts.workflows:
        WorkflowsStack(
            app,
            f"{stage.prefix}-workflows",
            stage=stage,
            workflows=stage.facts.workflows,
            state=state,
            training=training,
        )
    cdk.Tags.of(app).add("labelloop:stage", stage.name)
    if not stage.is_local:
        cdk.Validations.of(app).add_plugins(cdk_nag.AwsSolutionsChecks(app))
    return stage


def main() -> None:
    app = cdk.App()
    try:
        build(app)
    except LabelloopError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(exit_code(error))
    app.synth()


if __name__ == "__main__":
    main()
