"""What a keeper does for its clients, and what it does when they, the driver or others misbehave."""

from __future__ import annotations

import pytest

from rlgov.hardware.clocks import Verdict
from rlgov.hardware.keeper.values import Code, KeeperSettings, Refused
from rlgov.hardware.throttle import SYNC_BOOST
from tests.fakes.keeper import SUPPORTED_MHZ, Bench, KilledError

PAIR = ("GPU-0", "GPU-1")


def refused(bench: Bench, client: int, do: str, **fields: object) -> Refused:
    with pytest.raises(Refused) as caught:
        bench.ask(client, do, **fields)
    return caught.value


def wish(gpus: tuple[str, ...] = PAIR, mhz: int = 1200, ttl_s: float = 3.0) -> dict[str, object]:
    return {"gpus": gpus, "sm_clock_mhz": mhz, "ttl_s": ttl_s}


# ---------------------------------------------------------------------- leases


def test_a_lease_holds_while_it_is_renewed_and_ends_when_it_is_not() -> None:
    bench = Bench()
    lease = bench.lock(1, PAIR, 1300)
    assert (lease.sm_clock_mhz, lease.ttl_s) == (1200, 3.0)  # the highest supported one below
    bench.run_renewing(60, 1)
    assert bench.locks_mhz() == (1200, 1200, None, None)
    bench.run(2.9)
    assert bench.locks_mhz() == (1200, 1200, None, None)
    bench.run(0.2)
    assert bench.locks_mhz() == (None,) * 4
    assert refused(bench, 1, "check").code is Code.LEASE_LOST
    assert refused(bench, 1, "renew").code is Code.LEASE_LOST
    assert bench.lock(1, PAIR, 1400).sm_clock_mhz == 1400  # having been told, it may begin again
    bench.run(3.1)
    assert refused(bench, 1, "lock", **wish()).code is Code.LEASE_LOST
    assert bench.lock(1, PAIR, 1200).sm_clock_mhz == 1200


def test_a_client_that_goes_away_is_missed_at_once() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.keeper.gone(1)
    assert bench.locks_mhz() == (None,) * 4
    assert bench.machine.saved == {}
    assert bench.machine.held == set()


def test_releasing_restores_and_may_be_repeated() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    assert bench.ask(1, "release") == {"open": []}
    assert bench.locks_mhz() == (None,) * 4
    writes = list(bench.machine.writes)
    assert bench.ask(1, "release") == {"open": []}
    assert bench.machine.writes == writes


def test_the_administrators_own_lock_is_restored() -> None:
    bench = Bench(settings=KeeperSettings(restore_clock_mhz=1600))
    bench.lock(1, PAIR, 1200)
    bench.keeper.gone(1)
    assert bench.locks_mhz() == (1600,) * 4


@pytest.mark.parametrize(
    ("asked_mhz", "given_mhz"), [(1000, 1400), (1500, 1400), (1700, 1600), (5000, 1800), (1999, 1800)]
)
def test_the_administrators_bounds_hold_whatever_is_asked(asked_mhz: int, given_mhz: int) -> None:
    bench = Bench(settings=KeeperSettings(floor_mhz=1300, ceiling_mhz=1900))
    assert bench.lock(1, PAIR, asked_mhz).sm_clock_mhz == given_mhz
    assert bench.ask(1, "describe", gpus=PAIR)["supported_mhz"] == [1800, 1600, 1400]
    assert set(bench.machine.writes) == {("GPU-0", given_mhz), ("GPU-1", given_mhz)}


@pytest.mark.parametrize(("asked_s", "given_s"), [(0.01, 1.0), (3.0, 3.0), (3600.0, 10.0)])
def test_a_lease_lives_within_bounds(asked_s: float, given_s: float) -> None:
    bench = Bench()
    assert bench.lock(1, PAIR, 1200, asked_s).ttl_s == given_s
    bench.run(given_s + 0.1)
    assert bench.locks_mhz() == (None,) * 4


