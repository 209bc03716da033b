"""Ray's agent as it is where Ray was installed without its dashboard; the raylet insists on having one.

Run as a script, with the arguments of ray/dashboard/agent.py.
"""

import importlib.util
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    package = importlib.util.find_spec("ray")
    assert package is not None and package.origin is not None
    sys.modules["ray.dashboard.optional_deps"] = None  # type: ignore[assignment] # makes its import fail
    runpy.run_path(str(Path(package.origin).parent / "dashboard/agent.py"), run_name="__main__")
