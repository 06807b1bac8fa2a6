"""What `mla-jax bench paged --profile` makes of a trace; the trace itself needs a GPU."""

import pytest

from mla_jax.bench.profile import Stage, stages
from mla_jax.cli.main import main
from pallas_kernels.paged_attention.mosaic_gpu import MosaicTiles, role_names


def events(thread: int, *named: tuple[str, float, float]) -> list[dict]:
    return [
        {"name": name, "ph": phase, "ts": at, "pid": 1, "tid": thread}
        for name, begin, end in named
        for phase, at in (("B", begin), ("E", end))
    ]


def test_stages_are_counted_by_warpgroup(rng):
    """Of both blocks: threads 1 and 4 are the first warpgroups of blocks of three."""
    roles = ("scores", "values", "producer")
    begin, first, second = rng.uniform(0, 9, 3).tolist()
    trace = [
        *events(1, ("wait", begin, begin + first)),
        *events(4, ("wait", 1, 1 + second), ("wait", 30, 30)),
        *events(6, ("copy", 2, 2.5)),
    ]
    times = sorted([0.0, first, second])
    (scores, producer) = sorted(stages(trace, roles), key=lambda stage: stage.role)[::-1]
    assert producer == Stage("producer", "copy", 1, 0.5, 0.5, 0.5)
    assert scores[:3] == ("scores", "wait", 3)
    assert scores[3:] == pytest.approx((times[1], times[2], first + second))


def test_a_stage_within_a_stage(rng):
    inner = float(rng.uniform(1, 2))
    outer, *rest = events(1, ("outer", 0, 9))
    trace = [outer, *events(1, ("inner", 3, 3 + inner)), *rest]
    assert [(s.name, s.total) for s in stages(trace, ("only",))] == [
        ("inner", pytest.approx(inner)),
        ("outer", 9),
    ]


def test_roles_of_both_schedules():
    line, seesaw = (role_names(MosaicTiles(cluster=1, order=o)) for o in ("line", "seesaw"))
    assert line == ("scores", "values 0", "values 1", "producer")
    assert seesaw == ("consumer 0", "consumer 1", "producer")


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("/no/such/folder", "profile: /no/such/folder is not a folder"),
        (".", "profile: needs a Hopper"),
    ],
)
def test_a_mistake_is_one_line(capsys, folder, words):
    assert main(["bench", "paged", "--shapes", "B1-h16-s1024", "--profile", folder]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1
