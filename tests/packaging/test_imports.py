"""What importing costs and hides, seen from fresh processes."""

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "hivemind", "libp2p"}

RUN_HELP = """
import json, sys
from moehive.node.cli import main
sys.argv = ["moehive", "--help"]
code = 0
try:
    main()
except SystemExit as exit:
    code = exit.code or 0
print(json.dumps({"code": code, "modules": sorted({name.partition(".")[0] for name in sys.modules})}))
"""


def run(program: str, *, cwd, path: str = "") -> str:
    """The last line that a fresh Python prints; `-c` puts its working directory first on sys.path, as users do."""
    command = [sys.executable, "-c", f"import sys; sys.path[1:1] = {[path] if path else []}\n{program}"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1]


def test_help_is_fast_because_it_imports_nothing_heavy(tmp_path):
    seen = json.loads(run(RUN_HELP, cwd=tmp_path))

    assert seen["code"] == 0
    assert not HEAVY & set(seen["modules"])


def test_another_package_called_kernels_wins_in_the_checkout(checkout, tmp_path):
    """transformers imports Hugging Face's `kernels`; our folder of that name must never be taken for it."""
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("def get_kernel(): ...\n")

    found = run("import kernels; print(kernels.__file__, kernels.get_kernel)", cwd=checkout, path=str(tmp_path))

    assert found.startswith(str(theirs))


def test_the_folder_kernels_is_no_package_by_itself(checkout):
    """Without theirs, `import kernels` finds at most an empty namespace, in which no code of ours has run."""
    assert not (checkout / "kernels" / "__init__.py").exists()
    found = run(
        "try:\n import kernels\n print(kernels.__file__, hasattr(kernels, 'get_kernel'))\n"
        "except ModuleNotFoundError:\n print('absent')",
        cwd=checkout,
    )

    assert found in {"absent", "None False"} or not found.startswith(str(checkout))