def test_one_lease_a_gpu_and_one_group_a_connection() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    taken = refused(bench, 2, "lock", **wish(("GPU-1", "GPU-2")))
    assert (taken.code, taken.gpus) == (Code.TAKEN, ("GPU-1",))
    assert "process 1001" in taken.message
    assert bench.locks_mhz() == (1200, 1200, None, None)
    assert refused(bench, 1, "lock", **wish(("GPU-0",))).code is Code.WRONG_GROUP
    bench.lock(2, ("GPU-2", "GPU-3"), 1400)
    assert bench.locks_mhz() == (1200, 1200, 1400, 1400)
    bench.keeper.gone(1)
    assert bench.locks_mhz() == (None, None, 1400, 1400)


def test_what_another_process_claims_is_not_leased() -> None:
    bench = Bench()
    bench.machine.held_elsewhere.add("GPU-1")
    no = refused(bench, 1, "lock", **wish())
    assert no.code is Code.TAKEN
    assert "rlgov, process 1" in no.message
    assert bench.machine.writes == []
    assert bench.machine.held == set()
    assert bench.phase("GPU-0") == "free"


def test_who_asks_for_nonsense_gets_a_reason() -> None:
    bench = Bench()
    assert refused(bench, 1, "lock", **wish(())).code is Code.UNKNOWN_GPU
    assert refused(bench, 1, "lock", **wish(("GPU-0", "GPU-0"))).code is Code.UNKNOWN_GPU
    assert refused(bench, 1, "lock", **wish(("GPU-9",))).code is Code.UNKNOWN_GPU
    assert refused(bench, 1, "lock", **wish(mhz=900)).code is Code.NO_CLOCK
    assert refused(bench, 1, "renew").code is Code.NO_LEASE
    assert refused(bench, 1, "check").code is Code.NO_LEASE
    assert bench.machine.writes == []


def test_partitioned_gpus_are_refused_also_when_that_came_later() -> None:
    bench = Bench()
    bench.machine.gpus["GPU-1"].refusal = "GPU-1 is in MIG mode"
    no = refused(bench, 1, "lock", **wish())
    assert (no.code, no.message) == (Code.NOT_ALLOWED, "GPU-1 is in MIG mode")
    bench.start()
    assert refused(bench, 1, "lock", **wish()).code is Code.NOT_ALLOWED
    assert refused(bench, 1, "describe", gpus=PAIR).code is Code.NOT_ALLOWED
    assert bench.machine.writes == []
    bench.lock(1, ("GPU-2",), 1200)


def test_a_lock_changes_only_so_often_and_a_repeated_one_is_no_write() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.lock(1, PAIR, 1250)
    assert len(bench.machine.writes) == 2
    assert refused(bench, 1, "lock", **wish(mhz=1400)).code is Code.TOO_SOON
    bench.run(0.2)
    assert bench.lock(1, PAIR, 1400).sm_clock_mhz == 1400
    assert len(bench.machine.writes) == 4


def test_to_be_refused_for_haste_renews_the_lease() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200, 1.0)
    for number in range(20):
        bench.run(0.15)
        try:
            bench.lock(1, PAIR, 1400 if number % 2 else 1600, 1.0)
        except Refused as no:
            assert no.code is Code.TOO_SOON  # noqa: PT017  # only some are refused
    assert None not in bench.locks_mhz()[:2]


def test_suspending_the_host_counts_against_the_lease() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.clock.advance_s(3600)  # no tick in between: everything stood still
    bench.keeper.tick()
    assert bench.locks_mhz() == (None,) * 4


def test_a_jump_of_the_wall_clock_changes_nothing() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    for by_s in (3600.0, -7200.0):
        bench.clock.step_wall_s(by_s)
        bench.run_renewing(2, 1)
        assert bench.locks_mhz() == (1200, 1200, None, None)


# ---------------------------------------------------------------------- groups


