"""gpu-check: without a GPU it says what is owed; with one, a part that fails, hangs or lacks a library costs nobody else anything."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gpu_check
import pytest

import gpu_jobs
from gpu.harness import Target
from gpu_jobs import ROOT, Benchmark, FileResult, Measured, PytestFile
from gpu_results import Report, as_json, markdown, owed, verdict

# From a machine that has torch, triton, numpy, msgpack, hypothesis and pytest.
ABSENT = ("ray", "starlette", "uvicorn", "numba", "pydantic", "typer", "blake3", "httpx")
TARGETS = (Target(name="share", claim="of the bandwidth", at_least=0.85), Target(name="late", claim="seconds", unit="s", at_most=1.0))
GOOD = Benchmark(name="good", title="A good one.", targets=TARGETS)


def test_without_a_gpu_it_lists_what_is_owed_and_the_list_in_the_repository_is_that(tmp_path: Path) -> None:
    for path in (ROOT / "docs" / "results").glob("*.json"):
        shutil.copy(path, tmp_path)
    command = [sys.executable, "bench/gpu_check.py", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("No GPU here: these are owed.")
    assert (tmp_path / "gpu-owed.md").read_text() == (ROOT / "docs" / "results" / "gpu-owed.md").read_text(), "run `make gpu-check`"


@pytest.mark.parametrize("folder", sorted({str(Path(one.path).parent) for one in gpu_jobs.find_tests()}))
def test_its_benchmarks_and_tests_need_neither_ray_nor_a_web_server(folder: str) -> None:
    """A folder at a time: what one folder's conftest.py provides must not help another's tests."""
    block = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); sys.path[:0] = ['bench', 'tests/transport']; "
    code = block + "from gpu_jobs import *; bad = [one for one in find_benchmarks() if one.broken]; assert not bad, bad; "
    code += f"import pytest; files = [one.path for one in find_tests() if one.path.startswith('{folder}/test_')]; "
    code += "sys.exit(pytest.main([*PYTEST[2:], '--collect-only', '-q', *files]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_deadline_ends_a_process_and_what_it_started(tmp_path: Path) -> None:
    code = "import subprocess, time; print(subprocess.Popen(['sleep', '60']).pid, flush=True); time.sleep(60)"
    began = time.monotonic()
    ended = gpu_jobs.run([sys.executable, "-c", code], 2.0, tmp_path / "log")
    assert ended.status is None
    assert time.monotonic() - began < 2.0 + 2 * gpu_jobs.GRACE_S
    status = Path(f"/proc/{ended.output.split()[0]}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_a_process_that_no_signal_ends_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one inside a driver that hangs."""
    groups: list[int] = []
    kill = os.killpg
    monkeypatch.setattr(os, "killpg", lambda group, number: groups.append(group))
    monkeypatch.setattr(gpu_jobs, "GRACE_S", 0.2)
    try:
        with pytest.warns(ResourceWarning, match="is still running"):
            ended = gpu_jobs.run((sys.executable, "-c", "import time; time.sleep(20)"), 0.5, tmp_path / "log")
    finally:
        kill(groups[0], signal.SIGKILL)
    assert ended.status is None and ended.seconds < 10


def run_file(tmp_path: Path, text: str, deadline_s: float = 60.0) -> FileResult:
    path = tmp_path / "test_it.py"
    path.write_text(text)
    return gpu_jobs.run_tests(PytestFile(path=str(path)), deadline_s, tmp_path)


def test_tests_are_counted_and_failures_named(tmp_path: Path) -> None:
    text = "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('one GPU only')\n"
    tested = run_file(tmp_path, text)
    assert (tested.outcome, tested.num_passed, tested.num_failed) == ("failed", 1, 1)
    assert tested.skipped == ("test_c: one GPU only",)
    assert tested.reason.startswith("test_b: ")


def test_a_file_that_wants_an_absent_library_is_not_run_and_says_so(tmp_path: Path) -> None:
    tested = run_file(tmp_path, "import no_such_library\ndef test_a(): pass\n")
    assert (tested.outcome, tested.reason) == ("not run", "needs no_such_library, which is not installed here")


def test_a_module_of_ours_that_is_missing_is_a_failure(tmp_path: Path) -> None:
    assert run_file(tmp_path, "import polymux.no_such_module\ndef test_a(): pass\n").outcome == "failed"


