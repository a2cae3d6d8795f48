"""benchmarks/gpu_pack.py and gpu_unpack.py: two tiny wheels are packed, cut, damaged, joined and installed offline."""

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACK = Path(__file__).parents[1] / "benchmarks" / "gpu_pack.py"


def wheel(folder, name, code, requires="", data=b""):
    """A wheel of one module, and a file of data beside it, in its smallest form."""
    info = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": code, f"{name}.bin": data,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requires}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }  # fmt: skip
    rows = "".join(f"{file},,\n" for file in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for file, content in (files | {f"{info}/RECORD": rows}).items():
            archive.writestr(file, content)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    wheel(folder, "tiny_one", "VALUE = 1\n", data=random.Random(1).randbytes(200_000))
    wheel(folder, "tiny_two", "from tiny_one import VALUE\n", "Requires-Dist: tiny_one\n")
    return folder


def ran(*words, seen=(), **more):
    """A script without index; `seen`: folders of packages that its Python has."""
    own = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PYTHONPATH": os.pathsep.join(map(str, seen))}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, env=os.environ | own | more)


def packed(wheels, folder, *words):
    done = ran(PACK, folder, "tiny_two", "--piece", "0.0625", *words, PIP_FIND_LINKS=str(wheels))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def pack(wheels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "pack"
    assert "2 wheels" in packed(wheels, folder)
    return folder


@pytest.fixture(scope="module")
def installed(pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("target") / "packages"
    done = ran(pack / "install.py", "--target", folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_pieces_are_small_and_make_the_packages_again(pack, installed, wheels):
    pieces = sorted(pack.glob("piece.*"))
    assert len(pieces) > 3
    assert max(piece.stat().st_size for piece in pieces) <= 2**16
    assert json.loads((pack / "pack.json").read_text())["packages"] == {"tiny_one": "1.0", "tiny_two": "1.0"}
    with zipfile.ZipFile(wheels / "tiny_one-1.0-py3-none-any.whl") as archive:
        assert (installed / "tiny_one.bin").read_bytes() == archive.read("tiny_one.bin")
    assert ran("-c", "import tiny_two; print(tiny_two.VALUE)", seen=[installed]).stdout == "1\n"


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_a_bad_piece_is_one_sentence(pack, tmp_path, harm):
    piece = pack / "piece.001"
    content = piece.read_bytes()
    try:
        piece.unlink()
        if harm == "damaged":
            piece.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        done = ran(pack / "install.py", "--target", tmp_path / "packages")
    finally:
        piece.write_bytes(content)
    assert done.returncode == 2
    assert done.stderr.startswith(f"piece.001 is {harm}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "packages").exists()


def test_what_is_there_is_not_packed_but_seen(wheels, installed, tmp_path):
    assert "1 wheels" in packed(wheels, tmp_path / "pack", "--there", "tiny_one,absent*")
    script, venv = tmp_path / "pack" / "install.py", tmp_path / "venv"
    done = ran(script, "--venv", venv)
    assert done.returncode == 2
    assert done.stderr == "neither the pack nor this Python has tiny_one; pack again with another --there\n"
    done = ran(script, "--venv", venv, seen=[installed])
    assert done.returncode == 0, done.stderr
    code = "import tiny_two, importlib.metadata as m; print(tiny_two.VALUE, len([*m.distributions()]))"
    found = subprocess.run([venv / "bin" / "python", "-I", "-c", code], capture_output=True, text=True)
    assert found.stdout == "1 2\n", found.stderr


def test_a_folder_with_files_is_not_packed_into(wheels):
    done = ran(PACK, wheels, "tiny_two")
    assert done.returncode == 2
    assert "is not empty" in done.stderr
