"""The built site as one zip, to read without a network; two runs give the same bytes."""

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SITE, ZIP = "_build/html", "_build/from_lora_to_qlora.zip"


def pack(root: Path) -> Path:
    """Write the zip: one folder, whose index.html opens the book, and no file of the build's own."""
    site, target = root / SITE, root / ZIP
    if not (site / "index.html").exists():
        raise FileNotFoundError(f"no {SITE}/index.html; run make book")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(site.rglob("*")):
            if path.is_file() and path.name not in {".buildinfo", ".nojekyll", "404.html", "sitemap.xml"}:
                name = Path(target.stem, path.relative_to(site)).as_posix()
                packed.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    return target


if __name__ == "__main__":
    found = pack(Path(sys.argv[1]) if sys.argv[1:] else ROOT)
    print(f"{ZIP}, {found.stat().st_size / 1e6:.0f} MB: unpack it and open from_lora_to_qlora/index.html")