@pytest.mark.parametrize("broken", range(4))
@pytest.mark.parametrize("locked_before", [False, True])
def test_a_group_is_locked_whole_or_not_at_all(broken: int, *, locked_before: bool) -> None:
    bench = Bench()
    if locked_before:
        bench.lock(1, bench.uuids, 1600)
        bench.run(0.2)
    before_mhz = bench.locks_mhz()
    gpu = bench.machine.gpus[f"GPU-{broken}"]
    gpu.write_fault = "UNKNOWN"
    no = refused(bench, 1, "lock", **wish(bench.uuids))
    assert no.code is Code.DRIVER
    assert "UNKNOWN" in no.message
    gpu.write_fault = ""
    bench.run(1.0)
    # Where the faulty GPU could be put back, all are as before; else the whole group was restored.
    assert bench.locks_mhz() in {before_mhz, (None,) * 4}
    assert len(set(bench.locks_mhz())) == 1


def test_a_gpu_that_does_not_answer_after_the_lock_undoes_the_group() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1600)
    bench.run(0.2)
    bench.machine.gpus["GPU-1"].fault = "TIMEOUT"
    assert refused(bench, 1, "lock", **wish()).code is Code.DRIVER
    assert bench.machine.gpus["GPU-0"].lock_mhz is None
    assert bench.phase("GPU-1") == "restoring"
    bench.machine.gpus["GPU-1"].fault = ""
    bench.run(1.0)
    assert bench.locks_mhz() == (None,) * 4


def test_a_lost_gpu_ends_the_lease_of_its_group() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    bench.machine.gpus["GPU-1"].fault = "GPU_IS_LOST"
    bench.run(0.3)
    assert bench.machine.gpus["GPU-0"].lock_mhz is None
    assert "GPU-1 is lost" in refused(bench, 1, "renew").message
    lost = next(gpu for gpu in bench.state().gpus if gpu.uuid == "GPU-1")
    assert (lost.phase, lost.lost) == ("restoring", True)
    assert refused(bench, 2, "lock", **wish()).code is Code.RESTORING
    bench.lock(2, ("GPU-0",), 1200)  # alone it may be governed
    bench.machine.gpus["GPU-1"].fault = ""  # after a reboot of the GPU, say
    bench.run(15)
    assert bench.phase("GPU-1") == "free"


def test_without_room_to_save_nothing_is_locked() -> None:
    bench = Bench()
    bench.machine.full = True
    assert refused(bench, 1, "lock", **wish()).code is Code.CANNOT_SAVE
    assert bench.machine.writes == []
    assert bench.phase("GPU-0") == "free"
    bench.machine.full = False
    bench.lock(1, PAIR, 1600)
    bench.run(0.3)
    bench.machine.full = True
    assert refused(bench, 1, "lock", **wish()).code is Code.CANNOT_SAVE
    assert bench.locks_mhz() == (1600, 1600, None, None)
    bench.keeper.gone(1)
    assert bench.locks_mhz() == (None,) * 4


# ---------------------------------------------------------------------- restoring


def test_a_restore_that_fails_is_tried_until_it_succeeds() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.machine.gpus["GPU-1"].write_fault = "NO_PERMISSION"
    assert bench.ask(1, "release") == {"open": ["GPU-1"]}
    bench.run(120)
    (stuck,) = (gpu for gpu in bench.state().gpus if gpu.phase == "restoring")
    assert "NO_PERMISSION" in stuck.why
    assert 10 < stuck.attempts < 40  # with growing pauses
    assert bench.machine.saved.keys() == {"GPU-1"}
    bench.machine.gpus["GPU-1"].write_fault = ""
    bench.run(10.1)
    assert bench.locks_mhz() == (None,) * 4
    assert bench.machine.saved == {}
    assert [note for note in bench.said if note.grave and "GPU-1" in note.text]


def test_stopping_restores_and_leases_nothing_more() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    assert bench.keeper.stop(10.0)
    assert bench.locks_mhz() == (None,) * 4
    assert refused(bench, 2, "lock", **wish()).code is Code.STOPPING


def test_stopping_gives_up_after_a_while_and_says_so() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.machine.gpus["GPU-0"].write_fault = "UNKNOWN"
    assert not bench.keeper.stop(10.0)
    assert bench.keeper.restoring == ("GPU-0",)
    bench.machine.gpus["GPU-0"].write_fault = ""
    bench.start()
    assert bench.keeper.recover(10.0)
    assert bench.locks_mhz() == (None,) * 4


