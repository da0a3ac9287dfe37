"""Opens the pages elsewhere that ours link to, and says which are gone: `python .ci/links.py`.

It is for the nightly workflow. The suite opens no connection; it checks the links inside.
"""

import re
import sys
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATTERNS = ("*.md", "docs/**/*.md", "notebooks/*.ipynb", "torch_bridge/**/*.md")
# The addresses of files of this repository, which the suite looks for where they lie.
OURS = re.compile(r"https://(github\.com|colab\.research\.google\.com/github)/flash-wtconv/")
_LINK = re.compile(r"\]\((https?://[^)\s]+)\)|^\[[^\]]+\]: (https?://\S+)", re.M)


def external(text: str) -> set[str]:
    """The addresses elsewhere that a page links to."""
    found = {first or second for first, second in _LINK.findall(text)}
    return {one.partition("#")[0] for one in found if not OURS.match(one)}


def fault(address: str) -> str | None:
    """The reason why an address is wrong, None where a page is there or is refused to programs."""
    request = urllib.request.Request(address, headers={"User-Agent": "Mozilla/5.0 (links.py)"})
    try:
        with urllib.request.urlopen(request, timeout=30):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code in (401, 403, 405, 429) else f"{address}: {error}"
    except (OSError, HTTPException, UnicodeError) as error:
        return f"{address}: {error}"


def main() -> int:
    """Prints the links that lead nowhere and returns the process' status."""
    paths = {path for pattern in PATTERNS for path in ROOT.glob(pattern)}
    texts = (path.read_text(encoding="utf-8") for path in paths)
    addresses = sorted({one for text in texts for one in external(text)})
    with ThreadPoolExecutor(8) as pool:
        faults = [one for one in pool.map(fault, addresses) if one]
    print(*faults, f"{len(addresses)} addresses, {len(faults)} lead nowhere", sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
