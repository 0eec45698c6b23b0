"""Schemathesis over the OpenAPI schema of our routes: whatever fits the schema, or just does not, is no server error.

It wants `st` on the path (`pip install schemathesis`, in an environment of its own: it pins what vLLM pins otherwise).
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUTES = r"^/v1/(experts|route|router|ready|tenants)"
EXAMPLES = 200


@pytest.mark.skipif(shutil.which("st") is None, reason="schemathesis is not installed")
def test_no_request_to_our_routes_is_a_server_error(live: Any, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *("st", "run", f"{live.server.url}/openapi.json", "--include-path-regex", ROUTES),
            *("--checks", "not_a_server_error", "--max-examples", str(EXAMPLES)),
            *("--header", "Authorization: Bearer secret", "--request-timeout", "60"),
            *("--exclude-path", "/v1/ready", "--seed", "1"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    cases = re.search(r"(\d[\d,]*) (?:generated|test cases?)", done.stdout)
    sys.stderr.write(f"schemathesis: {cases[0] if cases else done.stdout[-500:]}\n")
    assert done.returncode == 0, done.stdout[-4000:]
    assert live.http("GET", "/health").status_code == 200
