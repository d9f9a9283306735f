"""The cost model against hand-made time lines, and its limits: no network, one rank, an endless link."""

from __future__ import annotations

import pytest

from lightning_distopt.advice import CANDIDATES, Candidate, CodecSpeed, Link, Workload, crossover, predict, rank_methods
from lightning_distopt.advice.choice import decide
from lightning_distopt.advice.cost_model import cut, low_rank_numel

DENSE = Candidate("fp32", "fp32", "gradients")
HALF = Candidate("bf16", "bf16", "gradients")
SIGN = Candidate("sign", "sign", "updates")
FREE = CodecSpeed(0.0, 0.0)
NUMEL = 8_000_000  # 32 MB


def test_one_bucket_of_gradients_waits_for_its_all_reduce() -> None:
    work, link = Workload(NUMEL, 0.1, 0.2), Link(1e8, 0.001)
    found = predict(DENSE, work, link, FREE, 4)
    network = 6 * 0.001 + 2 * 32e6 * 3 / 4 / 1e8
    assert found.seconds == pytest.approx(0.1 + 0.2 + network)
    assert (found.exchange, found.nbytes) == ("all_reduce", 2 * 32e6 * 3 / 4)


def test_buckets_hide_the_network_behind_backward() -> None:
    # forward 0.1; backward 0.05 a bucket; 0.03 on the network each: only the last one shows
    work = Workload(NUMEL, 0.1, 0.2, buckets=4)
    link = Link(8e6 / 0.03, 0.0)  # two ranks: 8 MB a bucket in all
    assert predict(DENSE, work, link, FREE, 2).seconds == pytest.approx(0.1 + 0.2 + 0.03)


def test_a_network_slower_than_backward_is_a_queue() -> None:
    # the first bucket is ready at 0.15; four of 0.1 follow one another
    work = Workload(NUMEL, 0.1, 0.2, buckets=4)
    assert predict(DENSE, work, Link(8e6 / 0.1, 0.0), FREE, 2).seconds == pytest.approx(0.15 + 4 * 0.1)


def test_updates_are_encoded_while_the_bucket_before_travels() -> None:
    # ready at 0.3; encode 0.02 each; 0.05 on the network each, from 0.32 on; decode 2 payloads of 0.01
    work = Workload(NUMEL, 0.1, 0.2, buckets=2)
    payload = SIGN.compressor.nbytes(NUMEL) / 2
    codec = CodecSpeed(0.02 / (NUMEL / 2), 0.005 / (NUMEL / 2))
    found = predict(SIGN, work, Link(payload / 0.05, 0.0), codec, 2)
    # network 0.32 to 0.37 and 0.37 to 0.42; decoding starts at 0.37 and at 0.42
    assert found.seconds == pytest.approx(0.42 + 2 * 0.005)
    assert found.exchange == "all_gather"


def test_one_rank_sends_nothing() -> None:
    found = predict(SIGN, Workload(NUMEL, 0.1, 0.2), Link(1.0, 1.0), CodecSpeed(1.0, 1.0), 1)
    assert (found.seconds, found.nbytes) == (pytest.approx(0.3), 0)


def test_a_server_shared_by_all_sends_as_much_on_any_number_of_ranks() -> None:
    work, link = Workload(NUMEL, 0.1, 0.2), Link(1e9, 1e-6)
    sent = [predict(SIGN, work, link, CodecSpeed(0, 1e-9), world).nbytes for world in (16, 256, 4096)]
    assert max(sent) / min(sent) < 1.07
    assert predict(SIGN, work, link, CodecSpeed(0, 1e-9), 4096).exchange == "sharded_server"


def test_an_endless_link_leaves_the_codec() -> None:
    work, codec = Workload(NUMEL, 0.1, 0.2), CodecSpeed(1e-9, 2e-9)
    assert predict(HALF, work, Link(1e18, 0.0), codec, 2).seconds == pytest.approx(0.3 + 3e-9 * NUMEL)


def test_the_crossover_is_where_both_are_equal() -> None:
    work, codecs = Workload(NUMEL, 0.1, 0.2), {"sign": CodecSpeed(2e-9, 1e-9), "bf16": CodecSpeed(1e-9, 1e-9)}
    limit = crossover(SIGN, HALF, work, Link(1.0, 1e-4), codecs, 2)
    ours, theirs = (predict(c, work, Link(limit, 1e-4), codecs[c.text], 2).seconds for c in (SIGN, HALF))
    assert ours == pytest.approx(theirs, rel=1e-6)
    for bandwidth, pays in ((limit / 2, True), (limit * 2, False)):
        ours, theirs = (predict(c, work, Link(bandwidth, 1e-4), codecs[c.text], 2).seconds for c in (SIGN, HALF))
        assert (ours < theirs) is pays


def test_what_is_never_faster_has_no_crossover() -> None:
    codecs = {"fp32": FREE, "bf16": FREE}
    assert crossover(DENSE, HALF, Workload(NUMEL, 0.1, 0.2), Link(1.0, 1e-4), codecs, 2) == 0


def test_what_sends_more_in_fewer_messages_is_faster_above_a_bandwidth() -> None:
    work, link = Workload(25_000_000, 0.03, 0.07), Link(1.25e9, 5e-4)
    topk = next(c for c in CANDIDATES if c.name == "top-k 1 %, feedback")
    codecs = {topk.name: FREE, "bf16": FREE}
    limit = crossover(topk, HALF, work, link, codecs, 64)
    assert limit < 0
    for bandwidth, pays in ((-limit / 1.1, False), (-limit * 1.1, True)):
        ours, theirs = (predict(c, work, Link(bandwidth, 5e-4), FREE, 64).seconds for c in (topk, HALF))
        assert (ours < theirs) is pays