@pytest.mark.parametrize("confirmed", [False, True])
def test_a_new_keeper_restores_what_the_old_one_left(*, confirmed: bool) -> None:
    bench = Bench(settings=KeeperSettings(restore_clock_mhz=1800))
    bench.lock(1, PAIR, 1200)
    if confirmed:
        bench.run(0.5)
        assert bench.machine.saved["GPU-0"].confirmed
    bench.settings = KeeperSettings()  # what was found then counts, not what is said now
    bench.start()
    assert bench.keeper.recover(10.0)
    assert bench.locks_mhz() == (1800,) * 4
    assert bench.machine.saved == {}


def test_a_keeper_that_dies_at_any_call_leaves_enough_for_the_next() -> None:
    deaths = 0
    for calls in range(1, 200):
        bench = Bench()
        bench.machine.dies_in = calls
        try:
            bench.lock(1, PAIR, 1600)
            bench.run_renewing(1, 1)
            bench.lock(1, PAIR, 1200)
            bench.run_renewing(1, 1)
            bench.keeper.gone(1)
        except KilledError:
            deaths += 1
        bench.start()
        assert bench.keeper.recover(10.0)
        assert bench.locks_mhz() == (None,) * 4, calls
        assert bench.machine.saved == {}, calls
        assert bench.phase("GPU-0") == "free", calls
    assert deaths > 40


def test_a_new_keeper_waits_for_who_holds_the_gpu() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.start()
    bench.machine.held_elsewhere.add("GPU-0")
    assert not bench.keeper.recover(1.0)
    assert bench.locks_mhz() == (1200, None, None, None)
    bench.machine.held_elsewhere.clear()
    bench.run(10)
    assert bench.locks_mhz() == (None,) * 4


# ---------------------------------------------------------------------- verifying


@pytest.mark.parametrize("theirs_mhz", [None, 1800, 1000])
def test_somebody_elses_change_is_left_alone(theirs_mhz: int | None) -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    for uuid in PAIR:
        bench.machine.foreign(uuid, theirs_mhz)
    writes = list(bench.machine.writes)
    bench.run(2.0)
    assert bench.machine.writes == writes
    assert bench.locks_mhz() == (theirs_mhz, theirs_mhz, None, None)
    no = refused(bench, 1, "renew")
    assert (no.code, no.gpus) == (Code.FOREIGN_WRITER, PAIR)
    assert bench.phase("GPU-0") == bench.phase("GPU-1") == "yielded"
    assert refused(bench, 1, "lock", **wish()).code is Code.FOREIGN_WRITER
    assert refused(bench, 2, "lock", **wish(("GPU-1",))).code is Code.FOREIGN_WRITER
    bench.start()  # and the next keeper knows
    assert bench.keeper.recover(10.0)
    assert refused(bench, 1, "lock", **wish()).code is Code.FOREIGN_WRITER
    assert bench.ask(3, "rearm", gpus=("GPU-1", "GPU-0")) == {"rearmed": ["GPU-1", "GPU-0"]}
    assert bench.lock(1, PAIR, 1200).sm_clock_mhz == 1200


def test_only_the_gpu_that_was_changed_is_left_alone() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    bench.machine.foreign("GPU-1", 1600)
    bench.run(2.0)
    assert bench.locks_mhz() == (None, 1600, None, None)
    assert refused(bench, 1, "renew").gpus == ("GPU-1",)
    bench.lock(2, ("GPU-0",), 1200)


def test_a_change_between_two_checks_is_not_overwritten_by_a_restore() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    bench.machine.foreign("GPU-0", 1600)
    bench.keeper.gone(1)
    assert bench.phase("GPU-0") == "restoring"
    assert bench.ask(2, "release") == {"open": []}
    bench.run(2.0)
    assert bench.locks_mhz() == (1600, None, None, None)
    assert bench.phase("GPU-0") == "yielded"


def test_a_new_keeper_does_not_overwrite_a_change_either() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    bench.machine.foreign("GPU-0", 1600)
    bench.start()
    assert bench.keeper.recover(10.0)
    assert bench.locks_mhz() == (1600, None, None, None)
    assert bench.phase("GPU-0") == "yielded"


