"""The web pages, from a real server and in a real Chromium: what they say, load and allow."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from urllib.parse import quote, urlsplit

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page

from support.browser import chromium
from support.servers import Command, Servers
from support.syncing import Repository, fetch

HOSTILE = "<img src=x onerror=alert(1)> & \"q' {{7*7}}"
BAD_WORDS = "</dd><script>alert(2)</script>"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with four repositories, one of a hostile name, and one that is not published."""
    top = tmp_path_factory.mktemp("pages") / "www"
    Repository.at(top / "fedora/43", count=150, steps=5)
    Repository.at(top / "debian/dists/stable", count=60, steps=3, kind="apt")
    Repository.at(top / HOSTILE, count=20, steps=2)
    Repository.at(top / "single", count=20)
    Repository(top / "plain").root.mkdir()
    return top


@pytest.fixture(scope="module")
def settings(root: Path) -> Path:
    """Settings with a followed repository, whose last looks failed."""
    state = root.parent / "state"
    (state / "follow").mkdir(parents=True)
    looked = {
        "v": 1,
        "path": "fedora/43",
        "checked": int(time.time()) - 7300,
        "good": int(time.time()) - 90000,
        "failures": 3,
        "error": {"code": BAD_WORDS, "message": "/srv/secret"},
        "upstream": "https://user:secret@upstream.example.org/fedora/43/",
    }
    (state / "follow" / "fedora%2F43.json").write_text(json.dumps(looked))
    file = root.parent / "mirror.toml"
    file.write_text(
        f'[follow]\nstate = "{state}"\n[[repo]]\npath = "fedora/43"\nroot = "{root}/fedora/43"\n'
        'urls = ["https://upstream.example.org/fedora/43/"]\n'
    )
    return file


@pytest.fixture(scope="module")
def running(root: Path, settings: Path) -> Iterator[Command]:
    with Servers(root.parent / "servers") as servers:
        yield servers.mirror(root, "--config", settings, "--cache", root.parent / "cache")


@pytest.fixture
def client(running: Command) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=running.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as made:
        yield made


PATHS = {
    "list": "/",
    "nothing": "/?q=nowhere",
    "rpm": "/-/repo/fedora/43",
    "apt": "/-/repo/debian/dists/stable",
    "hostile": "/-/repo/" + quote(HOSTILE),
    "single": "/-/repo/single",
    "interface": "/docs",
    "missing": "/-/repo/not/here",
}


