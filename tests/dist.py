"""`make dist`: the source distribution and the wheel, each tried as a stranger has it.

The wheels are built from the unpacked source distribution: one with the kernels in C, one as where no compiler is. Each is
installed into an empty environment that has nothing of the checkout on its path. torch and the other dependencies are those
of the environment that runs this file, so nothing is downloaded.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
OF_THE_CHECKOUT = {".ci/run", ".gitignore"}  # what only a repository needs
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]), file=sys.stderr)"

SMOKE = """
import json, sys, warnings
from importlib.resources import files
from pathlib import Path

with warnings.catch_warnings(record=True) as given:
    warnings.simplefilter("always")
    import shira
    import torch
    from shira.kernels import native
    from shira.sparse import positions

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))

    def weights():
        return [layer.weight.detach().clone() for layer in model]

    before = weights()
    with shira.attach(model, mask="wm", density=0.1) as tuner:
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=0.1)
        model(torch.randn(4, 64)).square().sum().backward()
        optimizer.step()
        trained = weights()
        tuner.adapter("poet").save("poet.safetensors")
    switcher = shira.Switcher(model)
    switcher.add("poet", "poet.safetensors")
    switcher.use("poet")
    assert all(map(torch.equal, weights(), trained)) and not any(map(torch.equal, weights(), before))
    switcher.use(None)
    assert all(map(torch.equal, weights(), before))
for part in ("py.typed", "analysis/report.html.j2"):
    assert files("shira").joinpath(part).is_file(), part
print(json.dumps({
    "at": str(Path(shira.__file__).parent),
    "path": sys.path,
    "in_c": [native.available(), positions._drawing is not None],
    "warnings": [warning.category.__name__ for warning in given if "shira" in str(warning.message)],
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="the folder for both files")
    output = parser.parse_args().output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sdist = output / build("build_sdist", output, ROOT)
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        source = folder / sdist.name.removesuffix(".tar.gz")
        check_complete(source)
        pure = folder / build("build_wheel", folder, source, CC="false")
        wheel = output / build("build_wheel", output, source)
        assert pure.name.endswith("-py3-none-any.whl"), pure.name
        assert not wheel.name.endswith("-none-any.whl"), f"{wheel.name}: the kernels were not compiled"
        for each, compiled in ((wheel, True), (pure, False)):
            check_links(each)
            try_out(each, folder / f"compiled-{compiled}", compiled)
    for made in (sdist, wheel):
        print(f"{made.relative_to(Path.cwd()) if made.is_relative_to(Path.cwd()) else made}: {made.stat().st_size:,} bytes")


def build(hook: str, output: Path, source: Path, **environment: str) -> str:
    """Call the build backend in a source folder. Returns the name of the file that it made."""
    done = run([sys.executable, "-c", BUILD, hook, str(output)], source, **environment)
    return done.stderr.strip().splitlines()[-1]


def check_complete(source: Path) -> None:
    """The source distribution has every file of the repository, and no other except for what the build writes."""
    listed = run(["git", "ls-files", "-z"], ROOT).stdout.split("\0")
    tracked = {name for name in listed if name and (ROOT / name).exists()} - OF_THE_CHECKOUT
    found = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    found = {name for name in found if name not in ("PKG-INFO", "setup.cfg") and ".egg-info/" not in name}
    assert found == tracked, f"missing {sorted(tracked - found)}, too many {sorted(found - tracked)}; see MANIFEST.in"


def check_links(wheel: Path) -> None:
    """The description on the page of an index has no link that only works in the repository."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert "# shira" in text
    relative = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#", target)]
    assert not relative, relative


def try_out(wheel: Path, folder: Path, compiled: bool) -> None:
    """Install a wheel into an empty environment, train and switch there, and call the command."""
    venv.create(folder, with_pip=False)
    python, here = folder / "bin" / "python", folder / "elsewhere"
    here.mkdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    run([sys.executable, "-m", "pip", "--python", str(python), *install], here)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files do not count
    found = json.loads(run([str(python), "-c", SMOKE], here).stdout)
    assert found["at"] == str(site / "shira") and str(ROOT / "src") not in found["path"], found
    assert found["in_c"] == [compiled, compiled]
    assert found["warnings"] == ([] if compiled else ["NotCompiled"]), found["warnings"]
    shira = str(folder / "bin" / "shira")
    assert re.fullmatch(r"shira \d+\.\d+.*\n", run([shira, "--version"], here).stdout)
    assert "poet" in run([shira, "inspect", "poet.safetensors"], here).stdout
    assert "bench" not in run([shira, "--help"], here).stdout


def run(command: list[str], where: Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_"))}
    done = subprocess.run(command, cwd=where, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done


if __name__ == "__main__":
    main()
