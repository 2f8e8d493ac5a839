"""Publisher and Replica on one CUDA device: stream order, the fence, graphs, where payloads lie."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from ranks import held, same, split
from roots import Roots, Trainer
from runs import QUICK, Ear, Site, Tensors, eventually, same_bits, step, until_stored, weights
from sparsecast import Policy, Publisher, Replica, Shard, digest
from sparsecast.messages.metrics import WorkerMetrics
from sparsecast.pipeline.bus.broker import Broker
from sparsecast.pipeline.bus.nats import NatsBus
from sparsecast.workers.choice import Choice
from sparsecast.workers.engine import ModuleEngine
from sparsecast.workers.guard import Guard
from sparsecast.workers.incoming import Incoming
from sparsecast.workers.outgoing import Outgoing
from sparsecast.workers.streams import CudaFence, finish, settle
from spawn import Context, spawn
from teams import Team
from trainers import Trainers

pytestmark = pytest.mark.gpu(1)

CUDA = torch.device("cuda:0")
#: About a tenth of a second of a GPU's time.
LONG = 150_000_000


@pytest.fixture(autouse=True)
def _own_stream() -> Iterator[None]:
    """The caller computes on a stream of its own: what is ordered by chance on the default stream,
    which waits for others, would not be seen to lack its order."""
    with torch.cuda.stream(torch.cuda.Stream(CUDA)):
        yield


def _on_gpu(tensors: Tensors) -> Tensors:
    return {name: tensor.to(CUDA) for name, tensor in tensors.items()}


def _on_host(tensors: Tensors) -> Tensors:
    torch.cuda.synchronize()
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _policy(**changes: Any) -> Policy:
    return replace(QUICK, **({"ready_s": 5.0, "commit_s": 10.0, "open_s": 20.0} | changes))


@pytest.mark.parametrize("window", ["gloo", "bus"])
@pytest.mark.parametrize("shadow", ["device", "host"])
async def test_rounds_from_gpu_to_gpu(site: Site, ear: Ear, window: Any, shadow: Any) -> None:
    """Trainer and worker on one GPU, through the host: every version exact, proven, by window."""
    trained, mine = _on_gpu(weights()), _on_gpu(weights())
    policy = _policy(window=window)
    publisher = await site.publisher(trained, policy=policy, shadow=shadow)
    replica = await site.replica(mine, policy=policy)
    assert replica.ports.device == "cuda:0"
    await publisher.wait_members(1, timeout_s=60)
    await eventually(lambda: publisher.window == window, 30.0)
    for version in range(1, 6):
        step_cuda(trained, version)
        update = await publisher.publish(step=version)
        assert (await update.wait_applied(timeout_s=30)).complete
        await eventually(lambda version=version: replica.verified == version, 30.0)
        assert (await ear.until(WorkerMetrics, version=version)).source == "window"
        assert same_bits(_on_host(trained), _on_host(mine))
    assert replica.mismatches == 0


@pytest.mark.parametrize("shadow", ["device", "host"])
async def test_back_from_the_log(site: Site, shadow: Any) -> None:
    """A trainer resumes a run from an older checkpoint, and rolls it back: old states are in host
    memory, shadow and weights on the GPU, and patches of both kinds meet."""
    policy = _policy()
    trained, mine, checkpoints = _on_gpu(weights()), _on_gpu(weights()), [weights()]
    first = await site.publisher(trained, policy=policy, shadow=shadow)
    replica = await site.replica(mine, policy=policy)
    await first.wait_members(1, timeout_s=60)
    for version in range(1, 4):
        step_cuda(trained, version)
        await first.publish()
        await until_stored(first, version)
        checkpoints.append(_on_host(trained))
    await replica.wait_version(3, timeout_s=30)
    await first.close()
    trained = _on_gpu(checkpoints[1])
    second = await site.publisher(trained, policy=policy, shadow=shadow, resume="must")
    assert second.version == 5
    await second.wait_members(1, timeout_s=60)
    assert same_bits(checkpoints[1], _on_host(mine))
    await until_stored(second, 5)
    back = await second.rollback(5)
    assert back.changed == 0
    step_cuda(trained, 7)
    await second.publish()
    back = await second.rollback(5)
    step_cuda(trained, 8)
    update = await second.publish()
    assert (await update.wait_applied(timeout_s=30)).complete
    await eventually(lambda: replica.verified == update.version == 9, 30.0)
    assert same_bits(_on_host(trained), _on_host(mine))
    assert replica.mismatches == 0


async def test_a_layout_loads_its_kernels_at_the_start(site: Site) -> None:
    """A worker of two ranks on one GPU: once both are there, updates of few, of many and of all
    elements need no kernel for parts that was not loaded by then, and are exact."""
    from sparsecast.pipeline.delta.kernels.bitmap import _bitmap_parts
    from sparsecast.pipeline.delta.kernels.dense import _dense_parts
    from sparsecast.pipeline.delta.kernels.digest import _digest_parts
    from sparsecast.pipeline.delta.kernels.scatter import _scatter_parts

    kernels = _scatter_parts, _bitmap_parts, _dense_parts, _digest_parts
    trained, policy = _on_gpu(weights()), _policy(window="gloo")
    layouts = split(trained, 2)
    mine = [_on_gpu(held(layout, trained)) for layout in layouts]
    given: dict[str, Any] = {"run": site.run, "bus": site.url, "name": "w0", "policy": policy}
    replica = Replica(mine[0], ranks=2, layout=layouts[0], **given)
    shard = Shard(mine[1], rank=1, layout=layouts[1], **given)
    await asyncio.gather(replica.__aenter__(), shard.__aenter__())
    for rank in (shard, replica):
        site.ends(rank)
    loaded = [set(kernel._known) for kernel in kernels]
    assert all(loaded)
    publisher = await site.publisher(trained, policy=policy)
    await publisher.wait_members(1, timeout_s=60)
    for version, share in enumerate((0.005, 0.3, 1.0), 1):
        step_cuda(trained, version, share)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=30)).complete
        await eventually(lambda version=version: replica.verified == version, 30.0)
        assert same(layouts, [_on_host(rank) for rank in mine], _on_host(trained))
    assert [set(kernel._known) for kernel in kernels] == loaded
    assert replica.mismatches == 0


def step_cuda(tensors: Tensors, seed: int, share: float = 0.02) -> None:
    """runs.step() for tensors on a GPU: the same changes, in the order of the current stream."""
    for tensor in tensors.values():
        if tensor.is_floating_point():
            random = torch.Generator().manual_seed(seed)
            changed = torch.rand(tensor.shape, generator=random) < share
            tensor.add_(changed.to(tensor.device, non_blocking=True).to(tensor.dtype) * 1.5)
        else:
            tensor.add_(1)


@pytest.mark.parametrize("shadow", ["device", "host"])
@pytest.mark.parametrize("place", ["cuda:0", "cpu"])
async def test_a_view_on_a_stream_of_its_own(site: Site, place: str, shadow: Any) -> None:
    """The view works long on a side stream and joins it; as soon as publish() returns, the weights
    change in the order of the caller's stream, and that side stream fills what memory it is given:
    each version is the view of the weights as they were, bit for bit, a tensor that it leaves alone
    and one that may lie in host memory among them."""
    side = torch.cuda.Stream(CUDA)
    trained = {f"w{i}": torch.zeros(300_007, device=CUDA) for i in range(4)}

    def held(tensors: Mapping[str, torch.Tensor]) -> Tensors:
        ours = torch.cuda.current_stream(CUDA)
        side.wait_stream(ours)
        with torch.cuda.stream(side):
            torch.cuda._sleep(LONG // 10)
            made = {f"{name}.fp8": tensors[name].to(torch.float8_e4m3fn) for name in tensors}
        ours.wait_stream(side)
        return made | {"w0": tensors["w0"], "w1": tensors["w1"].to(place)}

    def on_host(found: Tensors) -> Tensors:
        return {name: tensor.view(torch.uint8) for name, tensor in _on_host(found).items()}

    mine = {name: torch.zeros_like(tensor) for name, tensor in held(trained).items()}
    torch.cuda.synchronize()
    publisher = await site.publisher(trained, policy=_policy(), view=held, shadow=shadow)
    replica = await site.replica(mine, policy=_policy())
    await publisher.wait_members(1, timeout_s=60)
    for version in range(1, 6):
        step_cuda(trained, version)
        then = on_host(held(trained))
        torch.cuda._sleep(LONG // 10)
        update = await publisher.publish()
        with torch.cuda.stream(side):
            filled = [torch.full((300_007,), 77, dtype=torch.uint8, device=CUDA) for _ in range(8)]
        step_cuda(trained, version + 50)
        assert (await update.wait_applied(timeout_s=30)).complete
        await eventually(lambda version=version: replica.verified == version, 30.0)
        assert same_bits(then, on_host(mine))
        del filled
    assert replica.mismatches == 0


async def test_what_is_queued_behind_publish_is_not_in_the_patch(site: Site) -> None:
    """The next optimizer step is queued on the caller's stream as soon as publish() returns, with
    no synchronisation: version 1 is the weights before it, bit for bit."""
    trained = {f"w{i}": torch.zeros(1_000_003, device=CUDA) for i in range(8)}
    mine = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    torch.cuda.synchronize()
    publisher = await site.publisher(trained, policy=_policy(window="gloo"))
    replica = await site.replica(mine, policy=_policy(window="gloo"))
    await publisher.wait_members(1, timeout_s=60)
    for version in range(1, 6):
        torch.cuda._sleep(LONG)
        for tensor in trained.values():
            tensor[version::7].add_(version)
        at_publish = {name: tensor.clone() for name, tensor in trained.items()}
        update = await publisher.publish()
        for tensor in trained.values():
            tensor[version::5].sub_(1000.0)  # the next step: not this version's
        await replica.wait_version(version, timeout_s=30)
        assert (await update.wait_applied(timeout_s=30)).complete
        await eventually(lambda version=version: replica.verified == version, 30.0)
        assert same_bits(_on_host(at_publish), _on_host(mine))
    assert replica.mismatches == 0


def test_publish_of_a_synchronous_trainer_follows_its_stream(broker: Broker, run: str) -> None:
    """The same with Publisher and Replica on loops of their own, publishing faster than rounds
    go: what is merged is the newest state."""
    trained = {f"w{i}": torch.zeros(300_007, device=CUDA) for i in range(4)}
    mine = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    replica = Replica(mine, run=run, bus=broker.url, name="w0", policy=_policy())
    replica.start()
    try:
        with Publisher(trained, run=run, bus=broker.url, policy=_policy()) as publisher:
            publisher.wait_members(1, timeout_s=60)
            for version in range(1, 41):
                for tensor in trained.values():
                    tensor[version::11].add_(1.0)
                update = publisher.publish()
            last = {name: tensor.clone() for name, tensor in trained.items()}
            for tensor in trained.values():
                tensor.fill_(-1.0)
            assert update.wait_applied(timeout_s=30).complete
            assert same_bits(_on_host(last), _on_host(mine))
    finally:
        replica.stop()
    assert replica.mismatches == 0


def test_a_writer_comes_behind_what_readers_have_queued() -> None:
    """A reader leaves with a slow kernel and a read behind it in its queue: the write, on another
    thread and stream, comes after; without the fence it comes before, which shows that this test
    would see it."""
    for fenced in (False, True):
        weight, seen = torch.zeros(1, device=CUDA), torch.zeros(1, device=CUDA)
        torch.cuda.synchronize()
        guard = Guard(0)
        if fenced:
            fence = guard.fence = CudaFence()
            fence.include([CUDA])
        with guard.reading(), guard.reading():
            torch.cuda._sleep(LONG)
            seen.copy_(weight)

        def write(weight: torch.Tensor = weight, guard: Guard = guard) -> None:
            settle([CUDA])
            with guard.writing(1.0) as writer:
                writer.begin_write()
                weight.fill_(1.0)
                writer.commit(1)

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(30)
        assert guard.version == 1
        torch.cuda.synchronize()
        assert weight.item() == 1.0
        assert seen.item() == (0.0 if fenced else 1.0)


async def test_no_forward_sees_half_an_update(site: Site) -> None:
    """Two reader threads on their own streams queue a slow look at all weights, twice, and leave
    the guard at once: every look finds one version everywhere, that which the guard told."""
    names = [f"w{i}" for i in range(40)]
    trained = {name: torch.zeros(20_011, device=CUDA) for name in names}
    mine = {name: torch.zeros_like(tensor) for name, tensor in trained.items()}
    torch.cuda.synchronize()
    publisher = await site.publisher(trained, policy=_policy())
    replica = await site.replica(mine, policy=_policy())
    await publisher.wait_members(1, timeout_s=60)
    wrong = [torch.zeros(1, dtype=torch.int64, device=CUDA) for _ in range(2)]
    looks, versions, stop = [0, 0], set(), threading.Event()

    def read(who: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream(CUDA)):
            while not stop.is_set():
                with replica.reading() as version:
                    for _ in range(2):
                        for tensor in mine.values():
                            wrong[who] += (tensor != float(version or 0)).sum()
                        torch.cuda._sleep(LONG // 100)
                versions.add(version)
                looks[who] += 1
                if looks[who] % 4 == 0:
                    finish(CUDA)  # or the queue grows without end

    readers = [threading.Thread(target=read, args=(who,)) for who in range(2)]
    for reader in readers:
        reader.start()
    for version in range(1, 31):
        for tensor in trained.values():
            tensor.fill_(float(version))
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=30)).applied
    stop.set()
    for reader in readers:
        reader.join(30)
    torch.cuda.synchronize()
    assert [int(count) for count in wrong] == [0, 0]
    assert min(looks) > 5
    assert len(versions) > 5
    assert replica.mismatches == 0


def _module() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        layers = [torch.nn.Linear(256, 256), torch.nn.GELU(), torch.nn.Linear(256, 256)]
        return torch.nn.Sequential(*layers).to(CUDA)


async def test_a_captured_graph_replays_with_the_new_weights(site: Site) -> None:
    """The graph holds addresses, and weights are written in place: each replay is the eager
    forward of the version that the guard tells. Graphs are captured on while rounds go on."""
    trained, served = _module(), _module()
    publisher = await site.publisher(trained, policy=_policy())
    replica = await site.replica(served, policy=_policy())
    await publisher.wait_members(1, timeout_s=60)
    tokens = torch.linspace(-1, 1, 4 * 256, device=CUDA).view(4, 256)
    torch.cuda.synchronize()
    with torch.no_grad():
        served(tokens)  # cuBLAS makes its workspace before a capture
        finish(CUDA)
        graph, captures = torch.cuda.CUDAGraph(), 0
        with replica.reading(), torch.cuda.graph(graph):
            out = served(tokens)
        for version in range(1, 9):
            for parameter in trained.parameters():
                parameter.mul_(1.0 + 0.01 * version)
            update = await publisher.publish()
            while not (await update.wait_applied(timeout_s=0.001)).complete and captures < 2000:
                again = torch.cuda.CUDAGraph()
                with torch.cuda.graph(again), replica.reading():
                    served(tokens)
                captures += 1
            with replica.reading() as held:
                graph.replay()
                found = out.clone()
            assert held == version
            torch.testing.assert_close(found, trained(tokens), rtol=1e-4, atol=1e-5)
    await eventually(lambda: replica.verified == 8, 30.0)
    assert captures
    assert replica.mismatches == 0


# torch's compiler tells what it thinks of float32 products, and of its own past.
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
async def test_a_compiled_module_computes_with_the_new_weights(site: Site) -> None:
    """torch.compile keeps the parameters; its own prefix in their names is nobody's business."""
    trained, served = _module(), _module()
    compiled = torch.compile(served)
    tokens = torch.linspace(-1, 1, 4 * 256, device=CUDA).view(4, 256)
    with torch.no_grad():
        compiled(tokens)
        publisher = await site.publisher(trained, policy=_policy())
        replica = await site.replica(compiled, policy=_policy())
        await publisher.wait_members(1, timeout_s=60)
        for version in (1, 2):
            for parameter in trained.parameters():
                parameter.add_(0.05)
            update = await publisher.publish()
            assert (await update.wait_applied(timeout_s=30)).complete
            with replica.reading() as held:
                found = compiled(tokens)
            assert held == version
            torch.testing.assert_close(found, trained(tokens), rtol=1e-4, atol=1e-4)