def test_the_ranking_is_by_seconds() -> None:
    codecs = {c.name: FREE for c in CANDIDATES}
    ranked = rank_methods(Workload(NUMEL, 0.1, 0.2), Link(1e7, 1e-4), codecs, 2, CANDIDATES)
    assert [p.seconds for p in ranked] == sorted(p.seconds for p in ranked)
    assert len(ranked) == len(CANDIDATES)
    assert ranked[-1].candidate.text == "fp32"


@pytest.mark.parametrize("candidate", CANDIDATES, ids=lambda candidate: candidate.name)
def test_every_candidate_can_be_built(candidate: Candidate) -> None:
    from lightning_distopt import CompressedDDPStrategy  # noqa: F401  # the text below names it

    strategy = eval(candidate.arguments)
    assert repr(strategy.compressor) == repr(candidate.compressor)


def test_what_the_machine_cannot_do_at_once_is_not_hidden() -> None:
    # as above: four buckets of 0.03 each, of which 0.09 is hidden
    work = Workload(NUMEL, 0.1, 0.2, buckets=4)
    seconds = [predict(DENSE, work, Link(8e6 / 0.03, 0.0, overlap), FREE, 2).seconds for overlap in (1.0, 0.5, 0.0)]
    assert seconds == pytest.approx([0.33, 0.33 + 0.045, 0.42])


def test_measured_buckets_start_when_they_are_full() -> None:
    # a small one at once, and a large one at the end of backward, as in most networks
    work = Workload(NUMEL, 0.1, 0.2, cuts=((NUMEL // 8, 0.02), (NUMEL // 8 * 7, 0.2)))
    link = Link(4 * NUMEL / 0.08, 0.0)  # two ranks: 0.01 and 0.07
    assert predict(DENSE, work, link, FREE, 2).seconds == pytest.approx(0.3 + 0.07)


def test_buckets_are_cut_as_ddp_cuts_them() -> None:
    million = 1_000_000
    assert cut([million] * 9, [i / 10 for i in range(9)]) == ((million, 0.0), (7 * million, 0.7), (million, 0.8))


def test_low_ranks_send_two_thin_matrices_and_the_rest_whole() -> None:
    work = Workload(64 * 100 + 64, 0.1, 0.2, shapes=((64, 10, 10), (64,)))
    assert low_rank_numel(2, work) == (2 * 64 + 64, 2 * 100)
    low = Candidate("low", "powersgd:2", "gradients", residual=True)
    found = predict(low, work, Link(1e6, 1e-3), FREE, 4)
    assert found.nbytes == pytest.approx(2 * 3 / 4 * 4 * (192 + 200))
    assert found.seconds == pytest.approx(0.3 + 2 * 6e-3 + found.nbytes / 1e6)  # the second waits for the first


def test_votes_are_bits_on_few_ranks_and_bytes_on_many() -> None:
    vote = Candidate("vote", "signsgd", "gradients")
    work = Workload(NUMEL, 0.1, 0.2)
    assert predict(vote, work, Link(1e9, 0.0), FREE, 8).nbytes == pytest.approx(7 * NUMEL / 8)
    assert predict(vote, work, Link(1e9, 0.0), FREE, 64).nbytes == pytest.approx(2 * NUMEL * 63 / 64)
    assert rank_methods(work, Link(1e9, 0.0), {"vote": FREE}, 128, [vote]) == []


# ---- the choice ------------------------------------------------------------------------------------------------------

FREE_OF_ALL = {c.name: FREE for c in CANDIDATES}


def test_a_slow_link_is_worth_a_codec_and_a_fast_one_is_not() -> None:
    work = Workload(NUMEL, 0.03, 0.07)
    codecs = {c.name: CodecSpeed(1e-9, 1e-9) for c in CANDIDATES}
    slow, fast = (decide(work, Link(b, 1e-4), codecs, 2) for b in (1.25e7, 1.25e12))
    assert (slow.compressor, slow.error_feedback, slow.exchange) == ("qsgd:9", "none", "all_gather")
    assert fast.compressor == "bf16"


@pytest.mark.parametrize(("share", "compressor"), [(0.85, "qsgd:9"), (0.95, "bf16")])
def test_sixteen_bit_stays_unless_something_gains_the_margin(share: float, compressor: str) -> None:
    work = Workload(NUMEL, 0.0, 0.0)
    codecs = dict(FREE_OF_ALL)
    codecs["QSGD-9"] = CodecSpeed(share / NUMEL, 0.0)  # beside 1 second in 16 bit
    codecs["bf16"] = CodecSpeed(1.0 / NUMEL, 0.0)
    codecs["ORQ-9"] = codecs["fp32 (ddp)"] = CodecSpeed(2.0 / NUMEL, 0.0)
    assert decide(work, Link(1e18, 0.0), codecs, 2).compressor == compressor


def test_a_measured_baseline_counts_where_the_model_thinks_worse_of_it() -> None:
    work = Workload(NUMEL, 0.03, 0.07)
    chosen = decide(work, Link(1.25e7, 1e-4), FREE_OF_ALL, 2, measured=0.1)
    assert (chosen.compressor, chosen.baseline_seconds) == ("bf16", 0.1)


def test_only_what_has_evidence_is_chosen_and_the_rest_is_named() -> None:
    assert all(candidate.evidence for candidate in CANDIDATES)
    said = decide(Workload(NUMEL, 0.03, 0.07), Link(1.25e7, 1e-4), FREE_OF_ALL, 2).report
    assert "not chosen by itself: gradients-cifar10: 3 points below ddp" in said
    assert 'start one with `CompressedDDPStrategy("sign")`' in said
