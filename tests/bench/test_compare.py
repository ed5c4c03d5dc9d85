"""Comparing with peers: the same work or none, right results or no time, no peer that is lost."""

import json
import re
import shutil
from dataclasses import dataclass

import pytest
import torch

from tests.bench.commands import ran, refusal
from tests.small import small_checkpoint
from wantrt.bench import compare
from wantrt.bench.compare import build_ours, measure, set_up
from wantrt.bench.floor import Cost
from wantrt.bench.peers import base
from wantrt.bench.peers.base import Done, Loaded, Work, find_peer
from wantrt.bench.peers.diffusers_compiled import DiffusersCompiled
from wantrt.bench.peers.diffusers_eager import DiffusersEager
from wantrt.bench.rates import Rates
from wantrt.checkpoints import open_checkpoint
from wantrt.errors import BenchError, SettingsError

RESULT = torch.linspace(-1, 1, 12).view(1, 3, 1, 2, 2)


@dataclass
class Engine:
    """Takes as long as it is told; `off` makes its result wrong."""

    name: str
    seconds: float = 1.0
    off: float = 0.0
    settings: tuple = (("precision", "fp32"), ("parameters", 7))
    fails: BaseException | None = None
    after: int = 0  # runs before it fails

    packages = ()

    def decoder(self, work: Work) -> Loaded:
        def run(index: int) -> Done:
            if self.fails and index >= self.after:
                raise self.fails
            return Done(self.seconds * (1 + index / 100), RESULT + self.off)

        return Loaded(dict(self.settings), run)


def small_work(**changes) -> Work:
    checkpoint = small_checkpoint()
    variant = open_checkpoint(checkpoint).variant
    generator = torch.Generator().manual_seed(0)
    (dit,) = (expert.dit for expert in variant.experts)
    text = torch.randn(1, dit.text_len, dit.text_dim, generator=generator)
    given = {
        "checkpoint": checkpoint,
        "variant": variant,
        "precision": "fp32",
        "device": torch.device("cpu"),
        "size": (32, 32),
        "num_frames": 5,
        "latents": torch.randn(1, variant.vae.z_dim, 2, 4, 4, generator=generator),
        "text_embeds": text,
        "prompts": ["a red circle moves right", "a blue square"],
        "num_inference_steps": 3,
        "guidance_scale": 4.0,
    }
    return Work(**{**given, **changes})


def rows_of(ours, peers, scope="vae", work=None, runs=3, warmup=1):
    return measure(
        scope,
        work or small_work(),
        ours,
        [(peer, None) for peer in peers],
        warmup=warmup,
        runs=runs,
        cost=Cost(matrix_flops=500),
        rates=Rates(matrix=1000.0, attention=1.0, copy=1.0),
    )


# -- With real engines ----------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["pipeline", "dit", "vae"])
def test_does_the_same_as_diffusers(scope, tmp_path):
    """The reference is diffusers; what differs is rounding alone."""
    work = small_work()
    ours = build_ours(work, ["onnxruntime", "torch"], tmp_path)
    rows = list(rows_of(ours, [DiffusersEager()], scope, work, runs=2))
    engines = ["wantrt onnxruntime", "wantrt torch", "diffusers eager"]
    assert [row["engine"] for row in rows] == engines
    assert rows[2]["parity"] == 0
    for row in rows:
        assert row["parity"] < (1e-3 if scope == "pipeline" else 1e-5)
        assert row["seconds"]["runs"] == 2
        assert row["floor_fraction"] == pytest.approx(0.5 / row["seconds"]["median"])
        if scope == "pipeline":
            assert row["step_ms"]["runs"] == 2 * (work.num_inference_steps - 1)
            steps_s = work.num_inference_steps * row["step_ms"]["min"] / 1e3
            assert row["vae_decode_s"]["min"] < row["seconds"]["max"]
            assert row["vae_decode_s"]["min"] + steps_s * 2 / 3 < row["seconds"]["max"]
    assert "ratio" not in rows[0]
    assert rows[1]["ratio"]["median"] > 0


def test_another_guidance_is_no_parity(tmp_path):
    """The tolerance of whole videos is not so wide that it lets a wrong setting pass."""
    work = small_work()
    (ours,) = build_ours(work, ["torch"], tmp_path)
    other = small_work(guidance_scale=4.5)
    results = [engine.pipeline(w).run(0).result for engine, w in ((ours, work), (ours, other))]
    found = compare.difference(results[1].float(), results[0].float())
    assert found > compare.TOLERANCE["fp32"]