async def test_masters_on_the_host_for_weights_on_the_gpu(site: Site) -> None:
    """fp32 masters, offloaded, are diffed where they are and published as bf16; a device given for
    the windows moves nothing."""
    masters = {"a": torch.randn(70_000), "b": torch.randn(300, 40).t()}
    mine = {name: t.to(torch.bfloat16).to(CUDA) for name, t in masters.items()}
    publisher = await site.publisher(
        masters, dtype=torch.bfloat16, device="cuda:0", policy=_policy(window="gloo")
    )
    assert publisher._ports.device == "cuda:0"
    replica = await site.replica(mine, policy=_policy(window="gloo"))
    await publisher.wait_members(1, timeout_s=60)
    for version in range(1, 4):
        for tensor in masters.values():
            tensor.mul_(1.0 + 0.003 * version)
        update = await publisher.publish()
        assert (await update.wait_applied(timeout_s=30)).complete
        published = {name: t.to(torch.bfloat16) for name, t in masters.items()}
        assert same_bits(published, _on_host(mine))
    await eventually(lambda: replica.verified == 3, 30.0)


@pytest.mark.parametrize("room", [1, 1 << 30], ids=["host", "device"])
async def test_staging_on_the_device_is_bounded(site: Site, room: int) -> None:
    """A payload for which the device's staging has no room waits in host memory, and arrives."""
    trained, mine = _on_gpu(weights()), _on_gpu(weights())
    policy = _policy(staging_device_nbytes=room)
    publisher = await site.publisher(trained, policy=policy)
    replica = await site.replica(mine, policy=policy)
    await publisher.wait_members(1, timeout_s=60)
    guard = replica.engine.guard()
    with guard.reading():
        step_cuda(trained, 1)
        await publisher.publish()
        await eventually(lambda: guard._writers_waiting == 1, 30.0)
        (staged,) = replica._incoming._staged.values()
        assert staged.pieces is not None
        ((_, checked),) = staged.pieces
        assert checked.patch.buffer.is_cuda is (room > 1)
        assert replica._incoming._memory.on_device_nbytes == (staged.nbytes if room > 1 else 0)
    await replica.wait_version(1, timeout_s=30)
    await eventually(lambda: replica.verified == 1, 30.0)
    assert replica._incoming._memory.on_device_nbytes == 0
    assert same_bits(_on_host(trained), _on_host(mine))


