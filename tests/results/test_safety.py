"""What comes from elsewhere is neither run nor shown as anything but text: pickles, HTML in data, sites."""

import ast
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import nbformat
import pandas as pd
import pytest
from tiny import tiny_sample, tiny_vlm

from docs.reference import FOLDERS
from mmflow_utils.data.sample import SceneObject
from mmflow_utils.explorer import Explorer
from mmflow_utils.params import ROOT
from mmflow_utils.plots.prompt import plot_prompt
from mmflow_utils.prompts.encoding import encode


def test_no_pickle_is_loaded():
    unsafe = re.compile(r"^(c?[Pp]ickle|dill|joblib|shelve|marshal)$")
    found = []
    for file in (file for folder in ("mmflow_utils", *FOLDERS) for file in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [name.name for name in node.names] + [getattr(node, "module", None) or ""]
                found += [(file.name, n) for name in names for n in name.split(".") if unsafe.match(n)]
            if isinstance(node, ast.Call):
                called, text = ast.unparse(node.func), ast.unparse(node)
                safe = called != "torch.load" or "weights_only=True" in text
                if not safe or called.endswith("read_pickle") or "allow_pickle=True" in text:
                    found.append((file.name, text))
    assert found == []


HOSTILE = "<script>alert(1)</script> <img src=http://evil.example/x onerror=alert(1)> left or right?"


class Tags(HTMLParser):
    """Collects elements, and all text outside of scripts."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.sources, self.text, self.open = [], [], "", ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open = tag
        self.sources += [value for name, value in attrs if name in ("src", "href") and value]
        self.sources += [name for name, _ in attrs if name.startswith("on")]

    def handle_data(self, data):
        if self.open != "script":
            self.text += data
        elif "alert(1)" in data:
            self.sources.append(data)


@pytest.fixture
def hostile(tmp_path):
    """A sample whose question and objects hold HTML, and all HTML that shows it."""
    sample = tiny_sample(tmp_path, question=HOSTILE, objects=(SceneObject(name="<b onclick=x>cup</b>"),))
    model = tiny_vlm()
    encoded = encode(model, sample)
    explorer = Explorer(model, [replace(sample, answer="<script>alert(1)</script>")], window=1)
    frame = pd.DataFrame({"question": [sample.question], "object": [sample.objects[0].name]})
    return {
        "prompt": plot_prompt(encoded.tokens, encoded.positions).data,
        "missing": plot_prompt(["a"], {"<b onclick=x>cup</b>": [0]}).data,
        "table": frame.to_html(),
        "what was said": explorer.said.value + explorer.view.value,
    }


def test_text_from_data_comes_out_escaped_in_all_html_we_make(hostile):
    for name, html in hostile.items():
        page = Tags(html)
        assert not {"script", "b", "iframe", "object"} & set(page.tags), name
        assert all(source.startswith("data:image/png") for source in page.sources), name
    assert "<script>alert(1)</script>" in Tags(hostile["prompt"]).text.replace("\xb7", "")
    assert HOSTILE in Tags(hostile["table"]).text


@pytest.mark.slow
def test_text_from_data_comes_out_escaped_in_the_rendered_site(hostile, tmp_path):
    outputs = [nbformat.v4.new_output("display_data", {"text/html": html}) for html in hostile.values()]
    outputs += [
        nbformat.v4.new_output("execute_result", {"text/plain": HOSTILE}),
        nbformat.v4.new_output("stream", name="stdout", text=HOSTILE),
        nbformat.v4.new_output("error", ename="ValueError", evalue=HOSTILE, traceback=[HOSTILE]),
    ]
    cells = [
        nbformat.v4.new_markdown_cell("# 02 · Flow to last: who tells? — mini"),
        nbformat.v4.new_code_cell("show()", execution_count=1, outputs=outputs),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder = tmp_path / "outputs" / "mini"
    folder.mkdir(parents=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), folder / "02_flow_to_last.ipynb")
    build = [sys.executable, "-m", "docs.build", "--no-committed", "--outputs", str(tmp_path / "outputs")]
    subprocess.run([*build, "--docs", str(tmp_path / "none")], cwd=ROOT, check=True, capture_output=True)
    page = Tags((tmp_path / "outputs/site/mini/02_flow_to_last.html").read_text(encoding="utf-8"))
    assert page.text.count("alert(1)") >= 6
    assert not [s for s in page.sources if "evil" in s or "alert" in s or s in ("onerror", "onclick")]


def test_the_look_for_scripts_can_fail():
    page = Tags(f"<p>{HOSTILE}</p>")
    assert "script" in page.tags and "onerror" in page.sources and "http://evil.example/x" in page.sources
