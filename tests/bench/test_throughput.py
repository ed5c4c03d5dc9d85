"""Many requests to one pipeline: order, waiting, bounds, and nobody left behind by an error."""

import json
import threading
import time

import numpy as np
import pytest

from tests.bench.commands import ran, refusal
from tests.small import SMALL_SETTINGS, small_bundle
from wantrt import Pipeline
from wantrt.bench import throughput
from wantrt.bench.request import make_request, serve
from wantrt.bench.throughput import Queue, Request, closed_client, figures, poisson_client
from wantrt.errors import ExecutionError

SERVICE_S = 0.02


@pytest.fixture(scope="module")
def pipe():
    with Pipeline.load(small_bundle(), "torch") as pipe:
        yield pipe


@pytest.fixture(scope="module")
def videos(pipe):
    asked = {"size": (32, 32), "num_frames": 5, "num_inference_steps": 1, "seed": 7}
    return [make_request(pipe.bundle, "torch", asked | {"prompt": f"video {n}"}) for n in range(2)]


@pytest.fixture
def served(monkeypatch):
    """The settings of what was served, each in SERVICE_S and by nothing."""
    found = []

    def instead(pipe, settings, look=None):
        found.append(settings)
        time.sleep(SERVICE_S)

    monkeypatch.setattr(throughput, "serve", instead)
    return found


def test_one_client_never_waits(videos, served):
    queue = Queue(videos, requests=4, seconds=60)
    queue.serve(None, [closed_client])
    row = figures(queue.asked)
    assert row["videos"] == 4
    assert row["unserved"] == 0
    assert row["service_s"]["median"] >= SERVICE_S
    assert row["queue_s"]["median"] < SERVICE_S / 2
    assert row["videos_per_hour"] == pytest.approx(4 / row["elapsed_s"] * 3600)
    assert row["frames_per_second"] == pytest.approx(4 * 5 / row["elapsed_s"])


def test_four_clients_wait_for_three_others(videos, served):
    queue = Queue(videos, requests=16, seconds=60)
    queue.serve(None, [closed_client] * 4)
    row = figures(queue.asked)
    assert row["videos"] == 16
    assert row["queue_s"]["median"] > 2.5 * SERVICE_S
    waited = row["queue_s"]["median"] + row["service_s"]["median"]
    assert row["latency_s"]["median"] == pytest.approx(waited, rel=0.3)
    assert 0.8 < row["busy_fraction"] <= 1


def test_first_come_first_served_with_a_seed_each(videos, served):
    queue = Queue(videos, requests=6, seconds=60)
    queue.serve(None, [closed_client] * 3)
    assert [settings.seed for settings in served] == [7, 8, 9, 10, 11, 12]
    assert [settings.prompt for settings in served] == ["video 0", "video 1"] * 3
    begun = [request.begun for request in queue.asked]
    assert begun == sorted(begun)


def test_time_is_a_bound_and_who_still_waits_is_counted(videos, served):
    queue = Queue(videos, requests=1000, seconds=5 * SERVICE_S)
    start = time.perf_counter()
    queue.serve(None, [closed_client] * 3)
    assert time.perf_counter() - start < 60 * SERVICE_S
    row = figures(queue.asked)
    assert 0 < row["videos"] <= 6
    assert row["unserved"] > 0
    assert row["videos"] + row["unserved"] == len(queue.asked)


def test_an_open_loop_comes_as_it_is_seeded(videos, served):
    rate = 0.5 / SERVICE_S
    queue = Queue(videos, requests=8, seconds=60)
    queue.serve(None, [poisson_client(rate, seed=3)])
    gaps = np.random.default_rng(3).exponential(1 / rate, 8)[1:]
    asked = [request.asked for request in queue.asked]
    assert np.diff(asked) == pytest.approx(gaps)
    assert all(request.begun >= request.asked for request in queue.asked)


def test_a_loop_that_asks_too_much_has_a_growing_queue(videos, served):
    queue = Queue(videos, requests=10, seconds=60)
    queue.serve(None, [poisson_client(20 / SERVICE_S, seed=0)])
    waits = [request.begun - request.asked for request in queue.asked]
    assert waits == sorted(waits)
    assert waits[-1] > 5 * SERVICE_S
    assert figures(queue.asked)["latency_s"]["max"] > waits[-1]


