"""doctor on machines that are not this one: every check, and what it advises."""

import json

import pytest

from dino_adapters.cli.doctor import GIB, as_table, examine
from dino_adapters.cli.machine import Machine, Trial, free_memory, usable_cores

NEEDS = (
    "torch>=2.11",
    "torchvision>=0.26",
    "mmengine-lite>=0.10.7",
    'rasterio>=1.4; extra == "satellite"',
    'dino-adapters[report]; extra == "demo"',
    'scikit-image>=0.25; extra == "demo"',
)
HERE = {
    "torch": "2.15.0",
    "torchvision": "0.29.2",
    "mmengine-lite": "0.10.7",
    "rasterio": "1.4.4",
    "scikit-image": "0.26.0",
}
TORCH = json.dumps({"torch": "2.15.0+cu132", "cuda": "13.2", "gpus": []})


def machine(packages=None, answers=None, whole=None, **changes):
    """A machine in order, but for what is changed; `answers` maps a word of the code to a Trial."""
    asked = {"nms": Trial(True, ""), "cv2": Trial(True, "5.0\n"), "torch": Trial(True, TORCH)}
    asked = (answers or {}) | {k: v for k, v in asked.items() if k not in (answers or {})}

    def attempt(code):
        order = sorted(asked, key=lambda word: word == "torch")  # "torch" is in all codes
        return next(asked[word] for word in order if word in code)

    words = {
        "packages": whole or HERE | (packages or {}),
        "requirements": NEEDS,
        "attempt": attempt,
        "python": (3, 12, 1),
        "free_disk": 50 * GIB,
        "free_memory": 16 * GIB,
        "cores": 4.0,
        "variables": {},
    }
    return Machine(**(words | changes))


def found(what, **changes):
    return [finding for finding in examine(machine(**changes)) if finding.what == what]


def test_a_machine_in_order():
    findings = examine(machine())
    assert {f.state for f in findings} == {"ok", "note"}
    assert [f.what for f in findings if f.state == "note"] == ["GPU"]
    assert as_table(findings).note == "Ready."


def test_old_python():
    (finding,) = found("Python", python=(3, 10, 4))
    assert finding.state == "problem"
    assert "3.11 or newer" in finding.advice


def test_core_checks_work_without_torch():
    packages = {k: v for k, v in HERE.items() if not k.startswith("torch")}

    def never(code):
        raise AssertionError("nothing is imported where torch is absent")

    findings = examine(machine(whole=packages, attempt=never))
    problems = {f.what: f for f in findings if f.state == "problem"}
    assert set(problems) == {"torch>=2.11", "torchvision>=0.26"}
    assert problems["torch>=2.11"].advice == "Run: pip install 'torch>=2.11'"
    assert as_table(findings).note == "2 problems to solve first."


def test_core_package_too_old():
    (finding,) = found("torch>=2.11", packages={"torch": "2.4.0"})
    assert finding.state == "problem"
    assert "2.4.0" in finding.found


def test_broken_torch():
    trial = Trial(False, "Traceback ...\nOSError: libcudart.so.13: cannot open\n")
    (finding,) = found("torch", answers={"cuda.is_available": trial})
    assert finding.state == "problem"
    assert finding.found == "OSError: libcudart.so.13: cannot open"


def test_torch_and_torchvision_of_different_builds():
    trial = Trial(False, "RuntimeError: operator torchvision::nms does not exist")
    (finding,) = found("torch pair", answers={"nms": trial})
    assert finding.state == "problem"
    assert "torch 2.15.0+cu132, torchvision 0.29.2 do not fit" in finding.found
    assert "pip install" in finding.advice


def test_gpus_are_named_with_their_memory():
    told = {"torch": "2.15.0", "cuda": "13.2", "gpus": [["A GPU", 60 * GIB, 80 * GIB]]}
    (finding,) = found("GPU", answers={"cuda.is_available": Trial(True, json.dumps(told))})
    assert (finding.state, finding.found) == ("ok", "A GPU, 60 of 80 GiB free")