class Elements(HTMLParser):
    """Elements of a page, with the text of each."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data

    def of(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.found if tag == name]


# -- over HTTP -------------------------------------------------------------------------------------


def test_the_list_has_what_nobody_asked_for_yet(client: httpx.Client) -> None:
    page = Elements(client.get("/").text)
    links = {a["href"] for a in page.of("a") if a["href"].startswith("/-/repo/")}
    assert links == {PATHS[name] for name in ("rpm", "apt", "hostile", "single")}
    assert "4 repositories" in page.text
    assert "no earlier snapshot to compare with" in page.text
    assert "/plain" not in page.text
    for link in links:
        assert client.get(link).status_code == 200


def test_a_filter_and_orders(client: httpx.Client, root: Path) -> None:
    assert "1 repository with “DISTS”" in Elements(client.get("/?q=DISTS").text).text
    assert "No repository has “nowhere”" in Elements(client.get("/?q=nowhere").text).text
    times = {
        PATHS[name]: json.loads((root / path / "tidings/head.json").read_bytes())["time"]
        for name, path in (
            ("rpm", "fedora/43"),
            ("apt", "debian/dists/stable"),
            ("hostile", HOSTILE),
            ("single", "single"),
        )
    }
    for order, sign in (("newest", -1), ("oldest", 1)):
        links = [a["href"] for a in Elements(client.get(f"/?sort={order}").text).of("a")]
        shown = [sign * times[link] for link in links if link in times]
        assert len(shown) == 4
        assert shown == sorted(shown)
    for odd in (
        "?page=-1",
        "?page=x",
        "?page=99999999",
        "?sort=x",
        "?q=%00%ff",
        "?q=" + "a" * 3000,
    ):
        assert client.get("/" + odd).status_code == 200, odd


def test_many_repositories_come_in_parts(root: Path, tmp_path: Path) -> None:
    for number in range(120):
        shutil.copytree(root / "single" / "tidings", tmp_path / f"www/r{number:03d}/tidings")
        shutil.copytree(root / "single" / "repodata", tmp_path / f"www/r{number:03d}/repodata")
    with Servers(tmp_path / "servers") as servers:
        url = servers.mirror(tmp_path / "www").url
        seen: list[str] = []
        path, parts = "/", 0
        while path:
            page = Elements(httpx.get(url + path, timeout=60).text)
            parts += 1
            seen += [a["href"] for a in page.of("a") if a["href"].startswith("/-/repo/")]
            nexts = [a["href"] for a in page.of("a") if a.get("rel") == "next"]
            path = "/" + nexts[0] if nexts else ""
    assert parts == 3
    assert seen == [f"/-/repo/r{number:03d}" for number in range(120)]


def test_a_page_without_repositories_says_why(tmp_path: Path) -> None:
    (tmp_path / "www").mkdir()
    with Servers(tmp_path / "servers") as servers:
        text = httpx.get(servers.mirror(tmp_path / "www").url).text
        assert "no folder that this server serves holds" in text
        assert "tidings-mirror publish --recursive ROOT" in text
        assert str(tmp_path) not in text


def test_a_repository_shows_its_history_and_how_to_use_it(
    client: httpx.Client, running: Command, root: Path
) -> None:
    text = client.get(PATHS["rpm"]).text
    page = Elements(text)
    head = json.loads((root / "fedora/43/tidings/head.json").read_bytes())
    for file in head["files"]:
        assert file["type"] in page.text
    assert f"baseurl={running.url}/fedora/43/" in page.text
    assert f"tidings sync {running.url}/fedora/43 ./fedora-43" in page.text
    assert len(re.findall(r"<th scope=\"row\">\d", text)) == 5
    svgs = [svg for svg in page.of("svg") if svg.get("role") == "img"]
    assert len(svgs) == 4
    ids = {attributes.get("id") for _, attributes in page.found}
    for svg in svgs:
        assert set(svg["aria-labelledby"].split()) <= ids
    for pack in (root / "fedora/43/tidings").glob("*.pack"):
        size = pack.stat().st_size
        assert f"{size / 1000:.1f} KB" in page.text
    apt = Elements(client.get(PATHS["apt"]).text).text
    assert f"URIs: {running.url}/debian\nSuites: stable\nComponents: main\n" in apt
    assert "--gpgkey KEYFILE" in apt


def test_the_upstream_shows_without_its_secrets(client: httpx.Client) -> None:
    text = client.get(PATHS["rpm"]).text
    assert "https://upstream.example.org/fedora/43/" in text
    assert "secret" not in text
    assert "3 times: &lt;/dd&gt;&lt;script&gt;alert(2)" in text
    assert "upstream fails" in client.get("/").text


def test_hostile_names_are_text(client: httpx.Client) -> None:
    for path in ("/", PATHS["hostile"], "/?q=" + quote('"><script>alert(3)</script>')):
        page = Elements(client.get(path).text)
        assert not page.of("script")
        assert not page.of("img")
        assert "49 " not in page.text
    assert HOSTILE in Elements(client.get(PATHS["hostile"]).text).text
    for path in ("/-/repo/..%2f..%2fetc", "/-/repo/a/../../x", "/-/repo/.hidden", "/-/repo/%00"):
        answer = client.get(path)
        assert answer.status_code == 404, path
        assert not Elements(answer.text).of("script")


def test_a_forged_host_is_not_repeated(client: httpx.Client) -> None:
    host = 'evil"><script>'
    text = client.get(PATHS["rpm"], headers={"host": host}).text
    assert "evil" not in text
    assert "http://mirror.invalid/fedora/43" in text


def test_headers(client: httpx.Client) -> None:
    for path in PATHS.values():
        answer = client.get(path)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "http" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
    first = client.get("/docs")
    again = client.get("/docs", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    only = client.head("/docs")
    assert (only.content, only.headers["etag"]) == (b"", first.headers["etag"])
    style = client.get(Elements(first.text).of("link")[1]["href"])
    assert style.headers["content-type"] == "text/css; charset=utf-8"
    assert "immutable" in style.headers["cache-control"]
    assert client.post("/").status_code == 405


def test_no_page_leads_to_another_host(client: httpx.Client) -> None:
    for path in PATHS.values():
        page = Elements(client.get(path).text)
        assert not page.of("script")
        for _, attributes in page.found:
            assert "style" not in attributes
            assert not any(name.startswith("on") for name in attributes)
            for name in ("href", "src", "action", "xlink:href", "srcset", "data"):
                target = attributes.get(name, "/")
                assert target.startswith(("/", "#", "?", "data:image/svg+xml,")), target
                assert not target.startswith("//"), target
    style = client.get(Elements(client.get("/").text).of("link")[1]["href"]).text
    assert "url(" not in style
    assert "@import" not in style
    assert "://" not in client.get("/openapi.json").text


def test_the_interface_is_all_of_the_description(client: httpx.Client) -> None:
    described = client.get("/openapi.json").json()
    page = Elements(client.get("/docs").text)
    for path, methods in described["paths"].items():
        assert path in page.text
        for said in methods.values():
            assert said["summary"].replace("`", "") in page.text
            for status in said["responses"]:
                assert status in page.text
    for name in described["components"]["schemas"]:
        assert name in page.text
    targets = {a["href"][1:] for a in page.of("a") if a["href"].startswith("#")}
    assert targets <= {attributes.get("id") for _, attributes in page.found}


def test_damage_is_told_and_not_where(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "www")
    with Servers(tmp_path / "servers") as servers:
        (next((tmp_path / "www/fedora/43/tidings").glob("000003-*"))).unlink()
        (tmp_path / "www/single/tidings/head.json").write_text("{}")
        url = servers.mirror(tmp_path / "www").url
        holes = httpx.get(url + PATHS["rpm"])
        assert holes.status_code == 200
        assert "Not all of its packs can be read" in holes.text
        listed = httpx.get(url).text
        assert "cannot be told" in listed
        assert "Its head cannot be read" in listed
        broken = httpx.get(url + PATHS["single"])
        assert broken.status_code == 404
        for answer in (holes.text, listed, broken.text):
            assert str(tmp_path) not in answer


def test_a_new_publish_shows_at_once(tmp_path: Path) -> None:
    made = Repository.at(tmp_path / "www" / "r", count=20)
    with Servers(tmp_path / "servers") as servers:
        url = servers.mirror(tmp_path / "www").url
        assert "There is one snapshot" in httpx.get(f"{url}/-/repo/r").text
        made.advance()
        assert "followed this publish" in httpx.get(f"{url}/-/repo/r").text


def test_pulled_repositories_show_their_upstream(root: Path, tmp_path: Path) -> None:
    with Servers(tmp_path / "servers") as servers:
        origin = servers.nginx(root)
        host = urlsplit(origin.url).netloc
        file = tmp_path / "edge.toml"
        file.write_text(
            "".join(
                f'[[repo]]\npath = "{path}"\nurls = ["http://u:secret@{host}/{path}/"]\n'
                for path in ("single", "never")
            )
        )
        (tmp_path / "empty").mkdir()
        options = ("--config", file, "--pull-through", "--cache", tmp_path / "cache")
        url = servers.mirror(tmp_path / "empty", *options).url
        assert "nobody asked yet" in httpx.get(url).text
        assert httpx.get(f"{url}/single/repodata/repomd.xml", timeout=60).status_code == 200
        assert httpx.get(f"{url}/never/repodata/repomd.xml", timeout=60).status_code >= 500
        text = httpx.get(url).text
        assert "2 pulled through" in text
        assert f"{origin.url}/single/" in text
        assert text.count("upstream fails") == 1
        page = httpx.get(f"{url}/-/repo/single").text
        assert f"baseurl={url}/single/" in page
        assert "plugin" not in page  # nothing lies below tidings/ at an edge
        assert "Last good look" in page
        assert "secret" not in text + page


def test_bytes_that_this_server_saved_are_measured(tmp_path: Path) -> None:
    made = Repository.at(tmp_path / "www" / "r", count=300, steps=2)
    with Servers(tmp_path / "servers") as servers:
        url = servers.mirror(tmp_path / "www", "--cache", tmp_path / "cache").url
        fetch(f"{url}/r", tmp_path / "dest")
        made.advance()
        result = fetch(f"{url}/r", tmp_path / "dest")
        assert result.bytes_received < result.bytes_full / 3
        deadline = time.monotonic() + 30
        # The totals are a few seconds old.
        while "This server has saved its clients" not in (text := httpx.get(url).text):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        assert "Saved here" in text
        assert "Since this server started it sent" in httpx.get(f"{url}/-/repo/r").text


def test_pages_can_be_left_out(root: Path, tmp_path: Path) -> None:
    with Servers(tmp_path / "servers") as servers:
        url = servers.mirror(root, "--no-pages").url
        for path in ("/", "/docs", "/-/repo/single"):
            assert httpx.get(url + path).status_code == 404, path
        assert httpx.get(f"{url}/openapi.json").status_code == 200


# -- in a browser ----------------------------------------------------------------------------------


def opened(context: BrowserContext, url: str, said: list[str], asked: list[str]) -> Page:
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(url)
    return page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_chromium_shows_every_page(
    browser: Browser, running: Command, tmp_path: Path, scheme: str
) -> None:
    """Without JavaScript, at 320 and 1280 pixels: nothing is cut off, nothing is complained of."""
    said: list[str] = []
    asked: list[str] = []
    pictures: dict[tuple[str, int], bytes] = {}
    for width in (320, 1280):
        with browser.new_context(
            java_script_enabled=False,
            color_scheme=scheme,  # type: ignore[arg-type]
            viewport={"width": width, "height": 800},
        ) as context:
            for name in ("list", "rpm", "hostile", "interface"):
                page = opened(context, running.url + PATHS[name], said, asked)
                file = tmp_path / f"{name}-{width}.png"
                pictures[name, width] = page.screenshot(path=file, full_page=True)
                # Width and height of a PNG (its IHDR): a page that is too wide makes a wide one.
                assert int.from_bytes(pictures[name, width][16:20]) == width, file
                assert page.locator("h1").is_visible()
                shown = page.locator("svg.plot:visible").count()
                assert shown == (2 if name in ("rpm", "hostile") else 0)
                page.close()
    assert said == []
    assert {urlsplit(url).netloc for url in asked if not url.startswith("data:")} == {
        urlsplit(running.url).netloc
    }
    assert len(set(pictures.values())) == len(pictures)


@pytest.mark.parametrize(("scheme", "width"), [("light", 320), ("dark", 1280)])
def test_axe_finds_nothing(browser: Browser, running: Command, scheme: str, width: int) -> None:
    options = {
        "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
        "resultTypes": ["violations"],
    }
    with browser.new_context(
        color_scheme=scheme,  # type: ignore[arg-type]
        viewport={"width": width, "height": 800},
    ) as context:
        for name in ("list", "nothing", "rpm", "interface", "missing"):
            page = context.new_page()
            page.goto(running.url + PATHS[name])
            found = Axe().run(page, options=options)
            wrong = [
                (rule["id"], [node["html"] for node in rule["nodes"]])
                for rule in found.response["violations"]
            ]
            assert wrong == [], f"{name} at {width}"
            assert len(found.response["passes"]) > 15
            page.close()


def test_the_keyboard_reaches_everything(browser: Browser, running: Command) -> None:
    """In the order of the page, the link to the content first, and the focus can be seen."""
    with browser.new_context(viewport={"width": 1280, "height": 800}) as context:
        for name in ("list", "rpm"):
            page = context.new_page()
            page.goto(running.url + PATHS[name])
            wanted = page.evaluate(
                "[...document.querySelectorAll('a[href], input, select, button, [tabindex=\"0\"]')]"
                ".map((e, i) => { e.dataset.n = i; return String(i) })"
            )
            reached = []
            for _ in wanted:
                page.keyboard.press("Tab")
                number, visible = page.evaluate(
                    "(() => { const e = document.activeElement, r = e.getBoundingClientRect(),"
                    " s = getComputedStyle(e); return [e.dataset.n, r.left >= 0 && r.width > 0 &&"
                    " s.outlineStyle === 'solid' && parseFloat(s.outlineWidth) >= 2] })()"
                )
                reached.append(number)
                assert visible, page.evaluate("document.activeElement.outerHTML")
            assert reached == wanted
            page.evaluate("document.activeElement.blur()")
            page.reload()
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
            assert page.evaluate("document.activeElement.id") == "main"
            page.close()


def test_the_form_works_by_keyboard(browser: Browser, running: Command) -> None:
    with browser.new_context(java_script_enabled=False) as context:
        page = context.new_page()
        page.goto(running.url)
        page.get_by_label("Path contains").fill("dists")
        page.keyboard.press("Enter")
        page.get_by_role("link", name="/debian/dists/stable").click()
        assert page.get_by_role("heading", level=1).inner_text() == "/debian/dists/stable"
        table = page.get_by_role("table", name="Retained snapshots, newest first")
        assert table.get_by_role("row").count() == 4
        assert page.get_by_role("img", name=re.compile("Bytes to follow a publish")).count() == 1


# -- colours ---------------------------------------------------------------------------------------


def luminance(colour: str) -> float:
    """WCAG 2.2, "relative luminance"."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, "contrast ratio"."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast() -> None:
    """Texts have 4.5 to 1, marks and edges 3 to 1, in both schemes; axe sees no SVG marks."""
    style = (resources.files("tidings_server") / "templates" / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    assert len(blocks) == 2
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for text in ("text", "aside", "link", "bad"):
            for ground in ("ground", "raised"):
                assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
        assert contrast(colours["on-head"], colours["head"]) >= 4.5
        for mark in ("update", "full", "edge"):
            for ground in ("ground", "raised"):
                assert contrast(colours[mark], colours[ground]) >= 3, (mark, ground)
        assert contrast(colours["update"], colours["line"]) >= 3
