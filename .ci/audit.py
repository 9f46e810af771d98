"""Known vulnerabilities of what is installed here and of what the layers and the training job install: `make audit`.

pip-audit calls a package that its database does not answer for "not found" and passes it, so an audit without a database
looks like a clean one. This says which of the two it was. Exit codes: 0 clean or skipped, with a line that says which; 1 found.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ("layers/core/requirements.txt", "layers/inference/requirements.txt", "training_jobs/requirements.txt")


def audited() -> tuple[list[dict[str, object]], str]:
    """What pip-audit says of each package, and what it says on its way."""
    installed = subprocess.run(
        ["uv", "pip", "freeze", "--python", ".venv", "--exclude-editable"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "installed.txt"
        file.write_text(installed.stdout)
        files = [word for name in (str(file), *SHIPPED) for word in ("-r", name)]
        command = ["pip-audit", "--no-deps", "--disable-pip", "--progress-spinner", "off", "--format", "json", *files]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        return json.loads(done.stdout)["dependencies"], done.stderr
    except (ValueError, KeyError):
        return [], done.stderr


def main() -> int:
    packages, said = audited()
    answered = [package for package in packages if "skip_reason" not in package]
    if not answered:
        last = said.strip().splitlines()[-1:] if not packages else [f"none of {len(packages)} packages is known to it"]
        print(f"audit skipped: the database of vulnerabilities does not answer ({''.join(last)})")
        return 0
    found = [package for package in answered if package.get("vulns")]
    for package in found:
        for known in package["vulns"]:  # type: ignore[attr-defined]
            mended = ", ".join(known["fix_versions"]) or "no version yet"
            print(f"{package['name']} {package['version']}: {known['id']}, mended in {mended}")
    print(f"audit: {len(answered)} packages, {len(found)} with known vulnerabilities, {len(packages) - len(answered)} unknown")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