async def test_a_late_joiner_gets_gpu_weights_from_the_log(site: Site) -> None:
    """Patches and anchor lie in the log; a worker with other weights comes from there."""
    trained = _on_gpu(weights())
    publisher = await site.publisher(trained, policy=_policy())
    for version in range(1, 12):
        step_cuda(trained, version)
        await publisher.publish()
    mine = _on_gpu(weights(seed=9))
    replica = await site.replica(mine, policy=_policy())
    await replica.wait_version(11, timeout_s=60)
    await eventually(lambda: replica.verified == 11, 30.0)
    assert same_bits(_on_host(trained), _on_host(mine))


def test_an_anchor_takes_no_second_copy_on_the_device() -> None:
    """The trainer's memory is one copy of what was published and the patches: an anchor is copied
    to the host in pieces."""
    made: list[int] = []

    def make() -> None:
        weights = {f"w{i}": torch.ones(64 << 20, dtype=torch.uint8, device=CUDA) for i in range(8)}
        outgoing = Outgoing(Choice(weights), clock=time.monotonic)
        outgoing.anchor(1)
        torch.cuda.reset_peak_memory_stats(CUDA)
        before = torch.cuda.memory_allocated(CUDA)
        outgoing.anchor(1)
        made.append(torch.cuda.max_memory_allocated(CUDA) - before)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join(60)
    assert made
    assert made[0] < 128 << 20