@pytest.mark.slow
def test_compiled_diffusers():
    work = small_work()
    eager, compiled = (peer.transformer(work) for peer in (DiffusersEager(), DiffusersCompiled()))
    assert compiled.settings == eager.settings
    torch.testing.assert_close(compiled.run(0).result, eager.run(0).result, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_command(tmp_path, capsys):
    asked = "--frames 5 --steps 2 --runtime onnxruntime --peers diffusers-eager --warmup 1 --runs 2"
    assert ran("compare", *asked.split(), "--out", tmp_path) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(shown[-1])
    assert result == json.loads((tmp_path / "compare.json").read_text())
    assert [row["name"] for row in result["rows"]] == [
        "pipeline: wantrt onnxruntime",
        "pipeline: diffusers eager",
    ]
    assert result["settings"]["scopes"][0]["variant"] == "nano"
    table = [line for line in shown if re.search("[┃│]", line)]
    assert len(table) == 3
    assert max(map(len, table)) <= 100


# -- With invented ones ---------------------------------------------------------------------------


def test_ratios_are_of_a_round():
    fast, slow, peer = Engine("fast", 1.0), Engine("slow", 2.0), Engine("peer", 3.0)
    rows = {row["engine"]: row for row in rows_of([fast, slow], [peer])}
    assert list(rows) == ["fast", "slow", "peer"]
    assert rows["fast"]["seconds"]["median"] == pytest.approx(1.03)  # rounds 2, 3 and 4
    assert rows["slow"]["ratio"] == {
        **dict.fromkeys(("median", "p10", "p90", "p99", "min", "max"), 2.0),
        "runs": 3,
    }
    assert rows["peer"]["ratio"]["median"] == 3
    assert [row.get("ratio_to") for row in rows.values()] == [None, "fast", "fast"]


def test_a_faster_wrong_answer_is_refused():
    rows = []
    with pytest.raises(BenchError, match=r"from those of right: wrong in vae, by 1\.\de-01"):
        for row in rows_of([Engine("wrong", 0.1, off=0.1), Engine("slow")], [Engine("right")]):
            rows.append(row)
    assert [row["engine"] for row in rows] == ["wrong", "slow", "right"]
    assert "seconds" not in rows[0]
    assert rows[0]["says"].startswith("not timed")
    assert "seconds" in rows[1]
    assert "ratio" not in rows[1]
    assert rows[2]["ratio_to"] == "slow"


@pytest.mark.parametrize("ours, peer", [("nan", "1"), ("1", "nan"), ("nan", "nan")])
def test_what_is_not_a_number_is_wrong(ours, peer):
    """Also of the reference: then nothing is timed."""
    rows = []
    with pytest.raises(BenchError, match="outputs differ"):
        for row in rows_of([Engine("ours", off=float(ours))], [Engine("peer", off=float(peer))]):
            rows.append(row)
    assert not any("seconds" in row for row in rows)


@pytest.mark.parametrize("name, value", [("precision", "bf16"), ("parameters", 8)])
def test_unequal_settings_are_refused(name, value):
    other = Engine("ours", settings=(("precision", "fp32"), ("parameters", 7), (name, value)))
    with pytest.raises(BenchError, match=rf"unequal settings: {name} is .* and {value} in ours"):
        list(rows_of([other], [Engine("peer")]))


def test_what_a_scheduler_recorded_is_read_on_both_sides(tmp_path):
    folder = shutil.copytree(small_checkpoint(), tmp_path / "checkpoint")
    path = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"flow_shift": 7.5}))
    work = small_work(checkpoint=folder)
    ours = build_ours(work, ["torch"], tmp_path)
    theirs = DiffusersEager().pipeline(work).settings
    assert theirs == ours[0].pipeline(work).settings
    assert theirs["flow_shift"] == 7.5


def test_a_peer_that_fails_is_reported():
    broken = Engine("broken", fails=RuntimeError("no compiler\nsomewhere"))
    silent = Engine("silent", fails=RuntimeError())
    rows = list(rows_of([Engine("ours")], [broken, silent, Engine("peer")]))
    assert rows[0]["says"] == "failed: RuntimeError: no compiler"
    assert rows[1]["says"] == "failed: RuntimeError: "
    assert [row["engine"] for row in rows[2:]] == ["ours", "peer"]


@pytest.mark.parametrize("after", [1, 3], ids=["warm-up", "round"])
def test_a_peer_that_fails_later_is_reported_and_the_others_go_on(after):
    broken = Engine("broken", fails=RuntimeError("full"), after=after)
    rows = list(rows_of([Engine("ours", 1.0)], [broken, Engine("peer", 2.0)]))
    assert [row["engine"] for row in rows] == ["broken", "ours", "peer"]
    assert rows[0]["says"] == "failed: RuntimeError: full"
    assert [row["seconds"]["runs"] for row in rows[1:]] == [3, 3]
    assert rows[2]["ratio"]["min"] == rows[2]["ratio"]["max"] == 2.0  # of the same rounds


def test_our_own_failure_in_a_round_is_an_error():
    rows = []
    with pytest.raises(RuntimeError, match="ours"):
        ours = Engine("ours", fails=RuntimeError("ours"), after=3)
        for row in rows_of([ours], [Engine("peer")]):
            rows.append(row)
    assert [row["seconds"]["runs"] for row in rows] == [1, 1]


