"""Another project that installs a package ``ops`` into the same folder, before or after."""

from __future__ import annotations

import pytest

from tests.harness.helpers import PACKAGE, command, run

THEIRS = '"""Another project."""\n__version__ = "3.9.0"\n__all__ = ["main"]\n'
IMPORTS = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import ops
    print([str(one.message) for one in caught])
    print(ops.use_backend.__name__)
"""


@pytest.fixture
def folder(tmp_path):
    """A folder of installed packages; all files of ours are links."""
    package = tmp_path / "site" / "ops"
    package.mkdir(parents=True)
    for path in (PACKAGE / "ops").iterdir():
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return package.parent


def environment_of(folder, tmp_path):
    return {"PYTHONPATH": folder, "JITOPS_CACHE_DIR": tmp_path / "cache"}


@pytest.mark.parametrize("content", [THEIRS, None])
def test_one_that_was_installed_later_and_one_that_was_uninstalled(folder, tmp_path, content):
    init = folder / "ops" / "__init__.py"
    init.unlink()
    if content:
        init.write_text(content)
    variables = environment_of(folder, tmp_path)
    _, err = run("from ops.jit import load_inline", ok=False, **variables)
    last = err.splitlines()[-1]
    assert last.startswith("ops._errors.DependencyError: another project has replaced or ")
    assert str(init if content else f"none in {folder}") in last
    assert "pip uninstall ops" in last
    assert command("doctor", **variables) == (1, "", f"jitops: {last.partition(': ')[2]}\n")


def test_one_that_was_installed_before(folder, tmp_path):
    (folder / "ops" / "charm.py").touch()
    told = folder / "ops-3.9.0.dist-info"
    told.mkdir()
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: ops\nVersion: 3.9.0\n")
    (told / "RECORD").write_text("ops/__init__.py,,\nops/charm.py,,\n")
    variables = environment_of(folder, tmp_path)
    out, _ = run(IMPORTS, **variables)
    assert f"another project's package ops is in {folder / 'ops'} too: " in out
    assert out.splitlines()[-1] == "use_backend"
    status, out, err = command("doctor", **variables)
    assert status == 0
    assert "ops 3.9.0 has a package ops too" in out
    assert "pip uninstall ops" in " ".join(out.split())
    assert "another project's package" in err


def test_without_one_nothing_is_said(folder, tmp_path):
    variables = environment_of(folder, tmp_path)
    out, _ = run(IMPORTS, **variables)
    assert out.splitlines()[0] == "[]"
