"""Options, exit codes, and what a command says; no network."""

from __future__ import annotations

import argparse
import io
import json
import signal
from collections.abc import Callable

import pytest

import tidings_chunkstore.errors as errors
from tidings_client.cli import COMMANDS, SYNC, build_parser, main, run
from tidings_client.exits import TABLE, Exit, exit_of
from tidings_client.options import resolve
from tidings_client.progress import Reporter, cost_text, size_text, summary_text


def parsed(*arguments: str, **environ: str) -> argparse.Namespace:
    parser = build_parser()
    found = parser.parse_args(["sync", "http://h/", "d", *arguments])
    resolve(parser, found, SYNC, environ)
    return found


def test_the_command_line_goes_over_the_environment() -> None:
    assert parsed().route == "auto"
    assert parsed(TIDINGS_ROUTE="full").route == "full"
    assert parsed("--route", "delta", TIDINGS_ROUTE="full").route == "delta"
    assert parsed(TIDINGS_PLAN="1").plan is True
    assert parsed(TIDINGS_PLAN="0").plan is False
    assert parsed("--plan", TIDINGS_PLAN="0").plan is True
    assert parsed(TIDINGS_TIMEOUT="7").timeout == 7.0


def test_lists_in_the_environment() -> None:
    assert parsed().mirror == []
    assert parsed(TIDINGS_MIRROR="http://a/ http://b/").mirror == ["http://a/", "http://b/"]
    assert parsed("--mirror", "http://c/", TIDINGS_MIRROR="http://a/").mirror == ["http://c/"]
    assert [str(p) for p in parsed(TIDINGS_SEED="/a b:/c").seed] == ["/a b", "/c"]
    assert [str(p) for p in parsed("--seed", "x", "--seed", "y").seed] == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TIDINGS_ROUTE", "fastest"),
        ("TIDINGS_PLAN", "maybe"),
        ("TIDINGS_TIMEOUT", "soon"),
        ("TIDINGS_TIMEOUT", "-1"),
        ("TIDINGS_TIMEOUT", "nan"),
        ("TIDINGS_TOTAL_TIMEOUT", "inf"),
    ],
)
def test_a_bad_variable_is_wrong_usage(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parsed(**{name: value})
    assert caught.value.code == Exit.USAGE
    assert name in capsys.readouterr().err


def test_every_option_has_a_variable_of_its_own() -> None:
    for options in COMMANDS.values():
        names = [option.env for option in options]
        assert len(set(names)) == len(names)
        assert all(name.startswith("TIDINGS_") for name in names)


@pytest.mark.parametrize(
    "arguments",
    [["sync"], ["sync", "u"], ["nothing"], ["sync", "u", "d", "--route", "x"], ["sync", "--no"]],
)
def test_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == Exit.USAGE


def test_no_command_shows_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == Exit.USAGE
    assert "examples:" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_and_all_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"] if command else ["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "example" in text
    for meaning in TABLE:
        assert f"{meaning.exit.value:>3}  {meaning.what}" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("tidings 0")


# -- exit codes -----------------------------------------------------------------------------------


def _classes(kind: type[errors.TidingsError]) -> list[type[errors.TidingsError]]:
    return [kind, *(c for sub in kind.__subclasses__() for c in _classes(sub))]


def test_every_error_has_an_exit_code() -> None:
    ours = [c for c in _classes(errors.TidingsError) if c.__module__ == errors.__name__]
    assert len(ours) >= 11
    for kind in ours:
        assert exit_of(kind("text")) not in (None, Exit.OK)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.InputError("x"), 4),
        (errors.UnsettledError("x"), 4),
        (errors.NetworkError("x"), 5),
        (errors.VerificationError("x"), 6),
        (errors.RollbackError("x"), 7),
        (errors.StoreError("x"), 8),
        (errors.LockedError("x"), 9),
        (errors.LocalError("x"), 10),
        (OSError(28, "No space left on device"), 10),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_end_in_one_line_and_their_code(error: BaseException, code: int) -> None:
    def work() -> int:
        raise error

    out, err = io.StringIO(), io.StringIO()
    assert run(work, Reporter(out=out, err=err)) == code
    assert out.getvalue() == ""
    assert err.getvalue().startswith("error: ")
    assert err.getvalue().count("\n") == 1
    out, err = io.StringIO(), io.StringIO()
    assert run(work, Reporter(as_json=True, out=out, err=err)) == code
    [event] = map(json.loads, out.getvalue().splitlines())
    assert (event["type"], event["error"]["exit"]) == ("error", code)
    assert err.getvalue() == ""


