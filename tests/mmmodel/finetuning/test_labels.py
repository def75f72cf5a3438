"""Labels as users write them in KEY.json: what is understood, what is refused, and by whose name."""

import pytest
import torch

from mmmodel.configs import ConfigError
from mmmodel.features import Item
from mmmodel.finetuning import labels


def items(count):
    return [Item(f"k{i}", f"g{i // 2}", "xx", "c", "train", {"text": i, "image": i}) for i in range(count)]


def read(values, task, field="label"):
    return labels.read(
        items(len(values)), {f"k{i}": {field: v, "lang": "xx"} for i, v in enumerate(values)}, task, "label"
    )


def test_each_task_reads_its_kind():
    assert read(["cat", 3, True, None], "classification") == {"k0": "cat", "k1": "3", "k2": "True"}
    assert read(["cat", "", " "], "qa") == {"k0": "cat"}  # as tables are exported: blank is none, not a class
    assert read([["a", 2], [], ["b"]], "multilabel") == {"k0": ("a", "2"), "k1": (), "k2": ("b",)}
    assert read([1, 2.5, "3.5"], "regression") == {"k0": 1.0, "k1": 2.5, "k2": 3.5}


def test_of_a_column_that_came_as_text_the_cell_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="label 'label' of k2 is 'n/a', expected a number"):
        read(["1.6", "", "n/a", "3.1"], "regression")
    with pytest.raises(ConfigError, match="of k1 is '1_000', expected a number"):
        read(["1.6", "1_000"], "regression")


@pytest.mark.parametrize(
    ("task", "value", "expected"),
    [
        ("classification", 0.5, "a name or a whole number"),
        ("classification", ["a"], "a name or a whole number"),
        ("multilabel", "a b", "a list of names"),  # a string is a list of letters otherwise
        ("regression", "12 EUR", "a number"),
        ("regression", "nan", "a number"),
        ("regression", True, "a number"),
        ("regression", float("nan"), "a number"),
        ("regression", 10**400, "a number that is finite and that a float holds"),
        ("regression", "1" + 400 * "0", "a number"),
    ],
)
def test_a_label_of_another_kind_is_named(task, value, expected):
    with pytest.raises(ConfigError, match=f"label 'label' of k0 is .*, expected {expected}"):
        read([value], task)


def test_a_field_that_no_sample_has_names_those_there_are():
    with pytest.raises(ConfigError, match="no sample has a label 'label'; their fields are lang, other"):
        read([1, 2], "classification", field="other")


def test_targets():
    rule = labels.fit(["b", "a", "b"], "classification")
    assert rule.classes == ("a", "b")
    assert rule.encode(["b", "a", "new"]).tolist() == [1, 0, labels.UNSEEN]
    many = labels.fit([("a", "b"), ("c",)], "multilabel")
    assert many.encode([("c", "a"), (), ("new",)]).tolist() == [[1, 0, 1], [0, 0, 0], [0, 0, 0]]
    number = labels.fit([1.0, 3.0], "regression")
    torch.testing.assert_close(number.encode([1.0, 3.0, 2.0]), torch.tensor([[-1.0], [1.0], [0.0]]))


@pytest.mark.parametrize(
    ("values", "task", "shown"),
    [
        (["a", "a"], "classification", "a"),
        (["a", "a"], "retrieval", "a"),  # every answer would be right
        ([0.1] * 3, "regression", "0.1"),  # numpy's deviation of these is not quite 0
        ([(), ()], "multilabel", "empty"),
        ([("a", "b"), ("b", "a")], "multilabel", "a, b"),
    ],
)
def test_labels_with_nothing_to_learn_are_refused(values, task, shown):
    with pytest.raises(ConfigError, match=f"all {len(values)} training labels are {shown}, nothing to learn"):
        labels.fit(values, task)


def test_numbers_whose_deviation_is_none_are_refused():
    for values in ([1e300 * i for i in range(9)], [0.0, 5e-324]):
        with pytest.raises(ConfigError, match=r"go from 0 to .*, expected one that is finite and above 0; scale them"):
            labels.fit(values, "regression")


@pytest.mark.parametrize("task", ["classification", "multilabel", "regression", "retrieval"])
def test_no_labels_are_refused(task):
    with pytest.raises(ConfigError, match="there are 0 training labels, expected at least 2 that differ"):
        labels.fit([], task)


def test_labels_that_no_training_sample_has():
    rule = labels.fit(["a", "b"], "classification")
    assert labels.unseen(["a", "new", "b", "other"], rule) == ["new", "other"]
    many = labels.fit([("a", "b"), ("c",)], "multilabel")
    assert labels.unseen([("a",), (), ("b", "new", "newer")], many) == ["new"]
    assert labels.unseen([1.0], labels.fit([1.0, 3.0], "regression")) == []


def test_few_keeps_as_many_of_each_class_and_follows_the_seed():
    members = items(30)
    values = {item.key: "abc"[i % 3] if i < 28 else "rare" for i, item in enumerate(members)}
    kept = labels.few(members, values, 4, seed=0)
    assert sorted(values[item.key] for item in kept) == ["a"] * 4 + ["b"] * 4 + ["c"] * 4 + ["rare"] * 2
    assert kept == labels.few(members, values, 4, seed=0)
    assert kept != labels.few(members, values, 4, seed=1)


def test_one_of_a_group_and_some_modalities():
    assert [item.key for item in labels.first_of_groups(items(4))] == ["k0", "k2"]
    limited = labels.limited_to([*items(1), Item("t", "t", "", "", "train", {"text": 0})], ["image"])
    assert [(item.key, item.rows) for item in limited] == [("k0", {"image": 0})]