@pytest.mark.parametrize("kind", ["gloo", "bus"])
async def test_pieces_of_several_roots_reach_a_gpu(
    site: Site, bus: NatsBus, run: str, kind: Any
) -> None:
    """Two ranks of a trainer send their shares, of tensors of other names and shapes, to a worker
    whose weights are on a GPU: its kernels check and write each, and every version is proven."""
    trained, mine = weights(), _on_gpu(weights())
    async with Trainer(bus, run, Roots(trained, 2), kind) as trainer:
        replica = await site.replica(mine, policy=_policy())
        await trainer.welcome("w0")
        await trainer.open()
        for share in (0.001, 0.3, 1.0):
            await trainer.publish(share)
            assert same_bits(trained, _on_host(mine))
        assert (replica.verified, replica.mismatches) == (3, 0)


@pytest.mark.parametrize("routing", ["broadcast", "all-to-all"])
async def test_two_ranks_of_a_trainer_on_a_gpu(site: Site, routing: Any) -> None:
    """Each diffs its shard by kernels, on one GPU here, and gives its share of the digest; a worker
    of two ranks, which takes whole patches or parts of them, holds and proves what they make up."""
    policy = _policy(window="gloo", routing=routing)
    whole = weights()
    trainers = Trainers(site, whole, split(whole, 2), device="cuda:0")
    publisher = await trainers.start(policy=policy)
    team = Team(site, whole, 2)
    for mine in team.held:
        mine.update(_on_gpu(mine))
    first, _ = await team.start(policy=policy)
    await publisher.wait_members(1, timeout_s=60)
    await eventually(lambda: publisher.window == "gloo", 30.0)
    for version in range(1, 6):
        step(whole, version, 0.4 if version == 3 else 0.02)
        update = await trainers.publish()
        assert (await update.wait_applied(timeout_s=30)).complete
        await eventually(lambda version=version: first.verified == version, 30.0)
        assert same(team.layouts, [_on_host(mine) for mine in team.held], whole)
    assert first.mismatches == 0


