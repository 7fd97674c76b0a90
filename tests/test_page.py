"""The page of a report: what is in it, that it refers to no other file, and what it does in a browser."""

import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from PIL import Image
from test_report import write_options

from datafree import page, report
from datafree.errors import InputError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<img src=x onerror=alert(1)> & </script><script>alert(2)</script>"
WITHOUT_END = {"meta", "img", "input", "br", "hr", "link"}


def png(colour, size=8):
    contents = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(contents, format="PNG")
    return contents.getvalue()


def write_run(root, tag, seed, last, epochs=3, method="rgal", **options):
    """A finished run with all that a run leaves; its grid of epoch k has the shade 10 k."""
    options = {"student": "resnet8", "source": "inversion", "seed": seed, "method": method, **options}
    write_options(root / tag, seed, options, last, run=f"digits_{method}")
    folder = root / tag / f"digits_{method}" / f"seed{seed}"
    rows = [
        {"epoch": k, "acc1": (last or 50) - epochs + k + 1, "images/near_duplicates": 0.1 * k} for k in range(epochs)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "grids").mkdir()
    for k in range(epochs):
        (folder / "grids" / f"epoch_{k:04d}.png").write_bytes(png((10 * k, 0, 0)))
    (folder / "grids" / "test.png").write_bytes(png("blue", 9))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two settings with two seeds each; one of the runs warned twice of the same."""
    for seed, last in ((0, 90.0), (1, 94.0)):
        write_run(tmp_path / "runs", "a", seed, last, triplet=0.0, note=HOSTILE)
        folder = write_run(tmp_path / "runs", "b", seed, last + 1, triplet=0.1, note="plain")
    log = "[11/25 10:00:00 x]: Plan.\n[11/25 10:00:0{0} x]: [Alarm] {0}% of <b>the images</b> are near-duplicates\n"
    (folder / "log.txt").write_text(log.format(1) + log.format(2))
    return tmp_path / "runs"


@pytest.fixture
def write(tmp_path, monkeypatch, capsys):
    """Write the page of these arguments -> its text, and what was said on stderr."""

    def call(*words):
        monkeypatch.setattr("sys.argv", ["report", *map(str, words), "--html", str(tmp_path / "out.html")])
        report.main()
        return (tmp_path / "out.html").read_text(), capsys.readouterr().err

    return call


class Elements(HTMLParser):
    """Checks that elements are closed in their order, and collects their attributes and texts."""

    def __init__(self, text):
        super().__init__()
        self.opened, self.found, self.texts = [], [], {}
        self.feed(text)
        self.close()
        assert not self.opened

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in WITHOUT_END:
            self.opened.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.opened[-1] if self.opened else "", []).append(data)


def data_of(text):
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])


def test_the_page_is_well_formed_refers_to_no_other_file_and_escapes_every_text(runs, write):
    text, _ = write(runs, "--against", "triplet=0", "--effect", "triplet", "source")
    elements = Elements(text)
    attributes = [(tag, *pair) for tag, given in elements.found for pair in given.items()]
    assert not [one for one in attributes if one[1] in ("src", "href", "action", "data") or one[1].startswith("on")]
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", text)
    assert ("meta", "http-equiv", "Content-Security-Policy") in attributes and "default-src 'none'" in text
    assert [tag for tag, _ in elements.found].count("script") == 2 and "img" not in dict(elements.found)
    assert HOSTILE[:25] in "".join(elements.texts["span"])
    assert "2% of <b>the images</b> are near-duplicates" in elements.texts["td"]
    assert "No two runs with the same seed differ in it alone." in text and "The effect of triplet alone" in text
    assert "need not look real" in text and "The runs are of" not in text


def test_the_page_tells_all_that_the_runs_left(runs, write):
    text, said = write(runs)
    elements, data = Elements(text), data_of(text)
    names = ["1: digits_rgal note=", "2: digits_rgal note=plain triplet=0.1"]
    assert [row["name"][: len(name)] for row, name in zip(data["rows"], names)] == names
    assert data["rows"][1]["runs"][1] == {
        "name": "seed 1",
        "lines": {"acc1": [[1, 93.0], [2, 94.0], [3, 95.0]], "images/near_duplicates": [[1, 0.0], [2, 0.1], [3, 0.2]]},
    }
    cells = elements.texts["td"]
    assert "92.00" in cells and "± 25.41" in cells  # 12.7062 times the standard deviation 2.8284, over the root of 2
    assert cells.count("2") >= 3 and "11/25 10:00:02" in cells and "3 of 4 runs logged no alarm." in text
    assert [frame["name"] for frame in data["pictures"][0]["frames"]] == [f"after epoch {k}" for k in (1, 2, 3)]
    assert data["pictures"][0]["frames"][2]["image"] == page._as_uri(
        runs / "a" / "digits_rgal" / "seed0" / "grids" / "epoch_0002.png"
    )
    assert [picture["name"] for picture in data["pictures"][0]["beside"]] == ["test"]
    assert "2 options differ" in text and "without 2 other runs" in text and "without 2 other runs" in said


def test_pictures_are_bounded_and_what_is_left_out_is_said(runs, write, monkeypatch):
    long = write_run(runs, "c", 0, 80.0, epochs=30, method="dafl")
    (long / "grids" / "epoch_0029.png").write_bytes(b"<svg onload=alert(1)>")
    text, said = write(long)
    [shown] = data_of(text)["pictures"]
    names = [int(frame["name"].split()[-1]) for frame in shown["frames"]]
    assert len(names) == page.MOST_FRAMES and names[0] == 1 and names[-1] == 30 and "without 18 in between" in said
    assert shown["frames"][-1]["image"] == ""  # no picture
    monkeypatch.setattr(page, "MOST_PICTURES", 1200)
    text, said = write(runs)
    assert len(data_of(text)["pictures"]) < 3 and re.search(r"no images of \d rows?,", said)


def test_tasks_have_their_pictures_and_the_matrix(tmp_path, write):
    folder = write_run(tmp_path, "a", 0, 50.0, init_cls=2, class_seed=7)
    for task in (1, 2):
        shutil.copytree(folder / "grids", folder / f"task_{task:02d}" / "grids")
    shutil.rmtree(folder / "grids")
    (folder / "matrix.png").write_bytes(png("green"))
    [shown] = data_of(write(tmp_path)[0])["pictures"]
    assert [frame["name"] for frame in shown["frames"]][2:4] == ["task 2, after epoch 3", "task 3, after epoch 1"]
    assert [picture["name"] for picture in shown["beside"]] == ["test", "matrix"] and shown["name"].endswith("order 7")


def test_a_run_of_which_little_is_left_has_a_page(tmp_path, write):
    folder = write_run(tmp_path, "a", 0, None)
    shutil.rmtree(folder / "grids")
    (folder / "metrics.jsonl").unlink()
    (folder / "log.txt").write_bytes(b"\xff\xfe")
    text, _ = write(tmp_path)
    data = data_of(text)
    assert data["pictures"] == [] and data["rows"][0]["runs"] == [{"name": "seed 0", "lines": {}}]
    assert "log.txt cannot be read" in text


def test_commits_that_differ_are_called_out(runs, write):
    for path, commit in zip(sorted(runs.rglob("summary.json")), "abcd"):
        summary = json.loads(path.read_text())
        path.write_text(json.dumps({**summary, "environment": {"commit": 12 * commit, "dirty": True, "time": ""}}))
    text, _ = write(runs)
    assert "The runs are of 4 states of the code" in text and f"{9 * 'a'} with changes" in text


def test_another_kind_of_file_and_a_folder_that_is_missing_are_refused(runs, tmp_path, monkeypatch):
    for file, message in (
        ("out.png", "end it in .html"),
        (tmp_path / "nowhere" / "x.html", "there is no folder .*nowhere"),
    ):
        monkeypatch.setattr("sys.argv", ["report", str(runs), "--html", str(file)])
        with pytest.raises(InputError, match=message):
            report.main()


# In a browser.

PROBE = """
<script>
const shown = () => document.querySelector("#viewer .shown img").src;
const found = {};
for (const what of ["figure", "path"]) found[what] = document.querySelectorAll(`#panels ${what}`).length;
const slider = document.querySelector("#viewer input"), choice = document.querySelector("#viewer select");
found.first = [slider.value, document.querySelector("#viewer output").textContent, shown()];
slider.value = 0;
slider.dispatchEvent(new Event("input"));
found.moved = [slider.value, document.querySelector("#viewer output").textContent, shown()];
found.runs = choice.options.length;
choice.value = 1;
choice.dispatchEvent(new Event("change"));
found.beside = document.querySelectorAll("#viewer .shown img").length;
found.loaded = [...document.images].every(image => image.complete && image.naturalWidth > 0);
document.querySelector("#legend input").click();
found.hidden = [...document.querySelectorAll("#panels path")].filter(line => line.style.display === "none").length;
found.titles = [...document.querySelectorAll("#legend label")].map(label => label.textContent);
document.body.append(Object.assign(document.createElement("pre"), {id: "probe", textContent: JSON.stringify(found)}));
</script>
"""


def chromium(*words):
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=2000"]
    return subprocess.run([CHROMIUM, *flags, *map(str, words)], capture_output=True, text=True, timeout=60)


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_in_a_browser_curves_are_drawn_and_the_slider_moves_through_the_epochs(runs, write, tmp_path):
    text, _ = write(runs)
    (tmp_path / "probed.html").write_text(text.replace("</body>", f"{PROBE}</body>"))
    done = chromium("--dump-dom", tmp_path / "probed.html")
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    dom = Elements(done.stdout)
    found = json.loads(dom.texts["pre"][-1])
    frames = data_of(text)["pictures"][0]["frames"]
    assert found["first"] == ["2", " after epoch 3", frames[2]["image"]]
    assert found["moved"] == ["0", " after epoch 1", frames[0]["image"]]
    assert (found["figure"], found["path"], found["hidden"]) == (2, 8, 4)  # two metrics, two rows, two seeds
    assert (found["runs"], found["beside"], found["loaded"]) == (2, 2, True)
    assert HOSTILE in found["titles"][0]


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium")
def test_in_a_browser_the_page_has_something_to_look_at(runs, write, tmp_path):
    write(runs)
    chromium(f"--screenshot={tmp_path / 'page.png'}", "--window-size=1200,2000", tmp_path / "out.html")
    picture = Image.open(tmp_path / "page.png").convert("RGB")
    assert picture.size == (1200, 2000) and len(picture.getcolors(2**20)) > 50
