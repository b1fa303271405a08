"""Write docs/claims.md and the claims that the package ships, from claims.toml and the stored results.

python benchmarks/claims.py
"""

from __future__ import annotations

from pathlib import Path

from expertshare.lab.report import claims_json, claims_markdown, resolve_claims
from expertshare.measure.report import write_json

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Both files."""
    claims = resolve_claims(ROOT)
    write_json(ROOT / "src" / "expertshare" / "reporting" / "claims.json", claims_json(claims))
    (ROOT / "docs" / "claims.md").write_text(claims_markdown(claims), encoding="utf-8")
    print(f"{len(claims)} claims")


if __name__ == "__main__":
    main()