def test_a_lock_under_suspicion_is_not_written_over() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    bench.machine.foreign("GPU-0", 1600)
    bench.run(0.3)
    assert refused(bench, 1, "lock", **wish(mhz=1400)).code is Code.TOO_SOON
    assert bench.locks_mhz() == (1600, 1200, None, None)


def test_one_odd_measurement_is_no_change() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(2, 1)
    gpu = bench.machine.gpus["GPU-0"]
    for _ in range(5):
        gpu.lock_mhz = 1800
        bench.run_renewing(0.3, 1)
        gpu.lock_mhz = 1200
        bench.run_renewing(0.6, 1)
    assert bench.phase("GPU-0") == "leased"


def test_a_driver_that_ignores_locks_is_given_up_and_left_in_peace() -> None:
    bench = Bench()
    bench.machine.gpus["GPU-1"].ignores = True
    bench.lock(1, PAIR, 1200)
    bench.run(2.0)
    assert bench.locks_mhz() == (None,) * 4
    assert "does not hold it" in refused(bench, 1, "renew").message
    assert refused(bench, 2, "lock", **wish()).code is Code.SUSPENDED
    assert "ignored" in bench.why("GPU-1")
    bench.run(15.0)
    bench.lock(2, PAIR, 1200)
    bench.run(2.0)
    bench.run(16.0)
    assert refused(bench, 3, "lock", **wish()).code is Code.SUSPENDED  # longer than the first time
    bench.ask(3, "rearm", gpus=())
    bench.machine.gpus["GPU-1"].ignores = False
    bench.lock(3, PAIR, 1200)
    bench.run_renewing(5, 3)
    assert bench.locks_mhz() == (1200, 1200, None, None)


@pytest.mark.parametrize("why", ["cap", "sync", "idle"])
def test_what_explains_a_lower_clock_is_no_fault(why: str) -> None:
    bench = Bench()
    gpu = bench.machine.gpus["GPU-0"]
    bench.lock(1, PAIR, 1800)
    bench.run_renewing(1, 1)
    if why == "cap":
        gpu.cap_mhz = 1100
    elif why == "sync":
        gpu.lock_mhz, gpu.reasons = 1500, frozenset({SYNC_BOOST})
    else:
        gpu.lock_mhz, gpu.busy = None, False
    bench.run_renewing(20, 1)
    assert bench.phase("GPU-0") == "leased"
    verdict = bench.check(1).gpus[0].verdict
    assert verdict is (Verdict.IDLE if why == "idle" else Verdict.EXCUSED)


def test_a_gpu_that_cannot_be_measured_is_restored() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(1, 1)
    bench.machine.gpus["GPU-1"].fault = "TIMEOUT"
    bench.run_renewing(0.4, 1)
    assert bench.check(1).gpus[1].verdict is Verdict.UNVERIFIED
    bench.run(1.0)
    assert bench.machine.gpus["GPU-0"].lock_mhz is None
    assert "cannot be measured" in refused(bench, 1, "renew").message


def test_the_administrator_takes_everything_back() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(1, 1)
    assert bench.ask(2, "restore_all") == {"open": []}
    assert bench.locks_mhz() == (None,) * 4
    assert refused(bench, 1, "renew").code is Code.LEASE_LOST
    assert "administrator" in refused(bench, 3, "lock", **wish()).message
    assert refused(bench, 3, "lock", **wish(("GPU-3",))).code is Code.FOREIGN_WRITER
    bench.ask(3, "rearm", gpus=())
    bench.lock(3, bench.uuids, 1200)


def test_the_account_names_everything_that_happens() -> None:
    bench = Bench()
    bench.lock(1, PAIR, 1200)
    bench.run_renewing(1, 1)
    bench.machine.foreign("GPU-1", None)
    bench.run(5)
    counts = bench.state().counts
    assert counts["leases"] == counts["locks"] == counts["foreign"] == 1
    assert {gpu.uuid: str(gpu.phase) for gpu in bench.state().gpus} == {
        "GPU-0": "free", "GPU-1": "yielded", "GPU-2": "free", "GPU-3": "free",
    }  # fmt: skip
    assert bench.state().gpus[0].supported_mhz == SUPPORTED_MHZ
