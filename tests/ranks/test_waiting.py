"""Rank 0 works, the others wait: results, failures and requests to stop reach all of them."""

import time

from bigdet import distributed, messages
from bigdet.evaluation import waiting
from bigdet.evaluation.saved import SavedResults
from tests.spawn import run_ranks


def count_results():
    """Returns what a slow rank 0 found out, and how often this rank was asked to stop."""
    waiting.POLL_SECONDS = 0.05
    asked = []

    def must_stop():
        asked.append(None)
        return distributed.any_rank(False)

    def work():
        while len(asked) < 3:  # as long as it takes
            time.sleep(0.01)
        return {"rank": distributed.rank()}

    return waiting.work_on_main(work, must_stop), len(asked)


def stop_meanwhile():
    waiting.POLL_SECONDS = 0.05
    rounds = iter(range(100))

    def must_stop():  # rank 1 is asked in the third round
        return distributed.any_rank(distributed.rank() == 1 and next(rounds) == 2)

    return waiting.work_on_main(lambda: time.sleep(1.0), must_stop)


def fail():
    def work():
        raise ValueError("no such class")

    try:
        waiting.work_on_main(work, lambda: distributed.any_rank(False))
    except distributed.SharedError as error:
        return str(error)
    return None


def gather_in_parts(folder):
    messages.CHUNK_BYTES = 7  # several parts for each rank
    results = SavedResults(folder)
    for image in (5 - distributed.rank(), 20 + distributed.rank()):
        results.add(image, [{"image_id": image, "score": 0.1 * n} for n in range(image % 3)])
    results.gather()
    return results.image_ids(), list(results)


def all_of_it(folder):
    rank = distributed.rank()
    values = distributed.gather_objects(None if rank == 0 else rank)
    return count_results(), stop_meanwhile(), fail(), gather_in_parts(folder), values


def test_ranks_wait_without_a_long_collective_and_share_what_comes_out(tmp_path):
    first, second, third = run_ranks(all_of_it, 3, tmp_path, tmp_path / "waiting")
    for counted, stopped, message, *_ in (first, second, third):
        assert counted[0] == {"rank": 0}
        assert counted[1] >= 3  # they met again and again
        assert stopped is None
        assert message.startswith("rank 0: no such class. (ValueError from tests in ")
    assert (second[3], third[3]) == (([], []), ([], []))
    image_ids, results = first[3]
    assert image_ids == [3, 4, 5, 20, 21, 22]
    assert [result["image_id"] for result in results] == [4, 5, 5, 20, 20, 22]
    assert [result["score"] for result in results] == [0.0, 0.0, 0.1, 0.0, 0.1, 0.0]
    assert list((tmp_path / "waiting").iterdir()) == []  # nothing is left
    # Of the values None, 1 and 2: in order of rank, with None in its place.
    assert [values for *_, values in (first, second, third)] == [[None, 1, 2], [], []]
