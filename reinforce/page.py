"""Facts as one page that opens in any browser, without a network.

A template is a whole page with `{{policy}}`, `{{style}}`, `{{script}}` and `{{facts}}` in it. The style and the script
that all pages share are page.css and page.js. Facts are JSON that the script reads, and puts into the page as text
alone; a browser runs no script and loads nothing but what was here when the page was written.
"""

import base64
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from reinforce.errors import ConfigError
from reinforce.lines import without_secrets

SHARED = Path(__file__).parent
POLICY = (
    "default-src 'none'; img-src data:; style-src {style}; script-src {script}; base-uri 'none'; form-action 'none'"
)


def write(out: str, template: Path, facts: dict[str, Any]) -> int:
    """Write the page; gives its bytes. Raises ConfigError where it cannot be written."""
    text = template.read_text(encoding="utf-8")
    for kind, shared in (("style", "page.css"), ("script", "page.js")):
        text = text.replace(f"{{{{{kind}}}}}", (SHARED / shared).read_text(encoding="utf-8"))
    allowed = {kind: _allowed(text, kind) for kind in ("style", "script")}
    page = text.replace("{{policy}}", POLICY.format(**allowed)).replace("{{facts}}", _within_a_script(facts)).encode()
    try:
        path = Path(out).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(page)
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {error}") from None
    return len(page)


def _allowed(page: str, kind: str) -> str:
    """The one element of that kind, as a Content Security Policy names it."""
    [text] = re.findall(f"<{kind}>(.*?)</{kind}>", page, re.S)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _within_a_script(facts: dict[str, Any]) -> str:
    """JSON in which no sign can end the element, or a line in older browsers."""
    data = without_secrets(json.dumps(facts, ensure_ascii=False, default=float))
    for sign in "<>&\u2028\u2029":
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return data
