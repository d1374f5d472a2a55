"""What a device gets: packages, megabytes and seconds of import of umbel without extras, in a fresh environment.

    python -m benchmarks.edge_install [--python python3.11] [--keep DIR]

Runs the very `pip install` of the Dockerfile's target `edge` (base dependencies only, with constraints.txt), then
imports in that environment what a node imports. Prints a table and one JSON line.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IMPORTS = ("flwr.clientapp", "client.app", "client.node")
REPEATS = 5
UNWANTED = ("torch", "ray", "scipy", "opacus", "dp-accounting", "matplotlib", "prometheus-client")
_IMPORT = """
import importlib, json, resource, sys, time
started = time.process_time()
importlib.import_module(sys.argv[1])
seconds = time.process_time() - started
print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024]))
"""


def install(folder: Path, python: str) -> Path:
    """Make the environment; returns its interpreter."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    inside = folder / "bin" / "python"
    pip = [str(inside), "-m", "pip", "install", "--disable-pip-version-check", "--no-cache-dir", "--quiet"]
    subprocess.run([*pip, "--constraint", "constraints.txt", "."], cwd=ROOT, check=True)
    return inside


def packages(python: Path) -> dict[str, float]:
    """Megabytes of each installed distribution's files, by its name."""
    program = (
        "import importlib.metadata as m, json\n"
        "size = lambda f: f.locate().stat().st_size if f.locate().is_file() else 0\n"
        "print(json.dumps({d.metadata['Name'].lower().replace('_', '-'): sum(map(size, d.files or ())) / 1e6"
        " for d in m.distributions()}))"
    )
    return dict(json.loads(_output(python, program)))


def import_cost(python: Path, module: str) -> dict[str, Any]:
    """CPU seconds and peak memory of importing a module in a new process, the least of several."""
    try:
        runs = [json.loads(_output(python, _IMPORT, module)) for _ in range(REPEATS)]
    except subprocess.CalledProcessError:
        return {"module": module, "cpu_seconds": None, "peak_mib": None}
    return {"module": module, "cpu_seconds": min(run[0] for run in runs), "peak_mib": min(run[1] for run in runs)}


def _output(python: Path, program: str, *arguments: str) -> str:
    # isolated and elsewhere: what is imported is what was installed
    words = [str(python), "-I", "-c", program, *arguments]
    return subprocess.run(words, cwd=python.parent, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Install, look, import."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--keep", type=Path, help="make the environment here and leave it")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        python = install(arguments.keep or Path(temporary) / "edge", arguments.python)
        sizes = packages(python)
        sizes.pop("pip", None), sizes.pop("setuptools", None)
        imports = [import_cost(python, module) for module in IMPORTS]
    largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
    print(f"{len(sizes)} packages, {sum(sizes.values()):.0f} MB; largest:")
    for name, megabytes in largest:
        print(f"  {name:<20} {megabytes:>7.1f} MB")
    for cost in imports:
        if cost["cpu_seconds"] is not None:
            print(f"  import {cost['module']:<16} {cost['cpu_seconds']:>5.2f} CPU-s {cost['peak_mib']:>6.0f} MiB peak")
    unwanted = sorted(set(sizes).intersection(UNWANTED))
    print(f"not for the edge: {', '.join(unwanted) or 'none'}")
    result = {"packages": len(sizes), "megabytes": sum(sizes.values()), "unwanted": unwanted, "imports": imports}
    print(json.dumps({"benchmark": "edge_install", **result}))
    sys.exit(bool(unwanted))


if __name__ == "__main__":
    main()
