"""What is held against the pages of the report, in a browser and by their links; tests/docs/test_site.py."""

import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1400, "height": 900}
CHECKS = ("console", "failed", "other hosts", "described", "contrast, light", "contrast, dark", "phone")
# Text whose contrast with what lies behind it is below 4.5, as WCAG 2.2 counts it.
FAINT = """() => {
  const dot = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const once = (known, find) => key => { known.has(key) || known.set(key, find(key)); return known.get(key); };
  const rgba = once(new Map(), color => {
    dot.clearRect(0, 0, 1, 1); dot.fillStyle = color; dot.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = dot.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  });
  const seen = once(new Map([[null, 1]]), node => getComputedStyle(node).opacity * seen(node.parentElement));
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
  const behind = once(new Map([[null, [255, 255, 255, 1]]]), node =>
    over(rgba(getComputedStyle(node).backgroundColor), behind(node.parentElement)));
  const linear = c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
  const found = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (texts.nextNode()) {
    const words = texts.currentNode.textContent.trim(), holder = texts.currentNode.parentElement;
    if (!words || holder.closest("svg, script, style, noscript, dialog:not([open])")) continue;
    if (!holder.checkVisibility({opacityProperty: true, visibilityProperty: true})) continue;
    const below = behind(holder), color = rgba(getComputedStyle(holder).color);
    const text = over([...color.slice(0, 3), color[3] * seen(holder)], below);
    const [dark, bright] = [light(text), light(below)].sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < 4.5) found.push(`${ratio.toFixed(2)} for “${words.slice(0, 40)}”`);
  }
  return [...new Set(found)];
}"""
UNDESCRIBED = """() => [
  ...[...document.images].filter(i => !i.alt.trim() || /\\.(png|svg|jpe?g)$/i.test(i.alt)).map(i => i.src),
  ...[...document.querySelectorAll("svg[role=img]:not([aria-hidden=true])")]
    .filter(s => !s.getAttribute("aria-label")).map(s => s.outerHTML.slice(0, 60)),
]"""
WIDER = """() => {
  scrollTo(10000, 0);
  const wide = Math.max(scrollX, document.scrollingElement.scrollWidth - innerWidth);
  return wide > 0 ? [`${wide} px wider than the screen`] : [];
}"""


def pages_of(site: Path) -> list[Path]:
    """List the site's pages; what lies in _static are the theme's templates."""
    return sorted(file for file in site.rglob("*.html") if "_static" not in file.parts)


def inspect(browser, files: list[Path]) -> dict[str, list[str]]:
    """Visit pages with no network, in the light, in the dark and on a phone: check -> what is wrong."""
    wrong = defaultdict(list)
    context = browser.new_context(viewport=DESK, offline=True, reduced_motion="reduce")
    page = context.new_page()
    seen = {"console": [], "failed": [], "other hosts": []}
    page.on("console", lambda m: m.type == "error" and seen["console"].append(m.text))
    page.on("pageerror", lambda error: seen["console"].append(str(error)))
    page.on("requestfailed", lambda request: seen["failed"].append(request.url))
    page.on(
        "request",
        lambda r: urlsplit(r.url).scheme not in ("file", "data") and seen["other hosts"].append(r.url),
    )
    for file in files:
        page.set_viewport_size(DESK)
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(folded => folded.open = true)")
        found = {"described": page.evaluate(UNDESCRIBED)}
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.evaluate("new Promise(requestAnimationFrame)")  # the theme follows in a script
            found[f"contrast, {scheme}"] = page.evaluate(FAINT)
        page.set_viewport_size(PHONE)
        found["phone"] = page.evaluate(WIDER)
        for name, values in (found | seen).items():
            wrong[name] += [f"{file.name}: {value}" for value in values]
        for values in seen.values():
            values.clear()
    context.close()
    return dict(wrong)


class Addresses(HTMLParser):
    """Collect a page's ids and where it leads."""

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.targets = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids |= {given[name] for name in ("id", "name") if given.get(name)}
        self.targets += [given[name] for name in ("href", "src") if given.get(name)]


def broken_links(site: Path) -> list[str]:
    site = site.resolve()
    pages = {file: Addresses(file.read_text(encoding="utf-8")) for file in pages_of(site)}
    broken = []
    for file, page in pages.items():
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme:
                continue
            led_to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchor = unquote(parts.fragment)
            if not led_to.is_file() or (anchor and anchor not in pages[led_to].ids):
                broken.append(f"{file.relative_to(site)} -> {target}")
    return broken


def broken_markdown_links(file: Path) -> list[str]:
    text = re.sub(r"^```.*?^```", "", file.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        led_to = file.parent / path if path else file
        if ":" in target or (led_to.exists() and (not anchor or anchor in anchors(led_to))):
            continue
        broken.append(f"{file.name} -> {target}")
    return broken


def anchors(file: Path) -> set[str]:
    """List the anchors that GitHub gives to a file's headings."""
    titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}