def test_two_opencvs():
    both = {"opencv-python": "5.0", "opencv-python-headless": "5.0"}
    (finding,) = found("OpenCV", packages=both)
    assert finding.state == "problem"
    assert finding.advice == (
        "Run: pip uninstall -y opencv-python opencv-python-headless && pip install --no-deps "
        "opencv-python-headless"
    )


def test_opencv_without_libgl():
    trial = Trial(False, "ImportError: libGL.so.1: cannot open shared object file")
    (finding,) = found("OpenCV", packages={"opencv-python": "5.0"}, answers={"cv2": trial})
    assert finding.state == "problem"
    assert "libGL, which is absent" in finding.found
    assert "opencv-python-headless" in finding.advice


def test_one_opencv_that_imports():
    (finding,) = found("OpenCV", packages={"opencv-python-headless": "5.0"})
    assert finding.state == "ok"


def test_mmengine_twice():
    (finding,) = found("mmengine", packages={"mmengine": "0.10.7"})
    assert finding.state == "problem"
    assert "mmengine-lite" in finding.advice


@pytest.mark.parametrize(
    ("beside", "state"), [({}, "note"), ({"albumentations": "2.0"}, "problem")]
)
def test_albumentationsx(beside, state):
    (finding,) = found("albumentations", packages={"albumentationsx": "2.5", **beside})
    assert finding.state == state
    assert "AGPL" in finding.found


def test_extras():
    (present,) = found("extra satellite")
    assert (present.state, present.found) == ("ok", "rasterio 1.4.4")
    packages = {k: v for k, v in HERE.items() if k != "rasterio"}
    bare = examine(machine(whole=packages))
    (absent,) = [f for f in bare if f.what == "extra satellite"]
    assert absent.state == "note"
    assert absent.found == "rasterio>=1.4 absent"
    assert "pip install 'dino-adapters[satellite]'" in absent.advice


@pytest.mark.parametrize(("free", "state"), [(50, "ok"), (3, "note"), (0.5, "problem")])
def test_disk_and_memory(free, state):
    (disk,) = found("free disk", free_disk=int(free * GIB))
    (memory,) = found("free memory", free_memory=int(free * GIB))
    assert disk.state == memory.state == state
    assert bool(disk.advice) == (state != "ok")


def test_more_threads_than_cores():
    (finding,) = found("cores", variables={"OMP_NUM_THREADS": "32"})
    assert finding.state == "note"
    assert "export OMP_NUM_THREADS=4" in finding.advice
    (fine,) = found("cores", variables={"OMP_NUM_THREADS": "2"})
    assert fine.state == "ok"


def test_memory_is_the_smaller_of_machine_and_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable:  800 kB\n")
    assert free_memory(tmp_path) == 800 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("500000\n")
    (group / "memory.current").write_text("200000\n")
    assert free_memory(tmp_path) == 300000
    (group / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 800 * 1024
    assert free_memory(tmp_path / "elsewhere") is None


def test_cores_follow_the_containers_share(tmp_path):
    whole = usable_cores(tmp_path)
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("50000 100000\n")
    assert usable_cores(tmp_path) == 0.5
    (group / "cpu.max").write_text("max 100000\n")
    assert usable_cores(tmp_path) == whole


def test_the_command_ends_with_1_where_there_is_a_problem(run, monkeypatch):
    bad = machine(packages={"mmengine": "0.10.7"})
    monkeypatch.setattr("dino_adapters.cli.doctor.Machine", lambda: bad)
    result = run("doctor", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["ready"] is False
    assert {"state", "what", "found", "advice"} == set(told["findings"][0])
    monkeypatch.setattr("dino_adapters.cli.doctor.Machine", machine)
    result = run("doctor")
    assert result.exit_code == 0
    assert "Ready." in result.stdout
