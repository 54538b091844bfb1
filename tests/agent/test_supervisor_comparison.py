"""Plans beside the engine's log: what is compared with what, and what is made of the difference."""

from typing import ClassVar

import pytest
from msgspec.structs import replace
from sollol.correction import UNCORRECTED, Correction
from sollol.report import BackendEndpoint, CoordinatorPlan, DeviceShare

from agent.supervisor.buffers import MIB, Buffers
from agent.supervisor.comparison import Sizes, correction_between, logged_sizes, with_logged

OURS = "node-1"


def share(device_id: str = "CPU", layers: int = 0, node_id: str = "", sizes: tuple[int, int, int] = (0, 0, 0)):
    weights, kv, compute = sizes
    return DeviceShare(
        device_id=device_id, layers=layers, node_id=node_id, weight_bytes=weights, kv_bytes=kv, compute_bytes=compute
    )


def plan_of(*shares: DeviceShare, backends: tuple[BackendEndpoint, ...] = ()) -> CoordinatorPlan:
    return CoordinatorPlan(model="m", parallel=1, context_per_slot=512, shares=shares, backends=backends)


def logged(weights: int, kv: int, compute: int, *, least: int | None = None) -> Sizes:
    least = weights if least is None else least
    return Sizes(least_weights=least, most_weights=weights, kv=kv, compute=compute)


class TestWhatTheLogSays:
    SPLIT = plan_of(
        share(),
        share("CUDA0", 2),
        share("CPU", 3, "node-2"),
        share("CUDA0", 4, "node-2"),
        share("CPU", 5, OURS),
        backends=(
            BackendEndpoint(node_id="node-2", host="10.0.0.2", port=7500, device_ids=("CPU", "CUDA0")),
            BackendEndpoint(node_id=OURS, host="10.0.0.1", port=7501, device_ids=("CPU",)),
        ),
    )
    FOUND: ClassVar = {
        "CPU": Buffers(mapped=8, compute=1, output=2),
        "CUDA0": Buffers(model=20, kv=3, compute=4),
        "10.0.0.2:7500": Buffers(model=30, kv=5, compute=6),
        "10.0.0.2:7500/1": Buffers(model=40, kv=7, compute=8),
        "10.0.0.1:7501": Buffers(model=50, kv=9, compute=10),
    }

    def test_each_share_finds_its_device_own_and_lent_by_the_backends_addresses(self):
        assert logged_sizes(self.SPLIT, self.FOUND, OURS) == (
            logged(8, 0, 3, least=0),
            logged(20, 3, 4),
            logged(30, 5, 6),
            logged(40, 7, 8),
            logged(50, 9, 10),
        )

    @pytest.mark.parametrize("device", FOUND)
    def test_a_log_that_lost_a_line_says_nothing_at_all(self, device):
        without = {name: buffers for name, buffers in self.FOUND.items() if name != device}
        half = self.FOUND | {device: Buffers(model=5)}

        assert logged_sizes(self.SPLIT, without, OURS) == ()
        assert logged_sizes(self.SPLIT, half, OURS) == ()

    def test_a_device_that_holds_nothing_is_not_missed(self):
        plan = plan_of(share(layers=9), share("CUDA0", 0))

        assert logged_sizes(plan, {"CPU": Buffers(mapped=5, compute=1)}, OURS) == (logged(5, 0, 1), None)

    def test_of_a_model_on_one_cpu_the_mapped_file_is_its_weights(self):
        (sizes,) = logged_sizes(plan_of(share(layers=9)), {"CPU": Buffers(mapped=50, compute=1)}, OURS)

        assert sizes.weights(40) == sizes.weights(60) == 50

    def test_beside_other_devices_or_a_repacked_copy_it_is_a_bound(self):
        beside = logged_sizes(plan_of(share(layers=5), share("CUDA0", 4)), self.FOUND, OURS)[0]
        (repacked,) = logged_sizes(plan_of(share(layers=9)), {"CPU": Buffers(mapped=50, model=30, compute=1)}, OURS)

        assert [beside.weights(size) for size in (3, 8, 9)] == [3, 8, 8]
        assert [repacked.weights(size) for size in (20, 40, 90)] == [30, 40, 80]

    def test_what_was_logged_stands_beside_each_share(self):
        shares = with_logged((share(layers=5, sizes=(10, 2, 1)), share("CUDA0", 0)), (logged(12, 2, 1, least=0), None))

        assert [each.logged_bytes for each in shares] == [13, None]


class TestTheCorrection:
    PREDICTED = (share(sizes=(8 * MIB, 0, 4 * MIB)), share("CPU", 9, "n", (100 * MIB, 40 * MIB, 20 * MIB)))

    def found(self, *factors: float, predicted: tuple[DeviceShare, ...] = PREDICTED) -> tuple[Sizes, ...]:
        weights, kv, compute = factors
        return tuple(
            logged(round(each.weight_bytes * weights), round(each.kv_bytes * kv), round(each.compute_bytes * compute))
            for each in predicted
        )

    def test_what_the_logs_rounding_explains_is_no_error(self):
        rounded = tuple(
            replace(each, kv=each.kv + MIB // 200, compute=each.compute - MIB // 200) for each in self.found(1, 1, 1)
        )

        assert correction_between(self.PREDICTED, rounded) == UNCORRECTED

    @pytest.mark.parametrize("factors", [(1.2, 1.2, 1.2), (1.0, 1.5, 1.0), (0.8, 1.0, 1.3), (0.5, 0.25, 0.75)])
    def test_an_error_in_proportion_is_a_factor_by_kind(self, factors):
        correction = correction_between(self.PREDICTED, self.found(*factors))

        assert (correction.weights, correction.kv, correction.compute) == pytest.approx(factors, rel=1e-6)
        assert correction.added_bytes < 10

    def test_an_error_on_one_device_only_is_made_up_for_in_bytes(self):
        host, lent = self.found(1, 1, 1)
        correction = correction_between(self.PREDICTED, (replace(host, compute=host.compute + 6 * MIB), lent))

        assert correction.compute == pytest.approx(30 / 24)
        assert correction.added_bytes == 5 * MIB  # 10 MiB of 4 predicted, which the factor makes 5

    def test_memory_of_a_kind_that_was_not_predicted_at_all_is_made_up_for_too(self):
        predicted = (share(layers=9, sizes=(100 * MIB, 0, 20 * MIB)),)
        found = self.found(1, 1, 1, predicted=predicted)

        assert correction_between(predicted, (replace(found[0], kv=7 * MIB),)) == Correction(added_bytes=7 * MIB)

    def test_no_device_is_given_less_than_was_logged_whatever_the_error(self):
        for at in range(200):
            found = tuple(
                logged(MIB * (at * 7 % 150), MIB * (at * 5 % 60), MIB * (1 + (at + number) * 3 % 40))
                for number in range(2)
            )
            by = correction_between(self.PREDICTED, found)
            for each, sizes in zip(self.PREDICTED, found, strict=True):
                given = each.weight_bytes * by.weights + each.kv_bytes * by.kv + each.compute_bytes * by.compute
                assert given + by.added_bytes + 4 * MIB // 100 >= sizes.total(each)

    def test_a_log_of_nothing_corrects_nothing(self):
        assert correction_between(self.PREDICTED, (None, None)) == UNCORRECTED