def test_weights_that_come_back_to_the_device_are_ordered_from_then_on() -> None:
    """The engine had its weights in host memory at the start: the fence is there once an apply
    finds them on the device."""
    tensors: Tensors = {"w": torch.zeros(1000)}
    engine = ModuleEngine(tensors)
    incoming = Incoming(engine, clock=time.monotonic, guard_s=1.0)
    assert engine.guard().fence is None
    tensors["w"] = tensors["w"].to(CUDA)

    def apply() -> None:
        incoming._order(engine.tensors())
        incoming._order(engine.tensors())

    thread = threading.Thread(target=apply)
    thread.start()
    thread.join(30)
    fence = engine.guard().fence
    assert isinstance(fence, CudaFence)
    assert fence.devices == (CUDA,)


def _role(context: Context, run: str) -> int:
    """Rank 0 trains, rank 1 serves, both on GPU 0; the digest of what they hold in the end."""
    tensors = _on_gpu(weights())
    if context.rank == 0:
        with Publisher(tensors, run=run, bus=context.broker_url, policy=_policy()) as publisher:
            publisher.wait_members(1, timeout_s=60)
            for version in range(1, 21):
                step_cuda(tensors, version)
                update = publisher.publish()
                report = update.wait_applied(timeout_s=30)
                assert report.complete, report
            context.mark("trained")
            context.wait("served", rank=1, timeout_s=60)
            return digest(tensors)
    replica = Replica(tensors, run=run, bus=context.broker_url, name="w0", policy=_policy())
    replica.start()
    try:
        context.wait("trained", rank=0, timeout_s=90)
        deadline = time.monotonic() + 30
        while replica.verified != 20 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert replica.mismatches == 0
        with replica.reading() as version:
            assert version == 20
            found = digest(tensors)
        context.mark("served")
        return found
    finally:
        replica.stop()


def test_two_processes_on_one_gpu(broker: Broker, run: str) -> None:
    """NCCL refuses two ranks on one GPU: twenty rounds go by gloo, and both hold the same bits."""
    one, other = spawn(2, _role, run, timeout_s=120, broker_url=broker.url)
    assert one == other
