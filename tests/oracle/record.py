"""What every golden file carries beside its values, and how it is written."""

import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parent.parent
GOLDEN = TESTS / "golden"


def provenance(command: str, packages: list[str]) -> dict:
    """Tool, versions, command and date, as every golden file states them."""
    versions = {"python": platform.python_version()} | {p: version(p) for p in packages}
    return {
        "tool": packages[0],
        "versions": versions,
        "command": command,
        "date": datetime.date.today().isoformat(),
    }


def plain(value):
    """`value` with arrays as nested lists; float32 keeps its shortest exact decimal form."""
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, np.float32):
        return Decimal(str(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


class Decimal(float):
    """A float that JSON prints with the digits it was made from."""

    def __new__(cls, digits: str):
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    def __repr__(self) -> str:
        return self.digits


def dump(value, indent: int = 0) -> str:
    """JSON with one line per innermost list, so that a diff stays readable."""
    pad, inner = " " * indent, " " * (indent + 1)
    if isinstance(value, dict) and value:
        rows = [f"{inner}{json.dumps(k)}: {dump(v, indent + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(rows) + f"\n{pad}}}"
    if isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value):
        return "[\n" + ",\n".join(inner + dump(item, indent + 1) for item in value) + f"\n{pad}]"
    if isinstance(value, list):
        return "[" + ",".join(dump(item) for item in value) + "]"
    if isinstance(value, Decimal):
        return value.digits
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def write(path: Path, value: dict) -> None:
    """Writes `value` as JSON and prints the file's name and size."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = dump(plain(value)) + "\n"
    json.loads(text)
    path.write_text(text, encoding="utf-8", newline="\n")
    print(f"{path.relative_to(TESTS.parent)}: {len(text.encode()) / 1000:.0f} kB", file=sys.stderr)
