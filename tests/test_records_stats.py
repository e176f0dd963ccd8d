"""Significance: the Welch test against known values, the published p-values of the leaderboard, both rules."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from records import stats
from records.stats import Side, t_upper, welch

# per-seed BPB as printed in the logs of the accepted records
PR1493 = [1.08079352, 1.08103103, 1.08118408]
PR1514 = [1.07928348, 1.07996676, 1.08024795]
PR1736 = [1.06610085, 1.06473025, 1.06562743]
PR1868 = [1.06248776, 1.06090748, 1.06083288]
PR1855 = [1.05989454, 1.06124613, 1.06208695]
PR1769 = [1.06356801, 1.0641313, 1.06466993, 1.06509678, 1.06516558]


def test_the_t_distribution_has_its_textbook_values():
    # quantiles from printed tables: P(T > t) for t and degrees of freedom
    for t, df, p in ((6.314, 1, 0.05), (2.920, 2, 0.05), (4.541, 3, 0.01), (1.812, 10, 0.05), (2.326, 1e9, 0.01)):
        assert t_upper(t, df) == pytest.approx(p, rel=2e-3)
    assert (
        t_upper(0.0, 3.3) == pytest.approx(0.5, abs=1e-9)
        and t_upper(math.inf, 2) == 0.0
        and t_upper(-math.inf, 2) == 1.0
    )
    assert t_upper(1.0, 1.0) == pytest.approx(0.25, abs=1e-12)  # exact: the Cauchy distribution


@given(st.floats(0, 50), st.sampled_from([1, 1.3, 2, 2.5, 4, 50]))
def test_p_falls_with_t_and_matches_what_is_known_in_closed_form(t, df):
    assert 0 <= t_upper(t + 0.1, df) < t_upper(t, df) <= 0.5 + 1e-9
    assert t_upper(t, 1) == pytest.approx(math.atan2(1, t) / math.pi, rel=1e-9)
    root = math.sqrt(2 + t * t)
    assert t_upper(t, 2) == pytest.approx(1 / (root * (root + t)), rel=1e-9)  # (1 - t / root) / 2, without cancelling


def test_published_p_values_are_reproduced():
    assert welch(PR1493, PR1514).p == pytest.approx(0.0203, abs=5e-5)
    assert welch(PR1736, PR1769).p == pytest.approx(0.0626, abs=5e-5)
    assert welch(PR1736, [*PR1769, 1.06540571, 1.06534272]).p == pytest.approx(0.106, abs=5e-4)  # with the two left out
    assert welch(PR1868, PR1855).p == pytest.approx(0.355, abs=5e-4)


def test_the_written_rule_wants_more_than_the_applied_one():
    nats = math.log(2) * 3.726631
    old, new, far = (Side("", bpb, [b * nats for b in bpb]) for bpb in (PR1493, PR1514, [b - 0.01 for b in PR1493]))
    assert stats.tested(old, new)["practice"] and stats.tested(old, new)["readme"] is False
    assert stats.tested(old, far)["readme"]


def test_a_worse_record_is_never_significant():
    worse = stats.tested(Side("", PR1514, []), Side("", PR1493, []))
    assert not worse["practice"] and worse["p"] > 0.97


def test_one_seed_is_no_test():
    with pytest.raises(ValueError, match="two values on each side, got 1 and 3"):
        welch([1.0], PR1493)


def test_equal_constants_have_no_evidence_either_way():
    assert welch([1.0, 1.0], [1.0, 1.0]).p == pytest.approx(0.5, abs=1e-9)
    assert welch([1.0, 1.0], [0.9, 0.9]).p == 0.0
