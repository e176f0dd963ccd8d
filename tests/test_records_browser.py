"""The HTML pages in a real browser: no console message, nothing wider than the window, drawings where they belong."""

import http.server
import json
import re
import shutil
import subprocess
import threading

import pytest
from test_records_runs import make_run

from records.cli import main

BROWSER = next((b for b in ("chromium", "chromium-browser", "google-chrome") if shutil.which(b)), "")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--v=0",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
# a frame as wide as a phone or a desk, measured from outside: the page itself forbids scripts
PROBE = """<body style="margin:0"><iframe id="f" src="page.html" style="border:0;width:WIDTHpx;height:3000px"></iframe>
<script>onload=()=>{const d=f.contentDocument,w=[...d.querySelectorAll('svg,figure,table,h1,.tile')];
document.title=JSON.stringify({wide:d.documentElement.scrollWidth,svg:d.querySelectorAll('svg').length,
flat:w.filter(e=>e.tagName=='svg'&&!e.closest('details')&&e.getBoundingClientRect().height<10).length,text:d.body.innerText.length,
out:w.filter(e=>!e.closest('.scroll')&&e.getBoundingClientRect().right>WIDTH+1).length})}</script>"""


@pytest.fixture
def pages(tmp_path):
    """A local server for files below a folder."""
    site = tmp_path / "site"
    site.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, directory=str(site), **kwargs)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield site, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def measure(tmp_path, site, address, width):
    """What a browser of this width makes of page.html, and what it said on its console."""
    (site / "probe.html").write_text("<!doctype html>" + PROBE.replace("WIDTH", str(width)))
    command = [
        BROWSER,
        *FLAGS,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={max(width, 500)},3000",
        "--virtual-time-budget=4000",
        "--dump-dom",
        f"{address}/probe.html",
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True, text=True)
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title, done.stdout[-500:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return json.loads(title[1]), console


def a_report(tmp_path, site):
    run = make_run(tmp_path / "run", note="<script>console.error('owned')</script><img src=http://evil/x>" + "w" * 300)
    main(["report", str(run.path), "--out", str(tmp_path / "out"), "--price", "20"])
    shutil.copyfile(tmp_path / "out" / "report.html", site / "page.html")


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1280])
def test_a_page_fits_phone_and_desk_and_says_nothing_on_the_console(tmp_path, pages, width):
    site, address = pages
    a_report(tmp_path, site)
    found, console = measure(tmp_path, site, address, width)
    assert console == []
    assert found["wide"] <= width and found["out"] == 0 and found["text"] > 200
    assert found["flat"] == 0 and found["svg"] >= 8


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="no chromium on this machine")
def test_the_proof_itself_sees_a_script_error_and_an_overflow(tmp_path, pages):
    site, address = pages
    (site / "page.html").write_text(
        "<!doctype html><body><h1 style='width:2000px'>x</h1><script>nothing.here</script>" + "text " * 200
    )
    found, console = measure(tmp_path, site, address, 360)
    assert found["wide"] > 360 and found["out"] == 1 and console
