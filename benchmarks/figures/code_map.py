"""Line counts and a map of the package, for README. tests/test_size.py holds the limits by the same counts."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from writing import ROOT, paragraph, table

BLOCKS = ("code_size", "code_map")
PACKAGE = ROOT / "src" / "expertshare"
ENGINE = (
    *("__init__.py", "__main__.py", "errors.py", "config.py", "types.py"),
    *("routing", "kernels", "native", "experts", "models", "decoding", "measure"),
)
ABOVE = ("api", "evaluation", "tuning", "training", "convert", "serving", "integrations", "ray_connection.py", "cli")


def files_of(names: Sequence[str], kinds: Sequence[str] = (".py",)) -> list[Path]:
    """Source files of some parts of the package (files or folders; those that are not there give none)."""
    found = []
    for name in names:
        place = PACKAGE / name
        found += sorted(place.rglob("*")) if place.is_dir() else [place]
    return [path for path in found if path.suffix in kinds and path.is_file() and "__pycache__" not in path.parts]


def lines_of(files: Sequence[Path]) -> int:
    """All lines, as the formatter writes them: empty ones, comments and docstrings count."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def parts() -> list[str]:
    """Files and folders of the package that the import contracts know, the engine first."""
    others = (
        path.name for path in sorted(PACKAGE.iterdir()) if path.suffix == ".py" or (path / "__init__.py").is_file()
    )
    lab = [f"lab/{path.name}" for path in sorted((PACKAGE / "lab").iterdir()) if (path / "__init__.py").is_file()]
    listed = [name for name in (*ENGINE, *ABOVE) if (PACKAGE / name).exists()]
    rest = [name for name in others if name not in listed and name not in ("lab", "__pycache__")]
    return [*listed, *rest, "lab/__init__.py", *lab]


def purpose(name: str) -> str:
    """The first line of a file's or package's docstring."""
    place = PACKAGE / name
    text = (place / "__init__.py" if place.is_dir() else place).read_text(encoding="utf-8")
    said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
    return " ".join(said.split()).rstrip(".").replace("|", "\\|")


def code_size() -> str:
    """The engine, the whole package and the native library, in a sentence."""
    engine, package = files_of(ENGINE), files_of(parts())
    native = files_of(["native/csrc"], (".cpp", ".h"))
    return paragraph(
        f"From a prompt to its tokens: {lines_of(engine):,} lines of Python in {len(engine)} files, and "
        f"{lines_of(native):,} of C++. The whole package, with training, serving and the laboratory: "
        f"{lines_of(package):,} lines of Python in {len(package)} files."
    )


def code_map() -> str:
    """A row for every package of the engine, and one each for what stands on it and for the laboratory."""
    single = [name for name in ENGINE if name.endswith(".py")]
    rows = [_row("`types.py`, `config.py`, ...", "values that all others share, settings, errors", files_of(single))]
    rows += [_row(f"`{name}/`", purpose(name), files_of([name])) for name in ENGINE if name not in single]
    above = [name for name in parts() if name not in ENGINE and not name.startswith("lab/")]
    listed = ", ".join(f"`{name.removesuffix('.py')}` {lines_of(files_of([name])):,}" for name in above)
    rows.append(_row("on the engine", listed, files_of(above)))
    lab = [name for name in parts() if name.startswith("lab/")]
    listed = ", ".join(f"`{name[4:]}` {lines_of(files_of([name])):,}" for name in lab)
    rows.append(_row("`lab/`", listed, files_of(["lab"])))
    return table(("part", "what it is for", "files", "lines"), rows, words=2)


def _row(label: str, about: str, files: Sequence[Path]) -> tuple[str, str, str, str]:
    return label, about, f"{len(files)}", f"{lines_of(files):,}"
