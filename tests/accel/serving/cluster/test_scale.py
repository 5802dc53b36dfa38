"""How many replicas fit, and what each of them gets."""

import pytest

from accel.errors import UserError
from accel.serving.cluster.scale import Scale

CPUS, GPUS = [{"CPU": 16.0}, {"CPU": 16.0}], [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]


@pytest.mark.parametrize("text", ["0", "2-1", "x", "-1", "1-", "1.5"])
def test_what_is_no_number_of_replicas_is_refused(text):
    with pytest.raises(UserError, match="invalid replicas"):
        Scale.of(text, None, None)


@pytest.mark.parametrize("gpus", [-1.0, 1.5, float("nan"), float("inf")])
def test_a_share_of_gpus_is_below_one_or_whole(gpus):
    with pytest.raises(UserError, match="invalid GPUs"):
        Scale.of("1", None, gpus)


def test_cores_are_shared_out_and_gpus_are_used_where_there_are_any():
    assert Scale.of("4", None, None).settled(CPUS, 1, None) == Scale(4, 4, 8.0, 0.0)
    assert Scale.of("4", None, None).settled(CPUS, 2, None) == Scale(4, 4, 4.0, 0.0)
    assert Scale.of("1-4", None, None).settled(GPUS, 1, None) == Scale(1, 4, 4.0, 1.0)
    assert Scale.of("1", None, None).settled(GPUS, 1, "cpu").gpus == 0
    assert Scale.of("64", None, None).settled(CPUS, 1, None).cpus == 1  # too many, which `missing` says


def test_shares_of_a_gpu_lie_on_one_gpu():
    assert Scale(1, 1, 1.0, 0.5).room(GPUS) == 6
    assert Scale(1, 1, 1.0, 0.4).room(GPUS) == 6  # two on each, not three on two
    assert Scale(1, 1, 1.0, 2.0).room(GPUS) == 1
    assert Scale(1, 1, 4.0, 0.0).room(GPUS) == 4
    assert "6 replicas of 1 cores and 1 GPUs do not fit: there is room for 3" in Scale(6, 6, 1.0, 1.0).missing(GPUS, 1)
    assert Scale(3, 9, 1.0, 1.0).missing(GPUS, 1) == "" != Scale(3, 9, 1.0, 1.0).missing(GPUS, 2)


def test_a_range_of_replicas_goes_by_the_orders_that_fill_a_call():
    auto = Scale(1, 4, 2.0, 0.5).options(8)
    assert auto["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    assert auto["ray_actor_options"] == {"num_cpus": 2.0, "num_gpus": 0.5} and "num_replicas" not in auto
    assert Scale(3, 3, 1.0, 0.0).options(8)["num_replicas"] == 3