def test_a_slow_loop_does_not_wait_for_what_nobody_takes(videos, served):
    queue = Queue(videos, requests=3, seconds=5 * SERVICE_S)
    start = time.perf_counter()
    queue.serve(None, [poisson_client(1 / 3600, seed=0)])
    assert time.perf_counter() - start < 5
    assert figures(queue.asked) == {"videos": 0, "unserved": 0, "videos_per_hour": 0.0}


@pytest.mark.parametrize("error", [ExecutionError("out of order"), KeyboardInterrupt()])
def test_an_error_leaves_no_client_behind(error, videos, monkeypatch):
    def fail(pipe, settings):
        raise error

    monkeypatch.setattr(throughput, "serve", fail)
    before = threading.active_count()
    queue = Queue(videos, requests=100, seconds=60)
    with pytest.raises(type(error)):
        queue.serve(None, [closed_client, closed_client, poisson_client(1000.0, 0)])
    assert threading.active_count() == before
    assert queue.ask(time.perf_counter()) is None


def test_percentiles_are_of_what_was_served():
    def request(asked, begun=None, done=None):
        from types import SimpleNamespace

        return Request(SimpleNamespace(num_frames=5), asked, begun, done)

    row = figures([request(0.0, 0.0, 2.0), request(1.0, 2.0, 5.0), request(4.0)])
    assert row["elapsed_s"] == 5.0
    assert row["videos_per_hour"] == 1440.0
    assert row["frames_per_second"] == 2.0
    assert (row["latency_s"]["min"], row["latency_s"]["max"]) == (2.0, 4.0)
    assert (row["queue_s"]["min"], row["queue_s"]["max"]) == (0.0, 1.0)
    assert (row["service_s"]["median"], row["busy_fraction"]) == (2.5, 1.0)
    assert (row["videos"], row["unserved"]) == (2, 1)


def bench(tmp_path, *arguments):
    given = ("--bundle", small_bundle(), "--runtime", "torch", "--out", tmp_path / "results")
    code = ran("throughput", *given, *SMALL_SETTINGS, *arguments)
    return code, json.loads((tmp_path / "results" / "throughput.json").read_text())


def test_the_command_over_a_file_of_prompts(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a red circle\n{"prompt": "a blue square", "frames": 1}\n')
    code, result = bench(
        *(tmp_path, "--prompts", prompts, "--concurrency", "1,2", "--load", "0.8"),
        *("--requests", 4, "--warmup", 1),
    )
    assert code == 0
    told = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in told if "│" in line)
    first, second, opened = result["rows"]
    assert [row["mode"] for row in result["rows"]] == ["closed", "closed", "open"]
    assert (first["concurrency"], second["concurrency"]) == (1, 2)
    assert opened["rate_per_s"] == pytest.approx(0.8 * first["videos_per_hour"] / 3600)
    assert second["queue_s"]["median"] > first["queue_s"]["median"]
    for row in result["rows"]:
        assert row["videos"] == 4
        assert row["frames_per_second"] * row["elapsed_s"] == pytest.approx(2 * (5 + 1))
        assert row["latency_s"]["min"] >= row["service_s"]["min"] > 0
    assert [video["frames"] for video in result["settings"]["videos"]] == [5, 1]


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch):
    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 5:  # the second request of the second case
            raise KeyboardInterrupt
        return serve(*given)

    monkeypatch.setattr(throughput, "serve", interrupted)
    code, result = bench(tmp_path, "--requests", 2, "--warmup", 1)
    assert code == 130
    assert result["partial"] == "KeyboardInterrupt: interrupted"
    told = [(row["concurrency"], row["videos"], row["unserved"]) for row in result["rows"]]
    assert told == [(1, 2, 0), (2, 1, 1)]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--prompts /nowhere.txt", "cannot read prompts"),
        ("--concurrency 0", "not a number from 1 on"),
        ("--load nan", "not a number"),
        ("--rate -1", "not a number"),
        ("--requests 0", "0 is not in the range"),
        ("--size 33x33", "not a multiple"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, capsys):
    assert said in refusal("throughput", arguments, tmp_path, capsys)


def test_the_first_bad_line_is_told(tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('fine\n{"prompt": 3}\n')
    assert "line 2" in refusal("throughput", f"--prompts {prompts}", tmp_path, capsys)
