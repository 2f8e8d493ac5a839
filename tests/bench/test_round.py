"""bench/round.py in real processes: every method runs, and what it prints and writes is whole."""

import importlib.util
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benches import refusal

ROOT = Path(__file__).parents[2]
SPREAD = {"p50", "p10", "p90", "min", "max", "n"}


def bench(*words: str, timeout_s: float = 90.0) -> subprocess.CompletedProcess[str]:
    """Run the bench as a person does."""
    return subprocess.run(
        [sys.executable, "bench/round.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def module(name: str) -> ModuleType:
    """A module of the bench, which is no package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


Run = tuple[subprocess.CompletedProcess[str], Path]


@pytest.fixture(scope="module")
def of_cpus(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A trainer and two workers do two rounds of every method of CPUs at two densities."""
    path = tmp_path_factory.mktemp("cpus") / "round.json"
    size = ["--elements", "300000", "--workers", "2"]
    rounds = ["--rounds", "2", "--warmup", "1", "--diff-rounds", "2"]
    done = bench(
        *("--device", "cpu", *size, *rounds, "--densities", "0.01,0.2", "--json", str(path))
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done, path


@pytest.fixture(scope="module")
def of_gpus(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The methods that GPUs are measured with, over gloo, few and many elements changed."""
    path = tmp_path_factory.mktemp("gpus") / "round.json"
    size = ["--model", "tiny", "--ways", "device", "--changed", "27", "--densities", "0.01,0.6"]
    rounds = ["--rounds", "50", "--warmup", "1", "--seconds", "0.3", "--workers", "2"]
    done = bench(*size, *rounds, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return done, path


def test_a_small_run_is_whole(of_cpus: Run) -> None:
    """Every method ran on CPUs: all weights ended equal, and the document has each figure with its
    spread, machine, versions and command."""
    done, path = of_cpus
    assert "every worker of every method holds the trainer's bits" in done.stdout
    document = json.loads(path.read_text())
    assert document["command"].startswith("python bench/round.py --device cpu --elements 300000")
    assert str(path.parent) not in path.read_text()
    assert document["machine"]["cores"] >= 1
    assert {"sparsecast", "python", "torch", "nats-server"} <= document["versions"].keys()
    assert document["window"] == "gloo"
    assert [section["density"] for section in document["densities"]] == [0.01, 0.2]
    for section in document["densities"]:
        assert set(section["methods"]) == {"sparsecast", "dense", "dense_safe", "peers"}
        assert all(section["digests_equal"].values())
        for method in section["methods"].values():
            assert method["ms"]["whole"].keys() == SPREAD
            assert method["ms"]["whole"]["n"] == 2
            assert 0 < method["ms"]["wire_apply"]["min"] <= method["ms"]["whole"]["max"]
        ours = section["methods"]["sparsecast"]
        assert 0.5 < ours["changed"] / (section["density"] * 300_000) < 1.5
        assert 0 < ours["nbytes"] < section["dense_nbytes"]
        stages = sum(m["p50"] for key, m in ours["ms"].items() if key.startswith("stage_"))
        assert 0 < stages < 2 * ours["ms"]["whole"]["max"]
    assert [section["density"] for section in document["diff"]] == [0.01, 0.2]
    told = {target["what"] for target in document["targets"]}
    assert len(told) == 4, told
    assert all(what in done.stdout for what in told)


def test_the_ways_of_gpus_bring_the_same_bits(of_gpus: Run, tmp_path: Path) -> None:
    """Every method of GPUs ran until its time was over: all weights ended equal, and each is beside
    ours in the document."""
    _, path = of_gpus
    document = json.loads(path.read_text())
    beside = {"dense", "buckets_256m", "buckets_1g", "pairs", "nan_filled"}
    for section in document["densities"]:
        assert set(section["methods"]) == {"sparsecast", *beside}
        assert all(section["digests_equal"].values())
        times = [method["ms"]["whole"] for method in section["methods"].values()]
        assert all(1 <= whole["n"] < 50 and whole["min"] > 0 for whole in times)
        assert {f"{name}_to_sparsecast" for name in beside} < section["ratios"].keys()
        assert section["plain_broadcast_ms"]["n"] == 10
    few, some, many = document["densities"]
    assert 25 <= few["methods"]["sparsecast"]["changed"] <= 27
    assert 0.8 < some["methods"]["sparsecast"]["changed"] / 2786 < 1.2
    assert many["methods"]["sparsecast"]["nbytes"] < many["dense_nbytes"] * 1.01
    assert many["methods"]["pairs"]["nbytes"] > many["dense_nbytes"]
    assert document["answer_ms"]["min"] > 0
    again = tmp_path / "again.json"
    few = ["--model", "tiny", "--ways", "device", "--changed", "27", "--rounds", "1"]
    beside_it = ["--workers", "1", "--beside", str(path), "--json", str(again)]
    done = bench(*few, *beside_it)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [target["what"] for target in json.loads(again.read_text())["targets"]]
    assert any("our round with 1 worker(s) to 2" in what for what in told)


def test_a_failure_leaves_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank dies in the second density: the first one is kept, with the reason. In the first one
    there is nothing to keep, and the run fails."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    program = module("round")

    class Dying:
        def run(self, timeout_s: float) -> dict[int, Any]:
            raise program.RankFailed(f"rank 1 died within {timeout_s:g} s")

    found = program._result(Dying(), 7.0, [{"density": 0.01, "window": "nccl"}])
    assert found["failed"] == "rank 1 died within 7 s"
    assert [one["density"] for one in found["densities"]] == [0.01]
    assert found["window"] == "nccl"
    with pytest.raises(program.RankFailed, match="rank 1 died"):
        program._result(Dying(), 7.0, [])


def test_a_failed_run_is_shown(monkeypatch: pytest.MonkeyPatch, of_cpus: Run, of_gpus: Run) -> None:
    """What is left of a run that failed, in its document, is shown with the reason, for the
    methods of CPUs and of GPUs, though all that comes after the last density is missing."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    program = module("round")
    for _, path in (of_cpus, of_gpus):
        document = json.loads(path.read_text())
        for late in ("diff", "answer_ms", "held_nbytes", "targets"):
            document.pop(late, None)
        document |= {"failed": "rank 1 died", "link": None}
        document["targets"] = program.targets.of_round(document)
        into = program.Console(record=True, width=120, file=io.StringIO())
        program.report.show(document, into)
        told = into.export_text()
        assert "the run failed after these: rank 1 died" in told
        assert "1.000% changed" in told


def test_buckets_hold_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However large a bucket is, every element is in one of them, in order: tensors are split."""
    monkeypatch.syspath_prepend(ROOT / "bench")  # its modules know each other by bare names
    collectives = module("collectives")
    tensors = [torch.arange(start, stop) for start, stop in ((0, 10), (10, 11), (11, 40))]
    for size in (1, 7, 10, 11, 40, 100):
        fills = list(collectives._fills(tensors, size))
        assert all(sum(piece.numel() for piece in fill) == size for fill in fills[:-1])
        pieces = [piece for fill in fills for piece in fill]
        assert torch.equal(torch.cat(pieces), torch.arange(40))
        assert all(piece.numel() for piece in pieces)


def test_a_step_changes_as_many_as_it_is_asked_to() -> None:
    """A few elements are drawn over all tensors alike, many by a coin each: none are far off."""
    shapes = module("shapes")
    cut = shapes.Cut.whole(shapes.TINY)
    random = torch.Generator().manual_seed(5)
    for density in (1e-4, 0.01, 0.019, 0.021, 0.5, 1.0):
        weights = shapes.make_weights(cut, 3)
        before = shapes.make_weights(cut, 3)
        shapes.train_step(weights, density, random)
        changed = sum(
            int((weights[name].view(torch.int16) != before[name].view(torch.int16)).sum())
            for name in weights
        )
        assert changed == pytest.approx(density * cut.numel, rel=0.3), density


def test_the_whole_models_have_their_shapes() -> None:
    """Uncut, the shapes are those of Qwen2.5; cut, they come close to what was asked."""
    shapes = module("shapes")
    whole = shapes.Cut.of_elements(10**12)
    assert (len(whole.shapes), whole.numel) == (290, 494_032_768)
    assert whole == shapes.Cut.whole(shapes.QWEN_05B)
    assert whole.describe().startswith("Qwen2.5-0.5B, bf16, whole: 290 tensors")
    large = shapes.Cut.whole(shapes.QWEN_7B)
    assert (len(large.shapes), large.numel) == (339, 7_615_616_512)
    assert abs(shapes.Cut.of_elements(64_000_000).numel - 64_000_000) < 896
    assert "embedding left out" in shapes.Cut(2, 0).describe()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--link", "fast"], "a link is 'none' or a rate"),
        (["--densities", "0"], "shares are above 0"),
        (["--workers", "0"], "is below 1"),
        (["--device", "abacus"], "invalid choice"),
        (["--device", "cuda", "--workers", "99"], "needs 100 GPUs"),
        (["--beside", "nowhere.json"], "there is no file"),
    ],
    ids=["link", "density", "workers", "device", "gpus", "beside"],
)
def test_a_wrong_flag_is_named(words: list[str], reason: str) -> None:
    """Nothing is started, and the message says what is wrong."""
    assert reason in refusal("round.py", *words)


def test_a_link_leaves_nothing_behind() -> None:
    """The bench fails in the middle of a run over a shaped link: its namespaces are gone."""
    link = module("link")
    if os.geteuid() != 0:
        with pytest.raises(link.LinkError, match=r"root|iproute2"), link.Link("1gbit", 2):
            pass
        return
    made: list[str] = []

    def fail() -> None:
        with link.Link("200mbit", 2) as shaped:
            made.extend(line.split()[0] for line in spaces())
            carry(shaped)
            raise RuntimeError("in the middle")

    def carry(shaped: Any) -> None:
        """A server and a client in two of the namespaces, of the standard library alone."""
        own = repr(shaped.address(0))
        serve = (
            f"import socket; s = socket.create_server(({own}, 7007)); print('up', flush=True); "
            "s.settimeout(20); s.accept()[0].sendall(b'here')"
        )
        call = f"import socket; print(socket.create_connection(({own}, 7007), 20).recv(4))"
        with subprocess.Popen(
            [*shaped.prefix(0), sys.executable, "-c", serve], stdout=subprocess.PIPE
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == b"up\n"
            client = [*shaped.prefix(1), sys.executable, "-c", call]
            told = subprocess.run(client, capture_output=True, text=True, timeout=30)
            assert "here" in told.stdout, told.stderr
            server.wait(20)

    def spaces() -> list[str]:
        done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
        return [line for line in done.stdout.splitlines() if f"-{os.getpid()}-" in line]

    try:
        with pytest.raises(RuntimeError, match="in the middle"):
            fail()
    except link.LinkError as exc:
        pytest.skip(f"network namespaces are not to be had here: {exc}")
    assert len(made) == 3
    assert spaces() == []
