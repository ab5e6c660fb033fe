"""The browser's libraries are those that vendor.json names, with their licences."""

import hashlib
import json
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
VENDOR = ROOT / "circuit" / "viewer" / "static" / "vendor"
LISTED = json.loads((VENDOR / "vendor.json").read_text("utf-8"))


def test_files_are_those_that_were_fetched():
    for name, entry in LISTED.items():
        assert hashlib.sha256((ROOT / name).read_bytes()).hexdigest() == entry["sha256"], name
    scripts = {f"circuit/viewer/static/vendor/{path.name}" for path in VENDOR.glob("*.js")}
    assert scripts == {name for name in LISTED if name.startswith("circuit/")}


def test_licences_allow_it_and_are_there():
    texts = (VENDOR / "LICENSES.txt").read_text("utf-8")
    for name, entry in LISTED.items():
        for package in entry["packages"]:
            assert package["license"] in ("MIT", "ISC", "BSD-3-Clause", "Apache-2.0", "MPL-2.0")
            if name.startswith("circuit/"):  # given to users
                assert package["license"] != "MPL-2.0" and f"{package['name']} {package['version']}\n" in texts