def test_a_bug_shows_its_trace_and_its_event(capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> int:
        raise ZeroDivisionError("oops")

    out = io.StringIO()
    assert run(work, Reporter(as_json=True, out=out)) == 1
    assert json.loads(out.getvalue())["error"]["code"] == "bug"
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_that_turned_into_another_error_is_one() -> None:
    def work() -> int:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("Error calling __set_name__") from error
        return 0

    before = signal.getsignal(signal.SIGTERM)
    err = io.StringIO()
    assert run(work, Reporter(err=err)) == 130
    assert err.getvalue().startswith("error: interrupted")
    assert signal.getsignal(signal.SIGTERM) == before


# -- what is said ---------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def said(speak: Callable[[Reporter], None], terminal: bool = False, **how: bool) -> tuple[str, str]:
    out, err = io.StringIO(), Terminal() if terminal else io.StringIO()
    reporter = Reporter(out=out, err=err, **how)
    speak(reporter)
    return out.getvalue(), err.getvalue()


def everything(reporter: Reporter) -> None:
    reporter.progress("primary.xml", 500, 1000)
    reporter.note("something")
    reporter.note("something")
    reporter.line("a line")
    reporter.data({"type": "own", "x": b"\x01"})
    reporter.summary({"files": (1, 2)}, "the end")


def test_people_without_a_terminal() -> None:
    assert said(everything) == ("a line\nthe end\n", "something\n")


def test_people_with_a_terminal() -> None:
    out, err = said(everything, terminal=True)
    assert out == "a line\nthe end\n"
    assert "50%" in err
    assert err.index("50%") < err.index("\r\x1b[K", err.index("50%")) < err.index("something")


def test_quiet() -> None:
    assert said(everything, terminal=True, quiet=True) == ("a line\n", "")


def test_programs() -> None:
    out, err = said(everything, terminal=True, as_json=True)
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["type"] for event in events] == ["progress", "note", "note", "own", "summary"]
    assert all(event["v"] == 1 for event in events)
    assert events[-1]["files"] == [1, 2]
    assert err == ""


@pytest.mark.parametrize("text", ["two\nlines", "\x1b[31mred", "a\rb", "\u202eover"])
def test_names_cannot_steer_the_terminal(text: str) -> None:
    def speak(reporter: Reporter) -> None:
        reporter.line(text)
        reporter.error(errors.InputError(text))

    out, err = said(speak)
    for line in (out, err):
        assert line.endswith("\n")
        assert line[:-1].isprintable()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (19_670, "19.7 KB"),
        (999_949, "999.9 KB"),
        (999_950, "1.0 MB"),
        (2_839_894, "2.8 MB"),
        (4 << 40, "4.4 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_the_line_of_a_sync() -> None:
    facts = {
        "bytes_received": 19_670,
        "bytes_sent": 400,
        "requests": 2,
        "bytes_full": 2_839_894,
        "route": "delta",
        "seconds": 1.12,
        "trust": "transport",
        "changed": True,
        "fallback_reason": None,
    }
    assert summary_text("updates", facts) == (
        "updates: 19.7 KB in 2 requests instead of 2.8 MB (delta), 1.1 s; trust: transport"
    )
    assert summary_text("u", {**facts, "changed": False, "requests": 1}) == (
        "u: unchanged, 19.7 KB in 1 request, 1.1 s; trust: transport"
    )
    assert summary_text("u", {**facts, "fallback_reason": "no-tidings"}).endswith("; no-tidings")
    assert cost_text(5, 0) == "5 B"


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ([("delta", 100), ("current", 0)], "(delta)"),
        ([("full", 190), ("delta", 6), ("delta", 4)], "(full 95%, delta 5%)"),
        ([("full", 1), ("delta", 9999)], "(delta)"),
        ([("chunks", 50), ("delta", 50)], "(chunks 50%, delta 50%)"),
        ([], "(delta)"),
    ],
)
def test_the_line_has_every_route_with_a_share(files: list[tuple[str, int]], text: str) -> None:
    facts = {
        "changed": True,
        "route": "delta",
        "files": [{"route": route, "bytes": size} for route, size in files],
    }
    assert text in summary_text("u", facts)
