import json
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).parents[2] / "tools" / "benchmark.py"


def test_data_benchmark_measures_every_way_and_cleans_up(tmp_path):
    done = subprocess.run([sys.executable, str(TOOL), "data", "--megabytes", "2", "--rounds", "1", "--folder", str(tmp_path),
                           "--json"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tool, fast, floor, slow = json.loads(done.stdout.splitlines()[-1])
    assert fast["mb_per_second"] > slow["mb_per_second"] > 0
    assert min(one["cpu_seconds_per_mb"] for one in (tool, fast, floor, slow)) > 0
    assert 20 < tool["peak_mb"] < 1000
    assert "The tool: " in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_unknown_benchmark_is_refused():
    done = subprocess.run([sys.executable, str(TOOL), "nothing"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.startswith("error: ")) == (2, True)