def test_memory_is_what_an_engine_adds(monkeypatch):
    """On a GPU, at the peak of the run that is compared; loading and others are not in it."""
    held = {"now": 1000, "peak": 1000}

    def take(nbytes):
        held["now"] += nbytes
        held["peak"] = max(held.values())

    class Large(Engine):
        def decoder(self, work):
            take(9000)  # while it is loaded
            take(-8900)
            loaded = super().decoder(work)

            def run(index):
                take(50 if index == 0 else 5000)
                take(-50 if index == 0 else -5000)
                return loaded.run(index)

            return Loaded(loaded.settings, run)

    cuda = compare.torch.cuda
    monkeypatch.setattr(cuda, "memory_allocated", lambda device: held["now"])
    monkeypatch.setattr(cuda, "max_memory_allocated", lambda device: held["peak"])
    monkeypatch.setattr(
        cuda, "reset_peak_memory_stats", lambda device: held.update(peak=held["now"])
    )
    work = small_work(device=torch.device("cuda", 0))
    rows = list(rows_of([Large("ours")], [Large("peer")], work=work))
    assert [row["peak_allocated_bytes"] for row in rows] == [150, 150]
    assert "peak_allocated_bytes" not in next(rows_of([Large("ours")], []))


def test_our_own_failure_is_an_error():
    with pytest.raises(RuntimeError, match="ours"):
        list(rows_of([Engine("ours", fails=RuntimeError("ours"))], [Engine("peer")]))


def test_an_interruption_leaves_whole_rounds():
    peer = Engine("peer", fails=KeyboardInterrupt(), after=4)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in rows_of([Engine("ours")], [peer], runs=5):
            rows.append(row)
    assert [row["seconds"]["runs"] for row in rows] == [2, 2]  # rounds 2 and 3


def test_missing_and_other_versions(monkeypatch, tmp_path):
    assert find_peer("diffusers-eager")[1] is None
    pins = tmp_path / "constraints.txt"
    pins.write_text("# pins\ndiffusers==0.0.1\n")
    monkeypatch.setattr(base, "CONSTRAINTS", pins)
    assert re.fullmatch(r"diffusers is \S+, pinned is 0\.0\.1", find_peer("diffusers-eager")[1])
    monkeypatch.setattr(DiffusersEager, "packages", ("no-such-package",))
    (found, missing) = compare.find_peers(["diffusers-compiled"])
    assert not found
    assert missing[0]["says"] == "no-such-package is not installed: pip install 'wantrt[bench]'"
    assert missing[0]["engine"] == "diffusers compiled"
    monkeypatch.setattr(base, "CONSTRAINTS", tmp_path / "none.txt")
    assert base.pinned() == {}


# -- Bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--scope dti", "unknown scope 'dti'"),
        ("--scope dit,vae --size 64x64", "several scopes are measured at their defaults"),
        ("--scope dit --size 50x48", "50x48 is not a multiple of 16"),
        ("--scope vae --frames 6", "6 frames is not 4n [+] 1"),
        ("--scope vae --blocks 2", "--blocks means nothing to --scope vae"),
        ("--scope dit --steps 2", "--steps means nothing to --scope dit"),
        ("--variant t2v-a14b", "one transformer"),
        ("--variant i2v-14b-480p", "text to video"),
        ("--peers lightning", "unknown peer 'lightning'"),
        ("--runtime tourch", "unknown runtime 'tourch'"),
        ("--runtime onnxruntime --precision bf16", "does not run"),
        ("--runs 0", "0 is not in the range"),
        ("--checkpoint /nowhere", "no checkpoint '/nowhere'"),
    ],
)
def test_bad_input(arguments, said, tmp_path, monkeypatch, capsys):
    unwanted = "work began before the input was checked"
    monkeypatch.setattr(compare, "measure_rates", lambda *_: pytest.fail(unwanted))
    assert re.search(said, refusal("compare", arguments, tmp_path, capsys))


def test_precisions_of_runtimes_must_agree(monkeypatch):
    monkeypatch.setattr(
        compare, "choose_precision", lambda name, _: {"torch": "bf16"}.get(name, "fp32")
    )
    with pytest.raises(BenchError, match=r"onnxruntime fp32, torch bf16\. Name one --precision"):
        compare.choose_engines(["onnxruntime", "torch"], None)


def test_defaults():
    whole, dit, vae = (set_up(scope) for scope in ("pipeline", "dit", "vae"))
    assert (whole.variant, whole.checkpoint, whole.num_inference_steps) == ("nano", None, 20)
    assert (dit.size, dit.num_frames, dit.blocks) == ((416, 240), 17, 2)
    assert (vae.size, vae.num_frames, vae.blocks) == ((416, 240), 5, None)
    opened = open_checkpoint(dit.checkpoint, dit.variant).variant
    assert opened.experts[0].dit.dim == 1536
    assert opened.experts[0].dit.num_layers == 2
    decoder = open_checkpoint(vae.checkpoint, vae.variant).variant.vae
    assert decoder == open_checkpoint("random:0", "t2v-1.3b").variant.vae
    with pytest.raises(SettingsError, match="unknown variant"):
        set_up("dit", variant="15B")
