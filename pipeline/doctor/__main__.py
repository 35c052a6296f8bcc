"""`python -m pipeline.doctor`: the doctor where not even the command line's packages import.

With the name of a function below pipeline.doctor, and its arguments: that one's checks as JSON (subprocess_probe.py).
"""

import json
import pkgutil
import sys
from dataclasses import asdict

from pipeline.doctor.checks import exit_status, render
from pipeline.doctor.environment import check_machine

if len(sys.argv) > 1:
    checks = pkgutil.resolve_name(f"pipeline.doctor.{sys.argv[1]}")(*sys.argv[2:])
    print(json.dumps([asdict(check) for check in checks]))
else:
    checks = check_machine()
    print(render(checks))
    sys.exit(exit_status(checks))
