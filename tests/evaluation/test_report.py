from math import nan

from diffusers_byoc.evaluation.report import in_words, summarize_folds


def test_folds_are_summed_up_by_mean_and_deviation_and_one_fold_by_its_interval():
    two = summarize_folds([{"a": 1.0, "b": nan}, {"a": 3.0, "b": nan}])
    assert two["a"] == {"mean": 2.0, "std": 2**0.5}
    assert in_words(two, "a", 10) == "20 ± 14.1" and in_words(two, "b", 1) == "–"
    assert in_words(two, "a", 1000) == "2000 ± 1410"
    same = summarize_folds([{"a": value} for value in (0.1, 0.1, 0.1 + 1e-16)])
    assert in_words(same, "a", 1) == "0.1 ± 0"
    one = summarize_folds([{"accuracy": 0.5, "accuracy_low": 0.25, "accuracy_high": 0.75, "other": 2.0}])
    assert in_words(one, "accuracy", 1) == "0.5 [0.25, 0.75]" and in_words(one, "other", 1) == "2"
