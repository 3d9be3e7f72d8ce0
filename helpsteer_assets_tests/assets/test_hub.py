"""Fetching a data set or model from the hub: its cache, and what is said where the hub refuses."""

import os
import subprocess
import sys
from pathlib import Path

REVISION = "3ca5d59c1bc1080af195b4254e7407db60b6f450"


def test_offline_a_cached_revision_is_found_and_another_is_refused_in_words(tmp_path: Path) -> None:
    """In a new process, because the hub's client reads its settings when it is imported."""
    expected = []
    for folder in ("models--x--y", "datasets--x--y"):
        snapshot = tmp_path / "hub" / folder / "snapshots" / REVISION
        snapshot.mkdir(parents=True)
        (snapshot / "config.json").write_text("{}")
        (tmp_path / "hub" / folder / "refs").mkdir()
        (tmp_path / "hub" / folder / "refs" / "main").write_text(REVISION)
        expected.append(str(snapshot))
    script = f"""if True:
        import sys
        from helpsteer_assets.assets.hub import download
        from helpsteer_assets.errors import HelpsteerError
        print(download("x/y", {REVISION!r}, "model"))
        print(download("x/y", {REVISION!r}, "dataset", ["*.json"]))
        for repository in ("nvidia/HelpSteer", "x/y", "one/two/three"):
            try:
                download(repository, "0" * 40, "dataset")
            except HelpsteerError as error:
                print(error)
        assert "torch" not in sys.modules"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE_"))}
    environment |= {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    *found, absent, other, no_id = done.stdout.splitlines()
    assert found == expected
    for refused, name in ((absent, "nvidia/HelpSteer"), (other, "x/y")):
        assert refused.startswith(f"the data set {name} at revision {'0' * 40} is not in the hub cache")
        assert str(tmp_path / "hub") in refused and "unset HF_HUB_OFFLINE" in refused
        assert refused.endswith("or give the path of a local folder as `data.source`")
    assert no_id.startswith("`data.source`: 'one/two/three' is no id on the hub")