def test_files_that_hang_keep_what_had_passed(tmp_path: Path) -> None:
    """One can be interrupted, the other not even that."""
    hangs = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\n"
    ignores = "import signal, time\ndef test_a(): pass\ndef test_b():\n signal.signal(signal.SIGINT, signal.SIG_IGN)\n time.sleep(60)\n"
    with ThreadPoolExecutor() as pool:
        folders = [tmp_path / name for name in ("hangs", "ignores")]
        for folder in folders:
            folder.mkdir()
        interrupted, killed = pool.map(run_file, folders, (hangs, ignores), (10.0, 10.0))
    assert interrupted.reason.startswith("did not end within 10 s")
    assert [(one.outcome, one.num_passed) for one in (interrupted, killed)] == [("failed", 1)] * 2


def test_parts_that_fail_or_hang_leave_the_others_their_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    (folder / "hangs.py").write_text("import time\ndef measure(budget_s): time.sleep(60)\n")
    (folder / "fails.py").write_text("def measure(budget_s): raise ValueError('no such kernel')\n")
    parts = "'a', lambda: {'x': 1.0}", "'b', lambda: 1 / 0", "'c', lambda: time.sleep(60)", "'d', lambda: {'y': 1.0}"
    text = "import time\nfrom gpu.harness import attempt\ndef measure(budget_s):\n found = {}\n"
    (folder / "parts.py").write_text(text + "".join(f" found |= attempt({part})\n" for part in parts) + " return found\n")
    (folder / "good.py").write_text("def measure(budget_s):\n print('note: alone')\n return {'share': 0.9}\n")
    monkeypatch.setitem(gpu_jobs.ENV, "PYTHONPATH", f"{tmp_path}{os.pathsep}{gpu_jobs.ENV['PYTHONPATH']}")
    (tmp_path / "test_fine.py").write_text("def test_a(): pass\n")
    benchmarks = [Benchmark(name="broken", broken="ImportError()"), *(Benchmark(name=name) for name in ("hangs", "fails", "parts")), GOOD]
    began = time.monotonic()
    tests, measured = gpu_check.check([PytestFile(path=str(tmp_path / "test_fine.py"))], benchmarks, 30.0)
    assert time.monotonic() - began < 32.0
    assert [one.outcome for one in tests] == ["passed"]
    assert [one.outcome for one in measured] == ["failed"] * 4 + ["measured"]
    assert "no such kernel" in measured[2].reason
    assert measured[3].figures == {"x": 1.0}
    assert [one.partition(":")[0] for one in measured[3].notes] == ["b failed", "c"]
    assert (measured[4].figures, measured[4].notes) == ({"share": 0.9}, ("alone",))


def report(*measured: Measured) -> Report:
    passed = FileResult(path="tests/gpu/test_a.py", outcome="passed", num_passed=3)
    tests = (passed, FileResult(path="tests/gpu/test_b.py", outcome="not run", reason="needs ray"))
    return Report(gpu="NVIDIA H200", machine="One.", tests=tests, benchmarks=measured, seconds=400.0)


def test_a_result_says_which_targets_were_met() -> None:
    measured = Measured(benchmark=GOOD, outcome="measured", figures={"share": 0.8, "more": 2.0})
    assert [verdict(measured, name) for name in ("share", "late", "more")] == ["missed", "not measured", ""]
    text = markdown(report(measured))
    assert "Targets: 1 missed, 1 not measured. Tests: 3 passed, 0 failed." in text
    assert "| share: of the bandwidth | 0.8 | ≥ 0.85 | missed |" in text
    assert "| more | 2 | | |" in text
    assert report(measured).slug == "nvidia-h200"


def test_a_missed_target_is_no_failure_and_a_broken_benchmark_is_one() -> None:
    missed = Measured(benchmark=GOOD, outcome="measured", figures={"share": 0.1})
    assert not report(missed).has_failed
    assert report(missed, dataclasses.replace(missed, outcome="failed")).has_failed


def test_what_was_measured_is_owed_no_more(tmp_path: Path) -> None:
    assert "share" in owed([GOOD], tmp_path) and "late" in owed([GOOD], tmp_path)
    figures = {"share": 0.9, "late": float("nan")}
    (tmp_path / "nvidia-h200.json").write_text(as_json(report(Measured(benchmark=GOOD, outcome="measured", figures=figures))))
    assert json.loads((tmp_path / "nvidia-h200.json").read_text())["benchmarks"]["good"]["figures"]["late"] is None
    assert "share" not in owed([GOOD], tmp_path) and "late" in owed([GOOD], tmp_path)


def test_every_target_has_a_name_of_its_own_and_a_claim() -> None:
    for benchmark in gpu_jobs.find_benchmarks():
        names = [target.name for target in benchmark.targets]
        assert len(set(names)) == len(names) and all(target.claim for target in benchmark.targets), benchmark.name
